"""``passthrough``: the layer hands its input on; ``auto``: the same, with the strongest certificate that can be had."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from neutralize.activations import is_activation, is_proven
from neutralize.certify import Interpretation, side_readers
from neutralize.dataflow import argument, op_name, shape_of
from neutralize.errors import NeutralizeError, require_finite
from neutralize.likeness import likeness
from neutralize.obstacles import in_proof, on_skip
from neutralize.plan import Certificate, Edit, LayerPlan, Rewrite, dtype_name
from neutralize.planner import BOUND_MARGIN, Draft, Request, describe_refusals
from neutralize.readers import Read, per_dim, reads_of
from neutralize.regime import Regime, choose, unit_roundoff
from neutralize.rules import non_negative
from neutralize.search import IDENTITY, Assignment, Preference, joint
from neutralize.sites import UNSEEN, AffineSite, affine_site, describe, is_own_layer, norm_of, stays_in_place, widths
from neutralize.spread import SPREAD_MARGIN, Spread
from neutralize.strategies.consumers import (
    check_readers,
    identity_norm_edits,
    norm_error,
    peak,
    reading_error,
    rewritten_modules,
    spreads_of,
    undoing_edits,
    unique_norms,
    usual_norm_error,
    zeros_beside,
)
from neutralize.strategies.pairs import draft_pair
from neutralize.strategies.part import draft_part
from neutralize.strategies.postnorm import draft_postnorm
from neutralize.strategies.recurrent import draft_recurrent, is_recurrent

# What a norm may be off by as a rule, relative to its values, unless a tolerance says otherwise.
_FIGURES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3}
_FIGURE_NARROW = 3e-2


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
        partial: let a plain layer with more or fewer outputs than inputs hand on the features that fit: the first ones,
            and zeros for the rest.

    Source: MATH §2 (plain layers), §4 (blocks), §6 (recurrent layers).
    """

    gain: float = 1.0
    input_bound: float | None = None
    tolerance: float | None = None
    edit: Preference = "cheapest"
    partial: bool = False

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
        if request.fraction(layer) is not None:
            return draft_part(request, layer, 0.0)
        calls = request.calls(layer)
        sites = [affine_site(request.flow, call) for call in calls]
        if is_recurrent(request.layers[layer]):
            draft = draft_recurrent(request, layer, self.input_bound, self.gain)
        elif all(site is not None for site in sites):
            draft = self._plain(request, layer, [site for site in sites if site is not None])
        else:
            draft = self._block(request, layer)
        if not is_proven(draft.layer.activation):
            draft = _measured(draft)
        bound = draft.layer.certificate.bound
        if self.tolerance is not None and (bound is None or bound > self.tolerance):
            raise NeutralizeError(
                f"plan: expected a certificate within tolerance={self.tolerance:.3g} for {layer!r}, got "
                f"{draft.layer.certificate}; raise the tolerance, give a smaller input_bound, or use a wider dtype"
            )
        return draft

    # ---- blocks ----------------------------------------------------------------------------------------------------

    def _block(self, request: Request, layer: str) -> Draft:
        solved = _solved(request, layer, self.edit)
        if solved is None:
            folded = draft_postnorm(request, layer, self.edit) if self.gain == 1.0 else None
            if folded is not None:
                return folded
            pair = draft_pair(request, layer, self.gain, self.input_bound)
            if pair is not None:
                return pair
            windowed = skip_window(request, layer, self.edit) if self.gain == 1.0 else None
            if windowed is not None:
                return _cropped(request, layer, *windowed)
            raise NeutralizeError(_why_no_identity(request, layer, self.edit))
        if self.gain != 1.0:
            raise NeutralizeError(
                f"plan: expected gain=1 for the block {layer!r}, got {self.gain}; a block hands its input on as it is"
            )
        assignment, certificate = solved
        entry = LayerPlan(layer, "input", certificate, (), sides="" if self.edit == "cheapest" else self.edit)
        return Draft(request.edits_for(assignment), entry)

    # ---- plain layers ----------------------------------------------------------------------------------------------

    def _plain(self, request: Request, layer: str, sites: list[AffineSite]) -> Draft:
        site = sites[0]
        incoming = _identity_edit(request, layer, site, partial=self.partial)
        entering_width, leaving_width = widths(site, request.flow)
        if not all(stays_in_place(one) for one in sites):
            raise NeutralizeError(
                f"plan: expected a layer that leaves every feature in its place, got {layer!r}, which rearranges its "
                "input; select the affine layer inside it"
            )
        reads, readers = _reads(request, sites)
        activation = site.activation
        dtype = request.tensors[site.affine.weight].dtype
        entering_non_negative = all(non_negative(one.call.entry, request.cut) for one in sites)
        if activation is None and is_own_layer(site, request.flow):
            _check_follower(request, layer, site)
        trivial = activation is None or (entering_non_negative and activation.identity_from == 0.0 and self.gain > 0)
        bound = 0.0
        if not trivial:
            _check_readers(request, layer, site, reads, readers)
            bound = abs(self.gain) * (self.input_bound if self.input_bound is not None else request.input_bound(layer))
        chosen = partial(
            choose,
            activation,
            dtype,
            bound,
            consumer_peak=0.0 if trivial else peak(request, reads),
            has_bias=site.affine.bias is not None or site.norm is not None,
            non_negative=entering_non_negative and self.gain > 0,
        )
        spreads: list[Spread] = []
        regime: Regime | None = chosen()
        if regime is not None and not trivial:
            spreads = spreads_of(request, reads, self.gain)
            undoing = partial(reading_error, request, layer, reads, bound, spreads)
            undone = chosen(reading=undoing(zeros=False)) or chosen(reading=undoing(zeros=True))
            if undone is not None and self._is_good(undone, regime, dtype, bound, undoing(zeros=True)):
                regime = undone  # else what is in the way of the best one is said below
        if regime is None:
            raise NeutralizeError(_why_no_regime(site, layer, dtype))
        edits: list[Edit] = list(_incoming_edits(request, site, incoming, regime.epsilon * self.gain, regime.point))
        edits.extend(identity_norm_edits(request, layer, sites, regime.point))
        zeros: list[str] = []
        if not trivial:
            edits.extend(undoing_edits(request, layer, reads, regime, spreads))
            self._check_norms(layer, site, dtype, regime, bound, spreads)
            zeros = zeros_beside(request, reads) if regime.value != 0.0 else []
        certificate = self._certificate(request, layer, sites, regime, bound, measured=self.input_bound is None)
        if any(spread.error(regime.epsilon * regime.slope, spread.least) for spread in spreads):
            least = min(spread.least for spread in spreads)
            assumption = (
                f"{certificate.assumption}; spread at the norm >= {least:.3g} (measured, over {SPREAD_MARGIN:g})"
            )
            certificate = replace(certificate, kind="bounded", assumption=assumption)
        if zeros:
            certificate = self._at_borders(certificate, zeros, abs(regime.value * regime.rescale * self.gain) / bound)
        stored = _stored(regime.epsilon * self.gain, dtype)
        note = ""
        if abs(stored / (regime.epsilon * self.gain) - 1.0) > 1e-4:
            note = f"the diagonal {regime.epsilon * self.gain:.6g} is stored as {stored:.6g} in {dtype_name(dtype)}"
        for remark in (
            f"not exact beside {' and '.join(zeros)}: zeros stand there, not φ(a)" if zeros else "",
            f"holds in eval mode: the batch norm {site.norm.module!r} is the identity there" if site.norm else "",
            _which_pass(entering_width, leaving_width),
            _floor(site),
        ):
            note = "; ".join(filter(None, (note, remark)))
        entry = LayerPlan(
            layer,
            "input" if entering_width == leaving_width else "partial",
            certificate,
            (),
            activation=activation.name if activation else "",
            parameters=activation.parameters if activation else (),
            gain=self.gain,
            operating_point=regime.point,
            value=regime.value,
            slope=regime.slope,
            epsilon=regime.epsilon,
            input_bound=bound / abs(self.gain) if bound else None,
            consumers=() if trivial else rewritten_modules(reads),
            note=note,
        )
        return Draft(tuple(edits), entry)

    def _is_good(
        self, undone: Regime, best: Regime, dtype: torch.dtype, bound: float, reading: Callable[[Regime], float]
    ) -> bool:
        """Whether the best regime that the readers can undo is worth taking, next to the best that there is."""
        if self.tolerance is not None or math.isfinite(reading(best)):
            return True
        return undone.error <= max(16.0 * best.error, _FIGURES.get(dtype, _FIGURE_NARROW) * bound)

    def _check_norms(
        self, layer: str, site: AffineSite, dtype: torch.dtype, regime: Regime, bound: float, spreads: list[Spread]
    ) -> None:
        """Check that norms that read a scaled layer are off by no more than the dtype's figure, or the tolerance.

        Raises:
            NeutralizeError: the constant in a norm is too large beside what it reads.
        """
        error, norm = usual_norm_error(regime, spreads)
        figure = _FIGURES.get(dtype, _FIGURE_NARROW)
        # The nonlinearity is that of the largest input, four times what it is as a rule.
        if norm is None or self.tolerance is not None or max(error, regime.nonlinearity / bound / 4) <= figure:
            return
        assert site.activation is not None
        least = regime.error / bound * abs(self.gain)
        raise NeutralizeError(
            f"plan: expected a norm whose ε is small beside the variance of what {layer!r} ({site.activation.name}) "
            f"hands on, got the {norm.kind.replace('_', ' ')} of {norm.label!r} with ε = {norm.eps:g}: at the best "
            f"scale, {regime.epsilon * regime.slope:.3g}, its values are off by {error:.2g} as a rule; give "
            f"tolerance={_rounded_up(least):g} to accept that, use strategy='zero', or select the block that contains "
            "it"
        )

    def _at_borders(self, certificate: Certificate, zeros: list[str], error: float) -> Certificate:
        """The certificate of a layer that is read beside zeros: an error of φ(a) / (ε φ'(a)) per zero.

        Raises:
            NeutralizeError: nothing was said to allow an error of that size.
        """
        if self.tolerance is None or error > self.tolerance:
            raise NeutralizeError(
                f"plan: expected no zero padding beside what {certificate.layer!r} hands on at an operating point "
                f"other than 0, got {' and '.join(zeros)}: its borders would be wrong, by up to {error:.3g} of the "
                f"input bound per zero; give tolerance={math.ceil(error * 100) / 100:g} to accept that, or use "
                "strategy='zero'"
            )
        assert certificate.bound is not None
        return replace(
            certificate,
            kind="bounded",
            bound=max(error, certificate.bound),
            reason=f"{certificate.reason}; beside {' and '.join(zeros)} {error:.2g}, elsewhere {certificate.bound:.2g}",
        )

    def _certificate(
        self,
        request: Request,
        layer: str,
        sites: list[AffineSite],
        regime: Regime,
        bound: float,
        *,
        measured: bool,
    ) -> Certificate:
        site = sites[0]
        dtype = request.tensors[site.affine.weight].dtype
        through_norm = max((norm_error(request, norm) for norm in unique_norms(sites)), default=0.0)
        # The diagonal rounds when it is stored; unless it is a power of two, its product with x rounds once more.
        off_gain = abs(_stored(regime.epsilon * self.gain, dtype) / regime.epsilon - self.gain)
        off_gain += 0.0 if math.frexp(abs(self.gain))[0] == 0.5 else unit_roundoff(dtype) * abs(self.gain)
        if site.activation is None or bound == 0.0:
            reason = "the weight is the identity"
            if site.activation is not None:
                reason += f" and {site.activation.name} is one on what enters, which is never negative"
            if site.norm is not None:
                reason += ", and the batch norm's statistics make it one in eval mode"
            if self.gain != 1.0:
                error = off_gain + abs(self.gain) * through_norm
                return Certificate(layer, "bounded", error, "finite activations", f"{reason} times {self.gain:g}")
            if site.norm is not None:
                return Certificate(layer, "rounding", through_norm, "finite activations, eval mode", reason)
            return Certificate(layer, "exact", 0.0, "finite activations, matrix products in full precision", reason)
        relative = regime.error / bound * abs(self.gain) + off_gain
        # A batch norm without a bias of its own adds the operating point through its mean, and rounds it.
        reach = 1.0 + abs(regime.point) / (regime.epsilon * bound)
        relative += through_norm * abs(self.gain) * reach
        source = f"measured on the example inputs, with a margin of {BOUND_MARGIN:g}" if measured else "given"
        limit = bound / abs(self.gain)
        kind = "rounding" if regime.nonlinearity == 0.0 and self.gain == 1.0 else "bounded"
        return Certificate(
            layer,
            kind,
            relative,
            f"|x| <= {limit:.6g} ({source})",
            f"{site.activation.name} at {regime.point:g} with ε = {regime.epsilon:g}: nonlinearity "
            f"{regime.nonlinearity / bound:.2g}, rounding {regime.rounding / bound:.2g} of the bound"
            + (f", ε of the norm {regime.reading / bound:.2g}" if regime.reading else ""),
        )


