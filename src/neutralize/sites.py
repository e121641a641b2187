"""Sites: an affine layer with the norm and activation that follow it and the consumers that read it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.utils import _pytree as pytree

from neutralize.activations import Activation, activation_after
from neutralize.certify import unstrided, without_dtype
from neutralize.dataflow import Call, Dataflow, argument, dtype_of, is_mark, op_name, shape_of
from neutralize.rules import DROPOUT, REARRANGE, affine_operands, is_number, is_transparent, norm_operands

PRODUCTS = frozenset(f"aten::{name}" for name in "mul mm bmm matmul dot mv outer einsum inner tensordot".split())
RECURRENT = frozenset(
    f"aten::{name}{step}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") for step in ("", "_cell")
)
PADS = frozenset(
    f"aten::{name}"
    for name in """pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d""".split()
)


@dataclass(frozen=True)
class Affine:
    """An affine op with its own weight.

    Attributes:
        node: the op.
        data: what it reads.
        weight, bias: qualified names.
        transposed: the weight is stored (in, out, ...), as in the ``Conv1D`` of GPT-2 and in transposed convolutions.
        added: the sum that adds the bias, where that is an op of its own (``x @ W + b``).
    """

    node: fx.Node
    data: fx.Node
    weight: str
    bias: str | None
    transposed: bool
    added: fx.Node | None = None

    @property
    def result(self) -> fx.Node:
        """The op's value with its bias."""
        return self.node if self.added is None else self.added

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution, transposed or not."""
        return "conv" in op_name(self.node)

    @property
    def groups(self) -> int:
        """Into how many groups its features are divided; 1 if it is no convolution."""
        return int(argument(self.node, "groups", 1)) if self.is_convolution else 1

    @property
    def module(self) -> str:
        """Qualified name of the module that owns the weight."""
        return self.weight.rpartition(".")[0]

    @property
    def label(self) -> str:
        """What to call it in a message: its module, or its weight if that belongs to the model itself."""
        return self.module or self.weight

    @property
    def has_padding(self) -> bool:
        """Whether zeros are padded to what it reads."""
        padding = argument(self.node, "padding", 0)
        if isinstance(padding, str):
            return padding != "valid"
        return any(padding) if isinstance(padding, list | tuple) else bool(padding)


@dataclass(frozen=True)
class Norm:
    """A normalisation op with its own parameters, if it has any.

    Attributes:
        node: the op.
        data: what it reads.
        result: its value: the op, or the first of what it returns.
        weight, bias, mean, variance: qualified names, of a batch norm's running statistics too.
        eps: what is added to the variance.
        own_statistics: it normalises by the mean and variance of what it reads, not by stored ones.
    """

    node: fx.Node
    data: fx.Node
    result: fx.Node
    weight: str | None
    bias: str | None
    mean: str | None
    variance: str | None
    eps: float
    own_statistics: bool

    @property
    def kind(self) -> str:
        """``batch_norm``, ``layer_norm``, ``group_norm``, ``instance_norm`` or ``rms_norm``."""
        name = op_name(self.node)
        return next(kind for kind in _NORM_KINDS if kind in name)

    @property
    def module(self) -> str:
        """Qualified name of the module that owns the parameters, or ``""``."""
        return next((name.rpartition(".")[0] for name in self.parameters), "")

    @property
    def label(self) -> str:
        """What to call it in a message: its module, or the one that computes it without parameters."""
        return self.module or owner_of(self.node) or self.kind.replace("_", " ")

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters and statistics."""
        return tuple(name for name in (self.weight, self.bias, self.mean, self.variance) if name is not None)


@dataclass(frozen=True)
class Product:
    """An op that is linear in what it reads and in a parameter, and is no affine op: ``x * w``, ``w @ x``, an einsum.

    Attributes:
        node: the op.
        data: what it reads.
        weight: qualified name of the parameter.
    """

    node: fx.Node
    data: fx.Node
    weight: str

    @property
    def module(self) -> str:
        """Qualified name of the module that owns the weight."""
        return self.weight.rpartition(".")[0]

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return self.weight


