"""Models: the network that a checkpoint is of, without weights, and where each of its parameters is stored.

Nothing that lies in the checkpoint's folder is run: its ``config.json`` chooses among the classes of transformers, and
any other network comes from a factory that the caller names.
"""

from __future__ import annotations

import importlib
import inspect
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from neutralize import ops
from neutralize.checkpoint.bounded import read_json
from neutralize.checkpoint.gguf import KIND
from neutralize.checkpoint.layout import Elements, Layout
from neutralize.checkpoint.naming import Names, Source
from neutralize.checkpoint.provenance import Traced, traced
from neutralize.checkpoint.region import Files, Region
from neutralize.errors import NeutralizeError
from neutralize.select import tensors_of

_DEPTH, _LARGEST, _DEEPEST = 64, 1 << 24, 1 << 16
_FREE = re.compile(r"theta|base|length|seq|window|seed|param|scale|id$|ids$")
"""Names of entries that no loop and no shape follows."""
_REPEATED = re.compile(r"layer|block|depth|expert|stage")
"""Names of entries that say how often something is repeated."""

_DROPPED = {
    "auto_map",  # names code in the folder
    "attn_implementation",  # the next ones may name code on a hub
    "experts_implementation",
    "fusion_config",
    "kernel_config",
    "use_kernels",
    "quantization_config",  # the reader of the files has dealt with it
}

_AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")


def meta_model(
    layout: Layout, factory: str | Callable[..., nn.Module] | None = None, *, buffers: bool = False
) -> tuple[nn.Module, Names]:
    """Build the model that a checkpoint is of, on the meta device, and find where its parameters are stored.

    Args:
        layout: the checkpoint. Its parameters have the dtype that is stored if that is one, else that of the config.
        factory: ``"package.module:callable"``, or the callable, that returns the model; it is called without arguments,
            or with the checkpoint's folder if it wants one. Its parameters and the stored tensors have the same names.
            Without one the class is that of transformers which the folder's ``config.json`` names, or the metadata of
            a GGUF file.
        buffers: compute the buffers that no checkpoint holds (frequencies of rotary embeddings), so that the model can
            run once it has weights.

    Returns:
        The model, in evaluation mode, and the sources of each of its parameters and buffers that are stored.

    Raises:
        NeutralizeError: there is no config or it is malformed, it asks for code of its own, the factory fails, or the
            checkpoint is not of that model.
    """
    if factory is not None:
        build = _called(factory, layout.root)
        with torch.device("meta"), _bounded(layout):
            model = build()
        names = _same_names(model, layout)
    else:
        kind, config, dtype = _transformer(layout)

        def build() -> nn.Module:
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                made: nn.Module = kind(config)
            finally:
                torch.set_default_dtype(before)
            return made

        model, names = _loaded(kind, config, dtype, layout, _state(kind, build, dtype, layout))
    model.eval()
    if buffers:
        with _refused("computing its buffers"), parameters_on_meta(), _bounded(layout):
            _take_buffers(model, build(), names)
    return model, names


# ---- a model of one's own --------------------------------------------------------------------------------------------


def _called(factory: str | Callable[..., nn.Module], root: Path) -> Callable[[], nn.Module]:
    """What calls a factory."""
    found: Any = factory
    if isinstance(factory, str):
        module, _, path = factory.partition(":")
        if not module or not path:
            raise NeutralizeError(
                f"checkpoint: expected 'package.module:callable' for model, got {factory!r}; name a function that "
                "returns the model"
            )
        try:
            found = importlib.import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
        except Exception as error:  # importing runs the user's code
            raise NeutralizeError(
                f"checkpoint: expected something that can be imported for model, got {factory!r} "
                f"({type(error).__name__}: {error}); check the name and PYTHONPATH"
            ) from error
    if not callable(found):
        raise NeutralizeError(f"checkpoint: expected a callable for model, got {found!r}; name one")

    def build() -> nn.Module:
        try:
            takes = [
                parameter
                for parameter in inspect.signature(found).parameters.values()
                if parameter.default is parameter.empty
                and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            ]
        except (TypeError, ValueError):  # a builtin
            takes = []
        with _refused(f"calling {factory!r}"):
            made = found(root) if takes else found()
        if not isinstance(made, nn.Module):
            raise NeutralizeError(
                f"checkpoint: expected a torch.nn.Module from {factory!r}, got {type(made).__name__}; return the model"
            )
        return made

    return build


