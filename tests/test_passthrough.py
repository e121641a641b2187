"""Plain layers in their linear regime, against networks with the layer left out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import Mlp, perturbed
from torch import nn

import neutralize as nz

FUNCTIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sin": torch.sin,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
}
# End to end, relative to the network without the layer, on inputs of unit scale.
GOALS = {
    torch.float64: (1e-9, 1e-7),
    torch.float32: (2e-5, 3e-4),
    torch.bfloat16: (3e-2, 0.15),
    torch.float16: (5e-3, 5e-2),
}


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", GOALS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_square_layer_becomes_a_pass_through(name, dtype):
    model, x = perturbed(Mlp(FUNCTIONS[name])).to(dtype), unit(64, 8).to(dtype)
    plan = nz.plan(model, "middle", example_inputs=x)
    with torch.no_grad():
        wanted = model.without_middle(x)
        with plan.applied(model):
            got = model(x)
    assert relative(got, wanted) <= GOALS[dtype][name == "sigmoid"]
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.assumptions_hold
    assert verification.relative_error == pytest.approx(relative(got, wanted), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_bound_of_the_certificate_holds_at_the_edge_of_the_assumption(name):
    """Inputs as large as the bound allows, where the nonlinearity is worst, in a dtype where rounding is not all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Identity(), nn.Linear(16, 4)).double().eval()
    model[1].forward = FUNCTIONS[name]
    for bound in (0.01, 1.0, 30.0):
        plan = nz.plan(model, "0", "passthrough", example_inputs=unit(2, 16).double(), input_bound=bound)
        x = bound * torch.cat([torch.ones(1, 16), -torch.ones(1, 16), 2 * torch.rand(200, 16) - 1]).double()
        verification = nz.verify(model, plan, x)
        assert verification.bound_holds
        assert verification.assumptions_hold
        assert verification.per_layer["0"] <= plan.certificates[0].bound
        assert not nz.verify(model, plan, 1.5 * x).assumptions_hold


def test_relu_after_relu_is_bitwise_the_identity():
    model, x = perturbed(Mlp(F.relu)), unit(64, 8)
    plan = nz.plan(model, "middle", example_inputs=x)
    assert plan.certificates[0].kind == "exact"
    assert set(plan.parameters) == {"middle.weight", "middle.bias"}
    with torch.no_grad(), plan.applied(model):
        assert torch.equal(model(x), model.without_middle(x))


@pytest.mark.parametrize("act", [nn.Tanh(), nn.ReLU(), nn.Sigmoid(), nn.GELU()], ids=lambda act: type(act).__name__)
def test_a_chain_of_layers_is_passed_through_together(act):
    model = perturbed(nn.Sequential(nn.Linear(8, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 3)))
    x = unit(32, 8)
    plan = nz.plan(model, ["0", "2", "4"], example_inputs=x)
    with torch.no_grad(), plan.applied(model):
        got = model(x)
    assert relative(got, model[6](x)) <= (1e-3 if isinstance(act, nn.Sigmoid) else 1e-5)
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert all(gain == pytest.approx(1.0, rel=1e-2) for gain in verification.gradient_gain.values())


def test_epsilon_is_a_power_of_two_and_the_consumer_undoes_it():
    model, x = perturbed(Mlp(torch.tanh)), unit(8, 8)
    plan = nz.plan(model, "middle", example_inputs=x)
    epsilon = plan.layers[0].epsilon
    assert torch.frexp(torch.tensor(epsilon)).mantissa == 0.5
    before = model.last.weight.detach().clone()
    with plan.applied(model):
        assert torch.equal(model.middle.weight.detach(), epsilon * torch.eye(16))
        assert torch.equal(model.last.weight.detach() * epsilon, before)


def test_the_bias_of_the_consumer_absorbs_the_operating_point():
    model, x = perturbed(Mlp(torch.sigmoid)), unit(8, 8)
    plan = nz.plan(model, "middle", example_inputs=x)
    weight, bias = model.last.weight.detach().double(), model.last.bias.detach().double()
    factor = 4 / plan.layers[0].epsilon
    with plan.applied(model):
        wanted = bias - 0.5 * factor * weight.sum(1)
        assert torch.allclose(model.last.bias.detach().double(), wanted, rtol=1e-6)


