"""Ramp: switch layers off gradually while training goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Literal

import torch
from torch import nn

from neutralize.apply import apply_plan, rewrite_parts_
from neutralize.audit import Deed, audited, recorded
from neutralize.dataflow import Inputs
from neutralize.distributed.part import Part, part_of
from neutralize.distributed.team import team_of
from neutralize.distributed.wrapped import note_written, resharded
from neutralize.errors import NeutralizeError
from neutralize.plan import TIMEOUT, Plan, Rewrite
from neutralize.planner import plan
from neutralize.select import Layers, tensors_of, unwrap
from neutralize.strategies.damp import Damp
from neutralize.undo import overwrite_

Shape = Literal["linear", "cosine"]


class Ramp:
    """Takes a layer's contribution from 1 to 0 in a given number of steps, training in between.

    Each step multiplies the weights that scale the contribution by the ratio of two factors, so what training did to
    them stays; the last step writes the null, exactly, whatever they had become. Where a factor is ``1 + w`` it is that
    sum that is multiplied. Where both sides of a layer fade each has the square root of the ratio.

    ``restore`` puts these weights back to what they were before the ramp, bit for bit: what training did to them since
    is lost, and what it did to all others stays. In a ``with`` block this is done if the block ends with an exception.

    Attributes:
        plan: of the null, as if applied when the ramp is done.
        steps_done: how many steps have been gone.
        leads: whether this process writes the audit; of those that hold a model together one does.
    """

    def __init__(self, model: object, null: Plan, powers: dict[str, float], steps: int, shape: Shape) -> None:
        """Start at a factor of 1; nothing is written yet.

        Args:
            model: the model planned for, as it was given.
            null: the plan of ``damp`` by zero.
            powers: for each parameter the power of the factor that it is multiplied by.
            steps: how many steps lead to it.
            shape: ``linear`` or ``cosine``.
        """
        # The plan is written once and taken back: every check of an application is made before the first step.
        apply_plan(null, unwrap(model), is_trial=True).put_back()
        self._model = unwrap(model)
        named = tensors_of(self._model)
        team = team_of(model, named.values(), None, TIMEOUT)
        self._deed = Deed.of(
            null, "ramp", self._model, null.written_bytes, processes=1 if team is None else len(team.ranks)
        )
        self._files = audited()
        self.leads = team is None or team.leads
        self._edits = [edit for edit in null.edits if isinstance(edit, Rewrite)]
        parts = [part_of(edit.parameter, named[edit.parameter]) for edit in self._edits]
        self._parts = [part for part in parts if isinstance(part, Part)]  # all are: they have been written
        self._saved: list[torch.Tensor] | None = [block.clone() for block in self._blocks()]
        self._steps, self._shape, self._powers = steps, shape, powers
        self.plan = null
        self.steps_done = 0

    @property
    def factor(self) -> float:
        """What the contribution is multiplied by at the moment: 1 at the start, 0 at the end."""
        return _factor(self.steps_done, self._steps, self._shape)

    @property
    def done(self) -> bool:
        """Whether the layers are off."""
        return self.steps_done == self._steps

    def step(self) -> float:
        """Go one step on, after the optimizer's step; at the end the null is written again, as training moves it.

        Returns:
            The factor reached.
        """
        if self._saved is None:
            raise NeutralizeError("ramp: expected a ramp that is on, got a step after restore; make a new one")
        if self.done:
            self._move(0.0)
            return 0.0
        before, factor = self.factor, _factor(self.steps_done + 1, self._steps, self._shape)
        with self._recorded("ramp", factor=factor):
            self._move(factor / before if before else 0.0)
        self.steps_done += 1
        return factor

    def _move(self, ratio: float) -> None:
        """Multiply the contribution by a ratio."""
        ratios = [ratio ** self._powers[edit.parameter] for edit in self._edits]
        # Toward the null v: w <- r w + (1 - r) v, where v is 0, or -1 for a factor of 1 + w.
        moved = [
            replace(edit, scale=r, fill=(1.0 - r) * edit.fill) for r, edit in zip(ratios, self._edits, strict=True)
        ]
        resharded(self._model)
        rewrite_parts_(list(zip(moved, self._parts, strict=True)))
        note_written(self._model, (part.tensor for part in self._parts))

    def restore(self) -> None:
        """Put back the weights from before the ramp, bit for bit; a second call does nothing."""
        if self._saved is not None:
            with self._recorded("restore"):
                self._put_back(self._saved)
        self._saved, self.steps_done = None, 0

    def _put_back(self, saved: list[torch.Tensor]) -> None:
        resharded(self._model)
        for block, values in zip(self._blocks(), saved, strict=True):
            overwrite_(block, values)
        note_written(self._model, (part.tensor for part in self._parts))

    @contextmanager
    def _recorded(self, action: str, factor: float | None = None) -> Iterator[None]:
        """Record what is written in a ``with`` block; a step that cannot be recorded is taken back."""
        files, before = dict.fromkeys((*self._files, *audited())), None
        if files and action == "ramp":
            resharded(self._model)
            before = [block.clone() for block in self._blocks()]
        try:
            with recorded(replace(self._deed, action=action, factor=factor), files, files if self.leads else ()):
                yield
        except BaseException:
            if before is not None:
                self._put_back(before)
            raise

    def _blocks(self) -> Iterator[torch.Tensor]:
        """What this process holds of the blocks that fade."""
        for edit, part in zip(self._edits, self._parts, strict=True):
            for placed in part.block(edit):
                yield placed.window(part.local)

    def __enter__(self) -> Ramp:
        """Return the ramp."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restore after an exception; else leave the layers where they are."""
        if kind is not None:
            self.restore()

    def __repr__(self) -> str:
        """Say how far it is."""
        return f"Ramp({self.steps_done} of {self._steps} steps, factor {self.factor:.4g})"


