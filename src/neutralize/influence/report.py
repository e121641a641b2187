"""A sweep as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neutralize.report import as_text, format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from neutralize.influence.sweep import Sweep


def sweep_table(sweep: Sweep) -> str:
    """A sweep as text: the table, the steps of the search, and the time it took."""
    text = as_text(sweep_rich(sweep))
    if sweep.steps or sweep.budget is not None:
        text += as_text(steps_rich(sweep))
    return text + f"{timing(sweep)}\n"


def sweep_rich(sweep: Sweep) -> Table:
    """The layers as a rich table, the least harmful first."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"loss of the intact model: {sweep.loss:.4f}", box=box.SIMPLE, title_justify="left")
    table.add_column("layer off", overflow="fold")
    for heading in ("loss", "change", "KL", "1 - cos", "written"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in sweep.ranked:
        table.add_row(
            Text(entry.layer),
            f"{entry.loss:.4f}",
            f"{entry.delta_loss:+.4f}",
            _figure(entry.kl),
            _figure(entry.block_influence),
            format_bytes(entry.bytes_written),
        )
    return table


def steps_rich(sweep: Sweep) -> Table:
    """The steps of the greedy search as a rich table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    within = "" if sweep.budget is None else f", at most {sweep.budget:g} more loss"
    table = Table(title=f"greedy search{within}: {len(sweep.steps)} off", box=box.SIMPLE, title_justify="left")
    table.add_column("layer off as well", overflow="fold")
    for heading in ("loss", "change", "KL", "tried"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in sweep.steps:
        table.add_row(
            Text(step.layer), f"{step.loss:.4f}", f"{step.delta_loss:+.4f}", _figure(step.kl), str(step.tried)
        )
    return table


def timing(sweep: Sweep) -> str:
    """Say what the time went into."""
    from_log = f", {sweep.resumed} of the evaluations from the log" if sweep.resumed else ""
    return (
        f"evaluating {sweep.evaluating_s:.1f} s; rewriting and restoring {sweep.rewriting_s:.3f} s "
        f"({sweep.overhead:.2%} of it){from_log}"
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{round(value, 4) + 0.0:.4f}"  # no minus before a zero
