"""Switch layers of very large PyTorch models off in place, prove how exactly they are off, and put every bit back."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

logging.getLogger("neutralize").addHandler(logging.NullHandler())  # silent, unless a program wants to hear it


def __getattr__(name: str) -> str:
    """The version, as it was installed; looked up when it is asked for. Mere sources on the path do not know theirs."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("neutralize")
        except PackageNotFoundError:
            return "0+unknown"
    raise AttributeError(f"module 'neutralize' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names: what a notebook completes."""
    return sorted([*globals().get("__all__", ()), *(name for name in globals() if name[:2] == "__")])


def _load() -> None:
    """Make the names of ``neutralize.api`` those of this package; some are those of its modules too, and go before."""
    if "__all__" not in globals():
        from neutralize import api

        globals().update({name: getattr(api, name) for name in ("__all__", *api.__all__)})


def _is_command() -> bool:
    """Whether this process is the command ``neutralize``, which loads what takes seconds once it has work."""
    program, words = (sys.argv or [""])[0], sys.orig_argv
    if program == "-m":  # so it is called while the package that is to run is being looked for
        return "-m" in words and words[words.index("-m") + 1 :][:1] == ["neutralize"]
    if os.path.basename(program) != "neutralize" or program not in words:
        return False
    try:
        with open(program, "rb") as script:  # a program of that name may be anybody's
            return b"neutralize.cli" in script.read(4096)
    except OSError:
        return False


if TYPE_CHECKING:
    from neutralize.api import *  # noqa: F403
    from neutralize.api import __all__ as __all__
elif not _is_command():
    _load()
