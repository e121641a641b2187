"""The command `neutralize`. Each command imports what it needs when it runs, so that `--help` is quick."""

import sys
from typing import Annotated

import typer

from neutralize.cli import checkpoint
from neutralize.cli.influence import influence

app = typer.Typer(
    name="neutralize",
    help="Switch layers of PyTorch models off in place, say how exactly they are off, and put every bit back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a plain traceback can be pasted into an issue
)


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON, for a machine.")] = False) -> None:
    """Print what was built, what this machine would use, and why not more."""
    from neutralize.doctor import diagnose

    diagnosis = diagnose()
    if json:
        print(diagnosis.to_json())
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for label, text in diagnosis.rows():
            table.add_row(label, text, style="yellow" if label == "why not more" else None)
        Console().print(table)
    else:
        for label, text in diagnosis.rows():
            print(f"{label:<14}{text}")


@app.command()
def demo() -> None:
    """Switch blocks of a trained language model off, prove it, and put them back; exit 1 if a proof fails."""
    from neutralize import demo

    raise typer.Exit(demo.main())


app.command()(influence)
for command in (
    checkpoint.inspect,
    checkpoint.plan,
    checkpoint.apply,
    checkpoint.restore,
    checkpoint.status,
    checkpoint.verify,
):
    app.command()(command)


def main() -> None:
    """Run the command."""
    app()
