"""The error formulas of the linear parts, and the choice of the operating point, against dense grids in float64."""

from __future__ import annotations

import math

import pytest
import torch

from neutralize.activations import ACTIVATIONS, celu, elu, hardtanh, leaky_relu, softplus, swish
from neutralize.regime import choose, evaluation_roundoffs, unit_roundoff

ROWS = (
    *ACTIVATIONS,
    leaky_relu(0.3),
    elu(0.5),
    elu(2.0, 1.5, 0.5),
    celu(0.3),
    celu(4.0),
    softplus(0.25),
    softplus(5.0, 15.0),
    hardtanh(-0.25, 3.0),
    hardtanh(1.0, 1.5),
    swish(0.5),
)
NAMES = [f"{row.name}-{place}" for place, row in enumerate(ROWS)]
PARTS = [(row, part) for row in ROWS for part in row.parts]


def reach(part):
    """Distances from the point over which the formula of a part is tried."""
    below, above = min(part.below, 20.0), min(part.above, 20.0)
    return torch.cat([-torch.linspace(0, below, 200_001).double(), torch.linspace(0, above, 200_001).double()])


@pytest.mark.parametrize(("row", "part"), PARTS, ids=[f"{row.name}-{part.regime}" for row, part in PARTS])
def test_the_formula_of_every_linear_part_holds_on_a_fine_grid(row, part):
    if part.regime == "shift":
        side = -1.0 if part.downward else 1.0
        z = side * (abs(part.point) + torch.linspace(0, 60, 200_001, dtype=torch.float64))
        error = (row.function(z) - part.slope * z).abs()
        allowed = torch.zeros_like(z) if part.tail is None else part.tail[0] * torch.exp(-part.tail[1] * z.abs())
        assert (error <= allowed + 1e-15 * z.abs() + 1e-15).all()
        return
    point = torch.tensor(part.point, dtype=torch.float64)
    assert float(row.function(point)) == pytest.approx(part.value, abs=1e-15)
    d = reach(part)
    error = (row.function(part.point + d) - part.value - part.slope * d).abs()
    allowed = abs(part.slope) * (part.quadratic * d**2 + part.cubic * d.abs() ** 3)
    assert (error <= allowed + 2e-15 * (1 + d.abs())).all()


SMOOTH = [(row, part) for row, part in PARTS if part.regime == "origin"]


@pytest.mark.parametrize(("row", "part"), SMOOTH, ids=[f"{row.name}-{row.source[:8]}" for row, part in SMOOTH])
def test_the_suprema_of_the_derivatives_are_neither_exceeded_nor_far_off(row, part):
    """By differences of autograd's first derivative, which do not know the formulas of the table."""
    d = reach(part)[::2]
    z = (part.point + d).requires_grad_()
    (slope,) = torch.autograd.grad(row.function(z).sum(), z)
    step = 1e-4
    with torch.enable_grad():
        sides = []
        for shift in (-step, step):
            shifted = (part.point + d + shift).requires_grad_()
            sides.append(torch.autograd.grad(row.function(shifted).sum(), shifted)[0])
    first, second = (sides[1] - sides[0]) / (2 * step), (sides[1] - 2 * slope + sides[0]) / step**2
    at_point = float(slope[d.abs().argmin()])
    inner = (d > -part.below + step) & (d < part.above - step)
    inner &= d.abs() > 2 * step if row.name in ("elu", "celu", "softsign") else True  # φ'' jumps at 0
    assert at_point == pytest.approx(part.slope, rel=1e-7)  # autograd of celu rounds its alpha to float32
    if part.cubic:
        assert part.quadratic == 0.0
        supremum = float(second[inner].abs().max()) / (6 * abs(part.slope))
        assert 0.99 * part.cubic <= supremum <= part.cubic + 1e-5
    else:
        supremum = float(first[inner].abs().max()) / (2 * abs(part.slope))
        assert 0.99 * part.quadratic <= supremum <= part.quadratic + 1e-5


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
@pytest.mark.parametrize("non_negative", [False, True], ids=["both-signs", "non-negative"])
def test_what_a_layer_hands_on_is_within_the_bound(row, dtype, non_negative):
    for bound in (0.01, 1.0, 30.0):
        regime = choose(row, dtype, bound, non_negative=non_negative)
        if regime is None:  # it would not fit the format
            assert dtype == torch.float16
            continue
        x = bound * torch.linspace(0.0 if non_negative else -1.0, 1.0, 20_001, dtype=torch.float64)
        x = x.to(dtype).clamp(-bound, bound)
        z = (regime.epsilon * x + regime.point).to(dtype)
        got = (row.function(z).double() - regime.value) / (regime.epsilon * regime.slope)
        error = float((got - x.double()).abs().max())
        assert error <= regime.error + 1e-14 * bound, (bound, regime)
        assert math.frexp(regime.epsilon)[0] == 0.5
        assert float(torch.tensor(regime.point, dtype=torch.float64).to(dtype).double()) == regime.point


