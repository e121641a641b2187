"""Blocks switched off by the search of the dataflow, each compared with the excised network, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import (
    Bottleneck,
    Cropping,
    DataDependent,
    ExpertList,
    Experts,
    Flipped,
    Gated,
    GatedBlock,
    Halves,
    KeywordNet,
    LayerScale,
    PreNorm,
    RecurrentBranch,
    Routed,
    Shifted,
    perturbed,
)
from torch import nn

import neutralize as nz

EDITS = ("cheapest", "outgoing", "incoming")


def stem():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))


def features():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def wide():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def picture():
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def grid():
    return torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(1))


def transformer(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1, **options)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


# name: (model, inputs, selection)
BLOCKS = {
    "pre-norm": (lambda: nn.Sequential(PreNorm(), PreNorm(scale=0.5), nn.Linear(8, 4)), features, ["0", "1"]),
    "gated (1+w)": (lambda: nn.Sequential(GatedBlock(), GatedBlock(), nn.Linear(16, 4)), wide, "1"),
    "layer scale": (lambda: nn.Sequential(LayerScale(), nn.Linear(8, 4)), features, "0"),
    "gate": (lambda: nn.Sequential(Gated(), nn.Linear(8, 2)), features, "0"),
    "bottleneck": (lambda: nn.Sequential(stem(), Bottleneck(), Bottleneck(), nn.Flatten()), picture, ["1", "2"]),
    "shifted windows": (lambda: nn.Sequential(Shifted(), nn.Linear(8, 2)), grid, "0"),
    "keywords": (KeywordNet, features, "blocks[0:2]"),
    "experts": (lambda: nn.Sequential(Experts(), nn.Linear(8, 2)), features, "0"),
    "a list of experts": (lambda: nn.Sequential(ExpertList(), nn.Linear(8, 2)), features, "0"),
    "two streams": (lambda: nn.Sequential(Halves(), nn.Linear(8, 2)), features, "0"),
    "a recurrent branch": (lambda: nn.Sequential(RecurrentBranch(), nn.Linear(8, 2)), features, "0"),
    "torch transformer": (lambda: transformer(norm_first=True), features, "layers[1:]"),
    "data dependent": (DataDependent, features, "block"),
}


def hand_on(model, names):
    """Cut layers out with hooks: what enters first leaves first."""
    handles = []
    for name in names:

        def hook(module, args, kwargs, output):
            entering = args[0] if args else kwargs["hidden"]
            return (entering, *output[1:]) if isinstance(output, tuple) else entering

        handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    return handles


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_that_is_off_is_the_excised_network_bit_for_bit(name, edit):
    build, inputs, layers = BLOCKS[name]
    model, x = perturbed(build()), inputs()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        intact = model(x.clone())
        handles = hand_on(model, nz.select(model, layers))
        wanted = model(x.clone())
        for handle in handles:
            handle.remove()
        plan = nz.plan(model, layers, "passthrough", example_inputs=x, edit=edit)
        assert {certificate.kind for certificate in plan.certificates} == {"exact"}
        with plan.applied(model):
            got = model(x.clone())
        assert torch.equal(got, wanted)
        assert not torch.equal(intact, wanted)
        assert torch.equal(model(x.clone()), intact)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "data dependent"])
def test_verify_agrees_that_a_block_is_off_exactly(name):
    build, inputs, layers = BLOCKS[name]
    model, x = perturbed(build()), inputs()
    verification = nz.verify(model, nz.plan(model, layers, example_inputs=x), x)
    assert verification.exact
    assert verification.bound_holds
    assert verification.relative_error == 0.0
    assert set(verification.per_layer.values()) == {0.0}


def test_the_cheapest_edit_of_a_bias_free_block_is_its_two_norm_gains():
    model = perturbed(nn.Sequential(GatedBlock(), nn.Linear(16, 4)))
    plan = nz.plan(model, "0", example_inputs=wide())
    assert {edit.parameter: edit.fill for edit in plan.edits} == {"0.entry.weight": -1.0, "0.middle.weight": -1.0}
    assert plan.written_bytes == 2 * 16 * 4


def test_the_outgoing_edit_is_the_last_projections_and_the_block_can_wake_up():
    model = perturbed(nn.Sequential(GatedBlock(), nn.Linear(16, 4)))
    x = wide()
    plan = nz.plan(model, "0", "passthrough", example_inputs=x, edit="outgoing")
    assert set(plan.parameters) == {"0.o.weight", "0.down.weight"}
    with plan.applied(model):
        model(x).square().sum().backward()
    assert float(model[0].o.weight.grad.norm()) > 0
    assert float(model[0].down.weight.grad.norm()) > 0


def test_under_the_norm_null_attention_still_feels_a_gradient_and_the_gated_mlp_does_not():
    model = perturbed(nn.Sequential(GatedBlock(), nn.Linear(16, 4)))
    x = wide()
    with nz.plan(model, "0", example_inputs=x).applied(model):
        model(x).square().sum().backward()
    assert float(model[0].entry.weight.grad.norm()) > 0
    assert float(model[0].middle.weight.grad.norm()) == 0


def test_layer_scale_is_cheaper_than_a_projection():
    model = perturbed(nn.Sequential(LayerScale(), nn.Linear(8, 2)))
    assert nz.plan(model, "0", example_inputs=features()).parameters == ("0.gamma",)


def test_a_gate_is_shut_where_its_functions_round_to_one_and_zero():
    model = nn.Sequential(perturbed(Gated()), nn.Linear(8, 2)).eval()
    (edit,) = nz.plan(model, "0", example_inputs=features()).edits
    assert (edit.parameters, edit.fill) == (
        ("0.gate",),
        -256.0,
    )  # sigmoid(-256 / 1.5) is 0 in float32, and of -128 / 1.5 not
    assert torch.sigmoid(torch.tensor(-128 / 1.5)) > 0


def test_batch_norm_at_the_end_of_a_branch_is_nulled_by_gain_and_bias():
    model = perturbed(nn.Sequential(stem(), Bottleneck(), nn.Flatten()))
    assert nz.plan(model, "1", example_inputs=picture()).parameters == ("1.bn2.weight", "1.bn2.bias")


def test_a_trailing_relu_is_refused_where_the_input_may_be_negative():
    model = perturbed(nn.Sequential(nn.Conv2d(3, 8, 3), Bottleneck(), nn.Flatten()))
    with pytest.raises(nz.NeutralizeError, match=r"not proven to be its input then: relu in '1.relu' stands on"):
        nz.plan(model, "1", example_inputs=picture())


def test_a_trailing_relu_is_refused_where_only_a_layer_that_is_cut_out_too_vouched_for_the_sign():
    model = perturbed(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.ReLU(), Bottleneck(), nn.Flatten()))
    nz.plan(model, "3", example_inputs=picture())
    with pytest.raises(nz.NeutralizeError, match="not proven to be its input"):
        nz.plan(model, ["1", "3"], "passthrough", example_inputs=picture(), input_bound=10.0)


def test_a_skip_that_is_not_the_identity_is_refused():
    model = perturbed(nn.Sequential(Flipped(), nn.Linear(8, 2)))
    with pytest.raises(nz.NeutralizeError, match="not proven to be its input"):
        nz.plan(model, "0", example_inputs=features())


def test_what_stands_on_the_stream_is_named():
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.gelu(x + self.lin(x))

    model = nn.Sequential(Ends(), nn.Linear(8, 2)).eval()
    with pytest.raises(
        nz.NeutralizeError, match=r"of type Ends, on whose residual stream stands gelu in '0', which no param"
    ):
        nz.plan(model, "0", example_inputs=features())


def test_what_cannot_be_written_is_blamed_only_where_writing_it_would_help():
    class Looked(nn.Module):
        """A table of integers, a skip that is turned round: the table is not what is in the way."""

        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8, bias=False)
            self.register_buffer("table", torch.arange(8))

        def forward(self, x):
            return x.flip(-1) + self.lin(x) * self.table

    model = nn.Sequential(Looked(), nn.Linear(8, 2)).eval()
    with pytest.raises(nz.NeutralizeError) as refusal:
        nz.plan(model, "0", example_inputs=features())
    assert "table" not in str(refusal.value)


def test_experts_that_get_no_token_of_the_example_are_off_too():
    model = perturbed(nn.Sequential(Routed(), nn.Linear(8, 2)))
    model[0].router.weight.data.copy_(torch.eye(8)[:4])
    planned, other = torch.eye(8)[:2] + 0.01, torch.eye(8)[2:4] + 0.01  # experts 0 and 1; experts 2 and 3
    plan = nz.plan(model, "0", example_inputs=planned)
    assert not torch.equal(model[0](other), other)
    with plan.applied(model):
        assert torch.equal(model[0](other), other)


def test_a_recorded_run_says_what_it_assumes():
    assumption = nz.plan(perturbed(DataDependent()), "block", example_inputs=features()).certificates[0].assumption
    assert assumption == "finite activations, the control flow of the example inputs"


def test_an_active_dropout_on_the_stream_is_refused():
    class Dropped(PreNorm):
        def forward(self, x):
            return torch.dropout(super().forward(x), 0.5, self.training)

    model = perturbed(nn.Sequential(Dropped(), nn.Linear(8, 2)))
    nz.plan(model, "0", example_inputs=features())
    with pytest.raises(nz.NeutralizeError, match="on whose residual stream stands an active dropout"):
        nz.plan(model.train(), "0", example_inputs=features())


def test_post_norm_is_refused_with_what_would_work():
    model = perturbed(transformer(norm_first=False))
    with pytest.raises(nz.NeutralizeError, match=r"'layers\.0'.*use strategy='zero' or 'damp'"):
        nz.plan(model, "layers[0]", example_inputs=features())


def test_a_block_that_changes_the_shape_is_refused_with_both_shapes():
    model = perturbed(nn.Sequential(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)), nn.Linear(6, 2)))
    with pytest.raises(nz.NeutralizeError, match=r"turns shape \[2, 5, 8\] into \[2, 5, 6\]"):
        nz.plan(model, "0", example_inputs=features())


@pytest.mark.parametrize("kind", ["crop", "pad", "stride"])
@pytest.mark.parametrize("strategy", ["auto", "zero"])
def test_a_skip_that_crops_or_pads_is_what_the_block_hands_on(kind, strategy):
    model, x = perturbed(nn.Sequential(Cropping(kind), nn.Flatten(2))), picture().repeat(1, 3, 1, 1)[:, :8]
    plan = nz.plan(model, "0", strategy, example_inputs=x)
    with torch.no_grad(), plan.applied(model):
        assert torch.equal(model(x), model[0].skip(x).flatten(2))
    assert plan.layers[0].target == "partial"
    assert plan.layers[0].note.startswith("its skip connection crops or pads") or strategy == "zero"
    measured = nz.verify(model, plan, x)
    assert measured.exact
    assert measured.per_layer == {"0": 0.0}
    assert nz.Plan.from_json(plan.to_json()) == plan


def test_a_block_that_crops_is_damped():
    model, x = perturbed(nn.Sequential(Cropping("stride"))), picture().repeat(1, 3, 1, 1)[:, :8]
    plan = nz.plan(model, "0", "damp", factor=0.25, example_inputs=x)
    with torch.no_grad():
        skip = model[0].skip(x)
        wanted = skip + 0.25 * (model(x) - skip)
        with plan.applied(model):
            torch.testing.assert_close(model(x), wanted)
    assert nz.verify(model, plan, x).relative_error <= 1e-6


def test_the_excised_network_runs_on_several_threads():
    model = perturbed(transformer(norm_first=True))
    inputs = [torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(40)]

    def run(x):
        with torch.inference_mode():
            return model(x)

    handles = hand_on(model, ["layers.1"])
    wanted = [run(x) for x in inputs]
    handles[0].remove()
    with nz.excised(model, "layers[1]"), ThreadPoolExecutor(4) as pool:
        got = list(pool.map(run, inputs))
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_parameters_that_another_block_reads_are_left_alone():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = PreNorm(), PreNorm(), nn.Linear(8, 2)
            self.two.norm, self.two.up = self.one.norm, self.one.up

        def forward(self, x):
            return self.head(self.two(self.one(x)))

    model, x = perturbed(Shared()), features()
    plan = nz.plan(model, "one", example_inputs=x)
    assert set(plan.parameters) == {"one.down.weight", "one.down.bias"}
    assert nz.verify(model, plan, x).exact


def test_shared_parameters_that_cannot_be_avoided_are_an_error_that_names_them():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = PreNorm()
            self.two = PreNorm()
            self.two.norm, self.two.up, self.two.down = self.one.norm, self.one.up, self.one.down
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.two(self.one(x)))

    model, x = perturbed(Twice()), features()
    with pytest.raises(nz.NeutralizeError, match="also read outside the selected layers"):
        nz.plan(model, "one", example_inputs=x)
    plan = nz.plan(model, ["one", "two"], example_inputs=x)
    assert nz.verify(model, plan, x).exact


def test_a_block_called_twice_is_off_in_both_calls():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = PreNorm(), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.block(self.block(x)))

    model, x = perturbed(Loop()), features()
    plan = nz.plan(model, "block", example_inputs=x)
    with torch.no_grad(), plan.applied(model):
        assert torch.equal(model(x), model.head(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_blocks_are_exact_in_every_dtype(dtype):
    model = perturbed(nn.Sequential(GatedBlock(), nn.Linear(16, 4))).to(dtype)
    x = wide().to(dtype)
    plan = nz.plan(model, "0", example_inputs=x)
    with torch.no_grad(), plan.applied(model):
        assert torch.equal(model[0](x), x)


def test_nan_and_inf_in_nulled_weights_vanish():
    model, x = perturbed(nn.Sequential(PreNorm(), nn.Linear(8, 2))), features()
    with torch.no_grad():
        model[0].down.weight[0, 0], model[0].down.bias[1] = float("nan"), float("inf")
        with nz.plan(model, "0", "passthrough", example_inputs=x, edit="outgoing").applied(model):
            assert torch.equal(model[0](x), x)


class TwoStreams(nn.Module):
    """A block with two streams through one projection; later layers read both."""

    def __init__(self):
        super().__init__()
        self.norm, self.lin = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x, other):
        return x + self.lin(self.norm(x)), other + self.lin(self.norm(other))


def test_a_block_whose_other_outputs_are_read_later_is_not_called_exact():
    class Model(nn.Module):
        def __init__(self, both):
            super().__init__()
            self.block, self.head, self.both = TwoStreams(), nn.Linear(8, 2), both

        def forward(self, x):
            one, other = self.block(x, 2 * x)
            return self.head(one + other if self.both else one), other

    x = features()
    for both, kind in ((False, "exact"), (True, "measured")):
        plan = nz.plan(perturbed(Model(both)), "block", example_inputs=x)
        assert plan.certificates[0].kind == kind
    assert "the edits change what add" in plan.certificates[0].reason
    assert not nz.verify(perturbed(Model(True)), plan, x).exact


# ---- what an exact claim must not rest on ----------------------------------------------------------------------------


class Branch(nn.Module):
    """x + f(LN(x)) in the shapes that would fool a prover; ``forward`` is given by the test."""

    def __init__(self, forward, norm=nn.RMSNorm):
        super().__init__()
        self.norm, self.lin, self.out = norm(8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def off(forward, x=None, **options):
    """Plan the middle one of three such blocks; return the plan, and the outputs rewritten and excised."""
    torch.manual_seed(0)
    model = perturbed(nn.Sequential(*(Branch(forward) for _ in range(3)), nn.Linear(8, 2)))
    x = features() if x is None else x
    plan = nz.plan(model, "1", example_inputs=x, **options)
    with torch.no_grad(), plan.applied(model):
        got = model(x.clone())
    with torch.no_grad():
        return plan, got, nn.Sequential(model[0], model[2], model[3])(x.clone())


DIVIDED = {
    "normalised without an epsilon": lambda self, y: y / y.norm(dim=-1, keepdim=True),
    "a root mean square without one": lambda self, y: y * torch.rsqrt(y.square().sum(-1, keepdim=True)),
    "a logarithm": lambda self, y: y * y.abs().log(),
    "linear attention": lambda self, y: y.relu() / torch.einsum("btd,bd->bt", y.relu(), y.relu().sum(1))[..., None],
}


@pytest.mark.parametrize("name", DIVIDED)
def test_what_the_edits_make_zero_is_no_divisor(name):
    """The entry norm's gain would be cheaper, and every output not a number."""
    plan, got, wanted = off(lambda self, x: x + self.out(DIVIDED[name](self, self.lin(self.norm(x)))))
    assert plan.parameters == ("1.out.weight",)
    assert plan.certificates[0].kind == "exact"
    assert torch.equal(got, wanted)


