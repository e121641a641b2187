"""Read where the tensors of a GGUF file lie, and what it says about its model, trusting nothing that it says.

Source: ``docs/gguf.md`` of the ggml project, versions 2 and 3, little endian.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from neutralize.checkpoint.blocks import TYPES, Blocks
from neutralize.checkpoint.bounded import TEXT_LIMIT
from neutralize.checkpoint.layout import Elements, Layout, Stored
from neutralize.checkpoint.region import Region
from neutralize.errors import NeutralizeError

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
"""The names of parts that a file was split into."""

MAGIC, MARK = b"GGUF", b"NTRL"
"""The file's first bytes, and those put over them while it is edited, so that no reader takes it."""

KIND = "GGUF"

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
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9

_DIMS_AT_MOST = 4
_NAME_BYTES = 1024
_KEY_BYTES = (1 << 16) - 1
_DEPTH = 4
_VALUES_AT_MOST = 1 << 21
"""Values in the metadata, those in arrays included; a vocabulary with merges has about a million."""


@dataclass(frozen=True)
class Gguf:
    """What a GGUF file says before its tensors begin.

    Attributes:
        path: the file.
        version: of the format.
        metadata: by key: numbers, strings, and lists of them.
        tensors: by name.
        spans: by key, the bytes of the file that hold it and its value, half open.
    """

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    spans: Mapping[str, tuple[int, int]]

    @property
    def architecture(self) -> str:
        """Which network the file is of, in the words of llama.cpp; empty if it does not say."""
        found = self.metadata.get("general.architecture")
        return found if isinstance(found, str) else ""


def read_gguf(path: Path) -> Layout:
    """Return the layout of one file.

    Args:
        path: the file; the layout's root is its folder.

    Raises:
        NeutralizeError: it cannot be read, or is no whole and consistent GGUF file.
    """
    return _layout(read_header(path))


def read_parts(paths: Sequence[Path]) -> list[Layout]:
    """Return the layouts of the parts that a file was split into; the first one says what there is to say.

    Args:
        paths: all of them, in order.

    Raises:
        NeutralizeError: one cannot be read, or they do not belong together.
    """
    headers = [read_header(path) for path in paths]
    tensors = sum(len(header.tensors) for header in headers)
    for number, header in enumerate(headers):
        wanted = {"split.no": number, "split.count": len(paths), "split.tensors.count": tensors}
        for key, value in wanted.items():
            if header.metadata.get(key) != value:
                raise NeutralizeError(
                    f"checkpoint: expected {key} {value} in {str(header.path)!r}, got {header.metadata.get(key)!r}; it "
                    "is no part of the files beside it: fetch them again"
                )
    return [_layout(header) for header in headers]


def _layout(header: Gguf) -> Layout:
    name = header.path.name
    return Layout(header.path.parent, (name,), header.tensors, {name: (0, MARK)}, KIND)


