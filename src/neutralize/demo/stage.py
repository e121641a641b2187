"""How the demo speaks: headings, tables, proofs and progress, readable in 80 columns and plain where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from neutralize.demo.measure import Harm, Speed
from neutralize.demo.proofs import Proof
from neutralize.plan import Plan
from neutralize.progress import Advance, bar
from neutralize.report import format_bytes, plan_rich


class Stage:
    """Where the demo is shown; it keeps the proofs that were shown on it.

    Attributes:
        console: what is printed on.
        proofs: every proof so far.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.proofs: list[Proof] = []
        self._heading = 0

    def heading(self, title: str) -> None:
        """Begin the next part."""
        self._heading += 1
        self.console.print(Text(f"\n{self._heading}. {title}", style="bold"))

    def say(self, line: str) -> None:
        """Print a line of text; where it is too long, its further lines are indented like the first."""
        self.console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))

    def prove(self, proof: Proof) -> None:
        """Print a proof and keep it."""
        self.proofs.append(proof)
        self._lines(proof)

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Advance]:
        """Show a bar with rate and time left for the length of a ``with`` block, and a line afterwards.

        Args:
            what: what is being done, in a few words.
            total: how many units of work there are.
            unit: what they are.
        """
        started = time.perf_counter()
        hidden = not self.console.is_terminal
        with bar(self.console, lambda speed: f"{format_count(speed, unit)}/s", disable=hidden) as shown:
            task = shown.add_task(what, total=total)
            yield lambda units: shown.advance(task, units)
        seconds = time.perf_counter() - started
        self.say(f"{what}: {format_count(total, unit)} in {seconds:.1f} s ({format_count(total / seconds, unit)}/s)")

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show that something is going on that has no measure; afterwards, and where nobody watches, a line."""
        started = time.perf_counter()
        with self.console.status(f"{what} ..."):
            yield
        self.say(f"{what}: {time.perf_counter() - started:.1f} s")

    def plan(self, plan: Plan) -> None:
        """Show a plan as a table, narrow enough for 80 columns if its names are not very long."""
        table = plan_rich(plan)
        table.box, table.show_edge, table.pad_edge, table.padding = box.SIMPLE, False, False, (0, 1, 0, 0)
        layer, strategy, *_ = table.columns
        layer.no_wrap = strategy.no_wrap = True
        self.console.print(table)

    def harms(self, harms: Sequence[Harm]) -> None:
        """Show what blocks do to the loss, the least harmful one first."""
        table = _table("block off", "loss (nats)", "change", "perplexity", "")
        ranked = sorted(harms, key=lambda harm: harm.delta_loss)
        for harm in ranked:
            remark = {ranked[0].block: "least harmful", ranked[-1].block: "most harmful"}.get(harm.block, "")
            figures = (f"{harm.loss:.4f}", f"{harm.delta_loss:+.4f}", f"{harm.perplexity:,.2f}")
            table.add_row(str(harm.block), *figures, remark)
        self.console.print(table)

    def speeds(self, speeds: Sequence[tuple[str, Speed]]) -> None:
        """Show how fast plans were carried out."""
        table = _table("plan", "written", "rewrite", "GB/s", "apply", "restore")
        for what, speed in speeds:
            times = [format_seconds(seconds) for seconds in (speed.rewrite_s, speed.apply_s, speed.restore_s)]
            bandwidth = f"{speed.rewrite_gb_per_s:.1f}"
            table.add_row(what, format_bytes(speed.written_bytes), times[0], bandwidth, *times[1:])
        self.console.print(table)

    def close(self) -> bool:
        """Say how many proofs hold and name those that failed; return whether all hold."""
        for proof in self.failed:
            self._lines(proof)
        self.console.print(f"[bold]{self.verdict}[/bold]")
        return not self.failed

    @property
    def failed(self) -> list[Proof]:
        """Those that do not hold."""
        return [proof for proof in self.proofs if not proof.holds]

    @property
    def verdict(self) -> str:
        """How many of the proofs hold."""
        return f"{sum(proof.holds for proof in self.proofs)} of {len(self.proofs)} proofs hold."

    def _lines(self, proof: Proof) -> None:
        """Print a proof, with its further lines indented."""
        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_row(f"  {proof.verdict}:", proof.statement, style="green" if proof.holds else "bold red")
        self.console.print(line)


def format_count(count: float, unit: str) -> str:
    """Return a count with its unit; bytes get a decimal prefix."""
    if unit == "bytes":
        return format_bytes(count)
    return f"{count:,.0f} {unit}" if count >= 10 or count == int(count) else f"{count:.1f} {unit}"


def format_seconds(seconds: float) -> str:
    """Return a short time: ``"1.23 ms"``."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _table(label: str, *headings: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column(label)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