_NORM_KINDS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")


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
        norm: the batch norm between it and its activation, or ``None``.
        padding: the op of its own that pads what the affine op reads (circular, reflected ...), or ``None``.
    """

    layer: str
    call: Call
    affine: Affine
    activation: Activation | None
    result: fx.Node
    consumers: list[Affine] = field(default_factory=list)
    other_readers: list[fx.Node] = field(default_factory=list)
    inside: bool = False
    norm: Norm | None = None
    padding: fx.Node | None = None

    @property
    def source(self) -> fx.Node:
        """What the affine op reads, before it is padded."""
        return self.affine.data if self.padding is None else self.padding.all_input_nodes[0]


# Of a matrix each is its transpose; affine_of takes matrices only.
_TRANSPOSES = frozenset(f"aten::{name}" for name in "t transpose permute numpy_T mT swapaxes swapdims".split())


def affine_of(node: fx.Node, flow: Dataflow) -> Affine | None:
    """The affine op at ``node`` if its weight is a parameter (or its transpose), else ``None``."""
    if op_name(node) == "aten::einsum":
        return _einsum_of(node, flow)
    operands = affine_operands(node)
    if operands is None:
        return None
    if any(not is_number(argument(node, factor, 1), 1) for factor in ("alpha", "beta")):
        return None
    data, weight, bias = operands
    transposed = op_name(node) in ("aten::addmm", "aten::mm", "aten::matmul")
    while weight not in flow.names:
        if op_name(weight) in _TRANSPOSES:
            transposed = not transposed
        elif op_name(weight) not in ("aten::detach", "aten::alias"):
            return None
        if not isinstance(weight.args[0], fx.Node):
            return None
        weight = weight.args[0]
    if bias is not None and bias not in flow.names:
        return None
    size = flow.shapes[flow.names[weight]]
    if "conv" in op_name(node):
        if transposed:
            return None
        transposed = "transpose" in op_name(node) or bool(argument(node, "transposed", False))
    elif len(size) != 2:
        return None
    added = _added_bias(node, flow, size[1] if transposed else size[0]) if bias is None else None
    if added is not None:
        return Affine(node, data, flow.names[weight], added[1], transposed, added[0])
    return Affine(node, data, flow.names[weight], None if bias is None else flow.names[bias], transposed)


_PRODUCTS_OF_MATRICES = ("aten::mm", "aten::matmul", "aten::linear", "aten::einsum")


def _einsum_of(node: fx.Node, flow: Dataflow) -> Affine | None:
    """An einsum that multiplies the last dimension of its data by a matrix: ``...i,oi->...o`` and its like."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, list | tuple) or len(operands) != 2:
        return None
    left, arrow, out = equation.replace(" ", "").partition("->")
    for place in (0, 1):
        weight, data, terms = operands[place], operands[1 - place], left.split(",")
        if not isinstance(weight, fx.Node) or weight not in flow.names or not isinstance(data, fx.Node) or not arrow:
            continue
        matrix, read = terms[place], terms[1 - place]
        name = flow.names[weight]
        if len(flow.shapes[name]) != 2 or len(matrix) != 2 or not read or not out:
            continue
        for transposed in (False, True):  # (out, in) or (in, out)
            made, summed = matrix[transposed], matrix[not transposed]
            distinct = made != summed and made not in read and len(set(read)) == len(read) - 2 * ("..." in read)
            if distinct and read[-1] == summed and out == read[:-1] + made:
                added = _added_bias(node, flow, flow.shapes[name][transposed])
                return Affine(node, data, name, added and added[1], transposed, added and added[0])
    return None


def _added_bias(node: fx.Node, flow: Dataflow, width: int) -> tuple[fx.Node, str] | None:
    """The sum that adds a parameter of ``width`` elements to a matrix product, with the parameter's name."""
    readers = list(node.users)
    if op_name(node) not in _PRODUCTS_OF_MATRICES or len(readers) != 1:
        return None
    total = readers[0]
    if op_name(total) != "aten::add" or not is_number(argument(total, "alpha", 1), 1):
        return None
    others = [part for part in total.args[:2] if part is not node]
    if len(others) != 1 or others[0] not in flow.names or shape_of(total) != shape_of(node):
        return None
    name = flow.names[others[0]]  # type: ignore[index]
    return (total, name) if flow.shapes[name] == (width,) else None


