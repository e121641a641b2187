"""Selection: every way to name layers, and what is said where none or too much is named."""

import re

import pytest
import torch
from bits import Block, Stack, refusal
from torch import nn

import neutralize as nz

UPS = [f"layers.{index}.up" for index in range(4)]
BLOCKS = [f"layers.{index}" for index in range(4)]


class Shared(nn.Module):
    """One linear layer under two names, once inside a Sequential."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = nn.Sequential(self.first, nn.ReLU())

    def forward(self, x):
        return self.again(self.first(x))


def nested():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4))


STACK = Stack()
SELECTED = {
    "a name": ("layers.1.up", ["layers.1.up"]),
    "an index": ("layers[1]", ["layers.1"]),
    "an index from the end": ("layers[-1]", ["layers.3"]),
    "the first index from the end": ("layers[-4]", ["layers.0"]),
    "an index and a name": ("layers[1].up", ["layers.1.up"]),
    "a slice": ("layers[1:3]", BLOCKS[1:3]),
    "a slice without a start": ("layers[:2]", BLOCKS[:2]),
    "a slice without a stop": ("layers[2:]", BLOCKS[2:]),
    "a slice of all": ("layers[:]", BLOCKS),
    "a slice from the end": ("layers[-2:]", BLOCKS[-2:]),
    "a slice to the end": ("layers[:-3]", BLOCKS[:1]),
    "a slice with a step": ("layers[::2]", BLOCKS[::2]),
    "a slice backwards, in model order all the same": ("layers[::-1]", BLOCKS),
    "a slice that ends past the list": ("layers[2:99]", BLOCKS[2:]),
    "a slice and a name": ("layers[1:3].up", UPS[1:3]),
    "a slice and a glob": ("layers[1:3].u*", UPS[1:3]),
    "an index of what a glob names": ("l*s[1]", ["layers.1"]),
    "a glob across dots": ("*.up", UPS),
    "a glob inside a name": ("layers.*.u?", UPS),
    "a glob with a class": ("layers.[13].up", [UPS[1], UPS[3]]),
    "a glob with a negated class": ("layers.[!13].up", [UPS[0], UPS[2]]),
    "the name of a list stands for its layers": ("layers", BLOCKS),
    "a list object stands for its layers": (STACK.layers, BLOCKS),
    "a slice of a list object": (STACK.layers[1:3], BLOCKS[1:3]),
    "a module object": (STACK.layers[2], ["layers.2"]),
    "the model itself": (STACK, [""]),
    "a predicate": (lambda name, module: isinstance(module, nn.LayerNorm), [f"{block}.norm" for block in BLOCKS]),
    "a predicate on names": (lambda name, module: name.endswith("3.up"), UPS[3:]),
    "a predicate that is true of lists": (lambda name, module: isinstance(module, nn.ModuleList), BLOCKS),
    "a list, in model order": (["head", "embed"], ["embed", "head"]),
    "a tuple": (("head", "embed"), ["embed", "head"]),
    "a set": ({"head", "embed"}, ["embed", "head"]),
    "a generator": ((f"layers.{index}" for index in (3, 1)), ["layers.1", "layers.3"]),
    "what select returned": (nz.select(STACK, "layers[1:3]"), BLOCKS[1:3]),
    "nested lists of everything": (
        ["embed", [("layers[0]", {"layers.1.up"}), STACK.layers[2]], lambda name, module: name == "head"],
        ["embed", "layers.0", "layers.1.up", "layers.2", "head"],
    ),
    "the same layer twice": (["layers[1]", "layers.1", STACK.layers[1]], ["layers.1"]),
}


@pytest.mark.parametrize("selection", SELECTED)
def test_selects(selection):
    layers, names = SELECTED[selection]
    chosen = nz.select(STACK, layers)
    assert list(chosen) == names
    named = dict(STACK.named_modules())
    assert all(module is named[name] for name, module in chosen.items())


SEQUENTIAL = {
    "[0]": ["0"],
    "[-1]": ["3"],
    "[::3]": ["0", "3"],
    "[2:]": ["2", "3"],
    "[2][0]": ["2.0"],
    "[2].0": ["2.0"],
    "2[0]": ["2.0"],
    "2[0:1]": ["2.0"],
    "0": ["0"],
    "*.0": ["2.0"],
}


@pytest.mark.parametrize("text", SEQUENTIAL)
def test_indexes_a_sequential_at_the_root_and_below(text):
    assert list(nz.select(nested(), text)) == SEQUENTIAL[text]


def test_takes_a_slice_of_a_sequential_object():
    model = nested()
    assert list(nz.select(model, model[2:])) == ["2", "3"]


def test_lists_a_module_that_occurs_twice_under_its_first_name():
    model = Shared()
    for layers in ("first", "again.0", "again[0]", model.again[0], ["first", "again.0"], "*0"):
        assert list(nz.select(model, layers)) == ["first"], layers


def test_finds_a_part_that_is_also_elsewhere():
    text = refusal(lambda: nz.select(Shared(), ["first", "again"]))
    assert text.startswith("select: expected layers that do not contain each other, got 'again' and its part 'first'; ")


def test_sees_through_a_compiled_model():
    model = Stack()
    compiled = torch.compile(model, backend="eager")
    for layers, names in (
        ("layers[1]", ["layers.1"]),
        ("_orig_mod.layers.1", ["layers.1"]),
        ("_orig_mod.layers[1]", ["layers.1"]),
        (compiled.layers[1], ["layers.1"]),
        (compiled, [""]),
        (model, [""]),
        ("*.up", UPS),
    ):
        assert list(nz.select(compiled, layers)) == names, layers
    assert nz.select(compiled, compiled)[""] is model


def test_sees_through_a_compiled_layer():
    model = Stack()
    inside = model.layers[1]
    model.layers[1] = torch.compile(inside, backend="eager")
    for layers in ("layers[1]", "layers.1", "lay*.1", model.layers[1], inside):
        assert list(nz.select(model, layers)) == ["layers.1"], layers
    for layers in ("layers.1.up", "layers[1].up", "layers.1._orig_mod.up", inside.up):
        assert nz.select(model, layers) == {"layers.1._orig_mod.up": inside.up}, layers
    assert len(nz.select(model, "*.up")) == 4


UNKNOWN = {
    "laeyrs.1": "which is unknown; near matches: layers.1, ",
    "LAYERS.1": "which is unknown; near matches: layers.1, ",
    "layers.1.upp": "which is unknown; near matches: layers.1.up, ",
    "layers[1].nope": "got 'layers.1.nope', which is unknown; near matches: layers.1.norm, ",
    "layers[1": "which is unknown; near matches: layers.1, ",
    "layers[a]": "which is unknown; near matches: layers, ",
    "layers[1:2:3:4]": "which is unknown; near matches: layers",
    "layers[" + "9" * 5000 + "]": "which is unknown; near matches: layers",
    "layers[1][0]": "got 'layers.1[0]', which is unknown; near matches: layers.1, ",
    "embed[0]": "which is unknown; near matches: embed",
    "*.nothing": "which is unknown; ",
    "[1]": "got '[1]', which is unknown; the model's layers begin with: embed, layers, layers.0, ",
}


@pytest.mark.parametrize("text", UNKNOWN, ids=lambda text: text[:20])
def test_refuses_unknown_names_with_near_matches(text):
    message = refusal(lambda: nz.select(STACK, text))
    assert message.startswith("select: expected the name of a layer, got '")
    assert UNKNOWN[text] in message


REFUSED = {
    "an index past the end": (
        "layers[4]",
        "expected an index from -4 to 3 for 'layers', got 'layers[4]'; it has 4 layers",
    ),
    "an index before the start": (
        "layers[-5]",
        "expected an index from -4 to 3 for 'layers', got 'layers[-5]'; it has",
    ),
    "an empty slice": (
        "layers[4:]",
        "expected a slice that selects something of 'layers', got 'layers[4:]'; it has 4 layers, 0 to 3",
    ),
    "a slice the wrong way": (
        "layers[3:1]",
        "expected a slice that selects something of 'layers', got 'layers[3:1]'; it",
    ),
    "a step of zero": ("layers[::0]", "expected a slice whose step is not 0, got 'layers[::0]'; leave the step out"),
    "an empty list": ([], "expected at least one layer, got none from []; the model's layers begin with: embed, "),
    "nested empty lists": ([[], ()], "expected at least one layer, got none from [[], ()]; the model's layers begin"),
    "an empty string": ("", "expected the name of a layer, got an empty string; pass the model itself to select it"),
    "None": (
        None,
        "expected a name, glob, slice, module, predicate or a list of these for layers, got NoneType None; ",
    ),
    "an integer": (3, "or a list of these for layers, got int 3; write an index as 'model.layers[3]'"),
    "a boolean": (True, "or a list of these for layers, got bool True; write an index as"),
    "a float": (3.5, "or a list of these for layers, got float 3.5; write an index as"),
    "bytes": (b"embed", "or a list of these for layers, got bytes b'embed'; write an index as"),
    "an integer in a list": (["embed", 3], "or a list of these for layers, got int 3; write an index as"),
    "an unknown name in a list": (
        ["embed", "hed"],
        "expected the name of a layer, got 'hed', which is unknown; near match",
    ),
    "a class": (nn.Linear, "got the class Linear; write lambda name, module: isinstance(module, Linear)"),
    "a parameter": (STACK.head.weight, "expected a layer for layers, got a tensor; pass the module that holds it"),
    "a tensor without dimensions": (torch.tensor(1.0), "got a tensor; pass the module that holds it, or its name"),
    "a foreign module": (
        Block(),
        "expected a module of the model for layers, got a Block that is not part of it; pass a",
    ),
    "a foreign list": (
        nn.ModuleList([Block()]),
        "got a Block that is not part of it; pass a module reached through this",
    ),
    "a layer and its part": (
        ["layers.1", "layers.1.up"],
        "expected layers that do not contain each other, got 'layers.1' and its part 'layers.1.up'; select one of them",
    ),
    "the model and a part": ([STACK, "head"], "got '' and its part 'head'; select one of them"),
    "a glob of everything": (
        "*",
        "got 'layers.0' and its part 'layers.0.norm'; select one of them (* also matches dots",
    ),
    "a dict of strategies": (
        {"layers.0": "zero"},
        "expected layers alone, or what select returned, got a dict with other values than modules; make a plan for",
    ),
    "an object that shows much of itself": (
        type("Plan", (), {"__repr__": lambda self: "Plan(" + 1000 * "edit, " + ")"})(),
        "got Plan Plan(edit, ed... edit, edit, ); write an index as",
    ),
    "a predicate that accepts nothing": (
        lambda name, module: False,
        "expected a predicate that accepts at least one layer, got <function ",
    ),
}


@pytest.mark.parametrize("selection", REFUSED)
def test_refuses(selection):
    layers, message = REFUSED[selection]
    text = refusal(lambda: nz.select(STACK, layers))
    assert text.startswith("select: ")
    assert message in text
    assert refusal(lambda: nz.plan(STACK, layers)) == text  # the plan adds nothing and hides nothing


@pytest.mark.parametrize("model", [None, {}, {"embed.weight": torch.zeros(8)}, nn.Linear, 3])
def test_refuses_a_model_that_is_none(model):
    text = f"neutralize: expected a torch.nn.Module for model, got {type(model).__name__}; pass the model itself"
    for call in (nz.select, nz.plan, nz.neutralize):
        assert refusal(lambda call=call: call(model, "embed")) == text


def test_a_text_in_place_of_a_model_is_a_path():
    for call in (nz.plan, nz.neutralize):
        assert refusal(lambda call=call: call("Stack", "embed")) == (
            "checkpoint: expected a folder or a file, got nothing at 'Stack'; check the path"
        )
    assert refusal(lambda: nz.verify("Stack", nz.plan(STACK, "embed", "zero"))) == (
        "neutralize: expected a torch.nn.Module for model, got str; pass the model itself; neutralize.Checkpoint "
        "works on files"
    )


def test_says_so_where_the_model_has_no_layers():
    text = refusal(lambda: nz.select(nn.Linear(2, 2), "weight"))
    assert text.endswith("got 'weight', which is unknown; the model has no layers of its own")


def test_predicates_are_not_asked_about_the_model_itself():
    seen = []
    nz.select(STACK, lambda name, module: seen.append(name) or name == "embed")
    assert "" not in seen
    assert len(seen) == len(dict(STACK.named_modules())) - 1


def test_an_error_in_a_predicate_is_the_callers_own():
    with pytest.raises(TypeError, match=re.escape("positional argument")):
        nz.select(STACK, lambda name: True)
