"""The command `neutralize`. Each command imports what it needs when it runs, so that `--help` is quick."""

import sys
from pathlib import Path
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


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A folder or a hub name of a causal language model.")],
    drop: Annotated[list[str], typer.Option("--drop", help="Blocks that leave: name, glob or slice; repeatable.")],
    output: Annotated[Path, typer.Option(help="The folder of the smaller model; it must not be there.")],
    dtype: Annotated[str, typer.Option(help="Of the weights; auto is that of the files.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for a machine.")] = False,
) -> None:
    """Write a model without some of its blocks, once they are proven exact and its logits are found equal, bit for bit.

    Example: neutralize export ./llama --drop 'model.layers[20:25]' --output ./llama-27

    Exit status: 0, or 2 if the request cannot be carried out; nothing is written then.
    """
    from neutralize.cli.printing import print_json
    from neutralize.drop import drop as dropped
    from neutralize.errors import NeutralizeError
    from neutralize.language import load_language_model

    try:
        language = load_language_model(model, dtype=dtype)
        smaller = dropped(language.model, drop)
        path = smaller.save(output, tokenizer=language.tokenizer)
    except NeutralizeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error
    if json:
        config = {name: list(values) for name, values in smaller.config.items()}
        print_json({"output": str(path), "layers": smaller.layers, "config": config, "parameters": smaller.parameters})
        return
    print(f"{path}: without {', '.join(smaller.layers)}; {smaller.parameters / 1e6:.1f} M parameters less")
    for name, (old, new) in smaller.config.items():
        print(f"  {name}: {old} -> {new}")


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
