"""Plans: what will be written, as frozen data that prints, hashes and travels.

A plan names parameters and says what becomes of them. It holds no tensor of the model, so the same plan serves a live
model, a meta model, every rank of a sharded one, and files on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import torch
from torch import nn

from neutralize.errors import NeutralizeError, require_finite

if TYPE_CHECKING:
    from neutralize.undo import Undo

FORMAT_VERSION = 1
CERTIFICATE_KINDS = ("exact", "rounding", "bounded", "measured")


@dataclass(frozen=True)
class Rewrite:
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
        """Check the coefficients and the block."""
        require_finite(f"Rewrite of {self.parameter!r}", scale=self.scale, diagonal=self.diagonal, fill=self.fill)
        for what, extent, given in zip(("rows", "columns"), self.extent, (self.rows, self.columns), strict=True):
            if given is not None and not 0 <= given[0] < given[1] <= extent:
                raise NeutralizeError(
                    f"Rewrite: expected {what} inside 0:{extent} for {self.parameter!r}, got {given[0]}:{given[1]}; "
                    "give a range that is not empty"
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

    @property
    def written_bytes(self) -> int:
        """How many bytes are written."""
        return self.numel * _itemsize(self.dtype)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names that are written."""
        return (self.parameter,)

    def block(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the view of ``tensor`` (shape ``self.shape``) that this edit writes."""
        if self.rows is None and self.columns is None:
            return tensor
        rows, columns = self.extent
        matrix = (
            tensor.reshape(rows, columns) if tensor.is_contiguous() or tensor.dim() == 2 else tensor.view(rows, columns)
        )
        return matrix[slice(*(self.rows or (0, rows))), slice(*(self.columns or (0, columns)))]

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
        transposed: the weight is stored (in, out), as in the ``Conv1D`` of GPT-2: sum over dim 0.
    """

    parameter: str
    bias: str
    shape: tuple[int, ...]
    dtype: str
    scale: float
    shift: float
    transposed: bool = False

    def __post_init__(self) -> None:
        """Check the coefficients."""
        require_finite(f"Fold of {self.parameter!r}", scale=self.scale, shift=self.shift)

    @property
    def numel(self) -> int:
        """How many elements are written, the bias included."""
        return math.prod(self.shape) + self.bias_numel

    @property
    def bias_numel(self) -> int:
        """How many elements the bias has."""
        return self.shape[-1] if self.transposed else self.shape[0]

    @property
    def written_bytes(self) -> int:
        """How many bytes are written."""
        return self.numel * _itemsize(self.dtype)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names that are written."""
        return (self.parameter, self.bias)

    def describe(self) -> str:
        """Say in a few characters what is written."""
        return f"{self.bias} += {self.shift:.6g} ({self.parameter} 1), {self.parameter} <- {self.scale:.6g} W"


@dataclass(frozen=True)
class Assign:
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
        """Check the values."""
        if len(self.values) != math.prod(self.shape):
            raise NeutralizeError(
                f"Assign: expected {math.prod(self.shape)} values for {self.parameter!r} of shape {list(self.shape)}, "
                f"got {len(self.values)}; give one per element"
            )
        if not all(map(math.isfinite, self.values)):
            raise NeutralizeError(
                f"Assign: expected finite values for {self.parameter!r}, got NaN or Inf; check their source"
            )

    @property
    def numel(self) -> int:
        """How many elements are written."""
        return len(self.values)

    @property
    def written_bytes(self) -> int:
        """How many bytes are written."""
        return self.numel * _itemsize(self.dtype)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names that are written."""
        return (self.parameter,)

    def describe(self) -> str:
        """Say in a few characters what is written."""
        return f"{self.parameter} <- {self.numel} values"


Edit: TypeAlias = Rewrite | Fold | Assign
_EDITS: dict[str, type[Rewrite] | type[Fold] | type[Assign]] = {kind.__name__.lower(): kind for kind in get_args(Edit)}


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
    """

    layer: str
    kind: str
    bound: float | None = None
    assumption: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        """Check the kind and the bound."""
        if self.kind not in CERTIFICATE_KINDS:
            raise NeutralizeError(
                f"Certificate: expected one of {', '.join(CERTIFICATE_KINDS)} for kind, got {self.kind!r}; use one "
                "of these"
            )
        if self.bound is not None and not (math.isfinite(self.bound) and self.bound >= 0):
            raise NeutralizeError(f"Certificate: expected a finite bound of 0 or more, got {self.bound}; leave it out")

    def __str__(self) -> str:
        """Return the kind, with its bound."""
        return f"{self.kind}({self.bound:.2g})" if self.bound else self.kind


@dataclass(frozen=True)
class LayerPlan:
    """What a plan does to one layer, and what ``verify`` needs to measure it.

    Attributes:
        layer: qualified name of the layer.
        target: what the layer becomes: ``input`` (its output is its input), ``null`` (its output is zero, or nothing
            reads
            it), ``scaled`` (its output times ``gain``), ``damped`` (a residual block: what it adds times ``gain``) or
            ``fill``
            (constant weights).
        certificate: how exactly.
        edits: indices into the plan's edits.
        activation: name of the activation that belongs to the layer, or ``""``.
        gain: for ``input``, the factor that the layer hands its input on with; for ``scaled`` and ``damped``, the
            factor.
        operating_point, value, slope, epsilon: of the linear regime (MATH: a, φ(a), φ'(a), ε); a block has none of
            them.
        input_bound: the bound X on the magnitude of the layer's input, where one was needed.
        consumers: qualified names of the modules that read the layer and were rewritten for it.
        sides: which sides of the layer are rewritten, for strategies that have sides.
        note: one remark for the reader, or ``""``.
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


@dataclass(frozen=True)
class Plan:
    """A list of edits on named parameters, and what they make of each layer.

    Attributes:
        strategy: name of the strategy.
        edits: what is written, in this order.
        layers: one entry per selected layer.
        tied: groups of names that are one tensor, as far as the edits touch them and the planner has accepted it.
    """

    strategy: str
    edits: tuple[Edit, ...]
    layers: tuple[LayerPlan, ...]
    tied: tuple[tuple[str, ...], ...] = ()

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        """One certificate per layer."""
        return tuple(layer.certificate for layer in self.layers)

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
        """SHA-256 of the canonical JSON, as hexadecimal text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the canonical JSON: sorted keys, no white space, floats that round-trip."""
        content = {
            "format": FORMAT_VERSION,
            "strategy": self.strategy,
            "edits": [{"kind": type(edit).__name__.lower(), **asdict(edit)} for edit in self.edits],
            "layers": [asdict(layer) for layer in self.layers],
            "tied": self.tied,
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Parse what ``to_json`` wrote.

        Raises:
            NeutralizeError: the text is no JSON, of another format version, or a field is missing, unknown or of the
                wrong type.
        """
        try:
            content = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise NeutralizeError(
                f"Plan.from_json: expected JSON, got text that is none ({error}); pass to_json's"
            ) from error
        _check_keys("the plan", content, {"format", "strategy", "edits", "layers", "tied"})
        if content["format"] != FORMAT_VERSION:
            raise NeutralizeError(
                f"Plan.from_json: expected format {FORMAT_VERSION}, got {content['format']!r}; plan again with this "
                "version"
            )
        edits = []
        for entry in _typed(content["edits"], list, "edits"):
            kind = _EDITS.get(_typed(entry, dict, "an edit").get("kind"))
            if kind is None:
                raise NeutralizeError(
                    f"Plan.from_json: expected one of {', '.join(_EDITS)} for the kind of an edit, got "
                    f"{entry.get('kind')!r}; "
                    "plan again with this version"
                )
            edits.append(_build(kind, {key: value for key, value in entry.items() if key != "kind"}))
        layers = []
        for entry in _typed(content["layers"], list, "layers"):
            certificate = _build(Certificate, _typed(entry, dict, "a layer").get("certificate"))
            layer = _build(LayerPlan, {**entry, "certificate": certificate})
            if not all(0 <= index < len(edits) for index in layer.edits):
                raise NeutralizeError(
                    f"Plan.from_json: expected edits 0 to {len(edits) - 1} for layer {layer.layer!r}, got "
                    f"{list(layer.edits)}; "
                    "the text was changed by hand: plan again"
                )
            layers.append(layer)
        tied = tuple(
            tuple(_typed(name, str, "tied") for name in _typed(group, list, "tied")) for group in content["tied"]
        )
        return Plan(_typed(content["strategy"], str, "strategy"), tuple(edits), tuple(layers), tied)

    def apply(self, model: nn.Module, *, freeze: bool = False) -> Undo:
        """Write the edits into ``model``, after everything was checked.

        Args:
            model: the model planned for, or one with the same parameters (names, shapes, dtypes).
            freeze: also set ``requires_grad`` of what is written to false; ``restore`` puts that back too.

        Returns:
            The undo that restores every bit.

        Raises:
            NeutralizeError: the plan does not fit the model; all problems are listed, and nothing was written.
        """
        from neutralize.apply import apply_plan

        return apply_plan(self, model, freeze=freeze)

    @contextmanager
    def applied(self, model: nn.Module, *, freeze: bool = False) -> Iterator[Undo]:
        """Apply the plan for the length of a ``with`` block; restored on exit, also on an exception."""
        undo = self.apply(model, freeze=freeze)
        try:
            yield undo
        finally:
            undo.restore()

    def __str__(self) -> str:
        """Return a table: layer, strategy, edits, bytes, certificate."""
        from neutralize.report import plan_table

        return plan_table(self)


def matrix_extent(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows (dim 0) and columns (the rest flattened) of a tensor seen as a matrix; a scalar is 1 by 1."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _itemsize(dtype: str) -> int:
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise NeutralizeError(f"Plan: expected the name of a torch dtype, got {dtype!r}; write for example 'float32'")
    return found.itemsize


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise NeutralizeError(
            f"Plan.from_json: expected {kind.__name__} for {where}, got {type(value).__name__}; pass what to_json wrote"
        )
    return value


def _check_keys(where: str, content: Any, expected: set[str], optional: frozenset[str] = frozenset()) -> None:
    _typed(content, dict, where)
    missing, unknown = expected - optional - content.keys(), content.keys() - expected
    if missing or unknown:
        raise NeutralizeError(
            f"Plan.from_json: expected the keys {', '.join(sorted(expected))} for {where}, got "
            f"{'no ' + ', '.join(sorted(missing)) if missing else 'also ' + ', '.join(sorted(unknown))}; pass what "
            "to_json wrote"
        )


def _build(kind: type, content: Any) -> Any:
    """Make a dataclass of this module from JSON, each field checked against its annotation."""
    optional = frozenset(field.name for field in fields(kind) if field.default is not MISSING)
    _check_keys(kind.__name__, content, {field.name for field in fields(kind)}, optional)
    values: dict[str, Any] = {}
    for field in fields(kind):
        if field.name not in content:
            continue
        value, annotation, where = content[field.name], str(field.type), f"{kind.__name__}.{field.name}"
        if value is None and annotation.endswith("| None"):
            pass
        elif annotation.startswith("tuple[int"):
            value = tuple(_typed(item, int, where) for item in _typed(value, list, where))
        elif annotation.startswith("tuple[float"):
            value = tuple(float(_typed(item, int | float, where)) for item in _typed(value, list, where))  # type: ignore[arg-type]
        elif annotation.startswith("tuple[str"):
            value = tuple(_typed(item, str, where) for item in _typed(value, list, where))
        elif annotation.startswith("float"):
            value = float(_typed(value, int | float, where))  # type: ignore[arg-type]
        elif annotation in ("str", "int", "bool"):
            _typed(value, {"str": str, "int": int, "bool": bool}[annotation], where)
        values[field.name] = value
    return kind(**values)
