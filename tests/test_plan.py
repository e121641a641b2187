"""Plans: pure to make, the same text and digest every time, and one error for any text that is none."""

import builtins
import copy
import json
from dataclasses import replace

import pytest
import torch
from bits import Bag, Block, Counting, Plain, Stack, everything, refusal
from torch import nn

import neutralize as nz
from neutralize import Assign, Certificate, Copy, Fold, LayerPlan, Plan, Rewrite

EDITS = {
    "zero": Rewrite("w", (4, 6), "float32"),
    "every field": Rewrite("w", (4, 6), "float64", -0.0, 5e-324, 1.7976931348623157e308, -3, 7, (1, 3), (0, 6)),
    "whole numbers": Rewrite("w", (4, 6), "float32", 2, 1, -1),
    "a scalar": Rewrite("t", (), "bfloat16", fill=0.1),
    "no elements": Rewrite("e", (0, 3), "float8_e5m2", fill=1 / 3),
    "fold": Fold("w", "b", (4, 6), "float16", 8.0, -0.1),
    "transposed fold": Fold("w", "b", (6, 4), "float32", 8, -1, transposed=True),
    "fold of columns": Fold("w", "b", (4, 6), "float32", 8, -1, columns=(2, 5)),
    "assign": Assign("g", (2, 2), "float8_e4m3fn", (0.0, -0.0, 0.1, 3)),
    "assign nothing": Assign("g", (0,), "float32", ()),
    "copy": Copy("g", "h", (2, 3), "bfloat16", 0.1),
    "copy as it is": Copy("g", "h", (), "float32"),
    "a strange name": Rewrite('a"b\\c\n\u2028é.\ud800', (1,), "float32"),
}
EXACT = Certificate("layer", "exact", 0, "finite activations", "because")
LAYER = LayerPlan(
    "layer", "input", EXACT, (0, 1), "tanh", 2, 0, 0.5, 0.25, 2**-10, 3, consumers=("a", "b"), sides="in", note="[a] é"
)


def plan_of(*edits: nz.plan) -> Plan:
    return Plan("zero", edits, (replace(LAYER, edits=tuple(range(len(edits)))),), (("a.w", "b.w"), ("c", "d")))


# ---- text and digest -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS)
def test_json_comes_back_as_the_same_plan_and_the_same_bytes(edit):
    plan = plan_of(EDITS[edit])
    back = Plan.from_json(plan.to_json())
    assert back == plan
    assert back.to_json() == plan.to_json()
    assert back.digest == plan.digest
    assert repr(back) == repr(plan)  # equality alone would not tell 1 from 1.0, or 0.0 from -0.0
    assert hash(back) == hash(plan)


def test_json_is_canonical():
    text = plan_of(*EDITS.values()).to_json()
    assert text.isascii()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert Plan.from_json(json.dumps(json.loads(text), indent=3)).to_json() == text


def test_digest_is_that_of_the_canonical_json():
    # A change of this figure is a change of the format: raise FORMAT_VERSION, ranks of two versions must not agree.
    plan = Plan("zero", (Rewrite("w", (2, 3), "float32", fill=0.5),), (LayerPlan("l", "null", EXACT, (0,)),))
    assert plan.digest == "425c180e572025ce6b9708dfd08c72a2923f3db06b0c52ee87f1123b1ae4b6d4"


def test_digest_tells_order_and_every_field():
    first, second = EDITS["zero"], EDITS["fold"]
    plans = [
        plan_of(first, second),
        plan_of(second, first),
        plan_of(first),
        replace(plan_of(first, second), strategy="damp"),
        replace(plan_of(first, second), tied=()),
        replace(plan_of(first, second), layers=()),
        plan_of(replace(first, fill=5e-324), second),
        plan_of(replace(first, scale=-0.0), second),
        plan_of(replace(first, start=1), second),
        plan_of(replace(first, rows=(0, 4)), second),
        plan_of(first, replace(second, transposed=True)),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)


def test_whole_numbers_are_the_floats_that_they_equal():
    assert (
        plan_of(Rewrite("w", (2, 2), "float32", 2, 1, 0)).digest
        == plan_of(Rewrite("w", (2, 2), "float32", 2.0, 1.0)).digest
    )
    model = Stack()
    assert (
        nz.plan(model, "layers[1]", "damp", factor=2).digest == nz.plan(model, "layers[1]", "damp", factor=2.0).digest
    )


