"""Apply a plan to a live model: the one place that changes its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parameter import is_lazy

from neutralize import adapters, ops, reference
from neutralize.audit import Deed, audited, recording
from neutralize.distributed.folds import own_pairs, own_sums, total
from neutralize.distributed.part import Block, Held, Part, Shard, Window, names_in, own_tensors, parts_of, whole_shape
from neutralize.distributed.team import Team, TeamError, same_plan, team_of
from neutralize.distributed.wrapped import note_written, resharded
from neutralize.errors import NeutralizeError
from neutralize.offload import offloaded
from neutralize.plan import TIMEOUT, Assign, Copy, Edit, Fold, Plan, Rewrite, changed_again, dtype_name
from neutralize.select import tensors_of, unwrap
from neutralize.undo import Saved, Undo, bytes_of, open_on, overwrite_

_SMALL_RANGE = 1e6
"""Formats whose largest number is below this: a weight times 1/ε may leave float16 and the 8-bit formats."""


def aliases_of(named: dict[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """For each name, the names (its own first) whose tensors share memory with it."""
    storages: dict[object, list[tuple[int, int, str]]] = {}
    for name, tensor in named.items():
        storage, begin, end = _span(tensor)
        storages.setdefault(storage, []).append((begin, end, name))
    shared: dict[str, set[str]] = {name: {name} for name in named}
    for spans in storages.values():
        reaching: list[tuple[int, str]] = []  # spans that began earlier, with their ends
        for begin, end, name in sorted(spans):
            reaching = [(other_end, other) for other_end, other in reaching if other_end > begin]
            for _, other in reaching:
                shared[name].add(other)
                shared[other].add(name)
            reaching.append((end, name))
    place = {name: number for number, name in enumerate(named)}
    return {name: (name, *sorted(shared[name] - {name}, key=place.__getitem__)) for name in named}


def _span(tensor: torch.Tensor) -> tuple[object, int, int]:
    """The device that holds the tensor's elements, and its addresses from the first to past the last.

    Two storages may lie in the same memory, as those of slices of a numpy array do. A tensor without memory that could
    be looked at (meta, lazy, sparse, empty, a subclass) is its own holder.
    """
    itself = (id(tensor), 0, 1)
    if is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_meta:
        return itself
    try:
        address = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return itself
    if address == 0 or tensor.numel() == 0:
        return itself
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    itemsize = tensor.element_size()
    begin = address + int(tensor.storage_offset()) * itemsize
    return tensor.device, begin, begin + (last + 1) * itemsize


@dataclass(frozen=True)
class _Intent:
    """What a process is about to do: what the others must know before any of them writes.

    Attributes:
        digest: of the plan.
        here: the edits that it writes, or writes a part of.
        begins: the edits that begin a batch.
        lacking: the folds whose sums need elements that other processes hold.
        held: which elements it holds of what is folded or copied, by name.
        pieces: its elements of what is copied, where that is not all of them.
        audits: the audit files that are open in it.
    """

    digest: str
    here: frozenset[int]
    begins: frozenset[int]
    lacking: frozenset[int]
    held: dict[str, Held]
    pieces: dict[str, torch.Tensor]
    audits: tuple[Path, ...]


def apply_plan(
    plan: Plan,
    model: object,
    *,
    freeze: bool = False,
    shards: Mapping[str, Shard] | None = None,
    partial: bool = False,
    group: Any = None,
    timeout: float = TIMEOUT,
    is_trial: bool = False,
) -> Undo:
    """Check the whole plan against ``model``, copy what will be overwritten, then write.

    Args:
        plan: the plan.
        model: a model with the parameters that the plan names.
        freeze: set ``requires_grad`` of the written parameters to false and drop their gradients, so that optimizers
            pass them over.
        shards: which parts of parameters this process holds in plain tensors, by name or by a glob with one ``*``.
        partial: the model is one of the stages that the processes of the group have: edits of parameters that it lacks
            are left to them.
        group: the process group whose members hold the model together; by default that of the DTensors' meshes, of
            ``DistributedDataParallel``, or with ``shards`` or ``partial`` all processes.
        timeout: seconds to wait for the other processes.
        is_trial: it is put back at once, and so not recorded in the audit.

    Returns:
        The undo.

    Raises:
        NeutralizeError: something does not fit, here or in another process; every problem is listed and nothing was
            written.
    """
    module = unwrap(model)
    resharded(module)
    held, refused = offloaded(module)
    refused |= adapters.moved(module, (name for edit in plan.edits for name in names_in(edit)))
    named = tensors_of(module) | held
    team = team_of(model, named.values(), group, timeout, together=bool(shards) or partial)
    with nullcontext() if team is None else team.telling("apply"):
        parts, problems = parts_of(plan, named, shards or {}, refused, partial=partial)
        here = frozenset(number for number, edit in enumerate(plan.edits) if {*names_in(edit)} <= parts.keys())
        edits = [plan.edits[number] for number in sorted(here)]
        aliases = aliases_of(own_tensors(named, parts, shards or {}))
        problems += [*_divided(plan, parts, partial=partial), *_problems(edits, plan.tied, parts, aliases)]
        problems += [*_parted(plan, held, aliases), *(_alone(edits, parts) if team is None else ())]
        problems += adapters.unmet(module, plan.layers)
        problems += _merged(edits, parts) if freeze else ()
        problems += () if problems else _applied_already(plan, edits, parts)
        if problems:
            problems = list(dict.fromkeys(problems))
            listing = "".join(f"\n  - {problem}" for problem in problems)
            raise NeutralizeError(
                f"apply: expected a plan that fits the model, got {len(problems)} problem(s):{listing}"
            )
        saved = [entry for edit, name in _first_writes(edits) for entry in _save(parts[name], edit, name)]
        with nullcontext() if is_trial else recording() as record:
            own = _intent(plan, here, parts, aliases, () if is_trial else audited())
            intents = _agreed(plan, [own] if team is None else team.exchange("apply", "its begin", own))
            written_bytes = bytes_of(saved) if team is None else plan.written_bytes
            deed = Deed.of(plan, "apply", module, written_bytes, processes=len(intents))
            earlier = () if team is None else intents[: team.ranks.index(dist.get_rank())]
            files = tuple(path for path in own.audits if not any(path in other.audits for other in earlier))
            undo = Undo(saved, deed, module, files=files, leads=team is None or team.leads)
            try:
                copies = {edit: _copied(edit, parts, intents) for edit in edits if isinstance(edit, Copy)}
                lacking = frozenset().union(*(intent.lacking for intent in intents))
                for batch in _batches(len(plan.edits), frozenset().union(*(intent.begins for intent in intents))):
                    sums = {}
                    if team is not None and lacking & set(batch):
                        sums = _summed(plan, sorted(lacking & set(batch)), parts, intents, team)
                    _write([plan.edits[number] for number in batch if number in here], parts, copies, sums)
                if freeze:
                    for entry in saved:
                        if entry.tensor.requires_grad and entry.tensor.is_leaf:
                            entry.tensor.requires_grad_(False)
                            entry.tensor.grad = None  # an optimizer steps whatever has a gradient, frozen or not
                if team is not None:
                    team.exchange("apply", "its end", None)  # all have written
                if record is not None:
                    record(deed, None, files)
                if team is not None and any(intent.audits for intent in intents):
                    team.exchange("apply", "its audit", None)
            except BaseException as error:
                with suppress(NeutralizeError):  # what went wrong first is what is told
                    if record is not None:
                        record(deed, error, files)
                undo.put_back()
                raise
    torch.clear_autocast_cache()  # it holds casts of the old weights for as long as the caller's autocast lasts
    note_written(module, (entry.tensor for entry in saved))
    return undo


def _intent(
    plan: Plan,
    here: frozenset[int],
    parts: dict[str, Part],
    aliases: dict[str, tuple[str, ...]],
    audits: tuple[Path, ...],
) -> _Intent:
    folds = {number: edit for number in here if isinstance(edit := plan.edits[number], Fold)}
    copied = {edit.source for number in here if isinstance(edit := plan.edits[number], Copy)}
    return _Intent(
        plan.digest,
        here,
        _beginnings(plan.edits, aliases),
        frozenset(number for number, edit in folds.items() if own_pairs(edit, *_of(edit, parts)) is None),
        {name: parts[name].held for name in (*copied, *(edit.parameter for edit in folds.values()))},
        {name: parts[name].local.cpu().clone() for name in copied if not parts[name].is_whole},
        audits,
    )


def _agreed(plan: Plan, intents: list[_Intent]) -> list[_Intent]:
    """The intents, if they are of one plan, and of all of it: what this finds every process finds."""
    same_plan(intent.digest for intent in intents)
    missing = set(range(len(plan.edits))).difference(*(intent.here for intent in intents))
    if missing:
        names = dict.fromkeys(name for number in sorted(missing) for name in plan.edits[number].parameters)
        raise TeamError(
            f"apply: expected stages that hold all parameters of the plan, got none with "
            f"{', '.join(map(repr, list(names)[:8]))}; plan for this model, or name the group of all its stages"
        )
    return intents


def _of(edit: Fold, parts: dict[str, Part]) -> tuple[Part, Part]:
    return parts[edit.parameter], parts[edit.bias]


def _copied(edit: Copy, parts: dict[str, Part], intents: list[_Intent]) -> torch.Tensor:
    """What a copy writes here."""
    source, target = parts[edit.source], parts[edit.parameter]
    if source.is_whole or source.held == target.held:
        values = edit.values(source.local)
        return target.pick(values) if source.is_whole else values
    whole = torch.full(edit.shape, torch.nan, dtype=source.tensor.dtype)
    for intent in intents:
        if edit.source in intent.pieces:
            replace(source, runs=intent.held[edit.source]).put(whole, intent.pieces[edit.source])
    if whole.isnan().any():  # its own were looked for before
        raise NeutralizeError(
            f"apply: expected parts that cover {edit.source!r}, got others; name the group of the processes that hold "
            "the model"
        )
    return target.pick(edit.values(whole))


def _summed(
    plan: Plan, numbers: list[int], parts: dict[str, Part], intents: list[_Intent], team: Team
) -> dict[Fold, torch.Tensor]:
    """The row sums of folds over the elements of all processes, (out,) in float64."""
    folds = [edit for number in numbers if isinstance(edit := plan.edits[number], Fold)]
    own = [
        own_sums(edit, parts[edit.parameter]).to_sparse() if {*edit.parameters} <= parts.keys() else None
        for edit in folds  # of the outputs that are not held here there is nothing to send
    ]
    answers = team.exchange("apply", f"the sums for edit {numbers[0]}", own)
    return {
        edit: total(
            [
                (intent.held[edit.parameter], part.to_dense())
                for intent, sums in zip(intents, answers, strict=True)
                if (part := sums[place]) is not None
            ],
            edit,
        )
        for place, edit in enumerate(folds)
    }


def _problems(
    edits: list[Edit], tied: tuple[tuple[str, ...], ...], parts: dict[str, Part], aliases: dict[str, tuple[str, ...]]
) -> list[str]:
    accepted = [set(group) for group in tied]
    problems: list[str] = []
    for edit in edits:
        for name in edit.parameters:
            problems.extend(_tensor_problems(edit, name, parts[name]))
            if isinstance(edit, Copy):
                problems.extend(_source_problems(edit, parts[edit.source]))
            foreign = set(aliases[name]) - {name}
            if foreign and not any({name, *foreign} <= group for group in accepted):
                others = ", ".join(sorted(map(repr, foreign)))
                problems.append(
                    f"expected {name!r} to be no other layer's, got a tensor that is also {others}; untie them first "
                    "(clone the parameter), or select both layers"
                )
    return problems or list(_overflows(edits, parts))


def _overflows(edits: list[Edit], parts: dict[str, Part]) -> Iterator[str]:
    """Weights that a rescale would take out of a format of a small range: the plan may be of other weights, or of none.

    What the plan sets itself and then rescales is checked when it is made.
    """
    written: set[str] = set()
    for edit in edits:
        weight = parts[edit.parameter]
        limit = torch.finfo(weight.tensor.dtype).max
        rescales = isinstance(edit, Fold) or (isinstance(edit, Rewrite) and abs(edit.scale) > 1)
        if rescales and limit < _SMALL_RANGE and not written & set(edit.parameters):
            assert isinstance(edit, Rewrite | Fold)
            local = weight.local
            peaks = [float(_largest(placed.window(local))) for placed in weight.block(_rewriting(edit))]
            grown = {edit.parameter: abs(edit.scale) * max(peaks, default=0.0)}
            for rows, bias in (own_pairs(edit, *_of(edit, parts)) or ()) if isinstance(edit, Fold) else ():
                assert isinstance(edit, Fold)
                peak = float(_largest(bias.float() + edit.shift * rows.float().flatten(1).sum(1)))
                grown[edit.bias] = max(peak, grown.get(edit.bias, 0.0))
            for name, peak in grown.items():
                if limit < peak < math.inf:  # infinite weights are the model's own
                    yield (
                        f"expected {name!r} to stay inside {edit.dtype} when '{edit.describe()}' is written, got "
                        f"{peak:.3g}; plan for the weights of this model, or use a wider dtype"
                    )
        written.update(edit.parameters)


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().abs().max() if tensor.numel() else torch.zeros(())


def _parted(plan: Plan, held: dict[str, torch.Tensor], aliases: dict[str, tuple[str, ...]]) -> list[str]:
    """Tied parameters that the plan writes once and that are offloaded in more than one copy."""
    written = set(plan.parameters)
    return [
        f"expected {name!r} and {other!r} to be offloaded as the one tensor that they are, got two; offload to the CPU"
        for group in plan.tied
        for name in group
        for other in group
        if name in written and {name, other} <= held.keys() and other not in aliases[name]
    ]


def _divided(plan: Plan, parts: dict[str, Part], *, partial: bool) -> Iterator[str]:
    """Edits of which a stage holds one parameter and lacks another."""
    for edit in plan.edits if partial else ():
        lacking = [name for name in names_in(edit) if name not in parts]
        if 0 < len(lacking) < len(names_in(edit)):
            yield (
                f"expected all parameters of '{edit.describe()}' in one stage, got one without {lacking[0]!r}; cut the "
                "stages elsewhere"
            )


def _alone(edits: list[Edit], parts: dict[str, Part]) -> Iterator[str]:
    """Edits that need elements of other processes, where there are none to ask."""
    for edit in edits:
        lacks = False
        if isinstance(edit, Fold):
            lacks = own_pairs(edit, *_of(edit, parts)) is None
        elif isinstance(edit, Copy):
            lacks = not parts[edit.source].is_whole and parts[edit.source].held != parts[edit.parameter].held
        if lacks:
            yield (
                f"expected the other parts for '{edit.describe()}', got a process on its own; start the processes "
                "with torchrun, and initialize torch.distributed"
            )


def _merged(edits: list[Edit], parts: dict[str, Part]) -> Iterator[str]:
    """Parameters that cannot be frozen alone."""
    for name in (name for edit in edits for name in edit.parameters):
        if parts[name].inside != Window():
            yield f"expected a tensor of its own for {name!r} to freeze, got a part of another; leave freeze out"


def _tensor_problems(edit: Edit, name: str, part: Part) -> Iterable[str]:
    shape, tensor = whole_shape(edit, name), part.local
    if part.shape != tuple(shape):
        yield f"expected shape {list(shape)} for {name!r}, got {list(part.shape)}; plan for this model"
    if dtype_name(tensor.dtype) != edit.dtype:
        yield f"expected dtype {edit.dtype} for {name!r}, got {dtype_name(tensor.dtype)}; plan for this model"
    if tensor.dtype not in ops.DTYPES:
        known = ", ".join(dtype_name(dtype) for dtype in ops.DTYPES)
        yield f"expected one of {known} for {name!r}, got {dtype_name(tensor.dtype)}; dequantize it first"
        return
    if tensor.is_meta:
        yield f"expected {name!r} to hold data, got a meta tensor; load the weights first"
    kind = type(tensor)
    if tensor.layout != torch.strided:
        yield f"expected {name!r} to be dense, got {tensor.layout}; call to_dense() first"
    elif kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        yield f"expected {name!r} to be a plain tensor, got a {kind.__name__}; apply to the plain tensors inside it"
    elif not ops.is_held(tensor):
        yield f"expected {name!r} to hold data, got a tensor whose memory was freed; gather the weights first"
    elif any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        yield f"expected {name!r} to have memory for every element, got an expanded tensor; call contiguous() first"
    elif name == edit.parameter and part.shape == tuple(shape) and not _has_block(edit, part):
        yield f"expected {name!r} to be one matrix in memory, got strides {tensor.stride()}; call contiguous() first"
    if name == edit.parameter:
        for coefficient, value, limit in bounded_values(edit, tensor.dtype):
            if abs(value) > limit:
                yield (
                    f"expected {coefficient} within {limit:.6g} for {name!r} ({edit.dtype}), got {value:.6g}; "
                    "give a smaller one"
                )


def _source_problems(edit: Copy, part: Part) -> Iterable[str]:
    source = part.local
    if part.shape != edit.shape or source.dtype not in ops.DTYPES:
        yield (
            f"expected {list(edit.shape)} of a floating-point type for {edit.source!r}, got {list(part.shape)} of "
            f"{dtype_name(source.dtype)}; plan for this model"
        )
    elif not source.is_meta and not edit.values(source).isfinite().all():
        yield f"expected finite values in {edit.dtype} for {edit.describe()!r}, got Inf or NaN; use a wider dtype"


def _has_block(edit: Edit, part: Part) -> bool:
    if isinstance(edit, Assign | Copy):
        return True
    try:
        for placed in part.block(_rewriting(edit)):
            placed.window(part.local)
    except RuntimeError:  # no view of these strides
        return False
    return True


def bounded_values(edit: Edit, dtype: torch.dtype) -> Iterable[tuple[str, float, float]]:
    """What an edit stores as it is, and what it computes with: name, value, and the largest magnitude allowed."""
    stored, computed = torch.finfo(dtype).max, torch.finfo(reference.compute_dtype(dtype)).max
    if isinstance(edit, Rewrite):
        yield "scale", edit.scale, computed
        yield "fill", edit.fill, stored
        if edit.diagonal:
            yield "diagonal + fill", edit.diagonal + edit.fill, stored
    elif isinstance(edit, Fold):
        yield "scale", edit.scale, computed
        yield "shift", edit.shift, computed
    elif isinstance(edit, Assign):
        yield "a value", max(edit.values, key=abs, default=0.0), stored


def _applied_already(plan: Plan, edits: Sequence[Edit], parts: Mapping[str, Part]) -> Iterator[str]:
    """Say that the plan is on the model, where it would change a second time what it has changed.

    It is known by an undo that was not restored, and by what it sets, which is all there.
    """
    fixed = [edit for edit in edits if isinstance(edit, Rewrite) and edit.scale == 0]
    name = changed_again(edits)
    if not name:
        return
    applied = {undo.digest for undo in open_on(parts[fixed[0].parameter].tensor)}
    if not applied or plan.digest not in applied:  # the digest is work
        return
    for edit in fixed:
        part = parts[edit.parameter]
        for placed in part.block(edit):
            now = placed.window(part.local)
            wanted, start = now.clone(), placed.start(edit)
            ops.rewrite_([wanted], diagonal=edit.diagonal, fill=edit.fill, start=start, step=edit.step)
            if not torch.equal(now, wanted):
                return
    yield (
        f"expected a plan that is not applied, got one that is, and would change {name!r} a second time; call "
        "restore() of its undo first"
    )


def _first_writes(edits: Iterable[Edit]) -> Iterable[tuple[Edit, str]]:
    """Each (edit, tensor) to copy: a tensor that is already copied whole needs no second copy."""
    whole: set[str] = set()
    for edit in edits:
        for name in edit.parameters:
            if name in whole:
                continue
            if not isinstance(edit, Rewrite) or (edit.rows is None and edit.columns is None):
                whole.add(name)
            yield edit, name


def _rewriting(edit: Rewrite | Fold) -> Rewrite:
    """What becomes of the edit's parameter, as a rewrite."""
    return edit.rescale if isinstance(edit, Fold) else edit


