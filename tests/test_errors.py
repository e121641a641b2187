"""Errors: one exception, one form, for every wrong number and every wrong option of every strategy."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from bits import Plain, Stack, everything, refusal

import neutralize as nz
from neutralize.errors import require_finite
from neutralize.strategies import Damp, Passthrough, Zero

FINITE = [0, -0.0, 1, 2.5, -1e308, 5e-324, 2**1000, np.float32(0.5), np.float64(0.5), Fraction(1, 3)]
NOT_FINITE = {
    "nan": (math.nan, "nan"),
    "infinity": (math.inf, "inf"),
    "minus infinity": (-math.inf, "-inf"),
    "numpy's nan": (np.float32("nan"), "nan"),
    "an integer beyond every float": (10**400, "an integer of more than 20 digits"),
    "a longer one than Python prints": (10**10_000, "an integer of more than 20 digits"),
    "true": (True, "True"),
    "None": (None, "None"),
    "text": ("0.5", "'0.5'"),
    "a long text": ("x" * 1000, "'xxxxxxxxxx"),
    "a list": ([1.0], "[1.0]"),
    "a complex number": (1j, "1j"),
    "a tensor": (torch.tensor(0.5), "tensor(0.5000)"),
}


@pytest.mark.parametrize("value", FINITE, ids=repr)
def test_takes_every_finite_number(value):
    require_finite("op", number=value)


@pytest.mark.parametrize("case", NOT_FINITE)
def test_refuses_what_is_no_finite_number(case):
    value, shown = NOT_FINITE[case]
    text = refusal(lambda: require_finite("op", good=1.0, number=value))
    assert text.startswith("op: expected a finite number for number, got ")
    assert shown in text
    assert text.endswith("; give one")
    assert len(text) < 200


def test_is_a_value_error():
    assert issubclass(nz.NeutralizeError, ValueError)
    with pytest.raises(ValueError, match=r"^select: expected the name of a layer, got 'nope', which is unknown; "):
        nz.select(Stack(), "nope")


# ---- strategies and their options ------------------------------------------------------------------------------------

NAMES = "auto, passthrough, constant, zero, damp, mean"
OPTIONS = {
    "a near match": (
        "pasthrough",
        {},
        f"plan: expected one of {NAMES} for strategy, got 'pasthrough'; did you mean 'passthrough'?",
    ),
    "another case": ("Zero", {}, f"plan: expected one of {NAMES} for strategy, got 'Zero'; did you mean 'zero'?"),
    "no match": ("xyzzy", {}, f"plan: expected one of {NAMES} for strategy, got 'xyzzy'; use one of these"),
    "no name": ("", {}, f"plan: expected one of {NAMES} for strategy, got ''; use one of these"),
    "None": (None, {}, f"plan: expected a name or a strategy object for strategy, got NoneType; the names are {NAMES}"),
    "a number": (3, {}, f"plan: expected a name or a strategy object for strategy, got int; the names are {NAMES}"),
    "a class": (
        Zero,
        {},
        f"plan: expected a name or a strategy object for strategy, got the class Zero; the names are {NAMES}",
    ),
    "an object and options": (
        Zero("in"),
        {"sides": "out"},
        "plan: expected no options beside a strategy object, got sides; put them into the object",
    ),
    "an unknown option": (
        "zero",
        {"side": "in"},
        "plan: expected sides for strategy 'zero', got side; leave out what it does not",
    ),
    "the option of another": (
        "damp",
        {"factor": 1, "gain": 2},
        "plan: expected factor, sides for strategy 'damp', got gain; leave out",
    ),
    "several unknown options": (
        "auto",
        {"a": 1, "b": 2},
        "plan: expected gain, input_bound, tolerance, edit, partial for strategy 'auto', got a, b; leave "
        "out what it does not have",
    ),
    "an option left out": ("damp", {}, "plan: expected factor for strategy 'damp', got none; give factor="),
    "a factor that is no number": (
        "damp",
        {"factor": "half"},
        "damp: expected a finite number for factor, got 'half'; give one",
    ),
    "a factor of None": ("damp", {"factor": None}, "damp: expected a finite number for factor, got None; give one"),
    "a factor of NaN": ("damp", {"factor": math.nan}, "damp: expected a finite number for factor, got nan; give one"),
    "a factor beyond all floats": (
        "damp",
        {"factor": 10**400},
        "damp: expected a finite number for factor, got an integer of more",
    ),
    "a factor of true": ("damp", {"factor": True}, "damp: expected a finite number for factor, got True; give one"),
    "no side": ("zero", {"sides": "left"}, "zero: expected in, out or both for sides, got 'left'; use one of these"),
    "sides of None": ("zero", {"sides": None}, "zero: expected in, out or both for sides, got None; use one of these"),
    "a list of sides": (
        "zero",
        {"sides": ["in"]},
        "zero: expected in, out or both for sides, got ['in']; use one of these",
    ),
    "sides of constant": (
        "constant",
        {"sides": "up"},
        "constant: expected in, out or both for sides, got 'up'; use one of these",
    ),
    "an infinite weight": (
        "constant",
        {"weight": math.inf},
        "constant: expected a finite number for weight, got inf; give one",
    ),
    "a bias of None": ("constant", {"bias": None}, "constant: expected a finite number for bias, got None; give one"),
    "a gain of zero": (
        "passthrough",
        {"gain": 0},
        "passthrough: expected a gain other than 0, got 0; use strategy='zero'",
    ),
    "a gain of None": (
        "passthrough",
        {"gain": None},
        "passthrough: expected a finite number for gain, got None; give one",
    ),
    "a bound of zero": ("auto", {"input_bound": 0}, "passthrough: expected a positive input_bound, got 0; give max|x|"),
    "a negative bound": (
        "auto",
        {"input_bound": -1.5},
        "passthrough: expected a positive input_bound, got -1.5; give max|x|",
    ),
    "an infinite bound": (
        "auto",
        {"input_bound": math.inf},
        "passthrough: expected a finite number for input_bound, got inf; give",
    ),
    "a negative tolerance": (
        "auto",
        {"tolerance": -1},
        "passthrough: expected a tolerance of 0 or more, got -1; leave it out for",
    ),
    "a tolerance of text": (
        "auto",
        {"tolerance": "1"},
        "passthrough: expected a finite number for tolerance, got '1'; give one",
    ),
    "no edit": (
        "auto",
        {"edit": "last"},
        "passthrough: expected cheapest, outgoing or incoming for edit, got 'last'; use one",
    ),
    "a list of edits": (
        "auto",
        {"edit": []},
        "passthrough: expected cheapest, outgoing or incoming for edit, got []; use one",
    ),
    "inputs that are none": (
        "auto",
        {"example_inputs": 3},
        "plan: expected a tensor, a tuple of positional arguments or a dict of keyword arguments "
        "for example_inputs, got int; "
        "wrap it accordingly",
    ),
    "inputs that are text": (
        "auto",
        {"example_inputs": "x"},
        "keyword arguments for example_inputs, got str; wrap it accordingly",
    ),
    "inputs of another shape": (
        "auto",
        {"example_inputs": torch.ones(2, 9)},
        "plan: expected example_inputs that the model accepts, got a failing trace (RuntimeError: ",
    ),
    "inputs of another name": (
        "auto",
        {"example_inputs": {"y": torch.ones(2, 8)}},
        "got a failing trace (TypeError: Stack.forward() got an unexpected keyword argument 'y'); "
        "give others that it runs on",
    ),
    "no inputs": (
        "auto",
        {"example_inputs": ()},
        "got a failing trace (TypeError: Stack.forward() missing 1 required positional",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_refuses_a_strategy_or_an_option(case):
    strategy, options, message = OPTIONS[case]
    model = Stack()
    before = everything(model)
    for call in (nz.plan, nz.neutralize):
        text = refusal(lambda call=call: call(model, "layers[1]", strategy, **options))
        assert message in text
        assert everything(model) == before


@pytest.mark.parametrize(
    ("strategy", "options", "made"),
    [
        ("zero", {"sides": "out"}, Zero("out")),
        ("damp", {"factor": 0.5}, Damp(0.5)),
        ("passthrough", {"edit": "outgoing"}, Passthrough(edit="outgoing")),
    ],
)
def test_a_name_with_options_is_the_object(strategy, options, made):
    model = Stack()
    assert nz.plan(model, "layers[1]", made) == nz.plan(model, "layers[1]", strategy, **options)


def test_an_object_checks_its_numbers_when_it_is_made():
    for make in (
        lambda: Damp(math.nan),
        lambda: Zero("up"),
        lambda: Passthrough(gain=0),
        lambda: Passthrough(edit="x"),
    ):
        assert refusal(make)


def test_takes_numpy_numbers_as_the_numbers_they_are():
    model = Stack()
    plan = nz.plan(model, "layers[1]", "damp", factor=np.float32(0.5))
    assert plan.to_json() == nz.plan(model, "layers[1]", "damp", factor=0.5).to_json()


def test_an_input_bound_that_cannot_be_measured_is_asked_for():
    with torch.device("meta"):
        model = Plain().eval()
        text = refusal(lambda: nz.plan(model, "middle", input_bound=3))
    assert text.startswith("plan: expected a default device that computes, got meta; plan after the `with")
    inputs = torch.empty(2, 8, device="meta")
    text = refusal(lambda: nz.plan(model, "middle", example_inputs=inputs))
    assert text.startswith(
        "plan: expected a bound on the input of 'middle', got no weights (this is a meta or sharded model) to measure"
    )
    assert "; give input_bound=, the largest" in text
    assert nz.plan(model, "middle", example_inputs=inputs, input_bound=3).layers[0].input_bound == 3
    text = refusal(lambda: nz.plan(Plain().eval(), "middle"))
    assert text.endswith("with; give example_inputs=, or input_bound=, the largest magnitude that enters the layer")


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_an_input_that_is_not_finite_or_all_zero_has_no_bound(value):
    model = Plain().eval()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(value)
    text = refusal(lambda: nz.plan(model, "middle", example_inputs=torch.randn(5, 8)))
    assert text == (
        f"plan: expected a finite input of layer 'middle' that is not all zero, got a largest "
        f"magnitude of {value}; give "
        "input_bound, or other example_inputs"
    )
