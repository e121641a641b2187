"""Naming: which tensors of a checkpoint a model's parameters come from, and edits of the one as edits of the other.

A loader may rename tensors, stack the experts of a list into one parameter, split a fused projection, transpose,
permute rows, or add one to the gain of a norm; an edit of the parameter is turned into edits of what is stored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from neutralize.checkpoint.layout import Layout, Stored
from neutralize.errors import NeutralizeError
from neutralize.plan import Assign, Copy, Edit, Fold, Rewrite

Box: TypeAlias = tuple[tuple[int, int], ...]
"""A half-open range of each dimension of a tensor."""

_Range: TypeAlias = tuple[int, int] | None

_RUNS_AT_MOST = 1 << 16
"""Into how many runs of columns a box may fall apart before an edit of it is refused."""


@dataclass(frozen=True)
class Source:
    """A box of a stored tensor, and where a loader puts it in a parameter: ``parameter = stored + offset`` there.

    Attributes:
        stored: name of the stored tensor.
        box: half-open range of each of its dimensions.
        order: for each dimension of the parameter the dimension of the stored tensor that it comes from; ``None``: a
            new dimension of size 1, as when experts are stacked. A dimension of the stored tensor that is missing here
            has size 1 in the box.
        origin: place of the box's first element in the parameter.
        offset: what the loader adds: 1 for the norms of Gemma in GGUF files is -1 here, which stores 1 + w.
        is_shuffled: the elements lie in an order of their own (rows permuted for rotary embeddings): what is written
            through it is the same for all of them. What is permuted is where the box would lie without that; with an
            ``order`` of nothing but ``None``, the whole parameter.
        rows: where whole rows of the box are permuted and that is known, which of them is the first in the parameter,
            the second and so on; else empty.
        is_computed: the parameter is computed from this tensor in some other way: it cannot be written.
    """

    stored: str
    box: Box
    order: tuple[int | None, ...]
    origin: tuple[int, ...]
    offset: float = 0.0
    is_shuffled: bool = False
    rows: tuple[int, ...] = ()
    is_computed: bool = False

    @property
    def extent(self) -> tuple[int, ...]:
        """How large the box is along each dimension of the parameter."""
        return tuple(1 if dim is None else self.box[dim][1] - self.box[dim][0] for dim in self.order)

    def place(self) -> Box:
        """Where the box lies in the parameter."""
        return tuple((first, first + size) for first, size in zip(self.origin, self.extent, strict=True))

    def back(self, box: Box) -> Box:
        """The box of the stored tensor that a box of the parameter, inside ``place``, comes from."""
        found = list(self.box)
        for dim, (first, last), start in zip(self.order, box, self.origin, strict=True):
            if dim is not None:
                shift = self.box[dim][0] - start
                found[dim] = (first + shift, last + shift)
        return tuple(found)


Names: TypeAlias = Mapping[str, tuple[Source, ...]]
"""For each parameter of a model, the boxes that cover it; of tied weights that are stored twice, both copies."""


def retarget(edits: Sequence[Edit], names: Names, layout: Layout) -> list[Edit]:
    """Return edits of parameters as edits of stored tensors.

    Args:
        edits: of a model's parameters.
        names: where the parameters come from.
        layout: the checkpoint; shape and dtype of the new edits are those of its tensors.

    Returns:
        The edits that do the same to what is stored, in the same order.

    Raises:
        NeutralizeError: an edit cannot be carried through what the loader does, or a parameter is not stored; all
            problems are listed.
    """
    found: list[Edit] = []
    problems: list[str] = []
    for edit in edits:
        try:
            found.extend(_retargeted(edit, names, layout))
        except NeutralizeError as error:
            problems.append(str(error).removeprefix("checkpoint: "))
    if problems:
        problems = list(dict.fromkeys(problems))
        if len(problems) == 1:
            raise NeutralizeError(f"checkpoint: {problems[0]}")
        listing = "".join(f"\n  - {problem}" for problem in problems)
        raise NeutralizeError(
            f"checkpoint: expected a plan that fits what is stored, got {len(problems)} problems:{listing}"
        )
    return found


def _retargeted(edit: Edit, names: Names, layout: Layout) -> Iterator[Edit]:
    sources = _sources(edit.parameter, names, layout)
    if isinstance(edit, Rewrite):
        written = 0
        for source in sources:
            for piece in _rewrites(edit, source, layout.tensors[source.stored]):
                written += piece.numel
                yield piece
        if written < edit.numel:
            raise _refusal(edit, f"{edit.numel} elements in the checkpoint", f"{written}", sources)
    elif isinstance(edit, Fold):
        yield from _folds(edit, sources, _sources(edit.bias, names, layout), layout)
    elif isinstance(edit, Assign):
        assigned = [_assign(edit, source, layout.tensors[source.stored]) for source in sources]
        if sum(piece.numel for piece in assigned) < edit.numel:
            raise _refusal(edit, f"{edit.numel} elements in the checkpoint", "fewer", sources)
        yield from assigned
    else:
        yield from _copies(edit, sources, _sources(edit.source, names, layout), layout)


def _sources(parameter: str, names: Names, layout: Layout) -> tuple[Source, ...]:
    found = names.get(parameter, ())
    if not found or any(source.stored not in layout.tensors for source in found):
        raise NeutralizeError(
            f"checkpoint: expected {parameter!r} to be stored, got a checkpoint without it; leave it out of the plan, "
            "or name the model that the checkpoint is of"
        )
    computed = [source.stored for source in found if source.is_computed]
    if computed:
        raise NeutralizeError(
            f"checkpoint: expected {parameter!r} to lie in the checkpoint element by element, got one that the loader "
            f"computes from {_listed(computed)}; edit the loaded model, or choose another edit="
        )
    return found


def _listed(stored: Sequence[str]) -> str:
    known = [repr(name) for name in dict.fromkeys(stored)]
    return ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")


def _refusal(edit: Edit, expected: str, got: str, sources: Sequence[Source]) -> NeutralizeError:
    stored = _listed([source.stored for source in sources])
    return NeutralizeError(
        f"checkpoint: expected {expected} for '{edit.describe()}', got {got}, in {stored}; edit the loaded model, or "
        "choose another strategy"
    )


def _dtype(edit: Edit, stored: Stored) -> str:
    """The dtype that an edit of a stored tensor states: that of its elements, or of a quantized one as it is loaded."""
    return stored.encoding if isinstance(getattr(torch, stored.encoding, None), torch.dtype) else edit.dtype


def _is_whole(source: Source, stored: Stored) -> bool:
    return source.box == tuple((0, size) for size in stored.shape)


# ---- rewrites --------------------------------------------------------------------------------------------------------


def _rewrites(edit: Rewrite, source: Source, stored: Stored) -> Iterator[Rewrite]:
    """The part of a rewrite that falls on one source."""
    dtype = _dtype(edit, stored)
    whole = source.is_shuffled and all(dim is None for dim in source.order)
    place = tuple((0, size) for size in edit.shape) if whole else source.place()
    rows, columns = edit.rows or (0, edit.extent[0]), edit.columns or (0, edit.extent[1])
    for box in _column_boxes(edit, rows, columns):
        common = _common(box, place)
        if common is None:
            continue
        if source.is_shuffled:
            if edit.diagonal or common != place:
                raise _refusal(
                    edit, "the same for all of what is stored", "elements in an order of their own", [source]
                )
            target = source.box
        else:
            target = source.back(common)
        if source.offset and (edit.scale or edit.diagonal):
            raise _refusal(edit, "constants", f"a tensor that the loader adds {source.offset:g} to", [source])
        block = replace(
            edit,
            parameter=source.stored,
            shape=stored.shape,
            dtype=dtype,
            fill=edit.fill - source.offset,
            diagonal=0.0,
            start=0,
            step=1,
            rows=None,
            columns=None,
        )
        if not edit.diagonal:
            for run in _runs(target, stored.shape, edit):
                yield replace(block, rows=run[0], columns=run[1])
        else:
            yield _with_diagonal(edit, block, source, common, target)


def _with_diagonal(edit: Rewrite, block: Rewrite, source: Source, common: Box, target: Box) -> Rewrite:
    """A rewrite with a diagonal through a source that keeps the matrix, or turns it on its side."""
    runs = list(_runs(target, block.shape, edit))
    rank = len(edit.shape)
    straight, turned = tuple(range(rank)), (1, 0)
    if len(runs) != 1 or len(block.shape) != rank or source.order not in (straight, turned):
        raise _refusal(
            edit, "a tensor stored as the matrix that it is", "another arrangement of its dimensions", [source]
        )
    # In the block of the edit row r has its one in column start + r * step; here rows and columns count in the part.
    down = common[0][0] - (edit.rows or (0, 0))[0] if rank else 0
    right = _flat(common, edit.shape) - (edit.columns or (0, 0))[0]
    start, step = edit.start + down * edit.step - right, edit.step
    if rank > 1 and source.order == turned:
        if step not in (1, -1):
            raise _refusal(edit, "a step of 1 for a tensor stored transposed", f"{step}", [source])
        start = -step * start
    return replace(block, diagonal=edit.diagonal, start=start, step=step, rows=runs[0][0], columns=runs[0][1])


def _flat(box: Box, shape: tuple[int, ...]) -> int:
    """The first column of a box in the matrix view."""
    place = 0
    for (first, _), size in zip(box[1:], shape[1:], strict=True):
        place = place * size + first
    return place


def _column_boxes(edit: Rewrite, rows: tuple[int, int], columns: tuple[int, int]) -> Iterator[Box]:
    """The boxes that a block of the matrix view falls into."""
    if len(edit.shape) < 2:
        yield (rows,) if edit.shape else ()
        return
    for box in _split(columns, edit.shape[1:]):
        yield (rows, *box)


def _split(run: tuple[int, int], shape: tuple[int, ...]) -> Iterator[Box]:
    """The boxes that a run of the flattened elements of a shape falls into, in order."""
    if len(shape) == 1:
        yield (run,)
        return
    inner = math.prod(shape[1:])
    whole = tuple((0, size) for size in shape[1:])
    first, last = -(-run[0] // inner), run[1] // inner
    if first > last:  # inside one row
        for box in _split((run[0] - last * inner, run[1] - last * inner), shape[1:]):
            yield ((last, last + 1), *box)
        return
    if run[0] < first * inner:
        for box in _split((run[0] - (first - 1) * inner, inner), shape[1:]):
            yield ((first - 1, first), *box)
    if first < last:
        yield ((first, last), *whole)
    if last * inner < run[1]:
        for box in _split((0, run[1] - last * inner), shape[1:]):
            yield ((last, last + 1), *box)


def _common(box: Box, other: Box) -> Box | None:
    found = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(box, other, strict=True))
    return found if all(first < last for first, last in found) else None


def _runs(box: Box, shape: tuple[int, ...], edit: Edit) -> Iterator[tuple[_Range, _Range]]:
    """A box of a tensor as blocks of its matrix view, all of the view being ``None``."""
    if not shape:
        yield None, None
        return
    rows = None if box[0] == (0, shape[0]) else box[0]
    # The dimensions after the last that is cut are whole: a run reaches over them.
    cut = max((dim for dim in range(1, len(shape)) if box[dim] != (0, shape[dim])), default=0)
    if cut == 0:
        yield rows, None
        return
    inner = math.prod(shape[cut + 1 :])
    outer = [range(*box[dim]) for dim in range(1, cut)]
    if math.prod(map(len, outer)) > _RUNS_AT_MOST:
        raise NeutralizeError(
            f"checkpoint: expected at most {_RUNS_AT_MOST} runs of elements for '{edit.describe()}', got more; edit "
            "the loaded model"
        )
    for place in itertools.product(*outer):
        base = 0
        for index, size in zip(place, shape[1:cut], strict=True):
            base = base * size + index
        base *= shape[cut] * inner
        yield rows, (base + box[cut][0] * inner, base + box[cut][1] * inner)


# ---- folds, assignments, copies --------------------------------------------------------------------------------------


def _folds(edit: Fold, weights: tuple[Source, ...], biases: tuple[Source, ...], layout: Layout) -> Iterator[Fold]:
    """A fold goes through where whole outputs lie in one stored weight, and their biases in one stored bias."""
    outputs, covered = 1 if edit.transposed else 0, 0
    for weight in weights:
        stored = layout.tensors[weight.stored]
        if weight.is_shuffled or weight.offset or not _is_whole(weight, stored):
            raise _refusal(edit, "a weight stored as it is", "one that the loader takes apart or shifts", [weight])
        place = weight.place()
        if any(
            part != (0, size) for dim, (part, size) in enumerate(zip(place, edit.shape, strict=True)) if dim != outputs
        ):
            raise _refusal(edit, "whole row sums in one stored tensor", "a part of them", [weight])
        size = place[outputs][1] - place[outputs][0]
        covered += size
        if size != edit.shape[outputs] and edit.groups != 1:
            raise _refusal(edit, "all groups of a transposed convolution in one stored tensor", "some", [weight])
        own = [
            bias
            for bias in biases
            if (bias.origin, bias.extent) == ((place[outputs][0],), (size * edit.groups,))
            and not bias.is_shuffled
            and not bias.offset
            and _is_whole(bias, layout.tensors[bias.stored])
        ]
        if not own:
            raise _refusal(edit, f"the biases of what {weight.stored!r} gives in one tensor", "another split", biases)
        transposed = edit.transposed
        if weight.order == (1, 0):
            transposed = not transposed
        elif weight.order != tuple(range(len(edit.shape))):
            raise _refusal(edit, "a weight with its dimensions in order", f"the order {weight.order}", [weight])
        yield replace(
            edit,
            parameter=weight.stored,
            bias=own[0].stored,
            shape=stored.shape,
            dtype=_dtype(edit, stored),
            transposed=transposed,
        )
    if covered != edit.shape[outputs]:
        raise _refusal(edit, f"{edit.shape[outputs]} outputs in the checkpoint, each once", f"{covered}", weights)


def _assign(edit: Assign, source: Source, stored: Stored) -> Assign:
    if source.is_shuffled or not _is_whole(source, stored):
        raise _refusal(edit, "a tensor stored as it is", "one that the loader takes apart", [source])
    values = torch.tensor(edit.values, dtype=torch.float64).reshape(edit.shape)
    part = values[tuple(slice(*extent) for extent in source.place())]
    part = restored(part, source).reshape(stored.shape) - source.offset
    return Assign(source.stored, stored.shape, _dtype(edit, stored), tuple(part.flatten().tolist()))


def restored(part: torch.Tensor, source: Source) -> torch.Tensor:
    """What lies in a parameter where a source lies, with the dimensions of the stored tensor; a view."""
    kept = [dim for dim in source.order if dim is not None]
    part = part.reshape([size for size, dim in zip(part.shape, source.order, strict=True) if dim is not None])
    part = part.permute([kept.index(dim) for dim in sorted(kept)])
    return part.reshape([last - first for first, last in source.box])


def placed(content: torch.Tensor, source: Source) -> torch.Tensor:
    """The reverse of ``restored``: the content of a source's box as it lies in the parameter."""
    kept = [dim for dim in source.order if dim is not None]
    content = content[list(source.rows)] if source.rows else content
    content = content.permute([*kept, *(dim for dim in range(content.dim()) if dim not in kept)])
    return content.reshape(source.extent)


def _copies(edit: Copy, sources: tuple[Source, ...], read: tuple[Source, ...], layout: Layout) -> Iterator[Copy]:
    """A copy goes through where both tensors are taken apart in the same way, and whole."""
    for source in sources:
        stored = layout.tensors[source.stored]
        same = [
            other
            for other in read
            if (other.box, other.order, other.origin, other.offset) == (source.box, source.order, source.origin, 0.0)
            and not other.is_shuffled
            and _is_whole(other, layout.tensors[other.stored])
        ]
        if source.is_shuffled or source.offset or not same or not _is_whole(source, stored):
            raise _refusal(
                edit, "two tensors stored alike", "tensors that the loader takes apart or shifts", [source, *read]
            )
        yield replace(
            edit, parameter=source.stored, source=same[0].stored, shape=stored.shape, dtype=_dtype(edit, stored)
        )
