"""The command `neutralize`. Each command imports what it needs when it runs, so that `--help` is quick."""

from collections.abc import Callable
from typing import Annotated

import typer

import neutralize
from neutralize.cli.checkpoint import apply, plan, restore, status, verify
from neutralize.cli.export import export
from neutralize.cli.influence import influence
from neutralize.cli.inspection import inspect
from neutralize.cli.machine import bench, demo, doctor
from neutralize.cli.voice import NAME, Command, Group

EXAMPLES: dict[Callable[..., None], tuple[str, ...]] = {
    inspect: (
        "neutralize inspect ./llama",
        "neutralize inspect ./llama --layers 'model.layers[3]'",
        "neutralize inspect model.gguf --match '*norm*'",
    ),
    plan: (
        "neutralize plan ./llama --layers 'model.layers[20:25]'",
        "neutralize plan ./llama --layers '*.mlp' --strategy damp --option factor=0.5",
        "neutralize plan ./llama --layers 'model.layers[3]' --save plan.json",
    ),
    apply: (
        "neutralize apply ./llama --layers 'model.layers[20:25]' --in-place",
        "neutralize apply ./llama --plan plan.json --output ./llama-off",
        "neutralize apply model.gguf --set 'blk.3.ffn_down.weight=0' --output new.gguf",
    ),
    restore: (
        "neutralize restore ./llama",
        "neutralize restore ./llama --all --audit audit.jsonl",
    ),
    status: ("neutralize status ./llama", "neutralize status ./llama --quick --json"),
    verify: (
        "neutralize verify ./llama --layers 'model.layers[3]'",
        "neutralize verify ./llama --plan plan.json --applied",
    ),
    influence: (
        "neutralize influence --k 3 --among 6",
        "neutralize influence ./llama --log run.jsonl --resume",
        "neutralize influence --job sweeps.toml --quiet",
    ),
    export: ("neutralize export ./llama --drop 'model.layers[20:25]' --output ./llama-27",),
    bench: ("neutralize bench", "neutralize bench --only bfloat16 --seconds 5 --json"),
    doctor: ("neutralize doctor", "neutralize doctor --json"),
    demo: ("neutralize demo", "neutralize demo --quiet"),
}
"""Every command, in the order of the help, with examples of it."""

app = typer.Typer(
    name=NAME,
    cls=Group,
    rich_markup_mode=None,  # plain help: it reads the same in a pipe, without colour and in 80 columns
    epilog="""neutralize inspect ./llama
neutralize plan ./llama --layers 'model.layers[20:25]'
neutralize apply ./llama --layers 'model.layers[20:25]' --in-place
neutralize restore ./llama""",
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version, and exit.")] = False,
    debug: Annotated[  # Group.main takes it out, wherever it stands
        bool, typer.Option("--debug", help="With any command: what is logged, and the traceback of an error.")
    ] = False,
) -> None:
    """Switch layers of PyTorch models off in place, say how exactly they are off, and put every bit back."""
    if version:
        print(neutralize.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


for command, examples in EXAMPLES.items():
    app.command(cls=Command, epilog="\n".join(examples))(command)


def main() -> None:
    """Run the command."""
    app()
