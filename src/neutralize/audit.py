"""Audit: a line of JSON for every plan that is applied and every undo, in files that the user names.

The same is told to the logger ``neutralize``, which is silent by default. A file that cannot be appended to is an
error before anything is written; if its disk fails only afterwards, what an application wrote is put back.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import logging
import os
import platform
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import neutralize
from neutralize.errors import NeutralizeError

if TYPE_CHECKING:
    from neutralize.plan import Plan

LOGGER = logging.getLogger("neutralize")
"""Silent unless a program asks for it: ``logging.getLogger("neutralize").setLevel("INFO")`` and a handler."""

FORMAT_VERSION = 1

_PATHS: list[Path] = []
"""The files that are appended to now, by whatever thread."""


@dataclass(frozen=True)
class Deed:
    """Something that is done to weights.

    Attributes:
        action: ``apply``, ``restore``, ``write`` (an edited copy), ``export`` (a smaller model), ``ramp`` (one step),
            ``guard`` (what was applied is held from now on) or ``release`` (no longer).
        target: the class of a live model, or the path of a checkpoint.
        digest: of the plan.
        strategy: of the plan; ``""`` where only its digest is known, or where tensors are edited by name.
        layers: of the plan.
        tensors: the names of what is written.
        bytes: how many are written, in all processes.
        source: where a live model says that it comes from (``name_or_path`` of transformers); what a copy was made of,
            or a smaller model; or ``""``.
        processes: how many hold the model together, and do this together.
        factor: what the layers' contribution is multiplied by after a step of a ramp.
        steps: after how many steps of an optimizer a guard has put back what it holds.
    """

    action: str
    target: str
    digest: str
    strategy: str = ""
    layers: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    bytes: int = 0
    source: str = ""
    processes: int = 1
    factor: float | None = None
    steps: int | None = None

    @staticmethod
    def of(plan: Plan, action: str, target: object, count: int, *, processes: int = 1) -> Deed:
        """What is done by a plan that writes ``count`` bytes into a model, or into the checkpoint of a path."""
        layers = tuple(entry.layer for entry in plan.layers)
        name, source = (target, "") if isinstance(target, str) else (type(target).__name__, source_of(target))
        return Deed(action, name, plan.digest, plan.strategy, layers, plan.parameters, count, source, processes)


class Record(Protocol):
    """Appends a line to the files that were opened."""

    def __call__(self, deed: Deed, error: BaseException | None = None, only: Collection[Path] | None = None) -> None:
        """Append what was done, or failed with an error, to all of the files or only to some."""


@contextmanager
def audit(path: str | os.PathLike[str]) -> Iterator[None]:
    """Append a line of JSON to a file for every plan that is applied or undone in a ``with`` block, in any thread.

    A line says who (``user``, ``host``, ``pid``, ``command``), when (``time``, UTC), what (``action``, ``digest``,
    ``strategy``, ``layers``, ``tensors``, ``bytes``), where (``target``: the class of a model, or a path; ``source``;
    ``processes``), with which version, and the ``outcome``: ``done``, or ``failed`` with the ``error``; what failed was
    put back. Each step of a ramp has a line, with its ``factor``; a guard has one when it begins and one when it lets
    go, with its ``steps``. The undo of an application made in the block goes into the same file, whenever it is carried
    out. Lines of several processes do not mix; what they do together is one line, of the first of them that has the
    file open.

    Args:
        path: a regular file; made if it is not there.

    Raises:
        NeutralizeError: the file cannot be appended to; where that shows only after the weights were written, they are
            put back.
    """
    own = Path(path).absolute()
    with _opened(own):
        pass
    _PATHS.append(own)
    try:
        yield
    finally:
        _PATHS.reverse()
        _PATHS.remove(own)  # the last one: the same file may be named twice
        _PATHS.reverse()


def audited() -> tuple[Path, ...]:
    """The files that are appended to now."""
    return tuple(dict.fromkeys(_PATHS))


@contextmanager
def recording(also: Iterable[Path] = ()) -> Iterator[Record]:
    """Open the audit files before anything is done; what is yielded appends a line to each.

    Args:
        also: files besides those that are appended to now.

    Raises:
        NeutralizeError: one cannot be opened, or later appended to.
    """
    with ExitStack() as stack:
        paths = dict.fromkeys((*_PATHS, *also))
        files = [(path, stack.enter_context(_opened(path))) for path in paths]

        def record(deed: Deed, error: BaseException | None = None, only: Collection[Path] | None = None) -> None:
            outcome = "done" if error is None else "failed"
            LOGGER.info(
                "%s %s: %s, %d bytes, plan %s", deed.action, deed.target, outcome, deed.bytes, deed.digest[:12] or "-"
            )
            told = [(path, file) for path, file in files if only is None or path in only]
            line = _line(deed, error) if told else b""
            for path, file in told:
                _append(path, file, line)

        yield record


@contextmanager
def recorded(deed: Deed, also: Iterable[Path] = (), only: Collection[Path] | None = None) -> Iterator[None]:
    """Record what is done in a ``with`` block, once it is done or has failed.

    Args:
        deed: what is done.
        also: see ``recording``.
        only: the files that get the line of what is done; that of a failure goes to all.

    Raises:
        NeutralizeError: see ``recording``.
    """
    with recording(also) as record:
        try:
            yield
        except BaseException as error:
            with suppress(NeutralizeError):  # what went wrong first is what is told
                record(deed, error)
            raise
        record(deed, None, only)


def _line(deed: Deed, error: BaseException | None) -> bytes:
    about = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
    content = {
        "format": FORMAT_VERSION,
        "time": datetime.now(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "user": _user(),
        "host": platform.node(),
        "pid": os.getpid(),
        "command": _command(),
        "neutralize": neutralize.__version__,
        **{name: value for name, value in asdict(deed).items() if value is not None},
        "outcome": "done" if error is None else "failed",
        **about,
    }
    return json.dumps(content).encode() + b"\n"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # nobody has that number, as in many containers
        return str(os.getuid())


def _command() -> str:
    """The command of this package as it was typed; of another program its name alone: its words may be secret."""
    program = Path(sys.argv[0] if sys.argv else "")
    if "neutralize" in (program.name, program.parent.name):
        from neutralize.cli.printing import command_line

        return command_line()
    return program.name


def source_of(model: Any) -> str:
    """Where a live model says that it comes from, or ``""``."""
    found = getattr(model, "name_or_path", "")
    return found if isinstance(found, str) else ""


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise _refusal(path, error.strerror or str(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise _refusal(path, "no regular file")
        yield file
    finally:
        os.close(file)


def _append(path: Path, file: int, line: bytes) -> None:
    """Append a line by one write, and wait until the disk has it; of a line that does not fit nothing is left."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            before = os.fstat(file).st_size
            if not _is_whole(path, before):  # whoever wrote last was killed, or ends no line
                line = b"\n" + line
            written = os.write(file, line)
            if written < len(line):
                os.ftruncate(file, before)
                raise _refusal(path, "no space left for a line")
            os.fsync(file)
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
    except OSError as error:
        raise _refusal(path, error.strerror or str(error)) from error


def _is_whole(path: Path, size: int) -> bool:
    """Whether the last line of a file is ended; of one that may only be appended to that is not known."""
    try:
        with path.open("rb") as content:
            content.seek(max(size - 1, 0))
            return content.read(1) in (b"\n", b"")
    except OSError:
        return True


def _refusal(path: Path, got: str) -> NeutralizeError:
    return NeutralizeError(f"audit: expected a file that can be appended to, got {got} for {str(path)!r}; name another")
