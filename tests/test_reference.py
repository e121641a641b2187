"""The specification against element-by-element arithmetic written once more, independently: numpy scalars and loops."""

import math
import struct

import numpy as np
import pytest
import torch

from neutralize import reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (5, 3), (4, 0), (0, 4), (2, 3, 2, 2), (1, 9), (9, 1)]
COEFFICIENTS = [
    (0.0, 0.0, 0.0, 0, 1),
    (0.0, 1.0, 0.0, 0, 1),
    (0.0, 0.0, 0.1, 0, 1),
    (0.0, 1.0, -1.0, 1, 2),
    (1.0, 1.0, 0.0, -2, 1),
    (0.7, 0.3, 0.0, 4, -1),
    (-1.3, 0.3, 0.1, 0, 0),
    (1.0, 0.0, 0.0, 0, 1),
]


def by_hand(weight: torch.Tensor, scale: float, diagonal: float, fill: float, start: int, step: int) -> torch.Tensor:
    """The rewrite with numpy scalars, one element after the other."""
    number = np.float64 if weight.dtype == torch.float64 else np.float32
    scale, diagonal, fill = number(scale), number(diagonal), number(fill)
    if weight.numel() == 0:
        return weight.clone()
    rows = weight.shape[0] if weight.dim() else 1
    matrix = weight.to(torch.float64 if number is np.float64 else torch.float32).reshape(rows, -1).numpy().copy()
    for row in range(matrix.shape[0]):
        for col in range(matrix.shape[1]):
            offset = fill + diagonal if col == start + row * step else fill
            if scale == 0:
                matrix[row, col] = offset
                continue
            value = scale * matrix[row, col]
            matrix[row, col] = value + offset if offset != 0 else value
    return stored(torch.from_numpy(matrix).reshape(weight.shape), weight.dtype)


def stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What .to() of torch >= 2.13 gives; earlier ones turn what is too large for float8_e4m3fn into NaN."""
    return (values.clamp(-448, 448) if dtype == torch.float8_e4m3fn else values).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, where any NaN counts as any other."""
    nan = a.double().isnan()
    if not torch.equal(nan, b.double().isnan()):
        return False
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(kind)[~nan], b.contiguous().view(kind)[~nan])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rewrite_by_hand(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for coefficients in COEFFICIENTS:
        weight = torch.randn(shape).to(dtype)
        expected = by_hand(weight, *coefficients)
        reference.rewrite_([weight], *[[c] for c in coefficients])
        assert same_bits(weight, expected), coefficients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = torch.randn(6, 5, 4).to(dtype)
    for view in (
        lambda t: t.transpose(0, 2),
        lambda t: t[::2, :, 1:],
        lambda t: t[:, 1, :].t(),
        lambda t: t.permute(1, 2, 0)[1:],
    ):
        for coefficients in COEFFICIENTS:
            whole, dense = base.clone(), view(base).clone(memory_format=torch.contiguous_format)
            reference.rewrite_([view(whole)], *[[c] for c in coefficients])
            reference.rewrite_([dense], *[[c] for c in coefficients])
            assert same_bits(view(whole), dense)
            untouched = view(torch.ones_like(base, dtype=torch.bool))
            marks = torch.zeros_like(base, dtype=torch.bool)
            view(marks).copy_(untouched)
            assert same_bits(whole[~marks], base[~marks])


def test_old_values_are_not_read() -> None:
    weight = torch.full((4, 4), math.nan)
    weight[0] = math.inf
    reference.rewrite_([weight], [0.0], [1.0], [0.5], [0], [1])
    assert torch.equal(weight, torch.eye(4) + 0.5)


def test_an_offset_of_zero_keeps_the_sign_of_zero() -> None:
    weight = torch.tensor([-0.0, 0.0])
    reference.rewrite_([weight], [2.0], [0.0], [0.0], [0], [1])
    assert weight.signbit().tolist() == [True, False]


def test_large_tensors_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for shape in ((17, 13), (1, 221), (221,), (3, 7, 11)):
        for dtype in (torch.bfloat16, torch.float32):
            weight = torch.randn(shape).to(dtype)
            bias = torch.randn(shape[0]).to(dtype)
            whole = (weight.clone(), bias.clone())
            reference.rescale_fold_([whole[0]], [whole[1]], [0.5], [0.3])
            reference.rewrite_([whole[0]], [0.5], [1.0], [0.1], [0], [1])
            with monkeypatch.context() as patch:
                patch.setattr(reference, "CHUNK_NUMEL", 10)
                pieces = list(reference._pieces(weight))
                assert len(pieces) > 10
                assert max(piece.numel() for piece in pieces) <= 10
                assert sum(piece.numel() for piece in pieces) == weight.numel()
                reference.rescale_fold_([weight], [bias], [0.5], [0.3])
                reference.rewrite_([weight], [0.5], [1.0], [0.1], [0], [1])
            assert same_bits(weight, whole[0])
            assert same_bits(bias, whole[1])


def test_round_to_float32() -> None:
    values = [0.1, -0.1, 1e-40, -1e-45, 7e-46, 7.1e-46, 3.4028235e38, 3.4028236e38, 2.0**128, -(2.0**128), 1 + 2.0**-24]
    values += [1 + 3 * 2.0**-24, 5e-324, 0.0, -0.0, 3.4028235677973366e38, 3.4028235677973362e38]
    values += [
        float(v) for v in np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.arange(-500, 500).clip(-45, 38)
    ]
    with np.errstate(over="ignore"):
        for value in values:
            expected = float(np.float32(value))
            assert struct.pack("d", reference.round_to(value, torch.float32)) == struct.pack("d", expected), value
    assert reference.round_to(0.1, torch.float64) == 0.1


def test_diagonal_rows_by_hand() -> None:
    for rows in range(5):
        for cols in range(5):
            for start in range(-6, 7):
                for step in range(-4, 5):
                    hit = [r for r in range(rows) if 0 <= start + r * step < cols]
                    first, last = reference.diagonal_rows(rows, cols, start, step)
                    assert list(range(first, last)) == hit, (rows, cols, start, step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_by_hand(dtype: torch.dtype) -> None:
    """The lanes and the tree of the row sum, with numpy scalars."""
    torch.manual_seed(0)
    number = np.float64 if dtype == torch.float64 else np.float32
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lanes = {8: 64, 4: 128, 2: 256, 1: 512}[dtype.itemsize]
    for cols in (0, 1, 63, 64, 65, 513, 1100):
        weight, bias = torch.randn(2, cols).to(dtype), torch.randn(2).to(dtype)
        expected = []
        for row in range(2):
            lane = [number(0)] * lanes
            for col, value in enumerate(weight[row].to(wide).numpy()):
                lane[col % lanes] = lane[col % lanes] + value
            while len(lane) > 1:
                half = len(lane) // 2
                lane = [lane[i] + lane[i + half] for i in range(half)]
            expected.append(bias[row].to(wide).numpy()[()] + number(0.7) * lane[0])
        rescaled = by_hand(weight, 0.9, 0.0, 0.0, 0, 1)
        reference.rescale_fold_([weight], [bias], [0.9], [0.7])
        assert same_bits(bias, stored(torch.tensor(np.array(expected)), dtype)), cols
        assert same_bits(weight, rescaled)


def test_fold_corner_cases() -> None:
    weight, bias = torch.tensor([[math.inf, 1.0]]), torch.tensor([-0.0])
    reference.rescale_fold_([weight], [bias], [0.0], [0.0])
    assert bias.signbit().item()  # a shift of zero leaves the bias alone, whatever the weight holds
    assert torch.equal(weight, torch.zeros(1, 2))
    weight, bias = torch.ones(2, 2, 3), torch.zeros(2)
    reference.rescale_fold_([weight], [bias], [2.0], [1.0])
    assert bias.tolist() == [6.0, 6.0]
    assert weight.unique().tolist() == [2.0]
