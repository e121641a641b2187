"""Anatomy: the tree of a model, with what each strategy could do to its layers. Nothing is written, and no weight read.

Layers that are alike are one entry: children of one module that have the same parts, and whose dataflow is the same if
they are blocks. One of them is analysed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx, nn

from neutralize.dataflow import Inputs, trace
from neutralize.errors import NeutralizeError
from neutralize.likeness import likeness
from neutralize.norms import core_of
from neutralize.planner import Request, Strategy
from neutralize.rules import is_transparent
from neutralize.search import Search, residual_stream
from neutralize.select import Layers, select, unwrap
from neutralize.sites import affine_site, widths
from neutralize.strategies import Auto, Constant, Damp, Zero

STRATEGIES: dict[str, Strategy] = {
    "auto": Auto(),
    "zero": Zero(),
    "constant": Constant(),
    "damp": Damp(factor=0.5),
}
"""What is tried; ``mean`` takes batches, and can what ``zero`` can."""


@dataclass(frozen=True)
class Ability:
    """What a strategy could do to a layer.

    Attributes:
        strategy: its name; ``damp`` is tried with a factor of 0.5.
        certificate: ``exact``, ``rounding``, ``bounded`` or ``measured``; ``None``: it cannot.
        bound: the error that the certificate bounds, if it does.
        bytes: what it would write.
        why_not: the reason, where it cannot.
    """

    strategy: str
    certificate: str | None
    bound: float | None = None
    bytes: int = 0
    why_not: str = ""


@dataclass(frozen=True)
class Entry:
    """A module of the tree, or several that are alike.

    Attributes:
        name: qualified name of the first.
        names: of all of them.
        kind: their class.
        widths: features that enter and leave an affine layer, or ``None``.
        activation: what follows an affine layer; for a block those in it.
        residual: of a block ``pre-norm``, ``post-norm``, ``sandwich norm``, ``normed branch``, ``plain`` (a skip
            connection without a layer norm) or ``none``; of another module ``""``.
        parameters: how many one of them has.
        bytes: what they take, of one.
        abilities: one for each strategy; empty where none was tried.
        parts: the modules inside the first.
    """

    name: str
    names: tuple[str, ...]
    kind: str
    widths: tuple[int, int] | None
    activation: str
    residual: str
    parameters: int
    bytes: int
    abilities: tuple[Ability, ...]
    parts: tuple[Entry, ...]

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Entry]]:
        """This entry and all in it, each with its depth."""
        yield depth, self
        for part in self.parts:
            yield from part.walk(depth + 1)


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of.

    Attributes:
        model: its class.
        parameters: how many it has, tied ones once.
        bytes: what they take.
        entries: the tree.
        not_traced: why no strategy was tried, or ``""``.
    """

    model: str
    parameters: int
    bytes: int
    entries: tuple[Entry, ...]
    not_traced: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the same for JSON."""
        return asdict(self)


def anatomy(
    model: nn.Module,
    layers: Layers | None = None,
    *,
    example_inputs: Inputs | None = None,
    strategies: Sequence[str] = tuple(STRATEGIES),
) -> Anatomy:
    """Look at a model.

    Args:
        model: live or on the meta device; only read.
        layers: what is looked at; by default all of it.
        example_inputs: see ``neutralize.plan``.
        strategies: which of ``STRATEGIES`` are tried; none leaves out what is found in the dataflow.

    Raises:
        NeutralizeError: a selected layer is unknown.
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    roots = [""] if layers is None else list(select(model, layers))
    for name in roots:
        if name not in modules:
            raise NeutralizeError(
                f"inspect: expected modules, got {name!r}, a part of one; plan for it, or inspect the module"
            )
    look = _Look(model, roots, example_inputs, strategies)
    entries = look.entries()
    tensors = list(model.parameters())
    return Anatomy(
        type(model).__name__,
        sum(tensor.numel() for tensor in tensors),
        sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        entries,
        look.failure,
    )


