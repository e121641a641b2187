"""``mean``: the layer's output becomes its mean over given batches, baked into a bias (mean ablation).

A plain layer is zeroed, ``W = 0``, and the mean μ of what it handed on goes

- into its own bias, if no activation follows: ``b = μ``;
- else into the bias of what reads it, which then reads the constant φ(0): ``d ← d + V (μ - φ(0))``;
- or, where those have no bias to spare, into its own bias again: ``b = φ⁻¹(μ)``, which exists because a mean of values
  of a continuous function is one of its values.

A batch norm behind the layer is a part of it, and has the parameters that are written: ``γ = 0``, and μ goes into β. A
batch norm that reads the layer takes it into β too: ``β ← β + γ (μ - φ(0)) / √(σ² + ε)``.

A recurrent layer is zeroed and its gates shut; its mean goes into the biases of what reads it.

A block adds the mean of what it added: its branches are zeroed and the mean is the bias of the last projection.

Source: MATH §4 (which parameters null a branch), §2 (what a consumer's bias absorbs).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from neutralize.activations import Activation
from neutralize.dataflow import argument, copied, first_tensor, is_mark, op_name, placed_inputs, shape_of
from neutralize.errors import NeutralizeError
from neutralize.plan import Assign, Certificate, Edit, LayerPlan, dtype_name
from neutralize.planner import Draft, Request
from neutralize.progress import is_terminal
from neutralize.rules import is_number, is_transparent
from neutralize.search import Assignment
from neutralize.sites import Affine, AffineSite, Norm, affine_of, affine_site, norm_of
from neutralize.strategies.passthrough import identity_assignment
from neutralize.strategies.recurrent import draft_recurrent_null, is_recurrent, recurrent_reads
from neutralize.strategies.sides import check_own, unique
from neutralize.strategies.zero import zero_assignment
from neutralize.undo import untouched

Progress = Callable[[int, "int | None"], None]


@dataclass
class _Running:
    """A mean per feature over everything seen so far, in float64: one pass, and memory for the features only."""

    total: torch.Tensor | None = None
    count: int = 0

    def add(self, tensor: torch.Tensor, axis: int) -> None:
        """Take in a tensor whose dimension ``axis`` is the features."""
        others = [dim for dim in range(tensor.dim()) if dim != axis % tensor.dim()]
        features = tensor.shape[axis]
        if not tensor.numel():
            return
        tensor = tensor.detach()
        part = torch.sum(tensor, others, dtype=torch.float64) if others else tensor.double()
        self.total = part if self.total is None else self.total + part
        self.count += tensor.numel() // features

    def mean(self) -> torch.Tensor | None:
        """The mean, (features,), float64, on the CPU; ``None`` if nothing was seen."""
        return None if self.total is None else (self.total / self.count).cpu()


@dataclass
class _Route:
    """Where a layer's mean goes.

    Attributes:
        kind: ``bias`` (of the layer), ``consumers`` (their biases), ``recurrent`` (of a recurrent layer: their biases
            too), ``offset`` (what a block adds), ``output`` (of a block, or branch).
        watched: module at which the mean is taken; one per consumer.
        axis: dimension of the features there.
        assignment: what nulls a block's branches.
        target: name of the bias of a block.
        factor: what that bias is multiplied by on its way out.
        site: of a plain layer.
        consumers: what reads a plain layer.
    """

    kind: str
    watched: tuple[str, ...]
    axis: int
    assignment: Assignment = field(default_factory=dict)
    target: str = ""
    factor: float = 1.0
    site: AffineSite | None = None
    consumers: tuple[Affine | Norm, ...] = ()

    @property
    def is_read(self) -> bool:
        """Whether the mean is that of what reads the layer."""
        return self.kind in ("consumers", "recurrent")

    @property
    def own(self) -> tuple[str, str | None]:
        """The weight and bias that a plain layer's value ends with: those of a batch norm behind it, if there is one.

        A batch norm without a gain is refused before.
        """
        assert self.site is not None
        norm, affine = self.site.norm, self.site.affine
        return (affine.weight, affine.bias) if norm is None or norm.weight is None else (norm.weight, norm.bias)

    @property
    def ends(self) -> tuple[str, ...]:
        """The module behind the selected one whose output ends the layer: its batch norm's."""
        return () if self.site is None else _ends(self.site)


