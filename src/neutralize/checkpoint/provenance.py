"""Provenance: tensors without elements that know which boxes of which stored tensors they are made of.

A loader that is run on them instead of on real tensors tells what it does to every one, whatever it is: nothing of its
tables of names is copied here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from neutralize.checkpoint.naming import Source

aten = torch.ops.aten


class Traced(torch.Tensor):
    """A meta tensor with the boxes of stored tensors that lie in it."""

    sources: tuple[Source, ...]

    @staticmethod
    def __new__(cls: type[Traced], shape: Sequence[int], dtype: torch.dtype, sources: Iterable[Source]) -> Traced:
        """Make one of a shape, a dtype, and the sources that cover it."""
        made: Traced = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=torch.device("meta"))
        made.sources = tuple(sources)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an op for shape and dtype, and carry the sources to its results."""
        kwargs = kwargs or {}
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Traced)]
        if func._schema.is_mutable:
            if isinstance(args[0], Traced):
                args[0].sources = tuple(computed(leaves))
            return args[0]
        plain_args, plain_kwargs = pytree.tree_map_only(Traced, _meta, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        outputs, spec = pytree.tree_flatten(result)
        carry = _MOVES.get(func.overloadpacket)
        if carry is not None:
            names = (argument.name for argument in func._schema.arguments)
            found = carry(dict(zip(names, args, strict=False)) | kwargs, result)
        elif func.overloadpacket in _SHUFFLES:
            found = [shuffled(leaves, result)]
        else:
            found = [computed(leaves) for _ in outputs]
        made = [Traced(out.shape, out.dtype, own) for out, own in zip(outputs, found, strict=True)]
        return pytree.tree_unflatten(made, spec)


def traced(name: str, shape: Sequence[int], dtype: torch.dtype) -> Traced:
    """What stands for a stored tensor."""
    straight = tuple(range(len(shape)))
    source = Source(name, tuple((0, size) for size in shape), straight, (0,) * len(shape))
    return Traced(shape, dtype, [source])


def computed(tensors: Iterable[Traced]) -> list[Source]:
    """Sources of something that is computed from tensors."""
    return [
        replace(source, order=(), origin=(), is_shuffled=False, is_computed=True)
        for tensor in tensors
        for source in tensor.sources
    ]


def shuffled(tensors: Sequence[Traced], result: torch.Tensor) -> list[Source]:
    """Sources of all elements of one tensor in another order."""
    if len(tensors) != 1 or tensors[0].numel() != result.numel():
        return computed(tensors)
    found = []
    for source in tensors[0].sources:
        if source.is_computed:
            found.append(source)
            continue
        shape = tuple(last - first for first, last in source.box)
        is_alone = len(tensors[0].sources) == 1 and shape == tuple(result.shape)
        order = tuple(range(result.dim())) if is_alone else (None,) * result.dim()
        found.append(replace(source, order=order, origin=(0,) * result.dim(), is_shuffled=True, rows=()))
    return found


def _meta(tensor: Traced) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _fills_all(source: Source) -> bool:
    """Whether a source is shuffled over the whole tensor, whatever its box."""
    return source.is_shuffled and all(dim is None for dim in source.order)


# ---- what each op does to the sources of its argument ----------------------------------------------------------------

_Carry = Callable[[dict[str, Any], Any], list[list[Source]]]


def _same(given: dict[str, Any], result: Any) -> list[list[Source]]:
    return [list(given["self"].sources)]


def _permuted(sources: Iterable[Source], dims: Sequence[int]) -> list[Source]:
    return [
        source
        if source.is_computed
        else replace(
            source,
            order=tuple(source.order[dim] for dim in dims),
            origin=tuple(source.origin[dim] for dim in dims),
        )
        for source in sources
    ]


def _permute(given: dict[str, Any], result: Any) -> list[list[Source]]:
    rank = given["self"].dim()
    return [_permuted(given["self"].sources, [dim % rank for dim in given["dims"]])]


def _transpose(given: dict[str, Any], result: Any) -> list[list[Source]]:
    rank = given["self"].dim()
    dims = list(range(rank))
    if rank:
        first, second = given.get("dim0", 0) % rank, given.get("dim1", rank - 1) % rank
        dims[first], dims[second] = dims[second], dims[first]
    return [_permuted(given["self"].sources, dims)]


def _widened(sources: Iterable[Source], dim: int) -> list[Source]:
    return [
        source
        if source.is_computed
        else replace(
            source,
            order=(*source.order[:dim], None, *source.order[dim:]),
            origin=(*source.origin[:dim], 0, *source.origin[dim:]),
        )
        for source in sources
    ]


def _narrowed(sources: Iterable[Source], dims: Iterable[int]) -> list[Source]:
    """Without dimensions of size 1."""
    gone = set(dims)
    return [
        source
        if source.is_computed
        else replace(
            source,
            order=tuple(kept for dim, kept in enumerate(source.order) if dim not in gone),
            origin=tuple(kept for dim, kept in enumerate(source.origin) if dim not in gone),
        )
        for source in sources
    ]


def _unsqueeze(given: dict[str, Any], result: Any) -> list[list[Source]]:
    return [_widened(given["self"].sources, given["dim"] % result.dim())]


def _squeeze(given: dict[str, Any], result: Any) -> list[list[Source]]:
    tensor, dims = given["self"], given.get("dim")
    wanted = range(tensor.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % tensor.dim() for dim in wanted} if tensor.dim() else set()
    return [_narrowed(tensor.sources, [dim for dim in gone if tensor.shape[dim] == 1])]


def _view(given: dict[str, Any], result: Any) -> list[list[Source]]:
    """A view that only adds or drops dimensions of size 1 keeps everything in place."""
    tensor = given["self"]
    if tensor.shape == result.shape:
        return [list(tensor.sources)]
    if [size for size in tensor.shape if size != 1] != [size for size in result.shape if size != 1]:
        return [shuffled([tensor], result)]
    sources = _narrowed(tensor.sources, [dim for dim, size in enumerate(tensor.shape) if size == 1])
    for dim, size in enumerate(result.shape):
        if size == 1:
            sources = _widened(sources, dim)
    return [sources]


def _cut(tensor: Traced, dim: int, first: int, last: int) -> list[Source]:
    """The sources of a range of one dimension."""
    found: list[Source] = []
    if (first, last) == (0, tensor.shape[dim]):
        return list(tensor.sources)
    for source in tensor.sources:
        if source.is_computed:
            found.append(source)
            continue
        if _fills_all(source):
            return computed([tensor])
        place = list(source.place())
        begin, end = max(first, place[dim][0]), min(last, place[dim][1])
        if begin >= end:
            continue
        if source.is_shuffled and (begin, end) != place[dim]:
            return computed([tensor])
        place[dim] = (begin, end)
        origin = (*source.origin[:dim], begin - first, *source.origin[dim + 1 :])
        found.append(replace(source, box=source.back(tuple(place)), origin=origin))
    return found


def _slice(given: dict[str, Any], result: Any) -> list[list[Source]]:
    tensor, dim = given["self"], given.get("dim", 0) % given["self"].dim()
    size = tensor.shape[dim]
    first, last, step = slice(given.get("start"), given.get("end"), given.get("step", 1)).indices(size)
    if step != 1:
        return [computed([tensor])]
    return [_cut(tensor, dim, first, max(first, last))]


def _select(given: dict[str, Any], result: Any) -> list[list[Source]]:
    tensor, dim = given["self"], given["dim"] % given["self"].dim()
    index = given["index"] % tensor.shape[dim]
    return [_narrowed(_cut(tensor, dim, index, index + 1), [dim])]


def _split(given: dict[str, Any], result: Any) -> list[list[Source]]:
    tensor, dim = given["self"], given.get("dim", 0) % given["self"].dim()
    found, first = [], 0
    for part in result:
        found.append(_cut(tensor, dim, first, first + part.shape[dim]))
        first += part.shape[dim]
    return found


def _unbind(given: dict[str, Any], result: Any) -> list[list[Source]]:
    tensor, dim = given["self"], given.get("dim", 0) % given["self"].dim()
    return [_narrowed(_cut(tensor, dim, index, index + 1), [dim]) for index in range(len(result))]


def _joined(parts: Sequence[tuple[list[Source], int]], dim: int) -> list[Source]:
    """Sources of tensors that are put behind each other along a dimension, each with its size there."""
    found: list[Source] = []
    first = 0
    for sources, size in parts:
        for source in sources:
            if len(parts) > 1 and _fills_all(source):
                source = replace(source, order=(), origin=(), is_shuffled=False, is_computed=True)
            if source.is_computed:
                found.append(source)
                continue
            origin = (*source.origin[:dim], source.origin[dim] + first, *source.origin[dim + 1 :])
            found.append(replace(source, origin=origin))
        first += size
    return found


def _listed(given: dict[str, Any], result: Any) -> list[Traced] | None:
    """The tensors that are put together, if all are traced; ``cat`` leaves empty ones of one dimension out."""
    tensors = [tensor for tensor in given["tensors"] if tuple(tensor.shape) != (0,) or result.dim() == 1]
    return tensors if all(isinstance(tensor, Traced) for tensor in tensors) else None


def _cat(given: dict[str, Any], result: Any) -> list[list[Source]]:
    tensors, dim = _listed(given, result), given.get("dim", 0) % result.dim()
    if tensors is None:
        return [computed([tensor for tensor in given["tensors"] if isinstance(tensor, Traced)])]
    return [_joined([(list(tensor.sources), tensor.shape[dim]) for tensor in tensors], dim)]


def _stack(given: dict[str, Any], result: Any) -> list[list[Source]]:
    tensors, dim = list(given["tensors"]), given.get("dim", 0) % result.dim()
    if not all(isinstance(tensor, Traced) for tensor in tensors):
        return [computed([tensor for tensor in tensors if isinstance(tensor, Traced)])]
    return [_joined([(_stacked(tensor, dim), 1) for tensor in tensors], dim)]


def _stacked(tensor: Traced, dim: int) -> list[Source]:
    """The sources of one of the tensors of a stack; what fills all of it no longer does."""
    if any(_fills_all(source) for source in tensor.sources):
        return computed([tensor])
    return _widened(tensor.sources, dim)


def _shift(given: dict[str, Any], result: Any, sign: int) -> list[list[Source]]:
    tensor, by, factor = given["self"], given["other"], given.get("alpha", 1)
    is_plain = isinstance(tensor, Traced) and isinstance(by, int | float) and isinstance(factor, int | float)
    if not is_plain or not math.isfinite(by * factor):
        return [computed([leaf for leaf in (tensor, by) if isinstance(leaf, Traced)])]
    return [
        [
            source if source.is_computed else replace(source, offset=source.offset + sign * by * factor)
            for source in tensor.sources
        ]
    ]


def _pad(given: dict[str, Any], result: Any) -> list[list[Source]]:
    if any(given["pad"]):
        return [computed([given["self"]])]
    return _same(given, result)


_MOVES: dict[Any, _Carry] = {
    **dict.fromkeys((aten.alias, aten.detach, aten.clone, aten._to_copy, aten.lift_fresh, aten.positive), _same),
    aten.permute: _permute,
    aten.transpose: _transpose,
    aten.t: _transpose,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    **dict.fromkeys((aten.view, aten.reshape, aten._unsafe_view, aten._reshape_alias), _view),
    aten.slice: _slice,
    aten.select: _select,
    **dict.fromkeys((aten.split, aten.split_with_sizes, aten.chunk), _split),
    aten.unbind: _unbind,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.add: lambda given, result: _shift(given, result, 1),
    aten.sub: lambda given, result: _shift(given, result, -1),
    aten.constant_pad_nd: _pad,
}
"""What becomes of the sources, by op: one list for each result."""

_SHUFFLES = {aten.flip, aten.roll, aten.index, aten.index_select, aten.gather, aten.take, aten.unfold, aten.as_strided}
"""Ops that only move elements, in ways that no box tells."""