def product_of(node: fx.Node, data: fx.Node, flow: Dataflow) -> Product | None:
    """The product at ``node`` of ``data`` and a parameter (or a view of one) of a floating dtype, else ``None``."""
    others = [operand for operand in node.all_input_nodes if operand is not data]
    if op_name(node) not in PRODUCTS or len(others) != 1:
        return None
    weight = others[0]
    while weight not in flow.names:
        if op_name(weight) not in REARRANGE or not isinstance(weight.args[0], fx.Node):
            return None
        weight = weight.args[0]
    name = flow.names[weight]
    return Product(node, data, name) if flow.dtypes[name].is_floating_point else None


def recurrent_maps(node: fx.Node, flow: Dataflow) -> list[Affine]:
    """The affine maps ``W_ih x + b_ih`` by which a recurrent op takes in its data, one per direction.

    None if it is no recurrent op, or reads its data as a state too.
    """
    data = argument(node, "input", argument(node, "data"))
    if op_name(node) not in RECURRENT or not isinstance(data, fx.Node):
        return []
    if sum(leaf is data for leaf in pytree.tree_leaves((node.args, node.kwargs))) > 1:
        return []
    if op_name(node).endswith("_cell"):
        pairs = [(argument(node, "w_ih"), argument(node, "b_ih"))]
    else:
        params, directions = argument(node, "params"), 2 if argument(node, "bidirectional") else 1
        per_direction = len(params) // (int(argument(node, "num_layers")) * directions)  # of the first stacked layer
        firsts = [params[place * per_direction : (place + 1) * per_direction] for place in range(directions)]
        pairs = [(names[0], names[2] if argument(node, "has_biases") else None) for names in firsts]
    if any(operand is not None and operand not in flow.names for pair in pairs for operand in pair):
        return []
    return [
        Affine(node, data, flow.names[weight], None if bias is None else flow.names[bias], False)
        for weight, bias in pairs
    ]


def norm_of(node: fx.Node, flow: Dataflow) -> Norm | None:
    """The norm at ``node`` if its gain, bias and statistics are parameters and buffers, else ``None``."""
    if norm_operands(node) is None or not isinstance(node.args[0], fx.Node):
        return None
    names: list[str | None] = []
    for what in ("weight", "bias", "running_mean", "running_var"):
        operand = argument(node, what)
        if isinstance(operand, fx.Node) and operand not in flow.names:
            return None
        names.append(flow.names[operand] if isinstance(operand, fx.Node) else None)
    weight, bias, mean, variance = names
    op = op_name(node)
    training = argument(node, "training", argument(node, "train", argument(node, "use_input_stats")))
    if training is None:
        training = not op.endswith("no_training")
    result: fx.Node | None = node
    if shape_of(node) is None:  # several outputs: the value, then statistics
        picked = [reader for reader in node.users if op_name(reader) == "getitem" and reader.args[1] == 0]
        result = picked[0] if len(picked) == 1 else None
    if result is None:
        return None
    stored = mean is not None and variance is not None and not training
    eps = argument(node, "eps")
    if not is_number(eps):  # an rms norm's default: of the dtype in which it computes, or reads; the larger
        eps = torch.finfo(dtype_of(node.args[0]) or torch.float32).eps
    return Norm(node, node.args[0], result, weight, bias, mean, variance, float(eps), not stored)


def affine_site(flow: Dataflow, call: Call) -> AffineSite | None:
    """Recognise a call as one affine op, with or without its activation inside the selected module."""
    found: list[Affine] = []
    for node in call.nodes:
        affine = affine_of(node, flow)
        if affine is not None:
            found.append(affine)
    if len(found) != 1:
        return None
    affine = found[0]
    site = AffineSite(call.layer, call, affine, None, affine.node)
    if affine.is_convolution and op_name(affine.data) in PADS and len(affine.data.all_input_nodes) == 1:
        site.padding = affine.data
    if not _leads_back(site.source, call.entry):
        return None
    return site if _follow(flow, site) else None


