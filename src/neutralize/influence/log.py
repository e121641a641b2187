"""The log of a sweep: one line of JSON for each evaluation, written when it is done, read when a sweep goes on.

A sweep begins with a line that says what was measured on what; the lines of its evaluations carry its digest:

    {"format": 1, "sweep": "0f3c…", "model": "…", "data": "…", "candidates": "…", "plans": "…"}
    {"sweep": "0f3c…", "off": [], "loss": 3.2317, "kl": 0.0, …}
    {"sweep": "0f3c…", "off": ["model.layers.0"], "loss": 10.07, "kl": 6.9, …}
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from neutralize.errors import NeutralizeError

FORMAT_VERSION = 1
_LINE_TIMEOUT = 60.0
"""Seconds that a process waits until another has written its line."""

_START = b'{"format": 1, "sweep": "'


@dataclass(frozen=True)
class Identity:
    """What a sweep measures, on what: sweeps that agree in all of it are one sweep.

    Attributes:
        model: class and fingerprint of the model.
        data: digest of the data and the loss.
        candidates: the candidate layers.
        plans: digest of the plans that switch each off.
    """

    model: str
    data: str
    candidates: tuple[str, ...]
    plans: str

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, as hexadecimal text."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Measurement:
    """One evaluation.

    Attributes:
        off: the layers that were off.
        loss: the loss with them off.
        kl: mean divergence from the intact model's predictions in nats, or ``None``.
        bytes_written: what switching them off wrote.
        evaluating_s: seconds of the evaluation.
        rewriting_s: seconds of switching off and restoring, checks and copies included.
        block_influence: of every candidate, where the intact model was evaluated.
    """

    off: tuple[str, ...]
    loss: float
    kl: float | None
    bytes_written: int
    evaluating_s: float
    rewriting_s: float
    block_influence: Mapping[str, float] = field(default_factory=dict)


class Log:
    """A file that evaluations are appended to, for one sweep or, with ``many``, for several.

    Each line is on the disk before the next evaluation begins. A last line without an end, of a sweep that was killed
    while it wrote, is dropped.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, resume: bool = False, many: bool = False, shared: bool = False
    ) -> None:
        """Open the file.

        Args:
            path: made if it is not there.
            resume: go on with what is in the file; without it the file must be new or empty.
            many: let sweeps of several models, data or selections share the file.
            shared: let several processes write into it, each a line at a time.

        Raises:
            NeutralizeError: the file holds something and ``resume`` is not set, it is no log, or cannot be opened.
        """
        self.path = Path(path)
        self._many = many
        self._shared = shared
        self._sweep = ""
        self._identities: dict[str, dict[str, Any]] = {}
        self._measurements: dict[str, dict[tuple[str, ...], Measurement]] = {}
        try:
            self._file: IO[bytes] = open(self.path, "a+b")  # noqa: SIM115 - open as long as the sweep goes on
        except OSError as error:
            raise NeutralizeError(
                f"influence: expected a file that can be written for log, got {str(path)!r} ({error.strerror}); give "
                "another"
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):  # /dev/full has no end
                raise NeutralizeError(f"influence: expected a regular file for log, got {str(path)!r}; give another")
            self._begin(resume=resume)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def begin(self, identity: Identity, *, writes: bool = True) -> dict[tuple[str, ...], Measurement]:
        """Begin a sweep, or go on with it; return what was measured before, by the layers that were off.

        Args:
            identity: of the sweep.
            writes: write it down, if it is not there; of several processes one does.

        Raises:
            NeutralizeError: the file is the log of another sweep, and not of many; the message says what differs.
        """
        described = {
            "model": identity.model,
            "data": identity.data,
            "candidates": _digest(identity.candidates),
            "plans": identity.plans,
        }
        self._sweep = identity.digest[:16]
        if self._sweep not in self._identities:
            if self._identities and not self._many:
                (other,) = list(self._identities.values())[:1]
                differing = [name for name, value in described.items() if other.get(name) != value]
                raise NeutralizeError(
                    f"influence: expected the log of this sweep in {str(self.path)!r}, got one of "
                    f"{'another ' + ', another '.join(differing)}; give another file, or take back what was changed"
                )
            self._identities[self._sweep] = described
            if writes:
                self._append({"format": FORMAT_VERSION, "sweep": self._sweep, **described})
        return dict(self._measurements.get(self._sweep, {}))

    def add(self, measurement: Measurement) -> None:
        """Append an evaluation of the sweep that was begun last."""
        self._append({"sweep": self._sweep, **asdict(measurement)})

    def _begin(self, *, resume: bool) -> None:
        self._lock()
        self._file.seek(0)
        text = self._file.read()
        if text and not resume:
            raise NeutralizeError(
                f"influence: expected a new file for log, got {str(self.path)!r} with {len(text)} bytes in it; resume "
                "it (resume=True, --resume), or give another"
            )
        whole, _, torn = text.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            self._read(line, number)
        if torn:
            if not self._identities and torn[: len(_START)] != _START[: len(torn)]:
                self._refuse(1)  # no line of ours that was torn, but a file of another kind
            self._file.truncate(len(text) - len(torn))
        if self._shared:
            self._unlock()

    def _lock(self) -> None:
        """Let no two sweeps write into one file; the lock ends with the process, however that ends."""
        try:
            import fcntl
        except ImportError:  # no POSIX
            return None
        try:
            until = time.monotonic() + (_LINE_TIMEOUT if self._shared else 0.0)
            while True:
                try:
                    return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise
                time.sleep(0.01)
        except BlockingIOError as error:
            raise NeutralizeError(
                f"influence: expected a log that nobody else writes, got {str(self.path)!r}, which another process "
                "holds; wait for it, or give another file"
            ) from error
        except OSError:  # a file system without locks
            return None

    def _unlock(self) -> None:
        """Let the next process write a line."""
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _read(self, line: bytes, number: int) -> None:
        try:
            content = json.loads(line)
            sweep = content.pop("sweep")
            if "format" in content:
                if content.pop("format") != FORMAT_VERSION:
                    self._refuse(number)
                self._identities[sweep] = content
                return
            if sweep not in self._identities or content.keys() != {entry.name for entry in fields(Measurement)}:
                self._refuse(number)
            content["off"] = tuple(content["off"])
            for name in ("loss", "evaluating_s", "rewriting_s"):
                content[name] = float(content[name])
            content["kl"] = None if content["kl"] is None else float(content["kl"])
            content["block_influence"] = {name: float(value) for name, value in content["block_influence"].items()}
            measurement = Measurement(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, NeutralizeError):
                raise
            self._refuse(number)
        self._measurements.setdefault(sweep, {})[measurement.off] = measurement

    def _refuse(self, line: int) -> None:
        raise NeutralizeError(
            f"influence: expected a log of format {FORMAT_VERSION} in {str(self.path)!r}, got line {line}, which is "
            "none; give another file"
        )

    def _append(self, content: Mapping[str, Any]) -> None:
        line = json.dumps(jsonable(content)).encode() + b"\n"
        if self._shared:
            self._lock()
        try:
            if self._shared:
                self._drop_torn()
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            if self._shared:
                self._unlock()

    def _drop_torn(self) -> None:
        """Drop a last line without an end, of a process that was killed while it wrote it."""
        end = self._file.seek(0, os.SEEK_END)
        size = 1 << 16
        while end and size:
            start = max(end - size, 0)
            self._file.seek(start)
            tail = self._file.read(end - start)
            if tail.endswith(b"\n"):
                return
            if b"\n" in tail or start == 0:
                self._file.truncate(start + tail.rfind(b"\n") + 1)
                return
            size *= 2


def jsonable(value: Any) -> Any:
    """Return a value as JSON has it: numbers that are not finite become their names, which ``float`` reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return value


def _digest(names: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
