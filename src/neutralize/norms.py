"""Norms, whether one op computes them or a model spells them out: ``(x - mean) * rsqrt(var + eps)``.

What is recognised is the core, by what its ops do: a value over the root of its own mean square or variance along its
last dimensions. A gain and a bias that follow are ordinary products and sums with parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from neutralize.dataflow import argument, dtype_of, op_name, shape_of
from neutralize.rules import CAST, DIVISIONS, Carry, is_number, norm_operands, tensors


@dataclass(frozen=True)
class Core:
    """A value that is normalised along its last dimensions.

    Attributes:
        node: what gives the normalised value.
        data: what is normalised.
        is_centred: its mean is taken away first (a layer norm); else it is an RMS norm.
        over: sizes of the dimensions that it is normalised over.
        eps: what is added to the variance, or to the mean square.
        gain, bias: what the core itself multiplies by and adds.
        is_behind_root: ε is added to the standard deviation, not to the variance.
        scale: the standard deviation of the normalised value, without ε: below 1 where the variance is the unbiased
            one.
    """

    node: fx.Node
    data: fx.Node
    is_centred: bool
    over: tuple[int, ...]
    eps: float
    gain: fx.Node | None = None
    bias: fx.Node | None = None
    is_behind_root: bool = False
    scale: float = 1.0

    @property
    def floor(self) -> float:
        """What the root is for values next to which ε is large: there the norm is linear."""
        return self.eps if self.is_behind_root else math.sqrt(self.eps)

    def nonlinearity(self, size: float) -> float:
        """The relative error of taking the norm for linear, at values of standard deviation ``size`` or less."""
        ratio = size / self.floor
        return ratio if self.is_behind_root else ratio**2 / 2


def core_of(node: fx.Node) -> Core | None:
    """The norm whose value ``node`` is, else ``None``."""
    op = op_name(node)
    if op in ("aten::layer_norm", "aten::rms_norm"):
        data, eps = argument(node, "input"), argument(node, "eps")
        if not isinstance(data, fx.Node):
            return None
        if not is_number(eps):  # an rms norm's default: of the dtype in which it computes, or reads; the larger
            eps = torch.finfo(dtype_of(data) or torch.float32).eps
        gain, bias = (each if isinstance(each, fx.Node) else None for each in norm_operands(node) or (None, None))
        return Core(node, data, op == "aten::layer_norm", tuple(argument(node, "normalized_shape")), eps, gain, bias)
    if (op != "aten::mul" and op not in DIVISIONS) or len(node.args) != 2 or node.kwargs:
        return None
    value, root = node.args
    return _spelled(node, value, root) or (_spelled(node, root, value) if op == "aten::mul" else None)


def renorm_clauses(node: fx.Node, before: fx.Node) -> list[Carry]:
    """Conditions under which a norm hands on what another norm, ``before``, has normalised already.

    A layer norm of a value of mean 0 and variance 1 is that value, an RMS norm of one of mean square 1 too, up to ε. A
    positive multiple of it will do as well, as in DeepNorm.

    Source: MATH §5.
    """
    if multiple_of(node) is not None:
        return [Carry(tensors(*node.args[:2])[0])]
    core = core_of(node)
    first = core_of(before) if core is not None else None
    if core is None or first is None or core.over != first.over or (core.is_centred and not first.is_centred):
        return []
    return [Carry(core.data, ones=tuple(tensors(core.gain)), zeros=tuple(tensors(core.bias)))]


def multiple_of(node: fx.Node) -> float | None:
    """The positive number that a node multiplies (or divides) one tensor by, else ``None``."""
    if op_name(node) not in ("aten::mul", *DIVISIONS) or len(node.args) != 2 or node.kwargs:
        return None
    one, other = node.args
    if isinstance(other, fx.Node) and op_name(node) == "aten::mul":
        one, other = other, one
    if not (isinstance(one, fx.Node) and is_number(other)) or other <= 0:  # type: ignore[operator]
        return None
    return float(other) if op_name(node) == "aten::mul" else 1.0 / float(other)  # type: ignore[arg-type]


# ---- the parts of a norm that is spelled out ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Moment:
    """A mean square or a variance along dimensions that are kept.

    Attributes:
        source: the value, before its mean is taken away.
        is_central: the mean is taken away.
        dims: as the op has them.
        is_unbiased: it is divided by one less than there are values.
    """

    source: fx.Node
    is_central: bool
    dims: list[int]
    is_unbiased: bool = False


def _spelled(node: fx.Node, value: object, root: object) -> Core | None:
    """The norm that divides ``value`` by ``root``, or multiplies by it."""
    shape = shape_of(node)
    if not isinstance(value, fx.Node) or not isinstance(root, fx.Node) or not shape:
        return None
    found = _root(root) if op_name(node) in DIVISIONS else _inverse_root(root)
    if found is None:
        return None
    moment, eps, is_behind_root = found
    data, gain = value, None
    if moment.is_central:
        centred = _centred(value, moment.dims)
        if centred is None and op_name(value) == "aten::mul":  # gain * (x - mean) / root
            for part, rest in (value.args[:2], value.args[1::-1]):
                if isinstance(part, fx.Node) and isinstance(rest, fx.Node) and centred is None:
                    centred, gain = _centred(part, moment.dims), rest
        if centred is None:
            return None
        data = centred
    count, rank = len(moment.dims), len(shape)
    is_last = sorted(dim % rank for dim in moment.dims) == list(range(rank - count, rank))
    if not is_last or shape_of(data) != shape or not _is_same(data, moment.source):
        return None
    over = shape[rank - count :]
    scale = math.sqrt(1.0 - 1.0 / math.prod(over)) if moment.is_unbiased else 1.0
    eps *= scale if is_behind_root else scale**2
    return Core(node, data, moment.is_central, over, eps, gain, None, is_behind_root, scale)


def _root(node: fx.Node) -> tuple[_Moment, float, bool] | None:
    """The moment, the ε and whether that is added to the root, where a node is such a root."""
    eps, root = _plus(node)
    if op_name(root) == "aten::std":
        moment, behind = _variance(root), True
    else:
        squared = _power(root, 0.5)
        if squared is None:
            return None
        behind = eps != 0.0
        if not behind:
            eps, squared = _plus(squared)
        moment = _moment(squared)
    return None if moment is None or eps < 0 else (moment, eps, behind)


def _inverse_root(node: fx.Node) -> tuple[_Moment, float, bool] | None:
    """The same where a node is one over such a root."""
    node = _uncast(node)
    first = node.args[0] if node.args else None
    if op_name(node) == "aten::reciprocal" and isinstance(first, fx.Node):
        return _root(first)
    if op_name(node) in DIVISIONS and is_number(first, 1) and isinstance(node.args[1], fx.Node):
        return _root(node.args[1])
    squared = _power(node, -0.5)
    if squared is None:
        return None
    eps, squared = _plus(squared)
    moment = _moment(squared)
    return None if moment is None or eps < 0 else (moment, eps, False)


def _plus(node: fx.Node) -> tuple[float, fx.Node]:
    """The number that a node adds to a value, and that value."""
    node = _uncast(node)
    if op_name(node) == "aten::add" and len(node.args) == 2 and not node.kwargs:
        for one, other in (node.args, node.args[::-1]):
            if isinstance(one, fx.Node) and is_number(other):
                return float(other), _uncast(one)  # type: ignore[arg-type]
    return 0.0, node


def _power(node: fx.Node, exponent: float) -> fx.Node | None:
    """What a node is that power of."""
    node = _uncast(node)
    named = {"aten::sqrt": 0.5, "aten::rsqrt": -0.5, "aten::square": 2}.get(op_name(node))
    power = argument(node, "exponent") if op_name(node) == "aten::pow" else named
    if exponent == 2 and op_name(node) == "aten::mul" and node.args[0] is node.args[1]:
        power = 2
    first = node.args[0] if node.args else None
    return _uncast(first) if isinstance(first, fx.Node) and is_number(power, exponent) else None


def _moment(node: fx.Node) -> _Moment | None:
    if op_name(node) == "getitem" and isinstance(node.args[0], fx.Node) and node.args[1] == 0:
        node = node.args[0]
    if op_name(node) in ("aten::var", "aten::var_mean"):
        return _variance(node)
    dims = _kept_dims(node)
    square = _power(node.args[0], 2) if op_name(node) == "aten::mean" and isinstance(node.args[0], fx.Node) else None
    if square is None or dims is None:
        return None
    centred = _centred(square, dims)
    return _Moment(square, False, dims) if centred is None else _Moment(centred, True, dims)


def _variance(node: fx.Node) -> _Moment | None:
    """The variance, or its root, that one op computes."""
    dims, first = _kept_dims(node), node.args[0]
    if dims is None or not isinstance(first, fx.Node):
        return None
    correction = argument(node, "unbiased", argument(node, "correction"))
    correction = 1 if correction is None else int(correction)
    if correction not in (0, 1):
        return None
    return _Moment(_centred(first, dims) or first, True, dims, bool(correction))


def _kept_dims(node: fx.Node) -> list[int] | None:
    dims = argument(node, "dim")
    if dims is None or not argument(node, "keepdim", False):
        return None
    return list(dims) if isinstance(dims, list | tuple) else [dims]


def _centred(node: fx.Node, dims: list[int]) -> fx.Node | None:
    """The value that a node is without its mean, else ``None``."""
    node = _uncast(node)
    if op_name(node) != "aten::sub" or not is_number(argument(node, "alpha", 1), 1):
        return None
    value, mean = node.args[:2]
    if not isinstance(value, fx.Node) or not isinstance(mean, fx.Node):
        return None
    mean = _uncast(mean)
    wanted = "aten::mean"
    if op_name(mean) == "getitem" and isinstance(mean.args[0], fx.Node) and mean.args[1] == 1:
        mean, wanted = mean.args[0], "aten::var_mean"
    if op_name(mean) != wanted or _kept_dims(mean) != dims or not isinstance(mean.args[0], fx.Node):
        return None
    return value if _is_same(mean.args[0], value) else None


def _is_same(one: fx.Node, other: fx.Node) -> bool:
    return _uncast(one) is _uncast(other)


def _uncast(node: fx.Node) -> fx.Node:
    """The value of which a node holds every number, in a wider type, or times 1."""
    while op_name(node) in CAST or multiple_of(node) == 1.0:
        (operand,) = tensors(*node.args[:2])[:1]
        before, after = dtype_of(operand), dtype_of(node)
        if before is None or after is None or torch.promote_types(before, after) != after:
            break
        node = operand
    return node