def _leads_back(node: fx.Node, entry: fx.Node) -> bool:
    while node is not entry:
        if not is_transparent(node) or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True


def _follow(flow: Dataflow, site: AffineSite) -> bool:
    """Walk on from the affine op to its norm, activation and readers; whether the selected module ends on that way.

    A batch norm and an activation behind the module belong to the site if the module is the affine layer itself; a
    container ends where it ends.
    """
    node = site.affine.result
    owned = is_own_layer(site, flow)
    passed_exit = False
    while owned or not passed_exit:
        if site.activation is None and (found := activation_after(node)) is not None:
            site.activation, node = found
            site.inside = not passed_exit
            continue
        readers = list(node.users)
        if len(readers) != 1:
            break
        reader = readers[0]
        norm = norm_of(reader, flow) if site.norm is None and site.activation is None else None
        if is_transparent(reader):
            passed_exit = passed_exit or reader is site.call.exit
            node = reader
        elif norm is not None and norm.kind == "batch_norm" and norm.data is node:
            site.norm = norm
            node = norm.result
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


def is_own_layer(site: AffineSite, flow: Dataflow) -> bool:
    """Whether the selected module holds the affine op's weight itself; else it is a container around it."""
    weight = site.affine.weight
    return site.layer in {name.rpartition(".")[0] for name in flow.tied.get(weight, (weight,))}


def stays_in_place(site: AffineSite) -> bool:
    """Whether every element leaves the selected module where it entered, if the affine op itself moves none."""
    moves: list[fx.Node] = []
    for start, end in ((site.call.entry, site.source), (site.affine.result, site.call.exit)):
        path, node = [], end
        while node is not start:
            path.append(node)
            node = node.args[0]  # type: ignore[assignment]
        moves.extend(step for step in reversed(path) if op_name(step) in REARRANGE and not is_mark(step))
    shape = shape_of(site.call.entry)
    if not moves:
        return True
    if shape is None:
        return False
    entered = torch.arange(math.prod(shape)).reshape(shape)
    indices = entered
    for step in moves:
        indices = step.target(unstrided(indices), *step.args[1:], **without_dtype(step.kwargs))  # type: ignore[operator]
    return torch.equal(indices, entered)


def owner_of(node: fx.Node) -> str:
    """Qualified name of the module that computes the node, or ``""`` for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    owner: str = stack[-1][0].removeprefix("model.") if stack else ""
    owner = owner.removeprefix("L['self'].model.").removeprefix("model.")
    return "" if owner == "model" else owner


UNSEEN = "a value that was written through another view of its memory, or out of torch's sight"


def describe(node: fx.Node, flow: Dataflow) -> str:
    """Say what a node is, for an error message: the op, and where it belongs."""
    if node.op == "output":
        return "the model's output"
    if node in flow.names:
        return repr(flow.names[node])
    if node.op == "placeholder":
        return UNSEEN if node in flow.lost else "an input of the model, or a constant of it"
    if op_name(node) in DROPOUT:
        return "an active dropout (the model is in training mode: call model.eval())"
    owner = owner_of(node)
    read = [flow.names[operand] for operand in node.all_input_nodes if operand in flow.names]
    where = f" with {read[0]!r}" if read else f" in {owner!r}" if owner else ""
    if norm_operands(node) is not None:
        return f"a norm ({op_name(node).removeprefix('aten::')}{where})"
    return f"{op_name(node).removeprefix('aten::')}{where}"


def widths(site: AffineSite, flow: Dataflow) -> tuple[int, int]:
    """Features (channels) that enter and leave the affine op."""
    shape = flow.shapes[site.affine.weight]
    if site.affine.is_convolution:
        groups = site.affine.groups
        if site.affine.transposed:
            return shape[0], shape[1] * groups
        return shape[1] * groups, shape[0]
    return (shape[0], shape[1]) if site.affine.transposed else (shape[1], shape[0])
