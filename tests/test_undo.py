"""Undo: every bit comes back, of every dtype and layout, in any order, after anything that happened in between."""

import copy
import gc
import itertools
import pickle
import random
import weakref
from collections import UserDict

import pytest
import torch
from bits import Bag, Block, Counting, Plain, Stack, everything, random_bits, refusal, tensors, weights
from torch import nn

import neutralize as nz
from neutralize import Assign, Fold, Plan, Rewrite
from neutralize.pages.verified import page

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
ROWS, COLUMNS = 12, 54
# Of 12 rows and 54 columns of random bits; each is a view of a larger tensor where the layout says so.
LAYOUTS = {
    "contiguous": lambda dtype: random_bits((ROWS, COLUMNS), dtype),
    "kernel": lambda dtype: random_bits((ROWS, 6, 3, 3), dtype),
    "channels last": lambda dtype: random_bits((ROWS, 6, 3, 3), dtype).contiguous(memory_format=torch.channels_last),
    "transposed": lambda dtype: random_bits((COLUMNS, ROWS), dtype).t(),
    "columns of a wider one": lambda dtype: random_bits((ROWS, 2 * COLUMNS), dtype)[:, 5 : 5 + COLUMNS],
    "every other": lambda dtype: random_bits((2 * ROWS, 3 * COLUMNS), dtype)[::2, ::3],
}


def name(dtype):
    return str(dtype).removeprefix("torch.")


