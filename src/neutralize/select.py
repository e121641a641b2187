"""Select layers: names, globs, slices, module objects, predicates, and lists of these."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from neutralize.errors import NeutralizeError

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Layers: TypeAlias = "str | nn.Module | Predicate | Iterable[Layers]"

# An index or a slice of a ModuleList: "[3]", "[-1]", "[20:25]", "[::2]".
_INDEX = re.compile(r"\[(-?\d+)\]|\[(-?\d*)(:)(-?\d*)(?::(-?\d*))?\]")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module that holds the parameters: a module compiled by ``torch.compile`` stands for the original."""
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


def select(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """Resolve a selection to modules, in the order in which the model lists them.

    Args:
        model: the module to look in; its own name, the empty string, is never selected by a glob or a predicate.
        layers: a qualified name (``"model.layers.3.mlp"``), a glob over qualified names (``"*.mlp"``; ``*`` also
            matches
            dots), an index or slice of a ``ModuleList`` or ``Sequential`` (``"model.layers[-3:]"``, also followed by a
            name: ``"model.layers[3].mlp"``), a module object of the model, a predicate ``(name, module) -> bool``, or
                an
            iterable of these.

    Returns:
        Qualified name to module. A module that occurs under several names is listed under the first.

    Raises:
        NeutralizeError: nothing is selected, a name is unknown (near matches are listed), or one selected layer is a
            part of another.
    """
    model = unwrap(model)
    named = dict(model.named_modules(remove_duplicate=False))
    first_name: dict[int, str] = {}
    for name, module in named.items():
        first_name.setdefault(id(module), name)
    chosen = {first_name[id(named[name])] for name in _resolve(model, named, layers)}
    if not chosen:
        raise NeutralizeError(f"select: expected at least one layer, got none from {layers!r}; {_suggest(named, '')}")
    ordered = [name for name in named if name in chosen]
    for inner in ordered:
        for outer in ordered:
            if inner != outer and (outer == "" or inner.startswith(f"{outer}.")):
                raise NeutralizeError(
                    f"select: expected layers that do not contain each other, got {outer!r} and its part {inner!r}; "
                    "select one of them"
                )
    return {name: named[name] for name in ordered}


def _resolve(model: nn.Module, named: dict[str, nn.Module], layers: Layers) -> list[str]:
    if isinstance(layers, str):
        return _resolve_text(named, layers)
    if isinstance(layers, nn.Module):
        names = [name for name, module in named.items() if module is layers]
        if not names:
            raise NeutralizeError(
                f"select: expected a module of the model for layers, got a {type(layers).__name__} that is not part "
                "of it; "
                "pass a module reached through this model, or a qualified name"
            )
        return names[:1]
    if callable(layers):
        names = [name for name, module in named.items() if name and layers(name, module)]
        if not names:
            raise NeutralizeError(
                f"select: expected a predicate that accepts at least one layer, got {layers!r}, which accepted none of "
                f"{len(named) - 1}; {_suggest(named, '')}"
            )
        return names
    if isinstance(layers, Iterable):
        return [name for part in layers for name in _resolve(model, named, part)]
    raise NeutralizeError(
        f"select: expected a name, glob, slice, module, predicate or a list of these for layers, got "
        f"{type(layers).__name__} {layers!r}; write an index as 'model.layers[3]'"
    )


def _resolve_text(named: dict[str, nn.Module], text: str) -> list[str]:
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
        return [name for child in children for name in (_resolve_text(named, child + rest) if rest else [child])]
    names = _names(named, text)
    if not names:
        raise NeutralizeError(
            f"select: expected the name of a layer, got {text!r}, which is unknown; {_suggest(named, text)}"
        )
    return names


def _names(named: dict[str, nn.Module], pattern: str) -> list[str]:
    if pattern in named:
        return [pattern]
    return [name for name in named if name and fnmatchcase(name, pattern)]


def _indexable(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


def _children(named: dict[str, nn.Module], name: str, match: re.Match[str], text: str) -> Sequence[str]:
    children = [f"{name}.{key}" if name else key for key, child in named[name]._modules.items() if child is not None]
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
    near = difflib.get_close_matches(text, names, n=5, cutoff=0.5)
    if not near and text:
        last = text.rsplit(".", 1)[-1].strip("*[]0123456789:")
        near = [name for name in names if last and last in name][:5]
        near = near or difflib.get_close_matches(text, names, n=5, cutoff=0.2)
    if near:
        return f"near matches: {', '.join(near)}"
    return f"the model's layers begin with: {', '.join(names[:5])}"
