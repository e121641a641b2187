"""Pictures of plans and verifications: an activation with its linear window; errors against the size of the input.

Figures are made without pyplot, so nothing global changes and no display is needed. Colours are those of Okabe and Ito,
which people with any colour vision tell apart; every line also has a dash or a marker of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from neutralize.activations import function_of
from neutralize.errors import NeutralizeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neutralize.plan import LayerPlan, Plan
    from neutralize.verify import Verification

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, "#56B4E9")
_MARKERS = "osv^Dx"
_MOST_LAYERS = 6
_FLOOR = 1e-14  # what is smaller is drawn as 0
PLOT_SCALES = tuple(10.0 ** (step / 4) for step in range(-8, 9))
"""The factors of ``Verification.plot``: from a hundredth to a hundred."""


def _figure(rows: int, columns: int, *, width: float = 10.0, height: float = 3.4) -> tuple[Figure, Any]:
    figure = blank(width, height * rows)
    return figure, figure.subplots(rows, columns, squeeze=False)


def blank(width: float, height: float) -> Figure:
    """Return an empty figure, made without pyplot, that notebooks show.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        NeutralizeError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise NeutralizeError(
            "plot: expected matplotlib, got none installed; pip install 'neutralize[plot]'"
        ) from error
    from neutralize.picture import Picture

    return Picture(figsize=(width, height), layout="constrained")


def plot_plan(plan: Plan) -> Figure:
    """Each layer's activation with its operating point and linear window, and how far from linear it is there.

    The first six layers that work in a linear regime have a row each. A plan without any is drawn as bytes per layer.
    """
    shown = [entry for entry in plan.layers if _function(entry) is not None][:_MOST_LAYERS]
    if not shown:
        return _written(plan)
    figure, axes = _figure(len(shown), 2)
    for (left, right), entry in zip(axes, shown, strict=True):
        _draw_window(left, entry)
        _draw_departure(right, entry)
    hidden = sum(_function(entry) is not None for entry in plan.layers) - len(shown)
    more = f" (the first {len(shown)} of {len(shown) + hidden})" if hidden else ""
    figure.suptitle(f"operating points of plan {plan.digest[:12]}{more}; end to end {plan.certificate}")
    return figure


def _function(entry: LayerPlan) -> Any:
    """φ of a layer in a linear regime, or ``None``."""
    if entry.epsilon is None or entry.input_bound is None or not entry.activation:
        return None
    return function_of(entry.activation, entry.parameters)


def _regime(entry: LayerPlan) -> tuple[float, float, float, float, float]:
    """Operating point, value, slope, scale and input bound, in numbers."""
    numbers = (entry.operating_point, entry.value, entry.slope, entry.epsilon, entry.input_bound)
    point, value, slope, epsilon, bound = (0.0 if number is None else number for number in numbers)
    return point, value, slope, epsilon * abs(entry.gain), bound


