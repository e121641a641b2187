"""Apply a plan to a live model: the one place that changes its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from neutralize import ops, reference
from neutralize.errors import NeutralizeError
from neutralize.offload import offloaded
from neutralize.plan import Assign, Copy, Edit, Fold, Plan, Rewrite, dtype_name
from neutralize.select import unwrap
from neutralize.undo import Saved, Undo, overwrite_

_SMALL_RANGE = 1e6
"""Formats whose largest number is below this: a weight times 1/ε may leave float16 and the 8-bit formats."""


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by every one of its qualified names."""
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


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
    """What holds the tensor's elements, and the bytes of it from the first to past the last.

    A tensor without memory that could be looked at (meta, lazy, sparse, empty, a subclass) is its own holder.
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
    begin = int(tensor.storage_offset())
    itemsize = tensor.element_size()
    return (tensor.device, address), begin * itemsize, (begin + last + 1) * itemsize


def apply_plan(plan: Plan, model: object, *, freeze: bool = False) -> Undo:
    """Check the whole plan against ``model``, copy what will be overwritten, then write.

    Args:
        plan: the plan.
        model: a model with the parameters that the plan names.
        freeze: set ``requires_grad`` of the written parameters to false and drop their gradients, so that optimizers
            pass them over.

    Returns:
        The undo.

    Raises:
        NeutralizeError: something does not fit; every problem is listed and nothing was written.
    """
    module = unwrap(model)
    held, refused = offloaded(module)
    named = tensors_of(module) | held
    aliases = aliases_of(named)
    problems = _problems(plan, named, aliases, refused) + _parted(plan, held, aliases)
    if problems:
        listing = "".join(f"\n  - {problem}" for problem in problems)
        raise NeutralizeError(f"apply: expected a plan that fits the model, got {len(problems)} problem(s):{listing}")
    saved = [_save(named, edit, name) for edit, name in _first_writes(plan.edits)]
    undo = Undo(saved, plan.digest, module)
    copies = {edit: edit.values(named[edit.source]) for edit in plan.edits if isinstance(edit, Copy)}
    try:
        for batch in _batches(plan.edits, aliases):
            _write(batch, named, copies)
        if freeze:
            for entry in saved:
                if entry.tensor.requires_grad and entry.tensor.is_leaf:
                    entry.tensor.requires_grad_(False)
                    entry.tensor.grad = None  # an optimizer steps whatever has a gradient, frozen or not
    except BaseException:
        undo.restore()
        raise
    torch.clear_autocast_cache()  # it holds casts of the old weights for as long as the caller's autocast lasts
    return undo


def _problems(
    plan: Plan, named: dict[str, torch.Tensor], aliases: dict[str, tuple[str, ...]], refused: dict[str, str]
) -> list[str]:
    accepted = [set(group) for group in plan.tied]
    problems = []
    for edit in plan.edits:
        for name in edit.parameters:
            tensor = named.get(name)
            if name in refused:
                problems.append(refused[name])
                continue
            if tensor is None:
                problems.append(f"expected a parameter {name!r}, got a model without it; plan for this model")
                continue
            if is_lazy(tensor):
                problems.append(f"expected {name!r} to hold data, got a lazy parameter; run the module once first")
                continue
            problems.extend(_tensor_problems(edit, name, tensor))
            if isinstance(edit, Copy):
                problems.extend(_source_problems(edit, named.get(edit.source)))
            foreign = set(aliases[name]) - {name}
            if foreign and not any({name, *foreign} <= group for group in accepted):
                others = ", ".join(sorted(map(repr, foreign)))
                problems.append(
                    f"expected {name!r} to be no other layer's, got a tensor that is also {others}; untie them first "
                    "(clone the parameter), or select both layers"
                )
    return list(dict.fromkeys(problems or _overflows(plan, named)))


def _overflows(plan: Plan, named: dict[str, torch.Tensor]) -> Iterator[str]:
    """Weights that a rescale would take out of a format of a small range: the plan may be of other weights, or of none.

    What the plan sets itself and then rescales is checked when it is made.
    """
    written: set[str] = set()
    for edit in plan.edits:
        limit = torch.finfo(named[edit.parameter].dtype).max
        rescales = isinstance(edit, Fold) or (isinstance(edit, Rewrite) and abs(edit.scale) > 1)
        if rescales and limit < _SMALL_RANGE and not written & set(edit.parameters):
            assert isinstance(edit, Rewrite | Fold)
            grown = {edit.parameter: abs(edit.scale) * float(_largest(edit.block(named[edit.parameter].detach())))}
            if isinstance(edit, Fold):
                grown[edit.bias] = max(
                    float(_largest(bias.float() + edit.shift * weight.float().flatten(1).sum(1)))
                    for weight, bias in edit.pairs(named[edit.parameter].detach(), named[edit.bias].detach())
                )
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


def _tensor_problems(edit: Edit, name: str, tensor: torch.Tensor) -> Iterable[str]:
    shape = edit.shape if name == edit.parameter else (edit.bias_numel,) if isinstance(edit, Fold) else ()
    if tuple(tensor.shape) != tuple(shape):
        yield f"expected shape {list(shape)} for {name!r}, got {list(tensor.shape)}; plan for this model"
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
    elif name == edit.parameter and tuple(tensor.shape) == tuple(shape) and not _has_block(edit, tensor):
        yield f"expected {name!r} to be one matrix in memory, got strides {tensor.stride()}; call contiguous() first"
    if name == edit.parameter:
        for coefficient, value, limit in bounded_values(edit, tensor.dtype):
            if abs(value) > limit:
                yield (
                    f"expected {coefficient} within {limit:.6g} for {name!r} ({edit.dtype}), got {value:.6g}; "
                    "give a smaller one"
                )


def _source_problems(edit: Copy, source: torch.Tensor | None) -> Iterable[str]:
    if source is None:
        yield f"expected a parameter {edit.source!r}, got a model without it; plan for this model"
    elif tuple(source.shape) != edit.shape or source.dtype not in ops.DTYPES:
        yield (
            f"expected {list(edit.shape)} of a floating-point type for {edit.source!r}, got {list(source.shape)} of "
            f"{dtype_name(source.dtype)}; plan for this model"
        )
    elif not source.is_meta and not edit.values(source).isfinite().all():
        yield f"expected finite values in {edit.dtype} for {edit.describe()!r}, got Inf or NaN; use a wider dtype"


def _has_block(edit: Edit, tensor: torch.Tensor) -> bool:
    try:
        return isinstance(edit, Assign | Copy) or edit.block(tensor) is not None
    except RuntimeError:  # no view of these strides
        return False


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


def _save(named: dict[str, torch.Tensor], edit: Edit, name: str) -> Saved:
    block = edit.block if isinstance(edit, Rewrite) else _whole
    tensor = named[name]
    return Saved(name, tensor, block, block(tensor.detach()).clone(), tensor.requires_grad, tensor.shape)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _batches(edits: tuple[Edit, ...], aliases: dict[str, tuple[str, ...]]) -> Iterable[list[Edit]]:
    """Runs of edits of one kind that touch no memory twice: each is one call of an op."""
    batch: list[Edit] = []
    touched: set[str] = set()
    for edit in edits:
        if batch and (type(edit) is not type(batch[0]) or touched & set(edit.parameters)):
            yield batch
            batch, touched = [], set()
        batch.append(edit)
        touched.update(alias for name in edit.parameters for alias in aliases[name])
    if batch:
        yield batch


def _write(batch: list[Edit], named: dict[str, torch.Tensor], copies: dict[Copy, torch.Tensor]) -> None:
    rewrites = [edit for edit in batch if isinstance(edit, Rewrite)]
    if rewrites:
        ops.rewrite_(
            [edit.block(named[edit.parameter].detach()) for edit in rewrites],
            scale=[edit.scale for edit in rewrites],
            diagonal=[edit.diagonal for edit in rewrites],
            fill=[edit.fill for edit in rewrites],
            start=[edit.start for edit in rewrites],
            step=[edit.step for edit in rewrites],
        )
    folds = [
        (edit, *pair)
        for edit in batch
        if isinstance(edit, Fold)
        for pair in edit.pairs(named[edit.parameter].detach(), named[edit.bias].detach())
    ]
    if folds:
        ops.rescale_fold_(
            [weight for _, weight, _ in folds],
            [bias for _, _, bias in folds],
            scale=[edit.scale for edit, _, _ in folds],
            shift=[edit.shift for edit, _, _ in folds],
        )
    for edit in batch:
        if isinstance(edit, Assign):
            overwrite_(named[edit.parameter], torch.tensor(edit.values, dtype=torch.float64).reshape(edit.shape))
        elif isinstance(edit, Copy):
            overwrite_(named[edit.parameter], copies[edit])
