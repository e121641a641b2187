"""Undo a linear regime in the weights that read the layer: each kind of reader in its own way.

The layer hands on ``h = c + s x`` with ``c = φ(a)`` and ``s = ε φ'(a)``. A reader makes of it what it made of ``x``:

- an affine op: ``V ← V / s``, ``d ← d - c/s (V 1)``, where ``V 1`` sums over input features and taps;
- a product with a parameter: ``w ← w / s``, if c = 0;
- a batch norm with stored statistics: ``mean ← s mean + c``, ``gain ← gain / s``;
- a layer, group, instance or RMS norm has statistics of its own, and nothing to rewrite: c goes with the mean that it
  subtracts (an RMS norm subtracts none), s > 0 with the spread σ that it divides by. What is left is its constant e
  beside σ² (``spread``).

Source: MATH §2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from neutralize.dataflow import dtype_of
from neutralize.errors import NeutralizeError
from neutralize.plan import Edit
from neutralize.planner import Request
from neutralize.readers import Read, reads_every_tap_inside
from neutralize.regime import Regime, unit_roundoff
from neutralize.sites import Affine, AffineSite, Norm, Product
from neutralize.spread import Spread
from neutralize.strategies.sides import check_own


def check_readers(request: Request, layer: str, reads: list[Read]) -> None:
    """Check that the weights of the readers may be rewritten: nothing else reads them.

    Raises:
        NeutralizeError: naming the reader in the way.
    """
    nodes: dict[fx.Node, tuple[str, ...]] = {}
    ranges: dict[fx.Node, set[tuple[int, int] | None]] = {}
    for read in reads:
        reader = read.reader
        # A recurrent op has a map for each direction.
        nodes[reader.node] = tuple(dict.fromkeys((*nodes.get(reader.node, ()), *_written(reader))))
        ranges.setdefault(reader.node, set()).add(read.features)
        if isinstance(reader, Affine) and reader.added is not None:
            nodes[reader.added] = ()
    check_own(request, layer, nodes)
    canonical = {node: tuple(map(request.canonical, nodes[node])) for node in ranges}
    for node, names in canonical.items():
        for other, names_there in canonical.items():
            if {*names} & {*names_there} and (names != names_there or ranges[node] != ranges[other]):
                raise NeutralizeError(
                    f"plan: expected every reader of {layer!r} to have parameters of its own, got "
                    f"{min({*names} & {*names_there})!r} in two that read it differently; untie or copy it first, or "
                    "use strategy='zero'"
                )


def _written(reader: Affine | Norm | Product) -> tuple[str, ...]:
    """The parameters and statistics by which a reader undoes a regime."""
    if isinstance(reader, Norm):
        names: tuple[str | None, ...] = () if reader.own_statistics else reader.parameters
    else:
        names = (reader.weight, reader.bias if isinstance(reader, Affine) else None)
    return tuple(name for name in names if name is not None)


def zeros_beside(request: Request, reads: list[Read]) -> list[str]:
    """What reads zeros where the layer would hand on φ(a), in words; each once.

    A convolution that the plan makes the identity (or zero) reads each sample by its own tap, and no padding.
    """
    found: dict[str, None] = {}
    for read in reads:
        found.update(dict.fromkeys(read.zeros))
        if read.padded and read.reader.weight is not None and not request.is_diagonal(read.reader.weight):
            found[f"the padding of {read.reader.label!r}"] = None
    return list(found)


def rewritten_modules(reads: list[Read]) -> tuple[str, ...]:
    """Qualified names of the modules whose weights undo the layer's scale, each once; the model itself is none."""
    own = [read.reader for read in reads if not (isinstance(read.reader, Norm) and read.reader.own_statistics)]
    return tuple(dict.fromkeys(reader.module for reader in own if reader.module))


def unique_norms(sites: list[AffineSite]) -> list[Norm]:
    """The batch norms between a layer and its activation, each module once."""
    return list({site.norm.parameters: site.norm for site in sites if site.norm is not None}.values())


# ---- what undoing costs ----------------------------------------------------------------------------------------------


