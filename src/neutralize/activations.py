"""Activations: where each one is linear, how far from linear it is there, and the fills documented for it.

One row per activation. The error formulas are those of MATH §2: with ``W = εI``, ``b = a`` and the consumer divided by
``ε φ'(a)``, a layer hands on ``(φ(εx + a) - φ(a)) / (ε φ'(a))`` instead of ``x``; for ``|x| <= X`` the difference is
at most

- ``curvature · ε · X²``, with ``curvature = sup|φ''| / (2 |φ'(a)|)`` (order 1), or
- ``curvature · ε² · X³``, with ``curvature = sup|φ'''| / (6 |φ'(a)|)`` where ``φ''(a) = 0`` (order 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx
from torch.nn import functional

from neutralize.dataflow import argument, op_name


@dataclass(frozen=True)
class Activation:
    """An activation function and its linear regime.

    Attributes:
        name: the usual name.
        ops: ATen ops that compute it, without the namespace; an in-place twin counts too.
        function: the function itself, for tests and plots.
        regime: how its linear part is reached: ``origin`` (around the operating point, the better the smaller ε),
            ``window`` (exactly linear on ``|z - point| <= window``) or ``shift`` (exactly linear from ``window`` up:
            the
            operating point is moved there, ε = 1).
        point: operating point a; for ``shift`` it is chosen as ``X + window``.
        value: φ(a); for ``shift`` φ(a) = slope · a.
        slope: φ'(a).
        curvature, order: the error, as above; 0 for ``window`` and ``shift``.
        window: see ``regime``; for ``origin``, the |z - point| within which the error formula holds (0: everywhere).
        identity_from: z from which φ(z) = z bit for bit, or ``None``.
        fill: weight of the documented constant fill, or ``None``.
        source: where the numbers come from.
    """

    name: str
    ops: tuple[str, ...]
    function: Callable[[torch.Tensor], torch.Tensor]
    regime: Literal["origin", "window", "shift"]
    point: float = 0.0
    value: float = 0.0
    slope: float = 1.0
    curvature: float = 0.0
    order: int = 0
    window: float = 0.0
    identity_from: float | None = None
    fill: float | None = None
    source: str = ""

    @property
    def at_zero(self) -> float:
        """φ(0)."""
        return float(self.function(torch.zeros((), dtype=torch.float64)))


# Suprema of derivatives: |tanh'''| <= 2; |σ'''| <= 1/8; |GELU''| <= 2 φ(0) = 0.798; |SiLU''| <= 1/2; |Mish''| <= 0.64.
ACTIVATIONS: tuple[Activation, ...] = (
    Activation(
        "tanh",
        ("tanh",),
        torch.tanh,
        "origin",
        curvature=1 / 3,
        order=2,
        fill=0.001,
        source="MATH §2; sup|φ'''| = 2 at 0",
    ),
    Activation(
        "sigmoid",
        ("sigmoid",),
        torch.sigmoid,
        "origin",
        value=0.5,
        slope=0.25,
        curvature=1 / 12,
        order=2,
        fill=0.01,
        source="MATH §2; sup|φ'''| = 1/8 at 0",
    ),
    Activation(
        "relu", ("relu",), torch.relu, "shift", identity_from=0.0, fill=1.001, source="MATH §2; exact for z >= 0"
    ),
    Activation(
        "gelu",
        ("gelu",),
        functional.gelu,
        "origin",
        slope=0.5,
        curvature=0.8,
        order=1,
        source="MATH §2; sup|φ''| = 0.798 at 0 (erf form), 0.80 (tanh form)",
    ),
    Activation(
        "silu",
        ("silu",),
        functional.silu,
        "origin",
        slope=0.5,
        curvature=0.5,
        order=1,
        source="MATH §2; sup|φ''| = 1/2 at 0",
    ),
    Activation("sin", ("sin",), torch.sin, "origin", curvature=1 / 6, order=2, source="MATH §2; sup|φ'''| = 1"),
    Activation(
        "hardtanh", ("hardtanh",), functional.hardtanh, "window", window=1.0, source="MATH §2; linear on [-1, 1]"
    ),
    Activation(
        "relu6",
        ("relu6",),
        functional.relu6,
        "window",
        point=3.0,
        value=3.0,
        window=3.0,
        source="MATH §2; linear on [0, 6]",
    ),
    Activation(
        "hardsigmoid",
        ("hardsigmoid",),
        functional.hardsigmoid,
        "window",
        value=0.5,
        slope=1 / 6,
        window=3.0,
        source="MATH §2; linear on [-3, 3]",
    ),
    Activation(
        "hardswish",
        ("hardswish",),
        functional.hardswish,
        "origin",
        slope=0.5,
        curvature=1 / 3,
        order=1,
        window=3.0,
        source="φ(z) = z (z + 3) / 6 on [-3, 3]: φ'(0) = 1/2, φ'' = 1/3",
    ),
)

BY_NAME = {activation.name: activation for activation in ACTIVATIONS}
_BY_OP = {f"aten::{op}": activation for activation in ACTIVATIONS for op in activation.ops}
# Activations without a row of their own yet: recognised so that a layer in front of one is refused, not half cut out.
_OTHERS = ("leaky_relu", "elu", "selu", "celu", "mish", "softplus", "softsign", "log_sigmoid", "logsigmoid", "prelu",
           "_prelu_kernel", "hardshrink", "softshrink", "threshold", "rrelu", "rrelu_with_noise", "glu")  # fmt: skip
# Names of the Python functions that compute an activation, for the excised network (``verify.excised``).
FUNCTION_NAMES = frozenset(
    name + suffix for name in (*(op for row in ACTIVATIONS for op in row.ops), *_OTHERS) for suffix in ("", "_")
)


def is_activation(node: fx.Node) -> bool:
    """Whether the node is an activation, known in full (``activation_of``) or by name only."""
    return op_name(node).removeprefix("aten::") in FUNCTION_NAMES


def activation_of(node: fx.Node) -> Activation | None:
    """The activation that the node computes, or ``None``: unknown, or with parameters other than the usual ones."""
    op = op_name(node)
    if op == "aten::hardtanh":
        limits = (argument(node, "min_val", -1.0), argument(node, "max_val", 1.0))
        return BY_NAME["relu6"] if limits == (0, 6) else BY_NAME["hardtanh"] if limits == (-1, 1) else None
    return _BY_OP.get(op)
