"""``damp``: the layer's contribution times a factor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from neutralize.dataflow import shape_of
from neutralize.errors import NeutralizeError, require_finite
from neutralize.plan import Certificate, Edit, LayerPlan
from neutralize.planner import Draft, Request, describe_refusals
from neutralize.search import Assignment, Preference, joint, scaling
from neutralize.sites import Affine, AffineSite, Norm, affine_site
from neutralize.strategies.part import draft_part
from neutralize.strategies.passthrough import skip_window
from neutralize.strategies.recurrent import is_recurrent, recurrent_reads
from neutralize.strategies.sides import (
    SIDES,
    check_own,
    check_shared,
    check_sides,
    outgoing_consumers,
    sites_of,
    why_not_alone,
)

_HOMOGENEOUS = ("relu", "leaky_relu", "prelu")
"""Activations with φ(s x) = s φ(x) for s >= 0."""


@dataclass(frozen=True)
class Damp:
    """Multiply the layer's contribution by a factor, whichever side of the layer is written.

    Attributes:
        factor: 0 switches the contribution off, 1 leaves it.
        sides: ``in``: the layer's own weight and bias (or those of a batch norm behind it), for a block the first
            parameters that suffice. ``out``: the weights that read the layer, for a block its last parameters.
            ``both``: each side times √|factor|, the sign on the way out. By default, of a plain layer ``in`` where no
            activation follows but ReLU, LeakyReLU or PReLU, and else ``out``; of a block ``out``, by the fewest bytes
            (a LayerScale, the last projection); of a recurrent layer ``out``, the only one there is. With ``in`` and
            ``both`` before another activation it is the activation's argument that is multiplied, φ(f x), which is not
            f φ(x): such a plan is ``measured``.

    Source: MATH §4 (what scales a branch is what would null it).
    """

    factor: float
    sides: Literal["in", "out", "both"] | None = None

    name = "damp"

    def __post_init__(self) -> None:
        """Check the factor and the side."""
        require_finite("damp", factor=self.factor)
        if self.sides is not None:
            check_sides("damp", self.sides)

    def draft(self, request: Request, layer: str) -> Draft:
        """Draft the damping of one layer."""
        if request.fraction(layer) is not None:
            return draft_part(request, layer, self.factor)
        request.require_module(layer, self.name)
        if is_recurrent(request.layers[layer]):
            return self._recurrent(request, layer)
        if any(affine_site(request.flow, call) is None for call in request.calls(layer)):
            return self._block(request, layer)
        return self._plain(request, layer)

    def _plain(self, request: Request, layer: str) -> Draft:
        sites = sites_of(request, layer)
        refused = _why_not_own(sites)
        sides = self.sides or ("out" if refused or _argument_of(sites, self.factor) else "in")
        own, reading = self._shares(sides)
        argument_of = "" if own is None else _argument_of(sites, own)
        edits: list[Edit] = []
        consumers: tuple[str, ...] = ()
        if own is not None:
            if refused:
                raise NeutralizeError(
                    f"plan: expected a layer {layer!r} whose own weights scale what it hands on, got {refused}; use "
                    "sides='out'"
                )
            norms = {site.norm.node: site.norm for site in sites if site.norm is not None}
            check_own(request, layer, {node: norm.parameters[:2] for node, norm in norms.items()})
            affine = sites[0].affine
            names = [(norm.weight, norm.bias) for norm in norms.values()] or [(affine.weight, affine.bias)]
            written = dict.fromkeys(name for pair in names for name in pair if name is not None)
            edits.extend(request.rewrite(name, scale=own) for name in written)
            # What is scaled leaves that norm, not the layer's module.
            consumers = tuple(dict.fromkeys(norm.module for norm in _behind(sites)))
        if reading is not None:
            readers = outgoing_consumers(request, layer, required=True, keeps_order=reading >= 0)
            consumers = tuple(dict.fromkeys(reader.module for reader in readers))
            edits.extend(request.rewrite(name, scale=reading) for name in dict.fromkeys(one.weight for one in readers))
        certificate = self._certificate(layer, 1, sides)
        if argument_of:
            reason = f"the argument of {argument_of} is multiplied, not its value"
            certificate = Certificate(layer, "measured", None, "", reason)
        entry = LayerPlan(
            layer, "scaled", certificate, (), gain=self.factor, consumers=consumers, sides=sides,
            note=f"{own:g} times the argument of {argument_of}" if argument_of else "",
        )  # fmt: skip
        return Draft(tuple(edits), entry)

    def _recurrent(self, request: Request, layer: str) -> Draft:
        if self.sides not in (None, "out"):
            raise NeutralizeError(
                f"plan: expected sides='out' for the recurrent layer {layer!r}, got {self.sides!r}: a tanh, and "
                "its own next step, stand behind its weights; leave sides out"
            )
        consumers: list[Affine] = []
        others: list[str] = []
        for read in recurrent_reads(request, layer):
            why = why_not_alone(request, read, keeps_order=self.factor >= 0)
            others.extend([why] if why else [])
            consumers.extend([read.reader] if isinstance(read.reader, Affine) else [])
        if others:
            raise NeutralizeError(
                f"plan: expected affine or recurrent layers, and nothing else, to read {layer!r}, got "
                f"{', '.join(sorted(set(others)))}; use strategy='zero', or select the block that contains it"
            )
        check_shared(request, layer, consumers)
        entry = LayerPlan(
            layer, "scaled", self._certificate(layer, 1, "out"), (), gain=self.factor, sides="out",
            consumers=tuple(dict.fromkeys(reader.module for reader in consumers)),
        )  # fmt: skip
        edits = (request.rewrite(name, scale=self.factor) for name in dict.fromkeys(one.weight for one in consumers))
        return Draft(tuple(edits), entry)

    def _block(self, request: Request, layer: str) -> Draft:
        sides = self.sides or "out"
        preferences: tuple[Preference, ...] = ("incoming", "outgoing")
        last, branches = _scaling(request, layer, "outgoing", self.factor)
        if not last:
            raise NeutralizeError(_why_no_scaling(request, layer))
        edits: list[Edit] = []
        for preference, share in zip(preferences, self._shares(sides), strict=True):
            if share is None:
                continue
            found = _scaling(request, layer, preference, share)[0]
            if preference == "incoming" and (not found or found.keys() == last.keys()):
                raise NeutralizeError(
                    f"plan: expected first parameters of {layer!r} that scale its contribution, got none but the last "
                    f"ones, {', '.join(map(repr, last))}: an activation or a norm stands before them; use sides='out'"
                )
            edits.extend(request.rewrite(name, scale=share, fill=float(value)) for name, value in found.items())
        note = "each branch of the block is scaled by itself" if branches > 1 else ""
        call = request.calls(layer)[0]
        window: tuple[int, ...] = ()
        if branches and shape_of(call.entry) != shape_of(call.exit):
            cropped = skip_window(request, layer, "outgoing")
            if cropped is None:
                raise NeutralizeError(
                    f"plan: expected a skip connection that hands the input of {layer!r} on, crops or pads it, got "
                    f"another from {list(shape_of(call.entry) or ())} to {list(shape_of(call.exit) or ())}; select the "
                    "affine layers inside it"
                )
            window = cropped[1]
        entry = LayerPlan(
            layer, "damped" if branches else "scaled", self._certificate(layer, branches, sides), (), gain=self.factor,
            sides=sides, note=note, window=window,
        )  # fmt: skip
        return Draft(tuple(edits), entry)

    def _shares(self, sides: str) -> tuple[float | None, float | None]:
        """What the layer's own side and the side that reads it are multiplied by; ``None``: nothing is written."""
        if sides == "in":
            return self.factor, None
        if sides == "out":
            return None, self.factor
        root = math.sqrt(abs(self.factor))
        return root, math.copysign(root, self.factor)

    def _certificate(self, layer: str, branches: int, sides: str) -> Certificate:
        if branches > 1:
            return Certificate(
                layer, "measured", None, "", "a later branch or activation of the block sees an earlier branch damped"
            )
        exact = all(share is None or math.frexp(abs(share))[0] in (0.0, 0.5) for share in self._shares(sides))
        reason = f"the contribution is homogeneous in what is scaled: {SIDES[sides]}"
        if exact:
            reason += "; the factor is a power of two: the weights are scaled without rounding"
        return Certificate(layer, "rounding", None, "finite activations", reason)


