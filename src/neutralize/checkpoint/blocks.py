"""Blocks of ggml's quantized types: what decodes to zero, and where their scales are.

A block holds a few small integers and the scales that they are multiplied by. In every type below zero bytes decode to
zeros, and where the scales are one or two float16 numbers that all values are proportional to, multiplying these
multiplies the values.

Source: the struct definitions of ggml (``ggml-common.h``); each entry is checked by the tests against the decoder of
the ``gguf`` package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from neutralize.checkpoint.layout import Layout
from neutralize.checkpoint.patch import Patch, Pattern
from neutralize.checkpoint.region import BUFFER_BYTES, Files, Region
from neutralize.errors import NeutralizeError
from neutralize.plan import Edit, Rewrite, matrix_extent


@dataclass(frozen=True)
class Format:
    """A quantized type of ggml.

    Attributes:
        name: as ggml calls it.
        numel: values per block.
        nbytes: bytes per block.
        scales: where in a block its float16 scales are, in bytes; empty: they are of another kind.
        is_listed: no decoder is at hand that could check what is written: such tensors are only listed.
    """

    name: str
    numel: int
    nbytes: int
    scales: tuple[int, ...] = ()
    is_listed: bool = False


FORMATS = {
    2: Format("Q4_0", 32, 18, (0,)),
    3: Format("Q4_1", 32, 20, (0, 2)),
    6: Format("Q5_0", 32, 22, (0,)),
    7: Format("Q5_1", 32, 24, (0, 2)),
    8: Format("Q8_0", 32, 34, (0,)),
    9: Format("Q8_1", 32, 40, is_listed=True),
    10: Format("Q2_K", 256, 84, (80, 82)),
    11: Format("Q3_K", 256, 110, (108,)),
    12: Format("Q4_K", 256, 144, (0, 2)),
    13: Format("Q5_K", 256, 176, (0, 2)),
    14: Format("Q6_K", 256, 210, (208,)),
    15: Format("Q8_K", 256, 292, is_listed=True),
    16: Format("IQ2_XXS", 256, 66, (0,)),
    17: Format("IQ2_XS", 256, 74, (0,)),
    18: Format("IQ3_XXS", 256, 98, (0,)),
    19: Format("IQ1_S", 256, 50, (0,)),
    20: Format("IQ4_NL", 32, 18, (0,)),
    21: Format("IQ3_S", 256, 110, (0,)),
    22: Format("IQ2_S", 256, 82, (0,)),
    23: Format("IQ4_XS", 256, 136, (0,)),
    29: Format("IQ1_M", 256, 56),
    34: Format("TQ1_0", 256, 54, (52,)),
    35: Format("TQ2_0", 256, 66, (64,)),
    39: Format("MXFP4", 32, 17),
    40: Format("NVFP4", 64, 36),
    41: Format("Q1_0", 128, 18, is_listed=True),
}
"""By ggml's number of the type."""


@dataclass(frozen=True)
class Blocks:
    """A tensor in blocks, each of some neighbouring values of a row.

    Attributes:
        name: its name.
        format: the type.
        shape: of the values; the last size is a multiple of a block's.
        region: its bytes, one run.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    region: Region

    @property
    def encoding(self) -> str:
        """The type's name."""
        return self.format.name

    @property
    def regions(self) -> tuple[Region, ...]:
        """Its bytes."""
        return (self.region,)

    def patches(self, edit: Edit, layout: Layout, files: Files) -> Sequence[Patch]:
        """See ``Stored``: zeros and factors go through blocks, nothing else does."""
        if not isinstance(edit, Rewrite) or edit.diagonal or edit.fill:
            raise NeutralizeError(
                f"checkpoint: expected zero or a factor for {self.name!r}, got '{edit.describe()}', which blocks of "
                f"{self.encoding} cannot hold exactly; use strategy zero or damp, or a checkpoint that is not quantized"
            )
        if tuple(edit.shape) != self.shape:
            raise NeutralizeError(
                f"checkpoint: expected shape {list(edit.shape)} for {self.name!r}, got {list(self.shape)}; plan for "
                "this checkpoint"
            )
        region = self._blocks(edit)
        if edit.scale == 0:
            return [Pattern(region, bytes(self.format.nbytes))]
        if edit.scale == 1:
            return []
        if not self.format.scales:
            raise NeutralizeError(
                f"checkpoint: expected zero for {self.name!r}, got a factor of {edit.scale:g}: the scales of "
                f"{self.encoding} are not float16 numbers; use strategy zero, or edit the norm before it"
            )
        patch = Factor(region, self.format, edit.scale)
        patch.check(self.name, files)
        return [patch]

    def _blocks(self, edit: Rewrite) -> Region:
        """The blocks that an edit covers."""
        per, size = self.format.numel, self.format.nbytes
        rows, columns = edit.rows, edit.columns
        height, width = matrix_extent(self.shape)
        if len(self.shape) == 1:  # the blocks of a vector lie along its only dimension
            rows, columns, height, width = None, rows, 1, height
        top, bottom = rows or (0, height)
        first, last = columns or (0, width)
        if first % per or last % per:
            raise NeutralizeError(
                f"checkpoint: expected multiples of {per} for columns of {self.name!r} ({self.encoding} stores {per} "
                f"values of a row together), got {first}:{last}; edit more of it, or the norm before it"
            )
        stride = width // per * size
        offset = self.region.offset + top * stride + first // per * size
        return Region(self.region.file, offset, bottom - top, (last - first) // per * size, stride)


@dataclass(frozen=True)
class Factor:
    """The float16 scales of blocks times a number, each rounded once.

    Attributes:
        region: whole blocks.
        format: their type.
        factor: the number.
    """

    region: Region
    format: Format
    factor: float

    @property
    def regions(self) -> tuple[Region, ...]:
        """The blocks."""
        return (self.region,)

    def run(self, files: Files) -> Iterable[int]:
        """Multiply the scales, some blocks at a time."""
        for part, data in self._parts(files):
            blocks = data.view(-1, self.format.nbytes)
            for place in self.format.scales:
                blocks[:, place : place + 2] = self._scaled(blocks, place).view(torch.uint8)
            files.write(part, data)
            yield part.nbytes

    def check(self, name: str, files: Files) -> None:
        """Check that no scale leaves float16's range.

        Raises:
            NeutralizeError: one does.
        """
        if abs(self.factor) <= 1:
            return
        for _, data in self._parts(files):
            blocks = data.view(-1, self.format.nbytes)
            for place in self.format.scales:
                if not math.isfinite(self._scaled(blocks, place).float().abs().max().item()):
                    raise NeutralizeError(
                        f"checkpoint: expected scales of {name!r} that stay within float16, got one that leaves it "
                        f"when multiplied by {self.factor:g}; give a smaller factor"
                    )

    def _scaled(self, blocks: torch.Tensor, place: int) -> torch.Tensor:
        scales = blocks[:, place : place + 2].contiguous().view(torch.float16)
        return (scales.double() * self.factor).half()

    def _parts(self, files: Files) -> Iterable[tuple[Region, torch.Tensor]]:
        for chunk in self.region.chunks(BUFFER_BYTES // self.format.nbytes * self.format.nbytes):
            part = self.region.part(*chunk)
            yield part, files.read(part)
