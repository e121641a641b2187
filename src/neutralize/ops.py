"""The two ops, in place on tensors: the affine rewrite and the fold. Who does the work: :func:`backend`.

A call checks everything before it writes anything. The native kernels check their arguments themselves, so the usual
call (plain tensors on one device) goes straight to them, on the CPU even past the dispatcher, which costs more than
writing a small tensor. Only where they refuse, or the call is an unusual one, are the arguments examined here, one by
one: to split the call by device and layout, or to say what is wrong with it.
"""

import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from neutralize import _native, reference
from neutralize.errors import NeutralizeError

__all__ = ["backend", "rescale_fold_", "rewrite_"]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""The dtypes of every op."""

_DTYPE_SET = frozenset(DTYPES)
_DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
_REAL_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_TRACED_TENSORS = (FakeTensor, FunctionalTensor)
_COLUMN_LIMIT = 1 << 62
_ROUNDS_TO_INFINITY = {torch.float64: math.inf, torch.float32: 2.0**128 - 2.0**103}
"""The smallest magnitude that rounds to infinity: half a unit in the last place above the largest number."""
_REWRITE = torch.ops.neutralize.rewrite_.default
_RESCALE_FOLD = torch.ops.neutralize.rescale_fold_.default
_increment_version = torch._C._increment_version
_dispatch_modes = torch._C._len_torch_dispatch_stack
_profiling = torch._C._autograd._profiler_enabled
_is_negated = Tensor.is_neg
_is_gradtracking = torch._C._functorch.is_gradtrackingtensor
_is_batched = torch._C._functorch.is_batchedtensor
_is_grad_enabled = torch.is_grad_enabled
_set_grad_enabled = torch._C._set_grad_enabled
_is_compiling = torch.compiler.is_compiling
_NATIVE_CPU = "cpu" in _native.DEVICE_TYPES


def rewrite_(
    tensors: Tensor | Iterable[Tensor],
    *,
    scale: float | Iterable[float] = 0.0,
    diagonal: float | Iterable[float] = 0.0,
    fill: float | Iterable[float] = 0.0,
    start: int | Iterable[int] = 0,
    step: int | Iterable[int] = 1,
) -> None:
    """Rewrite tensors in place: ``W <- scale * W + diagonal * D + fill``.

    ``D`` is the generalized identity: of ``W`` seen as a matrix (rows: dim 0, columns: the rest flattened), row ``r``
    has its one at column ``start + r * step``, and none where that is outside. ``(0, 1)`` is the identity of a Linear
    layer, ``(K // 2, K)`` the Dirac kernel of a convolution with ``K`` taps. With ``scale == 0`` the old values are not
    read, so NaN and infinity vanish. The arithmetic is float64 for float64 and float32 for all others, rounded once on
    store.

    Args:
        tensors: one tensor or many, of any mix of shapes, devices and floating-point dtypes; written even where they
            require a gradient, and autograd then refuses a backward pass that would have needed the old values.
        scale: one number for all tensors or one for each; so are the others.
        diagonal: the factor of ``D``.
        fill: added everywhere.
        start: the column of row 0's one.
        step: how many columns further each row's one lies.

    Raises:
        NeutralizeError: an argument cannot be used; nothing has been written.

    Examples:
        >>> w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> rewrite_(w, scale=0.5, diagonal=1.0)
        >>> w
        tensor([[1.5000, 1.0000],
                [1.5000, 3.0000]])
    """
    listed: list[Any] = [tensors] if type(tensors) in _REAL_TENSORS else _listed("rewrite_", "tensors", tensors)
    if type(scale) is type(diagonal) is type(fill) is float and type(start) is type(step) is int:
        coefficients = ([scale], [diagonal], [fill], [start], [step])  # the usual call, spared five calls
    else:
        count = len(listed)
        coefficients = (
            _floats("rewrite_", "scale", scale, count),
            _floats("rewrite_", "diagonal", diagonal, count),
            _floats("rewrite_", "fill", fill, count),
            _ints("rewrite_", "start", start, count),
            _ints("rewrite_", "step", step, count),
        )
    if _is_compiling():
        _rewrite_traced(listed, coefficients)
        return
    if not listed:
        _check_rewrite(listed, coefficients)
        return
    if _straight_to_kernels(listed):
        try:
            if not (_direct_is_equal(listed) and _native.rewrite_direct(listed, *coefficients)):
                _call(_REWRITE._op, listed, *coefficients)
        except (RuntimeError, OverflowError, TypeError):
            if not _rewrite_examined(listed, coefficients):
                raise
        else:
            _increment_version(listed)
        return
    _rewrite_examined(listed, coefficients, always=True)


def rescale_fold_(
    weights: Tensor | Iterable[Tensor],
    biases: Tensor | Iterable[Tensor],
    *,
    scale: float | Iterable[float],
    shift: float | Iterable[float],
) -> None:
    """Fold weights into their biases and rescale them in the same pass: ``b <- b + shift * (W 1)``, ``W <- scale * W``.

    ``W 1`` is the row sum of the old weight. A shift of zero leaves the bias alone, a scale of zero makes the weight
    zero.

    Source: an affine change of variables ``x = (z - shift') / scale'`` before a linear layer, MATH section 2.

    Args:
        weights: one weight or many, each (out, ...).
        biases: as many, each (out,), of its weight's dtype and device.
        scale: one number for all pairs or one for each.
        shift: so too.

    Raises:
        NeutralizeError: an argument cannot be used; nothing has been written.

    Examples:
        >>> w, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 20.0])
        >>> rescale_fold_(w, b, scale=2.0, shift=-1.0)
        >>> w.tolist(), b.tolist()
        ([[2.0, 4.0], [6.0, 8.0]], [7.0, 13.0])
    """
    listed = _listed("rescale_fold_", "weights", weights)
    paired = _listed("rescale_fold_", "biases", biases)
    if len(paired) != len(listed):
        raise NeutralizeError(
            f"rescale_fold_: expected {len(listed)} tensors for biases, one per weight, got {len(paired)}; pair them up"
        )
    coefficients = (
        _floats("rescale_fold_", "scale", scale, len(listed)),
        _floats("rescale_fold_", "shift", shift, len(listed)),
    )
    if _is_compiling():
        _fold_traced(listed, paired, coefficients)
        return
    if not listed:
        _check_fold(listed, paired, coefficients)
        return
    if _straight_to_kernels([*listed, *paired]):
        try:
            _call(_RESCALE_FOLD._op, listed, paired, *coefficients)
        except RuntimeError:
            if not _fold_examined(listed, paired, coefficients):
                raise
        else:
            _increment_version([*listed, *paired])
        return
    _fold_examined(listed, paired, coefficients, always=True)


def is_held(tensor: Tensor) -> bool:
    """Return whether a dense tensor's storage holds all of its elements; sharding wrappers free what they gather."""
    if tensor.numel() == 0 or isinstance(tensor, _TRACED_TENSORS) or _is_gradtracking(tensor):
        return True
    if tensor._is_zerotensor() or _is_batched(tensor):
        return False
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    bytes_needed = (tensor.storage_offset() + reach + 1) * tensor.dtype.itemsize
    return tensor.untyped_storage().nbytes() >= bytes_needed


