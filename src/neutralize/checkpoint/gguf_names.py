"""The model of a GGUF file, and which of its tensors each parameter comes from.

The config, the names and what is done to the values come from the loader of transformers. What it does to a tensor
(rows permuted for rotary embeddings, one taken from the gain of a norm, a transpose) is found by letting it convert a
few numbers that tell their own place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from neutralize.checkpoint.gguf import read_header
from neutralize.checkpoint.layout import Layout
from neutralize.checkpoint.naming import Names, Source
from neutralize.errors import NeutralizeError


def gguf_model(layout: Layout) -> tuple[nn.Module, Names]:
    """Return the causal language model of a GGUF file on the meta device, and the sources of its parameters.

    Args:
        layout: of the file.

    Raises:
        NeutralizeError: a package is missing, or transformers does not know the architecture.
    """
    path = layout.root / layout.files[0]
    try:
        import gguf  # noqa: F401  # what transformers reads the config with
        import numpy
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers import modeling_gguf_pytorch_utils as loader
    except ImportError as error:
        raise NeutralizeError(
            f"checkpoint: expected the packages transformers and gguf, got none of the name {error.name!r}; run: pip "
            "install 'neutralize[hf]'"
        ) from error
    architecture = read_header(path).metadata.get("general.architecture")  # and whether the file is sound
    content = loader.load_gguf_checkpoint(str(path))["config"]
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    processor = loader.TENSOR_PROCESSORS.get(architecture, loader.TensorProcessor)(config=content)
    mapping: dict[str, str] = loader.get_gguf_hf_weights_map(model, processor)
    parameters = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    names: dict[str, tuple[Source, ...]] = {}
    for name, stored in layout.tensors.items():
        parameter = parameters.get(mapping.get(name, ""))
        if parameter is None:
            continue

        def convert(values: Any, name: str = name) -> Any:
            parsed: dict[str, Any] = {"config": content, "tensors": {}}
            made = processor.process(weights=values, name=name, tensor_key_mapping=mapping, parsed_parameters=parsed)
            return made.weights if made.name == name else None

        names[mapping[name]] = (_source(name, stored.shape, tuple(parameter.shape), convert, numpy),)
    for name, parameter in parameters.items():
        same = next((other for other in names if parameters[other] is parameter), None)
        if name not in names and same is not None:  # a tied parameter, stored once
            names[name] = names[same]
    return model, names


def _source(name: str, stored: tuple[int, ...], parameter: tuple[int, ...], convert: Any, numpy: Any) -> Source:
    """What a loader does to a tensor, told by what becomes of numbers that count its rows."""
    box = tuple((0, size) for size in stored)
    unknown = Source(name, box, (None,) * len(parameter), (0,) * len(parameter), is_computed=True)
    rows = stored[0] if stored else 1
    shape = (rows, *(1 for _ in stored[1:]))
    try:
        zeros = convert(numpy.zeros(shape))
        ones = convert(numpy.ones(shape))
        places = convert(numpy.arange(rows, dtype=numpy.float64).reshape(shape))
    except Exception:  # it wants all columns: the numbers above have one
        return unknown
    if zeros is None or not numpy.isfinite(zeros).all() or len({*zeros.ravel()}) != 1:
        return unknown
    offset = float(zeros.ravel()[0])
    if not (ones == offset + 1).all():
        return unknown
    is_shuffled = not (places.ravel() == numpy.arange(rows) + offset).all()
    dims = tuple(range(len(stored)))
    if stored == parameter and places.shape[:1] == shape[:1]:
        order: tuple[int | None, ...] = dims
    elif stored[::-1] == parameter and len(stored) == 2 and places.shape == shape[::-1]:
        order = (1, 0)
    else:
        widened = [dim for dim in range(len(parameter)) if parameter[:dim] + parameter[dim + 1 :] == stored]
        if not widened or parameter[widened[0]] != 1:
            return unknown
        order = (*dims[: widened[0]], None, *dims[widened[0] :])
    return Source(name, box, order, (0,) * len(parameter), offset, is_shuffled)
