"""Plan: from a selection and a strategy to a list of edits; nothing is written."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from neutralize import adapters, ops
from neutralize.certify import Interpretation
from neutralize.dataflow import Call, Dataflow, Inputs, copied, first_tensor, own_inputs, placed_inputs, trace
from neutralize.distributed.wrapped import as_whole
from neutralize.errors import NeutralizeError
from neutralize.parts import Part, part_of
from neutralize.plan import Assign, Copy, Edit, Fold, LayerPlan, Plan, Rewrite, dtype_name
from neutralize.search import IDENTITY, Assignment, Preference, Search
from neutralize.select import Layers, select, tensors_of, unwrap
from neutralize.sites import affine_site
from neutralize.spread import Spread, measure
from neutralize.stacked import place_of
from neutralize.undo import untouched

if TYPE_CHECKING:
    from neutralize.checkpoint.handle import Checkpoint

_LOGGER = logging.getLogger(__name__)

BOUND_MARGIN = 1.25
"""What a measured input bound is multiplied by: inputs a quarter larger than the example's are still covered."""


@dataclass(frozen=True)
class Draft:
    """What a strategy wants for one layer.

    Attributes:
        edits: in the order in which they are to be written.
        layer: the entry for the plan; its ``edits`` are filled in by the planner.
    """

    edits: tuple[Edit, ...]
    layer: LayerPlan


class Strategy(Protocol):
    """A frozen dataclass that holds its own numbers and drafts the edits of a layer."""

    @property
    def name(self) -> str:
        """The strategy's name in ``STRATEGIES``."""
        ...

    def draft(self, request: Request, layer: str) -> Draft:
        """Draft the edits of one selected layer, or raise a ``NeutralizeError`` with the reason."""
        ...


