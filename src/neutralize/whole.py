"""Whole: a file of text appears whole, in place of an older one, or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from neutralize.errors import NeutralizeError


def write_whole(path: str | os.PathLike[str], text: str | None, expected: str, endings: Sequence[str] = ()) -> None:
    """Write a file under a temporary name and rename it; without a text only show that this would go well.

    Args:
        path: the file.
        text: what is to stand in it, or ``None`` to fail before the work rather than after it.
        expected: says in a message what the file is for.
        endings: those that its name may have, if not any.

    Raises:
        NeutralizeError: its name ends otherwise, something else is there, or the folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    reason = ""
    if target.is_dir():
        reason = "it is a folder"
    elif endings and target.suffix.lower() not in endings:
        reason = f"its name does not end in {endings[0]}"
    elif target.exists() and not target.is_file():
        reason = "something else is there"
    else:
        try:
            with open(part, "x", encoding="utf-8", errors="replace") as file:  # names may hold what is no character
                if text is not None:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            if text is not None:
                part.replace(target)
        except OSError as error:
            reason = error.strerror or type(error).__name__
        finally:
            with suppress(OSError):  # renamed, or never made
                part.unlink()
    if reason:
        raise NeutralizeError(f"{expected} in a folder that can be written, got {str(path)!r} ({reason}); give one")
