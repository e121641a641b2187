"""Read where the tensors of a ``torch.distributed.checkpoint`` folder lie; its pickles are read as data.

A tensor is cut into boxes, one per shard; each is an archive of ``torch.save`` somewhere in one of the folder's files.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neutralize.checkpoint.layout import Elements, Layout, Listed, Stored
from neutralize.checkpoint.locate import inside
from neutralize.checkpoint.patch import Checksum
from neutralize.checkpoint.pickled import MARK, Archive, dtype_of, is_size, read_archive, sizes_of
from neutralize.checkpoint.unpickle import SIZE_LIMIT, Made, Named, Value, read_pickle
from neutralize.errors import NeutralizeError
from neutralize.plan import dtype_name

_METADATA = ".metadata"
_CLASSES = "torch.distributed.checkpoint.metadata"
_TENSOR = f"{_CLASSES}.TensorStorageMetadata"
_KNOWN = frozenset(
    {
        *(f"{_CLASSES}.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
        *(f"{_CLASSES}.{name}" for name in ("TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata")),
        *(_TENSOR, "torch.distributed.checkpoint.filesystem._StorageInfo"),
        *("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict"),
        *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
    }
)
"""What the metadata of ``torch.distributed.checkpoint`` is made of; none of it is made here."""


@dataclass(frozen=True)
class _Box:
    """A box of a tensor: its first element, and its shape."""

    origin: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, order=True)
class _Stream:
    """Bytes of a file that hold a box."""

    file: str
    offset: int
    nbytes: int


def read_distributed(folder: Path) -> Layout:
    """Return the layout of a folder that ``torch.distributed.checkpoint`` saved.

    Args:
        folder: with ``.metadata`` and the files that it names; it is the layout's root.

    Raises:
        NeutralizeError: it cannot be read, is damaged, names files elsewhere, or its tensors are stored in another way
            than ``torch.save`` does.
    """
    try:
        return _Reader(folder).layout()
    except OSError as error:
        raise NeutralizeError(
            f"checkpoint: expected files that can be read, got {error.strerror or error} for {str(folder)!r}; check it"
        ) from error


@dataclass(frozen=True)
class _Reader:
    folder: Path

    def layout(self) -> Layout:
        metadata = self._metadata()
        streams = self._streams(metadata)
        tensors: dict[str, Elements] = {}
        boxes: dict[_Stream, tuple[str, _Box]] = {}
        for name, value in self._table(metadata, "state_dict_metadata"):
            if not isinstance(value, Made) or value.what != _TENSOR:
                continue  # no tensor, but pickled bytes
            if not isinstance(name, str) or name in tensors:
                raise self._broken("tensors with names of their own", "others")
            tensors[name], own = self._tensor(name, value)
            for box in own:
                stream = streams.get((name, box.origin))
                if stream is None:
                    raise self._broken(f"a place of {name[:200]!r} at {list(box.origin)}", "none")
                if stream in boxes:
                    raise self._broken(f"bytes of its own for {name[:200]!r}", "those of another tensor")
                boxes[stream] = (name, box)
        stored, checksums = self._read(tensors, boxes)
        if not stored:
            raise self._broken("tensors", "none")
        return Layout(
            self.folder,
            tuple(dict.fromkeys(stream.file for stream in sorted(boxes))),
            stored,
            {_METADATA: (0, MARK)},
            "torch.distributed.checkpoint",
            checksums=checksums,
        )

    def _broken(self, expected: str, got: str) -> NeutralizeError:
        return NeutralizeError(
            f"checkpoint: expected {expected} in {str(self.folder / _METADATA)!r}, got {got}; it was damaged: fetch "
            "the folder again"
        )

    def _metadata(self) -> Made:
        path = self.folder / _METADATA
        if not path.is_file():
            raise NeutralizeError(
                f"checkpoint: expected a file {_METADATA} in {str(self.folder)!r}, got none; name a folder that "
                "torch.distributed.checkpoint saved"
            )
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
        if data.startswith(MARK):
            raise NeutralizeError(
                f"checkpoint: expected a finished checkpoint, got {str(self.folder)!r}, in which an edit was cut off; "
                "run: neutralize restore"
            )
        metadata = read_pickle(data, _is_known, repr(str(path)))
        if not isinstance(metadata, Made) or metadata.what != f"{_CLASSES}.Metadata":
            raise self._broken("the metadata of torch.distributed.checkpoint", "something else")
        return metadata

    def _table(self, metadata: Made, name: str) -> Sequence[tuple[Value, Value]]:
        table = metadata.fields().get(name)
        if not isinstance(table, Made) or table.what != "dict":
            raise self._broken(f"a table {name}", "none")
        return table.items

    def _streams(self, metadata: Made) -> dict[tuple[str, tuple[int, ...]], _Stream]:
        """Where boxes lie, by the name of the tensor and the box's origin."""
        found: dict[tuple[str, tuple[int, ...]], _Stream] = {}
        for index, info in self._table(metadata, "storage_data"):
            if not isinstance(index, Made) or not isinstance(info, Made):
                raise self._broken("a list of places", "something else")
            at, place = index.fields(), info.fields()
            name, origin = at.get("fqn"), sizes_of(at.get("offset"))
            file, offset, nbytes = (place.get(key) for key in ("relative_path", "offset", "length"))
            transforms = place.get("transform_descriptors")
            if not isinstance(name, str) or not isinstance(file, str) or not is_size(offset) or not is_size(nbytes):
                raise self._broken("names, files and sizes in its list of places", "others")
            if origin is None:
                continue  # no tensor
            if not (transforms is None or (isinstance(transforms, Made) and not transforms.elements)):
                raise NeutralizeError(
                    f"checkpoint: expected tensors as torch.save writes them in {str(self.folder)!r}, got compressed "
                    "or otherwise transformed ones; save again without extensions"
                )
            if (name, origin) in found:
                raise self._broken(f"one place of {name[:200]!r} at {list(origin)}", "two")
            found[name, origin] = _Stream(file, offset, nbytes)
        return found

    def _tensor(self, name: str, value: Made) -> tuple[Elements, list[_Box]]:
        """A tensor without pieces yet, and the boxes that it is cut into."""
        fields = value.fields()
        properties, chunks, shape = fields.get("properties"), fields.get("chunks"), sizes_of(fields.get("size"))
        state = properties.state if isinstance(properties, Made) else None
        named = state[0] if isinstance(state, tuple) and state else None
        dtype = dtype_of(named.name) if isinstance(named, Named) else None
        if dtype is None or shape is None or not isinstance(chunks, Made) or chunks.what != "list":
            raise self._broken(f"dtype, size and chunks of {name[:200]!r}", "others")
        boxes = []
        for chunk in chunks.elements:
            box = chunk.fields() if isinstance(chunk, Made) else {}
            origin, extent = sizes_of(box.get("offsets")), sizes_of(box.get("sizes"))
            if origin is None or extent is None or not len(origin) == len(extent) == len(shape):
                raise self._broken(f"offsets and sizes of the chunks of {name[:200]!r}", "others")
            if math.prod(extent):
                boxes.append(_Box(origin, extent))
        if boxes if math.prod(shape) == 0 else not _are_a_grid(shape, boxes):
            raise NeutralizeError(
                f"checkpoint: expected shards that cover {name[:200]!r} once, in rows and columns, in "
                f"{str(self.folder)!r}, got others; load the checkpoint and save it again"
            )
        return Elements(name, dtype, shape, ()), boxes

    def _read(
        self, tensors: Mapping[str, Elements], boxes: Mapping[_Stream, tuple[str, _Box]]
    ) -> tuple[dict[str, Stored], tuple[Checksum, ...]]:
        """Find the bytes of every box in its stream; the checksums come by file and offset, as the streams do."""
        found: dict[str, list[tuple[_Box, Elements | Listed]]] = {name: [] for name in tensors}
        checksums: list[Checksum] = []
        for file, streams in itertools.groupby(sorted(boxes), key=lambda stream: stream.file):
            path = inside(self.folder, file)
            with path.open("rb") as opened:
                size, free = os.fstat(opened.fileno()).st_size, 0
                for stream in streams:
                    name, box = boxes[stream]
                    if stream.offset < free or stream.offset + stream.nbytes > size:
                        raise self._broken(
                            f"bytes of its own for {name[:200]!r}, in the {size} bytes of {file[:200]!r}",
                            f"{stream.nbytes} at {stream.offset}",
                        )
                    free = stream.offset + stream.nbytes
                    what = f"{str(path)!r} at {stream.offset}"
                    archive = read_archive(opened, file, stream.offset, stream.nbytes, what)
                    found[name].append((box, self._in_box(tensors[name], box, archive)))
                    checksums.extend(sorted(archive.checksums(), key=lambda checksum: checksum.covered.offset))
        return {name: _joined(tensors[name], parts) for name, parts in found.items()}, tuple(checksums)

    def _in_box(self, tensor: Elements, box: _Box, archive: Archive) -> Elements | Listed:
        made = archive.content
        found = archive.stored(tensor.name, made) if isinstance(made, Made) else None
        if found is None or found.shape != box.shape:
            raise self._broken(f"a tensor of {list(box.shape)} in {archive.what}", "something else")
        if isinstance(found, Elements) and found.dtype != tensor.dtype:
            raise self._broken(f"{dtype_name(tensor.dtype)} in {archive.what}", found.encoding)
        return found


