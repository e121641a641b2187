"""Weights as small heat maps: what a tensor holds, reduced to a few cells, and drawn as a PNG in a data URI."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from neutralize.distributed.part import is_dtensor
from neutralize.plan import Plan, dtype_name, matrix_extent

_CELLS = 64
_FLATTEST = 8
_FAINTEST = 16.0  # what is smaller than the other by more than this has colours of its own
_MOST = 12
"""How many tensors of a plan are drawn."""

_SCALE_ENDS = ((8, 69, 124), (247, 247, 245), (150, 62, 8))
_NOT_FINITE = (20, 20, 20)


@dataclass(frozen=True)
class Heat:
    """A tensor reduced to a few cells.

    Attributes:
        cells: rows of cells; each is the value of the largest magnitude in its part of the matrix view, so that a cell
            is 0 only where every weight is, and NaN where one is not finite.
        largest: the largest magnitude of a finite element.
        zeros: the fraction of elements that are 0.
        not_finite: how many elements are NaN or infinite.
    """

    cells: tuple[tuple[float, ...], ...]
    largest: float
    zeros: float
    not_finite: int

    def picture(self, peak: float) -> str:
        """Return the cells as the URI of a PNG, from blue (``-peak``) over white (0) to orange (``peak``)."""
        rows = bytearray()
        for row in self.cells:
            rows.append(0)  # the row's filter: none
            rows.extend(_level(value, peak) for value in row)
        header = struct.pack(">IIBBBBB", len(self.cells[0]), len(self.cells), 8, 3, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"PLTE", _palette()), (b"IDAT", zlib.compress(bytes(rows), 9)), (b"IEND", b""))
        parts = [b"\x89PNG\r\n\x1a\n"]
        for kind, content in chunks:
            parts.append(struct.pack(">I", len(content)) + kind + content)
            parts.append(struct.pack(">I", zlib.crc32(kind + content)))
        return f"data:image/png;base64,{base64.b64encode(b''.join(parts)).decode()}"


@dataclass(frozen=True)
class Change:
    """What a plan makes of a tensor.

    Attributes:
        name: qualified name of the parameter.
        shape: of it.
        dtype: of it, without the ``torch.`` prefix.
        before: what it held.
        after: what it holds with the plan.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    before: Heat
    after: Heat

    @property
    def peaks(self) -> tuple[float, float]:
        """The magnitudes that the colours end at, before and after: one for both, unless one would be all white."""
        both = self.before.largest, self.after.largest
        return both if 0 < _FAINTEST * min(both) < max(both) else (max(both), max(both))


def changes(model: nn.Module, plan: Plan, applied: Callable[[], AbstractContextManager[object]]) -> tuple[Change, ...]:
    """Reduce the first tensors that a plan writes, as they are and as the plan makes them.

    Args:
        model: with weights; a tensor that is sharded, or elsewhere (on the meta device), is left out.
        plan: what is written.
        applied: makes a context in which the model has the plan's weights.
    """
    by_layer = [name for layer in plan.layers for edit in layer.edits for name in plan.edits[edit].parameters]
    names = list(dict.fromkeys([*by_layer, *plan.parameters]))
    before = dict(_heats(model, names[:_MOST]))
    if not before:
        return ()
    with applied():
        after = dict(_heats(model, before))
    tensors = _tensors(model)
    return tuple(
        Change(name, tuple(tensors[name].shape), dtype_name(tensors[name].dtype), heat, after[name])
        for name, heat in before.items()
    )


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


def _heats(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Heat]]:
    tensors = _tensors(model)
    for name in names:
        tensor = tensors.get(name)
        if tensor is not None and tensor.numel() and tensor.device.type != "meta" and not is_dtensor(tensor):
            yield name, heat(tensor)


def heat(tensor: torch.Tensor) -> Heat:
    """Reduce a tensor, a few rows of it at a time.

    Args:
        tensor: of any shape with an element, and any real dtype.
    """
    rows, columns = matrix_extent(tuple(tensor.shape))
    with torch.no_grad():
        matrix = tensor.detach().reshape(rows, columns)
        if columns == 1:  # a vector lies on its side
            matrix = matrix.reshape(1, rows)
        height, width = _grid(*matrix.shape)
        largest, zeros, not_finite = 0.0, 0, 0
        bands = []
        for rows_of_cells in matrix.tensor_split(height):
            block = rows_of_cells.double()
            finite = block.isfinite()
            largest = max(largest, float(block.where(finite, 0.0).abs().max()))
            zeros += int((block == 0).sum())
            not_finite += int((~finite).sum())
            block = block.where(finite, math.nan)
            bands.append(torch.stack([block.amax(0), block.amin(0)]))
        high, low = torch.stack(bands, 1)
        cells = [
            torch.where(top >= -bottom, top, bottom)
            for top, bottom in (
                (upper.amax(1), lower.amin(1))
                for upper, lower in zip(high.tensor_split(width, 1), low.tensor_split(width, 1), strict=True)
            )
        ]
        grid = torch.stack(cells, 1)
    return Heat(tuple(map(tuple, grid.tolist())), largest, zeros / tensor.numel(), not_finite)


def _grid(rows: int, columns: int) -> tuple[int, int]:
    """How many cells a matrix has, in its proportions, but never thinner than one can see."""
    scale = min(1.0, _CELLS / max(rows, columns))
    least = max(1, round(scale * max(rows, columns)) // _FLATTEST)
    return min(rows, max(least, round(rows * scale))), min(columns, max(least, round(columns * scale)))


def _level(value: float, peak: float) -> int:
    """The place of a value in the palette: 127 is 0 and nothing else is."""
    if not math.isfinite(value):
        return 255
    if value == 0 or peak == 0:
        return 127
    step = max(1, round(127 * min(1.0, abs(value) / peak)))
    return 127 + step if value > 0 else 127 - step


def _palette() -> bytes:
    low, middle, high = _SCALE_ENDS
    colours = []
    for place in range(-127, 128):
        end, part = (low if place < 0 else high), abs(place) / 127
        colours.append(bytes(round(a + (b - a) * part) for a, b in zip(middle, end, strict=True)))
    return b"".join(colours) + bytes(_NOT_FINITE)
