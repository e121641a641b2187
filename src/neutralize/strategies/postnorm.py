"""Post-norm blocks (BERT): pass-through by folding norms.

Such a block ends in a norm on the residual stream, ``y = norm(u + g(u))``, and what enters it comes out of a norm too,
whether one op computes them or the model spells them out:
``x = gain * n + bias`` with ``n`` normalised. Once the branches are null, a norm of a multiple of ``n`` gives a
multiple of ``n`` again. So the norm before the block and those inside hand on multiples of ``n``, and the last one
takes the gain and the bias of the norm before the block: the block's output is its input.

The multiples are chosen so small that ε outweighs the variance in every norm: there a norm is linear,
``norm(k n) = k n / sqrt(k² var + ε)``, and the old ε of the norm before the block is not applied twice.

Source: MATH §5 (with multiples of 1: exact up to ε / variance; with small ones the error is ``k² / (2 ε)`` per norm).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx

from neutralize.certify import Interpretation, side_readers
from neutralize.dataflow import Call, Dataflow, dtype_of, op_name, shape_of
from neutralize.errors import NeutralizeError
from neutralize.norms import Core, core_of, multiple_of
from neutralize.plan import Certificate, Copy, Edit, LayerPlan, dtype_name
from neutralize.planner import BOUND_MARGIN, Draft, Request
from neutralize.rules import CAST, is_number, is_transparent
from neutralize.search import Assignment, Preference, Search, constant_value, offset_of
from neutralize.sites import describe

# How many eps of its dtype a norm may be off, relative to its largest value: mean, variance, root and products in the
# wide types; the 16-bit types compute in float32, and round what they hand on and what the next norm centres.
_UNITS_PER_NORM = {8: 8, 4: 8, 2: 2}


# Views that keep the order of what they read.
_RESHAPES = frozenset(f"aten::{name}" for name in "view reshape _unsafe_view unsqueeze squeeze alias detach".split())


@dataclass(frozen=True)
class _Parameter:
    """A parameter that is a norm's gain or bias, element by element: as it is, or with a number added.

    Attributes:
        name: its qualified name.
        value: what the norm multiplies by or adds.
        offset: the number, 1 for a gain of ``1 + w``.
        reader: the op that multiplies by the value or adds it.
        between: the ops between the parameter and the reader.
    """

    name: str
    value: fx.Node
    offset: float
    reader: fx.Node
    between: frozenset[fx.Node]


@dataclass(frozen=True)
class _Norm:
    """A norm with its gain and bias, which are part of its op or follow it.

    Attributes:
        core: what normalises.
        result: its value, gain and bias included.
        weight, bias: its parameters, if it has any.
    """

    core: Core
    result: fx.Node
    weight: _Parameter | None = None
    bias: _Parameter | None = None

    @property
    def module(self) -> str:
        """Qualified name of the module that owns the parameters, or ``""``."""
        owned = self.weight or self.bias
        return owned.name.rpartition(".")[0] if owned is not None else ""

    @property
    def parameters(self) -> list[_Parameter]:
        """Its parameters."""
        return [each for each in (self.weight, self.bias) if each is not None]


@dataclass(frozen=True)
class _PostNorm:
    """A block whose branches can be nulled and whose stream passes norms only.

    Attributes:
        call: its one call.
        before: the norm that makes its input.
        inside: the norms on its stream, in order; the last makes its output.
        factors: what the stream is multiplied by on the way to each of them.
        assignment: what nulls its branches.
    """

    call: Call
    before: _Norm
    inside: tuple[_Norm, ...]
    factors: tuple[float, ...]
    assignment: Assignment


def draft_postnorm(request: Request, layer: str, edit: Preference) -> Draft | None:
    """Draft the pass-through of a block that ends in a norm; ``None`` where it does not, or is no residual block.

    Raises:
        NeutralizeError: it is one, but what enters it does not come out of a norm of its own.
    """
    block = _block(request, layer, edit)
    if isinstance(block, str):
        raise NeutralizeError(block)
    if block is None:
        return None
    chain = [block]  # selected blocks that hand on to each other, up to this one
    while True:
        first = chain[0].before.core.node
        previous = _neighbour(request, edit, lambda other, first=first: other.inside[-1].core.node is first)  # type: ignore[misc]
        if previous is None:
            break
        chain.insert(0, previous)
    following = _neighbour(request, edit, lambda other: other.before.core.node is block.inside[-1].core.node)
    norms = [chain[0].before, *(norm for each in chain for norm in each.inside)]
    factors = [1.0, *(factor for each in chain for factor in each.factors)]
    multiples = _multiples(request, norms, factors, is_small=True) or _multiples(
        request, norms, factors, is_small=False
    )
    assert multiples is not None

    edits: list[Edit] = []
    if following is None:
        edits += _copies(request, norms[0], norms[-1], multiples.factor)
    writes_before = len(norms) - len(block.inside) - 1
    for place in range(writes_before, len(norms) - 1):
        norm = norms[place]
        assert norm.weight is not None
        edits.append(request.rewrite(norm.weight.name, fill=multiples.fills[place]))
        if norm.bias is not None:
            edits.append(request.rewrite(norm.bias.name, fill=0.0))
    edits += request.edits_for(block.assignment)
    certificate = _certificate(request, layer, block, norms, multiples)
    note = f"the norm {norms[0].module!r} before it is rewritten too: it hands on multiples of normalised values"
    sides = "around" if following is None else "within"
    return Draft(tuple(edits), LayerPlan(layer, "input", certificate, (), sides=sides, note=note))


def _neighbour(request: Request, edit: Preference, fits: Callable[[_PostNorm], bool]) -> _PostNorm | None:
    """The selected post-norm block of which something holds."""
    for other in request.layers:
        found = _block(request, other, edit)
        if isinstance(found, _PostNorm) and fits(found):
            return found
    return None


def _block(request: Request, layer: str, edit: Preference) -> _PostNorm | str | None:
    """What the layer is, found once per plan: a post-norm block, why it cannot be off, or ``None`` for all others."""
    memory = request.remembered.setdefault("postnorm", {})
    if layer not in memory:
        memory[layer] = _find(request, layer, edit)
    found: _PostNorm | str | None = memory[layer]
    return found


def _find(request: Request, layer: str, edit: Preference) -> _PostNorm | str | None:
    calls = request.calls(layer)
    flow = request.flow
    call = calls[0]
    if shape_of(call.entry) != shape_of(call.exit):
        return None
    before, last = _norm_that_made(flow, call.entry), _norm_that_made(flow, call.exit)
    if last is None or flow.position[last.core.node] <= call.first:
        return None
    if len(calls) != 1:
        if not _assignments(request, call, last.core.node, edit):
            return None
        return (
            f"plan: expected a post-norm block that is called once, got {layer!r}, called {len(calls)} times: the norm "
            "before each call would have to be folded; use strategy='zero' or 'damp'"
        )
    if before is None:
        # Would it be one behind a norm? Its own last norm stands in for that norm.
        if not _assignments(request, call, last.core.node, edit):
            return None
        return (
            f"plan: expected a norm before the post-norm block {layer!r}, got {_maker(request, call.entry)}: only what "
            "is normalised passes its norms unchanged; use strategy='zero' or 'damp'"
        )
    for assignment in _assignments(request, call, before.core.node, edit):
        proof = Interpretation(flow, call, assignment, request.cut, before.core.node)
        if not proof.is_identity:
            continue
        inside, factors = _norms_on(flow, proof.stream)
        if not inside or inside[-1].core.node is not last.core.node or factors.pop() != 1.0:
            continue
        if not proof.holds_features(last.core.node, math.prod(last.core.over)):
            continue  # its gain and bias, those of the norm before the block, would meet other features
        reason = _why_not(request, layer, call, before, inside)
        if reason:
            return reason
        written = {parameter.name for norm in inside for parameter in norm.parameters}
        nulls = {name: value for name, value in assignment.items() if name not in written}
        return _PostNorm(call, before, tuple(inside), tuple(factors), nulls)
    return None


def _assignments(request: Request, call: Call, norm: fx.Node, edit: Preference) -> list[Assignment]:
    """What nulls the branches; from their ends, if the cheapest ways all null a norm that the stream passes."""
    preferences: list[Preference] = [edit, "outgoing"]
    for preference in preferences:
        found = Search(request.flow, call, request.regions, preference, normalised=norm).same(call.exit)
        if found:
            return found
    return []


def _norm_that_made(flow: Dataflow, node: fx.Node) -> _Norm | None:
    """The norm whose output a value is, through what hands on every element in its place."""
    norms, factors = _norms_on(flow, _path_from_norm(flow, node))
    return norms[0] if norms and norms[0].result is node and factors == [1.0, 1.0] else None


def _path_from_norm(flow: Dataflow, node: fx.Node) -> list[fx.Node]:
    """The nodes from the norm that made a value to that value: views, casts, gain and bias; empty: no norm made it."""
    path = [node]
    while core_of(path[-1]) is None:
        step = path[-1]
        operands = [operand for operand in step.args[:2] if isinstance(operand, fx.Node)]
        if op_name(step) in ("aten::add", "aten::mul"):
            operands = [one for one in operands if not _is_of_parameters(flow, one)]
        elif is_transparent(step) or op_name(step) in CAST:
            operands = operands[:1]
        else:
            return []
        if len(operands) != 1 or shape_of(operands[0]) != shape_of(step):
            return []
        path.append(operands[0])
    return path[::-1]


def _is_of_parameters(flow: Dataflow, node: fx.Node) -> bool:
    """Whether a value is a parameter, or made of one alone."""
    while node not in flow.names:
        if len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
    return True


def _norms_on(flow: Dataflow, stream: list[fx.Node]) -> tuple[list[_Norm], list[float]]:
    """The norms on a path through the graph, and what it is multiplied by before each of them and behind the last."""
    norms: list[_Norm] = []
    factors = [1.0]
    for before, node in zip([None, *stream], stream, strict=False):
        core = core_of(node)
        if core is not None:
            gain, bias = (_parameter_of(flow, node, value) for value in (core.gain, core.bias))
            norms.append(_Norm(core, node, gain, bias))
            factors.append(1.0)
            continue
        factors[-1] *= multiple_of(node) or 1.0
        follows = norms and norms[-1].result is before and factors[-1] == 1.0
        if not follows or before is None:
            continue
        norm = norms[-1]
        others = [operand for operand in node.args[:2] if operand is not before]
        parameter = _parameter_of(flow, node, others[0]) if len(others) == 1 else None
        if parameter is not None and parameter.value.meta["val"].shape[-len(norm.core.over) :] == norm.core.over:
            if op_name(node) == "aten::mul" and not norm.parameters:
                norms[-1] = replace(norm, weight=parameter, result=node)
            elif op_name(node) == "aten::add" and norm.bias is None and parameter.offset == 0.0:
                norms[-1] = replace(norm, bias=parameter, result=node)
        elif is_transparent(node) or op_name(node) in CAST:
            norms[-1] = replace(norm, result=node)
    return norms, factors


def _parameter_of(flow: Dataflow, result: fx.Node, value: object) -> _Parameter | None:
    """The parameter of which a vector that an op multiplies by or adds is a view, or the sum with a number."""
    reader = next((each for each in (result, *result.all_input_nodes) if value in each.all_input_nodes), None)
    if not isinstance(value, fx.Node) or reader is None or not is_number(reader.kwargs.get("alpha", 1), 1):
        return None
    offset, node = 0.0, value
    between = []
    while node not in flow.names:
        between.append(node)
        shifted = offset_of(node)
        operand = node.args[0] if node.args else None
        if shifted is not None and not offset:
            operand, offset = shifted
        elif op_name(node) not in CAST and op_name(node) not in _RESHAPES:
            return None
        if not isinstance(operand, fx.Node):
            return None
        node = operand
    name, shape = flow.names[node], shape_of(value)
    if shape is None or math.prod(shape) != math.prod(flow.shapes[name]):
        return None
    return _Parameter(name, value, offset, reader, frozenset(between))


def _maker(request: Request, node: fx.Node) -> str:
    while is_transparent(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return "the model's input" if node.op == "placeholder" else describe(node, request.flow)


def _why_not(request: Request, layer: str, call: Call, before: _Norm, inside: list[_Norm]) -> str:
    """Why the norms cannot be rewritten, or ``""``."""
    flow = request.flow
    start = f"plan: expected to fold the norms around {layer!r}, got "
    for norm in (before, *inside):
        if norm.weight is None:
            return f"{start}a norm without a gain ({describe(norm.core.node, flow)}); use strategy='zero' or 'damp'"
        for parameter in norm.parameters:
            read = [*flow.users(parameter.name), *(user for node in parameter.between for user in node.users)]
            others = [user for user in read if user is not parameter.reader and user not in parameter.between]
            if others:
                return (
                    f"{start}{parameter.name!r}, which {describe(others[0], flow)} reads too; untie it first, or use "
                    "strategy='zero' or 'damp'"
                )
    last = inside[-1]
    if before.bias is not None and last.bias is None:
        return f"{start}a last norm without a bias to take {before.bias.name!r}; use strategy='zero' or 'damp'"
    for source, target in ((before.weight, last.weight), (before.bias, last.bias)):
        if source is not None and target is not None and flow.shapes[source.name] != flow.shapes[target.name]:
            return (
                f"{start}{target.name!r} of shape {list(flow.shapes[target.name])}, which is to take {source.name!r} "
                f"of shape {list(flow.shapes[source.name])}; give both one shape, or use strategy='zero' or 'damp'"
            )
    # Between the norm and the block: whoever else reads it would read multiples of normalised values.
    path = _path_from_norm(flow, call.entry)
    inner = range(call.first, call.last + 1)
    readers = [user for node in path for user in node.users if user not in path and flow.position[user] not in inner]
    if readers:
        return (
            f"{start}{describe(readers[0], flow)}, which reads what enters the block too (the norm "
            f"{before.module!r} before it has other readers); select the block that contains both, or use "
            "strategy='zero' or 'damp'"
        )
    return ""


@dataclass(frozen=True)
class _Multiples:
    """What the norms hand on multiples of normalised values with.

    Attributes:
        fills: what the gains of all norms but the last are filled with.
        factor: what the gain of the norm before the block is multiplied by for the last norm.
        error: what ε and the variance leave, relative; ``None``: not known.
    """

    fills: list[float]
    factor: float
    error: float | None


def _multiples(request: Request, norms: list[_Norm], factors: list[float], *, is_small: bool) -> _Multiples | None:
    """Choose the multiples; ``None`` where the gains do not hold such small ones.

    Norm ``i`` is to hand on ``k`` times the normalised values, with ``k² <= 2^-(p+1) ε`` of the next norm, ``p`` the
    significant bits of the dtype: then it is linear to within roundoff. float16 does not hold such numbers, nor does
    ``1 + w`` with few bits, and with an ε of 0 every multiple will do: there ``k`` is 1.
    """
    assert norms[0].weight is not None
    dtype = request.tensors[norms[0].weight.name].dtype
    bits = 1 - round(math.log2(torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype).eps))
    is_small = is_small and dtype != torch.float16
    fills: list[float] = []
    multiple, error = 1.0, 0.0
    for place, norm in enumerate(norms):
        multiple *= factors[place]
        is_linear = place > 0 and is_small and norm.core.eps > 0.0
        passed = norm.core.scale * (multiple / norm.core.floor if is_linear else 1.0)  # per unit of gain
        if is_linear:
            error += norm.core.nonlinearity(multiple)
        if place == len(norms) - 1:
            if error > 2.0 ** (1 - bits) * len(norms):
                return None
            is_known = is_small or all(each.core.eps == 0.0 for each in norms)
            return _Multiples(fills, norms[0].core.scale / passed, error if is_known else None)
        ahead = norms[place + 1].core
        wanted = 1.0
        if is_small and ahead.eps > 0.0:
            spare = (bits + 1) * (1.0 if ahead.is_behind_root else 0.5)
            wanted = 2.0 ** math.floor(math.log2(ahead.floor / factors[place + 1]) - spare)
        assert norm.weight is not None
        least = (
            abs(norm.weight.offset) * torch.finfo(request.tensors[norm.weight.name].dtype).eps
        )  # of what 1 + w can be
        filled = _fill(request, norm, max(wanted / passed, least))
        if filled is None:
            return None
        fills.append(filled[0])
        multiple = filled[1] * passed
    raise AssertionError("there is a last norm")


def _fill(request: Request, norm: _Norm, gain: float) -> tuple[float, float] | None:
    """What a norm's weight is filled with for a gain, and the gain that this gives; ``None`` if that is far from it."""
    assert norm.weight is not None
    name = norm.weight.name
    stored = float(torch.tensor(gain - norm.weight.offset, dtype=torch.float64).to(request.tensors[name].dtype))
    made = constant_value(norm.weight.value, {name: stored}, request.flow.names)
    return (stored, made) if made is not None and gain / 2 < made < 2 * gain else None


