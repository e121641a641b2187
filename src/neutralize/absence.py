"""The network without some parts of its layers, made by other means than the edits that ``verify`` compares with it.

Heads: what their projection reads is zero in their features, put there as the product is computed. Channels: the
layer's output is zero there. Experts: all their weights are zero, not only the last ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from neutralize.errors import NeutralizeError
from neutralize.parts import owner_of, part_of
from neutralize.plan import LayerPlan, Plan, Rewrite
from neutralize.unread import Unread

_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"))


@contextmanager
def without_parts(model: nn.Module, plan: Plan) -> Iterator[None]:
    """The network that the parts of a plan are off (or damped) in, for the length of a ``with`` block.

    Raises:
        NeutralizeError: no product with the projection of heads was seen in the forward pass.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    masks: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for entry in plan.layers:
            part = None if entry.layer in modules else part_of(entry.layer)
            if part is None or owner_of(part, modules) not in modules:
                continue
            edits = [edit for edit in (plan.edits[place] for place in entry.edits) if isinstance(edit, Rewrite)]
            owner = modules[owner_of(part, modules)]
            if part.kind == "channels":
                stack.callback(owner.register_forward_hook(_channel_hook(entry, edits)).remove)
            elif part.kind == "experts":
                stack.enter_context(_zeroed(owner, edits))
            else:
                for edit in edits:
                    mask = masks.setdefault(edit.parameter, torch.ones(edit.extent[1 if edit.columns else 0]))
                    mask[slice(*(edit.columns or edit.rows or (None,)))] = _factor(entry)
        if not masks:
            yield
            return
        parameters = dict(model.named_parameters(remove_duplicate=False))
        watch = _Features({parameters[name]: mask for name, mask in masks.items()})
        with watch:
            yield
    if not watch.seen:
        raise NeutralizeError(
            f"verify: expected a product with {', '.join(map(repr, masks))} in the forward pass, got none; pass inputs "
            "that reach it"
        )


def _place(weight: torch.Tensor) -> tuple[int, int]:
    """Where a tensor lies: its transpose lies there too."""
    return weight.untyped_storage().data_ptr(), int(weight.storage_offset())


def _factor(entry: LayerPlan) -> float:
    return 0.0 if entry.target == "null" else entry.gain


class _Features(TorchDispatchMode):
    """Multiplies features of what certain weights are multiplied with."""

    def __init__(self, masks: Mapping[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._masks = dict(masks)
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in _PRODUCTS:
            args = tuple(part.read() if isinstance(part, Unread) else part for part in args)
            tensors = [part for part in args if isinstance(part, torch.Tensor)]
            factors = tensors[:2] if func._schema.name == "aten::linear" else tensors[-2:]
            for weight in factors:
                mask = self._of(weight)
                if mask is None:
                    continue
                data = next(part for part in factors if part is not weight)
                if data.shape[-1] == mask.numel():
                    self.seen = True
                    masked = data * mask.to(data)
                    args = tuple(masked if part is data else part for part in args)
        return func(*args, **(kwargs or {}))

    def _of(self, factor: torch.Tensor) -> torch.Tensor | None:
        """The mask for what a factor of a product is multiplied with, if it is one of the weights."""
        for weight, mask in self._masks.items():
            held = weight.held() if isinstance(weight, Unread) else weight
            if held is not None and _place(held) == _place(factor):
                return mask
        return None


def _channel_hook(entry: LayerPlan, edits: list[Rewrite]) -> Any:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        dim = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
        if isinstance(module, nn.modules.conv._ConvNd) and output.dim() < module.weight.dim():
            dim = 0  # no batch
        mask = torch.ones(output.shape[dim], dtype=output.dtype, device=output.device)
        for edit in edits:
            if len(edit.shape) < 2:
                continue
            taps = edit.extent[1] // edit.shape[1] if edit.columns else 1
            first, last = edit.columns or edit.rows or (0, len(mask))
            mask[first // taps : last // taps] = _factor(entry)
        shape = [1] * output.dim()
        shape[dim] = -1
        return output * mask.reshape(shape)

    return hook


@contextmanager
def _zeroed(owner: nn.Module, edits: list[Rewrite]) -> Iterator[None]:
    """All of an expert's weights zero: every parameter of the module with a slice per expert."""
    count = edits[0].extent[0]
    fused = [
        (module._parameters, name, parameter)
        for module in owner.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() >= 2 and parameter.shape[0] == count
    ]
    in_memory = [parameter for _, _, parameter in fused if not isinstance(parameter, Unread)]
    before = [parameter.detach().clone() for parameter in in_memory]

    def zero(weight: torch.Tensor) -> None:
        for edit in edits:
            weight[slice(*(edit.rows or (None,)))] = 0

    try:
        with torch.no_grad():
            for parameters, name, parameter in fused:
                if isinstance(parameter, Unread):
                    parameters[name] = parameter.changed(zero)  # type: ignore[assignment]
                else:
                    zero(parameter)
        yield
    finally:
        for parameters, name, parameter in fused:
            parameters[name] = parameter
        with torch.no_grad():
            for parameter, old in zip(in_memory, before, strict=True):
                parameter.copy_(old)
