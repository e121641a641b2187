"""Every activation against numbers that are computed here: derivatives, recognition, and figures end to end."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from networks import Mlp, perturbed
from torch import nn

import neutralize as nz

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)

# Modules as users write them: name in the library's table, and how it is called here.
SINGLE = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "prelu": nn.PReLU(),
    "elu": F.elu,
    "elu-0.5": lambda x: F.elu(x, 0.5),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.7),
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softplus-3": lambda x: F.softplus(x, 3.0, 15.0),
    "softsign": F.softsign,
    "hardtanh": F.hardtanh,
    "hardtanh-odd": lambda x: F.hardtanh(x, -0.3, 2.0),
    "hardtanh-positive": lambda x: F.hardtanh(x, 0.7, 2.0),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "sin": torch.sin,
}
COMPOSITE = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: torch.sigmoid(x) * x,
    "swish": lambda x: x / (1 + torch.exp(-1.5 * x)),
    "softsign": lambda x: x / (1 + x.abs()),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + torch.tanh(SQRT_2_OVER_PI * (x + 0.044715 * torch.pow(x, 3.0)))),
    "gelu": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "logsigmoid": lambda x: -F.softplus(-x),
    "hardswish": lambda x: x * F.relu6(x + 3) / 6,
    "hardsigmoid": lambda x: torch.clamp(x + 3, 0, 6) / 6,
    "hardtanh": lambda x: x.clamp(-1, 1),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.3 * x),
}
# End to end, relative to the network without the layer, on inputs of unit scale: issue 3.
GOALS = {torch.float64: (1e-9, 1e-7), torch.float32: (2e-5, 3e-4), torch.bfloat16: (3e-2, 0.15)}


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().detach())


class Net(Mlp):
    """The second activation is the one under test; the first is tanh, so that what enters has both signs."""

    def forward(self, x):
        return self.last(self.activation(self.middle(torch.tanh(self.first(x)))))

    def without_middle(self, x):
        return self.last(torch.tanh(self.first(x)))


def check(function, dtype, goal):
    if isinstance(function, nn.Module):
        function = function.to(dtype)
    model, x = perturbed(Net(function)).to(dtype), unit(64, 8).to(dtype)
    plan = nz.plan(model, "middle", example_inputs=x)
    with torch.no_grad():
        wanted = model.without_middle(x)
        with plan.applied(model):
            got = model(x)
    assert relative(got, wanted) <= goal
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds, (verification.per_layer, plan.certificates)
    assert verification.assumptions_hold
    assert verification.relative_error == pytest.approx(relative(got, wanted), rel=1e-3, abs=1e-12)
    return plan.layers[0]


@pytest.mark.parametrize("dtype", GOALS, ids=str)
@pytest.mark.parametrize("name", SINGLE)
def test_every_activation_reaches_its_figure(name, dtype):
    entry = check(SINGLE[name], dtype, GOALS[dtype][name.split("-")[0] in ("sigmoid", "softplus", "logsigmoid")])
    assert entry.activation == {"gelu-tanh": "gelu_tanh"}.get(name, name.split("-")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COMPOSITE)
def test_what_several_ops_compute_is_known_by_its_values(name, dtype):
    entry = check(COMPOSITE[name], dtype, GOALS[dtype][name == "logsigmoid"])
    assert entry.activation == name
