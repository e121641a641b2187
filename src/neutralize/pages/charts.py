"""Charts as plain numbers, which a template draws as SVG: every text is a text, every colour one of the page's.

Each chart comes in two widths, for a desk and for a phone, so that its letters have the size of the page's letters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from neutralize.pages.page import figure

WIDTHS = {"wide": 720, "narrow": 340}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "bar")
"""The marks that tell lines apart, beside their colours and dashes."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 30, 44
_LEAST_SPAN = 5.0  # what a logarithmic axis spans is at least the square of this
_LABEL = 18  # height of a label, with some room
_NOTHING = (1e-9, 0.1)  # the ends of a logarithmic axis where all is 0
_ZERO = 26  # height of the band below a logarithmic axis that holds what is 0


@dataclass(frozen=True)
class Scale:
    """From values to pixels.

    Attributes:
        low, high: the values at its ends.
        start, end: the pixels of these.
        kind: ``linear``, ``log``, or ``signed``: linear around 0 and logarithmic beyond ``near`` on both sides.
        near: of a signed scale, where it begins to be logarithmic.
        zero: of a logarithmic scale, the pixel of what is 0, or ``None`` if nothing is.
    """

    low: float
    high: float
    start: float
    end: float
    kind: str = "linear"
    near: float = 1.0
    zero: float | None = None

    def __call__(self, value: float) -> float:
        """Return the pixel of a value, within the scale's ends."""
        if self.kind == "log" and value <= 0:
            return self.start if self.zero is None else self.zero
        low, high = self._bent(self.low), self._bent(self.high)
        part = (self._bent(value) - low) / (high - low)
        return round(self.start + min(1.0, max(0.0, part)) * (self.end - self.start), 1)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """Return the pixels and labels of some round values, in ascending order."""
        if self.kind == "linear":
            values = _round_values(self.low, self.high, most)
        elif self.kind == "log":
            values = _powers(self.low, self.high, most)
        else:
            positive = _powers(self.near, max(self.high, self.near), max(1, most // 2))
            negative = _powers(self.near, max(-self.low, self.near), max(1, most // 2))
            values = [*(-value for value in reversed(negative) if -value >= self.low), 0.0]
            values += [value for value in positive if value <= self.high]
            values = self._apart(values)
        found = [(self(value), figure(value).removeprefix("1\u00a0×\u00a0")) for value in values]
        return [(self.zero, "0"), *found] if self.zero is not None else found

    def _apart(self, values: list[float]) -> list[float]:
        """Those of some values, 0 among them, whose labels do not touch; the ones nearest to 0 are thought of first."""
        kept: list[float] = []
        for value in sorted(values, key=abs):
            if all(abs(self(value) - self(other)) >= _LABEL for other in kept):
                kept.append(value)
        return sorted(kept)

    def _bent(self, value: float) -> float:
        if self.kind == "log":
            return math.log10(value)
        if self.kind == "signed":
            return math.copysign(math.log10(1 + abs(value) / self.near), value)
        return value


def _round_values(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, last + 1)]


def _powers(low: float, high: float, most: int) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first < 2:
        factors = (1, 2, 5) if high / low < 100 else (1, 3)
        values = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in factors]
        return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    step = -(-(last - first + 1) // max(1, most))
    return [10.0**power for power in range(first, last + 1, step)]


@dataclass(frozen=True)
class Line:
    """Points in order, with what is said of them in the legend.

    Attributes:
        label: in the legend.
        points: x and y; a y that is no number is left out.
        colour: 1 to 4, one of the page's; 0 is grey.
        shape: of the marks, one of ``SHAPES``, or ``""``: none.
        dashed: drawn as dashes.
        joined: the points are joined.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    colour: int = 1
    shape: str = "circle"
    dashed: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Bars:
    """A bar for each place.

    Attributes:
        label: in the legend.
        values: one per place; what is no number has none.
        names: of the places, in full.
        colour: see ``Line``.
        marked: places whose bars have another look.
        marked_label: what that means.
    """

    label: str
    values: tuple[float, ...]
    names: tuple[str, ...]
    colour: int = 1
    marked: frozenset[int] = frozenset()
    marked_label: str = ""


@dataclass(frozen=True)
class Drawing:
    """A chart in one width, in pixels.

    Attributes:
        style: ``wide`` or ``narrow``.
        width, height: of the picture.
        left, right, top, bottom: of the field.
        across, up: pixels and labels of the ticks.
        bars: x, y, width, height, name with value, and whether it is marked.
        lines: each with its points in pixels.
        base: the pixel that bars stand on.
    """

    style: str
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    bars: tuple[tuple[float, float, float, float, str, bool], ...]
    lines: tuple[tuple[Line, tuple[tuple[float, float], ...]], ...]
    base: float


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        key: of letters; no other chart of the page has it.
        title: what it shows.
        told: what one would say of it to somebody who does not see it.
        across, up: what the axes show.
        bars: what the legend says of bars, if there are any.
        lines: what the legend says of lines.
        drawings: one per width.
    """

    key: str
    title: str
    told: str
    across: str
    up: str
    bars: Bars | None
    lines: tuple[Line, ...]
    drawings: tuple[Drawing, ...]


def curves(key: str, title: str, told: str, across: str, up: str, lines: Sequence[Line]) -> Chart:
    """Draw lines over two logarithmic axes; what is 0 lies in a band of its own below.

    Args:
        key: see ``Chart``, as are the next four.
        title: of the chart.
        told: in words.
        across: of the horizontal axis.
        up: of the vertical one.
        lines: their x are positive.
    """
    values = [y for line in lines for _, y in line.points if not math.isnan(y)]
    xs = [x for line in lines for x, _ in line.points]

    def drawn(style: str, width: int) -> Drawing:
        height = 300 if style == "wide" else 260
        bottom = height - _BOTTOM
        vertical = _positive(values, bottom, _TOP)
        horizontal = Scale(min(xs), max(xs), _LEFT + 8, width - _RIGHT - 8, "log")
        return _drawing(style, width, height, horizontal.ticks(7), vertical, (), lines, horizontal)

    return Chart(key, title, told, across, up, None, tuple(lines), _both(drawn))


def bars(
    key: str,
    title: str,
    told: str,
    across: str,
    up: str,
    labels: Sequence[str],
    shown: Bars,
    lines: Sequence[Line] = (),
) -> Chart:
    """Draw a bar for each place, and marks above them.

    Args:
        key: see ``Chart``, as are the next four.
        title: of the chart.
        told: in words.
        across: of the horizontal axis.
        up: of the vertical one.
        labels: of the places, short.
        shown: the bars.
        lines: their x are places, from 0.
    """
    values = [value for value in shown.values if math.isfinite(value)]
    values += [y for line in lines for _, y in line.points if math.isfinite(y)]

    def drawn(style: str, width: int) -> Drawing:
        height = 280 if style == "wide" else 240
        bottom = height - _BOTTOM
        vertical = _signed(values, bottom, _TOP) if min(values, default=0.0) < 0 else _positive(values, bottom, _TOP)
        step = (width - _LEFT - _RIGHT) / max(1, len(labels))
        horizontal = Scale(-0.5, max(0.5, len(labels) - 0.5), _LEFT, width - _RIGHT)
        base = vertical(0.0) if vertical.kind == "signed" else float(bottom)
        rects = []
        for place, (value, name) in enumerate(zip(shown.values, shown.names, strict=True)):
            if math.isfinite(value):
                y, thick = vertical(value), min(40.0, max(1.0, 0.72 * step))
                left, top, tall = horizontal(place) - thick / 2, min(y, base), max(1.0, abs(y - base))
                rects.append(
                    (round(left, 1), top, round(thick, 1), tall, f"{name}: {figure(value)}", place in shown.marked)
                )
        every = max(1, math.ceil((7.5 * max(map(len, labels), default=1) + 6) / step))
        ticks = [(horizontal(place), label) for place, label in enumerate(labels) if place % every == 0]
        return _drawing(style, width, height, ticks, vertical, rects, lines, horizontal, base)

    return Chart(key, title, told, across, up, shown, tuple(lines), _both(drawn))


def _both(drawn: Callable[[str, int], Drawing]) -> tuple[Drawing, ...]:
    return tuple(drawn(style, width) for style, width in WIDTHS.items())


def _positive(values: Iterable[float], bottom: float, top: float) -> Scale:
    """A logarithmic scale of what is not negative."""
    found = [value for value in values if math.isfinite(value)]
    above = [value for value in found if value > 0]
    has_zero = len(above) < len(found) or not above
    low, high = (min(above), max(above)) if above else _NOTHING
    margin = max(1.6, _LEAST_SPAN * math.sqrt(low / high))
    zero = float(bottom - 8) if has_zero else None
    return Scale(low / margin, high * margin, bottom - (_ZERO if has_zero else 0), top, "log", zero=zero)


def _signed(values: Iterable[float], bottom: float, top: float) -> Scale:
    found = [value for value in values if math.isfinite(value)]
    sizes = [abs(value) for value in found if value]
    near = 10.0 ** math.floor(math.log10(max(min(sizes), max(sizes) / 1e4)))
    return Scale(min(found) * 1.3, max(*found, near) * 1.3, bottom, top, "signed", near=near)


def _drawing(
    style: str,
    width: int,
    height: int,
    across: Sequence[tuple[float, str]],
    vertical: Scale,
    rects: Sequence[tuple[float, float, float, float, str, bool]],
    lines: Sequence[Line],
    horizontal: Scale,
    base: float = 0.0,
) -> Drawing:
    placed = tuple(
        (line, tuple((horizontal(x), vertical(y)) for x, y in line.points if not math.isnan(y))) for line in lines
    )
    return Drawing(
        style,
        width,
        height,
        _LEFT,
        width - _RIGHT,
        _TOP,
        height - _BOTTOM,
        tuple(across),
        tuple(vertical.ticks(6)),
        tuple(rects),
        placed,
        base,
    )
