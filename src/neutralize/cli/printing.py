"""What the commands print in the same way: rich on a terminal, plain text elsewhere, JSON for a machine."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from json import dumps
from typing import TYPE_CHECKING, Any

from neutralize import progress

if TYPE_CHECKING:
    from rich.box import Box
    from rich.progress import Progress
    from rich.table import Table

    from neutralize.progress import Advance


PLAIN_WIDTH = 120
"""Columns of a table that goes into a pipe or a file."""


def print_json(content: dict[str, Any]) -> None:
    """Print an object as a line of JSON, at once."""
    print(dumps(content, allow_nan=False), flush=True)


def command_line() -> str:
    """Return the command that is running, as one would type it."""
    return shlex.join(["neutralize", *sys.argv[1:]])


def printable(text: str) -> str:
    """Return text from a file as it can be shown: what moves the cursor of a terminal or colours it is written out."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def one_line(text: str) -> str:
    """Return text in one line, a list in it too, as it can be shown."""
    return printable(re.sub(r"\s*\n\s*", " ", text.strip()))


def is_terminal() -> bool:
    """Whether standard output is a terminal that can do more than print letters."""
    return progress.is_terminal(sys.stdout) and os.environ.get("TERM") not in ("dumb", "unknown")


def print_text(text: str) -> None:
    """Print a sentence: on a terminal broken between words, elsewhere as one line."""
    from rich.console import Console
    from rich.text import Text

    if is_terminal():
        Console(highlight=False).print(Text(text))
    else:
        print(text, flush=True)


def print_table(table: Table) -> None:
    """Print a table: as wide as the terminal and with its rules, or as plain text."""
    from rich import box
    from rich.console import Console
    from rich.text import Text

    shown = is_terminal()
    table.box = box.SIMPLE_HEAD if shown else _plain()
    table.show_edge, table.pad_edge, table.padding = False, False, (0, 1, 0, 0)
    around, table.title, table.caption = (table.title, table.caption), None, None  # not as narrow as the table
    title, caption = (Text(part) if isinstance(part, str) else part for part in around)
    parts = [part for part in (title, table, caption) if part]
    console = Console(highlight=False, force_terminal=shown, width=None if shown else PLAIN_WIDTH)
    if shown:
        console.print(*parts, sep="\n")
        return
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Text))  # a line with a path in it stays one
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), flush=True)


def _plain() -> Box:
    """Columns under dashes, in ASCII."""
    from rich.box import Box

    blank = "    "
    return Box("\n".join([blank, blank, " -- ", blank, blank, blank, blank, blank]) + "\n", ascii=True)


def text_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table of text that may come from a file.

    Args:
        title: of the table.
        headings: of its columns; one called ``bytes`` is set to the right.
        rows: a cell for each heading.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)))
    for heading in headings:
        said = heading.replace(", ", ",\n") if is_terminal() else heading  # no column is as wide as its heading alone
        table.add_column(said, overflow="fold", justify="right" if heading == "bytes" else "left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


class Moved:
    """Told bytes as they are read and written; shows them on a bar if there is one."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._task = None if bar is None else bar.add_task("planning", total=None)

    def expect(self, total: float) -> None:
        """Say how many bytes there will be in all, so that the time left is known."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def __call__(self, count: float) -> None:
        """Note bytes that were just moved."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=count, description="bytes")


@contextmanager
def moved_bytes(*, quiet: bool) -> Iterator[Moved]:
    """Show bytes, their rate and the time left on standard error while something is done, on a terminal."""
    from rich.console import Console

    from neutralize.progress import bar
    from neutralize.report import format_bytes

    console = Console(stderr=True, highlight=False)
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield Moved(None)
        return
    with bar(console, lambda speed: f"{format_bytes(speed)}/s") as shown:
        yield Moved(shown)


@contextmanager
def counted(what: str, total: int, unit: str, *, quiet: bool) -> Iterator[Advance]:
    """Show on standard error, on a terminal, how much of some work is done, its rate and the time left."""
    from rich.console import Console

    from neutralize.progress import bar, silent

    console = Console(stderr=True, highlight=False)
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield silent
        return
    with bar(console, lambda speed: f"{speed:.1f} {unit}/s") as shown:
        task = shown.add_task(what, total=total)
        yield lambda count: shown.advance(task, count)


@contextmanager
def waiting(what: str, *, quiet: bool) -> Iterator[None]:
    """Show on standard error, on a terminal, that something is going on that has no measure."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    with console.status(f"{what} ..."):
        yield
