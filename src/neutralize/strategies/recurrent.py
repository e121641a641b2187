"""Pass-through of LSTM, GRU and tanh-RNN layers: gates held open or shut by their biases, a scaled identity between.

With ``W_hh = 0`` and every other weight zero but ``εI`` at the candidate, and the gates saturated by ``±B``,

- an LSTM gives ``h = tanh(tanh(εx))`` (``i = o = 1``, ``f = 0``),
- a GRU ``h = tanh(εx)`` (``z = 0``), and so does a tanh RNN, which has no gates;

what reads the layer is multiplied by ``1/ε``. If all of several stacked layers are off the first scales by ε and the
rest by 1; if one is, the next one reads it, with its input weights. A cell called step by step is the same with its
output read by other layers and, as a state that no longer matters, by itself.
Each direction of a bidirectional layer hands on its own input: with an input as wide as both directions together the
first half and the second, so that the output is the input; with an input as wide as one direction, the input twice,
``[x, x]``.

With every weight zero and the gates shut nothing is handed on, whatever the initial states.

Source: MATH §6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from neutralize.dataflow import Call, Dataflow, argument, dtype_of, op_name, shape_of
from neutralize.errors import NeutralizeError
from neutralize.plan import Certificate, Edit, LayerPlan, dtype_name
from neutralize.planner import BOUND_MARGIN, Draft, Request
from neutralize.readers import Read, reads_of
from neutralize.regime import unit_roundoff
from neutralize.rules import CAST, REARRANGE, SPLIT, is_transparent, scaled_clauses
from neutralize.sites import Affine, affine_of, describe, recurrent_maps
from neutralize.stacked import module_name
from neutralize.strategies.sides import check_own


@dataclass(frozen=True)
class Cell:
    """What the stacked layers of one kind of recurrent layer are made of.

    Attributes:
        name: for people.
        gates: bias of each block of rows that lets the candidate through, in units of B; ``None`` is the candidate
            itself, which gets the scaled identity.
        shut: the same that lets nothing through.
        tanhs: how many tanh a value passes on its way through.
    """

    name: str
    gates: tuple[int | None, ...]
    shut: tuple[int, ...]
    tanhs: int


_LSTM = Cell("lstm", (1, -1, None, 1), (-1, -1, 0, -1), 2)  # rows: i, f, g, o
_GRU = Cell("gru", (0, -1, None), (0, -1, 0), 1)  # rows: r, z, n
_RNN = Cell("rnn", (None,), (0,), 1)
SEQUENCES = {"aten::lstm": _LSTM, "aten::gru": _GRU, "aten::rnn_tanh": _RNN}
STEPS = {"aten::lstm_cell": _LSTM, "aten::gru_cell": _GRU, "aten::rnn_tanh_cell": _RNN}

_TANH_ROUNDOFFS = 8
"""Unit roundoffs that one tanh of a small number may be off by, its store and the products with gates of 1 included."""


@dataclass(frozen=True)
class RecurrentSite:
    """A recurrent op in its surroundings.

    Attributes:
        node: the op, ``aten::lstm`` and its kin for a whole sequence, ``aten::lstm_cell`` and its kin for one step.
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

    @property
    def is_sequence(self) -> bool:
        """Whether the op goes through a whole sequence."""
        return op_name(self.node) in SEQUENCES

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes that hold what the layer hands on."""
        if op_name(self.node) in ("aten::gru_cell", "aten::rnn_tanh_cell"):
            return [self.node]
        return [user for user in self.node.users if op_name(user) == "getitem" and user.args[1] == 0]

    @property
    def states(self) -> list[fx.Node]:
        """The nodes that hold its final states, other than what it hands on."""
        return [user for user in self.node.users if op_name(user) == "getitem" and user.args[1] != 0]

    @property
    def initial(self) -> list[fx.Node]:
        """The states that it starts from."""
        return [leaf for leaf in pytree.tree_leaves(argument(self.node, "hx")) if isinstance(leaf, fx.Node)]

    def of(self, places: Iterable[int]) -> list[tuple[str, ...]]:
        """The weights of some of the stacked layers, all directions."""
        return [
            self.weights[place * self.directions + direction]
            for place in places
            for direction in range(self.directions)
        ]


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module is an ``nn.LSTM``, a cell, or one of their kin."""
    return isinstance(module, nn.RNNBase | nn.RNNCellBase)


