"""Write an edited checkpoint beside the old one: a copy under a temporary name, edited there, and one atomic rename."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from neutralize.checkpoint.journal import FOLDER, explained, sync_folder, take
from neutralize.checkpoint.layout import Layout
from neutralize.checkpoint.patch import Patch, written_bytes
from neutralize.checkpoint.region import BUFFER_BYTES, Files, Reach
from neutralize.errors import NeutralizeError
from neutralize.progress import Advance, silent

_FICLONE = 0x40049409


@dataclass(frozen=True)
class Written:
    """What came of writing a checkpoint to a new place.

    Attributes:
        path: the new folder or file.
        files: those that the edit changes.
        written_bytes: how many bytes it writes into them.
        copied_bytes: bytes of files that were copied or cloned.
        linked_files: how many files share their bytes with the old ones by a hard link.
        verified: how many untouched tensors were compared with the old ones by SHA-256.
    """

    path: Path
    files: tuple[str, ...]
    written_bytes: int
    copied_bytes: int
    linked_files: int
    verified: int


def check_free(output: Path) -> None:
    """Check that a copy can appear at a path.

    Raises:
        NeutralizeError: something is there, or there is no folder for it.
    """
    output = Path(os.path.abspath(output))
    if output.exists() or output.is_symlink():
        raise NeutralizeError(
            f"checkpoint: expected nothing at {str(output)!r}, got something that is there; remove it, or give another "
            "output"
        )
    if not output.parent.is_dir():
        raise NeutralizeError(
            f"checkpoint: expected a folder to write {output.name!r} into, got none at {str(output.parent)!r}; make it"
        )


def write_to(
    source: Path,
    layout: Layout,
    patches: Sequence[Patch],
    output: Path,
    *,
    link: bool = False,
    verify: bool = False,
    advance: Advance = silent,
) -> Written:
    """Copy a checkpoint and edit the copy; the output appears whole or not at all.

    Args:
        source: a folder, of which every file is copied, or a file.
        layout: its tensors.
        patches: what is written into the copy.
        output: the path of the new folder or file; nothing may be there.
        link: give files that do not change a second name instead of copying them.
        verify: compare the SHA-256 of every tensor that is not written with that of the old one.
        advance: told the bytes copied, written and compared as they are done.

    Raises:
        NeutralizeError: something is in the way, the disk is full or fails, or a copy differs; no output is left.
    """
    output = Path(os.path.abspath(output))
    check_free(output)
    if source.is_dir() and output.is_relative_to(source.resolve()):
        raise NeutralizeError(
            f"checkpoint: expected an output outside of {str(source)!r}, got {str(output)!r}; give another"
        )
    if source.is_file() and output.suffix != source.suffix:
        raise NeutralizeError(
            f"checkpoint: expected an output that ends in {source.suffix}, as {source.name!r} does, got "
            f"{output.name!r}; give another"
        )
    touched = {region.file for patch in patches for region in patch.regions}
    with explained("checkpoint"), _temporary(output) as folder:
        root = folder / "new"
        root.mkdir()
        files = _files_of(source) if source.is_dir() else [(source, source.name)]
        copied, linked = 0, 0
        for path, name in files:
            if link and name not in touched:
                _link(path.resolve(), root / name)
                linked += 1
            else:
                copied += _copy(path, root / name, advance)
        with Files(root, writable=True) as opened:
            for patch in patches:
                for count in patch.run(opened):
                    advance(count)
            for file in touched:
                opened.sync(file)
        verified = _verify(layout, root, patches, advance) if verify else 0
        for path in (root, *(path for path in root.rglob("*") if path.is_dir())):
            sync_folder(path)
        _rename(root if source.is_dir() else root / source.name, output)
        sync_folder(output.parent)
    return Written(output, tuple(sorted(touched)), written_bytes(patches), copied, linked, verified)


def _files_of(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file under a folder, with its path relative to it; links may lead to blobs of the same cache only."""
    from neutralize.checkpoint.locate import inside

    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.split(os.sep)[0] == FOLDER or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink():
            inside(path.parent, path.name, folder)
        if not path.is_file():
            raise NeutralizeError(
                f"checkpoint: expected files in {str(folder)!r}, got {name!r}, which is none; remove it"
            )
        yield path, name


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        raise NeutralizeError(
            f"checkpoint: expected a file system where {str(source)!r} can get a second name beside the output, got "
            f"{error.strerror}; leave --link out"
        ) from error


