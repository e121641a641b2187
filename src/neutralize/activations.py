"""Activations: where each one is linear, how far from linear it is there, and the fills documented for it.

One row per activation in ``ACTIVATIONS``; a row has one or more *linear parts*, of which the planner takes the one with
the least total error. With ``W = εI``, ``b = a`` and the consumer divided by ``ε φ'(a)``, a layer hands on
``(φ(εx + a) - φ(a)) / (ε φ'(a))`` instead of ``x``. By Taylor's theorem the difference is, for ``|x| <= X``, at most
``quadratic · ε · X² + cubic · ε² · X³`` with

- ``quadratic = sup|φ''| / (2 |φ'(a)|)`` and ``cubic = 0``, or
- ``quadratic = |φ''(a)| / (2 |φ'(a)|)`` and ``cubic = sup|φ'''| / (6 |φ'(a)|)``.

An activation need not be one op: what pointwise ops compute together is recognised by its values
(``activation_after``), so ``x * sigmoid(1.702 * x)`` is QuickGELU however it is written.

Source: MATH §2 and §3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import fx
from torch.nn import functional

from neutralize.dataflow import argument, op_name
from neutralize.errors import NeutralizeError, require_finite
from neutralize.intervals import coefficients
from neutralize.parity import odd_gain

Function: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LinearPart:
    """A place where an activation is linear, or nearly.

    Attributes:
        regime: ``origin`` (around the operating point, the better the smaller ε), ``window`` (exactly linear from
            ``point - below`` to ``point + above``) or ``shift`` (linear from ``point`` on, to one side:
            the operating point is moved there).
        point: operating point a; for ``shift`` where the linear side begins.
        value: φ(a); for ``shift`` unused, φ(z) = slope · z there.
        slope: φ'(a).
        quadratic, cubic: the error of ``origin``, see the module.
        below, above: how far from the point the error formula holds.
        tail: (c, r): on the linear side, |φ(z) - slope · z| <= c exp(-r |z|); ``None``: it is 0.
        downward: the linear side of ``shift`` is that of the smaller numbers.
    """

    regime: Literal["origin", "window", "shift"]
    point: float = 0.0
    value: float = 0.0
    slope: float = 1.0
    quadratic: float = 0.0
    cubic: float = 0.0
    below: float = math.inf
    above: float = math.inf
    tail: tuple[float, float] | None = None
    downward: bool = False


@dataclass(frozen=True)
class Activation:
    """An activation function and its linear parts.

    Attributes:
        name: the usual name.
        ops: ATen ops that compute it, without the namespace; an in-place twin counts too.
        function: the function itself: for tests, for plots, and to recognise it by.
        parts: where it is linear; none: nowhere.
        identity_from: z from which φ(z) = z bit for bit, or ``None``.
        odd_gain: g with φ(x) - φ(-x) = g x for every x, or ``None`` (MATH §3).
        odd_error: how far φ(x) - φ(-x) is from that, relative to |x|.
        odd_floor: φ(0), where it is not 0: what the rounding of small φ(x) is relative to.
        roundoffs: how many units of roundoff the evaluation may be off, relative to its value; ``None``: what the
            transcendental functions of the dtype are.
        fill: weight of the documented constant fill, or ``None``.
        composite: how many ops compute it where it is not one op of its own.
        proven: the error coefficients are proven, not sampled.
        lipschitz: sup|φ'| over all numbers; ``None``: not known.
        ceiling: sup|φ|, where it is finite.
        jump: how far φ jumps at most where its formula changes.
        parameters: of a family with parameters, the arguments that make this member.
        source: where the numbers come from.
    """

    name: str
    ops: tuple[str, ...]
    function: Function
    parts: tuple[LinearPart, ...]
    identity_from: float | None = None
    odd_gain: float | None = None
    odd_error: float = 0.0
    odd_floor: float = 0.0
    roundoffs: float | None = None
    fill: float | None = None
    composite: int = 0
    proven: bool = True
    lipschitz: float | None = None
    ceiling: float = math.inf
    jump: float = 0.0
    parameters: tuple[float, ...] = ()
    source: str = ""

    @property
    def at_zero(self) -> float:
        """φ(0)."""
        return float(self.function(torch.zeros((), dtype=torch.float64)))


def _origin(slope: float = 1.0, *, quadratic: float = 0.0, cubic: float = 0.0, **more: float) -> LinearPart:
    return LinearPart("origin", slope=slope, quadratic=quadratic, cubic=cubic, **more)  # type: ignore[arg-type]


def _beyond(start: float = 0.0, slope: float = 1.0) -> LinearPart:
    return LinearPart("shift", point=start, slope=slope)


def _tail(size: float, rate: float) -> LinearPart:
    """φ(z) = z on the upper side, up to size · exp(-rate · z)."""
    return LinearPart("shift", tail=(size, rate))


def _between(low: float, high: float, slope: float = 1.0, offset: float = 0.0) -> tuple[LinearPart, ...]:
    """Linear parts of ``offset + slope · z`` on [low, high]: from its middle, and from 0 where that is inside."""
    points = [(low + high) / 2] if math.isfinite(low + high) else []
    if low <= 0 <= high:
        points.insert(0, 0.0)  # no bias, and nothing that rounding could be relative to
    return tuple(
        LinearPart("window", point, offset + slope * point, slope, below=point - low, above=high - point)
        for point in dict.fromkeys(points)
    )


_LARGEST = torch.finfo(torch.float64).max  # stands for infinity in parameters: JSON has none


# ---- families with parameters ----------------------------------------------------------------------------------------


def leaky_relu(negative_slope: float = 0.01) -> Activation:
    """Return z for z >= 0 and ``negative_slope`` · z below: a kink at 0, so from 0 up."""
    return Activation(
        "leaky_relu", ("leaky_relu",), lambda z: functional.leaky_relu(z, negative_slope), (_beyond(),),
        identity_from=0.0, odd_gain=1.0 + negative_slope, roundoffs=0.0, lipschitz=max(1.0, abs(negative_slope)),
        parameters=(negative_slope,), source="MATH §2, §3",
    )  # fmt: skip


def elu(alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0, name: str = "elu") -> Activation:
    """Return scale · z for z > 0, scale · alpha · (exp(input_scale · z) - 1) below: ELU, SELU and CELU."""
    parts = [_beyond(slope=scale)]
    if alpha * input_scale == 1.0 and scale > 0 and input_scale > 0:
        # φ' is continuous, φ'' = scale · input_scale · exp(·) below 0 and 0 above: from 0 at most input_scale · scale.
        parts.insert(0, _origin(scale, quadratic=input_scale / 2))
    return Activation(
        name, (name,), lambda z: torch.ops.aten.elu(z, alpha, scale, input_scale), tuple(parts),
        identity_from=0.0 if scale == 1.0 else None,
        lipschitz=abs(scale) * max(1.0, abs(alpha * input_scale)) if input_scale >= 0 else None,
        parameters=(alpha, scale, input_scale), source="MATH §2; φ'(0-) = alpha · input_scale · scale",
    )  # fmt: skip


def celu(alpha: float = 1.0) -> Activation:
    """Return z for z > 0 and alpha · (exp(z / alpha) - 1) below: smooth for every alpha > 0."""
    row = elu(alpha, 1.0, 1.0 / alpha, "celu")
    smooth = _origin(quadratic=1.0 / (2.0 * alpha))  # alpha · (1 / alpha) is 1, whatever its rounding
    return replace(
        row, function=lambda z: functional.celu(z, alpha), parts=(smooth, _beyond()) if alpha > 0 else (),
        lipschitz=1.0 if alpha > 0 else None, parameters=(alpha,),
    )  # fmt: skip


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    """Return log(1 + exp(beta · z)) / beta, which is z plus a tail; above threshold / beta it is z itself."""
    return Activation(
        "softplus", ("softplus",), lambda z: functional.softplus(z, beta, threshold),
        (LinearPart("shift", tail=(1.0 / beta, beta)),) if beta > 0 else (), odd_gain=1.0 if beta > 0 else None,
        odd_error=math.exp(-threshold) / threshold if threshold > 0 else math.inf,
        odd_floor=math.log(2.0) / beta if beta > 0 else math.inf, lipschitz=1.0 if beta > 0 else None,
        jump=math.exp(-threshold) / beta if beta > 0 else 0.0, parameters=(beta, threshold),
        source="MATH §2, §3; 0 < softplus(z) - z <= exp(-beta z) / beta",
    )  # fmt: skip


def hardtanh(low: float = -1.0, high: float = 1.0, name: str = "hardtanh") -> Activation:
    """Return z clamped to [low, high]: exactly linear between them."""
    return Activation(
        name, (name,), lambda z: functional.hardtanh(z, low, high), _between(low, high) if low < high else (),
        roundoffs=0.0, lipschitz=1.0, ceiling=max(abs(low), abs(high)),
        parameters=tuple(max(-_LARGEST, min(_LARGEST, limit)) for limit in (low, high)),
        source="MATH §2; linear between its limits",
    )  # fmt: skip


def swish(beta: float = 1.0, name: str = "silu") -> Activation:
    """Return z · sigmoid(beta · z): φ'' = beta σ'(2 - beta z tanh(beta z / 2)) is largest at 0, beta / 2."""
    return Activation(
        name, ("silu",) if name == "silu" else (), lambda z: z * torch.sigmoid(beta * z),
        (_origin(0.5, quadratic=abs(beta) / 2), *([_tail(4.0 / beta, 0.9 * beta)] if beta > 0 else [])), odd_gain=1.0,
        lipschitz=1.09984, parameters=(beta,),
        source="MATH §2, §3; sup|φ''| = beta / 2 at 0; 0 <= z - φ(z) <= z exp(-beta z)",
    )  # fmt: skip


