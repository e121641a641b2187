"""The ops in plain torch: their specification, the oracle of the tests, and the kernels of all other devices.

Same semantics and the same bits as the native kernels (any NaN counts as any other). The arithmetic type is float64 for
float64 tensors and float32 for all others; coefficients are rounded to it once, results once on store, to nearest even.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

_Number = TypeVar("_Number", int, float)

CHUNK_NUMEL = 1 << 22
"""Temporaries hold at most this many elements (or one row of them), however large the tensor."""


def rewrite_(
    tensors: Sequence[Tensor],
    scale: Sequence[float],
    diagonal: Sequence[float],
    fill: Sequence[float],
    start: Sequence[int],
    step: Sequence[int],
) -> None:
    """Rewrite every tensor: ``W <- scale * W + diagonal * D + fill``.

    ``D`` is the generalized identity: of ``W`` seen as a matrix (rows: dim 0, columns: the rest flattened), row ``r``
    has its one at column ``start + r * step``, and none where that is outside. With ``scale == 0`` the old values are
    not read; an offset of zero is not added.

    Args:
        tensors: what to rewrite, floating point, any layout.
        scale: one number per tensor, or one for all; so are the others.
        diagonal: the factor of ``D``.
        fill: added everywhere.
        start: the column of row 0's one.
        step: how many columns further each row's one lies.
    """
    for i, tensor in enumerate(tensors):
        _rewrite_one(tensor, _pick(scale, i), _pick(diagonal, i), _pick(fill, i), _pick(start, i), _pick(step, i))


def rescale_fold_(
    weights: Sequence[Tensor], biases: Sequence[Tensor], scale: Sequence[float], shift: Sequence[float]
) -> None:
    """Fold every weight into its bias, then rescale it: ``b <- b + shift * rowsum(W)``, then ``W <- scale * W``.

    The row sum has the order of csrc/affine.h: column ``c`` goes into lane ``c mod L`` with ``L = 512 / itemsize``,
    lanes add their columns in ascending order from +0, and are then added as a binary tree.

    Args:
        weights: each (out, ...), floating point, any layout.
        biases: each (out,), of its weight's dtype and device.
        scale: one number per weight, or one for all.
        shift: so too; with a shift of zero the bias keeps its bits.
    """
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        compute = compute_dtype(weight.dtype)
        factor = round_to(_pick(shift, i), compute)
        if factor != 0:
            bias = bias.detach()
            product = _lane_sums(weight.detach(), compute).mul_(factor)
            bias.copy_(_stored(bias.to(compute) + product, bias.dtype))
        _rewrite_one(weight, _pick(scale, i), 0.0, 0.0, 0, 1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that arithmetic on ``dtype`` is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def round_to(value: float, compute: torch.dtype) -> float:
    """Round a Python float to the compute type, to nearest even. Under torch.compile torch's ops do it."""
    if torch.compiler.is_compiling():
        return value
    value = float(value)
    if compute == torch.float64 or value == 0 or not math.isfinite(value):
        return value
    last_bit = max(math.frexp(value)[1] - 24, -149)
    rounded = math.ldexp(round(math.ldexp(abs(value), -last_bit)), last_bit)
    return math.copysign(rounded if rounded < 2.0**128 else math.inf, value)


