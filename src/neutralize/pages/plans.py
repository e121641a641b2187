"""A plan as a page shows it: a row per layer, and what its certificates mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from neutralize.pages.page import figure, render
from neutralize.plan import CERTIFICATE_KINDS, Certificate, LayerPlan, Plan

MOST_ROWS = 2000
"""Rows of a table: beyond, a page would be slow on a phone, and the plan's JSON is the better reading."""

OPEN_ROWS = 12
"""Rows that are seen at once; the others are folded away."""

_EDITS_OPEN, _MOST_EDITS = 3, 40

MEANINGS = {
    "exact": "Proven from the model's dataflow: the layer is off bit for bit.",
    "rounding": "Exact in real arithmetic: what is left is the rounding of the number format.",
    "bounded": "An error bound is proven, as long as its assumption holds.",
    "measured": "Nothing is proven: the measured error below says how far the layer is from its aim.",
}


@dataclass(frozen=True)
class Row:
    """What a plan does to one layer.

    Attributes:
        layer: qualified name.
        becomes: what becomes of its output, in words.
        how: the numbers of its linear regime, a remark.
        edits: what is written, as far as it is shown at once.
        folded: more of that.
        hidden: how many edits are not shown.
        written_bytes: of all of them.
        certificate: how exactly.
    """

    layer: str
    becomes: str
    how: tuple[str, ...]
    edits: tuple[str, ...]
    folded: tuple[str, ...]
    hidden: int
    written_bytes: int
    certificate: Certificate


@dataclass(frozen=True)
class Ground:
    """What certificates stand on.

    Attributes:
        kind: of them.
        assumption, reason: in words.
        layers: whose certificates they are, as far as they are shown.
        hidden: how many are not.
    """

    kind: str
    assumption: str
    reason: str
    layers: tuple[str, ...]
    hidden: int


def rows(plan: Plan) -> list[Row]:
    """Return a row for each layer, as many as a page shows."""
    return [_row(plan, entry) for entry in plan.layers[:MOST_ROWS]]


def _row(plan: Plan, entry: LayerPlan) -> Row:
    edits = [plan.edits[index] for index in entry.edits]
    told = tuple(edit.describe() for edit in edits[:_MOST_EDITS])
    how = [entry.activation] if entry.activation else []
    if entry.epsilon is not None and entry.operating_point is not None and entry.activation:
        how.append(f"a = {figure(entry.operating_point, 4)}, ε = {figure(entry.epsilon, 4)}")
    if entry.input_bound is not None:
        how.append(f"inputs up to {figure(entry.input_bound)}")
    if entry.note:
        how.append(entry.note)
    size = sum(edit.written_bytes for edit in edits)
    hidden = len(edits) - len(told)
    shown, folded = told[:_EDITS_OPEN], told[_EDITS_OPEN:]
    return Row(entry.layer, _becomes(entry), tuple(how), shown, folded, hidden, size, entry.certificate)


def _becomes(entry: LayerPlan) -> str:
    gain = figure(entry.gain, 4)
    return {
        "input": "hands its input on" if entry.gain == 1 else f"hands on its input times {gain}",
        "partial": "hands on the part of its input that fits",
        "null": "contributes nothing",
        "scaled": f"its output times {gain}",
        "damped": f"what it adds times {gain}",
        "fill": "weights of one value",
        "mean": "its mean",
        "offset": "adds its mean",
    }[entry.target]


def grounds(certificates: Iterable[Certificate]) -> list[Ground]:
    """Return what certificates stand on, those of one ground together."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for certificate in certificates:
        found.setdefault((certificate.kind, certificate.assumption, certificate.reason), []).append(certificate.layer)
    return [
        Ground(*told, tuple(layers[:OPEN_ROWS]), max(0, len(layers) - OPEN_ROWS))
        for told, layers in list(found.items())[:MOST_ROWS]
    ]


def meanings(certificates: Iterable[Certificate]) -> list[tuple[str, str]]:
    """Return what the kinds of these certificates mean, the strongest first."""
    kinds = {certificate.kind for certificate in certificates}
    return [(kind, MEANINGS[kind]) for kind in CERTIFICATE_KINDS if kind in kinds]


def fragment(plan: Plan) -> str:
    """Return a plan as a short piece of HTML, in the colours of what it stands in."""
    return render("plan_fragment.html", plan=plan, rows=rows(plan), open_rows=OPEN_ROWS)
