"""What makes the value of an op zero, unchanged, or scaled: one table for the search, the certificate and damping.

Each rule is a list of clauses, and a clause is a condition on the operands of a node that suffices:

- ``zero_clauses``: the node is zero if every operand of one clause is zero (``0 * finite = 0``, φ(0) = 0, attention is
zero
  where its values are);
- ``scaled_clauses``: the node is multiplied by f if every operand of one clause is;
- ``carry_clauses``: the node holds the elements of one operand, rearranged at most, if other operands are zero, one or
an
  identity matrix.

Where a rule is missing nothing is concluded: an op that is not in the table is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from neutralize.dataflow import argument, dtype_of, is_mark, op_name, shape_of

# ---- ops by what they do ------------------------------------------------------------------------------------------

# Rearrange elements of their first operand; run on a tensor of indices, they say where each element went.
REARRANGE = frozenset(
    f"aten::{name}"
    for name in """alias clone contiguous detach expand expand_as flatten flip lift_fresh lift_fresh_copy movedim
    narrow permute repeat reshape reshape_as roll select slice squeeze t transpose unflatten unsqueeze view view_as
    _unsafe_view _reshape_alias swapaxes swapdims moveaxis tile unfold pixel_shuffle pixel_unshuffle channel_shuffle
    rot90 mT numpy_T""".split()
) | {"neutralize::mark"}
# Return a tuple of rearranged parts; ``getitem`` picks one.
SPLIT = frozenset(
    f"aten::{name}" for name in "split split_with_sizes chunk unbind tensor_split unsafe_split unsafe_chunk".split()
)
JOIN = frozenset(("aten::cat", "aten::concat", "aten::stack", "aten::hstack", "aten::vstack"))
CAST = frozenset(f"aten::{name}" for name in "to _to_copy type_as float half double bfloat16".split())
DROPOUT = frozenset(f"aten::{name}" for name in "dropout native_dropout feature_dropout alpha_dropout".split())
# Linear in their first operand and without an offset.
_LINEAR_IN_FIRST = frozenset(
    f"aten::{name}"
    for name in """embedding neg sum mean cumsum index_select gather index take_along_dim masked_select
    _pack_padded_sequence _pad_packed_sequence
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d
    upsample_trilinear3d repeat_interleave tril triu diagonal col2im im2col trace real view_as_complex view_as_real
    fft_rfft fft_irfft fft_fft fft_ifft constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad1d
    replication_pad2d""".split()
)
# f(s x) = s f(x) for s >= 0 only.
_POSITIVE_HOMOGENEOUS = frozenset(
    f"aten::{name}"
    for name in """relu leaky_relu prelu _prelu_kernel abs amax amin max_pool1d max_pool2d max_pool3d
    max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d""".split()
)
# φ(0) = 0 and nothing more.
_ZERO_AT_ZERO = frozenset(
    f"aten::{name}"
    for name in """tanh gelu silu mish elu selu celu sin sinh asinh atan hardswish hardswish_
    sqrt square erf expm1 log1p sign relu6 tan asin atanh hardshrink softshrink rrelu nan_to_num round floor ceil trunc
    """.split()
)
# Work element by element: of constants they make a constant.
POINTWISE = frozenset(
    f"aten::{name}"
    for name in """add sub rsub mul div neg reciprocal abs square sqrt rsqrt pow exp expm1 log log1p tanh sigmoid
    softplus silu gelu relu hardsigmoid hardtanh clamp clamp_min clamp_max minimum maximum sin cos erf""".split()
)
_NORMS = {  # op: places of (gain, bias) in its schema
    "aten::layer_norm": ("weight", "bias"),
    "aten::native_layer_norm": ("weight", "bias"),
    "aten::rms_norm": ("weight", None),
    "aten::_fused_rms_norm": ("weight", None),
    "aten::group_norm": ("weight", "bias"),
    "aten::native_group_norm": ("weight", "bias"),
    "aten::instance_norm": ("weight", "bias"),
    "aten::batch_norm": ("weight", "bias"),
    "aten::native_batch_norm": ("weight", "bias"),
    "aten::cudnn_batch_norm": ("weight", "bias"),
    "aten::_native_batch_norm_legit": ("weight", "bias"),
    "aten::_native_batch_norm_legit_functional": ("weight", "bias"),
    "aten::_native_batch_norm_legit_no_training": ("weight", "bias"),
    "aten::_batch_norm_with_update_functional": ("weight", "bias"),
}
# Those that give zero plus their bias for a zero input: they subtract a mean of the input itself, or none.
NORMS_OWN_STATISTICS = frozenset(
    ("aten::layer_norm", "aten::native_layer_norm", "aten::rms_norm", "aten::_fused_rms_norm", "aten::group_norm",
     "aten::native_group_norm")
)  # fmt: skip
_AFFINE = {  # op: (data, weight, bias) by schema name
    "aten::linear": ("input", "weight", "bias"),
    "aten::addmm": ("mat1", "mat2", "self"),
    "aten::conv1d": ("input", "weight", "bias"),
    "aten::conv2d": ("input", "weight", "bias"),
    "aten::conv3d": ("input", "weight", "bias"),
    "aten::conv_transpose1d": ("input", "weight", "bias"),
    "aten::conv_transpose2d": ("input", "weight", "bias"),
    "aten::conv_transpose3d": ("input", "weight", "bias"),
    "aten::convolution": ("input", "weight", "bias"),
    "aten::baddbmm": ("batch1", "batch2", "self"),
}
_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in "mul mm bmm matmul dot mv outer einsum _grouped_mm linalg_vecdot inner tensordot kron".split()
) | {"transformers::grouped_mm_fallback"}
ATTENTION = frozenset(
    f"aten::{name}"
    for name in """scaled_dot_product_attention _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention
    _scaled_dot_product_cudnn_attention
    _scaled_dot_product_fused_attention_overrideable""".split()
)
_ADD = "aten::add"
_SUB = "aten::sub"
DIVISIONS = frozenset(("aten::div", "aten::true_divide"))
# Write the second tensor operand into the first: zero if both are.
_SCATTER = {
    "aten::index_add": ("self", "source"),
    "aten::scatter_add": ("self", "src"),
    "aten::scatter": ("self", "src"),
    "aten::scatter_reduce": ("self", "src"),
    "aten::index_put": ("self", "values"),
    "aten::_unsafe_index_put": ("self", "values"),
    "aten::index_copy": ("self", "source"),
    "aten::slice_scatter": ("self", "src"),
    "aten::select_scatter": ("self", "src"),
    "aten::masked_scatter": ("self", "source"),
    "aten::copy": ("self", "src"),
}
_RECURRENT = frozenset(("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"))
_ZERO_SOURCES = frozenset(("aten::zeros", "aten::zeros_like", "aten::new_zeros", "aten::zero"))
_NON_NEGATIVE = frozenset(
    f"aten::{name}"
    for name in """relu relu6 sigmoid hardsigmoid softplus exp abs square softmax _softmax
    sqrt""".split()
)
_ORDER_PRESERVING = frozenset(
    f"aten::{name}"
    for name in """max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d adaptive_max_pool2d amax mean sum
    index_select gather relu """.split()
)


def tensors(*operands: object) -> list[fx.Node]:
    """The operands that are nodes; a number or a missing bias needs no condition."""
    return [operand for operand in operands if isinstance(operand, fx.Node)]


def is_number(operand: object, *values: float) -> bool:
    """Whether an operand is a Python number (and one of ``values``, if any are given)."""
    return isinstance(operand, int | float) and not isinstance(operand, bool) and (not values or operand in values)


def is_fill(node: fx.Node) -> bool:
    """Whether the node is filled with a number."""
    return op_name(node) in ("aten::full", "aten::full_like", "aten::new_full")


def drops(node: fx.Node) -> bool:
    """Whether a dropout really drops something."""
    training = argument(node, "train", argument(node, "training", False))
    probability = argument(node, "p", 0.0)
    return bool(training) and probability != 0


def pointwise_value(node: fx.Node, operands: Sequence[float | None]) -> float | None:
    """What an op of ``POINTWISE`` makes of constants, computed by itself in their dtypes; ``None``: unknown.

    Args:
        node: a call of the op.
        operands: the value of each of its input nodes.
    """
    known = dict(zip(node.all_input_nodes, operands, strict=True))
    if op_name(node) not in POINTWISE or any(value is None for value in operands):
        return None

    def stand_in(operand: fx.Node) -> torch.Tensor:
        return torch.full((1,), known[operand], dtype=dtype_of(operand))  # type: ignore[arg-type]

    args, kwargs = fx.map_arg((node.args, node.kwargs), stand_in)
    value = float(node.target(*args, **kwargs))  # type: ignore[operator]
    return value if math.isfinite(value) else None


def zero_clauses(node: fx.Node) -> list[list[fx.Node]]:
    """Clauses that make the node zero; an empty clause: it is zero already."""
    op = op_name(node)
    homogeneous = _homogeneous_clauses(node, op, positive=True)
    if homogeneous is not None:
        if op in NORMS_OWN_STATISTICS:  # zero in, bias out
            return [*homogeneous, tensors(node.args[0], argument(node, "bias"))]
        return homogeneous
    if op in _RECURRENT:  # without weights, biases and states even half-open gates pass zeros on
        states, parameters = node.args[1], node.args[2]
        if isinstance(parameters, list | tuple):
            return [tensors(*(states if isinstance(states, list | tuple) else [states]), *parameters)]
        return []
    if op in _ZERO_SOURCES:
        return [[]]
    if is_fill(node):
        return [[]] if is_number(argument(node, "fill_value"), 0) else []
    if op in _ZERO_AT_ZERO:
        return [tensors(node.args[0])]
    if op in ("aten::hardtanh", "aten::clamp", "aten::clamp_min", "aten::clamp_max"):
        low = argument(node, "min_val", argument(node, "min"))
        high = argument(node, "max_val", argument(node, "max"))
        inside = (low is None or (is_number(low) and low <= 0)) and (high is None or (is_number(high) and high >= 0))
        return [tensors(node.args[0])] if inside else []
    if op == "aten::pow" and is_number(argument(node, "exponent")):
        return [tensors(node.args[0])] if argument(node, "exponent") > 0 else []
    if op == "aten::softsign":
        return [tensors(node.args[0])]
    return []


def scaled_clauses(node: fx.Node, factor: float) -> list[list[fx.Node]]:
    """Clauses that multiply the node by ``factor``."""
    return _homogeneous_clauses(node, op_name(node), positive=factor >= 0) or []


def _homogeneous_clauses(node: fx.Node, op: str, *, positive: bool) -> list[list[fx.Node]] | None:
    """Clauses that hold for zero and for any (positive) factor alike; ``None`` where the op has none."""
    first = node.args[0] if node.args else None
    if op == "getitem":
        # Parts of a split, or the first output of an op whose others are statistics.
        if isinstance(first, fx.Node) and (op_name(first) in SPLIT or node.args[1] == 0):
            return [[first]]
        return None
    if op == "aten::alpha_dropout" and drops(node):  # what it drops becomes a number other than zero
        return None
    if op in REARRANGE or op in SPLIT or op in CAST or op in DROPOUT:
        return [tensors(first)]
    if op in _LINEAR_IN_FIRST:
        if op in ("aten::constant_pad_nd", "aten::pad") and not is_number(argument(node, "value", 0) or 0, 0):
            return None
        if not is_number(argument(node, "padding_value", 0), 0):
            return None
        return [tensors(first)]
    if op in _POSITIVE_HOMOGENEOUS:
        return [tensors(first)] if positive else None
    if op in JOIN:
        return [tensors(*first)] if isinstance(first, list | tuple) else None
    if op in _AFFINE:
        data, weight, bias = (argument(node, name) for name in _AFFINE[op])
        return [tensors(weight, bias), tensors(data, bias)]
    if op in ("aten::_weight_norm", "aten::_weight_norm_interface"):
        return [tensors(argument(node, "g"))]
    if op in _NORMS:
        gain, bias = (argument(node, name) if name else None for name in _NORMS[op])
        return [tensors(gain, bias)] if isinstance(gain, fx.Node) else None
    if op in _PRODUCTS:
        operands = node.args[1] if op == "aten::einsum" else node.args
        return [[operand] for operand in tensors(*operands)] if isinstance(operands, list | tuple) else None
    if op in ATTENTION:
        return [tensors(argument(node, "value"))]
    if op in (_ADD, _SUB):
        one, other = node.args[0], node.args[1]
        if any(is_number(operand) and operand != 0 for operand in (one, other)):
            return None
        return [tensors(one, other)]
    if op in DIVISIONS:
        return [tensors(first)] if isinstance(first, fx.Node) else None
    if op == "aten::addcmul":
        base, one, other = node.args[:3]
        return [tensors(base, one), tensors(base, other)]
    if op == "aten::lerp":
        return [tensors(node.args[0], node.args[1])]
    if op == "aten::where" and len(node.args) == 3:
        chosen = node.args[1:]
        return (
            [tensors(*chosen)]
            if all(isinstance(operand, fx.Node) or is_number(operand, 0) for operand in chosen)
            else None
        )
    if op == "aten::masked_fill":
        return [tensors(first)] if is_number(node.args[2], 0) else None
    if op in _SCATTER:
        if not is_number(argument(node, "value", 0), 0):  # written instead of a tensor
            return None
        return [tensors(*(argument(node, name) for name in _SCATTER[op]))]
    return None


@dataclass(frozen=True)
class Carry:
    """A condition under which a node holds the elements of ``carrier``.

    Attributes:
        carrier: the operand whose elements are handed on.
        zeros, ones: operands that must be zero, one.
        identity: a weight that must be the identity.
        non_negative: the carrier must be known to be non-negative.
        by_number: it rests on a number in the graph, a factor of 1 say, that may be another for other inputs.
    """

    carrier: fx.Node
    zeros: tuple[fx.Node, ...] = ()
    ones: tuple[fx.Node, ...] = ()
    identity: fx.Node | None = None
    non_negative: bool = False
    by_number: bool = False


def carry_clauses(node: fx.Node) -> list[Carry]:
    """Conditions under which the node holds the elements of one of its operands, rearranged at most."""
    op = op_name(node)
    first = node.args[0] if node.args else None
    if op == "getitem" and isinstance(first, fx.Node):
        return [Carry(first)] if op_name(first) in SPLIT or (op_name(first) in DROPOUT and node.args[1] == 0) else []
    if isinstance(first, fx.Node):
        if op in REARRANGE or op in SPLIT or op in CAST or op in ("aten::constant_pad_nd", "aten::pad"):
            return [Carry(first)]
        if op in DROPOUT:
            return [] if drops(node) else [Carry(first)]
        if op == "aten::relu":
            return [Carry(first, non_negative=True)]
        if op == "aten::clamp_min" and is_number(node.args[1], 0):
            return [Carry(first, non_negative=True)]
    if op in JOIN and isinstance(first, list | tuple):
        return [Carry(part) for part in tensors(*first)]
    if op == _ADD and is_number(argument(node, "alpha", 1), 1):
        one, other = node.args[0], node.args[1]
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            return [Carry(one, zeros=(other,)), Carry(other, zeros=(one,))]
        return [
            Carry(part, by_number=True)
            for part, rest in ((one, other), (other, one))
            if isinstance(part, fx.Node) and is_number(rest, 0)
        ]
    if op == _ADD and isinstance(first, fx.Node) and isinstance(node.args[1], fx.Node):
        return [Carry(first, zeros=(node.args[1],))]
    if op == _SUB and isinstance(first, fx.Node):
        other = node.args[1]
        if isinstance(other, fx.Node):
            return [Carry(first, zeros=(other,))]
        return [Carry(first, by_number=True)] if is_number(other, 0) else []
    if op == "aten::mul":
        one, other = node.args[0], node.args[1]
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            return [Carry(one, ones=(other,)), Carry(other, ones=(one,))]
        return [
            Carry(part, by_number=True)
            for part, rest in ((one, other), (other, one))
            if isinstance(part, fx.Node) and is_number(rest, 1)
        ]
    if op in DIVISIONS and isinstance(first, fx.Node):
        other = node.args[1]
        if isinstance(other, fx.Node):
            return [Carry(first, ones=(other,))]
        return [Carry(first, by_number=True)] if is_number(other, 1) else []
    if op == "aten::where" and len(node.args) == 3:
        return [Carry(part) for part in tensors(*node.args[1:])]
    if op in ("aten::linear", "aten::addmm"):
        data, weight, bias = (argument(node, name) for name in _AFFINE[op])
        if isinstance(weight, fx.Node) and isinstance(data, fx.Node):
            size = shape_of(weight)
            if size is not None and len(size) == 2 and size[0] == size[1]:
                return [Carry(data, zeros=tuple(tensors(bias)), identity=weight)]
    return []


def affine_operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Data, weight and bias of an affine op (linear, addmm, mm, convolution), else ``None``."""
    op = op_name(node)
    if op in _AFFINE and op != "aten::baddbmm":
        data, weight, bias = (argument(node, name) for name in _AFFINE[op])
    elif op in ("aten::mm", "aten::matmul") and len(node.args) == 2:
        data, weight, bias = node.args[0], node.args[1], None
    else:
        return None
    if not isinstance(data, fx.Node) or not isinstance(weight, fx.Node):
        return None
    return data, weight, bias if isinstance(bias, fx.Node) else None


