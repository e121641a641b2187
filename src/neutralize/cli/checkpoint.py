"""`neutralize inspect | plan | apply | restore | status | verify`: checkpoints on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neutralize.cli.printing import command_line, print_json, printable

if TYPE_CHECKING:
    from rich.table import Table

    from neutralize.checkpoint import Checkpoint, Status
    from neutralize.checkpoint.journal import Edition
    from neutralize.plan import Plan
    from neutralize.progress import Advance

_Path = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A folder, or a .safetensors, .gguf, .pt, .pth or .bin file.")
]
_Layers = Annotated[
    list[str] | None, typer.Option("--layers", help="Name, glob or slice ('model.layers[20:25]'); repeatable.")
]
_Strategy = Annotated[str, typer.Option(help="auto, passthrough, zero, constant or damp.")]
_Options = Annotated[
    list[str] | None, typer.Option("--option", help="A parameter of the strategy, as factor=0.5; repeatable.")
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Instead of --layers: 'NAME=0', '*.bias*=0.5', 'w[0:4]=identity'; repeatable."),
]
_PlanFile = Annotated[Path | None, typer.Option("--plan", help="Instead of --layers: a plan that was saved.")]
_Model = Annotated[
    str | None,
    typer.Option("--model", help="package.module:callable that makes the model, where there is no config.json."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a machine.")]
_Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]


def inspect(
    checkpoint: _Path,
    match: Annotated[str, typer.Option("--match", help="Only tensors whose name fits this glob.")] = "*",
    json: _Json = False,
) -> None:
    """Show the tensors of a checkpoint: shape, encoding, bytes and file."""
    from fnmatch import fnmatchcase

    with _refusals():
        opened = _opened(checkpoint)
        shown = [stored for name, stored in opened.layout.tensors.items() if fnmatchcase(name, match)]
        rows: list[dict[str, Any]] = [
            {
                "name": stored.name,
                "shape": list(stored.shape),
                "encoding": stored.encoding,
                "bytes": sum(region.nbytes for region in stored.regions),
                "file": ", ".join(dict.fromkeys(region.file for region in stored.regions)),
            }
            for stored in shown
        ]
        if json:
            print_json({"kind": opened.layout.kind, "files": list(opened.layout.files), "tensors": rows})
            return
        from neutralize.report import format_bytes

        total = format_bytes(sum(row["bytes"] for row in rows))
        title = f"{checkpoint}: {opened.layout.kind}, {len(rows)} tensors, {total}"
        _print_table(
            title,
            ("tensor", "shape", "encoding", "bytes", "file"),
            [
                (r["name"], "x".join(map(str, r["shape"])), r["encoding"], format_bytes(r["bytes"]), r["file"])
                for r in rows
            ],
        )


def plan(
    checkpoint: _Path,
    layers: _Layers = None,
    strategy: _Strategy = "auto",
    option: _Options = None,
    model: _Model = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan to this file, for apply --plan.")] = None,
    json: _Json = False,
) -> None:
    """Work out what to write so that layers are off; nothing is written.

    Example: neutralize plan ./llama --layers 'model.layers[20:25]' --save plan.json
    """
    with _refusals():
        made = _planned(_opened(checkpoint, model), layers, strategy, option)
        if save is not None:
            save.write_text(made.to_json() + "\n", encoding="utf-8")
        _print_plan(made, json=json)


def apply(
    checkpoint: _Path,
    layers: _Layers = None,
    set_: _Set = None,
    plan_file: _PlanFile = None,
    strategy: _Strategy = "auto",
    option: _Options = None,
    digest: Annotated[str | None, typer.Option(help="Refuse a plan whose SHA-256 does not begin with this.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Edit the files themselves, with undo.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write an edited copy to this path.")] = None,
    link: Annotated[
        bool, typer.Option("--link", help="With --output: hard links to files that do not change.")
    ] = False,
    verify_copy: Annotated[
        bool, typer.Option("--verify-copy", help="With --output: compare the SHA-256 of every untouched tensor.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False,
    model: _Model = None,
    json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Switch layers of a checkpoint off, or edit its tensors by name: in place with undo, or in a copy.

    Examples: neutralize apply ./llama --layers 'model.layers[20:25]' --in-place
    neutralize apply model.gguf --set 'blk.3.ffn_down.weight=0' --output edited.gguf
    """
    from neutralize.checkpoint.patch import written_bytes
    from neutralize.checkpoint.setters import parse_setters
    from neutralize.errors import NeutralizeError
    from neutralize.plan import Plan

    with _refusals(), _bar(quiet=quiet) as advance:
        copy_options = [name for name, given in (("--link", link), ("--verify-copy", verify_copy)) if given]
        _check_target(
            layers, set_, plan_file, in_place=in_place, output=output, dry_run=dry_run, copy_options=copy_options
        )
        _check_strategy(layers, strategy, option)
        opened = _opened(checkpoint, model)
        if in_place and not dry_run:
            for edition in opened.recover(advance):
                print(f"rolled back edit {edition.number}, which was cut off", file=sys.stderr)
        content = parse_setters(set_, opened.layout) if set_ else _plan_of(opened, layers, plan_file, strategy, option)
        found = content.digest if isinstance(content, Plan) else Plan("set", tuple(content), ()).digest
        if digest is not None and not (digest and found.startswith(digest.lower())):
            raise NeutralizeError(
                f"apply: expected a plan with the digest {digest!r}, got {found}; plan again, or give its digest"
            )
        if not json:
            if isinstance(content, Plan):
                _print_plan(content, json=False)
            else:
                _print_table("edits", ("tensor", "edit"), [(edit.parameter, edit.describe()) for edit in content])
        summary: dict[str, Any] = {"checkpoint": str(checkpoint), "digest": found}
        if dry_run:
            patches = opened.patches(content)
            files = {region.file for patch in patches for region in patch.regions}
            summary |= {"bytes": written_bytes(patches), "files": sorted(files), "state": "untouched"}
        elif output is not None:
            written = opened.write(content, output, link=link, verify=verify_copy, advance=advance)
            summary |= {"bytes": written.written_bytes, "files": list(written.files), "state": "written"}
            summary |= {"output": str(written.path), "verified_tensors": written.verified}
        else:
            undo = opened.apply(content, digest=found, about="; ".join(set_ or ()), advance=advance)
            edition = undo.edition
            summary |= {"bytes": edition.nbytes, "files": sorted(edition.files), "state": "edited"}
            summary |= {"edit": edition.number, "undo": str(edition.path)}
        print_json(summary) if json else print(_applied(summary))


