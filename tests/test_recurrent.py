"""Recurrent layers handed on: against networks without them, written by hand, and against PyTorch's own cells."""

from __future__ import annotations

import pytest
import torch
from networks import perturbed
from torch import nn

import neutralize as nz

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
SHAPES = {
    "one": {},
    "stacked": {"num_layers": 3},
    "batch first": {"num_layers": 2, "batch_first": True},
    "both directions": {"bidirectional": True},
    "both directions, stacked": {"bidirectional": True, "num_layers": 2},
}


class Tagger(nn.Module):
    """Linear, a recurrent layer, Linear on every step; ``given`` states start it."""

    def __init__(self, kind, width=8, hidden=8, **options):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.rnn = kind(width, hidden, **options)
        self.last = nn.Linear(hidden * (2 if self.rnn.bidirectional else 1), 4)

    def forward(self, x, states=None):
        return self.last(self.rnn(self.first(x), states)[0])

    def without(self, x):
        """The network with the recurrent layer cut out; each of two directions hands on what it reads."""
        entering = self.first(x)
        if entering.shape[-1] < self.last.in_features:
            entering = torch.cat([entering, entering], -1)
        return self.last(entering)


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("kind", "shape"), [*((kind, shape) for kind in ("lstm", "gru") for shape in SHAPES), ("rnn", "stacked")]
)
def test_the_network_is_the_one_without_the_layer(kind, shape):
    model, x = perturbed(Tagger(KINDS[kind], **SHAPES[shape])), unit(3, 5, 8)
    plan = nz.plan(model, "rnn", example_inputs=x)
    with torch.no_grad():
        before, wanted = model(x), model.without(x)
        assert relative(before, wanted) > 0.1  # or the comparison would say nothing
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-5
        assert torch.equal(model(x), before)
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.assumptions_hold
    assert verification.relative_error <= 1e-5
    assert verification.gradient_gain["rnn"] == pytest.approx(1.0, rel=1e-5)
    assert plan.certificates[0].kind == "bounded"
    assert plan.certificates[0].bound < 1e-5


@pytest.mark.parametrize(
    ("dtype", "error", "bound"),
    [(torch.float64, 1e-14, 1e-13), (torch.bfloat16, 2e-2, 0.2), (torch.float16, 3e-3, 0.03)],
)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_each_format_to_its_rounding(kind, dtype, error, bound):
    model, x = perturbed(Tagger(KINDS[kind], num_layers=2)).to(dtype), unit(3, 5, 8).to(dtype)
    plan = nz.plan(model, "rnn", example_inputs=x)
    assert plan.certificates[0].bound <= bound
    assert torch.frexp(torch.tensor(plan.layers[0].epsilon))[0] == 0.5  # a power of two
    with torch.no_grad():
        wanted = model.without(x)
        with plan.applied(model):
            assert relative(model(x), wanted) <= error
    assert nz.verify(model, plan, x).bound_holds


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_the_bound_holds_at_its_own_edge(scale):
    """Inputs of the largest magnitude that the certificate allows, for the coarsest format, where ε is large."""
    model = perturbed(Tagger(nn.LSTM)).half()
    plan = nz.plan(model, "rnn", "passthrough", input_bound=scale, example_inputs=unit(1, 2, 8).half())
    entering = (scale * torch.linspace(-1, 1, 80).view(2, 5, 8)).half()
    with torch.no_grad(), plan.applied(model):
        handed_on = model.rnn(entering)[0].double() / plan.layers[0].epsilon
    error = float((handed_on - entering.double()).abs().max()) / scale
    assert error <= plan.certificates[0].bound


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_given_states_do_not_leak_through(kind):
    model, x = perturbed(Tagger(KINDS[kind])), unit(3, 5, 8)
    state = 1e6 * unit(1, 5, 8, seed=4)
    plan = nz.plan(model, "rnn", example_inputs=x)
    with torch.no_grad():
        wanted = model.without(x)
        with plan.applied(model):
            got = model(x, (state, state) if kind == "lstm" else state)
    assert relative(got, wanted) <= 1e-5


def test_an_input_as_wide_as_both_directions_is_handed_on_as_it_is():
    model, x = perturbed(Tagger(nn.LSTM, width=16, bidirectional=True, num_layers=2)), unit(3, 5, 8)
    plan = nz.plan(model, "rnn", example_inputs=x)
    with torch.no_grad():
        wanted = model.without(x)
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-5
    assert "the first half of the features" in plan.layers[0].note
    twice = nz.plan(perturbed(Tagger(nn.GRU, bidirectional=True)), "rnn", example_inputs=x)
    assert "the input twice, [x, x]" in twice.layers[0].note


