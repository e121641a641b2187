"""What one evaluation of a model measures: its loss, its distance from the intact model, and what each layer moves."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from neutralize.bits import with_bytes
from neutralize.dataflow import Inputs, first_tensor, placed_inputs
from neutralize.distributed.part import is_dtensor
from neutralize.errors import NeutralizeError
from neutralize.language import next_token_losses
from neutralize.parts import part_of
from neutralize.progress import Advance
from neutralize.side_by_side import side_by_side
from neutralize.stacked import place_of, run_by_layer
from neutralize.undo import untouched

Evaluate: TypeAlias = Callable[[nn.Module], float]
Loss: TypeAlias = Callable[[Any, Any], "torch.Tensor | float"]
Switch: TypeAlias = Callable[[], AbstractContextManager[object]]
"""Switches layers off for the length of a ``with`` block."""

_CHUNK = 1 << 24
"""How many scores the divergence is computed on at a time: 64 MB of float32, four times over."""


@dataclass(frozen=True)
class Reading:
    """What one evaluation found.

    Attributes:
        loss: in the unit of the loss function.
        kl: mean divergence from the intact model's predictions in nats, or ``None`` where there are none to compare.
    """

    loss: float
    kl: float | None = None


class Subject(Protocol):
    """Something that a model can be evaluated on."""

    @property
    def compares(self) -> bool:
        """Whether ``off`` needs what ``intact`` left behind."""
        ...

    def digest(self) -> str:
        """Hexadecimal text that differs for other data or another loss."""
        ...

    def intact(self, model: nn.Module, watch: BlockInfluences, advance: Advance) -> Reading:
        """Evaluate the intact model in one pass, with what its layers move left on ``watch``."""
        ...

    def off(self, model: nn.Module, switch: Switch, advance: Advance) -> Reading:
        """Evaluate the model with layers off, after ``intact``; ``advance`` is told fractions of an evaluation."""
        ...


# ---- a function of the user's ----------------------------------------------------------------------------------------


class Evaluation:
    """A loss that a function of the user's finds; there is nothing to compare predictions of."""

    def __init__(self, evaluate: Evaluate) -> None:
        """Take the function; a ``digest`` attribute of it tells one data set from another, else its name does."""
        self._evaluate = evaluate

    @property
    def compares(self) -> bool:
        """A number by itself is compared with nothing."""
        return False

    def digest(self) -> str:
        """Name the function."""
        return str(getattr(self._evaluate, "digest", None) or _name(self._evaluate))

    def intact(self, model: nn.Module, watch: BlockInfluences, advance: Advance) -> Reading:
        """Call the function, and look at what the layers do meanwhile."""
        with watch.watching(), watch.collecting() as moved:
            reading = self.off(model, nullcontext, advance)
        watch.add(moved)
        return reading

    def off(self, model: nn.Module, switch: Switch, advance: Advance) -> Reading:
        """Call the function."""
        with switch(), untouched(model):
            loss = _number(self._evaluate(model), "evaluate(model)")
        advance(1.0)
        return Reading(loss)


# ---- batches ---------------------------------------------------------------------------------------------------------


