"""Which gradients each way of switching a layer off leaves: the table of MATH §7, with derivatives by hand."""

from __future__ import annotations

import pytest
import torch
from networks import Mlp, PreNorm, perturbed
from torch import nn

import neutralize as nz


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network():
    return perturbed(nn.Sequential(nn.Linear(8, 8), PreNorm(), nn.Linear(8, 4)))


def gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    (model(x) - 1.0).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()} | {"x": x.grad}


@pytest.mark.parametrize("strategy", ["zero", "constant"])
@pytest.mark.parametrize(
    ("sides", "reaching", "cut"),
    [("out", {"last.weight"}, {"middle.weight", "first.weight"}), ("both", set(), {"middle.weight", "first.weight"})],
)
def test_a_layer_that_is_not_read_is_dead(strategy, sides, reaching, cut):
    """Outgoing zero: the outgoing weights still feel a gradient and can wake up; both zero: nothing does."""
    model, x = perturbed(Mlp(torch.tanh)).double(), unit(16, 8).double()
    options = {"weight": 0.0} if strategy == "constant" else {}
    with nz.plan(model, "middle", strategy, sides=sides, example_inputs=x, **options).applied(model):
        found = gradients(model, x)
    assert all(found[name].any() for name in reaching)
    assert not any(found[name].any() for name in cut | {"x"})
    if sides == "both":
        assert not found["last.weight"].any()


@pytest.mark.parametrize("strategy", ["zero", "constant"])
def test_a_layer_whose_own_weights_are_zero_can_wake_up(strategy):
    model, x = perturbed(Mlp(torch.tanh)).double(), unit(16, 8).double()
    options = {"weight": 0.0} if strategy == "constant" else {}
    with nz.plan(model, "middle", strategy, sides="in", example_inputs=x, **options).applied(model):
        found = gradients(model, x)
    assert found["middle.weight"].any()
    assert not found["last.weight"].any()  # it reads tanh(0)
    assert not found["x"].any()


def test_a_block_that_is_zero_on_its_way_out_wakes_up_and_one_that_is_zero_on_both_sides_does_not():
    model, x = network().double(), unit(16, 8).double()
    for sides, awake in (("out", True), ("both", False)):
        with nz.plan(model, "1", "zero", sides=sides, example_inputs=x).applied(model):
            found = gradients(model, x)
        assert bool(found["1.down.weight"].any()) is awake
        assert not found["1.up.weight"].any()
        assert found["0.weight"].any()  # the skip carries it past


@pytest.mark.parametrize("bound", [0.25, 1.0, 4.0])
def test_a_passthrough_passes_the_gradient_on_and_multiplies_its_own_by_one_over_epsilon(bound):
    """∂y/∂x = V (1 - O(ε²X²)), and ∂y/∂W that of an undistorted layer times 1/ε, both by hand for tanh."""
    model, x = perturbed(Mlp(torch.tanh)).double(), unit(16, 8).double()
    plan = nz.plan(model, "middle", "passthrough", input_bound=bound, example_inputs=x)
    epsilon = plan.layers[0].epsilon
    entering = (bound * torch.linspace(-1, 1, 48, dtype=torch.float64).view(3, 16)).requires_grad_()
    last = model.last.weight.detach().clone()
    with plan.applied(model):
        output = model.last(torch.tanh(model.middle(entering)))
        output.sum().backward()
    wanted = last.sum(0).expand(3, 16)
    # d tanh(εx)/dx / ε = 1 - tanh²(εx), between 1 - ε²X² and 1
    assert float((entering.grad / wanted - 1).abs().max()) <= (epsilon * bound) ** 2 + 1e-12
    undistorted = wanted.T @ entering.detach()  # dL/dW of a linear layer that y = V W x reads
    slopes = 1 - torch.tanh(epsilon * entering.detach()) ** 2
    assert torch.allclose(model.middle.weight.grad, (wanted * slopes).T @ entering.detach() / epsilon, rtol=1e-9)
    assert torch.allclose(model.middle.weight.grad * epsilon, undistorted, rtol=(epsilon * bound) ** 2 + 1e-9)
