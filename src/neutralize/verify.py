"""Verify a plan against the excised network: the same model with the layers cut out by hooks.

The excised network is the oracle. It is built from hooks on modules alone and shares with the planner what counts as an
activation (``activations.identify``), and nothing else: not the dataflow, not the search, not the formulas.
"""

from __future__ import annotations

import inspect
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from neutralize.absence import without_parts
from neutralize.activations import FUNCTION_NAMES, GRID, identify
from neutralize.dataflow import copied, first_tensor, replace_first_tensor, tensors_in
from neutralize.errors import NeutralizeError
from neutralize.parts import Part, owner_of, part_of
from neutralize.plan import Copy, Fold, LayerPlan, Plan, Rewrite, require_plan
from neutralize.report import Shown
from neutralize.select import Layers, select, unwrap
from neutralize.stacked import HandOn, module_name, per_direction, place_of, run_by_layer, with_stacked
from neutralize.undo import untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neutralize.pages.verified import Details

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""

_LOGGER = logging.getLogger(__name__)

_HANDING_ON = ("input", "partial")
SCALES = tuple(4.0**power for power in range(-3, 4))
"""The factors of ``Verification.at_scales``; powers of two, so that scaling itself rounds nothing."""
# Functions that work element by element; ``x * y`` comes as ``mul``, ``2 - x`` as ``__rsub__``.
_POINTWISE = FUNCTION_NAMES | frozenset(
    """abs add addcmul atan ceil clamp clamp_max clamp_min clip cos cosh div divide erf erfc exp exp2 expm1 floor
    log log10 log1p log2 logaddexp max maximum min minimum mul multiply neg negative pow radd rdiv reciprocal rmul rpow
    rsqrt rsub rtruediv acos acosh asin asinh atan2 atanh erfinv lerp logit sign sinc sinh sqrt square sub subtract tan
    true_divide truediv where float_power hypot gt ge lt le eq ne logical_not""".split()
)


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


# Views between a layer and its activation: followed as long as they keep every element.
_VIEWS = frozenset(
    """view view_as reshape reshape_as flatten unflatten permute transpose t swapaxes swapdims movedim moveaxis squeeze
    unsqueeze contiguous clone""".split()
)


@dataclass
class _HandedOn:
    """What a layer handed on in its first call, and what had entered it, in the same arrangement."""

    value: torch.Tensor
    entered: torch.Tensor
    activated: bool = False