def _new_gelu(z: torch.Tensor) -> torch.Tensor:
    return functional.gelu(z, approximate="tanh")


def _relu_squared(z: torch.Tensor) -> torch.Tensor:
    return functional.relu(z).square()


def _identity(z: torch.Tensor) -> torch.Tensor:
    return z


# ---- the table -------------------------------------------------------------------------------------------------------

# name, ops, function, linear parts (slope at the point; quadratic or cubic error), extras.
ACTIVATIONS: tuple[Activation, ...] = (
    Activation("identity", (), _identity, (LinearPart("window"),), identity_from=-math.inf, odd_gain=2.0, roundoffs=0.0,
               lipschitz=1.0, source="φ(z) = z"),
    Activation("tanh", ("tanh",), torch.tanh, (_origin(cubic=1 / 3),), fill=0.001, lipschitz=1.0, ceiling=1.0,
               source="sup|φ'''| = 2 at 0"),
    Activation("sigmoid", ("sigmoid",), torch.sigmoid, (_origin(0.25, cubic=1 / 12, value=0.5),), fill=0.01,
               lipschitz=0.25, ceiling=1.0, source="sup|φ'''| = 1/8 at 0"),
    Activation("relu", ("relu",), torch.relu, (_beyond(),), identity_from=0.0, odd_gain=1.0, roundoffs=0.0, fill=1.001,
               lipschitz=1.0, source="exact for z >= 0"),
    hardtanh(0.0, 6.0, "relu6"),
    leaky_relu(),
    replace(leaky_relu(0.25), name="prelu", ops=("prelu", "_prelu_kernel"), odd_gain=None,
            lipschitz=None, source="MATH §2; its weight is not needed for z >= 0"),
    elu(),
    elu(1.6732632423543772848170429916717, 1.0507009873554804934193349852946, name="selu"),
    celu(),
    Activation("gelu", ("gelu",), functional.gelu, (_origin(0.5, quadratic=0.797885), _tail(1200.0, 4.0)),
               odd_gain=1.0, lipschitz=1.12891,
               source="φ'' = (2 - z²) exp(-z²/2) / sqrt(2π), at most sqrt(2/π) at 0; "
               "0 <= z - φ(z) <= exp(-z²/2) / sqrt(2π) <= exp(8 - 4z) / sqrt(2π)"),
    Activation("gelu_tanh", (), _new_gelu, (_origin(0.5, quadratic=0.797885), _tail(1200.0, 4.0)), odd_gain=1.0,
               lipschitz=1.129, source="sup|φ''| = sqrt(2/π) at 0, as the erf form; "
               "0 <= z - φ(z) <= z exp(-sqrt(8/π) (z + 0.044715 z³)), at most 743 exp(-4z)"),
    swish(),
    swish(1.702, "quick_gelu"),
    Activation("mish", ("mish",), functional.mish, (_origin(0.6, quadratic=0.537), _tail(4.0, 1.8)), lipschitz=1.0885,
               source="φ'(0) = tanh(log 2) = 3/5; sup|φ''| = 0.6443 at -0.088; 0 <= z - φ(z) <= 2 z exp(-2 z)"),
    softplus(),
    Activation("softsign", ("softsign",), functional.softsign, (_origin(quadratic=1.0),), lipschitz=1.0, ceiling=1.0,
               source="φ'' = -2 sign(z) / (1 + |z|)³"),
    hardtanh(),
    Activation("hardsigmoid", ("hardsigmoid",), functional.hardsigmoid, _between(-3.0, 3.0, 1 / 6, 0.5)[:1],
               lipschitz=1 / 6, ceiling=1.0, source="linear on [-3, 3]"),
    Activation("hardswish", ("hardswish",), functional.hardswish,
               (_origin(0.5, quadratic=1 / 3, below=3.0, above=3.0), _beyond(3.0)), odd_gain=1.0, lipschitz=1.5,
               source="φ(z) = z (z + 3) / 6 on [-3, 3]: φ'(0) = 1/2, φ'' = 1/3; z above"),
    Activation("logsigmoid", ("log_sigmoid", "log_sigmoid_forward", "logsigmoid"), functional.logsigmoid,
               (LinearPart("shift", tail=(1.0, 1.0), downward=True),), odd_gain=1.0, odd_floor=math.log(2.0),
               lipschitz=1.0, source="-softplus(-z): z far below 0"),
    Activation("sin", ("sin",), torch.sin, (_origin(cubic=1 / 6),), lipschitz=1.0, ceiling=1.0,
               source="sup|φ'''| = 1 at 0"),
    Activation("relu_squared", (), _relu_squared,
               (_origin(2.0, quadratic=0.5, point=1.0, value=1.0, below=1.0),),
               source="φ(z) = z² for z >= 0: φ'(1) = φ'' = 2"),
)  # fmt: skip