def norm_operands(node: fx.Node) -> tuple[object, object] | None:
    """Gain and bias of a normalisation op, else ``None``."""
    names = _NORMS.get(op_name(node))
    return None if names is None else tuple(argument(node, name) if name else None for name in names)  # type: ignore[return-value]


def non_negative(node: fx.Node, cut: Mapping[fx.Node, fx.Node] | None = None) -> bool:
    """Whether every element of the node is known to be zero or more, from the ops that made it.

    Args:
        node: the node.
        cut: results of layers that are cut out, with what enters them: the result is what entered.
    """
    cut = cut or {}
    seen: dict[fx.Node, bool] = {}
    stack = [node]
    while stack:
        current = stack[-1]
        if current in seen:
            stack.pop()
            continue
        op = op_name(current)
        first = current.args[0] if current.args else None
        operands: list[fx.Node] | None
        if current in cut:
            operands = [cut[current]]
        elif op in _NON_NEGATIVE or (
            op in ("aten::hardtanh", "aten::clamp", "aten::clamp_min") and _clamped_at_zero(current)
        ):
            operands = []
        elif op == "aten::pow" and is_number(current.args[1]):
            operands = [] if current.args[1] % 2 == 0 else tensors(first)  # type: ignore[operator]
        elif (
            op in REARRANGE or op in SPLIT or op in CAST or op in DROPOUT or op in _ORDER_PRESERVING or op == "getitem"
        ):
            operands = tensors(first)
        elif op == _ADD or op == "aten::mul":
            both = current.args[:2]
            operands = None if any(is_number(part) and part < 0 for part in both) else tensors(*both)  # type: ignore[operator]
            if op == _ADD and not is_number(argument(current, "alpha", 1), 1):
                operands = None
        elif op in JOIN and isinstance(first, list | tuple):
            operands = tensors(*first)
        else:
            operands = None
        if operands is None:
            seen[current] = False
        elif all(part in seen for part in operands):
            seen[current] = all(seen[part] for part in operands)
        else:
            stack.extend(part for part in operands if part not in seen)
            continue
        stack.pop()
    return seen[node]


def clamped_from(node: fx.Node) -> float | None:
    """The number that a clamp keeps its values from falling below, if it has one."""
    low = argument(node, "min_val", argument(node, "min"))
    return low if is_number(low) else None


def _clamped_at_zero(node: fx.Node) -> bool:
    low = clamped_from(node)
    return low is not None and low >= 0


def is_transparent(node: fx.Node) -> bool:
    """Whether the node hands on every element of its first operand, in some order: marks, views, an idle dropout."""
    op = op_name(node)
    if op in DROPOUT:
        return not drops(node)
    if op in CAST:
        before, after = (
            (node.args[0].meta.get("val"), node.meta.get("val")) if isinstance(node.args[0], fx.Node) else (None, None)
        )
        return before is not None and after is not None and before.dtype == after.dtype
    if is_mark(node):
        return True
    if op not in REARRANGE or not isinstance(node.args[0], fx.Node):
        return False
    before_shape, after_shape = shape_of(node.args[0]), shape_of(node)
    if before_shape is None or after_shape is None:
        return False
    return math.prod(before_shape) == math.prod(after_shape) and op not in (
        "aten::unfold",
        "aten::slice",
        "aten::select",
    )
