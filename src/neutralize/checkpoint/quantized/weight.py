"""Weights whose codes and scales are tensors of their own: what zeroes them, what multiplies them, block by block."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import torch

from neutralize.checkpoint.layout import Elements, Layout
from neutralize.checkpoint.patch import Affine, Bytes, Patch, Pattern
from neutralize.checkpoint.region import BUFFER_BYTES, Files, Region
from neutralize.errors import NeutralizeError
from neutralize.plan import Edit, Rewrite, dtype_name

Span: TypeAlias = tuple[int, int]
"""A half-open range."""

Box: TypeAlias = tuple[Span, ...]
"""One range for each dimension."""

_E8M0_NAN = 255
_Option = TypeVar("_Option")


class Unfit(Exception):
    """Why a request, or a set of tensors, does not fit a format; the words of the error without what it is about."""


@dataclass(frozen=True)
class Axis:
    """Which part of a weight lies under the cells along one dimension of a stored tensor.

    Attributes:
        dim: the dimension of the weight, or ``None`` where all cells belong to every element.
        per: how many consecutive indices of it share a cell.
        order: the cell of each index of the weight, (size,) int32, where they do not follow each other (act-order).
        is_ordered: whether ``order`` counts; where not, it only has to agree with ``per``.
    """

    dim: int | None = None
    per: int = 1
    order: Elements | None = None
    is_ordered: bool = False

    def spans(self, wanted: Span, size: int, cells: int, files: Files) -> list[Span]:
        """Return the ranges of cells that hold a range of indices and nothing else.

        Raises:
            Unfit: some cell also holds other indices.
        """
        if wanted == (0, size):
            return [(0, cells)]
        if self.order is not None:
            return self._scattered(self.order, wanted, size, cells, files)
        first, last = wanted
        if first % self.per or (last % self.per and last != size):
            raise Unfit(f"{self.per} elements along dimension {self.dim} go together")
        return [self.covering(wanted)]

    def covering(self, wanted: Span) -> Span:
        """Return the range of cells that hold a range of indices, and maybe more."""
        return wanted[0] // self.per, -(-wanted[1] // self.per)

    def cells(self, order: Elements, cells: int, files: Files) -> torch.Tensor:
        """Return the cell of each index, int64.

        Raises:
            Unfit: there are no such cells.
        """
        cell = order.read(files).long()
        if int(cell.min()) < 0 or int(cell.max()) >= cells:
            raise Unfit(f"{order.name!r} names groups that do not exist")
        return cell

    def _scattered(self, order: Elements, wanted: Span, size: int, cells: int, files: Files) -> list[Span]:
        cell = self.cells(order, cells, files)
        if not self.is_ordered and not torch.equal(cell, torch.arange(size) // self.per):
            raise Unfit(f"{order.name!r} scatters the columns, and the configuration says that it does not")
        inside = torch.zeros(cells, dtype=torch.bool)
        inside[cell[slice(*wanted)]] = True
        outside = torch.zeros(cells, dtype=torch.bool)
        outside[cell[: wanted[0]]] = True
        outside[cell[wanted[1] :]] = True
        if bool((inside & outside).any()):
            raise Unfit(f"{self.per} elements along dimension {self.dim} go together, by {order.name!r}")
        edges = torch.nn.functional.pad(inside.int(), (1, 1)).diff().nonzero().view(-1, 2).tolist()
        return [(first, last) for first, last in edges]


@dataclass(frozen=True)
class Grid:
    """A stored tensor as cells over a weight.

    Attributes:
        tensor: in one piece.
        sizes: cells along each axis.
        itemsize: bytes per cell.
        axes: what lies under each.
    """

    tensor: Elements
    sizes: tuple[int, ...]
    itemsize: int
    axes: tuple[Axis, ...]

    def regions(self, box: Box, shape: tuple[int, ...], files: Files) -> list[Region]:
        """Return the bytes of the cells of a box of the weight.

        Raises:
            Unfit: they belong to other elements of the weight too.
        """
        held = {axis.dim for axis in self.axes}
        for dim, (span, size) in enumerate(zip(box, shape, strict=True)):
            if dim not in held and span != (0, size):
                raise Unfit(f"all elements along dimension {dim} go together")
        spans = [
            [(0, cells)] if axis.dim is None else axis.spans(box[axis.dim], shape[axis.dim], cells, files)
            for axis, cells in zip(self.axes, self.sizes, strict=True)
        ]
        return [region for cells in itertools.product(*spans) for region in self._of_cells(cells)]

    def covering(self, box: Box) -> list[Region]:
        """Return the bytes of all cells that reach into a box of the weight."""
        spans = [
            (0, cells) if axis.dim is None or axis.order is not None else axis.covering(box[axis.dim])
            for axis, cells in zip(self.axes, self.sizes, strict=True)
        ]
        return list(self._of_cells(tuple(spans)))

    def _of_cells(self, spans: Box) -> Iterator[Region]:
        """One region, or one per outer index where more than two axes are cut."""
        whole, inner = self.tensor.regions[0], self.itemsize
        sizes, cut = list(self.sizes), list(spans)
        while cut and cut[-1] == (0, sizes[-1]):  # whole rows are runs of bytes
            cut.pop()
            inner *= sizes.pop()
        for axis in range(len(cut) - 2, 0, -1):  # an axis that is whole joins the one before it
            if cut[axis] == (0, sizes[axis]):
                size, (first, last) = sizes.pop(axis), cut[axis - 1]
                cut.pop(axis)
                sizes[axis - 1] *= size
                cut[axis - 1] = (first * size, last * size)
        sizes, cut = [1] * (2 - len(cut)) + sizes, [(0, 1)] * (2 - len(cut)) + cut
        (*outer, (top, bottom), (left, right)), stride = cut, sizes[-1] * inner
        for index in itertools.product(*(range(*span) for span in outer)):
            row = top
            for axis, place in enumerate(index):
                row += place * math.prod(sizes[axis + 1 : -1])
            width = (right - left) * inner
            yield Region(whole.file, whole.offset + row * stride + left * inner, bottom - top, width, stride)


@dataclass(frozen=True)
class Factor:
    """Floating-point numbers that the weight is multiplied by, or with ``is_divisor`` divided by.

    Attributes:
        grid: where.
        is_divisor: see above.
        is_power: they stay powers of two.
    """

    grid: Grid
    is_divisor: bool = False
    is_power: bool = False

    def patches(self, factor: float, box: Box, shape: tuple[int, ...], files: Files) -> list[Patch]:
        """What multiplies a box of the weight.

        Raises:
            Unfit: the scales are shared with the rest of the weight, or leave the range of their dtype.
        """
        if self.is_power:
            _exponent(factor)
        factor, dtype = (1 / factor if self.is_divisor else factor), self.grid.tensor.dtype
        regions, limits = self.grid.regions(box, shape, files), torch.finfo(dtype)
        largest = max((_largest(region, dtype, files) for region in regions), default=0.0)
        if largest == 0:  # zero stays zero by any factor
            return []
        if not limits.tiny <= largest * factor <= limits.max:
            raise Unfit(f"the scales of {dtype_name(dtype)} would leave its range: {largest:.4g} times {factor:.4g}")
        return [Affine(region, dtype, scale=factor) for region in regions]

    def is_finite(self, box: Box, files: Files) -> bool:
        """Whether all of them that reach into a box are finite."""
        dtype = self.grid.tensor.dtype
        return all(math.isfinite(_largest(region, dtype, files)) for region in self.grid.covering(box))


@dataclass(frozen=True)
class Exponents:
    """Powers of two, each stored as a byte 127 above its exponent (E8M0), that the weight is multiplied by."""

    grid: Grid

    def patches(self, factor: float, box: Box, shape: tuple[int, ...], files: Files) -> list[Patch]:
        """What multiplies a box of the weight by a power of two.

        Raises:
            Unfit: it is none, or leaves the range.
        """
        shift, regions = _exponent(factor), self.grid.regions(box, shape, files)
        for region in regions:
            for part in _parts(region, 1):
                data = files.read(part)
                low, high = int(data.min()), int(data.max())
                if high == _E8M0_NAN or low + shift < 0 or high + shift >= _E8M0_NAN:
                    raise Unfit(f"its scales 2^-127 to 2^127 would leave their range by a factor of {factor:.6g}")
        return [Shift(region, shift) for region in regions]

    def is_finite(self, box: Box, files: Files) -> bool:
        """Whether none that reach into a box is NaN."""
        parts = (part for region in self.grid.covering(box) for part in _parts(region, 1))
        return not any(bool((files.read(part) == _E8M0_NAN).any()) for part in parts)


@dataclass(frozen=True)
class Nested:
    """Scales that are quantized themselves: ``nested_quant_map[absmax] * nested_absmax + nested_offset``.

    Attributes:
        scales: ``nested_absmax``.
        state: the JSON text that holds ``nested_offset``.
    """

    scales: Factor
    state: Elements

    def patches(self, factor: float, box: Box, shape: tuple[int, ...], files: Files) -> list[Patch]:
        """What multiplies the whole weight.

        Raises:
            Unfit: a part of the weight is asked for, for the offset is one for all of it.
        """
        if box != tuple((0, size) for size in shape):
            raise Unfit("its nested scales have one offset for the whole weight")
        text = bytes(self.state.read(files).view(-1).tolist()).decode()
        found = list(re.finditer(r'"nested_offset"\s*:\s*([^\s,}]+)', text))
        if len(found) != 1:
            raise Unfit(f"{self.state.name!r} has {len(found)} nested_offset, not one")
        (match,) = found
        offset = torch.tensor(float(match.group(1)) * factor, dtype=torch.float32)
        if not bool(offset.isfinite()):
            raise Unfit("its nested offset would leave the range of float32")
        number = f"{offset.item():.9g}"  # enough digits for a float32; the rest of the old number becomes white space
        room = len(match.group(1))
        if len(number) > room:
            raise Unfit(f"{self.state.name!r} has no room for the offset {number}")
        changed = text[: match.start(1)] + number.ljust(room) + text[match.end(1) :]
        json.loads(changed)
        whole = tuple((0, size) for size in self.scales.grid.sizes)
        nested = self.scales.patches(factor, whole, self.scales.grid.sizes, files)
        return [*nested, Bytes(self.state.regions[0], changed.encode())]

    def is_finite(self, box: Box, files: Files) -> bool:
        """Whether the scales of the scales are finite."""
        whole = tuple((0, size) for size in self.scales.grid.sizes)
        return self.scales.is_finite(whole, files)


@dataclass(frozen=True)
class Shift:
    """Add a number to every byte of a region.

    Attributes:
        region: where.
        by: the number; no byte overflows.
    """

    region: Region
    by: int

    @property
    def regions(self) -> tuple[Region, ...]:
        """The bytes."""
        return (self.region,)

    def run(self, files: Files) -> Iterable[int]:
        """Add piece by piece."""
        for part in _parts(self.region, 1):
            files.write(part, (files.read(part).short() + self.by).to(torch.uint8))
            yield part.nbytes


Multiplier: TypeAlias = Factor | Exponents | Nested


@dataclass(frozen=True)
class Zero:
    """Bytes that make a box of the weight zero.

    Attributes:
        grid: where.
        byte: what, again and again.
        beside: what is still multiplied with it, and so has to be finite.
    """

    grid: Grid
    byte: int = 0
    beside: tuple[Multiplier, ...] = ()

    def patches(self, box: Box, shape: tuple[int, ...], files: Files) -> list[Patch]:
        """What makes a box of the weight zero.

        Raises:
            Unfit: it would reach the rest of the weight too, or scales are not finite.
        """
        regions = self.grid.regions(box, shape, files)
        if not all(multiplier.is_finite(box, files) for multiplier in self.beside):
            raise Unfit("its scales hold Inf or NaN, and nothing times these is zero")
        return [Pattern(region, bytes([self.byte])) for region in regions]


class Decoder(Protocol):
    """What a weight's codes and scales stand for."""

    def rows(self, span: Span, shape: tuple[int, ...], files: Files) -> torch.Tensor:
        """Return some rows of a weight of a shape, float32.

        Raises:
            Unfit: that is not known.
        """
        ...


