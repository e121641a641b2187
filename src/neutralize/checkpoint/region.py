"""Regions: rows of bytes in a file, and the handles that read and write them.

Everything that is done to a checkpoint is done to regions: what an edit writes, what its undo holds, what is compared.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neutralize.errors import NeutralizeError
from neutralize.progress import Advance, silent

BUFFER_BYTES = 8 << 20
"""How much of a file is held in memory at a time."""

_SPAN_GAP = 4096
"""Rows whose gaps are smaller than this are read and written together with the gaps: a system call costs more."""


_OPEN_LIMIT = 256
"""How many files are open at a time: a sharded checkpoint can have more than a process may open."""


@dataclass(frozen=True)
class Region:
    """Rows of bytes in a file: row ``r`` is ``width`` bytes from ``offset + r * stride``.

    Attributes:
        file: path relative to the checkpoint's root.
        offset: of the first byte, from the start of the file.
        rows: how many.
        width: bytes per row.
        stride: bytes from the start of one row to the next, at least ``width``.
    """

    file: str
    offset: int
    rows: int
    width: int
    stride: int

    @staticmethod
    def run(file: str, offset: int, nbytes: int) -> Region:
        """One run of bytes."""
        return Region(file, offset, 1, nbytes, nbytes)

    @property
    def nbytes(self) -> int:
        """How many bytes the rows have together."""
        return self.rows * self.width

    @property
    def end(self) -> int:
        """The offset past the last byte."""
        return self.offset + (self.rows - 1) * self.stride + self.width if self.rows and self.width else self.offset

    @property
    def is_run(self) -> bool:
        """Whether the rows follow each other without gaps."""
        return self.rows <= 1 or self.stride == self.width

    def chunks(self, limit: int = BUFFER_BYTES) -> Iterator[tuple[int, int, int, int]]:
        """Yield row ranges and byte ranges inside the rows (first row, past the last, first byte, past the last).

        Each chunk has at most ``limit`` bytes, the gaps that are read and written with it among them, and takes whole
        rows wherever one row is not too long.
        """
        if self.nbytes == 0:
            return
        if self.width <= limit:
            reach = self.stride if self.stride - self.width <= _SPAN_GAP else self.width
            at_once = max(1, limit // reach)
            for first in range(0, self.rows, at_once):
                yield first, min(first + at_once, self.rows), 0, self.width
            return
        for row in range(self.rows):
            for first in range(0, self.width, limit):
                yield row, row + 1, first, min(first + limit, self.width)

    def part(self, first: int, last: int, begin: int, end: int) -> Region:
        """Rows ``first`` to ``last`` and of each the bytes ``begin`` to ``end``, both half open."""
        offset = self.offset + first * self.stride + begin
        if begin == 0 and end == self.width and self.is_run:  # rows that follow each other are one run
            return Region.run(self.file, offset, (last - first) * self.width)
        return Region(self.file, offset, last - first, end - begin, self.stride)


class Reach:
    """What regions reach over: for each file all bytes from the first to the last of each, those between rows too."""

    def __init__(self, regions: Iterable[Region]) -> None:
        """Join what meets.

        Args:
            regions: in any order.
        """
        self._starts: dict[str, list[int]] = {}
        self._ends: dict[str, list[int]] = {}
        for file, offset, end in sorted((region.file, region.offset, region.end) for region in regions):
            starts, ends = self._starts.setdefault(file, []), self._ends.setdefault(file, [])
            if ends and offset <= ends[-1]:
                ends[-1] = max(ends[-1], end)
            elif offset < end:
                starts.append(offset)
                ends.append(end)

    def meets(self, region: Region) -> bool:
        """Whether they reach over a byte that a region reaches over."""
        place = bisect.bisect_right(self._ends.get(region.file, []), region.offset)
        starts = self._starts.get(region.file, [])
        return place < len(starts) and starts[place] < region.end


@dataclass(frozen=True)
class Tile:
    """A box of a matrix of bytes that lies in a region.

    Attributes:
        region: one row of the box per row.
        row: the row of the matrix that its first row is in.
        begin: the byte of those rows that its first byte is.
    """

    region: Region
    row: int
    begin: int


@dataclass(frozen=True)
class Tiles:
    """A matrix of bytes that lies in several regions, as the shards of a tensor do.

    Attributes:
        rows: how many.
        width: bytes per row.
        tiles: boxes that cover it once.
    """

    rows: int
    width: int
    tiles: tuple[Tile, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes the rows have together."""
        return self.rows * self.width

    @property
    def regions(self) -> tuple[Region, ...]:
        """Those of its tiles."""
        return tuple(tile.region for tile in self.tiles)

    def block(self, first: int, last: int, begin: int, end: int) -> Tiles:
        """Rows ``first`` to ``last`` and of each the bytes ``begin`` to ``end``, both half open, as a matrix."""
        tiles = []
        for tile in self.tiles:
            region = tile.region
            top, bottom = max(first, tile.row), min(last, tile.row + region.rows)
            left, right = max(begin, tile.begin), min(end, tile.begin + region.width)
            if top < bottom and left < right:
                offset = region.offset + (top - tile.row) * region.stride + left - tile.begin
                box = Region(region.file, offset, bottom - top, right - left, region.stride)
                tiles.append(Tile(box, top - first, left - begin))
        return Tiles(last - first, end - begin, tuple(tiles))

    def read(self, files: Files) -> torch.Tensor:
        """Return its bytes, (rows, width), uint8, held in memory."""
        if len(self.tiles) == 1:
            return files.read(self.tiles[0].region)
        out = torch.empty(self.rows, self.width, dtype=torch.uint8)
        for tile in self.tiles:
            self._box(out, tile).copy_(files.read(tile.region))
        return out

    def write(self, files: Files, data: torch.Tensor) -> None:
        """Write its bytes.

        Args:
            files: where.
            data: (rows, width), uint8, contiguous.
        """
        for tile in self.tiles:
            files.write(tile.region, self._box(data, tile).contiguous())

    @staticmethod
    def _box(data: torch.Tensor, tile: Tile) -> torch.Tensor:
        region = tile.region
        return data[tile.row : tile.row + region.rows, tile.begin : tile.begin + region.width]