def _same_names(model: nn.Module, layout: Layout) -> Names:
    """Names of a model whose parameters are stored under their own names, or below one common key."""
    tensors = tensors_of(model)
    prefix = _common_key(model, layout)
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    names: dict[str, tuple[Source, ...]] = {}
    problems = []
    for aliases in groups.values():
        tensor = tensors[aliases[0]]
        stored = [layout.tensors[prefix + name] for name in aliases if prefix + name in layout.tensors]
        wrong = [held for held in stored if tuple(held.shape) != tuple(tensor.shape)]
        if wrong:
            problems.append(f"{wrong[0].name!r} is {list(wrong[0].shape)}, not {list(tensor.shape)}")
        elif not stored and isinstance(tensor, nn.Parameter):
            problems.append(f"{aliases[0]!r} is not stored")
        if stored:
            sources = tuple(traced(held.name, held.shape, tensor.dtype).sources[0] for held in stored)
            names.update(dict.fromkeys(aliases, sources))
    if problems:
        listing = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise NeutralizeError(
            f"checkpoint: expected the parameters of {type(model).__name__}, got others: {listing}; give the model "
            "that the checkpoint was saved from"
        )
    dtypes = _stored_dtypes(layout)
    if len(dtypes) == 1:
        model.to(next(iter(dtypes)))
    return names


def _common_key(model: nn.Module, layout: Layout) -> str:
    """What stands before the parameters' names: nothing, or the key of a state dict in a larger one, with a dot."""
    parameters = [name for name, _ in model.named_parameters()]
    if not parameters or any(name in layout.tensors for name in parameters):
        return ""
    keys = [name.removesuffix(parameters[0]) for name in layout.tensors if name.endswith(f".{parameters[0]}")]
    fitting = [key for key in keys if all(key + name in layout.tensors for name in parameters)]
    return fitting[0] if len(fitting) == 1 else ""


def _stored_dtypes(layout: Layout) -> Counter[torch.dtype]:
    """The floating-point dtypes that a network computes in, among those stored, by elements."""
    found: Counter[torch.dtype] = Counter()
    for stored in layout.tensors.values():
        if isinstance(stored, Elements) and stored.dtype in ops.DTYPES and stored.dtype.itemsize > 1:
            found[stored.dtype] += sum(region.nbytes for region in stored.regions) // stored.dtype.itemsize
    return found


# ---- a model of transformers -----------------------------------------------------------------------------------------


def _transformer(layout: Layout) -> tuple[Any, Any, torch.dtype]:
    """Class, config and dtype of the model of transformers that a folder's config names."""
    transformers = _transformers()
    if layout.kind.startswith(KIND):
        from neutralize.checkpoint.gguf_names import config_of

        path = layout.root / layout.files[0]
        with _refused(f"reading the metadata of {path}"), _quiet():
            content = config_of(layout)
    elif layout.config is not None:
        path = layout.config / "config.json"
        content = read_json(path, "a config")
    else:
        raise NeutralizeError(
            "checkpoint: expected a config.json beside the weights, got none; name the model as "
            "'package.module:callable', or edit tensors by name"
        )
    _check_config(content, path)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        shown = repr(model_type)[:80]
        got = f"{shown} with code of its own, which is never run" if "auto_map" in content else shown
        raise NeutralizeError(
            f"checkpoint: expected a model_type that transformers has in {path}, got {got}; name the model as "
            "'package.module:callable'"
        )
    with _refused(f"reading {path}"), _quiet():
        config_class = CONFIG_MAPPING[model_type]
        config = config_class.from_dict(_without_code(content))
    kind = model_class(transformers, config, content.get("architectures"), path)
    return kind, config, _load_dtype(config, layout)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise NeutralizeError(
            "checkpoint: expected transformers for a folder with config.json, got none; pip install 'neutralize[hf]'"
        ) from error
    return transformers


