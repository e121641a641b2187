"""Layouts: where the tensors of a checkpoint lie in its files, and how an edit of one becomes patches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from neutralize import ops, reference
from neutralize.checkpoint.patch import Affine, Bytes, FoldIn, Patch
from neutralize.checkpoint.region import Files, Region
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

    def read(self, files: Files) -> torch.Tensor:
        """Return the tensor; it is held in memory whole."""
        out = torch.empty(self.shape, dtype=self.dtype)
        for piece in self.pieces:
            box = tuple(slice(first, first + size) for first, size in zip(piece.origin, piece.shape, strict=True))
            out[box] = files.read(piece.region).view(-1).view(self.dtype).view(piece.shape)
        return out

    def patches(self, edit: Edit, layout: Layout, files: Files) -> Sequence[Patch]:
        """See ``Stored``."""
        self._check(edit)
        if isinstance(edit, Rewrite):
            return [patch for piece in self.pieces for patch in self._affine(edit, piece)]
        if isinstance(edit, Fold):
            return self._folds(edit, layout)
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
        stored, computed = torch.finfo(self.dtype).max, torch.finfo(reference.compute_dtype(self.dtype)).max
        for what, value, limit in _magnitudes(edit, stored, computed):
            if abs(value) > limit:
                raise NeutralizeError(
                    f"checkpoint: expected {what} within {limit:.6g} for {self.name!r} ({self.encoding}), got "
                    f"{value:.6g}; give a smaller one"
                )

    def _affine(self, edit: Rewrite, piece: Piece) -> Iterator[Affine]:
        """The part of a rewrite that falls on a piece: its rows and columns, counted inside the piece."""
        size, span = self.dtype.itemsize, _matrix_span(self.name, self.shape, piece)
        rows = _within(edit.rows or (0, edit.extent[0]), span.rows)
        columns = _within(edit.columns or (0, edit.extent[1]), span.columns)
        if rows is None or columns is None:
            return
        width = span.columns[1] - span.columns[0]
        first, begin = rows[0] - span.rows[0], columns[0] - span.columns[0]
        region = Region(
            piece.region.file,
            piece.region.offset + (first * width + begin) * size,
            rows[1] - rows[0],
            (columns[1] - columns[0]) * size,
            width * size,
        )
        # The coefficients count inside the edit's block: row r of it has its one at column start + r * step.
        down = rows[0] - (edit.rows or (0, 0))[0]
        right = columns[0] - (edit.columns or (0, 0))[0]
        start = edit.start + down * edit.step - right
        yield Affine(region, self.dtype, edit.scale, edit.diagonal, edit.fill, start, edit.step)

    def _folds(self, edit: Fold, layout: Layout) -> list[FoldIn]:
        bias = layout.elements(edit.bias, f"the bias of '{edit.describe()}'")
        if bias.shape != (edit.bias_numel,) or bias.dtype != self.dtype:
            raise NeutralizeError(
                f"checkpoint: expected {edit.bias_numel} elements of {self.encoding} for {edit.bias!r}, got "
                f"{list(bias.shape)} of {bias.encoding}; plan for this checkpoint"
            )
        if len(self.pieces) != 1 or len(bias.pieces) != 1:
            raise NeutralizeError(
                f"checkpoint: expected {self.name!r} and {edit.bias!r} in one piece each, for a row sum goes from the "
                "one into the other, got shards; gather the checkpoint first"
            )
        size = self.dtype.itemsize
        (weight,), (sums,) = self.regions, bias.regions
        rows, columns = matrix_extent(self.shape)
        if not edit.transposed:
            first, last = edit.columns or (0, columns)
            block = Region(weight.file, weight.offset + first * size, rows, (last - first) * size, columns * size)
            return [FoldIn(block, sums, self.dtype, edit.scale, edit.shift)]
        first, last = edit.columns or (0, rows)
        folds = []
        per_group, taps = (last - first) // edit.groups, math.prod(self.shape[2:])
        stride, own_width = columns * size, self.shape[1] * size
        for group in range(edit.groups):
            begin = weight.offset + (first + group * per_group) * stride
            block = Region(weight.file, begin, per_group, stride, stride)
            own = Region.run(sums.file, sums.offset + group * own_width, own_width)
            folds.append(FoldIn(block, own, self.dtype, edit.scale, edit.shift, taps))
        return folds

    def _bytes(self, values: torch.Tensor, piece: Piece) -> Bytes:
        box = tuple(slice(first, first + size) for first, size in zip(piece.origin, piece.shape, strict=True))
        return Bytes(piece.region, values[box].contiguous().view(-1).view(torch.uint8).numpy().tobytes())


@dataclass(frozen=True)
class Opaque:
    """A tensor whose elements are not understood: listed, copied, never written.

    Attributes:
        name: its name.
        encoding: how its values are stored, as the file calls it.
        shape: of the tensor, as the file gives it.
        region: its bytes.
    """

    name: str
    encoding: str
    shape: tuple[int, ...]
    region: Region

    @property
    def regions(self) -> tuple[Region, ...]:
        """Its bytes."""
        return (self.region,)

    def patches(self, edit: Edit, layout: Layout, files: Files) -> Sequence[Patch]:
        """Refuse."""
        raise NeutralizeError(
            f"checkpoint: expected a tensor whose elements are known for {self.name!r}, got {self.encoding}; edit what "
            "it belongs to, or the norm before it"
        )


def _magnitudes(edit: Edit, stored: float, computed: float) -> Iterator[tuple[str, float, float]]:
    """What an edit stores as it is, and what it computes with: name, value, and the largest magnitude allowed."""
    if isinstance(edit, Rewrite):
        yield "scale", edit.scale, computed
        yield "fill", edit.fill, stored
        if edit.diagonal:
            yield "diagonal + fill", edit.diagonal + edit.fill, stored
    elif isinstance(edit, Fold):
        yield "scale", edit.scale, computed
        yield "shift", edit.shift, computed
    elif isinstance(edit, Assign):
        yield "a value", max(edit.values, key=abs, default=0.0), stored


@dataclass(frozen=True)
class _Span:
    rows: tuple[int, int]
    columns: tuple[int, int]


def _matrix_span(name: str, shape: tuple[int, ...], piece: Piece) -> _Span:
    """Rows and columns of the matrix view that a piece holds."""
    if not shape:
        return _Span((0, 1), (0, 1))
    taps = math.prod(shape[2:])
    if piece.shape[2:] != shape[2:]:
        raise NeutralizeError(
            f"checkpoint: expected {name!r} in shards of its first two dimensions, got one of {list(piece.shape)} of "
            f"{list(shape)}; gather the checkpoint first"
        )
    rows = (piece.origin[0], piece.origin[0] + piece.shape[0])
    if len(shape) == 1:
        return _Span(rows, (0, 1))
    return _Span(rows, (piece.origin[1] * taps, (piece.origin[1] + piece.shape[1]) * taps))


def _within(wanted: tuple[int, int], held: tuple[int, int]) -> tuple[int, int] | None:
    first, last = max(wanted[0], held[0]), min(wanted[1], held[1])
    return (first, last) if first < last else None


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
    """

    root: Path
    files: tuple[str, ...]
    tensors: Mapping[str, Stored]
    marks: Mapping[str, tuple[int, bytes]] = field(default_factory=dict)
    kind: str = ""
    config: Path | None = None

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

    def patches(self, edits: Sequence[Edit], files: Files) -> list[Patch]:
        """What edits of stored tensors do to the files; all that does not fit is reported together.

        Raises:
            NeutralizeError: an edit does not fit.
        """
        found: list[Patch] = []
        problems: list[str] = []
        for edit in edits:
            stored = self.tensors.get(edit.parameter)
            if stored is None:
                problems.append(f"expected a tensor {edit.parameter!r}, got a checkpoint without it")
                continue
            try:
                found.extend(stored.patches(edit, self, files))
            except NeutralizeError as error:
                problems.append(str(error).removeprefix("checkpoint: "))
        if problems:
            problems = list(dict.fromkeys(problems))
            listing = problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
            raise NeutralizeError(f"checkpoint: {listing}")
        return found