def _copies(request: Request, source: _Norm, target: _Norm, factor: float) -> list[Edit]:
    """The last norm takes the gain and the bias of the norm before the block."""
    copies: list[Edit] = []
    for written, read, scale in ((target.weight, source.weight, factor), (target.bias, source.bias, 1.0)):
        if written is None:
            continue
        if read is None:
            copies.append(request.rewrite(written.name, fill=0.0))
            continue
        tensor = request.writable(written.name)
        name, other = request.canonical(written.name), request.canonical(read.name)
        offset = scale * read.offset - written.offset
        copies.append(Copy(name, other, tuple(tensor.shape), dtype_name(tensor.dtype), scale, offset))
    return copies


def _certificate(
    request: Request, layer: str, block: _PostNorm, norms: list[_Norm], multiples: _Multiples
) -> Certificate:
    reason = f"{len(norms)} norms folded: each hands on a multiple of normalised values"
    assumption = request.premise
    others = side_readers(request.flow, block.call, block.assignment)
    if others:
        found = ", ".join(sorted({describe(reader, request.flow) for reader in others})[:3])
        return Certificate(
            layer, "measured", None, assumption, f"{reason}, but the edits change what {found} reads of it too"
        )
    dtype = dtype_of(block.call.entry)
    assert dtype is not None
    assert norms[0].weight is not None
    gain = request.tensors[norms[0].weight.name]
    if multiples.error is None or dtype == torch.float16:
        small = "float16" if torch.float16 in (dtype, gain.dtype) else f"1 + w of {dtype_name(gain.dtype)}"
        return Certificate(
            layer, "measured", None, assumption, f"{reason}; their ε beside the variance is not negligible in {small}"
        )
    if gain.is_meta or request.example_inputs is None:
        return Certificate(layer, "measured", None, assumption, f"{reason}; no values to compare roundoff with")
    reach = request.input_bound(layer) / BOUND_MARGIN**2
    gain = gain.detach().double() + norms[0].weight.offset
    largest = float(gain.abs().max()) * math.sqrt(gain.numel())  # of what is normalised: sqrt(width)
    unit = torch.finfo(dtype).eps
    bound = (multiples.error + _UNITS_PER_NORM[dtype.itemsize] * unit * len(norms)) * largest / reach
    return Certificate(
        layer,
        "bounded",
        bound,
        f"{assumption}, |x| reaches {reach:.3g} (measured on the example inputs, with a margin of {BOUND_MARGIN:g})",
        f"{reason}, to within {multiples.error:.2g} and roundoff",
    )