def _check_config(content: dict[str, Any], path: Path) -> None:
    """Check that a config that anybody may have written is no deeper and asks for no more than one of a model."""
    for depth, key, value in _entries(content):
        if depth > _DEPTH:
            raise NeutralizeError(
                f"checkpoint: expected at most {_DEPTH} levels in {path}, got more; it is no config of a model"
            )
        if isinstance(value, int) and not isinstance(value, bool) and not _FREE.search(key):
            limit = _DEEPEST if _REPEATED.search(key) else _LARGEST
            if not -limit <= value <= limit:
                raise NeutralizeError(
                    f"checkpoint: expected at most {limit} for {key[:80]!r} in {path}, got {str(value)[:20]}; no model "
                    "is that large: fetch it again, or name the model as 'package.module:callable'"
                )


def _entries(content: Any) -> Iterator[tuple[int, str, Any]]:
    """Every value inside a JSON value with its depth and the key that it, or the list around it, stands under."""
    left: list[tuple[int, str, Any]] = [(0, "", content)]
    while left:
        depth, key, value = left.pop()
        yield depth, key, value
        if depth > _DEPTH:
            return
        if isinstance(value, dict):
            left.extend((depth + 1, str(name), inner) for name, inner in value.items())
        elif isinstance(value, list):
            left.extend((depth + 1, key, inner) for inner in value)


def _without_code(value: Any) -> Any:
    """A config without what names code, and without private entries."""
    if isinstance(value, dict):
        return {
            name: _without_code(inner)
            for name, inner in value.items()
            if name not in _DROPPED and not name.startswith("_")
        }
    return [_without_code(inner) for inner in value] if isinstance(value, list) else value


def model_class(transformers: Any, config: Any, architectures: Any, path: Path) -> Any:
    """The class that a config names, if it is one of transformers' for this type of config, or the usual one."""
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise NeutralizeError(
            f"checkpoint: expected a list of names for architectures in {path}, got {repr(architectures)[:80]}; fetch "
            "it again"
        )
    for name in architectures or ():
        with _refused(f"looking for {name[:80]!r}"):
            found = getattr(transformers, name, None) if name.isidentifier() else None
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if is_model and type(config) is getattr(found, "config_class", None):
            return found
    for auto in _AUTO:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise NeutralizeError(
        f"checkpoint: expected a model of transformers for {type(config).__name__} in {path}, got "
        f"{repr(architectures)[:80]}; name the model as 'package.module:callable'"
    )


def _load_dtype(config: Any, layout: Layout) -> torch.dtype:
    """The dtype that is stored; where several are, that of the config."""
    stored = _stored_dtypes(layout)
    if len(stored) == 1:
        return next(iter(stored))
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype) and named in ops.DTYPES:
        return named
    return stored.most_common(1)[0][0] if stored else torch.float32


def _state(kind: Any, build: Callable[[], nn.Module], dtype: torch.dtype, layout: Layout) -> dict[str, Traced]:
    """What transformers is to load: tensors that know where they come from."""
    if layout.kind.startswith(KIND):
        from neutralize.checkpoint.gguf_names import converted

        with _refused(f"reading the tensors of the GGUF file as those of a {kind.__name__}"), _quiet():
            with torch.device("meta"), _bounded(layout):
                model = build()
            return converted(model, layout, dtype)
    return {
        name: traced(name, stored.shape, stored.dtype if isinstance(stored, Elements) else dtype)
        for name, stored in layout.tensors.items()
    }


