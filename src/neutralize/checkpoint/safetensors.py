"""Read where the tensors of a ``.safetensors`` file lie, trusting nothing that it says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from neutralize.checkpoint.headers import MARK, Header, broken, read_header
from neutralize.checkpoint.layout import Elements, Layout, Listed, Stored
from neutralize.checkpoint.region import Region

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Those that are less than a byte, in bits: known, and never written as elements."""

_REMEDY = "edit the norm before it, or dequantize it first"


def read_safetensors(path: Path) -> Layout:
    """Return the layout of one file.

    Args:
        path: the file; the layout's root is its folder.

    Raises:
        NeutralizeError: it cannot be read, or is no whole and consistent safetensors file.
    """
    header = read_header(path)
    tensors = _tensors(path, header)
    return Layout(path.parent, (path.name,), tensors, {path.name: (0, MARK)}, "safetensors")


def _tensors(path: Path, header: Header) -> dict[str, Stored]:
    found: list[tuple[int, int, str, Stored]] = []
    for name, entry in header.entries.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise broken(path, "something else", "a table of strings as metadata")
            continue
        stored, first, last = _tensor(path, name, entry, header.begin)
        found.append((first, last, name, stored))
    found.sort(key=lambda entry: entry[:2])
    place = 0
    for first, last, name, _ in found:
        if first != place:
            what = "overlap" if first < place else "leave a hole"
            raise broken(path, f"tensors that {what} at {name[:200]!r}", f"one after the other from {place}")
        place = last
    if header.begin + place != header.size:
        raise broken(path, f"tensors up to byte {header.begin + place}", f"{header.size} bytes")
    return {name: stored for _, _, name, stored in found}


def _tensor(path: Path, name: str, entry: Any, begin: int) -> tuple[Stored, int, int]:
    shown = repr(name[:200])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise broken(path, f"an entry for {shown} that is none", "dtype, shape and data_offsets")
    shape, offsets, kind = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not _is_list_of_sizes(shape) or len(shape) > 64 or not _is_list_of_sizes(offsets) or len(offsets) != 2:
        raise broken(path, f"a shape or offsets of {shown} that are none", "lists of sizes")
    if not isinstance(kind, str) or (kind not in _DTYPES and kind not in _BITS):
        raise broken(path, f"the dtype {str(kind)[:40]!r} for {shown}", f"one of {', '.join([*_DTYPES, *_BITS])}")
    first, last = offsets
    bits = _BITS.get(kind) or _DTYPES[kind].itemsize * 8
    # The product is taken of small numbers only: 64 sizes of 64 bits each are at most 4096 bits.
    if last < first or math.prod(shape) * bits != (last - first) * 8:
        raise broken(path, f"{last - first} bytes for {shown}", f"{shape} of {kind}")
    if kind in _BITS:
        return (
            Listed(name, kind, _REMEDY, tuple(shape), (Region.run(path.name, begin + first, last - first),)),
            first,
            last,
        )
    return Elements.whole(name, _DTYPES[kind], shape, path.name, begin + first), first, last


def _is_list_of_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)
