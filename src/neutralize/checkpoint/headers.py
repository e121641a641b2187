"""Headers: which tensors the files of a checkpoint hold, told without PyTorch, which takes seconds to import.

Source: the format's description in the README of the safetensors project: eight bytes of header length, little endian,
a JSON header, and the tensors without holes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neutralize.checkpoint.bounded import TEXT_LIMIT, parse_json, read_json
from neutralize.errors import NeutralizeError

MARK = b"UNDO-ME!"
"""Put over the header's length while a file is edited: as a number larger than any file, so that no reader takes it."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its tensors begin.

    Attributes:
        entries: by name, as they stand there; and the metadata.
        begin: where the tensors begin.
        size: of the file.
    """

    entries: dict[str, Any]
    begin: int
    size: int


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file; what stands in it is not checked.

    Args:
        path: the file.

    Raises:
        NeutralizeError: it cannot be read, or has no whole header.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == MARK:
                raise NeutralizeError(
                    f"checkpoint: expected a finished file, got {str(path)!r}, in which an edit was cut off; run: "
                    "neutralize restore"
                )
            if len(start) < 8:
                raise broken(path, f"{size} bytes", "the eight bytes of a header's length")
            if length > size - 8:
                raise broken(path, f"a header of {length} bytes", f"one that fits into {size} bytes")
            if length > TEXT_LIMIT:
                raise broken(path, f"a header of {length} bytes", f"{TEXT_LIMIT} at most")
            text = file.read(length)
    except OSError as error:
        raise NeutralizeError(
            f"checkpoint: expected a file that can be read, got {error.strerror or error} for {str(path)!r}; check it"
        ) from error
    return Header(parse_json(text, f"the header of {str(path)!r}"), 8 + length, size)


def read_weight_map(index: Path) -> dict[str, str]:
    """Return what an index of shards says: the file of each tensor, by its name.

    Raises:
        NeutralizeError: it cannot be read, or says nothing of the kind.
    """
    found = read_json(index, "an index").get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise NeutralizeError(
            f"checkpoint: expected a weight_map of tensor names to files in {str(index)!r}, got none; fetch it again"
        )
    return found


def stored_names(path: Path) -> list[str] | None:
    """Return the names of the tensors in a safetensors file or in a folder with an index or such files.

    Args:
        path: the file or folder.

    Returns:
        The names in the order of the headers, or ``None`` if it is something else.

    Raises:
        NeutralizeError: a header or an index is damaged.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    indices = [file for file in files if file.name.endswith(".index.json")]
    if indices:
        return [name for index in indices for name in read_weight_map(index)]
    found = [file for file in files if file.suffix.lower() == ".safetensors"]
    names = [name for file in found for name in read_header(file).entries if name != "__metadata__"]
    return names if found else None


def broken(path: Path, got: str, expected: str) -> NeutralizeError:
    """Return the error for a file that is not what its name says."""
    return NeutralizeError(
        f"checkpoint: expected {expected} in {str(path)!r}, got {got}; it was cut off or damaged: fetch it again"
    )
