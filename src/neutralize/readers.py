"""What reads a layer's result, and where: through pools, views, splits and concatenations.

A layer in its linear regime hands on ``φ(a) + ε φ'(a) x``. Whatever commutes with that change of variables may stand
between the layer and the weights that undo it: every element of a view, a maximum, a mean and an interpolation (whose
weights add up to one) of ``c + s x`` is ``c + s`` times that of ``x`` (s > 0). Zeros that are padded on the way do not
commute with ``c``, and are reported.

In a concatenation only a part of what a weight reads is the layer's. Which part is not reasoned about but executed: the
ops on the way run on a tensor that is one where the layer is and zero elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from neutralize.dataflow import Dataflow, argument, op_name, shape_of
from neutralize.rules import DROPOUT, JOIN, REARRANGE, SPLIT, is_number, is_transparent
from neutralize.sites import Affine, Norm, affine_of, describe, norm_of

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
    upsample_bicubic2d index_select reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d""".split()
)


@dataclass(frozen=True)
class Read:
    """One op with weights of its own that reads the layer's result.

    Attributes:
        reader: the op.
        features: half-open range of its input features that are the layer's; ``None``: all of them are.
        zeros: what puts zeros beside the layer's values on the way, or in the op itself, in words.
        ordered: a maximum stands on the way: it commutes with a positive scale only.
    """

    reader: Affine | Norm
    features: tuple[int, int] | None
    zeros: tuple[str, ...]
    ordered: bool


@dataclass(frozen=True)
class _Way:
    """How far a walk has come.

    Attributes:
        node: the value that is read next.
        marker: ones where the layer is; ``None``: everywhere. A tuple for several outputs.
        zeros, ordered: as in ``Read``.
    """

    node: fx.Node
    marker: Any = None
    zeros: tuple[str, ...] = ()
    ordered: bool = False


def reads_of(flow: Dataflow, result: fx.Node) -> tuple[list[Read], list[fx.Node]]:
    """Everything that reads ``result``: ops with weights, and the rest.

    Returns:
        The reads, and the nodes that are neither an op with weights nor on the way to one.
    """
    reads: list[Read] = []
    others: list[fx.Node] = []
    ways = [_Way(result)]
    while ways:
        way = ways.pop()
        for reader in way.node.users:
            found = _read(reader, flow, way)
            onward = None if found else _onward(reader, flow, way)
            if found:
                reads.append(found)
            elif onward:
                ways.append(onward)
            elif reader not in others:
                others.append(reader)
    return reads, others


def _read(node: fx.Node, flow: Dataflow, way: _Way) -> Read | None:
    affine = affine_of(node, flow)
    reader: Affine | Norm | None = affine if affine is not None else norm_of(node, flow)
    if reader is None or reader.data is not way.node:
        return None
    axis = -1
    if isinstance(reader, Norm):
        axis = 1
    elif reader.is_convolution:
        axis = -(len(flow.shapes[reader.weight]) - 1)
    found, features = _features(way.marker, axis)
    if not found or (features is not None and not _is_divisible(reader)):
        return None
    zeros = way.zeros
    if isinstance(reader, Affine) and reader.is_convolution and _has_zeros(reader, flow):
        zeros = (*zeros, f"the padding of {reader.module!r}")
    return Read(reader, features, zeros, way.ordered)


def _features(marker: torch.Tensor | None, axis: int) -> tuple[bool, tuple[int, int] | None]:
    """Whether the layer is a range of whole features, and which one (``None``: all)."""
    if marker is None or bool((marker == 1).all()):
        return True, None
    rows = marker.movedim(axis, -1).reshape(-1, marker.shape[axis])
    ones = (rows[0] == 1).nonzero().flatten().tolist()
    whole = bool((rows == rows[0]).all()) and bool(((rows[0] == 0) | (rows[0] == 1)).all())
    if not whole or not ones or ones[-1] - ones[0] + 1 != len(ones):
        return False, None
    return True, (ones[0], ones[-1] + 1)


