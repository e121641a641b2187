"""Search the dataflow of a block for the cheapest parameter values that make it hand its input on.

Two mutually recursive questions, answered for every node of the block in graph order:

- what makes this value zero? (``rules.zero_clauses``)
- what makes this value the block's input? (``rules.carry_clauses``)

Each answer is a short list of assignments, cheapest first; a union of assignments that disagree is no answer. The
search proposes; ``certify`` decides.

Source: MATH §4; DESIGN §3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, TypeAlias

import torch
from torch import fx

from neutralize import ops
from neutralize.dataflow import Call, Dataflow, is_empty, is_mark, op_name, shape_of
from neutralize.norms import renorm_clauses
from neutralize.rules import (
    CAST,
    JOIN,
    POINTWISE,
    REARRANGE,
    carry_clauses,
    is_number,
    pointwise_value,
    scaled_clauses,
    tensors,
    zero_clauses,
)

IDENTITY: Literal["identity"] = "identity"
Assignment: TypeAlias = "dict[str, float | str]"
Preference: TypeAlias = Literal["cheapest", "outgoing", "incoming"]

# What is tried for a parameter behind a function, sigmoid(w) say: a gate is shut for good where it rounds to 0 or 1.
_LADDER = tuple(sign * float(2**power) for power in range(16) for sign in (1, -1))
_KEPT = 6  # alternatives kept per node; the cheapest of a union need not be the union of the cheapest


@dataclass
class Search:
    """The answers for one call of a block.

    Attributes:
        flow: the traced model.
        call: the call of the block.
        regions: half-open position ranges of every selected layer's calls: a parameter that is read outside them is not
            ours to write.
        preference: ``cheapest`` (fewest bytes), ``outgoing`` (the last affine parameters), ``incoming`` (the first).
        normalised: the norm whose output enters the block, if norms inside may be taken to hand it on.
        all_writable: suppose that every parameter may be written: what the refusals are to blame for.
        refused: parameters that would have been used but may not be written, with the reason.
    """

    flow: Dataflow
    call: Call
    regions: list[tuple[int, int]]
    preference: Preference = "cheapest"
    normalised: fx.Node | None = None
    all_writable: bool = False
    refused: dict[str, str] = field(default_factory=dict, init=False)
    _zero: dict[fx.Node, list[Assignment]] = field(default_factory=dict, init=False)
    _same: dict[fx.Node, list[Assignment]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Answer both questions for every node, operands first."""
        self._same[self.call.entry] = [{}]
        for node in self.call.nodes:
            self._zero[node] = self._any(
                self._all((self.zero(operand) for operand in clause), before=[{}])
                for clause in self._ordered(node, zero_clauses(node))
            )
            if self._constant(node, 0.0):
                self._zero[node] = self._any([self._zero[node], self._constant(node, 0.0)])
            answers = []
            clauses = carry_clauses(node)
            if self.normalised is not None:
                clauses = [*clauses, *renorm_clauses(node, self.normalised)]
            for clause in clauses:
                found = self._all((self.zero(operand) for operand in clause.zeros), before=self.same(clause.carrier))
                found = self._all((self.one(operand) for operand in clause.ones), before=found)
                if clause.identity is not None:
                    found = self._all([self._identity(clause.identity)], before=found)
                answers.append(found)
            if op_name(node) in JOIN and isinstance(node.args[0], list | tuple):  # every part, or zeros
                parts = [self.same(part) or self.zero(part) for part in tensors(*node.args[0])]
                answers = [self._all(parts, before=[{}])] if any(answers) else []
            self._same[node] = self._any(answers)

    def zero(self, node: fx.Node) -> list[Assignment]:
        """Assignments that make the node zero, best first; none: impossible."""
        if node in self.flow.names:
            return self._constant(node, 0.0)
        if is_empty(node):
            return [{}]
        return self._zero.get(node, [])

    def one(self, node: fx.Node) -> list[Assignment]:
        """Assignments that make a value that is computed from one parameter alone 1 everywhere, best first."""
        return self._constant(node, 1.0)

    def same(self, node: fx.Node) -> list[Assignment]:
        """Assignments that make the node hold the block's input, best first; none: impossible."""
        return self._same.get(node, [])

    def _ordered(self, node: fx.Node, clauses: list[list[fx.Node]]) -> list[list[fx.Node]]:
        """Keep the clauses that the preference wants: an affine op's own parameters, or what enters it."""
        if self.preference == "cheapest" or len(clauses) < 2:
            return clauses
        own = [clause for clause in clauses if all(self.is_parametric(operand) for operand in clause)]
        entering = [clause for clause in clauses if clause not in own]
        if not own or not entering:
            return clauses
        first, second = (own, entering) if self.preference == "outgoing" else (entering, own)
        solvable = [clause for clause in first if clause and all(self.zero(operand) for operand in clause)]
        return solvable or second

    def is_parametric(self, node: fx.Node) -> bool:
        """Whether the node is computed from one parameter alone."""
        while node not in self.flow.names:
            operands = node.all_input_nodes
            if len(operands) != 1 or is_mark(node):
                return False
            node = operands[0]
        return True

    def _constant(self, node: fx.Node, value: float) -> list[Assignment]:
        """What makes a value that is computed from one parameter alone equal to ``value`` everywhere."""
        name = self.flow.names.get(node)
        if name is not None:
            return [{name: value}] if self._writable(name) else []
        op = op_name(node)
        if op in REARRANGE or op in CAST:
            return (
                self._constant(node.args[0], value) if isinstance(node.args[0], fx.Node) and not is_mark(node) else []
            )
        if op in ("aten::add", "aten::sub", "aten::mul") and len(node.args) == 2 and not node.kwargs:
            one, other = node.args
            if isinstance(other, fx.Node) and isinstance(one, int | float):
                one, other = other, one
                if op == "aten::sub":
                    return []
            if isinstance(one, fx.Node) and is_number(other):
                number = float(other)  # type: ignore[arg-type]
                if op == "aten::mul":
                    return self._constant(one, value / number) if number else []
                return self._constant(one, value - number if op == "aten::add" else value + number)
        if op in POINTWISE and (name := self._parameter_behind(node)) is not None and self._writable(name):
            return [{name: tried} for tried in _LADDER if constant_value(node, {name: tried}, self.flow.names) == value]
        return []

    def _parameter_behind(self, node: fx.Node) -> str | None:
        """The parameter that a value is computed from element by element, if it is the only one."""
        found: set[str] = set()
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            name = self.flow.names.get(current)
            if name is not None:
                found.add(name)
            elif is_mark(current) or op_name(current) not in POINTWISE | REARRANGE | CAST:
                return None
            else:
                operands = [operand for operand in current.all_input_nodes if operand not in seen]
                seen.update(operands)
                stack.extend(operands)
        return found.pop() if len(found) == 1 else None

    def _identity(self, weight: fx.Node) -> list[Assignment]:
        name = self.flow.names.get(weight)
        if name is None or not self._writable(name) or len(self.flow.shapes[name]) != 2:
            return []
        return [{name: IDENTITY}]

    def _writable(self, name: str) -> bool:
        """Whether the parameter is of a floating-point type and read inside the selected layers only."""
        if self.all_writable:
            return True
        if name in self.refused:
            return False
        if self.flow.dtypes[name] not in ops.DTYPES:
            if torch.Size(self.flow.shapes[name]).numel() > 1:  # a counter is no weight
                self.refused[name] = f"{name!r} is {self.flow.dtypes[name]}, which is not rewritten"
            return False
        if name in self.flow.unwritable:
            self.refused[name] = f"{name!r} {self.flow.unwritable[name]}"
            return False
        for user in self.flow.users(name):
            place = self.flow.position[user]
            if not any(first < place < last for first, last in self.regions):
                also = [alias for alias in self.flow.tied.get(name, ()) if alias != name]
                tied = f" (it is tied to {', '.join(map(repr, also))})" if also else ""
                self.refused[name] = f"{name!r} is also read outside the selected layers{tied}"
                return False
        return True

    def _any(self, answers: Iterable[list[Assignment]]) -> list[Assignment]:
        return self._best(assignment for answer in answers for assignment in answer)

    def _all(self, parts: Iterable[list[Assignment]], *, before: list[Assignment]) -> list[Assignment]:
        found = before
        for part in parts:
            if not found:
                return []
            unions = (union(one, other) for one, other in product(found, part))
            found = self._best(joined for joined in unions if joined is not None)
        return found

    def _best(self, assignments: Iterable[Assignment]) -> list[Assignment]:
        """The cheapest assignments of which none contains another: those would only crowd out other ways."""
        best: list[Assignment] = []
        for assignment in sorted(assignments, key=self.cost):
            if not any(kept.items() <= assignment.items() for kept in best):
                best.append(assignment)
                if len(best) == _KEPT:
                    break
        return best

    def cost(self, assignment: Assignment) -> tuple[int, int]:
        """Bytes written; then the number of parameters."""
        return sum(self.flow.nbytes(name) for name in assignment), len(assignment)