def test_a_divisor_that_stays_positive_does_no_harm():
    def forward(self, x):
        y = self.lin(self.norm(x))
        weights = (y @ y.transpose(1, 2)).exp()
        y = nn.functional.normalize(y, dim=-1) + weights / weights.sum(-1, keepdim=True) @ y
        keys = nn.functional.elu(y) + 1
        return x + self.out(y / torch.sqrt(y.var(-1, keepdim=True) + 1e-6) / keys.sum(-1, keepdim=True))

    plan, got, wanted = off(forward)
    assert plan.parameters == ("1.norm.weight",)
    assert torch.equal(got, wanted)


def test_a_spectral_norm_without_a_norm_before_it_is_refused():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

        def forward(self, x):
            return x + torch.relu(self.lin(x))

    model = nn.Sequential(perturbed(Spectral()), nn.Linear(8, 2)).eval()
    with pytest.raises(nz.NeutralizeError, match="not proven to be its input"):  # W / sigma(W) of W = 0
        nz.plan(model, "0", example_inputs=features())


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_is_not_saved_or_that_the_model_writes_is_no_gate(persistent):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.lin = nn.LayerNorm(8), nn.Linear(8, 8)
            self.register_buffer("gate", torch.ones(1), persistent=persistent)

        def forward(self, x):
            y = x + self.gate * self.lin(self.norm(x))
            if persistent:
                self.gate.add_(0.1)
            return y

    model = nn.Sequential(perturbed(Gate()), nn.Linear(8, 2)).eval()
    assert "0.gate" not in nz.plan(model, "0", example_inputs=features()).parameters