def test_float16_weights_stay_inside_the_format():
    model, x = perturbed(Mlp(torch.tanh)).half(), unit(64, 8).half()
    with torch.no_grad():
        model.last.weight.mul_(1000.0)
    plan = nz.plan(model, "middle", example_inputs=x)
    with torch.no_grad():
        wanted = model.without_middle(x)
        with plan.applied(model):
            assert torch.isfinite(model.last.weight).all()
            assert relative(model(x), wanted) <= 5e-3


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (lambda: nn.Conv1d(6, 6, 5, padding=2), (2, 6, 20)),
        (lambda: nn.Conv2d(6, 6, 3, padding=1), (2, 6, 9, 9)),
        (lambda: nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=2), (2, 6, 9, 9)),
        (lambda: nn.Conv2d(6, 6, (1, 3), padding="same", groups=6), (2, 6, 9, 9)),
        (lambda: nn.Conv3d(6, 6, 3, padding=1, bias=False), (2, 6, 4, 5, 6)),
    ],
)
def test_a_convolution_becomes_a_dirac_kernel(conv, shape):
    layer = conv()
    head = type(layer)(6, 3, 1)
    model, x = perturbed(nn.Sequential(layer, nn.Tanh(), head)), unit(*shape)
    plan = nz.plan(model, "0", example_inputs=x)
    with torch.no_grad():
        wanted = head(x)
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-5


class Transposed(nn.Module):
    """A module with one transposed affine op."""

    def __init__(self, nx, nf):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.bias.numel())


def test_transposed_weights_fold_over_the_other_dimension():
    model = perturbed(nn.Sequential(Transposed(8, 8), nn.Sigmoid(), Transposed(8, 3))).double()
    x = unit(2, 5, 8).double()
    with torch.no_grad():
        wanted = model[2](x)
        with nz.plan(model, "0", example_inputs=x).applied(model):
            assert relative(model(x), wanted) <= 1e-7


def test_several_readers_are_each_rescaled():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.sigmoid(self.layer(x))
            return self.one(h), self.two(h)

    model, x = perturbed(Heads()).double(), unit(16, 8).double()
    with torch.no_grad():
        wanted = model.one(x), model.two(x)
        with nz.plan(model, "layer", example_inputs=x).applied(model):
            got = model(x)
    assert all(relative(one, other) <= 1e-7 for one, other in zip(got, wanted, strict=True))


def test_a_layer_without_an_activation_becomes_the_identity_whatever_reads_it():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.lin(x) + x.square())

    model, x = perturbed(Added()), unit(4, 8)
    plan = nz.plan(model, "lin", example_inputs=x)
    assert plan.certificates[0].kind == "exact"
    with torch.no_grad(), plan.applied(model):
        assert torch.equal(model(x), model.head(x + x.square()))


def test_a_module_that_holds_its_activation_is_one_layer():
    model = perturbed(nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Dropout(0.5), nn.Linear(8, 3)))
    x = unit(16, 8)
    plan = nz.plan(model, "0", example_inputs=x)
    with torch.no_grad():
        wanted = model[2](x)
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-5
    assert nz.verify(model, plan, x).bound_holds


def test_gain_goes_on_the_diagonal_and_the_plan_says_what_is_stored():
    model, x = perturbed(Mlp(F.relu)), unit(8, 8)
    plan = nz.plan(model, "middle", "passthrough", example_inputs=x, gain=1.001)
    with torch.no_grad(), plan.applied(model):
        assert torch.equal(model.middle.weight, 1.001 * torch.eye(16))
    narrow = nz.plan(model.bfloat16(), "middle", "passthrough", example_inputs=x.bfloat16(), gain=1.001)
    assert "1.001 is stored as 1 in bfloat16" in narrow.layers[0].note
    assert "1.001 is stored as 1 in bfloat16" in str(narrow).replace("\n", " ") or narrow.layers[0].note


def test_a_plan_made_on_the_meta_device_is_the_live_one():
    x = unit(16, 8)
    live = perturbed(Mlp(torch.tanh))
    with torch.device("meta"):
        shadow = Mlp(torch.tanh).eval()
    plan = nz.plan(shadow, "middle", "passthrough", example_inputs=x, input_bound=8.0)
    assert plan.digest == nz.plan(live, "middle", "passthrough", example_inputs=x, input_bound=8.0).digest
    with torch.no_grad():
        wanted = live.without_middle(x)
        with plan.applied(live):
            assert relative(live(x), wanted) <= 1e-5


