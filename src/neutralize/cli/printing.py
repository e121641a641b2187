"""What the commands print in the same way."""

import shlex
import sys
from json import dumps
from typing import Any


def print_json(content: dict[str, Any]) -> None:
    """Print an object as a line of JSON, at once."""
    print(dumps(content, allow_nan=False), flush=True)


def command_line() -> str:
    """Return the command that is running, as one would type it."""
    return shlex.join(["neutralize", *sys.argv[1:]])


def printable(text: str) -> str:
    """Return text from a file as it can be shown: what moves the cursor of a terminal or colours it is written out."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
