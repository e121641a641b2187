"""Read where the tensors of a file lie that ``torch.save`` wrote; its pickle is read as data, and nothing is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeGuard

import torch

from neutralize.checkpoint.archive import START, Record, read_records, record_bytes
from neutralize.checkpoint.layout import Elements, Layout, Listed, Piece, Stored, shared
from neutralize.checkpoint.patch import Checksum
from neutralize.checkpoint.region import Region
from neutralize.checkpoint.unpickle import SIZE_LIMIT, Made, Named, Value, read_pickle
from neutralize.errors import NeutralizeError
from neutralize.plan import dtype_name

MARK = b"EDIT"
"""Put over the start while a file is edited: neither an archive nor a pickle begins so, and torch.load raises."""

_DEPTH_LIMIT = 64
_NAME_LIMIT = 4096
_NAMES_LIMIT = 128 << 20
"""Bytes that names of tensors may take: objects can be named often, by ways that a pickle of few bytes makes many."""

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QInt32Storage": torch.qint32,
    "QUInt8Storage": torch.quint8,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}
_UNTYPED = "torch.storage.UntypedStorage"
_WRAPPERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_STRIDED = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_OTHERS = {
    "torch._utils._rebuild_sparse_tensor": ("a sparse tensor", "call to_dense() on it and save again"),
    "torch._utils._rebuild_qtensor": ("a quantized tensor", "call dequantize() on it and save again"),
    "torch._utils._rebuild_nested_tensor": ("a nested tensor", "save the tensors that it is made of"),
    "torch._utils._rebuild_meta_tensor_no_storage": (
        "a meta tensor",
        "it holds no values: save the model that has them",
    ),
}
"""Tensors that are no strided ones: what they are, and what can be done."""

_UNFIT = ("something unknown", "save plain tensors")
_CONTIGUOUS = "call contiguous() on it and save again"
_KNOWN = frozenset(
    {
        *(f"torch.{name}" for name in _STORAGES),
        *(_UNTYPED, _SUBCLASS, *_WRAPPERS, *_STRIDED, *_OTHERS),
        *("torch.Tensor", "torch.nn.parameter.Parameter", "torch.Size", "torch.device"),
        *("torch.serialization._get_layout", "torch.per_tensor_affine", "torch.per_channel_affine"),
        *("collections.OrderedDict", "collections.Counter", "_codecs.encode"),
        *("builtins.set", "builtins.bytearray", "builtins.complex"),
    }
)
"""What ``torch.load(..., weights_only=True)`` takes of itself, as far as it is read here."""


def read_torch_file(path: Path) -> Layout:
    """Return the layout of a file that ``torch.save`` wrote of a state dict, flat or nested.

    The names of nested tensors are their keys, joined by dots.

    Args:
        path: the file; the layout's root is its folder.

    Raises:
        NeutralizeError: it cannot be read, is damaged, is no zip archive, or its pickle wants more than tensors.
    """
    what = repr(str(path))
    try:
        with path.open("rb") as file:
            start = file.read(len(START))
            if start == MARK:
                raise NeutralizeError(
                    f"checkpoint: expected a finished file, got {what}, in which an edit was cut off; run: neutralize "
                    "restore"
                )
            if start != START:
                raise NeutralizeError(
                    f"checkpoint: expected a zip archive of torch.save for {what}, got another format; load it and "
                    "save it again with torch.save"
                )
            archive = read_archive(file, path.name, 0, os.fstat(file.fileno()).st_size, what)
    except OSError as error:
        raise NeutralizeError(
            f"checkpoint: expected a file that can be read, got {error.strerror or error} for {what}; check it"
        ) from error
    if not isinstance(archive.content, Made) or archive.content.what not in ("dict", "collections.OrderedDict"):
        raise NeutralizeError(f"checkpoint: expected a state dict in {what}, got something else; save one")
    tensors: dict[str, Stored] = {}
    for name, made in _tensors(archive.content, what):
        if name in tensors:
            raise NeutralizeError(
                f"checkpoint: expected each tensor once in {what}, got two of the name {name[:200]!r}; rename one"
            )
        tensors[name] = archive.stored(name, made)
    if not tensors:
        raise NeutralizeError(f"checkpoint: expected tensors in {what}, got a file without any; name another")
    return Layout(
        path.parent,
        (path.name,),
        tensors,
        {path.name: (0, MARK)},
        "torch",
        tied=shared(tensors),
        checksums=tuple(sorted(archive.checksums(), key=lambda checksum: checksum.covered.offset)),
    )


@dataclass(frozen=True)
class Archive:
    """An archive of ``torch.save``.

    Attributes:
        file: that holds it, relative to the checkpoint's root.
        what: names it in messages.
        content: what its pickle would build.
        data: the records of its storages, by key.
        dtypes: of the storages that tensors were found in, by key.
    """

    file: str
    what: str
    content: Value
    data: dict[str, Record]
    dtypes: dict[str, torch.dtype]

    def checksums(self) -> Iterator[Checksum]:
        """Those of its storages."""
        for record in self.data.values():
            if record.nbytes:
                places = tuple(Region.run(self.file, place, 4) for place in record.checksums)
                yield Checksum(Region.run(self.file, record.offset, record.nbytes), places)

    def stored(self, name: str, made: Made) -> Elements | Listed:
        """Return where a tensor lies that the pickle would make.

        Raises:
            NeutralizeError: it lies outside of its storage, or that is not there.
        """
        what, args = made.what, made.args
        while what == _SUBCLASS or what in _WRAPPERS:
            called, kind, inner = (*args, None, None, None)[:3]
            if what == _SUBCLASS:
                is_plain = isinstance(kind, Named) and kind.name in ("torch.Tensor", "torch.nn.parameter.Parameter")
                if not isinstance(called, Named) or not isinstance(inner, tuple) or not is_plain:
                    raise self._broken(name, "a subclass that is not known")
                what, args = called.name, inner
            elif isinstance(called, Made):
                what, args = called.what, called.args
            else:
                raise self._broken(name, "a parameter without a tensor")
        if what not in _STRIDED:
            return Listed(name, *_OTHERS.get(what, _UNFIT))
        return self._strided(name, what.endswith("v3"), args)

    def _strided(self, name: str, has_dtype: bool, args: tuple[Value, ...]) -> Elements | Listed:
        """A tensor of (storage, offset, sizes, strides, requires_grad, hooks[, dtype][, flags])."""
        storage, first, shape, strides, _, _, *rest = (*args, *[None] * 8)[:8]
        key, dtype, nbytes = self._storage(name, storage)
        if has_dtype:
            named = rest.pop(0)
            own = dtype_of(named.name) if isinstance(named, Named) else None
            if own is None:
                raise self._broken(name, "no dtype")
            dtype = own
        shape, strides = sizes_of(shape), sizes_of(strides)
        if shape is None or strides is None or len(shape) != len(strides) or not is_size(first):
            raise self._broken(name, "a shape or strides that are none")
        lasts = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        last = first + lasts + 1 if math.prod(shape) else first
        if last * dtype.itemsize > nbytes and last > first:
            raise self._broken(name, f"elements up to {last} in a storage of {nbytes} bytes")
        begin = self.data[key].offset + (first * dtype.itemsize if last > first else 0)
        region = Region.run(self.file, begin, (last - first) * dtype.itemsize)
        if last > first and not _is_contiguous(shape, strides):
            return Listed(name, f"{dtype_name(dtype)} with strides {list(strides)}", _CONTIGUOUS, shape, (region,))
        if any(isinstance(flag, Made) and flag.items for flag in rest):  # "conj" or "neg": done when it is read
            remedy = "call resolve_conj() and resolve_neg() on it and save again"
            return Listed(name, f"{dtype_name(dtype)}, conjugated or negated", remedy, shape, (region,))
        return Elements(name, dtype, shape, (Piece(region, shape, (0,) * len(shape)),))

    def _storage(self, name: str, storage: Value) -> tuple[str, torch.dtype, int]:
        """Key, dtype and bytes of a tensor's storage."""
        is_one = isinstance(storage, Made) and storage.what == "persistent"
        named = storage.args[0] if is_one and isinstance(storage, Made) else None
        if not isinstance(named, tuple) or len(named) != 5:
            raise self._broken(name, "no storage")
        _, kind, key, _, numel = named
        if not isinstance(kind, Named) or not isinstance(key, str) or key not in self.data or not is_size(numel):
            raise self._broken(name, "a storage that is not there")
        dtype = torch.uint8 if kind.name == _UNTYPED else _STORAGES.get(kind.name.removeprefix("torch."))
        if dtype is None:
            raise self._broken(name, "a storage of no known dtype")
        if self.dtypes.setdefault(key, dtype) != dtype:
            raise self._broken(name, f"a storage as {dtype_name(dtype)} and as {dtype_name(self.dtypes[key])}")
        nbytes = self.data[key].nbytes
        if numel * dtype.itemsize != nbytes:
            raise self._broken(name, f"{numel} elements in {nbytes} bytes")
        return key, dtype, nbytes

    def _broken(self, name: str, got: str) -> NeutralizeError:
        return NeutralizeError(
            f"checkpoint: expected a tensor of torch.save for {name[:200]!r} in {self.what}, got {got}; it was "
            "damaged: fetch it again"
        )


