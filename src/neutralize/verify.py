"""Verify a plan against the excised network (``oracle``): both are run (``probe``), and compared (``deviation``)."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from neutralize.absence import without_parts
from neutralize.dataflow import first_tensor, replace_first_tensor, tensors_in
from neutralize.deviation import absolute_error, encodings, equal, layer_error, peak, ratio, relative_error
from neutralize.errors import NeutralizeError
from neutralize.oracle import part_in, reference
from neutralize.parts import owner_of
from neutralize.plan import Copy, LayerPlan, Plan, require_plan
from neutralize.probe import Call, Probe, run_watched
from neutralize.report import Shown
from neutralize.select import unwrap
from neutralize.stacked import module_name, place_of, with_stacked
from neutralize.undo import untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neutralize.pages.verified import Details


_LOGGER = logging.getLogger(__name__)

SCALES = tuple(4.0**power for power in range(-3, 4))
"""The factors of ``Verification.at_scales``; powers of two, so that scaling itself rounds nothing."""


@dataclass(frozen=True)
class Verification(Shown):
    """What was measured.

    Attributes:
        relative_error: end to end, ``‖output - reference‖₂ / ‖reference‖₂`` over all floating-point outputs, in
            float64.
        per_layer: for each layer, the largest error of what it hands on, divided by the bound on its input (a plain
            layer), by the largest magnitude of its input (a block), or by that of the reference's value (other targets
            than the input); NaN where the value cannot be seen from outside.
        gradient_gain: for each layer, the norm of the gradient that reaches its input, divided by that in the reference
            network, under the loss ``Σ mean(output²)``; NaN where there is none, or the model cannot be differentiated.
        exact: every output equals the reference's as a number, element by element (-0 equals 0, NaN equals NaN).
        bound_holds: no layer's measured error is above its certificate's bound, among the layers whose assumption
            holds; nor, if all assumptions hold, the largest error of the outputs above that of the plan. Where no
            bound is stated (``has_bounds``) it says nothing.
        assumptions_hold: every layer's input stayed within the bound that its certificate assumes, and so did the
            model's.
        bounds: for each layer with one, the bound of its certificate.
        output_error: the largest error of an element of a floating-point output: absolute.
        output_bound: the bound on it that the plan's certificate states, if it states one.
        scaled: what ``at_scales`` multiplies: ``inputs``, the floating-point inputs of the model; or ``layers``, where
            it has none: what enters each layer; or ``""``, where that cannot be scaled either.
        not_held: of files that were said to hold the plan and fail, the stored tensors that are not as it leaves them.
    """

    relative_error: float
    per_layer: dict[str, float]
    gradient_gain: dict[str, float]
    exact: bool
    bound_holds: bool
    assumptions_hold: bool = True
    bounds: dict[str, float] = field(default_factory=dict)
    output_error: float = 0.0
    output_bound: float | None = None
    scaled: str = ""
    not_held: tuple[str, ...] = ()
    _again: Callable[[Sequence[float]], list[Verification]] | None = field(default=None, repr=False, compare=False)
    _details: Callable[[], Details] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a deep copy holds: the figures, without the model that was measured."""
        return {**vars(self), "_again": None, "_details": None}

    @property
    def has_bounds(self) -> bool:
        """Whether a certificate states a bound, of a layer or of the outputs."""
        return bool(self.bounds) or self.output_bound is not None

    def at_scales(self, scales: Sequence[float] | float | None = None) -> dict[float, Verification]:
        """Measure again at other sizes of the input: of the model's, or of what enters each layer; see ``scaled``.

        Where layers are scaled, each is given what entered it, times the factor, in both networks; the hidden states
        that enter a norm which is rewritten for a layer behind it are scaled instead of what enters the layer. The
        errors of layers are then what is measured; the outputs are those of networks that run on such states, and no
        bound is stated for them.

        Args:
            scales: positive factors, or one; by default the powers of four from 1/64 to 64.

        Returns:
            For each factor, in ascending order, what was measured (no gradients).

        Raises:
            NeutralizeError: nothing can be scaled, or a factor is none.
        """
        if self._again is None:
            raise NeutralizeError(
                "verify: expected floating-point inputs or hidden states to scale, got none, or a model that is no "
                "longer at hand; verify with some, or print the verification"
            )
        if isinstance(scales, int | float):
            scales = [scales]
        given = sorted({float(scale) for scale in (SCALES if scales is None else scales)})
        if not given or not all(0 < scale < math.inf for scale in given):
            raise NeutralizeError(f"verify: expected positive finite scales, got {given}; leave them out")
        return dict(zip(given, self._again(given), strict=True))

    def plot(self, scales: Sequence[float] | float | None = None) -> Figure:
        """Draw measured errors and their bounds against the size of the input: the model runs again at every scale.

        Args:
            scales: what is multiplied, see ``scaled``, by; by default from a hundredth to a hundred.

        Returns:
            A matplotlib figure, made without pyplot: ``verification.plot().savefig("errors.png")``. Where inputs are
            larger than the certificates assume, no bound is drawn.

        Raises:
            NeutralizeError: matplotlib is not installed, or there is nothing to scale.
        """
        from neutralize.plots import PLOT_SCALES, plot_verification

        return plot_verification(self, PLOT_SCALES if scales is None else scales)

    def to_html(self, path: str | PathLike[str], *, title: str = "", command: str = "") -> None:
        """Write a page: the plan, its certificates, errors, their curves, weights before and after, provenance.

        The page needs nothing else: no network, no script. The model runs again at some scales of its inputs, and is
        left as it was.

        Args:
            path: an html file; it appears whole, in place of an older one, or not at all.
            title: what was verified, in words.
            command: the command line, for the provenance.

        Raises:
            NeutralizeError: no page can be written there; nothing has been run then.
        """
        from neutralize.pages.page import check_target, write
        from neutralize.pages.verified import page

        check_target(path)
        details = None if self._details is None else self._details()
        write(path, page(self, details, title=title, command=command))

    def _repr_html_(self) -> str:
        """Return a short table for a notebook."""
        from neutralize.pages.verified import fragment

        return fragment(self)

    def __str__(self) -> str:
        """Return a table: layer, measured error, bound, gradient gain; then the end-to-end figures."""
        from neutralize.report import verification_table

        return verification_table(self)


