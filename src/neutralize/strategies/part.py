"""Parts of a layer: what attention heads, channels or experts contribute, times a factor (0: nothing).

A head contributes through the columns of the output projection that read it. Which these are is not reasoned about but
executed: the views between the attention and the projection run on a tensor of indices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from neutralize.certify import unstrided, without_dtype
from neutralize.dataflow import Call, is_mark, op_name, shape_of
from neutralize.errors import NeutralizeError
from neutralize.parts import Part
from neutralize.plan import Certificate, Edit, LayerPlan
from neutralize.planner import Draft, Request
from neutralize.rules import ATTENTION, CAST, DROPOUT, REARRANGE, tensors
from neutralize.sites import Affine, affine_of, affine_site

_PRODUCTS = ("aten::matmul", "aten::bmm", "aten::einsum")
_SOFTMAX = ("aten::softmax", "aten::_softmax")


def draft_part(request: Request, layer: str, factor: float) -> Draft:
    """Draft a part of a layer whose contribution is multiplied by ``factor``.

    Raises:
        NeutralizeError: the module has no such parts, or has not that many.
    """
    part = request.fraction(layer)
    assert part is not None
    draft = {"heads": _heads, "kv_heads": _heads, "channels": _channels, "experts": _experts}[part.kind]
    edits, reason, entry = draft(request, layer, part, factor)
    if factor == 0.0:
        certificate = Certificate(layer, "exact", 0.0, request.premise, reason)
    else:
        rounded = "" if math.frexp(abs(factor))[0] == 0.5 else "; the scaled weights are rounded once"
        certificate = Certificate(layer, "rounding", None, request.premise, reason + rounded)
    target = "null" if factor == 0.0 else "scaled"
    return Draft(edits, LayerPlan(layer, target, certificate, (), gain=factor if factor else 1.0, **entry))


def _runs(indices: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of the indices, which are in order."""
    start = last = None
    for index in indices:
        if last is not None and index != last + 1:
            yield start, last + 1  # type: ignore[misc]
            start = None
        start, last = index if start is None else start, index
    if start is not None and last is not None:
        yield start, last + 1


# ---- heads -----------------------------------------------------------------------------------------------------------


def _heads(request: Request, layer: str, part: Part, factor: float) -> tuple[tuple[Edit, ...], str, dict[str, Any]]:
    found: dict[str, tuple[Affine, torch.Tensor]] = {}
    for call in request.calls(layer):
        for projection, attention, steps in _projections(request, call):
            heads = _head_of_column(attention, steps)
            if heads is None:
                continue
            if part.kind == "kv_heads":
                heads = _groups(request, layer, attention, heads)
            known = found.setdefault(projection.weight, (projection, heads))
            if not torch.equal(known[1], heads):
                raise NeutralizeError(
                    f"plan: expected the heads of {layer!r} in the same columns of {projection.weight!r} in every "
                    "call, got others; select the attention module that is called once"
                )
    if len(found) != 1:
        names = ", ".join(map(repr, found)) or "none"
        raise NeutralizeError(
            f"plan: expected one attention with an output projection in {part.owner!r} for {layer!r}, got {names}; "
            "select the module of one attention"
        )
    projection, heads = next(iter(found.values()))
    _check_alone(request, layer, projection)
    chosen = part.among(layer, int(heads.max()) + 1)
    columns = [place for place, head in enumerate(heads.tolist()) if head in chosen]
    along = "rows" if projection.transposed else "columns"  # (in, out) or (out, in)
    edits = tuple(request.rewrite(projection.weight, scale=factor, **{along: run}) for run in _runs(columns))
    reason = f"{len(columns)} of {len(heads)} columns of {projection.weight!r} are all that reads what it computes"
    return edits, reason, {"sides": "out", "consumers": (projection.module,), "note": _counted(part, heads)}


def _counted(part: Part, heads: torch.Tensor) -> str:
    count = int(heads.max()) + 1
    return f"of {count} {part.kind}, {len(heads) // count} features each"


def _projections(request: Request, call: Call) -> Iterator[tuple[Affine, fx.Node, list[fx.Node]]]:
    """Affine ops of a call that read an attention, with the steps from the one to the other."""
    for node in call.nodes:
        affine = affine_of(node, request.flow)
        found = None if affine is None else _from_attention(affine.data)
        if affine is not None and found is not None:
            yield affine, found[0], found[1]


