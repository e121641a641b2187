"""Models that torch's parallelism has wrapped: their shards in place, and the whole model that they stand for."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from neutralize.distributed.part import is_dtensor
from neutralize.offload import on_meta

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def resharded(model: nn.Module) -> None:
    """Let FSDP2 put its shards in place, where it keeps whole parameters between a forward pass and the next."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def note_written(model: nn.Module, tensors: Iterable[torch.Tensor]) -> None:
    """Let a backward pass fail that FSDP2 would gather written shards for: its forward pass has seen the old ones.

    Args:
        model: the model.
        tensors: its sharded parameters that were written.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    written = {id(tensor) for tensor in tensors}
    for module in model.modules():
        group = getattr(module._get_fsdp_state(), "_fsdp_param_group", None) if isinstance(module, FSDPModule) else None
        for parameter in getattr(group, "fsdp_params", ()):
            whole = getattr(parameter, "_unsharded_param", None)  # FSDP2 fills it and keeps its version
            if whole is not None and not whole.is_inference() and id(parameter.sharded_param) in written:
                torch.autograd.graph.increment_version(whole)


@contextmanager
def as_whole(model: nn.Module) -> Iterator[None]:
    """Let a sharded model stand as the whole model on the meta device, so that it can be planned for.

    The hooks with which FSDP2 and tensor parallelism gather parameters and hand activations on are left out meanwhile.
    A model without DTensors is left as it is.
    """
    resharded(model)
    if not any(is_dtensor(tensor) for tensor in (*model.parameters(), *model.buffers())):
        yield
        return
    hooks = [(module, name, getattr(module, name)) for module in model.modules() for name in _HOOKS]
    try:
        for module, name, found in hooks:
            kept = OrderedDict((key, hook) for key, hook in found.items() if not _is_of_torch(hook))
            setattr(module, name, kept)
        with on_meta(model):
            yield
    finally:
        for module, name, found in hooks:
            setattr(module, name, found)


def _is_of_torch(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")
