"""Sharded models in real processes: the same bits as in the whole model, all or none of the processes writing."""

import copy
import functools
import json
import os
import pickle
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from edits import Every, every_edit, made_live, same_bits
from networks import GatedBlock, perturbed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import neutralize as nz
from neutralize import ops
from neutralize.distributed import team
from neutralize.distributed.part import plain
from neutralize.plan import Fold, Plan, Rewrite
from ranks import Ranks, here

FOLDED = {"first.bias", "second.bias", "half.bias", "conv.bias", "up.bias", "turned.bias"}
"""Sums over sharded inputs are taken in another order; all else must have the bits of the whole model."""


BACKENDS = ("gloo", "nccl")
"""Every test runs with both; ``here()`` is where the processes hold their tensors."""


def whole_of(model):
    """Every tensor of a sharded model, gathered by torch."""
    return {
        name: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor.detach().clone().cpu()
        for name, tensor in model.state_dict().items()
    }


def placed(mesh, placements):
    """A model whose parameters are DTensors."""
    model = Every().to(here())
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = [Shard(min(p.dim, parameter.dim() - 1)) if isinstance(p, Shard) else p for p in placements]
            module.register_parameter(name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, own)))
    return model


def fsdp(mesh):
    """A model that FSDP2 shards, each layer by itself (they have several dtypes), the rest at the root."""
    model = Every().to(here())
    for child in model.children():
        if not isinstance(child, nn.ParameterDict):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def apply_everywhere(build):
    """Build a sharded model, apply every kind of edit, and compare with the whole model; then restore."""
    torch.manual_seed(0)
    whole = Every()
    before = copy.deepcopy(whole.state_dict())
    edits = every_edit(whole)
    expected = made_live(whole, edits)
    model = build()
    local = [p.to_local().clone() if isinstance(p, DTensor) else p.clone() for p in model.parameters()]
    undo = Plan("by hand", edits, ()).apply(model)
    got = whole_of(model)
    exact = {name for name in got if same_bits({name: got[name]}, {name: expected[name]})}
    errors = {name: relative(got[name], expected[name]) for name in got if name not in exact}
    undo.restore()
    again = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    restored = all(torch.equal(one, other) for one, other in zip(local, again, strict=True))
    return errors, restored and same_bits(whole_of(model), before)


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def by_placements(shape, *placements):
    mesh = init_device_mesh(here().type, shape)
    return apply_everywhere(lambda: placed(mesh, placements))


def by_fsdp(shape):
    mesh = init_device_mesh(here().type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    return apply_everywhere(lambda: fsdp(mesh))


def check(answers):
    for errors, restored in answers:
        assert restored
        assert set(errors) <= FOLDED
        assert all(error < (4e-3 if name == "half.bias" else 2e-7) for name, error in errors.items())
    assert all(answer == answers[0] for answer in answers)  # replicas stay identical


@pytest.mark.parametrize(
    "placements",
    [
        (Shard(0),),
        (Shard(1),),
        (Shard(3),),
        (Replicate(),),
    ],
    ids=str,
)
def test_every_edit_on_two_processes(two, placements):
    answers = two.run(by_placements, (2,), *placements)
    check(answers)
    if placements[0] in (Shard(0), Replicate()):
        assert set(answers[0][0]) <= {"up.bias", "turned.bias"}  # whose weights have their inputs in dimension 0


@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((4,), (Shard(0),)),
        ((4,), (Shard(1),)),
        ((2, 2), (Shard(0), Shard(1))),
        ((2, 2), (Shard(1), Shard(1))),
        ((2, 2), (Replicate(), Shard(0))),
        ((2, 2), (Shard(2), Replicate())),
    ],
    ids=str,
)
def test_every_edit_on_four_processes(four, shape, placements):
    check(four.run(by_placements, shape, *placements))


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=["fsdp", "hybrid"])
def test_every_edit_under_fully_shard(four, shape):
    check(four.run(by_fsdp, shape))


