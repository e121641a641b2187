"""How far a norm is off that reads a scaled value: its constant does not scale with what it reads.

A layer norm divides x by √(σ² + e), with σ² the variance over a row of x and e a constant of the module. If it reads
``s x`` it divides by √(s²σ² + e), which is as if it divided x by √(σ² + e/s²): its values are off by the factor
√((σ² + e) / (σ² + e/s²)). That is 1 for s = 1 and tends to 1 with growing σ, so what bounds it is the least σ. A row of
no spread at all becomes zero either way, and does not count.

Source: Ba, Kiros, Hinton, Layer normalization, 2016, equation 4; the same for group, instance and RMS norms, each over
its own rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from neutralize.dataflow import argument, first_tensor, shape_of
from neutralize.sites import Norm, norm_of, owner_of

if TYPE_CHECKING:
    from neutralize.planner import Request

SPREAD_MARGIN = 2.0
"""What the least measured spread is divided by: inputs with half the example's least spread are still covered."""


@dataclass(frozen=True)
class Spread:
    """The spread σ by which a norm divides, over the rows (or groups) of the example inputs.

    Attributes:
        norm: the norm.
        least: the least σ that is not zero, divided by ``SPREAD_MARGIN``.
        usual: the σ at which the norm is off as it is in the root mean square.
    """

    norm: Norm
    least: float
    usual: float

    def error(self, scale: float, spread: float) -> float:
        """How far the norm's values are off, relative to them, where what it reads is scaled and has that spread."""
        variance, eps = spread**2, self.norm.eps
        if scale == 1.0 or eps == 0.0:
            return 0.0
        return abs(math.sqrt((variance + eps) / (variance + eps / scale**2)) - 1.0)


def measure(request: Request) -> dict[fx.Node, Spread]:
    """The spread of every norm with statistics of its own, in the network without the selected layers, in one run.

    What cannot be measured is left out: there are no example inputs or weights, or no module computes the norm alone.

    Raises:
        NeutralizeError: the model does not accept the example inputs.
    """
    found: dict[fx.Node, Spread] = {}
    if not request.is_runnable:
        return found

    def watch(norm: Norm) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, kwargs: object) -> None:
            tensor = first_tensor((args, kwargs))
            if tensor is None or tuple(tensor.shape) != shape_of(norm.data) or not tensor.numel():
                return
            spread = _spread(norm, tensor.detach())
            before = found.get(norm.node, spread)  # a module that is called twice
            found[norm.node] = Spread(norm, min(spread.least, before.least), min(spread.usual, before.usual))

        return hook

    norms = [norm for node in request.flow.graph.nodes if (norm := norm_of(node, request.flow)) is not None]
    own = [norm for norm in norms if norm.own_statistics and norm.kind != "batch_norm"]
    owners = {norm.node: owner_of(norm.node) for norm in own}
    watched = [norm for norm in own if owners[norm.node] and norm.module in ("", owners[norm.node])]
    request.run_excised([(request.modules[owners[norm.node]], watch(norm)) for norm in watched])
    return found


def _spread(norm: Norm, tensor: torch.Tensor) -> Spread:
    if norm.kind in ("layer_norm", "rms_norm"):
        rows = tensor.double().flatten(-len(argument(norm.node, "normalized_shape")))
    else:
        groups = tensor.shape[1] if norm.kind == "instance_norm" else argument(norm.node, "num_groups")
        rows = tensor.double().reshape(tensor.shape[0], groups, -1)
    centred = rows if norm.kind == "rms_norm" else rows - rows.mean(-1, keepdim=True)
    spreads = centred.square().mean(-1).sqrt()
    # Beside what rounding makes of a row of equal numbers.
    spreads = spreads[spreads > torch.finfo(tensor.dtype).eps * rows.abs().amax(-1)]
    if not spreads.numel():
        return Spread(norm, math.inf, math.inf)
    # The error is as 1/σ² where it is small.
    usual = float(spreads.pow(-4.0).mean()) ** -0.25
    return Spread(norm, float(spreads.min()) / SPREAD_MARGIN, usual)