@pytest.mark.parametrize(
    ("layers", "strategy", "options"),
    [
        ("layers[1:3]", "auto", {}),
        ("layers[1]", "passthrough", {"edit": "outgoing"}),
        ("layers[1]", "zero", {}),
        ("embed", "constant", {"weight": 1}),
        ("layers[-1]", "damp", {"factor": 0}),
    ],
)
def test_planning_twice_gives_the_same_bytes(layers, strategy, options):
    torch.manual_seed(1)
    model = Stack()
    plan = nz.plan(model, layers, strategy, **options)
    assert nz.plan(copy.deepcopy(model), layers, strategy, **options).to_json() == plan.to_json()
    assert Plan.from_json(plan.to_json()) == plan
    with torch.device("meta"):
        meta = Stack()
    assert nz.plan(meta, layers, strategy, **options).to_json() == plan.to_json()


# ---- text that is no plan --------------------------------------------------------------------------------------------

HOSTILE = {
    "nothing": "",
    "half": '{"format":1',
    "null": "null",
    "a list": "[]",
    "a number": "3",
    "text": '"plan"',
    "not a number": "NaN",
    "a million brackets": "[" * 1_000_000,
    "a hundred thousand objects": '{"edits":' * 100_000,
    "ten thousand digits": "9" * 10_000,
    "ten thousand digits inside": '{"format":' + "9" * 10_000 + "}",
    "a byte order mark": "\ufeff{}",
    "no unicode": b"\xff\xfe\xfd",
    "None": None,
    "an integer": 3,
    "a plan": plan_of(EDITS["zero"]),
}


@pytest.mark.parametrize("text", HOSTILE)
def test_refuses_text_that_is_no_plan(text):
    assert refusal(lambda: Plan.from_json(HOSTILE[text])).startswith("Plan.from_json: expected ")


