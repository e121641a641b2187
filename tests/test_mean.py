"""Mean ablation: against networks in which the mean, computed here, is written in by hand."""

from __future__ import annotations

import copy
import io
import sys
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from networks import GatedBlock, Mlp, PreNorm, perturbed
from torch import nn

import neutralize as nz


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(count=4, width=8, rows=16):
    return [unit(rows - place, width, seed=place) for place in range(count)]  # of different sizes: not a mean of means


def close(got, wanted, error=1e-5):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm()) <= error


@pytest.mark.parametrize(
    "activation",
    [torch.tanh, torch.sigmoid, F.relu, F.gelu, F.silu, F.softplus, F.elu],
    ids=lambda activation: activation.__name__,
)
@pytest.mark.parametrize("bias", ["consumer's", "own"])
def test_the_output_becomes_its_mean(activation, bias):
    model, given, x = perturbed(Mlp(activation)), batches(), unit(8, 8, seed=9)
    if bias == "own":  # the consumer has none to spare: the mean's preimage goes into the layer's own
        model.last.bias = None
    with torch.no_grad():
        handed_on = torch.cat([activation(model.middle(activation(model.first(batch)))) for batch in given])
        wanted = model.last(handed_on.double().mean(0).float().expand(8, -1))
        before = model(x)
        plan = nz.plan(model, "middle", "mean", batches=given, example_inputs=x)
        absorbed = {"last.bias"} if bias == "consumer's" else set()
        assert set(plan.parameters) == {"middle.weight", "middle.bias"} | absorbed
        with plan.applied(model):
            assert not model.middle.weight.any()
            assert close(model(x), wanted)
        assert torch.equal(model(x), before)
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.relative_error <= 1e-6
    assert plan.certificates[0].kind == "rounding"
    assert nz.Plan.from_json(plan.to_json()) == plan


def test_a_layer_without_an_activation_gets_the_mean_as_its_bias():
    model, given = perturbed(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))), batches()
    plan = nz.plan(model, "0", "mean", batches=given)
    with torch.no_grad():
        mean = model[0](torch.cat(given)).mean(0)
        with plan.applied(model):
            assert torch.allclose(model[0].bias, mean, atol=1e-6)
            assert torch.equal(model[0](given[0]), model[0].bias.expand(16, 6))
    assert nz.verify(model, plan, given[0]).exact