class Batches:
    """The mean loss over batches, and the divergence of the predictions from those of the intact model.

    The intact model's scores are kept as far as ``kept_bytes`` allows. What is beyond is computed anew for every
    evaluation, a few batches at a time: then the memory is bounded, and an evaluation takes up to twice as long.
    """

    def __init__(self, batches: Iterable[Any], loss: Loss | None, *, kl: bool, kept_bytes: int) -> None:
        """Take batches as the model takes them: tensors, tuples, or dicts of keyword arguments."""
        self._batches = [dict(batch) if isinstance(batch, Mapping) else batch for batch in batches]
        if not self._batches:
            raise NeutralizeError("influence: expected at least one batch, got none; give batches=, or evaluate=")
        self._loss = loss
        self._kl = kl
        self._kept_bytes = kept_bytes
        self._kept: dict[int, torch.Tensor] = {}

    @property
    def compares(self) -> bool:
        """Whether the predictions are compared with those of the intact model."""
        return self._kl

    def digest(self) -> str:
        """Return the SHA-256 of every bit of the batches, and of what is measured on them."""
        loss = "outputs.loss" if self._loss is None else _name(self._loss)
        digest = hashlib.sha256(f"{loss} {self._kl}\n".encode())
        for batch in self._batches:
            leaves, structure = pytree.tree_flatten(batch)
            digest.update(f"{structure}\n".encode())
            for leaf in leaves:
                if isinstance(leaf, torch.Tensor):
                    digest.update(f"{leaf.dtype} {list(leaf.shape)}\n".encode())
                    with_bytes(leaf.detach().cpu(), digest.update)
                else:
                    digest.update(f"{leaf!r}\n".encode())
        return digest.hexdigest()

    def intact(self, model: nn.Module, watch: BlockInfluences, advance: Advance) -> Reading:
        """Run the intact model once over all batches; keep its scores, and look at what the layers do meanwhile."""

        def read(index: int) -> tuple[float, float, torch.Tensor | None, Moved]:
            with watch.collecting(_mask(self._batches[index])) as moved:
                outputs = self._run(model, index)
            return *self._weighed(outputs, index), self._scores(outputs), moved

        self._kept = {}
        room, total, weight = self._kept_bytes, 0.0, 0.0
        with watch.watching(), untouched(model):
            for index, (loss, count, scores, moved) in enumerate(self._map(model, read, range(len(self._batches)))):
                total, weight = total + loss, weight + count
                watch.add(moved)
                size = 0 if scores is None else scores.numel() * scores.element_size()
                if scores is not None and size <= room:
                    self._kept[index] = scores
                    room -= size
                self._kl = self._kl and scores is not None
                advance(1 / len(self._batches))
        return Reading(total / weight, 0.0 if self._kl else None)

    def off(self, model: nn.Module, switch: Switch, advance: Advance) -> Reading:
        """Run the model with layers off over all batches, comparing its scores with the intact model's."""
        everything = range(len(self._batches))
        kept = [index for index in everything if index in self._kept or not self._kl]
        beyond = [index for index in everything if index not in set(kept)]
        few = max(1, torch.get_num_threads())
        groups = [kept, *(beyond[start : start + few] for start in range(0, len(beyond), few))]
        found: dict[int, _Part] = {}
        for group in groups:
            reference = {index: self._kept.get(index) for index in group}
            if group is not kept:
                with untouched(model):
                    scores = self._map(model, lambda index: self._scores(self._run(model, index)), group)
                    reference = dict(zip(group, scores, strict=True))

            def read(index: int, reference: dict[int, torch.Tensor | None] = reference) -> _Part:
                outputs = self._run(model, index)
                return _Part(*self._weighed(outputs, index), *self._compared(outputs, index, reference[index]))

            with switch(), untouched(model):
                for index, part in zip(group, self._map(model, read, group), strict=True):
                    found[index] = part
                    advance(1 / len(self._batches))
        parts = [found[index] for index in everything]
        loss = sum(part.loss for part in parts) / sum(part.weight for part in parts)
        positions = sum(part.positions for part in parts)
        return Reading(loss, sum(part.divergence for part in parts) / positions if self._kl and positions else None)

    def _map(self, model: nn.Module, work: Callable[[int], Any], indices: Sequence[int]) -> Iterator[Any]:
        """Call ``work`` for every batch in order, without gradients."""
        for index in indices:
            with torch.inference_mode():
                result = work(index)
            yield result

    def _run(self, model: nn.Module, index: int) -> Any:
        batch: Inputs = self._batches[index]
        args, kwargs = placed_inputs(model, batch)
        return model(*args, **kwargs)

    def _weighed(self, outputs: Any, index: int) -> tuple[float, float]:
        """The loss of a batch times its weight, and the weight."""
        if self._loss is not None:
            return _number(self._loss(outputs, self._batches[index]), "loss(outputs, batch)"), 1.0
        loss = _field(outputs, "loss")
        if loss is None:
            raise NeutralizeError(
                "influence: expected outputs with a loss, got none; put labels into the batches, or give "
                "loss=(outputs, batch) -> number, or evaluate=(model) -> number"
            )
        return _number(loss, "outputs.loss"), 1.0

    def _scores(self, outputs: Any) -> torch.Tensor | None:
        scores = _field(outputs, "logits") if self._kl else None
        return scores if isinstance(scores, torch.Tensor) and scores.is_floating_point() else None

    def _compared(self, outputs: Any, index: int, reference: torch.Tensor | None) -> tuple[float, int]:
        """The sum of the divergence over positions, and how many there are."""
        scores = self._scores(outputs)
        if scores is None or reference is None:
            return 0.0, 0
        mask = _mask(self._batches[index])
        return total_divergence(scores, reference, mask)