def read_archive(file: BinaryIO, name: str, begin: int, nbytes: int, what: str) -> Archive:
    """Return what an archive of ``torch.save`` holds.

    Args:
        file: an open file.
        name: its path relative to the checkpoint's root.
        begin: where the archive begins in it.
        nbytes: how long the archive is.
        what: names it in messages.

    Raises:
        NeutralizeError: it is damaged, a TorchScript program, of the other byte order, or wants more than tensors.
    """
    records = read_records(file, begin, nbytes, what)
    folder = min(records, default="", key=lambda record: records[record].offset).partition("/")[0]
    if f"{folder}/constants.pkl" in records:
        raise NeutralizeError(
            f"checkpoint: expected a state dict in {what}, got a TorchScript program; save its state_dict() with "
            "torch.save"
        )
    changed = next((record for record in records if not records[record].is_plain), None)
    if changed is not None:
        raise NeutralizeError(
            f"checkpoint: expected records stored as they are in {what}, got {changed[:200]!r}, compressed or "
            "encrypted; save again with torch.save"
        )
    order = f"{folder}/byteorder"
    if order in records and record_bytes(file, records, order, 16, what) != b"little":
        raise NeutralizeError(
            f"checkpoint: expected little-endian bytes in {what}, got others; load it and save it again on this machine"
        )
    content = read_pickle(record_bytes(file, records, f"{folder}/data.pkl", SIZE_LIMIT, what), _is_known, what)
    prefix = f"{folder}/data/"
    data = {key.removeprefix(prefix): record for key, record in records.items() if key.startswith(prefix)}
    return Archive(name, what, content, data, {})