_FAMILIES: dict[str, Callable[..., Activation]] = {
    "leaky_relu": leaky_relu,
    "elu": elu,
    "celu": celu,
    "softplus": softplus,
    "hardtanh": hardtanh,
    "swish": lambda beta: swish(beta, "swish"),
}
BY_NAME = {activation.name: activation for activation in ACTIVATIONS}
_BY_OP = {f"aten::{op}": activation for activation in ACTIVATIONS for op in activation.ops}
_REGISTERED: dict[str, Activation] = {}
# Activations without a row of their own: recognised so that a layer in front of one is refused, not half cut out.
_OTHERS = ("hardshrink", "softshrink", "tanhshrink", "threshold", "rrelu", "rrelu_with_noise", "glu")
# Names of the Python functions that compute an activation, for the excised network (``verify.excised``).
FUNCTION_NAMES = frozenset(
    name + suffix for name in (*(op for row in ACTIVATIONS for op in row.ops), *_OTHERS) for suffix in ("", "_")
)


def rows() -> tuple[Activation, ...]:
    """Every activation that is known: those of the table, then those that were registered."""
    return (*ACTIVATIONS, *_REGISTERED.values())


# ---- recognition -----------------------------------------------------------------------------------------------------


def is_proven(name: str) -> bool:
    """Whether the error coefficients of the activation of that name are proven; a name without a row has none."""
    return name not in _REGISTERED or _REGISTERED[name].proven


