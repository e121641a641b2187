"""Prove what a block computes under edited parameters: an abstract interpretation of its dataflow.

Every value is one of: a known constant everywhere; the block's input, rearranged in a known way; or unknown. The
rearrangement is not reasoned about but executed: the views of the block run on a tensor of indices. ``exact`` is
claimed only if the block's output comes out as its input with every element in its place.

A value that may not be finite under the edits (``finite.may_break``) is unknown, and so is all that is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from neutralize.dataflow import Call, Dataflow, argument, dtype_of, is_empty, op_name, shape_of
from neutralize.finite import may_break
from neutralize.norms import core_of, renorm_clauses
from neutralize.rules import (
    CAST,
    DROPOUT,
    JOIN,
    POINTWISE,
    REARRANGE,
    SPLIT,
    carry_clauses,
    drops,
    is_fill,
    is_number,
    non_negative,
    pointwise_value,
    zero_clauses,
)
from neutralize.search import IDENTITY, Assignment

_SUMS = frozenset(("aten::add", "aten::sub"))
_FILLED = -1  # index of an element that is zero and comes from nowhere


@dataclass(frozen=True)
class Constant:
    """Every element has this value."""

    value: float


@dataclass(frozen=True)
class Rearranged:
    """Element ``i`` is element ``indices[i]`` of the block's input, or zero where the index is -1.

    Attributes:
        indices: int64 tensor of the value's shape.
    """

    indices: torch.Tensor


Value: TypeAlias = "Constant | Rearranged | tuple[Any, ...] | None"  # a tuple: several outputs; None: unknown


class Interpretation:
    """The abstract values of one call of a block under an assignment of parameters."""

    def __init__(
        self,
        flow: Dataflow,
        call: Call,
        assignment: Assignment,
        cut: Mapping[fx.Node, fx.Node],
        normalised: fx.Node | None = None,
        changed: Collection[str] = (),
    ) -> None:
        """Evaluate the block.

        Args:
            flow: the traced model.
            call: the call of the block.
            assignment: parameter to the number it is filled with, or ``"identity"``.
            cut: results of the layers that are cut out with it, with what enters them.
            normalised: the norm, with gain 1 and bias 0, whose output enters the block as it is; norms of it inside
                hand it on, up to their ε.
            changed: parameters that something else writes.
        """
        self._non_negative_entry = non_negative(call.entry, cut)
        self.flow = flow
        self.call = call
        self.assignment = {alias: value for name, value in assignment.items() for alias in flow.tied.get(name, (name,))}
        self._changed_elsewhere = changed
        self.uses_identity = False
        self.uses_number = False
        self._normalised = normalised
        self._carriers: dict[fx.Node, fx.Node] = {}
        self._values: dict[fx.Node, Value] = {}
        self._constants: dict[fx.Node, float] = {}
        self._broken: set[fx.Node] = set()  # may not be finite
        self._numbered: set[fx.Node] = set()  # zero by a number in the graph, which may be another for other inputs
        self._parametric: set[fx.Node] = set()  # computed from parameters alone
        self._changed: set[fx.Node] = set()  # may not be what they are without the edits, nor the block's input
        shape = shape_of(call.entry)
        if shape is not None:
            self._values[call.entry] = Rearranged(torch.arange(math.prod(shape)).reshape(shape))
        for node in call.nodes:
            self._values[node] = self._evaluate(node)
            self._note(node)

    @property
    def output(self) -> Value:
        """The value of the block's output."""
        return self._values[self.call.exit]

    @property
    def is_identity(self) -> bool:
        """Whether the output is proven to be the input, every element in its place and of the same type."""
        return dtype_of(self.call.exit) == dtype_of(self.call.entry) and self.holds_input(self.call.exit)

    def holds_input(self, node: fx.Node) -> bool:
        """Whether a node of the block is proven to hold its input, every element in its place."""
        held, start = self._values.get(node), self._values[self.call.entry]
        if not isinstance(held, Rearranged) or not isinstance(start, Rearranged):
            return False
        return torch.equal(held.indices, start.indices)

    def holds_features(self, node: fx.Node, width: int) -> bool:
        """Whether a node of the block is proven to hold elements of its input, each at its place within its row.

        Args:
            node: the node.
            width: elements of a row, the last dimensions of node and input.
        """
        held = self._values.get(node)
        if not isinstance(held, Rearranged):
            return False
        rows = held.indices.reshape(-1, width) % width
        return torch.equal(rows, torch.arange(width).expand_as(rows))

    def is_known(self, node: fx.Node) -> bool:
        """Whether a node of the block is known to be a constant, or elements of the input."""
        return self.value(node) is not None

    def may_break(self, node: fx.Node) -> bool:
        """Whether a node of the block may not be finite under the edits."""
        return node in self._broken

    @property
    def window(self) -> tuple[int, ...] | None:
        """How the output crops, strides over or pads the input, or ``None`` if it is no such part of it.

        Where the shape stays, it is none: cropped at one end and padded at the other, every element has moved.

        Returns:
            For each dimension four numbers: how many zeros come first, the first element, the step, how many elements.
        """
        output, start = self.output, self._values[self.call.entry]
        if not isinstance(output, Rearranged) or not isinstance(start, Rearranged):
            return None
        indices, shape = output.indices, start.indices.shape
        if (
            indices.shape == shape
            or indices.dim() != len(shape)
            or dtype_of(self.call.exit) != dtype_of(self.call.entry)
        ):
            return None
        kept = indices != _FILLED
        window: list[int] = []
        expected = torch.zeros_like(indices)
        inside = torch.ones_like(kept)
        for dim, coordinate in enumerate(torch.unravel_index(indices.clamp(min=0), shape)):
            places = [other for other in range(indices.dim()) if other != dim]
            line = kept.amax(places) if places else kept
            along = torch.where(kept, coordinate, -1)
            along = (along.amax(places) if places else along)[line]
            if not len(along):
                return None
            before, step = int(line.nonzero()[0]), int(along[1] - along[0]) if len(along) > 1 else 1
            if step < 1:
                return None  # turned around
            window += [before, int(along[0]), step, len(along)]
            full = torch.full((len(line),), 0)
            full[before : before + len(along)] = int(along[0]) + step * torch.arange(len(along))
            within = torch.zeros(len(line), dtype=torch.bool)
            within[before : before + len(along)] = True
            view = [-1 if other == dim else 1 for other in range(indices.dim())]
            inside = inside & within.view(view)
            expected = expected * shape[dim] + full.view(view)
        return tuple(window) if torch.equal(torch.where(inside, expected, _FILLED), indices) else None

    @property
    def stream(self) -> list[fx.Node]:
        """The nodes that carry the block's input to its output, in order, both ends included."""
        path = [self.call.exit]
        while path[-1] in self._carriers:
            path.append(self._carriers[path[-1]])
        return path[::-1]

    def value(self, node: fx.Node) -> Value:
        """The value of a node; parameters and numbers included, whatever is outside the block is unknown."""
        name = self.flow.names.get(node)
        if name is not None:
            assigned = self.assignment.get(name)
            return Constant(assigned) if isinstance(assigned, float | int) else None
        return Constant(0.0) if is_empty(node) else self._values.get(node)

    def _is(self, node: fx.Node, number: float) -> bool:
        value = self.value(node)
        return isinstance(value, Constant) and value.value == number

    def _note(self, node: fx.Node) -> None:
        """Note what is known of a node beside its value."""
        value = self._values[node]
        if isinstance(value, Constant):
            self._constants[node] = value.value
        if node.all_input_nodes and all(map(self._is_parametric, node.all_input_nodes)):
            self._parametric.add(node)
        if not isinstance(value, Rearranged) and any(map(self._is_changed, node.all_input_nodes)):
            self._changed.add(node)

    def _is_changed(self, node: fx.Node) -> bool:
        name = self.flow.names.get(node)
        return node in self._changed or name in self.assignment or name in self._changed_elsewhere

    def _has_number(self, node: fx.Node) -> bool:
        """Whether a number enters an op beside data: that of ``1 + w`` is part of the model."""
        return any(map(is_number, node.args)) and not all(map(self._is_parametric, node.all_input_nodes))

    def _is_parametric(self, node: fx.Node) -> bool:
        """Whether a node of the block is a parameter, or computed from parameters alone."""
        return node in self.flow.names or node in self._parametric

    def _evaluate(self, node: fx.Node) -> Value:
        if any(operand in self._broken for operand in node.all_input_nodes) or may_break(
            node, self._is_changed, self._constants
        ):
            self._broken.add(node)
            return None
        op = op_name(node)
        constant = self._constant(node, op)
        if constant is not None:
            return constant
        zeros = next((zeros for zeros in zero_clauses(node) if all(self._is(operand, 0.0) for operand in zeros)), None)
        if zeros is not None:
            if self.flow.is_recorded and (is_fill(node) or (op in _SUMS and self._has_number(node))):
                return None  # the run may have computed the number from its data
            if is_fill(node) or any(operand in self._numbered for operand in zeros):
                self._numbered.add(node)
            return Constant(0.0)
        clauses = carry_clauses(node)
        if self._normalised is not None:
            clauses = [*clauses, *renorm_clauses(node, self._normalised)]
        for clause in clauses:
            carried = self.value(clause.carrier)
            if not isinstance(carried, Rearranged | tuple):
                continue
            if not all(self._is(operand, 0.0) for operand in clause.zeros):
                continue
            if not all(self._is(operand, 1.0) for operand in clause.ones):
                continue
            if clause.identity is not None:
                if self.assignment.get(self.flow.names.get(clause.identity, "")) != IDENTITY:
                    continue
                self.uses_identity = True
            if clause.non_negative and not self._non_negative_entry:
                continue
            if clause.by_number and self.flow.is_recorded:
                continue  # the run may have computed it from its data
            moved = self._carry(node, op, clause.carrier, carried)
            if moved is not None and self._holds_all(node):
                by_number = clause.by_number or any(operand in self._numbered for operand in clause.zeros)
                self.uses_number = self.uses_number or by_number
                self._carriers[node] = clause.carrier
                return moved
        return None

    def _constant(self, node: fx.Node, op: str) -> Constant | None:
        """Functions of constants: what ``1 + w`` is when w is -1, and ``sigmoid(w)`` when w is -128."""
        is_by_data = self.flow.is_recorded and self._has_number(node)
        if op in POINTWISE and node.all_input_nodes and not is_by_data:
            values = [self.value(operand) for operand in node.all_input_nodes]
            if all(isinstance(value, Constant) for value in values):
                value = pointwise_value(node, [value.value for value in values])  # type: ignore[union-attr]
                return None if value is None else Constant(value)
        if (op in REARRANGE or op in CAST) and isinstance(node.args[0], fx.Node):
            carried = self.value(node.args[0])
            return carried if isinstance(carried, Constant) else None
        return None

    def _carry(self, node: fx.Node, op: str, carrier: fx.Node, carried: Rearranged | tuple[Any, ...]) -> Value:
        """The carried elements after the node's own rearrangement, executed on the indices."""
        if op == "getitem":
            place = node.args[1]
            return carried[place] if isinstance(carried, tuple) and isinstance(place, int) else carried
        if isinstance(carried, tuple):
            return None
        core = core_of(node) if self._normalised is not None else None
        if core is not None and core.data is carrier:
            return carried if self._is_normalised(carried.indices, math.prod(core.over)) else None
        if op in CAST:
            return carried
        if op in ("aten::constant_pad_nd", "aten::pad"):
            if not is_number(argument(node, "value", 0) or 0, 0) or argument(node, "mode", "constant") != "constant":
                return None
            return Rearranged(torch.constant_pad_nd(carried.indices, list(node.args[1]), _FILLED))  # type: ignore[arg-type]
        if op in JOIN:
            return self._join(node)
        if op in REARRANGE or op in SPLIT:
            try:
                others = fx.map_arg(node.args[1:], lambda other: torch.empty(()).expand(shape_of(other) or ()))
                moved = node.target(unstrided(carried.indices), *others, **without_dtype(node.kwargs))  # type: ignore[operator]
            except (RuntimeError, TypeError):  # an operand that only the real model has
                return None
            return Rearranged(moved) if isinstance(moved, torch.Tensor) else tuple(Rearranged(part) for part in moved)
        if op in DROPOUT and drops(node):
            return None
        if op == "aten::where":
            parts = [self.value(part) for part in node.args[1:] if isinstance(part, fx.Node)]
            both = len(parts) == 2 and all(isinstance(part, Rearranged) for part in parts)
            if not both or not torch.equal(parts[0].indices, parts[1].indices):  # type: ignore[union-attr]
                return None
        shape = shape_of(node)
        if shape is None:
            return None
        try:
            return Rearranged(carried.indices.broadcast_to(shape))
        except RuntimeError:
            return None

    def _holds_all(self, node: fx.Node) -> bool:
        """Whether the node's dtype holds every number of the input's: casts and autocast may make it narrower."""
        before, after = dtype_of(self.call.entry), dtype_of(node)
        if after is None:  # parts of a tuple
            return shape_of(node) is None
        return before is not None and torch.promote_types(before, after) == after

    def _is_normalised(self, indices: torch.Tensor, width: int) -> bool:
        """Whether every ``width`` elements in a row are all that one row of the input has, in any order."""
        rows = indices.reshape(-1, width)
        within = (rows // width == rows[:, :1] // width).all()
        return bool(within) and torch.equal((rows % width).sort(-1).values, torch.arange(width).expand_as(rows))

    def _join(self, node: fx.Node) -> Value:
        parts = []
        for part in node.args[0]:  # type: ignore[union-attr]
            value, shape = self.value(part), shape_of(part)  # type: ignore[arg-type]
            if isinstance(value, Constant) and value.value == 0.0 and shape is not None:
                parts.append(torch.full(shape, _FILLED))
            elif isinstance(value, Rearranged):
                parts.append(value.indices)
            else:
                return None
        if self._normalised is not None and len(parts) > 1:
            return None  # of multiples of normalised values each might be another
        return Rearranged(node.target(parts, *node.args[1:], **node.kwargs))  # type: ignore[operator]


def unstrided(indices: torch.Tensor) -> torch.Tensor:
    """Copy indices for a view to run on: the strides of the real value alone may allow it; its elements are these."""
    return indices.clone(memory_format=torch.contiguous_format)


def without_dtype(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a view without those about its dtype and device: it runs on indices."""
    return {
        key: value
        for key, value in kwargs.items()
        if key not in ("dtype", "layout", "device", "pin_memory", "memory_format")
    }


def side_readers(flow: Dataflow, call: Call, assignment: Assignment) -> list[fx.Node]:
    """What reads, outside the block, a value of it that the edits change, other than its first output.

    The excised network hands the first input on and leaves such a value as it was; the rewritten one does not. Values
    that are only returned by the model are not counted: no layer depends on them.
    """
    edited = {alias for name in assignment for alias in flow.tied.get(name, (name,))}
    changed: set[fx.Node] = set()
    readers: list[fx.Node] = []
    for node in call.nodes:
        if any(operand in changed or flow.names.get(operand) in edited for operand in node.all_input_nodes):
            changed.add(node)
    for node in changed - {call.exit}:
        readers += [user for user in node.users if flow.position[user] > call.last and user.op != "output"]
    return readers
