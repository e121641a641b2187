"""Every activation against numbers that are computed here: derivatives, recognition, and figures end to end."""

from __future__ import annotations

import math
import re

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


def test_parameters_are_read_from_the_graph():
    def row(function):
        model, x = perturbed(Net(function)), unit(8, 8)
        return nz.plan(model, "middle", example_inputs=x, strategy="passthrough", input_bound=1.0).layers[0]

    assert row(lambda x: F.hardtanh(x, -8.0, 8.0)).epsilon == 8 * row(F.hardtanh).epsilon
    assert row(lambda x: F.hardtanh(x, 2.0, 4.0)).operating_point == 3.0
    assert row(F.selu).slope == pytest.approx(1.0507, rel=1e-4)
    assert row(F.elu).operating_point == 0.0
    assert row(lambda x: F.elu(x, 2.0)).operating_point >= 1.0
    assert row(F.logsigmoid).operating_point < -1.0


class Sliced(nn.Module):
    """What reads the layer is no activation, though part of it looks like one."""

    def __init__(self, function):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.middle(self.first(x))))


@pytest.mark.parametrize(
    "function",
    [
        lambda h: torch.tanh(h) + h,
        lambda h: torch.sigmoid(h) * torch.tanh(h),
        lambda h: h * torch.sigmoid(1.702 * h) * 2,
        lambda h: h.softmax(-1),
    ],
    ids=["skip", "product", "scaled", "softmax"],
)
def test_what_only_looks_like_an_activation_is_not_cut_out(function):
    model, x = perturbed(Sliced(function)), unit(16, 8)
    try:
        plan = nz.plan(model, "middle", example_inputs=x)
    except nz.NeutralizeError:
        return
    with torch.no_grad():
        h = model.first(x)
        # Without the layer and what is an activation in front of a factor, with that factor.
        wanted = [model.last(h), model.last(2 * h), model.last(function(h))]
        with plan.applied(model):
            assert min(relative(model(x), one) for one in wanted) <= 1e-4
    assert nz.verify(model, plan, x).relative_error <= 1e-4


def test_relu_squared_has_a_window_and_its_bound_holds():
    for dtype, goal in ((torch.float64, 1e-7), (torch.float32, 5e-3), (torch.bfloat16, 0.5)):
        assert check(lambda x: F.relu(x) ** 2, dtype, goal).activation == "relu_squared"


def test_prelu_is_the_identity_after_relu():
    model = perturbed(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 3)))
    assert nz.plan(model, "2", example_inputs=unit(4, 8)).certificates[0].kind == "exact"


# ---- registered activations ------------------------------------------------------------------------------------------


def snake(x):
    return x + torch.sin(x) ** 2


@pytest.fixture
def forgetful():
    names = []
    yield names.append
    for name in names:
        nz.forget_activation(name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_registered_activation_is_bounded_by_interval_arithmetic(forgetful, dtype):
    with pytest.raises(nz.NeutralizeError):
        nz.plan(perturbed(Net(snake)), "middle", example_inputs=unit(4, 8))
    row = nz.register_activation("snake", snake)
    forgetful("snake")
    assert row.proven
    assert row.parts[0].slope == 1.0
    assert row.parts[0].quadratic == pytest.approx(1.0, rel=1e-2)  # φ'' = 2 cos 2z
    assert check(snake, dtype, GOALS[dtype][0]).activation == "snake"


def test_a_registered_activation_may_fall(forgetful):
    nz.register_activation("falling", lambda x: torch.exp(-2 * x) - x, reach=0.5)
    forgetful("falling")
    entry = check(lambda x: torch.exp(-2 * x) - x, torch.float64, 1e-6)
    assert (entry.activation, entry.slope, entry.value) == ("falling", -3.0, 1.0)


class Snake(nn.Module):
    def forward(self, x):
        return x + x.sin().square()


def test_a_module_will_do_and_other_spellings_are_recognised(forgetful):
    nz.register_activation("snake", Snake())
    forgetful("snake")
    assert check(lambda x: torch.square(torch.sin(x)).add(x), torch.float32, 2e-5).activation == "snake"
    assert check(Snake(), torch.float32, 2e-5).activation == "snake"


def bent(x):
    return 2 * x / (1 + (0.25 * x * x).abs())


def test_what_is_only_sampled_says_measured(forgetful):
    row = nz.register_activation("bent", bent)
    forgetful("bent")
    assert not row.proven
    assert row.source == "sampled"
    model, x = perturbed(Net(bent)), unit(64, 8)
    plan = nz.plan(model, "middle", example_inputs=x)
    assert plan.certificates[0].kind == "measured"
    assert plan.certificates[0].bound is None
    assert "sampled" in plan.certificates[0].reason
    assert nz.verify(model, plan, x).relative_error <= 1e-5
    with pytest.raises(nz.NeutralizeError, match="tolerance"):
        nz.plan(model, "middle", "passthrough", example_inputs=x, tolerance=1e-3)


def test_a_given_curvature_is_taken_at_its_word(forgetful):
    row = nz.register_activation("bent", bent, curvature=6.0, reach=0.5, source="by hand")
    forgetful("bent")
    assert (row.proven, row.parts[0].quadratic, row.parts[0].above, row.source) == (True, 1.5, 0.5, "by hand")
    assert check(bent, torch.float32, 2e-5).activation == "bent"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tanh", torch.tanh), "expected a new name, got 'tanh'"),
        (("flat", torch.cos), r"expected a slope other than 0 at 0, got -?0"),
        (("steps", torch.floor), r"expected a slope other than 0"),
        (("broken", lambda x: x.nonsense()), r"that autograd can differentiate, got AttributeError"),
    ],
)
def test_what_cannot_be_registered_is_refused(arguments, message):
    with pytest.raises(nz.NeutralizeError, match=message):
        nz.register_activation(*arguments)
    with pytest.raises(nz.NeutralizeError, match=r"positive reach"):
        nz.register_activation("ok", torch.sin, reach=0.0)
    with pytest.raises(nz.NeutralizeError, match=r"expected a registered name \(none\), got 'tanh'"):
        nz.forget_activation("tanh")


def test_the_table_lists_every_activation_and_the_registered_ones(forgetful):
    from neutralize.activations import ACTIVATIONS

    nz.register_activation("snake", snake)
    forgetful("snake")
    text = nz.activation_table()
    for row in (*ACTIVATIONS, nz.register_activation("snake", snake)):
        assert re.search(rf"│ {row.name[:10]}", text), row.name
    (tanh,) = [line for line in text.splitlines() if line.startswith("│ tanh")]
    assert [cell.strip() for cell in tanh.split("│")[1:4]] == ["tanh", "0", "1"]
    assert "0.3333 ε² X²" in tanh
    nz.register_activation("bent", bent)
    forgetful("bent")
    assert "no bound" in nz.activation_table()
