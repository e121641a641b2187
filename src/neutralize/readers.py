"""What reads a layer's result, and where: through pools, views, splits and concatenations.

A layer in its linear regime hands on ``φ(a) + ε φ'(a) x``. Whatever commutes with that change of variables may stand
between the layer and the weights that undo it: every element of a view, a maximum, a mean and an interpolation (whose
weights add up to one) of ``c + s x`` is ``c + s`` times that of ``x`` (s > 0). Zeros that are padded on the way do not
commute with ``c``, and are reported; nor does what is linear and no more (a sum, a product with something else).

In a concatenation only a part of what a weight reads is the layer's. Which part is not reasoned about but executed: the
ops on the way run on a tensor that is one where the layer is and zero elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from neutralize.dataflow import Dataflow, argument, op_name, shape_of
from neutralize.rules import DROPOUT, JOIN, REARRANGE, SPLIT, is_number, is_transparent
from neutralize.sites import PRODUCTS, Affine, Norm, Product, affine_of, describe, norm_of, product_of, recurrent_maps

_MAXIMA = frozenset(
    f"aten::{name}"
    for name in """max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin""".split()
)
_AVERAGES = frozenset(f"aten::avg_pool{rank}d" for rank in (1, 2, 3))
_MEANS = frozenset(
    f"aten::{name}"
    for name in """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d mean upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d
    upsample_bicubic2d index_select index gather reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d""".split()
)
_PACK = "aten::_pack_padded_sequence"  # selects what is no padding
# Linear in their first operand, without an offset, but a constant does not come out of them as it went in.
_LINEAR = frozenset(f"aten::{name}" for name in "sum cumsum im2col col2im neg masked_fill div".split()) | PRODUCTS


@dataclass(frozen=True)
class Read:
    """One op with weights of its own that reads the layer's result.

    Attributes:
        reader: the op.
        features: half-open range of its input features that are the layer's; ``None``: all of them are.
        zeros: what puts zeros beside the layer's values on the way, in words.
        ordered: a maximum stands on the way: it commutes with a positive scale only.
        linear: what stands on the way that is linear and no more, in words: φ(a) must be 0.
        padded: the op is a convolution that pads zeros to what it reads.
    """

    reader: Affine | Norm | Product
    features: tuple[int, int] | None
    zeros: tuple[str, ...]
    ordered: bool
    linear: tuple[str, ...] = ()
    padded: bool = False


@dataclass(frozen=True)
class _Way:
    """How far a walk has come.

    Attributes:
        node: the value that is read next.
        marker: ones where the layer is; ``None``: everywhere. A tuple for several outputs.
        zeros, ordered, linear: as in ``Read``.
    """

    node: fx.Node
    marker: Any = None
    zeros: tuple[str, ...] = ()
    ordered: bool = False
    linear: tuple[str, ...] = ()


def reads_of(flow: Dataflow, results: Sequence[fx.Node]) -> tuple[list[Read], list[fx.Node]]:
    """Everything that reads what a layer hands on: ops with weights, and the rest.

    Args:
        flow: the dataflow.
        results: what the layer hands on in each of its calls; these may come together on the way, in a stack of steps.

    Returns:
        The reads, each once, and the nodes that are neither an op with weights nor on the way to one.
    """
    reads: dict[tuple[fx.Node, str | None, tuple[int, int] | None], Read] = {}
    others: list[fx.Node] = []
    ways = [_Way(result) for result in results]
    reached = _reached_from(results)
    while ways:
        way = ways.pop()
        for reader in way.node.users:
            if _is_idle(reader):
                continue
            found = _read(reader, flow, way)
            onward = None if found else _onward(reader, flow, way, reached, results)
            for read in found:
                reads.setdefault((reader, read.reader.weight, read.features), read)
            if found:
                continue
            if onward:
                ways.append(onward)
            elif reader not in others:
                others.append(reader)
    return list(reads.values()), others


def _reached_from(results: Sequence[fx.Node]) -> set[fx.Node]:
    """Every node that some values have an effect on."""
    reached, stack = set(results), list(results)
    while stack:
        for user in stack.pop().users:
            if user not in reached:
                reached.add(user)
                stack.append(user)
    return reached


def _is_idle(node: fx.Node) -> bool:
    """Whether nothing comes of a node: the indices of a maximum that nobody reads, a check of a dtype, batch sizes."""
    if op_name(node) == "getitem" and op_name(node.args[0]) == _PACK:  # type: ignore[arg-type]
        return bool(node.args[1] != 0)
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and not node.users and not (schema is not None and schema.is_mutable)


def _read(node: fx.Node, flow: Dataflow, way: _Way) -> list[Read]:
    """The reads of the layer's result by weights of the node's own: none, one, or one per direction of an RNN."""
    readers: list[Affine | Norm | Product | None] = [*recurrent_maps(node, flow)]
    readers = readers or [affine_of(node, flow) or norm_of(node, flow)]
    if readers[0] is None or readers[0].data is not way.node:
        readers = [product_of(node, way.node, flow) if _is_linear(node, way.node) else None]
    return [read for reader in readers if reader is not None for read in _reads_by(reader, flow, way)]


def _reads_by(reader: Affine | Norm | Product, flow: Dataflow, way: _Way) -> list[Read]:
    """One read for each range of features that is the layer's."""
    axis = -1
    if isinstance(reader, Norm):
        axis = 1
    elif isinstance(reader, Affine) and reader.is_convolution:
        axis = -(len(flow.shapes[reader.weight]) - 1)
    ranges = _features(way.marker, axis)
    if ranges != [None] and not _is_divisible(reader):
        return []
    padded = isinstance(reader, Affine) and reader.is_convolution and _has_zeros(reader, flow)
    return [Read(reader, features, way.zeros, way.ordered, way.linear, padded) for features in ranges]


