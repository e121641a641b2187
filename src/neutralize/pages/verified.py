"""A verification as a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from neutralize.pages import plans
from neutralize.pages.charts import SHAPES, Chart, Line, curves
from neutralize.pages.page import figure, provenance, render
from neutralize.pages.weights import Change, changes
from neutralize.plan import Plan

if TYPE_CHECKING:
    from neutralize.verify import Verification

SCALES = tuple(10.0 ** (step / 2) for step in range(-4, 5))
"""The factors that inputs are multiplied by: from a hundredth to a hundred."""

_MOST_LINES = 4


@dataclass(frozen=True)
class Details:
    """What a page shows beside the figures of a verification.

    Attributes:
        plan: what was verified.
        model: class of the model, and where its weights are.
        at: verifications at other scales of the inputs, by the factor; empty where the model has no input to scale.
        weights: some of what is written, before and after.
    """

    plan: Plan
    model: str
    at: tuple[tuple[float, Verification], ...]
    weights: tuple[Change, ...]


def details(
    model: nn.Module,
    plan: Plan,
    applied: Callable[[], AbstractContextManager[object]],
    again: Callable[[float], Verification] | None,
) -> Details:
    """Measure what a page shows beside the figures: the model runs again at every scale.

    Args:
        model: the model planned for.
        plan: the plan.
        applied: makes a context in which the model has the plan's weights.
        again: the verification at a factor of the inputs, or ``None``.
    """
    at = () if again is None else tuple((scale, again(scale)) for scale in SCALES)
    devices = dict.fromkeys(str(parameter.device) for parameter in model.parameters())
    about = f"{type(model).__module__}.{type(model).__qualname__} on {', '.join(devices) or 'no device'}"
    return Details(plan, about, at, changes(model, plan, applied))


def page(
    found: Verification, beside: Details | None, *, title: str = "", command: str = "", facts: Mapping[str, str] = {}
) -> str:
    """Return a verification as a page.

    Args:
        found: what was measured.
        beside: what was measured beside it, or ``None``: there is no more than the figures.
        title: what was verified, in words.
        command: the command line, or ``""``.
        facts: more lines of the provenance.
    """
    plan = None if beside is None else beside.plan
    return render(
        "verification.html",
        title=title or "Layers off, against the network without them",
        found=found,
        ok=is_ok(found, plan),
        errors=_errors(found),
        open_rows=plans.OPEN_ROWS,
        most_rows=plans.MOST_ROWS,
        plan=plan,
        rows=[] if plan is None else plans.rows(plan),
        grounds=[] if plan is None else plans.grounds(plan.certificates),
        meanings=[] if plan is None else plans.meanings([*plan.certificates, plan.certificate]),
        charts=[] if beside is None else _charts(found, beside),
        at=() if beside is None else beside.at,
        weights=() if beside is None else beside.weights,
        unshown=0 if plan is None or beside is None else len(plan.parameters) - len(beside.weights),
        provenance=provenance(
            command,
            {} if plan is None else {"the plan": plan.digest},
            {"model": "" if beside is None else beside.model, **facts},
        ),
    )


def fragment(found: Verification) -> str:
    """Return a verification as a short piece of HTML, in the colours of what it stands in."""
    return render(
        "verification_fragment.html",
        found=found,
        ok=is_ok(found, None),
        errors=_errors(found),
        open_rows=plans.OPEN_ROWS,
        most_rows=plans.MOST_ROWS,
    )


def is_ok(found: Verification, plan: Plan | None) -> bool:
    """Whether what was measured is what the certificates say; where the plan is exact, bit for bit."""
    return found.bound_holds and (found.exact or plan is None or plan.certificate.kind != "exact")


@dataclass(frozen=True)
class Error:
    """The errors of one layer: measured, its bound or ``None``, and the gain of its gradient or ``None``."""

    layer: str
    measured: float
    bound: float | None
    gain: float | None


def _errors(found: Verification) -> list[Error]:
    return [
        Error(layer, error, found.bounds.get(layer), found.gradient_gain.get(layer))
        for layer, error in list(found.per_layer.items())[: plans.MOST_ROWS]
    ]


def _charts(found: Verification, beside: Details) -> list[Chart]:
    if not beside.at:
        return []
    across = "input scale (1: the inputs given)"
    whole = [Line("measured", tuple((scale, one.output_error) for scale, one in beside.at))]
    told = _told([one.output_error for _, one in beside.at])
    whole += _bound("bound of the plan", found.output_bound, beside, 2)
    outputs = curves(
        "outputs",
        "The model's outputs",
        f"Largest error of an element of the outputs, at inputs from a hundredth to a hundred times as large: {told}",
        across,
        "largest error (absolute)",
        whole,
    )
    shown = list(found.per_layer)[:_MOST_LINES]
    lines = []
    for place, layer in enumerate(shown):
        points = tuple((scale, one.per_layer.get(layer, math.nan)) for scale, one in beside.at)
        if not all(math.isnan(error) for _, error in points):
            lines.append(Line(layer, points, place + 1, SHAPES[place]))
            lines += _bound(f"bound of {layer}", found.bounds.get(layer), beside, place + 1)
    charts = [chart for chart in (outputs,) if _shows(whole)]
    if not _shows(lines):
        return charts
    more = f" The first {len(shown)} of {len(found.per_layer)} layers." if len(found.per_layer) > len(shown) else ""
    told = " ".join(f"{line.label}: {_told([y for _, y in line.points])}" for line in lines if line.shape)
    layers = curves(
        "layers",
        "What each layer hands on",
        f"Largest error of what a layer hands on, divided by its largest input.{more} {told}",
        across,
        "largest error (relative)",
        lines,
    )
    return [*charts, layers]


def _shows(lines: Sequence[Line]) -> bool:
    """Whether a chart shows more than that all is 0."""
    return any(y > 0 for line in lines for _, y in line.points)


def _told(errors: list[float]) -> str:
    seen = [error for error in errors if not math.isnan(error)]
    if not seen:
        return "not seen from outside."
    if not any(seen):
        return "0 everywhere."
    return f"from {figure(min(seen))} to {figure(max(seen))}."


def _bound(label: str, bound: float | None, beside: Details, colour: int) -> list[Line]:
    """A bound as a dashed line, as far as its assumptions hold."""
    points = tuple((scale, bound) for scale, one in beside.at if one.assumptions_hold and bound is not None)
    return [Line(label, points, colour, "", dashed=True)] if bound and points else []