def _copy(source: Path, target: Path, advance: Advance) -> int:
    """Copy a file with the least work that the file system allows: a clone, a copy in the kernel, or by hand."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as old, target.open("xb") as new:
        size = os.fstat(old.fileno()).st_size
        if not _cloned(old.fileno(), new.fileno()):
            place = 0
            in_kernel = hasattr(os, "copy_file_range")
            while place < size:
                count = 0
                if in_kernel:
                    try:
                        count = os.copy_file_range(old.fileno(), new.fileno(), min(size - place, 1 << 28), place, place)
                    except OSError as error:
                        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                            raise
                        in_kernel = False
                        continue
                else:
                    count = os.pwrite(new.fileno(), os.pread(old.fileno(), BUFFER_BYTES, place), place)
                if count == 0:
                    raise NeutralizeError(
                        f"checkpoint: expected {size} bytes in {str(source)!r}, got {place}: it shrank while it was "
                        "copied; try again when nothing writes there"
                    )
                place += count
                advance(count)
        new.flush()
        os.fsync(new.fileno())
    shutil.copystat(source, target)
    target.chmod(stat.S_IMODE(target.stat().st_mode) | stat.S_IWUSR)
    return size


def _cloned(old: int, new: int) -> bool:
    try:
        fcntl.ioctl(new, _FICLONE, old)
    except OSError:
        return False
    return True


def _verify(layout: Layout, root: Path, patches: Sequence[Patch], advance: Advance) -> int:
    """Compare every tensor that no patch writes with the old one."""
    written = Reach(region for patch in patches for region in patch.regions)
    untouched = [stored.name for stored in layout.tensors.values() if not any(map(written.meets, stored.regions))]
    with Files(layout.root) as old, Files(root) as new:
        for name in untouched:
            for region in layout.tensors[name].regions:
                if old.digest(region, advance) != new.digest(region):
                    raise NeutralizeError(
                        f"checkpoint: expected {name!r} to be copied as it is, got other bytes; the disk is not to be "
                        "trusted: check it"
                    )
    return len(untouched)


def partial(output: Path) -> Path:
    """Return the folder in which an output is written before it gets its name."""
    output = Path(os.path.abspath(output))
    return output.parent / f".{output.name}.partial"


def discard(output: Path) -> list[str]:
    """Remove what a killed run has left of an output, and return its path, if there was something.

    Raises:
        NeutralizeError: a run is writing it now.
    """
    folder = partial(output)
    if not folder.is_dir():
        return []
    with explained("restore"), _temporary(output):
        return [str(folder)]


def remove(output: Path) -> None:
    """Remove a copy that was written, a folder or a file."""
    shutil.rmtree(output) if output.is_dir() else output.unlink()


@contextmanager
def _temporary(output: Path) -> Iterator[Path]:
    """A folder beside the output that is gone in the end; one that a killed run left is removed first."""
    folder = partial(output)
    folder.mkdir(exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        if not take(lock, folder):
            raise NeutralizeError(
                f"checkpoint: expected {str(output)!r} to be free, got one that another run is writing; wait until it "
                "has ended"
            )
        shutil.rmtree(folder / "new", ignore_errors=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _rename(source: Path, target: Path) -> None:
    """Give a file or a folder its name, if that is still free."""
    if target.exists():
        raise NeutralizeError(
            f"checkpoint: expected nothing at {str(target)!r}, got something that came while it was written; give "
            "another output"
        )
    source.rename(target)
