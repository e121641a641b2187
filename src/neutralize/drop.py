"""Drop: blocks that are proven exact leave a transformers model for good, for those who want their cost back too.

The architecture stays what it is, with fewer blocks: the config's counts and per-block lists are cut, and parameters
are renumbered. Which entries of the config these are is not looked up in a table: a candidate is one that, cut, makes
transformers build a model whose parameters are those that are left. The smaller model is then compared with the
neutralized one, bit for bit, before anything is written.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

import torch
from torch import nn

from neutralize.adapters import premise
from neutralize.audit import Deed, recorded, source_of
from neutralize.bits import same_bits
from neutralize.checkpoint.model import model_class, parameters_on_meta
from neutralize.dataflow import placed_inputs
from neutralize.errors import NeutralizeError
from neutralize.language import loading, quiet_transformers
from neutralize.select import Layers, select, unwrap

_Lists: TypeAlias = dict[str, list[int]]
"""Lists of blocks, by name, and the places that go."""
_Changes: TypeAlias = dict[str, tuple[Any, Any]]
"""Entries of a config, by path: the old value and the new one."""
_Proofs: TypeAlias = list[tuple[Callable[[nn.Module], list[torch.Tensor]], list[torch.Tensor]]]
"""What runs a model, and what it gives of the neutralized one."""

_WAYS = 64
"""How many ways to cut a config are tried."""
_LONGEST = 64
"""Tokens in the longest input that both models run on."""
_GENERATION = "generation_config.json"
_NEW = 3
"""Tokens that both models write, with their caches."""
_LIKELY = re.compile(r"^(?!.*(interval|period|step|freq|every|pattern)).*(layer|block|depth)")
"""Names of entries that count blocks."""
_PLACES = re.compile(r"layer|block|depth|idx|indic|index")
"""Names of entries that list places of blocks."""
_PARTIAL = re.compile(r"layer|block|depth|first|last|dense")
"""Names of entries that count some of the blocks, from the first or to the last."""
_WEIGHTS = [
    f"*.{kind}" for kind in ("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "h5", "msgpack", "onnx", "index.json")
]
_NOT_CARRIED = re.compile("|".join([*map(fnmatch.translate, _WEIGHTS), r"^config\.json$", r"^\."]))
"""Names of files in a model's folder that are not copied beside the smaller one."""
_SIDES = ("encoder", "decoder")
_PLAIN = (bool, int, str, NoneType)
_HOW_TO_TRAIN = ("training", "gradient_checkpointing")
"""Attributes that say how a block is trained, wherever it is: no smaller model is built with them."""


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
        origin: where the whole model says that it comes from (``name_or_path``), or ``""``: for the audit.
    """

    model: nn.Module
    layers: tuple[str, ...]
    config: dict[str, tuple[Any, Any]]
    parameters: int
    digest: str
    strategy: str
    origin: str = ""

    def save(self, folder: str | Path, *, tokenizer: Any = None, source: str | Path | None = None) -> Path:
        """Write the model with ``save_pretrained``, under a temporary name until it is complete.

        Args:
            folder: one that is not there.
            tokenizer: saved beside it, if given.
            source: the folder of the whole model, if there is one: tokenizer, licence and all other files in it that
                are neither weights nor a config are copied.

        Raises:
            NeutralizeError: there is something at ``folder``, or it cannot be written.
        """
        target = free(folder)
        unfinished = target.with_name(f".{target.name}.partial")
        count = sum(tensor.numel() * tensor.element_size() for tensor in self.model.parameters())
        deed = Deed("export", str(target), self.digest, self.strategy, self.layers, bytes=count, source=self.origin)
        is_written = False
        try:
            with recorded(deed):
                shutil.rmtree(unfinished, ignore_errors=True)
                self._fill(unfinished, tokenizer, [] if source is None else sorted(Path(source).iterdir()))
                unfinished.replace(target)
                is_written = True
        except BaseException as error:
            shutil.rmtree(target if is_written else unfinished, ignore_errors=True)
            if isinstance(error, OSError):
                raise NeutralizeError(
                    f"drop: expected a folder that can be written, got {error.strerror or error} for {str(target)!r}; "
                    "name another"
                ) from error
            if isinstance(error, ValueError) and not isinstance(error, NeutralizeError):
                told = " ".join(str(error).split())[:300]
                raise NeutralizeError(
                    f"drop: expected a model that save_pretrained takes, got {told}; put that right in the whole model"
                ) from error
            raise
        return target

    def _fill(self, folder: Path, tokenizer: Any, beside: list[Path]) -> None:
        """Save into a folder, with the files that lay beside the whole model."""
        carried = [path for path in beside if path.is_file()]
        with quiet_transformers(), _unchecked(self.model, any(path.name == _GENERATION for path in carried)):
            self.model.save_pretrained(folder)  # type: ignore[operator]
        for path in carried:
            if not _NOT_CARRIED.search(path.name) and (path.name == _GENERATION or not (folder / path.name).exists()):
                shutil.copyfile(path, folder / path.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _unchecked(model: Any, is_copied: bool) -> Iterator[None]:
    """Keep settings for generation that are copied as they are from being checked: many that load are not valid."""
    held = getattr(model, "generation_config", None)
    if is_copied and held is not None:
        model.generation_config = type(held)()
    try:
        yield
    finally:
        model.generation_config = held


def free(folder: str | Path) -> Path:
    """Return the absolute path of a folder that is yet to be made.

    Raises:
        NeutralizeError: there is something.
    """
    target = Path(folder).absolute()
    if target.exists() or target.is_symlink():
        raise NeutralizeError(f"drop: expected nothing at {str(target)!r}, got something; name a new folder")
    return target


def load_whole(source: str, dtype: str) -> tuple[nn.Module, Path]:
    """Load a model of the class that its config names, and say in which folder its other files are.

    Args:
        source: a folder, or a name that the hub or its local cache knows.
        dtype: of the weights; ``"auto"`` is that of the files.

    Raises:
        NeutralizeError: it does not load, or some of its weights are not there.
    """
    is_local = Path(source).is_dir()
    with loading(source, "a folder or a hub name of a model of transformers"):
        import transformers
        from huggingface_hub import snapshot_download

        folder = Path(source if is_local else snapshot_download(source, ignore_patterns=[*_WEIGHTS, "*/*"]))
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = model_class(transformers, config, config.architectures, folder)
        model, found = kind.from_pretrained(source, dtype=dtype, local_files_only=is_local, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise NeutralizeError(
            f"drop: expected all weights of a {kind.__name__} in {source!r}, got none for {missing[0]!r}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}; fetch it again"
        )
    return model.eval(), folder


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
    if away := next((name for name, tensor in model.state_dict().items() if tensor.is_meta), ""):
        raise NeutralizeError(
            f"drop: expected a model whose weights are in memory, got {away!r} on the meta device: offloaded, or never "
            "loaded; load it without offloading"
        )
    chosen = tuple(select(model, layers))
    if active := premise(model):
        raise NeutralizeError(
            f"drop: expected a model without adapters, got one with {active}; call merge_and_unload() first, "
            "which keeps what they add"
        )
    lists = _by_list(model, chosen)
    calls = [inputs] if inputs is not None else _own_inputs(model)
    plan = planned(model, list(chosen), example_inputs=calls[0])
    for entry in plan.layers:
        if entry.certificate.kind != "exact":
            raise NeutralizeError(
                f"drop: expected blocks that are proven exact, got {entry.certificate} for {entry.layer!r}; keep it, "
                "and neutralize it instead"
            )
    with plan.applied(model):
        proofs: _Proofs = [(partial(_outputs, given=given), _outputs(model, given)) for given in calls]
        with contextlib.suppress(Exception):  # a model need not write text, nor from these inputs alone
            proofs.append((partial(_written, given=calls[0]), _written(model, calls[0])))
    smaller, changed = _rebuilt(model, config, lists, proofs)
    count = sum(parameter.numel() for parameter in model.parameters())
    gone = count - sum(parameter.numel() for parameter in smaller.parameters())
    return Dropped(smaller, chosen, changed, gone, plan.digest, plan.strategy, source_of(model))


def _by_list(model: nn.Module, chosen: tuple[str, ...]) -> _Lists:
    """For each list of blocks the places that go."""
    found: _Lists = {}
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


def _new_name(name: str, lists: _Lists) -> str | None:
    """The name that a parameter or module gets, or ``None`` for one that is gone."""
    for holder, places in lists.items():
        match = re.fullmatch(rf"{re.escape(holder)}\.(\d+)(\..+)?", name)
        if match:
            place = int(match[1])
            return None if place in places else f"{holder}.{_shifted(place, places)}{match[2] or ''}"
    return name


def _shifted(place: int, gone: list[int]) -> int:
    """What is left before a place."""
    return place - sum(other < place for other in gone)


def _rebuilt(model: nn.Module, config: Any, lists: _Lists, proofs: _Proofs) -> tuple[nn.Module, _Changes]:
    """Cut the config until transformers builds from it the model that is left; return that, and what was cut.

    Args:
        model: the whole model.
        config: its config.
        lists: for each list of blocks the places that go.
        proofs: what runs a model, and what it gives of the neutralized one.
    """
    state = {new: tensor for name, tensor in model.state_dict().items() if (new := _new_name(name, lists)) is not None}
    shapes = {name: tensor.shape for name, tensor in state.items()}
    refused = ""
    for changes in itertools.islice(_ways(model, config, lists), _WAYS):
        smaller_config = copy.deepcopy(config)
        _set(smaller_config, changes)
        try:
            stored = type(config).from_dict(smaller_config.to_dict())
            with torch.device("meta"):
                blueprint = type(model)._from_config(copy.deepcopy(smaller_config))  # type: ignore[attr-defined]
        except Exception:  # any code of any architecture may refuse a config that was cut wrongly
            continue
        entries = dict(_entries(stored))
        if any(entries.get(path) != value for path, (_, value) in changes.items()):
            continue  # what is computed from other entries when the config is read
        if {name: tensor.shape for name, tensor in blueprint.state_dict().items()} != shapes:
            continue
        told = _moved_attribute(model, blueprint, lists)
        if not told:
            smaller = _filled(model, smaller_config, lists, state)
            told = _other_outputs(smaller, proofs)
            if not told:
                _on_its_own(smaller)
                return smaller, changes
        refused = refused or told
    if refused:
        raise NeutralizeError(
            f"drop: expected a smaller model that computes what the neutralized one does, got {refused}; keep the "
            "blocks, and neutralize them instead"
        )
    raise NeutralizeError(
        f"drop: expected a config that can say that {' and '.join(map(repr, lists))} got shorter, got "
        f"{type(config).__name__}, of which no count and no list makes such a model; keep the blocks, and neutralize "
        "them instead"
    )


def _filled(model: nn.Module, config: Any, lists: _Lists, state: dict[str, torch.Tensor]) -> nn.Module:
    """The model of a config with these tensors, and with the buffers that no state dict holds.

    It has the memory of the whole model: sums are split by the alignment of what they read, so copies round otherwise.
    """
    with parameters_on_meta():
        smaller: nn.Module = type(model)._from_config(config, dtype=model.dtype)  # type: ignore[attr-defined]
    smaller.load_state_dict(state, assign=True)
    smaller.generation_config = copy.deepcopy(getattr(model, "generation_config", None))  # type: ignore[assignment]
    smaller.tie_weights()  # type: ignore[operator]
    old = {new: buffer for name, buffer in model.named_buffers() if (new := _new_name(name, lists)) is not None}
    for prefix, module in smaller.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer, kept = module._buffers[name], old.get(f"{prefix}.{name}".lstrip("."))
            if buffer is not None and kept is not None and kept.shape == buffer.shape:
                module._buffers[name] = kept
    return smaller.eval()


def _on_its_own(smaller: nn.Module) -> None:
    """Give a model memory of its own; what was tied stays tied."""
    for parameter in smaller.parameters():
        parameter.data = parameter.data.clone()
    for module in smaller.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()


def _moved_attribute(model: nn.Module, smaller: nn.Module, lists: _Lists) -> str:
    """Say which plain attribute of a block that stays is another at its new place; empty if none is.

    A window that is longer than the inputs, or rotary embeddings in every other block, show here whatever the inputs.
    """
    modules = dict(smaller.named_modules())
    for name, module in model.named_modules():
        new = _new_name(name, lists)
        holder = next((holder for holder in lists if name.startswith(f"{holder}.")), None)
        if new is None or holder is None or new not in modules:
            continue
        place = int(name[len(holder) + 1 :].partition(".")[0])
        up = place - _shifted(place, lists[holder])
        for attribute, old in vars(module).items():
            value = vars(modules[new]).get(attribute)
            is_plain = isinstance(old, _PLAIN) and isinstance(value, _PLAIN) and not attribute.startswith("_")
            if not is_plain or old == value or attribute in _HOW_TO_TRAIN:
                continue
            if type(old) is type(value) is int and old - value == up:  # the place itself
                continue
            return f"{value!r} instead of {old!r} for {attribute!r} of {name!r}, which depends on its place"
    return ""


def _set(config: Any, changes: _Changes) -> None:
    for path, (_, value) in changes.items():
        *parts, name = path.split(".")
        owner = config
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, name, value)


def _ways(model: nn.Module, config: Any, lists: _Lists) -> Iterator[_Changes]:
    """Ways to cut a config, the one that cuts everything of the right length first.

    Counts of leading or trailing blocks (``first_k_dense_replace``) are touched only if nothing else does.
    """
    counts: dict[str, list[tuple[Any, Any]]] = {}
    series: dict[str, tuple[Any, Any]] = {}
    some: dict[str, list[tuple[Any, Any]]] = {}
    for holder, gone in lists.items():
        size = len(model.get_submodule(holder))  # type: ignore[arg-type]
        for path, value in _entries_for(model, config, holder):
            if any(one in holder.lower() and other in path for one, other in (_SIDES, _SIDES[::-1])):
                continue
            if isinstance(value, int) and not isinstance(value, bool):
                if value == size:
                    counts.setdefault(path, []).append((value, size - len(gone)))
                elif 0 < value < size and _PARTIAL.search(path):
                    leading = value - sum(place < value for place in gone)
                    trailing = value - sum(place >= size - value for place in gone)
                    found = [(value, new) for new in dict.fromkeys((leading, trailing)) if new != value]
                    some.setdefault(path, []).extend(found)
            elif isinstance(value, list | tuple) and value and path not in series and not re.search("token", path):
                if len(value) == size:
                    kept = (each for place, each in enumerate(value) if place not in gone)
                    series[path] = value, type(value)(kept)
                elif _PLACES.search(path) and _are_places(value, size):
                    kept = (_shifted(place, gone) for place in value if place not in gone)
                    series[path] = value, type(value)(kept)
                elif _PLACES.search(path) and len(value) < size and all(isinstance(each, str) for each in value):
                    kept = (value[place % len(value)] for place in range(size) if place not in gone)  # a pattern
                    series[path] = value, type(value)(kept)
    likely = {path: found for path, found in counts.items() if _LIKELY.search(path)}
    others = {path: found for path, found in counts.items() if path not in likely}
    bases: list[_Changes] = []
    for chosen in sorted(
        itertools.product(*([*found, None] for found in likely.values())), key=lambda chosen: chosen.count(None)
    ):
        base = {path: change for path, change in zip(likely, chosen, strict=True) if change is not None}
        bases += [base | series, base] if base and series else [base] if base else []
    bases += [{path: change} | series for path, found in others.items() for change in found]
    yield from bases
    for path, found in some.items():
        yield from (base | {path: change} for change in found for base in bases[:2])
    for pair in itertools.combinations(some, 2):
        for each in itertools.product(*(some[path] for path in pair)):
            yield from (base | dict(zip(pair, each, strict=True)) for base in bases[:2])


def _are_places(value: Any, size: int) -> bool:
    """Whether a list may be one of places of blocks."""
    are_numbers = all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < size for each in value)
    return are_numbers and len(set(value)) == len(value)


def _entries_for(model: nn.Module, config: Any, holder: str) -> Iterator[tuple[str, Any]]:
    """The entries of the config that a list of blocks is built from: those of the innermost model around it."""
    parts = holder.split(".")
    owners = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1)]
    kind = next(type(owner.config) for owner in owners if hasattr(getattr(owner, "config", None), "to_dict"))
    entries = list(_entries(config))
    owned = [path for path, value in _parts(config) if type(value) is kind]
    for path, value in entries:
        if not owned or path.rpartition(".")[0] in owned:
            yield path, value


def _parts(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A config and the configs in it, by path; its own is empty."""
    yield prefix, config
    for name, value in list(vars(config).items()):
        if not name.startswith("_") and hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _parts(value, f"{prefix}.{name}".lstrip("."))


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """The entries of a config and of the configs in it, by path."""
    parts = dict(_parts(config))
    for prefix, part in parts.items():
        for name, value in list(vars(part).items()):
            path = f"{prefix}.{name}".lstrip(".")
            if not name.startswith("_") and path not in parts:
                yield path, value