@dataclass(frozen=True)
class Auto(Passthrough):
    """Pass-through with the strongest certificate there is; where there is none, an error says what would work."""

    name = "auto"


def _measured(draft: Draft) -> Draft:
    """The draft without its bound, where the activation's curvature was sampled and not proven."""
    certificate = replace(
        draft.layer.certificate,
        kind="measured",
        bound=None,
        reason=f"{draft.layer.certificate.reason}; an estimate: the curvature of {draft.layer.activation} is sampled",
    )
    return Draft(draft.edits, replace(draft.layer, certificate=certificate))


def _solved(request: Request, layer: str, edit: Preference) -> tuple[Assignment, Certificate] | None:
    """What makes a block hand its input on, and how exactly; blocks that are alike are analysed once."""
    calls = request.calls(layer)
    shared = None
    if len(calls) == 1 and layer not in request.flow.overwriting:
        shared = likeness(request.flow, calls[0], request.regions, request.cut)
    if shared is not None and (shared.key, edit) in request.analysed:
        names, assignment, certificate = request.analysed[shared.key, edit]
        own = dict(zip(names, shared.names, strict=True))
        return {own[name]: value for name, value in assignment.items()}, replace(certificate, layer=layer)
    found = identity_assignment(request, layer, edit)
    if found is None:
        return None
    uses_identity = IDENTITY in found.values()
    assumption = request.premise + (", matrix products in full precision" if uses_identity else "")
    certificate = block_certificate(request, layer, found, assumption, "the dataflow's output evaluates to its input")
    if shared is not None and certificate.kind == "exact":  # another says what reads the block, by name
        request.analysed[shared.key, edit] = shared.names, found, certificate
    return found, certificate