class Entered:
    """What entered modules in a comparison, for others to be given it times a factor.

    Values are known by whether the model had the plan's weights, and by the module's name.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[bool, str], torch.Tensor] = {}
        self._over: set[bool] = set()

    def note(self, name: str, value: torch.Tensor, *, edited: bool) -> None:
        """Note what enters a module in its first call."""
        self._values.setdefault((edited, name), value.detach().clone())

    def close(self, *, edited: bool) -> None:
        """Note that a run is over."""
        self._over.add(edited)

    def of(self, name: str, *, edited: bool) -> torch.Tensor | None:
        """Return what entered a module; ``None`` if it was not called."""
        return self._values.get((edited, name))

    def is_settled(self, name: str, *, edited: bool) -> bool:
        """Whether it is known what ``of`` returns."""
        return (edited, name) in self._values or edited in self._over


def verify(model: nn.Module, plan: Plan, *inputs: Any, **kwargs: Any) -> Verification:
    """Measure how far a plan is from its aim, on given inputs; the model is left as it was.

    The reference is the excised network for layers that become their input; for the other strategies it is the intact
    network with the layer's contribution replaced by hooks (by zero, or by itself times the factor).

    Args:
        model: the model planned for, with weights.
        plan: a plan that is not applied at the moment.
        *inputs: positional arguments of the model; or one dict (a ``BatchEncoding`` too) of its keyword arguments. A
            model that takes such a dict as its one argument is given it as it is.
        **kwargs: keyword arguments of the model.

    Raises:
        NeutralizeError: the plan does not fit the model.

    Examples:
        >>> from neutralize import plan
        >>> model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
        >>> verify(model, plan(model, "0"), x).exact
        True
    """
    model = unwrap(model)
    require_plan("verify", plan)
    if not inputs and not kwargs:
        from neutralize.dataflow import own_inputs, placed_inputs

        brought = own_inputs(model)
        if brought is None:
            raise NeutralizeError("verify: expected inputs for the model, got none; pass its arguments after the plan")
        inputs, kwargs = placed_inputs(model, brought)
    alone = next(iter(inputs)) if len(inputs) == 1 and not kwargs else None
    if isinstance(alone, Mapping) and _takes(model, alone):
        inputs, kwargs = (), dict(alone)
    if any(tensor.is_meta for tensor in tensors_in((inputs, kwargs))):
        raise NeutralizeError("verify: expected inputs with data, got one on the meta device; put it on the model's")
    found = compared(model, plan, (inputs, kwargs), lambda: plan.applied(model))
    said = "bit for bit" if found.exact else f"relative error {found.relative_error:.3g}"
    bound = "every bound holds" if found.bound_holds else "a bound does NOT hold"
    _LOGGER.info("verify %s: %s, %s", type(model).__name__, said, bound)
    return found


def _takes(model: nn.Module, given: Mapping[Any, Any]) -> bool:
    """Whether a model's forward pass can be called with these as its keyword arguments."""
    try:
        inspect.signature(model.forward).bind(**given)
    except (TypeError, ValueError):  # other names, keys that are no names, or no signature
        return False
    return True


