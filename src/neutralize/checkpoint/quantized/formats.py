"""Which stored tensors are one quantized weight: by the configuration's word, and by names, dtypes and shapes together.

What does not fit in every respect is not guessed at: it is listed as unknown, and an edit of it is refused.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch

from neutralize.checkpoint.layout import Elements, Stored
from neutralize.checkpoint.quantized.decode import AWQ_ORDER, Fp4, LookedUp, Packed, Scaled, Spread, Undecoded
from neutralize.checkpoint.quantized.weight import (
    Axis,
    Decoder,
    Exponents,
    Factor,
    Grid,
    Multiplier,
    Nested,
    Quantized,
    Unfit,
    Unknown,
    Zero,
)
from neutralize.checkpoint.region import Files
from neutralize.errors import NeutralizeError
from neutralize.plan import dtype_name

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_E8M0 = (torch.uint8, torch.float8_e8m0fnu)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_STATE_BYTES = 1 << 16
_MOST_DIMS = 4
_TRANSPOSED = (Axis(1), Axis(0))
_PER_127TH = 7.874015718698502e-3
"""A 127th, with the digits that bitsandbytes has."""

_MOST_SHOWN = 6
_Axes: TypeAlias = tuple[Axis, ...]
_Fit = TypeVar("_Fit")


def attach(tensors: Mapping[str, Stored], config: Mapping[str, Any] | None, files: Files) -> dict[str, Stored]:
    """Return tensors with those that together store one quantized weight wrapped as that weight.

    Args:
        tensors: by name, as a reader found them, each inside its file.
        config: of ``config.json``; its ``quantization_config`` says which format it is.
        files: to read small parts from: shapes, and the state of a 4-bit format.

    Returns:
        What was given, in its order, with a weight in the place of a part that has its name, and the other weights at
        the end; the other parts stay under their own names. What looks quantized and is not known is ``Unknown``.

    Raises:
        NeutralizeError: the configuration is malformed.
    """
    checkpoint = _Checkpoint(tensors, *_settings(config), files)
    found: dict[str, Quantized | Unknown] = {}
    claimed: set[str] = set()
    # Names first, for they say most; FP8 last, for other formats have scales in FP8.
    for build in (checkpoint.by_suffix, checkpoint.by_bytes, checkpoint.by_fp8):
        for name in tensors:
            weight = None if name in claimed or name in found else build(name)
            if weight is None:
                continue
            stored = tensors[name]
            if weight.name in found and isinstance(stored, Elements):
                weight = Unknown(weight.name, stored, f"both {name!r} and {found[weight.name].names[0]!r}")
            found[weight.name] = weight
            if isinstance(weight, Quantized):
                claimed.update(weight.names)
    for name in claimed & found.keys():  # bytes of which nothing was known before their weight was found
        if isinstance(found[name], Unknown):
            del found[name]
    return {name: found.pop(name, stored) for name, stored in tensors.items()} | found


@dataclass(frozen=True)
class _Checkpoint:
    """What the builders look at.

    Attributes:
        tensors: by name.
        method: ``quant_method`` of the configuration, or ``""``.
        settings: all of its ``quantization_config``.
        files: to read from.
    """

    tensors: Mapping[str, Stored]
    method: str
    settings: Mapping[str, Any]
    files: Files

    def by_suffix(self, name: str) -> Quantized | Unknown | None:
        """The weight that a tensor belongs to whose name only quantized weights have."""
        for suffix, beside, of_weight, builders in _SUFFIXES:
            stem = name.removesuffix(suffix)
            if stem and stem != name and stem + beside in self.tensors:
                return self._build(name, stem + of_weight, builders)
        return None

    def by_bytes(self, name: str) -> Quantized | Unknown | None:
        """The weight that a tensor of bytes is the codes of."""
        return self._by_dtype(name, torch.int8, _INT8) or self._by_dtype(name, torch.uint8, _UINT8)

    def by_fp8(self, name: str) -> Quantized | Unknown | None:
        """The weight that a tensor of FP8 is the codes of."""
        return self._by_dtype(name, torch.float8_e4m3fn, _FP8_WEIGHT) or self._by_dtype(
            name, torch.float8_e5m2, _FP8_WEIGHT
        )

    def _by_dtype(self, name: str, dtype: torch.dtype, builders: _Builders) -> Quantized | Unknown | None:
        stored = self.tensors[name]
        return self._build(name, name, builders) if isinstance(stored, Elements) and stored.dtype == dtype else None

    def _build(self, anchor: str, weight: str, builders: _Builders) -> Quantized | Unknown | None:
        stored = self.tensors[anchor]
        if not isinstance(stored, Elements):
            return None
        try:
            if self.method not in builders:
                raise Unfit(self.unknown(anchor))
            built = builders[self.method](self, anchor, weight)
            if weight in self.tensors and weight not in built.names:
                raise Unfit(f"both {anchor!r} and {weight!r}")
        except Unfit as reason:
            return Unknown(weight, stored, str(reason))
        return built

    @functools.cached_property
    def _suffixes(self) -> Mapping[str, list[str]]:
        """The last parts of the names that begin alike, a few of each."""
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            stem, _, suffix = name.rpartition(".")
            beside = found.setdefault(stem, [])
            if len(beside) < _MOST_SHOWN:
                beside.append(suffix)
        return found

    def unknown(self, anchor: str) -> str:
        """Say what is beside a tensor of which nothing is known."""
        stem, _, own = anchor.rpartition(".")
        suffixes = ", ".join(repr(f".{suffix}") for suffix in self._suffixes[stem] if suffix != own) or "nothing"
        method = f"the quant_method {self.method!r}" if self.method else "no quantization_config"
        return f"an unknown quantization suffix ({suffixes} beside {anchor!r}, and {method} in the configuration)"

    def part(self, name: str, dtypes: Sequence[torch.dtype], *shape: int) -> Elements:
        """Return a tensor in one piece.

        Args:
            name: its name.
            dtypes: those that it may have.
            *shape: that it must have, if any is given.

        Raises:
            Unfit: it is not there, or not like that.
        """
        found = self.tensors.get(name)
        if not isinstance(found, Elements):
            raise Unfit(f"no {name!r}")
        if found.dtype not in dtypes or (shape and found.shape != shape):
            names = " or ".join(map(dtype_name, dtypes))
            wanted = f"{list(shape)} of {names}" if shape else names
            raise Unfit(f"{list(found.shape)} of {found.encoding} for {name!r}, not {wanted}")
        if len(found.pieces) != 1:
            raise Unfit(f"{name!r} in {len(found.pieces)} shards: gather the checkpoint")
        if 0 in found.shape or len(found.shape) > _MOST_DIMS:
            raise Unfit(f"the shape {list(found.shape)} for {name!r}")
        return found

    def number(self, name: str, dtype: torch.dtype) -> int:
        """Return the integer that a tensor of one element holds.

        Raises:
            Unfit: it is not like that.
        """
        part = self.part(name, (dtype,))
        if math.prod(part.shape) != 1:
            raise Unfit(f"{list(part.shape)} for {name!r}, not one number")
        return int(part.read(self.files).item())

    def rest(self, *names: str) -> tuple[Elements, ...]:
        """Return those of some tensors that are there."""
        return tuple(found for name in names if isinstance(found := self.tensors.get(name), Elements))

    def text(self, name: str) -> Any:
        """Return what the JSON text in a tensor of bytes says.

        Raises:
            Unfit: it is too long, or malformed.
        """
        part = self.part(name, (torch.uint8,))
        if len(part.shape) != 1 or part.shape[0] > _STATE_BYTES:
            raise Unfit(f"the shape {list(part.shape)} for the text in {name!r}")
        try:
            return json.loads(bytes(part.read(self.files).tolist()).decode())
        except (ValueError, RecursionError):
            raise Unfit(f"malformed JSON in {name!r}") from None

    def schemes(self, kind: str) -> Iterator[Mapping[str, Any]]:
        """Yield what the groups of a compressed-tensors configuration say of weights that are ``int`` or ``float``."""
        for group in _mapping(self.settings, "config_groups").values():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(weights, Mapping) and weights.get("type", "int") == kind:
                yield weights


_Builders: TypeAlias = Mapping[str, Callable[[_Checkpoint, str, str], Quantized]]


# ---- one builder for each format: (checkpoint, name of the anchor, name of the weight) -> the weight -----------------


def _gptq(source: _Checkpoint, anchor: str, weight: str) -> Quantized:
    """(in * bits / 32, out) int32 codes; one scale per output and group of inputs: ``(code - zero) * scale``."""
    stem = weight.removesuffix("weight")
    codes = source.part(anchor, (torch.int32,))
    packed, columns = _matrix(codes)
    order = source.rest(f"{stem}g_idx")
    dynamic = source.settings.get("dynamic")
    overrides = [each for each in dynamic.values() if isinstance(each, Mapping)] if isinstance(dynamic, Mapping) else []
    scales = source.part(f"{stem}scales", _FLOATS)
    fits = set()
    for settings in (source.settings, *({**source.settings, **each} for each in overrides)):
        bits, group = _integer(settings, "bits", 2, 8), _integer(settings, "group_size", -1, 1 << 31, default=128)
        rows, rest = divmod(packed * 32, bits)
        group = rows if group < 1 else group
        if rest == 0 and scales.shape == (-(-rows // group), columns) and all(each.shape == (rows,) for each in order):
            fits.add((bits, group, rows))
    bits, group, rows = _only(fits, scales)
    zeros = source.part(f"{stem}qzeros", (torch.int32,), scales.shape[0], -(-columns * bits // 32))
    index = source.part(order[0].name, (torch.int32,)) if order else None
    axes = (Axis(1, group, index, source.settings.get("desc_act") is True), Axis(0))
    packing = source.settings.get("checkpoint_format", "gptq")
    points = Spread(Packed(zeros, bits, 1, columns, carry=int(packing == "gptq")), axes)  # the first version stores -1
    decoder: Decoder = Scaled(Spread(Packed(codes, bits, 0, rows), _TRANSPOSED), (Factor(_grid(scales, axes)),), points)
    if packing not in ("gptq", "gptq_v2"):
        decoder = Undecoded(f"the checkpoint_format {packing!r}, not 'gptq' or 'gptq_v2'")
    encoding, parts = f"GPTQ {bits} bit, groups of {group}", (codes, zeros, scales, *order)
    return _by_scales(weight, (columns, rows), encoding, parts, scales, axes, decoder)


def _awq(source: _Checkpoint, anchor: str, weight: str) -> Quantized:
    """(in, out / 8) int32 codes; one scale per output and group of inputs: ``(code - zero) * scale``."""
    stem, settings = weight.removesuffix("weight"), source.settings
    version = settings.get("version", settings.get("format", "gemm"))
    if str(version).lower() != "gemm":
        raise Unfit(f"the AWQ version {version!r}, not 'gemm'")
    bits, group = _integer(settings, "bits", 4, 4), _integer(settings, "group_size", -1, 1 << 31, default=128)
    codes = source.part(anchor, (torch.int32,))
    columns, packed = _matrix(codes)
    rows, group = packed * 32 // bits, columns if group < 1 else group
    scales = source.part(f"{stem}scales", _FLOATS, -(-columns // group), rows)
    zeros = source.rest(f"{stem}qzeros")
    if settings.get("zero_point", True) or zeros:
        zeros = (source.part(f"{stem}qzeros", (torch.int32,), scales.shape[0], packed),)
    axes = (Axis(1, group), Axis(0))
    points = Spread(Packed(zeros[0], bits, 1, rows, AWQ_ORDER), axes) if zeros else None
    numbers = Packed(codes, bits, 1, rows, AWQ_ORDER, bias=0 if zeros else 1 << (bits - 1))
    decoder = Scaled(Spread(numbers, _TRANSPOSED), (Factor(_grid(scales, axes)),), points)
    encoding, parts = f"AWQ 4 bit, groups of {group}", (codes, *zeros, scales)
    return _by_scales(weight, (rows, columns), encoding, parts, scales, axes, decoder)


def _by_scales(
    weight: str,
    shape: tuple[int, ...],
    encoding: str,
    parts: tuple[Elements, ...],
    scales: Elements,
    axes: _Axes,
    decoder: Decoder,
) -> Quantized:
    """A weight that is zero where its scales are, and nowhere else for sure: its codes have zero points."""
    grid = _grid(scales, axes)
    return Quantized(weight, shape, encoding, parts, (Zero(grid),), (Factor(grid),), decoder)


def _bitsandbytes_int8(source: _Checkpoint, anchor: str, weight: str) -> Quantized:
    """(out, in) int8 codes: ``code * SCB / 127``, one SCB per output."""
    stem = weight.removesuffix("weight")
    codes = source.part(anchor, (torch.int8,))
    rows, columns = _matrix(codes)
    scales = source.part(f"{stem}SCB", (torch.float32,), rows)
    order = source.rest(f"{stem}weight_format")
    if order and source.number(order[0].name, torch.uint8):
        raise Unfit(f"tiles of a GPU, by {order[0].name!r}, not rows")
    factor = Factor(_grid(scales, (Axis(0),)))
    axes = (Axis(0), Axis(1))
    zeros = (Zero(factor.grid), Zero(_grid(codes, axes), beside=(factor,)))
    decoder = Scaled(Spread(codes, axes), (factor,), factor=_PER_127TH)
    return Quantized(weight, (rows, columns), "bitsandbytes int8", (codes, scales, *order), zeros, (factor,), decoder)


def _bitsandbytes_4bit(source: _Checkpoint, anchor: str, weight: str) -> Quantized:
    """Two codes to a byte, row after row: ``quant_map[code] * absmax``, one absmax per block."""
    kind = anchor.rpartition("__")[2]
    state = source.text(anchor)
    block, shape = (state.get("blocksize"), state.get("shape")) if isinstance(state, dict) else (None, None)
    if type(block) is not int or block < 2 or block % 2 or not isinstance(shape, list):
        raise Unfit(f"no blocksize and shape in {anchor!r}")
    if not 0 < len(shape) < _MOST_DIMS or not all(type(size) is int and 0 < size < 1 << 48 for size in shape):
        raise Unfit(f"the shape {str(shape)[:80]} in {anchor!r}")
    size, numel = tuple(shape), math.prod(shape)
    found = source.tensors.get(weight)
    if not isinstance(found, Elements):  # of any dtype: bytes are stored as bfloat16 where FSDP is to shard them
        raise Unfit(f"no {weight!r}")
    codes = source.part(weight, (found.dtype,))
    if codes.regions[0].nbytes != -(-numel // (2 * codes.dtype.itemsize)) * codes.dtype.itemsize:
        raise Unfit(f"{codes.regions[0].nbytes} bytes for {numel} codes of 4 bit in {weight!r}")
    blocks = -(-numel // block)
    text, table = source.part(anchor, (torch.uint8,)), source.part(f"{weight}.quant_map", (torch.float32,), 16)
    parts = [codes, text, table]
    if "nested_offset" not in state:
        scales = source.part(f"{weight}.absmax", (torch.float32,), blocks)
        single = _flat(scales, size, block, 4)
        factor: Multiplier = Factor(single)
        zeros = [Zero(single)]
        parts.append(scales)
        decoder = LookedUp(codes, table, scales, block)
    else:
        offset, inner = state["nested_offset"], state.get("nested_blocksize")
        if type(offset) is not float or not math.isfinite(offset) or type(inner) is not int or inner < 1:
            raise Unfit(f"no finite nested_offset and nested_blocksize in {anchor!r}")
        scales = source.part(f"{weight}.nested_absmax", (torch.float32,), -(-blocks // inner))
        factor = Nested(Factor(_grid(scales, (Axis(0),))), text)
        zeros = []
        places = source.part(f"{weight}.absmax", (torch.uint8,), blocks)
        values = source.part(f"{weight}.nested_quant_map", (torch.float32,), 256)
        parts += [places, values, scales]
        decoder = LookedUp(codes, table, places, block, (values, scales, text))
    zero_code = {"nf4": 0x77, "fp4": 0x00}[kind]  # quant_map[7] = 0 twice, and quant_map[0] = 0
    zeros.append(Zero(_flat(codes, size, 2, 1), zero_code, (factor,)))
    encoding = f"bitsandbytes {kind}, blocks of {block}" + (", nested" if "nested_offset" in state else "")
    return Quantized(weight, size, encoding, tuple(parts), tuple(zeros), (factor,), decoder)


def _compressed(source: _Checkpoint, anchor: str, weight: str) -> Quantized:
    """The packed weights of compressed-tensors, integers or FP4."""
    packed = source.part(anchor, (torch.int32, torch.uint8))
    if packed.dtype == torch.int32:
        return _compressed_packed(source, packed, weight)
    rows, half = _matrix(packed)
    scales, shared = f"{weight}_scale", f"{weight}_global_scale"
    group = 16 if shared in source.tensors else 32
    if not any(each.get("num_bits") == 4 and each.get("group_size") == group for each in source.schemes("float")):
        raise Unfit(f"no group of 4 bit floats and {group} elements in the configuration")
    if group == 32:
        exponents = Exponents(_grid(source.part(scales, _E8M0, rows, half // 16), (Axis(0), Axis(1, 32))))
        return _mx("MXFP4", weight, (rows, 2 * half), packed, exponents, (Axis(0), Axis(1, 2)))
    return _nvfp4(source, weight, packed, scales, shared, is_divisor=True)


def _compressed_packed(source: _Checkpoint, packed: Elements, weight: str) -> Quantized:
    """(out, in * bits / 32) int32 codes, 2^(bits - 1) above the integer: ``(integer - zero) * scale``."""
    shape_of = source.part(f"{weight}_shape", (torch.int64, torch.int32))
    if shape_of.shape != (len(packed.shape),):
        raise Unfit(f"{list(shape_of.shape)} for {shape_of.name!r}")
    shape = tuple(shape_of.read(source.files).tolist())
    if shape[:-1] != packed.shape[:-1] or shape[-1] < 1 or len(shape) < 2:
        raise Unfit(f"{list(shape)} in {shape_of.name!r} for {list(packed.shape)} packed")
    scales = source.part(f"{weight}_scale", _FLOATS)
    fits: set[tuple[int, _Axes]] = set()
    for scheme in source.schemes("int"):
        bits = _integer(scheme, "num_bits", 1, 8)
        if -(-shape[-1] * bits // 32) == packed.shape[-1]:
            fits.update((bits, axes) for axes in _scheme_axes(scheme, shape, scales))
    bits, axes = _only(fits, scales)
    order, points = source.rest(f"{weight}_g_idx"), source.rest(f"{weight}_zero_point")
    if order:
        index = source.part(order[0].name, (torch.int32,), shape[-1])
        axes = tuple(Axis(axis.dim, axis.per, index, True) if axis.dim == len(shape) - 1 else axis for axis in axes)
    factor = Factor(_grid(scales, axes))
    zeros = [Zero(factor.grid)]
    if not points and 8 % bits == 0:
        byte = sum(1 << (first + bits - 1) for first in range(0, 8, bits))
        codes = Grid(packed, (*packed.shape[:-1], packed.shape[-1] * 4), 1, _rows(shape, 8 // bits))
        zeros.append(Zero(codes, byte, (factor,)))
    numbers = Packed(packed, bits, len(shape) - 1, shape[-1], bias=1 << (bits - 1))
    decoder = _counted(Spread(numbers, _rows(shape, 1)), factor, points, bits, shape)
    parts = (packed, shape_of, scales, *order, *points)
    return Quantized(weight, shape, f"compressed-tensors int{bits}, packed", parts, tuple(zeros), (factor,), decoder)


def _counted(codes: Spread, factor: Factor, points: tuple[Elements, ...], bits: int, shape: tuple[int, ...]) -> Decoder:
    """What integers of compressed-tensors stand for, that are counted from zero points if there are some."""
    if not points:
        return Scaled(codes, (factor,))
    (point,), scales = points, factor.grid.tensor
    if point.dtype == torch.int8 and point.shape == scales.shape:
        return Scaled(codes, (factor,), Spread(point, factor.grid.axes))
    dim = len(shape) - 2
    packed = (*shape[:dim], -(-shape[dim] * bits // 32), *scales.shape[dim + 1 :])
    if point.dtype == torch.int32 and point.shape == packed and len(point.pieces) == 1:
        numbers = Packed(point, bits, dim, shape[dim], bias=1 << (bits - 1))
        return Scaled(codes, (factor,), Spread(numbers, factor.grid.axes))
    return Undecoded(f"{list(point.shape)} of {point.encoding} for {point.name!r}")


def _compressed_int8(source: _Checkpoint, anchor: str, weight: str) -> Quantized:
    """Codes in int8: ``(code - zero) * scale``."""
    codes = source.part(anchor, (torch.int8,))
    if len(codes.shape) < 2:
        raise Unfit(f"the shape {list(codes.shape)} for {anchor!r}")
    scales = source.part(f"{weight}_scale", _FLOATS)
    fits = {axes for scheme in source.schemes("int") for axes in _scheme_axes(scheme, codes.shape, scales)}
    factor = Factor(_grid(scales, _only(fits, scales)))
    points = source.rest(f"{weight}_zero_point")
    zeros = [Zero(factor.grid)]
    if not points:
        zeros.append(Zero(_grid(codes, _rows(codes.shape, 1)), beside=(factor,)))
    decoder = _counted(Spread(codes, _rows(codes.shape, 1)), factor, points, 8, codes.shape)
    parts = (codes, scales, *points)
    return Quantized(weight, codes.shape, "compressed-tensors int8", parts, tuple(zeros), (factor,), decoder)


def _fp8(source: _Checkpoint, anchor: str, weight: str) -> Quantized:
    """Codes in FP8: ``code * scale``, also where the scale is called ``scale_inv``."""
    codes = source.part(anchor, _FP8)
    if not 2 <= len(codes.shape) <= 3:
        raise Unfit(f"the shape {list(codes.shape)} for {anchor!r}")
    names = [f"{weight}_scale", f"{weight}_scale_inv"]
    if source.method == "fp8" and weight.endswith(".weight"):
        names += [weight.removesuffix("weight") + other for other in ("scale", "qscale_weight")]
    there = [name for name in names if name in source.tensors]
    if len(there) != 1:
        raise Unfit(source.unknown(anchor) if not there else f"several scales, {', '.join(there)}")
    scales = source.part(there[0], (*_FLOATS, *_E8M0))
    if source.method == "compressed-tensors":
        fits = {axes for scheme in source.schemes("float") for axes in _scheme_axes(scheme, codes.shape, scales)}
        axes = _only(fits, scales)
    else:
        axes = _only(_scale_axes(codes.shape, scales.shape, _sizes(source.settings, "weight_block_size")), scales)
    grid = _grid(scales, axes)
    is_power = source.settings.get("scale_fmt") == "ue8m0"
    factor = Exponents(grid) if scales.dtype in _E8M0 else Factor(grid, is_power=is_power)
    rows = _rows(codes.shape, 1)
    zero = Zero(_grid(codes, rows), beside=(factor,))
    blocks = " x ".join(str(axis.per) for axis in axes if axis.dim is not None and axis.per > 1)
    encoding = f"FP8 {codes.encoding.removeprefix('float8_')}" + (f", blocks of {blocks}" if blocks else "")
    decoder = Scaled(Spread(codes, rows), (factor,))
    return Quantized(weight, codes.shape, encoding, (codes, scales), (zero,), (factor,), decoder)


def _modelopt_nvfp4(source: _Checkpoint, anchor: str, weight: str) -> Quantized:
    packed = source.part(anchor, (torch.uint8,))
    return _nvfp4(source, weight, packed, f"{weight}_scale", f"{weight}_scale_2", is_divisor=False)


def _nvfp4(
    source: _Checkpoint, weight: str, packed: Elements, scales_name: str, shared_name: str, *, is_divisor: bool
) -> Quantized:
    """Two FP4 codes to a byte: ``code * scale * shared``, a scale in FP8 for 16 of them, ``shared`` for all."""
    if not 2 <= len(packed.shape) <= 3:
        raise Unfit(f"the shape {list(packed.shape)} for {packed.name!r}")
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    if shape[-1] % 16:
        raise Unfit(f"{shape[-1]} columns in {packed.name!r}, no multiple of 16")
    scales = source.part(scales_name, (torch.float8_e4m3fn,), *shape[:-1], shape[-1] // 16)
    shared = source.part(shared_name, (torch.float32,))
    if math.prod(shared.shape) != 1:
        raise Unfit(f"{list(shared.shape)} for {shared_name!r}, not one number")
    whole = Factor(_grid(shared, (Axis(),) * len(shared.shape)), is_divisor)
    local = Factor(_grid(scales, _rows(shape, 16)))
    zeros = (Zero(local.grid, beside=(whole,)), Zero(_grid(packed, _rows(shape, 2)), beside=(whole, local)))
    decoder = Scaled(Spread(Fp4(packed), _rows(shape, 1)), (local, whole))
    return Quantized(weight, shape, "NVFP4", (packed, scales, shared), zeros, (whole, local), decoder)


def _mxfp4_experts(source: _Checkpoint, anchor: str, weight: str) -> Quantized:
    """(experts, out, groups, 16) bytes of two FP4 codes, a power of two per group; loaded as (experts, in, out)."""
    blocks = source.part(anchor, (torch.uint8,))
    if len(blocks.shape) != 4 or blocks.shape[-1] != 16:
        raise Unfit(f"the shape {list(blocks.shape)} for {anchor!r}")
    experts, rows, groups, _ = blocks.shape
    scales = source.part(f"{weight}_scales", _E8M0, experts, rows, groups)
    exponents = Exponents(_grid(scales, (Axis(0), Axis(2), Axis(1, 32))))
    return _mx("MXFP4", weight, (experts, groups * 32, rows), blocks, exponents, (Axis(0), Axis(2), Axis(1, 2)))


def _mx(
    encoding: str, weight: str, shape: tuple[int, ...], codes: Elements, exponents: Exponents, axes: _Axes
) -> Quantized:
    """A weight whose scales have no zero: its codes are made zero."""
    sizes = (*codes.shape[: len(axes) - 1], math.prod(codes.shape[len(axes) - 1 :]))
    zero = Zero(Grid(codes, sizes, 1, axes), beside=(exponents,))
    decoder = Scaled(Spread(Fp4(codes), tuple(Axis(axis.dim) for axis in axes)), (exponents,))
    return Quantized(weight, shape, encoding, (codes, exponents.grid.tensor), (zero,), (exponents,), decoder)


_MODELOPT = ("modelopt", "modelopt_fp4")
_SUFFIXES: tuple[tuple[str, str, str, _Builders], ...] = (  # of the anchor, of what must be beside it, of the weight
    (".qweight", ".scales", ".weight", {"gptq": _gptq, "awq": _awq}),
    (".weight_packed", ".weight_scale", ".weight", {"compressed-tensors": _compressed}),
    (".quant_state.bitsandbytes__nf4", ".absmax", "", {"bitsandbytes": _bitsandbytes_4bit}),
    (".quant_state.bitsandbytes__fp4", ".absmax", "", {"bitsandbytes": _bitsandbytes_4bit}),
    ("_blocks", "_scales", "", {"mxfp4": _mxfp4_experts}),
)
_INT8: _Builders = {"bitsandbytes": _bitsandbytes_int8, "compressed-tensors": _compressed_int8}
_UINT8: _Builders = dict.fromkeys(_MODELOPT, _modelopt_nvfp4)
_FP8_WEIGHT: _Builders = dict.fromkeys(("fp8", "fbgemm_fp8", "compressed-tensors", *_MODELOPT), _fp8)


# ---- grids -----------------------------------------------------------------------------------------------------------


def _matrix(tensor: Elements) -> tuple[int, int]:
    if len(tensor.shape) != 2:
        raise Unfit(f"the shape {list(tensor.shape)} for {tensor.name!r}")
    return tensor.shape[0], tensor.shape[1]


def _grid(tensor: Elements, axes: _Axes) -> Grid:
    """A tensor each of whose elements is a cell."""
    return Grid(tensor, tensor.shape, tensor.dtype.itemsize, axes)


def _rows(shape: tuple[int, ...], per: int) -> _Axes:
    """Cells of ``per`` elements of a row, in rows like those of the weight."""
    return (*(Axis(dim) for dim in range(len(shape) - 1)), Axis(len(shape) - 1, per))


def _flat(tensor: Elements, shape: tuple[int, ...], per: int, itemsize: int) -> Grid:
    """Cells of ``per`` elements of a weight whose rows follow each other."""
    last = len(shape)
    while last > 1 and per % shape[last - 1] == 0:  # a cell takes whole rows
        last -= 1
        per //= shape[last]
    if last > 1 and shape[last - 1] % per:  # some cells reach from one row into the next
        cells = -(-math.prod(shape[:last]) // per)
        return Grid(tensor, (cells,), itemsize, (Axis(),))
    sizes = (*shape[: last - 1], -(-shape[last - 1] // per))
    return Grid(tensor, sizes, itemsize, _rows(shape[:last], per))


def _scale_axes(shape: tuple[int, ...], scales: tuple[int, ...], blocks: tuple[int, ...]) -> set[_Axes]:
    """What lies under the scales of a weight, if they have a shape that says it, else nothing.

    Args:
        shape: of the weight.
        scales: shape of its scales.
        blocks: how many elements share a scale along the last dimensions, by the configuration.
    """
    if math.prod(scales) == 1:
        return {(Axis(),) * len(scales)}
    if scales == shape[:1]:
        return {(Axis(0),)}
    if len(scales) != len(shape):
        return set()
    axes = []
    for dim, (size, cells) in enumerate(zip(shape, scales, strict=True)):
        place = dim - len(shape) + len(blocks)
        block = blocks[place] if place >= 0 else size if cells == 1 else 1
        if cells != -(-size // block):
            return set()
        axes.append(Axis() if cells == 1 else Axis(dim, block))
    return {tuple(axes)}


def _scheme_axes(scheme: Mapping[str, Any], shape: tuple[int, ...], scales: Elements) -> set[_Axes]:
    """The same by a scheme of compressed-tensors."""
    strategy = scheme.get("strategy")
    blocks = _sizes(scheme, "block_structure") if strategy == "block" else ()
    if strategy in ("group", "tensor_group"):
        blocks = (_integer(scheme, "group_size", 1, 1 << 31),)
    return _scale_axes(shape, scales.shape, blocks)


def _only(fits: set[_Fit], scales: Elements) -> _Fit:
    if len(fits) != 1:
        what = "several groups" if fits else "no group"
        raise Unfit(f"{what} of the configuration that {list(scales.shape)} of {scales.name!r} fits")
    return next(iter(fits))


# ---- the configuration -----------------------------------------------------------------------------------------------


def _settings(config: Mapping[str, Any] | None) -> tuple[str, Mapping[str, Any]]:
    """The method and all of ``quantization_config``, also where it is that of a model's text part."""
    content = config or {}
    if content.get("quantization_config") is None and isinstance(content.get("text_config"), Mapping):
        content = content["text_config"]
    found = _mapping(content, "quantization_config")
    by_flags = "bitsandbytes" if found.get("load_in_8bit") or found.get("load_in_4bit") else ""
    method = found.get("quant_method", by_flags)
    if not isinstance(method, str):
        raise _malformed("the name of a method", "quant_method", method)
    return method, found


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise _malformed("an object", key, found)
    return found


def _integer(content: Mapping[str, Any], key: str, low: int, high: int, default: int | None = None) -> int:
    found = content.get(key, default)
    if type(found) is not int or not low <= found <= high:
        raise _malformed(f"an integer from {low} to {high}", key, found)
    return found


def _sizes(content: Mapping[str, Any], key: str) -> tuple[int, ...]:
    found = content.get(key)
    if found is None:
        return ()
    if not isinstance(found, list) or len(found) != 2 or not all(type(size) is int and size > 0 for size in found):
        raise _malformed("two integers above 0", key, found)
    return tuple(found)


def _malformed(expected: str, key: str, found: object) -> NeutralizeError:
    return NeutralizeError(
        f"checkpoint: expected {expected} for {key} in quantization_config, got {repr(found)[:80]}; its config.json is "
        "malformed: fetch it again"
    )