def diagonal_rows(rows: int, cols: int, start: int, step: int) -> tuple[int, int]:
    """Return the rows, first and past the last, whose one ``start + r * step`` is a column of the matrix."""
    if step == 0:
        return (0, rows) if 0 <= start < cols else (0, 0)
    low, high = -start, cols - 1 - start
    if step < 0:
        low, high = high, low
    return max(-(-low // step), 0), min(high // step + 1, rows)


def _pick(values: Sequence[_Number], index: int) -> _Number:
    return values[0] if len(values) == 1 else values[index]


def _rewrite_one(weight: Tensor, scale: float, diagonal: float, fill: float, start: int, step: int) -> None:
    weight = weight.detach()
    if weight.dim() == 0:
        weight = weight[None]
    compute = compute_dtype(weight.dtype)
    scale, diagonal, fill = (round_to(value, compute) for value in (scale, diagonal, fill))
    on_diagonal = round_to(diagonal + fill, compute)

    # The diagonal is computed before its neighbours change, and put in place after them.
    ones: tuple[Tensor, ...] | None = None
    if on_diagonal != fill and weight.numel() > 0:
        ones = _diagonal_index(weight, start, step)
    if ones is not None:
        if scale == 0:
            new = torch.full_like(ones[0], 0, dtype=compute).add_(on_diagonal)
        else:
            new = _scaled(_bits(weight)[ones].view(weight.dtype).to(compute), scale, on_diagonal)

    if scale == 0:
        weight.copy_(_stored(torch.full((), fill, dtype=compute, device=weight.device), weight.dtype))
    elif scale != 1 or fill != 0:
        for piece in _pieces(weight):
            if weight.dtype == compute:
                _scaled(piece, scale, fill)
            else:
                piece.copy_(_stored(_scaled(piece.to(compute), scale, fill), weight.dtype))
    if ones is not None:
        _bits(weight)[ones] = _bits(_stored(new, weight.dtype))


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the stored type. float8_e4m3fn has no infinity: what is too large becomes its largest number, 448.

    torch saturates too since 2.13; before, it gave NaN.
    """
    return (values.clamp(-448, 448) if dtype == torch.float8_e4m3fn else values).to(dtype)


def _scaled(values: Tensor, scale: float, offset: float) -> Tensor:
    values.mul_(scale)
    return values.add_(offset) if offset != 0 else values


def _bits(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or its bytes where torch cannot index the dtype."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _diagonal_index(weight: Tensor, start: int, step: int) -> tuple[Tensor, ...] | None:
    """Return the index of the elements on the diagonal, dim by dim as every layout needs; None if there are none."""
    rows = weight.shape[0]
    first, last = diagonal_rows(rows, weight.numel() // rows, start, step)
    if first >= last:
        return None
    row = torch.arange(first, last, device=weight.device)
    column = row * step + start
    index: list[Tensor] = []
    for size in reversed(weight.shape[1:]):
        index.insert(0, column % size)
        column = column // size
    return (row, *index)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield views of at most CHUNK_NUMEL elements that cover the tensor once."""
    if tensor.numel() <= CHUNK_NUMEL:
        yield tensor
        return
    sizes = list(tensor.shape)
    dim = max((d for d in range(tensor.dim()) if sizes[d] > 1), key=lambda d: tensor.stride(d))
    half = sizes[dim] // 2
    yield from _pieces(tensor.narrow(dim, 0, half))
    yield from _pieces(tensor.narrow(dim, half, sizes[dim] - half))


def _lane_sums(weight: Tensor, compute: torch.dtype) -> Tensor:
    """Return the row sums of (out, ...) in the compute type, in the order of csrc/affine.h."""
    rows = weight.shape[0]
    cols = weight.numel() // rows if rows else 0
    lanes = 512 // weight.dtype.itemsize
    sums = torch.zeros(rows, dtype=compute, device=weight.device)
    at_once = max(CHUNK_NUMEL // max(cols, lanes), 1)
    for row in range(0, rows, at_once):
        block = weight[row : row + at_once]
        block = block.reshape(block.shape[0], cols)
        total = torch.zeros(block.shape[0], lanes, dtype=compute, device=weight.device)
        for col in range(0, cols, lanes):
            group = block[:, col : col + lanes]
            total[:, : group.shape[1]] += group.to(compute)
        while total.shape[1] > 1:
            half = total.shape[1] // 2
            total = total[:, :half] + total[:, half:]
        sums[row : row + at_once] = total[:, 0]
    return sums
