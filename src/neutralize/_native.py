"""Load the native parts, say which ones are there and why others are not, and make sure that the ops exist.

Importing this module defines ``torch.ops.neutralize.*`` in every kind of install: by the C++ library where it was
built, otherwise by the reference in plain torch. It never initialises CUDA: loading ``_cuda`` registers kernels and no
more.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from neutralize import reference

_HERE = Path(__file__).resolve().parent


def _read_record() -> dict[str, Any]:
    """Return what setup.py wrote down, or an empty record where the package was not installed by it."""
    try:
        record: dict[str, Any] = json.loads((_HERE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record


def _load_native() -> tuple[ModuleType | None, str]:
    """Return the pybind11 module and why it is or is not there."""
    built = any((_HERE / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
    if not built:
        return None, _RECORD.get("native_reason") or "the native extension was not built"
    try:
        return importlib.import_module("neutralize._C"), "loaded"
    except ImportError as error:
        return None, f"the native extension is there but does not load: {error}"


def _load_cuda() -> tuple[bool, str]:
    """Load the CUDA kernels where torch has CUDA; return whether they are there and why."""
    built = [_HERE / f"_cuda{suffix}" for suffix in EXTENSION_SUFFIXES if (_HERE / f"_cuda{suffix}").exists()]
    if not built:
        return False, _RECORD.get("cuda_reason") or "the CUDA part was not built"
    if _C is None:
        return False, "the CUDA part needs the native extension, which is not loaded"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} has no CUDA"
    try:
        torch.ops.load_library(built[0])
    except OSError as error:
        return False, f"the CUDA part is there but does not load: {error}"
    return True, "loaded"


_RECORD = _read_record()
_C, _C_REASON = _load_native()
_CUDA, _CUDA_REASON = _load_cuda()

_library = torch.library.Library("neutralize", "FRAGMENT")
if _C is None:
    _library.define(
        "rewrite_(Tensor(a!)[] tensors, float[] scale, float[] diagonal, float[] fill, int[] start, int[] step) -> ()"
    )
    _library.define("rescale_fold_(Tensor(a!)[] weights, Tensor(b!)[] biases, float[] scale, float[] shift) -> ()")

    def _check_count(op: str, parameter: str, values: Sequence[float], tensors: Sequence[torch.Tensor]) -> None:
        if len(values) not in (1, len(tensors)):
            raise RuntimeError(
                f"{op}: expected 1 or {len(tensors)} numbers for {parameter}, got {len(values)}; "
                "pass one for all tensors or one for each"
            )

    def _rewrite_fake(
        tensors: Sequence[torch.Tensor],
        scale: Sequence[float],
        diagonal: Sequence[float],
        fill: Sequence[float],
        start: Sequence[int],
        step: Sequence[int],
    ) -> None:
        for parameter, values in zip(
            ("scale", "diagonal", "fill", "start", "step"), (scale, diagonal, fill, start, step), strict=True
        ):
            _check_count("rewrite_", parameter, values, tensors)

    def _rescale_fold_fake(
        weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], scale: Sequence[float], shift: Sequence[float]
    ) -> None:
        if len(biases) != len(weights):
            raise RuntimeError(
                f"rescale_fold_: expected {len(weights)} tensors for biases, one per weight, got {len(biases)}; "
                "pair them up"
            )
        _check_count("rescale_fold_", "scale", scale, weights)
        _check_count("rescale_fold_", "shift", shift, weights)

    torch.library.register_fake("neutralize::rewrite_", _rewrite_fake, lib=_library)
    torch.library.register_fake("neutralize::rescale_fold_", _rescale_fold_fake, lib=_library)


def _check_fallback(op: str, *lists: Sequence[torch.Tensor]) -> None:
    """Refuse what the dispatcher sends here for want of better: lists on mixed devices, sparse tensors and the like."""
    tensors = [tensor for group in lists for tensor in group]
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device != tensors[0].device:
            raise RuntimeError(
                f"{op}: expected dense tensors on one device, got {tensors[0].device} with {tensor.device} "
                f"({tensor.layout}); call once per device, or use neutralize.ops, which does"
            )


def _rewrite_fallback(
    tensors: Sequence[torch.Tensor],
    scale: Sequence[float],
    diagonal: Sequence[float],
    fill: Sequence[float],
    start: Sequence[int],
    step: Sequence[int],
) -> None:
    _check_fallback("rewrite_", tensors)
    reference.rewrite_(tensors, scale, diagonal, fill, start, step)


def _rescale_fold_fallback(
    weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], scale: Sequence[float], shift: Sequence[float]
) -> None:
    _check_fallback("rescale_fold_", weights, biases)
    reference.rescale_fold_(weights, biases, scale, shift)


# Every device without kernels of its own.
_library.impl("rewrite_", _rewrite_fallback, "CompositeExplicitAutograd")
_library.impl("rescale_fold_", _rescale_fold_fallback, "CompositeExplicitAutograd")


def _load_direct() -> Callable[..., bool]:
    """Return ``rewrite_`` past the dispatcher, for plain CPU tensors; it says False to all where it cannot be had."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if _C is None or exchange is None or not _C.use_exchange_api(exchange):
        return lambda *_: False
    direct: Callable[..., bool] = _C.rewrite_direct
    return direct


rewrite_direct = _load_direct()
"""``rewrite_`` on a list of CPU tensors, past the dispatcher; False, and nothing written, where it cannot judge."""

DEVICE_TYPES = frozenset((["cpu"] if _C is not None else []) + (["cuda"] if _CUDA else []))
"""The device types whose tensors native kernels rewrite."""


def cpu_isas() -> list[str]:
    """Return the instruction sets this machine could use, best first; empty without the native extension."""
    return list(_C.build_info()["cpu_isas_usable"]) if _C is not None else []


def use_cpu_isa(name: str) -> None:
    """Use the CPU kernels of another instruction set, or ``"auto"`` for the best; for tests and measurements.

    Raises:
        ValueError: this build or machine has no such kernels.
    """
    if _C is None:
        raise ValueError(f"cpu: expected the native extension for {name}, got none; {_C_REASON}")
    _C.use_cpu_isa(name)


def build_info() -> dict[str, Any]:
    """Return what this install holds and uses, in plain types.

    Returns:
        ``native`` and ``cuda`` (``built``, ``loaded``, ``reason``), the CPU instruction sets compiled, usable and in
        use, the CUDA architectures, and the versions of torch, the ABI target and the compilers that it was built with.
    """
    compiled: dict[str, Any] = _C.build_info() if _C is not None else {}
    return {
        "native": {
            "built": any((_HERE / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES),
            "loaded": _C is not None,
            "reason": _C_REASON,
        },
        "cpu": {
            "isas_compiled": compiled.get("cpu_isas_compiled", []),
            "isas_usable": compiled.get("cpu_isas_usable", []),
            "isa": _C.cpu_isa() if _C is not None else None,
            "last_level_cache_bytes": compiled.get("last_level_cache_bytes"),
        },
        "cuda": {
            "built": any((_HERE / f"_cuda{suffix}").exists() for suffix in EXTENSION_SUFFIXES),
            "loaded": _CUDA,
            "reason": _CUDA_REASON,
            "archs": list(_RECORD.get("cuda_archs", [])),
        },
        "built_with": {
            "torch": _RECORD.get("torch") or compiled.get("built_with_torch"),
            "abi_target": compiled.get("abi_target"),
            "compiler": _RECORD.get("cxx") or compiled.get("compiler"),
            "nvcc": _RECORD.get("nvcc"),
            "debug": bool(_RECORD.get("debug", False)),
        },
    }
