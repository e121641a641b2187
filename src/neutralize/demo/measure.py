"""What the demo measures. Nothing here prints, and the weights are left as they were found."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from neutralize import ops
from neutralize.bits import same_bits
from neutralize.errors import NeutralizeError
from neutralize.language import all_logits
from neutralize.plan import Plan, Rewrite
from neutralize.progress import Advance, silent
from neutralize.side_by_side import side_by_side

# ---- one layer off ---------------------------------------------------------------------------------------------------


@contextmanager
def hooked_out(block: nn.Module) -> Iterator[None]:
    """Cut a block out by one forward hook that returns what entered: an oracle that shares nothing with the library."""

    def hand_on(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return args[0] if isinstance(output, torch.Tensor) else (args[0], *output[1:])

    handle = block.register_forward_hook(hand_on)
    try:
        yield
    finally:
        handle.remove()


def only(plan: Plan, layer: str) -> Plan:
    """Return the part of a plan that switches one of its layers off.

    Args:
        plan: a plan whose layers share no edit.
        layer: qualified name of one of its layers.

    Raises:
        NeutralizeError: the plan has no such layer.
    """
    for entry in plan.layers:
        if entry.layer == layer:
            edits = tuple(plan.edits[index] for index in entry.edits)
            return replace(plan, edits=edits, layers=(replace(entry, edits=tuple(range(len(edits)))),))
    raise NeutralizeError(f"demo: expected a layer of the plan, got {layer!r}; plan for it")


@dataclass(frozen=True)
class Harm:
    """What switching one block off does to the loss.

    Attributes:
        block: number of the block.
        loss: mean loss with the block off, in nats.
        delta_loss: the same, less that of the intact model.
    """

    block: int
    loss: float
    delta_loss: float

    @property
    def perplexity(self) -> float:
        """The loss as a perplexity."""
        return math.exp(self.loss)


# ---- every block by itself -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockInput:
    """What a block was called with; its first positional argument is the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden state (1, length, width)."""
        state: torch.Tensor = self.args[0]
        return state


def block_inputs(model: nn.Module, blocks: Sequence[nn.Module], window: torch.Tensor) -> list[BlockInput]:
    """Return what each block is called with when the model reads a window.

    Args:
        model: a causal language model.
        blocks: modules that it calls once each.
        window: (1, length), int64.
    """
    seen: dict[nn.Module, BlockInput] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[module] = BlockInput((args[0].clone(), *args[1:]), kwargs)

    handles = [block.register_forward_pre_hook(look, with_kwargs=True) for block in blocks]
    try:
        all_logits(model, [window])
    finally:
        for handle in handles:
            handle.remove()
    return [seen[block] for block in blocks]


def unequal(blocks: Sequence[nn.Module], inputs: Sequence[BlockInput], advance: Advance = silent) -> list[int]:
    """Run each block alone and return the positions of those that do not return their hidden state bit for bit.

    Args:
        blocks: the blocks.
        inputs: what each is called with.
        advance: told the blocks done.
    """

    def hands_on(pair: tuple[nn.Module, BlockInput]) -> bool:
        block, given = pair
        output = block(*given.args, **given.kwargs)
        return same_bits(output if isinstance(output, torch.Tensor) else output[0], given.hidden)

    found = []
    for position, handed_on in enumerate(side_by_side(hands_on, list(zip(blocks, inputs, strict=True)))):
        if not handed_on:
            found.append(position)
        advance(1)
    return found


# ---- speed -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """How long it takes to carry out a plan on a live model.

    Attributes:
        written_bytes: what an application writes.
        rewrite_s: seconds of the rewriting alone (one call of ``ops.rewrite_``), median.
        apply_s: seconds to check the plan, copy what it overwrites, and rewrite, median.
        restore_s: seconds to copy everything back, median.
    """

    written_bytes: int
    rewrite_s: float
    apply_s: float
    restore_s: float

    @property
    def rewrite_gb_per_s(self) -> float:
        """Bandwidth of the rewriting alone, in 10^9 bytes per second."""
        return self.written_bytes / self.rewrite_s / 1e9


def speed(model: nn.Module, plan: Plan, repeats: int = 7) -> Speed:
    """Time a plan of rewrites that do not read old values; the model is left as it was.

    Args:
        model: the model planned for.
        plan: rewrites with ``scale == 0``, so that rewriting twice is rewriting once.
        repeats: how often each part is timed.

    Raises:
        NeutralizeError: the plan holds other edits.
    """
    rewrites = [edit for edit in plan.edits if isinstance(edit, Rewrite) and edit.scale == 0]
    if len(rewrites) != len(plan.edits):
        raise NeutralizeError(
            "demo: expected rewrites with scale 0 to time, got other edits; use benchmarks/ for those"
        )
    named = dict(model.named_parameters(remove_duplicate=False))
    rewriting, applying, restoring = [], [], []
    for _ in range(repeats):
        started = time.perf_counter()
        undo = plan.apply(model)
        applying.append(time.perf_counter() - started)
        try:
            tensors = [edit.block(named[edit.parameter].detach()) for edit in rewrites]
            started = time.perf_counter()
            ops.rewrite_(
                tensors,
                diagonal=[edit.diagonal for edit in rewrites],
                fill=[edit.fill for edit in rewrites],
                start=[edit.start for edit in rewrites],
                step=[edit.step for edit in rewrites],
            )
            rewriting.append(time.perf_counter() - started)
        finally:
            started = time.perf_counter()
            undo.restore()
            restoring.append(time.perf_counter() - started)
    seconds = (statistics.median(times) for times in (rewriting, applying, restoring))
    return Speed(plan.written_bytes, *seconds)
