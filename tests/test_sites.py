"""Everything that may stand behind a layer in its linear regime, against networks computed without the layer.

Each network is written twice: as a module, and as a function of its parts that leaves the layer, its batch norm and its
activation out. Nothing of the library takes part in the second.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import perturbed
from torch import nn

import neutralize as nz

FUNCTIONS = {"tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu, "relu6": F.relu6, "sigmoid": torch.sigmoid}
# End to end, relative to the network without the layer, on inputs of unit scale: (all others, sigmoid).
GOALS = {torch.float64: (1e-9, 1e-7), torch.float32: (2e-5, 3e-4)}


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


class Net(nn.Module):
    """``rest(parts, φ(layer(x)), x)``; without the layer ``rest(parts, x, x)``."""

    def __init__(self, layer, function, rest, **parts):
        super().__init__()
        self.layer, self.function, self.rest = layer, function, rest
        self.norm = parts.pop("norm", None)
        self.parts = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
        for name, part in parts.items():
            if isinstance(part, torch.Tensor):
                setattr(self, name, nn.Parameter(part))

    def forward(self, x):
        h = self.layer(x)
        h = h if self.norm is None else self.norm(h)
        return self.rest(self, self.function(h), x)

    def without(self, x):
        return self.rest(self, x, x)


def linear(*features, **options):
    return lambda: nn.Linear(*features, **options)


def run(name):
    """Call a part on what the layer hands on."""
    return lambda net, h, x: net.parts[name](h)


def conv(rank, *args, transposed=False, **options):
    kinds = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
    return kinds[rank][transposed](*args, **options)


VECTOR, IMAGE = (2, 6), (2, 6, 7, 8)
# name: layer's input, layer, rest, parts; every function of FUNCTIONS must do.
READERS = {
    "linear": (VECTOR, linear(6, 6), run("head"), lambda: {"head": nn.Linear(6, 3)}),
    "conv, grouped, dilated, strided": (
        IMAGE,
        lambda: conv(2, 6, 6, 3, padding=1),
        run("head"),
        lambda: {"head": conv(2, 6, 4, 3, groups=2, dilation=2, stride=2)},
    ),
    "depthwise conv": (
        IMAGE,
        lambda: conv(2, 6, 6, 1),
        run("head"),
        lambda: {"head": conv(2, 6, 12, (2, 3), groups=6)},
    ),
    "conv1d": ((2, 6, 9), lambda: conv(1, 6, 6, 1), run("head"), lambda: {"head": conv(1, 6, 4, 3)}),
    "conv3d": ((1, 6, 4, 4, 5), lambda: conv(3, 6, 6, 1), run("head"), lambda: {"head": conv(3, 6, 4, 3)}),
    "transposed 1x1": (
        IMAGE,
        lambda: conv(2, 6, 6, 1),
        run("head"),
        lambda: {"head": conv(2, 6, 4, 1, transposed=True)},
    ),
    "transposed conv that crops to full taps": (
        IMAGE,
        lambda: conv(2, 6, 6, 1),
        run("head"),
        lambda: {"head": conv(2, 6, 4, 3, padding=4, dilation=2, transposed=True)},
    ),
    "transposed layer": (
        IMAGE,
        lambda: conv(2, 6, 6, 3, padding=1, groups=2, transposed=True),
        run("head"),
        lambda: {"head": conv(2, 6, 4, 3)},
    ),
    "matmul with a parameter and a bias": (
        (2, 5, 6),
        linear(6, 6),
        lambda net, h, x: h @ net.weight + net.bias,
        lambda: {"weight": unit(6, 3, seed=5), "bias": unit(3, seed=6)},
    ),
    "matmul with a transposed parameter": (
        (2, 5, 6),
        linear(6, 6),
        lambda net, h, x: h @ net.weight.t() + net.bias,
        lambda: {"weight": unit(3, 6, seed=5), "bias": unit(3, seed=6)},
    ),
    "batch norm": (
        VECTOR,
        linear(6, 6),
        lambda net, h, x: net.parts["head"](torch.cos(net.parts["norm2"](h))),
        lambda: {"norm2": nn.BatchNorm1d(6), "head": nn.Linear(6, 3)},
    ),
    "several readers of different kinds": (
        IMAGE,
        lambda: conv(2, 6, 6, 1),
        lambda net, h, x: (
            net.parts["one"](h)
            + net.parts["two"](F.max_pool2d(h, 7)).sum()
            + net.parts["three"](h.mean((2, 3)))[:, :, None, None]
            + net.parts["four"](h).mean()
        ),
        lambda: {
            "one": conv(2, 6, 4, 1),
            "two": conv(2, 6, 4, 1, transposed=True),
            "three": nn.Linear(6, 4),
            "four": nn.BatchNorm2d(6),
        },
    ),
    "concatenation": (
        VECTOR,
        linear(6, 6),
        lambda net, h, x: net.parts["head"](torch.cat([x.square(), h, x], -1)),
        lambda: {"head": nn.Linear(18, 3)},
    ),
    "concatenation of channels": (
        IMAGE,
        lambda: conv(2, 6, 6, 1),
        lambda net, h, x: net.parts["head"](torch.cat([h, x[:, :2]], 1)),
        lambda: {"head": conv(2, 8, 3, 3)},
    ),
    "concatenation into a transposed weight": (
        VECTOR,
        linear(6, 6),
        lambda net, h, x: torch.cat([x, h], -1) @ net.weight + net.bias,
        lambda: {"weight": unit(12, 3, seed=5), "bias": unit(3, seed=6)},
    ),
    "concatenation into a batch norm": (
        IMAGE,
        lambda: conv(2, 6, 6, 1),
        lambda net, h, x: torch.cos(net.parts["norm2"](torch.cat([x, h], 1))),
        lambda: {"norm2": nn.BatchNorm2d(12)},
    ),
    "concatenation, flattened": (
        IMAGE,
        lambda: conv(2, 6, 6, 1),
        lambda net, h, x: net.parts["head"](torch.cat([x.sin(), h], 1).flatten(1)),
        lambda: {"head": nn.Linear(12 * 56, 3)},
    ),
    "concatenation, max pool, split": (
        IMAGE,
        lambda: conv(2, 6, 6, 1),
        lambda net, h, x: net.parts["head"](F.max_pool2d(torch.cat([x, h], 1), 2).chunk(3, 1)[1]),
        lambda: {"head": conv(2, 4, 3, 1)},
    ),
    "the same twice in a concatenation": (
        VECTOR,
        linear(6, 6),
        lambda net, h, x: net.parts["head"](torch.cat([h, x, h.flip(-1)], -1)),
        lambda: {"head": nn.Linear(18, 3)},
    ),
    "max pool, flatten": (
        IMAGE,
        lambda: conv(2, 6, 6, 3, padding=1),
        lambda net, h, x: net.parts["head"](F.max_pool2d(h, 3, padding=1).flatten(1)),
        lambda: {"head": nn.Linear(54, 3)},
    ),
    "average pool": (
        IMAGE,
        lambda: conv(2, 6, 6, 1),
        lambda net, h, x: net.parts["head"](F.avg_pool2d(h, 3, padding=1, count_include_pad=False)),
        lambda: {"head": conv(2, 6, 3, 1)},
    ),
    "adaptive pool, permute, dropout": (
        IMAGE,
        lambda: conv(2, 6, 6, 1),
        lambda net, h, x: net.parts["head"](
            F.dropout(F.adaptive_avg_pool2d(h, 3), 0.5, net.training).permute(0, 2, 3, 1)
        ),
        lambda: {"head": nn.Linear(6, 3)},
    ),
    "upsampling, slices": (
        IMAGE,
        lambda: conv(2, 6, 6, 1),
        lambda net, h, x: net.parts["head"](F.interpolate(h, scale_factor=2)[:, :, 1:, ::2]),
        lambda: {"head": conv(2, 6, 3, 3)},
    ),
    "bilinear upsampling": (
        IMAGE,
        lambda: conv(2, 6, 6, 1),
        lambda net, h, x: net.parts["head"](F.interpolate(h, scale_factor=2, mode="bilinear")),
        lambda: {"head": conv(2, 6, 3, 3)},
    ),
    "last position": (
        (2, 5, 6),
        linear(6, 6),
        lambda net, h, x: net.parts["head"](h[:, -1]),
        lambda: {"head": nn.Linear(6, 3)},
    ),
    "batch norm before the activation": (
        IMAGE,
        lambda: conv(2, 6, 6, 3, padding=1, bias=False),
        run("head"),
        lambda: {"norm": nn.BatchNorm2d(6), "head": conv(2, 6, 3, 3)},
    ),
    "batch norm without gains before the activation": (
        VECTOR,
        linear(6, 6),
        run("head"),
        lambda: {"norm": nn.BatchNorm1d(6, affine=False, eps=0.1), "head": nn.Linear(6, 3)},
    ),
}


# Every reader in float64 with φ(a) = 0, with φ(a) = 1/2 and with a shift; in float32 with one of all.
CASES = [(name, function, torch.float64) for name in READERS for function in ("tanh", "sigmoid", "relu")]
CASES += [(name, tuple(FUNCTIONS)[place % len(FUNCTIONS)], torch.float32) for place, name in enumerate(READERS)]


@pytest.mark.parametrize(("name", "function", "dtype"), CASES)
def test_every_reader_undoes_the_scale(name, function, dtype):
    shape, layer, rest, parts = READERS[name]
    torch.manual_seed(0)
    model, x = perturbed(Net(layer(), FUNCTIONS[function], rest, **parts())).to(dtype), unit(*shape).to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = nz.plan(model, "layer", example_inputs=x)
    with torch.no_grad():
        wanted = model.without(x)
        with plan.applied(model):
            got = model(x)
    assert relative(got, wanted) <= GOALS[dtype][function == "sigmoid"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.assumptions_hold
    assert verification.per_layer["layer"] <= plan.certificates[0].bound
    assert verification.relative_error == pytest.approx(relative(got, wanted), rel=1e-3, abs=1e-12)


# name: layer's input, layer, function, rest, parts, bit for bit
NORMS_AFTER = {
    "layer norm takes the shift away": (VECTOR, linear(6, 6), F.relu, run("norm2"), lambda: {"norm2": nn.LayerNorm(6)}),
    "group norm takes the shift away": (
        IMAGE,
        lambda: conv(2, 6, 6, 1),
        F.relu,
        run("norm2"),
        lambda: {"norm2": nn.GroupNorm(2, 6)},
    ),
    "instance norm takes the shift away": (
        IMAGE,
        lambda: conv(2, 6, 6, 1),
        F.relu,
        run("norm2"),
        lambda: {"norm2": nn.InstanceNorm2d(6)},
    ),
    "rms norm of what is never negative": (
        VECTOR,
        linear(6, 6),
        F.relu,
        lambda net, h, x: net.parts["norm2"](h),
        lambda: {"norm2": nn.RMSNorm(6)},
    ),
}


@pytest.mark.parametrize("name", NORMS_AFTER)
def test_norms_with_statistics_of_their_own_absorb_a_shift(name):
    shape, layer, function, rest, parts = NORMS_AFTER[name]
    model, x = perturbed(Net(layer(), function, rest, **parts())).double(), unit(*shape).double()
    x = x.abs() if "rms" in name else x
    model = nn.Sequential(nn.ReLU() if "rms" in name else nn.Identity(), model).eval()
    plan = nz.plan(model, "1.layer", example_inputs=x)
    with torch.no_grad():
        wanted = model[1].without(x)
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-9
    assert nz.verify(model, plan, x).bound_holds
    assert not any("norm2" in parameter for parameter in plan.parameters)


def test_an_input_bound_that_is_too_small_is_told_apart_from_a_bound_that_does_not_hold():
    model = Net(nn.Linear(6, 6), F.relu, run("head"), head=nn.Linear(6, 3)).eval()
    plan = nz.plan(model, "layer", "passthrough", example_inputs=unit(2, 6), input_bound=0.01)
    verification = nz.verify(model, plan, unit(2, 6))
    assert not verification.assumptions_hold
    assert verification.bound_holds


# ---- zeros beside an operating point ---------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["relu", "relu6"])
def test_padding_beside_a_shift_is_bounded_if_that_is_asked_for(function):
    model = Net(conv(2, 6, 6, 1), FUNCTIONS[function], run("head"), head=conv(2, 6, 4, 3, padding=1))
    model, x = perturbed(model).double(), unit(2, 6, 9, 9).double()
    plan = nz.plan(model, "layer", "passthrough", example_inputs=x, tolerance=2.0)
    certificate = plan.certificates[0]
    assert certificate.kind == "bounded"
    assert 1.0 <= certificate.bound <= 2.0
    assert "the padding of 'parts.head'" in certificate.reason
    assert "not exact beside the padding of 'parts.head'" in plan.layers[0].note
    with torch.no_grad():
        wanted = model.without(x)
        with plan.applied(model):
            got = model(x)
    error = (got - wanted).abs()
    assert error[..., 1:-1, 1:-1].max() <= 1e-9
    assert error.max() > 1e-3
    # Five taps of a corner miss the operating point, each by at most bound · X times its weight.
    taps = model.parts["head"].weight.detach().abs().sum((1, 2, 3)).max()
    assert error.max() <= certificate.bound * plan.layers[0].input_bound * float(taps)
    assert nz.verify(model, plan, x).bound_holds


def test_padding_is_no_matter_where_the_operating_point_is_zero():
    model = Net(
        conv(2, 6, 6, 1),
        torch.tanh,
        lambda net, h, x: net.parts["head"](F.avg_pool2d(F.pad(h, (1, 2)), 3, padding=1)),
        head=conv(2, 6, 4, 3, padding=1, transposed=True, stride=2, groups=2, bias=False),
    )
    model, x = perturbed(model).double(), unit(2, 6, 9, 9).double()
    with torch.no_grad():
        wanted = model.without(x)
        with nz.plan(model, "layer", example_inputs=x).applied(model):
            assert relative(model(x), wanted) <= 1e-9


# ---- what is refused, and why ----------------------------------------------------------------------------------------


class Tied(nn.Module):
    """The logits are made with the embedding's own weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, x):
        return F.linear(torch.tanh(self.layer(self.embed(x))), self.embed.weight)