def constant_value(node: fx.Node, assignment: Assignment, names: Mapping[fx.Node, str]) -> float | None:
    """The value that a node has everywhere if it is computed element by element from assigned parameters."""
    memory: dict[fx.Node, float | None] = {}

    def of(current: fx.Node) -> float | None:
        if current not in memory:
            name = names.get(current)
            if name is not None:
                assigned = assignment.get(name)
                memory[current] = assigned if isinstance(assigned, float) else None
            elif op_name(current) in REARRANGE or op_name(current) in CAST:
                memory[current] = of(current.all_input_nodes[0])
            else:
                memory[current] = pointwise_value(current, [of(operand) for operand in current.all_input_nodes])
        return memory[current]

    return of(node)


def union(one: Assignment, other: Assignment) -> Assignment | None:
    """Both assignments together, or ``None`` if they disagree on a parameter."""
    if any(name in one and one[name] != value for name, value in other.items()):
        return None
    return {**one, **other}


def joint(answers: list[tuple[Search, list[Assignment]]]) -> list[Assignment]:
    """The assignments that answer for every call of a layer at once, best first."""
    found: list[Assignment] = [{}]
    for search, alternatives in answers:
        joined = (union(one, other) for one, other in product(found, alternatives))
        found = sorted((both for both in joined if both is not None), key=search.cost)
    return found


