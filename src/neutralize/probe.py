"""One run of a network, and what hooks saw in it: what entered and left its layers, and the gradients there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from neutralize.dataflow import copied, first_tensor, replace_first_tensor, tensors_in
from neutralize.deviation import per_value
from neutralize.oracle import Followers, HandedOn, is_plain, stacked
from neutralize.plan import Plan
from neutralize.stacked import place_of, run_by_layer

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""


@dataclass
class Probe:
    """What hooks saw in one run: first tensors entering and leaving modules, and gradients at the layers' inputs."""

    entering: dict[str, torch.Tensor] = field(default_factory=dict)
    leaving: dict[str, torch.Tensor] = field(default_factory=dict)
    handed_on: dict[str, HandedOn] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)


def run_watched(
    model: nn.Module, modules: Mapping[str, nn.Module], plan: Plan, inputs: Call, *, watch: bool, differentiate: bool
) -> tuple[list[torch.Tensor], Probe]:
    """Run the model once, in the same random state each time, and differentiate the loss where the model allows it."""
    try:
        return _run_once(model, modules, plan, inputs, watch=watch, differentiate=differentiate)
    except RuntimeError:  # an op without a derivative, or one that overwrites what its derivative needs
        if not differentiate:
            raise
        return _run_once(model, modules, plan, inputs, watch=watch, differentiate=False)


def _run_once(
    model: nn.Module, modules: Mapping[str, nn.Module], plan: Plan, inputs: Call, *, watch: bool, differentiate: bool
) -> tuple[list[torch.Tensor], Probe]:
    probe = Probe()
    nudges: dict[str, torch.Tensor] = {}
    watched = dict.fromkeys(name for entry in plan.layers for name in (entry.layer, *entry.consumers))

    def enter(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            tensor = first_tensor((args, kwargs))
            if tensor is None or name in probe.entering:
                return None
            probe.entering[name] = tensor.detach().clone()
            if not differentiate or not tensor.is_floating_point() or name not in layers:
                return None
            # Zeros that are added: the gradient that reaches them is the gradient that reaches the layer.
            nudges[name] = torch.zeros_like(tensor, requires_grad=True)
            return replace_first_tensor((args, kwargs), torch.where(nudges[name] == 0, tensor + nudges[name], tensor))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None and name not in probe.leaving:
                probe.leaving[name] = tensor.detach().clone()
                if name in layers and name in probe.entering and is_plain(module):
                    followers.watch(name, tensor, probe.entering[name])

        return hook

    def leave_stacked(places: dict[int, str]) -> Callable[..., None]:
        def note(place: int, entering: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
            if place in places and places[place] not in probe.entering:
                probe.entering[places[place]] = entering.detach().clone()
                probe.leaving[places[place]] = leaving.detach().clone()
            return leaving

        def hook(module: nn.RNNBase, args: Any, kwargs: Any, output: Any) -> None:
            with torch.no_grad():
                run_by_layer(module, args, kwargs, note)

        return hook

    layers = {entry.layer for entry in plan.layers}
    followers = Followers()
    with ExitStack() as stack, torch.random.fork_rng(), torch.set_grad_enabled(differentiate):
        torch.manual_seed(0)
        for recurrent, places in stacked({name: modules[name] for name in watched}):
            stack.callback(recurrent.register_forward_hook(leave_stacked(places), with_kwargs=True).remove)
        for name in (name for name in watched if place_of(name, modules[name]) is None):
            stack.callback(modules[name].register_forward_pre_hook(enter(name), with_kwargs=True).remove)
            stack.callback(modules[name].register_forward_hook(leave(name)).remove)
        # The caller's inputs are kept from in-place ops of the model.
        args, kwargs = pytree.tree_map(copied, inputs)
        with followers if watch else nullcontext():
            outputs = list(tensors_in(model(*args, **kwargs)))
        probe.handed_on = followers.handed_on
        found = _gradients(outputs, nudges) if differentiate else {}
        for name in nudges if differentiate else layers:
            gradient = found.get(name)
            if gradient is not None:
                gradient = per_value(name, plan, gradient.double()) if watch else gradient.double()
            probe.gradients[name] = (0.0 if gradient is None else float(gradient.norm())) if differentiate else math.nan
    return [output.detach() for output in outputs], probe


def _gradients(outputs: list[torch.Tensor], nudges: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """The gradient that reaches each layer's input; ``None`` where there is none."""
    parts = [
        output.double().square().mean() for output in outputs if output.is_floating_point() and output.requires_grad
    ]
    if not parts or not nudges:
        return dict.fromkeys(nudges)
    found = torch.autograd.grad(
        torch.stack([part.cpu() for part in parts]).sum(), list(nudges.values()), allow_unused=True
    )
    return dict(zip(nudges, found, strict=True))
