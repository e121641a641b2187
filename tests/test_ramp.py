"""A ramp: the contribution fades while training goes on, and is exactly nothing at the end."""

from __future__ import annotations

import math

import pytest
import torch
from networks import Mlp, OneRms, PreNorm, perturbed
from torch import nn

import neutralize as nz


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network():
    return perturbed(nn.Sequential(nn.Linear(8, 8), PreNorm(), nn.Linear(8, 4)))


FACTORS = {"linear": [0.75, 0.5, 0.25, 0.0], "cosine": [(1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3)] + [0.0]}


@pytest.mark.parametrize("shape", FACTORS)
def test_the_contribution_follows_the_shape(shape):
    model, x = network().double(), unit(16, 8).double()
    with torch.no_grad():
        added = model[1](x) - x
        ramp = nz.ramp(model, "1", steps=4, shape=shape, example_inputs=x)
        assert torch.equal(model[1](x) - x, added)  # making it writes nothing
        for factor in FACTORS[shape]:
            assert ramp.step() == pytest.approx(factor, abs=1e-15)
            assert torch.allclose(model[1](x), x + factor * added, rtol=1e-12, atol=1e-12)
        assert ramp.done
        assert torch.equal(model[1](x), x)


def test_training_in_between_stays_until_the_null():
    model, x = network(), unit(16, 8)
    made = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ramp = nz.ramp(model, "1", steps=10, example_inputs=x)
    while not ramp.done:
        made.zero_grad()
        model(x).square().mean().backward()
        made.step()
        weight = model[1].down.weight.detach().clone()
        previous = ramp.factor
        factor = ramp.step()
        assert torch.allclose(model[1].down.weight, weight * (factor / previous), rtol=1e-6)
    assert torch.equal(model[1](x), x)
    assert not torch.equal(model[0].weight, before["0.weight"])
    with nz.guard(model, ramp.plan, made):  # and there it stays
        for _ in range(5):
            made.zero_grad()
            model(x).square().mean().backward()
            made.step()
    assert torch.equal(model[1](x), x)


def test_a_step_after_the_end_writes_the_null_again():
    model, x = network(), unit(16, 8)
    ramp = nz.ramp(model, "1", steps=1, example_inputs=x)
    assert ramp.step() == 0.0
    with torch.no_grad():
        model[1].down.weight.fill_(float("nan"))
    assert ramp.step() == 0.0
    assert torch.equal(model[1](x), x)


def test_a_factor_of_one_plus_w_fades_as_a_whole():
    class Sandwich(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norm = nn.Linear(8, 8), OneRms(8)

        def forward(self, x):
            return x + self.norm(self.lin(x))

    model, x = perturbed(nn.Sequential(Sandwich(), nn.Linear(8, 2))), unit(16, 8)
    with torch.no_grad():
        added = model[0](x) - x
        ramp = nz.ramp(model, "0", steps=4, example_inputs=x)
        for factor in FACTORS["linear"]:
            ramp.step()
            assert torch.allclose(model[0](x), x + factor * added, atol=1e-5)
    assert bool((model[0].norm.weight == -1).all())
    assert torch.equal(model[0](x), x)


def test_a_plain_layer_fades():
    model, x = perturbed(Mlp(torch.tanh)).double(), unit(16, 8).double()
    ramp = nz.ramp(model, "middle", steps=2, example_inputs=x)
    with torch.no_grad():
        handed_on = torch.tanh(model.middle(torch.tanh(model.first(x))))
        wanted = [model.last(factor * handed_on) for factor in (0.5, 0.0)]
        for output in wanted:
            ramp.step()
            assert torch.allclose(model(x), output, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sides", ["in", "out", "both", None])
def test_either_side_fades_and_the_contribution_follows(sides):
    model, x = perturbed(Mlp(torch.relu)).double(), unit(16, 8).double()
    with torch.no_grad():
        handed_on = torch.relu(model.middle(torch.relu(model.first(x))))
        wanted = {factor: model.last(factor * handed_on) for factor in FACTORS["linear"]}
        ramp = nz.ramp(model, "middle", steps=4, sides=sides, example_inputs=x)
        for factor in FACTORS["linear"]:
            assert ramp.step() == factor
            assert torch.allclose(model(x), wanted[factor], rtol=1e-12, atol=1e-12)
    assert bool(model.middle.weight.any()) is (sides == "out")
    assert bool(model.last.weight.any()) is (sides in ("in", None))


def test_a_weight_between_two_fading_layers_fades_for_both():
    model = perturbed(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))).double()
    x = unit(16, 8).double()
    with torch.no_grad():
        first = torch.tanh(model[0](x))
        wanted = [model[4](factor * torch.relu(model[2](factor * first))) for factor in (0.5, 0.0)]
        ramp = nz.ramp(model, ["0", "2"], steps=2, example_inputs=x)  # 2.weight reads the one and is the other's own
        for output in wanted:
            ramp.step()
            assert torch.allclose(model(x), output, rtol=1e-12, atol=1e-12)


def test_restore_gives_back_these_weights_and_keeps_the_training_of_the_others():
    model, x = network(), unit(16, 8)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ramp = nz.ramp(model, "1", steps=3, example_inputs=x)
    ramp.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    ramp.restore()
    assert ramp.factor == 1.0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is (name in ramp.plan.parameters)
    ramp.restore()
    with pytest.raises(nz.NeutralizeError, match=r"ramp: expected a ramp that is on, got a step after restore"):
        ramp.step()


def test_an_exception_restores_and_a_normal_end_does_not():
    model, x = network(), unit(16, 8)
    before = model[1].down.weight.detach().clone()
    with pytest.raises(KeyError), nz.ramp(model, "1", steps=2, example_inputs=x) as ramp:
        raise KeyError(ramp.step())
    assert torch.equal(model[1].down.weight, before)
    with nz.ramp(model, "1", steps=2, example_inputs=x) as ramp:
        ramp.step()
        assert repr(ramp) == "Ramp(1 of 2 steps, factor 0.5)"
    assert torch.equal(model[1].down.weight, before * 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"ramp: expected a number of steps of 1 or more, got 0"),
        ({"steps": 2.5}, r"got 2\.5"),
        ({"steps": True}, r"got True"),
        ({"steps": 3, "shape": "sine"}, r"ramp: expected linear or cosine for shape, got 'sine'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(nz.NeutralizeError, match=message):
        nz.ramp(network(), "1", example_inputs=unit(16, 8), **options)