def scaling(search: Search, factor: float) -> tuple[list[Assignment], int]:
    """What multiplies the contribution of a residual block, or the output of a plain one, by ``factor``.

    The values of the assignments are what zero becomes under ``W <- factor * W + value``: 0 for a plain parameter,
    ``-(1 - factor) * c`` for one that enters as ``c + W``.

    Returns:
        The assignments, cheapest first, and how many branches and activations stand on its residual stream (0: it has
        none).

    Source: MATH §4; homogeneity of degree 1 of the ops in ``rules.scaled_clauses``.
    """
    scaled: dict[fx.Node, list[Assignment]] = {}

    def of(node: fx.Node) -> list[Assignment]:
        if node in search.flow.names:
            return [{name: 0.0} for name in [search.flow.names[node]] if search._writable(name)]
        return scaled.get(node, [])

    branches: list[list[Assignment]] = []
    for node in search.call.nodes:
        offset = offset_of(node)
        if offset is not None and search.is_parametric(offset[0]) and of(offset[0]):
            # c + w: w <- f w + (f - 1) c
            scaled[node] = [dict.fromkeys(of(offset[0])[0], (factor - 1.0) * offset[1])]
            continue
        clauses = search._ordered(node, scaled_clauses(node, factor))
        scaled[node] = search._any(search._all((of(operand) for operand in clause), before=[{}]) for clause in clauses)
    on_stream = residual_stream(search)
    if search.call.exit in on_stream:
        for node in on_stream:
            for clause in carry_clauses(node):
                if clause.carrier in on_stream and clause.zeros:
                    branches.append(search._any([search._all((of(operand) for operand in clause.zeros), before=[{}])]))
        activated = any(
            clause.non_negative for node in on_stream for clause in carry_clauses(node) if clause.carrier in on_stream
        )
        return (search._all(branches, before=[{}]) if branches else []), len(branches) + activated
    return scaled.get(search.call.exit, []), 0


def offset_of(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The value and the number that a node is the sum of, else ``None``."""
    if op_name(node) == "aten::add" and len(node.args) == 2 and not node.kwargs:
        one, other = node.args
        if isinstance(one, fx.Node) and is_number(other):
            return one, float(other)  # type: ignore[arg-type]
        if isinstance(other, fx.Node) and is_number(one):
            return other, float(one)  # type: ignore[arg-type]
    return None


def residual_stream(search: Search) -> dict[fx.Node, None]:
    """The residual stream, in order: what would hold the block's input if all that is added to it were zero."""
    stream: dict[fx.Node, None] = {search.call.entry: None}  # a set has another order in every process
    for node in search.call.nodes:
        for clause in carry_clauses(node):
            if clause.carrier in stream and not clause.ones and clause.identity is None:
                if shape_of(node) is not None and clause.zeros:
                    if shape_of(node) == shape_of(clause.carrier):
                        stream[node] = None
                else:
                    stream[node] = None
    return stream
