"""Select layers: names, globs, slices, module objects, predicates, and lists of these."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

from neutralize.errors import NeutralizeError
from neutralize.parts import owner_of, part_of
from neutralize.stacked import module_name, names_of

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Layers: TypeAlias = "str | nn.Module | Predicate | Iterable[Layers]"

# An index or a slice of a ModuleList: "[3]", "[-1]", "[20:25]", "[::2]".
_INDEX = re.compile(r"\[(-?\d{1,18})\]|\[(-?\d{0,18})(:)(-?\d{0,18})(?::(-?\d{0,18}))?\]")
_COMPILED = "_orig_mod"  # the name under which a module compiled by torch.compile keeps the original


def unwrap(model: object) -> nn.Module:
    """Return the module that holds the parameters, under the names that it gives them.

    A module compiled by ``torch.compile`` stands for the original, one in ``DataParallel`` or
    ``DistributedDataParallel`` for what is in it.

    Raises:
        NeutralizeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        is_path = isinstance(model, str | os.PathLike)
        others = "; neutralize.Checkpoint works on files" if is_path else ""
        raise NeutralizeError(
            "neutralize: expected a torch.nn.Module for model, got "
            f"{type(model).__name__}; pass the model itself{others}"
        )
    original = getattr(model, _COMPILED, None)
    if original is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        original = model.module
    return unwrap(original) if isinstance(original, nn.Module) else model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by every one of its qualified names."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def select(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """Resolve a selection to modules, in the order in which the model lists them.

    Args:
        model: the module to look in; it is selected itself only as a module object.
        layers: a qualified name (``"model.layers.3.mlp"``), a glob over qualified names (``"*.mlp"``; ``*`` also
            matches dots), an index or slice of a ``ModuleList`` or ``Sequential`` (``"model.layers[-3:]"``, also
            followed by a name: ``"model.layers[3].mlp"``), or of the stacked layers of an ``nn.LSTM``, ``nn.GRU`` or
            ``nn.RNN`` (``"rnn[1]"``), a part of a module (``"layers[3].attn.heads[2]"``, ``kv_heads``, ``channels``,
            ``experts``), a module object of the model, a predicate ``(name, module) -> bool``, or an
            iterable of these. A ``ModuleList`` or ``ModuleDict``, which computes nothing itself, stands for what is in
            it, and so does a slice of one.

    Returns:
        Qualified name to module; for a stacked layer ``"rnn[1]"`` or a part ``"attn.heads[2]"`` to the module that
        holds it. A module that occurs under several names is listed under the first.

    Raises:
        NeutralizeError: nothing is selected, a name is unknown (near matches are listed), or one selected layer is a
            part of another.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(select(model, lambda name, module: isinstance(module, nn.Linear)))
        ['0', '2']
        >>> list(select(model, "[-1]"))
        ['2']
    """
    model = unwrap(model)
    named = dict(model.named_modules(remove_duplicate=False))
    first_name: dict[int, str] = {}
    for name, module in named.items():
        first_name.setdefault(id(module), name)
    resolved = _resolve(named, layers)
    chosen = {_first(named, first_name, part) for name in resolved for part in _computing(named, name)}
    if not chosen:
        raise NeutralizeError(f"select: expected at least one layer, got none from {layers!r}; {_suggest(named, '')}")
    parts: dict[str, list[str]] = {}
    for layer in sorted(chosen):
        if layer not in named and part_of(layer) is not None:
            parts.setdefault(_module(layer, named), []).append(layer)

    def parts_at(name: str) -> list[str]:
        return [*names_of(name, named[name]), *parts.get(name, [])]

    ordered = [layer for name in named for layer in (name, *parts_at(name)) if layer in chosen]
    for outer in ordered:
        for part in named[outer].modules() if outer in named else ():
            within = [first_name[id(part)], *parts_at(first_name[id(part)])]
            for inner in (layer for layer in within if layer != outer and layer in chosen):
                raise NeutralizeError(
                    f"select: expected layers that do not contain each other, got {outer!r} and its part {inner!r}; "
                    "select one of them (* also matches dots: write 'layers[:]' for the layers of a list alone)"
                )
    return {layer: named[_module(layer, named)] for layer in ordered}


def _module(layer: str, named: dict[str, nn.Module]) -> str:
    """The name of the module that a layer is, or that holds it."""
    part = None if layer in named else part_of(layer)
    return module_name(layer, named) if part is None else owner_of(part, named)


def _first(named: dict[str, nn.Module], first_name: dict[int, str], layer: str) -> str:
    """The first of a layer's names; of what is no module that of its module, with the rest."""
    module = _module(layer, named)
    return first_name[id(named[module])] + layer[len(module) :]


def blocks(model: nn.Module) -> str:
    """Return the selection of a model's blocks: the ``ModuleList`` of one class that holds the most parameters.

    Raises:
        NeutralizeError: there is none with two layers or more.
    """
    model = unwrap(model)
    sizes = {}
    for name, module in model.named_modules():
        children = list(module.children())
        if isinstance(module, nn.ModuleList) and len(children) > 1 and len({type(child) for child in children}) == 1:
            sizes[name] = sum(parameter.numel() for parameter in module.parameters())
    if not sizes:
        raise NeutralizeError(
            f"select: expected a ModuleList of blocks in a {type(model).__name__}, got none; name the layers"
        )
    return f"{max(sizes, key=lambda name: sizes[name])}[:]"