def net(layer, function, rest, **parts):
    return lambda: Net(layer(), function, rest, **{name: part() for name, part in parts.items()})


REFUSALS = {
    "a skip around the layer": (
        net(linear(6, 6), torch.tanh, lambda net, h, x: net.parts["head"](x + h), head=linear(6, 3)),
        VECTOR,
        r"only affine layers to read 'layer' \(tanh\), got add",
    ),
    "another activation": (
        net(linear(6, 6), torch.tanh, lambda net, h, x: net.parts["head"](F.relu(h)), head=linear(6, 3)),
        VECTOR,
        r"only affine layers to read 'layer' \(tanh\), got relu",
    ),
    "a matmul without a bias": (
        net(linear(6, 6), torch.sigmoid, lambda net, h, x: h @ net.weight, weight=lambda: unit(6, 3)),
        VECTOR,
        r"expected a bias in .* to absorb the operating point of 'layer'",
    ),
    "layer norm of a scaled value": (
        net(linear(6, 6), torch.tanh, run("norm2"), norm2=lambda: nn.LayerNorm(6)),
        VECTOR,
        r"a norm whose ε is small beside.*'layer' \(tanh\).*'parts.norm2' with ε = 1e-05: .*off by 0\.000\d+ as a rule",
    ),
    "rms norm of a shifted value": (
        net(linear(6, 6), torch.relu, run("norm2"), norm2=lambda: nn.RMSNorm(6)),
        VECTOR,
        r"a norm that subtracts its mean.*got the rms norm of 'parts.norm2'",
    ),
    "batch norm without gains as a reader": (
        net(linear(6, 6), torch.tanh, run("norm2"), norm2=lambda: nn.BatchNorm1d(6, affine=False)),
        VECTOR,
        r"expected a gain in the batch norm of 'parts.norm2'.*got affine=False",
    ),
    "batch norm without statistics": (
        net(
            linear(6, 6),
            torch.tanh,
            run("head"),
            norm=lambda: nn.BatchNorm1d(6, track_running_stats=False),
            head=linear(6, 3),
        ),
        VECTOR,
        r"expected stored statistics in the batch norm 'norm' behind 'layer', got no running statistics",
    ),
    "layer norm before the activation": (
        net(linear(6, 6), torch.tanh, run("head"), norm=lambda: nn.LayerNorm(6), head=linear(6, 3)),
        VECTOR,
        r"a batch norm or nothing between 'layer' and its activation, got a norm \(layer_norm with 'norm.weight'\)",
    ),
    "sigmoid before a padded convolution": (
        net(lambda: conv(2, 6, 6, 1), torch.sigmoid, run("head"), head=lambda: conv(2, 6, 4, 3, padding=1)),
        IMAGE,
        r"no zero padding beside.*got the padding of 'parts.head': its borders would be wrong",
    ),
    "relu before a padding average": (
        net(
            lambda: conv(2, 6, 6, 1),
            torch.relu,
            lambda net, h, x: net.parts["head"](F.avg_pool2d(h, 3, padding=1)),
            head=lambda: conv(2, 6, 4, 1),
        ),
        IMAGE,
        r"got the padding that avg_pool2d counts: its borders would be wrong, by up to 1",
    ),
    "relu before an upsampling convolution": (
        net(
            lambda: conv(2, 6, 6, 1),
            torch.relu,
            run("head"),
            head=lambda: conv(2, 6, 4, 2, stride=2, transposed=True),
        ),
        IMAGE,
        r"a transposed convolution of stride 1 in 'parts.head'",
    ),
    "relu before a transposed convolution that crops": (
        net(
            lambda: conv(2, 6, 6, 1),
            torch.relu,
            run("head"),
            head=lambda: conv(2, 6, 4, 3, padding=1, transposed=True),
        ),
        IMAGE,
        r"got the padding of 'parts.head': its borders would be wrong",
    ),
    "a concatenation along another axis": (
        net(linear(6, 6), torch.tanh, lambda net, h, x: net.parts["head"](torch.cat([h, x], 0)), head=linear(6, 3)),
        VECTOR,
        r"only affine layers to read 'layer' \(tanh\), got linear with 'parts.head.weight'",
    ),
    "a maximum over the layer and something else": (
        net(
            linear(6, 6),
            torch.tanh,
            lambda net, h, x: net.parts["head"](torch.stack([h, x], -1).amax(-1)),
            head=linear(6, 3),
        ),
        VECTOR,
        r"only affine layers to read 'layer' \(tanh\), got amax",
    ),
    "an addmm with factors of its own": (
        net(
            linear(6, 6),
            torch.sigmoid,
            lambda net, h, x: torch.addmm(net.bias, h, net.weight, beta=0.5),
            weight=lambda: unit(6, 3),
            bias=lambda: unit(3),
        ),
        VECTOR,
        r"only affine layers to read 'layer' \(sigmoid\), got addmm",
    ),
    "a concatenation into groups": (
        net(
            lambda: conv(2, 6, 6, 1),
            torch.tanh,
            lambda net, h, x: net.parts["head"](torch.cat([h, x], 1)),
            head=lambda: conv(2, 12, 4, 1, groups=2),
        ),
        IMAGE,
        r"only affine layers to read 'layer' \(tanh\), got conv2d with 'parts.head.weight'",
    ),
    "a layer that transposes its square input": (
        lambda: nn.Sequential(Transposing(), nn.Tanh(), nn.Linear(6, 6)),
        (2, 6, 6),
        r"expected a layer that leaves every feature in its place, got '0'",
    ),
}


