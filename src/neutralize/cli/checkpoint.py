"""`neutralize plan | apply | restore | status | verify`: checkpoints on disk."""

from __future__ import annotations

import math
import sys
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neutralize.cli.options import (
    Audit,
    CheckpointPath,
    Factory,
    Json,
    Layers,
    PlanFile,
    Quiet,
    Setters,
    StrategyName,
    StrategyOptions,
    audited,
    check_alone,
    check_strategy,
    opened,
)
from neutralize.cli.printing import (
    command_line,
    moved_bytes,
    print_json,
    print_table,
    print_text,
    printable,
    text_table,
    waiting,
)

if TYPE_CHECKING:
    from neutralize.checkpoint import Checkpoint, Status
    from neutralize.checkpoint.journal import Edition
    from neutralize.plan import Plan
    from neutralize.verify import Verification


def plan(
    checkpoint: CheckpointPath,
    layers: Layers = None,
    strategy: StrategyName = "auto",
    option: StrategyOptions = None,
    model: Factory = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan to this file, for apply --plan.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Work out what to write so that layers are off; nothing is written."""
    from neutralize.whole import write_whole

    _check_strategy(layers, strategy, option)
    expected = "plan: expected a file for --save"
    if save is not None:
        write_whole(save, None, expected)
    with waiting("planning", quiet=quiet):
        made = _planned(opened(checkpoint, model), layers, strategy, option)
    if save is not None:
        write_whole(save, made.to_json() + "\n", expected)
    _print_plan(made, json=json)


def apply(
    checkpoint: CheckpointPath,
    layers: Layers = None,
    set_: Setters = None,
    plan_file: PlanFile = None,
    strategy: StrategyName = "auto",
    option: StrategyOptions = None,
    digest: Annotated[
        str | None, typer.Option(metavar="HEX", help="Refuse a plan whose SHA-256 does not begin with this.")
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Edit the files themselves, with undo.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="PATH", help="Write an edited copy to this path.")] = None,
    link: Annotated[
        bool, typer.Option("--link", help="With --output: hard links to files that do not change.")
    ] = False,
    verify_copy: Annotated[
        bool, typer.Option("--verify-copy", help="With --output: compare the SHA-256 of every untouched tensor.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False,
    model: Factory = None,
    audit: Audit = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Switch layers of a checkpoint off, or edit its tensors by name: in place with undo, or in a copy."""
    from neutralize.checkpoint.output import check_free
    from neutralize.checkpoint.patch import written_bytes
    from neutralize.checkpoint.setters import parse_setters
    from neutralize.errors import NeutralizeError
    from neutralize.plan import Plan

    with moved_bytes(quiet=quiet) as advance, audited(audit):
        copy_options = [name for name, given in (("--link", link), ("--verify-copy", verify_copy)) if given]
        _check_target(
            layers, set_, plan_file, in_place=in_place, output=output, dry_run=dry_run, copy_options=copy_options
        )
        _check_strategy(layers, strategy, option)
        if not dry_run:
            check_alone("apply")
        if output is not None:
            check_free(output)
        subject = opened(checkpoint, model)
        if in_place and not dry_run:
            for edition in subject.recover(advance):
                print(f"rolled back edit {edition.number}, which was cut off", file=sys.stderr)
        content = (
            parse_setters(set_, subject.layout) if set_ else _plan_of(subject, layers, plan_file, strategy, option)
        )
        found = content.digest if isinstance(content, Plan) else Plan("set", tuple(content), ()).digest
        if digest is not None and not (digest and found.startswith(digest.lower())):
            raise NeutralizeError(
                f"apply: expected a plan with the digest {digest!r}, got {found}; plan again, or give its digest"
            )
        if not json:
            if isinstance(content, Plan):
                _print_plan(content, json=False)
                if plan_file is not None:
                    print("as certified for the model that was planned for; neutralize verify --plan measures this one")
            else:
                rows = [(edit.parameter, edit.describe()) for edit in content]
                print_table(text_table("edits", ("tensor", "edit"), rows))
        summary: dict[str, Any] = {"checkpoint": str(checkpoint), "digest": found}
        if dry_run:
            patches = subject.patches(content)
            files = {region.file for patch in patches for region in patch.regions}
            summary |= {"bytes": written_bytes(patches), "files": sorted(files), "state": "untouched"}
        elif output is not None:
            written = subject.write(content, output, link=link, verify=verify_copy, digest=found, advance=advance)
            summary |= {"bytes": written.written_bytes, "files": list(written.files), "state": "written"}
            summary |= {"output": str(written.path), "verified_tensors": written.verified}
        else:
            undo = subject.apply(content, digest=found, about="; ".join(set_ or ()), advance=advance)
            edition = undo.edition
            summary |= {"bytes": edition.nbytes, "files": sorted(edition.files), "state": "edited"}
            summary |= {"edit": edition.number, "undo": str(edition.path)}
        print_json(summary) if json else print_text(_applied(summary))


def restore(
    checkpoint: CheckpointPath,
    everything: Annotated[bool, typer.Option("--all", help="Undo every edit, not only the last one.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also where something else has written since.")] = False,
    audit: Audit = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put every byte back: of an edit that was cut off, else of the last edit.

    What a killed run has left beside the files is removed; so is a copy (the path of --output) that was cut off.
    """
    from neutralize.checkpoint.output import discard

    check_alone("restore")
    with moved_bytes(quiet=quiet) as advance, audited(audit):
        removed = [] if checkpoint.exists() else discard(checkpoint)
        state, left = "absent", 0
        undone: list[Any] = []
        if not removed:
            subject = opened(checkpoint)
            removed = [str(path) for path in subject.status.leftovers]
            undone = subject.restore(everything=everything, force=force, advance=advance)
            found = subject.status
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
    checkpoint: CheckpointPath,
    quick: Annotated[bool, typer.Option("--quick", help="Only what the journal says; read no weights.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say whether a checkpoint is intact, edited, changed, interrupted or busy, and list the edits that can be undone.

    The bytes of every edit are compared with what it wrote. Exit status: 0, or 1 if something else has written there
    since, or an edit was cut off or is going on: the files are then not what the edits made of them.
    """
    with moved_bytes(quiet=quiet) as advance:
        subject = opened(checkpoint)
        found = subject.status if quick else subject.check(advance)
        if found.state == "intact" and not quick:
            _ = subject.layout  # nothing is intact that is no checkpoint, or was cut off
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
        return " - CHANGED: something else has written there since, or the file is gone; restore says what to do"
    return ""


def verify(
    checkpoint: CheckpointPath,
    layers: Layers = None,
    plan_file: PlanFile = None,
    strategy: StrategyName = "auto",
    option: StrategyOptions = None,
    applied: Annotated[bool, typer.Option("--applied", help="The files hold the plan already.")] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what was found as one HTML page to this file.")
    ] = None,
    model: Factory = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the model from its files, two tensors in memory at a time, with the layers off and with them cut out.

    Exit status: 0 if every certificate holds, 1 if one does not, 2 if the request cannot be carried out.
    """
    from neutralize.errors import NeutralizeError
    from neutralize.pages.page import check_target
    from neutralize.report import verification_rich

    with moved_bytes(quiet=quiet) as advance:
        if bool(layers) == bool(plan_file):
            raise NeutralizeError("verify: expected --layers or --plan, got none or both; give one of them")
        if report is not None:
            check_target(report)
        _check_strategy(layers, strategy, option)
        subject = opened(checkpoint, model)
        made = _plan_of(subject, layers, plan_file, strategy, option)
        advance.expect(2 * sum(region.nbytes for each in subject.layout.tensors.values() for region in each.regions))
        found = subject.verify(made, applied=applied, detailed=report is not None, advance=advance)
        if json:
            measured = found.measured
            print_json(
                {
                    "ok": found.ok,
                    "exact": measured.exact,
                    "relative_error": _number(measured.relative_error),
                    "per_layer": {name: _number(error) for name, error in found.per_layer.items()},
                    "read_bytes": found.read_bytes,
                    "peak_bytes": found.peak_bytes,
                    **({"not_held": measured.not_held} if applied else {}),
                    **({} if report is None else {"scaled": measured.scaled, "scales": _curve(measured)}),
                }
            )
        else:
            print_table(verification_rich(found.measured))
            print_text(found.summary)
        if report is not None:
            found.to_html(report, title=checkpoint.resolve().name, command=command_line())
        if not found.ok:
            raise typer.Exit(1)


def _number(error: float) -> float | None:
    """An error, or ``None`` for what cannot be seen or is not finite: JSON has no NaN."""
    return error if math.isfinite(error) else None


def _curve(measured: Verification) -> list[dict[str, Any]]:
    """The errors at every scale that was measured for the page."""
    if not measured.scaled:
        return []
    return [
        {
            "scale": scale,
            **({"relative_error": _number(one.relative_error)} if measured.scaled == "inputs" else {}),
            "per_layer": {name: _number(error) for name, error in one.per_layer.items()},
            "assumptions_hold": one.assumptions_hold,
            "bound_holds": one.bound_holds,
        }
        for scale, one in measured.at_scales().items()
    ]


# ---- what the commands share -----------------------------------------------------------------------------------------


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
    """Fail before the model is built rather than after it."""
    from neutralize.errors import NeutralizeError

    if layers:
        check_strategy(strategy, _parsed(options))
    elif strategy != "auto" or options:
        raise NeutralizeError(
            "neutralize: expected --strategy and --option beside --layers, got them beside what is planned already; "
            "leave them out"
        )


def _plan_of(
    subject: Checkpoint, layers: list[str] | None, plan_file: Path | None, strategy: str, options: list[str] | None
) -> Plan:
    """The plan in a file, or one made for layers."""
    from neutralize.errors import NeutralizeError
    from neutralize.plan import Plan

    if plan_file is None:
        return _planned(subject, layers, strategy, options)
    try:
        return Plan.from_json(plan_file.read_text(encoding="utf-8"))
    except OSError as error:
        got, remedy = error.strerror or str(error), "check the path"
    except ValueError as error:  # no text, or no plan
        got, remedy = f"something else ({error})", "name a file that neutralize plan --save has written"
    raise NeutralizeError(f"plan: expected a plan in {str(plan_file)!r}, got {got}; {remedy}")


def _planned(subject: Checkpoint, layers: list[str] | None, strategy: str, options: list[str] | None) -> Plan:
    from neutralize.errors import NeutralizeError
    from neutralize.planner import plan

    if not layers:
        raise NeutralizeError("plan: expected --layers, got none; name some, as --layers 'model.layers[20:25]'")
    return plan(subject, layers, strategy, **_parsed(options))


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
    from shlex import quote

    from neutralize.report import format_bytes

    what = f"{format_bytes(summary['bytes'])} in {len(summary['files'])} file(s)"
    if summary["state"] == "untouched":
        return f"dry run: would write {what}; nothing was written"
    if summary["state"] == "written":
        checked = f", {summary['verified_tensors']} untouched tensors compared" if summary["verified_tensors"] else ""
        return f"written: {summary['output']}, with {what} changed{checked}"
    return f"edited in place: {what}; `neutralize restore {quote(summary['checkpoint'])}` puts every byte back"


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
    from neutralize.report import plan_rich

    if json:
        print_json({**loads(made.to_json()), "planning_s": made.planning_s})
    else:
        print_table(plan_rich(made))