def compared(
    model: nn.Module,
    plan: Plan,
    call: Call,
    applied: Callable[[], AbstractContextManager[object]],
    *,
    differentiate: bool = True,
    scale: float | None = None,
    entered: Entered | None = None,
) -> Verification:
    """Measure how far a plan is from its aim: ``verify``, however the plan comes into the model.

    Args:
        model: the model planned for.
        plan: the plan.
        call: positional and keyword arguments of the model.
        applied: makes a context in which the model has the plan's weights.
        differentiate: measure gradients too.
        scale: a factor of the model's floating-point inputs, or, where it has none, of what ``entered`` the layers.
        entered: filled where there is no ``scale``.

    Raises:
        NeutralizeError: the plan does not fit the model.
    """
    modules = with_stacked(dict(model.named_modules(remove_duplicate=False)))
    owners = {entry.layer: owner_of(part, modules) for entry in plan.layers if (part := part_in(entry, modules))}
    modules.update({layer: modules[owner] for layer, owner in owners.items() if owner in modules})
    missing = [name for entry in plan.layers for name in (entry.layer, *entry.consumers) if name not in modules]
    if missing:
        raise NeutralizeError(
            f"verify: expected the layers of the plan in the model, got none named {missing[0]!r}; plan for it"
        )
    has_inputs = any(tensor.is_floating_point() for tensor in tensors_in(call))
    original = call
    if scale is not None and has_inputs:
        call = pytree.tree_map(
            lambda part: part * scale if isinstance(part, torch.Tensor) and part.is_floating_point() else part, call
        )
    places = {} if has_inputs else {entry.layer: _scaled_place(entry, plan, modules) for entry in plan.layers}

    replaced: set[str] = set()

    def run(*, edited: bool) -> tuple[list[torch.Tensor], Probe]:
        with ExitStack() as stack:
            for place in dict.fromkeys(filter(None, places.values())):
                if entered is None:
                    break
                hook = _entering(place, entered, scale, replaced, edited=edited)
                stack.callback(modules[place].register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)
            found = run_watched(model, modules, plan, call, watch=edited, differentiate=differentiate)
        if entered is not None and scale is None:
            entered.close(edited=edited)
        return found

    with reference(modules, plan), without_parts(model, plan), untouched(model):
        wanted, wanted_probe = run(edited=False)
    with applied(), untouched(model):
        got, probe = run(edited=True)
    per_layer, within = {}, {}
    unmeasured: set[str] = set()
    for entry in plan.layers:
        measured = layer_error(entry, plan, probe, wanted_probe)
        if scale is not None and not has_inputs and places[entry.layer] not in (replaced | {""}):
            measured = None  # what enters it is as it was
        per_layer[entry.layer], within[entry.layer] = measured or (math.nan, True)
        if measured is None:
            unmeasured.add(entry.layer)
    renormed = {entry.layer for entry in plan.layers if entry.sides in ("around", "within") or entry.layer in owners}
    bounds = {entry.layer: entry.certificate.bound for entry in plan.layers if entry.certificate.bound is not None}
    output_error = absolute_error(got, wanted)
    # Where layers are scaled, the outputs are those of networks that nothing is claimed for.
    whole = plan.certificate if scale is None or has_inputs else None
    output_bound = None if whole is None else whole.bound
    within_inputs = whole is None or whole.inputs_within is None or peak(call) <= whole.inputs_within
    assumptions_hold = all(within.values()) and within_inputs
    is_within = output_bound is None or not assumptions_hold or output_error <= output_bound

    def again(scales: Sequence[float]) -> list[Verification]:
        states = None if has_inputs else Entered()
        if states is not None:
            compared(model, plan, original, applied, differentiate=False, entered=states)
        return [
            compared(model, plan, original, applied, differentiate=False, scale=each, entered=states) for each in scales
        ]

    seen = [probe.entering.get(place) for place in places.values() if place]
    has_states = any(tensor is None or tensor.is_floating_point() for tensor in seen)
    scaled = "inputs" if has_inputs else "layers" if has_states else ""
    repeat = again if scaled else None

    def details() -> Details:
        from neutralize.pages.verified import details

        others = [each for each in SCALES if each != 1.0] if repeat else []
        return details(model, plan, applied, dict(zip(others, again(others), strict=True)))

    return Verification(
        relative_error=relative_error(got, wanted),
        per_layer=per_layer,
        gradient_gain=dict.fromkeys(per_layer, math.nan)
        | {
            name: ratio(probe.gradients[name], wanted_probe.gradients[name])
            for name in probe.gradients
            if name not in renormed  # there it is the gradient of something else
        },
        exact=len(got) == len(wanted) and all(equal(one, other) for one, other in zip(got, wanted, strict=True)),
        bound_holds=is_within
        and all(per_layer[name] <= bound for name, bound in bounds.items() if within[name] and name not in unmeasured),
        assumptions_hold=assumptions_hold,
        bounds=bounds,
        output_error=output_error,
        output_bound=output_bound,
        scaled=scaled,
        _again=repeat,
        _details=details,
    )


