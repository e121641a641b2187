"""Folds whose sums run over elements that several processes hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from neutralize.distributed.part import Held, Part, Run, Runs
from neutralize.errors import NeutralizeError
from neutralize.plan import Fold
from neutralize.reference import compute_dtype


def own_pairs(edit: Fold, weight: Part, bias: Part) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """What a process folds by itself, weights (out, ...) and biases (out,); ``None`` if it needs others' elements.

    It does not if it holds the biases of exactly the outputs that it holds weights of, and of these all inputs. The
    sum is then taken as for a whole weight, in the same order.
    """
    if weight.is_whole and bias.is_whole:
        return list(edit.pairs(weight.local, bias.local))
    if 0 in weight.local.shape and 0 in bias.local.shape:
        return []
    outputs = 1 if edit.transposed else 0
    inputs = [dim for dim in range(len(edit.shape)) if dim != outputs]
    if edit.groups != 1 or weight.held[outputs] != bias.held[0]:
        return None
    if any(weight.held[dim] != ((0, edit.shape[dim]),) for dim in inputs):
        return None
    return [(replace(edit, shape=tuple(weight.local.shape)).block(weight.local), bias.local)]


def own_sums(edit: Fold, weight: Part) -> torch.Tensor:
    """The row sums (out,) of the elements that a process holds, in float64 on the CPU."""
    sums = torch.zeros(edit.bias_numel, dtype=torch.float64)
    local = weight.local
    if 0 in local.shape:
        return sums
    if not edit.transposed:
        by_row = replace(edit, columns=edit.columns or (0, math.prod(edit.shape[1:])))  # which row is which matters
        for placed in weight.block(by_row.rescale):
            matrix = placed.window(local)
            part = matrix.to(compute_dtype(matrix.dtype)).sum(1, dtype=torch.float64)
            sums[placed.row : placed.row + len(part)] += part.cpu()
        return sums
    taps = local.to(compute_dtype(local.dtype))
    by_pair = taps.sum(tuple(range(2, local.dim())), dtype=torch.float64) if local.dim() > 2 else taps.double()
    first, last = edit.columns or (0, edit.shape[0])
    per_group = (last - first) // edit.groups
    for inputs, rows in _located(weight.held[0]):
        for outputs, columns in _located(weight.held[1]):
            block = by_pair[rows[0] : rows[0] + rows[1], columns[0] : columns[0] + columns[1]]
            for group in range(edit.groups):
                low = max(first + group * per_group, inputs[0])
                high = min(first + (group + 1) * per_group, sum(inputs))
                if low < high:
                    at = group * edit.shape[1] + outputs[0]
                    sums[at : at + outputs[1]] += block[low - inputs[0] : high - inputs[0]].sum(0).cpu()
    return sums


def _located(runs: Runs) -> list[tuple[Run, Run]]:
    """Runs of a dimension, each with the places at which a process holds it."""
    out, place = [], 0
    for first, size in runs:
        out.append(((first, size), (place, size)))
        place += size
    return out


def total(sums: Sequence[tuple[Held, torch.Tensor]], edit: Fold) -> torch.Tensor:
    """Add the sums of all processes in the order of their ranks; what several hold is counted once.

    Args:
        sums: for each process which elements of the weight it holds, and their sums (out,) in float64.
        edit: the fold.

    Raises:
        NeutralizeError: the parts do not cover the weight once.
    """
    distinct: dict[Held, torch.Tensor] = {}
    for held, part in sums:
        distinct.setdefault(held, part)
    covered = sum(math.prod(sum(size for _, size in dim) for dim in held) for held in distinct)
    if covered != math.prod(edit.shape):
        raise NeutralizeError(
            f"apply: expected parts that cover {edit.parameter!r} once, got {covered} elements of "
            f"{math.prod(edit.shape)} in parts that differ; name the group of the processes that hold the model"
        )
    added = torch.zeros(edit.bias_numel, dtype=torch.float64)
    for part in distinct.values():
        added += part
    return added
