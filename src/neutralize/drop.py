"""Drop: blocks that are proven exact leave a transformers model for good, for those who want their cost back too.

The architecture stays what it is, with fewer blocks: the config's counts and per-block lists are cut, and parameters
are renumbered. Which entries of the config these are is not looked up in a table: a candidate is one that, cut, makes
transformers build a model whose parameters are those that are left. The smaller model is then compared with the
neutralized one, bit for bit, before anything is written.
"""

from __future__ import annotations

import copy
import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neutralize.audit import Deed, recorded
from neutralize.bits import same_bits
from neutralize.dataflow import placed_inputs
from neutralize.errors import NeutralizeError
from neutralize.plan import Plan
from neutralize.select import Layers, select, unwrap

_COMBINATIONS = 64
"""How many ways to cut a config are tried."""


@dataclass(frozen=True)
class Dropped:
    """A model with fewer blocks.

    Attributes:
        model: the smaller model, in evaluation mode.
        layers: the blocks that are gone, by their old names.
        config: the entries of the config that were cut, with their old values and the new ones.
        parameters: how many parameters are gone.
        digest: of the plan that switches the blocks off, with which it was compared.
        strategy: of that plan.
    """

    model: nn.Module
    layers: tuple[str, ...]
    config: dict[str, tuple[Any, Any]]
    parameters: int
    digest: str
    strategy: str

    def save(self, folder: str | Path, *, tokenizer: Any = None) -> Path:
        """Write the model with ``save_pretrained``, under a temporary name until it is complete.

        Args:
            folder: one that is not there.
            tokenizer: saved beside it, if given.

        Raises:
            NeutralizeError: there is something at ``folder``, or it cannot be written.
        """
        target = Path(folder).absolute()
        if target.exists():
            raise NeutralizeError(f"drop: expected nothing at {str(target)!r}, got something; name a new folder")
        partial = target.with_name(f".{target.name}.partial")
        count = sum(tensor.numel() * tensor.element_size() for tensor in self.model.parameters())
        deed = Deed("export", str(target), self.digest, self.strategy, self.layers, bytes=count)
        is_written = False
        try:
            with recorded(deed):
                shutil.rmtree(partial, ignore_errors=True)
                self.model.save_pretrained(partial)  # type: ignore[operator]
                if tokenizer is not None:
                    tokenizer.save_pretrained(partial)
                partial.replace(target)
                is_written = True
        except BaseException as error:
            shutil.rmtree(target if is_written else partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise NeutralizeError(
                    f"drop: expected a folder that can be written, got {error.strerror or error} for {str(target)!r}; "
                    "name another"
                ) from error
            raise
        return target


def drop(model: nn.Module, layers: Layers, *, inputs: Any = None) -> Dropped:
    """Make a model of the same architecture without some of its blocks, and prove that it computes the same.

    Args:
        model: of transformers, with weights, in evaluation mode; it is left as it was.
        layers: blocks of one or more ``nn.ModuleList``; see ``neutralize.select``.
        inputs: what both are compared on: the model's arguments; by default token ids of three lengths.

    Returns:
        The smaller model. Its outputs were those of the neutralized one, bit for bit.

    Raises:
        NeutralizeError: a layer is not proven ``exact``, or is no block of a list; the config cannot say that it is
            gone; or the outputs differ.
    """
    from neutralize.planner import plan as planned

    model = unwrap(model)
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or not hasattr(type(model), "_from_config"):
        raise NeutralizeError(
            f"drop: expected a model of transformers, got {type(model).__name__}; remove the module from its list by "
            "hand"
        )
    if model.training:
        raise NeutralizeError("drop: expected a model in evaluation mode, got one in training; call model.eval()")
    chosen = tuple(select(model, layers))
    lists = _by_list(model, chosen)
    plan = planned(model, list(chosen))
    for entry in plan.layers:
        if entry.certificate.kind != "exact":
            raise NeutralizeError(
                f"drop: expected blocks that are proven exact, got {entry.certificate} for {entry.layer!r}; keep it, "
                "and neutralize it instead"
            )
    state = _renumbered(model, lists)
    smaller, changed = _rebuilt(model, config, lists, state)
    _compare(model, plan, smaller, inputs)
    count = sum(parameter.numel() for parameter in model.parameters())
    gone = count - sum(parameter.numel() for parameter in smaller.parameters())
    return Dropped(smaller, chosen, changed, gone, plan.digest, plan.strategy)


def _by_list(model: nn.Module, chosen: tuple[str, ...]) -> dict[str, list[int]]:
    """For each list of blocks the places that go."""
    found: dict[str, list[int]] = {}
    for layer in chosen:
        name, _, place = layer.rpartition(".")
        holder = model.get_submodule(name) if place.isdecimal() else None
        if not isinstance(holder, nn.ModuleList):
            raise NeutralizeError(
                f"drop: expected a block of a ModuleList, got {layer!r}; a part of a block can only be neutralized"
            )
        found.setdefault(name, []).append(int(place))
    for name, places in found.items():
        if len(places) == len(model.get_submodule(name)):  # type: ignore[arg-type]
            raise NeutralizeError(f"drop: expected a block of {name!r} to stay, got all of them; keep one")
    return found


def _renumbered(model: nn.Module, lists: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The tensors that stay, by their new names."""
    out = {}
    for name, tensor in model.state_dict().items():
        new: str | None = name
        for holder, places in lists.items():
            match = re.fullmatch(rf"{re.escape(holder)}\.(\d+)\.(.+)", name)
            if match:
                place = int(match[1])
                gone = sum(other < place for other in places)
                new = None if place in places else f"{holder}.{place - gone}.{match[2]}"
        if new is not None:
            out[new] = tensor
    return out


def _rebuilt(
    model: nn.Module, config: Any, lists: dict[str, list[int]], state: dict[str, torch.Tensor]
) -> tuple[nn.Module, dict[str, tuple[Any, Any]]]:
    """Cut the config until transformers builds from it a model with these tensors; return that, and what was cut."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for changes in itertools.islice(_ways(model, config, lists), _COMBINATIONS):
        smaller_config = copy.deepcopy(config)
        for path, (_, value) in changes.items():
            *parts, name = path.split(".")
            owner = smaller_config
            for part in parts:
                owner = getattr(owner, part)
            setattr(owner, name, value)
        try:
            with torch.device("meta"):
                blueprint = type(model)._from_config(smaller_config)  # type: ignore[attr-defined]
        except Exception:  # any code of any architecture may refuse a config that was cut wrongly
            continue
        if {name: tensor.shape for name, tensor in blueprint.state_dict().items()} != shapes:
            continue
        smaller: nn.Module = type(model)._from_config(smaller_config)  # type: ignore[attr-defined]
        smaller.load_state_dict(state)
        first = next(model.parameters())
        return smaller.to(first.device, first.dtype).eval(), changes
    raise NeutralizeError(
        f"drop: expected a config that can say that {' and '.join(map(repr, lists))} got shorter, got "
        f"{type(config).__name__}, of which no count and no list makes such a model; keep the blocks, and neutralize "
        "them instead"
    )


def _ways(model: nn.Module, config: Any, lists: dict[str, list[int]]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Ways to cut a config, the one that cuts everything of the right length first."""
    sizes = {name: len(model.get_submodule(name)) for name in lists}  # type: ignore[arg-type]
    counts: dict[str, tuple[Any, Any]] = {}
    series: dict[str, tuple[Any, Any]] = {}
    for path, value in _entries(config):
        for name, size in sizes.items():
            if isinstance(value, int) and not isinstance(value, bool) and value == size and path not in counts:
                counts[path] = value, size - len(lists[name])
            elif isinstance(value, list | tuple) and len(value) == size and path not in series:
                series[path] = value, type(value)(each for place, each in enumerate(value) if place not in lists[name])
    likely = [path for path in counts if re.search(r"layer|block|depth", path)]
    others = [path for path in counts if path not in likely]
    for size in range(len(likely), 0, -1):
        for kept in itertools.combinations(likely, size):
            yield {path: counts[path] for path in kept} | series
            if series:
                yield {path: counts[path] for path in kept}
    for path in others:
        yield {path: counts[path]} | series


def _entries(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a config and of the configs in it."""
    for name, value in list(vars(config).items()):
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _entries(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _compare(model: nn.Module, plan: Plan, smaller: nn.Module, inputs: Any) -> None:
    """Run the neutralized model and the smaller one on the same inputs.

    Raises:
        NeutralizeError: their outputs differ in a bit.
    """
    calls = [inputs] if inputs is not None else _token_inputs(model)
    for given in calls:
        args, kwargs = placed_inputs(model, given)
        with torch.no_grad():
            with plan.applied(model):
                wanted = _tensors(model(*args, **kwargs))
            got = _tensors(smaller(*args, **kwargs))
        if len(wanted) != len(got) or not all(same_bits(one, other) for one, other in zip(wanted, got, strict=True)):
            raise NeutralizeError(
                "drop: expected the outputs of the neutralized model, bit for bit, got others: a block depends on its "
                "place; keep the blocks, and neutralize them instead"
            )


def _token_inputs(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise NeutralizeError(
            f"drop: expected inputs for a {type(model).__name__}, which takes no tokens, got none; give inputs"
        )
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, vocabulary, (batch, length), generator=generator)}
        for batch, length in ((1, 1), (2, 7), (1, 64))
    ]


def _tensors(outputs: Any) -> list[torch.Tensor]:
    """What a model computes for its reader: its logits, or its first outputs, without caches."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(outputs, name, None)
        if isinstance(found, torch.Tensor):
            return [found]
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [each for each in (outputs if isinstance(outputs, tuple | list) else ()) if isinstance(each, torch.Tensor)]