def _is_known(name: str) -> bool:
    return name in _KNOWN or dtype_of(name) is not None


def _joined(tensor: Elements, parts: list[tuple[_Box, Elements | Listed]]) -> Stored:
    """The tensor of parts; it can be written if each of them can."""
    pieces = []
    for box, part in parts:
        if isinstance(part, Listed):
            regions = tuple(region for _, other in parts for region in other.regions)
            return Listed(tensor.name, part.encoding, tensor.shape, regions)
        pieces.append(replace(part.pieces[0], origin=box.origin))
    return replace(tensor, pieces=tuple(pieces))


def _are_a_grid(shape: tuple[int, ...], boxes: list[_Box]) -> bool:
    """Whether boxes are all that cuts right through a tensor leave of it."""
    ends: list[dict[int, int]] = []
    for size, starts in zip(shape, zip(*(box.origin for box in boxes), strict=True), strict=False):
        cuts = sorted(set(starts))
        ends.append(dict(zip(cuts, [*cuts[1:], size], strict=True)))
    if len({box.origin for box in boxes}) != len(boxes) or math.prod(map(len, ends)) != len(boxes):
        return False
    return all(0 in end for end in ends) and all(
        first + size == end[first]
        for box in boxes
        for first, size, end in zip(box.origin, box.shape, ends, strict=True)
    )