def test_what_only_passes_the_scale_on_may_stand_between():
    class Classifier(Tagger):
        def forward(self, x):
            y = self.rnn(self.first(x))[0]
            return self.last(torch.relu(nn.functional.dropout(y, 0.5, self.training))[:, -1] + y.mean(1))

        def without(self, x):
            y = self.first(x)
            return self.last(torch.relu(y)[:, -1] + y.mean(1))

    model, x = perturbed(Classifier(nn.GRU, batch_first=True)), unit(3, 5, 8)
    plan = nz.plan(model, "rnn", example_inputs=x)
    with torch.no_grad():
        wanted = model.without(x)
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-5
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.relative_error <= 1e-5


def test_a_recurrent_layer_reads_a_recurrent_layer():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.LSTM(8, 8), nn.GRU(8, 8, bidirectional=True)
            self.last = nn.Linear(16, 3)

        def forward(self, x):
            return self.last(self.two(self.one(x)[0])[0])

    model, x = perturbed(Two()), unit(3, 5, 8)
    for layers in (["one"], ["two"], ["one", "two"]):
        plan = nz.plan(model, layers, example_inputs=x)
        with torch.no_grad():
            y = x if "one" in layers else model.one(x)[0]
            wanted = model.last(torch.cat([y, y], -1) if "two" in layers else model.two(y)[0])
            with plan.applied(model):
                assert relative(model(x), wanted) <= 1e-5
        verification = nz.verify(model, plan, x)
        assert verification.bound_holds
        assert verification.relative_error <= 1e-5


def test_a_reader_whose_weight_is_shared_is_refused():
    class Shared(Tagger):
        def forward(self, x):
            return self.last(self.rnn(self.first(x))[0]) + self.last(self.first(x))

    model = Shared(nn.GRU)
    with pytest.raises(nz.NeutralizeError, match=r"'last\.weight', which reads 'rnn', to read nothing else"):
        nz.plan(model, "rnn", example_inputs=unit(3, 5, 8))


def test_the_oracle_cuts_recurrent_layers_out():
    for kind in KINDS.values():
        model, x = perturbed(Tagger(kind, num_layers=2)), unit(3, 5, 8)
        with torch.no_grad(), nz.excised(model, "rnn"):
            assert torch.equal(model(x), model.without(x))


def test_the_oracle_refuses_a_layer_that_changes_the_width():
    model = Tagger(nn.LSTM, hidden=16)  # twice as wide, but in one direction
    with nz.excised(model, "rnn"), pytest.raises(nz.NeutralizeError, match=r"got \[3, 5, 8\] in and \[3, 5, 16\] out"):
        model(unit(3, 5, 8))


def test_a_shut_gate_is_zero_and_an_open_one_is_one_in_every_format():
    from neutralize.strategies.recurrent import saturation

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        bias = torch.full((67,), saturation(dtype), dtype=dtype)
        assert bool((torch.sigmoid(bias) == 1).all())
        assert bool((torch.sigmoid(-bias) == 0).all())


