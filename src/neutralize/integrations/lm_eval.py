r"""The evaluation harness (``lm_eval``): a model of transformers with layers off.

Importing this module registers the model ``neutralize``. The harness looks for no models in other packages, so its
command line is called from here::

    python -m neutralize.integrations.lm_eval run --model neutralize \
        --model_args 'pretrained=./llama,layers=model.layers[20:25]' --tasks arc_easy
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    lacking = (
        f"lm_eval: expected the packages lm_eval and transformers, got none named {error.name}; "
        "pip install 'neutralize[integrations]'"
    )
    if __name__ == "__main__":
        print(lacking, file=sys.stderr)
        raise SystemExit(2) from None
    raise ModuleNotFoundError(lacking, name=error.name) from error

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
            NeutralizeError: not one of ``layers`` and ``plan`` is given, or parameters of another strategy; or the plan
                cannot be read or made, or does not fit.
        """
        if (layers is None) == (plan is None):
            raise NeutralizeError(
                f"lm_eval: expected either layers or plan, got {'none' if layers is None else 'both'}; "
                "give layers=model.layers[3], or plan=FILE"
            )
        options = {name: kwargs.pop(name) for name in sorted(_OPTIONS & kwargs.keys())}
        if plan is not None and (options or strategy != "auto"):
            raise NeutralizeError(
                f"lm_eval: expected a plan alone, which has its strategy in it, got {', '.join(options) or strategy!r} "
                "with it; give layers instead of plan, or leave that out"
            )
        if strategy in STRATEGIES and (others := options.keys() - _names(STRATEGIES[strategy])):
            takers = [name for name, kind in STRATEGIES.items() if others <= _names(kind)]
            raise NeutralizeError(
                f"lm_eval: expected parameters of strategy {strategy!r}, got {', '.join(sorted(others))}; give "
                f"strategy={' or '.join(takers) or 'another'}"
            )
        found = plan if plan is None or isinstance(plan, Plan) else _read(plan)  # before a large model is loaded
        super().__init__(pretrained, **kwargs)
        self.plan = found if found is not None else make_plan(self.model, layers or (), strategy, **options)
        self.undo = self.plan.apply(self.model)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the results say of the model: what they say of ``hf``, and the plan."""
        return {**super().get_model_info(), "neutralize_plan": self.plan.digest}


def _names(strategy: Any) -> set[str]:
    """The parameters of a strategy."""
    return {field.name for field in dataclasses.fields(strategy)}


_OPTIONS = set[str]().union(*map(_names, STRATEGIES.values()))


def _read(path: str | PathLike[str]) -> Plan:
    try:
        return Plan.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise NeutralizeError(
            f"lm_eval: expected a file with a plan, got {str(path)!r}, which cannot be read ({error}); name what "
            "`neutralize plan --json` was written to"
        ) from error


def main() -> None:
    """Run the harness's command line; an error of this library is one line, and exit status 2."""
    try:
        cli_evaluate()
    except NeutralizeError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
