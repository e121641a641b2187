"""Edits of parameters as edits of what is stored: the loader run again gives what the edit gives on what it gave."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bits import refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stored import edited, located
from torch import Tensor, nn

from neutralize.checkpoint.layout import Elements, Layout
from neutralize.checkpoint.naming import Source, placed, restored, retarget
from neutralize.checkpoint.provenance import traced
from neutralize.plan import Assign, Copy, Edit, Fold, Plan, Rewrite

Loader = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def fuse_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    gates, ups = (torch.stack([state[f"{kind}.{index}"] for index in range(3)]) for kind in ("gate", "up"))
    return {"weight": torch.cat([gates, ups], dim=1)}


LOADERS: dict[str, tuple[dict[str, tuple[int, ...]], Loader]] = {
    "renamed": ({"a": (4, 6)}, lambda state: {"weight": state["a"][...].clone()}),
    "transposed": ({"a": (6, 4)}, lambda state: {"weight": state["a"].T.contiguous()}),
    "stacked": (
        {f"e{index}": (4, 6) for index in range(3)},
        lambda state: {"weight": torch.stack([state[f"e{index}"] for index in range(3)])},
    ),
    "stacked last": (
        {f"e{index}": (4, 6) for index in range(3)},
        lambda state: {"weight": torch.stack([state[f"e{index}"].t() for index in range(3)], dim=-1)},
    ),
    "experts": ({f"{kind}.{index}": (4, 6) for kind in ("gate", "up") for index in range(3)}, fuse_experts),
    "joined": ({"q": (4, 6), "k": (2, 6), "v": (2, 6)}, lambda s: {"weight": torch.cat([s["q"], s["k"], s["v"]])}),
    "joined columns": ({"a": (5, 2), "b": (5, 4)}, lambda s: {"weight": torch.cat([s["a"], s["b"]], 1)}),
    "chunked": ({"qkv": (12, 5)}, lambda s: dict(zip(("q", "weight", "v"), s["qkv"].chunk(3), strict=True))),
    "chunked in the middle": ({"all": (3, 8, 5)}, lambda s: {"weight": s["all"].split([2, 4, 2], dim=1)[1]}),
    "chunked and turned": ({"all": (8, 5)}, lambda s: {"weight": s["all"].narrow(0, 2, 4).transpose(0, 1)}),
    "one of a stack": ({"all": (3, 4, 5)}, lambda s: {"weight": s["all"][1]}),
    "one of a list": ({"all": (4, 3, 5)}, lambda s: {"weight": s["all"].unbind(1)[2].squeeze()}),
    "a dimension more": ({"a": (4, 5)}, lambda s: {"weight": s["a"].unsqueeze(1)}),
    "a dimension less": ({"a": (4, 1, 5)}, lambda s: {"weight": s["a"].reshape(4, 5)}),
    "every other way": ({"a": (2, 3, 4)}, lambda s: {"weight": s["a"].permute(2, 0, 1)}),
    "taps": ({"a": (4, 3, 2, 2)}, lambda s: {"weight": s["a"]}),
    "vector": ({"a": (7,)}, lambda s: {"weight": s["a"]}),
    "scalar": ({"a": ()}, lambda s: {"weight": s["a"]}),
    "shifted": ({"a": (7,)}, lambda s: {"weight": s["a"] - 1}),
}


def written(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Layout:
    torch.manual_seed(0)
    save_file({name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}, folder / "all.safetensors")
    return located(folder)


def state_of(layout: Layout) -> dict[str, Tensor]:
    from neutralize.checkpoint.region import Files

    with Files(layout.root) as files:
        return {name: stored.read(files) for name, stored in layout.tensors.items() if isinstance(stored, Elements)}


def names_of(layout: Layout, loader: Loader) -> dict[str, tuple[Source, ...]]:
    state = {name: traced(name, stored.shape, torch.float32) for name, stored in layout.tensors.items()}
    return {name: tensor.sources for name, tensor in loader(state).items()}


def on_live(parameters: dict[str, Tensor], *edits: Edit) -> dict[str, Tensor]:
    """The edits on parameters of a live model, as ``apply`` carries them out."""
    model = nn.Module()
    for name, tensor in parameters.items():
        model.register_parameter(name, nn.Parameter(tensor.clone()))
    Plan("test", edits, ()).apply(model)
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def assert_goes_through(layout: Layout, loader: Loader, *edits: Edit) -> None:
    parameters = loader(state_of(layout))
    wanted = on_live(parameters, *edits)
    edited(layout, edits, names_of(layout, loader))
    for name, tensor in loader(state_of(layout)).items():
        assert torch.equal(tensor, wanted[name]), name


def rewrite(shape: tuple[int, ...], **about: object) -> Rewrite:
    return Rewrite("weight", shape, "float32", **about)


def shape_of(layout: Layout, loader: Loader, name: str = "weight") -> tuple[int, ...]:
    return tuple(loader(state_of(layout))[name].shape)


@pytest.mark.parametrize(
    ("case", "coefficients"),
    [
        (case, coefficients)
        for case in LOADERS
        for coefficients in ({"fill": 0.0}, {"fill": 0.75}, {"scale": 0.5, "fill": 0.25})
        if case != "shifted" or "scale" not in coefficients
    ],
)
def test_rewrites_of_any_block_go_through(case, coefficients, tmp_path):
    shapes, loader = LOADERS[case]
    layout = written(tmp_path, shapes)
    shape = shape_of(layout, loader)
    rows = shape[0] if shape else 1
    columns = math.prod(shape[1:])
    blocks = [(None, None), ((rows // 2, rows), None), (None, (columns // 3, columns)), ((0, 1), (0, -(-columns // 2)))]
    for row, column in blocks:
        assert_goes_through(layout, loader, rewrite(shape, **coefficients, rows=row, columns=column))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_blocks_of_fused_experts(data, tmp_path_factory):
    shapes, loader = LOADERS[data.draw(st.sampled_from(["experts", "stacked last", "chunked in the middle", "joined"]))]
    layout = written(tmp_path_factory.mktemp("experts"), shapes)
    shape = shape_of(layout, loader)
    columns = math.prod(shape[1:])
    first, last = sorted(data.draw(st.tuples(st.integers(0, shape[0] - 1), st.integers(1, shape[0]))))
    begin, end = sorted(data.draw(st.tuples(st.integers(0, columns - 1), st.integers(1, columns))))
    edit = rewrite(shape, scale=0.5, fill=3.0, rows=(first, max(last, first + 1)), columns=(begin, max(end, begin + 1)))
    assert_goes_through(layout, loader, edit)


@pytest.mark.parametrize("case", ["transposed", "joined", "joined columns", "chunked", "chunked and turned", "taps"])
@pytest.mark.parametrize(("start", "step"), [(0, 1), (2, 1), (-1, 1), (5, -1)])
@pytest.mark.parametrize("block", [(None, None), ((1, 4), (1, 4))], ids=str)
def test_identities_go_through(case, start, step, block, tmp_path):
    shapes, loader = LOADERS[case]
    layout = written(tmp_path, shapes)
    shape = shape_of(layout, loader)
    about = {"scale": 0.5, "diagonal": 1.5, "fill": 0.25, "start": start, "step": step}
    assert_goes_through(layout, loader, rewrite(shape, **about, rows=block[0], columns=block[1]))


def test_a_dirac_of_a_convolution_goes_through(tmp_path):
    shapes, loader = LOADERS["taps"]
    assert_goes_through(written(tmp_path, shapes), loader, rewrite((4, 3, 2, 2), diagonal=1.0, start=2, step=4))


def fold(shape: tuple[int, ...], **about: object) -> Fold:
    return Fold("weight", "bias", shape, "float32", 0.5, -0.25, **about)


@pytest.mark.parametrize("columns", [None, (1, 3)])
def test_folds_turn_with_a_transposed_weight(columns, tmp_path):
    layout = written(tmp_path, {"weight": (6, 4), "bias": (4,)})
    assert_goes_through(
        layout, lambda s: {"weight": s["weight"].T.contiguous(), "bias": s["bias"]}, fold((4, 6), columns=columns)
    )
    assert_goes_through(
        layout,
        lambda s: {"weight": s["weight"].T.contiguous().T, "bias": s["bias"]},
        fold((6, 4), transposed=True, columns=columns),
    )


def test_folds_of_rows_that_are_joined_with_their_biases(tmp_path):
    layout = written(tmp_path, {"q": (4, 6), "k": (2, 6), "qb": (4,), "kb": (2,)})

    def loader(s: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": torch.cat([s["q"], s["k"]]), "bias": torch.cat([s["qb"], s["kb"]])}

    assert_goes_through(layout, loader, fold((6, 6)))


def test_assignments_and_copies_go_through(tmp_path):
    layout = written(tmp_path, {"a": (4,), "b": (3,), "c": (4,), "d": (4, 2), "e": (4, 2), "f": (4,)})

    def loader(s: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "weight": torch.cat([s["a"], s["b"]]),
            "shifted": s["c"] + 2,
            "turned": s["d"].T,
            "alike": s["e"].T,
            "f": s["f"],
        }

    assert_goes_through(layout, loader, Assign("weight", (7,), "float32", tuple(range(7))))
    assert_goes_through(layout, loader, Assign("shifted", (4,), "float32", (1.0, 2.0, 4.0, 8.0)))
    assert_goes_through(layout, loader, Assign("turned", (2, 4), "float32", tuple(range(8))))
    assert_goes_through(layout, loader, Copy("alike", "turned", (2, 4), "float32", 0.5))
    assert "stored alike" in refusal(
        lambda: retarget([Copy("f", "shifted", (4,), "float32")], names_of(layout, loader), layout)
    )


REFUSED: list[tuple[dict[str, tuple[int, ...]], Loader, Edit, str]] = [
    (
        {"a": (7,)},
        lambda s: {"weight": s["a"] - 1},
        rewrite((7,), scale=0.5),
        "checkpoint: expected constants for 'weight <- 0.5 W', got a tensor that the loader adds -1 to, in 'a'; edit "
        "the loaded model, or choose another strategy",
    ),
    (
        {"a": (8, 4)},
        lambda s: {"weight": s["a"].view(2, 2, 2, 4).transpose(1, 2).reshape(8, 4)},
        rewrite((8, 4), diagonal=1.0),
        "checkpoint: expected the same for all of what is stored for 'weight <- D', got elements in an order of their "
        "own, in 'a'; edit the loaded model, or choose another strategy",
    ),
    (
        {"a": (8, 4)},
        lambda s: {"weight": s["a"].view(2, 2, 2, 4).transpose(1, 2).reshape(8, 4)},
        rewrite((8, 4), rows=(0, 4)),
        "elements in an order of their own, in 'a'",
    ),
    (
        {"a": (4, 4), "b": (4, 4)},
        lambda s: {"weight": s["a"] * s["b"]},
        rewrite((4, 4)),
        "checkpoint: expected 'weight' to lie in the checkpoint element by element, got one that the loader computes "
        "from 'a', 'b'; edit the loaded model, or choose another edit=",
    ),
    (
        {"a": (4, 4)},
        lambda s: {"other": s["a"]},
        rewrite((4, 4)),
        "checkpoint: expected 'weight' to be stored, got a checkpoint without it; leave it out of the plan, or name "
        "the model that the checkpoint is of",
    ),
    (
        {"e0": (4, 6), "e1": (4, 6)},
        lambda s: {"weight": torch.stack([s["e0"], s["e1"]])},
        rewrite((2, 4, 6), diagonal=1.0),
        "expected a tensor stored as the matrix that it is for 'weight <- D', got another arrangement of its",
    ),
    (
        {"a": (6, 4)},
        lambda s: {"weight": s["a"].T},
        rewrite((4, 6), diagonal=1.0, step=2),
        "expected a step of 1 for a tensor stored transposed for 'weight <- D', got 2, in 'a'",
    ),
    (
        {"a": (8, 4), "b": (8,)},
        lambda s: {"weight": s["a"][:4], "bias": s["b"][:4]},
        fold((4, 4)),
        "expected a weight stored as it is for 'bias += -0.25 (weight 1), weight <- 0.5 W', got one that the loader",
    ),
    (
        {"a": (4, 2), "c": (4, 2), "b": (4,)},
        lambda s: {"weight": torch.cat([s["a"], s["c"]], 1), "bias": s["b"]},
        fold((4, 4)),
        "expected whole row sums in one stored tensor",
    ),
    (
        {"a": (2, 4), "c": (2, 4), "b": (4,)},
        lambda s: {"weight": torch.cat([s["a"], s["c"]]), "bias": s["b"]},
        fold((4, 4)),
        "expected the biases of what 'a' gives in one tensor",
    ),
    (
        {"a": (8,)},
        lambda s: {"weight": s["a"][:4]},
        Assign("weight", (4,), "float32", (1.0, 2.0, 3.0, 4.0)),
        "expected a tensor stored as it is for 'weight <- 4 values', got one that the loader takes apart, in 'a'",
    ),
    (
        {"a": (4,), "b": (8,)},
        lambda s: {"weight": s["a"], "other": s["b"][:4]},
        Copy("weight", "other", (4,), "float32"),
        "expected two tensors stored alike for 'weight <- other', got tensors that the loader takes apart or shifts",
    ),
]


@pytest.mark.parametrize(("shapes", "loader", "edit", "message"), REFUSED)
def test_what_does_not_go_through_is_refused_with_the_reason(shapes, loader, edit, message, tmp_path):
    layout = written(tmp_path, shapes)
    assert message in refusal(lambda: retarget([edit], names_of(layout, loader), layout))


def test_all_problems_are_told_together(tmp_path):
    layout = written(tmp_path, {"a": (4,)})
    edits = [Rewrite("b", (4,), "float32"), Rewrite("c", (4,), "float32")]
    told = refusal(lambda: retarget(edits, {}, layout))
    assert "\n  - expected 'b' to be stored" in told
    assert "\n  - expected 'c' to be stored" in told


def permuted(weight: Tensor) -> Tensor:
    return weight.view(2, 2, 2, 4).transpose(1, 2).reshape(8, 4)


def test_what_is_the_same_for_all_goes_through_a_permutation_and_beside_one(tmp_path):
    def loader(s: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": torch.cat([permuted(s["q"]), s["v"]]), "other": s["u"].reshape(16), "flipped": s["w"].flip(0)}

    layout = written(tmp_path, {"q": (8, 4), "v": (8, 4), "u": (4, 4), "w": (3, 3)})
    assert_goes_through(layout, loader, rewrite((16, 4), scale=0.5, rows=(10, 13)))
    assert_goes_through(layout, loader, rewrite((16, 4), fill=2.0, rows=(0, 9)))
    assert_goes_through(layout, loader, Rewrite("other", (16,), "float32", fill=3.0))
    assert_goes_through(layout, loader, Rewrite("flipped", (3, 3), "float32"))
    assert_goes_through(layout, loader, Rewrite("flipped", (3, 3), "float32", scale=0.5))
    assert "order of their own" in refusal(
        lambda: retarget([rewrite((16, 4), rows=(7, 9))], names_of(layout, loader), layout)
    )


def test_an_edit_takes_the_stored_dtype_and_shape(tmp_path):
    layout = written(tmp_path, {"a": (6, 4)}, torch.bfloat16)
    (edit,) = retarget([rewrite((4, 6))], names_of(layout, lambda s: {"weight": s["a"].float().T}), layout)
    assert edit == Rewrite("a", (6, 4), "bfloat16")


def test_both_copies_of_a_tied_weight_are_written(tmp_path):
    layout = written(tmp_path, {"a": (4, 6), "b": (4, 6)})
    names = names_of(layout, lambda s: {"weight": s["a"], "other": s["b"]})
    edits = retarget([rewrite((4, 6), rows=(1, 2))], {"weight": (*names["weight"], *names["other"])}, layout)
    assert edits == [Rewrite(name, (4, 6), "float32", rows=(1, 2)) for name in ("a", "b")]


@pytest.mark.parametrize(
    "case", ["transposed", "stacked last", "chunked and turned", "one of a list", "every other way"]
)
def test_content_is_placed_and_put_back(case, tmp_path):
    shapes, loader = LOADERS[case]
    layout = written(tmp_path, shapes)
    state = state_of(layout)
    weight = loader(state)["weight"]
    for source in names_of(layout, loader)["weight"]:
        content = state[source.stored][tuple(slice(*extent) for extent in source.box)]
        part = weight[tuple(slice(*extent) for extent in source.place())]
        assert torch.equal(placed(content, source), part)
        assert torch.equal(restored(part, source), content)
