"""Repeated blocks: what two blocks share whose dataflow is the same, but for the parameters that they read.

The search and the proof of a block look at nothing but its ops, the shapes and dtypes of its values, what may be
written, and what is known of its input's sign. Blocks that agree in all of that have the same answer, each in its own
parameters.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from neutralize.dataflow import Call, Dataflow, dtype_of, is_mark, shape_of
from neutralize.finite import is_positive
from neutralize.rules import non_negative


@dataclass(frozen=True)
class Likeness:
    """A block without its names.

    Attributes:
        key: equal for blocks that the same edits switch off, with the same proof.
        names: the parameters that the block reads, in the order in which it first does.
    """

    key: Hashable
    names: tuple[str, ...]


def likeness(
    flow: Dataflow, call: Call, regions: list[tuple[int, int]], cut: Mapping[fx.Node, fx.Node]
) -> Likeness | None:
    """Describe a call of a block without its names; ``None`` for one that reads a tensor of several names.

    Args:
        flow: the traced model.
        call: the block's only call.
        regions: position ranges of every selected layer's calls: what is read outside them is not written.
        cut: results of the layers that are cut out with it, with what enters them.
    """
    places = {call.entry: 0}
    names: dict[str, int] = {}
    given: dict[fx.Node, int] = {}
    made: dict[fx.Node, int] = {}

    def of(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            if value in flow.names:
                return "parameter", names.setdefault(flow.names[value], len(names))
            if value in places:
                return "value", places[value]
            if value.op == "placeholder":  # the model's own inputs and constants, of which nothing but this is known
                return "given", given.setdefault(value, len(given)), _kind(value)
            if all(each.op == "placeholder" and each not in flow.names for each in value.all_input_nodes):
                # A constant that each block's code makes for itself: exports hand it in, and note it before the block.
                own = made.setdefault(value, len(made))
                return "made", own, value.target, of(value.args), of(value.kwargs), _kind(value)
            return "outside", value
        if isinstance(value, list | tuple):
            return tuple(map(of, value))
        if isinstance(value, Mapping):
            return tuple((key, of(each)) for key, each in value.items())
        if isinstance(value, slice):
            return "slice", of(value.start), of(value.stop), of(value.step)
        return type(value), repr(value) if isinstance(value, float) else value

    ops: list[Hashable] = [_kind(call.entry)]
    for node in call.nodes:
        places[node] = len(places)
        operands = (of(node.args[0]),) if is_mark(node) else (of(node.args), of(node.kwargs))  # a mark names its layer
        is_read_behind = node is not call.exit and any(
            flow.position[user] > call.last and user.op != "output" for user in node.users
        )
        ops.append((node.target, operands, _kind(node), is_read_behind))
    if any(len(flow.tied.get(name, (name,))) > 1 for name in names):
        return None
    parameters = tuple(
        (
            flow.shapes[name],
            flow.dtypes[name],
            flow.unwritable.get(name),
            all(any(first < flow.position[user] < last for first, last in regions) for user in flow.users(name)),
        )
        for name in names
    )
    signs = non_negative(call.entry, cut), non_negative(call.entry), is_positive(call.entry, {})
    return Likeness((tuple(ops), parameters, signs), tuple(names))


def _kind(node: fx.Node) -> Hashable:
    """Shape and dtype of a value, or of each part of a tuple."""
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return tuple((str(each.shape), each.dtype) if isinstance(each, torch.Tensor) else None for each in value)
    return shape_of(node), dtype_of(node)
