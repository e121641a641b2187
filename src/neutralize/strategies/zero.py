"""``zero``: the layer's contribution is zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

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
        if _is_homogeneous(request.layers[layer]):
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
            found, target, window = _off(request, layer, preference)
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
        certificate = block_certificate(request, layer, whole, request.premise, reason)
        return Draft(
            request.edits_for(whole), LayerPlan(layer, target, certificate, (), sides=self.sides, window=window)
        )


# What they return is zero where their parameters are.
_HOMOGENEOUS = (
    nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm,
    nn.BatchNorm1d, nn.InstanceNorm1d, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_FORWARDS = frozenset(kind.forward for kind in _HOMOGENEOUS)


def _is_homogeneous(module: nn.Module) -> bool:
    """Whether a module needs no proof: torch's own class, computing as it does, with its own parameters.

    Any other layer without layers inside may add a constant, take an exponential, or (``1 + w``) start from one.
    """
    parameters = {name for name, _ in module.named_parameters()}
    return type(module).forward in _FORWARDS and bool(parameters) and parameters <= {"weight", "bias"}


def _off(request: Request, layer: str, preference: Preference) -> tuple[Assignment | None, str, tuple[int, ...]]:
    """What is written, what the output becomes, and what a skip connection leaves of the input.

    A block hands its input on if it can; a layer without layers inside does so only if it cannot be zero.
    """
    null = zero_assignment(request, layer, preference) if request.is_leaf(layer) else None
    if null is not None:
        return null, "null", ()
    found = identity_assignment(request, layer, preference)
    if found is not None and IDENTITY not in found.values():
        return found, "input", ()
    cropped = skip_window(request, layer, preference)
    if cropped is not None:
        return cropped[0], "partial", cropped[1]
    return zero_assignment(request, layer, preference), "null", ()


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
    module = request.layers[layer]
    kind = type(module).__name__
    if next(module.parameters(), None) is None:
        return (
            f"plan: expected a layer that some parameters can null, got {layer!r}, a {kind} without any; "
            "dequantize it if its weights are packed, or select a layer that has some"
        )
    return (
        f"plan: expected a layer that some parameters can null, got {layer!r}, a {kind} whose output is not proven to "
        "be zero for any value of them; select the affine layers inside it"
    )