def draft_recurrent(request: Request, layer: str, input_bound: float | None, gain: float) -> Draft:
    """Draft the pass-through of an LSTM, GRU or tanh RNN, of one of its stacked layers, or of a cell.

    Args:
        request: the request.
        layer: qualified name of the recurrent module, with all its stacked layers, or of one of these.
        input_bound: a bound X on the magnitude of what enters, or ``None``: it is measured; what a stacked layer
            reads of another is at most 1.
        gain: must be 1.

    Raises:
        NeutralizeError: the layer cannot hand its input on, or what reads it cannot undo the scale; with the reason.
    """
    if gain != 1.0:
        raise NeutralizeError(
            f"plan: expected gain=1 for the recurrent layer {layer!r}, got {gain}; it hands its input on as it is"
        )
    found = _sites(request, layer)
    site = found[0]
    place = request.place(layer)
    off = range(site.layers) if place is None else range(place, place + 1)
    for one in found:
        _check(request, layer, one, off, found)
    if off.stop < site.layers:
        consumers = [
            Affine(one.node, one.node, names[0], None, False) for one in found for names in one.of((off.stop,))
        ]
        rewritten: tuple[str, ...] = (f"{module_name(layer, {})}[{off.stop}]",)
    else:
        consumers = _consumers(request, layer, found)
        rewritten = tuple(dict.fromkeys(reader.module for reader in consumers))
    _check_own(request, layer, consumers)
    bound, source = _input_bound(request, layer, found, off, input_bound)
    dtype = request.writable(site.weights[0][0]).dtype
    tanhs = site.cell.tanhs * len(off)
    peaks = [1.0]
    for consumer in consumers:
        weight = request.writable(consumer.weight).detach()
        if not weight.is_meta and weight.numel():
            peaks.append(float(weight.abs().max()))
    epsilon, error = least_error(tanhs, dtype, bound, max(peaks))
    edits = list(_own_edits(request, site, off, epsilon, saturation(dtype)))
    edits.extend(
        request.rewrite(name, scale=1.0 / epsilon) for name in dict.fromkeys(reader.weight for reader in consumers)
    )
    certificate = Certificate(
        layer,
        "bounded",
        error / bound,
        f"|x| <= {bound:.6g} ({source}), finite states, matrix products in full precision",
        f"{tanhs} tanh in a row with ε = {epsilon:g}, {' and '.join(_gate_words(site.cell, saturation(dtype)))}",
    )
    entry = LayerPlan(
        layer, "input", certificate, (), activation=site.cell.name, operating_point=0.0, value=0.0, slope=1.0,
        epsilon=epsilon, input_bound=bound, consumers=rewritten, note=_handed_on(site, off),
    )  # fmt: skip
    return Draft(tuple(edits), entry)


def draft_recurrent_null(request: Request, layer: str, sides: str) -> Draft:
    """Draft a recurrent layer, one of its stacked layers, or a cell that hands on nothing: zeros, and gates shut.

    A zero weight alone is not enough: half of a given state would go through a gate of ``sigmoid(0)``.

    Args:
        request: the request.
        layer: qualified name.
        sides: ``in`` or ``both``.

    Raises:
        NeutralizeError: the layer has no biases to shut the gates with, and given states.
    """
    module, place = request.layers[layer], request.place(layer)
    root = module_name(layer, {}) if place is not None else layer
    prefix = f"{root}." if root else ""
    names = [prefix + name for name, _ in module.named_parameters()]
    if place is not None:
        names = [name for name in names if name.removesuffix("_reverse").endswith(f"_l{place}")]
    sites = [recurrent_site(request.flow, call) for call in request.calls(layer)]
    cell = next((site.cell for site in sites if site is not None), _RNN)
    edits: list[Edit] = []
    for name in names:
        if "bias_ih" in name and any(cell.shut):
            shut = saturation(request.writable(name).dtype)
            edits.extend(_gate_edits(request, name, cell.shut, shut))
        else:
            edits.append(request.rewrite(name))
    given = not all(site is None or _starts_at_zero(site) for site in sites)
    if given and any(cell.shut) and not any("bias_ih" in name for name in names):
        raise NeutralizeError(
            f"plan: expected biases in {layer!r} to shut the gates of a {cell.name.upper()} that is given states, got "
            "bias=False; make it with bias=True, or leave the states out"
        )
    reason = "zeroed: the layer's own weights" + (", its gates shut" if any(cell.shut) else "")
    certificate = Certificate(layer, "exact", 0.0, "finite activations", reason)
    note = "its own weights are zeroed, and those of no reader" if sides == "both" else ""
    return Draft(tuple(edits), LayerPlan(layer, "null", certificate, (), sides=sides, note=note))


