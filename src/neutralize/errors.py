"""The one exception of this library, and the check that needs it most."""

from __future__ import annotations

import math
import numbers


class NeutralizeError(ValueError):
    """Bad input, or a request that cannot be carried out; nothing has been written when it is raised.

    The message names what was expected, what came, and what to do:
    ``<op>: expected X for <parameter>, got Y; <what to do>``.
    """


def require_finite(where: str, **values: float) -> None:
    """Check that every number is a finite one that a float holds.

    Args:
        where: the op, strategy or edit, for the message.
        **values: parameter name to value.

    Raises:
        NeutralizeError: a value is no number, NaN or infinite.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not _is_finite(value):
            raise NeutralizeError(f"{where}: expected a finite number for {name}, got {_shown(value)}; give one")


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "an integer of more than 20 digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
