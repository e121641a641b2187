"""Blocks Linear-φ-Linear that hand their input on by pairs of hidden units, against the input itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import perturbed
from torch import nn

import neutralize as nz


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ReluSquared(nn.Module):
    def forward(self, x):
        return F.relu(x).square()


ODD = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "quick_gelu": QuickGelu(),
    "hardswish": nn.Hardswish(),
    "softplus": nn.Softplus(),
    "logsigmoid": nn.LogSigmoid(),
}


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(activation, hidden=20, bias=True):
    block = nn.Sequential(nn.Linear(8, hidden, bias=bias), activation, nn.Dropout(0.1), nn.Linear(hidden, 8, bias=bias))
    return perturbed(nn.Sequential(nn.Linear(5, 8), block, nn.Linear(8, 3)))


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", ODD)
def test_a_pair_hands_on_inputs_far_larger_than_the_example(name):
    model, x = network(ODD[name]), unit(64, 5)
    plan = nz.plan(model, "1", example_inputs=x)
    assert plan.certificates[0].kind in (("exact",) if name == "relu" else ("rounding", "bounded"))
    with torch.no_grad():
        for size in (1.0, 50.0):
            wanted = model[2](model[0](size * x))
            with plan.applied(model):
                got = model(size * x)
            assert relative(got, wanted) <= 1e-5
            assert torch.equal(got, wanted) or name != "relu"
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.assumptions_hold
    assert verification.gradient_gain["1"] == pytest.approx(1.0, rel=1e-5)
    assert verification.relative_error <= 1e-5


CASES = [(name, dtype) for name in ODD for dtype in (torch.float32, torch.bfloat16)]
CASES += [("gelu", torch.float64), ("softplus", torch.float64), ("silu", torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_the_bound_holds_at_every_size(name, dtype):
    model = network(ODD[name], hidden=16, bias=name != "silu").to(dtype)
    for size in (1e-2, 100.0):
        x = (size * unit(256, 5)).to(dtype)
        verification = nz.verify(model, nz.plan(model, "1", example_inputs=x), x)
        assert verification.bound_holds, (size, verification.per_layer, verification.bounds)
        assert verification.assumptions_hold
        assert verification.bounds["1"] <= 120 * torch.finfo(dtype).eps / min(size, 1.0) + 2e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_relu_squared_needs_a_bound_and_measures_it(dtype):
    model, x = network(ReluSquared()).to(dtype), unit(64, 5).to(dtype)
    plan = nz.plan(model, "1", example_inputs=x)
    assert plan.layers[0].input_bound is not None
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.assumptions_hold
    assert verification.relative_error <= 32 * torch.finfo(dtype).eps
    assert not nz.verify(model, plan, 9 * x).assumptions_hold


def test_what_is_written():
    model = network(nn.ReLU(), hidden=20)
    with torch.no_grad(), nz.plan(model, "1", example_inputs=unit(4, 5)).applied(model):
        eye, rest = torch.eye(8), torch.zeros(4, 8)
        assert torch.equal(model[1][0].weight, torch.cat([eye, -eye, rest]))
        assert torch.equal(model[1][3].weight, torch.cat([eye, -eye, rest]).T)
        assert not model[1][0].bias.any()
        assert not model[1][3].bias.any()


def test_convolutions_of_one_tap():
    block = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))
    model = perturbed(nn.Sequential(nn.Conv2d(3, 4, 3), block, nn.Conv2d(4, 2, 3)))
    x = unit(2, 3, 9, 9)
    plan = nz.plan(model, "1", example_inputs=x)
    with torch.no_grad(), plan.applied(model):
        assert relative(model(x), model[2](model[0](x))) <= 1e-6
    assert plan.certificates[0].kind == "exact"
    assert nz.verify(model, plan, x).bound_holds


class Transposed(nn.Module):
    """GPT-2's Conv1D: the weight is stored (in, out)."""

    def __init__(self, nx, nf):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.bias.numel())


def test_weights_stored_the_other_way_round():
    block = nn.Sequential(Transposed(8, 32), nn.GELU("tanh"), Transposed(32, 8))
    model, x = perturbed(nn.Sequential(block, nn.Linear(8, 3))), unit(2, 5, 8)
    plan = nz.plan(model, "0", example_inputs=x)
    with torch.no_grad(), plan.applied(model):
        assert relative(model(x), model[1](x)) <= 1e-6
    assert nz.verify(model, plan, x).bound_holds


