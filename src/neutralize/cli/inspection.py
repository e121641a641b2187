"""`neutralize inspect`: what a checkpoint is made of, and what could be switched off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from neutralize.cli.options import CheckpointPath, Factory, Json, Layers, Quiet, opened
from neutralize.cli.printing import one_line, print_json, print_table, print_text, text_table, waiting

if TYPE_CHECKING:
    from neutralize.anatomy import Anatomy, Entry
    from neutralize.checkpoint import Checkpoint


def inspect(
    checkpoint: CheckpointPath,
    layers: Layers = None,
    match: Annotated[
        str | None, typer.Option("--match", metavar="GLOB", help="Instead of the tree: tensors whose name fits.")
    ] = None,
    strategies: Annotated[
        bool, typer.Option("--strategies/--no-strategies", help="Try what each strategy could do to each layer.")
    ] = True,
    model: Factory = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the tree of a model, and with which certificate each strategy could switch its layers off.

    Layers that are alike are one line, and one of them is analysed. With --layers it is also said why a strategy cannot
    switch them off. Where no model can be built for the files, and with --match, their tensors are listed.
    """
    from neutralize.anatomy import STRATEGIES, anatomy
    from neutralize.errors import NeutralizeError

    if match is not None and layers:
        raise NeutralizeError("inspect: expected --layers or --match, got both; give one of them")
    subject = opened(checkpoint, model)
    if match is not None:
        _print_tensors(subject, match, json=json)
        return
    with waiting("looking at the model", quiet=quiet):
        try:
            built = subject.model
        except NeutralizeError as error:
            if layers or model:
                raise
            reason = one_line(str(error))
        else:
            found = anatomy(built, layers, strategies=tuple(STRATEGIES) if strategies else ())
            reason = ""
    if reason:
        _print_tensors(subject, "*", json=json, no_model=reason)
    elif json:
        about = {"kind": subject.layout.kind, "files": list(subject.layout.files), "stored_bytes": _stored(subject)}
        print_json({**about, **found.to_dict()})
    else:
        _print_tree(subject, found, reasons=bool(layers))


def _print_tree(subject: Checkpoint, found: Anatomy, *, reasons: bool) -> None:
    from neutralize.report import format_bytes

    shown = [pair for entry in found.entries for pair in entry.walk()]
    millions = f"{found.parameters / 1e6:,.1f} M parameters"
    stored = f"{subject.layout.kind}, {format_bytes(_stored(subject))} on disk"
    title = f"{subject.path}: {found.model}, {millions}, {format_bytes(found.bytes)}; {stored}"
    rows = [
        (
            "  " * depth + _label(entry, depth),
            f"{len(entry.names)} x {entry.kind}" if len(entry.names) > 1 else entry.kind,
            "" if entry.widths is None else "{} -> {}".format(*entry.widths),
            ", ".join(part for part in (entry.activation, _skip(entry)) if part),
            format_bytes(entry.bytes * len(entry.names)),
        )
        for depth, entry in shown
    ]
    print_table(text_table(title, ("layer", "what", "widths", "activation, residual", "bytes"), rows))
    if found.not_traced:
        print_text(f"\nno strategy was tried: {one_line(found.not_traced)}")
    tried = [(depth, entry) for depth, entry in shown if entry.abilities]
    if not tried:
        return
    names = [ability.strategy for ability in tried[0][1].abilities]
    abilities = [
        ("  " * depth + _label(entry, depth), *(each.certificate or "-" for each in entry.abilities))
        for depth, entry in tried
    ]
    print()
    print_table(text_table("how exactly each strategy could switch it off", ("layer", *names), abilities))
    if reasons:
        print()
        for entry in found.entries:
            for each in entry.abilities:
                if each.why_not:
                    print_text(f"{entry.name}, {each.strategy}: {one_line(each.why_not)}")


def _stored(subject: Checkpoint) -> int:
    """What the files take: less than the model where they are quantized."""
    return sum((subject.layout.root / file).stat().st_size for file in subject.layout.files)


def _skip(entry: Entry) -> str:
    return {"plain": "residual", "none": "no residual"}.get(entry.residual, entry.residual)


def _label(entry: Entry, depth: int) -> str:
    """The name of an entry; below the first level without those of the modules around it."""
    own = entry.name.split(".")
    parent, numbers = ".".join(own[:-1]), [name.rpartition(".")[2] for name in entry.names]
    prefix = parent if depth == 0 else parent.rpartition(".")[2] if own[-1].isdigit() else ""
    if len(numbers) == 1:
        return f"{prefix}.{own[-1]}".lstrip(".") or "(the model)"
    places = list(map(int, numbers)) if all(map(str.isdigit, numbers)) else []
    step = places[1] - places[0] if places else 0
    if places and places == list(range(places[0], places[-1] + 1, step)):
        return f"{prefix}[{places[0]}:{places[-1] + 1}{f':{step}' if step > 1 else ''}]"
    return f"{prefix}[{', '.join(numbers)}]"


def _print_tensors(subject: Checkpoint, match: str, *, json: bool, no_model: str = "") -> None:
    from fnmatch import fnmatchcase

    from neutralize.checkpoint.setters import unknown_name
    from neutralize.report import format_bytes

    layout = subject.layout
    rows: list[dict[str, Any]] = [
        {
            "name": stored.name,
            "shape": list(stored.shape),
            "encoding": stored.encoding,
            "bytes": sum(region.nbytes for region in stored.regions),
            "file": ", ".join(dict.fromkeys(region.file for region in stored.regions)),
        }
        for name, stored in layout.tensors.items()
        if fnmatchcase(name, match)
    ]
    if not rows and layout.tensors:
        raise unknown_name("inspect", match, layout)
    if json:
        about = {"no_model": no_model} if no_model else {}
        print_json({"kind": layout.kind, "files": list(layout.files), "tensors": rows, **about})
        return
    title = f"{subject.path}: {layout.kind}, {len(rows)} tensors, {format_bytes(sum(row['bytes'] for row in rows))}"
    cells = [
        (r["name"], "x".join(map(str, r["shape"])), r["encoding"], format_bytes(r["bytes"]), r["file"]) for r in rows
    ]
    print_table(text_table(title, ("tensor", "shape", "encoding", "bytes", "file"), cells))
    if no_model:
        print_text(f"\nonly tensors: {no_model}")
