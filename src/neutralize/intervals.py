"""Taylor coefficients of a function over many intervals at once, with bounds that hold: interval arithmetic.

A ``Taylor`` goes through a function written in torch like a tensor, and comes out with enclosures of φ, φ', φ''/2 and
φ'''/6 on every interval. Every operation is widened by more than its rounding, so what comes out is proven.

Source: Moore, Kearfott, Cloud, "Introduction to Interval Analysis", SIAM 2009, §9.3 (recurrences for Taylor
coefficients).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

ORDER = 3
_WIDEN = 2.0**-48  # sixteen units in the last place: vectorised functions of float64 are good to one or two
_LEAST = 1e-300


class Interval:
    """Closed intervals, elementwise: ``low <= value <= high``."""

    def __init__(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Widen the ends by more than the rounding that they carry."""
        self.low = low - low.abs() * _WIDEN - _LEAST
        self.high = high + high.abs() * _WIDEN + _LEAST

    def __add__(self, other: Interval) -> Interval:
        """Return the interval of the sums."""
        return Interval(self.low + other.low, self.high + other.high)

    def __neg__(self) -> Interval:
        """Return the interval of the negatives."""
        return Interval(-self.high, -self.low)

    def __mul__(self, other: Interval) -> Interval:
        """Return the interval of the products; one that is not known contains everything."""
        ends = torch.stack([one * two for one in (self.low, self.high) for two in (other.low, other.high)])
        low, high = ends.amin(0), ends.amax(0)
        unknown = ends.isnan().any(0)
        return Interval(low.masked_fill(unknown, -math.inf), high.masked_fill(unknown, math.inf))

    def reciprocal(self) -> Interval:
        """Return the interval of the reciprocals; everything where 0 is inside."""
        through_zero = (self.low <= 0) & (self.high >= 0)
        low, high = 1 / self.high, 1 / self.low
        return Interval(low.masked_fill(through_zero, -math.inf), high.masked_fill(through_zero, math.inf))

    def mapped(self, increasing: Callable[[torch.Tensor], torch.Tensor]) -> Interval:
        """Return the image under an increasing function; everything where it is not defined."""
        low, high = increasing(self.low), increasing(self.high)
        return Interval(low.nan_to_num(nan=-math.inf), high.nan_to_num(nan=math.inf))

    def times(self, number: float) -> Interval:
        """Return the interval times a number."""
        return self * Interval(torch.full_like(self.low, number), torch.full_like(self.low, number))

    @property
    def magnitude(self) -> torch.Tensor:
        """The largest magnitude inside."""
        return torch.maximum(self.low.abs(), self.high.abs())


Series: TypeAlias = "list[Interval]"


def _product(one: Series, other: Series) -> Series:
    found = []
    for order in range(len(one)):
        terms = [one[place] * other[order - place] for place in range(order + 1)]
        found.append(sum(terms[1:], start=terms[0]))
    return found


def _solved(argument: Series, first: Interval, slope: Callable[[Series, Series], Series]) -> Series:
    """The series of y = f(a) from y' = s(a, y) a': k y_k = Σ i a_i s_{k-i}."""
    found = [first]
    for order in range(1, len(argument)):
        slopes = slope(argument[:order], found)
        terms = [(argument[place] * slopes[order - place]).times(place) for place in range(1, order + 1)]
        found.append(sum(terms[1:], start=terms[0]).times(1 / order))
    return found


def _constant(like: Series, number: float) -> Series:
    zeros = torch.zeros_like(like[0].low)
    return [Interval(zeros + (number if place == 0 else 0.0), zeros + (number if place == 0 else 0.0))
            for place in range(len(like))]  # fmt: skip


def _sum(one: Series, other: Series) -> Series:
    return [left + right for left, right in zip(one, other, strict=True)]


def _scaled(series: Series, number: float) -> Series:
    return [part.times(number) for part in series]


def _plus(series: Series, number: float) -> Series:
    return _sum(series, _constant(series, number))


def _reciprocal(series: Series) -> Series:
    found = [series[0].reciprocal()]
    for order in range(1, len(series)):
        terms = [series[place] * found[order - place] for place in range(1, order + 1)]
        found.append(-(sum(terms[1:], start=terms[0]) * found[0]))
    return found


