"""Apply: all is checked before the first write, all problems are told together, and each tensor is written once."""

import copy
import math
import pickle

import pytest
import torch
from bits import Bag, Plain, Stack, bits, everything, random_bits, refusal, tensors, weights
from torch import nn

import neutralize as nz
from neutralize import Assign, Fold, Plan, Rewrite, apply, ops

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def name(dtype):
    return str(dtype).removeprefix("torch.")


def plan_of(*edits, tied=()):
    return Plan("by hand", edits, (), tied)


def small():
    return Bag(
        w=nn.Parameter(torch.arange(12.0).reshape(3, 4)),
        b=nn.Parameter(torch.ones(3)),
        narrow=nn.Parameter(torch.ones(3, 4, dtype=torch.float16)),
        codes=torch.ones(3, 4, dtype=torch.int8),
        count=torch.tensor(3),
    )


# ---- what is written -------------------------------------------------------------------------------------------------

WRITTEN = {
    "fill": ([Rewrite("w", (3, 4), "float32", fill=2)], lambda w, b: (torch.full_like(w, 2), b)),
    "identity": ([Rewrite("w", (3, 4), "float32", diagonal=1)], lambda w, b: (torch.eye(3, 4), b)),
    "shifted diagonal": (
        [Rewrite("w", (3, 4), "float32", diagonal=2, start=3, step=-1)],
        lambda w, b: (torch.tensor([[0.0, 0, 0, 2], [0, 0, 2, 0], [0, 2, 0, 0]]), b),
    ),
    "scale": ([Rewrite("w", (3, 4), "float32", scale=-0.5)], lambda w, b: (w * -0.5, b)),
    "affine": ([Rewrite("w", (3, 4), "float32", 2, 3, 1)], lambda w, b: (w * 2 + 3 * torch.eye(3, 4) + 1, b)),
    "rows": (
        [Rewrite("w", (3, 4), "float32", fill=7, rows=(1, 3))],
        lambda w, b: (torch.cat([w[:1], w[1:] * 0 + 7]), b),
    ),
    "columns": (
        [Rewrite("w", (3, 4), "float32", diagonal=7, columns=(1, 4))],
        lambda w, b: (torch.cat([w[:, :1], 7 * torch.eye(3)], 1), b),
    ),
    "a block": (
        [Rewrite("w", (3, 4), "float32", scale=2, rows=(0, 2), columns=(2, 4))],
        lambda w, b: (torch.cat([torch.cat([w[:2, :2], 2 * w[:2, 2:]], 1), w[2:]]), b),
    ),
    "fold": ([Fold("w", "b", (3, 4), "float32", 4, -0.5)], lambda w, b: (4 * w, b - 0.5 * w.sum(1))),
    "assign": ([Assign("b", (3,), "float32", (3, -0.0, 0.1))], lambda w, b: (w, torch.tensor([3, -0.0, 0.1]))),
    "several in order": (
        [
            Rewrite("w", (3, 4), "float32", scale=2),
            Fold("w", "b", (3, 4), "float32", 1, 1),
            Assign("b", (3,), "float32", (1, 2, 3)),
            Rewrite("b", (3,), "float32", scale=1, fill=1),
            Rewrite("w", (3, 4), "float32", scale=0.5, rows=(0, 1)),
        ],
        lambda w, b: (torch.cat([w[:1], 2 * w[1:]]), torch.tensor([2.0, 3, 4])),
    ),
    "nothing": ([], lambda w, b: (w, b)),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_writes_what_the_edits_say_and_nothing_else(case):
    edits, wanted = WRITTEN[case]
    model = small()
    before = copy.deepcopy(model)
    with torch.no_grad():
        expected_w, expected_b = wanted(before.w.detach().clone(), before.b.detach().clone())
    undo = plan_of(*edits).apply(model)
    assert torch.equal(model.w, expected_w)
    assert bits(model.b) == bits(expected_b)
    for other in ("narrow", "codes", "count"):
        assert bits(getattr(model, other)) == bits(getattr(before, other))
    undo.restore()
    assert weights(model) == weights(before)


def test_folds_a_weight_that_is_stored_in_out():
    model = Bag(w=nn.Parameter(torch.randn(4, 3)), b=nn.Parameter(torch.randn(3)))
    w, b = model.w.detach().clone(), model.b.detach().clone()
    undo = plan_of(Fold("w", "b", (4, 3), "float32", 2, 0.5, transposed=True)).apply(model)
    assert torch.equal(model.w, 2 * w)
    torch.testing.assert_close(model.b.detach(), b + 0.5 * w.sum(0))
    undo.restore()
    assert torch.equal(model.w, w)
    assert torch.equal(model.b, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_fill_does_not_read_what_was_there(dtype):
    model = Bag(w=nn.Parameter(random_bits((16, 17), dtype), requires_grad=False))
    plan_of(Rewrite("w", (16, 17), name(dtype), fill=0.5)).apply(model)
    assert torch.equal(model.w.double(), torch.full((16, 17), 0.5, dtype=torch.float64))


def test_each_tensor_is_handed_to_the_ops_once(monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "rewrite_", lambda tensors, **coefficients: calls.append(list(tensors)))
    model = Stack(depth=6)
    plan = nz.plan(model, "layers[:]")
    plan.apply(model)
    assert len(plan.edits) == 24
    assert [len(batch) for batch in calls] == [24]  # one call for all of them
    written = {tensor.data_ptr() for tensor in calls[0]}
    assert written == {model.get_parameter(parameter).data_ptr() for parameter in plan.parameters}


def test_bumps_the_version_of_what_it_writes_and_of_nothing_else():
    model = Stack()
    plan = nz.plan(model, "layers[1]")
    before = {key: tensor._version for key, tensor in tensors(model).items()}
    undo = plan.apply(model)
    applied = {key: tensor._version for key, tensor in tensors(model).items()}
    assert {key for key in before if applied[key] > before[key]} == set(plan.parameters)
    undo.restore()
    restored = {key: tensor._version for key, tensor in tensors(model).items()}
    assert {key for key in before if restored[key] > applied[key]} == set(plan.parameters)


@pytest.mark.parametrize("edit", ["rewrite", "fold", "assign"])
def test_backward_through_a_rewritten_weight_raises(edit):
    model = nn.Linear(4, 4)
    edits = {
        "rewrite": Rewrite("weight", (4, 4), "float32"),
        "fold": Fold("weight", "bias", (4, 4), "float32", 2, 1),
        "assign": Assign("weight", (4, 4), "float32", (1.0,) * 16),
    }
    loss = model(torch.randn(2, 4, requires_grad=True)).square().sum()
    undo = plan_of(edits[edit]).apply(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = model(torch.randn(2, 4, requires_grad=True)).square().sum()
    undo.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(torch.randn(2, 4)).sum().backward()  # a forward pass made afterwards is sound
    assert model.weight.grad is not None


# ---- refusals --------------------------------------------------------------------------------------------------------

UNFIT = {
    "a missing parameter": (
        Rewrite("gone", (3, 4), "float32"),
        "expected a parameter 'gone', got a model without it; plan for this model",
    ),
    "a missing bias": (
        Fold("w", "gone", (3, 4), "float32", 1, 1),
        "expected a parameter 'gone', got a model without it; plan for this model",
    ),
    "a shape": (Rewrite("w", (4, 3), "float32"), "expected shape [4, 3] for 'w', got [3, 4]; plan for this model"),
    "a shape of as many elements": (
        Assign("w", (12,), "float32", (0.0,) * 12),
        "expected shape [12] for 'w', got [3, 4]; plan for this model",
    ),
    "the shape of a bias": (
        Fold("w", "b", (3, 4), "float32", 1, 1, transposed=True),
        "expected shape [4] for 'b', got [3]; plan for this model",
    ),
    "a dtype": (
        Rewrite("w", (3, 4), "bfloat16"),
        "expected dtype bfloat16 for 'w', got float32; plan for this model",
    ),
    "the dtype of a bias": (
        Fold("narrow", "b", (3, 4), "float16", 1, 1),
        "expected dtype float16 for 'b', got float32; plan for this model",
    ),
    "integers": (
        Rewrite("codes", (3, 4), "int8"),
        "expected one of float64, float32, float16, bfloat16, float8_e4m3fn, float8_e5m2 for 'codes', got int8; "
        "dequantize it first",
    ),
    "a counter": (Rewrite("count", (), "int64", fill=1), "for 'count', got int64; dequantize it first"),
    "a fill that overflows": (
        Rewrite("narrow", (3, 4), "float16", fill=7e4),
        "expected fill within 65504 for 'narrow' (float16), got 70000; give a smaller one",
    ),
    "a diagonal that overflows": (
        Rewrite("narrow", (3, 4), "float16", diagonal=-4e4, fill=-3e4),
        "expected diagonal + fill within 65504 for 'narrow' (float16), got -70000; give a smaller one",
    ),
    "a value that overflows": (
        Assign("narrow", (3, 4), "float16", (0.0,) * 11 + (-1e6,)),
        "expected a value within 65504 for 'narrow' (float16), got -1e+06; give a smaller one",
    ),
    "a scale beyond the arithmetic": (
        Rewrite("narrow", (3, 4), "float16", scale=1e39),
        "expected scale within 3.40282e+38 for 'narrow' (float16), got 1e+39; give a smaller one",
    ),
    "a shift beyond the arithmetic": (
        Fold("w", "b", (3, 4), "float32", 1, -1e39),
        "expected shift within 3.40282e+38 for 'w' (float32), got -1e+39; give a smaller one",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_refuses_an_edit_that_does_not_fit_and_writes_none(case):
    edit, problem = UNFIT[case]
    model = small()
    before = everything(model)
    # Sound edits before and after, in batches of their own: none may be written.
    sound = (Rewrite("b", (3,), "float32", fill=1), Rewrite("b", (3,), "float32", fill=2))
    text = refusal(lambda: plan_of(*sound, edit, Assign("b", (3,), "float32", (1, 2, 3))).apply(model))
    assert text.startswith("apply: expected a plan that fits the model, got 1 problem(s):\n  - ")
    assert text.endswith(problem)
    assert everything(model) == before


def test_reports_all_problems_together():
    model = small()
    before = everything(model)
    text = refusal(lambda: plan_of(*(edit for edit, _ in UNFIT.values())).apply(model))
    for case, (_, problem) in UNFIT.items():
        assert problem in text, case
    assert text.count("\n  - ") == len({problem for _, problem in UNFIT.values()})
    assert f"got {len({problem for _, problem in UNFIT.values()})} problem(s)" in text
    assert everything(model) == before


def test_refuses_meta_tensors_by_name():
    with torch.device("meta"):
        model = Stack()
    text = refusal(lambda: nz.plan(model, "layers[1]").apply(model))
    assert "got 4 problem(s)" in text
    assert "expected 'layers.1.norm.weight' to hold data, got a meta tensor; load the weights first" in text


def test_writes_nothing_where_one_of_many_tensors_is_meta():
    model = Stack()
    plan = nz.plan(model, "layers[1]")
    model.layers[1].down.bias = nn.Parameter(torch.empty(8, device="meta"))
    before = everything(model)
    text = refusal(lambda: plan.apply(model))
    assert text.endswith("expected 'layers.1.down.bias' to hold data, got a meta tensor; load the weights first")
    assert everything(model) == before


ODD = {
    "expanded": (
        lambda: torch.ones(3, 1).expand(3, 4),
        "expected 'w' to have memory for every element, got an expanded tensor; call contiguous() first",
    ),
    "sparse": (
        lambda: torch.eye(3, 4).to_sparse(),
        "expected 'w' to be dense, got torch.sparse_coo; call to_dense() first",
    ),
    "lazy": (
        lambda: nn.parameter.UninitializedParameter(),
        "expected 'w' to hold data, got a lazy parameter; run the module once first",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_refuses_tensors_that_are_not_plain_memory(kind):
    build, problem = ODD[kind]
    tensor = build()
    model = Bag(b=nn.Parameter(torch.ones(3)))
    model.register_parameter("w", tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
    text = refusal(lambda: plan_of(Rewrite("b", (3,), "float32"), Rewrite("w", (3, 4), "float32", fill=1)).apply(model))
    assert text.endswith(problem)
    assert torch.equal(model.b, torch.ones(3))


def test_refuses_a_block_of_columns_that_is_no_view():
    model = Bag(w=nn.Parameter(torch.randn(8, 6, 3, 3).contiguous(memory_format=torch.channels_last)))
    text = refusal(lambda: plan_of(Rewrite("w", (8, 6, 3, 3), "float32", columns=(1, 3))).apply(model))
    assert text.endswith("expected 'w' to be one matrix in memory, got strides (54, 1, 18, 6); call contiguous() first")


@pytest.mark.parametrize("model", [None, {}, 3])
def test_refuses_a_model_that_is_none(model):
    text = refusal(lambda: plan_of(Rewrite("w", (3, 4), "float32")).apply(model))
    assert (
        text == f"neutralize: expected a torch.nn.Module for model, got {type(model).__name__}; pass the model itself"
    )


# ---- shared memory ---------------------------------------------------------------------------------------------------


def test_refuses_a_tied_parameter_and_names_both():
    model = small()
    model.other = model.w
    before = everything(model)
    text = refusal(lambda: plan_of(Rewrite("w", (3, 4), "float32")).apply(model))
    assert text.endswith(
        "expected 'w' to be no other layer's, got a tensor that is also 'other'; untie them first (clone the "
        "parameter), or select both layers"
    )
    assert everything(model) == before


def test_refuses_memory_that_another_parameter_sees():
    flat = torch.arange(24.0)
    model = Bag(w=nn.Parameter(flat[:12].view(3, 4)), v=nn.Parameter(flat[11:15]), u=nn.Parameter(flat[12:]))
    text = refusal(lambda: plan_of(Rewrite("w", (3, 4), "float32")).apply(model))
    assert "expected 'w' to be no other layer's, got a tensor that is also 'v'; untie" in text
    assert torch.equal(flat, torch.arange(24.0))


def test_writes_one_of_many_parameters_in_one_storage():
    flat = torch.arange(24.0)
    model = Bag(w=nn.Parameter(flat[:12].view(3, 4)), v=nn.Parameter(flat[12:]))
    undo = plan_of(Rewrite("w", (3, 4), "float32", fill=-1)).apply(model)
    assert torch.equal(flat, torch.cat([torch.full((12,), -1.0), torch.arange(12.0, 24.0)]))
    undo.restore()
    assert torch.equal(flat, torch.arange(24.0))


def test_writes_tied_parameters_that_the_plan_has_accepted():
    model = small()
    model.other = model.w
    before = weights(model)
    accepted = plan_of(Rewrite("w", (3, 4), "float32", fill=5), tied=(("other", "w"),))
    undo = accepted.apply(model)
    assert torch.equal(model.other, torch.full((3, 4), 5.0))
    undo.restore()
    assert weights(model) == before


def test_writes_under_both_names_one_after_the_other():
    model = small()
    model.other = model.w
    before = weights(model)
    edits = (Rewrite("w", (3, 4), "float32", scale=2), Rewrite("other", (3, 4), "float32", scale=2))
    undo = plan_of(*edits, tied=(("other", "w"),)).apply(model)
    assert torch.equal(model.w, 4 * torch.arange(12.0).reshape(3, 4))
    undo.restore()
    assert weights(model) == before


def test_aliases_are_those_of_comparing_every_pair():
    generator = torch.Generator().manual_seed(0)
    flat = torch.zeros(400)
    named = {}
    for index in range(60):
        begin, size = (int(torch.randint(1, 300, (), generator=generator)) for _ in range(2))
        named[f"t{index}"] = flat[begin : begin + size % 40]
    named["other storage"] = torch.zeros(3)
    named["the same object"] = named["t5"]
    named["strided"] = flat[7:200:50]
    named["meta"] = torch.empty(3, device="meta")
    named["meta again"] = named["meta"]
    spans = {}
    for key, tensor in named.items():
        offsets = {tensor.storage_offset() + i * tensor.stride(0) for i in range(tensor.numel())}
        spans[key] = (tensor.untyped_storage()._cdata, min(offsets, default=0), max(offsets, default=-1))
    for key, others in apply.aliases_of(named).items():
        own = spans[key]
        expected = [
            other
            for other, (storage, low, high) in spans.items()
            if other != key
            and (
                named[other] is named[key]
                or (not named[key].is_meta and storage == own[0] and max(low, own[1]) <= min(high, own[2]))
            )
        ]
        assert others == (key, *expected), key


def test_aliases_of_many_parameters_in_one_storage_are_found_in_time():
    flat = torch.zeros(20_000, 4)
    aliases = apply.aliases_of({f"p{index}": flat[index] for index in range(20_000)})
    assert all(len(names) == 1 for names in aliases.values())


# ---- interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_exception_in_the_middle_of_writing_rolls_everything_back(monkeypatch, error, at):
    model = small()
    before = weights(model)
    edits = [Rewrite("w", (3, 4), "float32", scale=2), Rewrite("b", (3,), "float32", fill=9)]
    plan = plan_of(*edits, *edits, Assign("b", (3,), "float32", (1, 2, 3)), *edits)
    rewrite_, calls = ops.rewrite_, []

    def interrupted(listed, **coefficients):
        calls.append(len(listed))
        rewrite_(listed, **coefficients)
        if len(calls) == at:
            raise error

    monkeypatch.setattr(ops, "rewrite_", interrupted)
    with pytest.raises(type(error)):
        plan.apply(model, freeze=True)
    assert calls == [2] * at
    assert weights(model) == before
    monkeypatch.undo()
    plan.apply(model).restore()
    assert weights(model) == before


def test_an_exception_while_freezing_rolls_everything_back(monkeypatch):
    model = small()
    before = weights(model)
    requires_grad_ = torch.Tensor.requires_grad_

    def failing(tensor, flag=True):
        if tensor is model.b and not flag:
            raise RuntimeError("boom")
        return requires_grad_(tensor, flag)

    monkeypatch.setattr(torch.Tensor, "requires_grad_", failing)
    with pytest.raises(RuntimeError, match="boom"):
        plan_of(Rewrite("w", (3, 4), "float32"), Rewrite("b", (3,), "float32")).apply(model, freeze=True)
    assert weights(model) == before


# ---- around the model ------------------------------------------------------------------------------------------------


def test_freezes_what_it_writes_and_nothing_else():
    model = Stack()
    model.layers[1].norm.bias.requires_grad_(False)
    plan = nz.plan(model, "layers[1]")
    before = weights(model)
    undo = plan.apply(model, freeze=True)
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == set(plan.parameters)
    undo.restore()
    assert weights(model) == before


def test_without_freeze_the_flags_stay():
    model = Stack()
    undo = nz.neutralize(model, "layers[1]")
    assert all(parameter.requires_grad for parameter in model.parameters())
    undo.restore()
    undo = nz.neutralize(model, "layers[1]", freeze=True)
    assert not model.layers[1].norm.weight.requires_grad
    undo.restore()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_compiled_before_uses_the_new_weights():
    model = Stack()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 8)
    first = compiled(x)
    with nz.excised(model, "layers[1:3]"):
        excised = model(x)
    undo = nz.neutralize(compiled, "layers[1:3]")
    assert torch.equal(compiled(x), excised)
    assert not torch.equal(first, excised)
    undo.restore()
    assert torch.equal(compiled(x), first)


def test_a_compiled_layer_inside_a_model_is_switched_off():
    model = Stack()
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    model.layers[2].compile(backend="eager")
    x = torch.randn(2, 8)
    with nz.excised(model, "layers[1:3]"):
        excised = model(x)
    plan = nz.plan(model, "layers[1:3]", example_inputs=x)
    with plan.applied(model):
        assert torch.equal(model(x), excised)


def test_the_plan_of_one_model_serves_another():
    torch.manual_seed(3)
    first, second = Stack(), Stack()
    plan = Plan.from_json(nz.plan(first, "layers[1]").to_json())
    x = torch.randn(2, 8)
    with nz.excised(second, "layers[1]"):
        excised = second(x)
    with plan.applied(second):
        assert torch.equal(second(x), excised)


def test_autocast_sees_what_was_written_and_put_back():
    """It keeps casts of the weights for as long as it lasts."""
    model, x = Stack(), torch.randn(5, 8)
    plan = nz.plan(model, "layers[1]")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        with plan.applied(model):
            off = model(x)
        after = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        entered = model.layers[0](model.embed(x))
        assert torch.equal(off, model.head(model.layers[3](model.layers[2](entered))))
    assert torch.equal(before, after)


def test_refuses_memory_that_was_freed():
    """As sharding wrappers do between uses: the shape is there, the bytes are not."""
    model = Stack()
    plan = nz.plan(model, "layers[1]")
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    model.layers[1].norm.weight.untyped_storage().resize_(0)
    text = refusal(lambda: plan.apply(model))
    assert text.endswith(
        "expected 'layers.1.norm.weight' to hold data, got a tensor whose memory was freed; gather the weights first"
    )
    del before["layers.1.norm.weight"]
    assert all(torch.equal(tensors(model)[name], tensor) for name, tensor in before.items())


def test_weights_made_under_inference_mode_are_written_and_restored():
    with torch.inference_mode():
        model = Stack()
    assert model.embed.weight.is_inference()
    before = weights(model)
    edits = (Assign("embed.bias", (8,), "float32", (1.0,) * 8), Rewrite("embed.weight", (8, 8), "float32", diagonal=1))
    undo = plan_of(*edits).apply(model)
    assert torch.equal(model.embed.weight, torch.eye(8))
    assert torch.equal(model.embed.bias, torch.ones(8))
    undo.restore()
    assert weights(model) == before


def test_inference_mode_and_no_grad_around_a_call_do_no_harm():
    model = Stack()
    before = weights(model)
    plan = nz.plan(model, "layers[1]")
    for applying in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        for restoring in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with applying():
                undo = plan.apply(model)
            assert model.layers[1].norm.weight.count_nonzero() == 0
            with restoring():
                undo.restore()
            assert weights(model) == before
    model(torch.randn(2, 8)).sum().backward()
    assert model.layers[1].norm.weight.grad is not None


def test_a_neutralized_model_can_be_copied_saved_and_loaded():
    model = Stack()
    x = torch.randn(2, 8)
    before, y = weights(model), model(x)
    undo = nz.neutralize(model, "layers[1]")
    off = model(x)
    twin = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    undo.restore()
    assert torch.equal(model(x), y)
    for other in (twin, loaded):
        assert torch.equal(other(x), off)
        assert type(other) is Stack
    assert weights(copy.deepcopy(model)) == weights(pickle.loads(pickle.dumps(model))) == before


def test_leaves_nothing_on_the_model_but_the_weights():
    model, inputs = Plain().eval(), torch.randn(5, 8)
    before = everything(model)
    undo = nz.neutralize(model, "middle", "zero", sides="in", example_inputs=inputs)
    after = everything(model)
    for part in before.keys() - {"bits", "versions"}:
        assert after[part] == before[part], part
    changed = {key for key in before["bits"] if before["bits"][key] != after["bits"][key]}
    assert changed == {"middle.weight", "middle.bias"}
    undo.restore()
    assert everything(model)["bits"] == before["bits"]


def test_largest_values_of_every_format_are_taken():
    for dtype in DTYPES:
        model = Bag(w=nn.Parameter(torch.zeros(2, 2, dtype=dtype), requires_grad=False))
        largest = torch.finfo(dtype).max
        plan_of(Rewrite("w", (2, 2), name(dtype), fill=-largest)).apply(model)
        assert (model.w.double() == -largest).all(), dtype
        beyond = math.nextafter(largest, math.inf)
        if math.isfinite(beyond):
            assert "give a smaller one" in refusal(
                lambda dtype=dtype, model=model, beyond=beyond: plan_of(
                    Rewrite("w", (2, 2), name(dtype), fill=beyond)
                ).apply(model)
            )


@pytest.mark.parametrize(
    ("activation", "weight", "name"), [(nn.Tanh(), 1e4, "2.weight"), (nn.Sigmoid(), 5e2, "2.bias")]
)
def test_weights_that_a_rescale_takes_out_of_float16_are_refused_before_anything_is_written(activation, weight, name):
    model = nn.Sequential(nn.Linear(6, 6), activation, nn.Linear(6, 3)).half()
    plan = nz.plan(copy.deepcopy(model).to("meta"), "0", input_bound=4.0, example_inputs=torch.ones(2, 6).half())
    model[2].weight.data.fill_(weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(nz.NeutralizeError, match=rf"expected '{name}' to stay inside float16 when .*wider dtype"):
        plan.apply(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model[2].weight.data.fill_(1.0)
    with plan.applied(model):
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
