"""One certificate for a whole plan: the layers' errors, carried to the outputs and added up.

The rewritten and the excised network are compared value by value in one walk along the dataflow. A selected layer adds
its own error to that of what enters it; every other op multiplies it by a Lipschitz factor in the largest magnitude
(the ∞-norm), and adds what the rounding of both networks may add where they no longer compute the same. With an op
that has no rule, or a magnitude that nothing bounds, nothing is claimed: ``measured``.

Source: MATH §2 (the layers), §9 (rounding); Higham, "Accuracy and Stability of Numerical Algorithms", SIAM 2002, §3.1
(n products add up with an error of n u / (1 - n u) times the sum of their magnitudes); each factor beside its rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from neutralize.activations import Activation, activation_after, activation_of, lipschitz_within
from neutralize.dataflow import Call, argument, as_call, dtype_of, op_name, shape_of, tensors_in
from neutralize.plan import Certificate, LayerPlan, joined_certificate
from neutralize.planner import BOUND_MARGIN, Request
from neutralize.regime import evaluation_roundoffs, unit_roundoff
from neutralize.rules import CAST, DROPOUT, JOIN, REARRANGE, SPLIT, drops, is_number
from neutralize.sites import Affine, Norm, affine_of, affine_site, describe, norm_of, product_of

# |f(x) - f(y)| <= |x - y| and |f(x)| <= |x|, elementwise or by choice of an element; nothing is rounded.
_CONTRACTIONS = frozenset(
    f"aten::{name}"
    for name in """abs neg amax amin max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d index_select repeat_interleave tril triu
    upsample_nearest1d upsample_nearest2d upsample_nearest3d reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d constant_pad_nd pad gather""".split()
)
_MEANS = frozenset(
    f"aten::{name}"
    for name in """mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d""".split()
)
_PRODUCTS = frozenset(("aten::mm", "aten::bmm", "aten::matmul"))
# Smooth functions that are no activations of the table: sup|f'| and sup|f|.
_SMOOTH = {
    "aten::cos": (1.0, 1.0),
    "aten::erf": (2.0 / math.sqrt(math.pi), 1.0),
    "aten::atan": (1.0, math.pi / 2),
    "aten::softmax": (0.5, 1.0),  # Σ_j |∂p_i/∂z_j| = 2 p_i (1 - p_i)
    "aten::_softmax": (0.5, 1.0),
}


@dataclass(frozen=True)
class Drift:
    """How far a value of the rewritten network is from that of the excised one.

    Attributes:
        peak: bound on the largest magnitude in the excised network.
        error: bound on the largest difference.
        offset: between a layer in its linear regime and its readers, where ``c + s x`` stands for ``x``: |c / s|.
        scale: |s|; ``peak``, ``error`` and ``offset`` are those of what the readers make of it.
        obstacle: why the error is not bounded, in words.
    """

    peak: float
    error: float = 0.0
    offset: float = 0.0
    scale: float = 1.0
    obstacle: str = ""

    @property
    def size(self) -> float:
        """A bound on the magnitudes that are rounded in either network."""
        return self.peak + self.error + self.offset

    @property
    def is_encoded(self) -> bool:
        """Whether ``c + s x`` stands for the value."""
        return self.offset != 0.0 or self.scale != 1.0

    @property
    def is_same(self) -> bool:
        """Whether both networks have the same bits here."""
        return self.error == 0.0 and not self.is_encoded


def compose(request: Request, layers: Sequence[LayerPlan]) -> Certificate:
    """The certificate of all layers together: how far the model's outputs are from those of the excised network.

    Args:
        request: the request that the layers were planned for.
        layers: the entries of the plan.

    Returns:
        A certificate of the whole model (layer ``""``). Its bound is absolute: the largest error of an element of a
        floating-point output. Exact layers together are exact. Where an error cannot be followed to the outputs, what
        is ``rounding`` stays so without a bound, and the rest is ``measured``.
    """
    joined = joined_certificate(layers)
    if joined.kind == "exact":
        return joined
    unbounded = [entry.layer for entry in layers if entry.certificate.bound is None]
    if unbounded:
        return replace(joined, reason=f"the error of {unbounded[0]!r} has no bound")
    other = [entry for entry in layers if entry.target not in ("input", "partial")]
    if other:
        return replace(joined, reason=f"no Lipschitz factors are derived where a layer's target is {other[0].target!r}")
    folded = [entry.layer for entry in layers if entry.sides in ("around", "within")]
    if folded:
        return replace(joined, reason=f"no Lipschitz factors are derived through the norms folded around {folded[0]!r}")
    stacked = [entry.layer for entry in layers if request.place(entry.layer) is not None]
    if stacked:
        return replace(joined, reason=f"no bound end to end: {stacked[0]!r} is inside a recurrent op")
    if any(tensor.is_meta for tensor in request.tensors.values()):
        return replace(joined, reason="no bound end to end: a meta model has no weights to take Lipschitz factors of")
    # What the model is given is not bounded if the bounds on the layers' inputs suffice.
    norms: dict[str, float] = {}
    for input_peak in (math.inf, _input_peak(request)):
        found = _Walk(request, layers, input_peak, norms).worst_output()
        if math.isfinite(found.error):
            break
    else:
        return replace(joined, reason=f"no bound end to end: {found.obstacle}")
    kind = "bounded" if any(entry.certificate.kind == "bounded" for entry in layers) else "rounding"
    assumption = "finite activations, every layer's input within its bound, products in full precision"
    if math.isfinite(input_peak):
        assumption += f", the model's inputs within {input_peak:.6g} ({BOUND_MARGIN:g} times the example's)"
    return Certificate(
        "",
        kind,
        found.error,
        assumption,
        "the layers' errors times the Lipschitz factors of what follows them, plus rounding; absolute",
        input_peak if math.isfinite(input_peak) else None,
    )


def _input_peak(request: Request) -> float:
    """A bound on the model's floating-point inputs: the example's, with the margin; infinite without an example."""
    given = request.inputs
    if given is None:
        return math.inf
    floating = [tensor for tensor in tensors_in(as_call(given)) if tensor.is_floating_point() and tensor.numel()]
    if any(tensor.is_meta for tensor in floating):
        return math.inf
    peak = BOUND_MARGIN * max((float(tensor.detach().abs().max().double()) for tensor in floating), default=0.0)
    return peak if math.isfinite(peak) else math.inf


class _Walk:
    """The drift of every value, in the order of the graph."""

    def __init__(
        self, request: Request, layers: Sequence[LayerPlan], input_peak: float, norms: dict[str, float]
    ) -> None:
        """Prepare the walk.

        Args:
            request: the request.
            layers: the entries of the plan, all of them pass-throughs with a bound.
            input_peak: a bound on the magnitude of the model's floating-point inputs.
            norms: what has been computed of the weights, by name; filled further.
        """
        self.tensors, self.flow, self.input_peak, self.norms = request.tensors, request.flow, input_peak, norms
        self.drifts: dict[fx.Node, Drift] = {}
        # What is known before the walk comes to it: where an activation of several ops or a sum with a bias ends.
        self.ahead: dict[fx.Node, Drift] = {}
        self.results: dict[fx.Node, tuple[Call, LayerPlan]] = {}
        self.inside: set[fx.Node] = set()
        for entry in layers:
            for call in self.flow.calls[entry.layer]:
                site = affine_site(self.flow, call)
                result = call.exit if site is None or site.inside else site.result
                self.results[result] = call, entry
                self.inside.update(node for node in call.nodes if node is not call.exit)

    def worst_output(self) -> Drift:
        """The drift of the model's floating-point output that has the largest error."""
        if self.flow.is_recorded:
            return Drift(math.inf, math.inf, obstacle="the dataflow was recorded in one run, not exported")
        for node in self.flow.graph.nodes:
            if node.op == "output":
                found = [self._of(part) for part in node.all_input_nodes if _is_floating(part)]
                return max(found, key=lambda drift: drift.error, default=Drift(0.0))
            if node in self.results:
                self.drifts[node] = self._handed_on(*self.results[node])
                self._look_ahead(node)
            elif node not in self.inside and node not in self.flow.names:
                self.drifts[node] = self._evaluate(node)
                self._look_ahead(node)
        raise AssertionError("a graph ends with its output")

    def _handed_on(self, call: Call, entry: LayerPlan) -> Drift:
        """The drift of what a selected layer hands on: that of what enters it, and its own error."""
        entering, bound = self._of(call.entry), entry.certificate.bound
        assert bound is not None
        within = math.inf if entry.input_bound is None else entry.input_bound
        peak = min(entering.peak, within + entering.error)
        if bound == 0.0 and entering.is_same:
            return replace(entering, peak=peak)
        if not math.isfinite(entering.error):
            return entering
        # The bound is relative to the largest magnitude that enters, of the rewritten network.
        own = _times(bound, min(peak + entering.error, within))
        if not math.isfinite(own):
            return _unbounded(f"nothing bounds what enters {entry.layer!r}: give example_inputs or input_bound")
        offset, scale = 0.0, 1.0
        if entry.epsilon is not None and entry.slope is not None and entry.value is not None:
            scale = abs(entry.epsilon * entry.slope)
            offset = abs(entry.value) / scale
        # A layer that reads the scaled values of another takes their offset away in its own bias, and rounds there.
        undone = 4 * _roundoff(call.exit) * (entering.offset + (entering.size if entering.is_encoded else 0.0))
        return Drift(abs(entry.gain) * peak, abs(entry.gain) * (entering.error + undone) + own, offset, scale)

    def _of(self, operand: object) -> Drift:
        """The drift of an operand: a node, a parameter or a number."""
        if not isinstance(operand, fx.Node):
            return Drift(abs(float(operand))) if is_number(operand) else Drift(math.inf)  # type: ignore[arg-type]
        name = self.flow.names.get(operand)
        if name is not None:
            return Drift(self._norm_of(name, "peak"))
        return self.drifts.get(operand, _unbounded("a value inside a layer of the plan is read outside"))

    def _evaluate(self, node: fx.Node) -> Drift:
        """The drift of a value that no selected layer makes."""
        if node.op == "placeholder":
            is_input = _is_floating(node) and not node.name.startswith(("c_", "obj_", "token"))
            return Drift(self.input_peak if is_input else math.inf)
        if node in self.ahead:
            return self.ahead[node]
        operands = [self._of(part) for part in node.all_input_nodes if part not in self.flow.names]
        lost = [drift for drift in operands if not math.isfinite(drift.error)]
        if lost:
            return lost[0]
        found = self._ruled(node)
        if all(drift.is_same for drift in operands):  # both networks compute the same bits
            return Drift(math.inf if found is None or math.isnan(found.peak) else found.peak)
        if found is None or (dtype_of(node) is not None and not _is_floating(node)):
            return _unbounded(f"no Lipschitz factor for {describe(node, self.flow)}")
        if not math.isfinite(found.error):
            return _unbounded(
                f"nothing bounds the magnitudes that enter {describe(node, self.flow)}: give example_inputs"
            )
        return found

    def _look_ahead(self, node: fx.Node) -> None:
        """Take several ops that are one activation together: one by one, their factors are far too large."""
        drift = self.drifts[node]
        if drift.is_same or drift.is_encoded or not math.isfinite(drift.error) or not _is_floating(node):
            return
        found = activation_after(node)
        if found is not None and found[0].composite and found[1] not in self.results:
            activated = self._activated(found[0], drift, found[1])
            if activated is not None and math.isfinite(activated.error):
                self.ahead[found[1]] = activated

    # ---- rules -----------------------------------------------------------------------------------------------------

    def _ruled(self, node: fx.Node) -> Drift | None:
        """What the rule of an op makes of its operands, or ``None`` where there is none."""
        op = op_name(node)
        affine = affine_of(node, self.flow)
        if affine is not None:
            return self._affine(affine)
        norm = norm_of(node, self.flow)
        if norm is not None:
            return self._normalised(norm, node)
        if not node.args:
            return None
        first = node.args[0]
        if op in JOIN:
            return self._joined(first)
        if op == "aten::embedding":
            return Drift(self._of(first).peak)
        if op == "aten::where":
            return self._either(node.args[1:]) if len(node.args) == 3 else None
        if op in ("aten::maximum", "aten::minimum"):
            return self._either(node.args)
        if op in ("aten::add", "aten::sub") and len(node.args) >= 2:
            return self._sum(node)
        if op == "aten::mul":
            return self._product(node, first, node.args[1])
        if op in ("aten::div", "aten::true_divide"):
            divisor = node.args[1]
            if not is_number(divisor) or argument(node, "rounding_mode") is not None:
                return None
            return self._product(node, first, 1.0 / float(divisor)) if divisor else None  # type: ignore[arg-type]
        if op in _PRODUCTS:
            shape = shape_of(first)  # type: ignore[arg-type]
            return self._product(node, first, node.args[1], shape[-1]) if shape else None
        if op == "aten::scaled_dot_product_attention":
            return self._attention(node)
        return self._unary(node, op, self._of(first))

    def _unary(self, node: fx.Node, op: str, data: Drift) -> Drift | None:
        if op == "getitem":
            of_parts = op_name(node.args[0]) in SPLIT  # type: ignore[arg-type]
            return data if of_parts or node.args[1] == 0 else None
        if op in REARRANGE or op in SPLIT or (op in DROPOUT and not drops(node)):
            return data
        if op in _CONTRACTIONS:
            filled = argument(node, "value", 0) if "pad" in op else 0
            return replace(data, peak=max(data.peak, abs(float(filled or 0))))
        if op in CAST:
            return self._rounded(node, data, 1.0, 1)
        if op in _MEANS:
            if argument(node, "divisor_override") is not None:
                return None
            return self._rounded(node, data, 1.0, _terms(node))
        if op == "aten::sum":
            return self._rounded(node, data, float(_terms(node)), _terms(node))
        if op in ("aten::clamp", "aten::clamp_min", "aten::clamp_max"):
            limits = [argument(node, "min"), argument(node, "max")]
            if not all(limit is None or is_number(limit) for limit in limits):
                return None
            inside = [abs(float(limit)) for limit in limits if limit is not None]
            return replace(data, peak=max(inside) if len(inside) == 2 else max(data.peak, *inside))
        if op == "aten::square":
            return self._product(node, node.args[0], node.args[0])
        if op == "aten::pow" and is_number(node.args[1], 2, 3, 4):
            exponent = int(node.args[1])  # type: ignore[arg-type]
            growth = exponent * data.size ** (exponent - 1) if math.isfinite(data.size) else math.inf
            return self._through(node, data, growth, math.inf, 0.0, 2.0 * exponent)
        if op in _SMOOTH:
            # Softmax adds up as many terms as it has places, and rounds its argument before it grows exponentially.
            roundoffs = 8.0 + (_width(node) + 4 * data.size if "softmax" in op else 0.0)
            return self._through(node, data, *_SMOOTH[op], 1.0, roundoffs)
        row = activation_of(node)
        return None if row is None else self._activated(row, data, node)

    def _activated(self, row: Activation, data: Drift, node: fx.Node) -> Drift | None:
        if row.name == "prelu":
            weights = [part for part in node.all_input_nodes if part in self.flow.names]
            slope = max((self._norm_of(self.flow.names[part], "peak") for part in weights), default=math.inf)
            row = replace(row, lipschitz=max(1.0, slope))
        factor = lipschitz_within(row, data.size)
        dtype = dtype_of(node)
        if factor is None or dtype is None:
            return None
        found = self._through(
            node, data, factor, row.ceiling, abs(row.at_zero), max(1.0, evaluation_roundoffs(row, dtype))
        )
        return replace(found, error=found.error + row.jump)

    def _through(
        self, node: fx.Node, data: Drift, factor: float, ceiling: float, at_zero: float, roundoffs: float
    ) -> Drift:
        """Through a function with a Lipschitz factor that is off by so many roundoffs of its value and argument."""
        peak = min(ceiling, at_zero + _times(factor, data.peak)) * (1 + roundoffs * _roundoff(node))
        error = _times(factor, data.error)
        rounding = 2 * roundoffs * _roundoff(node) * (peak + error + _times(factor, data.size))
        return Drift(peak, error + rounding + 2 * _least(node))

    def _rounded(self, node: fx.Node, data: Drift, factor: float, terms: int) -> Drift:
        """Times a factor, after so many terms were added."""
        rounding = 2 * _gamma(terms + 1, node) * _times(factor, data.size)
        peak = factor * data.peak * (1 + _gamma(terms + 1, node))
        return replace(data, peak=peak, error=factor * data.error + rounding + 2 * _least(node))

    def _either(self, operands: Sequence[object]) -> Drift:
        both = [self._of(part) for part in operands]
        return Drift(max(part.peak for part in both), max(part.error for part in both))

    def _joined(self, parts: object) -> Drift:
        drifts = [self._of(part) for part in parts]  # type: ignore[attr-defined]
        joined = Drift(max(part.peak for part in drifts), max(part.error for part in drifts))
        scale = next((part.scale for part in drifts if part.scale != 1.0), 1.0)
        return replace(joined, offset=max(part.offset for part in drifts), scale=scale)

    def _sum(self, node: fx.Node) -> Drift | None:
        alpha = argument(node, "alpha", 1)
        if not is_number(alpha):
            return None
        one, other = (self._of(part) for part in node.args[:2])
        peak = (one.peak + abs(float(alpha)) * other.peak) * (1 + 2 * _roundoff(node))
        error = one.error + abs(float(alpha)) * other.error
        return Drift(peak, error + 4 * _roundoff(node) * (peak + error))

    def _product(self, node: fx.Node, left: object, right: object, terms: int = 1) -> Drift:
        one, other = self._of(left), self._of(right)
        peak = terms * _times(one.peak, other.peak) * (1 + _gamma(terms + 1, node))
        error = terms * (_times(one.peak, other.error) + _times(other.peak, one.error) + _times(one.error, other.error))
        found = Drift(peak, error + 2 * _gamma(terms + 1, node) * (peak + error) + 2 * terms * _least(node))
        encoded = [(part, drift) for part, drift in ((left, one), (right, other)) if drift.is_encoded]
        if encoded and product_of(node, encoded[0][0], self.flow) is None:  # type: ignore[arg-type]
            return replace(found, scale=encoded[0][1].scale)  # no parameter that undoes it: on the way to one
        return found

    def _attention(self, node: fx.Node) -> Drift | None:
        """``softmax(q k) v``: ‖Δp‖₁ <= ‖Δs‖, for Σ_i |Σ_j ∂p_i/∂s_j e_j| = 4 P (1 - P) <= 1 with signs e."""
        query, key, value = (self._of(argument(node, name)) for name in ("query", "key", "value"))
        mask = argument(node, "attn_mask")
        shapes = shape_of(argument(node, "query")), shape_of(argument(node, "key"))
        if argument(node, "dropout_p", 0.0) or not all(shapes) or (mask is not None and not self._of(mask).is_same):
            return None
        width, places = shapes[0][-1], shapes[1][-2]  # type: ignore[index]
        given = argument(node, "scale")
        scale = width * (abs(float(given)) if given is not None else 1.0 / math.sqrt(width))
        sizes = scale * _times(query.size, key.size)
        scores = scale * (
            _times(query.peak, key.error) + _times(key.peak, query.error) + _times(query.error, key.error)
        )
        scores += 2 * _gamma(width + 4, node) * sizes
        probabilities = scores + 4 * _gamma(places + 8, node) + 4 * _roundoff(node) * sizes
        moved = min(2.0, probabilities)  # both sum up to one
        error = value.error + _times(value.peak, moved) + 2 * _gamma(places + 4, node) * value.size
        return Drift(value.peak * (1 + 2 * _gamma(places + 4, node)), error)

    def _affine(self, affine: Affine) -> Drift:
        data, node = self._of(affine.data), affine.node
        if data.is_same and not math.isfinite(data.peak):
            return Drift(math.inf)  # whatever the weight is
        norm = self._norm_of(affine.weight, _layout(affine))
        shift = 0.0 if affine.bias is None else self._norm_of(affine.bias, "peak")
        terms = math.prod(self.flow.shapes[affine.weight]) // max(1, _outputs(affine, self.flow.shapes[affine.weight]))
        added = _gamma(terms + 1, node)
        plain, undone = _times(norm, data.peak) + shift, _times(norm, data.offset)
        # Either network adds up its products; in the rewritten one the offset is among them, once more in the bias.
        rounding = added * (2 * plain + _times(norm, data.error) + 2 * undone)
        if data.is_encoded:
            # The weight is rescaled, the bias takes away the offset times the weight's sums, and both are stored again.
            rounding += added * undone + 2 * _roundoff(node) * (plain + _times(norm, data.error) + undone)
        peak = plain * (1 + added)
        found = Drift(peak, _times(norm, data.error) + rounding + 2 * terms * _least(node))
        if affine.added is not None:
            self.ahead[affine.added] = found if not data.is_same else Drift(peak)
            return Drift(math.inf, 0.0 if data.is_same else math.inf, obstacle="a product is read without its bias")
        return found

    def _normalised(self, norm: Norm, node: fx.Node) -> Drift | None:
        data = self._of(norm.data)
        gain = 1.0 if norm.weight is None else self._norm_of(norm.weight, "peak")
        shift = 0.0 if norm.bias is None else self._norm_of(norm.bias, "peak")
        if not norm.own_statistics:
            assert norm.mean is not None
            assert norm.variance is not None
            least = float(self.tensors[norm.variance].detach().min())
            if least + norm.eps <= 0:
                return None
            factor = gain / math.sqrt(least + norm.eps)
            size = data.size + self._norm_of(norm.mean, "peak")
            peak = _times(factor, data.peak + self._norm_of(norm.mean, "peak")) + shift
            rounding = 16 * _roundoff(node) * (_times(factor, size) + shift)
            return Drift(peak + rounding, _times(factor, data.error) + rounding)
        shape = shape_of(norm.data)
        if norm.kind == "batch_norm" or norm.eps <= 0 or shape is None or data.scale != 1.0:
            return None
        if norm.kind in ("layer_norm", "rms_norm"):
            count = math.prod(argument(node, "normalized_shape", shape[-1:]))
        else:
            groups = int(argument(node, "num_groups", argument(node, "group", shape[1])))
            count = math.prod(shape[1:]) // groups
        # The Jacobian is a projection over the deviation, which is √ε or more: 1 / √ε in the 2-norm, and the 2-norm is
        # at most √n times the largest magnitude.
        peak = math.sqrt(count) * gain + shift
        factor = gain * math.sqrt(count) / math.sqrt(norm.eps)
        entering = data.error + 4 * _gamma(count + 4, node, stored=False) * data.size
        error = min(_times(factor, entering), 2 * math.sqrt(count) * gain)
        rounding = 16 * _roundoff(node) * peak
        return Drift(peak + rounding, error + rounding)

    # ---- weights ---------------------------------------------------------------------------------------------------

    def _norm_of(self, name: str, what: str) -> float:
        """A norm of a parameter, computed once.

        Args:
            name: of the parameter.
            what: ``peak`` (largest magnitude), or for a weight its norm as an operator in the largest magnitude:
                ``rows`` (out, ...), ``columns`` (in, out, ...) or ``columns/g`` (in, out / g, ...) in g groups.
        """
        key = f"{name} {what}"
        if key not in self.norms:
            tensor = self.tensors[name].detach()
            if not tensor.numel():
                self.norms[key] = 0.0
            elif what == "peak" or not tensor.is_floating_point():
                self.norms[key] = float(tensor.abs().max().double())
            else:
                kind, _, groups = what.partition("/")
                split = tensor.reshape(int(groups or 1), -1, *tensor.shape[1:])
                if kind == "rows":
                    split = tensor.unsqueeze(0).transpose(1, 2) if tensor.dim() > 1 else tensor.reshape(1, 1, -1)
                sums = split.movedim(2, 1).flatten(2).double().abs().sum(2)
                self.norms[key] = float(sums.max()) * (1 + 1e-9)
        return self.norms[key]