@dataclass(frozen=True, eq=False)
class Mean:
    """Replace the layer's output by its mean over batches (mean ablation), per feature or channel.

    Attributes:
        batches: tensors, tuples of positional arguments or dicts of keyword arguments of the model; gone through once,
            however many layers are selected. The model runs as it is, with every layer on.
        progress: called with the number of batches done and of all batches (``None`` if unknown). By default a bar is
            drawn if stderr is a terminal.

    Source: MATH §2, §4.
    """

    batches: Iterable[Any]
    progress: Progress | None = None

    name = "mean"

    def __post_init__(self) -> None:
        """Check the batches."""
        if isinstance(self.batches, torch.Tensor | Mapping | str) or not isinstance(self.batches, Iterable):
            raise NeutralizeError(
                f"mean: expected an iterable of batches, got {type(self.batches).__name__}; give a list of them, or a "
                "DataLoader"
            )
        object.__setattr__(self, "_last", None)  # the request measured last, and its routes and means

    def draft(self, request: Request, layer: str) -> Draft:
        """Draft the mean ablation of one layer; the batches are run at the first of them."""
        last = getattr(self, "_last")  # noqa: B009
        if last is None or last[0] is not request:
            routes, refusals = _routes(request)
            last = request, routes, refusals, self._measure(request, routes) if routes else {}
            object.__setattr__(self, "_last", last)
        _, routes, refusals, means = last
        if layer in refusals:
            raise refusals[layer]
        route, mean = routes[layer], means[layer]
        if mean is None:
            raise NeutralizeError(
                f"mean: expected batches that reach layer {layer!r}, got none that does; give others, or fewer layers"
            )
        if not bool(torch.isfinite(mean).all()):
            raise NeutralizeError(
                f"mean: expected finite values of layer {layer!r}, got NaN or Inf; give other batches"
            )
        if route.site is not None:
            return _plain(request, layer, route, mean)
        if route.kind == "recurrent":
            return _recurrent(request, layer, route, mean)
        return _block(request, layer, route, mean)

    def _measure(self, request: Request, routes: dict[str, _Route]) -> dict[str, torch.Tensor | None]:
        model = request.model
        if any(tensor.is_meta for tensor in request.tensors.values()):
            raise NeutralizeError(
                "mean: expected a model with whole weights, got a meta or sharded one; plan on the whole model"
            )
        modules = dict(model.named_modules(remove_duplicate=False))
        running = {layer: _Running() for layer in routes}
        handles = []
        for layer, route in routes.items():
            for name in route.watched:
                hook = _watch(running[layer], route)
                if route.is_read:
                    handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    handles.append(modules[name].register_forward_hook(hook, with_kwargs=True))
        total = len(self.batches) if isinstance(self.batches, Sized) else None
        try:
            with torch.no_grad(), untouched(model), _shown(self.progress, total) as done:
                for number, batch in enumerate(self.batches, 1):
                    args, kwargs = placed_inputs(model, batch)
                    model(*pytree.tree_map(copied, args), **pytree.tree_map(copied, kwargs))
                    done(number)
        finally:
            for handle in handles:
                handle.remove()
        return {layer: entry.mean() for layer, entry in running.items()}


@contextmanager
def _shown(progress: Progress | None, total: int | None) -> Iterator[Callable[[int], None]]:
    """Tell the caller how far it is, or draw a bar if stderr is a terminal, or be silent."""
    if progress is not None:
        yield lambda number: progress(number, total)
    elif not is_terminal(sys.stderr):
        yield lambda number: None
    else:
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("mean over batches", total=total)
            yield lambda number: bar.update(task, completed=number)