def spreads_of(request: Request, reads: list[Read], gain: float) -> list[Spread]:
    """The spreads of the norms among the readers, where they could be measured, if ``gain`` times x is handed on."""
    found = [request.spreads[read.reader.node] for read in reads if read.reader.node in request.spreads]
    return [replace(spread, least=abs(gain) * spread.least, usual=abs(gain) * spread.usual) for spread in found]


def reading_error(
    request: Request, layer: str, reads: list[Read], bound: float, spreads: list[Spread], *, zeros: bool
) -> Callable[[Regime], float]:
    """The error of a regime in what reads the layer: see ``regime.choose``.

    Args:
        request: the request.
        layer: qualified name.
        reads: what reads it.
        bound: X.
        spreads: of the norms among the readers.
        zeros: let zeros stand beside φ(a).
    """
    stand = zeros_beside(request, reads)

    def error(regime: Regime) -> float:
        if regime.value != 0.0 and stand and not zeros:
            return math.inf
        if any(obstacle(request, layer, read, regime, spreads) is not None for read in reads):
            return math.inf
        return norm_error_of(regime, bound, reads, spreads)

    return error


def norm_error_of(regime: Regime, bound: float, reads: list[Read], spreads: list[Spread]) -> float:
    """The largest error that the norms behind a layer add, as an error of what it hands on."""
    scale = regime.epsilon * regime.slope
    # |x - mean| <= 2 X; an RMS norm subtracts no mean.
    constant = [
        (1.0 if spread.norm.kind == "rms_norm" else 2.0) * bound * spread.error(scale, spread.least)
        for spread in spreads
    ]
    # What a norm subtracts is as large as φ(a), and it computes in float32 at least.
    own = [read.reader for read in reads if isinstance(read.reader, Norm) and read.reader.own_statistics]
    wide = [torch.float64 if dtype_of(norm.data) == torch.float64 else torch.float32 for norm in own]
    rounding = max((4.0 * unit_roundoff(dtype) * abs(regime.value / scale) for dtype in wide), default=0.0)
    return max(constant, default=0.0) + rounding


def usual_norm_error(regime: Regime, spreads: list[Spread]) -> tuple[float, Norm | None]:
    """How far the norms' values are off as a rule, relative to them, and the norm that is off the most."""
    scale = regime.epsilon * regime.slope
    errors = [(spread.error(scale, spread.usual), spread.norm) for spread in spreads]
    return max(errors, key=lambda found: found[0], default=(0.0, None))


# ---- undoing ---------------------------------------------------------------------------------------------------------


def undoing_edits(request: Request, layer: str, reads: list[Read], regime: Regime, spreads: list[Spread]) -> list[Edit]:
    """The edits by which the readers undo the regime; ops that share their parameters undo it once.

    Raises:
        NeutralizeError: a reader cannot.
    """
    edits: dict[tuple[tuple[str, ...], tuple[int, int] | None], list[Edit]] = {}
    for read in reads:
        reader = read.reader
        why = obstacle(request, layer, read, regime, spreads)
        if why is not None:
            raise NeutralizeError(why)
        names = tuple(map(request.canonical, _written(reader)))
        if not names or (names, read.features) in edits:
            continue
        if isinstance(reader, Affine):
            found = _affine_edits(request, reader, read.features, regime)
        elif isinstance(reader, Product):
            found = [request.rewrite(reader.weight, scale=regime.rescale)]
        else:
            found = _batch_norm_edits(request, reader, read.features, regime)
        edits[names, read.features] = found
    return [edit for found in edits.values() for edit in found]