def identity_assignment(request: Request, layer: str, edit: Preference) -> Assignment | None:
    """The cheapest assignment under which every call of the block is proven to hand its input on, or ``None``.

    Where the cheapest ones might divide zero by zero, the outgoing ones do not: they leave the block's inside alone.
    """
    preferences: list[Preference] = [edit, "outgoing"] if edit == "cheapest" else [edit]
    for preference in preferences:
        searches = request.search(layer, preference)
        for assignment in joint([(search, search.same(search.call.exit)) for search in searches]):
            if all(proof.is_identity for proof in _proofs(request, layer, assignment)):
                return assignment
    return None


def _proofs(request: Request, layer: str, assignment: Assignment) -> Iterator[Interpretation]:
    return (Interpretation(request.flow, call, assignment, request.cut) for call in request.calls(layer))


def skip_window(request: Request, layer: str, edit: Preference) -> tuple[Assignment, tuple[int, ...]] | None:
    """What nulls the branches of a block whose skip connection crops or pads its input, and what that leaves of it."""
    searches = request.search(layer, edit)
    for assignment in joint([(search, search.same(search.call.exit)) for search in searches]):
        found = {proof.window for proof in _proofs(request, layer, assignment)}
        window = found.pop()
        if not found and window is not None and IDENTITY not in assignment.values():
            return assignment, window
    return None