# ---- models as users shard them --------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Blocks of attention and gated MLP between two linear layers."""

    def __init__(self, depth: int = 3, width: int = 16):
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(GatedBlock(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x, without=()):
        x = self.embed(x)
        for number, layer in enumerate(self.layers):
            if number not in without:
                x = layer(x)
        return self.head(x)


def stack():
    torch.manual_seed(0)
    return perturbed(Stack()).to(here())


def as_fsdp(model, **options):
    mesh = init_device_mesh(here().type, (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def as_mixed(model):
    return as_fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def as_kept(model):
    return as_fsdp(model, reshard_after_forward=False)


def as_compiled(model):
    model = as_fsdp(model)
    for layer in model.layers:
        layer.compile(backend="eager")
    return model


def as_tensor_parallel(model, mesh=None):
    mesh = mesh or init_device_mesh(here().type, (dist.get_world_size(),))
    for layer in model.layers:
        table = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(layer, mesh, table)
    return model


def as_both(model):
    mesh = init_device_mesh(here().type, (2, 2), mesh_dim_names=("data", "tensor"))
    as_tensor_parallel(model, mesh["tensor"])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def as_replicas(model):
    return nn.parallel.DistributedDataParallel(model)


STRATEGIES = {
    "auto": ("layers[1]", "auto", {}),
    "outgoing": ("layers[1]", "auto", {"edit": "outgoing"}),
    "incoming": ("layers[1]", "auto", {"edit": "incoming"}),
    "zero": ("layers[1].down", "zero", {}),
    "damp": ("layers[1]", "damp", {"factor": 0.25}),
    "a head": ("layers[1].heads[2]", "auto", {}),
}


X = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1))


@functools.cache
def whole_plan(strategy):
    """The plan that is made for the whole model."""
    layers, name, options = STRATEGIES[strategy]
    return nz.plan(stack(), layers, name, example_inputs=X, **options)


def neutralized(wrap, strategy, expected_plan, *, plans):
    """Plan on the sharded model (or take the plan of the whole one), apply, run, restore; beside it the whole model."""
    whole, model, x = stack(), wrap(stack()), X.to(here())
    layers, name, options = STRATEGIES[strategy]
    with torch.no_grad():
        intact, excised = model(x), model(x, without=(1,))
    plan = nz.plan(model, layers, name, example_inputs=x, **options) if plans else expected_plan
    before = whole_of(model)
    expected = copy.deepcopy(whole)
    expected_plan.apply(expected)
    with plan.applied(model, timeout=90.0):
        after = whole_of(model)
        names = {name.removeprefix("module."): tensor for name, tensor in after.items()}
        with torch.no_grad():
            off = model(x)
    with torch.no_grad():
        again = model(x)
    return {
        "digest": plan.digest == expected_plan.digest,
        "weights": same_bits(names, dict(expected.state_dict())),
        "off": torch.equal(off, excised),
        "changed": not torch.equal(off, intact),
        "restored": same_bits(whole_of(model), before) and torch.equal(again, intact),
    }


WRAPS = {"fsdp": as_fsdp, "tensor parallel": as_tensor_parallel, "both": as_both, "replicas": as_replicas}
FSDP_WRAPS = {"mixed precision": as_mixed, "kept whole": as_kept, "compiled": as_compiled}


@pytest.mark.parametrize("wrap", FSDP_WRAPS)
def test_what_fsdp_is_told_does_not_matter(two, wrap):
    run = functools.partial(neutralized, plans=False)
    assert all(all(answer.values()) for answer in two.run(run, FSDP_WRAPS[wrap], "outgoing", whole_plan("outgoing")))


def written_before_backward(plan):
    """A backward pass after the shards that its forward pass saw were written, and one of a new forward pass."""
    model = as_fsdp(stack())
    loss = model(X.to(here())).sum()
    undo = plan.apply(model)
    stale = failure(loss.backward)
    model = as_fsdp(stack())
    model(X.to(here())).sum().backward()
    undo = plan.apply(model)
    fresh = failure(lambda: model(X.to(here())).sum().backward())
    undo.restore()
    return stale, fresh, failure(lambda: model(X.to(here())).sum().backward())


def test_a_backward_pass_of_weights_that_are_gone_fails(two):
    for stale, fresh, restored in two.run(written_before_backward, whole_plan("outgoing")):
        assert "modified by an inplace operation" in stale
        assert (fresh, restored) == ("", "")


def trained(model, plan, steps=2):
    """Train a model with the plan applied and guarded; return its weights, and what momentum the optimizer has."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    plan.apply(model)
    with nz.guard(model, plan, optimizer):
        for _ in range(steps):
            model(X.to(here())).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    state = {
        name: optimizer.state[parameter]["exp_avg"]
        for name, parameter in model.named_parameters()
        if name in plan.parameters
    }
    return whole_of(model), {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}


def verified_and_guarded(plans):
    found = nz.verify(as_fsdp(stack()), plans["outgoing"], X.to(here()))
    held = []
    for plan in plans.values():
        whole = stack()
        plan.apply(whole)
        weights, momentum = trained(as_fsdp(stack()), plan)
        before, written = whole_of(stack()), whole_of(whole)
        kept = all(
            torch.equal(edit.block(weights[edit.parameter]), edit.block(written[edit.parameter]))
            and not edit.block(momentum[edit.parameter]).any()
            for edit in plan.edits
        )
        moved = all(not torch.equal(tensor, before[name]) for name, tensor in weights.items())
        held.append((kept, moved))
    text = failure(lambda: nz.guard(model := as_fsdp(stack()), plan, torch.optim.SGD(model.parameters())))
    return found.exact, found.relative_error, held, text


def test_a_sharded_model_is_verified_and_guarded_while_it_trains(two):
    plans = {name: whole_plan(name) for name in ("outgoing", "a head")}
    for exact, error, held, text in two.run(verified_and_guarded, plans):
        assert (exact, error) == (True, 0.0)
        assert held == [(True, True)] * 2
        assert "expected the plan to be applied" in text


def recorded(folder, plan, failing):
    """What is done to replicas and to shards of a model, in all processes; whose audit file each has open."""
    own, rewrite = folder / f"{dist.get_rank()}.jsonl", ops.rewrite_

    def broken(*args, **kwargs):
        raise RuntimeError("the kernel failed")

    with nz.audit(folder / "all.jsonl"), nz.audit(own):
        for wrap in (as_fsdp, as_replicas):
            model = wrap(stack())
            undo = plan.apply(model)
            with nz.guard(model, plan, torch.optim.SGD(model.parameters())):
                undo.save(folder / f"{dist.get_rank()}.undo")
            nz.Undo.load(folder / f"{dist.get_rank()}.undo", model).restore()
            nz.ramp(model, "layers[1]", steps=2, example_inputs=X).step()
        model = as_fsdp(stack())
        before = whole_of(model)
        if dist.get_rank() == failing:
            ops.rewrite_ = broken
        texts = [failure(lambda: plan.apply(model))]
        ops.rewrite_ = rewrite
        if dist.get_rank() == failing:
            own.unlink()
            own.mkdir()  # this process can record nothing any more
        texts.append(failure(lambda: plan.apply(model)))
    return texts, same_bits(whole_of(model), before)


def test_what_processes_do_together_is_one_line_of_the_audit(two, tmp_path):
    plan = whole_plan("outgoing")
    for (broken, unrecorded), restored in two.run(recorded, tmp_path, plan, 1):
        assert "the kernel failed" in broken
        assert "audit: expected a file that can be appended to" in unrecorded
        assert restored
    *told, failed = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert (failed["action"], failed["outcome"], failed["processes"]) == ("apply", "failed", 2)
    assert failed["error"] == "TeamError: the kernel failed [rank 1]"
    assert [entry["action"] for entry in told] == ["apply", "guard", "release", "restore", "ramp"] * 2
    assert {entry["processes"] for entry in told} == {2}
    assert {entry["bytes"] for entry in told if entry["action"] != "ramp"} == {plan.written_bytes}
    assert all(entry["layers"] == ["layers.1"] for entry in told)
    assert len({entry["pid"] for entry in told}) == 1
    assert (tmp_path / "0.jsonl").read_text().count("\n") == len(told) + 1


def faded(model, layers):
    """Fade layers step by step; yields the weights after each step, and those restored."""
    ramp = nz.ramp(model, layers, steps=3, example_inputs=X)
    for _ in range(3):
        ramp.step()
        yield whole_of(model)
    ramp.restore()
    yield whole_of(model)


def faded_everywhere(expected):
    return [same_bits(*pair) for pair in zip(faded(as_fsdp(stack()), "layers[1].heads[2]"), expected, strict=True)]


def test_a_sharded_model_is_switched_off_by_and_by(two):
    expected = list(faded(stack(), "layers[1].heads[2]"))
    assert two.run(faded_everywhere, expected) == [[True] * 4] * 2


def crossing(plan):
    """Two weights on two meshes that cross, as experts on one axis and attention on the other."""
    mesh = init_device_mesh(here().type, (2, 2), mesh_dim_names=("experts", "heads"))
    model, whole = stack(), stack()
    for name, axis in (("o", "heads"), ("down", "experts")):
        layer = getattr(model.layers[1], name)
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh[axis], [Shard(1)]))
    plan.apply(whole)
    undo = plan.apply(model)
    same = same_bits(whole_of(model), dict(whole.state_dict()))
    undo.restore()
    return same, same_bits(whole_of(model), dict(stack().state_dict()))


def test_meshes_that_cross_agree_as_one(four):
    assert four.run(crossing, whole_plan("outgoing")) == [(True, True)] * 4


def outside(placement):
    """A model on a mesh of two of four processes; the other two hold nothing of it, and do not wait."""
    model = nn.Linear(6, 4).to(here())
    for parameter in list(model.parameters()):
        parameter.data.fill_(2.0)
    mesh = DeviceMesh(here().type, [0, 1])
    for name in ("weight", "bias"):
        whole = getattr(model, name).detach()
        own = Shard(0) if whole.dim() == 1 and isinstance(placement, Shard) else placement
        setattr(model, name, nn.Parameter(distribute_tensor(whole, mesh, [own])))
    Plan("by hand", (Fold("weight", "bias", (4, 6), "float32", 0.5, 1.0),), ()).apply(model)
    return [plain(parameter.detach()).unique().tolist() for parameter in model.parameters()]


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_a_process_outside_the_mesh_holds_nothing_and_waits_for_nobody(four, placement):
    assert four.run(outside, placement) == [[[1.0], [14.0]]] * 2 + [[[], []]] * 2


def measured():
    layers = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)).to(here())
    model = fully_shard(layers, mesh=init_device_mesh(here().type, (dist.get_world_size(),)))
    calls = [{"strategy": "mean", "batches": [X]}, {}, {"input_bound": 4.0}]
    return [failure(lambda call=call: nz.plan(model, "0", example_inputs=X, **call)) for call in calls]


def test_what_has_to_run_the_model_is_refused_on_a_sharded_one(two):
    for mean, bound, bounded in two.run(measured):
        assert "mean: expected a model with whole weights, got a meta or sharded one" in mean
        assert "got no weights (this is a meta or sharded model)" in bound
        assert bounded == ""


def unsettled():
    """Sums that are not yet taken are no weights."""
    model = nn.Linear(4, 4).to(here())
    mesh = init_device_mesh(here().type, (dist.get_world_size(),))
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(4, 4, device=here()), mesh, [Partial()]))
    text = failure(lambda: Plan("by hand", (Rewrite("weight", (4, 4), "float32"),), ()).apply(model))
    return text, bool(model.weight.to_local().all())


def test_a_partial_placement_is_refused(two):
    for text, unwritten in two.run(unsettled):
        assert "expected shards or replicas for 'weight', got a DTensor placed as P(sum); redistribute it first" in text
        assert unwritten


@pytest.mark.parametrize(
    ("wrap", "strategy"),
    [(wrap, strategy) for wrap in ("fsdp", "tensor parallel", "both") for strategy in STRATEGIES]
    + [("replicas", "auto")],
)
def test_a_sharded_model_is_planned_for_written_and_restored(four, wrap, strategy):
    plans = strategy in ("auto", "a head")  # what a model is wrapped in is no matter of the strategy
    answers = four.run(functools.partial(neutralized, plans=plans), WRAPS[wrap], strategy, whole_plan(strategy))
    for answer in answers:
        exact = strategy in ("auto", "outgoing", "incoming")
        assert answer | {"off": True} == {
            "digest": True,
            "weights": True,
            "off": True,
            "changed": True,
            "restored": True,
        }
        assert answer["off"] or not exact


def experts_off():
    """One expert of a mixture in fused 3-D parameters, sharded along any of its dimensions."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    whole = perturbed(MixtralForCausalLM(config)).to(here())
    plan = nz.plan(whole, "model.layers[1].mlp.experts[1]")
    expected = copy.deepcopy(whole)
    plan.apply(expected)
    found = []
    for dim in range(3):
        model = copy.deepcopy(whole)
        mesh = init_device_mesh(here().type, (dist.get_world_size(),))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p, dim=dim: Shard(min(dim, p.dim() - 1)))
        undo = plan.apply(model)
        same = same_bits(whole_of(model), dict(expected.state_dict()))
        undo.restore()
        found.append((same, same_bits(whole_of(model), dict(whole.state_dict()))))
    return found