def is_registered(name: str) -> bool:
    """Whether the activation of that name came by ``register_activation``."""
    return name in _REGISTERED


def function_of(name: str, parameters: tuple[float, ...] = ()) -> Function | None:
    """The activation of that name and those parameters; ``None`` if it is not known by them (a PReLU has a weight)."""
    if name in _REGISTERED:
        return _REGISTERED[name].function
    if parameters and name in _FAMILIES:
        return _FAMILIES[name](*parameters).function
    return BY_NAME[name].function if name in BY_NAME and name != "prelu" else None


def lipschitz_within(row: Activation, reach: float) -> float | None:
    """sup|φ'| where |z| <= reach: of the row, or by interval arithmetic for a registered function; else ``None``."""
    if row.lipschitz is not None:
        return row.lipschitz
    if row.name == "relu_squared":
        return 2.0 * reach
    registered = _REGISTERED.get(row.name)
    if registered is None or not math.isfinite(reach):
        return None
    found = coefficients(registered.function, -reach, reach)
    return None if found is None else found[1]


def is_activation(node: fx.Node) -> bool:
    """Whether the node is an activation, known in full (``activation_of``) or by name only."""
    return op_name(node).removeprefix("aten::") in FUNCTION_NAMES


def activation_of(node: fx.Node) -> Activation | None:
    """The activation that the op of the node is, with the parameters that it has there, or ``None``."""
    op = op_name(node)
    if op == "aten::hardtanh":
        low, high = float(argument(node, "min_val", -1.0)), float(argument(node, "max_val", 1.0))
        return BY_NAME["relu6"] if (low, high) == (0, 6) else hardtanh(low, high)
    if op == "aten::leaky_relu":
        return leaky_relu(float(argument(node, "negative_slope", 0.01)))
    if op == "aten::elu":
        alpha, scale, input_scale = (float(argument(node, name, 1.0)) for name in ("alpha", "scale", "input_scale"))
        return elu(alpha, scale, input_scale)
    if op == "aten::celu":
        return celu(float(argument(node, "alpha", 1.0)))
    if op == "aten::softplus":
        return softplus(float(argument(node, "beta", 1.0)), float(argument(node, "threshold", 20.0)))
    if op == "aten::gelu" and argument(node, "approximate", "none") == "tanh":
        return BY_NAME["gelu_tanh"]
    return _BY_OP.get(op)