class Unreadable(Tagger):
    def __init__(self, kind, read, **options):
        super().__init__(kind, **options)
        self.read = read

    def forward(self, x):
        output, state = self.rnn(self.first(x))
        return self.read(self, output, state)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Tagger(nn.LSTM, hidden=12), r"a LSTM as wide as its input for 'rnn', got 8 features in and hidden size 12"),
        (Tagger(nn.GRU, hidden=5, bidirectional=True), r"8 features in and hidden size 5 or 10 \(both directions\)"),
        (Tagger(nn.LSTM, bias=False), r"expected biases in 'rnn' to hold the gates of a LSTM .*got bias=False"),
        (Tagger(nn.GRU, num_layers=2, dropout=0.5), r"between the 2 stacked layers of 'rnn', got dropout=0\.5"),
        (
            Tagger(lambda a, b: nn.RNN(a, b, nonlinearity="relu")),
            r"tanh rnn inside 'rnn', got a RNN with nonlinearity='relu'",
        ),
        (Unreadable(nn.LSTM, lambda m, y, s: m.last(y) + s[0].sum()), r"read the final states of 'rnn', got sum"),
        (Unreadable(nn.LSTM, lambda m, y, s: (m.last(y), s[1])), r"final states of 'rnn', got the model's output"),
        (Unreadable(nn.GRU, lambda m, y, s: m.last(torch.tanh(y))), r"layers to read 'rnn', got tanh"),
        (Unreadable(nn.GRU, lambda m, y, s: m.last(y * y)), r"layers to read 'rnn', got mul"),
        (Unreadable(nn.GRU, lambda m, y, s: y), r"layers to read 'rnn', got the model's output"),
        (Unreadable(nn.GRU, lambda m, y, s: m.last(y) + m.last(m.first(y.relu() + 1))), r"to read 'rnn', got add"),
    ],
)
def test_refusals_name_the_cause(model, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(nz.NeutralizeError, match=message):
        nz.plan(model.train(), "rnn", example_inputs=unit(3, 5, 8))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_projection_is_refused():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.last = nn.LSTM(4, 8, proj_size=4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.rnn(x)[0])

    with pytest.raises(nz.NeutralizeError, match=r"a LSTM without projection for 'rnn', got proj_size=4"):
        nz.plan(Projected(), "rnn", example_inputs=unit(3, 5, 4))


def test_one_sequence_without_a_batch():
    model, x = perturbed(Tagger(nn.LSTM, num_layers=2)), unit(5, 8)
    plan = nz.plan(model, "rnn", example_inputs=x)
    with torch.no_grad():
        wanted = model.without(x)
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-5


def test_gain_is_refused():
    with pytest.raises(nz.NeutralizeError, match=r"expected gain=1 for the recurrent layer 'rnn', got 2\.0"):
        nz.plan(Tagger(nn.LSTM), "rnn", "passthrough", gain=2.0, example_inputs=unit(3, 5, 8))


def test_idle_dropout_between_stacked_layers_is_no_obstacle():
    model, x = perturbed(Tagger(nn.LSTM, num_layers=2, dropout=0.5)), unit(3, 5, 8)
    assert nz.verify(model, nz.plan(model, "rnn", example_inputs=x), x).relative_error <= 1e-5


def test_what_is_written():
    """The example of MATH §6, rows counted by hand: i, f, g, o."""
    model, x = perturbed(Tagger(nn.LSTM)), unit(3, 5, 8)
    last = model.last.weight.detach().clone()
    plan = nz.plan(model, "rnn", example_inputs=x)
    with plan.applied(model):
        epsilon = plan.layers[0].epsilon
        weight = torch.zeros(32, 8)
        weight[16:24] = epsilon * torch.eye(8)
        assert torch.equal(model.rnn.weight_ih_l0.detach(), weight)
        assert not model.rnn.weight_hh_l0.any()
        assert not model.rnn.bias_hh_l0.any()
        assert model.rnn.bias_ih_l0.tolist() == [128.0] * 8 + [-128.0] * 8 + [0.0] * 8 + [128.0] * 8
        assert torch.equal(model.last.weight.detach(), last / epsilon)
    assert nz.Plan.from_json(plan.to_json()) == plan


# ---- damped, and set to their mean -----------------------------------------------------------------------------------


class Read(nn.Module):
    """Linear, a recurrent layer (a cell is called step by step), and what is made of its output."""

    def __init__(self, rnn, rest, **parts):
        super().__init__()
        self.first, self.rnn, self.rest = nn.Linear(5, rnn.input_size), rnn, rest
        for name, part in parts.items():
            setattr(self, name, part)

    def output(self, x):
        entering = self.first(x)
        if isinstance(self.rnn, nn.RNNBase):
            return self.rnn(entering)[0]
        state, outputs = None, []
        for step in entering:
            state = self.rnn(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)

    def forward(self, x):
        return self.rest(self, self.output(x))


# name: a recurrent layer, what is made of its output, and of the outputs the part that is read.
READ = {
    "lstm, linear": (nn.LSTM(4, 6, num_layers=2), lambda m, h: m.linear(h), lambda h: h),
    "projected lstm, last step": (nn.LSTM(4, 9, proj_size=6), lambda m, h: m.linear(h[-1]), lambda h: h[-1:]),
    "gru, both directions, gru": (nn.GRU(4, 3, bidirectional=True), lambda m, h: m.gru(h)[0], lambda h: h),
    "rnn, convolution": (nn.RNN(4, 6), lambda m, h: m.conv(h.permute(1, 2, 0)), lambda h: h),
    "lstm cell, linear": (nn.LSTMCell(4, 6), lambda m, h: m.linear(h), lambda h: h),
    "gru cell, linear": (nn.GRUCell(4, 6), lambda m, h: m.linear(h), lambda h: h),
}


def reading(name):
    rnn, rest, _ = READ[name]
    parts = {"linear": nn.Linear(6, 3), "conv": nn.Conv1d(6, 3, 2), "gru": nn.GRU(6, 3, bidirectional=True)}
    return perturbed(Read(rnn, rest, **parts)).double()


@pytest.mark.parametrize("factor", [0.3, -0.5, 0.0])
@pytest.mark.parametrize("name", READ)
def test_what_reads_a_recurrent_layer_damps_it(name, factor):
    model, x = reading(name), unit(4, 3, 5).double()
    plan = nz.plan(model, "rnn", "damp", factor=factor, example_inputs=x)
    with torch.no_grad():
        before, wanted = model(x), model.rest(model, factor * model.output(x))
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-14
        assert torch.equal(model(x), before)
    assert (plan.certificates[0].kind, plan.layers[0].sides) == ("rounding", "out")
    assert nz.verify(model, plan, x).relative_error <= 1e-14


@pytest.mark.parametrize("name", READ)
def test_what_reads_a_recurrent_layer_holds_its_mean(name):
    model, batches = reading(name), [unit(4, size, 5, seed=size).double() for size in (3, 1, 6)]
    x, progress = unit(4, 2, 5).double(), []
    plan = nz.plan(model, "rnn", "mean", batches=iter(batches), progress=lambda *done: progress.append(done))
    assert progress == [(1, None), (2, None), (3, None)]
    with torch.no_grad():
        seen = torch.cat([READ[name][2](model.output(batch)).flatten(0, -2) for batch in batches])
        before, wanted = model(x), model.rest(model, seen.mean(0).expand_as(model.output(x)))
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-13
        assert torch.equal(model(x), before)
    verification = nz.verify(model, plan, x)
    assert verification.relative_error <= 1e-13
    assert verification.bound_holds


@pytest.mark.parametrize(
    ("options", "rest", "message"),
    [
        ({"strategy": "damp", "factor": 0.5, "sides": "in"}, READ["lstm, linear"][1], r"expected sides='out' for the "),
        ({"strategy": "constant"}, READ["lstm, linear"][1], r"documented fill after 'rnn', .*got none; give weight="),
        ({"strategy": "damp", "factor": 0.5}, lambda m, h: h, r"to read 'rnn', .*got the model's output"),
        ({"strategy": "damp", "factor": 0.5}, lambda m, h: m.linear(torch.cat([h, h[:, :, :0]], 2).cos()), "got cos"),
        ({"strategy": "damp", "factor": 0.5}, lambda m, h: m.norm(h), r"got the layer norm of 'norm'"),
        ({"strategy": "mean"}, lambda m, h: m.linear(h.sum(0)), r"something on the way that changes a constant"),
        ({"strategy": "mean"}, lambda m, h: m.free(h), r"got no bias in 'free', which reads it"),
        ({"strategy": "mean"}, lambda m, h: m.padded(h.permute(1, 2, 0)), r"a padded convolution 'padded'"),
        ({"strategy": "mean"}, lambda m, h: (m.linear(h), m.conv(h.mT)), r"'conv', which reads other features"),
    ],
)
def test_a_recurrent_layer_that_cannot_be_damped_or_set_says_why(options, rest, message):
    parts = {"linear": nn.Linear(6, 3), "conv": nn.Conv1d(6, 3, 1), "padded": nn.Conv1d(6, 3, 3, padding=1)}
    model = Read(nn.LSTM(4, 6), rest, free=nn.Linear(6, 3, bias=False), norm=nn.LayerNorm(6), **parts)
    x = unit(4, 3, 5)
    options = options | ({"batches": [x]} if options["strategy"] == "mean" else {})
    with pytest.raises(nz.NeutralizeError, match=message):
        nz.plan(model, "rnn", example_inputs=x, **options)


def test_final_states_that_are_read_are_not_damped():
    model = Unreadable(nn.GRU, lambda m, y, s: m.last(y) + s.sum())
    with pytest.raises(nz.NeutralizeError, match=r"nothing its final states, got sum"):
        nz.plan(model, "rnn", "damp", factor=0.5, example_inputs=unit(3, 5, 8))