class Keeps(nn.Module):
    """A block whose input is read again behind it."""

    def __init__(self, block):
        super().__init__()
        self.block, self.head = block, nn.Linear(8, 2)

    def forward(self, x):
        x = x + 0.5
        return self.head(self.block(x) + x)


@pytest.mark.parametrize("forward", [
    lambda self, x: x.clone() + self.lin(self.norm(x.relu_())),  # the input as it was, and then changed
    lambda self, x: (x + self.lin(self.norm(x)), x.zero_())[0],
])  # fmt: skip
def test_a_block_that_writes_into_an_input_that_others_read_is_not_called_exact(forward):
    model = perturbed(Keeps(Branch(forward)))
    (certificate,) = nz.plan(model, "block", example_inputs=features()).certificates
    assert (certificate.kind, certificate.bound) == ("measured", None)
    assert "it writes into its input too, which is read again behind it" in certificate.reason


def test_a_block_that_adds_to_its_input_in_place_leaves_it_alone_when_off():
    model = perturbed(Keeps(Branch(lambda self, x: x.add_(self.lin(self.norm(x))))))
    x = features()
    plan = nz.plan(model, "block", example_inputs=x)
    assert plan.certificates[0].kind == "exact"
    with torch.no_grad(), plan.applied(model):
        assert torch.equal(model(x), model.head(2 * (x + 0.5)))