def _layout(affine: Affine) -> str:
    if not affine.transposed:
        return "rows"
    return f"columns/{affine.groups}"


def _outputs(affine: Affine, shape: tuple[int, ...]) -> int:
    return shape[1] * affine.groups if affine.transposed else shape[0]


def _terms(node: fx.Node) -> int:
    """How many elements go into one of a mean, a sum or a pool, at most."""
    before, after = shape_of(node.args[0]) or (), shape_of(node) or ()  # type: ignore[arg-type]
    if "pool" in op_name(node) or "upsample" in op_name(node):
        return math.prod(before[2:])
    return math.ceil(math.prod(before) / max(1, math.prod(after)))


def _width(node: fx.Node) -> int:
    return (shape_of(node) or (1,))[int(argument(node, "dim", -1))]


def _unbounded(obstacle: str) -> Drift:
    return Drift(math.inf, math.inf, obstacle=obstacle)


def _times(one: float, other: float) -> float:
    """A product of bounds: nothing times whatever is nothing."""
    return one * other if one and other else 0.0


def _is_floating(node: fx.Node) -> bool:
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_floating_point


def _roundoff(node: fx.Node) -> float:
    dtype = dtype_of(node)
    return unit_roundoff(dtype) if dtype is not None and dtype.is_floating_point else 0.0


def _least(node: fx.Node) -> float:
    """What may be lost where a result is too small for the format."""
    dtype = dtype_of(node)
    return torch.finfo(dtype).smallest_normal if dtype is not None and dtype.is_floating_point else 0.0


def _gamma(terms: int, node: fx.Node, *, stored: bool = True) -> float:
    """Relative error of a sum of so many products: added in float32 at least, and rounded once more when stored."""
    own = _roundoff(node)
    unit = min(own, 2.0**-24)
    added = terms * unit / (1 - terms * unit) if terms * unit < 1 else math.inf
    return added + (own if stored and own > unit else 0.0)
