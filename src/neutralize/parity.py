"""The even and the odd part of a function, followed through the torch operations that compute it.

Every function is an even one plus an odd one, ``φ(x) = e(x) + o(x)``, and ``φ(x) - φ(-x) = 2 o(x)``. A ``Parity`` goes
through a function written in torch like a tensor. Of ``e`` it knows whether it is a constant, of ``o`` whether it is a
multiple of x: if ``o(x) = k x`` comes out, then ``φ(x) - φ(-x) = 2 k x`` is proven for every x where φ is finite.

Source: MATH §3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from neutralize.intervals import as_number, functional_call

_ODD = frozenset("tanh sin tan atan arctan asin sinh asinh erf softsign sign reciprocal tanhshrink hardtanh".split())
_EVEN = frozenset("abs cos cosh square".split())
_SUM_TO_ONE = frozenset(("sigmoid", "hardsigmoid"))  # g(z) + g(-z) = 1
_HALF_LINEAR = frozenset("relu gelu silu hardswish logsigmoid log_sigmoid".split())  # φ(z) - φ(-z) = z
_OTHERS = frozenset("exp expm1 log log1p sqrt rsqrt softplus mish relu6 elu selu erfc".split())
_LEAST = 1e-6  # a smaller multiple may be what rounding left of none


@dataclass(frozen=True)
class Parity:
    """What is known of the two parts of a function of x.

    Attributes:
        even: the constant that the even part is; ``None``: it may be any even function.
        odd: k, where the odd part is k x; ``None``: it may be any odd function.
    """

    even: float | None
    odd: float | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Parity:
        """Return what is known of a torch function of a ``Parity``."""
        return _called(getattr(func, "__name__", str(func)), args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        """Return a method of a tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: _called(name, (self, *args), kwargs)

    def __bool__(self) -> bool:
        """Refuse to be a condition: the branch would hold for one x only."""
        raise NotImplementedError("no rule for a condition")

    def __add__(self, other: Any) -> Parity:
        """Return the sum."""
        other = _parity(other)
        return Parity(_both(self.even, other.even), _both(self.odd, other.odd))

    def __mul__(self, other: Any) -> Parity:
        """Return the product: (e + o)(e' + o') has the even part e e' + o o' and the odd part e o' + o e'."""
        other = _parity(other)
        squared = 0.0 if 0.0 in (self.odd, other.odd) else None
        even = _both(_times(self.even, other.even), squared)
        return Parity(even, _both(_times(self.even, other.odd), _times(self.odd, other.even)))

    def __neg__(self) -> Parity:
        """Return the negative."""
        return self * -1.0

    def __sub__(self, other: Any) -> Parity:
        """Return the difference."""
        return self + _parity(other) * -1.0

    def __rsub__(self, other: Any) -> Parity:
        """Return the difference from a number."""
        return Parity.__add__(self * -1.0, other)

    def __truediv__(self, other: Any) -> Parity:
        """Return the quotient."""
        return self * (_unary("reciprocal", other) if isinstance(other, Parity) else 1.0 / as_number(other))

    def __rtruediv__(self, other: Any) -> Parity:
        """Return a number divided by this."""
        return Parity.__mul__(_unary("reciprocal", self), other)

    def __pow__(self, exponent: Any) -> Parity:
        """Return an integer power."""
        number = as_number(exponent)
        if number < 1 or number != int(number):
            raise NotImplementedError(f"no rule for the power {exponent}")
        found = self
        for _ in range(min(int(number), 9) - 1):
            found = found * self
        return found if number <= 9 else Parity(None, None)

    __radd__, __rmul__ = __add__, __mul__


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("add", "radd"), lambda one, other: _parity(one) + other),
    **dict.fromkeys(("mul", "multiply", "rmul"), lambda one, other: _parity(one) * other),
    **dict.fromkeys(("sub", "subtract"), lambda one, other: _parity(one) - other),
    **dict.fromkeys(("div", "divide", "true_divide"), lambda one, other: _parity(one) / other),
    "pow": lambda one, other: _parity(one) ** other,
}


def odd_gain(function: Callable[[Any], Any]) -> float | None:
    """The g with φ(x) - φ(-x) = g x for every x, where the ops that compute φ prove it; else ``None``.

    Args:
        function: written in torch, elementwise.
    """
    try:
        found = function(Parity(0.0, 1.0))
    except Exception:  # whatever a function does with what is no tensor: then nothing is proven about it
        return None
    if not isinstance(found, Parity) or found.odd is None or not _LEAST < abs(found.odd) < math.inf:
        return None
    return 2.0 * found.odd


def _called(name: str, args: Any, kwargs: Any) -> Parity:
    name, kwargs = functional_call(name, kwargs)
    if name == "gelu" and kwargs.get("approximate") in ("none", "tanh"):  # both forms are z Φ(z), Φ(z) + Φ(-z) = 1
        kwargs = {}
    if name in _BINARY and len(args) == 2 and not kwargs:
        found: Parity = _BINARY[name](*args)
        return found
    if name in ("neg", "negative") and len(args) == 1:
        return -_parity(args[0])
    if name == "hardtanh" and kwargs:
        raise NotImplementedError("no rule for limits")
    if len(args) != 1 or kwargs:
        raise NotImplementedError(f"no rule for {name} with {len(args)} arguments")
    return _unary(name, args[0])


def _unary(name: str, argument: Parity) -> Parity:
    """What is known of an elementwise function of an argument."""
    if name not in _ODD | _EVEN | _SUM_TO_ONE | _HALF_LINEAR | _OTHERS:
        raise NotImplementedError(f"no rule for {name}")
    if argument.odd == 0.0:
        return Parity(None, 0.0)
    if argument.even == 0.0:
        if name in _ODD:
            return Parity(0.0, None)
        if name in _EVEN:
            return Parity(None, 0.0)
        if name in _SUM_TO_ONE:
            return Parity(0.5, None)
        if name in _HALF_LINEAR:
            return Parity(None, _times(argument.odd, 0.5))
    return Parity(None, None)


def _parity(value: Any) -> Parity:
    return value if isinstance(value, Parity) else Parity(as_number(value), 0.0)


def _both(one: float | None, other: float | None) -> float | None:
    """The sum of two parts."""
    return None if one is None or other is None else one + other


def _times(one: float | None, other: float | None) -> float | None:
    """The product of two parts; with 0 it is 0, whatever the other is."""
    if one == 0.0 or other == 0.0:
        return 0.0
    return None if one is None or other is None else one * other
