"""``passthrough``: the layer hands its input on; ``auto``: the same, with the strongest certificate that can be had."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from neutralize.activations import is_activation
from neutralize.certify import Interpretation
from neutralize.dataflow import argument, op_name, shape_of
from neutralize.errors import NeutralizeError, require_finite
from neutralize.plan import Certificate, Edit, LayerPlan, Rewrite, dtype_name
from neutralize.planner import BOUND_MARGIN, Draft, Request, describe_refusals
from neutralize.regime import Regime, choose
from neutralize.rules import non_negative
from neutralize.search import IDENTITY, Assignment, Preference, union
from neutralize.sites import Affine, AffineSite, affine_site, describe, widths
from neutralize.strategies.pairs import draft_pair
from neutralize.strategies.recurrent import draft_recurrent
from neutralize.strategies.sides import check_shared, unique


@dataclass(frozen=True)
class Passthrough:
    """Make the layer's output its input.

    A block with a skip connection is switched off exactly, by the parameters that null its branches. A square affine
    layer
    with its activation becomes a scaled identity in the activation's linear regime; its consumers undo the scale.

    Attributes:
        gain: factor that a plain layer hands its input on with.
        input_bound: a bound X on the magnitude of what enters a plain layer; by default it is measured on the example
            inputs.
        tolerance: refuse a layer whose certificate has a larger bound (relative to X).
        edit: for blocks, which parameters to write: ``cheapest`` (the fewest bytes), ``outgoing`` (the last affine
            parameters: gradients still reach them), ``incoming`` (the entry norm or the first projections).

    Source: MATH §2 (plain layers), §4 (blocks), §6 (recurrent layers).
    """

    gain: float = 1.0
    input_bound: float | None = None
    tolerance: float | None = None
    edit: Preference = "cheapest"

    name = "passthrough"

    def __post_init__(self) -> None:
        """Check the numbers."""
        given = {"input_bound": self.input_bound, "tolerance": self.tolerance}
        require_finite(
            "passthrough", gain=self.gain, **{name: value for name, value in given.items() if value is not None}
        )
        if self.gain == 0:
            raise NeutralizeError("passthrough: expected a gain other than 0, got 0; use strategy='zero'")
        if self.input_bound is not None and self.input_bound <= 0:
            raise NeutralizeError(f"passthrough: expected a positive input_bound, got {self.input_bound}; give max|x|")
        if self.tolerance is not None and self.tolerance < 0:
            raise NeutralizeError(
                f"passthrough: expected a tolerance of 0 or more, got {self.tolerance}; leave it out for none"
            )
        if self.edit not in ("cheapest", "outgoing", "incoming"):
            raise NeutralizeError(
                f"passthrough: expected cheapest, outgoing or incoming for edit, got {self.edit!r}; use one"
            )

    def draft(self, request: Request, layer: str) -> Draft:
        """Draft the pass-through of one layer."""
        calls = request.calls(layer)
        sites = [affine_site(request.flow, call) for call in calls]
        if isinstance(request.layers[layer], nn.RNNBase):
            draft = draft_recurrent(request, layer, self.input_bound, self.gain)
        elif all(site is not None for site in sites):
            draft = self._plain(request, layer, [site for site in sites if site is not None])
        else:
            draft = self._block(request, layer)
        bound = draft.layer.certificate.bound
        if self.tolerance is not None and (bound is None or bound > self.tolerance):
            raise NeutralizeError(
                f"plan: expected a certificate within tolerance={self.tolerance:.3g} for {layer!r}, got "
                f"{draft.layer.certificate}; raise the tolerance, give a smaller input_bound, or use a wider dtype"
            )
        return draft

    # ---- blocks ----------------------------------------------------------------------------------------------------

    def _block(self, request: Request, layer: str) -> Draft:
        assignment = identity_assignment(request, layer, self.edit)
        if assignment is None:
            pair = draft_pair(request, layer, self.gain, self.input_bound)
            if pair is not None:
                return pair
            raise NeutralizeError(_why_no_identity(request, layer, self.edit))
        if self.gain != 1.0:
            raise NeutralizeError(
                f"plan: expected gain=1 for the block {layer!r}, got {self.gain}; a block hands its input on as it is"
            )
        uses_identity = IDENTITY in assignment.values()
        assumption = "finite activations" + (", matrix products in full precision" if uses_identity else "")
        certificate = Certificate(layer, "exact", 0.0, assumption, "the dataflow's output evaluates to its input")
        entry = LayerPlan(layer, "input", certificate, (), sides="" if self.edit == "cheapest" else self.edit)
        return Draft(request.edits_for(assignment), entry)

    # ---- plain layers ----------------------------------------------------------------------------------------------

    def _plain(self, request: Request, layer: str, sites: list[AffineSite]) -> Draft:
        site = sites[0]
        incoming = _identity_edit(request, layer, site)
        consumers = unique(consumer for one in sites for consumer in one.consumers)
        readers = [describe(reader, request.flow) for one in sites for reader in one.other_readers]
        activation = site.activation
        dtype = request.tensors[site.affine.weight].dtype
        entering_non_negative = all(non_negative(one.call.entry, request.cut) for one in sites)
        if activation is None:
            _check_follower(request, layer, site)
        trivial = activation is None or (entering_non_negative and activation.identity_from == 0.0 and self.gain > 0)
        bound = 0.0
        if not trivial:
            _check_consumers(request, layer, site, consumers, readers)
            bound = abs(self.gain) * (self.input_bound if self.input_bound is not None else request.input_bound(layer))
        regime = choose(
            activation,
            dtype,
            bound,
            consumer_peak=0.0 if trivial else _peak(request, consumers),
            has_bias=site.affine.bias is not None,
            non_negative=entering_non_negative and self.gain > 0,
        )
        if regime is None:
            raise NeutralizeError(_why_no_regime(site, layer, dtype))
        edits: list[Edit] = list(_incoming_edits(request, site, incoming, regime.epsilon * self.gain, regime.point))
        if not trivial:
            edits.extend(_outgoing_edits(request, layer, consumers, regime))
        certificate = self._certificate(layer, site, regime, bound, dtype, measured=self.input_bound is None)
        stored = _stored(regime.epsilon * self.gain, dtype)
        note = ""
        if abs(stored / (regime.epsilon * self.gain) - 1.0) > 1e-4:
            note = f"the diagonal {regime.epsilon * self.gain:.6g} is stored as {stored:.6g} in {dtype_name(dtype)}"
        entry = LayerPlan(
            layer,
            "input",
            certificate,
            (),
            activation=activation.name if activation else "",
            gain=self.gain,
            operating_point=regime.point,
            value=regime.value,
            slope=regime.slope,
            epsilon=regime.epsilon,
            input_bound=bound / abs(self.gain) if bound else None,
            consumers=() if trivial else tuple(dict.fromkeys(consumer.module for consumer in consumers)),
            note=note,
        )
        return Draft(tuple(edits), entry)

    def _certificate(
        self, layer: str, site: AffineSite, regime: Regime, bound: float, dtype: torch.dtype, *, measured: bool
    ) -> Certificate:
        off_gain = abs(_stored(regime.epsilon * self.gain, dtype) / regime.epsilon - 1.0)
        if site.activation is None or bound == 0.0:
            reason = "the weight is the identity"
            if site.activation is not None:
                reason += f" and {site.activation.name} is one on what enters, which is never negative"
            if self.gain != 1.0:
                return Certificate(layer, "bounded", off_gain, "finite activations", f"{reason} times {self.gain:g}")
            return Certificate(layer, "exact", 0.0, "finite activations, matrix products in full precision", reason)
        relative = regime.error / bound * abs(self.gain) + off_gain
        source = f"measured on the example inputs, with a margin of {BOUND_MARGIN:g}" if measured else "given"
        limit = bound / abs(self.gain)
        kind = "rounding" if regime.nonlinearity == 0.0 and self.gain == 1.0 else "bounded"
        return Certificate(
            layer,
            kind,
            relative,
            f"|x| <= {limit:.6g} ({source})",
            f"{site.activation.name} at {regime.point:g} with ε = {regime.epsilon:g}: nonlinearity "
            f"{regime.nonlinearity / bound:.2g}, rounding {regime.rounding / bound:.2g} of the bound",
        )


@dataclass(frozen=True)
class Auto(Passthrough):
    """Pass-through with the strongest certificate there is; where there is none, an error says what would work."""

    name = "auto"


def identity_assignment(request: Request, layer: str, edit: Preference) -> Assignment | None:
    """The cheapest assignment under which every call of the block is proven to hand its input on, or ``None``."""
    found: list[Assignment] = [{}]
    searches = request.search(layer, edit)
    for search in searches:
        answers = search.same(search.call.exit)
        joined = (union(one, other) for one in found for other in answers)
        found = sorted((both for both in joined if both is not None), key=search.cost)
    for assignment in found:
        if all(Interpretation(request.flow, search.call, assignment, request.cut).is_identity for search in searches):
            return assignment
    return None


def _why_no_identity(request: Request, layer: str, edit: Preference) -> str:
    searches = request.search(layer, edit)
    call = searches[0].call
    before, after = shape_of(call.entry), shape_of(call.exit)
    start = f"plan: expected a layer that can hand its input on, got {layer!r}, "
    if before != after:
        return (
            f"{start}which turns shape {list(before or ())} into {list(after or ())}; use strategy='zero' or 'damp', "
            "or select "
            "the block that contains it"
        )
    refused = describe_refusals(searches)
    if refused:
        return (
            f"{start}some of whose parameters cannot be written: {refused}; select every layer that reads them, or untie "
            "them"
        )
    if not any(search.same(search.call.exit) for search in searches):
        return (
            f"{start}a {type(request.layers[layer]).__name__} with no skip connection around parameters that could be "
            "nulled; use strategy='zero' or 'damp', or select the block that adds it to the residual stream"
        )
    return (
        f"{start}whose parameters can be nulled, but whose output is not proven to be its input then (a norm or an "
        "activation stands on the residual stream); use strategy='zero' or 'damp'"
    )


def _identity_edit(request: Request, layer: str, site: AffineSite) -> tuple[int, int]:
    """Start and step of the diagonal that makes the layer the identity.

    Raises:
        NeutralizeError: it cannot be one: its widths differ, or it is a convolution that moves or skips samples.
    """
    affine, node = site.affine, site.affine.node
    entering, leaving = widths(site, request.flow)
    if entering != leaving:
        raise NeutralizeError(
            f"plan: expected a layer with as many outputs as inputs, got {layer!r} from {entering} to {leaving} "
            "features; "
            "use strategy='zero' or 'damp', or select the block that contains it"
        )
    if not affine.is_convolution:
        return 0, 1
    name = op_name(node).removeprefix("aten::")
    if "transpose" in name or name == "convolution":
        raise NeutralizeError(
            f"plan: expected a convolution that is not transposed for {layer!r}, got {name}; use 'zero'"
        )
    if any(stride != 1 for stride in argument(node, "stride", [1])):
        raise NeutralizeError(
            f"plan: expected stride 1 for {layer!r}, got stride {list(argument(node, 'stride'))}; a strided "
            "convolution drops "
            "samples: use strategy='zero', or select the block that contains it"
        )
    kernel = request.flow.shapes[affine.weight][2:]
    if shape_of(node) != shape_of(affine.data) or any(size % 2 == 0 for size in kernel):
        raise NeutralizeError(
            f"plan: expected a convolution that keeps its input's shape for {layer!r}, got "
            f"{list(shape_of(affine.data) or ())} to "
            f"{list(shape_of(node) or ())} with kernel {list(kernel)}; use strategy='zero'"
        )
    volume = math.prod(kernel)
    return volume // 2, volume


def _incoming_edits(
    request: Request, site: AffineSite, diagonal: tuple[int, int], value: float, point: float
) -> tuple[Rewrite, ...]:
    affine = site.affine
    groups = int(argument(affine.node, "groups", 1)) if affine.is_convolution else 1
    start, step = diagonal
    edits: list[Rewrite] = []
    if groups == 1:
        edits.append(request.rewrite(affine.weight, diagonal=value, start=start, step=step))
    else:
        # Row r of a grouped kernel sees its own group's channels only: the diagonal starts again in every group.
        rows = request.flow.shapes[affine.weight][0]
        per_group = rows // groups
        if per_group == 1:
            edits.append(request.rewrite(affine.weight, diagonal=value, start=start, step=0))
        else:
            for group in range(groups):
                block = (group * per_group, (group + 1) * per_group)
                edits.append(request.rewrite(affine.weight, diagonal=value, start=start, step=step, rows=block))
    if affine.bias is not None:
        edits.append(request.rewrite(affine.bias, fill=point))
    return tuple(edits)


def _outgoing_edits(request: Request, layer: str, consumers: list[Affine], regime: Regime) -> list[Edit]:
    edits: list[Edit] = []
    for consumer in consumers:
        if regime.value == 0.0:
            edits.append(request.rewrite(consumer.weight, scale=regime.rescale))
            continue
        if consumer.bias is None:
            raise NeutralizeError(
                f"plan: expected a bias in {consumer.module!r} to absorb the operating point of {layer!r}, got none; "
                "add a "
                "zero bias to that layer, or use strategy='zero'"
            )
        if consumer.is_convolution and consumer.has_padding:
            raise NeutralizeError(
                f"plan: expected no zero padding in {consumer.module!r}, which reads {layer!r} at an operating point "
                "other "
                "than 0, got a padded convolution: its borders would be wrong; use strategy='zero'"
            )
        edits.append(
            request.fold(
                consumer.weight,
                consumer.bias,
                scale=regime.rescale,
                shift=-regime.value * regime.rescale,
                transposed=consumer.transposed,
            )
        )
    return edits


def _check_consumers(
    request: Request, layer: str, site: AffineSite, consumers: list[Affine], readers: list[str]
) -> None:
    """Check that everything that reads the layer can be rescaled, and that nothing else is rescaled with it.

    Raises:
        NeutralizeError: naming the reader in the way.
    """
    assert site.activation is not None
    if readers:
        raise NeutralizeError(
            f"plan: expected only affine layers to read {layer!r} ({site.activation.name}), got "
            f"{', '.join(sorted(set(readers)))}; "
            "its scale can be undone in a weight only: use strategy='zero', or select the block that contains it"
        )
    if not consumers:
        raise NeutralizeError(
            f"plan: expected an affine layer that reads {layer!r} ({site.activation.name}), got none; use "
            "strategy='zero'"
        )
    for consumer in consumers:
        if "transpose" in op_name(consumer.node) or op_name(consumer.node) == "aten::convolution":
            raise NeutralizeError(
                f"plan: expected a linear layer or a plain convolution to read {layer!r}, got "
                f"{op_name(consumer.node)}; "
                "use strategy='zero'"
            )
    check_shared(request, layer, consumers)


def _check_follower(request: Request, layer: str, site: AffineSite) -> None:
    """Refuse a layer whose norm or activation would have to be cut out with it but cannot.

    Raises:
        NeutralizeError: naming what follows.
    """
    for reader in site.other_readers:
        if "batch_norm" in op_name(reader) or is_activation(reader):
            raise NeutralizeError(
                f"plan: expected a known activation, an affine layer or a sum after {layer!r}, got "
                f"{describe(reader, request.flow)}; use strategy='zero' or 'damp', or select the block that contains it"
            )


def _peak(request: Request, consumers: list[Affine]) -> float:
    """Largest magnitude among the consumers' weights and row sums; 1 where there is no data to look at."""
    peaks = [1.0]
    for consumer in consumers:
        tensor = request.tensors[consumer.weight].detach()
        if tensor.is_meta or not tensor.numel():
            continue
        sums = tensor.sum(0 if consumer.transposed else tuple(range(1, tensor.dim())), dtype=torch.float32)
        peaks.extend((float(tensor.abs().max()), float(sums.abs().max())))
    return max(peaks)


def _why_no_regime(site: AffineSite, layer: str, dtype: torch.dtype) -> str:
    assert site.activation is not None
    if site.affine.bias is None:
        return (
            f"plan: expected a bias in {layer!r} to reach the linear side of {site.activation.name}, got none; add a "
            "zero bias, "
            "select a layer whose input is known to be non-negative, or use strategy='zero'"
        )
    return (
        f"plan: expected an operating point of {site.activation.name} at which the consumers of {layer!r} stay inside "
        f"{dtype_name(dtype)}, got none; use a wider dtype, or strategy='zero'"
    )


def _stored(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(dtype).double())