def read_header(path: Path) -> Gguf:
    """Return what a file says about its model, and where its tensors are.

    Args:
        path: the file.

    Raises:
        NeutralizeError: it cannot be read, or is no whole and consistent GGUF file.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file).header()
    except OSError as error:
        raise NeutralizeError(
            f"checkpoint: expected a file that can be read, got {error.strerror or error} for {str(path)!r}; check it"
        ) from error


class _Reader:
    """Reads a header; every count is compared with the bytes that are left before it is believed."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        self._place = 0
        self._values = 0

    def header(self) -> Gguf:
        magic = self._take(4, "the magic")
        if magic == MARK:
            raise NeutralizeError(
                f"checkpoint: expected a finished file, got {str(self._path)!r}, in which an edit was cut off; run: "
                "neutralize restore"
            )
        if magic != MAGIC:
            raise self._broken(f"{magic!r}", "'GGUF' as its first bytes")
        version = self._number("I", "the version")
        if version & 0xFFFF == 0 and version:
            raise NeutralizeError(
                f"checkpoint: expected little endian for {str(self._path)!r}, got a big-endian GGUF file; convert it "
                "with gguf_convert_endian of the gguf package"
            )
        if version not in (2, 3):
            raise NeutralizeError(
                f"checkpoint: expected GGUF version 2 or 3 for {str(self._path)!r}, got {version}; convert the model "
                "again with a current llama.cpp"
            )
        tensors, entries = self._number("Q", "the number of tensors"), self._number("Q", "the number of keys")
        # The least that one takes: a key of no characters and a byte; a name, a dimension, a type and an offset.
        self._check_count(entries, 13, "keys")
        metadata, spans = self._metadata(entries)
        self._check_count(tensors, 24, "tensors")
        infos = self._infos(tensors)
        alignment = self._alignment(metadata)
        begin = -(-self._place // alignment) * alignment
        return Gguf(self._path, version, metadata, self._placed(infos, begin, alignment), spans)

    def _metadata(self, entries: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
        found: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(entries):
            begin = self._place
            key = self._string(_KEY_BYTES, "a key")
            if key in found:
                raise self._broken(f"the key {key[:80]!r} twice", "each key once")
            kind = self._number("I", f"the type of {key[:80]!r}")
            found[key] = self._value(kind, key[:80], 0)
            if key == "general.alignment" and kind != _UINT32:
                raise self._broken(f"general.alignment of type {kind}", "a 32-bit number")
            spans[key] = begin, self._place
        return found, spans

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment: int = metadata.get("general.alignment", 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise self._broken(f"general.alignment {alignment}", "a power of two")
        return alignment

    def _value(self, kind: int, key: str, depth: int) -> Any:
        self._count_values(1)
        if kind == _STRING:
            return self._string(TEXT_LIMIT, f"the value of {key!r}")
        if kind == _ARRAY:
            return self._array(key, depth + 1)
        if kind not in _SCALARS:
            raise self._broken(f"a value of type {kind} for {key!r}", "a type from 0 to 12")
        return self._scalars(kind, 1, key)[0]

    def _array(self, key: str, depth: int) -> list[Any]:
        if depth > _DEPTH:
            raise self._broken(f"arrays in arrays without end for {key!r}", f"{_DEPTH} levels at most")
        kind, count = self._number("I", f"the type of {key!r}"), self._number("Q", f"the length of {key!r}")
        if kind in _SCALARS:
            self._check_count(count, struct.calcsize(f"<{_SCALARS[kind]}"), f"values of {key!r}")
            self._count_values(count)
            return self._scalars(kind, count, key)
        self._check_count(count, 8 if kind == _STRING else 12, f"values of {key!r}")
        if count > _VALUES_AT_MOST:
            self._count_values(count)
        return [self._value(kind, key, depth) for _ in range(count)]

    def _scalars(self, kind: int, count: int, key: str) -> list[Any]:
        code = f"<{count}{_SCALARS[kind]}"
        found = list(struct.unpack(code, self._take(struct.calcsize(code), f"the value of {key!r}")))
        if kind != _BOOL:
            return found
        if not set(found) <= {0, 1}:
            raise self._broken(f"a truth value other than 0 and 1 for {key!r}", "one of them")
        return [bool(value) for value in found]

    def _infos(self, tensors: int) -> list[tuple[str, tuple[int, ...], int, int]]:
        """Name, shape as torch has it, type and offset of each tensor."""
        found = []
        names: set[str] = set()
        for _ in range(tensors):
            name = self._string(_NAME_BYTES, "the name of a tensor")
            if name in names:
                raise self._broken(f"two tensors {name[:80]!r}", "each name once")
            names.add(name)
            rank = self._number("I", f"the rank of {name[:80]!r}")
            if rank > _DIMS_AT_MOST:
                raise self._broken(f"{rank} dimensions for {name[:80]!r}", f"{_DIMS_AT_MOST} at most")
            shape = struct.unpack(f"<{rank}Q", self._take(8 * rank, f"the shape of {name[:80]!r}"))[::-1]
            kind, offset = self._number("I", f"the type of {name[:80]!r}"), self._number("Q", "an offset")
            if any(size >= 1 << 63 for size in shape):
                raise self._broken(f"the sizes {list(shape)} of {name[:80]!r}", "sizes below 2^63")
            found.append((name, shape, kind, offset))
        return found

    def _placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], begin: int, alignment: int
    ) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        spans: list[tuple[int, int, str]] = []
        for name, shape, kind, offset in infos:
            shown = repr(name[:80])
            nbytes = self._nbytes(shown, shape, kind)
            first = begin + offset
            if offset % alignment:
                raise self._broken(f"{shown} at {offset}", f"a multiple of {alignment}")
            if first + nbytes > self._size:
                raise self._broken(f"{shown} up to byte {first + nbytes}", f"{self._size} bytes")
            if kind in _DTYPES:
                found[name] = Elements.whole(name, _DTYPES[kind], shape, self._path.name, first)
            else:
                found[name] = Blocks(name, TYPES[kind], shape, Region.run(self._path.name, first, nbytes))
            if nbytes:
                spans.append((first, first + nbytes, shown))
        spans.sort()
        for (_, end, one), (first, _, other) in itertools.pairwise(spans):
            if first < end:
                raise self._broken(f"{one} and {other} over each other", "tensors with bytes of their own")
        return found

    def _nbytes(self, shown: str, shape: tuple[int, ...], kind: int) -> int:
        """How many bytes a tensor has; the product is taken of at most four numbers of 64 bits."""
        numel = math.prod(shape)
        if kind in _DTYPES:
            return numel * _DTYPES[kind].itemsize
        if kind not in TYPES:
            known = ", ".join([*(str(dtype).removeprefix("torch.") for dtype in _DTYPES.values()), "and the quantized"])
            raise NeutralizeError(
                f"checkpoint: expected a type of ggml that files have for {shown} in {str(self._path)!r} ({known}), "
                f"got number {kind}; convert the model again with a current llama.cpp"
            )
        block = TYPES[kind]
        if not shape or shape[-1] % block.size:
            raise self._broken(f"rows of {shape[-1] if shape else 1} in {shown}", f"blocks of {block.size} whole")
        return numel // block.size * block.nbytes

    # ---- bytes ------------------------------------------------------------------------------------------------------
    def _string(self, limit: int, what: str) -> str:
        length = self._number("Q", f"the length of {what}")
        if length > limit:
            raise self._broken(f"{length} bytes for {what}", f"{limit} at most")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._broken(f"{what} that is no UTF-8", "text") from error

    def _number(self, code: str, what: str) -> int:
        found: int = struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}"), what))[0]
        return found

    def _take(self, count: int, what: str) -> bytes:
        if count > self._size - self._place:
            raise self._broken(f"its end at {self._size}", f"{count} bytes for {what} at {self._place}")
        if self._place + count > TEXT_LIMIT:
            raise self._broken("a longer header", f"one of {TEXT_LIMIT} bytes at most")
        found = self._file.read(count)
        if len(found) != count:
            raise self._broken(f"its end at {self._place + len(found)}", f"{count} bytes for {what} at {self._place}")
        self._place += count
        return found

    def _check_count(self, count: int, least: int, what: str) -> None:
        left = self._size - self._place
        if count * least > left:
            raise self._broken(f"{count} {what}", f"what {left} bytes can hold")

    def _count_values(self, count: int) -> None:
        self._values += count
        if self._values > _VALUES_AT_MOST:
            raise self._broken("more values in its metadata", f"{_VALUES_AT_MOST} at most")

    def _broken(self, got: str, expected: str) -> NeutralizeError:
        return NeutralizeError(
            f"checkpoint: expected {expected} in {str(self._path)!r}, got {got}; it was cut off or damaged: fetch it "
            "again"
        )
