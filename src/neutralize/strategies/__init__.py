"""Strategies by name. Each is a frozen dataclass that holds only its own numbers."""

from __future__ import annotations

from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any

from neutralize.errors import NeutralizeError
from neutralize.planner import Strategy
from neutralize.strategies.constant import Constant
from neutralize.strategies.damp import Damp
from neutralize.strategies.mean import Mean
from neutralize.strategies.passthrough import Auto, Passthrough
from neutralize.strategies.zero import Zero

STRATEGIES: dict[str, type] = {
    "auto": Auto,
    "passthrough": Passthrough,
    "constant": Constant,
    "zero": Zero,
    "damp": Damp,
    "mean": Mean,
}

__all__ = ["STRATEGIES", "Auto", "Constant", "Damp", "Mean", "Passthrough", "Zero", "resolve"]


def resolve(strategy: str | Strategy, options: dict[str, Any]) -> Strategy:
    """Return the strategy object for a name and its parameters.

    Args:
        strategy: a name in ``STRATEGIES``, or a strategy object, which takes no options.
        options: parameters by name.

    Raises:
        NeutralizeError: the name or an option is unknown, or an option is out of range.
    """
    if not isinstance(strategy, str):
        if options:
            raise NeutralizeError(
                f"plan: expected no options beside a strategy object, got {', '.join(options)}; put them into the "
                "object"
            )
        if isinstance(strategy, type) or not hasattr(strategy, "draft"):
            kind_given = f"the class {strategy.__name__}" if isinstance(strategy, type) else type(strategy).__name__
            raise NeutralizeError(
                f"plan: expected a name or a strategy object for strategy, got {kind_given}; "
                f"the names are {', '.join(STRATEGIES)}"
            )
        return strategy
    kind = STRATEGIES.get(strategy)
    if kind is None:
        near = get_close_matches(strategy, STRATEGIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "use one of these"
        raise NeutralizeError(f"plan: expected one of {', '.join(STRATEGIES)} for strategy, got {strategy!r}; {hint}")
    known = [entry.name for entry in fields(kind)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise NeutralizeError(
            f"plan: expected {', '.join(known) or 'no options'} for strategy {strategy!r}, got {', '.join(unknown)}; "
            "leave out what it does not have"
        )
    missing = [entry.name for entry in fields(kind) if entry.default is MISSING and entry.name not in options]
    if missing:
        raise NeutralizeError(
            f"plan: expected {', '.join(missing)} for strategy {strategy!r}, got none; give {missing[0]}="
        )
    made: Strategy = kind(**options)
    return made
