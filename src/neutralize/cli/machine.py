"""`neutralize doctor | demo | bench`: what this machine has, shows and does."""

from __future__ import annotations

import os
from json import loads
from typing import Annotated

import typer

from neutralize.cli.options import Json, Quiet
from neutralize.cli.printing import is_terminal, print_json, print_table, print_text


def doctor(json: Json = False, quiet: Quiet = False) -> None:
    """Print what was built, what this machine would use, and why not more."""
    from neutralize.doctor import diagnose

    diagnosis = diagnose()
    if json:
        print_json(loads(diagnosis.to_json()))
    elif not is_terminal():
        for label, text in diagnosis.rows():
            print(f"{label:<14}{text}")
    else:
        from rich.table import Table

        table = Table(show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for label, text in diagnosis.rows():
            table.add_row(label, text, style="yellow" if label == "why not more" else None)
        print_table(table)


def demo(json: Json = False, quiet: Quiet = False) -> None:
    """Switch blocks of a trained language model off, prove it, and put them back; exit 1 if a proof fails.

    With --json the show is on standard error; with --quiet there is none but for proofs that fail and the verdict.
    """
    from rich.console import Console

    from neutralize import demo

    raise typer.Exit(demo.main(console=Console(highlight=False, stderr=json, quiet=quiet), json=json))


def bench(
    only: Annotated[str, typer.Option(metavar="TEXT", help="Only cases in whose name this occurs.")] = "",
    seconds: Annotated[float, typer.Option(metavar="SECONDS", help="Time spent on each case.", min=0.01)] = 1.0,
    most: Annotated[int, typer.Option(metavar="MIB", help="Size of the largest tensor.", min=1)] = 256,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time the ops of this library against those of PyTorch on this machine's CPU, after both gave the same bits.

    Both sides are timed in turn, on the same tensors and as many threads; a ratio above 1 says that this library is
    quicker. The limit is what the C library's memset or memmove does with the same memory: other work on the machine
    slows all of them.
    """
    from dataclasses import asdict

    from neutralize.bench import cases, machine, results_rich, run
    from neutralize.cli.printing import counted
    from neutralize.errors import NeutralizeError

    chosen = {name: make for name, make in cases(most).items() if only in name}
    if not chosen:
        raise NeutralizeError(
            f"bench: expected a part of a case's name for --only, got {only!r}; the cases are {', '.join(cases(most))}"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    if 4 * most > memory:
        raise NeutralizeError(
            f"bench: expected at most {memory // 4} for --most, a quarter of this machine's memory, got {most}; give "
            "less"
        )
    results = []
    with counted("timing", len(chosen), "cases", quiet=quiet) as advance:
        for name, make in chosen.items():  # made when its turn comes, so that one large tensor lives at a time
            results.append(run(name, make(), seconds))
            advance(1)
    if json:
        print_json({"machine": machine(), "results": [asdict(result) for result in results]})
        return
    print_text(", ".join(f"{name} {value}" for name, value in machine().items()))
    print_table(results_rich(results))