def backend(tensor: Tensor) -> str:
    """Return who would rewrite this tensor: ``"cuda"`` or ``"cpu"`` kernels, or the reference in plain ``"torch"``.

    Raises:
        NeutralizeError: it is not a tensor.
    """
    if not isinstance(tensor, Tensor):
        raise NeutralizeError(
            f"backend: expected a tensor for tensor, got {type(tensor).__name__}; pass a torch tensor"
        )
    return tensor.device.type if _is_native(tensor) else "torch"


# ---- arguments -------------------------------------------------------------------------------------------------------
_RewriteCoefficients = tuple[list[float], list[float], list[float], list[int], list[int]]
_FoldCoefficients = tuple[list[float], list[float]]


def _listed(op: str, parameter: str, tensors: Any) -> list[Any]:
    if isinstance(tensors, Tensor):
        return [tensors]
    if isinstance(tensors, (str, bytes)) or not isinstance(tensors, Iterable):
        raise NeutralizeError(
            f"{op}: expected a tensor or a sequence of tensors for {parameter}, got {type(tensors).__name__}; "
            "pass torch tensors"
        )
    return list(tensors)


def _floats(op: str, parameter: str, values: Any, count: int) -> list[float]:
    """Return one number per tensor, or a single one for all of them."""
    if type(values) is float:
        return [values]
    if isinstance(values, numbers.Real):
        return [_as_float(op, parameter, values)]
    listed = _sequence(op, parameter, values, count, "numbers")
    return [value if type(value) is float else _as_float(op, parameter, value) for value in listed]


