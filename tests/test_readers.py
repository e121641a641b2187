"""What reads a layer in its linear regime: products, norms, transposed convolutions; against networks cut by hand.

Each network is a function of its parts that is called with what the layer hands on, and for the oracle with its input.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import perturbed
from torch import nn

import neutralize as nz


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


class Net(nn.Module):
    """``rest(net, φ(layer(x)), x)``; without the layer ``rest(net, x, x)``."""

    def __init__(self, layer, function, rest=None, **parts):
        super().__init__()
        self.layer, self.function = layer, function
        self.rest = rest or (lambda net, h, x: net.head(h))
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, x):
        return self.rest(self, self.function(self.layer(x)), x)

    def without(self, x):
        return self.rest(self, x, x)


def errors(model, x, *, apart=1e-12, **options):
    """Plan, apply, compare with the oracle, restore; the plan and the error end to end."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = nz.plan(model, "layer", "passthrough", example_inputs=x, **options)
    with torch.no_grad():
        wanted = model.without(x)
        with plan.applied(model):
            got = model(x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.assumptions_hold
    assert verification.relative_error == pytest.approx(relative(got, wanted), rel=1e-3, abs=apart)
    return plan, relative(got, wanted)


SEQUENCE, IMAGE = (2, 5, 6), (2, 6, 7, 8)
# name: what the network makes of h and x, its parts, whether a bias or a mean absorbs a constant.
PRODUCTS = {
    "x @ w.T": (lambda net, h, x: h @ net.w.T, {"w": (3, 6)}, False),
    "b + x @ w.mT": (lambda net, h, x: net.b + h @ net.w.mT, {"w": (3, 6), "b": (3,)}, True),
    "linear with a parameter": (lambda net, h, x: F.linear(h, net.w, net.b), {"w": (3, 6), "b": (3,)}, True),
    "a view of a parameter": (lambda net, h, x: h @ net.w.view(6, 4), {"w": (2, 3, 4)}, False),
    "einsum": (lambda net, h, x: torch.einsum("bti,oi->bto", h, net.w), {"w": (3, 6)}, False),
    "einsum, transposed, with a bias": (
        lambda net, h, x: torch.einsum("io, ...i -> ...o", net.w, h) + net.b,
        {"w": (6, 3), "b": (3,)},
        True,
    ),
    "einsum into heads": (lambda net, h, x: torch.einsum("bti,iho->btho", h, net.w), {"w": (6, 2, 3)}, False),
    "einsum over the positions": (lambda net, h, x: torch.einsum("bti,ot->boi", h, net.w), {"w": (4, 5)}, False),
    "w @ x": (lambda net, h, x: net.w @ h, {"w": (3, 5)}, False),
    "bmm": (lambda net, h, x: torch.bmm(h, net.w), {"w": (2, 6, 3)}, False),
    "gains": (lambda net, h, x: (h * net.w).cos(), {"w": (6,)}, False),
    "a factor and a linear": (lambda net, h, x: net.head(h * 0.37), {"head": nn.Linear(6, 3)}, False),
    "a divided product": (lambda net, h, x: net.head(h / x.square().sum() ** 0.5), {"head": nn.Linear(6, 3)}, False),
    "attention over the values": (
        lambda net, h, x: net.head((x @ x.mT).softmax(-1) @ h),
        {"head": nn.Linear(6, 3)},
        False,
    ),
    "a sum and a mask": (
        lambda net, h, x: net.head(h.masked_fill(x > 0.5, 0.0).sum(1)),
        {"head": nn.Linear(6, 3)},
        False,
    ),
    "one weight twice": (lambda net, h, x: net.head(h) - net.head(h.flip(1)).sin(), {"head": nn.Linear(6, 3)}, True),
    "one batch norm twice": (
        lambda net, h, x: net.head(h.mT).cos() - net.head(h.flip(1).mT),
        {"head": nn.BatchNorm1d(6)},
        True,
    ),
    "one gain twice": (lambda net, h, x: (h * net.w).cos() - net.w * h.flip(1), {"w": (6,)}, False),
}


def product(name, function, dtype):
    rest, parts, _ = PRODUCTS[name]
    torch.manual_seed(0)
    made = {
        key: unit(*part, seed=5) if isinstance(part, tuple) else type(part)(*_size(part)) for key, part in parts.items()
    }
    return perturbed(Net(nn.Linear(6, 6), function, rest, **made)).to(dtype), unit(*SEQUENCE).to(dtype)


def _size(part):
    return (part.in_features, part.out_features) if isinstance(part, nn.Linear) else (part.num_features,)


@pytest.mark.parametrize(("dtype", "goal"), [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_linear_in_a_parameter_undoes_a_scale(name, dtype, goal):
    model, x = product(name, torch.tanh, dtype)
    assert errors(model, x)[1] <= goal


@pytest.mark.parametrize("function", [torch.relu, torch.sigmoid], ids=["relu", "sigmoid"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_linear_in_a_parameter_undoes_a_constant_or_says_why_not(name, function):
    model, x = product(name, function, torch.float64)
    if PRODUCTS[name][2]:
        assert errors(model, x)[1] <= 1e-7
        return
    with pytest.raises(nz.NeutralizeError, match=r"absorb|changes a constant"):
        nz.plan(model, "layer", example_inputs=x)


REFUSED = {
    "a weight that reads something else too": (
        lambda net, h, x: net.head(h) + net.head(x),
        {"head": nn.Linear(6, 6)},
        r"'head\.weight', which reads 'layer', to read nothing else",
    ),
    "one weight on two sides of a concatenation": (
        lambda net, h, x: net.head(torch.cat([h, x], -1)) - net.head(torch.cat([x, h], -1)),
        {"head": nn.Linear(12, 3)},
        r"parameters of its own, got 'head\.(bias|weight)' in two that read it differently",
    ),
    "one weight with two biases": (
        lambda net, h, x: F.linear(h, net.w, net.b) - F.linear(h, net.w, net.c),
        {"w": unit(3, 6), "b": unit(3), "c": unit(3)},
        r"parameters of its own, got 'w' in two that read it differently",
    ),
    "a product with itself": (
        lambda net, h, x: net.head(h * h),
        {"head": nn.Linear(6, 3)},
        r"only affine layers to read 'layer' \(tanh\), got mul",
    ),
    "a product with what it computes": (
        lambda net, h, x: net.head(h * h.mean(-1, keepdim=True)),
        {"head": nn.Linear(6, 3)},
        r"only affine layers to read 'layer' \(tanh\), got mul",
    ),
    "a weight that multiplies twice": (
        lambda net, h, x: torch.einsum("bti,oi,oi->bto", h, net.w, net.w),
        {"w": unit(3, 6)},
        r"only affine layers to read 'layer' \(tanh\), got einsum",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_linear_or_shared_is_refused(name):
    rest, parts, message = REFUSED[name]
    model = Net(nn.Linear(6, 6), torch.tanh, rest, **parts).eval()
    with pytest.raises(nz.NeutralizeError, match=message):
        nz.plan(model, "layer", example_inputs=unit(*SEQUENCE))


# ---- norms with statistics of their own ------------------------------------------------------------------------------

NORMS = {
    "layer norm": ((32, 6), lambda: nn.Linear(6, 6), lambda: nn.LayerNorm(6)),
    "layer norm without gains": ((8, 3, 6), lambda: nn.Linear(6, 6), lambda: nn.LayerNorm(6, elementwise_affine=False)),
    "layer norm over two dimensions": ((4, 5, 6), lambda: nn.Linear(6, 6), lambda: nn.LayerNorm((5, 6))),
    "group norm": (IMAGE, lambda: nn.Conv2d(6, 6, 1), lambda: nn.GroupNorm(2, 6)),
    "instance norm": (IMAGE, lambda: nn.Conv2d(6, 6, 1), lambda: nn.InstanceNorm2d(6)),
}
UPPER_SIDES = {"gelu": F.gelu, "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "mish": F.mish,
               "softplus": F.softplus, "relu": F.relu, "leaky_relu": F.leaky_relu}  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "goal"), [(torch.float64, 1e-9), (torch.float32, 2e-5), (torch.bfloat16, 3e-2)], ids=str
)
@pytest.mark.parametrize("function", UPPER_SIDES)
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_takes_a_constant_away_so_the_linear_side_needs_no_scale(name, function, dtype, goal):
    shape, layer, norm = NORMS[name]
    model, x = perturbed(Net(layer(), UPPER_SIDES[function], head=norm())).to(dtype), unit(*shape).to(dtype)
    plan, error = errors(model, x)
    assert error <= goal
    assert plan.layers[0].epsilon * plan.layers[0].slope >= 1.0
    assert not any(name.startswith("head") for name in plan.parameters)


@pytest.mark.parametrize("name", [*NORMS, "rms norm"])
def test_a_norm_whose_constant_is_small_reads_a_scaled_value(name):
    """As in BERT, ε = 1e-12; the bound covers every row, down to half the least spread of the example's."""
    shape, layer, norm = NORMS.get(name, ((32, 6), lambda: nn.Linear(6, 6), lambda: nn.RMSNorm(6)))
    norm = norm()
    norm.eps = 1e-12
    model, x = perturbed(Net(layer(), torch.tanh, head=norm)), unit(*shape)
    plan, error = errors(model, x)
    certificate = plan.certificates[0]
    assert error <= 2e-5
    assert certificate.kind == "bounded"
    assert "spread at the norm >= " in certificate.assumption


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("function", [torch.tanh, F.selu, F.hardtanh, F.softsign], ids=lambda f: f.__name__)
def test_a_norm_whose_constant_is_not_small_is_refused_or_bounded(function, eps):
    model = Net(nn.Linear(64, 64), function, head=nn.LayerNorm(64, eps=eps, elementwise_affine=False)).double()
    x = unit(40, 64).double() * torch.logspace(-0.3, 0.3, 40, dtype=torch.float64)[:, None]
    with pytest.raises(nz.NeutralizeError, match=r"whose ε is small beside.*give tolerance=") as refused:
        nz.plan(model, "layer", example_inputs=x)
    tolerance = float(str(refused.value).partition("tolerance=")[2].partition(" ")[0])
    plan, error = errors(model, x, tolerance=tolerance)
    certificate = plan.certificates[0]
    assert error > 1e-9
    assert certificate.bound <= tolerance
    with torch.no_grad():
        wanted = model.without(x)
        with plan.applied(model):
            off = (model(x) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    # Half the bound at most is the norm's share, twice it the most that a change of what it reads can do.
    spread = (x - x.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    assert bool((off <= certificate.bound * (0.5 + 2 * plan.layers[0].input_bound / spread)).all())
    measured = float(certificate.assumption.partition(">= ")[2].partition(" ")[0])
    assert measured == pytest.approx(float(spread.min()) / 2, rel=1e-2)


def test_a_scaled_value_before_a_norm_is_within_the_figure_of_a_narrow_dtype():
    model, x = Net(nn.Linear(64, 64), torch.tanh, head=nn.LayerNorm(64)).bfloat16(), unit(40, 64).bfloat16()
    assert errors(model, x)[1] <= 3e-2


def test_rows_of_no_spread_are_zero_whatever_the_scale():
    model, x = Net(nn.Linear(8, 8), torch.tanh, head=nn.LayerNorm(8, eps=1e-12)), unit(16, 8)
    x[3], x[7] = 0.7, 0.0
    assert errors(model, x)[1] <= 2e-5


def test_a_gain_widens_the_spread_with_what_is_handed_on():
    model, x = Net(nn.Linear(8, 8), torch.tanh, head=nn.LayerNorm(8)).double(), unit(16, 8).double()
    options = {"example_inputs": x, "tolerance": 9.0}
    plans = [nz.plan(model, "layer", "passthrough", gain=gain, **options) for gain in (1.0, 4.0)]
    spreads = [float(plan.certificates[0].assumption.partition(">= ")[2].partition(" ")[0]) for plan in plans]
    assert spreads[1] == pytest.approx(4 * spreads[0], rel=1e-2)
    assert plans[1].certificates[0].bound == pytest.approx(4 * plans[0].certificates[0].bound, rel=1e-2)


def test_a_batch_norm_in_training_mode_is_refused_as_a_reader():
    model = Net(nn.Linear(6, 6), torch.tanh, head=nn.BatchNorm1d(6)).train()
    with pytest.raises(
        nz.NeutralizeError, match=r"stored statistics in the batch norm of 'head'.*call model\.eval\(\)"
    ):
        nz.plan(model, "layer", example_inputs=unit(8, 6))


def test_an_rms_norm_takes_no_constant_away():
    model, x = Net(nn.Linear(6, 6), torch.relu, head=nn.RMSNorm(6)), unit(8, 6)
    with pytest.raises(nz.NeutralizeError, match=r"a norm that subtracts its mean.*the rms norm of 'head'"):
        nz.plan(model, "layer", example_inputs=x)


def test_a_spread_that_cannot_be_measured_is_asked_for():
    named = Net(nn.Linear(6, 6), torch.tanh, head=nn.LayerNorm(6))
    with pytest.raises(
        nz.NeutralizeError, match=r"example_inputs and a module of its own for the layer norm of 'head'"
    ):
        nz.plan(named, "layer", "passthrough", input_bound=4.0)
    function = Net(nn.Linear(6, 6), torch.tanh, lambda net, h, x: F.layer_norm(h, (6,)))
    with pytest.raises(nz.NeutralizeError, match=r"example_inputs and a module of its own for the layer norm"):
        nz.plan(function, "layer", example_inputs=unit(8, 6))
    plan = nz.plan(Net(nn.Linear(6, 6), F.gelu, head=nn.LayerNorm(6)), "layer", "passthrough", input_bound=4.0)
    assert plan.layers[0].epsilon == 1.0


@pytest.mark.parametrize("reader", ["norm", "maximum", "batch norm", "linear"])
def test_a_slope_below_zero_is_undone_by_weights_but_not_by_a_norm(reader):
    nz.register_activation("falling", lambda z: torch.tanh(-z))
    rest = (lambda net, h, x: net.head(h.unflatten(-1, (3, 2)).amax(-1))) if reader == "maximum" else None
    heads = {"norm": nn.LayerNorm(6), "maximum": nn.Linear(3, 3), "batch norm": nn.BatchNorm1d(6)}
    head = heads.get(reader, nn.Linear(6, 3))
    model = perturbed(Net(nn.Linear(6, 6), lambda h: torch.tanh(-h), rest, head=head)).double()
    x = unit(16, 6).double()
    if reader in ("norm", "maximum"):
        with pytest.raises(nz.NeutralizeError, match=r"got -1: a norm takes|no maximum between .* slope of -1"):
            nz.plan(model, "layer", example_inputs=x)
        return
    plan, error = errors(model, x)
    assert plan.layers[0].slope == -1.0
    assert error <= 1e-9


# ---- convolutions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["relu", "sigmoid", "tanh"])
@pytest.mark.parametrize(
    ("rank", "options"),
    [
        (1, {"kernel_size": 3, "padding": 2, "groups": 2}),
        (2, {"kernel_size": 1, "groups": 6}),
        (2, {"kernel_size": 3, "padding": 4, "dilation": 2, "groups": 3}),
        (3, {"kernel_size": (1, 3, 1), "padding": (0, 2, 0), "groups": 2}),
    ],
)
def test_a_transposed_convolution_in_groups_absorbs_a_constant_group_by_group(rank, options, function):
    shape = (2, 6, 5, 6, 7)[: 2 + rank]
    one, many = {
        1: (nn.Conv1d, nn.ConvTranspose1d),
        2: (nn.Conv2d, nn.ConvTranspose2d),
        3: (nn.Conv3d, nn.ConvTranspose3d),
    }[rank]
    model = perturbed(Net(one(6, 6, 1), getattr(torch, function), head=many(6, 12, **options))).double()
    x = unit(*shape).double()
    plan, error = errors(model, x)
    assert error <= 1e-7
    assert nz.Plan.from_json(plan.to_json()) == plan


def test_a_transposed_convolution_that_crops_is_wrong_at_its_borders_only():
    head = nn.ConvTranspose2d(6, 4, 3, padding=1, groups=2)
    model, x = perturbed(Net(nn.Conv2d(6, 6, 1), torch.relu, head=head)).double(), unit(2, 6, 7, 8).double()
    plan = nz.plan(model, "layer", "passthrough", example_inputs=x, tolerance=2.0)
    assert "the padding of 'head'" in plan.certificates[0].reason
    with torch.no_grad():
        wanted = model.without(x)
        with plan.applied(model):
            error = (model(x) - wanted).abs()
    assert error[..., 1:-1, 1:-1].max() <= 1e-9
    assert error.max() > 1e-3


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_a_convolution_with_a_padding_of_its_own_is_a_layer(mode, groups):
    layer = nn.Conv2d(6, 6, (5, 3), padding=(2, 2), dilation=(1, 2), padding_mode=mode, groups=groups)
    model = perturbed(Net(layer, torch.tanh, head=nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode)))
    assert errors(model, unit(2, 6, 9, 8))[1] <= 2e-5
    bare = perturbed(Net(layer, lambda h: h, head=nn.Conv2d(6, 4, 1)))
    assert nz.plan(bare, "layer", example_inputs=unit(2, 6, 9, 8)).certificates[0].kind == "exact"


class Lopsided(nn.Conv1d):
    """A convolution that looks back only: its middle tap reads another sample than that of its own place."""

    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


def test_a_causal_convolution_hands_on_by_the_tap_that_reads_its_own_sample():
    model = Net(Lopsided(6, 6, 3), torch.tanh, head=nn.Conv1d(6, 3, 1)).eval()
    x = unit(2, 6, 9)
    plan = nz.plan(model, "layer", example_inputs=x)
    with torch.no_grad(), plan.applied(model):
        rewritten = model(x)
    with torch.no_grad():
        wanted = model.head(x)
    assert (rewritten - wanted).norm() / wanted.norm() <= 2e-5


class Late(nn.Conv1d):
    """Keeps the shape, but no tap reads the sample of its own place."""

    def forward(self, x):
        return super().forward(F.pad(x, (3, -1)))


def test_a_padding_that_moves_the_samples_is_refused():
    model = Net(Late(6, 6, 3), torch.tanh, head=nn.Conv1d(6, 3, 1)).eval()
    with pytest.raises(nz.NeutralizeError, match=r"expected a convolution that keeps its input.*own place"):
        nz.plan(model, "layer", example_inputs=unit(2, 6, 9))


# ---- two layers, one of which reads the other beside something else --------------------------------------------------


class Dense(nn.Module):
    """Each layer reads the input and what the layers before it hand on, beside each other."""

    def __init__(self, function, axis, *layers, head):
        super().__init__()
        self.function, self.axis, self.layers, self.head = function, axis, nn.ModuleList(layers), head

    def forward(self, x, off=()):
        read = x
        for place, layer in enumerate(self.layers):
            read = torch.cat([read, x], self.axis) if place else read
            read = read if place in off else self.function(layer(read))
        return self.head(read)


DENSE = {
    "linear": (-1, lambda: (nn.Linear(6, 6), nn.Linear(12, 12), nn.Linear(18, 18), nn.Linear(18, 3)), (8, 6)),
    "channels": (1, lambda: (nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(8, 8, 1), nn.Conv1d(12, 12, 1),
                             nn.Conv1d(12, 3, 1)), (2, 4, 9)),
}  # fmt: skip


@pytest.mark.parametrize("off", [(0, 1), (1, 2), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize(("function", "goal"), [(torch.tanh, 1e-9), (torch.sigmoid, 1e-7)])
@pytest.mark.parametrize("kind", DENSE)
def test_a_layer_and_its_reader_behind_a_concatenation_are_off_in_one_plan(kind, function, goal, off):
    axis, parts, shape = DENSE[kind]
    *layers, head = parts()
    model, x = perturbed(Dense(function, axis, *layers, head=head)).double(), unit(*shape).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    selected = [f"layers.{place}" for place in off]
    plan = nz.plan(model, selected, example_inputs=x)
    with torch.no_grad():
        wanted = model(x, off)
        with plan.applied(model):
            assert relative(model(x), wanted) <= goal
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.relative_error <= goal
    assert all(gain == pytest.approx(1.0, rel=1e-4) for gain in verification.gradient_gain.values())


def test_a_convolution_that_is_off_too_reads_no_padding():
    layers = nn.Conv2d(4, 4, 3, padding=1), nn.Sigmoid(), nn.Conv2d(4, 4, 5, padding=2, groups=2), nn.Sigmoid()
    model, x = perturbed(nn.Sequential(*layers, nn.Conv2d(4, 3, 3))).double(), unit(2, 4, 8, 8).double()
    with torch.no_grad():
        wanted = model[4](x)
        with nz.plan(model, ["0", "2"], example_inputs=x).applied(model):
            assert relative(model(x), wanted) <= 1e-7
    with pytest.raises(nz.NeutralizeError, match=r"expected no zero padding beside what '0' hands on"):
        nz.plan(model, "0", example_inputs=x)


@pytest.mark.parametrize("join", [torch.stack, lambda steps: torch.cat(steps, 0)])
@pytest.mark.parametrize(("function", "goal"), [(torch.tanh, 1e-9), (torch.sigmoid, 1e-7)])
def test_the_results_of_several_calls_are_read_together(join, function, goal):
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(join([function(self.layer(step)) for step in x]))

        def without(self, x):
            return self.head(join(list(x)))

    assert errors(perturbed(Steps()).double(), unit(3, 4, 6).double())[1] <= goal


# ---- recurrent layers that read a plain one --------------------------------------------------------------------------


def _in_steps(net, h):
    state, outputs = None, []
    for step in h:
        state = net.rnn(step, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs)


def _packed(net, h):
    packed = nn.utils.rnn.pack_padded_sequence(h, torch.tensor([4, 3, 1]))
    return nn.utils.rnn.pad_packed_sequence(net.rnn(packed)[0])[0]


# name: a recurrent layer of 6 features, and what the network makes of what it reads.
RECURRENT = {
    "lstm": (lambda: nn.LSTM(6, 5), lambda net, h, x: net.rnn(h)[0]),
    "gru, both directions": (lambda: nn.GRU(6, 5, bidirectional=True), lambda net, h, x: net.rnn(h)[0]),
    "lstm, both directions, stacked": (
        lambda: nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True), lambda net, h, x: net.rnn(h)[0]
    ),
    "lstm, projected, its last state": (lambda: nn.LSTM(6, 5, proj_size=3), lambda net, h, x: net.rnn(h)[1][0][-1]),
    "relu rnn": (lambda: nn.RNN(6, 5, nonlinearity="relu"), lambda net, h, x: net.rnn(h)[0]),
    "gru, beside the input": (lambda: nn.GRU(9, 5), lambda net, h, x: net.rnn(torch.cat([x[..., :3], h], -1))[0]),
    "lstm cell": (lambda: nn.LSTMCell(6, 5), lambda net, h, x: _in_steps(net, h)),
    "gru cell": (lambda: nn.GRUCell(6, 5), lambda net, h, x: _in_steps(net, h)),
    "packed": (lambda: nn.LSTM(6, 5, bidirectional=True), lambda net, h, x: _packed(net, h)),
}  # fmt: skip


@pytest.mark.parametrize(("function", "goal"), [(torch.tanh, 2e-5), (torch.sigmoid, 3e-4)])
@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_layer_undoes_a_scale_and_a_constant_by_its_input_weights_and_biases(name, function, goal):
    rnn, rest = RECURRENT[name]
    model, x = perturbed(Net(nn.Linear(6, 6), function, rest, rnn=rnn())), unit(4, 3, 6)
    plan, error = errors(model, x, apart=goal / 10)  # verify differentiates: torch computes in another order then
    assert error <= goal
    assert plan.layers[0].consumers == ("rnn",)


@pytest.mark.parametrize(("sides", "factor"), [("out", 0.25), ("both", -0.25)])
def test_a_recurrent_layer_that_reads_a_layer_damps_it(sides, factor):
    model, x = perturbed(Net(nn.Linear(6, 6), torch.relu, RECURRENT["gru, both directions"][1],
                             rnn=nn.GRU(6, 5, bidirectional=True))).double(), unit(4, 3, 6).double()  # fmt: skip
    plan = nz.plan(model, "layer", "damp", factor=factor, sides=sides, example_inputs=x)
    with torch.no_grad():
        wanted = model.rest(model, factor * torch.relu(model.layer(x)), x)
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-14
    assert nz.verify(model, plan, x).relative_error <= 1e-14


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_layer_and_the_recurrent_layer_that_reads_it_are_off_together(kind):
    model = perturbed(Net(nn.Linear(6, 6), torch.sigmoid, lambda net, h, x: net.head(net.rnn(h)[0]),
                          rnn=kind(6, 6, num_layers=2), head=nn.Linear(6, 3)))  # fmt: skip
    x = unit(4, 3, 6)
    plan = nz.plan(model, ["layer", "rnn"], example_inputs=x)
    with torch.no_grad():
        wanted = model.head(x)
        with plan.applied(model):
            assert relative(model(x), wanted) <= 3e-4
    assert nz.verify(model, plan, x).bound_holds


def test_a_recurrent_layer_that_reads_a_layer_as_its_state_or_without_a_bias_is_refused():
    as_state = Net(nn.Linear(6, 6), torch.tanh, lambda net, h, x: net.rnn(h, h[:1])[0], rnn=nn.GRU(6, 6))
    with pytest.raises(nz.NeutralizeError, match=r"only affine layers to read 'layer' \(tanh\), got gru"):
        nz.plan(as_state, "layer", example_inputs=unit(4, 3, 6))
    unbiased = Net(nn.Linear(6, 6), torch.sigmoid, lambda net, h, x: net.rnn(h)[0], rnn=nn.GRU(6, 6, bias=False))
    with pytest.raises(nz.NeutralizeError, match=r"a bias in 'rnn' to absorb the operating point of 'layer', got none"):
        nz.plan(unbiased, "layer", example_inputs=unit(4, 3, 6))


@pytest.mark.parametrize(
    "rest",
    [
        lambda net, h, x: net.head(h[:, [2, 0, 1]]),
        lambda net, h, x: net.head(h[:, torch.tensor([1, 1])]),
        lambda net, h, x: net.head(torch.cat([x[:, :3], h[:, [2, 0, 1]]], -1)),
    ],
)
def test_steps_that_are_picked_by_index_are_read(rest):
    head = nn.LazyLinear(3)
    model, x = Net(nn.Linear(6, 6), torch.sigmoid, rest, head=head).double(), unit(2, 5, 6).double()
    model(x)
    assert errors(perturbed(model), x)[1] <= 1e-7