SOUND = plan_of(EDITS["every field"], EDITS["fold"], EDITS["assign"])
REWRITE, FOLD, ASSIGN = ("edits", 0), ("edits", 1), ("edits", 2)
CERTIFICATE = ("layers", 0, "certificate")
HUGE = 10**400
WRONG = [
    (("format",), 1, "expected format 6, got 1; plan again with this version"),
    (("format",), True, "expected format 6, got True"),
    (("format",), 4.0, "expected format 6, got 4.0"),
    (("format",), "4", "expected format 6, got '4'"),
    (("format",), [], "expected format 6, got []"),
    (("strategy",), 3, "expected str for strategy, got int"),
    (("edits",), {}, "expected list for edits, got dict"),
    (("edits",), None, "expected list for edits, got NoneType"),
    (("edits",), [3], "expected dict for an edit, got int"),
    (("layers",), "x", "expected list for layers, got str"),
    (("layers",), [3], "expected dict for a layer, got int"),
    (("tied",), 3, "expected list for tied, got int"),
    (("tied",), [3], "expected list for tied, got int"),
    (("tied",), ["ab"], "expected list for tied, got str"),
    (("tied",), [["a", None]], "expected str for tied, got NoneType"),
    (("more",), 3, "expected the keys edits, end_to_end, format, layers, strategy, tied for the plan, got also more"),
    ((*REWRITE, "kind"), "delete", "expected one of rewrite, fold, assign, copy for the kind of an edit, got 'delete'"),
    ((*REWRITE, "kind"), [], "for the kind of an edit, got []"),
    ((*REWRITE, "kind"), None, "for the kind of an edit, got None"),
    ((*REWRITE, "kind"), "fold", "got no bias, groups, shift, transposed and also diagonal, "),
    ((*REWRITE, "scale"), float("nan"), "expected JSON, got text that is none (NaN is no number of JSON)"),
    ((*REWRITE, "fill"), float("-inf"), "expected JSON, got text that is none (-Infinity is no number of JSON)"),
    ((*REWRITE, "scale"), HUGE, "expected a number that a float holds for Rewrite.scale, got a larger one"),
    ((*REWRITE, "scale"), True, "expected a number for Rewrite.scale, got bool"),
    ((*REWRITE, "scale"), "1", "expected a number for Rewrite.scale, got str"),
    ((*REWRITE, "scale"), None, "expected a number for Rewrite.scale, got NoneType"),
    ((*REWRITE, "start"), 1.5, "expected int for Rewrite.start, got float"),
    ((*REWRITE, "step"), True, "expected int for Rewrite.step, got bool"),
    ((*REWRITE, "start"), HUGE, "expected less than 2^62 in magnitude for start of 'w', got more"),
    ((*REWRITE, "step"), -(2**62), "expected less than 2^62 in magnitude for step of 'w', got more"),
    ((*REWRITE, "shape"), [-4, 6], "expected sizes of 0 or more for the shape of 'w', got [-4, 6]"),
    ((*REWRITE, "shape"), [4, 6.0], "expected int for Rewrite.shape, got float"),
    ((*REWRITE, "shape"), [True], "expected int for Rewrite.shape, got bool"),
    ((*REWRITE, "shape"), "46", "expected list for Rewrite.shape, got str"),
    ((*REWRITE, "dtype"), "float33", "expected the name of a torch dtype, got 'float33'"),
    ((*REWRITE, "dtype"), "nn", "expected the name of a torch dtype, got 'nn'"),
    ((*REWRITE, "dtype"), 3, "expected str for Rewrite.dtype, got int"),
    ((*REWRITE, "rows"), [0], "expected rows inside 0:4 for 'w', got 0; give a range that is not empty"),
    ((*REWRITE, "rows"), [0, 1, 2], "expected rows inside 0:4 for 'w', got 0:1:2"),
    ((*REWRITE, "rows"), [0, 5], "expected rows inside 0:4 for 'w', got 0:5"),
    ((*REWRITE, "rows"), [-1, 3], "expected rows inside 0:4 for 'w', got -1:3"),
    ((*REWRITE, "columns"), [2, 2], "expected columns inside 0:6 for 'w', got 2:2"),
    ((*REWRITE, "rows"), "01", "expected list for Rewrite.rows, got str"),
    ((*REWRITE, "parameter"), None, "expected str for Rewrite.parameter, got NoneType"),
    ((*REWRITE, "more"), 1, "for Rewrite, got also more"),
    ((*FOLD, "shape"), [], "expected shape (out, ...) for 'w', got []"),
    ((*FOLD, "transposed"), 1, "expected bool for Fold.transposed, got int"),
    ((*FOLD, "shift"), [], "expected a number for Fold.shift, got list"),
    ((*ASSIGN, "values"), [1.0], "expected 4 values for 'g' of shape [2, 2], got 1; give one per element"),
    ((*ASSIGN, "values"), "1234", "expected list for Assign.values, got str"),
    ((*ASSIGN, "values"), [0, 0, 0, HUGE], "expected a number that a float holds for Assign.values, got a larger one"),
    ((*ASSIGN, "values"), [0, 0, 0, False], "expected a number for Assign.values, got bool"),
    (("layers", 0, "edits"), [3], "expected edits 0 to 2 for layer 'layer', got [3]; the text was changed by hand"),
    (("layers", 0, "edits"), [-1], "expected edits 0 to 2 for layer 'layer', got [-1]"),
    (("layers", 0, "edits"), [True], "expected int for LayerPlan.edits, got bool"),
    (
        ("layers", 0, "target"),
        "off",
        "expected one of input, partial, null, scaled, damped, fill, mean, offset for target of 'layer', got 'off'",
    ),
    (("layers", 0, "gain"), HUGE, "expected a number that a float holds for LayerPlan.gain, got a larger one"),
    (("layers", 0, "gain"), None, "expected a number for LayerPlan.gain, got NoneType"),
    (("layers", 0, "consumers"), "ab", "expected list for LayerPlan.consumers, got str"),
    (("layers", 0, "certificate"), None, "expected dict for Certificate, got NoneType"),
    ((*CERTIFICATE, "kind"), "sure", "expected one of exact, rounding, bounded, measured for kind, got 'sure'"),
    ((*CERTIFICATE, "bound"), -1, "expected a bound of 0 or more, got -1.0; leave it out"),
    ((*CERTIFICATE, "bound"), True, "expected a number for Certificate.bound, got bool"),
]


