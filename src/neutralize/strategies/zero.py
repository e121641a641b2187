"""``zero``: the layer's contribution is zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neutralize.certify import Constant as ConstantValue
from neutralize.certify import Interpretation
from neutralize.errors import NeutralizeError
from neutralize.plan import Certificate, Edit, LayerPlan
from neutralize.planner import Draft, Request, describe_refusals
from neutralize.search import IDENTITY, Assignment, Preference, joint, union
from neutralize.sites import affine_site
from neutralize.strategies.part import draft_part
from neutralize.strategies.passthrough import block_certificate, identity_assignment, skip_window
from neutralize.strategies.recurrent import draft_recurrent_null, is_recurrent
from neutralize.strategies.sides import SIDES, check_sides, outgoing_consumers


@dataclass(frozen=True)
class Zero:
    """Make the layer's contribution zero: a plain layer gives φ(0), a residual block hands its input on.

    Attributes:
        sides: which weights are written. For a plain layer ``in`` is its own weight and bias, ``out`` the weights of
            the affine layers that read it, ``both`` the two (its own alone where nothing affine reads it). For a block
            ``in`` is the first parameters that suffice, ``out`` the last, ``both`` the two.

    Source: MATH §4, §7.
    """

    sides: Literal["in", "out", "both"] = "both"

    name = "zero"

    def __post_init__(self) -> None:
        """Check the side."""
        check_sides("zero", self.sides)

    def draft(self, request: Request, layer: str) -> Draft:
        """Draft the null of one layer."""
        if request.fraction(layer) is not None:
            return draft_part(request, layer, 0.0)
        if is_recurrent(request.layers[layer]) and self.sides != "out":
            return draft_recurrent_null(request, layer, self.sides)
        if request.is_leaf(layer):
            return self._plain(request, layer)
        sites = [affine_site(request.flow, call) for call in request.calls(layer)]
        return self._block(request, layer) if None in sites else self._plain(request, layer)

    def _plain(self, request: Request, layer: str) -> Draft:
        edits: list[Edit] = []
        note = ""
        consumers: tuple[str, ...] = ()
        if self.sides in ("in", "both"):
            module = request.layers[layer]
            prefix = f"{layer}." if layer else ""
            edits.extend(request.rewrite(prefix + name) for name, _ in module.named_parameters())
        if self.sides in ("out", "both"):
            readers = outgoing_consumers(request, layer, required=self.sides == "out", keeps_order=True)
            consumers = tuple(dict.fromkeys(reader.module for reader in readers))
            edits.extend(request.rewrite(name) for name in dict.fromkeys(reader.weight for reader in readers))
            if not readers:
                note = "nothing affine reads the layer alone: its own weights are zeroed"
        certificate = Certificate(layer, "exact", 0.0, "finite activations", f"zeroed: {SIDES[self.sides]}")
        entry = LayerPlan(layer, "null", certificate, (), consumers=consumers, sides=self.sides, note=note)
        return Draft(tuple(edits), entry)

    def _block(self, request: Request, layer: str) -> Draft:
        preferences: dict[str, list[Preference]] = {
            "in": ["incoming"], "out": ["outgoing"], "both": ["incoming", "outgoing"]
        }  # fmt: skip
        whole: Assignment = {}
        target = "input"
        window: tuple[int, ...] = ()
        for preference in preferences[self.sides]:
            found = identity_assignment(request, layer, preference)
            if found is None or IDENTITY in found.values():
                cropped = skip_window(request, layer, preference)
                found, window = cropped or (zero_assignment(request, layer, preference), ())
                target = "partial" if cropped else "null"
            if found is None:
                raise NeutralizeError(_why_not_zero(request, layer, preference))
            joined = union(whole, found)
            if joined is None:
                raise NeutralizeError(
                    f"plan: expected both sides of {layer!r} to agree, got parameters that would need two values; "
                    "use sides='out'"
                )
            whole = joined
        left = {"input": "its input", "partial": "what its skip connection leaves of its input", "null": "zero"}[target]
        reason = f"the dataflow's output evaluates to {left}"
        certificate = block_certificate(request, layer, whole, "finite activations", reason)
        return Draft(
            request.edits_for(whole), LayerPlan(layer, target, certificate, (), sides=self.sides, window=window)
        )


def zero_assignment(request: Request, layer: str, preference: Preference) -> Assignment | None:
    """The cheapest assignment under which every call's output is proven to be zero, or ``None``."""
    searches = request.search(layer, preference)
    for assignment in joint([(search, search.zero(search.call.exit)) for search in searches]):
        outputs = [Interpretation(request.flow, search.call, assignment, request.cut).output for search in searches]
        if all(output == ConstantValue(0.0) for output in outputs):
            return assignment
    return None


def _why_not_zero(request: Request, layer: str, preference: Preference) -> str:
    refused = describe_refusals(request.search(layer, preference))
    if refused:
        return (
            f"plan: expected {layer!r} to have parameters that null it, got some that cannot be written: {refused}; "
            "select every layer that reads them, or untie them"
        )
    kind = type(request.layers[layer]).__name__
    return (
        f"plan: expected a layer that some parameters can null, got {layer!r}, a {kind} whose output is zero for no "
        "value of them; select the affine layers inside it"
    )