def _features(marker: torch.Tensor | None, axis: int) -> list[tuple[int, int] | None]:
    """The ranges of whole features that are the layer's (``None``: all); none if it is a part of one."""
    if marker is None or bool((marker == 1).all()):
        return [None]
    rows = marker.movedim(axis, -1).reshape(-1, marker.shape[axis])
    if not bool((rows == rows[0]).all()) or not bool(((rows[0] == 0) | (rows[0] == 1)).all()):
        return []
    ones = (rows[0] == 1).nonzero().flatten().tolist()
    firsts = [place for place in ones if place - 1 not in ones]
    lasts = [place + 1 for place in ones if place + 1 not in ones]
    return list(zip(firsts, lasts, strict=True))


def _is_divisible(reader: Affine | Norm | Product) -> bool:
    """Whether a range of input features has weights of its own."""
    if isinstance(reader, Product):
        return False
    return not reader.own_statistics if isinstance(reader, Norm) else reader.groups == 1


def _has_zeros(reader: Affine, flow: Dataflow) -> bool:
    """Whether some output position of a convolution reads zeros that are not the layer's."""
    if not reader.transposed:
        return reader.has_padding
    # The convolution that it is: over an input with stride - 1 zeros between the samples, padded by d (k - 1) - p.
    return not leaves_no_tap_out(reader, flow.shapes[reader.weight])


def reads_every_tap_inside(reader: Affine) -> bool:
    """Whether a convolution misses taps at its borders only: always, unless it is transposed and strided."""
    stride = argument(reader.node, "stride", 1)
    return not reader.transposed or all(step == 1 for step in per_dim(stride, 1))


def leaves_no_tap_out(reader: Affine, shape: tuple[int, ...]) -> bool:
    """Whether every output position of a transposed convolution reads a sample through every tap.

    Source: the transposed convolution as a plain one over an input with zeros between and around the samples (Dumoulin
    and Visin, A guide to convolution arithmetic, 2016, section 4).
    """
    rank = len(shape) - 2
    stride, padding, dilation, extra = (
        per_dim(argument(reader.node, name, default), rank)
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0))
    )
    return all(
        stride[dim] == 1 and extra[dim] == 0 and padding[dim] == dilation[dim] * (shape[2 + dim] - 1)
        for dim in range(rank)
    )


def per_dim(given: Any, rank: int) -> list[int]:
    """An argument of a convolution or pool, one number per dimension."""
    values = [int(value) for value in given] if isinstance(given, list | tuple) else [int(given)]
    return values * rank if len(values) == 1 else values


