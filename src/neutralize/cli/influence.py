"""`neutralize influence`: what each layer of a language model is worth."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neutralize.cli.options import Audit, Json, Quiet, StrategyName, audited, check_strategy, complete_layers
from neutralize.cli.printing import command_line, one_line, print_json, print_table, print_text

if TYPE_CHECKING:
    from neutralize.influence import Progress, Sweep
    from neutralize.influence.job import Task
    from neutralize.influence.sweep import Report

logger = logging.getLogger("neutralize")

_MODEL = "A folder, a GGUF file or a hub name of a causal language model; by default SmolLM2-135M, as in the demo."


def influence(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=_MODEL, metavar="[MODEL]")] = "smollm2",
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers",
            metavar="LAYERS",
            help="Name, glob or slice; repeatable. By default every block.",
            autocompletion=complete_layers,
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file to read; by default the text of the GPL-3.")
    ] = None,
    characters: Annotated[int, typer.Option(metavar="COUNT", help="How much of it; 0 is all of it.", min=0)] = 20_000,
    window: Annotated[int, typer.Option(metavar="COUNT", help="Tokens per window.", min=2)] = 512,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="Of the weights.")] = "float32",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto is the GPU if there is one.")] = "auto",
    strategy: StrategyName = "auto",
    k: Annotated[
        int | None, typer.Option("--k", metavar="COUNT", help="Search the best k layers to switch off.", min=1)
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="LOSS", help="... as long as the loss grows by no more than this.")
    ] = None,
    among: Annotated[
        int | None, typer.Option(metavar="COUNT", help="... trying only this many of the least harmful layers.", min=1)
    ] = None,
    kl: Annotated[bool, typer.Option("--kl/--no-kl", help="Measure the divergence from the intact model.")] = True,
    log: Annotated[  # --log-file: torchrun takes --log for one of its own
        Path | None,
        typer.Option("--log", "--log-file", metavar="FILE", help="A file that every evaluation is appended to."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in the log.")] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: divide the model among the processes; else each has all.")
    ] = False,
    job: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML file of sweeps, instead of MODEL and options.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the result: a png, svg or pdf file.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result as one HTML page to this file.")
    ] = None,
    audit: Audit = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Switch each block of a language model off alone, measure the harm, and put every bit back.

    Exit status: 0 if all went well, 1 if a sweep of a job failed, 2 if the request cannot be carried out, 130 after
    Ctrl-C (with --log, --resume goes on from there).

    Under torchrun the layers are shared out among its processes.
    """
    from neutralize.errors import NeutralizeError
    from neutralize.influence.crew import started
    from neutralize.influence.job import Job, Task

    speaks = True
    try:
        with started() as speaks, audited(audit):
            if job is not None:
                _check_alone(context)
                raise typer.Exit(_run_job(Job.read(job), resume=resume, json=json, quiet=quiet, speaks=speaks))
            if resume and log is None:
                raise NeutralizeError("influence: expected --log beside --resume, got none; name the log to go on with")
            check_strategy(strategy)
            task = Task(
                model=model,
                layers=tuple(layers or ()),
                text=None if text is None else str(text),
                characters=characters or None,
                window=window,
                dtype=dtype,
                device=device,
                strategy=strategy,
                k=k,
                budget=budget,
                among=among,
                kl=kl,
                shard=shard,
            )
            _run_task(task, log, plot, report, resume=resume, json=json, quiet=quiet, speaks=speaks)
    except NeutralizeError as error:
        if speaks:
            raise
        logger.debug("what the first process tells too", exc_info=error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        if not speaks:
            raise typer.Exit(130) from None
        hint = "; --resume goes on from here" if log is not None or job is not None else ""
        raise KeyboardInterrupt(f"every bit of the model was put back{hint}") from None


def _run_task(
    task: Task,
    log: Path | None,
    plot: Path | None,
    report: Path | None,
    *,
    resume: bool,
    json: bool,
    quiet: bool,
    speaks: bool,
) -> None:
    from neutralize.influence.crew import Crew
    from neutralize.influence.sweep import open_log
    from neutralize.pages.page import check_target

    if plot is not None:
        _check_plot(plot)
    if report is not None and speaks:
        check_target(report)
    opened = None if log is None else open_log(log, Crew(), resume=resume)
    try:
        language = task.load()
        with _shown(quiet=quiet or not speaks) as progress:
            sweep = task.run(language, opened, progress)
    finally:
        if opened is not None:
            opened.close()
    if not speaks:
        return
    if plot is not None:
        sweep.plot(plot, title=language.title)
    if json:
        print_json({"model": task.model, **sweep.to_dict()})
    else:
        _print_sweep(language.title, sweep)
    if report is not None:
        sweep.to_html(report, title=language.title, command=command_line())


def _run_job(job: Any, *, resume: bool, json: bool, quiet: bool, speaks: bool) -> int:
    from neutralize.errors import NeutralizeError

    failed = False
    with _shown(quiet=quiet or not speaks) as progress:
        for task, found in job.run(resume=resume, progress=lambda number, task: progress):
            failed = failed or isinstance(found, NeutralizeError)
            if not speaks:
                continue
            if isinstance(found, NeutralizeError):
                print(one_line(f"{task.model}: {found}"), file=sys.stderr)
                logger.debug("%s", task.model, exc_info=found)  # with --debug
                if json:
                    print_json({"model": task.model, "error": str(found)})
            elif json:
                print_json({"model": task.model, **found.to_dict()})
            else:
                _print_sweep(task.model, found)
    return int(failed)


def _check_alone(context: typer.Context) -> None:
    """Check that what a job file says is not said beside it too."""
    from neutralize.errors import NeutralizeError

    beside = sorted(
        "MODEL" if name == "model" else f"--{name}"
        for name in context.params
        if name not in ("job", "resume", "json", "quiet", "audit")
        and getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"
    )
    if beside:
        raise NeutralizeError(
            f"influence: expected --job with --resume, --audit, --json and --quiet alone, got {', '.join(beside)}; "
            "write that into the job file"
        )


def _check_plot(path: Path) -> None:
    """Fail before the evaluations rather than after them."""
    import importlib.util

    from neutralize.errors import NeutralizeError
    from neutralize.whole import write_whole

    if importlib.util.find_spec("matplotlib") is None:
        raise NeutralizeError("plot: expected matplotlib, got none installed; pip install 'neutralize[plot]'")
    write_whole(path, None, "plot: expected a png, svg or pdf file", (".png", ".svg", ".pdf"))


def _print_sweep(title: str, sweep: Sweep) -> None:
    """Print what was measured: tables, and the time it took."""
    from neutralize.influence.report import steps_rich, sweep_rich, timing

    print_text(title)
    print_table(sweep_rich(sweep))
    if sweep.steps or sweep.budget is not None:
        print_table(steps_rich(sweep))
    print_text(timing(sweep))


@contextmanager
def _shown(*, quiet: bool) -> Iterator[Report | None]:
    """Show progress on standard error: a bar on a terminal, elsewhere a line for each evaluation."""
    if quiet:
        yield None
        return
    from rich.console import Console

    from neutralize.progress import bar

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Lines()
        return
    with bar(console, lambda speed: f"{60 * speed:.1f} evaluations/min") as shown:
        task = shown.add_task("planning", total=None)

        def report(progress: Progress) -> None:
            what = f"{_off(progress.doing)} {progress.done:.0f}/{progress.total}"
            shown.update(task, description=what, completed=progress.done, total=progress.total)

        yield report


class _Lines:
    """Prints a line for each evaluation that is done."""

    def __init__(self) -> None:
        self._started: float | None = None  # when the clock started, which taking evaluations from the log stops
        self._begun, self._seen = 0.0, 0.0

    def __call__(self, progress: Progress) -> None:
        """Print the line, with the time left."""
        if progress.done < self._seen:  # the next sweep
            self._started = None
        self._seen = progress.done
        if progress.finished is None:
            if self._started is None:
                self._started, self._begun = time.perf_counter(), progress.done
            return
        if progress.resumed:
            about, self._started = "from the log", None
        elif self._started is None:
            about = "by another process"
        else:
            rate = (progress.done - self._begun) / max(1e-9, time.perf_counter() - self._started)
            left = f", {(progress.total - progress.done) / rate:.0f} s left" if rate else ""
            about = f"{60 * rate:.1f} evaluations/min{left}"
        what = f"[{progress.done:.0f}/{progress.total}] {_off(progress.doing)}: loss {progress.finished.loss:.4f}"
        print(f"{what} ({about})", file=sys.stderr, flush=True)


def _off(layers: tuple[str, ...]) -> str:
    return f"{', '.join(layers)} off" if layers else "intact"
