"""A sweep as a page: what each layer is worth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from neutralize.influence.plot import short_names
from neutralize.influence.report import timing
from neutralize.pages import plans
from neutralize.pages.charts import Bars, Chart, Line, bars
from neutralize.pages.page import figure, provenance, render

if TYPE_CHECKING:
    from neutralize.influence.sweep import Influence, Sweep

_LONGEST_LABEL = 3


def page(sweep: Sweep, *, title: str = "", command: str = "") -> str:
    """Return a sweep as a page.

    Args:
        sweep: what was found.
        title: what was measured, in words.
        command: the command line, or ``""``.
    """
    certificates = [plan.certificate for plan in sweep.plans]
    layers = [row for plan in sweep.plans for row in plans.rows(plan)][: plans.MOST_ROWS]
    return render(
        "sweep.html",
        title=title or "What each layer is worth",
        sweep=sweep,
        ranked=sweep.ranked[: plans.MOST_ROWS],
        step_of={step.layer: place for place, step in enumerate(sweep.steps, 1)},
        number_of={entry.layer: place for place, entry in enumerate(sweep, 1)} if _is_numbered(sweep) else {},
        open_rows=plans.OPEN_ROWS,
        most_rows=plans.MOST_ROWS,
        charts=_charts(sweep),
        rows=layers,
        written_bytes=sum(plan.written_bytes for plan in sweep.plans),
        grounds=plans.grounds(certificate for plan in sweep.plans for certificate in plan.certificates),
        meanings=plans.meanings(certificates),
        timing=timing(sweep),
        provenance=provenance(command, sweep.digests, {}),
    )


def fragment(sweep: Sweep) -> str:
    """Return a sweep as a short piece of HTML, in the colours of what it stands in."""
    return render(
        "sweep_fragment.html",
        sweep=sweep,
        ranked=sweep.ranked[: plans.MOST_ROWS],
        step_of={step.layer: place for place, step in enumerate(sweep.steps, 1)},
        number_of={},
        open_rows=plans.OPEN_ROWS,
        most_rows=plans.MOST_ROWS,
    )


def _names(sweep: Sweep) -> tuple[list[str], str]:
    return short_names([entry.layer for entry in sweep])


def _is_numbered(sweep: Sweep) -> bool:
    """Whether charts number the layers, for want of short names."""
    return max(map(len, _names(sweep)[0]), default=0) > _LONGEST_LABEL


def _charts(sweep: Sweep) -> list[Chart]:
    if not sweep.entries:
        return []
    labels, across = _names(sweep)
    if _is_numbered(sweep):
        labels, across = [str(place) for place in range(1, len(sweep) + 1)], "layer, by its number in the table"
    names = tuple(entry.layer for entry in sweep)
    worst, best = sweep.ranked[-1], sweep.ranked[0]
    chosen = frozenset(place for place, name in enumerate(names) if name in sweep.chosen)
    lost = Bars(
        "loss added",
        tuple(entry.delta_loss for entry in sweep),
        names,
        1,
        chosen,
        "of the layers that go together" if chosen else "",
    )
    divergences = tuple((float(place), entry.kl) for place, entry in enumerate(sweep) if entry.kl is not None)
    kl = [Line("KL from the intact model", divergences, 2, "circle", joined=False)] if divergences else []
    told = f"Added loss of each layer switched off alone: {_extremes(best, worst)}."
    charts = [bars("loss", "What each layer is worth", told, across, "with the layer off, log scale", labels, lost, kl)]
    cosines = tuple(math.nan if entry.block_influence is None else entry.block_influence for entry in sweep)
    if any(map(math.isfinite, cosines)):
        turned = Bars("1 − cos(input, output)", cosines, names, 3)
        seen = [(value, name) for value, name in zip(cosines, names, strict=True) if math.isfinite(value)]
        (low, least), (high, most) = min(seen), max(seen)
        told = f"From {figure(low)} for {least} to {figure(high)} for {most}." if len(seen) > 1 else f"{figure(low)}."
        charts.append(
            bars("cosine", "How far each layer turns its input", told, across, "1 − cos, log scale", labels, turned)
        )
    return charts


def _extremes(best: Influence, worst: Influence) -> str:
    if best is worst:
        return f"{figure(best.delta_loss)} for {best.layer}"
    return f"from {figure(best.delta_loss)} for {best.layer} to {figure(worst.delta_loss)} for {worst.layer}"