def ramp(
    model: nn.Module,
    layers: Layers,
    *,
    steps: int,
    shape: Shape = "linear",
    sides: Literal["in", "out", "both"] | None = None,
    example_inputs: Inputs | None = None,
) -> Ramp:
    """Switch layers off gradually: call ``step`` on the result after each step of the optimizer.

    After the last step the plan (``.plan``) is applied as if by ``plan.apply``, and ``guard`` can hold it.

    Args:
        model: a model with weights.
        layers: see ``select``.
        steps: how many steps lead from the whole contribution to none.
        shape: ``linear``, or ``cosine``: half a period, flat at both ends.
        sides: which side of the layers fades, as for ``damp``.
        example_inputs: see ``plan``.

    Raises:
        NeutralizeError: see ``plan`` of ``damp``; or ``steps`` or ``shape`` is none.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> fading = ramp(model, "0", steps=4)
        >>> [fading.step() for _ in range(4)]
        [0.75, 0.5, 0.25, 0.0]
        >>> bool(model[0].weight.any())
        False
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise NeutralizeError(f"ramp: expected a number of steps of 1 or more, got {steps!r}; give one")
    if shape not in ("linear", "cosine"):
        raise NeutralizeError(f"ramp: expected linear or cosine for shape, got {shape!r}; use one of these")
    null, part = (plan(model, layers, Damp(factor, sides), example_inputs=example_inputs) for factor in (0.0, 0.25))
    powers: dict[str, float] = {}
    for edit in part.edits:  # a weight that one layer writes and another reads may be scaled for both
        if isinstance(edit, Rewrite):
            powers[edit.parameter] = powers.get(edit.parameter, 0.0) + math.log(edit.scale, 0.25)
    return Ramp(model, null, powers, steps, shape)


def _factor(done: int, steps: int, shape: Shape) -> float:
    if done >= steps:
        return 0.0
    part = done / steps
    return 1.0 - part if shape == "linear" else (1.0 + math.cos(math.pi * part)) / 2
