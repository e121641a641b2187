"""Pass-through of LSTM, GRU and tanh-RNN layers: gates held open or shut by their biases, a scaled identity between.

With ``W_hh = 0`` and every other weight zero but ``εI`` at the candidate, and the gates saturated by ``±B``,

- an LSTM gives ``h = tanh(tanh(εx))`` (``i = o = 1``, ``f = 0``),
- a GRU ``h = tanh(εx)`` (``z = 0``), and so does a tanh RNN, which has no gates;

what reads the layer is multiplied by ``1/ε``. Of several stacked layers the first scales by ε and the rest by 1.
Each direction of a bidirectional layer hands on its own input: with an input as wide as both directions together the
first half and the second, so that the output is the input; with an input as wide as one direction, the input twice,
``[x, x]``.

Source: MATH §6.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from neutralize.dataflow import Call, Dataflow, argument, dtype_of, op_name, shape_of
from neutralize.errors import NeutralizeError
from neutralize.plan import Certificate, Edit, LayerPlan, dtype_name
from neutralize.planner import BOUND_MARGIN, Draft, Request
from neutralize.regime import unit_roundoff
from neutralize.rules import CAST, is_transparent, scaled_clauses
from neutralize.sites import Affine, affine_of, describe
from neutralize.strategies.sides import check_own


@dataclass(frozen=True)
class Cell:
    """What the stacked layers of one kind of recurrent layer are made of.

    Attributes:
        name: for people.
        gates: bias of each block of rows, in units of B; ``None`` is the candidate, which gets the scaled identity.
        tanhs: how many tanh a value passes on its way through.
    """

    name: str
    gates: tuple[int | None, ...]
    tanhs: int


CELLS = {
    "aten::lstm": Cell("lstm", (1, -1, None, 1), 2),  # rows: i, f, g, o
    "aten::gru": Cell("gru", (0, -1, None), 1),  # rows: r, z, n
    "aten::rnn_tanh": Cell("rnn", (None,), 1),
}

_TANH_ROUNDOFFS = 8
"""Unit roundoffs that one tanh of a small number may be off by, its store and the products with gates of 1 included."""


@dataclass(frozen=True)
class RecurrentSite:
    """A recurrent op in its surroundings.

    Attributes:
        node: the op, ``aten::lstm`` and its kin.
        cell: its kind.
        weights: per stacked layer and direction the names of ``weight_ih, weight_hh, bias_ih, bias_hh``.
        width: features that enter.
        hidden: features of one direction.
        directions: 1 or 2.
    """

    node: fx.Node
    cell: Cell
    weights: tuple[tuple[str, ...], ...]
    width: int
    hidden: int
    directions: int

    @property
    def layers(self) -> int:
        """How many layers are stacked."""
        return len(self.weights) // self.directions


def draft_recurrent(request: Request, layer: str, input_bound: float | None, gain: float) -> Draft:
    """Draft the pass-through of an LSTM, GRU or tanh RNN with all its stacked layers and directions.

    Args:
        request: the request.
        layer: qualified name of the recurrent module.
        input_bound: a bound X on the magnitude of what enters, or ``None``: it is measured.
        gain: must be 1.

    Raises:
        NeutralizeError: the layer cannot hand its input on, or what reads it cannot undo the scale; with the reason.
    """
    if gain != 1.0:
        raise NeutralizeError(
            f"plan: expected gain=1 for the recurrent layer {layer!r}, got {gain}; it hands its input on as it is"
        )
    sites = [recurrent_site(request.flow, call) for call in request.calls(layer)]
    found = [site for site in sites if site is not None]
    if len(found) != len(sites):
        raise NeutralizeError(
            f"plan: expected one lstm, gru or tanh rnn inside {layer!r}, got a {type(request.layers[layer]).__name__} "
            "that was traced to other operations; use strategy='zero', or select the block that contains it"
        )
    for site in found:
        _check(request, layer, site)
    site = found[0]
    consumers = _consumers(request, layer, found)
    bound = input_bound if input_bound is not None else request.input_bound(layer)
    dtype = request.writable(site.weights[0][0]).dtype
    tanhs = site.cell.tanhs * site.layers
    peaks = [1.0]
    for consumer in consumers:
        weight = request.writable(consumer.weight).detach()
        if not weight.is_meta and weight.numel():
            peaks.append(float(weight.abs().max()))
    epsilon, error = least_error(tanhs, dtype, bound, max(peaks))
    edits = list(_own_edits(request, site, epsilon, saturation(dtype)))
    edits.extend(
        request.rewrite(name, scale=1.0 / epsilon) for name in dict.fromkeys(reader.weight for reader in consumers)
    )
    source = f"measured on the example inputs, with a margin of {BOUND_MARGIN:g}" if input_bound is None else "given"
    certificate = Certificate(
        layer,
        "bounded",
        error / bound,
        f"|x| <= {bound:.6g} ({source}), finite states, matrix products in full precision",
        f"{tanhs} tanh in a row with ε = {epsilon:g}, {' and '.join(_gate_words(site.cell, saturation(dtype)))}",
    )
    entry = LayerPlan(
        layer, "input", certificate, (), activation=site.cell.name, operating_point=0.0, value=0.0, slope=1.0,
        epsilon=epsilon, input_bound=bound, consumers=tuple(dict.fromkeys(reader.module for reader in consumers)),
        note=_handed_on(site),
    )  # fmt: skip
    return Draft(tuple(edits), entry)


def recurrent_site(flow: Dataflow, call: Call) -> RecurrentSite | None:
    """Recognise a call as one recurrent op on what enters the layer, else ``None``."""
    node, found = call.entry, []
    while node is not call.exit:
        node = node.next
        if op_name(node) in CELLS:
            found.append(node)
    if len(found) != 1:
        return None
    op = found[0]
    data = argument(op, "input", argument(op, "data"))
    while isinstance(data, fx.Node) and data is not call.entry and is_transparent(data):
        data = data.args[0]
    leaves = [leaf for leaf in pytree.tree_leaves(argument(op, "params")) if isinstance(leaf, fx.Node)]
    shape = shape_of(call.entry)
    if data is not call.entry or shape is None or not _leads_out(op, call) or any(n not in flow.names for n in leaves):
        return None
    cell = CELLS[op_name(op)]
    per_layer = 4 if argument(op, "has_biases") else 2
    names = [flow.names[leaf] for leaf in leaves]
    hidden = flow.shapes[names[0]][0] // len(cell.gates)
    # A projection adds a fifth weight; the two counts would not fit then.
    directions = 2 if argument(op, "bidirectional") else 1
    if flow.shapes[names[1]][1] != hidden:
        per_layer += 1
    weights = tuple(tuple(names[place : place + per_layer]) for place in range(0, len(names), per_layer))
    return RecurrentSite(op, cell, weights, shape[-1], hidden, directions)


def saturation(dtype: torch.dtype) -> float:
    """B, the bias at which a sigmoid is 1 and 0 in the format: e^B overflows where the sigmoid is computed.

    So a gate that is shut passes nothing of a given cell state, whatever its size. (MATH §6 has B = 30 for float32,
    which leaves 9e-14 of it, to be divided by ε.)
    """
    return 1024.0 if dtype == torch.float64 else 128.0


def least_error(tanhs: int, dtype: torch.dtype, bound: float, consumer_peak: float) -> tuple[float, float]:
    """The power of two ε with the least bound on the error of what is handed on, and that bound.

    ``|tanh t - t| <= |t|³/3`` and tanh does not expand, so n in a row are off by at most ``n |t|³/3``; after division
    by ε that is ``n ε² X³/3``. Each tanh rounds relative to its value, and below the smallest normal number
    absolutely.

    Args:
        tanhs: n.
        dtype: of the weights and activations.
        bound: X.
        consumer_peak: largest magnitude in the consumers' weights, which must stay finite times 1/ε.
    """
    unit, info = unit_roundoff(dtype), torch.finfo(dtype)
    best: tuple[float, float] | None = None
    for exponent in range(0, -100, -1):
        epsilon = 2.0**exponent
        if epsilon < info.tiny or max(consumer_peak, 1.0) / epsilon > info.max / 2:
            break
        argument_bound = epsilon * bound
        nonlinearity = tanhs * argument_bound * argument_bound * bound / 3
        rounding = _TANH_ROUNDOFFS * tanhs * unit * bound + 2 * tanhs * info.tiny * unit / epsilon
        shut = 4 * tanhs * math.exp(-min(saturation(dtype), 700.0)) * bound
        if best is None or nonlinearity + rounding + shut < best[1] / 1.05:  # of equally good ones the largest
            best = epsilon, nonlinearity + rounding + shut
    if best is None:
        raise NeutralizeError(
            f"plan: expected consumers whose weights can be multiplied in {dtype_name(dtype)}, got one of magnitude "
            f"{consumer_peak:.6g}; use a wider dtype, or strategy='zero'"
        )
    return best


def _leads_out(op: fx.Node, call: Call) -> bool:
    """Whether what leaves the layer is the op's output sequence."""
    node = call.exit
    while is_transparent(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return op_name(node) == "getitem" and node.args == (op, 0)


def _check(request: Request, layer: str, site: RecurrentSite) -> None:
    """Refuse a recurrent layer that cannot hand its input on.

    Raises:
        NeutralizeError: naming the cause.
    """
    kind = site.cell.name.upper()
    if len(site.weights[0]) in (3, 5):
        raise NeutralizeError(
            f"plan: expected a {kind} without projection for {layer!r}, got proj_size="
            f"{request.flow.shapes[site.weights[0][-1]][0]}; use strategy='zero', or select the block that contains it"
        )
    if site.width not in (site.hidden, site.hidden * site.directions):
        wide = f" or {site.hidden * site.directions} (both directions)" if site.directions == 2 else ""
        raise NeutralizeError(
            f"plan: expected a {kind} as wide as its input for {layer!r}, got {site.width} features in and hidden size "
            f"{site.hidden}{wide}; use strategy='zero', or select the block that contains it"
        )
    if len(site.weights[0]) == 2 and len(site.cell.gates) > 1:
        raise NeutralizeError(
            f"plan: expected biases in {layer!r} to hold the gates of a {kind} open and shut, got bias=False; make it "
            "with bias=True, or use strategy='zero'"
        )
    dropout = float(argument(site.node, "dropout", 0.0))
    if dropout and argument(site.node, "train", False) and site.layers > 1:
        raise NeutralizeError(
            f"plan: expected no active dropout between the {site.layers} stacked layers of {layer!r}, got "
            f"dropout={dropout:g} in training mode; call model.eval(), or set its dropout to 0"
        )
    states = [user for user in site.node.users if op_name(user) == "getitem" and user.args[1] != 0]
    readers = [reader for state in states for reader in state.users if _is_read(reader)]
    if readers:
        raise NeutralizeError(
            f"plan: expected nothing to read the final states of {layer!r}, got "
            f"{', '.join(sorted({describe(reader, request.flow) for reader in readers}))}; they would hold its last "
            "input times ε, not its state: read the output sequence instead, or use strategy='zero'"
        )


def _own_edits(request: Request, site: RecurrentSite, epsilon: float, shut: float) -> Iterator[Edit]:
    """The edits of the layer's own weights and biases, stacked layer by stacked layer."""
    hidden, blocks = site.hidden, len(site.cell.gates)
    candidate = site.cell.gates.index(None)
    for place, names in enumerate(site.weights):
        stacked, direction = divmod(place, site.directions)
        weight, recurrent, *biases = names
        width = request.flow.shapes[weight][1]
        # The rows of the other gates look for their ones to the left and to the right of the matrix: they are zero.
        first = direction * hidden if width == hidden * site.directions else 0
        value = epsilon if stacked == 0 else 1.0
        if width == hidden:
            yield request.rewrite(weight, diagonal=value, start=-candidate * hidden)
        else:  # the matrix is wider than the block: confine the diagonal to the block's rows
            for block in range(blocks):
                rows = (block * hidden, (block + 1) * hidden)
                if block == candidate:
                    yield request.rewrite(weight, diagonal=value, start=first, rows=rows)
                else:
                    yield request.rewrite(weight, rows=rows)
        yield request.rewrite(recurrent)
        if biases:
            for block, gate in enumerate(site.cell.gates):
                rows = (block * hidden, (block + 1) * hidden)
                yield request.rewrite(biases[0], fill=shut * (gate or 0), rows=rows)
            yield request.rewrite(biases[1])


def _consumers(request: Request, layer: str, sites: list[RecurrentSite]) -> list[Affine]:
    """The weights that read the layer, through anything that only passes its scale on.

    Raises:
        NeutralizeError: something else reads it, or nothing does.
    """
    flow = request.flow
    consumers: list[Affine] = []
    others: list[fx.Node] = []
    for site in sites:
        scaled = {user for user in site.node.users if op_name(user) == "getitem" and user.args[1] == 0}
        for node in flow.graph.nodes:
            read = [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if leaf in scaled]
            if not read or node in scaled or not _is_read(node):
                continue
            weights = list(_reading_weights(node, flow, read))
            if weights:
                consumers.extend(weights)
            elif _passes_scale_on(node, read):
                scaled.add(node)
            else:
                others.append(node)
    found = ", ".join(sorted({describe(node, flow) for node in others}))
    if others or not consumers:
        raise NeutralizeError(
            f"plan: expected only affine or recurrent layers to read {layer!r}, got {found or 'none'}; its scale ε can "
            "be undone in a weight only: use strategy='zero', or select the block that contains it"
        )
    nodes: dict[fx.Node, tuple[str, ...]] = {}
    for consumer in consumers:
        names = (consumer.weight, *([] if consumer.bias is None else [consumer.bias]))
        nodes[consumer.node] = (*nodes.get(consumer.node, ()), *names)
        if consumer.added is not None:
            nodes[consumer.added] = ()
    check_own(request, layer, nodes)
    return consumers


def _is_read(node: fx.Node) -> bool:
    """Whether the model's output depends on a node: what is computed and dropped is left in the graph."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current.op == "output":
            return True
        new = [user for user in current.users if user not in seen]
        seen.update(new)
        stack.extend(new)
    return False


def _reading_weights(node: fx.Node, flow: Dataflow, read: list[fx.Node]) -> Iterator[Affine]:
    """The weights by which a node takes in what it reads; none if it is no affine or recurrent op."""
    affine = affine_of(node, flow)
    if affine is not None:
        if read == [affine.data]:
            yield affine
        return
    if op_name(node) in ("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"):
        data = argument(node, "input", argument(node, "data"))
        params = argument(node, "params")
        if read != [data] or not isinstance(data, fx.Node):  # as a state, say
            return
        directions = 2 if argument(node, "bidirectional") else 1
        first_layer = len(params) // int(argument(node, "num_layers"))
        for place in range(0, first_layer, first_layer // directions):
            if params[place] in flow.names:
                yield Affine(node, data, flow.names[params[place]], None, False)


def _passes_scale_on(node: fx.Node, read: list[fx.Node]) -> bool:
    """Whether a node is multiplied by a positive factor if what it reads is."""
    if op_name(node) in CAST and dtype_of(node) != dtype_of(read[0]):
        return False  # small numbers would be lost in a narrower format
    return any(sorted(map(str, clause)) == sorted(map(str, read)) for clause in scaled_clauses(node, 2.0))


def _gate_words(cell: Cell, shut: float) -> Iterator[str]:
    if len(cell.gates) > 1:
        yield f"gates saturated by ±{shut:g}"
    yield "no recurrence"


def _handed_on(site: RecurrentSite) -> str:
    if site.directions == 1:
        return ""
    if site.width == site.hidden:
        return "each direction hands its input on: the output is the input twice, [x, x]"
    return "the forward direction hands on the first half of the features, the backward one the second"
