"""Find the repeated blocks of a model, switch a middle one of each stack off, and compare with the network without it.

The network without the block is made here, by a forward hook, and shares no code with the library.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Collection
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import neutralize as nz

from .build import Built, others, run, tensors

TOLERANCE = 2e-5  # of post-norm blocks, float32, relative
ORDER = ("WRONG", "crashed", "refused", "measured", "folded", "exact")  # of verdicts, the worst first


@dataclass
class Row:
    """The verdict on one stack of blocks.

    Attributes:
        stack, block: qualified names; ``kind`` is the class of the block.
        has_skip: whether the block, its weights zero, hands its input on: found by running it.
        verdict: one of ``ORDER``.
        error: end to end against the network without the block, relative, on the worst of the inputs; 0: every bit.
        inputs: how many inputs were compared: those of the plan, others of their shapes, others of other shapes.
        reason: why it was refused, or how it failed.
        certificate: kind of the certificate.
        written, total: bytes written, of how many in the block.
        effect: how much the block changes the outputs, relative.
    """

    stack: str
    block: str
    kind: str
    has_skip: bool
    verdict: str
    error: float | None = None
    reason: str = ""
    certificate: str = ""
    written: int = 0
    total: int = 0
    effect: float = 0.0
    inputs: int = 0


@dataclass
class _Seen:
    """What entered and left a block in its calls."""

    entering: list[torch.Tensor]
    leaving: list[torch.Tensor]

    @property
    def keeps_shape(self) -> bool:
        pairs = zip(self.entering, self.leaving, strict=True)
        return bool(self.entering) and all(
            one.shape == other.shape and one.dtype == other.dtype for one, other in pairs
        )


def judge(built: Built) -> list[dict[str, Any]]:
    """One row per stack of like blocks; what changes no output (a head that the model does not return) is left out."""
    dead: set[str] = set()
    while found := stacks(built, dead):
        if rows := _rows(built, found):
            return rows
        dead |= {stack for stack, _, _ in found}  # its first output is not what is read: look at the stacks inside
    return []


def judge_lone(built: Built) -> list[dict[str, Any]]:
    """The same for a model that has no stack."""
    return _rows(built, lone(built))


def _rows(built: Built, found: list[tuple[str, str, bool]]) -> list[dict[str, Any]]:
    rows = [_judged(built, *each) for each in found]
    return [asdict(row) for row in rows if row.effect != 0]


def stacks(built: Built, besides: Collection[str] = ()) -> list[tuple[str, str, bool]]:
    """Stacks of like blocks that keep the shape of what they take: name, a middle block, whether it has a skip.

    Of nested stacks the outermost one whose blocks have a skip connection; if there is none in the whole model, the
    outermost ones. Of stacks that differ in numbers only (the stages of a hierarchical network) the longest. Those of
    ``besides`` are passed over.
    """
    model = built.model
    lists = {
        name: module for name, module in model.named_modules() if name and name not in besides and _are_alike(module)
    }
    seen = _observe(
        built, [f"{name}.{child}" for name, module in lists.items() for child, _ in module.named_children()]
    )
    calls = {
        name: {child: seen[f"{name}.{child}"] for child, _ in module.named_children() if f"{name}.{child}" in seen}
        for name, module in lists.items()
    }
    keeping = {
        name: [
            child for child, each in calls[name].items() if each.keeps_shape and _has_parts(module.get_submodule(child))
        ]
        for name, module in lists.items()
    }
    blocks = {name: f"{name}.{_middle(keeping[name], list(calls[name]))}" for name in lists if keeping[name]}
    skips = {name: _has_skip(built, block) for name, block in blocks.items()}
    found: dict[str, tuple[str, str, bool, int]] = {}
    chosen: list[str] = []
    for name, block in blocks.items():
        if any(name.startswith(f"{outer}.") for outer in chosen):
            continue
        inner = any(skips[other] for other in blocks if other.startswith(f"{name}."))
        if inner and (not skips[name] or len(keeping[name]) < len(calls[name])):
            continue  # stages of blocks, one of which keeps its shape
        is_list = isinstance(lists[name], nn.ModuleList | nn.Sequential)
        if not is_list and (not skips[name] or len(keeping[name]) < 2):
            continue
        chosen.append(name)
        key = f"{re.sub(r'[0-9]+', '#', name)} {type(model.get_submodule(block)).__name__}"
        if key not in found or len(keeping[name]) > found[key][3]:
            found[key] = (name, block, skips[name], len(keeping[name]))
    rows = [row[:3] for row in found.values()]
    return [row for row in rows if row[2]] or rows


def lone(built: Built) -> list[tuple[str, str, bool]]:
    """What stands for the blocks of a model without a stack: those with a skip connection, wherever they are.

    A middle one of each class, and of nested ones the outermost; if there is none, one of the most frequent class.
    """
    modules = {
        name: module
        for name, module in built.model.named_modules()
        if name and _has_parts(module) and any(each.dim() > 1 for each in module.parameters())
    }
    seen = _observe(built, list(modules))
    kinds: dict[type, list[str]] = {}
    for name in modules:
        if name in seen:
            kinds.setdefault(type(modules[name]), []).append(name)
    found: list[str] = []
    for names in kinds.values():
        keeping = [name for name in names if seen[name].keeps_shape]
        block = _middle(keeping, names) if keeping else ""
        if block and _has_skip(built, block) and not any(block.startswith(f"{outer}.") for outer in found):
            found.append(block)
    if found:
        return [(block.rpartition(".")[0], block, True) for block in found]
    usual = max(kinds.values(), key=len, default=[])
    block = usual[len(usual) // 2] if usual else ""
    return [(block.rpartition(".")[0], block, False)] if usual else []


def _middle(among: list[str], children: list[str]) -> str:
    return min(among, key=lambda child: abs(children.index(child) - len(children) // 2))


def _has_skip(built: Built, block: str) -> bool:
    """Whether a block with its weights and biases zero still hands its input on: as it is, or through a norm.

    Gains are left alone; what comes out as a multiple of the input went through a gate, not past the block.
    """
    module = built.model.get_submodule(block)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            last = name.rpartition(".")[2]
            if tensor.is_floating_point() and (tensor.dim() > 1 or "bias" in last or last in ("running_mean", "beta")):
                kept.append((tensor, tensor.clone()))
                tensor.zero_()
        try:
            seen = _observe(built, [block]).get(block)
        except Exception:
            return False
        finally:
            for tensor, values in kept:
                tensor.copy_(values)
    if seen is None or not seen.keeps_shape:
        return False
    entering, leaving = seen.entering[0].double().flatten(), seen.leaving[0].double().flatten()
    if not bool(torch.isfinite(leaving).all()) or not float(leaving.norm()):
        return False
    if float((leaving - entering).norm() / entering.norm()) < 1e-3:
        return True
    alike = float(torch.corrcoef(torch.stack([entering, leaving]))[0, 1])
    return 0.7 < alike < 1 - 1e-6


def _are_alike(module: nn.Module) -> bool:
    """Whether most children are of one class, and that has parameters and parts of its own."""
    children = list(module.children())
    if not children:
        return False
    kinds = [type(child) for child in children]
    usual = max(set(kinds), key=kinds.count)
    sample = next(child for child in children if type(child) is usual)
    return _has_parts(sample) and kinds.count(usual) * 2 > len(kinds)


def _has_parts(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None


def _observe(built: Built, places: list[str]) -> dict[str, _Seen]:
    """What entered and left the modules of these names in one run."""
    seen: dict[str, _Seen] = {}
    handles = []
    for place in places:

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, place: str = place) -> None:
            leaving = next(iter(tensors(output)), None)
            entering = None if leaving is None else stream(args, kwargs, leaving)
            if entering is not None and leaving is not None and leaving.is_floating_point():
                each = seen.setdefault(place, _Seen([], []))
                each.entering.append(entering.detach().clone())
                each.leaving.append(leaving.detach().clone())

        handles.append(built.model.get_submodule(place).register_forward_hook(hook, with_kwargs=True))
    try:
        run(built.model, built.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def stream(args: Any, kwargs: Any, leaving: torch.Tensor) -> torch.Tensor | None:
    """The input that the first output continues: the first one of its shape and dtype, else the first one."""
    entering = tensors((args, kwargs))
    fitting = [each for each in entering if each.shape == leaving.shape and each.dtype == leaving.dtype]
    return next(iter([*fitting, *entering]), None)


@contextmanager
def without(block: nn.Module) -> Any:
    """The network without a block: its first output is its input."""

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        leaving = next(iter(tensors(output)))
        return _with_first(output, stream(args, kwargs, leaving))[0]

    handle = block.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _with_first(tree: Any, tensor: torch.Tensor | None) -> tuple[Any, bool]:
    if isinstance(tree, torch.Tensor):
        return tensor, True
    if isinstance(tree, dict):
        for key, value in tree.items():
            new, is_done = _with_first(value, tensor)
            if is_done:
                tree[key] = new
                return tree, True
    if isinstance(tree, list | tuple):
        for place, value in enumerate(tree):
            new, is_done = _with_first(value, tensor)
            if is_done:
                return type(tree)([*tree[:place], new, *tree[place + 1 :]]), True
    return tree, False


def _judged(built: Built, stack: str, block: str, has_skip: bool) -> Row:
    model, inputs = built.model, built.inputs
    module = model.get_submodule(block)
    total = sum(each.numel() * each.element_size() for each in module.parameters())
    row = Row(stack, block, type(module).__name__, has_skip, "crashed", total=total)
    before = _bits(model)
    intact = run(model, inputs)
    compared = [inputs, *others(built)]
    wanted: list[list[torch.Tensor]] = []
    try:
        with without(module):
            wanted = [run(model, each) for each in compared]
    except Exception:
        if has_skip:
            raise
        compared = []  # it changes the shape of what it takes: there is no network without it to compare with
    row.effect, row.inputs = distance(intact, wanted[0]) if wanted else 1.0, len(compared)
    if not row.effect:
        return row
    try:
        plan = nz.plan(model, block, example_inputs=inputs)
        if not _same_bits(before, _bits(model)):
            row.verdict, row.reason = "WRONG", "planning changed the model"
            return row
        undo = plan.apply(model)
        try:
            got = [run(model, each) for each in compared]
        finally:
            undo.restore()
    except nz.NeutralizeError as error:
        row.verdict, row.reason = "refused", str(error)
        return row
    except Exception as error:
        row.reason = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-600:]}"
        return row
    certificate = plan.certificates[0]
    row.written, row.certificate = plan.written_bytes, certificate.kind
    if not wanted:
        row.verdict, row.reason = "measured", "the network without the block does not run"
        return row
    row.error = max((distance(*pair) for pair in zip(got, wanted, strict=True)), key=lambda each: (each != each, each))
    row.reason = certificate.reason if certificate.kind == "measured" else ""
    row.verdict = _verdict(row, got, wanted)
    if not _same_bits(before, _bits(model)):
        row.verdict, row.reason = "WRONG", "restore left other bits"
    return row


def _verdict(row: Row, got: list[list[torch.Tensor]], wanted: list[list[torch.Tensor]]) -> str:
    assert row.error is not None
    if row.certificate == "exact":
        return "exact" if all(map(_equal, got, wanted)) else "WRONG"
    if row.certificate in ("rounding", "bounded"):
        return "folded" if row.error <= TOLERANCE else "WRONG"
    return "measured"


def _bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in (*model.named_parameters(), *model.named_buffers())}


def _same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    flat: Callable[[torch.Tensor], torch.Tensor] = lambda each: each.contiguous().reshape(-1).view(torch.uint8)  # noqa: E731
    return one.keys() == other.keys() and all(torch.equal(flat(one[name]), flat(other[name])) for name in one)


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """``|one - other| / |other|`` over all floating-point outputs, in float64."""
    if len(one) != len(other):
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True) if b.is_floating_point()]
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    difference = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    size = sum(float(b.square().sum()) for _, b in pairs) ** 0.5
    return difference / size if size else difference
