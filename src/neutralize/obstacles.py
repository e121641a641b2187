"""Say in words what keeps a block from handing its input on."""

from __future__ import annotations

from torch import fx

from neutralize.certify import Interpretation
from neutralize.dataflow import Dataflow, op_name
from neutralize.norms import core_of
from neutralize.rules import CAST, REARRANGE, carry_clauses, is_number, norm_operands, tensors
from neutralize.search import Search
from neutralize.sites import describe, owner_of

_MOST = 2  # obstacles on a way that is still called a skip connection


def on_skip(search: Search) -> str:
    """What stands between the input and the output of a block beside its branches; empty if it has no such way.

    Looked for is the way from the entry to the exit with the fewest obstacles: ops without parameters that change what
    they read, norms, and sums with something that no parameters make zero.
    """
    flow, entry = search.flow, search.call.entry
    ways: dict[fx.Node, tuple[str, ...]] = {entry: ()}
    joined: set[fx.Node] = set()  # behind something that takes in a branch
    for node in search.call.nodes:
        found: list[tuple[tuple[str, ...], bool]] = []
        carriers: set[fx.Node] = set()
        for clause in carry_clauses(node):
            answers = [search.zero(each) for each in clause.zeros] + [search.one(each) for each in clause.ones]
            if clause.carrier in ways and clause.identity is None and all(answers):
                carriers.add(clause.carrier)
                found.append((ways[clause.carrier], clause.carrier in joined or bool(answers)))
        operands = node.all_input_nodes
        if norm_operands(node) is not None or not any(operand in flow.names for operand in operands):
            for operand in operands:
                if operand in ways and operand not in carriers:
                    is_joined = operand in joined or (len(operands) > 1 and norm_operands(node) is None)
                    found.append(((*ways[operand], _obstacle(flow, node, operand)), is_joined))
        if found:
            ways[node], is_joined = min(found, key=lambda each: (len(each[0]), not each[1]))
            if is_joined:
                joined.add(node)
    way = ways.get(search.call.exit, ())
    return " and ".join(way) if search.call.exit in joined and len(way) <= _MOST else ""


def in_proof(search: Search, proof: Interpretation) -> str:
    """What keeps the output from being proven to be the input, where the search has found what nulls the branches."""
    moved = [node for node in proof.stream if not proof.holds_input(node)]
    if proof.window is None and moved and proof.is_known(moved[-1]):
        return f"{describe(moved[0], search.flow)} moves its elements"
    for node in search.call.nodes:
        if proof.may_break(node):
            return f"{describe(node, search.flow)} may make it infinite or NaN then"
        carried = [clause.carrier for clause in carry_clauses(node)]
        if search.same(node) and not proof.is_known(node) and any(map(proof.is_known, carried)):
            return f"{describe(node, search.flow)} stands on its residual stream"
    return "a norm or an activation stands on its residual stream"


def _obstacle(flow: Dataflow, node: fx.Node, operand: fx.Node) -> str:
    """An op in words: what it adds to the stream, or what it is."""
    op, both = op_name(node), node.args[:2]
    others = [other for other in tensors(*both) if other is not operand]
    if others and (op == "aten::add" or (op == "aten::sub" and both[0] is operand)):
        added = others[0]
        while op_name(added) in REARRANGE | CAST and isinstance(added.args[0], fx.Node):
            added = added.args[0]
        return f"a sum with {describe(added, flow)}"
    if core_of(node) is not None and norm_operands(node) is None:
        return f"a norm (spelled out in {owner_of(node)!r})"
    numbers = [part for part in both if is_number(part)]
    if op in ("aten::add", "aten::sub", "aten::mul", "aten::div") and numbers:
        where = owner_of(node)
        return f"{op.removeprefix('aten::')} with {numbers[0]:g}" + (f" in {where!r}" if where else "")
    return describe(node, flow)
