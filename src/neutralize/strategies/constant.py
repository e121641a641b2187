"""``constant``: the documented constant fills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from neutralize.activations import ACTIVATIONS
from neutralize.errors import NeutralizeError, require_finite
from neutralize.plan import Certificate, Edit, LayerPlan, dtype_name
from neutralize.planner import Draft, Request
from neutralize.sites import affine_site
from neutralize.strategies.sides import SIDES, check_sides, outgoing_consumers


@dataclass(frozen=True)
class Constant:
    """Fill every weight of the layer with one value, and its bias with another.

    The documented values are 0.01 before a sigmoid, 0.001 before a tanh and 1.001 before a ReLU, with bias 0. A
    full-matrix fill has rank 1: it is a null for sigmoid and tanh (the output is nearly constant) and a sum for ReLU,
    never a pass-through (MATH §1). The pass-through reading of these numbers is ``passthrough`` with ``gain=1.001``.

    Attributes:
        weight: the value; by default that of the activation, found from the dataflow.
        bias: the value that biases are filled with.
        sides: ``in`` (the layer's own weights), ``out`` (those that read it) or ``both``.

    Source: MATH §1.
    """

    weight: float | None = None
    bias: float = 0.0
    sides: Literal["in", "out", "both"] = "in"

    name = "constant"

    def __post_init__(self) -> None:
        """Check the numbers."""
        require_finite("constant", bias=self.bias)
        if self.weight is not None:
            require_finite("constant", weight=self.weight)
        check_sides("constant", self.sides)

    def draft(self, request: Request, layer: str) -> Draft:
        """Draft the fill of one layer."""
        request.require_module(layer, self.name)
        weight, activation = self.weight, ""
        if weight is None:
            weight, activation = _documented(request, layer)
        targets: dict[str, float] = {}
        if self.sides in ("in", "both"):
            targets.update(_own_fills(request, layer, weight, self.bias))
        consumers: tuple[str, ...] = ()
        if self.sides in ("out", "both"):
            readers = outgoing_consumers(request, layer, required=True)
            consumers = tuple(dict.fromkeys(reader.module for reader in readers))
            for reader in readers:
                targets[reader.weight] = weight
                if reader.bias is not None:
                    targets[reader.bias] = self.bias
        edits: list[Edit] = [request.rewrite(name, fill=value) for name, value in targets.items()]
        certificate = Certificate(
            layer, "measured", None, "", f"a constant fill of {SIDES[self.sides]} has rank 1 and is no pass-through"
        )
        entry = LayerPlan(
            layer, "fill", certificate, (), activation=activation, gain=weight, consumers=consumers, sides=self.sides,
            note=_stored_note(request, targets),
        )  # fmt: skip
        return Draft(tuple(edits), entry)


def _documented(request: Request, layer: str) -> tuple[float, str]:
    """The documented fill for the activation that follows the layer, and its name."""
    documented = {row.name: row.fill for row in ACTIVATIONS if row.fill is not None}
    table = ", ".join(f"{fill:g} ({name})" for name, fill in documented.items())
    sites = [affine_site(request.flow, call) for call in request.calls(layer)]
    names = {site.activation.name if site is not None and site.activation is not None else "" for site in sites}
    name = names.pop()
    if names or name not in documented:
        found = "different ones" if names else name or "none"
        raise NeutralizeError(
            f"plan: expected an activation with a documented fill after {layer!r}, {table}, got {found}; give "
            "weight=, the value "
            "to fill with"
        )
    return documented[name], name


def _own_fills(request: Request, layer: str, weight: float, bias: float) -> dict[str, float]:
    """Fills of the parameters inside the layer: matrices and kernels are weights, vectors are biases."""
    module = request.layers[layer]
    prefix = f"{layer}." if layer else ""
    inside = {prefix + name: parameter for name, parameter in module.named_parameters()}
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) or not any(
        parameter.dim() > 1 for parameter in inside.values()
    ):
        raise NeutralizeError(
            f"plan: expected a layer with a weight matrix or kernel for strategy 'constant', got {layer!r}, a "
            f"{type(module).__name__}; select a linear layer or a convolution"
        )
    return {name: weight if parameter.dim() > 1 else bias for name, parameter in inside.items()}


def _stored_note(request: Request, targets: dict[str, float]) -> str:
    """What the formats make of the values, where that is not the value itself to four digits."""
    notes: dict[str, None] = {}
    for name, value in targets.items():
        dtype = request.writable(name).dtype
        stored = float(torch.tensor(value, dtype=torch.float64).to(dtype).double())
        if abs(stored - value) > 1e-4 * abs(value):
            notes[f"{value:g} is stored as {stored:.6g} in {dtype_name(dtype)}"] = None
    return "; ".join(notes)
