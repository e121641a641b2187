"""JSON that anybody may have written: bounded in size and memory, no key twice, one kind of error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neutralize.errors import NeutralizeError

TEXT_LIMIT = 64 << 20
"""Bytes of JSON that are read at all; the header of a checkpoint of 100,000 tensors has some 15 MB."""

_OBJECT_LIMIT = 1 << 30
"""Bytes of memory that the parsed objects may take, by a generous estimate."""


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: the file.
        what: names it in messages.

    Raises:
        NeutralizeError: it cannot be read, is too large, or is no JSON object.
    """
    if path.exists() and not path.is_file():
        raise NeutralizeError(f"checkpoint: expected {what} in {str(path)!r}, got no file; fetch it again")
    try:
        with path.open("rb") as file:
            text = file.read(TEXT_LIMIT + 1)
    except OSError as error:
        raise NeutralizeError(
            f"checkpoint: expected {what} in {str(path)!r}, got {error.strerror or error}; check the path"
        ) from error
    return parse_json(text, f"{what} in {str(path)!r}")


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """Return the object that bytes of JSON hold.

    Raises:
        NeutralizeError: they are too many, no JSON, no object, nested without end, or name a key twice.
    """
    if len(text) > TEXT_LIMIT:
        raise NeutralizeError(
            f"checkpoint: expected at most {TEXT_LIMIT} bytes of JSON for {what}, got more; it is no such file"
        )
    estimate = 300 * text.count(b"{") + 100 * text.count(b"[") + 60 * text.count(b",") + 2 * len(text)
    if estimate > _OBJECT_LIMIT:
        raise NeutralizeError(
            f"checkpoint: expected JSON that takes less than {_OBJECT_LIMIT >> 20} MiB of memory for {what}, got more "
            "objects than that; it is no such file"
        )
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        about = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise NeutralizeError(
            f"checkpoint: expected JSON for {what}, got text that is none ({about}); fetch it again"
        ) from error
    if not isinstance(found, dict):
        raise NeutralizeError(
            f"checkpoint: expected a JSON object for {what}, got a {type(found).__name__}; fetch it again"
        )
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return found