def test_two_linear_layers_alone_are_two_identities():
    model, x = perturbed(nn.Sequential(nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8)), nn.Linear(8, 3))), unit(4, 8)
    with torch.no_grad(), nz.plan(model, "0", example_inputs=x).applied(model):
        assert torch.equal(model(x), model[1](x))


def test_a_gain_is_handed_on():
    model, x = network(nn.GELU()), unit(16, 5)
    plan = nz.plan(model, "1", "passthrough", example_inputs=x, gain=1.5)
    with torch.no_grad(), plan.applied(model):
        assert relative(model(x), model[2](1.5 * model[0](x))) <= 1e-6
    assert nz.verify(model, plan, x).bound_holds


class TwoReaders(nn.Module):
    """The hidden units are read twice: no pair."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        h = F.relu(self.up(x))
        return self.down(h) * h.mean()


class Folded(nn.Module):
    """The features are moved between the two layers: no pair."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).view(-1, 2, 8)).sum(1)


REFUSALS = {
    "too few hidden units": (
        lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)),
        r"at least 16 hidden units for the 8 features of the pair '0', got 12",
    ),
    "mish": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.Mish(), nn.Linear(16, 8)),
        r"proportional to x in the pair '0'.*got mish",
    ),
    "unknown": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.Hardshrink(), nn.Linear(16, 8)),
        r"expected a known activation in the pair '0', got hardshrink",
    ),
    "two readers": (TwoReaders, r"no skip connection"),
    "features moved": (Folded, r"no skip connection"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_pair_is_refused_by_its_cause(name):
    build, message = REFUSALS[name]
    model = perturbed(nn.Sequential(build(), nn.Linear(8, 2)))
    with pytest.raises(nz.NeutralizeError, match=message):
        nz.plan(model, "0", example_inputs=unit(4, 8))


def test_kernels_of_more_taps_are_refused():
    block = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = perturbed(nn.Sequential(block, nn.Conv2d(4, 2, 1)))
    with pytest.raises(nz.NeutralizeError, match=r"expected 1×1 convolutions.*got '0\.0' with kernel \[3, 3\]"):
        nz.plan(model, "0", example_inputs=unit(1, 4, 5, 5))


def test_shared_layers_are_refused():
    shared = nn.Linear(8, 16)
    model = perturbed(nn.Sequential(nn.Sequential(shared, nn.ReLU(), nn.Linear(16, 8)), shared))
    with pytest.raises(nz.NeutralizeError, match=r"weight', which is also read elsewhere"):
        nz.plan(model, "0", example_inputs=unit(4, 8))


# ---- registered activations ------------------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(6, 14), nn.Linear(14, 6), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


def test_a_registered_activation_does_in_pairs_where_its_ops_prove_it():
    def tilted(z):  # its odd part is 1.25 z, its even part is not
        return 0.75 * z + nn.functional.silu(z) + torch.cos(z)

    nz.register_activation("tilted", tilted)
    try:
        model = nn.Sequential(_Block(tilted), nn.Linear(6, 3)).eval()
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
        plan = nz.plan(model, "0", example_inputs=x)
        assert plan.certificates[0].kind == "measured"
        with torch.no_grad(), plan.applied(model):
            for scale in (1.0, 50.0):
                wanted = model[1](scale * x)
                assert (model(scale * x) - wanted).norm() / wanted.norm() <= 1e-5
    finally:
        nz.forget_activation("tilted")


def test_a_registered_activation_whose_ops_prove_nothing_is_refused_in_pairs():
    def bent(z):
        return torch.tanh(z) * z + torch.sin(z)

    nz.register_activation("bent", bent)
    try:
        model = nn.Sequential(_Block(bent), nn.Linear(6, 3)).eval()
        with pytest.raises(nz.NeutralizeError, match="got bent, whose ops do not prove that, or overflow"):
            nz.plan(model, "0", example_inputs=torch.randn(5, 6))
    finally:
        nz.forget_activation("bent")