def _outputs(model: nn.Module, given: Any) -> list[torch.Tensor]:
    """What a model computes for its reader: its logits, or its first outputs, without caches."""
    args, kwargs = placed_inputs(model, given)
    with torch.no_grad():
        outputs = model(*args, **kwargs)
    for name in ("logits", "last_hidden_state"):
        found = getattr(outputs, name, None)
        if isinstance(found, torch.Tensor):
            return [found]
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [each for each in (outputs if isinstance(outputs, tuple | list) else ()) if isinstance(each, torch.Tensor)]


def _written(model: nn.Module, given: Any) -> list[torch.Tensor]:
    """The scores of the first tokens that a model writes, with its cache."""
    _, kwargs = placed_inputs(model, given)
    settings = {"do_sample": False, "num_beams": 1, "use_cache": True, "pad_token_id": 0}
    with torch.no_grad(), quiet_transformers():
        found: Any = model.generate(  # type: ignore[operator]
            input_ids=kwargs["input_ids"],
            max_new_tokens=_NEW,
            min_new_tokens=_NEW,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
    return list(found.logits)


def _other_outputs(smaller: nn.Module, proofs: _Proofs) -> str:
    """Say what a model does instead of computing what the neutralized one did; empty if it is that."""
    for run, wanted in proofs:
        try:
            got = run(smaller)
        except Exception as error:  # such as a cache that wants a block of attention, when none is left
            return f"{type(error).__name__} ({next(iter(str(error).splitlines()), '')}) when it runs"
        if len(got) != len(wanted) or not all(same_bits(one, other) for one, other in zip(got, wanted, strict=True)):
            return "other outputs: a block depends on its place"
    return ""


def _own_inputs(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Token ids of three lengths, for an encoder and a decoder too; or images."""
    config: Any = model.config
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    kind = getattr(model, "main_input_name", "input_ids")
    vocabulary = getattr(text, "vocab_size", None)
    if kind == "input_ids" and isinstance(vocabulary, int):
        longest = min(getattr(text, "max_position_embeddings", None) or _LONGEST, _LONGEST)
        names = ["input_ids", *(["decoder_input_ids"] if config.is_encoder_decoder else [])]
        return [
            {name: torch.randint(0, vocabulary, (batch, length), generator=generator) for name in names}
            for batch, length in ((2, min(7, longest)), (1, 1), (1, longest))
        ]
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if kind == "pixel_values" and isinstance(size, int) and isinstance(channels, int):
        return [{"pixel_values": torch.randn(2, channels, size, size, generator=generator)}]
    raise NeutralizeError(
        f"drop: expected inputs for a {type(model).__name__}, which takes no tokens, got none; give inputs"
    )
