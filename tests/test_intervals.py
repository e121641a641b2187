"""Interval bounds on derivatives, against autograd on a fine grid: never below it, and hardly above."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from neutralize.intervals import Interval, coefficients

FUNCTIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "cos": torch.cos,
    "mish": F.mish,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "softplus-3": lambda x: F.softplus(x, beta=3.0),
    "atan": torch.atan,
    "snake": lambda x: x + torch.sin(3 * x) ** 2 / 3,
    "lisht": lambda x: x * torch.tanh(x),
    "rational": lambda x: (1 - x) / (1 + x**2),
    "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "new-gelu": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3)))),
    "mixed": lambda x: 1.5 - x.cos() * 2 - torch.log1p(x * x) + (2 + x).sqrt() - (3 + x).log() / 2 + torch.expm1(-x),
    "erf": lambda x: torch.erf(x).square().neg() + x.exp().reciprocal(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.25, 1.75)])
def test_enclosures_contain_the_derivatives_and_are_tight(name, low, high):
    function = FUNCTIONS[name]
    bounds = coefficients(function, low, high)
    x = torch.linspace(low, high, 20_001, dtype=torch.float64, requires_grad=True)
    value = function(x)
    for order, bound in enumerate(bounds):
        largest = float(value.detach().abs().max()) / math.factorial(order)
        assert largest <= bound <= 1.01 * largest + 1e-3
        if order < 2:
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        elif order == 2:  # the third by differences: some second derivatives have none of their own
            step = float(x[1] - x[0])
            value = (value[2:] - value[:-2]).detach() / (2 * step) * (1 - 1e-6)


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        torch.abs,
        F.softsign,
        lambda x: torch.where(x > 0, x, 0.5 * x),
        lambda x: x**0.5,
        lambda x: 1 / x,
        torch.log,
        lambda x: x if x > 0 else -x,
        lambda x: 1.0,
        lambda x: F.gelu(x, approximate="tanh"),
    ],
)
def test_where_a_rule_is_missing_or_a_pole_is_inside_nothing_is_claimed(function):
    assert coefficients(function, -1.0, 1.0) is None


def test_intervals_contain_what_exact_arithmetic_gives():
    one, other = (Interval(torch.tensor([low]), torch.tensor([high])) for low, high in ((-1.0, 2.0), (3.0, 4.0)))
    for got, low, high in (
        (one + other, 2, 6), (one * other, -4, 8), (-one, -2, 1), (other.reciprocal(), 0.25, 1 / 3),
    ):  # fmt: skip
        assert low - 1e-6 <= float(got.low) <= low
        assert high <= float(got.high) <= high + 1e-6
    assert math.isinf(float(one.reciprocal().high))
    assert float(one.magnitude) >= 2.0