@pytest.mark.parametrize(("forward", "fits"), [
    (lambda self, x: nn.functional.pad(x, (0, 0, 1, 0))[:, :-1] + self.lin(self.norm(x)), False),  # tokens shifted
    (lambda self, x: x[:, 1:-1] + self.lin(self.norm(x))[:, 1:-1], True),
])  # fmt: skip
def test_a_skip_that_moves_its_elements_is_no_crop(forward, fits):
    if fits:
        model = perturbed(nn.Sequential(Branch(forward), nn.Linear(8, 2)))
        assert nz.plan(model, "0", example_inputs=features()).layers[0].target == "partial"
    else:
        with pytest.raises(nz.NeutralizeError, match="not proven to be its input"):
            off(forward)


def test_a_factor_of_one_that_comes_from_the_shape_is_named_as_an_assumption():
    plan, _, _ = off(lambda self, x: x * (x.shape[1] / 5) + self.lin(self.norm(x)))
    assert "the number on its skip connection the same for inputs of other shapes" in plan.certificates[0].assumption


def test_a_factor_of_one_that_was_computed_from_the_data_is_unknown():
    with pytest.raises(nz.NeutralizeError, match="not proven to be its input"):
        off(lambda self, x: x * (1.0 + float(x.abs().max() > 1e6)) + self.lin(self.norm(x)))


