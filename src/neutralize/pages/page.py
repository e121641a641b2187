"""What every page has: the templates, numbers as people read them, provenance, and the file it goes to."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

import neutralize
from neutralize.report import format_bytes
from neutralize.whole import write_whole

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@cache
def _templates() -> Environment:
    """The templates; what is put into them is escaped, whatever it is."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("neutralize.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(figure=figure, size=format_bytes, breakable=_breakable)
    return templates


def render(template: str, **content: Any) -> str:
    """Fill a template.

    Args:
        template: its file name.
        **content: what it shows.
    """
    return _templates().get_template(template).render(**content)


def figure(number: float | None, digits: int = 3) -> str:
    """Return a number with some significant digits, as people write it: ``"1.25 × 10⁻⁷"``; nothing for ``None``."""
    if number is None:
        return ""
    if math.isnan(number):
        return "not seen"
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    mantissa, _, exponent = f"{number:.{digits}g}".partition("e")
    mantissa = mantissa.replace("-", "−")
    return f"{mantissa}\u00a0×\u00a010{str(int(exponent)).translate(_SUPERSCRIPTS)}" if exponent else mantissa


def _breakable(name: str) -> Markup:
    """A qualified name, escaped, that a line may break behind its dots."""
    from markupsafe import Markup, escape

    return escape(name).replace(".", Markup(".<wbr>"))


def provenance(command: str, digests: Mapping[str, str], facts: Mapping[str, str]) -> list[tuple[str, str, bool]]:
    """Where a page comes from: what is shown, and whether it is code.

    The date is that of ``SOURCE_DATE_EPOCH`` where the environment has it, as reproducible builds do.

    Args:
        command: the command line, or ``""``.
        digests: by what they are of.
        facts: more lines, in words.
    """
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    told = [("date", _now().strftime("%Y-%m-%d %H:%M:%S UTC"), False)]
    if command:
        told.append(("command line", command, True))
    told += [
        ("neutralize", neutralize.__version__, False),
        ("PyTorch", f"{torch.__version__}{cuda}", False),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}", False),
    ]
    told += [(label, text, False) for label, text in facts.items() if text]
    return told + [(f"digest of {what}", digest, True) for what, digest in digests.items()]


def _now() -> datetime:
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(given), timezone.utc) if given.isdecimal() else datetime.now(timezone.utc)


_EXPECTED, _ENDINGS = "report: expected an html file", (".html", ".htm")


def check_target(path: str | os.PathLike[str]) -> None:
    """Fail before the work rather than after it, if no page could be written there.

    Raises:
        NeutralizeError: the name is not that of a page, something else is there, or the folder cannot be written.
    """
    write_whole(path, None, _EXPECTED, _ENDINGS)


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write a page: it appears whole, in place of an older one, or not at all.

    Raises:
        NeutralizeError: see ``check_target``.
    """
    write_whole(path, text, _EXPECTED, _ENDINGS)