def _make_grid() -> torch.Tensor:
    """Where functions are compared: all magnitudes, densely around 0, in an order that no sort or flip keeps."""
    steep = torch.logspace(-8, 30, 115, dtype=torch.float64)
    grid = torch.cat([steep, -steep, torch.linspace(-12, 12, 193, dtype=torch.float64)])
    return grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))]


GRID = _make_grid()
_RELATIVE, _ABSOLUTE = 1e-9, 1e-12
_FAR = 64.0  # exp overflows in float32 from 88 on; nearer to 0 an activation has values
_MOST_OPS = 16


def identify(values: torch.Tensor | None) -> Activation | None:
    """The activation that has these values on ``GRID``, or ``None``; the identity is none.

    Far from 0 the values may be infinite or no numbers, as those of log(1 + exp(z)) are: then it is the activation on
    the inputs that it can be computed for, and there are no pairs of it, which hold for all.

    Args:
        values: float64, as many as the grid has points.
    """
    if values is None or values.shape != GRID.shape or values.dtype != torch.float64 or torch.equal(values, GRID):
        return None
    finite = values.isfinite()
    if not bool((finite | (GRID.abs() > _FAR)).all()):
        return None
    known = (row for row in (*_REGISTERED.values(), *ACTIVATIONS) if row.name != "identity")
    for row in (*known, *_fitted(values)):
        try:
            wanted = row.function(GRID)
        except Exception:  # a registered function that has no float64
            continue
        if torch.allclose(values[finite], wanted[finite], rtol=_RELATIVE, atol=_ABSOLUTE):
            return row if bool(finite.all()) else replace(row, odd_gain=None)
    return None


def _fitted(values: torch.Tensor) -> list[Activation]:
    """Members of the families with parameters that have the right value at one or two points."""
    least, largest = int(GRID.argmin()), int(GRID.argmax())
    one = int((GRID - 1.0).abs().argmin())
    found = []
    if 0 < float(values[one]) < 1:
        found.append(swish(math.log(float(values[one]) / (1 - float(values[one]))), "swish"))
    low, high = float(values[least]), float(values[largest])
    if low < high and math.isfinite(low) and math.isfinite(high):
        found.append(hardtanh(low, high))
    if high == float(GRID[largest]) and math.isfinite(low):
        found.append(leaky_relu(low / float(GRID[least])))
    return found


