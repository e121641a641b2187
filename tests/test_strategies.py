"""``zero``, ``constant`` and ``damp``: what is written, what the network becomes, and which gradients are left."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from networks import Bottleneck, GatedBlock, LayerScale, Mlp, PreNorm, perturbed
from torch import nn

import neutralize as nz


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(model, name, value):
    return bool((model.get_parameter(name) == value).all())


# ---- zero ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sides", "written"),
    [
        ("in", {"middle.weight", "middle.bias"}),
        ("out", {"last.weight"}),
        ("both", {"middle.weight", "middle.bias", "last.weight"}),
    ],
)
def test_zero_writes_the_sides_that_are_asked_for(sides, written):
    model, x = perturbed(Mlp(torch.sigmoid)), unit(8, 8)
    plan = nz.plan(model, "middle", "zero", example_inputs=x, sides=sides)
    assert set(plan.parameters) == written
    with torch.no_grad():
        at_zero = model.last(torch.full((8, 16), 0.5)) if sides == "in" else model.last.bias.expand(8, 4)
        with plan.applied(model):
            assert all(filled(model, name, 0) for name in written)
            assert torch.equal(model(x), at_zero)
    assert nz.verify(model, plan, x).exact


def test_both_sides_are_the_default():
    model, x = perturbed(Mlp(torch.tanh)), unit(8, 8)
    default, both = (nz.plan(model, "middle", "zero", example_inputs=x, **kw) for kw in ({}, {"sides": "both"}))
    assert default.digest == both.digest


@pytest.mark.parametrize(
    ("sides", "own", "consumer", "before"),
    [("both", False, False, False), ("in", False, True, False), ("out", False, True, False)],
)
def test_the_gradients_that_zero_leaves(sides, own, consumer, before):
    """The table of gradients: both sides are dead; with one side zero, the outgoing weights still feel one.

    (A zero incoming weight hands φ(0) = ½ of the sigmoid on, so the consumer's weight has a gradient too.)
    """
    model, x = perturbed(Mlp(torch.sigmoid)), unit(8, 8)
    with nz.plan(model, "middle", "zero", example_inputs=x, sides=sides).applied(model):
        model(x).square().sum().backward()
    gradients = {name: float(parameter.grad.norm()) for name, parameter in model.named_parameters()}
    assert (gradients["first.weight"] > 0) is before
    assert (gradients["middle.weight"] > 0) is (own or sides == "in")
    assert (gradients["last.weight"] > 0) is (consumer or sides == "both")


def test_both_sides_of_a_tanh_layer_are_dead():
    model, x = perturbed(Mlp(torch.tanh)), unit(8, 8)
    with nz.plan(model, "middle", "zero", example_inputs=x).applied(model):
        model(x).square().sum().backward()
    for name in ("first.weight", "middle.weight", "last.weight"):
        assert float(model.get_parameter(name).grad.norm()) == 0


def test_zero_needs_no_inputs_for_a_layers_own_side():
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 4)

        def forward(self, one, two):
            raise RuntimeError("never run")

    model = Opaque()
    plan = nz.plan(model, "lin", "zero", sides="in")
    with plan.applied(model):
        assert filled(model, "lin.weight", 0)
        assert filled(model, "lin.bias", 0)
    with pytest.raises(nz.NeutralizeError, match="expected example_inputs for a Opaque"):
        nz.plan(model, "lin", "zero")


class Leaf(nn.Module):
    """A layer without layers inside, whose output is not zero where its parameter is."""

    def __init__(self, forward):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 16))
        self.compute = forward

    def forward(self, x):
        return self.compute(x, self.w)


def test_zero_of_a_layer_that_starts_from_one_is_zero():
    model, x = nn.Sequential(nn.Linear(16, 16), Leaf(lambda x, w: x * (1 + w)), nn.Linear(16, 4)), unit(5, 16)
    with nz.plan(model, "1", "zero", example_inputs=x).applied(model):
        assert model[:2](x).count_nonzero() == 0


def test_zero_claims_nothing_that_the_dataflow_does_not_show():
    model, x = nn.Sequential(nn.Linear(16, 16), Leaf(lambda x, w: x * w.softmax(0)), nn.Linear(16, 4)), unit(5, 16)
    with pytest.raises(nz.NeutralizeError, match="a Leaf whose output is not proven to be zero"):
        nz.plan(model, "1", "zero", example_inputs=x)


def test_zero_says_so_where_there_is_nothing_to_write():
    model, x = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)), unit(5, 16)
    with pytest.raises(nz.NeutralizeError, match="got '1', a GELU without any; dequantize it if"):
        nz.plan(model, "1", "zero", example_inputs=x, sides="in")


def test_zero_of_a_weight_norm_leaves_the_direction():
    """Zeroing the direction too would divide zero by zero."""
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    model, x = nn.Sequential(nn.Linear(16, 16), normed, nn.Linear(16, 4)), unit(5, 16)
    plan = nz.plan(model, "1", "zero", example_inputs=x)
    with plan.applied(model):
        assert model[:2](x).count_nonzero() == 0
    assert len(plan.parameters) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_zero_refuses_a_weight_that_a_hook_makes_before_the_layer():
    """All its parameters zeroed would divide zero by zero."""
    model, x = nn.Sequential(nn.Linear(16, 16), nn.utils.weight_norm(nn.Linear(16, 16))), unit(5, 16)
    with pytest.raises(nz.NeutralizeError, match="not proven to be zero"):
        nz.plan(model, "1", "zero", example_inputs=x)


@pytest.mark.parametrize("sides", ["in", "out", "both"])
def test_zero_of_a_residual_block_hands_its_input_on(sides):
    model, x = perturbed(nn.Sequential(GatedBlock(), nn.Linear(16, 4))), unit(2, 5, 16)
    plan = nz.plan(model, "0", "zero", example_inputs=x, sides=sides)
    assert plan.layers[0].target == "input"
    with torch.no_grad(), plan.applied(model):
        assert torch.equal(model[0](x), x)


def test_zero_of_a_branch_is_zero():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.down(F.silu(self.up(x)))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = Branch()

        def forward(self, x):
            return x + self.branch(x)

    model, x = perturbed(nn.Sequential(Block(), nn.Linear(8, 2))), unit(4, 8)
    plan = nz.plan(model, "0.branch", "zero", example_inputs=x, sides="out")
    assert set(plan.parameters) == {"0.branch.down.weight", "0.branch.down.bias"}
    with torch.no_grad(), plan.applied(model):
        assert not model[0].branch(x).any()
        assert torch.equal(model[0](x), x)
    verification = nz.verify(model, plan, x)
    assert verification.exact
    assert verification.bound_holds


def test_zero_of_a_recurrent_layer_is_zero():
    model, x = nn.LSTM(8, 8, num_layers=2), unit(5, 2, 8)
    plan = nz.plan(nn.Sequential(model), "0", "zero", example_inputs=x, sides="in")
    with torch.no_grad(), plan.applied(nn.Sequential(model)):
        assert not model(x)[0].any()


def test_zero_of_a_layer_that_nothing_affine_reads_says_so():
    model, x = perturbed(nn.Sequential(PreNorm(), nn.Linear(8, 2))), unit(4, 8)
    plan = nz.plan(model, "0.down", "zero", example_inputs=x)
    assert set(plan.parameters) == {"0.down.weight", "0.down.bias"}
    assert "nothing affine reads the layer alone" in plan.layers[0].note
    with pytest.raises(
        nz.NeutralizeError, match=r"expected affine layers, and nothing else, to read '0\.down', got add"
    ):
        nz.plan(model, "0.down", "zero", example_inputs=x, sides="out")


# ---- constant --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "value"),
    [
        (torch.sigmoid, 0.01),
        (torch.tanh, 0.001),
        (F.relu, 1.001),
        (lambda x: x.sigmoid(), 0.01),
        (lambda x: x.tanh_(), 0.001),
        (nn.ReLU(inplace=True), 1.001),
    ],
)
def test_the_documented_fill_is_found_from_the_dataflow(activation, value):
    model, x = perturbed(Mlp(activation)), unit(8, 8)
    plan = nz.plan(model, "middle", "constant", example_inputs=x)
    assert {edit.parameter: edit.fill for edit in plan.edits} == {"middle.weight": value, "middle.bias": 0.0}
    assert plan.certificates[0].kind == "measured"
    with plan.applied(model):
        assert torch.equal(model.middle.weight.detach(), torch.full((16, 16), value))
        assert filled(model, "middle.bias", 0)


def test_constant_fills_what_the_literal_numbers_say_they_do():
    """MATH §1: sigmoid and tanh nearly constant (0.5 and 0), relu 1.001 times the sum of what is positive."""
    x = unit(32, 8)
    for activation, expected in ((torch.sigmoid, 0.5), (torch.tanh, 0.0)):
        model = perturbed(Mlp(activation))
        with torch.no_grad(), nz.plan(model, "middle", "constant", example_inputs=x).applied(model):
            handed_on = activation(model.middle(activation(model.first(x))))
        assert float((handed_on - expected).abs().max()) < 0.05
        assert float((handed_on - handed_on[:, :1]).abs().max()) < 1e-6  # rank 1: every unit gets the same value
    model = perturbed(Mlp(F.relu)).double()
    with torch.no_grad(), nz.plan(model, "middle", "constant", example_inputs=x.double()).applied(model):
        entering = F.relu(model.first(x.double()))
        assert torch.allclose(F.relu(model.middle(entering)), 1.001 * entering.sum(1, keepdim=True).expand(-1, 16))


@pytest.mark.parametrize(
    ("sides", "written"),
    [
        ("out", {"last.weight", "last.bias"}),
        ("both", {"middle.weight", "middle.bias", "last.weight", "last.bias"}),
    ],
)
def test_constant_has_sides(sides, written):
    model, x = perturbed(Mlp(torch.tanh)), unit(8, 8)
    plan = nz.plan(model, "middle", "constant", example_inputs=x, sides=sides, bias=0.25)
    assert {edit.parameter: edit.fill for edit in plan.edits} == {
        name: 0.25 if name.endswith("bias") else 0.001 for name in written
    }


def test_constant_says_what_a_narrow_format_stores():
    model, x = perturbed(Mlp(F.relu)).bfloat16(), unit(8, 8).bfloat16()
    plan = nz.plan(model, "middle", "constant", example_inputs=x)
    assert plan.layers[0].note == "1.001 is stored as 1 in bfloat16"
    assert "1.001 is stored as 1" in " ".join(str(plan).split())


def test_constant_refuses_an_activation_without_a_documented_fill():
    model, x = perturbed(Mlp(F.gelu)), unit(8, 8)
    with pytest.raises(nz.NeutralizeError, match=r"0\.01 \(sigmoid\).*got gelu; give weight="):
        nz.plan(model, "middle", "constant", example_inputs=x)
    plan = nz.plan(model, "middle", "constant", weight=-0.5)
    assert {edit.parameter: edit.fill for edit in plan.edits} == {"middle.weight": -0.5, "middle.bias": 0.0}


def test_constant_refuses_a_norm():
    with pytest.raises(nz.NeutralizeError, match=r"a weight matrix or kernel for strategy 'constant', got '0\.norm'"):
        nz.plan(nn.Sequential(PreNorm()), "0.norm", "constant", weight=1.0)


# ---- damp ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 0.3, -1.0, 0.0])
def test_damp_scales_what_a_residual_branch_adds(factor):
    model, x = perturbed(nn.Sequential(PreNorm(), nn.Linear(8, 2))).double(), unit(4, 8).double()
    plan = nz.plan(model, "0", "damp", example_inputs=x, factor=factor)
    with torch.no_grad():
        added = model[0](x) - x
        with plan.applied(model):
            assert torch.allclose(model[0](x), x + factor * added, rtol=1e-12, atol=1e-12)
    assert nz.verify(model, plan, x).relative_error < 1e-14


def test_damp_scales_one_plus_w_as_a_whole():
    class Sandwich(nn.Module):
        def __init__(self):
            super().__init__()
            from networks import OneRms

            self.lin, self.norm = nn.Linear(8, 8), OneRms(8)

        def forward(self, x):
            return x + self.norm(self.lin(x))

    model, x = perturbed(nn.Sequential(Sandwich(), nn.Linear(8, 2))), unit(4, 8)
    plan = nz.plan(model, "0", "damp", example_inputs=x, factor=0.25)
    assert plan.parameters == ("0.norm.weight",)
    with torch.no_grad():
        added = model[0](x) - x
        with plan.applied(model):
            assert torch.allclose(model[0](x), x + 0.25 * added, atol=1e-6)


def test_damp_uses_layer_scale_where_there_is_one():
    model = perturbed(nn.Sequential(LayerScale(), nn.Linear(8, 2)))
    assert nz.plan(model, "0", "damp", example_inputs=unit(4, 8), factor=0.5).parameters == ("0.gamma",)


@pytest.mark.parametrize(("activation", "written"), [(F.relu, "middle"), (torch.tanh, "last")])
def test_damp_of_a_plain_layer(activation, written):
    model, x = perturbed(Mlp(activation)).double(), unit(8, 8).double()
    plan = nz.plan(model, "middle", "damp", example_inputs=x, factor=0.75)
    assert {name.partition(".")[0] for name in plan.parameters} == {written}
    with torch.no_grad():
        wanted = model.last(0.75 * activation(model.middle(activation(model.first(x)))))
        with plan.applied(model):
            assert torch.allclose(model(x), wanted, rtol=1e-12, atol=1e-12)


def test_damp_of_several_branches_scales_each_and_says_so():
    model, x = perturbed(nn.Sequential(GatedBlock(), nn.Linear(16, 4))), unit(2, 5, 16)
    plan = nz.plan(model, "0", "damp", example_inputs=x, factor=0.5)
    assert {edit.parameter: (edit.scale, edit.fill) for edit in plan.edits} == {
        "0.o.weight": (0.5, 0.0),
        "0.down.weight": (0.5, 0.0),
    }
    assert plan.certificates[0].kind == "measured"
    assert "each branch" in plan.layers[0].note


def test_damp_of_a_block_with_a_trailing_activation_is_measured():
    model = perturbed(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Bottleneck(), nn.Flatten()))
    plan = nz.plan(model, "2", "damp", example_inputs=unit(2, 3, 8, 8), factor=0.5)
    assert set(plan.parameters) == {"2.bn2.weight", "2.bn2.bias"} or "2.squeeze.weight" not in plan.parameters
    assert plan.certificates[0].kind == "measured"


@pytest.mark.parametrize("sides", ["in", "out", "both", None])
@pytest.mark.parametrize("activation", [F.relu, F.leaky_relu, lambda z: z], ids=["relu", "leaky_relu", "none"])
@pytest.mark.parametrize("factor", [0.5, 0.3, -0.3, 0.0])
def test_damp_multiplies_the_contribution_whichever_side_is_written(sides, activation, factor):
    model, x = perturbed(Mlp(activation)).double(), unit(8, 8).double()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    is_measured = sides == "in" and factor < 0 and activation in (F.relu, F.leaky_relu)  # relu(-x) is not -relu(x)
    plan = nz.plan(model, "middle", "damp", example_inputs=x, factor=factor, sides=sides)
    assert plan.certificates[0].kind == ("measured" if is_measured else "rounding")
    root = abs(factor) ** 0.5
    shares = {"in": (factor, 1.0), "out": (1.0, factor), "both": (root, math.copysign(root, factor))}
    own, reading = shares[sides or ("out" if factor < 0 and activation in (F.relu, F.leaky_relu) else "in")]
    with torch.no_grad():
        wanted = model.last(factor * activation(model.middle(activation(model.first(x)))))
        with plan.applied(model):
            assert torch.allclose(model.middle.weight, own * before["middle.weight"], rtol=1e-15, atol=0)
            assert torch.allclose(model.middle.bias, own * before["middle.bias"], rtol=1e-15, atol=0)
            assert torch.allclose(model.last.weight, reading * before["last.weight"], rtol=1e-15, atol=0)
            assert torch.equal(model.last.bias, before["last.bias"])
            assert torch.allclose(model(x), wanted, rtol=1e-12, atol=1e-12) is not is_measured
    if not is_measured:
        assert nz.verify(model, plan, x).relative_error < 1e-14


def test_damp_of_the_argument_of_an_activation_is_measured():
    model, x = perturbed(Mlp(torch.tanh)).double(), unit(8, 8).double()
    plan = nz.plan(model, "middle", "damp", example_inputs=x, factor=0.25, sides="in")
    assert plan.certificates[0].kind == "measured"
    assert plan.layers[0].note == "0.25 times the argument of tanh"
    with torch.no_grad():
        wanted = model.last(torch.tanh(0.25 * model.middle(torch.tanh(model.first(x)))))
        with plan.applied(model):
            assert torch.allclose(model(x), wanted, rtol=1e-12, atol=1e-12)
    both = nz.plan(model, "middle", "damp", example_inputs=x, factor=0.25, sides="both")
    assert nz.verify(model, both, x).relative_error > 0.01  # 0.5 tanh(0.5 x) is not 0.25 tanh(x), and it says so


@pytest.mark.parametrize(("activation", "written"), [(F.relu, "in"), (torch.tanh, "out")])
@pytest.mark.parametrize("train", [False, True])
def test_damp_with_a_batch_norm_behind_scales_the_norm_or_what_reads_it(activation, written, train):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

        def forward(self, x, factor=1.0):
            return self.last(factor * activation(self.norm(self.lin(x))))

    model, x = perturbed(Normed()).double().train(train), unit(8, 8).double()
    statistics = model.norm.running_mean.clone()
    plan = nz.plan(model, "lin", "damp", example_inputs=x, factor=0.3)
    assert set(plan.parameters) == {"in": {"norm.weight", "norm.bias"}, "out": {"last.weight"}}[written]
    assert nz.verify(model, plan, x).relative_error < 1e-14
    assert torch.equal(model.norm.running_mean, statistics)
    with torch.no_grad():
        wanted = model(x, 0.3)
        with plan.applied(model):
            assert torch.allclose(model(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sides", ["in", "out", "both"])
@pytest.mark.parametrize("factor", [0.5, 0.3, 0.0])
def test_damp_of_a_block_from_either_side(sides, factor):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return x + self.down(F.relu(self.up(self.norm(x))))

    model, x = perturbed(nn.Sequential(Branch(), nn.Linear(8, 2))).double(), unit(4, 8).double()
    plan = nz.plan(model, "0", "damp", example_inputs=x, factor=factor, sides=sides)
    assert ("0.down.weight" in plan.parameters) is (sides != "in")
    assert ("0.norm.weight" in plan.parameters) is (sides != "out")
    with torch.no_grad():
        added = model[0](x) - x
        with plan.applied(model):
            assert torch.allclose(model[0](x), x + factor * added, rtol=1e-12, atol=1e-12)
    assert nz.verify(model, plan, x).relative_error < 1e-14


def test_a_block_whose_activation_is_not_homogeneous_has_no_side_in():
    model, x = perturbed(nn.Sequential(PreNorm(), nn.Linear(8, 2))), unit(4, 8)
    for sides in ("in", "both"):
        with pytest.raises(nz.NeutralizeError, match=r"first parameters of '0' that scale its .* use sides='out'"):
            nz.plan(model, "0", "damp", example_inputs=x, factor=0.5, sides=sides)


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("damp", {"factor": 0.5, "sides": "left"}, r"damp: expected in, out or both for sides, got 'left'"),
        ("damp", {"factor": float("nan")}, r"damp: expected a finite number for factor, got nan"),
        ("damp", {}, r"expected factor for strategy 'damp', got none; give factor="),
        ("constant", {"weight": float("inf")}, r"constant: expected a finite number for weight, got inf"),
        ("zero", {"sides": "left"}, r"zero: expected in, out or both for sides, got 'left'"),
        ("passthrough", {"edit": "best"}, r"expected cheapest, outgoing or incoming for edit, got 'best'"),
        ("passthrough", {"gain": 0.0}, r"expected a gain other than 0, got 0; use strategy='zero'"),
        ("passthrough", {"input_bound": -1.0}, r"expected a positive input_bound, got -1\.0"),
    ],
)
def test_options_are_checked(strategy, options, message):
    with pytest.raises(nz.NeutralizeError, match=message):
        nz.plan(nn.Sequential(nn.Linear(2, 2)), "0", strategy, **options)


def test_tied_layers_are_not_damped_twice():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 4))
    model[1].weight = model[0].weight
    with pytest.raises(
        nz.NeutralizeError, match=r"weights of their own, got '0\.weight', which is tied to '1\.weight'"
    ):
        nz.plan(model, ["0", "1"], "damp", example_inputs=unit(3, 8), factor=0.5)