def _is_known(name: str) -> bool:
    return name in _KNOWN or dtype_of(name) is not None


def dtype_of(name: str) -> torch.dtype | None:
    """Return the dtype that a pickle names, or ``None`` if it names something else."""
    module, _, attribute = name.rpartition(".")
    found = vars(torch).get(attribute) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def _tensors(content: Made, what: str) -> Iterator[tuple[str, Made]]:
    """Tensors by their keys, joined by dots, in order."""
    spent = 0

    def walk(path: str, value: Value, depth: int) -> Iterator[tuple[str, Made]]:
        nonlocal spent
        spent += 256 + len(path)
        if depth > _DEPTH_LIMIT or len(path) > _NAME_LIMIT or spent > _NAMES_LIMIT:
            raise NeutralizeError(
                f"checkpoint: expected a state dict nested less than {_DEPTH_LIMIT} deep in {what}, got a deeper or "
                "larger one; save the tensors alone"
            )
        children: Iterator[tuple[Value, Value]] = iter(())
        if isinstance(value, tuple):
            children = iter(enumerate(value))
        elif isinstance(value, Made):
            if value.what in ("dict", "collections.OrderedDict"):
                children = iter(value.items)
            elif value.what == "list":
                children = iter(enumerate(value.elements))
            elif value.what.startswith("torch._utils._rebuild") or value.what == _SUBCLASS:
                yield path, value
        for key, child in children:
            if isinstance(child, Made | tuple):
                if not isinstance(key, str | int) or (isinstance(key, int) and abs(key) >= 1 << 63):
                    raise NeutralizeError(
                        f"checkpoint: expected keys of text or numbers in {what}, got another; save the tensors alone"
                    )
                yield from walk(f"{path}.{key}" if depth else str(key), child, depth + 1)

    return walk("", content, 0)


def sizes_of(value: Value) -> tuple[int, ...] | None:
    """Return sizes that a pickle holds, as a tuple or as a ``torch.Size``, or ``None`` if it holds something else."""
    if isinstance(value, Made) and value.what == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, tuple) or len(value) > 64:
        return None
    sizes = tuple(size for size in value if is_size(size))
    return sizes if len(sizes) == len(value) else None


def is_size(value: Value) -> TypeGuard[int]:
    """Return whether a value is an integer that can be a size, an offset or a stride."""
    return type(value) is int and 0 <= value < 1 << 62


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
