"""What the commands print in the same way."""

from json import dumps
from typing import Any


def print_json(content: dict[str, Any]) -> None:
    """Print an object as a line of JSON, at once."""
    print(dumps(content, allow_nan=False), flush=True)