def _as_float(op: str, parameter: str, value: Any) -> float:
    if not isinstance(value, numbers.Real):
        raise NeutralizeError(
            f"{op}: expected numbers for {parameter}, got {type(value).__name__}; pass Python floats, "
            "one or one per tensor"
        )
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _ints(op: str, parameter: str, values: Any, count: int) -> list[int]:
    """Return one integer per tensor, or a single one for all of them."""
    if type(values) is int:
        listed = [values]
    elif isinstance(values, numbers.Number) or hasattr(values, "__index__"):
        listed = [_as_int(op, parameter, values)]
    else:
        listed = _sequence(op, parameter, values, count, "integers")
        listed = [value if type(value) is int else _as_int(op, parameter, value) for value in listed]
    return listed


def _as_int(op: str, parameter: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise NeutralizeError(
            f"{op}: expected integers for {parameter}, got {type(value).__name__}; pass Python ints, "
            "one or one per tensor"
        ) from None


def _sequence(op: str, parameter: str, values: Any, count: int, kind: str) -> list[Any]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise NeutralizeError(
            f"{op}: expected {kind} for {parameter}, got {type(values).__name__}; "
            "pass one for all tensors or one for each"
        )
    listed = list(values)
    if len(listed) != count:
        raise NeutralizeError(
            f"{op}: expected one number or a sequence of {count} {kind} for {parameter}, got a sequence of "
            f"{len(listed)}; pass one for all tensors or one for each"
        )
    return listed


def _at(values: Sequence[Any], index: int) -> Any:
    return values[0] if len(values) == 1 else values[index]


def _call(kernel: Any, *args: Any) -> None:
    """Call under no_grad; by hand, as the context manager costs as much as rewriting a small tensor."""
    if not _is_grad_enabled():
        kernel(*args)
        return
    _set_grad_enabled(False)
    try:
        kernel(*args)
    finally:
        _set_grad_enabled(True)


# ---- the checks, one tensor at a time --------------------------------------------------------------------------------
def _straight_to_kernels(tensors: list[Any]) -> bool:
    """Return whether the kernels may see the list first: plain tensors, and a device whose kernels check them."""
    if not _REAL_TENSORS.issuperset(map(type, tensors)):
        return False
    return _NATIVE_CPU if tensors[0].is_cpu else tensors[0].device.type in _native.DEVICE_TYPES


def _direct_is_equal(tensors: list[Any]) -> bool:
    """Return whether the way past the dispatcher does the same: nothing watches, and values are what memory holds."""
    return tensors[0].is_cpu and not _dispatch_modes() and not _profiling() and not any(map(_is_negated, tensors))


def _is_native(tensor: Tensor) -> bool:
    """Return whether native kernels take the tensor: device, dtype, and memory that is contiguous row by row."""
    if tensor.device.type not in _native.DEVICE_TYPES or tensor.dtype not in _DTYPE_SET:
        return False
    if tensor.layout != torch.strided or (not torch.compiler.is_compiling() and tensor.is_neg()):
        return False
    shape, stride = tensor.shape, tensor.stride()
    cols = 1
    for dim in range(len(shape) - 1, 0, -1):
        if shape[dim] != 1 and stride[dim] != cols:
            return False
        cols *= shape[dim]
    if tensor.numel() == 0:
        return True
    if len(shape) > 0 and shape[0] > 1 and stride[0] < cols:
        return False
    if isinstance(tensor, _TRACED_TENSORS) or torch.compiler.is_compiling():
        return True  # no memory yet whose alignment could be asked
    return tensor.data_ptr() % tensor.dtype.itemsize == 0


def _check_tensor(op: str, name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise NeutralizeError(f"{op}: expected a tensor for {name}, got {type(tensor).__name__}; pass torch tensors")
    if not torch.compiler.is_compiling() and type(tensor) not in _REAL_TENSORS:
        _check_subclass(op, name, tensor)
    if tensor.dtype not in _DTYPE_SET:
        raise NeutralizeError(
            f"{op}: expected one of {_DTYPE_NAMES} for the dtype of {name}, got "
            f"{str(tensor.dtype).removeprefix('torch.')}; dequantize or cast it first"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested one" if tensor.is_nested else tensor.layout
        raise NeutralizeError(f"{op}: expected a dense tensor for {name}, got {kind}; call to_dense() first")
    if tensor.device.type == "meta" and not isinstance(tensor, _TRACED_TENSORS):
        raise NeutralizeError(
            f"{op}: expected a tensor with memory for {name}, got one on the meta device; load the weights first"
        )
    if not torch.compiler.is_compiling() and not is_held(tensor):
        raise NeutralizeError(
            f"{op}: expected a tensor with memory for {name}, got one without, or with too little (freed, inside "
            "torch.vmap, or all zeros by construction); gather or clone it first"
        )


def _check_subclass(op: str, name: str, tensor: Tensor) -> None:
    """Refuse tensors that are not memory but a program: DTensor, quantized wrappers and the like."""
    kind = type(tensor)
    if isinstance(tensor, _TRACED_TENSORS):
        return
    if torch.nn.parameter.is_lazy(tensor):
        raise NeutralizeError(
            f"{op}: expected a tensor with memory for {name}, got {kind.__name__}; run the lazy module once first"
        )
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        hint = "rewrite its to_local()" if hasattr(tensor, "to_local") else "rewrite the plain tensors inside it"
        raise NeutralizeError(f"{op}: expected a plain tensor for {name}, got the subclass {kind.__name__}; {hint}")


def _check_finite(op: str, **coefficients: list[float]) -> None:
    for parameter, values in coefficients.items():
        for value in values:
            if value - value != 0:  # not math.isfinite, which torch.compile cannot trace on symbols
                raise NeutralizeError(
                    f"{op}: expected a finite number for {parameter}, got {value}; pass finite coefficients"
                )


def _check_coefficient(op: str, parameter: str, value: float, name: str, tensor: Tensor) -> None:
    compute = reference.compute_dtype(tensor.dtype)
    if not abs(value) < _ROUNDS_TO_INFINITY[compute]:
        raise NeutralizeError(
            f"{op}: expected a number that {str(compute).removeprefix('torch.')} holds for {parameter}, got {value} "
            f"for {name}; pass a smaller one"
        )


def _check_rewrite(tensors: list[Any], coefficients: _RewriteCoefficients) -> None:
    scale, diagonal, fill, start, step = coefficients
    _check_finite("rewrite_", scale=scale, diagonal=diagonal, fill=fill)
    for parameter, columns in (("start", start), ("step", step)):
        for value in columns:
            if not -_COLUMN_LIMIT < value < _COLUMN_LIMIT:
                raise NeutralizeError(
                    f"rewrite_: expected less than 2^62 in magnitude for {parameter}, got {value}; "
                    "no tensor has a column there"
                )
    for i, tensor in enumerate(tensors):
        name = f"tensors[{i}]"
        _check_tensor("rewrite_", name, tensor)
        _check_coefficient("rewrite_", "scale", _at(scale, i), name, tensor)
        _check_coefficient("rewrite_", "diagonal", _at(diagonal, i), name, tensor)
        _check_coefficient("rewrite_", "fill", _at(fill, i), name, tensor)
        _check_coefficient("rewrite_", "diagonal + fill", _at(diagonal, i) + _at(fill, i), name, tensor)


def _check_fold(weights: list[Any], biases: list[Any], coefficients: _FoldCoefficients) -> None:
    op = "rescale_fold_"
    scale, shift = coefficients
    _check_finite(op, scale=scale, shift=shift)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        _check_tensor(op, f"weights[{i}]", weight)
        _check_tensor(op, f"biases[{i}]", bias)
        if weight.dim() < 1 or tuple(bias.shape) != tuple(weight.shape[:1]):
            raise NeutralizeError(
                f"{op}: expected shape (out,) for biases[{i}] and (out, ...) for weights[{i}], got {tuple(bias.shape)} "
                f"and {tuple(weight.shape)}; pair weights and biases of the same layer"
            )
        for what, a, b in (("dtype", weight.dtype, bias.dtype), ("device", weight.device, bias.device)):
            if a != b:
                raise NeutralizeError(
                    f"{op}: expected one {what} for weights[{i}] and biases[{i}], got {a} and {b}; "
                    "move or cast one first"
                )
        _check_coefficient(op, "scale", _at(scale, i), f"weights[{i}]", weight)
        _check_coefficient(op, "shift", _at(shift, i), f"weights[{i}]", weight)


# ---- memory shared within a call -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Span:
    """The bytes from a tensor's first to its last element."""

    begin: int
    end: int
    name: str
    tensor: Tensor


def _check_apart(op: str, named: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse memory that a call would write twice: in two tensors of the list, or within one (an expanded tensor)."""
    by_device: dict[torch.device, list[_Span]] = {}
    for name, tensor in named:
        if tensor.numel() == 0 or isinstance(tensor, _TRACED_TENSORS):
            continue
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        itemsize = tensor.dtype.itemsize
        span = _Span(tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * itemsize, name, tensor)
        if not _surely_simple(tensor) and _written_twice([span]):
            raise NeutralizeError(
                f"{op}: expected memory of its own for every element of {name}, got elements that share memory (an "
                "expanded tensor?); call contiguous() first"
            )
        by_device.setdefault(tensor.device, []).append(span)
    for spans in by_device.values():
        spans.sort(key=lambda span: span.begin)
        group: list[_Span] = []
        reach = 0
        for span in spans:
            if group and span.begin < reach:
                pair = _sharing(group, span)
                if pair is not None:
                    raise NeutralizeError(
                        f"{op}: expected tensors with memory of their own, got {pair.name} and {span.name} sharing "
                        "some; name shared memory once, it would be rewritten twice"
                    )
                group.append(span)
                reach = max(reach, span.end)
            else:
                group, reach = [span], span.end


def _surely_simple(tensor: Tensor) -> bool:
    """Return True only where no two elements share memory: each stride steps over all that the smaller ones reach."""
    covered = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride <= covered:
            return False
        covered += (size - 1) * stride
    return True


def _sharing(group: list[_Span], span: _Span) -> _Span | None:
    """Return the member of the group that shares memory with the span, or None where they only interleave."""
    for other in group:
        if other.end <= span.begin:
            continue
        if _surely_apart(other, span):
            continue
        if _written_twice([other, span]):
            return other
    return None


def _surely_apart(a: _Span, b: _Span) -> bool:
    """Return True only for blocks of one wide matrix whose columns are apart, e.g. ``w[:, :8]`` and ``w[:, 8:]``."""
    if not (a.tensor.dim() >= 1 and b.tensor.dim() >= 1):
        return False
    row_bytes = [s.tensor.stride(0) * s.tensor.dtype.itemsize for s in (a, b)]
    if row_bytes[0] != row_bytes[1] or row_bytes[0] == 0:
        return False
    offset = (b.begin - a.begin) % row_bytes[0]
    widths = []
    for s in (a, b):
        inner = zip(s.tensor.shape[1:], s.tensor.stride()[1:], strict=True)
        widths.append((1 + sum((size - 1) * stride for size, stride in inner)) * s.tensor.dtype.itemsize)
    return widths[0] <= offset and offset + widths[1] <= row_bytes[0]


def _written_twice(spans: list[_Span]) -> bool:
    """Return whether any byte belongs to two elements: exactly, by writing on a map of the bytes."""
    begin = min(span.begin for span in spans)
    seen = torch.zeros(max(span.end for span in spans) - begin, dtype=torch.bool)
    for span in spans:
        tensor, itemsize = span.tensor, span.tensor.dtype.itemsize
        view = seen.as_strided(
            (*tensor.shape, itemsize), (*(s * itemsize for s in tensor.stride()), 1), span.begin - begin
        )
        if view.any():
            return True
        view.fill_(True)
    return int(seen.sum()) != sum(span.tensor.numel() * span.tensor.dtype.itemsize for span in spans)


# ---- the unusual calls -----------------------------------------------------------------------------------------------
def _rewrite_examined(tensors: list[Any], coefficients: _RewriteCoefficients, *, always: bool = False) -> bool:
    """Check all, then rewrite group by group. Return False where all is one native group, unless ``always``."""
    _check_rewrite(tensors, coefficients)
    _check_apart("rewrite_", [(f"tensors[{i}]", tensor) for i, tensor in enumerate(tensors)])
    groups = _groups([_is_native(tensor) for tensor in tensors], tensors)
    if len(groups) == 1 and next(iter(groups)) is not None and not always:
        return False
    for device, members in groups.items():
        picked = tuple(values if len(values) == 1 else [values[i] for i in members] for values in coefficients)
        _run([tensors[i] for i in members], (), picked, _REWRITE if device is not None else reference.rewrite_)
    return True


def _fold_examined(
    weights: list[Any], biases: list[Any], coefficients: _FoldCoefficients, *, always: bool = False
) -> bool:
    """Check all, then fold group by group. Return False where all is one native group, unless ``always``."""
    _check_fold(weights, biases, coefficients)
    named = [(f"weights[{i}]", weight) for i, weight in enumerate(weights)]
    _check_apart("rescale_fold_", named + [(f"biases[{i}]", bias) for i, bias in enumerate(biases)])
    native = [_is_native(weight) and _is_native(bias) for weight, bias in zip(weights, biases, strict=True)]
    groups = _groups(native, weights)
    if len(groups) == 1 and next(iter(groups)) is not None and not always:
        return False
    for device, members in groups.items():
        picked = tuple(values if len(values) == 1 else [values[i] for i in members] for values in coefficients)
        kernel = _RESCALE_FOLD if device is not None else reference.rescale_fold_
        _run([weights[i] for i in members], ([biases[i] for i in members],), picked, kernel)
    return True


def _groups(native: list[bool], tensors: list[Any]) -> dict[torch.device | None, list[int]]:
    """Return the positions by device; under None those that the reference rewrites."""
    groups: dict[torch.device | None, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.device if native[i] else None, []).append(i)
    return groups


def _run(tensors: list[Tensor], partners: tuple[list[Tensor], ...], coefficients: tuple[Any, ...], kernel: Any) -> None:
    """Call a kernel or the reference on checked tensors, and let autograd know."""
    every = [tensor for group in (tensors, *partners) for tensor in group]
    inference = any(tensor.is_inference() for tensor in every)
    with torch.inference_mode() if inference else torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        kernel(tensors, *partners, *coefficients)
    if not any(isinstance(tensor, _TRACED_TENSORS) for tensor in every):
        _increment_version(every)


# ---- under torch.compile: nothing has an address, so the kernels check at run time what is left unchecked here -------
def _rewrite_traced(tensors: list[Any], coefficients: _RewriteCoefficients) -> None:
    _check_rewrite(tensors, coefficients)
    groups = _groups([_is_native(tensor) for tensor in tensors], tensors)
    with torch.no_grad():
        for device, members in groups.items():
            kernel: Any = _REWRITE if device is not None else reference.rewrite_
            kernel(
                [tensors[i] for i in members],
                *[values if len(values) == 1 else [values[i] for i in members] for values in coefficients],
            )


def _fold_traced(weights: list[Any], biases: list[Any], coefficients: _FoldCoefficients) -> None:
    _check_fold(weights, biases, coefficients)
    native = [_is_native(weight) and _is_native(bias) for weight, bias in zip(weights, biases, strict=True)]
    groups = _groups(native, weights)
    with torch.no_grad():
        for device, members in groups.items():
            kernel = _RESCALE_FOLD if device is not None else reference.rescale_fold_
            kernel(
                [weights[i] for i in members],
                [biases[i] for i in members],
                *[values if len(values) == 1 else [values[i] for i in members] for values in coefficients],
            )