@dataclass(frozen=True)
class Quantized:
    """A weight of several stored tensors.

    Attributes:
        name: of the weight, as a model has it.
        shape: that it has when it is dequantized.
        encoding: the format.
        parts: all that is stored of it.
        zeros: what makes it zero, the cheapest first.
        factors: what multiplies it, the most exact first.
        decoder: what it stands for.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    parts: tuple[Elements, ...]
    zeros: tuple[Zero, ...]
    factors: tuple[Multiplier, ...]
    decoder: Decoder

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its parts."""
        return tuple(part.name for part in self.parts)

    @property
    def regions(self) -> tuple[Region, ...]:
        """Those of its parts."""
        return tuple(region for part in self.parts for region in part.regions)

    def read(self, files: Files, span: Span | None = None) -> torch.Tensor:
        """See ``Stored``: what the format's own decoder makes of it, float32."""
        try:
            return self.decoder.rows((0, self.shape[0]) if span is None else span, self.shape, files)
        except Unfit as reason:
            raise NeutralizeError(
                f"checkpoint: expected a weight that can be decoded for {self.name!r} ({self.encoding}), got {reason}; "
                "verify the loaded model"
            ) from None

    def patches(self, edit: Edit, layout: Layout, files: Files) -> Sequence[Patch]:
        """See ``Stored``: zero, or a multiple of what it was, of the whole weight or of a block of it."""
        if edit.parameter == self.name and tuple(edit.shape) != self.shape:
            raise NeutralizeError(
                f"checkpoint: expected shape {list(edit.shape)} for {self.name!r}, got {list(self.shape)} "
                f"({self.encoding}); plan for this checkpoint"
            )
        if not isinstance(edit, Rewrite) or edit.diagonal or edit.fill or edit.parameter != self.name:
            raise NeutralizeError(
                f"checkpoint: expected zero, or a multiple of itself, for {self.name!r}, got {edit.describe()!r}, "
                f"which {self.encoding} cannot represent exactly; use a strategy that writes norm gains, or dequantize "
                "the checkpoint first"
            )
        try:
            box = box_of(edit)
            if edit.scale == 0:
                return _first_fit(lambda zero: zero.patches(box, self.shape, files), self.zeros)
            return self._multiplied(edit.scale, box, files)
        except Unfit as reason:
            raise NeutralizeError(
                f"checkpoint: expected an edit that {self.encoding} can represent for {self.name!r}, got "
                f"{edit.describe()!r}: {reason}; edit whole groups, or dequantize the checkpoint first"
            ) from None

    def _multiplied(self, by: float, box: Box, files: Files) -> list[Patch]:
        if not 0 < by <= torch.finfo(torch.float32).max:
            raise Unfit(f"scales are multiplied by numbers above 0 that float32 holds, and {by:.6g} is none")
        if by == 1:
            return []
        return _first_fit(lambda factor: factor.patches(by, box, self.shape, files), self.factors)