def _cropped(request: Request, layer: str, assignment: Assignment, window: tuple[int, ...]) -> Draft:
    call = request.calls(layer)[0]
    before, after = shape_of(call.entry) or (), shape_of(call.exit) or ()
    reason = "the dataflow's output evaluates to what its skip connection leaves of its input"
    certificate = block_certificate(request, layer, assignment, request.premise, reason)
    note = f"its skip connection crops or pads {list(before)} to {list(after)}: that is what it hands on"
    entry = LayerPlan(layer, "partial", certificate, (), note=note, window=window)
    return Draft(request.edits_for(assignment), entry)


def block_certificate(
    request: Request, layer: str, assignment: Assignment, assumption: str, reason: str
) -> Certificate:
    """``exact`` for a block whose first output is all that later layers see of the edits, else ``measured``."""
    proofs = list(_proofs(request, layer, assignment))
    if any(proof.uses_number for proof in proofs):
        assumption += ", the number on its skip connection the same for inputs of other shapes"
    writes = request.flow.overwriting.get(layer)
    if writes is not None and not (writes and all(any(each.holds_input(node) for each in proofs) for node in writes)):
        reason += ", but it writes into its input too, which is read again behind it"
        return Certificate(layer, "measured", None, assumption, reason)
    others = [reader for call in request.calls(layer) for reader in side_readers(request.flow, call, assignment)]
    if not others:
        return Certificate(layer, "exact", 0.0, assumption, reason)
    found = ", ".join(sorted({describe(reader, request.flow) for reader in others})[:3])
    return Certificate(
        layer, "measured", None, assumption, f"{reason}, but the edits change what {found} reads of it too"
    )


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
    blocked = [search for search in searches if not search.same(search.call.exit)]
    if refused and blocked and all(replace(search, all_writable=True).same(search.call.exit) for search in blocked):
        return (
            f"{start}some of whose parameters cannot be written: {refused}; select every layer that reads them, or "
            "untie them"
        )
    kind = type(request.layers[layer]).__name__
    if next(request.layers[layer].parameters(), None) is None:
        return (
            f"{start}of type {kind}, which has no parameters that could be written; select the layer before it, or the "
            "block that contains it"
        )
    found = joint([(search, search.same(search.call.exit)) for search in searches])
    if found:
        failed = [
            each for each in zip(searches, _proofs(request, layer, found[0]), strict=True) if not each[1].is_identity
        ]
        return (
            f"{start}whose parameters can be nulled, but whose output is not proven to be its input then: "
            f"{in_proof(*failed[0])}; use strategy='zero' or 'damp'"
        )
    stopped = on_skip(blocked[0])
    if stopped:
        return (
            f"{start}of type {kind}, on whose residual stream stands {stopped}, which no parameters make the identity; "
            "use strategy='zero' or 'damp', or select the branch beside it"
        )
    if request.flow.reads_lost(blocked[0].call):
        return f"{start}of type {kind}, which reads {UNSEEN}; use strategy='zero' or 'damp'"
    return (
        f"{start}of type {kind}, with no skip connection around parameters that could be nulled; use strategy='zero' "
        "or 'damp', or select the block that adds it to the residual stream"
    )


