"""Single stacked layers of an ``nn.LSTM`` and its kin, cells, and packed sequences; each oracle is a module by hand."""

from __future__ import annotations

import math

import pytest
import torch
from networks import perturbed
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import neutralize as nz

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def of_fewer_layers(rnn, kept):
    """A module with only those of the stacked layers, made anew."""
    width = rnn.input_size if kept[0] == 0 else rnn.hidden_size * (1 + rnn.bidirectional)
    made = type(rnn)(
        width, rnn.hidden_size, num_layers=len(kept), bidirectional=rnn.bidirectional, batch_first=rnn.batch_first,
        dtype=rnn.weight_ih_l0.dtype,
    )  # fmt: skip
    weights = rnn.state_dict()
    made.load_state_dict(
        {
            name.replace(f"_l{place}", f"_l{kept.index(place)}"): weights[name]
            for place in kept
            for name in weights
            if name.removesuffix("_reverse").endswith(f"_l{place}")
        }
    )
    return made


class Tagger(nn.Module):
    """Linear, stacked recurrent layers, Linear on every step."""

    def __init__(self, kind, width=8, hidden=8, **options):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.rnn = KINDS[kind](width, hidden, **options)
        self.last = nn.Linear(hidden * (1 + self.rnn.bidirectional), 4)

    def forward(self, x, states=None):
        return self.last(self.rnn(self.first(x), states)[0])

    def without(self, x, cut, states=None):
        """The network without those stacked layers."""
        y = self.first(x)
        kept = [place for place in range(self.rnn.num_layers) if place not in cut]
        if 0 in cut and y.shape[-1] < self.last.in_features:
            y = torch.cat([y, y], -1)
        if kept and states is not None:
            rows = [2 * place + way if self.rnn.bidirectional else place for place in kept for way in (0, 1)]
            rows = sorted(dict.fromkeys(rows))
            states = tuple(part[rows] for part in states) if isinstance(states, tuple) else states[rows]
        return self.last(of_fewer_layers(self.rnn, kept)(y, states)[0] if kept else y)


def states_for(model, x, kind, seed=7):
    batch = 5
    shape = (model.rnn.num_layers * (1 + model.rnn.bidirectional), batch, model.rnn.hidden_size)
    state = unit(*shape, seed=seed).clamp(-1, 1)
    return (state, unit(*shape, seed=seed + 1)) if kind == "lstm" else state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("both", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize(
    ("layers", "cut"),
    [
        ("rnn[0]", {0}),
        ("rnn[1]", {1}),
        ("rnn[-1]", {2}),
        ("rnn[:2]", {0, 1}),
        ("rnn[1:]", {1, 2}),
        ("rnn[::2]", {0, 2}),
        ("rnn[:]", {0, 1, 2}),
    ],
)
def test_the_network_is_the_one_without_these_stacked_layers(kind, both, layers, cut):
    model, x = perturbed(Tagger(kind, num_layers=3, bidirectional=both)), unit(6, 5, 8)
    plan = nz.plan(model, layers, example_inputs=x)
    assert [entry.layer for entry in plan.layers] == [f"rnn[{place}]" for place in sorted(cut)]
    states = states_for(model, x, kind)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        wanted, started = model.without(x, cut), model.without(x, cut, states)
        assert relative(model(x), wanted) > 0.01  # or the comparison would say nothing
        assert relative(started, wanted) > 0.001 or len(cut) == 3
        with nz.excised(model, layers):
            assert relative(model(x), wanted) <= 1e-6
            assert relative(model(x, states), started) <= 1e-6
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-5
            assert relative(model(x, states), started) <= 1e-5
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.assumptions_hold
    assert verification.relative_error <= 1e-5
    assert all(error < 1e-5 for error in verification.per_layer.values())  # none is NaN: each layer was seen
    assert all(certificate.kind == "bounded" for certificate in plan.certificates)
    assert nz.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-13), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)], ids=str
)
def test_each_format_to_its_rounding(kind, dtype, error):
    model, x = perturbed(Tagger(kind, num_layers=3)).to(dtype), unit(6, 5, 8).to(dtype)
    for layers, cut in (("rnn[0]", {0}), ("rnn[1:]", {1, 2})):
        plan = nz.plan(model, layers, example_inputs=x)
        with torch.no_grad():
            wanted = model.without(x, cut)
            with plan.applied(model):
                assert relative(model(x), wanted) <= error
        assert nz.verify(model, plan, x).bound_holds


