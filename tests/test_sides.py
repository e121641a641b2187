"""The weights that read a layer, for ``zero`` and ``damp``: behind pools, views, sums; against networks cut by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import perturbed
from torch import nn

import neutralize as nz

FUNCTIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}  # φ(0) = 0 and φ(0) = 1/2


class Net(nn.Module):
    """``rest(net, factor · φ(layer(x)), x)``; the factor is 1 but in the oracle."""

    def __init__(self, layer, function, rest, **parts):
        super().__init__()
        self.layer, self.function, self.rest = layer, function, rest
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, x, factor=None):
        h = self.function(self.layer(x))
        return self.rest(self, h if factor is None else factor * h, x)


# name: the shape of x, what the network makes of h and x, its parts, whether a factor below zero will do.
THROUGH = {
    "max pool, flatten": (
        (2, 6, 4, 4), lambda net, h, x: net.head(F.max_pool2d(h, 2).flatten(1)), lambda: nn.Linear(24, 3), False,
    ),
    "adaptive max pool": (
        (2, 6, 4, 4), lambda net, h, x: net.head(F.adaptive_max_pool2d(h, 1)), lambda: nn.Conv2d(6, 3, 1), False,
    ),
    "average pool, padding": (
        (2, 6, 4, 4), lambda net, h, x: net.head(F.pad(F.avg_pool2d(h, 2), (1, 1))),
        lambda: nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), True,
    ),
    "mean, dropout": (
        (2, 5, 6), lambda net, h, x: net.head(F.dropout(h.mean(1), 0.5, net.training)), lambda: nn.Linear(6, 3), True,
    ),
    "sum, factor": ((2, 5, 6), lambda net, h, x: net.head(-h.sum(1) / 3), lambda: nn.Linear(6, 3), True),
    "parts of it": (
        (2, 5, 6), lambda net, h, x: net.head(h.chunk(2, -1)[1]) + x[..., :3], lambda: nn.Linear(3, 3), True,
    ),
    "two calls": ((2, 5, 6), lambda net, h, x: net.head(h).cos() - net.head(h.flip(1)), lambda: nn.Linear(6, 3), True),
}  # fmt: skip
STRATEGIES = [("zero", {"sides": "out"}, 0.0), ("damp", {"factor": 0.5}, 0.5), ("damp", {"factor": -0.3}, -0.3)]


def network(name, function):
    shape, rest, head, _ = THROUGH[name]
    layer = nn.Conv2d(6, 6, 1) if len(shape) == 4 else nn.Linear(6, 6)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return perturbed(Net(layer, FUNCTIONS[function], rest, head=head())).double(), x


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("strategy", "options", "factor"), STRATEGIES)
@pytest.mark.parametrize("name", THROUGH)
def test_the_weights_that_read_a_layer_are_found_behind_what_is_homogeneous(name, strategy, options, factor, function):
    model, x = network(name, function)
    if factor < 0 and not THROUGH[name][3]:
        with pytest.raises(nz.NeutralizeError, match=r"got 'head' behind a maximum"):
            nz.plan(model, "layer", strategy, example_inputs=x, **options)
        return
    plan = nz.plan(model, "layer", strategy, example_inputs=x, **options)
    assert plan.parameters == ("head.weight",)
    with torch.no_grad():
        wanted = model(x, factor)
        with plan.applied(model):
            got = model(x)
    assert torch.equal(got, wanted) if factor == 0 else torch.allclose(got, wanted, rtol=1e-12, atol=1e-14)
    verification = nz.verify(model, plan, x)
    assert verification.exact or factor != 0
    assert verification.relative_error <= 1e-12


ALONE = {
    "a concatenation": (lambda net, h, x: net.head(torch.cat([h, x], -1)), {"head": nn.Linear(12, 3)}),
    "the batch norm": (lambda net, h, x: net.head(h.transpose(1, 2)), {"head": nn.BatchNorm1d(6)}),
    "not the weight of an affine module": (lambda net, h, x: h @ net.weight, {"weight": torch.ones(6, 3)}),
    "not the weight of an affine": (lambda net, h, x: (h * net.weight).cos(), {"weight": torch.ones(6)}),
    "head.in_proj_weight": (
        lambda net, h, x: net.head(h, h, h, need_weights=False)[0],
        {"head": nn.MultiheadAttention(6, 2, batch_first=True)},
    ),
    "tanh": (lambda net, h, x: net.head(torch.tanh(h) + 1), {"head": nn.Linear(6, 3)}),
}


@pytest.mark.parametrize("found", ALONE)
def test_what_does_not_read_the_layer_alone_is_refused_and_both_sides_fall_back_to_its_own(found):
    rest, parts = ALONE[found]
    model = perturbed(Net(nn.Linear(6, 6), torch.sigmoid, rest, **parts))
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3))
    for strategy, options in (("zero", {"sides": "out"}), ("damp", {"factor": 0.5})):
        with pytest.raises(nz.NeutralizeError, match=f"and nothing else, to read 'layer', got .*{found}"):
            nz.plan(model, "layer", strategy, example_inputs=x, **options)
    plan = nz.plan(model, "layer", "zero", example_inputs=x)
    assert set(plan.parameters) == {"layer.weight", "layer.bias"}
    assert nz.verify(model, plan, x).exact
