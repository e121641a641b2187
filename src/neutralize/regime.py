"""Choose the operating point (a, ε) of a linear-regime pass-through by minimising its total error.

Source: MATH §2 (formulas), §9 (rounding).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from neutralize.activations import Activation, LinearPart

# How many units of roundoff the evaluation of an activation may be off, relative to its value: vectorised tanh, sigmoid
# and erf are good to 1 to 2 units in the last place (2 to 4 roundoffs); the 16-bit types compute in float32 and round
# once. An activation that several ops compute rounds in each.
_EVALUATION_ROUNDOFFS = {torch.float64: 4.0, torch.float32: 4.0}
_EVALUATION_ROUNDOFFS_NARROW = 1.5
_SAMPLES = 513


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
        reading: bound on the error that what reads the layer adds: a norm whose ε does not scale with its input.
    """

    epsilon: float
    point: float
    value: float
    slope: float
    nonlinearity: float
    rounding: float
    reading: float = 0.0

    @property
    def error(self) -> float:
        """Bound on the error of the handed-on value: absolute, for |x| <= X."""
        return self.nonlinearity + self.rounding + self.reading

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
    reading: Callable[[Regime], float] | None = None,
) -> Regime | None:
    """Return the operating point with the least total error, over all linear parts of the activation.

    Args:
        activation: the activation, or ``None`` for the identity.
        dtype: of the weights and activations.
        input_bound: X, a bound on the magnitude of what enters the layer.
        consumer_peak: largest magnitude in the consumers' weights, which must stay finite when rescaled.
        has_bias: whether the layer has a bias (for a ≠ 0).
        non_negative: whether what enters is known to be zero or more.
        reading: the error of a regime in what reads the layer, in the units of what it hands on; ∞ where that cannot be
            undone there.

    Returns:
        The regime; ``None`` where it needs a bias that the layer does not have, or nothing fits the format's range, or
        no regime can be undone.
    """
    if activation is None or (non_negative and activation.identity_from is not None and activation.identity_from <= 0):
        return Regime(1.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    limit = torch.finfo(dtype).max / 2
    candidates = [
        candidate
        for part in activation.parts
        if part.slope
        for candidate in _operating_points(activation, part, dtype, input_bound, non_negative)
        if (candidate.point == 0 or has_bias)
        and max(1.0, consumer_peak) * abs(candidate.rescale) <= limit
        and abs(candidate.point) + candidate.epsilon * input_bound <= limit
    ]
    if reading is not None:
        candidates = [replace(candidate, reading=reading(candidate)) for candidate in candidates]
        candidates = [candidate for candidate in candidates if math.isfinite(candidate.reading)]
    while candidates:
        least = min(candidate.error for candidate in candidates)
        # Of equally good ones the largest ε: the weights stay in the middle of the format's range.
        best = next(candidate for candidate in candidates if candidate.error <= 1.05 * least)
        if not activation.composite or _holds(activation, best, dtype, input_bound, non_negative):
            return best
        candidates.remove(best)
    return None


def _operating_points(
    activation: Activation, part: LinearPart, dtype: torch.dtype, bound: float, non_negative: bool
) -> Iterator[Regime]:
    """Every (a, ε) worth a look in one linear part."""
    smallest = torch.finfo(dtype).tiny
    if part.regime == "shift":
        # A tail, or a linear side that starts away from 0, weighs the less the larger ε is; else ε = 1 is as good.
        exponents = range(13) if part.tail is not None or part.point else range(1)
        for exponent in exponents:
            epsilon = 2.0**exponent
            reach = 0.0 if non_negative and not part.downward else epsilon * bound
            for distance in [0.0] if part.tail is None else [step / part.tail[1] for step in range(1, 45)]:
                size = _ceil_to_grid(reach + abs(part.point) + distance, dtype)
                point = -size if part.downward else size
                tail = 0.0 if part.tail is None else part.tail[0] * math.exp(-part.tail[1] * distance)
                yield _regime(activation, part, epsilon, point, part.slope * point, tail, dtype, bound)
        return
    point = _near_on_grid(part.point, dtype)
    moved = abs(point - part.point)
    value = part.value + part.slope * (point - part.point) if part.regime == "window" else part.value
    if part.regime == "origin" and moved:
        return
    for exponent in range(8, -120, -1):
        epsilon = 2.0**exponent
        if epsilon * bound > part.above - moved or (not non_negative and epsilon * bound > part.below - moved):
            continue
        if epsilon < smallest:
            break
        error = abs(part.slope) * (part.quadratic * (epsilon * bound) ** 2 + part.cubic * (epsilon * bound) ** 3)
        yield _regime(activation, part, epsilon, point, value, error, dtype, bound)


def _regime(
    activation: Activation,
    part: LinearPart,
    epsilon: float,
    point: float,
    value: float,
    error: float,
    dtype: torch.dtype,
    bound: float,
) -> Regime:
    """The cost of an operating point; ``error`` is that of φ, before it is divided by ε φ'(a)."""
    slope = abs(part.slope)
    unit = unit_roundoff(dtype)
    # The argument εx + a is rounded when a is added; φ is evaluated and stored; what is below the smallest number of
    # the format is lost twice. All of it is divided by ε φ'(a) on the way out.
    argument_error = unit * (abs(point) + epsilon * bound) if point else 0.0
    peak = abs(value) + slope * epsilon * bound + error
    absolute = argument_error * slope + evaluation_roundoffs(activation, dtype) * unit * peak + 2 * _lost(dtype)
    # A slope that is no power of two makes the rescaled weights round once more.
    inexact = 0.0 if math.frexp(slope)[0] == 0.5 else unit * bound
    nonlinearity, rounding = error / (epsilon * slope), absolute / (epsilon * slope) + inexact
    return Regime(epsilon, point, value, part.slope, nonlinearity, rounding)


def evaluation_roundoffs(activation: Activation, dtype: torch.dtype) -> float:
    """How many units of roundoff an evaluation may be off, relative to its value."""
    usual = _EVALUATION_ROUNDOFFS.get(dtype, _EVALUATION_ROUNDOFFS_NARROW)
    if activation.composite:
        return usual * activation.composite
    return usual if activation.roundoffs is None else min(usual, activation.roundoffs)


def _lost(dtype: torch.dtype) -> float:
    """Return the magnitude below which a result may be flushed to zero: float16 keeps its subnormal numbers."""
    info = torch.finfo(dtype)
    return info.smallest_normal * (info.eps if dtype == torch.float16 else 1.0)


def _holds(activation: Activation, regime: Regime, dtype: torch.dtype, bound: float, non_negative: bool) -> bool:
    """Whether the ops that compute a composite keep to the bound in their own dtype: they may cancel or overflow."""
    x = bound * torch.linspace(0.0 if non_negative else -1.0, 1.0, _SAMPLES, dtype=torch.float64)
    x = torch.cat([x, x * 2.0**-8])
    try:
        got = activation.function((regime.epsilon * x + regime.point).to(dtype)).double()
    except Exception:  # no such op for this dtype here: what cannot be tried is not relied on
        return False
    error = ((got - regime.value) * regime.rescale - x).abs().max()
    return bool(error <= regime.error)


def _ceil_to_grid(value: float, dtype: torch.dtype) -> float:
    """The smallest number of few significant bits that is not below ``value``: it is stored without rounding."""
    if value <= 0:
        return 0.0
    mantissa, exponent = math.frexp(value)
    bits = _grid_bits(dtype)
    return math.ldexp(math.ceil(mantissa * 2**bits), exponent - bits)


def _near_on_grid(value: float, dtype: torch.dtype) -> float:
    """The nearest number of few significant bits: it is stored without rounding."""
    mantissa, exponent = math.frexp(value)
    bits = _grid_bits(dtype)
    return math.ldexp(round(mantissa * 2**bits), exponent - bits)


def _grid_bits(dtype: torch.dtype) -> int:
    return 4 if torch.finfo(dtype).eps > 2**-8 else 6
