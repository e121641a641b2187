"""What the demo measures. Nothing here prints, and the weights are left as they were found."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from neutralize import ops
from neutralize.demo.side_by_side import side_by_side
from neutralize.errors import NeutralizeError
from neutralize.plan import Plan, Rewrite

Advance: TypeAlias = Callable[[int], None]
"""Told how many units of work were just done."""


def _silent(units: int) -> None:
    """Tell nobody."""


# ---- bits ------------------------------------------------------------------------------------------------------------


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits: stricter than equal numbers, for it tells -0 from 0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def fingerprint(model: nn.Module, advance: Advance = _silent) -> str:
    """Return the SHA-256 of the name, dtype, shape and every bit of all parameters and buffers, as hexadecimal text.

    Args:
        model: a model on any device.
        advance: told the bytes done.
    """
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        content = _bytes(tensor.detach()).cpu()
        digest.update(content.numpy().data)
        advance(content.numel())
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# ---- the loss --------------------------------------------------------------------------------------------------------


def cut(tokens: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Cut a text into windows that do not overlap.

    Args:
        tokens: (n,), int64.
        length: tokens per window.

    Returns:
        Windows (1, length); the last one may be shorter, and is left out if it is a single token, predicting nothing.
    """
    return [window[None] for window in tokens.split(length) if window.numel() > 1]


def mean_loss(model: nn.Module, windows: Sequence[torch.Tensor], advance: Advance = _silent) -> float:
    """Return the cross-entropy in nats, averaged over all predicted tokens: those of every window but its first.

    Args:
        model: a causal language model.
        windows: (1, length) each, int64.
        advance: told the tokens done.
    """

    def lost(window: torch.Tensor) -> float:
        losses = functional.cross_entropy(_logits(model, window)[0, :-1].float(), window[0, 1:], reduction="none")
        return float(losses.double().sum())

    total = 0.0
    for window, loss in zip(windows, side_by_side(lost, windows), strict=True):
        total += loss
        advance(window.numel())
    return total / sum(window.numel() - 1 for window in windows)


def all_logits(model: nn.Module, windows: Sequence[torch.Tensor], advance: Advance = _silent) -> list[torch.Tensor]:
    """Return the scores (1, length, vocabulary) of the next token at every position of each window.

    Args:
        model: a causal language model.
        windows: (1, length) each, int64.
        advance: told the tokens done.
    """
    found = []
    for scores in side_by_side(lambda window: _logits(model, window), windows):
        found.append(scores)
        advance(scores.shape[1])
    return found


def _logits(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    scores: torch.Tensor = model(input_ids=window, use_cache=False).logits
    return scores


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


def unequal(blocks: Sequence[nn.Module], inputs: Sequence[BlockInput], advance: Advance = _silent) -> list[int]:
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
