"""Blocks: the quantized types of ggml, whose elements share scales block by block.

What a block can hold is little: all its values are its codes times its scales. It can be zeroed, and its scales can be
multiplied; one value of its own it cannot take.

Source: the block structures of ``ggml-common.h`` in the ggml project, which the dequantizers of its Python package
``gguf`` agree with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from neutralize import ops
from neutralize.checkpoint.layout import Layout
from neutralize.checkpoint.patch import Patch, Pattern
from neutralize.checkpoint.region import BUFFER_BYTES, Files, Region
from neutralize.errors import NeutralizeError
from neutralize.plan import Assign, Copy, Edit, Fold, Rewrite, matrix_extent


@dataclass(frozen=True)
class BlockType:
    """A quantized type of ggml.

    All of its values are linear in its scales, and an all-zero block decodes to zeros.

    Attributes:
        name: as ggml calls it.
        size: elements in a block, which follow each other along the last dimension.
        nbytes: bytes in a block.
        scales: byte offsets of the scales that all its values are proportional to.
        scale: how they are stored: ``float16``, ``float32``, ``nibbles`` (a float16 whose four digits are the highest
            of four 16-bit words), ``e8m0`` (the exponent of a power of two), or ``e4m3`` (which are too coarse to be
            multiplied).
    """

    name: str
    size: int
    nbytes: int
    scales: tuple[int, ...]
    scale: str = "float16"


TYPES = {
    2: BlockType("Q4_0", 32, 18, (0,)),
    3: BlockType("Q4_1", 32, 20, (0, 2)),
    6: BlockType("Q5_0", 32, 22, (0,)),
    7: BlockType("Q5_1", 32, 24, (0, 2)),
    8: BlockType("Q8_0", 32, 34, (0,)),
    10: BlockType("Q2_K", 256, 84, (80, 82)),
    11: BlockType("Q3_K", 256, 110, (108,)),
    12: BlockType("Q4_K", 256, 144, (0, 2)),
    13: BlockType("Q5_K", 256, 176, (0, 2)),
    14: BlockType("Q6_K", 256, 210, (208,)),
    15: BlockType("Q8_K", 256, 292, (0,), "float32"),
    16: BlockType("IQ2_XXS", 256, 66, (0,)),
    17: BlockType("IQ2_XS", 256, 74, (0,)),
    18: BlockType("IQ3_XXS", 256, 98, (0,)),
    19: BlockType("IQ1_S", 256, 50, (0,)),
    20: BlockType("IQ4_NL", 32, 18, (0,)),
    21: BlockType("IQ3_S", 256, 110, (0,)),
    22: BlockType("IQ2_S", 256, 82, (0,)),
    23: BlockType("IQ4_XS", 256, 136, (0,)),
    29: BlockType("IQ1_M", 256, 56, (48,), "nibbles"),
    34: BlockType("TQ1_0", 256, 54, (52,)),
    35: BlockType("TQ2_0", 256, 66, (64,)),
    39: BlockType("MXFP4", 32, 17, (0,), "e8m0"),
    40: BlockType("NVFP4", 64, 36, (0, 1, 2, 3), "e4m3"),
    41: BlockType("Q1_0", 128, 18, (0,)),
}
"""By the number that a GGUF file has for each.

