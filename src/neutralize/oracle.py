"""The oracle: networks that a plan is measured against, made of hooks on modules alone.

The excised network has the layers cut out. What a plan aims at otherwise (a factor, a value, the part that fits) is
made of hooks too. They share with the planner what counts as an activation (``activations.identify``), and nothing
else: not the dataflow, not the search, not the formulas.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from neutralize.activations import FUNCTION_NAMES, GRID, identify
from neutralize.dataflow import first_tensor, replace_first_tensor
from neutralize.errors import NeutralizeError
from neutralize.parts import Part, part_of
from neutralize.plan import LayerPlan, Plan
from neutralize.select import Layers, select, unwrap
from neutralize.stacked import HandOn, per_direction, place_of, run_by_layer

HANDING_ON = ("input", "partial")
"""Targets of a layer that hands its input on, or the part of it that fits."""

# Functions that work element by element; ``x * y`` comes as ``mul``, ``2 - x`` as ``__rsub__``.
_POINTWISE = FUNCTION_NAMES | frozenset(
    """abs add addcmul atan ceil clamp clamp_max clamp_min clip cos cosh div divide erf erfc exp exp2 expm1 floor
    log log10 log1p log2 logaddexp max maximum min minimum mul multiply neg negative pow radd rdiv reciprocal rmul rpow
    rsqrt rsub rtruediv acos acosh asin asinh atan2 atanh erfinv lerp logit sign sinc sinh sqrt square sub subtract tan
    true_divide truediv where float_power hypot gt ge lt le eq ne logical_not""".split()
)


# Views between a layer and its activation: followed as long as they keep every element.
_VIEWS = frozenset(
    """view view_as reshape reshape_as flatten unflatten permute transpose t swapaxes swapdims movedim moveaxis squeeze
    unsqueeze contiguous clone""".split()
)


@dataclass
class HandedOn:
    """What a layer handed on in its first call, and what had entered it, in the same arrangement."""

    value: torch.Tensor
    entered: torch.Tensor
    activated: bool = False


class Followers(TorchFunctionMode):
    """Follow layers' outputs through the norm and activation that belong to them, functions and modules alike.

    Cut layers' inputs are handed past both; of watched layers it is noted what comes out behind both.

    An activation that several functions compute is known by its values only when the last of them has run. So a second
    computation runs beside the real one, on ``activations.GRID``: the steps from a cut layer on, as if nothing had been
    skipped. When it has the values of an activation, what has been computed for real gives way to the layer's input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handed_on: dict[str, HandedOn] = {}
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
            self.handed_on[layer] = HandedOn(leaving.detach().clone(), entered)
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
            self.handed_on[watched[0]] = HandedOn(result.detach().clone(), watched[1])
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
                self.handed_on[watched[0]] = HandedOn(result.detach().clone(), watched[1], activated=True)
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
    mode = Followers()
    with ExitStack() as stack:
        for name, module in layers.items():
            if place_of(name, module) is None:
                stack.enter_context(_changed(module, _cut(name, module, mode, gain, partial=partial)))
        for recurrent, places in stacked(layers):
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


def part_in(entry: LayerPlan, modules: Mapping[str, nn.Module]) -> Part | None:
    """The part of a module that an entry stands for; ``None``: it is a module."""
    return None if entry.layer in modules else part_of(entry.layer)


def is_plain(module: nn.Module) -> bool:
    """Whether what follows a module belongs to it; a recurrent layer is complete, and a container is what it holds."""
    return next(module.children(), None) is None and not isinstance(module, nn.RNNBase | nn.RNNCellBase)


def stacked(layers: Mapping[str, nn.Module]) -> list[tuple[nn.RNNBase, dict[int, str]]]:
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
        return entering if entering.shape == leaving.shape else fitted(entering, leaving)

    return hand_on


def _times_stacked(places: Mapping[int, str], factor: float) -> HandOn:
    return lambda place, entering, leaving: factor * leaving if place in places else leaving


def _wrong_shape(name: str, entering: torch.Tensor | None, leaving: torch.Tensor | None) -> NeutralizeError:
    shapes = [None if tensor is None else list(tensor.shape) for tensor in (entering, leaving)]
    return NeutralizeError(
        f"excised: expected layer {name!r} to return its input's shape, got {shapes[0]} in and {shapes[1]} out; only a "
        "layer that keeps the shape can be cut out"
    )


def _cut(name: str, module: nn.Module, mode: Followers, gain: float, *, partial: bool) -> Change:
    plain = is_plain(module)

    def change(module: nn.Module, entering: torch.Tensor | None, leaving: torch.Tensor | None, output: Any) -> Any:
        if isinstance(module, nn.RNNBase) and module.bidirectional and entering is not None and leaving is not None:
            entering = per_direction(entering, leaving)
        if partial and entering is not None and leaving is not None:
            entering = fitted(entering, leaving)
        if entering is None or leaving is None or entering.shape != leaving.shape:
            raise _wrong_shape(name, entering, leaving)
        entering = entering if gain == 1.0 else entering * gain
        return replace_first_tensor(output, mode.hand_on(entering) if plain else entering)

    return change


def fitted(entering: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
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


@contextmanager
def reference(modules: Mapping[str, nn.Module], plan: Plan) -> Iterator[None]:
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
            if entry.target in HANDING_ON:
                partial = entry.target == "partial"
                stack.enter_context(_cut_out({entry.layer: modules[entry.layer]}, entry.gain, partial=partial))
                continue
            if entry.target in ("mean", "offset"):
                stack.enter_context(_set_to_values(modules, entry))
                continue
            factor = {"null": 0.0, "fill": 0.0}.get(entry.target, entry.gain)
            if place_of(entry.layer, modules[entry.layer]) is not None or part_in(entry, {}) is not None:
                continue
            if entry.consumers and entry.sides in ("out", "both"):
                for name in entry.consumers:
                    stack.callback(modules[name].register_forward_pre_hook(_times_in(factor), with_kwargs=True).remove)
            else:
                times = _times_out(factor, residual=entry.target == "damped")
                for name in entry.consumers or (entry.layer,):  # a batch norm behind the layer ends it
                    stack.enter_context(_changed(modules[name], times))
        for recurrent, places in stacked({entry.layer: modules[entry.layer] for entry in nulled}):
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
        kept = through(window, entering, leaving)
        return replace_first_tensor(output, kept + factor * (leaving - kept) if factor else kept)

    return hook


def through(window: tuple[int, ...], entering: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
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