def test_a_layer_with_its_activation_inside():
    model = perturbed(nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.SiLU()), nn.Linear(8, 4, bias=False)))
    given, x = batches(), unit(5, 8, seed=9)
    plan = nz.plan(model, "0", "mean", batches=given, example_inputs=x)
    with torch.no_grad():
        mean = model[0](torch.cat(given)).mean(0)
        with plan.applied(model):
            assert torch.allclose(model[0](x), mean.expand(5, 8), atol=1e-6)
    assert nz.verify(model, plan, x).relative_error <= 1e-6


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("groups", [1, 2])
def test_channels_of_a_convolution(padding, groups):
    model = perturbed(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.GELU(),
            nn.Conv2d(8, 4, 3, padding=padding, groups=groups), nn.Flatten(), nn.Linear(4 * (4 + 2 * padding) ** 2, 2),
        )
    )  # fmt: skip
    given, x = [unit(4, 3, 8, 8, seed=place) for place in range(3)], unit(2, 3, 8, 8, seed=9)
    plan = nz.plan(model, "1", "mean", batches=given, example_inputs=x)
    with torch.no_grad():
        mean = model[:3](torch.cat(given)).mean((0, 2, 3))
        wanted = model[3:](mean.view(1, 8, 1, 1).expand(2, 8, 6, 6))
        with plan.applied(model):
            assert close(model(x), wanted)
    assert ("3.bias" in plan.parameters) is (padding == 0)  # zeros at the borders would not be shifted
    assert nz.verify(model, plan, x).relative_error <= 1e-5


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("spare", [True, False], ids=["consumer's", "norm's own"])
@pytest.mark.parametrize("activation", [torch.tanh, torch.sigmoid, F.relu, None])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_batch_norm_behind_the_layer(bias, spare, activation, train):
    """It is a part of the layer: the mean is taken behind it, and its own β holds it where no reader can."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norm = nn.Linear(8, 6, bias=bias), nn.BatchNorm1d(6)
            self.last = nn.Linear(6, 4, bias=spare)

        def value(self, x):
            y = self.norm(self.lin(x))
            return y if activation is None else activation(y)

        def forward(self, x):
            return self.last(self.value(x))

    model, given, x = perturbed(Normed()).train(train), batches(), unit(8, 8, seed=9)
    statistics = model.norm.running_mean.clone()
    plan = nz.plan(model, "lin", "mean", batches=given, example_inputs=x)
    in_reader = spare and activation is not None
    assert set(plan.parameters) == {"norm.weight", "norm.bias"} | ({"last.bias"} if in_reader else set())
    assert torch.equal(model.norm.running_mean, statistics)
    verification = nz.verify(model, plan, x)
    assert verification.relative_error <= 1e-6
    assert verification.bound_holds
    with torch.no_grad():
        handed_on = torch.cat([copy.deepcopy(model).value(batch) for batch in given])  # a copy's statistics move
        wanted = model.last(handed_on.double().mean(0).float().expand(8, -1))
        with plan.applied(model):
            assert close(model(x), wanted)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_batch_norm_that_reads_the_layer(bias):
    model = perturbed(nn.Sequential(nn.Linear(8, 6, bias=bias), nn.Sigmoid(), nn.BatchNorm1d(6), nn.Linear(6, 4)))
    given, x = batches(), unit(8, 8, seed=9)
    plan = nz.plan(model, "0", "mean", batches=given, example_inputs=x)
    assert set(plan.parameters) == {"0.weight", "2.bias"} | ({"0.bias"} if bias else set())
    with torch.no_grad():
        wanted = model[2:](model[:2](torch.cat(given)).mean(0).expand(8, -1))
        with plan.applied(model):
            assert close(model(x), wanted)
    assert nz.verify(model, plan, x).relative_error <= 1e-6
    if not bias:  # in training mode the norm takes the constant out again
        with pytest.raises(nz.NeutralizeError, match=r"no bias of its own and readers that are not affine"):
            nz.plan(model.train(), "0", "mean", batches=given, example_inputs=x)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_convolution_with_its_batch_norm(padding):
    model = perturbed(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=padding),
            nn.Flatten(), nn.Linear(4 * (4 + 2 * padding) ** 2, 2),
        )
    )  # fmt: skip
    given, x = [unit(4, 3, 8, 8, seed=place) for place in range(3)], unit(2, 3, 8, 8, seed=9)
    plan = nz.plan(model, "0", "mean", batches=iter(given), example_inputs=x)
    with torch.no_grad():
        mean = model[:3](torch.cat(given)).mean((0, 2, 3))
        wanted = model[3:](mean.view(1, 8, 1, 1).expand(2, 8, 6, 6))
        with plan.applied(model):
            assert close(model(x), wanted)
    assert ("3.bias" in plan.parameters) is (padding == 0)
    assert nz.verify(model, plan, x).relative_error <= 1e-6


def test_a_container_that_ends_in_its_batch_norm():
    part = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))
    model, given, x = perturbed(nn.Sequential(part, nn.Linear(6, 4))), batches(), unit(8, 8, seed=9)
    plan = nz.plan(model, "0", "mean", batches=given, example_inputs=x)
    assert set(plan.parameters) == {"0.1.weight", "0.1.bias"}
    with torch.no_grad():
        wanted = model[1](model[0](torch.cat(given)).mean(0).expand(8, -1))
        with plan.applied(model):
            assert close(model(x), wanted)
    assert nz.verify(model, plan, x).relative_error <= 1e-6


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ((nn.BatchNorm1d(8, affine=False),), r"behind 'lin', got one without a gain and a bias"),
        ((nn.BatchNorm1d(8), nn.BatchNorm1d(8)), r"behind 'lin', got one behind some of its calls"),
    ],
)
def test_batch_norms_that_cannot_hold_a_mean(norms, message):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norms, self.last = nn.Linear(8, 8), nn.ModuleList(norms), nn.Linear(8, 4)

        def forward(self, x):
            for norm in self.norms:
                x = torch.tanh(norm(self.lin(x)))
            return self.last(x)

    with pytest.raises(nz.NeutralizeError, match=message):
        nz.plan(perturbed(Normed()), "lin", "mean", batches=batches(), example_inputs=unit(4, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_mean_in_a_16_bit_format_is_rounded_once(dtype):
    model = perturbed(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))).to(dtype)
    given = [unit(500, 8, seed=place).to(dtype) for place in range(20)]
    plan = nz.plan(model, "0", "mean", batches=(batch for batch in given))
    with torch.no_grad():
        exact = torch.cat([model[0](batch) for batch in given]).double().mean(0)
        assert torch.allclose(torch.tensor(plan.layers[0].values, dtype=torch.float64), exact, rtol=1e-12)
        with plan.applied(model):
            assert torch.equal(model[0].bias.detach(), exact.to(dtype))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_residual_block_adds_its_mean(scale):
    model, given, x = perturbed(nn.Sequential(PreNorm(scale=scale), nn.Linear(8, 2))), batches(), unit(5, 8, seed=9)
    plan = nz.plan(model, "0", "mean", batches=given, example_inputs=x)
    assert set(plan.parameters) == {"0.down.weight", "0.down.bias"}
    with torch.no_grad():
        added = torch.cat([model[0](batch) - batch for batch in given]).mean(0)
        with plan.applied(model):
            assert torch.allclose(model[0](x), x + added, atol=1e-6)
    verification = nz.verify(model, plan, x)
    assert verification.relative_error <= 1e-6
    assert verification.bound_holds


def test_a_branch_becomes_its_mean():
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

    model, given, x = perturbed(nn.Sequential(Block(), nn.Linear(8, 2))), batches(), unit(5, 8, seed=9)
    plan = nz.plan(model, "0.branch", "mean", batches=given, example_inputs=x)
    with torch.no_grad():
        mean = model[0].branch(torch.cat(given)).mean(0)
        with plan.applied(model):
            assert torch.allclose(model[0].branch(x), mean.expand(5, 8), atol=1e-6)
    assert nz.verify(model, plan, x).relative_error <= 1e-6


def test_several_layers_are_measured_in_one_pass_and_with_every_layer_on():
    model = perturbed(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    given, passes = batches(), []
    model.register_forward_hook(lambda *_: passes.append(1))

    plan = nz.plan(model, ["0", "2"], "mean", batches=(batch for batch in given), example_inputs=given[0])
    assert len(passes) <= len(given) + 1  # one more if the trace runs it
    with torch.no_grad():
        means = model[:2](torch.cat(given)).mean(0), model[:4](torch.cat(given)).mean(0)
        wanted = model[4](means[1].expand(16, 8))
        with plan.applied(model):
            assert torch.allclose(model[:2](given[0]), means[0].expand(16, 8), atol=1e-6)
            assert close(model(given[0]), wanted)
    assert nz.verify(model, plan, given[0]).relative_error <= 1e-6


def test_batches_may_be_tuples_dicts_and_streams():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x, *, scale=1.0):
            return self.out(self.lin(x) * scale)

    model = perturbed(Two())
    given = [(unit(4, 8),), {"x": unit(4, 8, seed=4), "scale": 2.0}, unit(4, 8, seed=5)]
    seen = []
    plan = nz.plan(
        model,
        "lin",
        "mean",
        batches=iter(given),
        progress=lambda *counts: seen.append(counts),
        example_inputs=unit(4, 8),
    )
    assert seen == [(1, None), (2, None), (3, None)]
    with torch.no_grad():
        mean = model.lin(torch.cat([unit(4, 8, seed=seed) for seed in (3, 4, 5)])).mean(0)
    assert torch.allclose(torch.tensor(plan.layers[0].values), mean, atol=1e-6)


def test_the_mean_is_summed_in_float64():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).half()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    given = [torch.full((4096, 1), 60000.0).half(), torch.full((4096, 1), 1.0).half()]  # whose sum half cannot hold
    assert nz.plan(model, "0", "mean", batches=given).layers[0].values == ((60000.0 + 1.0) / 2,)


def test_a_bar_is_drawn_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    model, given = perturbed(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))), batches()
    for stream, drawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        nz.plan(model, "0", "mean", batches=given)
        assert bool(stream.getvalue()) is drawn
    monkeypatch.setattr(sys, "stderr", None)  # as of a service
    nz.plan(model, "0", "mean", batches=given)


def test_the_model_is_left_as_it_was():
    model = perturbed(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nz.plan(model, "2", "mean", batches=batches())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("model", "layer", "given", "message"),
    [
        (nn.Sequential(nn.Linear(8, 8)), "0", unit(4, 8), r"mean: expected an iterable of batches, got Tensor"),
        (nn.Sequential(nn.Linear(8, 8)), "0", UserDict(x=unit(4, 8)), r"expected an iterable of batches, got UserDict"),
        (nn.Sequential(nn.Linear(8, 8)), "0", [], r"expected batches that reach layer '0', got none"),
        (nn.Sequential(nn.Linear(8, 8)), "0", [unit(4, 8) / 0], r"expected finite values of layer '0', got NaN or Inf"),
        (
            Mlp(torch.tanh, bias=False), "middle", batches(),
            r"bias that can hold the mean of 'middle', got no bias of its own and no bias in 'last'",
        ),
        (
            nn.Sequential(GatedBlock(), nn.Linear(16, 2)), "0", [unit(2, 3, 16)],
            r"an output projection with a bias that is added to the output of '0', got none among '0\.",
        ),
    ],
)  # fmt: skip
def test_refusals_name_the_cause(model, layer, given, message):
    example = unit(2, 3, 16) if any(isinstance(module, GatedBlock) for module in model.modules()) else unit(4, 8)
    with pytest.raises(nz.NeutralizeError, match=message):
        nz.plan(model.eval(), layer, "mean", batches=given, example_inputs=example)


def test_a_layer_that_moves_its_features_is_refused():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x):
            return self.lin(x).transpose(1, 2)

    model, x = nn.Sequential(Moving(), nn.Linear(8, 2)), unit(2, 8, 8)
    with pytest.raises(nz.NeutralizeError, match=r"leaves its features in their dimension, got '0', which moves them"):
        nz.plan(model, "0", "mean", batches=[x], example_inputs=x)


def test_one_layer_before_two_activations_is_refused():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(torch.tanh(self.lin(torch.relu(self.lin(x)))))

    with pytest.raises(nz.NeutralizeError, match=r"the same activation behind every call of 'lin', got relu, tanh"):
        nz.plan(Shared(), "lin", "mean", batches=batches(), example_inputs=unit(4, 8))


def test_batches_are_needed():
    with pytest.raises(nz.NeutralizeError, match=r"expected batches for strategy 'mean', got none; give batches="):
        nz.plan(nn.Sequential(nn.Linear(8, 8)), "0", "mean")