class _Look:
    """The traces of a model: one with marks around its blocks, one with marks around what is in those that differ."""

    def __init__(self, model: nn.Module, roots: list[str], inputs: Inputs | None, strategies: Sequence[str]) -> None:
        self.model, self.roots, self.inputs, self.strategies = model, roots, inputs, strategies
        self.modules = dict(model.named_modules())
        self.failure = ""
        found = dict(_blocks(model)) if strategies else {}
        self.blocks = {name: module for name, module in found.items() if self._is_below(name, roots)}
        self.outer = self._request(self.blocks)
        self.alike = {name: self._alike(name) for name in self.modules}
        inner = {
            name: module
            for name, module in self.modules.items()
            if strategies and name and _has_parameters(module) and name not in self.blocks and self._is_shown(name)
            if next(module.children(), None) is None or name in roots or self._is_below(name, found)
        }
        self.inner = self._request(inner)
        self.thorough: Request | None = None

    @staticmethod
    def _is_below(name: str, roots: Iterable[str]) -> bool:
        return any(root in ("", name) or name.startswith(f"{root}.") for root in roots)

    def entries(self) -> tuple[Entry, ...]:
        """The tree, from its roots."""
        if self.roots == [""]:
            return self.children("", self.model) or (self.entry([""]),)
        return tuple(map(self.entry, self._roots()))

    def _roots(self) -> list[list[str]]:
        """The roots, those that are alike and in one list together."""
        groups: dict[Hashable, list[str]] = {}
        for name in self.roots:
            parent = name.rpartition(".")[0]
            is_one = not parent or not isinstance(self.modules[parent], nn.ModuleList | nn.Sequential)
            groups.setdefault(name if is_one else (parent, self.alike[name]), []).append(name)
        return list(groups.values())

    def _request(self, layers: dict[str, nn.Module]) -> Request | None:
        if not layers or self.failure:
            return None
        request = Request(self.model, layers, self.inputs)
        try:
            request.flow = trace(self.model, layers, self.inputs, partial=True)
        except NeutralizeError as error:
            self.failure = str(error)
            return None
        return request

    def _alike(self, name: str) -> Hashable:
        """What modules of one parent have in common that are one entry."""
        module = self.modules[name]
        parts = tuple((key, type(part)) for key, part in module.named_modules())
        shapes = tuple((key, tuple(tensor.shape), tensor.dtype) for key, tensor in module.named_parameters())
        found: Hashable = None
        if self.outer is not None and name in self.blocks:
            calls = self.outer.flow.calls.get(name, [])
            same = likeness(self.outer.flow, calls[0], self.outer.regions, {}) if len(calls) == 1 else None
            found = len(calls) if same is None else same.key
        return parts, shapes, found

    def _is_shown(self, name: str) -> bool:
        """Whether a module is the first of its kind, and so are those around it, up to a root."""
        if name in self.roots:
            return any(names[0] == name for names in self._roots())
        parent, _, _ = name.rpartition(".")
        if not name or not self._is_shown(parent):
            return False
        return any(names[0] == name for names in self._groups(parent, self.modules[parent]))

    def _groups(self, name: str, module: nn.Module) -> list[list[str]]:
        """The children of a module, those that are alike together; only lists have such."""
        prefix = f"{name}." if name else ""
        children = [f"{prefix}{key}" for key, _ in module.named_children() if f"{prefix}{key}" in self.modules]
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            return [[child] for child in children]
        groups: dict[Hashable, list[str]] = {}
        for child in children:
            groups.setdefault(self.alike[child], []).append(child)
        return list(groups.values())

    def children(self, name: str, module: nn.Module) -> tuple[Entry, ...]:
        """The entries inside a module; lists are seen through."""
        found: list[Entry] = []
        for names in self._groups(name, module):
            child = self.modules[names[0]]
            if isinstance(child, nn.ModuleList | nn.ModuleDict) and type(child).forward is nn.Module.forward:
                found += self.children(names[0], child)
            elif _has_parameters(child):
                found.append(self.entry(names))
        return tuple(found)

    def entry(self, names: list[str]) -> Entry:
        """The entry of modules that are alike, with those inside the first."""
        name, module = names[0], self.modules[names[0]]
        parts = self.children(name, module)
        width, activation = self._site(name)
        if not activation:
            inside = (part.activation for part in parts if part.activation)
            activation = ", ".join(dict.fromkeys(each for names in inside for each in names.split(", ")))
        tensors = list(module.parameters())
        return Entry(
            name,
            tuple(names),
            type(module).__name__,
            width,
            activation,
            self._residual(name),
            sum(tensor.numel() for tensor in tensors),
            sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            tuple(self._ability(name, strategy) for strategy in self.strategies) if self._request_of(name) else (),
            parts,
        )

    def _request_of(self, name: str) -> Request | None:
        """The request in which a layer is, if the model calls it."""
        request = self.outer if name in self.blocks else self.inner
        return request if request is not None and request.flow.calls.get(name) else None

    def _site(self, name: str) -> tuple[tuple[int, int] | None, str]:
        request = self._request_of(name)
        if request is None or next(self.modules[name].children(), None) is not None:
            return None, ""
        site = affine_site(request.flow, request.calls(name)[0])
        if site is None:
            return None, ""
        return widths(site, request.flow), site.activation.name if site.activation is not None else ""

    def _residual(self, name: str) -> str:
        request = self._request_of(name)
        if request is None or name not in self.blocks:
            return ""
        search = Search(request.flow, request.calls(name)[0], request.regions, "cheapest")
        return _residual(search)

    def _ability(self, name: str, strategy: str) -> Ability:
        request = self._request_of(name)
        assert request is not None
        chosen = STRATEGIES[strategy]
        try:
            draft = chosen.draft(request.part([name]), name)
        except NeutralizeError as error:
            # What a block is filled with asks for nothing inside it, which the export would show better.
            if name not in self.blocks or not request.flow.is_quick or strategy == "constant":
                return Ability(strategy, None, why_not=str(error))
            try:  # the export keeps larger ops whole
                draft = chosen.draft(self._thorough().part([name]), name)
            except NeutralizeError as last:
                return Ability(strategy, None, why_not=str(last))
        certificate = draft.layer.certificate
        return Ability(strategy, certificate.kind, certificate.bound, sum(edit.written_bytes for edit in draft.edits))

    def _thorough(self) -> Request:
        if self.thorough is None:
            self.thorough = Request(self.model, self.blocks, self.inputs, is_thorough=True)
            self.thorough.flow = trace(self.model, self.blocks, self.inputs, is_thorough=True, partial=True)
        return self.thorough


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _blocks(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules with modules inside that are children of a list."""
    prefix = f"{name}." if name else ""
    is_list = isinstance(model, nn.ModuleList | nn.Sequential)
    for key, child in model.named_children():
        if is_list and next(child.children(), None) is not None and _has_parameters(child):
            yield f"{prefix}{key}", child
        else:
            yield from _blocks(child, f"{prefix}{key}")


def _residual(search: Search) -> str:
    """Where the norms of a block stand on its residual stream."""
    stream = residual_stream(search)
    before, on_branch = False, False
    for node in search.call.nodes:
        core = core_of(node)
        if core is not None:
            before = before or core.data in stream
        elif node in stream and len(node.all_input_nodes) == 2:
            branches = [each for each in node.all_input_nodes if each not in stream]
            on_branch = on_branch or any(_is_normed(each, search) for each in branches)
    if search.call.exit not in stream:
        return "post-norm" if before else "none"
    if before and on_branch:
        return "sandwich norm"
    return "pre-norm" if before else "normed branch" if on_branch else "plain"


def _is_normed(node: fx.Node, search: Search) -> bool:
    """Whether a value comes out of a norm, its gain (also one of ``1 + w``) and bias included."""
    while core_of(node) is None:
        operands = [each for each in node.all_input_nodes if not search.is_parametric(each)]
        if len(operands) != 1 or not (is_transparent(node) or len(node.all_input_nodes) == 2):
            return False
        node = operands[0]
    return True
