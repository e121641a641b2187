"""Odd parts that ops prove, against the functions themselves on a grid."""

import pytest
import torch
from torch.nn import functional as F

from neutralize.parity import odd_gain

PROVEN = {
    "relu": (F.relu, 1.0),
    "silu spelled out": (lambda x: x * torch.sigmoid(x), 1.0),
    "gelu, tanh form": (lambda x: F.gelu(x, approximate="tanh"), 1.0),
    "a multiple and an even part": (lambda x: 3 * x + torch.cos(x) - x.abs(), 6.0),
    "leaky": (lambda x: F.relu(x) - 0.25 * F.relu(-x), 1.25),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), 1.0),
}
NOT = {
    "tanh": torch.tanh,
    "sine": torch.sin,
    "mish": F.mish,
    "shifted": lambda x: F.relu(x + 1),
    "even": lambda x: x * x,
    "a branch": lambda x: x if x > 0 else -x,
    "in place": lambda x: x.add_(1),
    "an unknown op": lambda x: torch.special.gammaln(x),
    "cube": lambda x: x**3,
}


@pytest.mark.parametrize("name", PROVEN)
def test_a_proven_odd_part_is_there(name):
    function, gain = PROVEN[name]
    assert odd_gain(function) == gain
    x = torch.linspace(-40, 40, 1001, dtype=torch.float64)
    torch.testing.assert_close(function(x) - function(-x), gain * x)


@pytest.mark.parametrize("name", NOT)
def test_nothing_is_proven_of_other_functions(name):
    assert odd_gain(NOT[name]) is None
