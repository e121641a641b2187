"""How every command speaks: help in plain text with examples, refusals in one line, ``--debug`` for the traceback."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

import neutralize
from neutralize.cli.printing import one_line
from neutralize.errors import NeutralizeError

NAME = "neutralize"

_ClickException: Any = typer.BadParameter.__mro__[2]  # typer brings click itself or a copy of it, by its version

UNEXPECTED = 70
"""The exit status of a bug: 1 says that something does not hold, 2 that a request cannot be carried out."""


class Command(TyperCommand):
    """A command whose epilog is examples, one a line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read its words; what is wrong with them is told as of this command."""
        try:
            return super().parse_args(ctx, args)
        except _ClickException as error:
            if getattr(error, "ctx", None) is None:
                error.ctx = ctx
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run it, with all names of the package: whoever asks only for help does not wait for them."""
        neutralize._load()
        return super().invoke(ctx)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are to be typed."""
        _write_examples(self.epilog, formatter)


class Group(TyperGroup):
    """The commands together: the one place where an exception becomes a line and an exit status."""

    def main(  # type: ignore[override]  # it ends the process, so that what it would return is nobody's
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run a command; ``--debug`` may stand anywhere before ``--``."""
        words = list(sys.argv[1:] if args is None else args)
        own = words.index("--") if "--" in words else len(words)
        debug = "--debug" in words[:own]
        words = [word for word in words[:own] if word != "--debug"] + words[own:]
        if isinstance(sys.stdout, io.TextIOWrapper):  # a ≥ where the output is ASCII is written out, as on stderr
            sys.stdout.reconfigure(errors="backslashreplace")
        with refusals(debug=debug):
            status = super().main(words, prog_name or NAME, **{**extra, "standalone_mode": False})
            if sys.stdout is not None:  # as where it was closed
                sys.stdout.flush()  # while an error of it can be told
        sys.exit(status or 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            about = str(stop) or "of a checkpoint, neutralize status says what was done"
            print(f"neutralize: interrupted; {about}", file=sys.stderr)
            raise typer.Exit(130) from None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands with the first sentence of each, in full."""
        rows = [(name, (command.help or "").split("\n\n")[0]) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are to be typed."""
        _write_examples(self.epilog, formatter)


def _write_examples(epilog: str | None, formatter: Any) -> None:
    if epilog:
        with formatter.section("Examples"):
            for line in epilog.splitlines():
                formatter.write(f"  {line}\n")


@contextmanager
def refusals(*, debug: bool) -> Iterator[None]:
    """Turn whatever goes wrong into one line on standard error and an exit status.

    Args:
        debug: print the traceback too, and what the library logs.
    """
    with _logged() if debug else _unlogged():
        try:
            yield
        except NeutralizeError as error:
            _end(str(error), 2, debug=debug)
        except BrokenPipeError:  # the reader of the output has seen enough
            _close_output()
            sys.exit(1)
        except OSError as error:
            _close_output()
            what = "paths that can be used" if error.filename else "files and an output that can be used"
            got = f"{error.strerror or error}{f' for {error.filename!r}' if error.filename else ''}"
            _end(f"neutralize: expected {what}, got {got}; check them", 2, debug=debug)
        except Exception as error:
            if isinstance(error, _ClickException):
                _end(_misuse(error), 2, debug=debug)
            got = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            remedy = "please report it with what is above" if debug else "--debug shows where, for a report"
            _end(f"neutralize: expected no such error, got {got}; {remedy}", UNEXPECTED, debug=debug)


def _close_output() -> None:
    """Give up what cannot be printed: at the end it would be tried once more, and fail in words of Python's own."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _misuse(error: Any) -> str:
    """What is wrong with the words of a command, and where its words are explained."""
    command = error.ctx.command_path if getattr(error, "ctx", None) is not None else "neutralize"
    return f"{command}: {error.format_message().rstrip('.')}; see {command} --help"


def _end(line: str, status: int, *, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(one_line(line), file=sys.stderr)
    sys.exit(status)


@contextmanager
def _unlogged() -> Iterator[None]:
    yield


@contextmanager
def _logged() -> Iterator[None]:
    """Show what the library logs on standard error."""
    logger, handler = logging.getLogger("neutralize"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
