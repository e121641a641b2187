"""Adapters of PEFT: a plan holds for the adapters that were active when it was made.

An adapter adds to a layer, or multiplies it, in the forward pass: what switches the layer off has to switch off its
part too. It is in the dataflow, so a plan made on the model with its adapters does that, and says whose part it was. A
layer with an adapter is known by what it offers (``active_adapters``, ``disable_adapters``), not by its class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from neutralize.plan import LayerPlan


def premise(model: nn.Module, names: Iterable[str] | None = None) -> str:
    """Say which adapters take part in the forward pass: ``"adapter 'a' active"``; empty if none has been added.

    Args:
        model: the whole model.
        names: of modules, of parts of them, or of tensors: only adapters in them and around them count.
    """
    scope = None if names is None else [re.sub(r"\[(\d+)\]", r".\1", name) for name in names]
    active: dict[str, None] = {}
    merged: dict[str, None] = {}
    found = False
    for name, module in _adapted(model):
        if scope is not None and not any(_is_in(name, other) or _is_in(other, name) for other in scope):
            continue
        found = True
        merged.update(dict.fromkeys(_merged(module)))
        if not module.disable_adapters:
            active.update(dict.fromkeys(map(str, module.active_adapters)))  # type: ignore[arg-type]
    if not found:
        return ""
    said = [_said(merged, "merged"), _said([name for name in active if name not in merged], "active")]
    return " and ".join(filter(None, said)) or "no adapter active"


def conditioned(layer: LayerPlan, premise: str) -> LayerPlan:
    """The entry of a layer whose certificate also assumes the adapters, if there are any."""
    if not premise:
        return layer
    certificate = layer.certificate
    assumption = ", ".join(filter(None, (certificate.assumption, premise)))
    return replace(layer, certificate=replace(certificate, assumption=assumption))


def unmet(model: nn.Module, layers: Iterable[LayerPlan]) -> Iterator[str]:
    """Problems with the layers of a plan that was made for other adapters than are active now."""
    now = premise(model)
    for layer in layers:
        if now and now not in layer.certificate.assumption:
            yield (
                f"expected the adapters that {layer.layer!r} was planned with, got a model with {now}; plan on this "
                "model as it is"
            )


def moved(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Reasons why parameters cannot be written, by name: an adapter is around them, or merged into them."""
    refused = {}
    layers = [(f"{prefix}.".lstrip("."), module) for prefix, module in _adapted(model)]
    for name in names:
        for prefix, module in layers:
            own = name.removeprefix(prefix)
            base = getattr(module, "base_layer", None)
            if own == name or not isinstance(base, nn.Module):
                continue
            if own in dict(base.named_parameters()):
                refused[name] = (
                    f"expected a parameter {name!r}, got {prefix}base_layer.{own} in a layer that an adapter was added "
                    "to; plan on the model with its adapters"
                )
            elif own.startswith("base_layer.") and _merged(module):
                refused[name] = (
                    f"expected {name!r} as it is without adapters, got {_said(_merged(module), 'merged')} into "
                    "it, which is taken out again later; call unmerge_adapter() first, or merge_and_unload()"
                )
    return refused


def _is_in(name: str, owner: str) -> bool:
    return f"{name}.".startswith(f"{owner}.".lstrip("."))


def _merged(module: nn.Module) -> list[str]:
    """The adapters whose part is in the layer's own weights at the moment."""
    names: Any = getattr(module, "merged_adapters", None)
    return [str(name) for name in names or ()]


def _said(names: Iterable[str], state: str) -> str:
    """``"adapter 'a' merged"``, ``"adapters 'a', 'b' merged"``, or nothing of no names."""
    listed = [repr(name) for name in names]
    return f"adapter{'s' * (len(listed) > 1)} {', '.join(listed)} {state}" if listed else ""


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers with adapters, by name."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "disable_adapters", None), bool) and hasattr(module, "active_adapters"):
            yield name, module
