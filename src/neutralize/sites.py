"""Sites: an affine layer with the norm and activation that follow it and the consumers that read it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from neutralize.activations import Activation, activation_after
from neutralize.dataflow import Call, Dataflow, argument, op_name
from neutralize.rules import DROPOUT, affine_operands, is_transparent, norm_operands


@dataclass(frozen=True)
class Affine:
    """An affine op with its own weight.

    Attributes:
        node: the op.
        data: what it reads.
        weight, bias: qualified names.
        transposed: the weight is stored (in, out), as in the ``Conv1D`` of GPT-2.
    """

    node: fx.Node
    data: fx.Node
    weight: str
    bias: str | None
    transposed: bool

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution."""
        return "conv" in op_name(self.node)

    @property
    def module(self) -> str:
        """Qualified name of the module that owns the weight."""
        return self.weight.rpartition(".")[0]

    @property
    def has_padding(self) -> bool:
        """Whether zeros are padded to what it reads."""
        padding = argument(self.node, "padding", 0)
        if isinstance(padding, str):
            return padding != "valid"
        return any(padding) if isinstance(padding, list | tuple) else bool(padding)


@dataclass
class AffineSite:
    """An affine layer in its surroundings.

    Attributes:
        layer: qualified name of the selected layer.
        call: its call.
        affine: its op.
        activation: the activation that follows, or ``None``.
        result: the node whose value the consumers read.
        consumers: the affine ops that read it.
        other_readers: what else reads it.
        inside: the activation was computed inside the selected module.
    """

    layer: str
    call: Call
    affine: Affine
    activation: Activation | None
    result: fx.Node
    consumers: list[Affine] = field(default_factory=list)
    other_readers: list[fx.Node] = field(default_factory=list)
    inside: bool = False


def affine_of(node: fx.Node, flow: Dataflow) -> Affine | None:
    """The affine op at ``node`` if its weight is a parameter (or its transpose), else ``None``."""
    operands = affine_operands(node)
    if operands is None:
        return None
    data, weight, bias = operands
    transposed = op_name(node) in ("aten::addmm", "aten::mm", "aten::matmul")
    while weight not in flow.names:
        if op_name(weight) in ("aten::t", "aten::transpose", "aten::permute"):
            transposed = not transposed
        elif op_name(weight) not in ("aten::detach", "aten::alias"):
            return None
        if not isinstance(weight.args[0], fx.Node):
            return None
        weight = weight.args[0]
    if bias is not None and bias not in flow.names:
        return None
    return Affine(node, data, flow.names[weight], None if bias is None else flow.names[bias], transposed)


def affine_site(flow: Dataflow, call: Call) -> AffineSite | None:
    """Recognise a call as one affine op, with or without its activation inside the selected module."""
    found: list[Affine] = []
    node = call.entry
    while node is not call.exit:
        node = node.next
        affine = affine_of(node, flow)
        if affine is not None:
            found.append(affine)
    if len(found) != 1 or not _leads_back(found[0].data, call.entry):
        return None
    affine = found[0]
    site = AffineSite(call.layer, call, affine, None, affine.node)
    return site if _follow(flow, site) else None


def _leads_back(node: fx.Node, entry: fx.Node) -> bool:
    while node is not entry:
        if not is_transparent(node) or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True


def _follow(flow: Dataflow, site: AffineSite) -> bool:
    """Walk on from the affine op to its activation and its readers; whether the selected module ends on that way."""
    node = site.affine.node
    passed_exit = False
    while True:
        if site.activation is None and (found := activation_after(node)) is not None:
            site.activation, node = found
            site.inside = not passed_exit
            continue
        readers = list(node.users)
        if len(readers) != 1:
            break
        reader = readers[0]
        if is_transparent(reader):
            passed_exit = passed_exit or reader is site.call.exit
            node = reader
        else:
            break
    site.result = node
    stack = [node]
    while stack:
        current = stack.pop()
        for reader in current.users:
            consumer = affine_of(reader, flow)
            if consumer is not None and consumer.data is current:
                site.consumers.append(consumer)
            elif is_transparent(reader) and reader.args[0] is current:
                stack.append(reader)
            else:
                site.other_readers.append(reader)
    return passed_exit


def describe(node: fx.Node, flow: Dataflow) -> str:
    """Say what a node is, for an error message: the op, and where it belongs."""
    if node.op == "output":
        return "the model's output"
    if op_name(node) in DROPOUT:
        return "an active dropout (the model is in training mode: call model.eval())"
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    owner = stack[-1][0].removeprefix("model.") if stack else ""
    owner = owner.removeprefix("L['self'].model.").removeprefix("model.")
    read = [flow.names[operand] for operand in node.all_input_nodes if operand in flow.names]
    where = f" with {read[0]!r}" if read else f" in {owner!r}" if owner and owner != "model" else ""
    if norm_operands(node) is not None:
        return f"a norm ({op_name(node).removeprefix('aten::')}{where})"
    return f"{op_name(node).removeprefix('aten::')}{where}"


def widths(site: AffineSite, flow: Dataflow) -> tuple[int, int]:
    """Features (channels) that enter and leave the affine op."""
    shape = flow.shapes[site.affine.weight]
    if site.affine.is_convolution:
        groups = int(argument(site.affine.node, "groups", 1))
        if "transpose" in op_name(site.affine.node):
            return shape[0], shape[1] * groups
        return shape[1] * groups, shape[0]
    return (shape[0], shape[1]) if site.affine.transposed else (shape[1], shape[0])
