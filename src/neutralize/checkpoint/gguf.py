"""Read where the tensors of a GGUF file lie, trusting nothing that it says.

Source: the format's description in the documentation of ggml (``docs/gguf.md``), versions 2 and 3.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from neutralize.checkpoint.blocks import FORMATS, Blocks
from neutralize.checkpoint.layout import Elements, Layout, Listed, Stored
from neutralize.checkpoint.region import Region
from neutralize.errors import NeutralizeError

MARK = b"NTRL"
"""Put over the file's magic while it is edited, so that no reader takes it."""

_MAGIC = b"GGUF"
_TEXT_LIMIT = 1 << 24
_TENSOR_LIMIT = 1 << 20
_VALUE_LIMIT = 1 << 26
"""Bytes that all metadata may take: a vocabulary of 256,000 words with scores has some 10 MB."""

_DEPTH_LIMIT = 4
_SCALARS = {
    0: ("B", 1), 1: ("b", 1), 2: ("H", 2), 3: ("h", 2), 4: ("I", 4), 5: ("i", 4), 6: ("f", 4), 7: ("?", 1),
    10: ("Q", 8), 11: ("q", 8), 12: ("d", 8),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_DTYPES = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
        metadata: by key; of arrays only their length, as ``(length,)``.
        tensors: name, sizes (the fastest dimension first, as ggml has them), ggml type and offset in the data.
        data: where the data begin in the file.
        size: of the file.
    """

    metadata: dict[str, Any]
    tensors: tuple[tuple[str, tuple[int, ...], int, int], ...]
    data: int
    size: int


def read_gguf(path: Path) -> Layout:
    """Return the layout of one file; shapes are those of torch, the fastest dimension last.

    Args:
        path: the file; the layout's root is its folder.

    Raises:
        NeutralizeError: it cannot be read, or is no whole and consistent GGUF file.
    """
    header = read_header(path)
    found: dict[str, Stored] = {}
    spans = []
    for name, sizes, kind, offset in header.tensors:
        stored, nbytes = _stored(path, name, sizes, kind, header.data + offset)
        if header.data + offset + nbytes > header.size:
            raise _broken(path, f"{nbytes} bytes of {name[:200]!r} at {offset}", f"a file of {header.size} bytes")
        found[name] = stored
        spans.append((offset, offset + nbytes, name))
    spans.sort()
    for (_, end, _), (begin, _, name) in itertools.pairwise(spans):
        if begin < end:
            raise _broken(path, f"tensors that overlap at {name[:200]!r}", "tensors one after the other")
    ordered = {name: found[name] for _, _, name in spans}
    return Layout(path.parent, (path.name,), ordered, {path.name: (0, MARK)}, "GGUF")


def read_header(path: Path) -> Header:
    """Return what a GGUF file says of itself.

    Raises:
        NeutralizeError: see ``read_gguf``.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file, os.fstat(file.fileno()).st_size).header()
    except OSError as error:
        raise NeutralizeError(
            f"checkpoint: expected a file that can be read, got {error.strerror or error} for {str(path)!r}; check it"
        ) from error