class Files:
    """Open files of a checkpoint, by their path relative to its root; the one place that writes into them.

    Use it as a context manager: the files are closed at its end.
    """

    def __init__(self, root: Path, *, writable: bool = False) -> None:
        """Open nothing yet.

        Args:
            root: the folder that file names are relative to.
            writable: open files for writing too, following no link.
        """
        self.root = root
        self._writable = writable
        self._open: dict[str, int] = {}

    def __enter__(self) -> Files:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def descriptor(self, file: str) -> int:
        """Return the descriptor of a file, opened at its first use; use it before the next one is asked for.

        Raises:
            OSError: it cannot be opened.
        """
        if file not in self._open:
            if len(self._open) >= _OPEN_LIMIT:
                os.close(self._open.pop(next(iter(self._open))))
            flags = os.O_RDWR | os.O_NOFOLLOW if self._writable else os.O_RDONLY
            self._open[file] = os.open(self.root / file, flags | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe: waits for none
        return self._open[file]

    def size(self, file: str) -> int:
        """Return the size of a file in bytes."""
        return os.fstat(self.descriptor(file)).st_size

    def read(self, region: Region) -> torch.Tensor:
        """Return the bytes of a region, (rows, width), uint8; keep regions small, as this holds them in memory.

        Raises:
            NeutralizeError: the file ends before the region does.
            OSError: reading failed.
        """
        out = torch.empty(region.rows, region.width, dtype=torch.uint8)
        if region.nbytes == 0:
            return out
        if region.is_run:
            self._read_into(region.file, region.offset, out.view(-1))
        elif region.stride - region.width <= _SPAN_GAP:
            out.copy_(_rows_of(region, self._span(region)))
        else:
            for row in range(region.rows):
                self._read_into(region.file, region.offset + row * region.stride, out[row])
        return out

    def write(self, region: Region, data: torch.Tensor) -> None:
        """Write bytes into a region.

        Args:
            region: where.
            data: (rows, width), uint8, contiguous.

        Raises:
            OSError: writing failed; part of the region may have been written.
        """
        if region.nbytes == 0:
            return
        if region.is_run:
            self._write_from(region.file, region.offset, data.view(-1))
        elif region.stride - region.width <= _SPAN_GAP:
            span = self._span(region)
            _rows_of(region, span).copy_(data)
            self._write_from(region.file, region.offset, span)
        else:
            for row in range(region.rows):
                self._write_from(region.file, region.offset + row * region.stride, data[row])

    def zero(self, region: Region) -> None:
        """Write zeros into a region, without passing them through memory where the file system can do that.

        The blocks stay allocated (``FALLOC_FL_ZERO_RANGE``, not a hole), so that putting the old bytes back can never
        find the disk full.
        """
        if region.is_run and region.nbytes >= 1 << 16 and self._zero_range(region):
            return
        for chunk in region.chunks():
            part = region.part(*chunk)
            self.write(part, torch.zeros(part.rows, part.width, dtype=torch.uint8))

    def digest(self, region: Region, advance: Advance = silent) -> str:
        """Return the SHA-256 of a region's bytes, hexadecimal; a piece of it is held in memory at a time.

        Args:
            region: what.
            advance: told the bytes as they are read.
        """
        hasher = hashlib.sha256()
        for chunk in region.chunks():
            data = memory(self.read(region.part(*chunk)).view(-1))
            hasher.update(data)
            advance(len(data))
        return hasher.hexdigest()

    def sync(self, file: str) -> None:
        """Return when what was written into a file is on the disk."""
        os.fsync(self.descriptor(file))

    def _span(self, region: Region) -> torch.Tensor:
        span = torch.empty(region.end - region.offset, dtype=torch.uint8)
        self._read_into(region.file, region.offset, span)
        return span

    def _read_into(self, file: str, offset: int, out: torch.Tensor) -> None:
        view = memory(out)
        while view:
            count = os.preadv(self.descriptor(file), [view], offset)
            if count == 0:
                raise NeutralizeError(
                    f"checkpoint: expected {file!r} to hold {len(view)} more bytes at {offset}, got its end; it was "
                    "truncated: fetch it again"
                )
            view, offset = view[count:], offset + count

    def _write_from(self, file: str, offset: int, data: torch.Tensor) -> None:
        view = memory(data)
        while view:
            count = os.pwritev(self.descriptor(file), [view], offset)
            view, offset = view[count:], offset + count

    def _zero_range(self, region: Region) -> bool:
        zero_range = _fallocate()
        return zero_range is not None and zero_range(self.descriptor(region.file), region.offset, region.nbytes)


def memory(data: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor, which lives as long as the view."""
    if not data.numel():
        return memoryview(b"")
    array = (ctypes.c_ubyte * data.numel()).from_address(data.data_ptr())
    array.owner = data  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def _rows_of(region: Region, span: torch.Tensor) -> torch.Tensor:
    return span.as_strided((region.rows, region.width), (region.stride, 1))


@functools.cache
def _fallocate() -> Callable[[int, int, int], bool] | None:
    """What zeroes a range of a file on Linux and says whether it did, or ``None`` elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError, AttributeError):
        function: Any = ctypes.CDLL(None, use_errno=True).fallocate64
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

        def zero_range(descriptor: int, offset: int, nbytes: int) -> bool:
            if function(descriptor, 0x11, offset, nbytes) == 0:  # FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
                return True
            error = ctypes.get_errno()
            if error in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EINTR):
                return False
            raise OSError(error, os.strerror(error))

        return zero_range
    return None