class Transposing(nn.Linear):
    """A linear layer that reads its input's transpose."""

    def __init__(self):
        super().__init__(6, 6)

    def forward(self, x):
        return super().forward(x.transpose(-1, -2))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_undo_the_scale_is_refused_by_its_cause(name):
    build, shape, message = REFUSALS[name]
    model = build().eval()
    layer = "layer" if isinstance(model, Net) else "0"
    with pytest.raises(nz.NeutralizeError, match=message):
        nz.plan(model, layer, example_inputs=unit(*shape))


def test_an_embedding_that_makes_the_logits_too_is_refused_naming_it():
    with pytest.raises(nz.NeutralizeError, match=r"'embed\.weight', which reads 'layer', to read nothing else"):
        nz.plan(Tied().eval(), "layer", example_inputs=torch.tensor([[1, 2, 3]]))


def test_a_batch_norm_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).train()
    with pytest.raises(nz.NeutralizeError, match=r"batch norm '1' behind '0'.*call model\.eval\(\)"):
        nz.plan(model, "0", example_inputs=unit(4, 6))


# ---- batch norm between the layer and its activation, in networks as they are ----------------------------------------


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.2), nn.Tanh(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


@pytest.mark.parametrize("layers", [["3"], ["7"], ["3", "7"]], ids=str)
@pytest.mark.parametrize("dtype", GOALS, ids=str)
def test_a_convolution_with_its_batch_norm_and_activation_is_one_layer(layers, dtype):
    model, x = perturbed(convnet()).to(dtype), unit(2, 3, 12, 12).to(dtype)
    kept = [range(3), range(3, 6), range(6, 7), range(7, 11), range(11, 14)]
    left_out = {"3": 1, "7": 3}
    plan = nz.plan(model, layers, example_inputs=x)
    with torch.no_grad():
        wanted = x
        for place, part in enumerate(kept):
            if place not in [left_out[layer] for layer in layers]:
                wanted = nn.Sequential(*[model[index] for index in part])(wanted)
        with plan.applied(model):
            got = model(x)
    assert relative(got, wanted) <= GOALS[dtype][0]
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.relative_error <= GOALS[dtype][0]


def test_a_batch_norm_behind_the_activation_stays():
    model = perturbed(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3))).double()
    x = unit(8, 6).double()
    plan = nz.plan(model, "0", example_inputs=x)
    with torch.no_grad():
        wanted = model[3](model[2](x))
        with nz.excised(model, "0"):
            assert torch.equal(model(x), wanted)
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-9
    assert plan.layers[0].consumers == ("2",)


