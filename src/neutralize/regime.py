"""Choose the operating point (a, ε) of a linear-regime pass-through by minimising its total error.

Source: MATH §2 (formulas), §9 (rounding).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from neutralize.activations import Activation

# How many units of roundoff the evaluation of an activation may be off, relative to its value: vectorised tanh, sigmoid
# and erf are good to 1 to 2 units in the last place (2 to 4 roundoffs); the 16-bit types compute in float32 and round
# once.
_EVALUATION_ROUNDOFFS = {torch.float64: 4.0, torch.float32: 4.0}
_EVALUATION_ROUNDOFFS_NARROW = 1.5
_SHIFT_MARGIN = 1.0  # the bound X already has its margin; a = X + window lies on the linear side


@dataclass(frozen=True)
class Regime:
    """An operating point and what it costs.

    Attributes:
        epsilon: ε, a power of two.
        point: a.
        value: φ(a).
        slope: φ'(a).
        nonlinearity: bound on the error of the handed-on value that the curvature causes, for |x| <= X.
        rounding: bound on the error that rounding causes.
    """

    epsilon: float
    point: float
    value: float
    slope: float
    nonlinearity: float
    rounding: float

    @property
    def error(self) -> float:
        """Bound on the error of the handed-on value: absolute, for |x| <= X."""
        return self.nonlinearity + self.rounding

    @property
    def rescale(self) -> float:
        """What the consumer's weight is multiplied by: 1 / (ε φ'(a))."""
        return 1.0 / (self.epsilon * self.slope)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: 2⁻²⁴ for float32, 2⁻⁸ for bfloat16 (to nearest)."""
    return torch.finfo(dtype).eps / 2


def choose(
    activation: Activation | None,
    dtype: torch.dtype,
    input_bound: float,
    *,
    consumer_peak: float = 0.0,
    has_bias: bool = True,
    non_negative: bool = False,
) -> Regime | None:
    """Return the operating point with the least total error, or ``None`` if the layer has no bias to reach it with.

    Args:
        activation: the activation, or ``None`` for the identity.
        dtype: of the weights and activations.
        input_bound: X, a bound on the magnitude of what enters the layer.
        consumer_peak: largest magnitude in the consumers' weights, which must stay finite when rescaled.
        has_bias: whether the layer has a bias (for a ≠ 0).
        non_negative: whether what enters is known to be zero or more.

    Returns:
        The regime; ``None`` where it needs a bias that the layer does not have, or nothing fits the format's range.
    """
    if activation is None or (non_negative and activation.identity_from == 0.0):
        return Regime(1.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    if activation.regime == "shift":
        point = _ceil_to_grid(input_bound * _SHIFT_MARGIN + activation.window, dtype)
        candidate = _regime(activation, 1.0, point, dtype, input_bound)
        return candidate if has_bias else None
    if activation.point != 0 and not has_bias:
        return None
    limit = torch.finfo(dtype).max / 2
    candidates = []
    for exponent in range(8, -120, -1):
        epsilon = 2.0**exponent
        if activation.window and epsilon * input_bound > activation.window:
            continue
        if epsilon < torch.finfo(dtype).tiny:
            break
        candidate = _regime(activation, epsilon, activation.point, dtype, input_bound)
        if consumer_peak * candidate.rescale <= limit and candidate.rescale <= limit:
            candidates.append(candidate)
    if not candidates:
        return None
    least = min(candidate.error for candidate in candidates)
    # Of equally good ones the largest ε: the weights stay in the middle of the format's range.
    return next(candidate for candidate in candidates if candidate.error <= 1.05 * least)


def _regime(activation: Activation, epsilon: float, point: float, dtype: torch.dtype, bound: float) -> Regime:
    value = activation.slope * point if activation.regime == "shift" else activation.value
    nonlinearity = activation.curvature * epsilon**activation.order * bound ** (activation.order + 1)
    unit = unit_roundoff(dtype)
    evaluation = _EVALUATION_ROUNDOFFS.get(dtype, _EVALUATION_ROUNDOFFS_NARROW) * unit
    # The argument εx + a is rounded when a is added; φ is evaluated and stored; what is below the smallest number of
    # the
    # format is lost twice. All of it is divided by ε φ'(a) on the way out.
    argument_error = unit * (abs(point) + epsilon * bound) if point else 0.0
    peak = abs(value) + abs(activation.slope) * epsilon * bound + nonlinearity * epsilon * abs(activation.slope)
    smallest = torch.finfo(dtype).smallest_normal * unit
    absolute = argument_error * abs(activation.slope) + evaluation * peak + 2 * smallest
    # A slope that is no power of two makes the rescaled weights round once more.
    inexact = 0.0 if math.frexp(activation.slope)[0] == 0.5 else unit * bound
    rounding = absolute / (epsilon * abs(activation.slope)) + inexact
    return Regime(epsilon, point, value, activation.slope, nonlinearity, rounding)


def _ceil_to_grid(value: float, dtype: torch.dtype) -> float:
    """The smallest number of few significant bits that is not below ``value``: it is stored without rounding."""
    if value <= 0:
        return 0.0
    mantissa, exponent = math.frexp(value)
    bits = 4 if torch.finfo(dtype).eps > 2**-8 else 6
    return math.ldexp(math.ceil(mantissa * 2**bits), exponent - bits)