@dataclass
class Request:
    """What a strategy may ask about: the model, the selection, the dataflow, measured bounds.

    Attributes:
        model: the model; only read.
        layers: the selected layers, by qualified name, in model order.
        example_inputs: as given by the caller.
        is_thorough: export the model, where recording it on the meta device would be quicker.
        remembered: what a strategy found out about layers and needs again when it drafts their neighbours.
    """

    model: nn.Module
    layers: dict[str, nn.Module]
    example_inputs: Inputs | None = None
    is_thorough: bool = False
    remembered: dict[str, dict[str, Any]] = field(default_factory=dict)
    _bounds: dict[str, float] = field(default_factory=dict)
    _written: dict[str, tuple[float, float]] = field(default_factory=dict)
    _whole: Request | None = None

    def part(self, layers: Iterable[str]) -> Request:
        """A request for some of the layers, as if no other had been selected; the model is traced once for all parts.

        Args:
            layers: qualified names among ``self.layers``.
        """
        wanted = set(layers)
        chosen = {name: module for name, module in self.layers.items() if name in wanted}
        return Request(self.model, chosen, self.example_inputs, _whole=self)

    @cached_property
    def flow(self) -> Dataflow:
        """The traced model; traced at the first use."""
        if self._whole is not None:
            whole = self._whole.flow
            return replace(whole, calls={name: whole.calls[name] for name in self.layers})
        return trace(self.model, self.layers, self.example_inputs, is_thorough=self.is_thorough)

    @cached_property
    def analysed(self) -> dict[Any, Any]:
        """What was found out about blocks, by their likeness; parts of a request share it."""
        return {} if self._whole is None else self._whole.analysed

    @cached_property
    def spreads(self) -> dict[fx.Node, Spread]:
        """The spread that each norm of the model divides by, where that can be measured; measured at the first use."""
        return measure(self)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by every name."""
        return tensors_of(self.model)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Modules by every name."""
        return dict(self.model.named_modules(remove_duplicate=False))

    @cached_property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Name to every name of the same tensor."""
        from neutralize.apply import aliases_of

        return aliases_of(self.tensors)

    @cached_property
    def cut(self) -> dict[fx.Node, fx.Node]:
        """Results of the selected layers, with what enters them: in the network without them the one is the other."""
        found = {}
        for layer, calls in self.flow.calls.items():
            for call in calls:
                if self.place(layer) is not None or self.fraction(layer) is not None:
                    continue  # what enters and leaves it is not in the graph
                site = affine_site(self.flow, call)
                found[call.exit if site is None or site.inside else site.result] = call.entry
        return found

    @property
    def regions(self) -> list[tuple[int, int]]:
        """Position ranges of every call of every selected layer."""
        return [(call.first, call.last) for calls in self.flow.calls.values() for call in calls]

    @property
    def premise(self) -> str:
        """What everything that is read off the dataflow assumes, in words."""
        return "finite activations" + (", the control flow of the example inputs" if self.flow.is_recorded else "")

    def place(self, layer: str) -> int | None:
        """Which stacked layer of its module a layer is, from 0; ``None``: it is a module."""
        return place_of(layer, self.layers[layer])

    def fraction(self, layer: str) -> Part | None:
        """Which part of its module a layer is (heads, channels, experts); ``None``: it is a module."""
        return None if layer in self.modules else part_of(layer)

    def require_module(self, layer: str, strategy: str) -> None:
        """Check that a layer is a module, and not a part or one of the stacked layers of one.

        Raises:
            NeutralizeError: it is one.
        """
        part = self.fraction(layer)
        if part is not None:
            raise NeutralizeError(
                f"plan: expected a module for strategy {strategy!r}, got {layer!r}, {part.kind} of one; use "
                "strategy='zero' or 'damp', or select the module"
            )
        if self.place(layer) is not None:
            raise NeutralizeError(
                f"plan: expected a module for strategy {strategy!r}, got {layer!r}, one of the stacked layers of one; "
                "use strategy='passthrough' or 'zero', or select the module"
            )

    def calls(self, layer: str) -> list[Call]:
        """The calls of a layer."""
        return self.flow.calls[layer]

    def search(self, layer: str, preference: Preference = "cheapest") -> list[Search]:
        """Searches of a layer, one per call."""
        return [Search(self.flow, call, self.regions, preference) for call in self.calls(layer)]

    def is_leaf(self, layer: str) -> bool:
        """Whether the layer has parameters of its own and no layers inside."""
        module = self.layers[layer]
        return next(module.children(), None) is None and next(module.parameters(recurse=False), None) is not None

    def canonical(self, name: str) -> str:
        """The first of the names of one tensor: two edits of tied parameters are seen to be one."""
        same = [alias for alias in self.aliases[name] if self.tensors[alias] is self.tensors[name]]
        return next(alias for alias in self.tensors if alias in same)

    def rewrite(self, name: str, **coefficients: Any) -> Rewrite:
        """A rewrite of a parameter, with its shape and dtype filled in."""
        tensor, name = self.writable(name), self.canonical(name)
        return Rewrite(name, tuple(tensor.shape), dtype_name(tensor.dtype), **coefficients)

    def fold(
        self,
        weight: str,
        bias: str,
        *,
        scale: float,
        shift: float,
        transposed: bool = False,
        columns: tuple[int, int] | None = None,
        groups: int = 1,
    ) -> Fold:
        """A fold of a weight into a bias, with shape and dtype filled in."""
        tensor = self.writable(weight)
        self.writable(bias)
        weight, bias = self.canonical(weight), self.canonical(bias)
        shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
        return Fold(weight, bias, shape, dtype, scale, shift, transposed, columns, groups)

    def writable(self, name: str) -> torch.Tensor:
        """The tensor of that name if it can be rewritten.

        Raises:
            NeutralizeError: it is of a type that is not rewritten (integers, packed quantized weights).
        """
        tensor = self.tensors[name]
        if is_lazy(tensor):
            raise NeutralizeError(
                f"plan: expected {name!r} to hold data, got a lazy parameter; run the model once first"
            )
        if tensor.dtype not in ops.DTYPES:
            known = ", ".join(dtype_name(dtype) for dtype in ops.DTYPES)
            raise NeutralizeError(
                f"plan: expected one of {known} for {name!r}, got {dtype_name(tensor.dtype)}; dequantize the layer "
                "first"
            )
        return tensor

    def edits_for(self, assignment: Assignment) -> tuple[Rewrite, ...]:
        """The rewrites that carry out an assignment of constants and identities."""
        return tuple(
            self.rewrite(name, diagonal=1.0) if value == IDENTITY else self.rewrite(name, fill=float(value))
            for name, value in assignment.items()
        )

    def note_written(self, edits: tuple[Edit, ...]) -> None:
        """Note what a draft sets parameters to: another layer's rescale may fall on them."""
        self._written.update(
            (edit.parameter, (edit.diagonal, edit.fill))
            for edit in edits
            if isinstance(edit, Rewrite) and edit.scale == 0
        )

    def written_peak(self, name: str) -> float | None:
        """The largest magnitude that a draft so far sets in a parameter; ``None``: none sets it."""
        diagonal, fill = self._written.get(self.canonical(name), (None, 0.0))
        return None if diagonal is None else abs(diagonal) + abs(fill)

    def is_diagonal(self, name: str) -> bool:
        """Whether a draft so far sets a weight to a diagonal, or to zero."""
        return self._written.get(self.canonical(name), (0.0, 1.0))[1] == 0.0

    def input_bound(self, layer: str) -> float:
        """A bound on the magnitude of what enters a layer, measured on the example inputs with ``BOUND_MARGIN``.

        The selected layers are cut out while it is measured: that is the network in which the layer will work.

        Raises:
            NeutralizeError: there are no example inputs or no weights to measure with, or the input is not finite.
        """
        if not self._bounds:
            self._bounds = self._measure()
        bound = self._bounds[layer]
        if not 0 < bound < float("inf"):
            raise NeutralizeError(
                f"plan: expected a finite input of layer {layer!r} that is not all zero, got a largest magnitude of "
                f"{bound}; "
                "give input_bound, or other example_inputs"
            )
        return bound

    @property
    def is_runnable(self) -> bool:
        """Whether there are inputs, and weights, to run the model with."""
        return self.inputs is not None and not any(tensor.is_meta for tensor in self.tensors.values())

    @property
    def inputs(self) -> Inputs | None:
        """The example inputs given, or those that the model brings itself."""
        return self.example_inputs if self.example_inputs is not None else own_inputs(self.model)

    def _measure(self) -> dict[str, float]:
        if not self.is_runnable:
            lacking = "weights (this is a meta or sharded model)" if self.inputs is not None else "example_inputs"
            remedy = "" if self.inputs is not None else "example_inputs=, or "
            raise NeutralizeError(
                f"plan: expected a bound on the input of {', '.join(map(repr, self.layers))}, got no {lacking} to "
                "measure it "
                f"with; give {remedy}input_bound=, the largest magnitude that enters the layer"
            )
        peaks = dict.fromkeys(self.layers, 0.0)

        def watch(layer: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                tensor = first_tensor((args, kwargs))
                if tensor is not None and tensor.is_floating_point() and tensor.numel():
                    peak = float(tensor.detach().abs().max().double())
                    peaks[layer] = peak if peak != peak else max(peaks[layer], peak)

            return hook

        self.run_excised([(module, watch(layer)) for layer, module in self.layers.items()])
        return {layer: BOUND_MARGIN * peak for layer, peak in peaks.items()}

    def run_excised(self, hooks: list[tuple[nn.Module, Callable[..., None]]]) -> None:
        """Run the example inputs through the network without the selected layers; the model is left as it was.

        Args:
            hooks: modules, and what is called with (module, args, kwargs) before each of their calls.

        Raises:
            NeutralizeError: the model does not accept the inputs.
        """
        from neutralize.oracle import excised

        given = self.inputs
        assert given is not None
        parts = [layer for layer in self.layers if self.fraction(layer) is not None]
        if parts:
            raise NeutralizeError(
                f"plan: expected modules beside layers whose input has to be measured, got {parts[0]!r}; plan them one "
                "after the other, or give input_bound="
            )
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
        args, kwargs = placed_inputs(self.model, given)
        selected: list[Layers] = [layer or self.model for layer in self.layers]
        try:
            with torch.no_grad(), untouched(self.model), excised(self.model, selected, partial=True):
                self.model(*pytree.tree_map(copied, args), **pytree.tree_map(copied, kwargs))
        except NeutralizeError:
            raise
        except Exception as error:
            raise NeutralizeError(
                f"plan: expected example_inputs that the model accepts, got {type(error).__name__}: {error}; give "
                "others, or "
                "input_bound="
            ) from error
        finally:
            for handle in handles:
                handle.remove()


def plan(
    model: nn.Module | Checkpoint | str | PathLike[str],
    layers: Layers,
    strategy: str | Strategy = "auto",
    *,
    example_inputs: Inputs | None = None,
    **options: Any,
) -> Plan:
    """Work out what to write so that the selected layers are off. Pure: nothing is written.

    Args:
        model: live or on the meta device; or a checkpoint, or its path: the model is then built on the meta device from
            its ``config.json``.
        layers: see ``neutralize.select``.
        strategy: a name (``auto``, ``passthrough``, ``zero``, ``constant``, ``damp``, ``mean``) or a strategy
            object.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments for ``model``. They
            give the shapes of the trace and, where a bound on a layer's input is needed and not given, its measured
            range. May be left out where the model brings its own (``dummy_inputs`` of transformers), where its first
            layer tells its input (``Linear``, ``Embedding``, convolution), or where the strategy needs none.
        **options: parameters of the strategy, if it is given by name.

    Returns:
        The plan.

    Raises:
        NeutralizeError: the selection is empty or unknown, an option is unknown, or a layer cannot be switched off this
            way; the message says why and what would work. All layers that fail are listed.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> made = plan(model, "0")
        >>> made.parameters, made.written_bytes, made.certificate.kind
        (('0.weight', '0.bias'), 80, 'exact')
    """
    from neutralize.strategies import resolve

    if not isinstance(model, nn.Module):
        from neutralize.checkpoint.handle import as_checkpoint

        checkpoint = as_checkpoint(model)
        if checkpoint is not None:
            model = checkpoint.model
    if torch.empty(0).device.type == "meta":
        raise NeutralizeError(
            'plan: expected a default device that computes, got meta; plan after the `with torch.device("meta")` in '
            "which the model is made, or torch.set_default_device(None)"
        )
    module = unwrap(model)
    started = time.perf_counter()
    with as_whole(module):
        made = drafted(Request(module, select(module, layers), example_inputs), resolve(strategy, options))
    made = replace(made, planning_s=time.perf_counter() - started)
    _log(made, module)
    return made


def _log(made: Plan, model: nn.Module) -> None:
    if not _LOGGER.isEnabledFor(logging.INFO):
        return  # the digest is work
    what = made.layers[0].layer or "the model"
    if len(made.layers) > 1:
        what += f" and {len(made.layers) - 1} more"
    _LOGGER.info(
        "plan %s: %s by %s, %s, %d bytes, %.2f s, plan %s",
        type(model).__name__,
        what,
        made.strategy,
        made.certificate.kind,
        made.written_bytes,
        made.planning_s,
        made.digest[:12],
    )
    for entry in made.layers:
        _LOGGER.debug("plan: %s is off as %s by %d edit(s)", entry.layer, entry.certificate, len(entry.edits))
    for edit in made.edits:
        _LOGGER.debug("plan: %s", edit.describe())


def drafted(request: Request, chosen: Strategy) -> Plan:
    """Let a strategy draft every layer of a request, and join the drafts to a plan.

    Raises:
        NeutralizeError: see ``plan``.
    """
    made: dict[str, Draft] = {}
    failed: dict[str, str] = {}
    premise = adapters.premise(request.model)
    for layer in reversed(request.layers):  # from behind: what a layer's scale falls on is known when it is chosen
        try:
            draft = chosen.draft(request, layer)
            refused = adapters.moved(request.model, (name for edit in draft.edits for name in edit.parameters))
            if refused:
                raise NeutralizeError(f"plan: {next(iter(refused.values()))}")
            made[layer] = replace(draft, layer=adapters.conditioned(draft.layer, premise))
            request.note_written(made[layer].edits)
        except NeutralizeError as error:
            failed[layer] = str(error)
    drafts = [made[layer] for layer in request.layers if layer in made]
    if failed and "flow" in request.__dict__ and request.flow.is_quick:  # the export keeps larger ops whole
        return drafted(Request(request.model, request.layers, request.example_inputs, is_thorough=True), chosen)
    if failed:
        problems = list(dict.fromkeys(failed[layer] for layer in request.layers if layer in failed))
        if len(problems) == 1:
            raise NeutralizeError(problems[0])
        listing = "".join(f"\n  - {problem}" for problem in problems)
        raise NeutralizeError(
            f"plan: expected layers that can be switched off, got {len(problems)} that cannot:{listing}"
        )
    return _merge(request, chosen.name, drafts)


def _merge(request: Request, strategy: str, drafts: list[Draft]) -> Plan:
    """Join the drafts, those further down the network first: a layer's rescale falls on what they wrote."""
    from neutralize.composition import compose

    order = list(range(len(drafts)))
    if "flow" in request.__dict__:
        order = sorted(order, key=lambda place: -request.calls(drafts[place].layer.layer)[-1].last)
    edits: list[Edit] = []
    places: dict[int, tuple[int, ...]] = {}
    for place in order:
        kept = []
        for edit in drafts[place].edits:
            if edit not in edits or not _is_idempotent(edit):
                _check_conflict(request, edits, edit)
                edits.append(edit)
                kept.append(len(edits) - 1)
            else:
                kept.append(edits.index(edit))
        places[place] = tuple(kept)
    _check_range(edits)
    _check_neighbours(request, edits, {draft.layer.layer: places[place] for place, draft in enumerate(drafts)})
    written = {name for edit in edits for name in edit.parameters}
    tied = _accepted_ties(request, written)
    entries = tuple(_with_edits(draft.layer, places[place]) for place, draft in enumerate(drafts))
    return Plan(strategy, tuple(edits), entries, tied, compose(request, entries))


def _with_edits(layer: LayerPlan, places: tuple[int, ...]) -> LayerPlan:
    return replace(layer, edits=places)


def _is_idempotent(edit: Edit) -> bool:
    return isinstance(edit, Assign | Copy) or (isinstance(edit, Rewrite) and edit.scale == 0)


def _check_conflict(request: Request, edits: list[Edit], edit: Edit) -> None:
    if not _is_idempotent(edit):
        written = {name for earlier in edits for name in earlier.parameters}
        twice = [name for name in edit.parameters if name in written and len(request.aliases[name]) > 1]
        if twice:
            also = ", ".join(repr(alias) for alias in request.aliases[twice[0]] if alias != twice[0])
            raise NeutralizeError(
                f"plan: expected layers with weights of their own, got {twice[0]!r}, which is tied to {also} and would "
                "be rescaled once for each; untie them first (clone the parameter)"
            )
        return
    for earlier in edits:
        if edit.parameters[0] in earlier.parameters and not _disjoint(earlier, edit):
            raise NeutralizeError(
                f"plan: expected layers that agree on {edit.parameters[0]!r}, got '{earlier.describe()}' for one and "
                f"'{edit.describe()}' for another; plan them one after the other"
            )


def _check_neighbours(request: Request, edits: list[Edit], places: Mapping[str, tuple[int, ...]]) -> None:
    """Check that no layer divides by what is written for another one.

    Raises:
        NeutralizeError: one does, and what it hands on may not be finite.
    """
    if "flow" not in request.__dict__ or len(places) < 2:
        return
    for layer, own in places.items():
        ours = {alias for place in own for name in edits[place].parameters for alias in request.aliases[name]}
        others = {alias for edit in edits for name in edit.parameters for alias in request.aliases[name]} - ours
        for call in request.calls(layer):
            reads = {request.flow.names.get(operand) for node in call.nodes for operand in node.all_input_nodes}
            shared = [name for name in others if name in reads]
            if shared and Interpretation(request.flow, call, {}, request.cut, changed=shared).may_break(call.exit):
                raise NeutralizeError(
                    f"plan: expected layers that stay finite when the others are off, got {layer!r}, which reads "
                    f"{shared[0]!r}, written for another, and may divide by it; use edit='outgoing', or select one"
                )


def _check_range(edits: list[Edit]) -> None:
    """Check that a parameter that is set for one layer and rescaled for another stays inside its format.

    Raises:
        NeutralizeError: it does not.
    """
    peaks: dict[str, float] = {}
    for edit in edits:
        if isinstance(edit, Assign | Copy):
            continue
        name = edit.parameter
        if isinstance(edit, Rewrite) and edit.scale == 0:
            peaks[name] = max(peaks.get(name, 0.0) * (edit.numel < edit.extent[0] * edit.extent[1]),
                              abs(edit.diagonal) + abs(edit.fill))  # fmt: skip
            continue
        grown = dict.fromkeys((name,), abs(edit.scale) * peaks[name]) if name in peaks else {}
        if isinstance(edit, Fold) and name in peaks:
            grown[edit.bias] = peaks.get(edit.bias, 0.0) + abs(edit.shift) * peaks[name]
        limit = torch.finfo(getattr(torch, edit.dtype)).max
        for what, peak in grown.items():
            if peak > limit:
                raise NeutralizeError(
                    f"plan: expected {what!r} to stay inside {edit.dtype} when it undoes the scale of the layer that "
                    f"it reads, got {peak:.3g}, for it is set for a layer of the plan itself; plan one of the two, or "
                    "use a wider dtype"
                )
        peaks.update(grown)


def _disjoint(one: Edit, other: Edit) -> bool:
    if not (isinstance(one, Rewrite) and isinstance(other, Rewrite)) or one.parameter != other.parameter:
        return False
    for first, second in ((one.rows, other.rows), (one.columns, other.columns)):
        if first is not None and second is not None and (first[1] <= second[0] or second[1] <= first[0]):
            return True
    return False


def _accepted_ties(request: Request, written: set[str]) -> tuple[tuple[str, ...], ...]:
    """The groups of tied names that the edits touch.

    Raises:
        NeutralizeError: one of the names belongs to a layer outside the selection.
    """
    groups: dict[frozenset[str], None] = {}
    for name in sorted(written):
        names = request.aliases[name]
        if len(names) < 2:
            continue
        owned = _owned(request, written, names)
        foreign = [other for other in names if other not in owned]
        if foreign:
            ours = next((other for other in names if other in owned), name)
            raise NeutralizeError(
                f"plan: expected {ours!r} to be read by the selected layers only, got a tensor that is tied to "
                f"{', '.join(map(repr, foreign))}; select that layer too, or untie it first (clone the parameter)"
            )
        groups[frozenset(names)] = None
    return tuple(tuple(sorted(group)) for group in groups)


def _owned(request: Request, written: set[str], names: tuple[str, ...]) -> set[str]:
    """Those of the names whose tensor is read by the selected layers, or is written for them knowingly."""
    if "flow" in request.__dict__:
        regions = request.regions
        position = request.flow.position
        readers = [position[user] for user in request.flow.users(names[0])]
        if readers and all(any(first < place < last for first, last in regions) for place in readers):
            return set(names)
    inside = {name for name in names for layer in request.layers if layer == "" or name.startswith(f"{layer}.")}
    return inside | ({name for name in names if name in written} if len(set(names) & written) == len(names) else set())


def describe_refusals(searches: list[Search]) -> str:
    """The parameters that a search would have used but may not, in words; empty if there are none."""
    reasons: Mapping[str, str] = {name: reason for search in searches for name, reason in search.refused.items()}
    return "; ".join(list(reasons.values())[:3])