def edits_for(shape, dtype):
    """Every kind of edit; blocks that overlap each other, in several edits of one tensor."""

    def rewrite(**arguments):
        return Rewrite("w", shape, dtype, **arguments)

    return {
        "whole": [rewrite(fill=1)],
        "diagonal": [rewrite(diagonal=1, start=1, step=2)],
        "scale": [rewrite(scale=-0.5)],
        "rows": [rewrite(fill=1, rows=(1, 3))],
        "columns": [rewrite(fill=1, columns=(2, 7))],
        "a block": [rewrite(scale=0.75, rows=(0, 2), columns=(1, 3))],
        "blocks that overlap": [
            rewrite(scale=0.75, rows=(0, 4)),
            rewrite(fill=3, rows=(2, 6)),
            rewrite(scale=0.75, rows=(3, 5)),
        ],
        "a block, then all": [rewrite(fill=1, rows=(0, 2)), rewrite(scale=0.75), rewrite(fill=5, rows=(1, 3))],
        "assign": [Assign("w", shape, dtype, (1.0,) * (ROWS * COLUMNS))],
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_restores_every_bit(dtype, layout):
    tensor = LAYOUTS[layout](dtype)
    for case, edits in edits_for(tuple(tensor.shape), name(dtype)).items():
        if layout == "channels last" and case in ("columns", "a block"):
            continue  # no view: refused, see test_apply
        model = Bag(w=nn.Parameter(tensor.clone(memory_format=torch.preserve_format)))
        model.w.data = LAYOUTS[layout](dtype)
        before, strides = weights(model), model.w.stride()
        around = bytes(model.w.untyped_storage())
        undo = Plan("by hand", tuple(edits), ()).apply(model)
        assert weights(model) != before, case
        undo.restore()
        assert weights(model) == before, case
        assert bytes(model.w.untyped_storage()) == around, case  # nor is anything beside the view touched
        assert model.w.stride() == strides


SPECIAL = {
    torch.float64: (torch.int64, [0x7FF8000000000123, -0x7FFFFFFFFFF123, 0x7FF0000000000001, -0x8000000000000000, 1]),
    torch.float32: (torch.int32, [0x7FC12345, -0x3EDCBB, 0x7F800001, -0x80000000, 1]),
    torch.float16: (torch.int16, [0x7E12, -0x1ED, 0x7C01, -0x8000, 1]),
    torch.bfloat16: (torch.int16, [0x7FC5, -0x3B, 0x7F81, -0x8000, 1]),
    torch.float8_e4m3fn: (torch.uint8, [0x7F, 0xFF, 0x80, 0x01, 0x7E]),
    torch.float8_e5m2: (torch.uint8, [0x7D, 0xFF, 0x80, 0x7C, 0xFC]),
}


@pytest.mark.parametrize("dtype", SPECIAL, ids=name)
def test_restores_the_payload_of_a_nan_and_the_sign_of_a_zero(dtype):
    integer, patterns = SPECIAL[dtype]
    stored = torch.tensor(patterns, dtype=integer)
    model = Bag(w=nn.Parameter(stored.view(dtype).clone()))
    for edit in (Rewrite("w", (5,), name(dtype), fill=1), Rewrite("w", (5,), name(dtype), scale=0.5)):
        undo = Plan("by hand", (edit,), ()).apply(model)
        assert not torch.equal(model.w.detach().view(integer), stored)
        undo.restore()
        assert torch.equal(model.w.detach().view(integer), stored)


def test_restores_scalars_vectors_folds_and_buffers():
    model = Bag(
        w=nn.Parameter(torch.randn(3, 4)), b=nn.Parameter(torch.randn(3)), t=nn.Parameter(torch.randn(())),
        e=nn.Parameter(torch.randn(0, 3)), running=torch.randn(5),
    )  # fmt: skip
    before = weights(model)
    plan = Plan(
        "by hand",
        (
            Fold("w", "b", (3, 4), "float32", 0, 1),
            Rewrite("t", (), "float32", fill=1),
            Rewrite("t", (), "float32", scale=3, rows=(0, 1)),
            Rewrite("e", (0, 3), "float32", fill=1),
            Assign("running", (5,), "float32", (1.0,) * 5),
        ),
        (),
    )
    undo = plan.apply(model)
    assert model.t == 3
    assert {key for key in before if weights(model)[key] != before[key]} == {"w", "b", "t", "running"}
    assert undo.held_bytes == 4 * (12 + 3 + 1 + 5)  # the scalar once, for two edits
    undo.restore()
    assert weights(model) == before


# ---- the state of an undo --------------------------------------------------------------------------------------------


def test_restores_once_and_lets_go_of_the_copies():
    model = Stack()
    before = weights(model)
    undo = nz.neutralize(model, "layers[1]")
    assert not undo.restored
    undo.check()
    assert undo.held_bytes == 160
    assert repr(undo) == f"Undo(4 tensors, 160 bytes, plan {undo.digest[:12]})"
    undo.restore()
    assert (undo.restored, undo.held_bytes, repr(undo)) == (True, 0, "Undo(restored)")
    assert "check: expected a plan that is applied, got one that was restored" in refusal(undo.check)
    with torch.no_grad():
        model.layers[1].norm.weight.fill_(3)
    undo.restore()  # does nothing
    assert model.layers[1].norm.weight.eq(3).all()
    assert before != weights(model)


def test_keeps_neither_the_model_nor_its_weights_alive_afterwards():
    model = Stack()
    undo = nz.neutralize(model, "layers[1]")
    other, gone = weakref.ref(model.head.weight), weakref.ref(model.layers[1].norm.weight)
    del model
    gc.collect()
    assert other() is None  # what was not written is not held at all
    undo.restore()
    gc.collect()
    assert gone() is None


def test_copies_only_what_is_written():
    model = Bag(w=nn.Parameter(torch.zeros(1000, 10)))
    undo = Plan("by hand", (Rewrite("w", (1000, 10), "float32", fill=1, rows=(3, 5)),), ()).apply(model)
    assert undo.held_bytes == 2 * 10 * 4
    undo.restore()


# ---- several applications --------------------------------------------------------------------------------------------


def test_two_plans_unwind_in_order():
    model = Stack()
    states = [weights(model)]
    undos = []
    for layers, strategy, options in (
        ("layers[1]", "zero", {"sides": "out"}),
        ("layers[:3]", "damp", {"factor": 0.5}),
        ("layers[1:]", "auto", {}),
    ):
        undos.append(nz.neutralize(model, layers, strategy, freeze=strategy == "damp", **options))
        states.append(weights(model))
    assert len({str(state) for state in states}) == 4
    for undo, state in zip(reversed(undos), reversed(states[:-1]), strict=True):
        undo.restore()
        assert weights(model) == state


def test_a_plan_that_multiplies_is_not_applied_twice():
    """As a cell of a notebook that is run again would: what reads the layer would be scaled by 1/ε squared."""
    model, inputs = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(5, 8)
    before, plan = weights(model), nz.plan(model, "0", example_inputs=inputs)
    loaded = copy.deepcopy(model.state_dict())
    undo = plan.apply(model)
    applied = weights(model)
    said = "got one that is, and would change '2.weight' a second time; call restore() of its undo first"
    assert said in refusal(lambda: plan.apply(model))
    assert said in refusal(lambda: nz.verify(model, plan, inputs))
    assert weights(model) == applied
    undo.restore()
    assert weights(model) == before
    again = plan.apply(model)
    model.load_state_dict(loaded)  # off in another way: then it is not applied
    plan.apply(model).restore()
    again.restore()
    assert weights(model) == before


def test_a_plan_that_copies_what_it_overwrites_is_not_applied_twice():
    """A fold of norms moves a gain: the second time it would move the number that it has put there."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, inputs = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval(), torch.randn(2, 5, 16)
    plan = nz.plan(model, "layers[1]", example_inputs=inputs)
    assert any(isinstance(edit, nz.Copy) for edit in plan.edits)
    undo = plan.apply(model)
    applied = weights(model)
    assert "got one that is, and would change 'layers." in refusal(lambda: plan.apply(model))
    assert weights(model) == applied
    undo.restore()
    plan.apply(model).restore()


OVERLAPPING = (
    (Rewrite("w", (6, 4), "float32", scale=2, rows=(1, 5)), Rewrite("w", (6, 4), "float32", fill=3, columns=(0, 2))),
    (Rewrite("w", (6, 4), "float32", scale=-0.5),),
    (Rewrite("w", (6, 4), "float32", fill=7, rows=(0, 2), columns=(1, 3)), Rewrite("v", (4,), "float32", fill=1)),
)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_every_bit_comes_back_whatever_the_order(order):
    model = Bag(w=nn.Parameter(random_bits((6, 4), torch.float32)), v=nn.Parameter(torch.randn(4)))
    before = weights(model)
    undos = [
        Plan("by hand", edits, ()).apply(model, freeze=freeze)
        for edits, freeze in zip(OVERLAPPING, (True, False, True), strict=True)
    ]
    for place in order:
        undos[place].restore()
    assert weights(model) == before


def test_an_earlier_undo_puts_its_own_part_back_at_once():
    model = Bag(w=nn.Parameter(torch.arange(8.0).reshape(4, 2)))
    original = model.w.detach().clone()
    first = Plan("by hand", (Rewrite("w", (4, 2), "float32", fill=-1, rows=(0, 2)),), ()).apply(model)
    second = Plan("by hand", (Rewrite("w", (4, 2), "float32", fill=-2, rows=(1, 4)),), ()).apply(model)
    first.restore()
    assert torch.equal(model.w, torch.cat([original[:2], torch.full((2, 2), -2.0)]))
    second.restore()
    assert torch.equal(model.w, original)


def test_plans_of_different_layers_come_off_one_by_one():
    model = Stack()
    before = weights(model)
    first, second = nz.neutralize(model, "layers[1]"), nz.neutralize(model, "layers[2]")
    first.restore()
    changed = {key for key in before if weights(model)[key] != before[key]}
    assert changed == {f"layers.2.{part}" for part in ("norm.weight", "up.bias", "down.bias")}  # norm.bias was 0
    second.restore()
    assert weights(model) == before


def test_an_undo_that_was_dropped_is_not_waited_for():
    model = Stack()
    first = nz.neutralize(model, "layers[1]")
    before = weights(model)
    nz.neutralize(model, "layers[1]", "damp", factor=0.5)
    gc.collect()
    first.restore()
    assert weights(model) != before
    assert model.layers[1].norm.weight.eq(1).all()


# ---- with blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_applied_restores_on_any_exception(error):
    model = Stack()
    plan = nz.plan(model, "layers[1:3]")
    before = weights(model)
    undos = []

    def interrupted():
        with plan.applied(model, freeze=True) as undo:
            undos.append((undo, undo.restored, weights(model)))
            raise error

    with pytest.raises(error):
        interrupted()
    [(undo, was_restored, inside)] = undos
    assert (was_restored, undo.restored) == (False, True)
    assert inside != before
    assert weights(model) == before


def test_applied_restores_at_the_end_and_nests():
    model = Stack()
    before = weights(model)
    with nz.plan(model, "layers[1]").applied(model):
        outer = weights(model)
        with nz.plan(model, "layers[1:]", "damp", factor=0.5).applied(model, freeze=True):
            assert weights(model) != outer
        assert weights(model) == outer
    assert weights(model) == before


def test_applied_restores_though_something_else_was_left_applied_inside():
    model = Stack()
    before = weights(model)
    inside = []

    def interrupted():
        with nz.plan(model, "layers[1]", "zero").applied(model):
            inside.append(nz.neutralize(model, "layers[1]", "damp", factor=0.5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    inside[0].restore()
    assert weights(model) == before


def test_applied_does_not_restore_twice():
    model = Stack()
    before = weights(model)
    with nz.plan(model, "layers[1]").applied(model) as undo:
        undo.restore()
        assert weights(model) == before
    assert weights(model) == before


# ---- what happened in between ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [True, False])
def test_restores_after_an_optimizer_step(freeze):
    model = Stack()
    before = weights(model)
    undo = nz.neutralize(model, "layers[1]", freeze=freeze)
    neutralized = weights(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    trained = weights(model)
    names = {f"layers.1.{part}" for part in ("norm.weight", "norm.bias", "up.bias", "down.bias")}
    if freeze:
        assert all(trained[key] == neutralized[key] for key in names)
    else:
        assert trained["layers.1.down.bias"] != neutralized["layers.1.down.bias"]
    undo.restore()
    for key, state in weights(model).items():
        assert state == (before[key] if key in names else trained[key]), key


def test_restores_flags_as_they_were():
    model = Stack()
    model.layers[1].norm.weight.requires_grad_(False)
    before = weights(model)
    undo = nz.neutralize(model, "layers[1]", freeze=True)
    model.requires_grad_(True)
    undo.restore()
    assert weights(model) == before


def test_keeps_gradients_and_training_mode():
    model = Plain().train()
    model(torch.randn(5, 8)).sum().backward()
    grads = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    nz.neutralize(model, "middle", "zero", sides="in", example_inputs=torch.randn(5, 8)).restore()
    assert all(torch.equal(parameter.grad, grads[key]) for key, parameter in model.named_parameters())
    assert model.training


def test_restores_after_a_trip_through_another_dtype():
    model = Stack()
    model = model.to(torch.float16).to(torch.float32)  # what float16 holds survives the trip
    before = weights(model)
    undo = nz.neutralize(model, "layers[1]")
    model.to(torch.float16)
    held = weights(model)
    text = refusal(undo.restore)
    assert text == (
        "restore: expected dtype torch.float32 for 'layers.1.norm.weight', got torch.float16; convert the model back "
        "before restoring"
    )
    assert weights(model) == held
    model.to(torch.float32)
    undo.restore()
    assert weights(model) == before


def test_refuses_a_parameter_that_was_replaced_and_puts_nothing_back():
    model = Stack()
    undo = nz.neutralize(model, "layers[1]")
    old = model.layers[1].down.bias
    model.layers[1].down.bias = nn.Parameter(torch.ones(8))
    held = weights(model)
    text = refusal(undo.restore)
    assert text == (
        "restore: expected the tensor that was written for 'layers.1.down.bias', got a model in which it was replaced; "
        "put the old parameter back before restoring"
    )
    assert weights(model) == held
    model.layers[1].down.bias = old
    undo.restore()
    assert model.layers[1].norm.weight.eq(1).all()


def test_finds_a_parameter_that_was_moved_inside_the_model():
    model = Stack()
    undo = nz.neutralize(model, "layers[1]")
    block = model.layers[1]
    model.layers[1] = nn.Sequential(block)  # as an adapter does that wraps a layer
    undo.restore()
    assert block.norm.weight.eq(1).all()


def test_refuses_a_parameter_that_was_resized():
    model = Stack()
    undo = nz.neutralize(model, "layers[1]")
    model.layers[1].norm.weight.data = torch.ones(1)  # a copy would broadcast without a word
    text = refusal(undo.restore)
    assert text == (
        "restore: expected shape [8] for 'layers.1.norm.weight', got [1]; put the old weights back before restoring"
    )
    assert model.layers[1].norm.weight.shape == (1,)


def test_restores_after_the_state_dict_was_loaded():
    model = Stack()
    saved = copy.deepcopy(model.state_dict())
    undo = nz.neutralize(model, "layers[1]")
    model.load_state_dict({key: torch.zeros_like(value) for key, value in saved.items()})
    undo.restore()
    assert torch.equal(model.layers[1].norm.weight, saved["layers.1.norm.weight"])
    assert model.head.weight.count_nonzero() == 0


# ---- verify leaves the model as it was -------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("build", [Stack, Plain, Counting])
def test_verify_leaves_the_model_as_it_was(build, training):
    torch.manual_seed(4)
    model, inputs = build().train(training), torch.randn(5, 8)
    next(model.parameters()).requires_grad_(False)
    handle = model.register_forward_hook(lambda module, args, output: None)
    given = inputs.clone()
    plan = nz.plan(model, "layers[1]" if build is Stack else "middle", example_inputs=inputs)
    before = everything(model)
    verification = nz.verify(model, plan, inputs)
    after = everything(model)
    versions = {key for key in before["versions"] if before["versions"][key] != after["versions"][key]}
    assert versions == set(plan.parameters)  # written and restored
    for part in before.keys() - {"versions"}:
        assert after[part] == before[part], part
    assert torch.equal(inputs, given)
    assert verification.bound_holds
    handle.remove()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_verify_works_in_any_mode(mode):
    model, inputs = Stack(), torch.randn(5, 8)
    plan = nz.plan(model, "layers[1]")
    before = everything(model)["bits"]
    with mode():
        verification = nz.verify(model, plan, inputs)
    assert verification.exact
    assert everything(model)["bits"] == before


def test_verify_leaves_the_model_as_it_was_where_the_model_fails():
    model = Plain().train()
    plan = nz.plan(model, "middle", example_inputs=torch.randn(5, 8))
    wrong = torch.randn(5, 9)
    before = everything(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        nz.verify(model, plan, wrong)
    assert everything(model) == before


class InPlace(Block):
    """Writes its branch into its input."""

    def forward(self, x):
        return x.add_(self.down(self.act(self.up(self.norm(x)))))


@pytest.mark.parametrize("strategy", ["auto", "zero"])
def test_verify_compares_with_what_entered_a_block_that_writes_into_its_input(strategy):
    model, inputs = Stack(), torch.randn(5, 8)
    model.layers = nn.ModuleList(InPlace() for _ in range(3))
    plan = nz.plan(model, "layers[1]", strategy, example_inputs=inputs)
    assert nz.verify(model, plan, inputs).exact
    wanted = model.head(model.layers[2](model.layers[0](model.embed(inputs))))
    with plan.applied(model):
        assert torch.equal(model(inputs), wanted)


def test_verify_wants_a_plan():
    text = refusal(lambda: nz.verify(Stack(), None, torch.randn(5, 8)))
    assert text == "verify: expected a Plan for plan, got NoneType; make one by nz.plan"


def test_verify_prints_its_figures():
    model, inputs = Stack(), torch.randn(5, 8)
    model.odd = nn.Linear(8, 8)
    lines = str(nz.verify(model, nz.plan(model, "layers[1:3]"), inputs)).splitlines()
    headings = [cell.strip() for cell in lines[2].strip("┃").split("┃")]
    assert headings == ["layer", "measured error", "bound", "gradient gain"]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [["layers.1", "0", "0", "1"], ["layers.2", "0", "0", "1"]]
    assert lines[-1] == "end to end: bit for bit, largest error 0 (bound 0); bounds hold"


def test_verify_says_so_where_no_bound_is_stated():
    model, inputs = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 8)
    found = nz.verify(model, nz.plan(model, "0", "constant", example_inputs=inputs), inputs)
    assert not found.exact
    assert not found.has_bounds
    assert str(found).endswith("; no bound is stated\n")
    piece = found._repr_html_()
    assert "no bound is stated" in piece
    assert "✓" not in piece
    assert "Every bound holds" not in page(found, None)


def test_verify_takes_keyword_arguments_in_a_dict_as_plan_does():
    class Batched(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model(**batch)

    class Named(Stack):
        def forward(self, x, mask=None):
            return super().forward(x)

    model, inputs = Named(), UserDict(x=torch.randn(5, 8))  # a BatchEncoding is a UserDict
    assert nz.verify(model, nz.plan(model, "layers[1]", example_inputs=inputs), inputs).exact
    batched = Batched(model)  # takes the dict itself
    plan = nz.plan(batched, "model.layers[1]", example_inputs=(dict(inputs),))
    assert nz.verify(batched, plan, dict(inputs)).exact


def test_a_verification_is_pickled_without_its_model():
    model, inputs = Stack(), torch.randn(5, 8)
    found = nz.verify(model, nz.plan(model, "layers[1]"), inputs)
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert refusal(again.at_scales).startswith("verify: expected floating-point inputs or hidden states to scale")


def test_verify_wants_inputs_and_the_planned_model():
    model = Stack()
    plan = nz.plan(model, "layers[1]")
    text = refusal(lambda: nz.verify(model, plan))
    assert text == "verify: expected inputs for the model, got none; pass its arguments after the plan"
    text = refusal(lambda: nz.verify(model, plan, torch.randn(5, 8, device="meta")))
    assert text == "verify: expected inputs with data, got one on the meta device; put it on the model's"
    text = refusal(lambda: nz.verify(Plain(), plan, torch.randn(5, 8)))
    assert text == "verify: expected the layers of the plan in the model, got none named 'layers.1'; plan for it"


def test_random_numbers_go_on_as_if_nothing_had_been_run():
    torch.manual_seed(5)
    random.seed(5)
    wanted = (torch.rand(3).tolist(), random.random())
    model, inputs = Counting().train(), torch.ones(5, 8)
    torch.manual_seed(5)
    random.seed(5)
    plan = nz.plan(model, "middle", example_inputs=inputs)
    nz.verify(model, plan, inputs)
    plan.apply(model).restore()
    assert (torch.rand(3).tolist(), random.random()) == wanted
    assert len(tensors(model)) == 13


# ---- in a file -------------------------------------------------------------------------------------------------------


def test_another_process_restores_from_a_file(tmp_path):
    model = Stack()
    before = weights(model)
    plan = nz.plan(model, "layers[1:3]", example_inputs=torch.ones(2, 8))
    undo = plan.apply(model, freeze=True)
    undo.save(tmp_path / "undo.pt")
    other = Stack()
    other.load_state_dict(model.state_dict())
    for name, parameter in model.named_parameters():
        other.get_parameter(name).requires_grad_(parameter.requires_grad)
    loaded = nz.Undo.load(tmp_path / "undo.pt", other)
    assert (loaded.digest, loaded.held_bytes) == (plan.digest, undo.held_bytes)
    loaded.restore()
    assert weights(other) == before
    assert [path.name for path in tmp_path.iterdir()] == ["undo.pt"]


def test_a_block_of_a_matrix_and_the_8_bit_formats_go_through_a_file(tmp_path):
    model = Bag(first=random_bits((4, 6), torch.float8_e4m3fn), second=random_bits((4, 6), torch.bfloat16))
    before = weights(model)
    edits = [
        Rewrite("first", (4, 6), "float8_e4m3fn", rows=(1, 3), columns=(2, 5)),
        Rewrite("second", (4, 6), "bfloat16", columns=(2, 5)),
    ]
    Plan("by hand", tuple(edits), ()).apply(model).save(tmp_path / "undo.pt")
    assert weights(model) != before
    nz.Undo.load(tmp_path / "undo.pt", model).restore()
    assert weights(model) == before


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    model = Bag(w=torch.ones(4, 6))
    undo = Plan("by hand", (Rewrite("w", (4, 6), "float32", rows=(1, 3)),), ()).apply(model)
    path = tmp_path / "undo.pt"
    assert "expected a file that can be written" in refusal(lambda: undo.save(tmp_path / "none" / "undo.pt"))
    undo.save(path)
    assert "got a model without it" in refusal(lambda: nz.Undo.load(path, Bag(v=torch.ones(4, 6))))
    assert "expected [4, 6] of torch.float32" in refusal(lambda: nz.Undo.load(path, Bag(w=torch.ones(4, 5))))
    assert "expected a file of Undo.save" in refusal(lambda: nz.Undo.load(tmp_path / "none.pt", model))
    torch.save({"w": torch.ones(3)}, tmp_path / "weights.pt")
    assert "expected a file of Undo.save" in refusal(lambda: nz.Undo.load(tmp_path / "weights.pt", model))
    (tmp_path / "text.pt").write_text("no archive")
    assert "expected a file of Undo.save" in refusal(lambda: nz.Undo.load(tmp_path / "text.pt", model))
    undo.restore()
    assert "got one that is; apply again" in refusal(lambda: undo.save(path))