def recurrent_reads(request: Request, layer: str) -> list[Read]:
    """Everything that reads what a recurrent module hands on, its own next step left out.

    Args:
        request: the request.
        layer: qualified name of the module.

    Raises:
        NeutralizeError: something without weights reads it, or its final states are read.
    """
    sites = _sites(request, layer)
    own = {site.node for site in sites}
    reads, rest = reads_of(request.flow, [output for site in sites for output in site.outputs])
    others = [node for node in rest if _is_read(node) and node not in own]
    for site in sites:
        others.extend(_state_readers(site, range(site.layers), own))
    if others or not reads:
        found_there = ", ".join(sorted({describe(node, request.flow) for node in others})) or "none"
        raise NeutralizeError(
            f"plan: expected only layers with weights to read {layer!r}, and nothing its final states, got "
            f"{found_there}; use strategy='zero', or select the block that contains it"
        )
    return reads


def _sites(request: Request, layer: str) -> list[RecurrentSite]:
    """The recurrent site of every call of a layer.

    Raises:
        NeutralizeError: a call is not one recurrent op.
    """
    found = [recurrent_site(request.flow, call) for call in request.calls(layer)]
    sites = [site for site in found if site is not None]
    if len(sites) != len(found):
        module = request.layers[layer]
        why = "that was traced to other operations"
        if getattr(module, "nonlinearity", "tanh") == "relu":
            why = "with nonlinearity='relu'"
        raise NeutralizeError(
            f"plan: expected one lstm, gru or tanh rnn inside {layer!r}, got a {type(module).__name__} {why}; use "
            "strategy='zero', or select the block that contains it"
        )
    return sites


