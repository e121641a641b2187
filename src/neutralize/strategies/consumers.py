"""Undo a linear regime in the weights that read the layer: each kind of reader in its own way.

The layer hands on ``h = c + s x`` with ``c = φ(a)`` and ``s = ε φ'(a)``. A reader makes of it what it made of ``x``:

- an affine op: ``V ← V / s``, ``d ← d - c/s (V 1)``, where ``V 1`` sums over input features and taps;
- a batch norm with stored statistics: ``mean ← s mean + c``, ``gain ← gain / s``;
- a layer, group, instance norm: nothing if s = 1, for it subtracts c itself; an RMS norm: nothing if s = 1 and c = 0.

Source: MATH §2.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from neutralize.dataflow import Dataflow, dtype_of
from neutralize.errors import NeutralizeError
from neutralize.plan import Edit
from neutralize.planner import Request
from neutralize.readers import Read, leaves_no_tap_out
from neutralize.regime import Regime
from neutralize.sites import Affine, AffineSite, Norm
from neutralize.strategies.sides import check_own


def check_readers(request: Request, layer: str, reads: list[Read]) -> None:
    """Check that the weights of the readers may be rewritten: nothing else reads them.

    Raises:
        NeutralizeError: naming the reader in the way.
    """
    nodes: dict[fx.Node, tuple[str, ...]] = {}
    for read in reads:
        reader = read.reader
        if isinstance(reader, Affine):
            nodes[reader.node] = tuple(name for name in (reader.weight, reader.bias) if name is not None)
            if reader.added is not None:
                nodes[reader.added] = ()
        else:
            nodes[reader.node] = () if reader.own_statistics else reader.parameters
        if read.features is not None and reader.module in request.layers:
            raise NeutralizeError(
                f"plan: expected {reader.module!r} to read {layer!r} and nothing else, got a concatenation, and both "
                "selected; select one of them"
            )
    check_own(request, layer, nodes)


def zeros_beside(reads: list[Read]) -> list[str]:
    """What reads zeros where the layer would hand on φ(a), in words; each once."""
    return list(dict.fromkeys(zeros for read in reads for zeros in read.zeros))


def absorbs(reads: list[Read]) -> bool:
    """Whether every reader has a parameter or a mean that takes φ(a) away."""
    return all(
        read.reader.bias is not None
        and (not read.reader.transposed or not read.reader.is_convolution or not read.zeros)
        if isinstance(read.reader, Affine)
        else read.reader.kind != "rms_norm"
        for read in reads
    )


def rewritten_modules(reads: list[Read]) -> tuple[str, ...]:
    """Qualified names of the modules whose weights undo the layer's scale, each once."""
    own = [read.reader for read in reads if isinstance(read.reader, Affine) or not read.reader.own_statistics]
    return tuple(dict.fromkeys(reader.module for reader in own))


def unique_norms(sites: list[AffineSite]) -> list[Norm]:
    """The batch norms between a layer and its activation, each module once."""
    return list({site.norm.parameters: site.norm for site in sites if site.norm is not None}.values())


def undoing_edits(request: Request, layer: str, reads: list[Read], regime: Regime) -> list[Edit]:
    """The edits by which the readers undo the regime.

    Raises:
        NeutralizeError: a reader cannot.
    """
    edits: list[Edit] = []
    scale = regime.epsilon * regime.slope
    for read in reads:
        if read.ordered and scale < 0:
            raise NeutralizeError(
                f"plan: expected no maximum between {layer!r} and its readers, got one, and a slope of "
                f"{regime.slope:g} that turns the order round; use strategy='zero'"
            )
        if isinstance(read.reader, Affine):
            edits.extend(_affine_edits(request, layer, read.reader, read.features, regime))
        elif read.reader.own_statistics:
            _check_own_statistics(layer, read.reader, regime, request.flow)
        else:
            edits.extend(_batch_norm_edits(request, layer, read.reader, read.features, regime))
    return edits


def _affine_edits(
    request: Request, layer: str, reader: Affine, features: tuple[int, int] | None, regime: Regime
) -> list[Edit]:
    shape = request.flow.shapes[reader.weight]
    taps = math.prod(shape[2:]) if reader.is_convolution else 1
    columns = features if features is None or reader.transposed else (features[0] * taps, features[1] * taps)
    if regime.value == 0.0:
        block = {"rows" if reader.transposed else "columns": columns}
        return [request.rewrite(reader.weight, scale=regime.rescale, **block)]
    if reader.bias is None:
        raise NeutralizeError(
            f"plan: expected a bias in {reader.module!r} to absorb the operating point of {layer!r}, got none; add a "
            "zero bias to that layer, or use strategy='zero'"
        )
    if reader.is_convolution and reader.transposed:
        if reader.groups > 1:
            raise NeutralizeError(
                f"plan: expected one group in {reader.module!r}, a transposed convolution that reads {layer!r} at an "
                f"operating point other than 0, got {reader.groups}; use strategy='zero'"
            )
        if not leaves_no_tap_out(reader, shape):
            raise NeutralizeError(
                f"plan: expected a transposed convolution whose every output position reads every tap in "
                f"{reader.module!r}, which reads {layer!r} at an operating point other than 0, got one whose stride or "
                "padding leaves taps out: no bias absorbs that; use strategy='zero'"
            )
    return [
        request.fold(
            reader.weight,
            reader.bias,
            scale=regime.rescale,
            shift=-regime.value * regime.rescale,
            transposed=reader.transposed,
            columns=columns,
        )
    ]