class _Reader:
    """Reads values in order, none past the file's end, all together no more than a bound."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.left = _VALUE_LIMIT

    def header(self) -> Header:
        magic = self.file.read(4)
        if magic == MARK:
            raise NeutralizeError(
                f"checkpoint: expected a finished file, got {str(self.path)!r}, in which an edit was cut off; run: "
                "neutralize restore"
            )
        if magic != _MAGIC:
            raise _broken(self.path, "another first word", "GGUF")
        version = self.number("I")
        if version not in (2, 3):
            what = "big-endian numbers" if version in (2 << 24, 3 << 24) else f"version {version}"
            raise _broken(self.path, what, "version 2 or 3, little endian")
        count, keys = self.number("Q"), self.number("Q")
        if count > min(_TENSOR_LIMIT, self.size // 24) or keys > min(_TENSOR_LIMIT, self.size // 13):
            raise _broken(self.path, f"{count} tensors and {keys} keys", f"no more than {self.size} bytes hold")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.text()
            if key in metadata:
                raise _broken(self.path, f"the key {key[:80]!r} twice", "each key once")
            metadata[key] = self.value(self.number("I"), 0)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _broken(self.path, f"the alignment {str(alignment)[:40]}", "a power of two")
        tensors, names = [], set()
        for _ in range(count):
            name = self.text()
            if name in names:
                raise _broken(self.path, f"the tensor {name[:80]!r} twice", "each tensor once")
            names.add(name)
            dims = self.number("I")
            if dims > 8:
                raise _broken(self.path, f"{dims} dimensions of {name[:80]!r}", "8 at most")
            sizes = tuple(self.number("Q") for _ in range(dims))
            kind, offset = self.number("I"), self.number("Q")
            if offset % alignment:
                raise _broken(self.path, f"the offset {offset} of {name[:80]!r}", f"a multiple of {alignment}")
            tensors.append((name, sizes, kind, offset))
        place = self.file.tell()
        return Header(metadata, tuple(tensors), -(-place // alignment) * alignment, self.size)

    def take(self, nbytes: int) -> bytes:
        if nbytes > self.left:
            raise _broken(self.path, "more metadata than that", f"{_VALUE_LIMIT} bytes of metadata at most")
        self.left -= nbytes
        found = self.file.read(nbytes)
        if len(found) != nbytes:
            raise _broken(self.path, "its end", "more metadata")
        return found

    def number(self, kind: str) -> int:
        found: int = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]
        return found

    def text(self) -> str:
        length = self.number("Q")
        if length > min(_TEXT_LIMIT, self.size):
            raise _broken(self.path, f"a text of {length} bytes", f"{_TEXT_LIMIT} at most")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise _broken(self.path, "a text that is no UTF-8", "UTF-8") from error

    def value(self, kind: int, depth: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind][0])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth >= _DEPTH_LIMIT:
            raise _broken(self.path, f"a value of type {kind} at depth {depth}", "numbers, texts and arrays of them")
        inner, length = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.skip(length * _SCALARS[inner][1])
            return (length,)
        if length > self.size:
            raise _broken(self.path, f"an array of {length}", f"no more than {self.size} bytes hold")
        for _ in range(length):
            if inner == _STRING:
                self.skip(self.number("Q"))
            else:
                self.value(inner, depth + 1)
        return (length,)

    def skip(self, nbytes: int) -> None:
        """Pass over bytes that are not needed: each counts as one byte in 16 towards the bound."""
        place = self.file.tell()
        if nbytes > self.size - place:
            raise _broken(self.path, "its end", "more metadata")
        self.left -= nbytes // 16
        if self.left < 0:
            raise _broken(self.path, "more metadata than that", f"{_VALUE_LIMIT} bytes of metadata at most")
        self.file.seek(place + nbytes)


def _stored(path: Path, name: str, sizes: tuple[int, ...], kind: int, offset: int) -> tuple[Stored, int]:
    """A tensor, and how many bytes it has."""
    shape = tuple(reversed(sizes))
    numel = math.prod(shape)
    if kind in _DTYPES:
        nbytes = numel * _DTYPES[kind].itemsize
        return Elements.whole(name, _DTYPES[kind], shape, path.name, offset), nbytes
    known = FORMATS.get(kind)
    if known is None:
        raise _broken(path, f"the type {kind} of {name[:200]!r}", "a type of ggml that is known")
    if not sizes or sizes[0] % known.numel:
        raise _broken(path, f"rows of {sizes[0] if sizes else 0} in {name[:200]!r}", f"blocks of {known.numel}")
    nbytes = numel // known.numel * known.nbytes
    region = Region.run(path.name, offset, nbytes)
    if known.is_listed:
        return Listed(name, known.name, shape, (region,), "edit the norm before it"), nbytes
    return Blocks(name, known, shape, region), nbytes


def _broken(path: Path, got: str, expected: str) -> NeutralizeError:
    return NeutralizeError(
        f"checkpoint: expected {expected} in {str(path)!r}, got {got}; it was cut off or damaged: fetch it again"
    )