def _floor(site: AffineSite) -> str:
    """Say why a layer in front of ReLU² is handed on no better, and what would be.

    (x + a)² = a² + 2 a x + x²: x²/(2 a) is wrong, and a² rounds by u a², that is u a / 2 of x: their sum is least at
    a = X / √u, where it is of the order of √u X, whatever the scale.
    """
    if site.activation is None or site.activation.name != "relu_squared":
        return ""
    return (
        "no square is linear: the error is of the order of the root of the roundoff; with twice as many hidden units "
        "as features, the block of this layer and the next is a pair, up to rounding"
    )


def _which_pass(entering: int, leaving: int) -> str:
    """Say which features a layer hands on whose widths differ."""
    if entering == leaving:
        return ""
    passing = f"features 0:{min(entering, leaving)} of {entering} pass"
    rest = f"{entering - leaving} are dropped" if entering > leaving else f"{leaving - entering} outputs are zero"
    return f"{passing}, {rest}"


def _identity_edit(request: Request, layer: str, site: AffineSite, *, partial: bool) -> tuple[int, int]:
    """Start and step of the diagonal that makes the layer the identity.

    Raises:
        NeutralizeError: it cannot be one: its widths differ, or it is a convolution that moves or skips samples.
    """
    affine, node = site.affine, site.affine.node
    entering, leaving = widths(site, request.flow)
    grouped = affine.is_convolution and int(argument(node, "groups", 1)) != 1
    if entering != leaving and (not partial or grouped):
        raise NeutralizeError(
            f"plan: expected a layer with as many outputs as inputs, got {layer!r} from {entering} to {leaving} "
            "features; use strategy='zero' or 'damp', select the block that contains it, or "
            f"{'ungroup it' if grouped else 'give partial=True to hand on the features that fit'}"
        )
    if not affine.is_convolution:
        return 0, 1
    if any(stride != 1 for stride in argument(node, "stride", [1])):
        raise NeutralizeError(
            f"plan: expected stride 1 for {layer!r}, got stride {list(argument(node, 'stride'))}; a strided "
            "convolution drops "
            "samples: use strategy='zero', or select the block that contains it"
        )
    kernel = request.flow.shapes[affine.weight][2:]
    before, after = shape_of(site.source) or (), shape_of(node) or ()
    space = slice(-len(kernel), None)  # the channels are what ``widths`` has compared
    taps = _own_taps(site, kernel)
    if before[space] != after[space] or taps is None:
        raise NeutralizeError(
            f"plan: expected a convolution that keeps its input's shape for {layer!r}, with a tap on each sample's own "
            f"place, got {list(before)} to {list(after)} with kernel {list(kernel)}; use strategy='zero'"
        )
    start = sum(tap * math.prod(kernel[place + 1 :]) for place, tap in enumerate(taps))
    return start, math.prod(kernel)


