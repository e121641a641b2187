"""Layers whose output is wider or narrower than their input: the features that fit, only when asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import perturbed
from torch import nn

import neutralize as nz


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(x, width, dim=-1):
    """The first features, zeros for the rest."""
    if x.shape[dim] >= width:
        return x.narrow(dim, 0, width)
    shape = list(x.shape)
    shape[dim] = width - x.shape[dim]
    return torch.cat([x, torch.zeros(shape, dtype=x.dtype)], dim)


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("width", [5, 8, 11])
@pytest.mark.parametrize("act", [nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.Softplus()], ids=lambda act: type(act).__name__)
def test_the_features_that_fit_are_handed_on(act, width):
    model = perturbed(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, width), act, nn.Linear(width, 3)))
    x = unit(32, 4)
    plan = nz.plan(model, "1", "passthrough", example_inputs=x, partial=True)
    with torch.no_grad():
        wanted = model[3](fitted(model[0](x), width))
        with plan.applied(model):
            assert relative(model(x), wanted) <= 3e-4
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.per_layer["1"] <= plan.certificates[0].bound
    assert verification.relative_error <= 3e-4
    note = {5: "features 0:5 of 8 pass, 3 are dropped", 8: "", 11: "features 0:8 of 8 pass, 3 outputs are zero"}[width]
    assert plan.layers[0].note == note
    assert plan.layers[0].target == ("input" if width == 8 else "partial")
    assert nz.Plan.from_json(plan.to_json()) == plan


def test_a_gain_is_handed_on_by_what_fits():
    model = perturbed(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)))
    x = unit(32, 4)
    plan = nz.plan(model, "1", "passthrough", example_inputs=x, partial=True, gain=0.5)
    with torch.no_grad():
        wanted = model[3](0.5 * fitted(model[0](x), 5))
        with plan.applied(model):
            assert relative(model(x), wanted) <= 2e-5
    assert nz.verify(model, plan, x).bound_holds


def test_channels_of_a_convolution():
    model = perturbed(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 2, 3)))
    x = unit(2, 3, 7, 7)
    plan = nz.plan(model, "0", "passthrough", example_inputs=x, partial=True)
    with torch.no_grad():
        wanted = model[2](fitted(x, 6, 1))
        with plan.applied(model):
            assert relative(model(x), wanted) <= 2e-5
    assert nz.verify(model, plan, x).bound_holds


def test_it_is_refused_unless_it_is_asked_for():
    model = perturbed(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)))
    for strategy in ("auto", "passthrough"):
        with pytest.raises(nz.NeutralizeError, match=r"got '0' from 8 to 6 features.*or give partial=True"):
            nz.plan(model, "0", strategy, example_inputs=unit(4, 8))
    grouped = perturbed(nn.Sequential(nn.Conv1d(4, 8, 1, groups=2), nn.Tanh(), nn.Conv1d(8, 2, 1)))
    with pytest.raises(nz.NeutralizeError, match=r"from 4 to 8 features.*ungroup it"):
        nz.plan(grouped, "0", "passthrough", example_inputs=unit(2, 4, 5), partial=True)


def test_the_excised_network_can_be_partial_too():
    model = perturbed(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)))
    x = unit(4, 8)
    with torch.no_grad(), nz.excised(model, "0", partial=True):
        assert torch.equal(model(x), F.linear(x[:, :6], model[2].weight, model[2].bias))
    with pytest.raises(nz.NeutralizeError, match="only a layer that keeps the shape"), nz.excised(model, "0"):
        model(x)