def _is_divisible(reader: Affine | Norm) -> bool:
    """Whether a range of input features has weights of its own."""
    return not reader.own_statistics if isinstance(reader, Norm) else reader.groups == 1


def _has_zeros(reader: Affine, flow: Dataflow) -> bool:
    """Whether some output position of a convolution reads zeros that are not the layer's."""
    if not reader.transposed:
        return reader.has_padding
    # The convolution that it is: over an input with stride - 1 zeros between the samples, padded by d (k - 1) - p.
    return not leaves_no_tap_out(reader, flow.shapes[reader.weight])


def leaves_no_tap_out(reader: Affine, shape: tuple[int, ...]) -> bool:
    """Whether every output position of a transposed convolution reads a sample through every tap.

    Source: the transposed convolution as a plain one over an input with zeros between and around the samples (Dumoulin
    and Visin, A guide to convolution arithmetic, 2016, section 4).
    """
    rank = len(shape) - 2
    stride, padding, dilation, extra = (
        _per_dim(argument(reader.node, name, default), rank)
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0))
    )
    return all(
        stride[dim] == 1 and extra[dim] == 0 and padding[dim] == dilation[dim] * (shape[2 + dim] - 1)
        for dim in range(rank)
    )


def _per_dim(given: Any, rank: int) -> list[int]:
    values = [int(value) for value in given] if isinstance(given, list | tuple) else [int(given)]
    return values * rank if len(values) == 1 else values


def _onward(node: fx.Node, flow: Dataflow, way: _Way) -> _Way | None:
    """The way past a node that commutes with ``c + s x``, or ``None``."""
    op = op_name(node)
    zeros, ordered = way.zeros, way.ordered
    if op in JOIN:
        parts = node.args[0]
        if not isinstance(parts, list | tuple):
            return None
        markers = [_marker_of(part, way) for part in parts]
        joined = _run(node, markers)
        return None if joined is None else _Way(node, joined, zeros, ordered)
    if not node.args or node.args[0] is not way.node:
        return None
    if op == "getitem":
        place = node.args[1]
        if op_name(way.node) in SPLIT:
            part = way.marker[place] if isinstance(way.marker, tuple) and isinstance(place, int) else None
            return _Way(node, part, zeros, ordered)
        first = place == 0 and (op_name(way.node) in _MAXIMA or op_name(way.node) in DROPOUT)
        return _Way(node, way.marker, zeros, ordered) if first else None
    if op in DROPOUT:
        return _Way(node, way.marker, zeros, ordered) if is_transparent(node) else None
    if op in _MAXIMA:
        ordered = True
    elif op in _AVERAGES:
        if argument(node, "divisor_override") is not None:
            return None
        if any(_per_dim(argument(node, "padding", 0), 1)) and argument(node, "count_include_pad", True):
            zeros = (*zeros, f"the padding that {describe(node, flow)} counts")
    elif op in ("aten::constant_pad_nd", "aten::pad"):
        if argument(node, "mode", "constant") == "constant":
            if not is_number(argument(node, "value", 0) or 0, 0):
                return None
            zeros = (*zeros, "the zeros of a pad")
    elif op not in _MEANS and op not in REARRANGE and op not in SPLIT and not is_transparent(node):
        return None
    if way.marker is None:
        return _Way(node, None, zeros, ordered)
    if op in ("aten::constant_pad_nd", "aten::pad"):
        return None  # whose zeros these would be is not said by a marker
    marker = _run(node, way.marker)
    if marker is None:
        return None
    if op in _MAXIMA:  # of the layer's values or of others: a maximum over both is neither
        others = _run(node, 1 - way.marker)
        if others is None or not bool((marker + others == 1).all()):
            return None
    return _Way(node, marker, zeros, ordered)


def _marker_of(part: Any, way: _Way) -> torch.Tensor | None:
    shape = shape_of(part)
    if shape is None:
        return None
    if part is not way.node:
        return torch.zeros(shape)
    return torch.ones(shape) if way.marker is None else way.marker


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