The package ``gguf`` has no dequantizer for Q8_K and Q1_0: their values are d · q and ±d, so that d = 0 makes zeros.
Q8_1 is left out: ggml computes with it and writes it into no file.
"""

_WIDTH = {"float16": 2, "float32": 4, "nibbles": 8, "e8m0": 1}
_E8M0_LARGEST = 254


@dataclass(frozen=True)
class Blocks:
    """A tensor stored in blocks of a quantized type.

    Attributes:
        name: its name.
        type: of its blocks.
        shape: of the tensor.
        region: its bytes, in one run.
    """

    name: str
    type: BlockType
    shape: tuple[int, ...]
    region: Region

    @property
    def encoding(self) -> str:
        """The name of the type."""
        return self.type.name

    @property
    def regions(self) -> tuple[Region, ...]:
        """Its bytes."""
        return (self.region,)

    def read(self, files: Files, span: tuple[int, int] | None = None) -> torch.Tensor:
        """See ``Stored``: what the dequantizer of the package ``gguf`` makes of it, float32."""
        first, last = span or (0, self.shape[0])
        inner = math.prod(self.shape[1:])
        begin, end = first * inner, last * inner
        if begin % self.type.size or end % self.type.size:  # rows of a vector are its elements
            return self.read(files)[first:last]
        nbytes = self.type.nbytes
        place = self.region.part(0, 1, begin // self.type.size * nbytes, end // self.type.size * nbytes)
        values = _dequantized(files.read(place).view(-1, nbytes), self.type)
        return values.view(last - first, *self.shape[1:])

    def patches(self, edit: Edit, layout: Layout, files: Files) -> Sequence[Patch]:
        """See ``Stored``: zeros and multiples of whole blocks, nothing else."""
        if tuple(edit.shape) != self.shape:
            raise NeutralizeError(
                f"checkpoint: expected shape {list(edit.shape)} for {self.name!r}, got {list(self.shape)}; plan for "
                "this checkpoint"
            )
        if not isinstance(edit, Rewrite) or edit.diagonal or edit.fill:
            raise self._refusal(edit, f"{_kind(edit)}, which {self.type.name} blocks, {self._why}, cannot hold")
        part = self._part(edit)
        if edit.scale == 0:
            return [Pattern(part, bytes(self.type.nbytes))]
        if edit.scale == 1:
            return []
        self._check_factor(edit)
        patch = Multiplied(part, self.type, edit.scale)
        if not patch.is_held(files):
            what = (
                f"a scale past the largest {self.type.scale}" if abs(edit.scale) > 1 else "a scale that would become 0"
            )
            raise self._refusal(edit, what)
        return [patch]

    @property
    def _why(self) -> str:
        return f"whose {self.type.size} values share a scale"

    def _refusal(self, edit: Edit, got: str) -> NeutralizeError:
        return NeutralizeError(
            f"checkpoint: expected zeros or a multiple for '{edit.describe()}', got {got}; choose another strategy, or "
            "take a file in F16 or F32"
        )

    def _check_factor(self, edit: Rewrite) -> None:
        if self.type.scale == "e4m3":
            raise self._refusal(edit, f"a factor for {self.type.name}, whose scales have 3 bits after the first")
        if self.type.scale == "e8m0" and (edit.scale < 0 or math.frexp(edit.scale)[0] != 0.5):
            raise self._refusal(edit, f"{edit.scale:.6g} for {self.type.name}, whose scales are powers of two")

    def _part(self, edit: Rewrite) -> Region:
        """The bytes of the blocks that an edit writes."""
        size, nbytes = self.type.size, self.type.nbytes
        rows, columns = matrix_extent(self.shape)
        first, last = edit.rows or (0, rows)
        begin, end = edit.columns or (0, columns)
        if (begin, end) == (0, columns):  # whole rows follow each other, and one may be less than a block
            rows, first, last, begin, end, columns = 1, 0, 1, first * columns, last * columns, rows * columns
        if begin % size or end % size or columns % size:
            raise NeutralizeError(
                f"checkpoint: expected a part of {self.name!r} that begins and ends with a block for "
                f"'{edit.describe()}', got one that cuts through blocks of {size} elements ({self.type.name}); choose "
                f"a range of whole blocks, or take a file in F16 or F32"
            )
        stride, width = columns // size * nbytes, (end - begin) // size * nbytes
        offset = self.region.offset + first * stride + begin // size * nbytes
        if last - first == 1:
            return Region.run(self.region.file, offset, width)
        return Region(self.region.file, offset, last - first, width, stride)


def _dequantized(blocks: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """The values of blocks (blocks, bytes), float32."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise NeutralizeError(
            f"checkpoint: expected the package gguf to decode {kind.name}, got none; pip install 'neutralize[gguf]'"
        ) from error
    import numpy as np

    try:
        with np.errstate(all="ignore"):
            values = quants.dequantize(blocks.numpy(), GGMLQuantizationType[kind.name])
    except (KeyError, NotImplementedError) as error:
        raise NeutralizeError(
            f"checkpoint: expected a type that the package gguf decodes, got {kind.name}; take a file in another type"
        ) from error
    return torch.from_numpy(values)