def test_an_expert_of_a_fused_mixture_is_off_on_any_sharding(two):
    assert two.run(experts_off) == [[(True, True)] * 3] * 2


def saved_and_loaded(folder):
    """The undo in a file per process; the edited model saved sharded, and loaded sharded otherwise."""
    rank = dist.get_rank()
    model = as_fsdp(stack())
    before = whole_of(model)
    plan = nz.plan(model, "layers[1]", edit="outgoing", example_inputs=torch.ones(1, 3, 16))
    plan.apply(model).save(folder / f"undo-{rank}.pt")
    after = whole_of(model)
    checkpoint.save(model.state_dict(), checkpoint_id=folder / "saved")
    other = stack()
    mesh = init_device_mesh(here().type, (dist.get_world_size(),))
    for layer in other.layers:
        parallelize_module(layer, mesh, {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()})
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=folder / "saved")
    carried = same_bits(whole_of(other), after)
    nz.Undo.load(folder / f"undo-{rank}.pt", model).restore()
    text = failure(lambda: nz.Undo.load(folder / f"undo-{rank}.pt", other))
    return carried, same_bits(whole_of(model), before), text


def test_an_edited_model_is_saved_loaded_and_restored_by_each_process(two, tmp_path):
    for carried, restored, text in two.run(saved_and_loaded, tmp_path):
        assert carried
        assert restored
        assert "sharded as it was" in text