@pytest.mark.parametrize(
    ("row", "at_most"),
    [(row, 1e-3 if row.name in ("sigmoid", "softplus", "logsigmoid", "relu_squared") else 6e-5) for row in ROWS],
    ids=NAMES,
)
def test_float32_loses_little(row, at_most):
    assert choose(row, torch.float32, 4.0).error / 4.0 <= at_most


def test_the_best_part_is_taken():
    assert choose(elu(), torch.bfloat16, 4.0).point == 0.0  # small ε: nothing but the format's own rounding
    assert choose(elu(0.5), torch.bfloat16, 4.0).point >= 4.0  # a kink at 0: from the linear side
    assert choose(hardtanh(-1.0, 1.0), torch.float32, 0.5).epsilon >= 1.0
    assert choose(hardtanh(0.0, 6.0), torch.float32, 4.0, non_negative=True).point == 0.0
    assert choose(hardtanh(0.0, 6.0), torch.float32, 4.0).point == 3.0
    assert choose(hardtanh(0.0, 6.0), torch.float32, 4.0, has_bias=False) is None
    assert choose(leaky_relu(), torch.float32, 4.0, non_negative=True).error == 0.0


def test_what_several_ops_compute_rounds_in_each_of_them():
    from dataclasses import replace

    row = swish()
    assert evaluation_roundoffs(replace(row, composite=3), torch.bfloat16) == 3 * evaluation_roundoffs(
        row, torch.bfloat16
    )
    assert unit_roundoff(torch.bfloat16) == 2**-8


def test_a_composite_that_cancels_is_not_relied_on():
    """tanh from exponentials has no digits left where ε is small: an operating point has to be found that it bears."""
    from dataclasses import replace

    tanh = next(row for row in ACTIVATIONS if row.name == "tanh")
    clumsy = replace(tanh, function=lambda z: (z.exp() - (-z).exp()) / (z.exp() + (-z).exp()), composite=4)
    regime = choose(clumsy, torch.float32, 1.0)
    x = torch.linspace(-1, 1, 10_001)
    got = clumsy.function(regime.epsilon * x) / regime.epsilon
    assert regime.epsilon > choose(tanh, torch.float32, 1.0).epsilon
    assert float((got - x).abs().max()) <= 2 * regime.error


def test_odd_parameters_do_not_mislead():
    """Limits at infinity, slopes that vanish or are negative."""
    assert choose(hardtanh(-math.inf, math.inf), torch.float32, 3.0).point == 0.0
    assert choose(hardtanh(-1.0, math.inf), torch.float32, 3.0).epsilon == 0.25
    assert choose(hardtanh(1.0, math.inf), torch.float32, 3.0) is None
    assert choose(softplus(0.0), torch.float32, 3.0) is None
    assert choose(elu(1.0, 0.0), torch.float32, 3.0) is None
    falling = choose(elu(1.0, -2.0), torch.float32, 3.0)
    assert falling.slope == -2.0
    x = torch.linspace(-3, 3, 1001)
    got = (elu(1.0, -2.0).function(falling.epsilon * x + falling.point) - falling.value) * falling.rescale
    assert float((got - x).abs().max()) <= falling.error