def changed(path, value):
    content = json.loads(SOUND.to_json())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(("path", "value", "message"), WRONG, ids=lambda part: str(part)[:30])
def test_refuses_a_field_of_the_wrong_kind(path, value, message):
    assert message in refusal(lambda: Plan.from_json(changed(path, value)))


def paths(content, path=()):
    """Every key of every object of the plan."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        if isinstance(content, dict):
            yield (*path, key)
        yield from paths(value, (*path, key))


def test_refuses_a_plan_that_lacks_any_key():
    content = json.loads(SOUND.to_json())
    every = list(paths(content))
    assert len(every) == 56
    for path in every:
        shortened = copy.deepcopy(content)
        place = shortened
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        text = json.dumps(shortened)
        assert refusal(lambda text=text: Plan.from_json(text)), path


@pytest.mark.parametrize("junk", [None, True, -1, 1.5, HUGE, "", "x", [], [[]], {}, {"a": 1}], ids=str)
def test_any_junk_anywhere_is_taken_or_refused_in_words(junk):
    taken = 0
    for path in paths(json.loads(SOUND.to_json())):
        try:
            back = Plan.from_json(changed(path, junk))
        except nz.NeutralizeError:
            continue
        taken += 1
        assert Plan.from_json(back.to_json()) == back
        assert str(back)
    assert taken < 30


# ---- what a plan may say ---------------------------------------------------------------------------------------------

REFUSED = {
    "NaN": (
        lambda: Rewrite("w", (2, 2), "float32", float("nan")),
        "Rewrite of 'w': expected a finite number for scale, got nan",
    ),
    "infinity": (
        lambda: Rewrite("w", (2, 2), "float32", fill=float("inf")),
        "expected a finite number for fill, got inf",
    ),
    "no number": (
        lambda: Rewrite("w", (2, 2), "float32", diagonal="1"),
        "expected a finite number for diagonal, got '1'",
    ),
    "None": (lambda: Rewrite("w", (2, 2), "float32", scale=None), "expected a finite number for scale, got None"),
    "a boolean": (lambda: Rewrite("w", (2, 2), "float32", scale=True), "expected a finite number for scale, got True"),
    "a huge integer": (
        lambda: Fold("w", "b", (2, 2), "float32", HUGE, 1),
        "Fold of 'w': expected a finite number for scale, got",
    ),
    "a fold of a scalar": (
        lambda: Fold("w", "b", (), "float32", 1, 1),
        "Fold: expected shape (out, ...) for 'w', got []",
    ),
    "a transposed fold of a vector": (
        lambda: Fold("w", "b", (2,), "float32", 1, 1, transposed=True),
        "Fold: expected shape (in, out, ...) for 'w', got [2]; fold the weight of an affine layer",
    ),
    "a fold of columns that are not there": (
        lambda: Fold("w", "b", (2, 2, 3), "float32", 1, 1, columns=(3, 7)),
        "Fold: expected columns inside 0:6 for 'w', got 3:7; give a range that is not empty",
    ),
    "values that are not finite": (
        lambda: Assign("w", (2,), "float32", (1.0, float("nan"))),
        "Assign: expected finite values for 'w', got NaN or Inf; check their source",
    ),
    "an infinite bound": (
        lambda: Certificate("l", "bounded", float("inf")),
        "expected a finite number for bound, got inf",
    ),
    "an infinite gain": (
        lambda: LayerPlan("l", "input", EXACT, (), gain=float("inf")),
        "expected a finite number for gain",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_cannot_be_written(case):
    call, message = REFUSED[case]
    assert message in refusal(call)


def test_counts_what_it_writes():
    plan = plan_of(EDITS["every field"], EDITS["fold"], EDITS["assign"])
    assert [edit.numel for edit in plan.edits] == [2 * 6, 4 * 6 + 4, 4]
    assert [edit.written_bytes for edit in plan.edits] == [12 * 8, 28 * 2, 4]
    assert plan.written_bytes == 12 * 8 + 28 * 2 + 4
    assert plan.parameters == ("w", "b", "g")
    assert plan.certificates == (EXACT,)
    assert EDITS["transposed fold"].bias_numel == 4


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_prints_layer_strategy_edits_bytes_and_certificate():
    model = Stack()
    plan = nz.plan(model, "layers[1:3]")
    lines = str(plan).splitlines()
    assert lines[0].split(":")[0].split() == ["plan", plan.digest[:12]]
    assert lines[0].strip().endswith(": 2 layer(s), 320 B")
    assert [cell.strip() for cell in lines[2].strip("┃").split("┃")] == [
        "layer",
        "strategy",
        "edits",
        "bytes",
        "certificate",
    ]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert [row for row in rows if row[0]] == [
        [f"layers.{index}", "auto", f"layers.{index}.norm.weight <- 0", "160 B", "exact"] for index in (1, 2)
    ]


def test_prints_the_same_in_a_kernel_of_jupyter(monkeypatch):
    class ZMQInteractiveShell:
        """By this name rich knows a kernel."""

    class Printer:
        text = staticmethod(lambda shown: seen.append(shown))

    plan, seen = nz.plan(Stack(), "layers[1:3]"), []
    wanted = str(plan)
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # kernels set it
    assert str(plan) == wanted
    plan._repr_pretty_(Printer, False)
    assert seen == [wanted.rstrip()]


def test_prints_names_and_blocks_as_they_are():
    edits = [Rewrite("w", (4, 6), "float32", rows=(0, 2)), Rewrite("w", (4, 6), "float32", 2, 0, 1, columns=(1, 3))]
    layer = LayerPlan("odd[/name]", "null", EXACT, (0, 1), note="a [bold]remark :smile:")
    text = str(Plan("zero", tuple(edits), (layer,)))
    for part in ("w[rows 0:2] <- 0", "w[columns 1:3] <- 2 W + 1", "odd[/name]", "a [bold]remark :smile:"):
        assert part in text, part


def test_prints_many_edits_in_few_lines():
    edits = tuple(Rewrite(f"w{index}", (4,), "float32") for index in range(100))
    text = str(Plan("zero", edits, (LayerPlan("l", "null", EXACT, tuple(range(100))),)))
    assert "… and 96 more" in text
    assert "1.6 kB" in text
    assert len(text.splitlines()) < 15


# ---- pure ------------------------------------------------------------------------------------------------------------

PURE = {
    "blocks": (Stack, "layers[1:3]", {}),
    "a bound measured": (Plain, "middle", {}),
    "a bound given": (Plain, "middle", {"input_bound": 4.0}),
    "zero": (Plain, "middle", {"strategy": "zero"}),
    "damp": (Stack, "layers[0]", {"strategy": "damp", "factor": 0.5}),
    "constant": (Plain, "middle", {"strategy": "constant"}),
    "recorded on real inputs": (Counting, "middle", {}),
    "fails: a norm": (Plain, "norm", {}),
    "fails: shapes": (Stack, "head", {}),
    "fails: unknown": (Stack, "had", {}),
    "fails: an option": (Stack, "layers[1]", {"strategy": "zero", "gain": 1}),
    "fails: inputs": (Plain, "middle", {"example_inputs": torch.ones(5, 9)}),
    "fails: recorded": (Counting, "norm", {}),
    "fails: a bound is exceeded": (Plain, "middle", {"tolerance": 0.0}),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("case", PURE)
def test_planning_changes_nothing(case, training):
    build, layers, options = PURE[case]
    torch.manual_seed(2)
    model = build().train(training)
    model.get_parameter("first.weight" if build is not Stack else "embed.weight").requires_grad_(False)
    handle = model.register_forward_pre_hook(lambda module, args: None)
    inputs = options.get("example_inputs", torch.randn(5, 8))
    before, given = everything(model), inputs.clone()

    def make():
        return nz.plan(model, layers, **{"example_inputs": inputs, **options})

    if case.startswith("fails"):
        refusal(make)
    else:
        assert make().edits
    assert everything(model) == before
    assert torch.equal(inputs, given)
    handle.remove()


def test_planning_changes_nothing_on_an_exception_from_the_model():
    class Failing(Plain):
        def forward(self, x):
            super().forward(x)
            raise KeyError("no such thing")

    model = Failing().train()
    inputs = torch.randn(5, 8)
    before = everything(model)
    text = refusal(lambda: nz.plan(model, "middle", example_inputs=inputs))
    assert text == (
        "plan: expected example_inputs that the model accepts, got a failing trace (KeyError: 'no such thing')"
        "; give others that it runs on"
    )
    assert everything(model) == before


def test_planning_needs_no_weights():
    with torch.device("meta"):
        model = Stack()
    before = everything(model)
    plan = nz.plan(model, "layers[2]")
    assert plan.certificates[0].kind == "exact"
    assert everything(model) == before


@pytest.mark.parametrize("odd", ["sparse", "expanded", "integer", "float8", "scalar", "empty"])
def test_plans_beside_tensors_of_any_kind(odd):
    model = Stack()
    tensor = {
        "sparse": torch.eye(3).to_sparse(),
        "expanded": torch.ones(1, 3).expand(4, 3),
        "integer": torch.ones(3, dtype=torch.int8),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(1.0),
        "empty": torch.empty(0, 3),
    }[odd]
    model.register_buffer("odd", tensor)
    undo = nz.neutralize(model, "layers[1]")
    assert model.layers[1].norm.weight.count_nonzero() == 0
    undo.restore()


# ---- tied parameters -------------------------------------------------------------------------------------------------


def tied(bias: bool = False):
    model = nn.Sequential(*(nn.Linear(8, 8, bias=bias) for _ in range(3)))
    model[1].weight = model[0].weight
    return model


def test_refuses_to_write_what_another_layer_reads_and_names_both():
    for strategy, options in (("auto", {}), ("zero", {"sides": "in"}), ("constant", {"weight": 0.5})):
        model = tied()
        before = everything(model)
        text = refusal(lambda m=model, s=strategy, o=options: nz.plan(m, "0", s, example_inputs=torch.ones(2, 8), **o))
        assert text == (
            "plan: expected '0.weight' to be read by the selected layers only, got a tensor that is tied to "
            "'1.weight'; select that layer too, or untie it first (clone the parameter)"
        )
        assert everything(model) == before


def test_writes_a_tensor_once_that_is_tied_inside_the_selection():
    model = tied()
    before = everything(model)
    plan = nz.plan(model, ["0", "1"], "zero", sides="in", example_inputs=torch.ones(2, 8))
    assert plan.parameters in (("0.weight",), ("1.weight",))
    assert plan.tied == (("0.weight", "1.weight"),)
    undo = plan.apply(model)
    assert model[1].weight.count_nonzero() == 0
    undo.restore()
    assert everything(model)["bits"] == before["bits"]


def test_reports_every_layer_that_fails():
    text = refusal(
        lambda: nz.plan(Stack(), ["embed", "head", "layers[1].up"], "passthrough", example_inputs=torch.ones(2, 8))
    )
    assert text.startswith("plan: expected layers that can be switched off, got 2 that cannot:\n  - ")
    assert "'layers.1.up'" in text
    assert "'head'" in text
    assert "'embed'" not in text


def test_refuses_integer_weights():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return x @ self.codes.to(x.dtype)

    model = nn.Sequential(nn.Linear(8, 8), Quantized())
    text = refusal(lambda: nz.plan(model, "[1]", "zero", example_inputs=torch.ones(2, 8)))
    assert "'1.codes'" in text
    assert "int8" in text


def test_holds_no_tensor():
    plan = nz.plan(Stack(), "layers[1]")
    assert plan.edits
    assert not any(isinstance(value, torch.Tensor) for edit in plan.edits for value in vars(edit).values())


def test_a_block_is_selected_as_the_model_itself():
    block = Block()
    plan = nz.plan(block, block, example_inputs=torch.randn(2, 8))
    assert plan.layers[0].layer == ""
    with plan.applied(block):
        x = torch.randn(3, 8)
        assert torch.equal(block(x), x)


def test_bag_has_what_it_was_given():
    """The tests of apply and undo rest on it."""
    bag = Bag(w=nn.Parameter(torch.ones(2)), b=torch.zeros(3))
    assert list(dict(bag.named_parameters())) == ["w"]
    assert list(dict(bag.named_buffers())) == ["b"]