def _kind(edit: Edit) -> str:
    """What an edit writes besides zeros and multiples, in words."""
    if isinstance(edit, Rewrite):
        return "an identity" if edit.diagonal else "a constant"
    return {Fold: "a fold", Assign: "single values", Copy: "a copy"}[type(edit)]


@dataclass(frozen=True)
class Multiplied:
    """Blocks whose scales are multiplied: each product is computed in float32, and rounded once to the stored format.

    Attributes:
        region: rows of whole blocks.
        type: of the blocks.
        factor: what by.
    """

    region: Region
    type: BlockType
    factor: float

    @property
    def regions(self) -> tuple[Region, ...]:
        """The blocks."""
        return (self.region,)

    def run(self, files: Files) -> Iterable[int]:
        """Multiply piece by piece."""
        for part, blocks in self._pieces(files):
            for offset in self.type.scales:
                _put(blocks, self.type.scale, offset, self._product(_get(blocks, self.type.scale, offset)))
            files.write(part, blocks.view(part.rows, part.width))
            yield part.nbytes

    def is_held(self, files: Files) -> bool:
        """Whether the format holds every product: none becomes infinite, and none 0 that was not; reads all."""
        for _, blocks in self._pieces(files):
            for offset in self.type.scales:
                before = _get(blocks, self.type.scale, offset)
                if self.type.scale == "e8m0":
                    after = before.int() + math.frexp(self.factor)[1] - 1
                    held = (after >= 0) & (after <= _E8M0_LARGEST)
                else:
                    after = self._product(before.clone())
                    held = (after.isfinite() | ~before.isfinite()) & ((after != 0) | (before == 0))
                if not bool(held.all()):
                    return False
        return True

    def _pieces(self, files: Files) -> Iterable[tuple[Region, torch.Tensor]]:
        nbytes = self.type.nbytes
        for chunk in self.region.chunks(BUFFER_BYTES // nbytes * nbytes):
            part = self.region.part(*chunk)
            yield part, files.read(part).view(-1, nbytes)

    def _product(self, scales: torch.Tensor) -> torch.Tensor:
        """Multiply scales (blocks, 1) in place."""
        if self.type.scale == "e8m0":
            return scales.add_(math.frexp(self.factor)[1] - 1)
        ops.rewrite_(scales, scale=self.factor)
        return scales


def _get(blocks: torch.Tensor, scale: str, offset: int) -> torch.Tensor:
    """The scales (blocks, 1) at a byte of each block: of their dtype, or int64 exponents."""
    field = blocks[:, offset : offset + _WIDTH[scale]].clone(memory_format=torch.contiguous_format)
    if scale == "e8m0":
        return field.long()
    if scale == "nibbles":
        digits = field.view(torch.int16).int() >> 12 & 0xF
        places = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
        field = (digits << places).sum(1, keepdim=True, dtype=torch.int32).to(torch.int16)
    return field.view(torch.float32 if scale == "float32" else torch.float16)


def _put(blocks: torch.Tensor, scale: str, offset: int, scales: torch.Tensor) -> None:
    """Write scales (blocks, 1) at a byte of each block."""
    field = blocks[:, offset : offset + _WIDTH[scale]]
    if scale == "e8m0":
        field.copy_(scales)
        return
    if scale == "nibbles":
        places = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
        digits = scales.view(torch.int16).int() >> places & 0xF
        rest = field.contiguous().view(torch.int16).int() & 0xFFF
        scales = (digits << 12 | rest).to(torch.int16)
    field.copy_(scales.view(torch.uint8))
