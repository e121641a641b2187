"""The stacked layers of an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``: their names, and the module run layer by layer.

They are no modules, only parameters ``weight_ih_l0``, ``weight_ih_l1`` and so on of one. A selection names them by
index, ``"encoder.rnn[1]"``, as it names the layers of a ``ModuleList``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

HandOn: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]

_NAME = re.compile(r"(.*)\[(\d{1,9})\]", re.DOTALL)
_KINDS: dict[str, Callable[..., nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN, "RNN_RELU": nn.RNN}


def names_of(name: str, module: nn.Module) -> list[str]:
    """The names of a module's stacked layers; none where it has only one or is no recurrent layer."""
    if not isinstance(module, nn.RNNBase) or module.num_layers < 2:
        return []
    return [f"{name}[{place}]" for place in range(module.num_layers)]


def module_name(layer: str, modules: Mapping[str, nn.Module]) -> str:
    """The name of the module that a layer is, or that it is a stacked layer of."""
    found = _NAME.fullmatch(layer)
    return layer if layer in modules or found is None else found[1]


def place_of(layer: str, module: nn.Module) -> int | None:
    """Which stacked layer of its module a selected layer is, from 0; ``None``: it is the module."""
    found = _NAME.fullmatch(layer) if isinstance(module, nn.RNNBase) else None
    return None if found is None else int(found[2])


def with_stacked(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules, and each recurrent one also under the names of its stacked layers."""
    stacked = {layer: module for name, module in modules.items() for layer in names_of(name, module)}
    return {**stacked, **modules}


def per_direction(entering: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
    """What the directions of a recurrent layer hand on: an input as wide as one of two is handed on by each."""
    is_twice = leaving.dim() == entering.dim() and leaving.shape[-1] == 2 * entering.shape[-1]
    return torch.cat([entering, entering], -1) if is_twice else entering


def run_by_layer(module: nn.RNNBase, args: Sequence[Any], kwargs: Mapping[str, Any], hand_on: HandOn) -> Any:
    """Run a module on its arguments, one stacked layer after another.

    Args:
        module: the module; its hooks are not called.
        args: its positional arguments: a tensor or a packed sequence, and states.
        kwargs: its keyword arguments.
        hand_on: given which layer it is, what enters and what leaves it, returns what goes on from there.

    Returns:
        What the module returns: the output and the final states of every stacked layer.
    """
    entering, states = _arguments(*args, **kwargs)
    directions = 2 if module.bidirectional else 1
    finals: list[Any] = []
    for place in range(module.num_layers):
        rows = slice(place * directions, (place + 1) * directions)
        own = tuple(state[rows] for state in states) if isinstance(states, tuple | list) else states
        own = own[rows] if isinstance(own, torch.Tensor) else own
        leaving, final = _single(module, place, _data(entering).shape[-1])(entering, own)
        data = hand_on(place, _data(entering), _data(leaving))
        if place < module.num_layers - 1:
            data = nn.functional.dropout(data, module.dropout, module.training)
        entering = leaving._replace(data=data) if isinstance(leaving, PackedSequence) else data
        finals.append(final)
    if isinstance(finals[0], tuple):
        return entering, tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
    return entering, torch.cat(finals)


def _arguments(input: Any, hx: Any = None) -> tuple[Any, Any]:
    """What a module is called with, by the names that it gives them."""
    return input, hx


def _data(sequence: torch.Tensor | PackedSequence) -> torch.Tensor:
    return sequence.data if isinstance(sequence, PackedSequence) else sequence


def _single(module: nn.RNNBase, place: int, width: int) -> nn.RNNBase:
    """A module of that stacked layer alone, with the same parameters."""
    options: dict[str, Any] = {"bias": module.bias, "bidirectional": module.bidirectional}
    options["batch_first"] = module.batch_first
    if module.mode.startswith("RNN"):
        options["nonlinearity"] = module.mode.removeprefix("RNN_").lower()
    if module.proj_size:
        options["proj_size"] = module.proj_size
    single = _KINDS[module.mode](width, module.hidden_size, device="meta", **options)
    for name in [name for name, _ in single.named_parameters()]:
        setattr(single, name, getattr(module, name.replace("_l0", f"_l{place}")))
    return single