def activation_after(node: fx.Node) -> tuple[Activation, fx.Node] | None:
    """The activation that is computed from the value of a node, by one op or several.

    What the ops compute is tried on ``GRID``: it counts what comes out, not how it is written. Every reader of the node
    and of the steps in between must belong to the activation.

    Args:
        node: the argument of the activation.

    Returns:
        The activation and the node that is its result, or ``None``; of several, the one that spans most ops.
    """
    inside: dict[fx.Node, torch.Tensor | None] = {node: GRID}
    found: tuple[Activation, fx.Node] | None = None
    place = node
    while len(inside) <= _MOST_OPS and (following := _next_pointwise(place, inside)) is not None:
        place = following
        inside[place] = _tried(place, inside)
        if not _is_closed(node, place, inside):
            continue
        direct = activation_of(place) if place.args and place.args[0] is node else None
        row = direct or (None if is_activation(place) and place.args[0] is node else identify(inside[place]))
        if row is not None:
            span = [step for step in inside if step is not node and _reaches(step, place, inside)]
            if direct is None:
                row = replace(row, function=_chain(node, span, place), composite=len(span))
            found = row, place
    return found


def _next_pointwise(place: fx.Node, inside: dict[fx.Node, torch.Tensor | None]) -> fx.Node | None:
    """The next node, in graph order, that reads nothing but nodes inside."""
    candidates = [user for known in inside for user in known.users if user not in inside and user.op == "call_function"]
    pointwise = [user for user in candidates if _is_pointwise(user) and all(part in inside for part in _operands(user))]
    return min(pointwise, default=None)


def _operands(node: fx.Node) -> list[fx.Node]:
    """What a pointwise op computes from; the weight of a PReLU is none of it, for it is not used where z >= 0."""
    return node.all_input_nodes[:1] if op_name(node) in ("aten::prelu", "aten::_prelu_kernel") else node.all_input_nodes


def _is_pointwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or op_name(node) in _BY_OP or is_activation(node)


def _is_closed(node: fx.Node, result: fx.Node, inside: dict[fx.Node, torch.Tensor | None]) -> bool:
    """Whether everything that is computed from the node goes into the result."""
    return all(
        _reaches(user, result, inside)
        for step in inside
        if step is not result and (step is node or _reaches(step, result, inside))
        for user in step.users
    )


def _reaches(step: fx.Node, result: fx.Node, inside: dict[fx.Node, torch.Tensor | None]) -> bool:
    if step is result:
        return True
    return step in inside and any(_reaches(user, result, inside) for user in step.users if user in inside)


def _tried(node: fx.Node, values: dict[fx.Node, torch.Tensor | None]) -> torch.Tensor | None:
    """What an op makes of the values of its operands, or ``None``."""
    if any(values.get(part) is None for part in node.all_input_nodes):
        return None
    try:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda part: values[part].clone())  # type: ignore[union-attr]
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # an op that does not do with float64 on the CPU: then it is no activation that is known
        return None
    return result if isinstance(result, torch.Tensor) else None


def _chain(node: fx.Node, steps: list[fx.Node], result: fx.Node) -> Function:
    """The function that the steps from ``node`` to ``result`` compute."""

    def function(z: torch.Tensor) -> torch.Tensor:
        values: dict[fx.Node, torch.Tensor | None] = {node: z}
        for step in steps:
            values[step] = _tried(step, values)
        computed = values[result]
        if computed is None:
            raise TypeError(f"no {z.dtype} for {result}")
        return computed

    return function


# ---- registration ----------------------------------------------------------------------------------------------------


