"""How far two runs are apart: at the outputs, and at each layer in the terms in which the plan hands its input on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from neutralize.dataflow import tensors_in
from neutralize.oracle import HANDING_ON, HandedOn, fitted, part_in, through
from neutralize.plan import Fold, LayerPlan, Plan, Rewrite
from neutralize.stacked import module_name, per_direction

if TYPE_CHECKING:
    from neutralize.probe import Probe


def layer_error(entry: LayerPlan, plan: Plan, got: Probe, wanted: Probe) -> tuple[float, bool] | None:
    """The largest error of what a layer hands on, and whether its input stayed within the assumed bound.

    ``None`` where the value cannot be seen: no number is better than a wrong one.
    """
    part = part_in(entry, {})
    if part is not None:
        place = entry.consumers[0] if entry.consumers else entry.layer
        if place not in got.leaving or place not in wanted.leaving:  # a module that is called through its weights only
            return None
        return _largest(got.leaving[place], wanted.leaving[place], wanted.leaving[place]), True
    if entry.target == "null" and entry.sides != "out":
        leaving = got.leaving[entry.layer]
        return float(leaving.double().abs().max()) if leaving.numel() else 0.0, True
    if entry.target not in HANDING_ON:
        # What reads a layer shows whether its contribution is as wanted, unless that is a layer of the plan itself.
        planned = {other.layer for other in plan.layers}
        places = [name for name in entry.consumers if name not in planned]
        place = places[0] if places else entry.layer
        return _largest(got.leaving[place], wanted.leaving[place], wanted.leaving[place]), True
    seen = got.handed_on.get(entry.layer)
    if seen is None:  # a container, which ends where it ends, or a recurrent layer, which is complete in itself
        seen = HandedOn(got.leaving[entry.layer], got.entering[entry.layer], activated=True)
    if entry.activation and not seen.activated:  # by no function that could be seen: then its reader shows the value
        read = [got.entering[name] for name in entry.consumers if name in got.entering]
        if not read or read[0].numel() != seen.entered.numel():
            return None
        seen = HandedOn(read[0], got.entering[entry.layer])
    if entry.sides == "within":
        return None
    if entry.sides == "around":  # what enters it is encoded by the norm before it: the reference has it plain
        return _largest(seen.value, wanted.entering[entry.layer], wanted.entering[entry.layer]), True
    entering = _decoded(entry.layer, plan, seen.entered.double())
    handed_on = seen.value.double() if entry.epsilon is None else _decode(entry, seen.value.double())
    if entry.activation in ("lstm", "gru", "rnn"):
        entering = per_direction(entering, handed_on)
    if entry.window:
        entering = through(entry.window, entering, handed_on)
    elif entry.target == "partial":
        entering = fitted(entering, handed_on)
    if handed_on.numel() != entering.numel():
        return None
    expected = entry.gain * entering.reshape(handed_on.shape)
    if entry.input_bound is None:
        return _largest(handed_on, expected, expected), True
    peak = float(entering.abs().max()) if entering.numel() else 0.0
    return float((handed_on - expected).abs().max()) / entry.input_bound, peak <= entry.input_bound


def encodings(layer: str, plan: Plan) -> Iterator[tuple[LayerPlan, tuple[int, tuple[int, int]] | None]]:
    """The pass-throughs that a layer reads, and which part of its input each is: a dimension and a range of it.

    ``None``: all of it. The range is that of the layer's weights which undo the scale.
    """
    # The first of stacked layers reads what its module reads.
    names = {layer, module_name(layer, {}) if layer.endswith("[0]") else layer}
    for entry in plan.layers:
        reads = any(name in names or name.startswith(f"{layer}.") for name in entry.consumers)
        if not reads or entry.target not in HANDING_ON or entry.epsilon is None or entry.layer == layer:
            continue
        ranges: dict[tuple[int, tuple[int, int]] | None, None] = {}
        for edit in (plan.edits[place] for place in entry.edits):
            if not any(edit.parameter.startswith(f"{name}.") for name in names):
                continue
            columns = edit.columns if isinstance(edit, Fold | Rewrite) else None
            if columns is not None and not (isinstance(edit, Fold) and edit.transposed):
                taps = math.prod(edit.shape[2:])
                columns = columns[0] // taps, columns[1] // taps
            elif isinstance(edit, Rewrite):
                columns = edit.rows  # the weight is stored (in, out)
            ranges[None if columns is None else (1 - len(edit.shape), columns)] = None
        yield from ((entry, found) for found in ranges or {None: None})


def _part_of(tensor: torch.Tensor, place: tuple[int, tuple[int, int]] | None) -> torch.Tensor:
    """A view of the part of a layer's input that ``encodings`` names."""
    if place is None:
        return tensor
    dim, (first, last) = place
    return tensor.narrow(dim, first, last - first)


def per_value(layer: str, plan: Plan, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient at a layer's input by the values that the pass-throughs which it reads hand on: times ε φ'(a)."""
    gradient = gradient.clone()
    for entry, place in encodings(layer, plan):
        assert entry.epsilon is not None
        assert entry.slope is not None
        _part_of(gradient, place).mul_(entry.epsilon * entry.slope)
    return gradient


def _decoded(layer: str, plan: Plan, tensor: torch.Tensor) -> torch.Tensor:
    """What enters a layer, decoded where that is a pass-through's."""
    tensor = tensor.clone()
    for entry, place in encodings(layer, plan):
        part = _part_of(tensor, place)
        part.copy_(_decode(entry, part))
    return tensor


def _decode(entry: LayerPlan, tensor: torch.Tensor) -> torch.Tensor:
    """What a consumer of a linear-regime layer makes of what it reads: ``(h - φ(a)) / (ε φ'(a))``."""
    assert entry.epsilon is not None
    assert entry.slope is not None
    assert entry.value is not None
    return (tensor - entry.value) / (entry.epsilon * entry.slope)


def _largest(got: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor) -> float:
    if got.numel() == 0 or equal(got, wanted):
        return 0.0
    peak = float(scale.double().abs().max())
    difference = float((got.double() - wanted.double()).abs().max())
    return difference / peak if peak else difference


def absolute_error(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return the largest difference of an element, over all floating-point tensors."""
    pairs = [(one, other) for one, other in zip(got, wanted, strict=True) if other.is_floating_point()]
    # What equals, infinities and NaN included, has no error.
    return max((0.0 if equal(one, other) else _difference(one, other) for one, other in pairs), default=0.0)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def peak(tree: Any) -> float:
    """The largest magnitude among floating-point tensors."""
    floating = [tensor for tensor in tensors_in(tree) if tensor.is_floating_point() and tensor.numel()]
    return max((float(tensor.detach().abs().max().double()) for tensor in floating), default=0.0)


def relative_error(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return the norm of the difference over that of what is wanted, in float64."""
    pairs = [
        (one.double(), other.double()) for one, other in zip(got, wanted, strict=True) if other.is_floating_point()
    ]
    difference = math.sqrt(sum(float((one - other)[one != other].square().sum()) for one, other in pairs))
    size = math.sqrt(sum(float(other.square().sum()) for _, other in pairs))
    return difference / size if size else difference


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included; -0 counts as 0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    same = one == other
    return bool((same | (one != one) & (other != other)).all())


def ratio(one: float, other: float) -> float:
    """Return ``one / other``; 1 if both are zero, NaN if only the other is."""
    return one / other if other else (1.0 if one == 0.0 else math.nan)