def _why_not_own(sites: list[AffineSite]) -> str:
    """Why no parameters of a layer's own multiply its value; empty if some do."""
    for site in sites:
        if site.norm is not None and (site.norm.weight is None or site.norm.bias is None):
            return "a batch norm without a gain behind it"
        if (site.norm is None) != (sites[0].norm is None):
            return "a batch norm behind one of its calls"
    return ""


def _argument_of(sites: list[AffineSite], factor: float) -> str:
    """The activation behind a layer that a factor does not commute with; empty if there is none."""
    for site in sites:
        if site.activation is not None and (site.activation.name not in _HOMOGENEOUS or factor < 0):
            return site.activation.name
    return ""


def _behind(sites: list[AffineSite]) -> list[Norm]:
    """The batch norms behind a layer that are not a part of its module."""
    position = {node: place for place, node in enumerate(sites[0].affine.node.graph.nodes)}
    return [
        site.norm for site in sites if site.norm is not None and position[site.norm.node] > position[site.call.exit]
    ]


def _scaling(request: Request, layer: str, preference: Preference, factor: float) -> tuple[Assignment, int]:
    """The cheapest parameters that multiply a block's contribution, if there are any, and how many branches it has."""
    searches = request.search(layer, preference)
    answers = [scaling(search, factor) for search in searches]
    found = joint([(search, found) for search, (found, _) in zip(searches, answers, strict=True)])
    return (found[0] if found else {}), answers[-1][1]


def _why_no_scaling(request: Request, layer: str) -> str:
    searches = request.search(layer, "outgoing")
    for search in searches:
        scaling(search, 0.5)  # which notes what it may not write
    refused = describe_refusals(searches)
    why = f"some of its parameters cannot be written: {refused}" if refused else "no parameters scale its contribution"
    return (
        f"plan: expected a layer whose contribution some parameters scale, got {layer!r}: {why}; select the affine "
        "layers inside it"
    )
