"""A sweep as a picture: what each layer is worth, and how far it turns what it is given."""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING, Any

from neutralize.errors import NeutralizeError
from neutralize.plots import blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neutralize.influence.sweep import Sweep

_DECADE = 10.0
"""Bars stand on 0, so that their lengths can be compared, unless the largest is this many times the smallest."""

_LOSS, _GONE, _KL, _COSINE, _GREY = "#4477aa", "#ccbb44", "#aa3377", "#228833", "#555555"


def plot(sweep: Sweep, path: str | os.PathLike[str] | None = None, *, title: str = "") -> Figure:
    """Draw the change of the loss and the divergence of every layer above its block influence, in model order.

    Args:
        sweep: what was found.
        path: a file whose ending names the format: png, svg, pdf; without one it is only drawn.
        title: what is shown above it.

    Returns:
        A matplotlib figure, made without pyplot.

    Raises:
        NeutralizeError: matplotlib is not installed, or the file cannot be written.
    """
    figure = drawn(sweep, title)
    if path is None:
        return figure
    try:
        figure.savefig(os.fspath(path), dpi=120)
    except (OSError, ValueError) as error:
        raise NeutralizeError(
            f"plot: expected a file name that ends in png, svg or pdf in a folder that is there, got {str(path)!r} "
            f"({error}); give one"
        ) from error
    return figure


def drawn(sweep: Sweep, title: str = "") -> Figure:
    """Draw what ``plot`` saves."""
    moved = any(entry.block_influence is not None for entry in sweep)
    figure = blank(max(7.0, min(16.0, 0.3 * len(sweep) + 1.5)), 5.4 if moved else 3.8)
    rows = figure.subplots(2 if moved else 1, 1, sharex=True, squeeze=False, height_ratios=[2.2, 1] if moved else [1])
    _draw_losses(rows[0, 0], sweep)
    if moved:
        _draw_cosines(rows[1, 0], sweep)
    labels, what = short_names([entry.layer for entry in sweep])
    rows[-1, 0].set_xticks(range(len(sweep)), labels, rotation=90 if max(map(len, labels)) > 3 else 0, fontsize=8)
    rows[-1, 0].set_xlabel(what)
    rows[-1, 0].set_xlim(-0.7, len(sweep) - 0.3)
    for axes in rows[:, 0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _draw_losses(axes: Any, sweep: Sweep) -> None:
    places = range(len(sweep))
    deltas = [entry.delta_loss if math.isfinite(entry.delta_loss) else math.nan for entry in sweep]
    gone = set(sweep.chosen)
    colours = [_GONE if entry.layer in gone else _LOSS for entry in sweep]
    axes.bar(places, deltas, color=colours, width=0.72, label="loss added")
    divergences = [math.nan if entry.kl is None else entry.kl for entry in sweep]
    if any(not math.isnan(value) for value in divergences):
        axes.plot(
            places,
            divergences,
            "o",
            color=_KL,
            markersize=4.5,
            markeredgecolor="white",
            label="KL from the intact model",
        )
    if sweep.chosen:
        label = f"off together: {sweep.steps[-1].delta_loss:+.3f}"
        axes.bar([0], [math.nan], color=_GONE, label=label)
    sizes = [abs(value) for value in (*deltas, *divergences) if value and math.isfinite(value)]
    if sizes and min((value for value in deltas if not math.isnan(value)), default=0.0) >= 0:
        if max(sizes) / min(sizes) > _DECADE:
            axes.set_yscale("log")
            axes.set_ylim(min(sizes) / 1.6, max(sizes) * 1.6)
    elif sizes:  # some layers do harm when they are on
        axes.set_yscale("symlog", linthresh=max(min(sizes), max(sizes) / 1e4))
        axes.axhline(0.0, color=_GREY, linewidth=0.8)
    _plain_numbers(axes)
    axes.set_ylabel("with the layer off (nats)")
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=3)
    worst, best = sweep.ranked[-1], sweep.ranked[0]
    for entry in {best.layer: best, worst.layer: worst}.values():
        place = [other.layer for other in sweep].index(entry.layer)
        if math.isfinite(entry.delta_loss):
            height = max(entry.delta_loss, entry.kl or 0.0)
            axes.annotate(
                f"{entry.delta_loss:+.3g}",
                (place, height),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=_GREY,
            )


def _draw_cosines(axes: Any, sweep: Sweep) -> None:
    values = [math.nan if entry.block_influence is None else entry.block_influence for entry in sweep]
    axes.bar(range(len(sweep)), values, color=_COSINE, width=0.72)
    known = [value for value in values if not math.isnan(value)]
    if min(known, default=0.0) > 0 and max(known) / min(known) > _DECADE:
        axes.set_yscale("log")
    _plain_numbers(axes)
    axes.set_ylabel("1 - cos(in, out)")


def _plain_numbers(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        # A decade or less has few powers of ten to label.
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def short_names(names: list[str]) -> tuple[list[str], str]:
    """Return the names without what they share, and what the axis shows: ``model.layers.3`` is 3 of ``model.layers``.

    Args:
        names: qualified names of layers.
    """
    parts = [re.fullmatch(r"(.*)\.(\d+)(.*)", name) for name in names]
    around = {(part[1], part[3]) for part in parts if part is not None}
    if all(parts) and len(around) == 1:
        ((before, after),) = around
        return [part[2] for part in parts if part is not None], f"{before}[·]{after}"
    return names, "layer"