class _Followers(TorchFunctionMode):
    """Follow layers' outputs through the norm and activation that belong to them, functions and modules alike.

    Cut layers' inputs are handed past both; of watched layers it is noted what comes out behind both.

    An activation that several functions compute is known by its values only when the last of them has run. So a second
    computation runs beside the real one, on ``activations.GRID``: the steps from a cut layer on, as if nothing had been
    skipped. When it has the values of an activation, what has been computed for real gives way to the layer's input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handed_on: dict[str, _HandedOn] = {}
        # Address of a tensor where following starts, to the watched layer and what entered it, arranged like it.
        self._watched: dict[int, tuple[str, torch.Tensor]] = {}
        # Address of a tensor that was computed from a cut layer's input to that tensor, the input, and the values.
        self._followed: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def hand_on(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return an alias of the tensor that the mode recognises."""
        alias = tensor.view_as(tensor)
        self._followed[id(alias)] = alias, alias, GRID
        return alias

    def watch(self, layer: str, leaving: torch.Tensor, entered: torch.Tensor) -> None:
        """Note what a layer hands on in its first call."""
        if layer not in self.handed_on:
            self.handed_on[layer] = _HandedOn(leaving.detach().clone(), entered)
            self._followed[id(leaving)] = leaving, leaving, GRID
            self._watched[id(leaving)] = layer, entered

    def _follow_on(self, result: torch.Tensor, watched: tuple[str, torch.Tensor] | None) -> None:
        """Start anew at a tensor."""
        self._followed[id(result)] = result, result, GRID
        if watched is not None:
            self._watched[id(result)] = watched

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        tensors = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.Tensor)]
        followed = [self._followed[id(part)] for part in tensors if id(part) in self._followed]
        if not followed:
            return func(*args, **kwargs)
        _, start, values = followed[0]
        subject = args[0] if args else kwargs.get("input")
        watched = self._watched.get(id(start))
        if name == "batch_norm" and subject is start:
            if watched is None:
                return subject
            result = func(*args, **kwargs)
            self._follow_on(result, watched)
            self.handed_on[watched[0]] = _HandedOn(result.detach().clone(), watched[1])
            return result
        if name in _VIEWS and subject is start:
            result = func(*args, **kwargs)
            if isinstance(result, torch.Tensor) and result is not subject and result.numel() == start.numel():
                if watched is not None and watched[1].shape == start.shape:
                    others = {key: value for key, value in kwargs.items() if key != "input"}
                    watched = watched[0], func(watched[1], *args[1:], **others)
                self._follow_on(result, watched)
            return result
        same_start = len(followed) == len(tensors) and all(other[1] is start for other in followed)
        tried = self._tried(func, args, kwargs) if same_start and name in _POINTWISE else None
        is_known = name in FUNCTION_NAMES and subject is start and values is GRID
        if is_known or (tried is not None and identify(tried) is not None):
            # Another alias: what is computed from it may be a longer activation still.
            result = start.view_as(start) if watched is None else func(*args, **kwargs)
            if watched is not None:
                self.handed_on[watched[0]] = _HandedOn(result.detach().clone(), watched[1], activated=True)
            if tried is not None:
                self._followed[id(result)] = result, start, tried
            return result
        result = func(*args, **kwargs)
        if tried is not None and isinstance(result, torch.Tensor):
            self._followed[id(result)] = result, start, tried
        return result

    def _tried(self, func: Callable[..., Any], args: Any, kwargs: Any) -> torch.Tensor | None:
        """What the function makes of the values on the grid, or ``None``."""

        def values(part: Any) -> Any:
            return self._followed[id(part)][2].clone() if isinstance(part, torch.Tensor) else part

        try:
            with torch.no_grad():
                result = func(*[values(part) for part in args], **{key: values(part) for key, part in kwargs.items()})
        except Exception:  # it does not do with float64 on the CPU: then it is no activation that is known
            return None
        return result if isinstance(result, torch.Tensor) else None


@contextmanager
def excised(model: nn.Module, layers: Layers, *, partial: bool = False) -> Iterator[None]:
    """Cut layers out of the forward pass for the length of a ``with`` block; the weights are not touched.

    A block hands its first tensor input on as its first tensor output. A plain affine layer does the same, and the
    norm and activation that follow it are skipped with it: a layer is the affine map, its batch norm and its
    activation.

    Args:
        model: any module.
        layers: see ``neutralize.select``.
        partial: a layer whose output is wider or narrower than its input hands on the features that fit, and zeros for
            the rest; else it is an error.

    Raises:
        NeutralizeError: nothing is selected; or, during a forward pass, a layer's output does not have its input's
            shape.

    Examples:
        >>> model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 4)
        >>> with excised(model, "0"):  # the linear layer and its tanh
        ...     out = model(x)
        >>> torch.equal(out, model[2](x))
        True
    """
    model = unwrap(model)
    selected = select(model, layers)
    named = dict(model.named_modules(remove_duplicate=False))
    parts = [layer for layer in selected if layer not in named and part_of(layer) is not None]
    if parts:
        raise NeutralizeError(
            f"excised: expected modules, got {parts[0]!r}, which hands nothing on by itself; "
            "verify a plan for it instead"
        )
    with _cut_out(selected, partial=partial):
        yield


@contextmanager
def _cut_out(layers: Mapping[str, nn.Module], gain: float = 1.0, *, partial: bool = False) -> Iterator[None]:
    mode = _Followers()
    with ExitStack() as stack:
        for name, module in layers.items():
            if place_of(name, module) is None:
                stack.enter_context(_changed(module, _cut(name, module, mode, gain, partial=partial)))
        for recurrent, places in _stacked(layers):
            hand_on = _by_layer(_cut_stacked(places, partial=partial))
            stack.callback(recurrent.register_forward_hook(hand_on, with_kwargs=True).remove)
        stack.enter_context(mode)
        yield


Change: TypeAlias = Callable[[nn.Module, "torch.Tensor | None", "torch.Tensor | None", Any], Any]
"""What a module returns instead, from its first input tensor as it was, its first output tensor, and its output."""


