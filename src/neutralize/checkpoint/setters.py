"""Setters: edits of tensors by name, as text: ``blk.3.ffn_down.weight=0``, ``*.bias*=0.5``, ``w[0:4]=identity``."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from neutralize.checkpoint.layout import Elements, Layout, Stored
from neutralize.errors import NeutralizeError
from neutralize.plan import Rewrite, matrix_extent

_SLICES = re.compile(r"\[([-\d:,\s]+)\]$")
_HOW = "write NAME=0, NAME=identity, NAME*=0.5 or NAME+=1, with a glob for NAME and rows and columns: NAME[0:4,:128]=0"


def parse_setters(texts: Sequence[str], layout: Layout) -> list[Rewrite]:
    """Return the edits that setters ask for, in their order.

    A setter is ``NAME = VALUE``, ``NAME *= VALUE`` or ``NAME += VALUE``. ``NAME`` is that of a tensor or a glob over
    the names; ``[ROWS]`` or ``[ROWS,COLUMNS]`` after it confine the edit to indices or ranges of the first two
    dimensions. ``VALUE`` is a number, or after ``=`` also ``identity``: ones on the diagonal of a matrix, the Dirac
    kernel of a convolution. A glob takes a quantized weight, not the tensors that it is stored in. ``NAME*=``
    multiplies where ``NAME`` fits a tensor; else the ``*`` ends a glob (a space before ``=`` says so too).

    Args:
        texts: the setters.
        layout: of the checkpoint whose tensors they name.

    Raises:
        NeutralizeError: a setter cannot be read, names no tensor, or a range that the tensor does not have.
    """
    return [edit for text in texts for edit in _parsed(text, layout)]


def _parsed(text: str, layout: Layout) -> list[Rewrite]:
    left, equals, right = text.rpartition("=")
    operator = left[-1:] if left[-1:] in ("*", "+") and len(left) > 1 else ""
    pattern, value = (left[:-1] if operator else left).strip(), right.strip().lower()
    if not equals or not pattern or not value:
        raise NeutralizeError(f"set: expected NAME=VALUE, got {text!r}; {_HOW}")
    if operator == "*" and not _names(pattern, layout) and _names(f"{pattern}*", layout):
        operator, pattern = "", f"{pattern}*"  # "layers.3.*=0": what no tensor is called is no factor
    slices = _SLICES.search(pattern)
    if slices and pattern not in layout.tensors:
        pattern = pattern[: slices.start()].strip()
    else:
        slices = None
    names = _names(pattern, layout)
    if not names:
        raise unknown_name("set", pattern, layout)
    return [_edit(text, layout.tensors[name], operator, value, slices and slices.group(1)) for name in names]


def unknown_name(op: str, pattern: str, layout: Layout) -> NeutralizeError:
    """Return the error for a name or glob that fits no tensor."""
    near = difflib.get_close_matches(pattern, layout.tensors, n=3, cutoff=0.5) or list(layout.tensors)[:3]
    return NeutralizeError(
        f"{op}: expected the name of a tensor or a glob, got {pattern!r}, which none has; near matches: "
        f"{', '.join(near)}"
    )


def _names(pattern: str, layout: Layout) -> list[str]:
    """The tensor of that name, or else those whose names fit it as a glob.

    A quantized weight stands for the tensors that it is stored in: edited beside it, they would be edited twice.
    """
    if pattern in layout.tensors:
        return [pattern]
    fitting = {name: stored for name, stored in layout.tensors.items() if fnmatchcase(name, pattern)}
    held = {region for stored in fitting.values() if not isinstance(stored, Elements) for region in stored.regions}
    return [
        name
        for name, stored in fitting.items()
        if not isinstance(stored, Elements) or not stored.regions or not held.issuperset(stored.regions)
    ]


def _edit(text: str, stored: Stored, operator: str, value: str, slices: str | None) -> Rewrite:
    rows, columns = _block(text, stored, slices) if slices else (None, None)
    dtype = stored.encoding if isinstance(stored, Elements) else "float32"  # a quantized one says itself what it takes
    about = {"parameter": stored.name, "shape": stored.shape, "dtype": dtype, "rows": rows, "columns": columns}
    if value == "identity" and not operator:
        if len(stored.shape) < 2:
            raise NeutralizeError(
                f"set: expected a matrix or a convolution for {text!r}, got shape {list(stored.shape)}; set a number"
            )
        taps = math.prod(stored.shape[2:])
        if columns is not None and taps > 1:
            raise NeutralizeError(f"set: expected all columns of a convolution for {text!r}, got some; leave them out")
        return Rewrite(**about, diagonal=1.0, start=taps // 2, step=taps)  # type: ignore[arg-type]
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise NeutralizeError(f"set: expected a finite number or identity in {text!r}, got {value!r}; {_HOW}")
    if operator == "*":
        return Rewrite(**about, scale=number)  # type: ignore[arg-type]
    return Rewrite(**about, scale=1.0 if operator else 0.0, fill=number)  # type: ignore[arg-type]


def _block(text: str, stored: Stored, slices: str) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Rows and columns of the matrix view that the ranges of the first two dimensions are."""
    parts = [part.strip() for part in slices.split(",")]
    if not 1 <= len(parts) <= min(2, len(stored.shape)):
        raise NeutralizeError(
            f"set: expected up to {min(2, len(stored.shape))} ranges for {stored.name!r} of shape "
            f"{list(stored.shape)}, "
            f"got [{slices}]; give rows and columns"
        )
    ranges = [_range(text, part, size) for part, size in zip(parts, stored.shape, strict=False)]
    taps = math.prod(stored.shape[2:])
    columns = tuple(place * taps for place in ranges[1]) if len(ranges) == 2 else None
    whole = matrix_extent(stored.shape)
    rows = None if ranges[0] == (0, whole[0]) else ranges[0]
    return rows, None if columns is None or columns == (0, whole[1]) else (columns[0], columns[1])


def _range(text: str, part: str, size: int) -> tuple[int, int]:
    numbers = part.split(":")
    try:
        if len(numbers) == 1:
            first = int(numbers[0])
            first += size if first < 0 else 0
            last = first + 1
        elif len(numbers) == 2:
            first, last, _ = slice(*(int(n) if n.strip() else None for n in numbers)).indices(size)
        else:
            raise ValueError(part)
    except ValueError:
        raise NeutralizeError(
            f"set: expected an index or a range without a step in {text!r}, got {part!r}; {_HOW}"
        ) from None
    if not 0 <= first < last <= size:
        raise NeutralizeError(
            f"set: expected a range inside 0:{size} in {text!r}, got {part!r}; give one with elements"
        )
    return first, last