def register_activation(
    name: str,
    function: Function,
    *,
    point: float = 0.0,
    reach: float = 1.0,
    curvature: float | None = None,
    source: str = "",
) -> Activation:
    """Make an activation known: layers in front of it can be passed through, wherever a model computes it.

    It is recognised by its values: every pointwise computation in a model that has those of ``function`` is it. Its
    slope comes from autograd; its curvature is given, or bounded by interval arithmetic, which is a proof. Where the
    function uses an op without an interval rule, the curvature is sampled, and certificates say ``measured``. Where a
    model computes it by several ops, their rounding is counted, and tried on samples at the operating point. Where its
    ops prove that φ(x) - φ(-x) is a multiple of x (``parity``), it will do in pairs as well.

    Args:
        name: a name that no other activation has.
        function: elementwise and without parameters; a module will do. It must work on float64 tensors.
        point: operating point, where the slope is not zero.
        reach: how far from the point the curvature is bounded; inputs are scaled to stay within.
        curvature: sup|φ''| over [point - reach, point + reach], if it is known.
        source: where the numbers come from.

    Returns:
        The row.

    Raises:
        NeutralizeError: the name is taken, a number is out of range, or the slope at the point is zero.

    Source: MATH §2.

    Examples:
        >>> row = register_activation("wiggle", lambda x: x + 0.1 * torch.sin(x) ** 2)
        >>> row.parts[0].slope
        1.0
        >>> forget_activation("wiggle")
    """
    where = "register_activation"
    require_finite(where, point=point, reach=reach, **({} if curvature is None else {"curvature": curvature}))
    if name in BY_NAME:
        raise NeutralizeError(f"{where}: expected a new name, got {name!r}, which is in the table; take another")
    if reach <= 0 or (curvature is not None and curvature < 0):
        raise NeutralizeError(
            f"{where}: expected a positive reach and a curvature of 0 or more, got {reach} and {curvature}; "
            "correct them"
        )
    at = torch.tensor(point, dtype=torch.float64, requires_grad=True)
    try:
        with torch.enable_grad():
            value = function(at)
            slope = float(torch.autograd.grad(value, at)[0])
    except Exception as error:
        raise NeutralizeError(
            f"{where}: expected a function of float64 tensors that autograd can differentiate, got "
            f"{type(error).__name__}: {error}; give one"
        ) from error
    require_finite(where, value=float(value.detach()), slope=slope)
    if abs(slope) < 1e-6:
        raise NeutralizeError(
            f"{where}: expected a slope other than 0 at {point:g}, got {slope:.3g}; give another point"
        )
    errors, proven = _curvature(function, point, reach, float(value.detach()), slope, curvature)
    if not source:
        source = "given" if curvature is not None else "interval arithmetic" if proven else "sampled"
    parts = tuple(
        LinearPart("origin", point, float(value.detach()), slope, quadratic, cubic, reach, reach)
        for quadratic, cubic in errors
    )
    row = Activation(
        name, (), function, parts, odd_gain=odd_gain(function), proven=proven, roundoffs=8.0, source=source
    )
    _REGISTERED[name] = row
    return row


def _curvature(
    function: Function, point: float, reach: float, value: float, slope: float, curvature: float | None
) -> tuple[list[tuple[float, float]], bool]:
    """Pairs of quadratic and cubic coefficients, any of which bounds the error, and whether that is proven."""
    if curvature is not None:
        return [(curvature / (2 * abs(slope)), 0.0)], True
    around, here = coefficients(function, point - reach, point + reach), coefficients(function, point, point, 1)
    if around is not None and here is not None:
        return [(around[2] / abs(slope), 0.0), (here[2] / abs(slope), around[3] / abs(slope))], True
    d = reach * torch.linspace(-1, 1, 20_000, dtype=torch.float64)
    with torch.no_grad():
        remainder = (function(point + d) - value - slope * d).abs()
    return [(1.5 * float((remainder / d.square()).max()) / abs(slope), 0.0)], False


def forget_activation(name: str) -> None:
    """Take back a registration.

    Raises:
        NeutralizeError: nothing is registered under that name.
    """
    if _REGISTERED.pop(name, None) is None:
        known = ", ".join(_REGISTERED) or "none"
        raise NeutralizeError(f"forget_activation: expected a registered name ({known}), got {name!r}; check it")