@contextmanager
def _changed(module: nn.Module, change: Change) -> Iterator[None]:
    """Change what a module returns; it is run on a copy of its first input tensor, as it may write into it."""
    # Calls that have begun, by thread: several may run the model at once.
    calls: dict[int, list[torch.Tensor | None]] = {}

    def lend(module: nn.Module, args: Any, kwargs: Any) -> Any:
        tensor = first_tensor((args, kwargs))
        calls.setdefault(threading.get_ident(), []).append(tensor)
        return None if tensor is None else replace_first_tensor((args, kwargs), tensor.clone())

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        owned, lent = calls[threading.get_ident()].pop(), first_tensor((args, kwargs))
        # What was not written into carries what was added to it on the way: the probe of the gradient.
        intact = lent is not None and not lent.is_inference() and lent._version == 0
        return change(module, lent if intact else owned, first_tensor(output), output)

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(lend, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _part(entry: LayerPlan, modules: Mapping[str, nn.Module]) -> Part | None:
    """The part of a module that an entry stands for; ``None``: it is a module."""
    return None if entry.layer in modules else part_of(entry.layer)


def _is_leaf(module: nn.Module) -> bool:
    """Whether what follows a module belongs to it; a recurrent layer is complete, and a container is what it holds."""
    return next(module.children(), None) is None and not isinstance(module, nn.RNNBase | nn.RNNCellBase)


def _stacked(layers: Mapping[str, nn.Module]) -> list[tuple[nn.RNNBase, dict[int, str]]]:
    """Those of the layers that are stacked layers of recurrent modules, by module: which ones, and their names."""
    found: dict[int, tuple[nn.RNNBase, dict[int, str]]] = {}
    for name, module in layers.items():
        place = place_of(name, module)
        if place is not None and isinstance(module, nn.RNNBase):
            found.setdefault(id(module), (module, {}))[1][place] = name
    return list(found.values())


def _by_layer(hand_on: HandOn) -> Callable[..., Any]:
    """A hook that runs a recurrent module again, layer by layer."""

    def hook(module: nn.RNNBase, args: Any, kwargs: Any, output: Any) -> Any:
        return run_by_layer(module, args, kwargs, hand_on)

    return hook


def _cut_stacked(places: Mapping[int, str], *, partial: bool) -> HandOn:
    def hand_on(place: int, entering: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
        if place not in places:
            return leaving
        entering = per_direction(entering, leaving)
        if entering.shape != leaving.shape and not partial:
            raise _wrong_shape(places[place], entering, leaving)
        return entering if entering.shape == leaving.shape else _fitted(entering, leaving)

    return hand_on


def _times_stacked(places: Mapping[int, str], factor: float) -> HandOn:
    return lambda place, entering, leaving: factor * leaving if place in places else leaving


def _wrong_shape(name: str, entering: torch.Tensor | None, leaving: torch.Tensor | None) -> NeutralizeError:
    shapes = [None if tensor is None else list(tensor.shape) for tensor in (entering, leaving)]
    return NeutralizeError(
        f"excised: expected layer {name!r} to return its input's shape, got {shapes[0]} in and {shapes[1]} out; only a "
        "layer that keeps the shape can be cut out"
    )


def _cut(name: str, module: nn.Module, mode: _Followers, gain: float, *, partial: bool) -> Change:
    is_leaf = _is_leaf(module)

    def change(module: nn.Module, entering: torch.Tensor | None, leaving: torch.Tensor | None, output: Any) -> Any:
        if isinstance(module, nn.RNNBase) and module.bidirectional and entering is not None and leaving is not None:
            entering = per_direction(entering, leaving)
        if partial and entering is not None and leaving is not None:
            entering = _fitted(entering, leaving)
        if entering is None or leaving is None or entering.shape != leaving.shape:
            raise _wrong_shape(name, entering, leaving)
        entering = entering if gain == 1.0 else entering * gain
        return replace_first_tensor(output, mode.hand_on(entering) if is_leaf else entering)

    return change


def _fitted(entering: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
    """The first features of what enters, as many as leave, and zeros for the rest; as it is if more is different."""
    differing = [
        dim for dim, size in enumerate(leaving.shape) if entering.dim() == leaving.dim() and size != entering.shape[dim]
    ]
    if len(differing) != 1:
        return entering
    dim = differing[0]
    kept = entering.narrow(dim, 0, min(entering.shape[dim], leaving.shape[dim]))
    missing = list(leaving.shape)
    missing[dim] -= kept.shape[dim]
    return torch.cat([kept, kept.new_zeros(missing)], dim)


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
    owners = {entry.layer: owner_of(part, modules) for entry in plan.layers if (part := _part(entry, modules))}
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

    def run(*, edited: bool) -> tuple[list[torch.Tensor], _Probe]:
        with ExitStack() as stack:
            for place in dict.fromkeys(filter(None, places.values())):
                if entered is None:
                    break
                hook = _entering(place, entered, scale, replaced, edited=edited)
                stack.callback(modules[place].register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)
            found = _run(model, modules, plan, call, watch=edited, differentiate=differentiate)
        if entered is not None and scale is None:
            entered.close(edited=edited)
        return found

    with _reference(modules, plan), without_parts(model, plan), untouched(model):
        wanted, wanted_probe = run(edited=False)
    with applied(), untouched(model):
        got, probe = run(edited=True)
    per_layer, within = {}, {}
    unmeasured: set[str] = set()
    for entry in plan.layers:
        measured = _layer_error(entry, plan, probe, wanted_probe)
        if scale is not None and not has_inputs and places[entry.layer] not in (replaced | {""}):
            measured = None  # what enters it is as it was
        per_layer[entry.layer], within[entry.layer] = measured or (math.nan, True)
        if measured is None:
            unmeasured.add(entry.layer)
    renormed = {entry.layer for entry in plan.layers if entry.sides in ("around", "within") or entry.layer in owners}
    bounds = {entry.layer: entry.certificate.bound for entry in plan.layers if entry.certificate.bound is not None}
    output_error = _absolute_error(got, wanted)
    # Where layers are scaled, the outputs are those of networks that nothing is claimed for.
    whole = plan.certificate if scale is None or has_inputs else None
    output_bound = None if whole is None else whole.bound
    within_inputs = whole is None or whole.inputs_within is None or _peak(call) <= whole.inputs_within
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
        relative_error=_relative_error(got, wanted),
        per_layer=per_layer,
        gradient_gain=dict.fromkeys(per_layer, math.nan)
        | {
            name: _ratio(probe.gradients[name], wanted_probe.gradients[name])
            for name in probe.gradients
            if name not in renormed  # there it is the gradient of something else
        },
        exact=len(got) == len(wanted) and all(_equal(one, other) for one, other in zip(got, wanted, strict=True)),
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
    if next(_encodings(entry.layer, plan), None) is not None:  # a scale of its own, which its weights undo
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


# ---- running and probing ---------------------------------------------------------------------------------------------


@dataclass
class _Probe:
    """What hooks saw in one run: first tensors entering and leaving modules, and gradients at the layers' inputs."""

    entering: dict[str, torch.Tensor] = field(default_factory=dict)
    leaving: dict[str, torch.Tensor] = field(default_factory=dict)
    handed_on: dict[str, _HandedOn] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)


def _run(
    model: nn.Module, modules: Mapping[str, nn.Module], plan: Plan, inputs: Call, *, watch: bool, differentiate: bool
) -> tuple[list[torch.Tensor], _Probe]:
    """Run the model once, in the same random state each time, and differentiate the loss where the model allows it."""
    try:
        return _run_once(model, modules, plan, inputs, watch=watch, differentiate=differentiate)
    except RuntimeError:  # an op without a derivative, or one that overwrites what its derivative needs
        if not differentiate:
            raise
        return _run_once(model, modules, plan, inputs, watch=watch, differentiate=False)


def _run_once(
    model: nn.Module, modules: Mapping[str, nn.Module], plan: Plan, inputs: Call, *, watch: bool, differentiate: bool
) -> tuple[list[torch.Tensor], _Probe]:
    probe = _Probe()
    nudges: dict[str, torch.Tensor] = {}
    watched = dict.fromkeys(name for entry in plan.layers for name in (entry.layer, *entry.consumers))

    def enter(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            tensor = first_tensor((args, kwargs))
            if tensor is None or name in probe.entering:
                return None
            probe.entering[name] = tensor.detach().clone()
            if not differentiate or not tensor.is_floating_point() or name not in layers:
                return None
            # Zeros that are added: the gradient that reaches them is the gradient that reaches the layer.
            nudges[name] = torch.zeros_like(tensor, requires_grad=True)
            return replace_first_tensor((args, kwargs), torch.where(nudges[name] == 0, tensor + nudges[name], tensor))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None and name not in probe.leaving:
                probe.leaving[name] = tensor.detach().clone()
                if name in layers and name in probe.entering and _is_leaf(module):
                    followers.watch(name, tensor, probe.entering[name])

        return hook

    def leave_stacked(places: dict[int, str]) -> Callable[..., None]:
        def note(place: int, entering: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
            if place in places and places[place] not in probe.entering:
                probe.entering[places[place]] = entering.detach().clone()
                probe.leaving[places[place]] = leaving.detach().clone()
            return leaving

        def hook(module: nn.RNNBase, args: Any, kwargs: Any, output: Any) -> None:
            with torch.no_grad():
                run_by_layer(module, args, kwargs, note)

        return hook

    layers = {entry.layer for entry in plan.layers}
    followers = _Followers()
    with ExitStack() as stack, torch.random.fork_rng(), torch.set_grad_enabled(differentiate):
        torch.manual_seed(0)
        for recurrent, places in _stacked({name: modules[name] for name in watched}):
            stack.callback(recurrent.register_forward_hook(leave_stacked(places), with_kwargs=True).remove)
        for name in (name for name in watched if place_of(name, modules[name]) is None):
            stack.callback(modules[name].register_forward_pre_hook(enter(name), with_kwargs=True).remove)
            stack.callback(modules[name].register_forward_hook(leave(name)).remove)
        # The caller's inputs are kept from in-place ops of the model.
        args, kwargs = pytree.tree_map(copied, inputs)
        with followers if watch else nullcontext():
            outputs = list(tensors_in(model(*args, **kwargs)))
        probe.handed_on = followers.handed_on
        found = _gradients(outputs, nudges) if differentiate else {}
        for name in nudges if differentiate else layers:
            gradient = found.get(name)
            if gradient is not None:
                gradient = _per_value(name, plan, gradient.double()) if watch else gradient.double()
            probe.gradients[name] = (0.0 if gradient is None else float(gradient.norm())) if differentiate else math.nan
    return [output.detach() for output in outputs], probe


def _gradients(outputs: list[torch.Tensor], nudges: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """The gradient that reaches each layer's input; ``None`` where there is none."""
    parts = [
        output.double().square().mean() for output in outputs if output.is_floating_point() and output.requires_grad
    ]
    if not parts or not nudges:
        return dict.fromkeys(nudges)
    found = torch.autograd.grad(
        torch.stack([part.cpu() for part in parts]).sum(), list(nudges.values()), allow_unused=True
    )
    return dict(zip(nudges, found, strict=True))


@contextmanager
def _reference(modules: Mapping[str, nn.Module], plan: Plan) -> Iterator[None]:
    """The network that the plan aims at, made by hooks."""
    cut = {entry.layer: modules[entry.layer] for entry in plan.layers if entry.target == "input" and entry.gain == 1.0}
    nulled = [entry for entry in plan.layers if entry.target == "null"]
    with ExitStack() as stack:
        stack.enter_context(_cut_out(cut))
        for entry in plan.layers:
            if entry.layer in cut:
                continue
            if entry.window:
                factor = entry.gain if entry.target == "damped" else 0.0
                handle = modules[entry.layer].register_forward_hook(_windowed(entry.window, factor), with_kwargs=True)
                stack.callback(handle.remove)
                continue
            if entry.target in _HANDING_ON:
                partial = entry.target == "partial"
                stack.enter_context(_cut_out({entry.layer: modules[entry.layer]}, entry.gain, partial=partial))
                continue
            if entry.target in ("mean", "offset"):
                stack.enter_context(_set_to_values(modules, entry))
                continue
            factor = {"null": 0.0, "fill": 0.0}.get(entry.target, entry.gain)
            if place_of(entry.layer, modules[entry.layer]) is not None or _part(entry, {}) is not None:
                continue
            if entry.consumers and entry.sides in ("out", "both"):
                for name in entry.consumers:
                    stack.callback(modules[name].register_forward_pre_hook(_times_in(factor), with_kwargs=True).remove)
            else:
                times = _times_out(factor, residual=entry.target == "damped")
                for name in entry.consumers or (entry.layer,):  # a batch norm behind the layer ends it
                    stack.enter_context(_changed(modules[name], times))
        for recurrent, places in _stacked({entry.layer: modules[entry.layer] for entry in nulled}):
            hand_on = _times_stacked(places, 0.0)
            stack.callback(recurrent.register_forward_hook(_by_layer(hand_on), with_kwargs=True).remove)
        yield


@contextmanager
def _set_to_values(modules: Mapping[str, nn.Module], entry: LayerPlan) -> Iterator[None]:
    """Replace what a layer hands on, or adds, or what its consumers read, by the values of its entry."""

    def values(tensor: torch.Tensor) -> torch.Tensor:
        shape = [len(entry.values) if dim == entry.axis % tensor.dim() else 1 for dim in range(tensor.dim())]
        return torch.tensor(entry.values, dtype=torch.float64).reshape(shape).to(tensor).expand_as(tensor)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        tensor = first_tensor((args, kwargs))
        return None if tensor is None else replace_first_tensor((args, kwargs), values(tensor))

    def leave(module: nn.Module, entering: torch.Tensor | None, leaving: torch.Tensor | None, output: Any) -> Any:
        if entering is None or leaving is None:
            return None
        set_to = values(leaving) if entry.target == "mean" else entering + values(leaving)
        return replace_first_tensor(output, set_to)

    with ExitStack() as stack:
        if entry.sides == "out":
            for name in entry.consumers:
                stack.callback(modules[name].register_forward_pre_hook(enter, with_kwargs=True).remove)
        else:
            ends = entry.consumers[0] if entry.consumers else entry.layer  # a batch norm behind the layer ends it
            stack.enter_context(_changed(modules[ends], leave))
        yield


def _windowed(window: tuple[int, ...], factor: float) -> Callable[..., Any]:
    """A hook that leaves of a block what its skip connection does, and a factor of the rest."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        entering, leaving = first_tensor((args, kwargs)), first_tensor(output)
        if entering is None or leaving is None:
            return None
        kept = _through(window, entering, leaving)
        return replace_first_tensor(output, kept + factor * (leaving - kept) if factor else kept)

    return hook


def _through(window: tuple[int, ...], entering: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
    """The elements of what enters that the window leaves, in zeros of the shape of what leaves."""
    kept = torch.zeros_like(leaving)
    target, source = kept, entering
    for dim, (before, first, step, count) in enumerate(zip(*[iter(window)] * 4, strict=True)):
        target = target.narrow(dim, before, count)
        source = source[(slice(None),) * dim + (slice(first, first + step * (count - 1) + 1, step),)]
    target.copy_(source)
    return kept


def _times_in(factor: float) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        tensor = first_tensor((args, kwargs))
        return None if tensor is None else replace_first_tensor((args, kwargs), tensor * factor)

    return hook


def _times_out(factor: float, *, residual: bool) -> Change:
    def change(module: nn.Module, entering: torch.Tensor | None, leaving: torch.Tensor | None, output: Any) -> Any:
        is_recurrent = isinstance(module, nn.RNNBase | nn.RNNCellBase)
        if leaving is None:
            return None
        if residual and entering is not None:
            return replace_first_tensor(output, entering + factor * (leaving - entering))
        if is_recurrent:  # its state is its output too
            return pytree.tree_map(lambda part: part * factor if isinstance(part, torch.Tensor) else part, output)
        return replace_first_tensor(output, factor * leaving)

    return change


# ---- errors ----------------------------------------------------------------------------------------------------------


def _layer_error(entry: LayerPlan, plan: Plan, got: _Probe, wanted: _Probe) -> tuple[float, bool] | None:
    """The largest error of what a layer hands on, and whether its input stayed within the assumed bound.

    ``None`` where the value cannot be seen: no number is better than a wrong one.
    """
    part = _part(entry, {})
    if part is not None:
        place = entry.consumers[0] if entry.consumers else entry.layer
        if place not in got.leaving or place not in wanted.leaving:  # a module that is called through its weights only
            return None
        return _largest(got.leaving[place], wanted.leaving[place], wanted.leaving[place]), True
    if entry.target == "null" and entry.sides != "out":
        leaving = got.leaving[entry.layer]
        return float(leaving.double().abs().max()) if leaving.numel() else 0.0, True
    if entry.target not in _HANDING_ON:
        # What reads a layer shows whether its contribution is as wanted, unless that is a layer of the plan itself.
        planned = {other.layer for other in plan.layers}
        places = [name for name in entry.consumers if name not in planned]
        place = places[0] if places else entry.layer
        return _largest(got.leaving[place], wanted.leaving[place], wanted.leaving[place]), True
    seen = got.handed_on.get(entry.layer)
    if seen is None:  # a container, which ends where it ends, or a recurrent layer, which is complete in itself
        seen = _HandedOn(got.leaving[entry.layer], got.entering[entry.layer], activated=True)
    if entry.activation and not seen.activated:  # by no function that could be seen: then its reader shows the value
        read = [got.entering[name] for name in entry.consumers if name in got.entering]
        if not read or read[0].numel() != seen.entered.numel():
            return None
        seen = _HandedOn(read[0], got.entering[entry.layer])
    if entry.sides == "within":
        return None
    if entry.sides == "around":  # what enters it is encoded by the norm before it: the reference has it plain
        return _largest(seen.value, wanted.entering[entry.layer], wanted.entering[entry.layer]), True
    entering = _decoded(entry.layer, plan, seen.entered.double())
    handed_on = seen.value.double() if entry.epsilon is None else _decode(entry, seen.value.double())
    if entry.activation in ("lstm", "gru", "rnn"):
        entering = per_direction(entering, handed_on)
    if entry.window:
        entering = _through(entry.window, entering, handed_on)
    elif entry.target == "partial":
        entering = _fitted(entering, handed_on)
    if handed_on.numel() != entering.numel():
        return None
    expected = entry.gain * entering.reshape(handed_on.shape)
    if entry.input_bound is None:
        return _largest(handed_on, expected, expected), True
    peak = float(entering.abs().max()) if entering.numel() else 0.0
    return float((handed_on - expected).abs().max()) / entry.input_bound, peak <= entry.input_bound


def _encodings(layer: str, plan: Plan) -> Iterator[tuple[LayerPlan, tuple[int, tuple[int, int]] | None]]:
    """The pass-throughs that a layer reads, and which part of its input each is: a dimension and a range of it.

    ``None``: all of it. The range is that of the layer's weights which undo the scale.
    """
    # The first of stacked layers reads what its module reads.
    names = {layer, module_name(layer, {}) if layer.endswith("[0]") else layer}
    for entry in plan.layers:
        reads = any(name in names or name.startswith(f"{layer}.") for name in entry.consumers)
        if not reads or entry.target not in _HANDING_ON or entry.epsilon is None or entry.layer == layer:
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
    """A view of the part of a layer's input that ``_encodings`` names."""
    if place is None:
        return tensor
    dim, (first, last) = place
    return tensor.narrow(dim, first, last - first)


def _per_value(layer: str, plan: Plan, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient at a layer's input by the values that the pass-throughs which it reads hand on: times ε φ'(a)."""
    gradient = gradient.clone()
    for entry, place in _encodings(layer, plan):
        assert entry.epsilon is not None
        assert entry.slope is not None
        _part_of(gradient, place).mul_(entry.epsilon * entry.slope)
    return gradient


def _decoded(layer: str, plan: Plan, tensor: torch.Tensor) -> torch.Tensor:
    """What enters a layer, decoded where that is a pass-through's."""
    tensor = tensor.clone()
    for entry, place in _encodings(layer, plan):
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
    if got.numel() == 0 or _equal(got, wanted):
        return 0.0
    peak = float(scale.double().abs().max())
    difference = float((got.double() - wanted.double()).abs().max())
    return difference / peak if peak else difference


def _absolute_error(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    pairs = [(one, other) for one, other in zip(got, wanted, strict=True) if other.is_floating_point()]
    # What equals, infinities and NaN included, has no error.
    return max((0.0 if _equal(one, other) else _difference(one, other) for one, other in pairs), default=0.0)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def _peak(tree: Any) -> float:
    """The largest magnitude among floating-point tensors."""
    floating = [tensor for tensor in tensors_in(tree) if tensor.is_floating_point() and tensor.numel()]
    return max((float(tensor.detach().abs().max().double()) for tensor in floating), default=0.0)


def _relative_error(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    pairs = [
        (one.double(), other.double()) for one, other in zip(got, wanted, strict=True) if other.is_floating_point()
    ]
    difference = math.sqrt(sum(float((one - other)[one != other].square().sum()) for one, other in pairs))
    size = math.sqrt(sum(float(other.square().sum()) for _, other in pairs))
    return difference / size if size else difference


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    same = one == other
    return bool((same | (one != one) & (other != other)).all())


def _ratio(one: float, other: float) -> float:
    return one / other if other else (1.0 if one == 0.0 else math.nan)
