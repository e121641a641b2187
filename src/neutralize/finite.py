"""Where edits may make a value that is not finite: 0 / 0, log 0, the root of a negative number.

``0 * x`` is 0 only if ``x`` is finite. What the edits leave alone is finite by assumption, as it is without them; what
they change (a gain that is now zero, and what comes of it) may be the divisor of something. So a divisor, or what a
logarithm reads, has to be positive by the ops that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from neutralize.dataflow import argument, op_name
from neutralize.rules import (
    CAST,
    DROPOUT,
    JOIN,
    NORMS_OWN_STATISTICS,
    REARRANGE,
    SPLIT,
    clamped_from,
    drops,
    is_number,
    non_negative,
)

_DEEPEST = 200  # how far back a sign is looked for

_POSITIVE = frozenset(
    f"aten::{name}" for name in "exp exp2 cosh sigmoid softplus softmax _softmax ones ones_like".split()
)
# Positive where what they read is.
_KEEP_POSITIVE = frozenset(
    f"aten::{name}"
    for name in """sum mean cumsum amax amin max min median sort topk gather index index_select take_along_dim
    repeat_interleave abs square sqrt pow reciprocal rsqrt relu prod cumprod max_pool1d max_pool2d max_pool3d avg_pool1d
    avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d norm linalg_vector_norm""".split()
)
# Positive where all that they read is.
_OF_POSITIVES = frozenset(f"aten::{name}" for name in "mul div einsum bmm mm matmul dot mv minimum where".split())
_NORMS = frozenset(("aten::var", "aten::std", "aten::norm", "aten::linalg_vector_norm"))
_DIVISIONS = frozenset(f"aten::{name}" for name in "div true_divide floor_divide remainder fmod".split())
_OF_POSITIVE_ONLY = frozenset(f"aten::{name}" for name in "reciprocal rsqrt log log2 log10".split())
_OF_NON_NEGATIVE_ONLY = frozenset(f"aten::{name}" for name in "sqrt log1p".split())
_UNSAFE = frozenset(
    f"aten::{name}"
    for name in """acos acosh asin atanh logit tan digamma lgamma inverse linalg_inv linalg_inv_ex linalg_solve
    linalg_solve_ex linalg_solve_triangular linalg_cholesky linalg_cholesky_ex cholesky linalg_qr linalg_svd linalg_eigh
    linalg_pinv""".split()
)


def may_break(node: fx.Node, is_changed: Callable[[fx.Node], bool], constants: Mapping[fx.Node, float]) -> bool:
    """Whether an op may make a number that is not finite of what the edits changed.

    Args:
        node: a call of the op.
        is_changed: whether the edits change the value of a node.
        constants: the nodes whose value is known.
    """
    op = op_name(node)
    first = node.args[0] if node.args else None
    if op in _DIVISIONS:
        divisor = node.args[1]
        if not isinstance(divisor, fx.Node) or not is_changed(divisor):
            return False
        return constants[divisor] == 0 if divisor in constants else not is_positive(divisor, constants)
    if op in NORMS_OWN_STATISTICS:
        eps: object = argument(node, "eps")
        return isinstance(eps, int | float) and eps <= 0 and isinstance(first, fx.Node) and is_changed(first)
    if op in ("aten::_weight_norm", "aten::_weight_norm_interface"):
        return is_changed(argument(node, "v"))
    if not isinstance(first, fx.Node) or not is_changed(first):
        return False
    if op in _OF_POSITIVE_ONLY:
        return not is_positive(first, constants)
    if op in _OF_NON_NEGATIVE_ONLY:
        return constants[first] < 0 if first in constants else not _is_non_negative(first, constants)
    if op == "aten::pow":
        exponent = node.args[1]
        if isinstance(exponent, int | float) and exponent >= 0:
            return exponent % 1 != 0 and not _is_non_negative(first, constants)
        return not is_positive(first, constants)
    return op in _UNSAFE


def is_positive(node: object, constants: Mapping[fx.Node, float], depth: int = 0) -> bool:
    """Whether every element is known to be greater than zero, from the ops that made it.

    Args:
        node: a node, or a number.
        constants: the nodes whose value is known.
        depth: how far back from the value that was asked about.
    """
    if not isinstance(node, fx.Node):
        return is_number(node) and node > 0  # type: ignore[operator]
    if node in constants:
        return constants[node] > 0
    if depth > _DEEPEST:
        return False

    def positive(operand: object) -> bool:
        return is_positive(operand, constants, depth + 1)

    op = op_name(node)
    first = node.args[0] if node.args else None
    if op in _POSITIVE:
        return True
    if op in _KEEP_POSITIVE or op in REARRANGE or op in SPLIT or op in CAST or op == "getitem":
        return positive(first)
    if op in DROPOUT:
        return not drops(node) and positive(first)
    if op in _OF_POSITIVES:
        operands = {"aten::where": node.args[1:], "aten::einsum": node.args[1:2]}.get(op, node.args[:2])
        return all(
            all(map(positive, operand)) if isinstance(operand, list | tuple) else positive(operand)
            for operand in operands
        )
    if op in JOIN:
        return isinstance(first, list | tuple) and all(map(positive, first))
    if op == "aten::maximum":
        return any(map(positive, node.args[:2]))
    if op == "aten::add" and is_number(argument(node, "alpha", 1), 1):
        pairs = (node.args[:2], node.args[1::-1])
        return any(positive(one) and _is_non_negative(other, constants) for one, other in pairs) or any(
            isinstance(one, fx.Node)
            and op_name(one) == "aten::elu"
            and is_number(other)
            and other >= argument(one, "alpha", 1)
            and not argument(one, "scale", 1) > 1
            for one, other in pairs
        )
    if op in ("aten::clamp", "aten::clamp_min", "aten::hardtanh"):
        low = clamped_from(node)
        return low is not None and (low > 0 or positive(first))
    return False


def _is_non_negative(node: object, constants: Mapping[fx.Node, float]) -> bool:
    if not isinstance(node, fx.Node):
        return is_number(node) and node >= 0  # type: ignore[operator]
    if node in constants:
        return constants[node] >= 0
    op = op_name(node)
    if op in _NORMS or (op == "aten::mul" and node.args[0] is node.args[1]):
        return True
    if op in REARRANGE or op in CAST or op in ("aten::sum", "aten::mean"):
        return _is_non_negative(node.args[0], constants)
    return non_negative(node) or is_positive(node, constants)