REFUSALS = {
    "rectangular": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)),
        {},
        r"as many outputs as inputs, got '0' from 8 to 6 features",
    ),
    "no bias in the consumer": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2, bias=False)),
        {},
        r"expected a bias in '2' to absorb the operating point of '0'",
    ),
    "no bias to move relu": (
        lambda: nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 2)),
        {},
        r"expected a bias in '0' to reach the linear side of relu",
    ),
    "unknown activation": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Hardshrink(), nn.Linear(8, 2)),
        {},
        r"expected a known activation.*after '0', got hardshrink",
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2)),
        {},
        r"expected a batch norm or nothing between '0' and its activation, got a norm \(layer_norm",
    ),
    "nothing reads it": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh()), {}, r"got the model's output"),
    "active dropout": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5).train(), nn.Linear(8, 2)),
        {"train": True},
        r"got an active dropout .*call model\.eval\(\)",
    ),
    "tolerance": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2)),
        {"tolerance": 1e-6},
        r"expected a certificate within tolerance=1e-06 for '0', got bounded",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_passed_through_is_refused_by_its_cause(name):
    build, options, message = REFUSALS[name]
    options = dict(options)
    model = perturbed(build()).train(options.pop("train", False))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(nz.NeutralizeError, match=message):
        nz.neutralize(model, "0", "passthrough", example_inputs=unit(4, 8), **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_strided_convolution_is_refused_by_name_of_the_cause():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 1)).eval()
    with pytest.raises(nz.NeutralizeError, match=r"expected stride 1 for '0', got stride \[2, 2\]"):
        nz.plan(model, "0", example_inputs=unit(1, 4, 8, 8))


def test_padding_after_a_shifted_operating_point_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 3, padding=1)).eval()
    with pytest.raises(nz.NeutralizeError, match=r"beside what '0'.*padding of '2': its borders would be wrong"):
        nz.plan(model, "0", example_inputs=unit(1, 4, 8, 8))


class SharedReader(nn.Module):
    """Two layers read by one."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.one(x))) + self.out(torch.tanh(self.two(x)))


class TiedReader(nn.Module):
    """An output layer tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.lin, self.out = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(torch.tanh(self.lin(self.embed(tokens))))


def test_a_shared_consumer_is_refused():
    with pytest.raises(nz.NeutralizeError, match=r"'out\.weight', which reads 'one', to read nothing else.*shared"):
        nz.plan(perturbed(SharedReader()), "one", example_inputs=unit(4, 8))


def test_a_tied_consumer_is_refused_naming_both():
    with pytest.raises(nz.NeutralizeError, match=r"'out\.weight'.*tied to 'embed\.weight'"):
        nz.plan(perturbed(TiedReader()), "lin", example_inputs=torch.tensor([[1, 2, 3]]))


def test_a_reader_that_is_not_affine_is_refused():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            h = torch.tanh(self.lin(x))
            return self.out(h) + h

    with pytest.raises(nz.NeutralizeError, match=r"only affine layers to read 'lin' \(tanh\), got add"):
        nz.plan(perturbed(Skip()), "lin", example_inputs=unit(4, 8))


def test_a_bound_is_asked_for_where_it_cannot_be_measured():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    with pytest.raises(nz.NeutralizeError, match=r"expected a bound on the input of '0', got no example_inputs"):
        nz.plan(model, "0")
    with pytest.raises(nz.NeutralizeError, match=r"got no weights \(this is a meta or sharded model\)"):
        nz.plan(model.to("meta"), "0", example_inputs=unit(2, 8))
    assert nz.plan(model, "0", "passthrough", input_bound=4.0).layers[0].input_bound == 4.0


def test_the_measured_bound_is_the_excised_networks_with_the_stated_margin():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    x = 7 * unit(16, 8)
    plan = nz.plan(model, ["0", "2"], example_inputs=x)
    wanted = nz.planner.BOUND_MARGIN * float(x.abs().max())
    assert [layer.input_bound for layer in plan.layers] == pytest.approx([wanted, wanted])