def _batch_norm_edits(
    request: Request, layer: str, norm: Norm, features: tuple[int, int] | None, regime: Regime
) -> list[Edit]:
    assert norm.mean is not None
    scale = regime.epsilon * regime.slope
    edits: list[Edit] = [request.rewrite(norm.mean, scale=scale, fill=regime.value, rows=features)]
    if scale != 1.0:
        if norm.weight is None:
            raise NeutralizeError(
                f"plan: expected a gain in the batch norm of {norm.module!r} to undo the scale of {layer!r}, got "
                "affine=False; use strategy='zero'"
            )
        edits.append(request.rewrite(norm.weight, scale=regime.rescale, rows=features))
    return edits


def _check_own_statistics(layer: str, norm: Norm, regime: Regime, flow: Dataflow) -> None:
    scale = regime.epsilon * regime.slope
    name = norm.kind.replace("_", " ")
    if norm.kind == "batch_norm":
        raise NeutralizeError(
            f"plan: expected stored statistics in the batch norm of {norm.module!r}, which reads {layer!r}, got those "
            "of the batch; call model.eval(), or use strategy='zero'"
        )
    if scale != 1.0:
        raise NeutralizeError(
            f"plan: expected a scale of 1 before the {name} of {norm.module!r}, which reads {layer!r}, got "
            f"{scale:.3g}: its ε = {norm.eps:g} does not scale with its input and would act as "
            f"{norm.eps / scale**2:.3g}; use strategy='zero', or select the block that contains it"
        )
    if regime.value != 0.0 and norm.kind == "rms_norm":
        raise NeutralizeError(
            f"plan: expected a norm that subtracts its mean to read {layer!r} at an operating point other than 0, got "
            f"the rms norm of {norm.module!r}; use strategy='zero', or select the block that contains it"
        )


def peak(request: Request, reads: list[Read]) -> float:
    """Largest magnitude among the readers' weights and their sums; 1 where there is no data to look at."""
    peaks = [1.0]
    for read in reads:
        reader = read.reader
        if reader.weight is None or (isinstance(reader, Norm) and reader.own_statistics):
            continue
        tensor = request.tensors[reader.weight].detach()
        if tensor.is_meta or not tensor.numel():
            continue
        peaks.append(float(tensor.abs().max()))
        if isinstance(reader, Affine):
            kept = 1 if reader.transposed else 0
            summed = tuple(dim for dim in range(tensor.dim()) if dim != kept)
            peaks.append(float(tensor.sum(summed, dtype=torch.float32).abs().max()))
    return max(peaks)


# ---- the batch norm between the layer and its activation -------------------------------------------------------------


def identity_norm_edits(request: Request, layer: str, sites: list[AffineSite], point: float) -> list[Edit]:
    """The edits that make the batch norms behind a layer add ``point`` and do nothing else, in eval mode.

    ``(x - 0) / √((1 - ε) + ε) · 1 + point``: statistics, not gains, because that holds whatever the statistics were,
    on a meta model and without a gain too.

    Raises:
        NeutralizeError: it normalises by the statistics of the batch.
    """
    edits: list[Edit] = []
    for norm in unique_norms(sites):
        if norm.own_statistics or norm.mean is None or norm.variance is None:
            lacking = (
                "no running statistics (track_running_stats=False)"
                if norm.mean is None
                else "those of the batch (call model.eval())"
            )
            raise NeutralizeError(
                f"plan: expected stored statistics in the batch norm {norm.module!r} behind {layer!r}, got {lacking}: "
                "what it does depends on the batch; use strategy='zero', or select the block that contains it"
            )
        edits.append(request.rewrite(norm.mean, fill=0.0 if norm.bias is not None else -point))
        edits.append(request.rewrite(norm.variance, fill=1.0 - norm.eps))
        if norm.weight is not None:
            edits.append(request.rewrite(norm.weight, fill=1.0))
        if norm.bias is not None:
            edits.append(request.rewrite(norm.bias, fill=point))
    check_own(request, layer, {site.norm.node: site.norm.parameters for site in sites if site.norm is not None})
    return edits


def norm_error(request: Request, norm: Norm) -> float:
    """Relative error of a batch norm that was made the identity: of 1/√(variance + ε), and of its own rounding."""
    assert norm.variance is not None
    dtype = request.tensors[norm.variance].dtype
    stored = float(torch.tensor(1.0 - norm.eps, dtype=torch.float64).to(dtype).double())
    data = dtype_of(norm.data) or dtype
    # Arithmetic on the 16-bit types is in float32 and rounds once on store.
    roundoffs = 6 if data in (torch.float32, torch.float64) else 2
    return abs(1.0 / math.sqrt(stored + norm.eps) - 1.0) + roundoffs * torch.finfo(data).eps / 2