def _loaded(
    kind: Any, config: Any, dtype: torch.dtype, layout: Layout, state: dict[str, Traced]
) -> tuple[nn.Module, Names]:
    """Let transformers load tensors without elements that know where they come from, and ask the model's parameters."""
    with _refused(f"loading the tensors of the checkpoint as a {kind.__name__}"), _quiet(), _bounded(layout):
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
        )
    wrong = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if wrong:
        listing = ", ".join(map(repr, wrong[:3])) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise NeutralizeError(
            f"checkpoint: expected tensors of the shapes that {kind.__name__} has, got others for {listing}; the "
            "config is of another model"
        )
    names = {
        name: tensor.sources
        for name, tensor in tensors_of(model).items()
        if isinstance(tensor, Traced) and tensor.sources
    }
    if not names:
        raise NeutralizeError(
            f"checkpoint: expected tensors of a {kind.__name__}, got none of them; the config is of another model"
        )
    _replace_traced(model)
    return model, _with_ties(model, names, layout)


def _replace_traced(model: nn.Module) -> None:
    """Put plain meta tensors in place of traced ones; what was one tensor stays one."""
    plain: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if isinstance(tensor, Traced):
                    if id(tensor) not in plain:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                        is_trained = held is module._parameters and tensor.is_floating_point()
                        plain[id(tensor)] = nn.Parameter(empty, is_trained) if held is module._parameters else empty
                    held[name] = plain[id(tensor)]  # type: ignore[assignment]


def _with_ties(model: nn.Module, names: dict[str, tuple[Source, ...]], layout: Layout) -> Names:
    """Tie what the loader will find to be equal: tied weights that are stored twice, with the same bytes."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        copies = names.get(target, ()), names.get(source, ())
        if not all(copies) or copies[0] == copies[1] or not _are_equal(*copies, layout):
            continue
        parent, _, name = target.rpartition(".")
        setattr(model.get_submodule(parent), name, model.get_parameter(source))
        names[target] = names[source] = (*copies[1], *copies[0])
    return names


def _are_equal(one: tuple[Source, ...], other: tuple[Source, ...], layout: Layout) -> bool:
    regions: list[list[Region]] = []
    for sources in (one, other):
        stored = [layout.tensors[source.stored] for source in sources]
        if not all(isinstance(held, Elements) for held in stored):
            return False
        regions.append([region for held in stored for region in held.regions])
    if [region.nbytes for region in regions[0]] != [region.nbytes for region in regions[1]]:
        return False
    with Files(layout.root) as files:
        for first, second in zip(*regions, strict=True):
            for chunk in first.chunks():
                if not torch.equal(files.read(first.part(*chunk)), files.read(second.part(*chunk))):
                    return False
    return True


# ---- guards ----------------------------------------------------------------------------------------------------------


@contextmanager
def _refused(doing: str) -> Iterator[None]:
    """Make one clear error of whatever goes wrong inside: a config can ask a library for anything."""
    try:
        yield
    except NeutralizeError:
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        raise NeutralizeError(
            f"checkpoint: expected no error from {doing}, got {type(error).__name__}: {told}; check config.json and "
            "the model"
        ) from error


@contextmanager
def _bounded(layout: Layout) -> Iterator[None]:
    """Stop a model that is being built from getting many more parameters than the checkpoint has tensors."""
    limit, thread, count = max(4_000, 16 * len(layout.tensors)), threading.get_ident(), 0

    def note(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > limit:
                raise NeutralizeError(
                    f"checkpoint: expected a model of at most {limit} parameters for a checkpoint of "
                    f"{len(layout.tensors)} tensors, got more; the config is of another model"
                )

    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put every parameter that a module gets on the meta device; buffers are computed where they are."""
    thread = threading.get_ident()

    def drop(module: nn.Module, name: str, parameter: Any) -> Any:
        if threading.get_ident() != thread or parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def _take_buffers(model: nn.Module, built: nn.Module, names: Names) -> None:
    """Give a model on the meta device the buffers of one that has real ones, where no checkpoint holds them."""
    modules = dict(built.named_modules())
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and f"{prefix}.{name}".lstrip(".") not in names:
                module._buffers[name] = modules[prefix]._buffers[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting what it finds missing, and from drawing bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