@pytest.mark.parametrize(("forward", "message"), [
    (lambda self, x: x.clamp(-1, 1) + self.lin(self.norm(x)), "residual stream stands clamp in '1', which no par"),
    (lambda self, x: x.masked_fill(x > 9, 0.0) + self.lin(self.norm(x)), "residual stream stands masked_fill in '1'"),
    (lambda self, x: 0.9 * x + self.lin(self.norm(x)), "residual stream stands mul with 0.9 in '1'"),
    (lambda self, x: torch.tanh(x + self.lin(x)), "residual stream stands tanh in '1'"),
    (lambda self, x: x * self.lin(x).sigmoid(), "residual stream stands mul in '1'"),
    (lambda self, x: x + self.lin(self.norm(x)).exp(), "residual stream stands a sum with exp in '1'"),
    (lambda self, x: x + self.lin(self.norm(x)).cos().transpose(0, 1).transpose(0, 1), "a sum with cos in '1'"),
    (lambda self, x: x + x.sin() + self.lin(self.norm(x)), "residual stream stands a sum with sin in '1'"),
    (lambda self, x: x.sin().round() + self.lin(self.norm(x)), "stands sin in '1' and round in '1', which"),
    (lambda self, x: self.lin(self.norm(x)).tanh(), "of type Branch, with no skip connection around parameters"),
    (lambda self, x: x.flip(-1) + self.lin(self.norm(x)), "not proven to be its input then: flip in '1' moves its"),
    (lambda self, x: x.half().float() + self.lin(x), "not proven to be its input then: to in '1' stands on its resid"),
    (lambda self, x: x + self.norm(x) / self.norm(x).norm(), "then: div in '1' may make it infinite or NaN then; use"),
])  # fmt: skip
def test_what_keeps_a_block_on_is_named(forward, message):
    with pytest.raises(nz.NeutralizeError) as error:
        off(forward)
    assert message in str(error.value)


