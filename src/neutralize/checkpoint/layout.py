"""Layouts: where the tensors of a checkpoint lie in its files, and how an edit of one becomes patches."""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from neutralize import ops
from neutralize.apply import bounded_values
from neutralize.bits import with_bytes
from neutralize.checkpoint.patch import Affine, Bytes, Checksum, FoldIn, Patch
from neutralize.checkpoint.region import Files, Region, Tile, Tiles
from neutralize.errors import NeutralizeError
from neutralize.plan import Assign, Edit, Fold, Rewrite, dtype_name, matrix_extent


class Stored(Protocol):
    """A tensor as a checkpoint holds it: plain elements, blocks of a quantized format, or several tensors together."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it has when it is loaded."""
        ...

    @property
    def encoding(self) -> str:
        """How its values are stored: the name of a torch dtype, or of a format."""
        ...

    @property
    def regions(self) -> tuple[Region, ...]:
        """All of its bytes."""
        ...

    def read(self, files: Files, span: tuple[int, int] | None = None) -> torch.Tensor:
        """Return it, or some of its rows, as it is when it is loaded.

        Args:
            files: where it lies.
            span: half-open range of its first dimension; a caller who takes few at a time bounds the memory.

        Raises:
            NeutralizeError: its elements do not lie row by row, or it is not known what its bytes stand for.
        """
        ...

    def patches(self, edit: Edit, layout: Layout, files: Files) -> Sequence[Patch]:
        """What an edit of this tensor does to the files.

        Args:
            edit: names this tensor as its parameter, or as its bias.
            layout: where the other tensors that the edit names are.
            files: to read small vectors from.

        Raises:
            NeutralizeError: the edit does not fit, or the format cannot represent what it writes.
        """
        ...


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that lies in one run of bytes, row-major.

    Attributes:
        region: the run.
        shape: of the box.
        origin: its first element's place in the tensor.
    """

    region: Region
    shape: tuple[int, ...]
    origin: tuple[int, ...]

    def read(self, dtype: torch.dtype, files: Files, first: int = 0, last: int = 1, dim: int = 0) -> torch.Tensor:
        """Return a range of one dimension of the box; of a box without dimensions its one element."""
        shape = self.shape or (1,)
        inner = math.prod(shape[dim + 1 :]) * dtype.itemsize
        run = self.region
        part = Region(
            run.file, run.offset + first * inner, math.prod(shape[:dim]), (last - first) * inner, shape[dim] * inner
        )
        content = files.read(part).view(-1).view(dtype)
        return content.view((*shape[:dim], last - first, *shape[dim + 1 :]) if self.shape else ())


@dataclass(frozen=True)
class Elements:
    """A tensor stored element by element.

    Attributes:
        name: its name.
        dtype: of its elements.
        shape: of the tensor.
        pieces: boxes that cover it once: one, but for sharded checkpoints.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @staticmethod
    def whole(name: str, dtype: torch.dtype, shape: Sequence[int], file: str, offset: int) -> Elements:
        """A tensor in one piece."""
        shape = tuple(shape)
        run = Region.run(file, offset, math.prod(shape) * dtype.itemsize)
        return Elements(name, dtype, shape, (Piece(run, shape, (0,) * len(shape)),))

    @property
    def encoding(self) -> str:
        """The name of the dtype."""
        return dtype_name(self.dtype)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The runs of its pieces."""
        return tuple(piece.region for piece in self.pieces)

    def read(self, files: Files, span: tuple[int, int] | None = None, dim: int = 0) -> torch.Tensor:
        """See ``Stored``; the range may be one of any dimension."""
        if not self.shape:
            return self.pieces[0].read(self.dtype, files)
        first, last = span or (0, self.shape[dim])
        if len(self.pieces) == 1:
            return self.pieces[0].read(self.dtype, files, first, last, dim)
        out = torch.empty((*self.shape[:dim], last - first, *self.shape[dim + 1 :]), dtype=self.dtype)
        for piece in self.pieces:
            start, end = piece.origin[dim], piece.origin[dim] + piece.shape[dim]
            begin, stop = max(first, start), min(last, end)
            if begin < stop:
                box = [slice(at, at + size) for at, size in zip(piece.origin, piece.shape, strict=True)]
                box[dim] = slice(begin - first, stop - first)
                out[tuple(box)] = piece.read(self.dtype, files, begin - start, stop - start, dim)
        return out

    def patches(self, edit: Edit, layout: Layout, files: Files) -> Sequence[Patch]:
        """See ``Stored``."""
        self._check(edit)
        if isinstance(edit, Rewrite):
            return list(self._affine(edit))
        if isinstance(edit, Fold):
            return list(self._folds(edit, layout))
        if isinstance(edit, Assign):
            values = torch.tensor(edit.values, dtype=torch.float64).reshape(self.shape).to(self.dtype)
        else:
            source = layout.elements(edit.source, f"the source of '{edit.describe()}'")
            if source.shape != self.shape:
                raise NeutralizeError(
                    f"checkpoint: expected {list(self.shape)} for {edit.source!r}, got {list(source.shape)}; plan for "
                    "this checkpoint"
                )
            values = edit.values(source.read(files))
            if not values.isfinite().all():
                raise NeutralizeError(
                    f"checkpoint: expected finite values in {self.encoding} for {edit.describe()!r}, got Inf or NaN; "
                    "use a wider dtype"
                )
        return [self._bytes(values, piece) for piece in self.pieces]

    def _check(self, edit: Edit) -> None:
        """Check that an edit was made for a tensor like this one."""
        shape = edit.shape if edit.parameter == self.name else ()
        if tuple(shape) != self.shape:
            raise NeutralizeError(
                f"checkpoint: expected shape {list(shape)} for {self.name!r}, got {list(self.shape)}; plan for this "
                "checkpoint"
            )
        if edit.dtype != self.encoding:
            raise NeutralizeError(
                f"checkpoint: expected dtype {edit.dtype} for {self.name!r}, got {self.encoding}; plan for this "
                "checkpoint"
            )
        if self.dtype not in ops.DTYPES:
            raise NeutralizeError(
                f"checkpoint: expected one of {', '.join(map(dtype_name, ops.DTYPES))} for {self.name!r}, got "
                f"{self.encoding}; only floating-point tensors are rewritten"
            )
        for what, value, limit in bounded_values(edit, self.dtype):
            if abs(value) > limit:
                raise NeutralizeError(
                    f"checkpoint: expected {what} within {limit:.6g} for {self.name!r} ({self.encoding}), got "
                    f"{value:.6g}; give a smaller one"
                )

    def _matrix(self) -> Tiles:
        """The tensor seen as a matrix, in bytes."""
        size, (rows, columns) = self.dtype.itemsize, matrix_extent(self.shape)
        return Tiles(rows, columns * size, tuple(_tile(self.name, self.shape, piece, size) for piece in self.pieces))

    def _affine(self, edit: Rewrite) -> Iterator[Affine]:
        """A rewrite, piece by piece."""
        size, (rows, columns) = self.dtype.itemsize, edit.extent
        first, last = edit.rows or (0, rows)
        begin, end = edit.columns or (0, columns)
        for tile in self._matrix().block(first, last, begin * size, end * size).tiles:
            # Row r of the edit's block has its one at column start + r * step; each piece counts its own.
            start = edit.start + tile.row * edit.step - tile.begin // size
            yield Affine(tile.region, self.dtype, edit.scale, edit.diagonal, edit.fill, start, edit.step)

    def _folds(self, edit: Fold, layout: Layout) -> Iterator[FoldIn]:
        bias = layout.elements(edit.bias, f"the bias of '{edit.describe()}'")
        if bias.shape != (edit.bias_numel,) or bias.dtype != self.dtype:
            raise NeutralizeError(
                f"checkpoint: expected {edit.bias_numel} elements of {self.encoding} for {edit.bias!r}, got "
                f"{list(bias.shape)} of {bias.encoding}; plan for this checkpoint"
            )
        size, (rows, columns) = self.dtype.itemsize, matrix_extent(self.shape)
        weight = self._matrix()
        own = tuple(Tile(piece.region, 0, piece.origin[0] * size) for piece in bias.pieces)
        sums = Tiles(1, edit.bias_numel * size, own)
        if not edit.transposed:
            first, last = edit.columns or (0, columns)
            block = weight.block(0, rows, first * size, last * size)
            yield FoldIn(block, sums, self.dtype, edit.scale, edit.shift)
            return
        first, last = edit.columns or (0, rows)
        per_group, width = (last - first) // edit.groups, self.shape[1] * size
        for group in range(edit.groups):
            begin = first + group * per_group
            yield FoldIn(
                weight.block(begin, begin + per_group, 0, columns * size),
                sums.block(0, 1, group * width, (group + 1) * width),
                self.dtype,
                edit.scale,
                edit.shift,
                math.prod(self.shape[2:]),
            )

    def _bytes(self, values: torch.Tensor, piece: Piece) -> Bytes:
        box = tuple(slice(first, first + size) for first, size in zip(piece.origin, piece.shape, strict=True))
        return Bytes(piece.region, with_bytes(values[box], bytes))


@dataclass(frozen=True)
class Listed:
    """A tensor that is listed and copied, and never written: its elements do not lie one by one, row by row.

    Attributes:
        name: its name.
        encoding: how its values are stored, in words.
        remedy: what can be done, in words.
        shape: when it is loaded, as far as it is known.
        regions: its bytes, as far as they are known.
    """

    name: str
    encoding: str
    remedy: str
    shape: tuple[int, ...] = ()
    regions: tuple[Region, ...] = ()

    def read(self, files: Files, span: tuple[int, int] | None = None) -> torch.Tensor:
        """Refuse."""
        raise self._refusal()

    def patches(self, edit: Edit, layout: Layout, files: Files) -> Sequence[Patch]:
        """Refuse."""
        raise self._refusal()

    def _refusal(self) -> NeutralizeError:
        return NeutralizeError(
            f"checkpoint: expected elements row by row for {self.name!r}, got {self.encoding}; {self.remedy}"
        )


def _tile(name: str, shape: tuple[int, ...], piece: Piece, size: int) -> Tile:
    """Where a piece lies in the matrix view."""
    taps = math.prod(shape[2:])
    if piece.shape[2:] != shape[2:]:
        raise NeutralizeError(
            f"checkpoint: expected {name!r} in shards of its first two dimensions, got one of {list(piece.shape)} of "
            f"{list(shape)}; gather the checkpoint first"
        )
    rows, columns = matrix_extent(piece.shape)
    region = Region(piece.region.file, piece.region.offset, rows, columns * size, columns * size)
    first, begin = ((*piece.origin, 0, 0))[:2]
    return Tile(region, first, begin * taps * size)


def shared(tensors: Mapping[str, Stored]) -> dict[str, frozenset[str]]:
    """Return the groups of names whose bytes overlap, directly or by way of others: for each such name, its group."""
    leader = {name: name for name in tensors}

    def lead(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    spans = sorted(
        (region.file, region.offset, region.end, name)
        for name, stored in tensors.items()
        for region in stored.regions
        if region.nbytes
    )
    reach: tuple[str, int, str] = ("", 0, "")
    for file, begin, end, name in spans:
        if file == reach[0] and begin < reach[1]:
            leader[lead(name)] = lead(reach[2])
            reach = (file, max(end, reach[1]), name)
        else:
            reach = (file, end, name)
    groups: dict[str, set[str]] = {}
    for name in tensors:
        groups.setdefault(lead(name), set()).add(name)
    return {name: group for group in map(frozenset, groups.values()) if len(group) > 1 for name in group}


@dataclass(frozen=True)
class Layout:
    """Where everything is in a checkpoint.

    Attributes:
        root: the folder that file names are relative to.
        files: those that hold tensors, relative to the root.
        tensors: by name, in the order of the files.
        marks: file to (offset, bytes) that are put over its head while it is being edited in place, so that no reader
            takes a half-written file for a whole one.
        kind: what it is, in words: ``"safetensors"``, ``"GGUF"``.
        config: the folder with the model's ``config.json``, if there is one.
        tied: for each name whose bytes are also those of others, all of these names; see ``shared``.
        checksums: those that the files keep of runs of their bytes, by file and then offset of the run.
    """

    root: Path
    files: tuple[str, ...]
    tensors: Mapping[str, Stored]
    marks: Mapping[str, tuple[int, bytes]] = field(default_factory=dict)
    kind: str = ""
    config: Path | None = None
    tied: Mapping[str, frozenset[str]] = field(default_factory=dict)
    checksums: tuple[Checksum, ...] = ()

    def elements(self, name: str, what: str) -> Elements:
        """Return a tensor that is stored element by element.

        Raises:
            NeutralizeError: there is none of that name, or it is quantized.
        """
        found = self.tensors.get(name)
        if found is None:
            raise NeutralizeError(
                f"checkpoint: expected a tensor {name!r}, {what}, got a checkpoint without it; plan for this checkpoint"
            )
        if not isinstance(found, Elements):
            raise NeutralizeError(
                f"checkpoint: expected plain elements for {name!r}, {what}, got {found.encoding}; dequantize it first"
            )
        return found

    def patches(self, edits: Sequence[Edit], files: Files, tied: Iterable[Collection[str]] = ()) -> list[Patch]:
        """What edits of stored tensors do to the files, in order; all that does not fit is reported together.

        Args:
            edits: of stored tensors.
            files: to read small vectors from.
            tied: groups of names of stored tensors that are known to be one, as those of a plan are: who edits one of
                them means all.

        Raises:
            NeutralizeError: an edit does not fit.
        """
        accepted = [frozenset(group) for group in tied]
        together = self._together(edits)
        found: list[Patch] = []
        problems: list[str] = []
        for edit in edits:
            stored = self.tensors.get(edit.parameter)
            if stored is None:
                problems.append(f"expected a tensor {edit.parameter!r}, got a checkpoint without it")
                continue
            try:
                if not self._is_done(edit, accepted, together):
                    found.extend(stored.patches(edit, self, files))
            except NeutralizeError as error:
                problems.append(str(error).removeprefix("checkpoint: "))
        if problems:
            problems = list(dict.fromkeys(problems))
            listing = problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
            raise NeutralizeError(f"checkpoint: {listing}")
        return [*found, *self._checksums_over(region for patch in found for region in patch.regions)]

    def _together(self, edits: Sequence[Edit]) -> dict[tuple[frozenset[str], Edit], list[str]]:
        """For each group of tied names and edit of it, the names that the edit is given for, in order."""
        found: dict[tuple[frozenset[str], Edit], dict[str, None]] = {}
        for edit in edits:
            if edit.parameter in self.tied and edit.parameters == (edit.parameter,):
                key = self.tied[edit.parameter], replace(edit, parameter="")
                found.setdefault(key, {})[edit.parameter] = None
        return {key: list(names) for key, names in found.items()}

    def _is_done(
        self,
        edit: Edit,
        accepted: Sequence[frozenset[str]],
        together: Mapping[tuple[frozenset[str], Edit], Sequence[str]],
    ) -> bool:
        """Whether the same is done already, under another name of the same bytes.

        Raises:
            NeutralizeError: the bytes are also another tensor's, which is not meant.
        """
        for name in edit.parameters:
            group = self.tied.get(name)
            if group is None or any(group <= known for known in accepted):
                continue
            names = together.get((group, replace(edit, parameter="")), ())
            members = [self.tensors[other] for other in group]
            are_one = len({(stored.regions, stored.shape, stored.encoding) for stored in members}) == 1
            if are_one and len(names) == len(group):
                return names[0] != name
            others = ", ".join(map(repr, sorted(group - {name})[:8]))
            what, remedy = (
                ("is also", "give all of them the same edit, or clone it")
                if are_one
                else ("shares bytes with", "clone them")
            )
            raise NeutralizeError(
                f"checkpoint: expected {name!r} to have bytes of its own, got a tensor that {what} {others}; {remedy} "
                "and save again"
            )
        return False

    def _checksums_over(self, regions: Iterable[Region]) -> list[Checksum]:
        """The checksums of runs that something is written into."""
        starts = [(checksum.covered.file, checksum.covered.offset) for checksum in self.checksums]
        found: dict[Checksum, None] = {}
        for region in regions:
            at = max(bisect.bisect_right(starts, (region.file, region.offset)) - 1, 0)
            while at < len(starts) and starts[at] < (region.file, region.end):
                covered = self.checksums[at].covered
                if covered.file == region.file and covered.end > region.offset:
                    found[self.checksums[at]] = None
                at += 1
        return list(found)
