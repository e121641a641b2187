"""Apply a plan to a live model: the one place that changes its weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from neutralize import ops
from neutralize.errors import NeutralizeError
from neutralize.plan import Assign, Edit, Fold, Plan, Rewrite, dtype_name
from neutralize.select import unwrap
from neutralize.undo import Saved, Undo


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by every one of its qualified names."""
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def aliases_of(named: dict[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """For each name, the names (its own first) whose tensors share memory with it."""
    groups: dict[object, list[str]] = {}
    for name, tensor in named.items():
        if tensor.is_meta or tensor.numel() == 0:
            key: object = id(tensor)
        else:
            key = (tensor.device, tensor.untyped_storage().data_ptr())
        groups.setdefault(key, []).append(name)
    aliases = {}
    for group in groups.values():
        for name in group:
            others = [other for other in group if other != name and _overlap(named[name], named[other])]
            aliases[name] = (name, *others)
    return aliases


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one storage may share an element (their spans intersect)."""
    if one is other or one.is_meta:
        return one is other
    first, second = _span(one), _span(other)
    return first[0] < second[1] and second[0] < first[1]


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = int(tensor.storage_offset()) * tensor.element_size()
    return begin, begin + (last + 1) * tensor.element_size()


def apply_plan(plan: Plan, model: nn.Module, *, freeze: bool = False) -> Undo:
    """Check the whole plan against ``model``, copy what will be overwritten, then write.

    Args:
        plan: the plan.
        model: a model with the parameters that the plan names.
        freeze: set ``requires_grad`` of the written parameters to false.

    Returns:
        The undo.

    Raises:
        NeutralizeError: something does not fit; every problem is listed and nothing was written.
    """
    model = unwrap(model)
    named = tensors_of(model)
    problems = _problems(plan, named)
    if problems:
        listing = "".join(f"\n  - {problem}" for problem in problems)
        raise NeutralizeError(f"apply: expected a plan that fits the model, got {len(problems)} problem(s):{listing}")
    saved = [_save(named, edit, name) for edit, name in _first_writes(plan.edits)]
    undo = Undo(saved, plan.digest)
    try:
        with torch.no_grad():
            for batch in _batches(plan.edits):
                _write(batch, named)
            if freeze:
                for entry in saved:
                    if entry.tensor.is_leaf:
                        entry.tensor.requires_grad_(False)
    except BaseException:
        undo.restore()
        raise
    return undo


def _problems(plan: Plan, named: dict[str, torch.Tensor]) -> list[str]:
    aliases = aliases_of(named)
    accepted = [set(group) for group in plan.tied]
    problems = []
    for edit in plan.edits:
        for name in edit.parameters:
            tensor = named.get(name)
            if tensor is None:
                problems.append(f"expected a parameter {name!r}, got a model without it; plan for this model")
                continue
            problems.extend(_tensor_problems(edit, name, tensor))
            foreign = set(aliases[name]) - {name}
            if foreign and not any({name, *foreign} <= group for group in accepted):
                others = ", ".join(sorted(map(repr, foreign)))
                problems.append(
                    f"expected {name!r} to be no other layer's, got a tensor that is also {others}; untie them first "
                    "(clone the parameter), or select both layers"
                )
    return list(dict.fromkeys(problems))


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
    limit = torch.finfo(tensor.dtype).max
    for coefficient, value in _stored_values(edit):
        if abs(value) > limit:
            yield (
                f"expected {coefficient} within {limit:.6g} for {name!r} ({edit.dtype}), got {value:.6g}; "
                "give a smaller one"
            )


def _stored_values(edit: Edit) -> Iterable[tuple[str, float]]:
    """The values that an edit stores as they are, whatever the old weights were."""
    if isinstance(edit, Rewrite):
        yield "fill", edit.fill
        yield "diagonal + fill", edit.diagonal + edit.fill
    elif isinstance(edit, Assign):
        yield from (("a value", value) for value in edit.values)


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
    return Saved(name, tensor, block, block(tensor.detach()).clone(), tensor.requires_grad)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _batches(edits: tuple[Edit, ...]) -> Iterable[list[Edit]]:
    """Runs of edits of one kind that touch no tensor twice: each is one call of an op."""
    batch: list[Edit] = []
    touched: set[str] = set()
    for edit in edits:
        if batch and (type(edit) is not type(batch[0]) or touched & set(edit.parameters)):
            yield batch
            batch, touched = [], set()
        batch.append(edit)
        touched |= set(edit.parameters)
    if batch:
        yield batch


def _write(batch: list[Edit], named: dict[str, torch.Tensor]) -> None:
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
    folds = [edit for edit in batch if isinstance(edit, Fold)]
    if folds:
        weights = [named[edit.parameter].detach() for edit in folds]
        ops.rescale_fold_(
            [weight.t() if edit.transposed else weight for weight, edit in zip(weights, folds, strict=True)],
            [named[edit.bias].detach() for edit in folds],
            scale=[edit.scale for edit in folds],
            shift=[edit.shift for edit in folds],
        )
    for edit in batch:
        if isinstance(edit, Assign):
            tensor = named[edit.parameter]
            tensor.copy_(torch.tensor(edit.values, dtype=torch.float64).reshape(edit.shape))