def _save(part: Part, edit: Edit, name: str) -> Iterator[Saved]:
    windows = [placed.window for placed in part.block(edit)] if isinstance(edit, Rewrite) else [Window()]
    for window in windows:
        block = Block(part.inside, window)
        values = block(part.tensor.detach()).clone()
        yield Saved(name, part.tensor, block, values, part.tensor.requires_grad, part.tensor.shape)


def _beginnings(edits: tuple[Edit, ...], aliases: dict[str, tuple[str, ...]]) -> frozenset[int]:
    """The edits at which a new batch begins: one has edits of one kind that touch no memory twice."""
    begins = set()
    touched: set[str] = set()
    for number, edit in enumerate(edits):
        if number == 0 or type(edit) is not type(edits[number - 1]) or touched & set(edit.parameters):
            begins.add(number)
            touched = set()
        touched.update(alias for name in edit.parameters for alias in aliases.get(name, (name,)))
    return frozenset(begins)


def _batches(count: int, begins: frozenset[int]) -> Iterator[list[int]]:
    """The numbers of edits that are written together, each batch by one call of an op."""
    starts = sorted(begins)
    for first, last in zip(starts, [*starts[1:], count], strict=False):
        yield list(range(first, last))


def _write(
    batch: list[Edit], parts: dict[str, Part], copies: dict[Copy, torch.Tensor], sums: dict[Fold, torch.Tensor]
) -> None:
    rewrites = [(edit, parts[edit.parameter]) for edit in batch if isinstance(edit, Rewrite)]
    folds = [edit for edit in batch if isinstance(edit, Fold)]
    for edit in folds:
        if edit in sums:
            bias = parts[edit.bias]
            added = reference.compute_dtype(bias.tensor.dtype)
            shifted = bias.pick(sums[edit]).to(bias.local.device, added).mul_(edit.shift).add_(bias.local.to(added))
            overwrite_(bias.local, shifted)
    rewrite_parts_(rewrites + [(edit.rescale, parts[edit.parameter]) for edit in folds if edit in sums])
    pairs = [(edit, *pair) for edit in folds if edit not in sums for pair in own_pairs(edit, *_of(edit, parts)) or ()]
    if pairs:
        ops.rescale_fold_(
            [weight for _, weight, _ in pairs],
            [bias for _, _, bias in pairs],
            scale=[edit.scale for edit, _, _ in pairs],
            shift=[edit.shift for edit, _, _ in pairs],
        )
    for other in batch:
        part = parts[other.parameter]
        if isinstance(other, Assign):
            overwrite_(part.local, part.pick(torch.tensor(other.values, dtype=torch.float64).reshape(other.shape)))
        elif isinstance(other, Copy):
            overwrite_(part.local, copies[other])


def rewrite_parts_(edits: list[tuple[Rewrite, Part]]) -> None:
    """Rewrite the blocks that a process holds."""
    found = [(edit, placed, placed.window(part.local)) for edit, part in edits for placed in part.block(edit)]
    if found:
        ops.rewrite_(
            [block for _, _, block in found],
            scale=[edit.scale for edit, _, _ in found],
            diagonal=[edit.diagonal for edit, _, _ in found],
            fill=[edit.fill for edit, _, _ in found],
            start=[placed.start(edit) for edit, placed, _ in found],
            step=[edit.step for edit, _, _ in found],
        )