def test_what_is_written_for_one_stacked_layer():
    """MATH §6 by hand: the layer's own four tensors, and the input weights of the next."""
    model, x = perturbed(Tagger("lstm", num_layers=3)), unit(6, 5, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = nz.plan(model, "rnn[1]", example_inputs=x)
    assert plan.layers[0].consumers == ("rnn[2]",)
    with plan.applied(model):
        epsilon = plan.layers[0].epsilon
        wanted = torch.zeros(32, 8)
        wanted[16:24] = epsilon * torch.eye(8)
        assert torch.equal(model.rnn.weight_ih_l1.detach(), wanted)
        assert not model.rnn.weight_hh_l1.any()
        assert not model.rnn.bias_hh_l1.any()
        assert model.rnn.bias_ih_l1.tolist() == [128.0] * 8 + [-128.0] * 8 + [0.0] * 8 + [128.0] * 8
        assert torch.equal(model.rnn.weight_ih_l2.detach(), before["rnn.weight_ih_l2"] / epsilon)
        written = {f"rnn.{kind}_l1" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        written.add("rnn.weight_ih_l2")
        now = model.state_dict()
        assert all(torch.equal(before[name], now[name]) for name in before if name not in written)


def test_a_first_layer_as_wide_as_both_directions_is_handed_on_as_it_is():
    model, x = perturbed(Tagger("lstm", width=16, num_layers=2, bidirectional=True)), unit(6, 5, 8)
    plan = nz.plan(model, "rnn[0]", example_inputs=x)
    assert "the first half of the features" in plan.layers[0].note
    with torch.no_grad():
        wanted = model.without(x, {0})
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-5
    twice = nz.plan(perturbed(Tagger("gru", num_layers=2, bidirectional=True)), "rnn[0]", example_inputs=x)
    assert "[x, x]" in twice.layers[0].note


def test_batch_first_and_no_batch():
    model = perturbed(Tagger("gru", num_layers=2, batch_first=True))
    for x in (unit(5, 6, 8), unit(6, 8)):
        plan = nz.plan(model, "rnn[1]", example_inputs=x)
        with torch.no_grad():
            wanted = model.without(x, {1})
            with plan.applied(model):
                assert relative(model(x), wanted) <= 1e-5
        assert nz.verify(model, plan, x).relative_error <= 1e-5


def test_a_wide_first_layer_stays_and_the_others_go():
    model, x = perturbed(Tagger("lstm", width=8, hidden=12, num_layers=3)), unit(6, 5, 8)
    plan = nz.plan(model, "rnn[1:]", example_inputs=x)
    with torch.no_grad():
        wanted = model.without(x, {1, 2})
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-5
    with pytest.raises(nz.NeutralizeError, match=r"as wide as its input for 'rnn\[0\]'.*behind it \('rnn\[1:\]'\)"):
        nz.plan(model, "rnn[0]", example_inputs=x)
    with nz.excised(model, "rnn[0]"), pytest.raises(nz.NeutralizeError, match=r"\[6, 5, 8\] in and \[6, 5, 12\] out"):
        model(x)


def test_stacked_layers_of_one_module_and_another_module_that_reads_it():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.LSTM(8, 8, num_layers=2), nn.GRU(8, 8, num_layers=2)
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.two(self.one(x)[0])[0])

    model, x = perturbed(Two()), unit(6, 5, 8)
    plan = nz.plan(model, ["one[1]", "two[0]"], example_inputs=x)
    assert plan.layers[0].consumers == ("two",)
    with torch.no_grad():
        y = of_fewer_layers(model.two, [1])(of_fewer_layers(model.one, [0])(x)[0])[0]
        wanted = model.last(y)
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-5
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.relative_error <= 1e-5
    assert max(verification.per_layer.values()) <= 1e-5
    assert all(math.isnan(gain) for gain in verification.gradient_gain.values())  # which no hook can see


class LastState(nn.Module):
    """A classifier that reads a final state, picked by ``pick``."""

    def __init__(self, kind, pick, **options):
        super().__init__()
        self.rnn, self.last, self.pick = KINDS[kind](8, 8, num_layers=3, **options), nn.Linear(8, 3), pick

    def forward(self, x):
        states = self.rnn(x)[1]
        return self.last(self.pick(states[0] if isinstance(states, tuple) else states))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize(
    "pick",
    [
        lambda state: state[-1],
        lambda state: state.unbind(0)[2],
        lambda state: state.view(3, 5, 8)[2:].squeeze(0),
        lambda state: state.transpose(0, 1).reshape(5, 24)[:, 16:],
    ],
)
def test_the_final_state_of_a_layer_that_stays_may_be_read(kind, pick):
    model, x = perturbed(LastState(kind, pick)), unit(6, 5, 8)
    plan = nz.plan(model, "rnn[:2]", example_inputs=x)
    with torch.no_grad():
        state = of_fewer_layers(model.rnn, [2])(x)[1]
        wanted = model.last((state[0] if kind == "lstm" else state)[0])
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-5
    assert nz.verify(model, plan, x).relative_error <= 1e-5
    for layers in ("rnn[2]", "rnn[1:]", "rnn"):
        with pytest.raises(nz.NeutralizeError, match=r"nothing to read the final states of 'rnn"):
            nz.plan(model, layers, example_inputs=x)


def test_states_that_mix_layers_are_refused():
    model, x = perturbed(LastState("gru", lambda state: state.sum(0))), unit(6, 5, 8)
    with pytest.raises(nz.NeutralizeError, match=r"nothing to read the final states of 'rnn\[0\]', got sum"):
        nz.plan(model, "rnn[0]", example_inputs=x)


def test_a_module_that_goes_on_from_its_own_states():
    class Chunks(nn.Module):
        """Two halves of a sequence, the second from the final states of the first."""

        def __init__(self):
            super().__init__()
            self.rnn, self.last = nn.LSTM(8, 8, num_layers=2), nn.Linear(8, 3)

        def run(self, rnn, x):
            head, states = rnn(x[:3])
            return self.last(torch.cat([head, rnn(x[3:], states)[0]]))

        def forward(self, x):
            return self.run(self.rnn, x)

    model, x = perturbed(Chunks()), unit(6, 5, 8)
    for layers, kept in (("rnn[0]", [1]), ("rnn[1]", [0])):
        plan = nz.plan(model, layers, example_inputs=x)
        with torch.no_grad():
            wanted = model.run(of_fewer_layers(model.rnn, kept), x)
            with plan.applied(model):
                assert relative(model(x), wanted) <= 1e-5


def test_a_module_that_reads_its_own_output_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.last = nn.GRU(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.rnn(self.rnn(x)[0])[0])

    with pytest.raises(nz.NeutralizeError, match=r"layers to read 'rnn', got gru with 'rnn\.weight_ih_l0'"):
        nz.plan(perturbed(Twice()), "rnn", example_inputs=unit(6, 5, 8))


def test_several_calls_of_one_module():
    class Siamese(Tagger):
        def forward(self, x):
            return super().forward(x) - super().forward(x.flip(0))

    model, x = perturbed(Siamese("lstm", num_layers=2)), unit(6, 5, 8)
    plan = nz.plan(model, "rnn[0]", example_inputs=x)
    with torch.no_grad():
        wanted = model.without(x, {0}) - model.without(x.flip(0), {0})
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", ["rnn[0]", "rnn[1]", "rnn"])
def test_zero_hands_on_nothing_whatever_the_states(kind, layers):
    model, x = perturbed(Tagger(kind, num_layers=2, bidirectional=True)), unit(6, 5, 8)
    states = states_for(model, x, kind)
    plan = nz.plan(model, layers, "zero", example_inputs=(x, states))
    with torch.no_grad():
        if layers == "rnn[0]":
            last = of_fewer_layers(model.rnn, [1])
            own = tuple(part[2:] for part in states) if kind == "lstm" else states[2:]
            wanted = model.last(last(torch.zeros(6, 5, 16), own)[0])
        else:
            wanted = model.last(torch.zeros(6, 5, 16))
        assert relative(model(x, states), wanted) > 0.01
        with plan.applied(model):
            assert torch.equal(model(x, states), wanted)
    assert plan.certificates[0].kind == "exact"
    verification = nz.verify(model, plan, x, states)
    assert verification.exact
    assert verification.per_layer[layers] == 0.0


def test_zero_without_biases_needs_states_of_zero():
    model, x = perturbed(Tagger("gru", bias=False)), unit(6, 5, 8)
    with nz.plan(model, "rnn", "zero", example_inputs=x).applied(model), torch.no_grad():
        assert not model.rnn(unit(6, 5, 8))[0].any()
    with pytest.raises(nz.NeutralizeError, match=r"expected biases in 'rnn' to shut the gates .* got bias=False"):
        nz.plan(model, "rnn", "zero", example_inputs=(x, states_for(model, x, "gru")))


class Looped(nn.Module):
    """A cell called step by step, its last state read too."""

    def __init__(self, kind, width=8):
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(8, width), CELLS[kind](width, 8), nn.Linear(8, 4)

    def forward(self, x, state=None):
        outputs = []
        for step in self.first(x):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return self.last(torch.stack(outputs)) + self.last(outputs[-1])

    def without(self, x):
        y = self.first(x)
        return self.last(y) + self.last(y[-1])


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("batch", [(5,), ()], ids=["batch", "no batch"])
def test_a_cell_in_a_loop(kind, batch):
    model, x = perturbed(Looped(kind)), unit(6, *batch, 8)
    state = 10 * unit(*batch, 8, seed=7)
    state = (state, state) if kind == "lstm" else state
    plan = nz.plan(model, "cell", example_inputs=x)
    with torch.no_grad():
        wanted = model.without(x)
        assert relative(model(x), wanted) > 0.1
        with nz.excised(model, "cell"):
            assert torch.equal(model(x), wanted)
        with plan.applied(model):
            assert relative(model(x), wanted) <= 1e-5
            assert relative(model(x, state), wanted) <= 1e-5
    verification = nz.verify(model, plan, x)
    assert verification.bound_holds
    assert verification.relative_error <= 1e-5
    null = nz.plan(model, "cell", "zero", example_inputs=(x, state))
    with torch.no_grad(), null.applied(model):
        assert torch.equal(model(x, state), model.last(torch.zeros(6, *batch, 8)) + model.last(torch.zeros(*batch, 8)))


def test_a_cell_whose_memory_is_read_is_refused():
    class Memory(Looped):
        def forward(self, x):
            output, memory = self.cell(self.first(x))
            return self.last(output) + self.last(memory)

    with pytest.raises(nz.NeutralizeError, match=r"nothing to read the final states of 'cell', got linear"):
        nz.plan(Memory("lstm"), "cell", example_inputs=unit(5, 8))
    with pytest.raises(nz.NeutralizeError, match=r"a GRU as wide as its input for 'cell', got 6 features in"):
        nz.plan(Looped("gru", width=6), "cell", example_inputs=unit(3, 5, 8))


class Padded(nn.Module):
    """Sequences of different lengths, packed for the recurrent layer."""

    def __init__(self, kind, padding=0.0, **options):
        super().__init__()
        self.first, self.rnn = nn.Linear(8, 8), KINDS[kind](8, 8, **options)
        self.last, self.padding = nn.Linear(8 * (1 + self.rnn.bidirectional), 4), padding

    def run(self, rnn, x, lengths):
        packed = pack_padded_sequence(self.first(x), lengths, enforce_sorted=False)
        if rnn is None:
            output = packed
        elif rnn.input_size == packed.data.shape[-1]:
            output = rnn(packed)[0]
        else:
            output = rnn(packed._replace(data=torch.cat([packed.data, packed.data], -1)))[0]
        return self.last(pad_packed_sequence(output, padding_value=self.padding)[0])

    def forward(self, x, lengths):
        return self.run(self.rnn, x, lengths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layers", "kept", "options"),
    [
        ("rnn", [], {}),
        ("rnn[0]", [1], {"num_layers": 2}),
        ("rnn[1]", [0], {"num_layers": 2, "bidirectional": True}),
        ("rnn[0]", [1], {"num_layers": 2, "bidirectional": True}),
    ],
)
def test_packed_sequences(kind, layers, kept, options):
    model, inputs = perturbed(Padded(kind, **options)), (unit(6, 4, 8), torch.tensor([3, 6, 1, 4]))
    plan = nz.plan(model, layers, example_inputs=inputs)
    with torch.no_grad():
        wanted = model.run(of_fewer_layers(model.rnn, kept) if kept else None, *inputs)
        assert relative(model(*inputs), wanted) > 0.01
        with nz.excised(model, layers):
            assert relative(model(*inputs), wanted) <= 1e-6
        with plan.applied(model):
            assert relative(model(*inputs), wanted) <= 1e-5
    verification = nz.verify(model, plan, *inputs)
    assert verification.bound_holds
    assert verification.relative_error <= 1e-5


def test_what_is_padded_with_is_not_scaled():
    inputs = unit(6, 4, 8), torch.tensor([3, 6, 1, 4])
    with pytest.raises(nz.NeutralizeError, match=r"recurrent layers to read 'rnn', got _pad_packed_sequence"):
        nz.plan(perturbed(Padded("gru", padding=1.0)), "rnn", example_inputs=inputs)


def test_a_plan_for_a_meta_model():
    x = unit(6, 5, 8)
    with torch.device("meta"):
        model = Tagger("lstm", num_layers=2)
    plan = nz.plan(model, "rnn[1]", example_inputs=x)  # what enters is at most 1: nothing needs to be measured
    assert plan.layers[0].input_bound == 1.0
    live = perturbed(Tagger("lstm", num_layers=2))
    with torch.no_grad():
        wanted = live.without(x, {1})
        with plan.applied(live):
            assert relative(live(x), wanted) <= 1e-5


def test_it_is_restored_frozen_and_guarded_like_any_other():
    model, x = perturbed(Tagger("lstm", num_layers=2)), unit(6, 5, 8)
    plan = nz.plan(model, "rnn[0]", example_inputs=x)
    undo = plan.apply(model, freeze=True)
    assert not model.rnn.weight_ih_l0.requires_grad
    assert model.rnn.weight_hh_l1.requires_grad
    undo.restore()
    plan.apply(model)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with nz.guard(model, plan, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in plan.parameters)
    assert not torch.equal(before["rnn.weight_hh_l1"], after["rnn.weight_hh_l1"])


@pytest.mark.parametrize("strategy", ["damp", "mean", "constant"])
def test_strategies_that_take_whole_modules_say_so(strategy):
    options = {"damp": {"factor": 0.5}, "mean": {"batches": [unit(6, 5, 8)]}, "constant": {"weight": 0.1}}[strategy]
    with pytest.raises(nz.NeutralizeError, match=rf"expected a module for strategy '{strategy}', got 'rnn\[1\]'"):
        nz.plan(Tagger("lstm", num_layers=2), "rnn[1]", strategy, example_inputs=unit(6, 5, 8), **options)


# ---- selection -------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Tagger("lstm", num_layers=3), Tagger("gru")


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("encoder.rnn[0]", ["encoder.rnn[0]"]),
        ("encoder.rnn[-1]", ["encoder.rnn[2]"]),
        ("encoder.rnn[1:]", ["encoder.rnn[1]", "encoder.rnn[2]"]),
        (["encoder.rnn[2]", "encoder.rnn[0]", "encoder.rnn[2]"], ["encoder.rnn[0]", "encoder.rnn[2]"]),
        ("*.rnn[0]", ["encoder.rnn[0]", "decoder.rnn"]),  # a single layer is the module
        ("decoder.rnn[0]", ["decoder.rnn"]),
        ("*rnn", ["encoder.rnn", "decoder.rnn"]),
    ],
)
def test_stacked_layers_are_selected_by_index(layers, names):
    model = Nested()
    selected = nz.select(model, layers)
    assert list(selected) == names
    assert all(module is model.get_submodule(name.partition("[")[0]) for name, module in selected.items())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("encoder.rnn[3]", r"an index from -3 to 2 for 'encoder\.rnn', got 'encoder\.rnn\[3\]'; it has 3 layers"),
        ("encoder.rnn[3:]", r"a slice that selects something of 'encoder\.rnn'"),
        (["encoder.rnn", "encoder.rnn[1]"], r"contain each other, got 'encoder\.rnn' and its part 'encoder\.rnn\[1\]'"),
        (["encoder", "encoder.rnn[1]"], r"contain each other, got 'encoder' and its part 'encoder\.rnn\[1\]'"),
        ("encoder.rnn[1].weight", r"expected the name of a layer, got 'encoder\.rnn\[1\]\.weight', which is unknown"),
    ],
)
def test_selections_that_are_none(layers, message):
    with pytest.raises(nz.NeutralizeError, match=message):
        nz.select(Nested(), layers)