def _onward(node: fx.Node, flow: Dataflow, way: _Way, reached: set[fx.Node], results: Sequence[fx.Node]) -> _Way | None:
    """The way past a node that commutes with ``c + s x``, or with ``s x``, or ``None``."""
    op = op_name(node)
    zeros, ordered = way.zeros, way.ordered
    if op in _LINEAR:
        others = [operand for operand in node.all_input_nodes if operand is not way.node]
        is_linear = way.marker is None and not any(other in reached for other in others) and _is_linear(node, way.node)
        linear = (*way.linear, describe(node, flow))
        return _Way(node, None, zeros, ordered, linear) if is_linear else None
    if op in JOIN:
        parts = node.args[0]
        if not isinstance(parts, list | tuple):
            return None
        markers = [_marker_of(part, way, results) for part in parts]
        joined = _run(node, markers)
        return None if joined is None else _Way(node, joined, zeros, ordered, way.linear)
    if not node.args or node.args[0] is not way.node:
        return None
    if op == "getitem":
        place = node.args[1]
        if op_name(way.node) in SPLIT:
            part = way.marker[place] if isinstance(way.marker, tuple) and isinstance(place, int) else None
            return _Way(node, part, zeros, ordered, way.linear)
        first = place == 0 and (op_name(way.node) in (*_MAXIMA, _PACK) or op_name(way.node) in DROPOUT)
        return _Way(node, way.marker, zeros, ordered, way.linear) if first else None
    if op in DROPOUT:
        return _Way(node, way.marker, zeros, ordered, way.linear) if is_transparent(node) else None
    if op in _MAXIMA:
        ordered = True
    elif op in _AVERAGES:
        if argument(node, "divisor_override") is not None:
            return None
        if any(per_dim(argument(node, "padding", 0), 1)) and argument(node, "count_include_pad", True):
            zeros = (*zeros, f"the padding that {describe(node, flow)} counts")
    elif op in ("aten::constant_pad_nd", "aten::pad"):
        if argument(node, "mode", "constant") == "constant":
            if not is_number(argument(node, "value", 0) or 0, 0):
                return None
            zeros = (*zeros, "the zeros of a pad")
    elif op == _PACK:
        if way.marker is not None:
            return None
    elif op not in _MEANS and op not in REARRANGE and op not in SPLIT and not is_transparent(node):
        return None
    if way.marker is None:
        return _Way(node, None, zeros, ordered, way.linear)
    if op in ("aten::constant_pad_nd", "aten::pad"):
        return None  # whose zeros these would be is not said by a marker
    marker = _run(node, way.marker)
    if marker is None:
        return None
    if op in _MAXIMA:  # of the layer's values or of others: a maximum over both is neither
        others = _run(node, 1 - way.marker)
        if others is None or not bool((marker + others == 1).all()):
            return None
    return _Way(node, marker, zeros, ordered, way.linear)


def _is_linear(node: fx.Node, data: fx.Node) -> bool:
    """Whether an op of ``_LINEAR`` is linear in ``data``: it stands where the op is, and once."""
    op = op_name(node)
    if op == "aten::masked_fill" and not is_number(argument(node, "value"), 0):
        return False
    if op == "aten::div" and argument(node, "rounding_mode") is not None:
        return False
    operands = node.args[1] if op == "aten::einsum" else node.args[: 2 if op in PRODUCTS else 1]
    places = operands if isinstance(operands, list | tuple) else []
    return sum(operand is data for operand in places) == 1 and len(places) <= 2


def _marker_of(part: Any, way: _Way, results: Sequence[fx.Node]) -> torch.Tensor | None:
    shape = shape_of(part)
    if shape is None:
        return None
    if part is not way.node:
        return torch.ones(shape) if _is_view_of(part, results) else torch.zeros(shape)
    return torch.ones(shape) if way.marker is None else way.marker


def _is_view_of(node: Any, results: Sequence[fx.Node]) -> bool:
    """Whether a node holds what a result does, element by element."""
    while isinstance(node, fx.Node) and node not in results and is_transparent(node):
        node = node.args[0]
    return node in results


def _run(node: fx.Node, first: Any) -> Any:
    """What the node makes of markers, or ``None``."""
    if isinstance(first, list) and any(marker is None for marker in first):
        return None
    kwargs = {key: value for key, value in node.kwargs.items() if key not in ("dtype", "layout", "device")}
    try:
        result = node.target(first, *node.args[1:], **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError):  # an operand that only the real model has
        return None
    if isinstance(result, tuple | list) and op_name(node) in _MAXIMA:
        return result[0]
    return tuple(result) if isinstance(result, tuple | list) else result