def _watch(running: _Running, route: _Route) -> Callable[..., None]:
    activation = None
    if route.kind == "bias" and route.site is not None and not route.site.inside and route.site.activation is not None:
        activation = route.site.activation.function  # it runs behind the module that is watched

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        entering = first_tensor((args, kwargs))
        tensor = entering if route.is_read else first_tensor(output)
        if tensor is None or not tensor.is_floating_point():
            return
        if activation is not None:
            tensor = activation(tensor)
        running.add(tensor, route.axis)
        if route.kind == "offset" and entering is not None and running.total is not None:
            running.total = running.total - torch.sum(
                entering, [dim for dim in range(entering.dim()) if dim != route.axis % entering.dim()],
                dtype=torch.float64,
            )  # fmt: skip

    return hook


# ---- where the mean goes ---------------------------------------------------------------------------------------------


def _routes(request: Request) -> tuple[dict[str, _Route], dict[str, NeutralizeError]]:
    """The route of every selected layer, and why the others have none."""
    routes: dict[str, _Route] = {}
    refusals: dict[str, NeutralizeError] = {}
    for layer in request.layers:
        sites = [affine_site(request.flow, call) for call in request.calls(layer)]
        found = [site for site in sites if site is not None]
        try:
            request.require_module(layer, "mean")
            if is_recurrent(request.layers[layer]):
                routes[layer] = _recurrent_route(request, layer)
            elif len(found) == len(sites):
                routes[layer] = _plain_route(request, layer, found)
            else:
                routes[layer] = _block_route(request, layer)
        except NeutralizeError as error:
            refusals[layer] = error
    return routes, refusals


def _plain_route(request: Request, layer: str, sites: list[AffineSite]) -> _Route:
    site = sites[0]
    axis = _axis(site.affine, request)
    activations = {one.activation.name if one.activation is not None else "none" for one in sites}
    if len(activations) > 1:
        raise NeutralizeError(
            f"plan: expected the same activation behind every call of {layer!r}, got {', '.join(sorted(activations))}; "
            "use strategy='zero'"
        )
    if any(_moves_features(node, axis) for one in sites for node in _behind(one)):
        raise NeutralizeError(
            f"plan: expected a layer that leaves its features in their dimension, got {layer!r}, which moves them; "
            "select the affine layer inside it"
        )
    _check_norms(request, layer, sites)
    own = _Route("bias", _ends(site) or (layer,), axis, site=site)
    if site.activation is None and own.own[1] is not None:
        return own
    consumers = _readers(request, sites)
    why = _why_not_consumers(request, layer, consumers)
    if not why:
        watched = tuple(dict.fromkeys(consumer.module for consumer in consumers))
        return _Route("consumers", watched, _axis(consumers[0], request), site=site, consumers=tuple(consumers))
    if own.own[1] is not None:
        return own
    raise NeutralizeError(
        f"plan: expected a bias that can hold the mean of {layer!r}, got no bias of its own and {why}; add a zero "
        "bias, select the block that contains it, or use strategy='zero'"
    )


def _recurrent_route(request: Request, layer: str) -> _Route:
    reads = recurrent_reads(request, layer)
    consumers: list[Affine | Norm] = [read.reader for read in reads if isinstance(read.reader, Affine)]
    changed = [read for read in reads if read.zeros or read.linear or not isinstance(read.reader, Affine)]
    why = "something on the way that changes a constant" if changed else _why_not_consumers(request, layer, consumers)
    if not why and any(read.features is not None for read in reads):
        why = f"{consumers[0].module!r}, which reads something else beside it"
    if why:
        raise NeutralizeError(
            f"plan: expected affine or recurrent layers with biases that can hold the mean of {layer!r}, got {why}; "
            "select the block that contains it, or use strategy='zero'"
        )
    watched = tuple(dict.fromkeys(consumer.module for consumer in consumers))
    return _Route("recurrent", watched, _axis(consumers[0], request), consumers=tuple(consumers))