def _from_attention(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The attention whose result a value is, rearranged or weighted element by element, and the steps in between."""
    steps: list[fx.Node] = []
    while not _is_attention(node):
        op = op_name(node)
        if op == "aten::mul":  # a gate
            operands = [operand for operand in tensors(*node.args) if shape_of(operand) == shape_of(node)]
            found = [way for way in map(_from_attention, operands) if way is not None]
            return (found[0][0], [*found[0][1], node, *reversed(steps)]) if len(found) == 1 else None
        if not (op in REARRANGE or op in CAST or op in DROPOUT or op == "getitem") or not node.args:
            return None
        operand = node.args[0]
        if not isinstance(operand, fx.Node):
            return None
        steps.append(node)
        node = operand
    return node, steps[::-1]


def _is_attention(node: fx.Node) -> bool:
    op = op_name(node)
    if op == "aten::einsum" and not (isinstance(node.args[1], list | tuple) and len(node.args[1]) == 2):
        return False
    return op in ATTENTION or (op in _PRODUCTS and _is_weights(_operands(node)[0]))


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What weighs, and what is weighed: the two operands of a product, or the values of a fused attention twice."""
    if op_name(node) in ATTENTION:
        value = node.args[2]
        assert isinstance(value, fx.Node)
        return value, value
    operands = node.args[1] if op_name(node) == "aten::einsum" else node.args
    assert isinstance(operands, list | tuple)
    one, other = operands[:2]
    assert isinstance(one, fx.Node)
    assert isinstance(other, fx.Node)
    return one, other


def _is_weights(node: object) -> bool:
    """Whether a value is a softmax, rearranged at most."""
    while isinstance(node, fx.Node) and op_name(node) not in _SOFTMAX:
        op = op_name(node)
        if not (op in REARRANGE or op in CAST or op in DROPOUT or op == "getitem" or is_mark(node)):
            return False
        node = node.args[0]
    return isinstance(node, fx.Node)


def _head_of_column(attention: fx.Node, steps: list[fx.Node]) -> torch.Tensor | None:
    """For every feature that a projection reads the head that computed it; ``None`` where that is not one each.

    Returns:
        int64 (features,): heads from 0, each with as many features.
    """
    shape = shape_of(attention)
    if shape is None or len(shape) < 3:
        return None
    indices = _moved(torch.arange(math.prod(shape)).reshape(shape), steps)
    if indices is None or indices.dim() < 2:
        return None
    rows = indices.reshape(-1, indices.shape[-1])
    varying = []
    for coordinate in torch.unravel_index(rows, shape)[:-1]:
        relative = coordinate - coordinate[:, :1]
        if not torch.equal(relative, relative[:1].expand_as(relative)):
            return None  # which one it is depends on the position
        if relative.any():
            varying.append(coordinate[0] - coordinate[0].min())
    if len(varying) > 1:
        return None
    heads = varying[0] if varying else torch.zeros(rows.shape[1], dtype=torch.int64)
    counts = heads.bincount()
    return heads if counts.numel() and bool((counts == counts[0]).all()) else None


def _moved(indices: torch.Tensor, steps: list[fx.Node]) -> torch.Tensor | None:
    for step in steps:
        if op_name(step) not in REARRANGE:
            continue
        try:
            indices = step.target(unstrided(indices), *step.args[1:], **without_dtype(step.kwargs))  # type: ignore[operator]
        except (RuntimeError, TypeError):  # an operand that only the real model has
            return None
    return indices


def _groups(request: Request, layer: str, attention: fx.Node, heads: torch.Tensor) -> torch.Tensor:
    """For every feature the key-value head that its head reads.

    Raises:
        NeutralizeError: the values cannot be followed back to fewer heads.
    """
    value = _operands(attention)[1]
    shape = shape_of(value)
    count = int(heads.max()) + 1
    assert shape is not None
    if len(shape) == 4 and shape[1] < count:  # the fused attention repeats them itself
        return heads // (count // shape[1])
    steps: list[fx.Node] = []
    source = value
    while op_name(source) in REARRANGE and isinstance(source.args[0], fx.Node):
        steps.append(source)
        source = source.args[0]
        before = shape_of(source)
        if before is None or len(before) != 4 or before[1] >= count or before[-1] != shape[-1]:
            continue
        moved = _moved(torch.arange(math.prod(before)).reshape(before), steps[::-1])
        if moved is None or moved.dim() != 4 or moved.shape[1] != count:
            break
        group = torch.unravel_index(moved[0, :, 0, 0], before)[1]
        return group[heads]
    raise NeutralizeError(
        f"plan: expected fewer key-value heads than heads for {layer!r}, got {count} of both; select heads"
    )


def _check_alone(request: Request, layer: str, projection: Affine) -> None:
    """Check that a weight is read by one op only.

    Raises:
        NeutralizeError: it is read elsewhere too.
    """
    calls = {node for call in request.calls(layer) for node in call.nodes}
    others = [user for user in request.flow.users(projection.weight) if user not in calls]
    if others:
        raise NeutralizeError(
            f"plan: expected {projection.weight!r} to be read in {layer!r} only, got another reader; untie it first"
        )
    if not projection.module:
        raise NeutralizeError(
            f"plan: expected a projection with a module of its own for {layer!r}, got {projection.weight!r}; select "
            "the whole attention"
        )


# ---- channels --------------------------------------------------------------------------------------------------------


def _channels(request: Request, layer: str, part: Part, factor: float) -> tuple[tuple[Edit, ...], str, dict[str, Any]]:
    sites = [affine_site(request.flow, call) for call in request.calls(layer)]
    if any(site is None for site in sites) or sites[0] is None:
        raise NeutralizeError(
            f"plan: expected one affine layer (linear, convolution) to have channels, got {part.owner!r}, a "
            f"{type(request.layers[layer]).__name__}; name the affine layer inside it"
        )
    affine = sites[0].affine
    shape = request.flow.shapes[affine.weight]
    if affine.transposed and affine.is_convolution and affine.groups != 1:
        raise NeutralizeError(
            f"plan: expected a transposed convolution of one group for {layer!r}, got {affine.groups}; its channels "
            "lie apart in memory: use strategy='zero' on the layer"
        )
    chosen = part.among(layer, shape[1] if affine.transposed else shape[0])
    taps = math.prod(shape[2:]) if affine.transposed else 1
    edits: list[Edit] = []
    for first, last in _runs(chosen):
        block = {"columns": (first * taps, last * taps)} if affine.transposed else {"rows": (first, last)}
        edits.append(request.rewrite(affine.weight, scale=factor, **block))
        if affine.bias is not None:
            edits.append(request.rewrite(affine.bias, scale=factor, rows=(first, last)))
    return tuple(edits), f"its {len(chosen)} rows of weight and bias are all that computes it", {"sides": "in"}


# ---- experts ---------------------------------------------------------------------------------------------------------

# An expert's slice of a fused parameter multiplies its own tokens only: one matrix of a batch or group.
_PER_EXPERT = frozenset(
    f"aten::{name}" for name in "bmm baddbmm _grouped_mm select index unbind index_select".split()
) | {"transformers::grouped_mm_fallback"}


def _experts(request: Request, layer: str, part: Part, factor: float) -> tuple[tuple[Edit, ...], str, dict[str, Any]]:
    names = [
        name
        for name in _fused(request, layer)
        if any(op_name(user) in _PER_EXPERT or _leads_to_expert(user) for user in request.flow.users(name))
    ]
    counts = {request.flow.shapes[name][0] for name in names}
    if len(counts) != 1:
        raise NeutralizeError(
            f"plan: expected experts in fused parameters (experts, ...) for {layer!r}, got none that the dataflow of "
            f"{part.owner!r} nulls expert by expert; name the expert's module if it has one"
        )
    if factor != 0.0:
        raise NeutralizeError(
            f"plan: expected strategy='zero' for {layer!r}, got a factor of {factor}; experts are off or on"
        )
    chosen = part.among(layer, counts.pop())
    edits = tuple(request.rewrite(name, scale=factor, rows=run) for name in names for run in _runs(chosen))
    reason = f"what it gives is homogeneous in its slices of {', '.join(map(repr, names))}"
    return edits, reason, {"sides": "in"}


def _fused(request: Request, layer: str) -> list[str]:
    """The parameters, one slice per expert, that null the module's output if they are zero."""
    for search in request.search(layer, "outgoing"):
        for assignment in search.zero(search.call.exit):
            names = [name for name in assignment if len(request.flow.shapes[name]) >= 2]
            if names and len(names) == len(assignment) and not any(assignment.values()):
                return names
    return []


def _leads_to_expert(node: fx.Node) -> bool:
    """Whether a view of a fused parameter is multiplied expert by expert."""
    return op_name(node) in REARRANGE and any(
        op_name(user) in _PER_EXPERT or _leads_to_expert(user) for user in node.users
    )