def _resolve(named: dict[str, nn.Module], layers: Layers) -> list[str]:
    if isinstance(layers, str):
        return _resolve_text(named, layers)
    if isinstance(layers, nn.Module):
        return _resolve_module(named, layers)
    if isinstance(layers, type):
        raise NeutralizeError(
            f"select: expected a layer or a predicate for layers, got the class {layers.__name__}; write "
            f"lambda name, module: isinstance(module, {layers.__name__})"
        )
    if callable(layers):
        names = [name for name, module in named.items() if name and layers(name, module)]
        if not names:
            raise NeutralizeError(
                f"select: expected a predicate that accepts at least one layer, got {layers!r}, which accepted none of "
                f"{len(named) - 1}; {_suggest(named, '')}"
            )
        return names
    if isinstance(layers, Tensor):
        raise NeutralizeError(
            "select: expected a layer for layers, got a tensor; pass the module that holds it, or its name"
        )
    if isinstance(layers, Mapping) and not all(isinstance(module, nn.Module) for module in layers.values()):
        raise NeutralizeError(
            "select: expected layers alone, or what select returned, got a dict with other values than modules; make a "
            "plan for each strategy, and apply one after the other"
        )
    if isinstance(layers, Iterable) and not isinstance(layers, bytes | bytearray):
        return [name for part in layers for name in _resolve(named, part)]
    raise NeutralizeError(
        f"select: expected a name, glob, slice, module, predicate or a list of these for layers, got "
        f"{type(layers).__name__} {reprlib.repr(layers)}; write an index as 'model.layers[3]'"
    )


def _resolve_module(named: dict[str, nn.Module], module: nn.Module) -> list[str]:
    module = unwrap(module)
    for name, candidate in named.items():
        if candidate is module or getattr(candidate, _COMPILED, None) is module:
            return [name]
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):  # what slicing one returns is a new one
        return [name for child in module.children() for name in _resolve_module(named, child)]
    raise NeutralizeError(
        f"select: expected a module of the model for layers, got a {type(module).__name__} that is not part of it; "
        "pass a module reached through this model, or a qualified name"
    )


def _resolve_text(named: dict[str, nn.Module], text: str) -> list[str]:
    if text == "":
        raise NeutralizeError(
            "select: expected the name of a layer, got an empty string; pass the model itself to select it whole"
        )
    if text in named:
        return [text]
    for match in _INDEX.finditer(text):
        base, rest = text[: match.start()], text[match.end() :]
        if base.endswith(".") or (rest and not rest.startswith((".", "["))):
            continue  # a character class of a glob, not an index
        lists = [name for name in ([""] if base == "" else _names(named, base)) if _indexable(named[name])]
        if not lists:
            continue
        children = [child for name in lists for child in _children(named, name, match, text)]
        if rest and all(isinstance(named[name], nn.RNNBase) for name in lists):
            break  # a stacked layer has no parts with names
        return [name for child in children for name in (_resolve_text(named, child + rest) if rest else [child])]
    names = _names(named, text)
    part = None if names else part_of(text)
    if part is not None:
        owners = _resolve_text(named, part.owner) if part.owner else [""]
        return [f"{owner}.{part.kind}[{part.text}]".lstrip(".") for owner in owners]
    if not names:
        raise NeutralizeError(
            f"select: expected the name of a layer, got {text!r}, which is unknown; {_suggest(named, text)}"
        )
    return names


def _names(named: dict[str, nn.Module], pattern: str) -> list[str]:
    """The modules that a name or glob means; names are compared without the marks that torch.compile leaves in them."""
    if pattern in named:
        return [pattern]
    plain: dict[str, str] = {}
    for name in named:
        plain.setdefault(_plain(name), name)
    pattern = _plain(pattern)
    if pattern in plain:
        return [plain[pattern]]
    return [name for short, name in plain.items() if short and fnmatchcase(short, pattern)]


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _indexable(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential | nn.RNNBase)


def _computing(named: dict[str, nn.Module], name: str) -> list[str]:
    """The layer itself, or what it holds where it is a container that cannot be called."""
    module = named.get(name)  # none: a stacked layer
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or type(module).forward is not nn.Module.forward:
        return [name]
    prefix = f"{name}." if name else ""
    return [part for key, _ in module.named_children() for part in _computing(named, prefix + key)]


def _children(named: dict[str, nn.Module], name: str, match: re.Match[str], text: str) -> Sequence[str]:
    module = named[name]
    children = [f"{name}.{key}" if name else key for key, child in module._modules.items() if child is not None]
    if isinstance(module, nn.RNNBase):
        children = names_of(name, module) or [name]
    size = len(children)
    if match[1] is not None:
        position = int(match[1])
        if not -size <= position < size:
            raise NeutralizeError(
                f"select: expected an index from {-size} to {size - 1} for {name!r}, got {text!r}; it has {size} layers"
            )
        return [children[position]]
    start, stop, step = (int(part) if part else None for part in (match[2], match[4], match[5]))
    if step == 0:
        raise NeutralizeError(f"select: expected a slice whose step is not 0, got {text!r}; leave the step out")
    picked = children[slice(start, stop, step)]
    if not picked:
        raise NeutralizeError(
            f"select: expected a slice that selects something of {name!r}, got {text!r}; it has {size} layers, 0 to "
            f"{size - 1}"
        )
    return picked


def _suggest(named: dict[str, nn.Module], text: str) -> str:
    names = [name for name in named if name]
    if not names:
        return "the model has no layers of its own"
    folded = {name.lower(): name for name in reversed(names)}
    near = [folded[name] for name in difflib.get_close_matches(text.lower(), folded, n=5, cutoff=0.5)]
    if not near and text:
        last = text.rsplit(".", 1)[-1].strip("*[]0123456789:")
        near = [name for name in names if last and last in name][:5]
        near = near or difflib.get_close_matches(text, names, n=5, cutoff=0.2)
    if near:
        return f"near matches: {', '.join(near)}"
    return f"the model's layers begin with: {', '.join(names[:5])}"
