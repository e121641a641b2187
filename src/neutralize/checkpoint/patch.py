"""Patches: an edit of a stored tensor as what it does to regions of files, with memory bounded."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from neutralize import ops
from neutralize.checkpoint.region import BUFFER_BYTES, Files, Region, Tiles, memory


class Patch(Protocol):
    """What an edit does to the bytes of a checkpoint."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """All that it may write."""
        ...

    def run(self, files: Files) -> Iterable[int]:
        """Read what is needed, and write; yields how many bytes were done, piece by piece."""
        ...


@dataclass(frozen=True)
class Affine:
    """The affine rewrite ``W <- scale * W + diagonal * D + fill`` of a matrix whose rows lie in a region.

    Attributes:
        region: one row of the matrix per row.
        dtype: of the elements.
        scale, diagonal, fill, start, step: see ``neutralize.ops.rewrite_``.
    """

    region: Region
    dtype: torch.dtype
    scale: float = 0.0
    diagonal: float = 0.0
    fill: float = 0.0
    start: int = 0
    step: int = 1

    @property
    def regions(self) -> tuple[Region, ...]:
        """The matrix."""
        return (self.region,)

    def run(self, files: Files) -> Iterable[int]:
        """Rewrite piece by piece; with a scale of 0 nothing is read."""
        if self.scale == self.diagonal == self.fill == 0 and math.copysign(1.0, self.fill) > 0:
            files.zero(self.region)
            yield self.region.nbytes
            return
        size = self.dtype.itemsize
        for first, last, begin, end in self.region.chunks(BUFFER_BYTES // size * size):
            part = self.region.part(first, last, begin, end)
            data = files.read(part) if self.scale else torch.empty(part.rows, part.width, dtype=torch.uint8)
            matrix = data.view(-1).view(self.dtype).view(last - first, (end - begin) // size)
            ops.rewrite_(
                matrix,
                scale=self.scale,
                diagonal=self.diagonal,
                fill=self.fill,
                start=self.start + first * self.step - begin // size,
                step=self.step,
            )
            files.write(part, data)
            yield part.nbytes


@dataclass(frozen=True)
class FoldIn:
    """The fold ``b <- b + shift * (W_old . 1); W <- scale * W``.

    Attributes:
        weight: the matrix (out, in · taps), one row per row; (in, out · taps) if ``taps_below`` is not 0.
        bias: its biases (out,), in one row.
        dtype: of both.
        scale, shift: see ``neutralize.ops.rescale_fold_``.
        taps_below: 0 where the rows of ``weight`` are outputs; where they are input features (the ``Conv1D`` of GPT-2,
            transposed convolutions), how many elements each of their outputs has.
    """

    weight: Tiles
    bias: Tiles
    dtype: torch.dtype
    scale: float
    shift: float
    taps_below: int = 0

    @property
    def regions(self) -> tuple[Region, ...]:
        """Weight and bias."""
        return (*self.weight.regions, *self.bias.regions)

    def run(self, files: Files) -> Iterable[int]:
        """Fold a block of outputs at a time: each output's sum is taken over its whole row at once, however sharded."""
        size, taps = self.dtype.itemsize, self.taps_below
        outputs = self.bias.width // size
        at_once = max(1, BUFFER_BYTES * outputs // max(self.weight.nbytes, 1))
        for first in range(0, outputs, at_once):
            last = min(first + at_once, outputs)
            if taps:
                part = self.weight.block(0, self.weight.rows, first * taps * size, last * taps * size)
            else:
                part = self.weight.block(first, last, 0, self.weight.width)
            data = part.read(files)
            elements = data.view(-1).view(self.dtype)
            if taps:
                matrix = elements.view(self.weight.rows, last - first, taps).transpose(0, 1)
            else:
                matrix = elements.view(last - first, self.weight.width // size)
            sums = self.bias.block(0, 1, first * size, last * size)
            bias = sums.read(files)
            ops.rescale_fold_(matrix, bias.view(-1).view(self.dtype), scale=self.scale, shift=self.shift)
            part.write(files, data)
            sums.write(files, bias)
            yield part.nbytes + sums.nbytes


@dataclass(frozen=True)
class Bytes:
    """Explicit bytes, few enough to hold in memory.

    Attributes:
        region: where they go.
        data: as many as the region has, row by row.
    """

    region: Region
    data: bytes

    @property
    def regions(self) -> tuple[Region, ...]:
        """Where they go."""
        return (self.region,)

    def run(self, files: Files) -> Iterable[int]:
        """Write them."""
        content = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)
        files.write(self.region, content.view(self.region.rows, self.region.width))
        yield self.region.nbytes


@dataclass(frozen=True)
class Pattern:
    """The same few bytes over and over: what a quantized format decodes to zero, say.

    Attributes:
        region: where; its width is a multiple of the pattern's length.
        pattern: what.
    """

    region: Region
    pattern: bytes

    @property
    def regions(self) -> tuple[Region, ...]:
        """Where it goes."""
        return (self.region,)

    def run(self, files: Files) -> Iterable[int]:
        """Write it; nothing is read."""
        if not any(self.pattern):
            files.zero(self.region)
            yield self.region.nbytes
            return
        length = len(self.pattern)
        pattern = torch.frombuffer(bytearray(self.pattern), dtype=torch.uint8)
        for chunk in self.region.chunks(BUFFER_BYTES // length * length):
            part = self.region.part(*chunk)
            data = pattern.repeat(part.nbytes // length)
            files.write(part, data.view(part.rows, part.width))
            yield part.nbytes


@dataclass(frozen=True)
class Checksum:
    """The CRC-32 of a run of bytes, where a file keeps it; it comes after all that writes the run.

    Attributes:
        covered: the run.
        places: four bytes each.
    """

    covered: Region
    places: tuple[Region, ...]

    @property
    def regions(self) -> tuple[Region, ...]:
        """Where it stands."""
        return self.places

    def run(self, files: Files) -> Iterable[int]:
        """Read the run and write its checksum."""
        crc = 0
        for chunk in self.covered.chunks():
            data = files.read(self.covered.part(*chunk))
            crc = zlib.crc32(memory(data), crc)
        stored = torch.frombuffer(bytearray(crc.to_bytes(4, "little")), dtype=torch.uint8).view(1, 4)
        for place in self.places:
            files.write(place, stored)
            yield place.nbytes


def written_bytes(patches: Sequence[Patch]) -> int:
    """How many bytes the patches may write together."""
    return sum(region.nbytes for patch in patches for region in patch.regions)
