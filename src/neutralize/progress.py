"""Progress: how work tells that it moves on, and the bar that shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Advance: TypeAlias = Callable[[float], None]
"""Told how many units of work were just done."""


def silent(units: float) -> None:
    """Tell nobody."""


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; a process without one, as a service may be, has none."""
    return stream is not None and stream.isatty()


def bar(console: Console, rate: Callable[[float], str], *, disable: bool = False) -> Progress:
    """Return a rich bar with rate and time left that vanishes when it ends.

    Args:
        console: what it is drawn on.
        rate: says how many units per second.
        disable: draw nothing.
    """
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Units per second, once there is a rate."""

        def render(self, task: Task) -> Text:
            """Return the rate as text."""
            return Text("" if task.speed is None else rate(task.speed))

    columns = (TextColumn("  {task.description}"), BarColumn(24), Rate(), TimeRemainingColumn())
    # The rate is that of the last ten minutes: a step may take longer than rich's half a minute. What is printed
    # meanwhile is shown above the bar, but only if it goes to a terminal: else it would go where the bar goes.
    return Progress(
        *columns,
        console=console,
        transient=True,
        disable=disable,
        speed_estimate_period=600,
        redirect_stdout=is_terminal(sys.stdout),
    )
