"""Post-norm blocks (BERT): pass-through by folding norms.

Such a block ends in a norm on the residual stream, ``y = norm(u + g(u))``, and what enters it comes out of a norm too:
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
from dataclasses import dataclass

import torch
from torch import fx

from neutralize.certify import Interpretation, side_readers
from neutralize.dataflow import Call, dtype_of, shape_of
from neutralize.errors import NeutralizeError
from neutralize.plan import Certificate, Copy, Edit, LayerPlan, dtype_name
from neutralize.planner import BOUND_MARGIN, Draft, Request
from neutralize.rules import is_transparent, multiple_of
from neutralize.search import Assignment, Preference, Search
from neutralize.sites import Norm, describe, norm_of

# How many eps of its dtype a norm may be off, relative to its largest value: mean, variance, root and products in the
# wide types; the 16-bit types compute in float32, and round what they hand on and what the next norm centres.
_UNITS_PER_NORM = {8: 8, 4: 8, 2: 2}


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
    before: Norm
    inside: tuple[Norm, ...]
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
        first = chain[0].before.node
        previous = _neighbour(request, edit, lambda other, first=first: other.inside[-1].node is first)  # type: ignore[misc]
        if previous is None:
            break
        chain.insert(0, previous)
    following = _neighbour(request, edit, lambda other: other.before.node is block.inside[-1].node)
    norms = [chain[0].before, *(norm for each in chain for norm in each.inside)]
    factors = [1.0, *(factor for each in chain for factor in each.factors)]
    gains, factor, nonlinearity = _multiples(request, norms, factors)

    edits: list[Edit] = []
    if following is None:
        edits += _copies(request, norms[0], norms[-1], factor)
    writes_before = len(norms) - len(block.inside) - 1
    for place in range(writes_before, len(norms) - 1):
        norm = norms[place]
        assert norm.weight is not None
        edits.append(request.rewrite(norm.weight, fill=gains[place]))
        if norm.bias is not None:
            edits.append(request.rewrite(norm.bias, fill=0.0))
    edits += request.edits_for(block.assignment)
    certificate = _certificate(request, layer, block, norms, nonlinearity)
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
    before, last = _norm_that_made(request, call.entry), _norm_that_made(request, call.exit)
    if last is None or flow.position[last.node] <= call.first:
        return None
    if len(calls) != 1:
        if not _assignments(request, call, last.node, edit):
            return None
        return (
            f"plan: expected a post-norm block that is called once, got {layer!r}, called {len(calls)} times: the norm "
            "before each call would have to be folded; use strategy='zero' or 'damp'"
        )
    if before is None:
        # Would it be one behind a norm? Its own last norm stands in for that norm.
        if not _assignments(request, call, last.node, edit):
            return None
        return (
            f"plan: expected a norm before the post-norm block {layer!r}, got {_maker(request, call.entry)}: only what "
            "is normalised passes its norms unchanged; use strategy='zero' or 'damp'"
        )
    for assignment in _assignments(request, call, before.node, edit):
        proof = Interpretation(flow, call, assignment, request.cut, before.node)
        if not proof.is_identity:
            continue
        inside: list[Norm] = []
        factors = [1.0]
        for node in proof.stream:
            norm = norm_of(node, flow)
            if norm is None:
                factors[-1] *= multiple_of(node) or 1.0
            else:
                inside.append(norm)
                factors.append(1.0)
        if not inside or inside[-1].node is not last.node or factors.pop() != 1.0:
            continue
        reason = _why_not(request, layer, call, before, inside)
        if reason:
            return reason
        written = {name for norm in inside for name in (norm.weight, norm.bias)}
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


def _norm_that_made(request: Request, node: fx.Node) -> Norm | None:
    """The norm whose output a value is, through what hands on every element in its place."""
    while norm_of(node, request.flow) is None:
        operand = node.args[0] if node.args else None
        if not isinstance(operand, fx.Node) or not is_transparent(node) or shape_of(operand) != shape_of(node):
            return None
        node = operand
    return norm_of(node, request.flow)


def _maker(request: Request, node: fx.Node) -> str:
    while is_transparent(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return "the model's input" if node.op == "placeholder" else describe(node, request.flow)


def _why_not(request: Request, layer: str, call: Call, before: Norm, inside: list[Norm]) -> str:
    """Why the norms cannot be rewritten, or ``""``."""
    flow = request.flow
    start = f"plan: expected to fold the norms around {layer!r}, got "
    for norm in (before, *inside):
        if norm.weight is None:
            return f"{start}a norm without a gain ({describe(norm.node, flow)}); use strategy='zero' or 'damp'"
        for name in (norm.weight, *([norm.bias] if norm.bias is not None else [])):
            others = [user for user in flow.users(name) if user is not norm.node]
            if others:
                return (
                    f"{start}{name!r}, which {describe(others[0], flow)} reads too; untie it first, or use "
                    "strategy='zero' or 'damp'"
                )
    if (before.bias is None) != (inside[-1].bias is None) and before.bias is not None:
        return f"{start}a last norm without a bias to take {before.bias!r}; use strategy='zero' or 'damp'"
    # Between the norm and the block: whoever else reads it would read multiples of normalised values.
    path = [call.entry]
    while path[-1] is not before.result:
        operand = path[-1].args[0]
        assert isinstance(operand, fx.Node)
        path.append(operand)
    inner = range(call.first, call.last + 1)
    readers = [user for node in path for user in node.users if user not in path and flow.position[user] not in inner]
    if readers:
        return (
            f"{start}{describe(readers[0], flow)}, which reads what enters the block too (the norm "
            f"{before.module!r} before it has other readers); select the block that contains both, or use "
            "strategy='zero' or 'damp'"
        )
    return ""


def _multiples(request: Request, norms: list[Norm], factors: list[float]) -> tuple[list[float], float, float]:
    """Gains of all norms but the last, the factor of the last one's, and the error that ε and variance leave.

    Norm ``i`` is to hand on ``k`` times the normalised values, with ``k² <= 2^-(p+1) ε`` of the next norm, ``p`` the
    significant bits of the dtype: then it is linear to within roundoff. float16 does not hold such numbers, and with an
    ε of 0 every multiple will do: there ``k`` is 1.
    """
    dtype = request.tensors[norms[0].weight or ""].dtype
    bits = 1 - round(math.log2(torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype).eps))
    gains: list[float] = []
    multiple, error = 1.0, 0.0
    for place, norm in enumerate(norms):
        multiple *= factors[place]
        is_linear = place > 0 and dtype != torch.float16 and norm.eps > 0.0
        passed = multiple / math.sqrt(norm.eps) if is_linear else 1.0  # per unit of gain
        if is_linear:
            error += multiple**2 / (2 * norm.eps)
        if place == len(norms) - 1:
            return gains, 1.0 / passed, error
        ahead = norms[place + 1].eps
        wanted = 1.0
        if dtype != torch.float16 and ahead > 0.0:
            ahead /= factors[place + 1] ** 2
            wanted = 2.0 ** math.floor(math.log2(math.sqrt(ahead)) - (bits + 1) / 2)
        stored = torch.tensor(wanted / passed, dtype=torch.float64).to(dtype)
        gains.append(float(stored.double()))
        multiple = gains[-1] * passed
    raise AssertionError("there is a last norm")


def _copies(request: Request, source: Norm, target: Norm, factor: float) -> list[Edit]:
    """The last norm takes the gain and the bias of the norm before the block."""
    copies: list[Edit] = []
    for name, other, scale in ((target.weight, source.weight, factor), (target.bias, source.bias, 1.0)):
        if name is None:
            continue
        if other is None:
            copies.append(request.rewrite(name, fill=0.0))
            continue
        tensor = request.writable(name)
        copies.append(
            Copy(
                request.canonical(name), request.canonical(other), tuple(tensor.shape), dtype_name(tensor.dtype), scale
            )
        )
    return copies


def _certificate(request: Request, layer: str, block: _PostNorm, norms: list[Norm], nonlinearity: float) -> Certificate:
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
    if torch.float16 in (dtype, request.tensors[norms[0].weight].dtype):
        return Certificate(
            layer, "measured", None, assumption, f"{reason}; their ε beside the variance is not negligible in float16"
        )
    gain = request.tensors[norms[0].weight]
    if gain.is_meta or request.example_inputs is None:
        return Certificate(layer, "measured", None, assumption, f"{reason}; no values to compare roundoff with")
    reach = request.input_bound(layer) / BOUND_MARGIN**2
    largest = float(gain.detach().double().abs().max()) * math.sqrt(gain.numel())  # of what is normalised: sqrt(width)
    unit = torch.finfo(dtype).eps
    bound = (nonlinearity + _UNITS_PER_NORM[dtype.itemsize] * unit * len(norms)) * largest / reach
    return Certificate(
        layer,
        "bounded",
        bound,
        f"{assumption}, |x| reaches {reach:.3g} (measured on the example inputs, with a margin of {BOUND_MARGIN:g})",
        f"{reason}, to within {nonlinearity:.2g} and roundoff",
    )
