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
from neutralize.report import blame, bounds_verdict

if TYPE_CHECKING:
    from neutralize.verify import Verification

_MOST_LINES = 4


@dataclass(frozen=True)
class Details:
    """What a page shows beside the figures of a verification.

    Attributes:
        plan: what was verified.
        model: class of the model, and where its weights are.
        at: verifications at other scales, by the factor; empty where nothing can be scaled.
        weights: some of what is written, before and after.
    """

    plan: Plan
    model: str
    at: Mapping[float, Verification]
    weights: tuple[Change, ...]


def details(
    model: nn.Module,
    plan: Plan,
    applied: Callable[[], AbstractContextManager[object]],
    at: Mapping[float, Verification],
) -> Details:
    """Put together what a page shows beside the figures.

    Args:
        model: the model planned for.
        plan: the plan.
        applied: makes a context in which the model has the plan's weights.
        at: see ``Details``.
    """
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
    at = _scales(found, beside)
    return render(
        "verification.html",
        title=title or "What a plan does, against what it aims at",
        found=found,
        is_off=_is_off(plan),
        ok=is_ok(found, plan),
        blame=blame(found),
        errors=_errors(found),
        open_rows=plans.OPEN_ROWS,
        most_rows=plans.MOST_ROWS,
        plan=plan,
        rows=[] if plan is None else plans.rows(plan),
        grounds=[] if plan is None else plans.grounds(plan.certificates),
        meanings=[] if plan is None else plans.meanings([*plan.certificates, plan.certificate]),
        charts=_charts(found, at),
        at=[(_factor(scale), one, _worst(one)) for scale, one in at],
        around=[] if plan is None else [entry.layer for entry in plan.layers if entry.sides == "around"],
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
    proven = found.exact or found.has_bounds
    return render(
        "verification_fragment.html",
        found=found,
        mark="✗ " if not is_ok(found, None) else "✓ " if proven else "",
        held=bounds_verdict(found),
        errors=_errors(found),
        open_rows=plans.OPEN_ROWS,
        most_rows=plans.MOST_ROWS,
    )


def is_ok(found: Verification, plan: Plan | None) -> bool:
    """Whether what was measured is what the certificates say; where the plan is exact, bit for bit."""
    return found.bound_holds and (found.exact or plan is None or plan.certificate.kind != "exact")


def _is_off(plan: Plan | None) -> bool:
    """Whether the aim of a plan is the network without its layers: nothing damped, filled, or at its mean."""
    return plan is not None and all(entry.target in ("input", "null") and entry.gain == 1 for entry in plan.layers)


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


def _scales(found: Verification, beside: Details | None) -> list[tuple[float, Verification]]:
    """What was measured at each scale, in ascending order, that of the inputs given among them."""
    return [] if beside is None or not beside.at else sorted({**beside.at, 1.0: found}.items())


def _factor(scale: float) -> str:
    """A factor as people write it: one below 1 as a fraction, where it is that of a whole number."""
    return f"1/{figure(1 / scale)}" if scale < 1 and (1 / scale).is_integer() else figure(scale)


def _worst(found: Verification) -> float:
    """The largest error of a layer; NaN: none can be seen."""
    return max((error for error in found.per_layer.values() if not math.isnan(error)), default=math.nan)


def _charts(found: Verification, at: Sequence[tuple[float, Verification]]) -> list[Chart]:
    if not at:
        return []
    scales = f"{_factor(at[0][0])} to {_factor(at[-1][0])}"
    charts = []
    if found.scaled == "inputs":
        errors = [one.output_error for _, one in at]
        line = Line(f"measured{_zeros(errors)}", tuple((scale, one.output_error) for scale, one in at))
        charts = [
            curves(
                "outputs",
                "The model's outputs",
                f"Largest error of an element of the outputs, at inputs times {scales}: {_told(errors)}",
                "input scale (1: the inputs given)",
                "largest error (absolute)",
                [line, *_bound("bound of the plan", found.output_bound, at, 2)],
            )
        ]
    curved = {layer: [one.per_layer.get(layer, math.nan) for _, one in at] for layer in found.per_layer}
    seen = {layer: errors for layer, errors in curved.items() if sum(map(math.isfinite, errors)) > 1}
    inexact = [layer for layer, errors in seen.items() if any(error > 0 for error in errors)]
    worst = sorted(inexact, key=lambda layer: -max(filter(math.isfinite, seen[layer])))[:_MOST_LINES]
    drawn = {layer: layer for layer in inexact if layer in worst}
    exact = [layer for layer in seen if layer not in inexact]
    if exact:  # one line for all of them: they lie on each other
        drawn[exact[0]] = f"{_named(exact)}: 0, bit for bit at every scale"
    lines = []
    for place, (layer, label) in enumerate(drawn.items()):
        points = tuple((scale, error) for (scale, _), error in zip(at, seen[layer], strict=True))
        lines.append(Line(label, points, (place + 1) % 5, SHAPES[place]))
        if layer in inexact:
            lines += _bound(f"bound of {layer}", found.bounds.get(layer), at, (place + 1) % 5)
    if not lines:
        return charts
    more = (
        f" Drawn are the {len(worst)} of {len(inexact)} with the largest errors." if len(inexact) > len(worst) else ""
    )
    told = " ".join(f"{layer}: {_told(seen[layer])}" for layer in drawn if layer in worst)
    told += f" {_named(exact)}: {_told([0.0])}" if exact else ""
    given = "inputs" if found.scaled == "inputs" else "hidden states that enter the layer,"
    return [
        *charts,
        curves(
            "layers",
            "What each layer hands on",
            f"Largest error of what a layer hands on, relative, at {given} times {scales}.{more} {told.strip()}",
            "input scale (1: the inputs given)" if found.scaled == "inputs" else "scale of what enters the layer",
            "largest error (relative)",
            lines,
        ),
    ]


def _named(layers: Sequence[str]) -> str:
    """Some layers, in few words."""
    if len(layers) > 2:
        return f"{layers[0]} and {len(layers) - 1} others"
    return " and ".join(layers)


def _zeros(errors: Sequence[float]) -> str:
    """What a legend adds for a line that lies at 0."""
    return "" if any(errors) else ": 0, bit for bit at every scale"


def _told(errors: list[float]) -> str:
    seen = [error for error in errors if not math.isnan(error)]
    if not seen:
        return "not seen from outside."
    if not any(seen):
        return "0 at every scale, bit for bit."
    return f"from {figure(min(seen))} to {figure(max(seen))}."


def _bound(label: str, bound: float | None, at: Sequence[tuple[float, Verification]], colour: int) -> list[Line]:
    """A bound as a dashed line, as far as its assumptions hold."""
    points = tuple((scale, bound) for scale, one in at if one.assumptions_hold and bound is not None)
    return [Line(label, points, colour, "", dashed=True)] if bound and points else []
