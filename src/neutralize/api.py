"""The names of the package: what ``import neutralize`` gives."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import nn

from neutralize import ops
from neutralize.activations import forget_activation, register_activation
from neutralize.audit import audit
from neutralize.checkpoint.handle import Checkpoint, FileUndo
from neutralize.dataflow import Inputs
from neutralize.distributed.part import Shard
from neutralize.drop import Dropped, drop
from neutralize.errors import NeutralizeError
from neutralize.guard import Guard, guard
from neutralize.influence import Influence, Sweep, influence
from neutralize.oracle import excised
from neutralize.plan import Assign, Certificate, Copy, Fold, LayerPlan, Plan, Rewrite
from neutralize.planner import Strategy, plan
from neutralize.ramp import Ramp, ramp
from neutralize.report import activation_table
from neutralize.select import Layers, select
from neutralize.strategies import STRATEGIES
from neutralize.undo import Undo
from neutralize.verify import Verification, verify

__all__ = [
    "STRATEGIES",
    "Assign",
    "Certificate",
    "Checkpoint",
    "Copy",
    "Dropped",
    "FileUndo",
    "Fold",
    "Guard",
    "Influence",
    "LayerPlan",
    "NeutralizeError",
    "Plan",
    "Ramp",
    "Rewrite",
    "Shard",
    "Strategy",
    "Sweep",
    "Undo",
    "Verification",
    "activation_table",
    "audit",
    "drop",
    "excised",
    "forget_activation",
    "guard",
    "influence",
    "neutralize",
    "ops",
    "plan",
    "ramp",
    "register_activation",
    "select",
    "verify",
]


def neutralize(
    model: nn.Module | Checkpoint | str | PathLike[str],
    layers: Layers,
    strategy: str | Strategy = "auto",
    *,
    example_inputs: Inputs | None = None,
    freeze: bool = False,
    **options: Any,
) -> Undo | FileUndo:
    """Plan and apply in one call.

    Args:
        model: a model with weights; or a checkpoint, or its path, to be edited in place.
        layers: see ``select``.
        strategy: see ``plan``.
        example_inputs: see ``plan``.
        freeze: of a model: also set ``requires_grad`` of what is written to false.
        **options: parameters of the strategy.

    Returns:
        The undo: ``undo.restore()`` puts every bit back.

    Raises:
        NeutralizeError: see ``plan``; nothing was written.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> undo = neutralize(model, "0", "zero")
        >>> bool(model[0].weight.any())
        False
        >>> undo.restore()
        >>> bool(model[0].weight.any())
        True
    """
    made = plan(model, layers, strategy, example_inputs=example_inputs, **options)
    return made.apply(model, freeze=freeze) if isinstance(model, nn.Module) else made.apply(model)
