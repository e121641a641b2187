"""Parts of parameters: what all processes write together is what the edit writes into the whole; no process needed."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import transformers
from bits import Bag, refusal, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import neutralize as nz
from neutralize import ops
from neutralize.apply import rewrite_parts_
from neutralize.bits import same_bits
from neutralize.distributed.folds import own_sums, total
from neutralize.distributed.part import Part
from neutralize.plan import Assign, Copy, Fold, LayerPlan, Plan, Rewrite


def plan_of(*edits):
    layer = LayerPlan("layer", "null", nz.Certificate("layer", "measured"), tuple(range(len(edits))))
    return Plan("by hand", edits, (layer,))


@st.composite
def cuts(draw, shape):
    """For each dimension the runs of each of a few owners, which need not be neighbours."""
    owners = []
    for size in shape:
        count = draw(st.integers(1, 3))
        places = sorted(draw(st.lists(st.integers(0, size), max_size=4)))
        runs = [
            (first, last - first) for first, last in zip([0, *places], [*places, size], strict=True) if first < last
        ]
        whose = [draw(st.integers(0, count - 1)) for _ in runs]
        owners.append([tuple(run for run, owner in zip(runs, whose, strict=True) if owner == k) for k in range(count)])
    return owners


def held_by_all(whole, owners):
    """The tensors of all processes, cut by plain indexing, with the indices that each holds."""
    for runs in itertools.product(*owners):
        local = whole
        for dim, own in enumerate(runs):
            index = [first + k for first, size in own for k in range(size)]
            local = local.index_select(dim, torch.tensor(index, dtype=torch.long))
        yield runs, local.clone()


def joined(parts, shape, dtype):
    """The whole tensor, put together by plain indexing."""
    whole = torch.full(shape, torch.nan, dtype=dtype)
    for runs, local in parts:
        index = [[first + k for first, size in own for k in range(size)] for own in runs]
        for place, at in zip(
            itertools.product(*(range(len(own)) for own in index)), itertools.product(*index), strict=True
        ):
            whole[at] = local[place]
    return whole


SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@settings(deadline=None, max_examples=150)
@given(st.data(), SHAPES, st.sampled_from([0.0, 1.0, 0.5]), st.sampled_from([0.0, 2.0]), st.sampled_from([0.0, -3.0]))
def test_a_rewrite_in_parts_is_the_rewrite_of_the_whole(data, shape, scale, diagonal, fill):
    rows, columns = shape[0], math.prod(shape[1:])

    def some(extent):
        ends = sorted(data.draw(st.lists(st.integers(0, extent), min_size=2, max_size=2, unique=True)))
        return tuple(ends) if data.draw(st.booleans()) else None

    start, step = data.draw(st.integers(-3, 3)), data.draw(st.integers(-2, 2))
    edit = Rewrite("w", shape, "float32", scale, diagonal, fill, start, step, some(rows), some(columns))
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = []
    for runs, local in held_by_all(whole, data.draw(cuts(shape))):
        rewrite_parts_([(edit, part_with(local, shape, runs))])
        parts.append((runs, local))
    ops.rewrite_(edit.block(whole), scale=scale, diagonal=diagonal, fill=fill, start=start, step=step)
    assert same_bits(joined(parts, shape, torch.float32), whole)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_the_sums_of_the_parts_are_the_sums_of_the_whole(data):
    transposed = data.draw(st.booleans())
    groups = data.draw(st.sampled_from([1, 2])) if transposed else 1
    inner = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    shape = (groups * data.draw(st.integers(1, 4)), *inner)
    extent = shape[0] if transposed else math.prod(inner)
    ends = sorted(data.draw(st.lists(st.integers(0, extent), min_size=2, max_size=2, unique=True)))
    columns = tuple(ends) if groups == 1 and data.draw(st.booleans()) else None
    edit = Fold("w", "b", shape, "float32", 0.5, 1.0, transposed, columns, groups)
    whole = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(1)).float()  # exact in any order
    sums = []
    for runs, local in held_by_all(whole, data.draw(cuts(shape))):
        part = part_with(local, shape, runs)
        for _ in range(data.draw(st.integers(1, 2))):  # replicas
            sums.append((part.held, own_sums(edit, part)))
    bias = torch.zeros(edit.bias_numel)
    for rows, own in edit.pairs(whole, bias):
        own += rows.flatten(1).sum(1)
    assert torch.equal(total(sums, edit).float(), bias)


def test_parts_that_do_not_cover_the_weight_are_refused():
    edit = Fold("w", "b", (4, 4), "float32", 0.5, 1.0)
    part = part_with(torch.ones(2, 4), (4, 4), (((0, 2),), ((0, 4),)))
    text = refusal(lambda: total([(part.held, own_sums(edit, part))] * 2, edit))
    assert "cover 'w' once, got 8 elements of 16" in text


@settings(deadline=None, max_examples=60)
@given(st.data(), SHAPES)
def test_a_whole_tensor_is_picked_apart_and_put_together(data, shape):
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    again = torch.full(shape, torch.nan)
    for runs, local in held_by_all(whole, data.draw(cuts(shape))):
        part = part_with(local, shape, runs)
        assert torch.equal(part.pick(whole), local)
        part.put(again, local)
    assert torch.equal(again, whole)


def part_with(local, shape, runs):
    return Part(local, shape, () if runs == tuple(((0, size),) for size in shape) else runs)


# ---- shards that the caller describes, in one process ----------------------------------------------------------------


def sharded(shapes, shards, seed=0):
    """A whole model, and the models of all processes, cut by torch.chunk."""
    generator = torch.Generator().manual_seed(seed)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    count = max((count for _, count in shards.values()), default=1)
    locals_ = []
    for index in range(count):
        own = {}
        for name, tensor in whole.items():
            dim, parts = shards.get(name, (0, 1))
            chunks = tensor.chunk(parts, dim)
            chunk = chunks[index] if parts > 1 and index < len(chunks) else tensor.narrow(dim, 0, 0)
            own[name] = nn.Parameter((chunk if parts > 1 else tensor).clone())
        locals_.append(Bag(**own))
    return Bag(**{name: nn.Parameter(tensor) for name, tensor in whole.items()}), locals_


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_process_writes_its_part_and_puts_it_back(dim, count):
    shapes = {"w": (5, 6), "v": (5,)}
    plan = plan_of(
        Rewrite("w", (5, 6), "float32", 0.5, 2.0, 1.0, start=1, rows=(1, 4), columns=(1, 6)),
        Assign("v", (5,), "float32", (1.0, 2.0, 3.0, 4.0, 5.0)),
    )
    whole, locals_ = sharded(shapes, {"w": (dim, count), "v": (0, count)})
    before = [weights(model) for model in locals_]
    shards = [{"w": nz.Shard(dim, index, count), "v": nz.Shard(0, index, count)} for index in range(max(count, 1))]
    undos = [plan.apply(model, shards=own) for model, own in zip(locals_, shards, strict=True)]
    plan.apply(whole)
    assert same_bits(torch.cat([model.w for model in locals_], dim), whole.w)
    assert same_bits(torch.cat([model.v for model in locals_]), whole.v)
    for undo in undos:
        undo.restore()
    assert [weights(model) for model in locals_] == before


def test_a_merged_projection_is_found_by_a_table():
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(8, 4, generator=generator), torch.randn(4, 4, generator=generator)
    plan = plan_of(
        Rewrite("layers.0.q_proj.weight", (8, 4), "float32", 0.0, rows=(2, 6)),
        Rewrite("layers.0.k_proj.weight", (4, 4), "float32", -2.0),
    )
    for rank in range(2):
        merged = torch.cat([q[4 * rank : 4 * rank + 4], k[2 * rank : 2 * rank + 2]])
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"qkv": nn.Linear(4, 6, bias=False)})])})
        model["layers"][0]["qkv"].weight.data.copy_(merged)
        before = weights(model)
        table = {
            "*.q_proj.weight": nz.Shard(0, rank, 2, "*.qkv.weight"),
            "*.k_proj.weight": nz.Shard(0, rank, 2, "*.qkv.weight", start=4),
        }
        undo = plan.apply(model, shards=table)
        merged[2 - 2 * rank : 4 - 2 * rank] = 0
        merged[4:] *= -2
        assert same_bits(model["layers"][0]["qkv"].weight.detach(), merged)
        assert "freeze" in refusal(lambda model=model, table=table: plan.apply(model, shards=table, freeze=True))
        undo.restore()
        assert weights(model) == before


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        (nz.Shard(0, 0, 2), "expected [3, 6]"),
        (nz.Shard(2, 0, 2), "expected a dimension of 'w'"),
        (nz.Shard(0, 1, 2, "other"), "expected a tensor 'other'"),
        (nz.Shard(0, 1, 2, "w", start=4), "from 4 along dimension 0"),
        (nz.Shard(1, 0, 2, "w"), "expected [5, 3]"),
    ],
)
def test_a_shard_that_the_tensor_is_not_is_refused(shard, said):
    model = Bag(w=nn.Parameter(torch.ones(2, 6)))
    text = refusal(lambda: plan_of(Rewrite("w", (5, 6), "float32")).apply(model, shards={"w": shard}))
    assert said in text
    assert torch.equal(model.w, torch.ones(2, 6))


def test_what_needs_other_processes_is_refused_in_one_alone():
    model = Bag(w=nn.Parameter(torch.ones(5, 3)), b=nn.Parameter(torch.ones(5)))
    plan = plan_of(Fold("w", "b", (5, 6), "float32", 0.5, 1.0))
    text = refusal(lambda: plan.apply(model, shards={"w": nz.Shard(1, 0, 2)}))
    assert "expected the other parts for 'b += 1 (w 1), w <- 0.5 W'" in text
    model = Bag(w=nn.Parameter(torch.ones(3)), b=nn.Parameter(torch.ones(6)))
    text = refusal(lambda: plan_of(Copy("b", "w", (6,), "float32")).apply(model, shards={"w": nz.Shard(0, 0, 2)}))
    assert "expected the other parts" in text


def test_a_tensor_of_another_name_that_is_tied_to_a_third_is_refused():
    tied = nn.Parameter(torch.ones(4, 2))
    model = nn.ModuleDict({"embed": Bag(w=tied), "head": Bag(w=tied), "other": Bag(w=nn.Parameter(torch.ones(4, 2)))})
    plan = plan_of(Rewrite("a.w", (4, 2), "float32"))
    text = refusal(lambda: plan.apply(model, shards={"a.*": nz.Shard(0, 0, 1, "embed.*")}))
    assert "got a tensor that is also 'head.w'" in text
    plan.apply(model, shards={"a.*": nz.Shard(0, 0, 1, "other.*")})
    assert not model["other"].w.any()
    assert tied.all()


@pytest.mark.parametrize("numbers", [(-1, 0, 1), (0, 2, 2), (0, 0, 0), (0, -1, 2)])
def test_a_shard_counts_from_zero(numbers):
    assert "expected dim and start of 0 or more" in refusal(lambda: nz.Shard(*numbers))


def test_the_page_works_out_what_a_plan_for_405_billion_parameters_writes_on_64_gpus():
    """The figures of docs/distributed.md against the edits of a plan, cut row by row as torch.chunk cuts."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=2,
        num_attention_heads=128,
        num_key_value_heads=8,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    page = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    for edit, row, unit, digits in (("incoming", "norm gains", 1, 0), ("outgoing", "outgoing weights", 1e6, 1)):
        plan = nz.plan(model, "model.layers[1]", edit=edit)
        own = [
            [math.prod(torch.empty(e.shape, device="meta").chunk(64)[k].shape) for e in plan.edits] for k in range(64)
        ]
        assert all(parts == own[0] for parts in own)
        total, each = sum(e.written_bytes for e in plan.edits), 2 * sum(own[0])
        line = next(line for line in page.splitlines() if line.startswith(f"| {row}") and "1.6 MB" in line)
        assert 64 * each == total
        assert f"{total:,} bytes" in line or f"{total / 1e9:.2f} GB" in line
        assert f"| {each / unit:,.{digits}f} " in line
    assert round(2 * 64**2 * 200 / 1e6, 1) == 1.6
