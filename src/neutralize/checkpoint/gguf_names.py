"""GGUF names: the model that a GGUF file is of in transformers, and what its loader makes of the stored tensors.

The loader renames tensors, and turns their values back into what the model has: it permutes rows for rotary
embeddings, transposes, subtracts one from the gains of norms. Nothing of its tables is copied here: its converters are
run on small arrays of numbers that tell where each element went.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neutralize.checkpoint.gguf import MAGIC, Gguf, read_header
from neutralize.checkpoint.layout import Layout
from neutralize.checkpoint.naming import Source
from neutralize.checkpoint.provenance import Traced, traced
from neutralize.errors import NeutralizeError

_PROBE = 8
"""How long the dimensions after the first are at most in a probe; those of convolution kernels stay as they are."""

_LIST = 1 << 12
"""How long a list in the metadata is at most that tells something about the network: one number per layer."""

_PROBE_ELEMENTS = 1 << 26
"""How many elements a probe has at most where the converter wants the shape as it is."""


def config_of(layout: Layout) -> dict[str, Any]:
    """Return what transformers makes of a GGUF file's metadata, as a ``config.json`` has it.

    Args:
        layout: the file, or the parts that it was split into.

    Raises:
        NeutralizeError: transformers is missing or does not know the architecture, or the file is one of several parts.
    """
    path = layout.root / layout.files[0]
    header = read_header(path)
    parts = header.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > len(layout.files):
        raise NeutralizeError(
            f"checkpoint: expected a whole model in {str(path)!r}, got one of {parts} parts; name the folder that "
            "holds all of them, and no other GGUF files"
        )
    _loader()
    if not _is_native(header.architecture):
        try:
            return _config(header, layout)
        except (ValueError, IndexError) as error:  # an architecture that it does not have, or none
            got = f"{header.architecture[:80]!r} ({' '.join(str(error).split())[:200]})"
    else:
        got = f"{header.architecture[:80]!r}, which it loads in a way that is not followed here"
    raise NeutralizeError(
        f"checkpoint: expected an architecture that transformers loads in {str(path)!r}, got {got}; edit tensors by "
        "name"
    )


def converted(model: nn.Module, layout: Layout, dtype: torch.dtype) -> dict[str, Traced]:
    """Return what the loader of GGUF files makes of the stored tensors, by the model's names.

    Args:
        model: on the meta device.
        layout: the file.
        dtype: of the result.
    """
    loader, header = _loader(), read_header(layout.root / layout.files[0])
    processor = loader.TENSOR_PROCESSORS.get(header.architecture, loader.TensorProcessor)(
        config=_config(header, layout)
    )
    with _names_cached():
        mapping: dict[str, str] = loader.get_gguf_hf_weights_map(model, processor)
    state = model.state_dict()
    sources: dict[str, list[Source]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for name, stored in layout.tensors.items():

        def convert(values: Any, name: str = name) -> dict[str, Any]:
            parsed: dict[str, dict[str, Any]] = {"tensors": {}}
            result = processor.process(values, name, tensor_key_mapping=mapping, parsed_parameters=parsed)
            made = {key: value.numpy() for key, value in parsed["tensors"].items()}
            return made | ({mapping[result.name]: result.weights} if result.name in mapping else {})

        shape = tuple(stored.shape)
        for target, placed in _placed(convert, shape).items():
            if target in state:
                sizes[target] = placed.sizes(shape, tuple(state[target].shape))
                sources.setdefault(target, []).append(placed.source(name, shape))
    return {target: Traced(sizes[target], dtype, own) for target, own in sources.items()}


@dataclass(frozen=True)
class _Placed:
    """Where a converter puts the elements of an array.

    Attributes:
        probe: shape of the array.
        result: shape of the result.
        begin: of the box of the result that its elements fill.
        extent: of that box.
        order: for each dimension of the result that of the array, or ``None`` for one of size 1.
        offset: what is added.
        is_shuffled: the elements lie in another order.
        rows: of whole rows in another order, which of them is the first in the result, the second and so on.
        is_computed: something else is done to them.
    """

    probe: tuple[int, ...]
    result: tuple[int, ...]
    begin: tuple[int, ...] = ()
    extent: tuple[int, ...] = ()
    order: tuple[int | None, ...] = ()
    offset: float = 0.0
    is_shuffled: bool = False
    rows: tuple[int, ...] = ()
    is_computed: bool = False

    def sizes(self, shape: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the result for an array of a shape; the wanted one where nothing speaks against it."""
        if self.is_computed:
            return wanted
        if self.is_scattered:
            return wanted if math.prod(wanted) == math.prod(shape) else shape
        return tuple(
            size * real // probed for size, (probed, real) in zip(self.result, self._grown(shape), strict=True)
        )

    def source(self, name: str, shape: tuple[int, ...]) -> Source:
        """What a stored tensor of a shape is to the result."""
        whole = traced(name, shape, torch.float32).sources[0]
        if self.is_computed:
            return replace(whole, order=(), origin=(), is_computed=True)
        grown = self._grown(shape)
        origin = tuple(first * real // probed for first, (probed, real) in zip(self.begin, grown, strict=True))
        return replace(
            whole,
            order=self.order,
            origin=origin,
            offset=self.offset,
            is_shuffled=self.is_shuffled,
            rows=self.rows,
        )

    @property
    def is_scattered(self) -> bool:
        """Whether its elements lie all over the result."""
        return self.is_shuffled and all(dim is None for dim in self.order)

    def _grown(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """For each dimension of the result, how long its own is in the array that was probed, and really."""
        return [(1, 1) if dim is None else (self.probe[dim], shape[dim]) for dim in self.order]


def _placed(convert: Callable[[Any], dict[str, Any]], shape: tuple[int, ...]) -> dict[str, _Placed]:
    """Where a converter puts the elements of arrays of a shape, by the name of the result."""
    small = tuple(size if dim == 0 else min(size, _PROBE) for dim, size in enumerate(shape))
    for probe in dict.fromkeys((small, shape)):
        if math.prod(probe) > _PROBE_ELEMENTS:
            break
        try:
            return _probed(convert, probe)
        except (ValueError, IndexError, RuntimeError):  # it counts on the real shape
            continue
    return {}


def _probed(convert: Callable[[Any], dict[str, Any]], shape: tuple[int, ...]) -> dict[str, _Placed]:
    """The same, from what becomes of zeros, of ones, and of each element's place along each dimension."""
    import numpy as np

    def made(values: Any) -> dict[str, torch.Tensor]:
        with np.errstate(all="ignore"):
            result = convert(np.broadcast_to(values, shape).astype(np.float32))
        return {name: torch.from_numpy(np.array(array, np.float32)) for name, array in result.items()}

    filled = {
        name: _filled(shape, zeros, ones) for (name, zeros), ones in zip(made(0).items(), made(1).values(), strict=True)
    }
    ranges = (np.arange(size).reshape(-1, *(1,) * (len(shape) - dim - 1)) for dim, size in enumerate(shape))
    places = [made(values) for values in ranges]
    return {
        name: found if found.is_computed else _ordered(found, [place[name] for place in places])
        for name, found in filled.items()
    }


def _filled(shape: tuple[int, ...], zeros: torch.Tensor, ones: torch.Tensor) -> _Placed:
    """Which box of the result an array of a shape fills, and what is added, from the results for zeros and ones."""
    result = tuple(zeros.shape)
    computed = _Placed(shape, result, is_computed=True)
    numel, inside = math.prod(shape), ones - zeros == 1
    if not numel or int(inside.sum()) != numel or not bool(((ones == zeros) | inside).all()):
        return computed
    along = [inside.movedim(dim, 0).reshape(size, -1).any(1).nonzero() for dim, size in enumerate(result)]
    begin = tuple(int(held.min()) for held in along)
    base = zeros[tuple(slice(first, int(held.max()) + 1) for first, held in zip(begin, along, strict=True))]
    offset = float(base.flatten()[0])
    if base.numel() != numel or not bool((base == offset).all()):
        return computed
    return _Placed(shape, result, begin, extent=tuple(base.shape), offset=offset)


def _ordered(found: _Placed, places: list[torch.Tensor]) -> _Placed:
    """In which order the elements lie in the box, from what becomes of the place of each along each dimension."""
    shape, extent = found.probe, found.extent
    box = tuple(slice(first, first + size) for first, size in zip(found.begin, extent, strict=True))
    places = [(place[box] - found.offset).round() for place in places]

    def runs(dim: int, along: int) -> bool:
        """Whether a dimension of the array runs along one of the box."""
        return bool((places[dim] == torch.arange(shape[dim]).view(-1, *(1,) * (len(extent) - along - 1))).all())

    for order in _orders(shape, extent):
        if all(runs(dim, order.index(dim)) for dim in range(len(shape)) if dim in order):
            return replace(found, order=order)
    if extent == shape:
        rows = places[0].reshape(shape[0], -1)[:, 0]
        is_moved = bool((places[0] == rows.view(-1, *(1,) * (len(shape) - 1))).all())
        is_all = torch.equal(rows.sort().values, torch.arange(shape[0], dtype=rows.dtype))
        if is_moved and is_all and all(runs(dim, dim) for dim in range(1, len(shape))):
            moved = tuple(map(int, rows.tolist()))
            return replace(found, order=tuple(range(len(shape))), is_shuffled=True, rows=moved)
    is_whole = extent == found.result
    if not _is_each_once(places, shape) or not (extent == shape or is_whole):
        return _Placed(shape, found.result, is_computed=True)
    return replace(
        found, order=tuple(range(len(shape))) if extent == shape else (None,) * len(extent), is_shuffled=True
    )


def _is_each_once(places: list[torch.Tensor], shape: tuple[int, ...]) -> bool:
    """Whether every element of an array is at one of the places."""
    flat = torch.zeros_like(places[0], dtype=torch.int64)
    for place, size in zip(places, shape, strict=True):
        if not bool(((place >= 0) & (place < size)).all()):
            return False
        flat = flat * size + place.long()
    seen = torch.zeros(math.prod(shape), dtype=torch.bool)
    seen[flat.flatten()] = True
    return bool(seen.all())


def _orders(shape: tuple[int, ...], box: tuple[int, ...]) -> Iterator[tuple[int | None, ...]]:
    """The ways in which the dimensions of an array can become those of a box; some may be new or gone if of size 1."""
    for order in itertools.permutations([*range(len(shape)), *(None,) * len(box)], len(box)):
        fits = all(size == (1 if dim is None else shape[dim]) for dim, size in zip(order, box, strict=True))
        if fits and all(shape[dim] == 1 for dim in range(len(shape)) if dim not in order):
            yield order


# ---- transformers ----------------------------------------------------------------------------------------------------


def _loader() -> Any:
    try:
        import gguf  # noqa: F401
        from transformers import modeling_gguf_pytorch_utils
    except ImportError as error:
        raise NeutralizeError(
            "checkpoint: expected transformers and gguf for the model of a GGUF file, got none; pip install "
            "'neutralize[hf]', or edit tensors by name"
        ) from error
    return modeling_gguf_pytorch_utils


def _is_native(architecture: str) -> bool:
    """Whether transformers loads an architecture in a way of its own, which is not followed here."""
    try:
        from transformers.integrations.gguf import is_gguf_arch_supported
    except ImportError:  # an older one, which has none of these
        return False
    return bool(is_gguf_arch_supported(architecture))


def _config(header: Gguf, layout: Layout) -> dict[str, Any]:
    """What transformers makes of the metadata.

    It is shown a file with the same keys and names of tensors, but without data and long lists: it would take minutes
    for a vocabulary.
    """
    tensors = b"".join(
        struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 1, 0, 0)  # one float32 at the start
        for name in (name.encode() for name in layout.tensors)
    )
    kept = [
        key
        for key, value in header.metadata.items()
        if key != "general.alignment" and not (isinstance(value, list) and len(value) > _LIST)
    ]
    with header.path.open("rb") as file:
        data = file.read(max((end for _, end in header.spans.values()), default=0))
    metadata = b"".join(data[slice(*header.spans[key])] for key in kept)
    counts = struct.pack("<IQQ", header.version, len(layout.tensors), len(kept))
    with tempfile.TemporaryDirectory() as folder:
        shown = Path(folder) / header.path.name
        shown.write_bytes(MAGIC + counts + metadata + tensors + bytes(64))  # to the next multiple of 32, and a number
        config: dict[str, Any] = _loader().load_gguf_checkpoint(str(shown), return_tensors=False)["config"]
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    return {"vocab_size": len(tokens)} | config if isinstance(tokens, list) else config


@contextmanager
def _names_cached() -> Iterator[None]:
    """Let the map of names, which the loader builds again for each module, be built once."""
    import gguf

    build = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = functools.cache(build)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = build
