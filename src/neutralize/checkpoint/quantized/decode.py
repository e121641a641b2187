"""Decoding: the values that the codes and scales of a quantized weight stand for, some of its rows at a time.

Products are computed in float32, as the formats' own decoders do; what these compute in float16 or bfloat16 is the same
once it is rounded to these, for codes of a few bits times such a scale are exact in float32.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Protocol

import torch

from neutralize.checkpoint.layout import Elements
from neutralize.checkpoint.quantized.weight import Axis, Exponents, Factor, Span, Unfit
from neutralize.checkpoint.region import Files

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of the eight codes of a word is the first, the second and so on."""


class Numbers(Protocol):
    """Numbers that are stored one by one, or several to a word."""

    def read(self, files: Files, span: Span | None = None, dim: int = 0) -> torch.Tensor:
        """Return them, or a range of one dimension of them."""
        ...


@dataclass(frozen=True)
class Packed:
    """Integers of a few bits in words of 32, the first in the lowest bits; one may reach from a word into the next.

    Attributes:
        tensor: the words, int32.
        bits: of each integer.
        dim: the dimension of the words that the integers follow each other along.
        size: how many follow each other.
        order: of eight in a word that are stored in another order, the place of the first, the second and so on.
        bias: what is subtracted from each.
        carry: what is added to each before its bits are cut off.
    """

    tensor: Elements
    bits: int
    dim: int
    size: int
    order: tuple[int, ...] = ()
    bias: int = 0
    carry: int = 0

    def read(self, files: Files, span: Span | None = None, dim: int = 0) -> torch.Tensor:
        """See ``Numbers``."""
        if span is None or dim != self.dim:
            return self._integers(self.tensor.read(files, span, dim)).narrow(self.dim, 0, self.size)
        first, last = span
        begin = first // 32
        words = begin * self.bits, min(-(-last // 32) * self.bits, self.tensor.shape[self.dim])
        return self._integers(self.tensor.read(files, words, dim)).narrow(self.dim, first - 32 * begin, last - first)

    def _integers(self, words: torch.Tensor) -> torch.Tensor:
        words, bits = words.movedim(self.dim, -1).contiguous(), self.bits
        if 8 % bits == 0:
            found = words.view(torch.uint8).unsqueeze(-1) >> torch.arange(0, 8, bits, dtype=torch.uint8)
        else:
            words = torch.nn.functional.pad(words, (0, -words.shape[-1] % bits)).long() & 0xFFFFFFFF
            words = words.unflatten(-1, (-1, bits))
            first = torch.arange(32) * bits
            word, shift = first // 32, first % 32
            found = words[..., word] >> shift | words[..., (word + 1) % bits] << (32 - shift)
        found = ((found + self.carry) & ((1 << bits) - 1)).flatten(-2)
        if self.order:
            found = found.unflatten(-1, (-1, len(self.order)))[..., list(self.order)].flatten(-2)
        return (found.short() - self.bias).movedim(-1, self.dim)


@dataclass(frozen=True)
class Fp4:
    """Two numbers of a sign, two bits of exponent and one of mantissa (E2M1) to a byte, the first in the lower bits.

    Attributes:
        tensor: the bytes; the numbers follow each other along the last dimension.
    """

    tensor: Elements

    def read(self, files: Files, span: Span | None = None, dim: int = 0) -> torch.Tensor:
        """See ``Numbers``."""
        codes = self.tensor.read(files, span, dim)
        table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
        return table[torch.stack([codes & 0xF, codes >> 4], -1).flatten(-2).int()]


@dataclass(frozen=True)
class Powers:
    """Powers of two, each stored as a byte 127 above its exponent (E8M0); 255 is NaN.

    Attributes:
        tensor: the bytes.
    """

    tensor: Elements

    def read(self, files: Files, span: Span | None = None, dim: int = 0) -> torch.Tensor:
        """See ``Numbers``."""
        stored = self.tensor.read(files, span, dim).view(torch.uint8)
        return (stored.float() - 127).exp2().where(stored < 255, math.nan)


@dataclass(frozen=True)
class Spread:
    """Numbers that lie over a weight.

    Attributes:
        numbers: the numbers.
        axes: for each of their dimensions what lies under them; see ``Grid``.
    """

    numbers: Numbers
    axes: tuple[Axis, ...]

    def rows(self, span: Span, shape: tuple[int, ...], files: Files) -> torch.Tensor:
        """Return them for some rows of the weight: with its dimensions, of size 1 where one number is for all."""
        cut = next((place for place, axis in enumerate(self.axes) if axis.dim == 0 and axis.order is None), None)
        covering = (0, 0) if cut is None else self.axes[cut].covering(span)
        data = self.numbers.read(files) if cut is None else self.numbers.read(files, covering, cut)
        data = data.float().flatten(len(self.axes) - 1) if self.axes else data.float()
        for place, axis in enumerate(self.axes):
            if axis.dim is None:
                continue
            first, last = span if axis.dim == 0 else (0, shape[axis.dim])
            if axis.order is not None:
                data = data.index_select(place, axis.cells(axis.order, data.shape[place], files)[first:last])
            elif axis.per > 1:
                begin = covering[0] if place == cut else 0
                data = _repeated(data, axis.per, place, (first - begin * axis.per, last - begin * axis.per))
        held = [axis.dim for axis in self.axes if axis.dim is not None]
        data = data.reshape([size for size, axis in zip(data.shape, self.axes, strict=True) if axis.dim is not None])
        data = data.permute([held.index(dim) for dim in sorted(held)])
        return data.reshape([data.shape[sorted(held).index(dim)] if dim in held else 1 for dim in range(len(shape))])


def _repeated(data: torch.Tensor, times: int, dim: int, span: Span) -> torch.Tensor:
    """A range of what a tensor becomes if each index of a dimension is repeated."""
    times = min(times, span[1])  # one cell may be for more than there is
    repeated = data.unsqueeze(dim + 1).expand(*data.shape[: dim + 1], times, *data.shape[dim + 1 :])
    return repeated.flatten(dim, dim + 1).narrow(dim, span[0], span[1] - span[0])


@dataclass(frozen=True)
class Scaled:
    """``(code - point) * scale``.

    Attributes:
        codes: one for each element.
        scales: they are multiplied with each other first.
        points: what the codes are counted from; ``None``: from 0.
        factor: what every product is multiplied by.
    """

    codes: Spread
    scales: tuple[Factor | Exponents, ...]
    points: Spread | None = None
    factor: float = 1.0

    def rows(self, span: Span, shape: tuple[int, ...], files: Files) -> torch.Tensor:
        """See ``Decoder``."""
        values = self.codes.rows(span, shape, files)
        if self.points is not None:
            values = values - self.points.rows(span, shape, files)
        scale = torch.ones(())
        for multiplier in self.scales:
            grid, is_power = multiplier.grid, isinstance(multiplier, Exponents)
            own = Spread(Powers(grid.tensor) if is_power else grid.tensor, grid.axes).rows(span, shape, files)
            scale = scale / own if isinstance(multiplier, Factor) and multiplier.is_divisor else scale * own
        values = values * scale
        return values if self.factor == 1 else values * self.factor


@dataclass(frozen=True)
class LookedUp:
    """``table[code] * scale``: two codes to a byte, the first in the higher bits, row after row; a scale per block.

    Attributes:
        codes: the bytes, of any dtype.
        table: 16 values.
        scales: one per block, float32; or the place of one in ``nested``.
        block: how many elements share a scale.
        nested: the values of scales, their own scales (float32), and the JSON text that says how many of them share
            one, and what is added.
    """

    codes: Elements
    table: Elements
    scales: Elements
    block: int
    nested: tuple[Elements, Elements, Elements] | None = None

    def rows(self, span: Span, shape: tuple[int, ...], files: Files) -> torch.Tensor:
        """See ``Decoder``."""
        inner = math.prod(shape[1:])
        first, last = span[0] * inner, span[1] * inner
        content = files.read(self.codes.regions[0].part(0, 1, first // 2, -(-last // 2))).view(-1, 1)
        codes = (content >> torch.tensor([4, 0], dtype=torch.uint8) & 0xF).view(-1)[first % 2 :][: last - first]
        begin = first // self.block
        scales = self._scales((begin, -(-last // self.block)), files)
        scale = _repeated(scales, self.block, 0, (first - begin * self.block, last - begin * self.block))
        return (self.table.read(files)[codes.int()] * scale).view(span[1] - span[0], *shape[1:])

    def _scales(self, span: Span, files: Files) -> torch.Tensor:
        scales = self.scales.read(files, span)
        if self.nested is None:
            return scales
        table, outer, text = self.nested
        state = json.loads(bytes(text.read(files).tolist()))
        share = torch.arange(*span) // state["nested_blocksize"]
        return table.read(files)[scales.int()] * outer.read(files)[share] + torch.tensor(state["nested_offset"])


@dataclass(frozen=True)
class Undecoded:
    """A weight of which it is not known what its codes stand for.

    Attributes:
        reason: why.
    """

    reason: str

    def rows(self, span: Span, shape: tuple[int, ...], files: Files) -> torch.Tensor:
        """Refuse."""
        raise Unfit(self.reason)