class Embedded(nn.Module):
    """The first stage of a pipeline: its parameters have the names that they have in the whole model."""

    def __init__(self, whole, layers):
        super().__init__()
        self.embed = whole.embed
        self.layers = nn.ModuleDict({str(number): whole.layers[number] for number in layers})

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        return x


class Headed(nn.Module):
    """The last stage."""

    def __init__(self, whole, layers):
        super().__init__()
        self.layers = nn.ModuleDict({str(number): whole.layers[number] for number in layers})
        self.head = whole.head

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return self.head(x)


def pipelined(layers):
    """Two stages in two processes, run by torch's own schedule."""
    rank = dist.get_rank()
    whole = stack()
    x = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(1)).to(here())
    plan = nz.plan(whole, layers, example_inputs=x)
    expected = copy.deepcopy(whole)
    plan.apply(expected)
    module = Embedded(whole, [0]) if rank == 0 else Headed(whole, [1, 2])
    stage = PipelineStage(module, rank, 2, here())
    schedule = ScheduleGPipe(stage, n_microbatches=2)
    undo = plan.apply(module, partial=True)
    with torch.no_grad():
        out = schedule.step(*([x] if rank == 0 else []))
        same = rank == 0 or torch.allclose(out, expected(x), rtol=0, atol=1e-6)
    wrong = failure(lambda: plan.apply(nn.Identity() if rank == 0 else module, partial=True))
    undo.restore()
    names = dict(stack().named_parameters())
    return same, all(torch.equal(p, names[name]) for name, p in module.named_parameters()), wrong