def restore(
    checkpoint: _Path,
    everything: Annotated[bool, typer.Option("--all", help="Undo every edit, not only the last one.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also where something else has written since.")] = False,
    json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Put every byte back: of an edit that was cut off, else of the last edit.

    What a killed run has left beside the files is removed; so is a copy (the path of --output) that was cut off.
    """
    from neutralize.checkpoint.output import discard

    with _refusals(), _bar(quiet=quiet) as advance:
        removed = [] if checkpoint.exists() else discard(checkpoint)
        state, left = "absent", 0
        undone: list[Any] = []
        if not removed:
            opened = _opened(checkpoint)
            removed = [str(path) for path in opened.status.leftovers]
            undone = opened.restore(everything=everything, force=force, advance=advance)
            found = opened.status
            state, left = found.state, len(found.edits)
        if json:
            print_json(
                {"undone": [_edition(entry) for entry in undone], "removed": removed, "state": state, "left": left}
            )
            return
        for entry in undone:
            print(f"undone: {_described(entry)}")
        for path in removed:
            print(f"removed: {path}")
        print(f"{checkpoint}: {state}{f', {left} edit(s) left' if left else ''}")


def status(
    checkpoint: _Path,
    quick: Annotated[bool, typer.Option("--quick", help="Only what the journal says; read no weights.")] = False,
    json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Say whether a checkpoint is intact, edited, changed, interrupted or busy, and list the edits that can be undone.

    The bytes of every edit are compared with what it wrote. Exit status: 0, or 1 if something else has written there
    since, or an edit was cut off or is going on: the files are then not what the edits made of them.
    """
    with _refusals(), _bar(quiet=quiet or json) as advance:
        opened = _opened(checkpoint)
        found = opened.status if quick else opened.check(advance)
        if json:
            told = {"undone": found.undone, "changed": found.changed, "leftovers": [*map(str, found.leftovers)]}
            print_json({"state": found.state, "edits": [_edition(entry) for entry in found.edits], **told})
        else:
            print(f"{checkpoint}: {found.state}")
            for entry in found.edits:
                print(f"  {_described(entry)}{_remark(entry, found)}")
            for path in found.leftovers:
                print(f"  {path}: left by a run that was killed; neutralize restore removes it")
        if found.state in ("changed", "interrupted", "busy"):
            raise typer.Exit(1)


def _remark(entry: Edition, found: Status) -> str:
    if not entry.is_done:
        return " - CUT OFF: run neutralize restore"
    if entry.number in found.undone:
        return " - NOT THERE: the old bytes are back, as if the file had been replaced; restore forgets the edit"
    if entry.number in found.changed:
        return " - CHANGED: something else has written there since; restore refuses, but for --force"
    return ""


def verify(
    checkpoint: _Path,
    layers: _Layers = None,
    plan_file: _PlanFile = None,
    strategy: _Strategy = "auto",
    option: _Options = None,
    applied: Annotated[bool, typer.Option("--applied", help="The files hold the plan already.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write what was found as one HTML page to this file.")] = None,
    model: _Model = None,
    json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Run the model from its files, two tensors in memory at a time, with the layers off and with them cut out.

    Exit status: 0 if every certificate holds, 1 if one does not, 2 if the request cannot be carried out.
    """
    from neutralize.errors import NeutralizeError
    from neutralize.pages.page import check_target

    with _refusals(), _bar(quiet=quiet) as advance:
        if bool(layers) == bool(plan_file):
            raise NeutralizeError("verify: expected --layers or --plan, got none or both; give one of them")
        if report is not None:
            check_target(report)
        _check_strategy(layers, strategy, option)
        opened = _opened(checkpoint, model)
        made = _plan_of(opened, layers, plan_file, strategy, option)
        found = opened.verify(made, applied=applied, detailed=report is not None, advance=advance)
        if json:
            measured = found.measured
            print_json(
                {
                    "ok": found.ok,
                    "exact": measured.exact,
                    "relative_error": measured.relative_error,
                    "per_layer": {name: error if error == error else None for name, error in found.per_layer.items()},
                    "read_bytes": found.read_bytes,
                    "peak_bytes": found.peak_bytes,
                }
            )
        else:
            print(found, end="", flush=True)
        if report is not None:
            found.to_html(report, title=checkpoint.resolve().name, command=command_line())
        if not found.ok:
            raise typer.Exit(1)


# ---- what the commands share -----------------------------------------------------------------------------------------


@contextmanager
def _refusals() -> Iterator[None]:
    """Print a refusal as a line on standard error, and exit with 2."""
    from neutralize.errors import NeutralizeError

    try:
        yield
    except NeutralizeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error
    except BrokenPipeError:  # the reader of the output has seen enough
        raise
    except OSError as error:
        about = f" for {error.filename!r}" if error.filename else ""
        print(f"neutralize: expected paths that can be used, got {error.strerror}{about}; check them", file=sys.stderr)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        print("interrupted: neutralize status says what was done", file=sys.stderr)
        raise typer.Exit(130) from None


def _opened(path: Path, factory: str | None = None) -> Checkpoint:
    from neutralize.checkpoint import Checkpoint

    if factory is not None and "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does: a module of one's own lies where one works
    return Checkpoint(path, factory=factory)


def _check_target(
    layers: list[str] | None,
    setters: list[str] | None,
    plan_file: Path | None,
    *,
    in_place: bool,
    output: Path | None,
    dry_run: bool,
    copy_options: list[str],
) -> None:
    from neutralize.errors import NeutralizeError

    if sum(map(bool, (layers, setters, plan_file))) != 1:
        raise NeutralizeError(
            "apply: expected one of --layers, --set and --plan, got none or several; give one of them"
        )
    if output is None and copy_options:
        raise NeutralizeError(f"apply: expected --output beside {' and '.join(copy_options)}, got none; name it")
    if in_place and output is not None:
        raise NeutralizeError("apply: expected --in-place or --output, got both; give one of them")
    if not in_place and output is None and not dry_run:
        raise NeutralizeError(
            "apply: expected --in-place (edit the files, with undo) or --output (edit a copy), got neither; give "
            "one of "
            "them, or --dry-run"
        )


def _check_strategy(layers: list[str] | None, strategy: str, options: list[str] | None) -> None:
    from neutralize.errors import NeutralizeError

    if not layers and (strategy != "auto" or options):
        raise NeutralizeError(
            "neutralize: expected --strategy and --option beside --layers, got them beside what is planned already; "
            "leave them out"
        )


def _plan_of(
    opened: Checkpoint, layers: list[str] | None, plan_file: Path | None, strategy: str, options: list[str] | None
) -> Plan:
    """The plan in a file, or one made for layers."""
    from neutralize.errors import NeutralizeError
    from neutralize.plan import Plan

    if plan_file is None:
        return _planned(opened, layers, strategy, options)
    try:
        text = plan_file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise NeutralizeError(f"apply: expected a plan in {str(plan_file)!r}, got {error}; check the path") from error
    return Plan.from_json(text)


def _planned(opened: Checkpoint, layers: list[str] | None, strategy: str, options: list[str] | None) -> Plan:
    from neutralize.errors import NeutralizeError
    from neutralize.planner import plan

    if not layers:
        raise NeutralizeError("plan: expected --layers, got none; name some, as --layers 'model.layers[20:25]'")
    return plan(opened, layers, strategy, **_parsed(options))


def _parsed(options: list[str] | None) -> dict[str, Any]:
    """The parameters of a strategy: JSON values, or text."""
    import json

    from neutralize.errors import NeutralizeError

    found: dict[str, Any] = {}
    for text in options or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise NeutralizeError(f"plan: expected NAME=VALUE for --option, got {text!r}; write for example factor=0.5")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _applied(summary: dict[str, Any]) -> str:
    from neutralize.report import format_bytes

    what = f"{format_bytes(summary['bytes'])} in {len(summary['files'])} file(s)"
    if summary["state"] == "untouched":
        return f"dry run: would write {what}; nothing was written"
    if summary["state"] == "written":
        checked = f", {summary['verified_tensors']} untouched tensors compared" if summary["verified_tensors"] else ""
        return f"written: {summary['output']}, with {what} changed{checked}"
    return f"edited in place: {what}; `neutralize restore {summary['checkpoint']}` puts every byte back"


def _edition(entry: Any) -> dict[str, Any]:
    return {
        "number": entry.number,
        "about": entry.about,
        "digest": entry.digest,
        "when": entry.when,
        "bytes": entry.nbytes,
        "files": list(entry.files),
        "whole": entry.is_done,
    }


def _described(entry: Any) -> str:
    from neutralize.report import format_bytes

    size = format_bytes(entry.nbytes)
    return f"edit {entry.number} of {entry.when}: {printable(entry.about) or 'edit'} ({size}, plan {entry.digest[:12]})"


def _print_plan(made: Plan, *, json: bool) -> None:
    if json:
        print_json({**loads(made.to_json()), "planning_s": made.planning_s})
    elif sys.stdout.isatty():
        from rich.console import Console

        from neutralize.report import plan_rich

        Console(highlight=False).print(plan_rich(made))
    else:
        print(made, end="", flush=True)


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from neutralize.report import as_text

    table: Table = Table(title=Text(printable(title)))
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="right" if heading == "bytes" else "left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if sys.stdout.isatty():
        Console(highlight=False).print(table)
    else:
        print(as_text(table), end="", flush=True)


@contextmanager
def _bar(*, quiet: bool) -> Iterator[Advance]:
    """Show bytes per second on standard error while something is done, on a terminal."""
    from rich.console import Console

    from neutralize.progress import bar, silent
    from neutralize.report import format_bytes

    console = Console(stderr=True, highlight=False)
    if quiet or not console.is_terminal:
        yield silent
        return
    with bar(console, lambda speed: f"{format_bytes(speed)}/s") as shown:
        task = shown.add_task("bytes", total=None)
        advance: Callable[[float], None] = lambda count: shown.advance(task, count)  # noqa: E731
        yield advance