def recurrent_site(flow: Dataflow, call: Call) -> RecurrentSite | None:
    """Recognise a call as one recurrent op on what enters the layer, else ``None``."""
    found = [node for node in call.nodes if op_name(node) in SEQUENCES or op_name(node) in STEPS]
    if len(found) != 1:
        return None
    op, width = found[0], (shape_of(call.entry) or (0,))[-1]
    data = argument(op, "input", argument(op, "data"))
    while isinstance(data, fx.Node) and data is not call.entry and is_transparent(data):
        data = data.args[0]
    if data is not call.entry:
        return None
    if op_name(op) in STEPS:
        operands = [argument(op, name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
        leaves = [leaf for leaf in operands if isinstance(leaf, fx.Node)]
        cell, directions, per_layer = STEPS[op_name(op)], 1, len(leaves)
    else:
        leaves = [leaf for leaf in pytree.tree_leaves(argument(op, "params")) if isinstance(leaf, fx.Node)]
        cell, directions = SEQUENCES[op_name(op)], 2 if argument(op, "bidirectional") else 1
        per_layer = 4 if argument(op, "has_biases") else 2
    if any(leaf not in flow.names for leaf in leaves):
        return None
    names = [flow.names[leaf] for leaf in leaves]
    hidden = flow.shapes[names[0]][0] // len(cell.gates)
    if flow.shapes[names[1]][1] != hidden:  # a projection adds a fifth weight
        per_layer += 1
    weights = tuple(tuple(names[place : place + per_layer]) for place in range(0, len(names), per_layer))
    site = RecurrentSite(op, cell, weights, width, hidden, directions)
    return site if _leads_out(site, call) else None


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


def _leads_out(site: RecurrentSite, call: Call) -> bool:
    """Whether what leaves the layer is what the op hands on."""
    node = call.exit
    while node not in site.outputs:
        if not is_transparent(node) or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True


def _check(request: Request, layer: str, site: RecurrentSite, off: range, sites: list[RecurrentSite]) -> None:
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
    if off.start == 0 and site.width not in (site.hidden, site.hidden * site.directions):
        wide = f" or {site.hidden * site.directions} (both directions)" if site.directions == 2 else ""
        rest = f"select the stacked layers behind it ('{module_name(layer, {})}[1:]'), " if site.layers > 1 else ""
        raise NeutralizeError(
            f"plan: expected a {kind} as wide as its input for {layer!r}, got {site.width} features in and hidden size "
            f"{site.hidden}{wide}; {rest}use strategy='zero', or select the block that contains it"
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
    readers = _state_readers(site, off, {one.node for one in sites})
    if readers:
        raise NeutralizeError(
            f"plan: expected nothing to read the final states of {layer!r}, got "
            f"{', '.join(sorted({describe(reader, request.flow) for reader in readers}))}; they would hold its last "
            "input times ε, not its state: read the output sequence instead, or use strategy='zero'"
        )


def _state_readers(site: RecurrentSite, off: range, own: set[fx.Node]) -> list[fx.Node]:
    """What reads the final states of the layers that are off; the op itself may, as its next initial states.

    Which part of the states is read is not reasoned about but executed, on ones where a layer is off and zeros
    elsewhere.
    """
    rows = slice(off.start * site.directions, off.stop * site.directions)

    def marked(shape: tuple[int, ...]) -> torch.Tensor:
        marker = torch.zeros(shape)
        marker[rows if site.is_sequence else ...] = 1.0
        return marker

    found: list[fx.Node] = []
    ways = [(state, marked(shape_of(state) or ())) for state in site.states]
    while ways:
        node, marker = ways.pop()
        for reader in node.users:
            operands = [leaf for leaf in pytree.tree_leaves((reader.args, reader.kwargs)) if leaf is node]
            is_view = op_name(reader) in REARRANGE or op_name(reader) in SPLIT or op_name(reader) == "getitem"
            if reader in own and _reads_as_state(reader, node) and torch.equal(marker, marked(tuple(marker.shape))):
                continue
            if not is_view or len(operands) != 1:
                found.extend([reader] if _is_read(reader) else [])
                continue
            result = reader.target(marker, *reader.args[1:], **reader.kwargs)  # type: ignore[operator]
            parts = result if isinstance(result, tuple | list) else (result,)
            if op_name(reader) in SPLIT:
                for part in reader.users:
                    picked = parts[part.args[1]] if op_name(part) == "getitem" else marker  # type: ignore[index]
                    if bool(picked.any()):
                        ways.append((part, picked))
            elif bool(parts[0].any()):
                ways.append((reader, parts[0]))
    return found


def _reads_as_state(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a recurrent op reads a value as an initial state, and as nothing else."""
    leaves = [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if leaf is operand]
    states = [leaf for leaf in pytree.tree_leaves(argument(node, "hx")) if leaf is operand]
    return bool(states) and len(leaves) == len(states)


def _starts_at_zero(site: RecurrentSite) -> bool:
    """Whether a recurrent op is given no initial states."""
    return site.is_sequence and all(op_name(leaf) in ("aten::zeros", "aten::zeros_like") for leaf in site.initial)


def _input_bound(
    request: Request, layer: str, sites: list[RecurrentSite], off: range, given: float | None
) -> tuple[float, str]:
    """A bound on the magnitude of what the layer reads, and where it is from, in words."""
    if given is not None:
        return given, "given"
    name = module_name(layer, {})
    if off.start == 0 or all(f"{name}[{place}]" in request.layers for place in range(off.start)):
        return request.input_bound(layer), f"measured on the example inputs, with a margin of {BOUND_MARGIN:g}"
    if sites[0].cell is _GRU and not all(map(_starts_at_zero, sites)):
        return 1.0, "all that a gru hands on that starts within it"
    return 1.0, f"all that a {sites[0].cell.name} hands on"


def _own_edits(request: Request, site: RecurrentSite, off: range, epsilon: float, shut: float) -> Iterator[Edit]:
    """The edits of the layer's own weights and biases, stacked layer by stacked layer."""
    hidden, blocks = site.hidden, len(site.cell.gates)
    candidate = site.cell.gates.index(None)
    for place, names in enumerate(site.of(off)):
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
            yield from _gate_edits(request, biases[0], tuple(gate or 0 for gate in site.cell.gates), shut)
            yield request.rewrite(biases[1])


def _gate_edits(request: Request, bias: str, gates: tuple[int, ...], shut: float) -> Iterator[Edit]:
    """The edits that give each block of a bias its value, in units of ``shut``."""
    hidden = request.writable(bias).numel() // len(gates)
    for block, gate in enumerate(gates):
        yield request.rewrite(bias, fill=shut * gate, rows=(block * hidden, (block + 1) * hidden))


def _consumers(request: Request, layer: str, sites: list[RecurrentSite]) -> list[Affine]:
    """The weights that read the layer, through anything that only passes its scale on.

    Raises:
        NeutralizeError: something else reads it, or nothing does.
    """
    flow = request.flow
    consumers: list[Affine] = []
    others: list[fx.Node] = []
    own = {site.node for site in sites}
    scaled = {output for site in sites for output in site.outputs}
    for node in flow.graph.nodes:
        read = [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if leaf in scaled]
        dtype = dtype_of(node)
        if not read or node in scaled or not _is_read(node) or not (dtype is None or dtype.is_floating_point):
            continue  # the lengths of a padded sequence, say, come out of the same op
        if node in own and all(_reads_as_state(node, leaf) for leaf in read):
            continue  # of no effect: nothing of a state goes through
        weights = [] if node in own else list(_reading_weights(node, flow, read))
        if weights:
            consumers.extend(weights)
        elif node not in own and _passes_scale_on(node, read):
            scaled.add(node)
        else:
            others.append(node)
    found = ", ".join(sorted({describe(node, flow) for node in others}))
    if others or not consumers:
        raise NeutralizeError(
            f"plan: expected only affine or recurrent layers to read {layer!r}, got {found or 'none'}; its scale ε can "
            "be undone in a weight only: use strategy='zero', or select the block that contains it"
        )
    return consumers


def _check_own(request: Request, layer: str, consumers: list[Affine]) -> None:
    """Check that the weights that are rescaled read the layer alone.

    Raises:
        NeutralizeError: one is read elsewhere.
    """
    nodes: dict[fx.Node, tuple[str, ...]] = {}
    for consumer in consumers:
        names = (consumer.weight, *([] if consumer.bias is None else [consumer.bias]))
        nodes[consumer.node] = (*nodes.get(consumer.node, ()), *names)
        if consumer.added is not None:
            nodes[consumer.added] = ()
    check_own(request, layer, nodes)


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
    maps = recurrent_maps(node, flow)
    if maps and read == [maps[0].data]:  # and not as a state, say
        yield from maps


def _passes_scale_on(node: fx.Node, read: list[fx.Node]) -> bool:
    """Whether a node is multiplied by a positive factor if what it reads is."""
    if op_name(node) in CAST and dtype_of(node) != dtype_of(read[0]):
        return False  # small numbers would be lost in a narrower format
    return any(sorted(map(str, clause)) == sorted(map(str, read)) for clause in scaled_clauses(node, 2.0))


def _gate_words(cell: Cell, shut: float) -> Iterator[str]:
    if len(cell.gates) > 1:
        yield f"gates saturated by ±{shut:g}"
    yield "no recurrence"


def _handed_on(site: RecurrentSite, off: range) -> str:
    if site.directions == 1:
        return ""
    if off.start == 0 and site.width == site.hidden:
        return "each direction hands its input on: the output is the input twice, [x, x]"
    return "the forward direction hands on the first half of the features, the backward one the second"
