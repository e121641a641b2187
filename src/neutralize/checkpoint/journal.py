"""The journal of a checkpoint that is edited in place: a write-ahead undo for each edit, and the state that they tell.

The journal is the folder ``.neutralize`` beside the files. Edit number ``n`` leaves

- ``n.undo``: the bytes of exactly what will change, and their digests. It is complete and on the disk before the first
  byte of the checkpoint changes.
- ``n.done``: the digests of what was written. It appears when all of it is on the disk.

So a checkpoint with an ``.undo`` and no ``.done`` is half-written, and putting back the old bytes makes it whole,
however often that is begun anew. While an edit runs, a mark lies over the head of each file that it touches: no
reader takes a half-written file for a whole one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

import torch

from neutralize.audit import Deed
from neutralize.checkpoint.bounded import TEXT_LIMIT, parse_json
from neutralize.checkpoint.patch import Patch
from neutralize.checkpoint.region import Files, Reach, Region, memory
from neutralize.errors import NeutralizeError
from neutralize.progress import Advance, silent

FOLDER = ".neutralize"
_MAGIC = b"neutralize undo\n"
_FORMAT = 1


@dataclass(frozen=True)
class Kept:
    """What an undo holds of one region.

    Attributes:
        region: where the bytes belong.
        digest: SHA-256 of them, hexadecimal.
        place: where they are in the undo file.
    """

    region: Region
    digest: str
    place: int


@dataclass(frozen=True)
class Mark:
    """What lies over a file's head while it is edited.

    Attributes:
        file: relative to the root.
        offset: of the first byte.
        held: the bytes that belong there, hexadecimal.
        mark: the bytes that say that the file is half-written, hexadecimal.
    """

    file: str
    offset: int
    held: str
    mark: str


@dataclass(frozen=True)
class Edition:
    """One edit of a checkpoint in place.

    Attributes:
        number: counts the edits, from 1.
        path: the undo file.
        digest: of the plan.
        about: what was done, in words.
        when: ISO time, UTC.
        kept: the old bytes.
        marks: one per touched file.
        written: SHA-256 of each region after the edit; empty: the edit was cut off.
        strategy: of the plan; ``""`` where that is not known.
        layers: of the plan.
        tensors: the names of what it writes.
    """

    number: int
    path: Path
    digest: str
    about: str
    when: str
    kept: tuple[Kept, ...]
    marks: tuple[Mark, ...]
    written: tuple[str, ...] = ()
    strategy: str = ""
    layers: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether all of it was written; if not, the files are half-written."""
        return bool(self.written)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it touches."""
        return tuple(dict.fromkeys(entry.region.file for entry in self.kept))

    @property
    def nbytes(self) -> int:
        """How many bytes it keeps."""
        return sum(entry.region.nbytes for entry in self.kept)

    def is_under(self, later: Edition) -> bool:
        """Whether a later edit may have written over its bytes."""
        reach = Reach(entry.region for entry in later.kept)
        return any(reach.meets(entry.region) for entry in self.kept)


class Shared(Protocol):
    """Several processes that carry out patches together."""

    @property
    def patience_s(self) -> float:
        """Seconds to wait until the others have ended their writing, if something fails."""
        ...

    def run(self, patches: Sequence[Patch], files: Files, advance: Advance) -> None:
        """Return when all patches have been carried out, each by one process."""
        ...


class Journal:
    """The edits of the checkpoints in one folder. Open it with ``opened``: it is locked as long as it is used."""

    def __init__(self, root: Path) -> None:
        """Name a journal; nothing is made.

        Args:
            root: the folder that the checkpoint's files are in.
        """
        self.root = root
        self.folder = root / FOLDER

    # ---- what was done ---------------------------------------------------------------------------------------------
    def editions(self) -> list[Edition]:
        """The edits that can be undone, earliest first.

        Raises:
            NeutralizeError: an undo file is damaged.
        """
        if not self.folder.is_dir():
            return []
        return [_read_edition(path) for path in sorted(self.folder.glob("*.undo"), key=_number)]

    def leftovers(self) -> list[Path]:
        """What a run that was killed has left, and nothing depends on; meaningless while a run is going on."""
        if not self.folder.is_dir():
            return []
        return sorted(self.folder.glob("*.part")) if any(self.folder.glob("*.undo")) else [self.folder]

    # ---- the lock ----------------------------------------------------------------------------------------------------
    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the checkpoint for this process; the lock goes with the process, however it ends.

        Raises:
            NeutralizeError: another process holds it, or the folder cannot be written.
        """
        descriptor = self._lock()
        try:
            yield
        finally:
            with suppress(OSError):
                if not any(self.folder.glob("*.undo")):
                    shutil.rmtree(self.folder)
            os.close(descriptor)

    def is_locked(self) -> bool:
        """Whether some process is editing the checkpoint now."""
        return self._is_taken("lock", fcntl.LOCK_SH) or self._is_taken("team", fcntl.LOCK_EX)

    def _is_taken(self, name: str, kind: int) -> bool:
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            return not take(descriptor, self.root, kind)
        finally:
            os.close(descriptor)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Write beside the process that has locked the checkpoint: nobody puts bytes back as long as others write."""
        descriptor = os.open(self.folder / "team", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            while not take(descriptor, self.root, fcntl.LOCK_SH):
                time.sleep(0.01)  # somebody looks whether anybody writes
            yield
        finally:
            os.close(descriptor)

    def _outwait(self, seconds: float, edition: Edition, error: BaseException) -> None:
        """Wait until no other process writes: old bytes are put back after that."""
        until = time.monotonic() + seconds
        while self._is_taken("team", fcntl.LOCK_EX):
            if time.monotonic() > until:
                raise NeutralizeError(
                    f"checkpoint: expected the other processes to end their writing under {str(self.root)!r} within "
                    f"{seconds:g} s, got one that goes on; the old bytes are in {str(edition.path)!r}: run neutralize "
                    "restore when it has ended"
                ) from error
            time.sleep(0.01)

    def _lock(self) -> int:
        path = self.folder / "lock"
        while True:
            if self.folder.is_symlink():
                raise NeutralizeError(
                    f"checkpoint: expected a folder of its own for {str(self.folder)!r}, got a link; remove it"
                )
            try:
                self.folder.mkdir(exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            except FileNotFoundError:
                if self.root.is_dir():
                    continue  # another process has just ended and removed the journal's folder
                raise
            except OSError as error:
                raise NeutralizeError(
                    f"checkpoint: expected a folder that can be written for {str(self.root)!r}, got "
                    f"{error.strerror}; make it writable, or name an --output to apply"
                ) from error
            try:
                if not take(descriptor, self.root) or self._is_taken("team", fcntl.LOCK_EX):
                    holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "another process"
                    raise NeutralizeError(
                        f"checkpoint: expected {str(self.root)!r} to be free, got one that is being edited by "
                        f"{holder}; wait until it has ended"
                    )
            except BaseException:
                os.close(descriptor)
                raise
            with suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                    with suppress(OSError):  # a full disk: only messages to others name the process
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, f"process {os.getpid()}".encode(), 0)
                    return descriptor
            os.close(descriptor)  # the process before us removed it between the two calls

    # ---- editing, under the lock -----------------------------------------------------------------------------------
    def edit(
        self,
        patches: Sequence[Patch],
        marks: Mapping[str, tuple[int, bytes]],
        deed: Deed,
        about: str,
        advance: Advance = silent,
        crew: Shared | None = None,
    ) -> Edition:
        """Carry out patches so that every byte can be put back; the journal must be locked.

        Args:
            patches: what is written.
            marks: file to (offset, bytes) that are laid over its head meanwhile.
            deed: what is done, as the undo remembers it.
            about: the same in words.
            advance: told the bytes kept and the bytes written as they are done.
            crew: the processes that carry them out together, this one the first of them.

        Raises:
            NeutralizeError: a file may not be written, or the disk is full or fails; the old bytes are back, or the
                message says that ``neutralize restore`` has to put them back.
        """
        regions = list(dict.fromkeys(region for patch in patches for region in patch.regions if region.nbytes))
        if not regions:
            raise NeutralizeError(
                f"checkpoint: expected an edit of a byte or more under {str(self.root)!r}, got one of tensors without "
                "elements; name others"
            )
        touched = list(dict.fromkeys(region.file for region in regions))
        with Files(self.root, writable=True) as files:
            for file in dict.fromkeys((*touched, *marks)):
                _check_writable(files, file)
            edition = self._keep(files, regions, marks, deed, about, advance)
            try:
                self._lay(files, edition)
                if crew is None:
                    run(patches, files, advance)
                else:
                    crew.run(patches, files, advance)
                written = tuple(files.digest(region) for region in regions)
                self._finish(files, edition)
                _write_whole(self._done(edition.number), json.dumps({"written": written}).encode())
            except BaseException as error:
                if crew is not None:
                    self._outwait(crew.patience_s, edition, error)
                self._roll_back_after(error, files, edition)
                raise
        return replace(edition, written=written)

    def roll_back(self, edition: Edition, advance: Advance = silent) -> None:
        """Put back the bytes of an edit, whether it was finished or cut off; the journal must be locked.

        Raises:
            NeutralizeError: the undo is damaged, a file was removed or has another size, or the disk fails.
        """
        with explained("restore"), Files(self.root, writable=True) as files:
            for file in dict.fromkeys((*edition.files, *(mark.file for mark in edition.marks))):
                if not os.path.lexists(self.root / file):
                    raise _gone(file, edition)
                _check_writable(files, file)
            self._restore(files, edition, advance)

    def recover(self, advance: Advance = silent) -> list[Edition]:
        """Put back the bytes of what was cut off; the journal must be locked.

        Returns:
            The edits that were rolled back: one at most, unless somebody has touched the journal.
        """
        cut_off = [edition for edition in self.editions() if not edition.is_done]
        for edition in reversed(cut_off):
            self.roll_back(edition, advance)
        for part in self.folder.glob("*.part"):
            part.unlink()
        return cut_off

    def found(self, edition: Edition, advance: Advance = silent) -> str:
        """Say what is now where a finished edit wrote, as far as no later edit has written there too.

        Args:
            edition: the edit.
            advance: told the bytes as they are read: those of the edit, whatever the size of the checkpoint.

        Returns:
            ``edited`` (what it wrote), ``undone`` (what was there before: somebody has put the old file back),
            or ``changed`` (something else, or no longer there).
        """
        later = [other for other in self.editions() if other.number > edition.number]
        reach = Reach(entry.region for other in later for entry in other.kept)
        seen = {
            digest if digest in ("edited", "undone") else "changed"
            for entry, digest in self._digests(edition, advance)
            if not reach.meets(entry.region)
        }
        return seen.pop() if len(seen) == 1 else "changed" if seen else "edited"

    def check_unchanged(self, edition: Edition) -> None:
        """Check that putting the old bytes back destroys nothing: what a finished edit wrote, or they, are there.

        Raises:
            NeutralizeError: something else was written since.
        """
        for entry, digest in self._digests(edition, silent):
            if digest == "gone":
                raise _gone(entry.region.file, edition)
            if digest not in ("edited", "undone"):
                raise NeutralizeError(
                    f"restore: expected {entry.region.file!r} as edit {edition.number} left it, got other bytes at "
                    f"{entry.region.offset}: something else has written there; --force puts the old bytes back "
                    "all the same"
                )

    def _digests(self, edition: Edition, advance: Advance) -> Iterator[tuple[Kept, str]]:
        """For each region of a finished edit whether it is as the edit left it, as it was before, or else."""
        with Files(self.root) as files:
            for entry, written in zip(edition.kept, edition.written, strict=True):
                try:
                    digest = files.digest(entry.region, advance)
                except (OSError, NeutralizeError):  # it is not there any more, or shorter
                    digest = "gone"
                yield entry, "edited" if digest == written else "undone" if digest == entry.digest else digest

    def _done(self, number: int) -> Path:
        return self.folder / f"{number:06d}.done"

    def _keep(
        self,
        files: Files,
        regions: list[Region],
        marks: Mapping[str, tuple[int, bytes]],
        deed: Deed,
        about: str,
        advance: Advance,
    ) -> Edition:
        """Write the undo, and return when it is on the disk."""
        number = max((_number(path) for path in self.folder.glob("*.undo")), default=0) + 1
        path = self.folder / f"{number:06d}.undo"
        part = path.with_suffix(".part")
        needed = sum(region.nbytes for region in regions)
        free = shutil.disk_usage(self.folder).free
        if free < needed + (1 << 20):
            raise NeutralizeError(
                f"checkpoint: expected {needed} free bytes beside {str(self.root)!r} for the undo, got {free}; make "
                "room, or use --output on another disk"
            )
        try:
            with explained("checkpoint"), part.open("wb") as out:
                out.write(_MAGIC)
                kept = []
                for region in regions:
                    place, hasher = out.tell(), hashlib.sha256()
                    for chunk in region.chunks():
                        data = files.read(region.part(*chunk)).view(-1)
                        view = memory(data)
                        hasher.update(view)
                        out.write(view)
                        advance(len(view))
                    kept.append(Kept(region, hasher.hexdigest(), place))
                held = tuple(
                    Mark(file, offset, _bytes(files, Region.run(file, offset, len(mark))).hex(), mark.hex())
                    for file, (offset, mark) in marks.items()
                )
                when = datetime.now(timezone.utc).isoformat(timespec="seconds")
                names = deed.strategy, deed.layers, deed.tensors
                edition = Edition(number, path, deed.digest, about, when, tuple(kept), held, (), *names)
                footer = _footer(edition)
                out.write(footer)
                out.write(hashlib.sha256(footer).digest() + len(footer).to_bytes(8, "little"))
                out.flush()
                os.fsync(out.fileno())
            with explained("checkpoint"):
                part.rename(path)
                sync_folder(self.folder)
                sync_folder(self.root)
        except BaseException:  # nothing has been changed yet
            part.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise
        return edition

    def _lay(self, files: Files, edition: Edition) -> None:
        """Lay the marks over the files' heads."""
        for mark in edition.marks:
            files.write(Region.run(mark.file, mark.offset, len(mark.mark) // 2), _tensor(mark.mark))
            files.sync(mark.file)

    def _finish(self, files: Files, edition: Edition) -> None:
        """Bring everything to the disk, and only then take the marks away."""
        for file in edition.files:
            files.sync(file)
        for mark in edition.marks:
            files.write(Region.run(mark.file, mark.offset, len(mark.held) // 2), _tensor(mark.held))
            files.sync(mark.file)

    def _restore(self, files: Files, edition: Edition, advance: Advance) -> None:
        """Put the old bytes back: first the edit counts as cut off, at the end as never made."""
        for mark in edition.marks:
            if _bytes(files, Region.run(mark.file, mark.offset, len(mark.held) // 2)).hex() not in (
                mark.held,
                mark.mark,
            ):
                raise NeutralizeError(
                    f"restore: expected the head of {mark.file!r} as edit {edition.number} found it, got another: the "
                    f"file was replaced by one whose tensors lie elsewhere; remove {str(edition.path)!r} to forget the "
                    "edit"
                )
        with Files(self.folder) as undo:
            for entry in edition.kept:
                if entry.region.end > files.size(entry.region.file):
                    raise NeutralizeError(
                        f"restore: expected {entry.region.end} bytes or more in {entry.region.file!r}, got "
                        f"{files.size(entry.region.file)}: it was replaced or truncated; fetch the checkpoint again"
                    )
                kept = Region.run(edition.path.name, entry.place, entry.region.nbytes)
                if undo.digest(kept) != entry.digest:
                    raise NeutralizeError(
                        f"restore: expected the bytes that were kept in {str(edition.path)!r}, got others: the undo is "
                        "damaged; fetch the checkpoint again"
                    )
            self._done(edition.number).unlink(missing_ok=True)  # from here on it counts as cut off
            sync_folder(self.folder)
            self._lay(files, edition)
            for entry in edition.kept:
                place = entry.place
                for chunk in entry.region.chunks():
                    part = entry.region.part(*chunk)
                    data = undo.read(Region.run(edition.path.name, place, part.nbytes))
                    files.write(part, data.view(part.rows, part.width))
                    place += part.nbytes
                    advance(part.nbytes)
        self._finish(files, edition)
        edition.path.unlink()
        sync_folder(self.folder)

    def _roll_back_after(self, error: BaseException, files: Files, edition: Edition) -> None:
        try:
            self._restore(files, edition, silent)
        except BaseException as second:
            raise NeutralizeError(
                f"checkpoint: expected to write {edition.nbytes} bytes under {str(self.root)!r}, got {_reason(error)}, "
                f"and could not put the old bytes back ({_reason(second)}); they are in {str(edition.path)!r}: run "
                "neutralize restore when the disk works again"
            ) from error
        if isinstance(error, OSError):
            raise NeutralizeError(
                f"checkpoint: expected to write {edition.nbytes} bytes under {str(self.root)!r}, got {_reason(error)}; "
                "every old byte is back: make room or check the disk, and apply again"
            ) from error


def run(patches: Sequence[Patch], files: Files, advance: Advance) -> None:
    """Carry out patches in their order."""
    for patch in patches:
        for count in patch.run(files):
            advance(count)


def take(descriptor: int, place: Path, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file if it is free.

    Args:
        descriptor: of the file.
        place: names it in messages.
        kind: ``LOCK_EX`` or ``LOCK_SH``.

    Returns:
        Whether it was free.

    Raises:
        NeutralizeError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise NeutralizeError(
            f"checkpoint: expected a file system with locks for {str(place)!r}, got {error.strerror}; mount it with "
            "flock, or copy the checkpoint to another disk"
        ) from error
    return True


def _gone(file: str, edition: Edition) -> NeutralizeError:
    return NeutralizeError(
        f"restore: expected {file!r} with the bytes that edit {edition.number} wrote, got no such file or a shorter "
        f"one; put it back, or remove {str(edition.path)!r} to forget the edit"
    )


def _check_writable(files: Files, file: str) -> None:
    """Check that a file may be changed in place.

    Raises:
        NeutralizeError: it is a link, has several names, or is read-only.
    """
    path = files.root / file
    if path.is_symlink():
        raise NeutralizeError(
            f"checkpoint: expected a file of its own for {str(path)!r}, got a link to {str(path.resolve())!r}, which "
            "others may use too (the cache of a hub is shared); use --output, or copy it"
        )
    try:
        descriptor = files.descriptor(file)
    except OSError as error:
        raise NeutralizeError(
            f"checkpoint: expected a file that can be written for {str(path)!r}, got {error.strerror}; use --output"
        ) from error
    about = os.fstat(descriptor)
    if about.st_nlink > 1:
        raise NeutralizeError(
            f"checkpoint: expected a file with one name for {str(path)!r}, got one with {about.st_nlink} hard links, "
            "which would all change; use --output, or copy it"
        )
    if not about.st_mode & 0o222:
        raise NeutralizeError(
            f"checkpoint: expected a file that can be written for {str(path)!r}, got a read-only one; use --output, or "
            "chmod u+w it"
        )


# ---- the undo file ---------------------------------------------------------------------------------------------------


def _footer(edition: Edition) -> bytes:
    content = {
        "format": _FORMAT,
        "number": edition.number,
        "digest": edition.digest,
        "about": edition.about,
        "when": edition.when,
        "strategy": edition.strategy,
        "layers": edition.layers,
        "tensors": edition.tensors,
        "kept": [
            [entry.region.file, entry.region.offset, entry.region.rows, entry.region.width, entry.region.stride,
             entry.digest, entry.place]
            for entry in edition.kept
        ],
        "marks": [list(asdict(mark).values()) for mark in edition.marks],
    }  # fmt: skip
    return json.dumps(content, separators=(",", ":")).encode()


def _read_edition(path: Path) -> Edition:
    damaged = NeutralizeError(
        f"checkpoint: expected the undo of an edit in {str(path)!r}, got a damaged file; fetch the checkpoint again"
    )
    try:
        size = path.stat().st_size
        if size < len(_MAGIC) + 40:
            raise damaged
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise damaged
            file.seek(size - 40)
            digest, length = file.read(32), int.from_bytes(file.read(8), "little")
            if length > min(size - 40 - len(_MAGIC), TEXT_LIMIT):
                raise damaged
            file.seek(size - 40 - length)
            footer = file.read(length)
    except OSError as error:
        raise NeutralizeError(
            f"checkpoint: expected the undo of an edit in {str(path)!r}, got {error.strerror}; check the folder"
        ) from error
    if hashlib.sha256(footer).digest() != digest:
        raise damaged
    content = parse_json(footer, f"the undo {str(path)!r}")
    try:
        if content["format"] != _FORMAT:
            raise NeutralizeError(
                f"checkpoint: expected format {_FORMAT} of {str(path)!r}, got {content['format']!r}; use the version "
                "of neutralize that wrote it"
            )
        kept = tuple(
            Kept(_region(file, offset, rows, width, stride), str(digest), _size(place))
            for file, offset, rows, width, stride, digest, place in content["kept"]
        )
        marks = tuple(_mark(file, offset, held, mark) for file, offset, held, mark in content["marks"])
        written: tuple[str, ...] = ()
        done = path.with_suffix(".done")
        if done.is_file():
            written = tuple(parse_json(done.read_bytes(), f"{str(done)!r}")["written"])
            if len(written) != len(kept):
                raise damaged
        strategy = _text(content.get("strategy", ""))  # undos of earlier versions have none of these three
        layers, tensors = (tuple(map(_text, content.get(name, ()))) for name in ("layers", "tensors"))
        digest, about, when = content["digest"], content["about"], content["when"]
        return Edition(_number(path), path, digest, about, when, kept, marks, written, strategy, layers, tensors)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, NeutralizeError):
            raise
        raise damaged from error


def _region(file: str, *sizes: object) -> Region:
    region = Region(_plain(file), *map(_size, sizes))
    if not 0 < region.width <= region.stride or not region.rows or region.end >= 1 << 63:
        raise ValueError(region)
    return region


def _mark(file: str, offset: object, held: str, mark: str) -> Mark:
    if not 0 < len(bytes.fromhex(held)) == len(bytes.fromhex(mark)):
        raise ValueError(mark)
    return Mark(_plain(file), _size(offset), held, mark)


def _plain(file: str) -> str:
    """The name of a file of the folder itself: an undo may lead nowhere else."""
    if not isinstance(file, str) or not file or file in (".", "..") or "/" in file or "\0" in file:
        raise ValueError(file)
    return file


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(value)
    return value


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdigit() else 0


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _bytes(files: Files, region: Region) -> bytes:
    return bytes(memory(files.read(region).view(-1)))


def _tensor(hexadecimal: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(hexadecimal), dtype=torch.uint8)[None]


def _write_whole(path: Path, content: bytes) -> None:
    """Write a small file so that it is either not there or whole, on the disk too."""
    part = path.with_suffix(".part")
    with part.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    part.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(op: str) -> Iterator[None]:
    """Turn what the operating system reports into the one error of this library."""
    try:
        yield
    except OSError as error:
        raise NeutralizeError(
            f"{op}: expected files that can be read and written, got {_reason(error)}; make room or check the disk, "
            "and try again"
        ) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' for {str(error.filename)!r}' if error.filename else ''}"
    return str(error) or type(error).__name__
