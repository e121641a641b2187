"""``damp``: the layer's contribution times a factor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from neutralize.errors import NeutralizeError, require_finite
from neutralize.plan import Certificate, Edit, LayerPlan
from neutralize.planner import Draft, Request, describe_refusals
from neutralize.search import Preference, joint, scaling
from neutralize.sites import affine_site
from neutralize.strategies.sides import outgoing_consumers, sites_of


@dataclass(frozen=True)
class Damp:
    """Multiply the layer's contribution by a factor.

    A residual block's branches are scaled by the fewest bytes that suffice (a LayerScale, the last projection); the
    output of
    a plain layer is scaled by its own weight and bias where nothing but a sum follows, else in the weights that read
    it.

    Attributes:
        factor: 0 switches the contribution off, 1 leaves it.

    Source: MATH §4 (what scales a branch is what would null it).
    """

    factor: float

    name = "damp"

    def __post_init__(self) -> None:
        """Check the factor."""
        require_finite("damp", factor=self.factor)

    def draft(self, request: Request, layer: str) -> Draft:
        """Draft the damping of one layer."""
        request.require_module(layer, self.name)
        if any(affine_site(request.flow, call) is None for call in request.calls(layer)):
            return self._block(request, layer)
        sites = sites_of(request, layer)
        edits: list[Edit] = []
        consumers: tuple[str, ...] = ()
        homogeneous = all(
            site.activation is None or (site.activation.name == "relu" and self.factor >= 0) for site in sites
        )
        if homogeneous:
            affine = sites[0].affine
            edits.append(request.rewrite(affine.weight, scale=self.factor))
            if affine.bias is not None:
                edits.append(request.rewrite(affine.bias, scale=self.factor))
        else:
            readers = outgoing_consumers(request, layer, required=True, keeps_order=self.factor >= 0)
            consumers = tuple(dict.fromkeys(reader.module for reader in readers))
            for name in dict.fromkeys(reader.weight for reader in readers):
                edits.append(request.rewrite(name, scale=self.factor))
        side = "in" if homogeneous else "out"
        entry = LayerPlan(
            layer, "scaled", self._certificate(layer, 1), (), gain=self.factor, consumers=consumers, sides=side
        )
        return Draft(tuple(edits), entry)

    def _block(self, request: Request, layer: str) -> Draft:
        preference: Preference = "outgoing"
        searches = request.search(layer, preference)
        answers = [scaling(search, self.factor) for search in searches]
        branches = answers[-1][1]
        found = joint([(search, found) for search, (found, _) in zip(searches, answers, strict=True)])
        if not found:
            refused = describe_refusals(searches)
            why = (
                f"some of its parameters cannot be written: {refused}"
                if refused
                else "no parameters scale its contribution"
            )
            raise NeutralizeError(
                f"plan: expected a layer whose contribution some parameters scale, got {layer!r}: {why}; "
                "select the affine layers inside it"
            )
        edits = tuple(request.rewrite(name, scale=self.factor, fill=float(value)) for name, value in found[0].items())
        note = "each branch of the block is scaled by itself" if branches > 1 else ""
        entry = LayerPlan(
            layer, "damped" if branches else "scaled", self._certificate(layer, branches), (), gain=self.factor,
            sides="out", note=note
        )  # fmt: skip
        return Draft(edits, entry)

    def _certificate(self, layer: str, branches: int) -> Certificate:
        if branches > 1:
            return Certificate(
                layer, "measured", None, "", "a later branch or activation of the block sees an earlier branch damped"
            )
        exact = math.frexp(abs(self.factor))[0] in (0.0, 0.5)
        reason = "the contribution is homogeneous in the scaled parameters"
        if exact:
            reason += "; the factor is a power of two: the weights are scaled without rounding"
        return Certificate(layer, "rounding", None, "finite activations", reason)
