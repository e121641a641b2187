"""Offloaded models: where the weights of a model really are that accelerate has dispatched.

A module whose weights accelerate keeps elsewhere has meta parameters and a hook with a map of weights: to tensors on
the CPU, or to files of an offload folder. Both are edited in place there; the hook hands the new values on at the next
call.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neutralize.distributed.part import is_dtensor

_MAPPED: weakref.WeakValueDictionary[tuple[Any, ...], torch.Tensor] = weakref.WeakValueDictionary()
"""Files that are mapped at the moment: one tensor per file, so that applications and their undos meet in it."""


def offloaded(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Find the weights that accelerate keeps elsewhere than in the model.

    Args:
        model: any model; one without such hooks has none.

    Returns:
        By qualified name the tensor that holds the elements, in memory or mapped onto its file; and for those that
        cannot be written the reason.
    """
    found: dict[str, torch.Tensor] = {}
    refused: dict[str, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for hook in _offloading(module):
            for name, tensor in _own(module, hook):
                full = f"{prefix}.{name}".lstrip(".")
                held = _held(hook.weights_map, name)
                if isinstance(held, str):
                    refused[full] = f"expected {full!r} to be in memory or in an offload folder, got {held}"
                elif held is not None and held.shape == tensor.shape:
                    found[full] = held
    return found, refused


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Let an offloaded model stand as a meta model, so that it can be traced; any other model is left as it is."""
    modules = [module for module in model.modules() if "_hf_hook" in vars(module)]
    if not any(True for module in modules for _ in _offloading(module)):
        yield
        return
    forwards = [(module, module.forward) for module in modules if hasattr(module, "_old_forward")]
    try:
        for module, _ in forwards:
            module.forward = module._old_forward  # type: ignore[assignment]
        with on_meta(model):
            yield
    finally:
        for module, forward in forwards:
            module.forward = forward


@contextmanager
def on_meta(model: nn.Module) -> Iterator[None]:
    """Let meta tensors of the same shapes stand for the tensors of a model: of the whole shape, where it is sharded."""
    tensors = [
        (held, name, tensor)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None and not (tensor.is_meta and not is_dtensor(tensor))
    ]
    stand_ins = {id(tensor): _stand_in(tensor) for _, _, tensor in tensors}
    try:
        for held, name, tensor in tensors:
            held[name] = stand_ins[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for held, name, tensor in tensors:
            held[name] = tensor  # type: ignore[assignment]


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    if is_dtensor(tensor):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    else:
        empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _offloading(module: nn.Module) -> Iterator[Any]:
    """The hooks of a module that keep its weights elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):  # a sequence of hooks, or one
        if getattr(part, "offload", False) is True and getattr(part, "weights_map", None) is not None:
            yield part


def _own(module: nn.Module, hook: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a module that its hook brings for a call and takes away again."""
    deep = bool(getattr(hook, "place_submodules", False))
    yield from ((name, tensor) for name, tensor in module.named_parameters(recurse=deep) if tensor.is_meta)
    yield from ((name, tensor) for name, tensor in module.named_buffers(recurse=deep) if tensor.is_meta)


def _held(weights: Any, name: str) -> torch.Tensor | str | None:
    """What a map of weights gives for a name: the tensor itself, or why there is none that could be written."""
    if hasattr(weights, "dataset") and hasattr(weights, "prefix"):
        return _held(weights.dataset, f"{weights.prefix}{name}")
    if not (hasattr(weights, "state_dict") and hasattr(weights, "index")):
        tensor = weights.get(name) if isinstance(weights, dict) else None
        return tensor if isinstance(tensor, torch.Tensor) else f"a {type(weights).__name__}; load it without offload"
    if name in weights.state_dict:
        tensor = weights.state_dict[name]
        return tensor if isinstance(tensor, torch.Tensor) else None
    about = weights.index.get(name)
    if about is None:
        return None
    if about.get("safetensors_file") is not None:
        return (
            f"the checkpoint {str(about['safetensors_file'])!r} itself, which others may read; edit the checkpoint, or "
            "offload a copy (accelerate.disk_offload)"
        )
    return _mapped(Path(weights.save_folder) / f"{name}.dat", about)


def _mapped(path: Path, about: Any) -> torch.Tensor | str:
    """A file of an offload folder as a tensor: what is written into it is written into the file."""
    dtype, shape = getattr(torch, str(about["dtype"]), None), tuple(about["shape"])
    if not isinstance(dtype, torch.dtype):
        return f"dtype {about['dtype']!r}; offload it again"
    size = math.prod(shape) * dtype.itemsize
    try:
        status = path.stat()
    except OSError as error:
        return f"no file {str(path)!r} ({error.strerror}); offload it again"
    if status.st_size != size:
        return f"{status.st_size} bytes instead of {size} in {str(path)!r}; offload it again"
    key = (str(path.resolve()), status.st_ino, dtype, shape)
    tensor = _MAPPED.get(key)
    if tensor is None:
        content = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        tensor = _MAPPED[key] = content.view(dtype).view(shape)
    return tensor
