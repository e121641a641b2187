"""Transformers: a callback that switches layers off by and by while a ``Trainer`` trains."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from torch import nn

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"integrations: expected the package transformers, got none named {error.name}; pip install 'neutralize[hf]'",
        name=error.name,
    ) from error

from neutralize.dataflow import Inputs
from neutralize.errors import NeutralizeError
from neutralize.ramp import Ramp, Shape, ramp
from neutralize.select import Layers


class RampCallback(TrainerCallback):  # type: ignore[misc]  # mypy does not follow transformers
    """Fades layers out while a ``Trainer`` trains: their contribution goes from 1 to 0, and stays 0 to the end.

    The factor follows the optimizer's steps, whatever the number of batches in each. Training that is resumed from a
    checkpoint goes on with the factor that its weights have. With ``load_best_model_at_end`` the weights are in the end
    those of the best step, as damped as they were then: ``ramp.factor`` says how much that is, and
    ``while not callback.ramp.done: callback.ramp.step()`` goes the rest of the way. Training that ends before the ramp
    does is warned of when it begins.

    Attributes:
        ramp: the ramp, once training has begun: ``ramp.factor``, ``ramp.plan``, ``ramp.restore()``.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        steps: int,
        start: int = 0,
        shape: Shape = "linear",
        sides: Literal["in", "out", "both"] | None = None,
        example_inputs: Inputs | None = None,
    ) -> None:
        """Write nothing yet: the model is looked at when training begins.

        Args:
            layers: see ``neutralize.select``.
            steps: how many steps of the optimizer lead from the whole contribution to none.
            start: after how many steps of the optimizer the first of these comes.
            shape: ``linear`` or ``cosine``, as for ``neutralize.ramp``.
            sides: which side of the layers fades, as for ``damp``.
            example_inputs: see ``neutralize.plan``; models of transformers bring their own.

        Raises:
            NeutralizeError: ``start`` is no number of steps.
        """
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise NeutralizeError(f"RampCallback: expected a number of steps for start, got {start!r}; give 0 or more")
        self.ramp: Ramp | None = None
        self._layers, self._start, self._steps = layers, start, steps
        self._options: dict[str, Any] = {"shape": shape, "sides": sides, "example_inputs": example_inputs}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Plan the ramp; of training that is resumed, the part of it that the weights have behind them is done.

        Raises:
            NeutralizeError: see ``neutralize.ramp``.
        """
        modes = [(module, module.training) for module in model.modules()]
        model.eval()  # dropout and checkpointed activations have no part in what is planned
        try:
            self.ramp = ramp(model, self._layers, steps=self._steps, **self._options)
        finally:
            for module, mode in modes:
                module.training = mode
        self.ramp.leads = self.ramp.leads and state.is_world_process_zero  # the others may have replicas
        self.ramp.steps_done = self._done(state.global_step)
        if 0 < state.max_steps < self._start + self._steps:
            warnings.warn(
                f"RampCallback: expected training of {self._start + self._steps} steps or more, got {state.max_steps}, "
                "after which the layers are not off yet; train longer, or give fewer steps",
                stacklevel=2,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Go one step on; after the last one write the null again, as the optimizer moves it."""
        if self.ramp is not None and state.global_step > self._start:
            self.ramp.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where the weights of an earlier step were loaded, go back to the factor of that step."""
        is_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if self.ramp is not None and is_loaded and state.best_global_step is not None:
            self.ramp.steps_done = self._done(state.best_global_step)

    def _done(self, step: int) -> int:
        return min(max(step - self._start, 0), self._steps)