def test_an_activation_behind_a_view_belongs_to_the_layer_and_one_behind_a_container_does_not():
    x = unit(8, 6).double()
    viewed = perturbed(nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.Tanh(), nn.Linear(3, 3))).double()
    contained = perturbed(nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3))).double()
    for model, wanted in (
        (viewed, lambda: viewed[3](x.unflatten(1, (2, 3)))),
        (contained, lambda: contained[2](torch.tanh(x))),
    ):
        plan = nz.plan(model, "0", example_inputs=x)
        with torch.no_grad():
            without = wanted()
            with nz.excised(model, "0"):
                assert torch.equal(model(x), without)
            with plan.applied(model):
                assert relative(model(x), without) <= 1e-9
        assert nz.verify(model, plan, x).bound_holds


def test_a_plan_with_a_batch_norm_needs_no_weights():
    live = perturbed(convnet())
    with torch.device("meta"):
        shadow = convnet().eval()
    options = {"example_inputs": unit(2, 3, 12, 12), "input_bound": 20.0}
    plan = nz.plan(shadow, "7", "passthrough", **options)
    assert set(plan.parameters) >= {"8.running_mean", "8.running_var", "8.weight", "8.bias"}
    assert plan.digest == nz.plan(live, "7", "passthrough", **options).digest
    assert "holds in eval mode" in plan.layers[0].note


def test_a_gain_behind_a_concatenation_scales_the_layer_alone():
    model = Net(
        nn.Linear(6, 6), torch.tanh, lambda net, h, x: net.parts["head"](torch.cat([h, x], -1)), head=nn.Linear(12, 3)
    )
    model, x = perturbed(model).double(), unit(4, 6).double()
    plan = nz.plan(model, "layer", "passthrough", example_inputs=x, gain=0.5)
    with torch.no_grad():
        wanted = model.parts["head"](torch.cat([0.5 * x, x], -1))
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-9
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.relative_error <= 1e-9