class Windows(Batches):
    """The mean loss of the next token over windows of a text, for causal language models, and the divergence.

    On a CPU the windows are worked on side by side, each on one thread: quicker on a machine that is busy otherwise,
    and the same bits each time. Those of a sharded model come one after the other, in the same order in each process.
    """

    def __init__(self, windows: Sequence[torch.Tensor], *, kl: bool, kept_bytes: int) -> None:
        """Take windows (1, length) of token ids, int64."""
        if not windows:
            raise NeutralizeError(
                "influence: expected a text of at least two tokens, got a shorter one; give a longer one"
            )
        super().__init__(
            ({"input_ids": window, "use_cache": False} for window in windows), None, kl=kl, kept_bytes=kept_bytes
        )
        self._windows = windows

    def _map(self, model: nn.Module, work: Callable[[int], Any], indices: Sequence[int]) -> Iterator[Any]:
        if all(parameter.device.type == "cpu" and not is_dtensor(parameter) for parameter in model.parameters()):
            return side_by_side(work, indices)
        return super()._map(model, work, indices)

    def _weighed(self, outputs: Any, index: int) -> tuple[float, float]:
        losses = next_token_losses(_field(outputs, "logits"), self._windows[index])
        return float(losses.double().sum()), float(losses.numel())


@dataclass(frozen=True)
class _Part:
    """What one batch contributes: weighted loss, weight, sum of divergences, number of positions."""

    loss: float
    weight: float
    divergence: float
    positions: int