def _wave(phase: float) -> Callable[[Interval], Interval]:
    """The image under sin(z + phase), by its ends and the crests and troughs between them."""

    def image(part: Interval) -> Interval:
        ends = torch.sin(part.low + phase), torch.sin(part.high + phase)
        low, high = torch.minimum(*ends) - 1e-12, torch.maximum(*ends) + 1e-12

        def passes(crest: float) -> torch.Tensor:
            turns = [(end + phase - crest) / (2 * math.pi) for end in (part.low - 1e-9, part.high + 1e-9)]
            return turns[0].ceil() <= turns[1].floor()

        return Interval(low.masked_fill(passes(-math.pi / 2), -1.0), high.masked_fill(passes(math.pi / 2), 1.0))

    return image


def _sine(series: Series, phase: float = 0.0) -> Series:
    return _solved(series, _wave(phase)(series[0]), lambda a, y: _sine(a, phase + math.pi / 2))


def _exp(series: Series) -> Series:
    return _solved(series, series[0].mapped(torch.exp), lambda a, y: y)


def _erf(series: Series) -> Series:
    def slope(a: Series, y: Series) -> Series:
        return _scaled(_exp(_scaled(_product(a, a), -1.0)), 2 / math.sqrt(math.pi))

    return _solved(series, series[0].mapped(torch.erf), slope)


def _sigmoid(series: Series) -> Series:
    def slope(a: Series, y: Series) -> Series:
        return _product(y, _plus(_scaled(y, -1.0), 1.0))

    return _solved(series, series[0].mapped(torch.sigmoid), slope)


def _tanh(series: Series) -> Series:
    def slope(a: Series, y: Series) -> Series:
        return _plus(_scaled(_product(y, y), -1.0), 1.0)

    return _solved(series, series[0].mapped(torch.tanh), slope)


def _softplus(series: Series, beta: float = 1.0) -> Series:
    inner = _scaled(series, beta)
    first = inner[0].mapped(lambda z: torch.logaddexp(z, torch.zeros_like(z)))
    return _scaled(_solved(inner, first, lambda a, y: _sigmoid(a)), 1 / beta)


_UNARY: dict[str, Callable[[Series], Series]] = {
    "neg": lambda a: _scaled(a, -1.0),
    "square": lambda a: _product(a, a),
    "reciprocal": _reciprocal,
    "exp": _exp,
    "expm1": lambda a: _solved(a, a[0].mapped(torch.expm1), lambda a, y: _exp(a)),
    "log": lambda a: _solved(a, a[0].mapped(torch.log), lambda a, y: _reciprocal(a)),
    "log1p": lambda a: _solved(a, a[0].mapped(torch.log1p), lambda a, y: _reciprocal(_plus(a, 1.0))),
    "sqrt": lambda a: _solved(a, a[0].mapped(torch.sqrt), lambda a, y: _reciprocal(_scaled(y, 2.0))),
    "sin": _sine,
    "cos": lambda a: _sine(a, math.pi / 2),
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "atan": lambda a: _solved(a, a[0].mapped(torch.atan), lambda a, y: _reciprocal(_plus(_product(a, a), 1.0))),
    "erf": _erf,
    "silu": lambda a: _product(a, _sigmoid(a)),
    "mish": lambda a: _product(a, _tanh(_softplus(a))),
}