@dataclass(frozen=True)
class Unknown:
    """A tensor that is quantized in a way that is not known here: it is listed, and not edited.

    Attributes:
        name: its name.
        elements: what is stored.
        reason: why it is not known.
    """

    name: str
    elements: Elements
    reason: str

    @property
    def names(self) -> tuple[str, ...]:
        """The name of what is stored."""
        return (self.elements.name,)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is stored."""
        return self.elements.shape

    @property
    def encoding(self) -> str:
        """The dtype of what is stored."""
        return f"{self.elements.encoding}, unknown quantization"

    @property
    def regions(self) -> tuple[Region, ...]:
        """The bytes of what is stored."""
        return self.elements.regions

    def read(self, files: Files, span: Span | None = None) -> torch.Tensor:
        """Refuse."""
        raise self._refusal()

    def patches(self, edit: Edit, layout: Layout, files: Files) -> Sequence[Patch]:
        """Refuse."""
        raise self._refusal()

    def _refusal(self) -> NeutralizeError:
        return NeutralizeError(
            f"checkpoint: expected a known quantization format for {self.name!r} ({self.elements.encoding}), got "
            f"{self.reason}; dequantize the checkpoint first"
        )


def box_of(edit: Rewrite) -> Box:
    """Return the box of a tensor that a rewrite is confined to.

    Raises:
        Unfit: its columns are no box of a tensor with more than two dimensions.
    """
    shape = edit.shape
    box = [(0, size) for size in shape]
    if edit.rows is not None:
        box[0] = edit.rows
    first, last = edit.columns or (0, math.prod(shape[1:]))
    for dim in range(1, len(shape)):
        inner = math.prod(shape[dim + 1 :])
        if first % inner == 0 and last % inner == 0:
            box[dim] = (first // inner, last // inner)
            break
        index = first // inner
        if last > (index + 1) * inner:
            raise Unfit(f"its columns are no box of {list(shape)}")
        box[dim] = (index, index + 1)
        first, last = first - index * inner, last - index * inner
    return tuple(box)


def _first_fit(attempt: Callable[[_Option], list[Patch]], options: Sequence[_Option]) -> list[Patch]:
    """What the first option that fits gives; else the reason of the last, which is the one with the finest blocks."""
    reason = Unfit("the format has nothing that could carry it")
    for option in options:
        try:
            return attempt(option)
        except Unfit as unfit:
            reason = unfit
    raise reason


def _exponent(factor: float) -> int:
    mantissa, exponent = math.frexp(factor)
    if mantissa != 0.5:
        raise Unfit(f"its scales are powers of two, and {factor:.6g} is none")
    return exponent - 1


def _parts(region: Region, itemsize: int) -> Iterator[Region]:
    return (region.part(*chunk) for chunk in region.chunks(BUFFER_BYTES // itemsize * itemsize))


def _largest(region: Region, dtype: torch.dtype, files: Files) -> float:
    """The largest magnitude in a region; NaN if it holds one."""
    found = torch.zeros((), dtype=torch.float64)
    for part in _parts(region, dtype.itemsize):
        values = files.read(part).view(-1).view(dtype)
        found = torch.maximum(found, values.to(torch.float32 if dtype.itemsize < 8 else dtype).abs().max().double())
    return found.item()
