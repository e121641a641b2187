"""The certificate of a whole plan: by hand where that is possible, and never below what is measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import Mlp, PreNorm, perturbed
from torch import nn

import neutralize as nz
from neutralize.activations import ACTIVATIONS, celu, elu, hardtanh, leaky_relu, lipschitz_within, softplus, swish
from neutralize.composition import compose
from neutralize.planner import Request
from neutralize.select import select


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROWS = (
    *ACTIVATIONS,
    leaky_relu(-3.0),
    elu(2.0, 1.5, 3.0),
    celu(0.3),
    softplus(5.0, 15.0),
    hardtanh(0.7, 2.0),
    swish(-2.0),
)


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.name}-{place}" for place, row in enumerate(ROWS)])
def test_lipschitz_factors_and_ceilings_are_those_of_a_fine_grid(row):
    reach = 6.0
    z = torch.linspace(-reach, reach, 1_200_001, dtype=torch.float64)
    y = row.function(z)
    steepest = float((y.diff() / z.diff()).abs().max())
    factor = lipschitz_within(row, reach)
    if row.name == "prelu":  # its factor is that of its weight
        assert factor is None
        return
    assert 0.99 * factor <= steepest + row.jump / 1e-5
    assert steepest <= factor * (1 + 1e-6) + row.jump / 1e-5
    assert float(y.abs().max()) <= row.ceiling


def test_exact_layers_are_exact_together_and_rounding_ones_round():
    model, x = perturbed(nn.Sequential(PreNorm(), PreNorm(), nn.Linear(8, 8), nn.Linear(8, 3))), unit(4, 8)
    whole = nz.plan(model, ["0", "1", "2"], example_inputs=x).certificate
    assert (whole.layer, whole.kind, whole.bound) == ("", "exact", 0.0)
    pair = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    model = perturbed(nn.Sequential(PreNorm(), pair, nn.Linear(8, 3)))
    whole = nz.plan(model, ["0", "1"], example_inputs=x).certificate
    assert whole.kind == "rounding"
    assert 0 < whole.bound < 1e-4


def test_the_bound_is_the_layers_error_times_the_norm_of_what_follows():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[1.0, -4.0], [2.0, 0.5]]))
        model[4].weight.copy_(torch.tensor([[3.0, -4.0]]))
    x = torch.ones(1, 2).double()
    plan = nz.plan(model, ["0", "2"], "passthrough", example_inputs=x, input_bound=8.0)
    first, second = (
        replace(entry, certificate=replace(entry.certificate, bound=bound))
        for entry, bound in zip(plan.layers, (1e-3, 1e-4), strict=True)
    )
    # ‖[3 -4]‖ = 7, tanh 1, ‖[[1 -4] [2 0.5]]‖ = 5; the layers' errors are 0.008 and 0.0008
    alone = compose(Request(model, select(model, "0"), x), [first])
    assert (alone.kind, alone.bound) == ("bounded", pytest.approx(7 * 1 * 5 * 8e-3, rel=1e-5))
    both = compose(Request(model, select(model, ["0", "2"]), x), [first, second])
    assert both.bound == pytest.approx(7 * (8e-3 + 8e-4), rel=1e-5)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


class Scores(nn.Module):
    """Attention by matrix products, with a mask and a softmax."""

    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        scores = self.q(x) @ x.transpose(-1, -2) / 8**0.5
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return torch.where(keep, scores, -1e4).softmax(-1) @ self.v(x)


class Arithmetic(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(8))
        self.last = nn.Linear(16, 8)

    def forward(self, x):
        y = (
            x.clamp(-1, 2) * self.gain
            - 0.5 * x.square()
            + x.pow(3) / 3
            + torch.maximum(x, x.abs().mean(-1, keepdim=True))
        )
        return self.last(torch.cat([y.sum(1, keepdim=True).expand_as(y), y.cos().erf()], -1))


FOLLOWING = {
    "linear": lambda: nn.Linear(8, 5),
    "two": lambda: nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 4)),
    "layer norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)),
    "rms norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8, eps=1e-3)),
    "block": lambda: nn.Sequential(nn.Linear(8, 8), PreNorm()),
    "attention": lambda: nn.Sequential(nn.Linear(8, 8), Attention()),
    "scores": lambda: nn.Sequential(nn.Linear(8, 8), Scores()),
    "arithmetic": lambda: nn.Sequential(nn.Linear(8, 8), Arithmetic()),
    "silu spelled out": lambda: nn.Sequential(nn.Linear(8, 8), Spelled(lambda x: x / (1 + torch.exp(-x)))),
    "prelu": lambda: nn.Sequential(nn.Linear(8, 8), nn.PReLU(1, -3.0)),
    "relu squared": lambda: nn.Sequential(nn.Linear(8, 8), Spelled(lambda x: F.relu(x) ** 2)),
}
IMAGES = {
    "convolution": lambda: nn.Conv2d(8, 4, 3, padding=1, groups=2),
    "transposed": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2)),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3)),
    "group norm": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)),
    "instance norm": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8, affine=True)),
    "pools": lambda: nn.Sequential(nn.AvgPool2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)),
    "upsampled": lambda: nn.Sequential(nn.Conv2d(8, 2, 1), nn.Upsample(scale_factor=2, mode="bilinear")),
    "normed": lambda: nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)),
}


class Spelled(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*FOLLOWING, *IMAGES])
def test_every_rule_bounds_what_is_measured(name, dtype):
    """Behind a sigmoid, whose error is the largest of all activations, at several sizes of the input."""
    first = nn.Conv2d(8, 8, 1) if name in IMAGES else nn.Linear(8, 8)
    following = {**FOLLOWING, **IMAGES}[name]()
    model = perturbed(nn.Sequential(first, nn.Sigmoid(), following)).to(dtype)
    x = unit(*((2, 8, 4, 4) if name in IMAGES else (4, 5, 8))).to(dtype)
    plan = nz.plan(
        model, "0", "passthrough", example_inputs=x, tolerance=1e9
    )  # the convolution's borders: 0 is not φ(a)
    whole = plan.certificate
    assert whole.kind == "bounded", whole.reason
    for size in (1.0, 0.1, -1.0):
        with torch.no_grad():
            wanted = following(size * x)
            with plan.applied(model):
                error = float((model(size * x).double() - wanted.double()).abs().max())
        assert 0 < error <= whole.bound, (error, whole.bound)
        verification = nz.verify(model, plan, size * x)
        assert verification.output_error == error
        assert verification.output_bound == whole.bound
        assert verification.bound_holds
        assert verification.assumptions_hold


def test_many_layers_in_a_chain_are_bounded_together():
    names = ["0", "2", "4", "6"]
    layers = [nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)]
    model = perturbed(nn.Sequential(*layers, nn.Softplus(), nn.Linear(8, 2))).double()
    x = unit(64, 8).double()
    plan = nz.plan(model, names, example_inputs=x)
    with torch.no_grad():
        wanted = model[8](x)
        with plan.applied(model):
            error = float((model(x) - wanted).abs().max())
    norm = float(model[8].weight.detach().abs().sum(1).max())
    own = sum(entry.certificate.bound * entry.input_bound for entry in plan.layers)
    assert 0 < error <= plan.certificate.bound
    assert norm * own * (1 - 1e-9) <= plan.certificate.bound <= 4 * norm * own


def test_a_bound_that_is_exceeded_is_seen():
    model, x = perturbed(nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3))), unit(16, 8)
    plan = nz.plan(model, "0", example_inputs=x)
    low = replace(plan, end_to_end=replace(plan.certificate, bound=1e-12))
    assert not nz.verify(model, low, x).bound_holds
    assert "A BOUND IS EXCEEDED" in str(nz.verify(model, low, x))
    assert nz.verify(model, low, 9 * x).bound_holds  # its assumption does not hold: nothing is claimed
    assert not nz.verify(model, low, 9 * x).assumptions_hold


class Unruled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x))).cumsum(-1)


class Recorded(Unruled):
    def forward(self, x):
        y = self.last(torch.tanh(self.first(x)))
        return y * 2 if y.sum().item() > 0 else y


def test_where_a_factor_is_missing_it_is_measured_and_the_reason_is_given():
    for build, reason in ((Unruled, "no Lipschitz factor for cumsum"), (Recorded, "recorded in one run")):
        whole = nz.plan(perturbed(build()), "first", example_inputs=unit(4, 8)).certificate
        assert (whole.kind, whole.bound) == ("measured", None)
        assert reason in whole.reason
    with torch.device("meta"):
        shadow = Mlp(torch.tanh).eval()
    plan = nz.plan(shadow, "middle", "passthrough", example_inputs=unit(4, 8), input_bound=1.0)
    assert "meta model" in plan.certificate.reason
    model = perturbed(Mlp(torch.tanh))
    assert nz.plan(model, "middle", "constant", example_inputs=unit(4, 8)).certificate.kind == "measured"


def test_the_models_inputs_are_bounded_only_where_that_is_needed():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, y):
            return self.last(torch.tanh(self.first(x))) + y

    model, x, y = perturbed(Added()), unit(4, 8), 100 * unit(4, 8, seed=5)
    plan = nz.plan(model, "first", example_inputs=(x, y))
    assert plan.certificate.inputs_within == pytest.approx(1.25 * float(y.abs().max()))
    assert nz.verify(model, plan, x, y).assumptions_hold
    assert not nz.verify(model, plan, x, 2 * y).assumptions_hold
    alone = perturbed(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)))
    assert nz.plan(alone, "0", example_inputs=x).certificate.inputs_within is None


def test_it_is_printed_and_travels_and_is_no_part_of_the_digest():
    model, x = perturbed(Mlp(torch.tanh)), unit(16, 8)
    plan = nz.plan(model, "middle", example_inputs=x)
    assert f"end to end: bounded({plan.certificate.bound:.2g})" in str(plan)
    back = nz.Plan.from_json(plan.to_json())
    assert back.certificate == plan.certificate
    assert math.isfinite(back.certificate.bound)
    with torch.no_grad():
        model.last.weight.mul_(2)
    other = nz.plan(model, "middle", example_inputs=x)
    assert other.certificate.bound > 1.5 * plan.certificate.bound
    assert other.digest == plan.digest
    assert f"(bound {other.certificate.bound:.3g})" in str(nz.verify(model, other, x))


# ---- formats with a narrow range -------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [nn.Softplus(), nn.LogSigmoid()], ids=["softplus", "logsigmoid"])
@pytest.mark.parametrize("first", [nn.GELU(), nn.Mish(), nn.Tanh()], ids=["gelu", "mish", "tanh"])
def test_two_layers_in_a_row_stay_inside_float16(first, second):
    """The second's diagonal is 4096 where it is alone: undoing the first's scale on it went beyond 65504."""
    layers = [nn.Linear(8, 8), first, nn.Linear(8, 8), second, nn.Linear(8, 3)]
    model, x = perturbed(nn.Sequential(*layers)).half(), unit(64, 8).half()
    plan = nz.plan(model, ["0", "2"], example_inputs=x)
    with torch.no_grad():
        wanted = model[4](x)
        with plan.applied(model):
            got = model(x)
            assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert float((got - wanted).double().norm() / wanted.double().norm()) <= 2e-2
    assert nz.verify(model, plan, x).bound_holds