class Taylor:
    """Enclosures of the first Taylor coefficients of what has been computed so far, on many intervals."""

    def __init__(self, series: Series) -> None:
        """Hold a series: the function, its derivative, half its second derivative, a sixth of its third."""
        self.series = series

    @classmethod
    def variable(cls, low: torch.Tensor, high: torch.Tensor) -> Taylor:
        """Return the variable itself, on the given intervals."""
        zeros = torch.zeros_like(low)
        return cls([Interval(low, high), Interval(zeros + 1, zeros + 1)] + [Interval(zeros, zeros)] * (ORDER - 1))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute a torch function of a Taylor; raise ``NotImplementedError`` where there is no rule for it."""
        return cls._called(getattr(func, "__name__", str(func)), args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        """Return a method of a tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self._called(name, (self, *args), kwargs)

    @classmethod
    def _called(cls, name: str, args: Any, kwargs: Any) -> Taylor:
        name, kwargs = functional_call(name, kwargs)
        if name in _UNARY and len(args) == 1 and not kwargs:
            return cls(_UNARY[name](args[0].series))
        if name == "softplus":
            return cls(_softplus(args[0].series, float(kwargs.get("beta", args[1] if len(args) > 1 else 1.0))))
        if name == "gelu" and (kwargs or len(args) > 1) in (False, {"approximate": "none"}):
            half: Taylor = args[0] * 0.5
            return half * (cls(_erf(_scaled(args[0].series, math.sqrt(0.5)))) + 1.0)
        if name in _BINARY and len(args) == 2 and not kwargs:
            found: Taylor = _BINARY[name](*(arg if isinstance(arg, cls) else as_number(arg) for arg in args))
            return found
        raise NotImplementedError(f"no rule for {name}")

    def __add__(self, other: Any) -> Taylor:
        """Return the sum with a Taylor or a number."""
        if isinstance(other, Taylor):
            return Taylor(_sum(self.series, other.series))
        return Taylor(_plus(self.series, as_number(other)))

    def __mul__(self, other: Any) -> Taylor:
        """Return the product with a Taylor or a number."""
        if isinstance(other, Taylor):
            return Taylor(_product(self.series, other.series))
        return Taylor(_scaled(self.series, as_number(other)))

    def __neg__(self) -> Taylor:
        """Return the negative."""
        return self * -1.0

    def __sub__(self, other: Any) -> Taylor:
        """Return the difference."""
        return self.__add__(-other)

    def __rsub__(self, other: Any) -> Taylor:
        """Return the difference from a number."""
        return self.__neg__().__add__(other)

    def __truediv__(self, other: Any) -> Taylor:
        """Return the quotient."""
        return self * (Taylor(_reciprocal(other.series)) if isinstance(other, Taylor) else 1.0 / as_number(other))

    def __rtruediv__(self, other: Any) -> Taylor:
        """Return a number divided by this."""
        return Taylor(_reciprocal(self.series)).__mul__(other)

    def __pow__(self, exponent: Any) -> Taylor:
        """Return an integer power of 1 to 8."""
        if as_number(exponent) not in range(1, 9):
            raise NotImplementedError(f"no rule for the power {exponent}")
        found: Taylor = self
        for _ in range(int(exponent) - 1):
            found = found * self
        return found

    __radd__, __rmul__ = __add__, __mul__


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("add", "radd"), lambda one, other: one + other),
    **dict.fromkeys(("mul", "multiply", "rmul"), lambda one, other: one * other),
    **dict.fromkeys(("sub", "subtract"), lambda one, other: one - other),
    **dict.fromkeys(("div", "divide", "true_divide"), lambda one, other: one / other),
    "pow": lambda one, other: one**other,
}


def functional_call(name: str, kwargs: Any) -> tuple[str, dict[str, Any]]:
    """Return the plain name of a function and its keywords; raise NotImplementedError for one that works in place."""
    if (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace"):
        raise NotImplementedError(f"no rule for {name} in place")
    return name.strip("_"), {key: value for key, value in kwargs.items() if key != "inplace"}


def as_number(value: Any) -> float:
    """Return a number, or the one number that a tensor holds; raise ``NotImplementedError`` for all else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NotImplementedError(f"no rule for a {type(value).__name__}")
    return float(value)


def coefficients(function: Callable[[Any], Any], low: float, high: float, pieces: int = 4096) -> list[float] | None:
    """Bounds on |φ|, |φ'|, |φ''| / 2 and |φ'''| / 6 over [low, high], or ``None`` where a rule is missing.

    Args:
        function: written in torch, elementwise.
        low: the lower end.
        high: the upper end.
        pieces: into how many it is divided: the bounds come the closer, the more there are.
    """
    ends = torch.linspace(low, high, pieces + 1, dtype=torch.float64)
    try:
        found = function(Taylor.variable(ends[:-1], ends[1:]))
    except Exception:  # whatever a function does with what is no tensor: then nothing is proven about it
        return None
    if not isinstance(found, Taylor):
        return None
    bounds = [float(part.magnitude.max()) for part in found.series]
    return bounds if all(map(math.isfinite, bounds)) else None