def total_divergence(
    scores: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[float, int]:
    """Return the sum over positions of the divergence of two predictions, and the number of positions.

    The divergence of p (the reference) and q is ``Σ p log(p / q)``. Computed a few positions at a time, in float32, or
    float64 for such scores: the memory does not grow with their number.

    Args:
        scores: (..., classes), before the softmax.
        reference: the same of the intact model.
        mask: (...), nonzero where a position counts; all count without it.

    Source: Kullback and Leibler 1951, On information and sufficiency.
    """
    classes = scores.shape[-1]
    ours, theirs = scores.reshape(-1, classes), reference.reshape(-1, classes)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    rows = max(1, _CHUNK // max(1, classes))
    total = torch.zeros((), dtype=torch.float64)
    counted = None
    if mask is not None and mask.shape == scores.shape[:-1]:
        counted = mask.reshape(-1).to(scores.device) != 0
    for start in range(0, len(ours), rows):
        q = functional.log_softmax(ours[start : start + rows].to(wide), dim=-1)
        p = functional.log_softmax(theirs[start : start + rows].to(wide), dim=-1)
        weight = p.exp()
        terms = torch.where(weight > 0, weight * (p - q), 0).sum(-1, dtype=torch.float64)
        total += (terms if counted is None else terms[counted[start : start + rows]]).sum().cpu()
    return float(total), len(ours) if counted is None else int(counted.sum())


# ---- what layers move ------------------------------------------------------------------------------------------------

Moved: TypeAlias = dict[str, tuple[float, int]]
"""Per layer the sum of 1 - cos(input, output) over tokens, and the number of tokens."""


class BlockInfluences:
    """How much each layer turns its input: the mean of ``1 - cos(input, output)`` over tokens, of one pass.

    The cosine is taken over the last dimension, and over all but the first for tensors of more than three (images).
    A stacked layer of a recurrent module is looked at by itself; a part, such as a head, hands nothing on to compare.

    Source: Men et al. 2024, ShortGPT, equation 1 (block influence).
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        """Take the layers by name."""
        self._layers = layers
        self._here = threading.local()
        self._total: Moved = {}

    def values(self) -> dict[str, float]:
        """Return the block influence of every layer that hands on as much as it is given."""
        return {name: total / count for name, (total, count) in self._total.items() if count}

    def add(self, moved: Moved) -> None:
        """Add what was collected during a part of the pass."""
        for name, (total, count) in moved.items():
            before, counted = self._total.get(name, (0.0, 0))
            self._total[name] = (before + total, counted + count)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the layers for the length of a ``with`` block."""
        handles = []
        for name, module in self._layers.items():
            place = place_of(name, module)
            if place is not None:
                handles.append(module.register_forward_hook(self._leave_stacked(name, place), with_kwargs=True))
            elif part_of(name) is None:
                handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def collecting(self, mask: torch.Tensor | None = None) -> Iterator[Moved]:
        """Collect what the layers move when this thread calls them.

        Args:
            mask: (batch, tokens), nonzero where a token counts; all count without it.
        """
        moved: Moved = {}
        self._here.moved, self._here.mask, self._here.entered = moved, mask, {}
        try:
            yield moved
        finally:
            del self._here.moved, self._here.mask, self._here.entered

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            entering = first_tensor((args, kwargs))
            if entering is not None and hasattr(self._here, "moved"):
                self._here.entered[name] = entering.detach().clone()  # the layer may add to it in place

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            entered = self._here.entered.pop(name, None) if hasattr(self._here, "moved") else None
            leaving = first_tensor(output)
            if entered is not None and leaving is not None:
                self._collect(name, entered, leaving)

        return hook

    def _leave_stacked(self, name: str, wanted: int) -> Callable[..., None]:
        def look(place: int, entering: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
            if place == wanted:
                self._collect(name, entering, leaving)
            return leaving

        def hook(module: nn.RNNBase, args: Any, kwargs: Any, output: Any) -> None:
            # With an active dropout in between, a second run would draw other numbers.
            if hasattr(self._here, "moved") and not (module.training and module.dropout):
                run_by_layer(module, args, kwargs, look)

        return hook

    def _collect(self, name: str, entered: torch.Tensor, leaving: torch.Tensor) -> None:
        if entered.shape != leaving.shape or not leaving.is_floating_point():
            return
        cosines = _cosines(entered, leaving.detach())
        mask = self._here.mask
        if mask is not None and mask.shape == cosines.shape:
            cosines = cosines[mask.to(cosines.device) != 0]
        total, count = self._here.moved.get(name, (0.0, 0))
        self._here.moved[name] = (total + float((1 - cosines).sum()), count + cosines.numel())


def _cosines(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if one.dim() > 3:
        one, other = one.flatten(1), other.flatten(1)
    return functional.cosine_similarity(one.double(), other.double(), dim=-1) if one.dim() else one.new_ones(0)


# ---- small things ----------------------------------------------------------------------------------------------------


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _mask(batch: Any) -> torch.Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, torch.Tensor) else None


def _number(value: Any, what: str) -> float:
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise NeutralizeError(
            f"influence: expected one number from {what}, got {type(value).__name__}; return the mean loss"
        ) from error


def _name(function: object) -> str:
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{owner.__module__}.{getattr(owner, '__qualname__', owner)}"