# ---- what enters layers, scaled --------------------------------------------------------------------------------------


def _scaled_place(entry: LayerPlan, plan: Plan, modules: Mapping[str, nn.Module]) -> str | None:
    """The module whose input is scaled for a layer; ``""`` if a layer before it sees to that, ``None`` if none is."""
    if entry.sides == "within":  # it cannot be seen
        return None
    if entry.sides == "around":  # what enters the layer has the one size that the norm before it gives it
        copies = [edit for edit in (plan.edits[place] for place in entry.edits) if isinstance(edit, Copy)]
        owner = copies[0].source.rpartition(".")[0] if copies else None
        return owner if owner in modules else None
    if next(encodings(entry.layer, plan), None) is not None:  # a scale of its own, which its weights undo
        return ""
    return module_name(entry.layer, {}) if place_of(entry.layer, modules[entry.layer]) is not None else entry.layer


def _entering(
    place: str, entered: Entered, scale: float | None, replaced: set[str], *, edited: bool
) -> Callable[..., Any]:
    """A hook that notes what enters a module in its first call, or replaces it by what was noted times the scale."""
    begun = False

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        nonlocal begun
        tensor = first_tensor((args, kwargs))
        if begun or tensor is None or not tensor.is_floating_point():
            return None
        begun = True
        if scale is None:
            entered.note(place, tensor, edited=edited)
            return None
        value = entered.of(place, edited=edited)
        if value is None or value.shape != tensor.shape:  # data decide how often it is called, and on what
            return None
        replaced.add(place)
        return replace_first_tensor((args, kwargs), value * scale)

    return hook