def obstacle(request: Request, layer: str, read: Read, regime: Regime, spreads: list[Spread]) -> str | None:
    """Why a reader cannot undo a regime, as an error message, or ``None``."""
    reader, scale = read.reader, regime.epsilon * regime.slope
    if read.ordered and scale < 0:
        return (
            f"plan: expected no maximum between {layer!r} and its readers, got one, and a slope of {regime.slope:g} "
            "that turns the order round; use strategy='zero'"
        )
    if read.linear and regime.value != 0.0:
        return (
            f"plan: expected nothing between {layer!r} and its readers that changes a constant, got "
            f"{' and '.join(read.linear)}, and an operating point at which φ(a) = {regime.value:.3g}; use "
            "strategy='zero', or select the block that contains it"
        )
    if isinstance(reader, Norm):
        if reader.own_statistics:
            return _norm_obstacle(layer, reader, regime, spreads)
        if scale != 1.0 and reader.weight is None:
            return (
                f"plan: expected a gain in the batch norm of {reader.label!r} to undo the scale of {layer!r}, got "
                "affine=False; use strategy='zero'"
            )
        return None
    if regime.value == 0.0:
        return None
    if isinstance(reader, Product):
        return (
            f"plan: expected an affine layer to read {layer!r} at an operating point other than 0, got a product with "
            f"{reader.label!r}, and no bias to absorb φ(a) = {regime.value:.3g}; use strategy='zero'"
        )
    if reader.bias is None:
        return (
            f"plan: expected a bias in {reader.label!r} to absorb the operating point of {layer!r}, got none; add a "
            "zero bias to that layer, or use strategy='zero'"
        )
    if not reads_every_tap_inside(reader):
        return (
            f"plan: expected a transposed convolution of stride 1 in {reader.label!r}, which reads {layer!r} at an "
            "operating point other than 0, got one whose stride gives each output position taps of its own: no bias "
            "absorbs what they make of φ(a); use strategy='zero'"
        )
    return None


def _norm_obstacle(layer: str, norm: Norm, regime: Regime, spreads: list[Spread]) -> str | None:
    scale = regime.epsilon * regime.slope
    name = f"the {norm.kind.replace('_', ' ')} of {norm.label!r}"
    if norm.kind == "batch_norm":
        return (
            f"plan: expected stored statistics in {name}, which reads {layer!r}, got those of the batch; call "
            "model.eval(), or use strategy='zero'"
        )
    if scale < 0:
        return (
            f"plan: expected a positive slope before {name}, which reads {layer!r}, got {regime.slope:g}: a norm takes "
            "a scale away, but not its sign; use strategy='zero', or select the block that contains it"
        )
    if regime.value != 0.0 and norm.kind == "rms_norm":
        return (
            f"plan: expected a norm that subtracts its mean to read {layer!r} at an operating point other than 0, got "
            f"{name}; use strategy='zero', or select the block that contains it"
        )
    if scale != 1.0 and norm.eps and not any(spread.norm.node is norm.node for spread in spreads):
        return (
            f"plan: expected example_inputs and a module of its own for {name}, which reads {layer!r} at a scale of "
            f"{scale:.3g}, to measure its spread, got none: its ε = {norm.eps:g} would act as "
            f"{norm.eps / scale**2:.3g}; give them, use strategy='zero', or select the block that contains it"
        )
    return None


def _affine_edits(request: Request, reader: Affine, features: tuple[int, int] | None, regime: Regime) -> list[Edit]:
    shape = request.flow.shapes[reader.weight]
    taps = math.prod(shape[2:]) if reader.is_convolution else 1
    columns = features if features is None or reader.transposed else (features[0] * taps, features[1] * taps)
    if regime.value == 0.0:
        block = {"rows" if reader.transposed else "columns": columns}
        return [request.rewrite(reader.weight, scale=regime.rescale, **block)]
    assert reader.bias is not None
    return [
        request.fold(
            reader.weight,
            reader.bias,
            scale=regime.rescale,
            shift=-regime.value * regime.rescale,
            transposed=reader.transposed,
            groups=reader.groups if reader.transposed else 1,
            columns=columns,
        )
    ]


def _batch_norm_edits(request: Request, norm: Norm, features: tuple[int, int] | None, regime: Regime) -> list[Edit]:
    assert norm.mean is not None
    scale = regime.epsilon * regime.slope
    edits: list[Edit] = [request.rewrite(norm.mean, scale=scale, fill=regime.value, rows=features)]
    if scale != 1.0:
        assert norm.weight is not None
        edits.append(request.rewrite(norm.weight, scale=regime.rescale, rows=features))
    return edits


def peak(request: Request, reads: list[Read]) -> float:
    """Largest magnitude among the readers' weights and their sums; 1 where there is no data to look at."""
    peaks = [1.0]
    for read in reads:
        reader = read.reader
        if reader.weight is None or (isinstance(reader, Norm) and reader.own_statistics):
            continue
        if (written := request.written_peak(reader.weight)) is not None:
            peaks.append(written)
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