def test_a_layer_without_parameters_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(nz.NeutralizeError) as error:
        nz.plan(model, "1", example_inputs=features())
    assert str(error.value) == (
        "plan: expected a layer that can hand its input on, got '1', of type ReLU, which has no parameters that could "
        "be written; select the layer before it, or the block that contains it"
    )


def test_an_alpha_dropout_makes_numbers_of_zeros():
    class Dropped(Branch):
        def forward(self, x):
            return x + nn.functional.alpha_dropout(self.lin(self.norm(x)), 0.5, self.training)

    model = perturbed(nn.Sequential(Dropped(None), nn.Linear(8, 2)))
    assert nz.plan(model, "0", example_inputs=features()).certificates[0].kind == "exact"
    with pytest.raises(nz.NeutralizeError, match="a sum with an active dropout"):
        nz.plan(model.train(), "0", example_inputs=features())


def test_a_number_that_is_scattered_is_not_zero():
    def forward(self, x, value):
        ones = torch.zeros_like(x).scatter(-1, torch.zeros(*x.shape[:-1], 1, dtype=torch.long), value)
        return x + ones + self.lin(self.norm(x))

    with pytest.raises(nz.NeutralizeError, match="a sum with scatter in '1'"):
        off(lambda self, x: forward(self, x, 1.0))
    plan, got, wanted = off(lambda self, x: forward(self, x, 0.0))
    assert plan.certificates[0].kind == "exact"
    assert torch.equal(got, wanted)


def test_a_zero_that_comes_from_the_shape_is_named_as_an_assumption():
    plan, _, _ = off(lambda self, x: x + torch.full_like(x, x.shape[1] - 5.0) + self.lin(self.norm(x)))
    assert "the number on its skip connection the same for inputs of other shapes" in plan.certificates[0].assumption
    plan, _, _ = off(lambda self, x: x + torch.full_like(x, 0.0) @ self.out.weight + self.lin(self.norm(x)))
    assert "the number" in plan.certificates[0].assumption
    plan, _, _ = off(lambda self, x: x + torch.zeros_like(x) + self.lin(self.norm(x)))
    assert plan.certificates[0].assumption == "finite activations"
    with pytest.raises(nz.NeutralizeError, match="expected a layer that can hand its input on"):
        off(lambda self, x: x + torch.full_like(x, float(x.abs().max() > 1e6)) + self.lin(self.norm(x)))


def test_a_view_of_the_shape_of_another_tensor_is_a_view():
    plan, got, wanted = off(lambda self, x: x.flatten().view_as(x) + self.lin(self.norm(x)))
    assert plan.certificates[0].kind == "exact"
    assert torch.equal(got, wanted)


def test_autocast_inside_a_block_is_seen_through():
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x + self.out(self.lin(self.norm(x)))

    plan, got, wanted = off(forward)
    assert plan.certificates[0].kind == "exact"
    assert torch.equal(got, wanted)

    def narrowed(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.out(x).float() + self.lin(self.norm(x))  # with W = I: x rounded to bfloat16

    with pytest.raises(nz.NeutralizeError, match="expected a layer that can hand its input on"):
        off(narrowed)
