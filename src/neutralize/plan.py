"""Plans: what will be written, as frozen data that prints, hashes and travels.

A plan names parameters and says what becomes of them. It holds no tensor of the model, so the same plan serves a live
model, a meta model, every rank of a sharded one, and files on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias, get_args, overload

import torch
from torch import nn

from neutralize.errors import NeutralizeError, require_finite
from neutralize.report import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neutralize.checkpoint.handle import Checkpoint, FileUndo
    from neutralize.distributed.part import Shard
    from neutralize.undo import Undo

FORMAT_VERSION = 6
CERTIFICATE_KINDS = ("exact", "rounding", "bounded", "measured")
TARGETS = ("input", "partial", "null", "scaled", "damped", "fill", "mean", "offset")
_COLUMN_LIMIT = 1 << 62

TIMEOUT = 60.0
"""Seconds that a process waits for the others that hold the model with it."""


class _OfOneParameter:
    """What edits have in common that write one parameter."""

    parameter: str
    dtype: str

    @property
    def numel(self) -> int:
        """How many elements are written."""
        raise NotImplementedError

    @property
    def written_bytes(self) -> int:
        """How many bytes are written."""
        return self.numel * _itemsize(self.dtype)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names that are written."""
        return (self.parameter,)


@dataclass(frozen=True)
class Rewrite(_OfOneParameter):
    """The affine rewrite ``W <- scale * W + diagonal * D + fill`` of a parameter, or of a block of it.

    Attributes:
        parameter: qualified name of a parameter or buffer.
        shape: its whole shape, as the plan saw it.
        dtype: its dtype, without the ``torch.`` prefix.
        scale, diagonal, fill: coefficients; with ``scale == 0`` the old values are not read.
        start, step: row ``r`` of the matrix view (rows = dim 0, columns = the rest flattened) has the one of ``D`` at
            column ``start + r * step``; both count inside the block if there is one.
        rows, columns: half-open ranges of the matrix view that the rewrite is confined to; ``None`` is all of it.
    """

    parameter: str
    shape: tuple[int, ...]
    dtype: str
    scale: float = 0.0
    diagonal: float = 0.0
    fill: float = 0.0
    start: int = 0
    step: int = 1
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the tensor, the coefficients and the block."""
        _settle_tensor(self)
        _settle_floats(self, "scale", "diagonal", "fill")
        for what in ("start", "step"):
            if not -_COLUMN_LIMIT < getattr(self, what) < _COLUMN_LIMIT:
                raise NeutralizeError(
                    f"Rewrite: expected less than 2^62 in magnitude for {what} of {self.parameter!r}, got more; no "
                    "tensor has a column there"
                )
        for what, extent, given in zip(("rows", "columns"), self.extent, (self.rows, self.columns), strict=True):
            if given is not None and not (len(given) == 2 and 0 <= given[0] < given[1] <= extent):
                raise NeutralizeError(
                    f"Rewrite: expected {what} inside 0:{extent} for {self.parameter!r}, got "
                    f"{':'.join(map(str, given))}; give a range that is not empty"
                )

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns of the whole parameter as a matrix."""
        return matrix_extent(self.shape)

    @property
    def numel(self) -> int:
        """How many elements are written."""
        spans = zip((self.rows, self.columns), self.extent, strict=True)
        return math.prod(extent if given is None else given[1] - given[0] for given, extent in spans)

    def block(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the view of ``tensor`` (shape ``self.shape``) that this edit writes."""
        if self.rows is None and self.columns is None:
            return tensor
        rows, columns = self.extent
        if self.columns is None and tensor.dim() > 0:  # rows of any layout are a view; only columns need a matrix
            return tensor[slice(*(self.rows or (0, rows)))]
        return tensor.view(rows, columns)[slice(*(self.rows or (0, rows))), slice(*(self.columns or (0, columns)))]

    def describe(self) -> str:
        """Say in a few characters what is written."""
        terms = []
        if self.scale:
            terms.append("W" if self.scale == 1 else f"{self.scale:.6g} W")
        if self.diagonal:
            terms.append("D" if self.diagonal == 1 else f"{self.diagonal:.6g} D")
        if self.fill or not terms:
            terms.append(f"{self.fill:.6g}")
        block = "".join(
            f"[{name} {given[0]}:{given[1]}]"
            for name, given in (("rows", self.rows), ("columns", self.columns))
            if given
        )
        return f"{self.parameter}{block} <- {' + '.join(terms)}"


@dataclass(frozen=True)
class Fold:
    """The fold ``b <- b + shift * (W_old . 1); W <- scale * W``: one pass over ``W``.

    Attributes:
        parameter: qualified name of the weight, (out, in, ...), or (in, out) if ``transposed``.
        bias: qualified name of the bias, (out,).
        shape, dtype: of the weight; the bias has the same dtype.
        scale: what the weight is multiplied by.
        shift: what the row sum of the old weight is multiplied by before it is added to the bias.
        transposed: the weight is stored (in, out, ...), as in the ``Conv1D`` of GPT-2 and in transposed convolutions:
            sum over all dims but the second.
        columns: half-open range of the matrix view (out, in · taps) that the fold is confined to, or of the input
            features (dim 0) if ``transposed``; ``None`` is all of it.
        groups: of a transposed convolution: its weight is (in, out / groups, ...), and each group of input features has
            outputs, and so biases, of its own.
    """

    parameter: str
    bias: str
    shape: tuple[int, ...]
    dtype: str
    scale: float
    shift: float
    transposed: bool = False
    columns: tuple[int, int] | None = None
    groups: int = 1

    def __post_init__(self) -> None:
        """Check the tensor and the coefficients."""
        _settle_tensor(self)
        if not self.shape or (self.transposed and len(self.shape) < 2):
            raise NeutralizeError(
                f"Fold: expected shape {'(in, out, ...)' if self.transposed else '(out, ...)'} for {self.parameter!r}, "
                f"got {list(self.shape)}; fold the weight of an affine layer"
            )
        _settle_floats(self, "scale", "shift")
        if self.groups != 1 and (
            self.groups < 1 or not self.transposed or self.columns is not None or self.shape[0] % self.groups
        ):
            raise NeutralizeError(
                f"Fold: expected 1 group for {self.parameter!r}, or a number that divides the input features of the "
                f"whole weight of a transposed convolution, got {self.groups}; give that of the convolution"
            )
        extent = self.shape[0] if self.transposed else matrix_extent(self.shape)[1]
        if self.columns is not None and not (
            len(self.columns) == 2 and 0 <= self.columns[0] < self.columns[1] <= extent
        ):
            raise NeutralizeError(
                f"Fold: expected columns inside 0:{extent} for {self.parameter!r}, got "
                f"{':'.join(map(str, self.columns))}; give a range that is not empty"
            )

    @property
    def numel(self) -> int:
        """How many elements are written, the bias included."""
        rows, columns = matrix_extent(self.shape)
        if self.columns is None:
            return rows * columns + self.bias_numel
        return (self.columns[1] - self.columns[0]) * (columns if self.transposed else rows) + self.bias_numel

    @property
    def bias_numel(self) -> int:
        """How many elements the bias has."""
        return self.shape[1] * self.groups if self.transposed else self.shape[0]

    @property
    def written_bytes(self) -> int:
        """How many bytes are written."""
        return self.numel * _itemsize(self.dtype)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names that are written."""
        return (self.parameter, self.bias)

    def block(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the view (out, ...) of ``tensor`` (shape ``self.shape``) that is summed over and scaled."""
        if self.transposed:
            return tensor[slice(*(self.columns or (None,)))].transpose(0, 1)
        if self.columns is None:
            return tensor
        return tensor.view(matrix_extent(self.shape))[:, slice(*self.columns)]

    @property
    def rescale(self) -> Rewrite:
        """What becomes of the weight, as a rewrite."""
        rows, columns = (self.columns, None) if self.transposed else (None, self.columns)
        return Rewrite(self.parameter, self.shape, self.dtype, self.scale, rows=rows, columns=columns)

    def pairs(self, weight: torch.Tensor, bias: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the views (out, ...) of the weight and (out,) of the bias, one pair per group."""
        if self.groups == 1:
            yield self.block(weight), bias
            return
        for rows, sums in zip(weight.chunk(self.groups), bias.chunk(self.groups), strict=True):
            yield rows.transpose(0, 1), sums

    def describe(self) -> str:
        """Say in a few characters what is written."""
        weight = self.parameter + (f"[columns {self.columns[0]}:{self.columns[1]}]" if self.columns else "")
        return f"{self.bias} += {self.shift:.6g} ({weight} 1), {weight} <- {self.scale:.6g} W"


@dataclass(frozen=True)
class Assign(_OfOneParameter):
    """The assignment of explicit values to a small vector.

    Attributes:
        parameter: qualified name of the parameter or buffer.
        shape, dtype: of the parameter.
        values: its new elements in row-major order.
    """

    parameter: str
    shape: tuple[int, ...]
    dtype: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the tensor and the values."""
        _settle_tensor(self)
        if len(self.values) != math.prod(self.shape):
            raise NeutralizeError(
                f"Assign: expected {math.prod(self.shape)} values for {self.parameter!r} of shape {list(self.shape)}, "
                f"got {len(self.values)}; give one per element"
            )
        if not all(map(math.isfinite, self.values)):
            raise NeutralizeError(
                f"Assign: expected finite values for {self.parameter!r}, got NaN or Inf; check their source"
            )
        object.__setattr__(self, "values", tuple(map(float, self.values)))

    @property
    def numel(self) -> int:
        """How many elements are written."""
        return len(self.values)

    def describe(self) -> str:
        """Say in a few characters what is written."""
        return f"{self.parameter} <- {self.numel} values"


@dataclass(frozen=True)
class Copy(_OfOneParameter):
    """One parameter becomes another, scaled and shifted: ``W <- scale * S + offset``, ``S`` as it was before the plan.

    Attributes:
        parameter: qualified name of the parameter that is written.
        source: qualified name of the parameter of the same shape that is read.
        shape, dtype: of the written parameter.
        scale, offset: the coefficients; the result is rounded once.
    """

    parameter: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    scale: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        """Check the tensor and the coefficients."""
        _settle_tensor(self)
        _settle_floats(self, "scale", "offset")

    @property
    def numel(self) -> int:
        """How many elements are written."""
        return math.prod(self.shape)

    def values(self, source: torch.Tensor) -> torch.Tensor:
        """Return what is written, in the written dtype, from the tensor that is read."""
        return (source.detach().double() * self.scale + self.offset).to(getattr(torch, self.dtype))

    def describe(self) -> str:
        """Say in a few characters what is written."""
        offset = f" {'-' if self.offset < 0 else '+'} {abs(self.offset):.6g}" if self.offset else ""
        return f"{self.parameter} <- {'' if self.scale == 1 else f'{self.scale:.6g} '}{self.source}{offset}"


Edit: TypeAlias = Rewrite | Fold | Assign | Copy
_EDITS: dict[str, type[Edit]] = {kind.__name__.lower(): kind for kind in get_args(Edit)}


@dataclass(frozen=True)
class Certificate:
    """How exactly a layer is off, as derived by the planner.

    Attributes:
        layer: qualified name of the layer.
        kind: ``exact`` (bit for bit), ``rounding`` (exact in real arithmetic), ``bounded`` (an error bound under an
            assumption) or ``measured`` (nothing is derived: ``verify`` says how far the layer is from its aim).
        bound: for ``rounding`` and ``bounded``, the largest error of a value that the layer hands on, divided by the
            largest magnitude of the values entering it (the input bound); for ``exact`` 0; else ``None``.
        assumption: what must hold, in words.
        reason: what the certificate was derived from, in words.
        inputs_within: for that of a whole plan, the largest magnitude of the model's floating-point inputs that it
            assumes, if it assumes any.

    The certificate of a whole plan has the layer ``""``, the model itself. Its bound is absolute: the largest error of
    an element of the model's floating-point outputs; ``rounding`` may come without one there.
    """

    layer: str
    kind: str
    bound: float | None = None
    assumption: str = ""
    reason: str = ""
    inputs_within: float | None = None

    def __post_init__(self) -> None:
        """Check the kind and the bound."""
        _settle_floats(self, *(name for name in ("bound", "inputs_within") if getattr(self, name) is not None))
        if self.kind not in CERTIFICATE_KINDS:
            raise NeutralizeError(
                f"Certificate: expected one of {', '.join(CERTIFICATE_KINDS)} for kind, got {self.kind!r}; use one "
                "of these"
            )
        if self.bound is not None and self.bound < 0:
            raise NeutralizeError(f"Certificate: expected a bound of 0 or more, got {self.bound}; leave it out")

    def __str__(self) -> str:
        """Return the kind, with its bound."""
        return f"{self.kind}({self.bound:.2g})" if self.bound else self.kind


@dataclass(frozen=True)
class LayerPlan:
    """What a plan does to one layer, and what ``verify`` needs to measure it.

    Attributes:
        layer: qualified name of the layer.
        target: what the layer becomes: ``input`` (its output is its input), ``partial`` (its output is as many features
            of its input as it has, and zeros for the rest), ``null`` (its output is zero, or nothing
            reads it), ``scaled`` (its output times ``gain``), ``damped`` (a residual block: what it adds times
            ``gain``), ``fill`` (constant weights), ``mean`` (its output, or with ``sides`` ``out`` what its consumers
            read, is ``values``) or ``offset`` (a residual block: what it adds is ``values``).
        certificate: how exactly.
        edits: indices into the plan's edits.
        activation: name of the activation that belongs to the layer, or ``""``.
        gain: for ``input``, the factor that the layer hands its input on with; for ``scaled`` and ``damped``, the
            factor.
        operating_point, value, slope, epsilon: of the linear regime (MATH: a, φ(a), φ'(a), ε); a block has none of
            them.
        input_bound: the bound X on the magnitude of the layer's input, where one was needed.
        consumers: qualified names of the modules that read the layer and were rewritten for it; with ``sides`` ``in``
            a batch norm behind the layer, whose output is then the layer's.
        sides: which sides of the layer are rewritten, for strategies that have sides; ``around``: the norm before a
            post-norm block is rewritten too, and what enters it is a multiple of the normalised values; ``within``: it
            hands such a multiple on to the next.
        note: one remark for the reader, or ``""``.
        values: for ``mean`` and ``offset``, one number per feature.
        axis: the dimension of the features in what carries them, counted from the end.
        window: for a block whose skip connection crops, strides over or pads its input, what is left of it: for each
            dimension how many zeros come first, the first element, the step, and how many elements; else empty.
        parameters: of the activation, where it is one of a family: the negative slope of a LeakyReLU, say.
    """

    layer: str
    target: str
    certificate: Certificate
    edits: tuple[int, ...]
    activation: str = ""
    gain: float = 1.0
    operating_point: float | None = None
    value: float | None = None
    slope: float | None = None
    epsilon: float | None = None
    input_bound: float | None = None
    consumers: tuple[str, ...] = ()
    sides: str = ""
    note: str = ""
    values: tuple[float, ...] = ()
    axis: int = -1
    window: tuple[int, ...] = ()
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the target and the numbers."""
        if self.target not in TARGETS:
            raise NeutralizeError(
                f"LayerPlan: expected one of {', '.join(TARGETS)} for target of {self.layer!r}, got {self.target!r}; "
                "use one of these"
            )
        numbers = ("gain", "operating_point", "value", "slope", "epsilon", "input_bound")
        _settle_floats(self, *(name for name in numbers if getattr(self, name) is not None))
        if not all(math.isfinite(number) for number in (*self.values, *self.parameters)):
            raise NeutralizeError(
                f"LayerPlan: expected finite values for {self.layer!r}, got NaN or Inf; check their source"
            )
        for name in ("values", "parameters"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))


@dataclass(frozen=True)
class Plan(Shown):
    """A list of edits on named parameters, and what they make of each layer.

    Attributes:
        strategy: name of the strategy.
        edits: what is written, in this order.
        layers: one entry per selected layer.
        tied: groups of names that are one tensor, as far as the edits touch them and the planner has accepted it.
        end_to_end: how far the model's outputs are from those of the network that the plan aims at; without one, what
            follows from the layers' certificates alone. It is not compared, and not in the digest.
        planning_s: seconds that planning took, the trace included, or ``None``. It is not compared, and neither in the
            canonical JSON nor in the digest.
    """

    strategy: str
    edits: tuple[Edit, ...]
    layers: tuple[LayerPlan, ...]
    tied: tuple[tuple[str, ...], ...] = ()
    end_to_end: Certificate | None = field(default=None, compare=False)
    planning_s: float | None = field(default=None, compare=False)

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        """One certificate per layer."""
        return tuple(layer.certificate for layer in self.layers)

    @property
    def certificate(self) -> Certificate:
        """How exactly all layers are off together, seen at the model's outputs."""
        return self.end_to_end if self.end_to_end is not None else joined_certificate(self.layers)

    @property
    def written_bytes(self) -> int:
        """How many bytes an application writes."""
        return sum(edit.written_bytes for edit in self.edits)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names that are written, each once, in order."""
        return tuple(dict.fromkeys(name for edit in self.edits for name in edit.parameters))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, as hexadecimal text: of what is written and what becomes of each layer.

        The certificate end to end is left out: its Lipschitz factors are those of weights which a meta model, or a rank
        with a part of them, does not have, and the plan is the same there.
        """
        return hashlib.sha256(replace(self, end_to_end=None).to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the canonical JSON: sorted keys, no white space, floats that round-trip."""
        content = {
            "format": FORMAT_VERSION,
            "strategy": self.strategy,
            "edits": [{"kind": type(edit).__name__.lower(), **asdict(edit)} for edit in self.edits],
            "layers": [asdict(layer) for layer in self.layers],
            "tied": self.tied,
            "end_to_end": None if self.end_to_end is None else asdict(self.end_to_end),
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Parse what ``to_json`` wrote, or what ``neutralize plan --json`` printed: the same and ``planning_s``.

        Raises:
            NeutralizeError: the text is no JSON, of another format version, or a field is missing, unknown or of the
                wrong type.
        """
        content = _typed(_parse(text), dict, "the plan")
        version = content.get("format", FORMAT_VERSION)  # before its keys, which another version may have changed
        if type(version) is not int or version != FORMAT_VERSION:
            raise NeutralizeError(
                f"Plan.from_json: expected format {FORMAT_VERSION}, got {version!r}; plan again with this version"
            )
        planning = content.pop("planning_s", None)
        planning_s = None if planning is None else _number(planning, "planning_s")
        _check_keys("the plan", content, {"format", "strategy", "edits", "layers", "tied", "end_to_end"})
        edits = []
        for entry in _typed(content["edits"], list, "edits"):
            kind = _typed(entry, dict, "an edit").get("kind")
            if not isinstance(kind, str) or kind not in _EDITS:
                raise NeutralizeError(
                    f"Plan.from_json: expected one of {', '.join(_EDITS)} for the kind of an edit, got {kind!r}; plan "
                    "again with this version"
                )
            edits.append(_build(_EDITS[kind], {key: value for key, value in entry.items() if key != "kind"}))
        layers = []
        for entry in _typed(content["layers"], list, "layers"):
            certificate = _build(Certificate, _typed(entry, dict, "a layer").get("certificate"))
            layer = _build(LayerPlan, {**entry, "certificate": certificate})
            if not all(0 <= index < len(edits) for index in layer.edits):
                raise NeutralizeError(
                    f"Plan.from_json: expected edits 0 to {len(edits) - 1} for layer {layer.layer!r}, got "
                    f"{list(layer.edits)}; the text was changed by hand: plan again"
                )
            layers.append(layer)
        tied = tuple(
            tuple(_typed(name, str, "tied") for name in _typed(group, list, "tied"))
            for group in _typed(content["tied"], list, "tied")
        )
        whole = content["end_to_end"]
        end_to_end = None if whole is None else _build(Certificate, whole)
        strategy = _typed(content["strategy"], str, "strategy")
        return Plan(strategy, tuple(edits), tuple(layers), tied, end_to_end, planning_s)

    @overload
    def apply(
        self,
        model: nn.Module,
        *,
        freeze: bool = False,
        shards: Mapping[str, Shard] | None = None,
        partial: bool = False,
        group: Any = None,
        timeout: float = TIMEOUT,
    ) -> Undo: ...

    @overload
    def apply(
        self, model: Checkpoint | str | PathLike[str], *, group: Any = None, timeout: float = TIMEOUT
    ) -> FileUndo: ...

    def apply(
        self,
        model: nn.Module | Checkpoint | str | PathLike[str],
        *,
        freeze: bool = False,
        shards: Mapping[str, Shard] | None = None,
        partial: bool = False,
        group: Any = None,
        timeout: float = TIMEOUT,
    ) -> Undo | FileUndo:
        """Write the edits into ``model``, after everything was checked.

        Where several processes hold the model (its parameters are DTensors, it is in ``DistributedDataParallel``, or
        ``shards`` or ``partial`` are given), all of them call this. None writes before all have the same plan and are
        able to; if one fails or does not answer, all raise, and what was written is put back. Rewrites and assignments
        give the bits of the whole model, on any sharding, and so do folds whose inputs are not sharded; a sum over
        sharded inputs is taken in float64, each process's own first and these in the order of the ranks, and rounded
        once.

        Args:
            model: the model planned for, or one with the same parameters (names, shapes, dtypes); or a checkpoint, or
                its path, to be edited in place.
            freeze: of a model: also set ``requires_grad`` of what is written to false; ``restore`` puts that back too.
            shards: of a model: which parts of parameters this process holds in plain tensors, as inference engines
                keep them; by name of the parameter, or by a glob with one ``*``.
            partial: of a model: it is one stage of a pipeline; edits of parameters that it lacks are left to the other
                stages, and it is an error if no stage has them.
            group: the process group whose members hold the model together, if it is not to be taken from its
                DTensors; with ``shards`` or ``partial`` all processes by default. Of a checkpoint's path: all members
                call this, and each writes files of its own; without it one process alone edits.
            timeout: seconds to wait for the other processes.

        Returns:
            The undo that restores every bit.

        Raises:
            NeutralizeError: the plan does not fit the model, or both sets and rescales, and is applied already, so that
                it would rescale a second time; all problems are listed, and nothing was written. Plans that rescale
                alone, as ``damp`` makes them, may be stacked.
        """
        if not isinstance(model, nn.Module):
            from neutralize.checkpoint.handle import Checkpoint, as_checkpoint

            if group is not None and isinstance(model, str | PathLike):
                from neutralize.distributed.team import team_of

                if (team := team_of(model, (), group, timeout)) is not None:
                    with team.telling("apply"):
                        return Checkpoint(model).apply_together(self, team)
            checkpoint = as_checkpoint(model)
            if checkpoint is not None:
                return checkpoint.apply(self)
        from neutralize.apply import apply_plan

        return apply_plan(self, model, freeze=freeze, shards=shards, partial=partial, group=group, timeout=timeout)

    @contextmanager
    def applied(
        self, model: nn.Module | Checkpoint | str | PathLike[str], *, freeze: bool = False, **team: Any
    ) -> Iterator[Undo | FileUndo]:
        """Apply the plan for the length of a ``with`` block; restored on exit, also on an exception.

        Args:
            model: see ``apply``.
            freeze: see ``apply``.
            **team: of a model: ``shards``, ``partial``, ``group`` and ``timeout``; see ``apply``.

        Raises:
            NeutralizeError: see ``apply``.
        """
        if team and not isinstance(model, nn.Module):
            raise NeutralizeError(
                f"applied: expected a model beside {', '.join(team)}, got a checkpoint; apply, and restore in one "
                "process"
            )
        undo = self.apply(model, freeze=freeze, **team) if isinstance(model, nn.Module) else self.apply(model)
        try:
            yield undo
        finally:
            undo.restore()

    def plot(self) -> Figure:
        """Draw the activations with their operating points and linear windows; without any, the bytes per layer.

        Returns:
            A matplotlib figure, made without pyplot: ``plan.plot().savefig("plan.png")``.

        Raises:
            NeutralizeError: matplotlib is not installed.
        """
        from neutralize.plots import plot_plan

        return plot_plan(self)

    def _repr_html_(self) -> str:
        """Return a short table for a notebook."""
        from neutralize.pages.plans import fragment

        return fragment(self)

    def __str__(self) -> str:
        """Return a table: layer, strategy, edits, bytes, certificate."""
        from neutralize.report import plan_table

        return plan_table(self)


def require_plan(where: str, given: object) -> None:
    """Check that what was given for a plan is one.

    Raises:
        NeutralizeError: it is something else.
    """
    if not isinstance(given, Plan):
        raise NeutralizeError(f"{where}: expected a Plan for plan, got {type(given).__name__}; make one by nz.plan")


def joined_certificate(layers: Sequence[LayerPlan]) -> Certificate:
    """What the layers' certificates alone say of the whole: no Lipschitz factor is known, so no error has a bound."""
    kinds = {entry.certificate.kind for entry in layers}
    if kinds <= {"exact"}:
        assumptions = dict.fromkeys(entry.certificate.assumption for entry in layers if entry.certificate.assumption)
        return Certificate("", "exact", 0.0, "; ".join(assumptions), "every layer is exact")
    if kinds <= {"exact", "rounding"}:
        return Certificate("", "rounding", None, "", "every layer is exact in real arithmetic")
    return Certificate("", "measured", None, "", "a layer's error is not followed to the outputs")


def matrix_extent(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows (dim 0) and columns (the rest flattened) of a tensor seen as a matrix; a scalar is 1 by 1."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def changed_again(edits: Iterable[Edit]) -> str:
    """Name what a second application would change once more, of edits that also set parameters; else ``""``.

    A pass-through rescales what reads the layer, and a fold of norms copies a gain that it overwrites. Edits that
    rescale alone (``damp``) are meant to stack.
    """
    edits = tuple(edits)
    if not any(isinstance(edit, Rewrite) and edit.scale == 0 for edit in edits):
        return ""
    written = {name for edit in edits for name in (edit.parameters if isinstance(edit, Fold) else (edit.parameter,))}
    for edit in edits:
        is_moved = edit.source in written if isinstance(edit, Copy) else isinstance(edit, Fold)
        if is_moved or (isinstance(edit, Rewrite) and edit.scale != 0):
            return edit.parameter
    return ""


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _itemsize(dtype: str) -> int:
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise NeutralizeError(f"Plan: expected the name of a torch dtype, got {dtype!r}; write for example 'float32'")
    return found.itemsize


def _settle_tensor(edit: Edit) -> None:
    """Check what an edit says about its tensor."""
    if not all(isinstance(size, int) and size >= 0 for size in edit.shape):
        raise NeutralizeError(
            f"{type(edit).__name__}: expected sizes of 0 or more for the shape of {edit.parameter!r}, got "
            f"{list(edit.shape)}; give the shape of the parameter"
        )
    _itemsize(edit.dtype)


def _settle_floats(record: Any, *names: str) -> None:
    """Check that fields are finite, and make floats of them: 2 and 2.0 are the same plan, digest included."""
    subject = record.parameter if hasattr(record, "parameter") else record.layer
    require_finite(f"{type(record).__name__} of {subject!r}", **{name: getattr(record, name) for name in names})
    for name in names:
        object.__setattr__(record, name, float(getattr(record, name)))


# ---- reading JSON that anybody may have written ----------------------------------------------------------------------


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (TypeError, ValueError, RecursionError) as error:  # no text, no JSON or no Unicode, nested without end
        raise NeutralizeError(
            f"Plan.from_json: expected JSON, got text that is none ({error}); pass what to_json wrote"
        ) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise NeutralizeError(
            f"Plan.from_json: expected {kind.__name__} for {where}, got {type(value).__name__}; pass what to_json wrote"
        )
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NeutralizeError(
            f"Plan.from_json: expected a number for {where}, got {type(value).__name__}; pass what to_json wrote"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise NeutralizeError(
            f"Plan.from_json: expected a number that a float holds for {where}, got a larger one; pass what to_json "
            "wrote"
        )
    return number


def _check_keys(where: str, content: Any, expected: set[str]) -> None:
    _typed(content, dict, where)
    missing, unknown = expected - content.keys(), content.keys() - expected
    if missing or unknown:
        found = [f"no {', '.join(sorted(missing))}"] if missing else []
        found += [f"also {', '.join(sorted(unknown))}"] if unknown else []
        raise NeutralizeError(
            f"Plan.from_json: expected the keys {', '.join(sorted(expected))} for {where}, got {' and '.join(found)}; "
            "pass what to_json wrote"
        )


def _build(kind: type, content: Any) -> Any:
    """Make a dataclass of this module from JSON, each field checked against its annotation."""
    _check_keys(kind.__name__, content, {entry.name for entry in fields(kind)})
    values: dict[str, Any] = {}
    for entry in fields(kind):
        value, annotation, where = content[entry.name], str(entry.type), f"{kind.__name__}.{entry.name}"
        if value is None and annotation.endswith("| None"):
            pass
        elif annotation.startswith("tuple["):
            item = annotation.removeprefix("tuple[").partition(",")[0]
            value = tuple(_read(part, item, where) for part in _typed(value, list, where))
        else:
            value = _read(value, annotation.removesuffix(" | None"), where)
        values[entry.name] = value
    return kind(**values)


def _read(value: Any, annotation: str, where: str) -> Any:
    if annotation == "float":
        return _number(value, where)
    kinds: dict[str, type] = {"str": str, "int": int, "bool": bool, "Certificate": Certificate}
    return _typed(value, kinds[annotation], where)