def _check_norms(request: Request, layer: str, sites: list[AffineSite]) -> None:
    """Check that the batch norm behind a layer, if there is one, can hold its mean.

    Raises:
        NeutralizeError: it has no gain or bias, reads other layers too, is no module, or is not behind every call.
    """
    norms = [site.norm for site in sites]
    norm = norms[0]
    if norm is None and not any(norms):
        return
    modules = dict(request.model.named_modules(remove_duplicate=False))
    owner = "" if norm is None else norm.module
    if norm is None or any(other is None or other.module != owner for other in norms):
        problem = "one behind some of its calls"
    elif norm.weight is None or norm.bias is None:
        problem = "one without a gain and a bias"
    elif not isinstance(modules[owner], nn.modules.batchnorm._BatchNorm):
        problem = f"one that is computed by a {type(modules[owner]).__name__}"
    else:
        check_own(request, layer, {other.node: other.parameters[:2] for other in norms if other is not None})
        return
    raise NeutralizeError(
        f"plan: expected a batch norm of its own, with a gain and a bias, behind {layer!r}, got {problem}; select the "
        "block that contains it, or use strategy='zero'"
    )


def _ends(site: AffineSite) -> tuple[str, ...]:
    """The name of a batch norm behind a layer that is not a part of the selected module; else none."""
    if site.norm is None:
        return ()
    position = {node: place for place, node in enumerate(site.norm.node.graph.nodes)}
    return (site.norm.module,) if position[site.norm.node] > position[site.call.exit] else ()


def _readers(request: Request, sites: list[AffineSite]) -> list[Affine | Norm]:
    """What reads a layer's value, if it is nothing but ops with a bias that may absorb a constant; else none."""
    found: list[Affine | Norm] = [*unique(consumer for site in sites for consumer in site.consumers)]
    for reader in dict.fromkeys(reader for site in sites for reader in site.other_readers):
        norm = norm_of(reader, request.flow)
        if norm is None or norm.own_statistics or norm.kind != "batch_norm" or norm.data is not reader.args[0]:
            return []
        found.append(norm)
    return found


def _why_not_consumers(request: Request, layer: str, consumers: list[Affine | Norm]) -> str:
    """Why the mean cannot go into the biases of what reads a layer; empty if it can."""
    if not consumers:
        return "readers that are not affine"
    for consumer in consumers:
        if consumer.bias is None:
            return f"no bias in {consumer.module!r}, which reads it"
        padded = isinstance(consumer, Affine) and consumer.is_convolution and consumer.has_padding
        if padded or "conv_transpose" in op_name(consumer.node):
            return f"a padded convolution {consumer.module!r}, whose borders do not read it"
        if consumer.module in request.layers:
            return f"a selected layer {consumer.module!r} that reads it"
        if _axis(consumer, request) != _axis(consumers[0], request):
            return f"{consumer.module!r}, which reads other features than {consumers[0].module!r}"
    if len(consumers) > 1 and len({consumer.data for consumer in consumers}) > 1:
        return "several values of it that are read"
    nodes: dict[fx.Node, tuple[str, ...]] = {}
    for consumer in consumers:
        nodes[consumer.node] = tuple(name for name in (consumer.weight, consumer.bias) if name is not None)
        if isinstance(consumer, Affine) and consumer.added is not None:
            nodes[consumer.added] = ()
    try:
        check_own(request, layer, nodes)
    except NeutralizeError:
        return "a reader whose weights are shared"
    return ""


def _behind(site: AffineSite) -> Iterator[fx.Node]:
    """The nodes from the affine op to the end of the selected module."""
    node = site.affine.result
    while node is not site.call.exit:
        node = node.next
        yield node


def _moves_features(node: fx.Node, axis: int) -> bool:
    """Whether a view takes the features out of the dimension that they are in."""
    if not is_transparent(node) or is_mark(node) or not isinstance(node.args[0], fx.Node):
        return False
    before, after = shape_of(node.args[0]), shape_of(node)
    return op_name(node) in _MOVES or before is None or after is None or before[axis:] != after[axis:]


def _axis(reader: Affine | Norm, request: Request) -> int:
    """The dimension of the features in what an affine op or a batch norm reads and returns, from the end."""
    if isinstance(reader, Norm):
        return 1 - len(shape_of(reader.data) or (0, 0))
    return -(len(request.flow.shapes[reader.weight]) - 1) if reader.is_convolution else -1


