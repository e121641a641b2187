"""Antisymmetric pairs: an affine layer, an activation and an affine layer that together hand their input on.

If φ(z) - φ(-z) = g z for every z, then with ``W = [I; -I; 0]``, ``b = 0``, ``V = [I, -I, 0] / g`` and ``d = 0`` the
block ``V φ(W x + b) + d`` is x, for inputs of any size. It takes twice as many hidden units as features.

Source: MATH §3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from neutralize.activations import BY_NAME, Activation, activation_after, is_activation, is_registered
from neutralize.dataflow import Call, Dataflow, argument, dtype_of, is_mark, op_name, shape_of
from neutralize.errors import NeutralizeError
from neutralize.plan import Certificate, Edit, LayerPlan, dtype_name
from neutralize.planner import BOUND_MARGIN, Draft, Request
from neutralize.regime import evaluation_roundoffs, unit_roundoff
from neutralize.rules import CAST, DROPOUT, drops
from neutralize.sites import Affine, affine_of, describe

_AS_THEY_ARE = frozenset(f"aten::{name}" for name in "alias clone contiguous detach".split())
_RESHAPES = frozenset(
    f"aten::{name}" for name in "view reshape _unsafe_view flatten unflatten squeeze unsqueeze".split()
)
_OWN_ROUNDOFFS = 1.5  # of an activation that picks one of two products, such as LeakyReLU


@dataclass(frozen=True)
class Pair:
    """A block of two affine ops with at most an activation and an idle dropout between them.

    Attributes:
        first, second: the ops.
        activation: φ, or ``None`` for the identity.
        other: an activation that is not known, in words.
    """

    first: Affine
    second: Affine
    activation: Activation | None
    other: str = ""


def draft_pair(request: Request, layer: str, gain: float, input_bound: float | None) -> Draft | None:
    """Draft the pass-through of a block as an antisymmetric pair.

    Args:
        request: the request.
        layer: qualified name of a block.
        gain: factor that the block hands its input on with.
        input_bound: X, for the activations that need one; by default it is measured.

    Returns:
        The draft; ``None`` if the block is something else than two affine layers and an activation.

    Raises:
        NeutralizeError: it is that, but cannot be made the identity; the message says why.
    """
    found = [_pair_of(request.flow, call) for call in request.calls(layer)]
    pair = found[0]
    if pair is None or any(other is None for other in found):
        return None
    features, hidden = _widths(request, layer, pair)
    _check_own(request, layer, pair)
    activation = pair.activation
    dtype = request.tensors[pair.first.weight].dtype
    if activation is not None and activation.name == "relu_squared":
        return _squared(request, layer, pair, features, hidden, gain, input_bound)
    coefficient = gain if activation is None else gain / _odd_gain(layer, activation)
    edits = _edits(request, pair, features, hidden, coefficient, 0.0)
    stored = float(torch.tensor(coefficient, dtype=torch.float64).to(dtype).double())
    off = abs(stored / coefficient - 1.0) * abs(gain)
    bound: float | None = None
    if activation is None or (activation.name == "relu" and not activation.composite):
        kind, error = "exact", 0.0
        reason = "x and -x on two units per feature: relu(x) - relu(-x) is x" if activation else "two identities"
    else:
        kind = "rounding" if activation.odd_error == 0.0 else "bounded"
        unit = unit_roundoff(dtype)
        roundoffs = max(evaluation_roundoffs(activation, dtype), _OWN_ROUNDOFFS)
        # Both values may be off by roundoffs · u · |x| (the smaller one by cancellation), and their difference rounds
        # when it is accumulated and when it is stored.
        error = (2 * roundoffs + 2) * unit + activation.odd_error
        if activation.odd_floor:
            bound = input_bound if input_bound is not None else request.input_bound(layer)
            error += (2 * roundoffs + 2) * unit * activation.odd_floor / bound
        # A coefficient that is rounded, once in V and once in the product.
        error += 0.0 if math.frexp(coefficient)[0] == 0.5 else unit
        reason = f"x and -x on two units per feature: {activation.name}(x) - {activation.name}(-x) is a multiple of x"
    if gain != 1.0:
        kind = "bounded"
    total: float | None = error * abs(gain) + off
    if activation is not None and is_registered(activation.name):
        kind, total = "measured", None
        reason += ", by the parity of the ops that compute it; their rounding is not bounded"
    assumption = "finite activations, matrix products in full precision"
    if bound is not None:
        assumption += f", |x| <= {bound:.6g} ({_source(input_bound)})"
    certificate = Certificate(layer, kind, total, assumption, reason)
    name = activation.name if activation is not None else ""
    entry = LayerPlan(layer, "input", certificate, (), activation=name, gain=gain, input_bound=bound)
    return Draft(tuple(edits), entry)


def _squared(
    request: Request, layer: str, pair: Pair, features: int, hidden: int, gain: float, input_bound: float | None
) -> Draft:
    """Draft a pair with ReLU²: (c + x)² - (c - x)² = 4 c x for |x| <= c."""
    assert pair.activation is not None
    bound = input_bound if input_bound is not None else request.input_bound(layer)
    dtype = request.tensors[pair.first.weight].dtype
    half = 2.0 ** math.ceil(math.log2(bound))  # a power of two: 1 / (4 c) is one too
    if pair.first.bias is None:
        raise NeutralizeError(
            f"plan: expected a bias in {pair.first.module!r} for the squares of {layer!r}, got none; add a zero "
            "bias, or use strategy='zero'"
        )
    if 8 * half**2 > torch.finfo(dtype).max:
        raise NeutralizeError(
            f"plan: expected squares inside {dtype_name(dtype)} for {layer!r}, got 4 · {half:g}²; use a wider "
            "dtype, or strategy='zero'"
        )
    edits = _edits(request, pair, features, hidden, gain / (4 * half), half)
    # The argument rounds (squared: twice), the activation, the sum; (c + x)² + (c - x)² is at most 4 c².
    unit = unit_roundoff(dtype)
    roundoffs = max(evaluation_roundoffs(pair.activation, dtype), _OWN_ROUNDOFFS) + 4
    stored = float(torch.tensor(gain / (4 * half), dtype=torch.float64).to(dtype).double())
    error = roundoffs * unit * half / bound * abs(gain) + abs(stored * 4 * half - gain)
    certificate = Certificate(
        layer,
        "rounding" if gain == 1.0 else "bounded",
        error,
        f"|x| <= {bound:.6g} ({_source(input_bound)}), matrix products in full precision",
        f"(c + x)² - (c - x)² is 4 c x with c = {half:g}",
    )
    entry = LayerPlan(
        layer, "input", certificate, (), activation=pair.activation.name, gain=gain, input_bound=bound,
        operating_point=half,
    )  # fmt: skip
    return Draft(tuple(edits), entry)


def _source(input_bound: float | None) -> str:
    return "given" if input_bound is not None else f"measured on the example inputs, with a margin of {BOUND_MARGIN:g}"


def _odd_gain(layer: str, activation: Activation) -> float:
    if not activation.odd_gain:
        raise NeutralizeError(
            f"plan: expected an activation with φ(x) - φ(-x) proportional to x in the pair {layer!r} (relu, "
            f"leaky_relu, gelu, silu, quick_gelu, hardswish, softplus, logsigmoid), got {_why_unpaired(activation)}; "
            "use strategy='zero' or 'damp', or select the block that adds it to the residual stream"
        )
    return activation.odd_gain


def _why_unpaired(activation: Activation) -> str:
    if is_registered(activation.name):
        return f"{activation.name}, whose ops do not prove that, or overflow far from 0"
    known = BY_NAME.get(activation.name)
    if known is not None and known.odd_gain:
        return f"{activation.name} in a form that overflows far from 0"
    return activation.name


def _pair_of(flow: Dataflow, call: Call) -> Pair | None:
    """The pair that a call is, from its first input to its output with nothing beside it."""
    affines: list[Affine] = []
    activation: Activation | None = None
    other = ""
    node = call.entry
    while node is not call.exit:
        if len(affines) == 1 and activation is None and (found := activation_after(node)) is not None:
            activation, node = found
            continue
        readers = list(node.users)
        if len(readers) != 1:
            return None
        reader = readers[0]
        affine = affine_of(reader, flow)
        if affine is not None and affine.data is node and len(affines) < 2:
            affines.append(affine)
        elif len(affines) == 1 and activation is None and is_activation(reader) and reader.args[0] is node:
            other = describe(reader, flow)
        elif not _keeps_features(reader, node):
            return None
        node = reader
    if len(affines) != 2 or shape_of(call.entry) != shape_of(call.exit) or dtype_of(call.entry) != dtype_of(call.exit):
        return None
    return Pair(affines[0], affines[1], activation, other)


def _keeps_features(node: fx.Node, before: fx.Node) -> bool:
    """Whether the node hands on every element in its order, with the features where they were."""
    op = op_name(node)
    if not node.args or node.args[0] is not before:
        return False
    if is_mark(node) or op in _AS_THEY_ARE:
        return True
    if op in DROPOUT:
        return not drops(node)
    if op in CAST:
        return dtype_of(node) == dtype_of(before)
    shapes = shape_of(before), shape_of(node)
    return op in _RESHAPES and all(shapes) and shapes[0][-1] == shapes[1][-1]  # type: ignore[index]


def _widths(request: Request, layer: str, pair: Pair) -> tuple[int, int]:
    """Features and hidden units.

    Raises:
        NeutralizeError: there are too few hidden units, or an op is no plain linear layer or 1×1 convolution.
    """
    sizes = []
    for affine in (pair.first, pair.second):
        shape = request.flow.shapes[affine.weight]
        if affine.is_convolution:
            plain = op_name(affine.node) in ("aten::conv1d", "aten::conv2d", "aten::conv3d")
            moves = any(size != 1 for size in shape[2:]) or affine.has_padding
            strided = any(step != 1 for step in argument(affine.node, "stride", [1]))
            groups = int(argument(affine.node, "groups", 1))
            if not plain or moves or strided or groups != 1:
                raise NeutralizeError(
                    f"plan: expected 1×1 convolutions with stride 1, no padding and one group in the pair {layer!r}, "
                    f"got {affine.module!r} with kernel {list(shape[2:])} and {groups} group(s); use strategy='zero' "
                    "or 'damp', or select the block that adds it to the residual stream"
                )
        sizes.append((shape[1], shape[0]) if affine.transposed else (shape[0], shape[1]))
    (hidden, features), (leaving, _) = sizes
    if pair.other:
        raise NeutralizeError(
            f"plan: expected a known activation in the pair {layer!r}, got {pair.other}; use strategy='zero' or 'damp'"
        )
    needed = features if pair.activation is None else 2 * features
    if leaving != features or hidden < needed:
        raise NeutralizeError(
            f"plan: expected at least {needed} hidden units for the {features} features of the pair {layer!r}, got "
            f"{hidden}; use strategy='zero' or 'damp', or select the block that adds it to the residual stream"
        )
    return features, hidden


def _check_own(request: Request, layer: str, pair: Pair) -> None:
    """Check that nothing outside the selected layers reads the parameters.

    Raises:
        NeutralizeError: something does.
    """
    names = [name for one in (pair.first, pair.second) for name in (one.weight, one.bias) if name is not None]
    for name in names:
        places = [request.flow.position[user] for user in request.flow.users(name)]
        if len(set(names)) < len(names) or not all(
            any(first < place < last for first, last in request.regions) for place in places
        ):
            raise NeutralizeError(
                f"plan: expected the parameters of the pair {layer!r} to be its own, got {name!r}, which is also read "
                "elsewhere; select every layer that reads it, or untie it"
            )


def _edits(request: Request, pair: Pair, features: int, hidden: int, coefficient: float, point: float) -> list[Edit]:
    """The rewrites: ±1 in blocks of the first weight, ±coefficient in blocks of the second, zero elsewhere."""
    signs = (1.0,) if pair.activation is None else (1.0, -1.0)
    edits: list[Edit] = []
    for affine, value, hidden_first in ((pair.first, 1.0, True), (pair.second, coefficient, False)):
        along_rows = hidden_first != affine.transposed
        for place, sign in enumerate(signs):
            block = (place * features, (place + 1) * features)
            edits.append(_block(request, affine.weight, along_rows, block, diagonal=sign * value))
        used = len(signs) * features
        if used < hidden:
            edits.append(_block(request, affine.weight, along_rows, (used, hidden), diagonal=0.0))
    if pair.first.bias is not None:
        edits.append(request.rewrite(pair.first.bias, fill=point))
    if pair.second.bias is not None:
        edits.append(request.rewrite(pair.second.bias, fill=0.0))
    return edits


def _block(request: Request, name: str, along_rows: bool, block: tuple[int, int], *, diagonal: float) -> Edit:
    return request.rewrite(name, diagonal=diagonal, **{"rows" if along_rows else "columns": block})