def test_stages_of_a_pipeline_write_what_they_hold(two):
    for same, restored, wrong in two.run(pipelined, ["layers[0]", "layers[2]"]):
        assert same
        assert restored
        assert "expected stages that hold all parameters of the plan, got none with 'layers.0.entry.weight'" in wrong


# ---- failures: all processes raise, and none has written -------------------------------------------------------------


def failing(case, plan, seconds=60.0):
    """Apply in processes of which the last has something wrong; return what this one got."""
    last = dist.get_rank() == dist.get_world_size() - 1
    model = as_fsdp(stack())
    if case == "another plan" and last:
        plan = Plan("by hand", plan.edits[:1], ())
    elif case == "no parameter" and last:
        model.layers[1].entry = nn.Identity()
    elif case == "another shape" and last:
        model.layers[1].entry.weight = nn.Parameter(torch.ones(7, device=here()))
    elif case == "shared memory" and last:
        model.layers[1].entry.weight = nn.Parameter(torch.ones(1).expand(16))
    elif case == "late":
        time.sleep(2 * seconds if last else 0.0)
    elif case == "killed before" and last:
        os.kill(os.getpid(), signal.SIGKILL)
    before = whole_local(model)
    began = time.monotonic()
    writing = ops.rewrite_

    def broken(*arguments, **options):
        writing(*arguments, **options)
        if case == "killed between":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the device is gone")

    try:
        if case in ("writing", "killed between") and last:
            ops.rewrite_ = broken
        text = failure(lambda: plan.apply(model, timeout=seconds))
    finally:
        ops.rewrite_ = writing
    return text, time.monotonic() - began, same_bits(whole_local(model), before)