def _block_route(request: Request, layer: str) -> _Route:
    assignment, kind = identity_assignment(request, layer, "outgoing"), "offset"
    if assignment is None or "identity" in assignment.values():
        assignment, kind = zero_assignment(request, layer, "outgoing"), "output"
    if assignment is None:
        raise NeutralizeError(
            f"plan: expected a layer that some parameters can null, got {layer!r}; select the affine layers inside it"
        )
    candidates: list[tuple[int, Affine, float]] = []
    for call in request.calls(layer):
        for node in request.flow.graph.nodes:
            inside = call.first < request.flow.position[node] < call.last
            affine = affine_of(node, request.flow) if inside else None
            if affine is not None and affine.bias in assignment:
                factor = _factor_to(affine, call.exit)
                candidates.extend([] if factor is None else [(request.flow.position[node], affine, factor)])
    last, factor = max(candidates, key=lambda entry: entry[0])[1:] if candidates else (None, 1.0)
    others = {(affine.bias, scale) for _, affine, scale in candidates} - {(last.bias if last else None, factor)}
    if last is None or last.bias is None or (others and len(request.calls(layer)) > 1):
        raise NeutralizeError(
            f"plan: expected an output projection with a bias that is added to the output of {layer!r}, got none among "
            f"{', '.join(map(repr, assignment))}; add a zero bias to the last projection, or use strategy='zero'"
        )
    return _Route(kind, (layer,), _axis(last, request), assignment, last.bias, factor)


def _factor_to(affine: Affine, exit_: fx.Node) -> float | None:
    """What an affine op's value is multiplied by on its way to the exit, through sums and views; ``None``: no such way.

    The views must leave the features in their place.
    """
    node, factor = affine.result, 1.0
    features = -(len(shape_of(node) or ()) - 1) if affine.is_convolution else -1
    while node is not exit_:
        readers = list(node.users)
        before, after = shape_of(node), shape_of(readers[0]) if len(readers) == 1 else None
        if before is None or after is None:
            return None
        reader, op = readers[0], op_name(readers[0])
        numbers: list[Any] = [part for part in reader.args if is_number(part) and part != 0]
        if op in ("aten::mul", "aten::div") and len(numbers) == 1:
            number = float(numbers[0])
            if op == "aten::div" and reader.args[0] is not node:
                return None
            factor = factor * number if op == "aten::mul" else factor / number
        elif op == "aten::add" and argument(reader, "alpha", 1) == 1 and before == after:
            pass
        elif not is_transparent(reader) or _moves_features(reader, features):
            return None
        node = reader
    return factor


_MOVES = frozenset(
    f"aten::{name}" for name in "t transpose permute flip roll movedim moveaxis swapaxes swapdims rot90".split()
)


# ---- what is written -------------------------------------------------------------------------------------------------


def _plain(request: Request, layer: str, route: _Route, mean: torch.Tensor) -> Draft:
    site = route.site
    assert site is not None
    weight, own_bias = route.own
    consumers = tuple(consumer.module for consumer in route.consumers)
    values, activation = mean, site.activation
    if route.kind == "consumers":
        edits: list[Edit] = [request.rewrite(name) for name in (weight, own_bias) if name is not None]
        shift = mean - (activation.at_zero if activation is not None else 0.0)
        edits.extend(_absorbed(request, consumer, shift) for consumer in route.consumers)
        reason = "the layer is zero, and what reads it has its mean in the bias"
    else:
        edits = [request.rewrite(weight)]
        bias = mean if activation is None else _preimage(layer, activation, mean)
        assert own_bias is not None
        edits.append(_assign(request, own_bias, bias))
        consumers = route.ends
        values = mean if activation is None or site.inside else bias
        reason = "the weight is zero and the bias the mean" + ("'s preimage" if activation is not None else "")
    certificate = Certificate(layer, "rounding", None, "finite activations", reason)
    entry = LayerPlan(
        layer, "mean", certificate, (), activation=activation.name if activation is not None else "",
        consumers=tuple(dict.fromkeys(consumers)), sides="out" if route.kind == "consumers" else "in",
        values=tuple(values.tolist()), axis=route.axis,
    )  # fmt: skip
    return Draft(tuple(edits), entry)


