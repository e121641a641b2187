"""The one exception of this library, and the check that needs it most."""

from __future__ import annotations

import math


class NeutralizeError(ValueError):
    """Bad input, or a request that cannot be carried out; nothing has been written when it is raised.

    The message names what was expected, what came, and what to do: ``<op>: expected X for <parameter>, got Y; <what to
        do>``.
    """


def require_finite(where: str, **numbers: float | None) -> None:
    """Check that every number given is a finite one; ``None`` is a number left out.

    Args:
        where: the op, strategy or edit, for the message.
        **numbers: parameter name to value.

    Raises:
        NeutralizeError: a value is no number, NaN or infinite.
    """
    for name, value in numbers.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise NeutralizeError(f"{where}: expected a finite number for {name}, got {value!r}; give one")