def _own_taps(site: AffineSite, kernel: tuple[int, ...]) -> list[int] | None:
    """The tap of the kernel, in each dimension, that reads the sample at the result's own place; ``None``: none does.

    Tap k reads k · dilation samples behind the padding in front: the tap is that padding over the dilation.
    """
    node = site.affine.node
    extra = argument(node, "output_padding", 0)
    if any(extra) if isinstance(extra, list | tuple) else bool(extra):
        return None  # samples are appended, and as many cropped
    rank = len(kernel)
    dilation = per_dim(argument(node, "dilation", 1), rank)
    padding = argument(node, "padding", 0)
    if padding == "same":
        front = [step * (size - 1) // 2 for step, size in zip(dilation, kernel, strict=True)]
    else:
        front = [0] * rank if padding == "valid" else per_dim(padding, rank)
    if site.padding is not None:
        amounts = list(site.padding.args[1])  # type: ignore[arg-type]  # before, after; the last dimension first
        if len(amounts) > 2 * rank or min(amounts) < 0:
            return None
        before = [amounts[2 * place] if 2 * place < len(amounts) else 0 for place in reversed(range(rank))]
        front = [one + other for one, other in zip(front, before, strict=True)]
    taps = [divmod(amount, step) for amount, step in zip(front, dilation, strict=True)]
    if any(rest or tap >= size for (tap, rest), size in zip(taps, kernel, strict=True)):
        return None
    return [tap for tap, _ in taps]


def _incoming_edits(
    request: Request, site: AffineSite, diagonal: tuple[int, int], value: float, point: float
) -> tuple[Rewrite, ...]:
    affine = site.affine
    groups = affine.groups
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
        # A batch norm behind it adds the operating point instead.
        edits.append(request.rewrite(affine.bias, fill=0.0 if site.norm is not None else point))
    return tuple(edits)


def _reads(request: Request, sites: list[AffineSite]) -> tuple[list[Read], list[str]]:
    """What reads a layer in any of its calls; and other readers, in words."""
    reads, rest = reads_of(request.flow, [site.result for site in sites])
    return reads, [describe(node, request.flow) for node in rest]


def _check_readers(request: Request, layer: str, site: AffineSite, reads: list[Read], others: list[str]) -> None:
    """Check that everything that reads the layer can undo its scale, and that nothing else is rescaled with it.

    Raises:
        NeutralizeError: naming the reader in the way.
    """
    assert site.activation is not None
    if others:
        raise NeutralizeError(
            f"plan: expected only affine layers to read {layer!r} ({site.activation.name}), got "
            f"{', '.join(sorted(set(others)))}; its scale can be undone in a weight only: use strategy='zero', or "
            "select the block that contains it"
        )
    if not reads:
        raise NeutralizeError(
            f"plan: expected an affine layer that reads {layer!r} ({site.activation.name}), got none; use "
            "strategy='zero'"
        )
    check_readers(request, layer, reads)


def _check_follower(request: Request, layer: str, site: AffineSite) -> None:
    """Refuse a layer whose norm or activation would have to be cut out with it but cannot.

    Raises:
        NeutralizeError: naming what follows.
    """
    for reader in site.other_readers:
        norm = norm_of(reader, request.flow)
        if norm is not None and norm.own_statistics and any(map(is_activation, norm.result.users)):
            raise NeutralizeError(
                f"plan: expected a batch norm or nothing between {layer!r} and its activation, got "
                f"{describe(reader, request.flow)}: it normalises by what it reads, and no parameters make it the "
                "identity; use strategy='zero' or 'damp', or select the block that contains it"
            )
        if "batch_norm" in op_name(reader) or is_activation(reader):
            raise NeutralizeError(
                f"plan: expected a known activation, an affine layer or a sum after {layer!r}, got "
                f"{describe(reader, request.flow)}; use strategy='zero' or 'damp', or select the block that contains it"
            )


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


def _rounded_up(value: float) -> float:
    """To two digits, not below ``value``."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit * (1 + 1e-9)) * unit


def _stored(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(dtype).double())
