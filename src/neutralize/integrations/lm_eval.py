r"""The evaluation harness (``lm_eval``): a model of transformers with layers off.

Importing this module registers the model ``neutralize``. The harness looks for no models in other packages, so its
command line is called from here::

    python -m neutralize.integrations.lm_eval run --model neutralize \
        --model_args 'pretrained=./llama,layers=model.layers[20:25]' --tasks arc_easy
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from neutralize.errors import NeutralizeError
from neutralize.plan import Plan
from neutralize.planner import plan as make_plan
from neutralize.strategies import STRATEGIES


@register_model("neutralize")
class NeutralizedLM(HFLM):  # type: ignore[misc]  # mypy does not follow lm_eval
    """The harness's model ``hf`` with layers off; results name the plan's digest.

    Attributes:
        plan: what was applied.
        undo: ``undo.restore()`` puts every bit back; the model is then ``hf``.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        layers: str | Sequence[str] | None = None,
        plan: Plan | str | PathLike[str] | None = None,
        strategy: str = "auto",
        **kwargs: Any,
    ) -> None:
        """Load the model as ``hf`` does, plan, and apply.

        Args:
            pretrained: a folder, a hub name, or a model of transformers, which is then edited itself.
            layers: what to switch off; see ``neutralize.select``.
            plan: instead of ``layers`` a plan, or the file that ``neutralize plan --json`` was written to.
            strategy: a name; see ``neutralize.plan``.
            **kwargs: parameters of the strategy (``factor=0.5``), and those of ``hf``.

        Raises:
            NeutralizeError: not one of ``layers`` and ``plan`` is given; or the plan cannot be made, or does not fit.
        """
        if (layers is None) == (plan is None):
            raise NeutralizeError(
                f"lm_eval: expected either layers or plan, got {'none' if layers is None else 'both'}; "
                "give layers=model.layers[3], or plan=FILE"
            )
        known = {field.name for field in dataclasses.fields(STRATEGIES[strategy])} if strategy in STRATEGIES else set()
        options = {name: kwargs.pop(name) for name in sorted(known & kwargs.keys())}
        super().__init__(pretrained, **kwargs)
        if layers is not None:
            self.plan = make_plan(self.model, layers, strategy, **options)
        else:
            self.plan = plan if isinstance(plan, Plan) else Plan.from_json(Path(str(plan)).read_text(encoding="utf-8"))
        self.undo = self.plan.apply(self.model)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the results say of the model: what they say of ``hf``, and the plan."""
        return {**super().get_model_info(), "neutralize_plan": self.plan.digest}


if __name__ == "__main__":
    cli_evaluate()
