"""Tables for people: plans and verifications as text, with rich."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from neutralize.activations import LinearPart
    from neutralize.plan import LayerPlan, Plan
    from neutralize.verify import Verification

_EDITS_SHOWN = 4


class Shown:
    """What IPython shows as ``print`` does: a table, rather than a line with every field."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Write the text."""
        printer.text(str(self).rstrip())


def plan_table(plan: Plan) -> str:
    """A plan as a text table: layer, strategy, edits, bytes, certificate."""
    return as_text(plan_rich(plan))


def plan_rich(plan: Plan) -> Table:
    """A plan as a rich table."""
    from rich.table import Table
    from rich.text import Text

    whole = plan.certificate
    time_spent = "" if plan.planning_s is None else f"planned in {plan.planning_s:.1f} s"
    table = Table(
        title=f"plan {plan.digest[:12]}: {len(plan.layers)} layer(s), {format_bytes(plan.written_bytes)}",
        caption="\n".join(
            part for part in (f"end to end: {whole}", whole.assumption, whole.reason, time_spent) if part
        ),
        caption_justify="left",
    )
    for heading in ("layer", "strategy", "edits"):
        table.add_column(heading, overflow="fold")
    table.add_column("bytes", justify="right")
    table.add_column("certificate", overflow="fold")
    for layer in plan.layers:
        edits = [plan.edits[index] for index in layer.edits]
        lines = [edit.describe() for edit in edits[:_EDITS_SHOWN]]
        if len(edits) > _EDITS_SHOWN:
            lines.append(f"… and {len(edits) - _EDITS_SHOWN} more")
        size = sum(edit.written_bytes for edit in edits)
        cells = (layer.layer, _strategy(plan, layer), "\n".join(lines), format_bytes(size), _certificate(layer))
        table.add_row(*map(Text, cells))  # text: a string would be read as markup, and "[rows 0:4]" would vanish
    return table


def _strategy(plan: Plan, layer: LayerPlan) -> str:
    about = [plan.strategy]
    if layer.activation:
        about.append(layer.activation)
    if layer.epsilon is not None and layer.operating_point is not None and layer.activation:
        about.append(f"a={layer.operating_point:.4g} ε={layer.epsilon:.4g}")
    if layer.sides:
        about.append(layer.sides)
    return "\n".join(about)


def _certificate(layer: LayerPlan) -> str:
    certificate = layer.certificate
    return "\n".join(part for part in (str(certificate), certificate.assumption, layer.note) if part)


def activation_table() -> str:
    """Return every known activation, the registered ones too, as a text table with a line per linear part.

    The columns are the operating point a, the slope φ'(a), the bound on the error of what is handed on (divided by the
    input, with ``X`` the input bound and ``ε`` the scale), where the part is valid, g of φ(x) - φ(-x) = g x, and where
    the numbers come from.
    """
    from rich.table import Table
    from rich.text import Text

    from neutralize.activations import rows

    table = Table(title="activations and where they are linear")
    for heading in ("activation", "a", "φ'(a)", "error / X", "valid for", "pair g", "source"):
        table.add_column(heading, overflow="fold")
    for row in rows():
        gain = "" if row.odd_gain is None else f"{row.odd_gain:.4g}"
        for place, part in enumerate(row.parts):
            shown = (row.name, gain, row.source if row.proven else f"{row.source}: no bound")
            name, pair, source = shown if place == 0 else ("", "", "")
            cells = (name, _point(part), f"{part.slope:.4g}", _error(part), _validity(part), pair, source)
            table.add_row(*map(Text, cells))
    return as_text(table)


def _point(part: LinearPart) -> str:
    if part.regime != "shift":
        return f"{part.point:.4g}"
    return f"{'≤ -' if part.downward else '≥ '}(εX + {abs(part.point):.4g})"


def _error(part: LinearPart) -> str:
    if part.regime == "window" or (part.regime == "shift" and part.tail is None):
        return "0, but rounding"
    if part.tail is not None:
        return f"{part.tail[0]:.4g} exp(-{part.tail[1]:.4g} (|a| - εX)) / (εX)"
    return f"{part.cubic:.4g} ε² X²" if part.cubic else f"{part.quadratic:.4g} ε X"


def _validity(part: LinearPart) -> str:
    if part.regime == "shift":
        return "|z - a| ≤ εX"
    return "all z" if part.below == part.above == float("inf") else f"a - {part.below:.4g} to a + {part.above:.4g}"


def verification_table(verification: Verification) -> str:
    """A verification as a text table, with the end-to-end figures below."""
    return f"{as_text(verification_rich(verification))}{verdict(verification)}\n"


def verification_rich(verification: Verification) -> Table:
    """The errors of the layers as a rich table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="verification: the plan against its aim")
    table.add_column("layer", overflow="fold")
    for heading in ("measured error", "bound", "gradient gain"):
        table.add_column(heading, justify="right")
    for layer, error in verification.per_layer.items():
        bound = verification.bounds.get(layer)
        gain = verification.gradient_gain.get(layer)
        table.add_row(
            Text(layer),
            f"{error:.3g}",
            "" if bound is None else f"{bound:.3g}",
            "" if gain is None or gain != gain else f"{gain:.4g}",
        )
    return table


def verdict(verification: Verification) -> str:
    """The end-to-end figures of a verification in a line."""
    said = "bit for bit" if verification.exact else f"relative error {verification.relative_error:.3g}"
    said += f", largest error {verification.output_error:.3g}"
    if verification.output_bound is not None:
        said += f" (bound {verification.output_bound:.3g})"
    return f"end to end: {said}; {bounds_verdict(verification)}"


def bounds_verdict(verification: Verification) -> str:
    """Whether the bounds hold, in words; where the certificates state none, there is nothing that could."""
    if not verification.bound_holds:
        held = f"A BOUND IS EXCEEDED: {blame(verification)}"
    else:
        held = "bounds hold" if verification.has_bounds else "no bound is stated"
    return held if verification.assumptions_hold else f"{held}; some inputs were larger than a certificate assumes"


def blame(verification: Verification) -> str:
    """What a verification that fails speaks of: files that do not hold the plan, or a bug."""
    if not verification.not_held:
        return "please report this as a bug, unless the plan is that of another model"
    first, *more = verification.not_held
    others = f" and {len(more)} more" if more else ""
    return f"the files do not hold this plan, which leaves other values in {first!r}{others}; see neutralize status"


def format_bytes(count: float) -> str:
    """Return a size with a decimal unit: ``"1.2 MB"``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def as_text(table: Table) -> str:
    """Return a table as plain text, 120 columns wide."""
    from rich.console import Console

    out = io.StringIO()
    # In a kernel of Jupyter rich would show the table there and then, and write nothing; with FORCE_COLOR, which such
    # kernels and many a CI set, it would write escape sequences.
    console = Console(file=out, width=120, no_color=True, highlight=False, force_terminal=False, force_jupyter=False)
    console.print(table)
    return out.getvalue()
