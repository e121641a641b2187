"""Parts: which elements of a parameter a process holds, and what an edit of the whole parameter writes there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch.nn.parameter import is_lazy

from neutralize.errors import NeutralizeError
from neutralize.plan import Copy, Edit, Fold, Plan, Rewrite, matrix_extent

Run: TypeAlias = "tuple[int, int]"
"""Consecutive indices of a dimension: the first, and how many."""

Runs: TypeAlias = "tuple[Run, ...]"
"""The indices of a dimension that a process holds, in the order in which it holds them."""

Held: TypeAlias = "tuple[Runs, ...]"
"""For each dimension the indices that a process holds."""


@dataclass(frozen=True)
class Shard:
    """Which part of a parameter a process holds in a plain tensor, as inference engines keep them.

    The parameter is cut along ``dim`` as ``torch.chunk`` does: into ``count`` parts of ⌈size / count⌉ elements, of
    which the last ones may have fewer, or none.

    Attributes:
        dim: the dimension of the whole parameter that is cut.
        index: which of the parts this process holds, from 0.
        count: how many parts there are; 1 is all of the parameter.
        name: the tensor of the process's model that holds the part, where it has another name than the parameter, as
            in a merged projection (``qkv_proj``); ``*`` stands for what the ``*`` of the key stands for.
        start: the first index along ``dim`` of that tensor that belongs to the part.

    Examples:
        >>> from torch import nn
        >>> from neutralize import plan
        >>> whole = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> half = nn.Sequential(nn.Linear(8, 8))  # the second half of the hidden units
        >>> null = plan(whole, "0", "zero", sides="in")
        >>> undo = null.apply(half, shards={"0.*": Shard(0, 1, 2)})
        >>> bool(half[0].weight.any())
        False
    """

    dim: int
    index: int
    count: int
    name: str = ""
    start: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not (self.dim >= 0 and self.count >= 1 and 0 <= self.index < self.count and self.start >= 0):
            raise NeutralizeError(
                f"Shard: expected dim and start of 0 or more, and an index below count, got {self}; count parts and "
                "dimensions from 0"
            )


@dataclass(frozen=True)
class Window:
    """A view of what a process holds of a parameter.

    Attributes:
        box: of each dimension the first index and the one past the last; ``None`` is all of it.
        rows, columns: half-open ranges of the box as a matrix (rows = dim 0); ``None`` is all.
    """

    box: tuple[tuple[int, int], ...] | None = None
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def __call__(self, held: torch.Tensor) -> torch.Tensor:
        """Return the view."""
        view = held if self.box is None else held[tuple(slice(*ends) for ends in self.box)]
        if self.columns is not None or (self.rows is not None and view.dim() == 0):
            view = view.view(matrix_extent(tuple(view.shape)))
            return view[slice(*(self.rows or (None,))), slice(*(self.columns or (None,)))]
        return view if self.rows is None else view[slice(*self.rows)]


@dataclass(frozen=True)
class Block:
    """A view of a live tensor: where a process's part lies in it, and a window of that part."""

    inside: Window
    window: Window

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the view."""
        return self.window(self.inside(plain(tensor)))


@dataclass(frozen=True)
class Placed:
    """A window into a part, and where it lies in the block that an edit writes.

    Attributes:
        window: the view.
        row, column: the place of its first element in the block.
    """

    window: Window
    row: int = 0
    column: int = 0

    def start(self, edit: Rewrite) -> int:
        """The column of the window that the edit's diagonal has in the window's first row."""
        return edit.start + self.row * edit.step - self.column


@dataclass(frozen=True)
class Part:
    """The part of a parameter that a process holds.

    Attributes:
        tensor: the live tensor: a parameter or buffer of the model, a DTensor, or a merged parameter of others.
        shape: of the whole parameter.
        runs: for each dimension the indices that are held; empty where the whole parameter is.
        inside: where the part lies in the live tensor, if that holds more.
    """

    tensor: torch.Tensor
    shape: tuple[int, ...]
    runs: Held = ()
    inside: Window = Window()

    @property
    def is_whole(self) -> bool:
        """Whether the process holds the whole parameter, in order."""
        return not self.runs

    @property
    def held(self) -> Held:
        """For each dimension the indices that are held."""
        return self.runs or tuple(((0, size),) for size in self.shape)

    @property
    def local(self) -> torch.Tensor:
        """What is held, as a plain tensor that shares its memory with the live one."""
        return self.inside(plain(self.tensor.detach()))

    def block(self, edit: Rewrite) -> list[Placed]:
        """Where the elements lie that a rewrite of the whole parameter writes: the views cover the part once."""
        rows, columns = edit.rows, edit.columns
        if self.is_whole:
            return [Placed(Window(None, rows, columns))]
        if 0 in self.local.shape:
            return []
        if rows is None and columns is None and edit.diagonal == 0:
            return [Placed(Window())]  # one value for all: no need to know which is where
        return list(self._clipped(rows, columns))

    def _clipped(self, rows: tuple[int, int] | None, columns: tuple[int, int] | None) -> Iterator[Placed]:
        extent = matrix_extent(self.shape)
        first, last = rows or (0, extent[0])
        begin, end = columns or (0, extent[1])
        for box, row, column in self.matrices():
            height, width = matrix_extent(tuple(stop - start for start, stop in box))
            top, bottom = max(first, row), min(last, row + height)
            left, right = max(begin, column), min(end, column + width)
            if top < bottom and left < right:
                window = Window(box, (top - row, bottom - row), (left - column, right - column))
                yield Placed(window, top - first, left - begin)

    def matrices(self) -> Iterator[tuple[tuple[tuple[int, int], ...], int, int]]:
        """Boxes of the part that are matrices of consecutive rows and columns of the whole parameter as a matrix.

        Yields the box, and the row and the column of its first element.
        """
        cut = max((dim for dim, runs in enumerate(self.held) if runs != ((0, self.shape[dim]),)), default=0)
        ends = []
        for dim, runs in enumerate(self.held):
            singles = [(first + k, 1) for first, size in runs for k in range(size)] if 0 < dim < cut else runs
            starts = itertools.accumulate((size for _, size in singles), initial=0)
            ends.append([(first, start, start + size) for (first, size), start in zip(singles, starts, strict=False)])
        for box in itertools.product(*ends):
            row, column = box[0][0], 0
            for size, (first, _, _) in zip(self.shape[1:], box[1:], strict=True):
                column = column * size + first
            yield tuple((start, stop) for _, start, stop in box), row, column

    def pick(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the elements of a tensor of the whole shape that the process holds."""
        if self.is_whole:
            return whole
        for dim, runs in enumerate(self.held):
            whole = torch.cat([whole.narrow(dim, first, size) for first, size in runs or ((0, 0),)], dim)
        return whole

    def put(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        """Write the elements that a process holds into a tensor of the whole shape."""
        index = torch.arange(math.prod(self.shape)).view(self.shape)
        whole.view(-1)[self.pick(index).reshape(-1)] = own.reshape(-1)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or of a DTensor the part that this process holds."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None or not is_dtensor(tensor):
        return tensor
    local: torch.Tensor = to_local()
    return local.detach()


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor; without one in the process nothing of ``torch.distributed`` is imported."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def part_of(name: str, tensor: torch.Tensor) -> Part | str:
    """Return the part of a parameter that this process holds: of a DTensor its shard, of any other tensor all.

    A DTensor that is placed in a way that parameters are not is refused: the reason is returned.
    """
    shape = tuple(tensor.shape)
    if not is_dtensor(tensor):
        return Part(tensor, shape)
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as DimShard

    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    place = mesh.get_coordinate()  # None in a process that is not in the mesh, which holds nothing
    runs: list[Runs] = [((0, size),) if place else () for size in shape]
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        factor = getattr(placement, "split_factor", None)  # of a shard that is cut again by an axis to its right
        if not isinstance(placement, DimShard) and factor is None:
            return (
                f"expected shards or replicas for {name!r}, got a DTensor placed as {placement}; redistribute it first"
            )
        if place is None:
            continue
        dim = placement.dim % max(len(shape), 1)  # type: ignore[attr-defined]
        pieces = [_chunk(runs[dim], index, factor) for index in range(factor)] if factor else [runs[dim]]
        runs[dim] = tuple(run for piece in pieces for run in _chunk(piece, place[axis], mesh.size(axis)))
    part = Part(tensor, shape, _settled(shape, runs))
    held = tuple(sum(size for _, size in dim) for dim in part.held)
    if tuple(part.local.shape) != held and part.local.numel() + math.prod(held):
        return (
            f"expected a shard of {list(held)} for {name!r}, placed as {tensor.placements} of {list(shape)}, got "
            f"{list(part.local.shape)}; shard it with torch's own functions"
        )
    return part


def whole_shape(edit: Edit, name: str) -> tuple[int, ...]:
    """The shape of a whole parameter that an edit writes, or that it copies."""
    return (edit.bias_numel,) if isinstance(edit, Fold) and name == edit.bias else edit.shape


def names_in(edit: Edit) -> tuple[str, ...]:
    """The parameters that an edit writes, and the one that it copies."""
    return (*edit.parameters, edit.source) if isinstance(edit, Copy) else edit.parameters


def parts_of(
    plan: Plan,
    named: Mapping[str, torch.Tensor],
    shards: Mapping[str, Shard],
    refused: Mapping[str, str],
    *,
    partial: bool = False,
) -> tuple[dict[str, Part], list[str]]:
    """Find the parts that this process holds of the parameters that a plan writes or copies.

    Args:
        plan: the plan.
        named: the process's own tensors.
        shards: which parts are held in plain tensors, by name of the parameter or by a glob with one ``*``.
        refused: names that cannot be written, with the reasons.
        partial: the tensors are those of one stage: a parameter without a tensor is another stage's.

    Returns:
        The parts by name, and for each other name of this process's the reason why there is none.
    """
    parts: dict[str, Part] = {}
    problems: dict[str, str] = {}
    for edit in plan.edits:
        for name in names_in(edit):
            shard, where = _described(shards, name)
            tensor = named.get(where)
            if name in parts or name in problems or (partial and tensor is None):
                continue
            if name in refused:
                problems[name] = refused[name]
            elif tensor is None and shard is None:
                problems[name] = f"expected a parameter {name!r}, got a model without it; plan for this model"
            elif tensor is None:
                problems[name] = f"expected a tensor {where!r} with the part of {name!r}, got none; correct the Shard"
            elif is_lazy(tensor):
                problems[name] = f"expected {name!r} to hold data, got a lazy parameter; run the module once first"
            else:
                part = (
                    part_of(name, tensor) if shard is None else _sharded(shard, name, whole_shape(edit, name), tensor)
                )
                if isinstance(part, str):
                    problems[name] = part
                else:
                    parts[name] = part
    return parts, list(problems.values())


def own_tensors(
    named: Mapping[str, torch.Tensor], parts: Mapping[str, Part], shards: Mapping[str, Shard]
) -> dict[str, torch.Tensor]:
    """The plain tensors that a process holds, by name: for a tensor with another name stand the parameters in it."""
    holders = {_described(shards, name)[1] for name in parts}
    others = {name: plain(tensor) for name, tensor in named.items() if name not in holders | parts.keys()}
    return others | {name: part.local for name, part in parts.items()}


def _described(shards: Mapping[str, Shard], name: str) -> tuple[Shard | None, str]:
    """What is said of a parameter's part, and the name of the tensor that holds it."""
    keys = [key for key in shards if key == name or ("*" in key and fnmatchcase(name, key))]
    if not keys:
        return None, name
    key = max(keys, key=lambda key: (key == name, len(key)))  # the one that says most
    before, _, after = key.partition("*")
    text = name[len(before) : len(name) - len(after)]
    return shards[key], (shards[key].name or name).replace("*", text, 1)


def _sharded(found: Shard, name: str, shape: tuple[int, ...], tensor: torch.Tensor) -> Part | str:
    """The part of a parameter that a plain tensor holds, or why it cannot be that."""
    if found.dim >= len(shape) or tensor.dim() != len(shape):
        return (
            f"expected a dimension of {name!r} of shape {list(shape)}, got {found} and a tensor of "
            f"{list(tensor.shape)}; correct the Shard"
        )
    runs: list[Runs] = [((0, size),) if size else () for size in shape]
    runs[found.dim] = _chunk(runs[found.dim], found.index, found.count)
    held = [sum(size for _, size in dim) for dim in runs]
    box = [(0, size) for size in held]
    box[found.dim] = (found.start, found.start + held[found.dim])
    sizes = list(tensor.shape)
    fits = all(stop <= size for (_, stop), size in zip(box, sizes, strict=True))
    exact = all(stop == size for dim, ((_, stop), size) in enumerate(zip(box, sizes, strict=True)) if dim != found.dim)
    if not fits or not exact or (not found.name and sizes != held):
        return (
            f"expected {held} from {found.start} along dimension {found.dim} for part {found.index} of {found.count} "
            f"of {name!r}, got a tensor of {sizes}; correct the Shard"
        )
    inside = Window(tuple(box)) if sizes != held else Window()
    return Part(tensor, shape, _settled(shape, runs), inside)


def _settled(shape: tuple[int, ...], runs: Sequence[Runs]) -> tuple[Runs, ...]:
    """The runs, neighbours joined; none at all if they are everything."""
    joined: list[Runs] = []
    for dim in runs:
        out: list[Run] = []
        for first, size in dim:
            if size and out and sum(out[-1]) == first:
                out[-1] = (out[-1][0], out[-1][1] + size)
            elif size:
                out.append((first, size))
        joined.append(tuple(out))
    if all(dim == ((0, size),) or (size == 0 and dim == ()) for dim, size in zip(joined, shape, strict=True)):
        return ()
    return tuple(joined)


def _chunk(runs: Runs, index: int, count: int) -> Runs:
    """The indices at the places of one chunk of ``torch.chunk``; chunks that it does not make are empty."""
    total = sum(size for _, size in runs)
    each = -(-total // count)
    begin, end = min(index * each, total), min((index + 1) * each, total)
    out, place = [], 0
    for first, size in runs:
        low, high = max(begin - place, 0), min(end - place, size)
        if low < high:
            out.append((first + low, high - low))
        place += size
    return tuple(out)
