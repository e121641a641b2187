"""The options that several commands have, with what the shell can complete."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import neutralize

if TYPE_CHECKING:
    from neutralize.checkpoint import Checkpoint


STRATEGIES = ("auto", "passthrough", "zero", "constant", "damp")
"""Those that a command line can give all they need: without ``mean``, which takes batches."""


def _layers_of(checkpoint: Path) -> Iterator[str]:
    """The modules of a checkpoint: of safetensors and of shards as their headers name tensors, without PyTorch."""
    from neutralize.checkpoint.headers import stored_names

    stored = stored_names(checkpoint)
    if stored is None:
        neutralize._load()
        subject = neutralize.Checkpoint(checkpoint)
        # A GGUF file has names of its own, which no option takes: those of its model take seconds.
        stored = list(subject.model.state_dict() if subject.layout.kind.startswith("GGUF") else subject.layout.tensors)
    for tensor in stored:
        parts = tensor.split(".")
        yield from (".".join(parts[:count]) for count in range(1, len(parts)))


def complete_layers(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a layer, one dot further than what is typed."""
    given = [ctx.params.get("checkpoint"), ctx.params.get("model"), *ctx.args]  # the last: not yet parsed to the end
    path = next((each for each in given if each), None)
    try:
        # A name of the hub is not looked up.
        names = {} if path is None or not Path(path).exists() else dict.fromkeys(_layers_of(Path(path)))
    except Exception:  # a shell that waits for an answer cannot be told why there is none
        return []
    depth = incomplete.count(".")
    return [name for name in names if name.startswith(incomplete) and name.count(".") == depth]


def complete_options(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete a parameter of the strategy that is named already."""
    from dataclasses import fields

    neutralize._load()
    kind: Any = neutralize.STRATEGIES.get(ctx.params.get("strategy") or "auto")
    return [f"{entry.name}=" for entry in fields(kind) if entry.name.startswith(incomplete)] if kind else []


CheckpointPath = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A folder, or a .safetensors, .gguf, .pt, .pth or .bin file.")
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        metavar="LAYERS",
        help="Name, glob or slice ('model.layers[20:25]'); repeatable.",
        autocompletion=complete_layers,
    ),
]
StrategyName = Annotated[
    str,
    typer.Option(
        "--strategy",
        metavar="NAME",
        help=f"{', '.join(STRATEGIES[:-1])} or {STRATEGIES[-1]}.",
        autocompletion=lambda: list(STRATEGIES),
    ),
]
StrategyOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="A parameter of the strategy, as factor=0.5; repeatable.",
        autocompletion=complete_options,
    ),
]
Setters = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="EDIT",
        help="Instead of --layers: 'NAME=0', '*.bias*=0.5', 'w[0:4]=identity'; repeatable.",
    ),
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="Instead of --layers: a plan that was saved.")
]
Factory = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:CALLABLE",
        help="Makes the model, where there is no config.json.",
    ),
]
Audit = Annotated[
    Path | None,
    typer.Option("--audit", metavar="FILE", help="Append a line of JSON for all that is written or put back."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a machine.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]


def audited(path: Path | None) -> AbstractContextManager[None]:
    """Append to the file that ``--audit`` names, if it names one."""
    from neutralize.audit import audit

    return nullcontext() if path is None else audit(path)


def check_alone(command: str) -> None:
    """Check that no other process of torchrun runs the same command: what is edited twice is another edit."""
    from neutralize.errors import NeutralizeError

    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1" and "TORCHELASTIC_RUN_ID" in os.environ:
        raise NeutralizeError(
            f"{command}: expected one process, got {count} of torchrun, each of which would write; run it without "
            "torchrun, or from inside one of its processes with TORCHELASTIC_RUN_ID taken out of the environment"
        )


def opened(path: Path, factory: str | None = None) -> Checkpoint:
    """Open a checkpoint, whose model may come out of a module where one works."""
    from neutralize.checkpoint import Checkpoint

    if factory is not None and "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does: a module of one's own lies where one works
    return Checkpoint(path, factory=factory)


def check_strategy(name: str, options: dict[str, Any] | None = None) -> None:
    """Check that a strategy is there and has the parameters that it needs, before a model is waited for.

    Args:
        name: as it was given.
        options: its parameters; ``None``: there is no way to give any.

    Raises:
        NeutralizeError: it is none, takes what no command line gives, or its parameters are others.
    """
    from dataclasses import MISSING, fields

    from neutralize.errors import NeutralizeError
    from neutralize.strategies import STRATEGIES as KINDS
    from neutralize.strategies import resolve

    kind: Any = KINDS.get(name)
    known = fields(kind) if kind else ()
    missing = [entry.name for entry in known if entry.default is MISSING and entry.name not in (options or {})]
    if options and not {entry.name for entry in known}.issuperset(options):
        missing = []  # an option that it does not have is told first
    if missing and options is not None and name in STRATEGIES:
        raise NeutralizeError(f"plan: expected --option {missing[0]}=VALUE for strategy {name!r}, got none; give it")
    if missing:
        raise NeutralizeError(
            f"plan: expected a strategy that needs nothing more for --strategy, got {name!r}, which needs "
            f"{missing[0]}; give that in Python"
        )
    resolve(name, options or {})