def _draw_window(axes: Any, entry: LayerPlan) -> None:
    point, value, slope, epsilon, bound = _regime(entry)
    window = epsilon * bound
    reach = max(4.0, 1.3 * abs(point), 1.5 * (abs(point) + window))
    z = torch.linspace(-reach, reach, 2001, dtype=torch.float64)
    line = value + slope * (z - point)
    y = _function(entry)(z)
    axes.plot(z, y, color=BLUE, linewidth=2, label=f"φ = {entry.activation}")
    axes.plot(z, line, color=ORANGE, linewidth=1.5, linestyle="--", label=f"tangent, slope {slope:.4g}")
    low, high = float(y.min()), float(y.max())
    margin = 0.15 * max(high - low, 0.1)
    axes.set_ylim(min(low, value) - margin, max(high, value) + margin)
    label = f"window a ± εX = {point:.4g} ± {window:.3g}"
    if window < 0.005 * reach:  # narrower than a pixel or two: its place is shown, and its width said
        axes.axvline(point, color=GREEN, alpha=0.6, linewidth=2, label=label)
    else:
        axes.axvspan(point - window, point + window, color=GREEN, alpha=0.2, linewidth=0, label=label)
    axes.plot([point], [value], "o", color=RED, markersize=7, label=f"operating point a = {point:.4g}")
    axes.set_title(f"{entry.layer!r}: {entry.activation}, ε = {_power(entry.epsilon)}", fontsize=10)
    axes.set_xlabel("pre-activation z")
    axes.set_ylabel("φ(z)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_departure(axes: Any, entry: LayerPlan) -> None:
    """What the layer hands on, minus its input: of φ in float64, so that rounding is not in the curve."""
    point, value, slope, epsilon, bound = _regime(entry)
    x = torch.linspace(-1.5, 1.5, 1201, dtype=torch.float64)
    error = (_function(entry)(epsilon * bound * x + point) - value) / (epsilon * slope * bound) - x
    error[error.abs() < _FLOOR] = 0.0  # the rounding of this very computation
    axes.plot(x, error, color=BLUE, linewidth=2, label="curvature of φ (in float64)")
    certified = entry.certificate.bound
    if certified and certified < _FLOOR:
        axes.plot([], [], " ", label=f"certificate {entry.certificate}: not to be told from 0")
        axes.set_ylim(-1, 1)
    elif certified:
        for side in (-1, 1):
            label = f"certificate {entry.certificate}, rounding included" if side > 0 else None
            axes.plot([-1, 1], [side * certified] * 2, color=RED, linestyle="--", linewidth=1.5, label=label)
        axes.set_ylim(-2.2 * certified, 2.8 * certified)
    axes.axvspan(-1, 1, color=GREEN, alpha=0.15, linewidth=0, label=f"valid: |x| ≤ X = {bound:.4g}")
    axes.set_title("departure from handing the input on", fontsize=10)
    axes.set_xlabel("input x / X")
    axes.set_ylabel("error / X")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper center")


def _power(number: float | None) -> str:
    if number and math.frexp(number)[0] == 0.5:
        exponent = str(math.frexp(number)[1] - 1)
        return "2" + exponent.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{number:.4g}"


def _written(plan: Plan) -> Figure:
    """Bytes written per layer, by the kind of certificate."""
    colours = dict(zip(("exact", "rounding", "bounded", "measured"), (BLUE, GREEN, ORANGE, GREY), strict=True))
    hatches = {"exact": "", "rounding": "//", "bounded": "..", "measured": "xx"}
    figure, ((axes,),) = _figure(1, 1, height=max(2.4, 1.2 + 0.3 * len(plan.layers)))
    for kind, colour in colours.items():
        found = [place for place, entry in enumerate(plan.layers) if entry.certificate.kind == kind]
        sizes = [sum(plan.edits[index].written_bytes for index in plan.layers[place].edits) for place in found]
        if found:
            axes.barh(found, sizes, height=0.6, color=colour, hatch=hatches[kind], edgecolor="white", label=kind)
    axes.set_yticks(range(len(plan.layers)), [entry.layer or "(the model)" for entry in plan.layers])
    axes.set_xlabel("written [bytes]")
    axes.set_ylabel("layer")
    axes.set_title(f"plan {plan.digest[:12]}, {plan.strategy}; end to end {plan.certificate}", fontsize=10)
    if plan.layers:
        axes.legend(title="certificate", fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.set_ylim(len(plan.layers) - 0.3, -0.7)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3, axis="x")
    return figure


def plot_verification(verification: Verification, scales: Sequence[float] | float) -> Figure:
    """Measured errors and their bounds against the scale of the inputs, or of what enters the layers.

    Args:
        verification: what is measured again at the scales.
        scales: positive factors.
    """
    given = sorted({float(scale) for scale in ([scales] if isinstance(scales, int | float) else scales)})
    if len(given) < 2:
        raise NeutralizeError(f"plot: expected two or more positive finite scales, got {given}; leave them out")
    measured = verification.at_scales(given)
    scales, at = list(measured), list(measured.values())
    has_inputs = verification.scaled == "inputs"
    figure, ((left, *beside),) = _figure(1, 1 + has_inputs, width=12.0 if has_inputs else 7.0, height=4.6)
    first = at[0]
    valid_to = _valid_to(scales, at, lambda scale: verification.at_scales([scale])[scale])
    left.set_title("what each layer hands on", fontsize=10)
    left.set_ylabel("largest error / largest input (X)")
    for place, layer in enumerate(list(first.per_layer)[:_MOST_LAYERS]):
        colour, marker = _COLOURS[place], _MARKERS[place]
        _draw_measured(left, scales, [found.per_layer[layer] for found in at], colour, marker, f"{layer!r} measured")
        _draw_bound(left, scales, first.bounds.get(layer), valid_to, colour, f"{layer!r} bound")
    for right in beside:
        right.set_title("the model's outputs", fontsize=10)
        right.set_ylabel("largest error of an element (absolute)")
        _draw_measured(right, scales, [found.output_error for found in at], BLUE, "o", "measured")
        _draw_bound(right, scales, first.output_bound, valid_to, RED, "bound of the plan")
    for axes in (left, *beside):
        axes.set_xscale("log")
        axes.set_xlabel("input scale (1: the inputs given)" if has_inputs else "scale of what enters each layer")
        if valid_to < scales[-1]:
            axes.axvspan(max(valid_to, scales[0]), scales[-1], color=GREY, alpha=0.15, linewidth=0,
                         label="inputs larger than assumed")  # fmt: skip
        axes.set_xlim(scales[0], scales[-1])
        axes.grid(alpha=0.3, which="major")
        axes.legend(fontsize=8)
    stated = "bounds hold" if any(found.has_bounds for found in at) else "no bound is stated"
    held = stated if all(found.bound_holds for found in at) else "A BOUND IS EXCEEDED"
    figure.suptitle(f"error against the size of the input: {held}")
    return figure


def _valid_to(scales: list[float], at: list[Verification], verify_at: Callable[[float], Verification]) -> float:
    """The scale up to which the assumptions hold: between two that were measured, found by halving."""
    holding = [scale for scale, found in zip(scales, at, strict=True) if found.assumptions_hold]
    broken = [scale for scale in scales if scale not in holding]
    if not broken or not holding:
        return math.inf if holding else 0.0
    low, high = max(holding), min(broken)
    for _ in range(5):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if verify_at(middle).assumptions_hold else (low, middle)
    return low


def _draw_measured(axes: Any, scales: list[float], errors: list[float], colour: str, marker: str, label: str) -> None:
    """A line of errors on a logarithmic axis; where all are zero, a line in the legend that says so."""
    if any(error > 0 for error in errors):
        axes.set_yscale("log")
        drawn = [error if error > 0 else math.nan for error in errors]
        zeros = " (0 where there is no mark)" if 0.0 in errors else ""
        axes.plot(scales, drawn, color=colour, marker=marker, markersize=4, label=label + zeros)
    else:
        axes.plot(scales, errors, color=colour, marker=marker, markersize=4, label=f"{label}: 0 everywhere")


def _draw_bound(axes: Any, scales: list[float], bound: float | None, valid_to: float, colour: str, label: str) -> None:
    if bound and bound < _FLOOR * 1e-4:
        axes.plot([], [], " ", label=f"{label} {bound:.2g}: below the picture")
    elif bound and valid_to > scales[0]:
        ends = [scales[0], min(valid_to, scales[-1])]
        axes.plot(ends, [bound, bound], color=colour, linestyle="--", linewidth=1.5, label=f"{label} {bound:.2g}")