def _recurrent(request: Request, layer: str, route: _Route, mean: torch.Tensor) -> Draft:
    edits = [*draft_recurrent_null(request, layer, "in").edits]
    edits.extend(_absorbed(request, consumer, mean) for consumer in route.consumers)
    reason = "the layer is zero, its gates shut, and what reads it has its mean in the bias"
    certificate = Certificate(layer, "rounding", None, "finite activations", reason)
    entry = LayerPlan(
        layer, "mean", certificate, (), consumers=route.watched, sides="out", values=tuple(mean.tolist()),
        axis=route.axis,
    )  # fmt: skip
    return Draft(tuple(edits), entry)


def _block(request: Request, layer: str, route: _Route, mean: torch.Tensor) -> Draft:
    nulled = {name: value for name, value in route.assignment.items() if name != route.target}
    edits: list[Edit] = [*request.edits_for(nulled), _assign(request, route.target, mean / route.factor)]
    reason = f"the branches are zero and {route.target!r} is the mean"
    certificate = Certificate(layer, "rounding", None, "finite activations", reason)
    target = "offset" if route.kind == "offset" else "mean"
    entry = LayerPlan(layer, target, certificate, (), sides="in", values=tuple(mean.tolist()), axis=route.axis)
    return Draft(tuple(edits), entry)


def _assign(request: Request, name: str, values: torch.Tensor) -> Assign:
    tensor, name = request.writable(name), request.canonical(name)
    return Assign(name, tuple(tensor.shape), dtype_name(tensor.dtype), tuple(values.double().flatten().tolist()))


def _absorbed(request: Request, consumer: Affine | Norm, shift: torch.Tensor) -> Assign:
    """``d + V shift``, or ``β + γ shift / √(σ² + ε)``, in float64, a few rows of V at a time."""
    assert consumer.bias is not None
    bias = request.writable(consumer.bias).detach()
    shift = shift.to(bias.device)
    if isinstance(consumer, Norm):
        assert consumer.variance is not None
        gain = 1.0 if consumer.weight is None else request.tensors[consumer.weight].detach().double()
        scale = gain / (request.tensors[consumer.variance].detach().double() + consumer.eps).sqrt()
        return _assign(request, consumer.bias, bias.double() + scale * shift)
    weight = request.writable(consumer.weight).detach()
    if consumer.is_convolution:
        taps = weight.sum(tuple(range(2, weight.dim())), dtype=torch.float64)  # (out, in / groups)
        groups = shift.numel() // taps.shape[1]
        product = torch.einsum("goi,gi->go", taps.view(groups, -1, taps.shape[1]), shift.view(groups, -1)).flatten()
    else:
        rows = weight.t() if consumer.transposed else weight
        product = torch.cat([chunk.double() @ shift for chunk in rows.split(1024)])
    return _assign(request, consumer.bias, bias.double() + product)


def _preimage(layer: str, activation: Activation, mean: torch.Tensor) -> torch.Tensor:
    """Per feature a b near zero with φ(b) = μ, by bisection.

    Raises:
        NeutralizeError: none was found.
    """
    far = torch.logspace(0, 9, 512, base=10.0, dtype=torch.float64)
    near = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    grid = torch.cat([-far.flip(0)[:-1], near, far[1:]])
    heights = activation.function(grid)
    low, high = heights[:-1], heights[1:]
    # Features by intervals: the interval nearest zero that holds the mean between its ends.
    holds = (torch.minimum(low, high) <= mean[:, None]) & (mean[:, None] <= torch.maximum(low, high))
    distance = torch.where(holds, grid[:-1].abs().maximum(grid[1:].abs()), torch.inf)
    nearest = distance.argmin(1)
    if not bool(holds.any(1).all()):
        worst = float(mean[~holds.any(1)][0])
        raise NeutralizeError(
            f"plan: expected a value of {activation.name} for the mean of {layer!r}, got {worst:.6g}, which is none; "
            "use strategy='zero'"
        )
    begin, end = grid[nearest].clone(), grid[nearest + 1].clone()
    rising = heights[nearest + 1] >= heights[nearest]
    for _ in range(80):
        middle = (begin + end) / 2
        is_right = (activation.function(middle) <= mean) == rising
        begin, end = torch.where(is_right, middle, begin), torch.where(is_right, end, middle)
    return (begin + end) / 2
