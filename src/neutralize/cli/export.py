"""`neutralize export`: a smaller model, without the blocks that are proven to be off."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neutralize.cli.options import Audit, Json, Quiet, audited, check_alone, complete_layers
from neutralize.cli.printing import print_json, waiting


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub name of a model of transformers.")],
    drop: Annotated[
        list[str],
        typer.Option(
            "--drop",
            metavar="LAYERS",
            help="Blocks that leave: name, glob or slice; repeatable.",
            autocompletion=complete_layers,
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The folder of the smaller model; it must not be there.")
    ],
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="Of the weights; auto is that of the files.")] = "auto",
    audit: Audit = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model without some of its blocks, once they are proven exact and its logits are found equal, bit for bit.

    Exit status: 0, or 2 if the request cannot be carried out; nothing is written then.
    """
    from neutralize.drop import drop as dropped
    from neutralize.drop import free, load_whole

    check_alone("export")
    with audited(audit), waiting("proving", quiet=quiet):
        free(output)  # nobody waits for a proof that cannot be written down
        whole, folder = load_whole(model, dtype)
        smaller = dropped(whole, drop)
        path = smaller.save(output, source=folder)
    if json:
        config = {name: list(values) for name, values in smaller.config.items()}
        print_json({"output": str(path), "layers": smaller.layers, "config": config, "parameters": smaller.parameters})
        return
    print(f"{path}: without {', '.join(smaller.layers)}; {smaller.parameters / 1e6:.1f} M parameters less")
    for name, (old, new) in smaller.config.items():
        print(f"  {name}: {old} -> {new}")