def whole_local(model):
    return {name: plain(tensor.detach()).clone() for name, tensor in model.named_parameters()}


def failure(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("another plan", "expected the same plan in all 2 processes, got 2 different ones"),
        ("no parameter", "got a model without it; plan for this model"),
        ("another shape", "expected shape [16] for 'layers.1.entry.weight', got [7]"),
        ("writing", "the device is gone"),
    ],
)
def test_a_process_that_cannot_fails_all(two, case, said):
    for text, seconds, unwritten in two.run(failing, case, whole_plan("auto")):
        assert said in text
        assert unwritten
        assert seconds < 30
    again = functools.partial(neutralized, plans=False)
    assert two.run(again, as_fsdp, "auto", whole_plan("auto"))[0]["restored"]  # and the next goes well


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("another plan", "expected the same plan in all 4 processes, got 2 different ones"),
        ("shared memory", "memory"),
        ("writing", "the device is gone"),
    ],
)
def test_one_of_four_that_cannot_fails_all(four, case, said):
    for text, _, unwritten in four.run(failing, case, whole_plan("auto")):
        assert said in text
        assert unwritten


@pytest.mark.parametrize("end", ["killed before", "killed between"])
def test_a_process_that_does_not_answer_fails_the_others_in_time(end):
    """Late, it fails all, and they can go on; killed before or after they have agreed, it fails the others."""
    ranks = Ranks(3)
    try:
        for case, plan in [("late", whole_plan("auto")), ("", whole_plan("auto")), (end, whole_plan("outgoing"))]:
            ranks.start(failing, case, plan, 5.0)
            for rank in range(3 if case != end else 2):
                text, seconds, unwritten = ranks.result(rank)
                assert seconds < 11
                assert unwritten == (case != "")
                if case:
                    assert "TeamError: apply: expected an answer of all 3 processes within 5 s" in text
                else:
                    assert text == ""
    finally:
        ranks.close()


def test_who_gives_up_and_who_goes_on_decide_as_one(monkeypatch):
    """Who is out of time goes on all the same if the others do; who comes after another has given up does not."""
    store = dist.HashStore()
    monkeypatch.setattr(team, "store_of", lambda prefix: dist.PrefixStore(prefix, store))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    key = f"neutralize/0.1/{team._COUNTS.get((0, 1), 0) + 1}"
    store.set(f"{key}/verdict", "go on")
    waiting = dist.PrefixStore.wait

    def late(self, keys, waited):
        store.set(f"{key}/1", pickle.dumps(("", "theirs", None)))
        raise RuntimeError("timeout")

    monkeypatch.setattr(dist.PrefixStore, "wait", late)
    assert team.Team((0, 1)).exchange("apply", "", "ours") == ["ours", "theirs"]
    monkeypatch.setattr(dist.PrefixStore, "wait", waiting)
    key = f"neutralize/0.1/{team._COUNTS[0, 1] + 1}"
    store.set(f"{key}/verdict", "give up")
    store.set(f"{key}/1", pickle.dumps(("", "theirs", None)))
    assert "another process has given up waiting" in failure(lambda: team.Team((0, 1)).exchange("apply", "", "ours"))
