"""Locate: what a path is, and the layout of the checkpoint that it names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from neutralize.checkpoint.bounded import read_json
from neutralize.checkpoint.headers import read_weight_map
from neutralize.checkpoint.layout import Layout, Stored
from neutralize.checkpoint.region import Files
from neutralize.checkpoint.safetensors import read_safetensors
from neutralize.errors import NeutralizeError

_FILE_LIMIT = 100_000


def locate(path: str | os.PathLike[str]) -> Layout:
    """Return the layout of a checkpoint.

    Args:
        path: a ``.safetensors``, ``.gguf``, ``.pt``, ``.pth`` or ``.bin`` file; a folder with one of these, with shards
            and their index, or written by ``torch.distributed.checkpoint``.

    Raises:
        NeutralizeError: there is none, it is damaged, or an index names files outside of the folder.
    """
    place = Path(path)
    if place.is_dir():
        return _with_quantized(_with_config(_checked(_folder(place)), place))
    if not place.exists():
        raise NeutralizeError(f"checkpoint: expected a file or a folder, got nothing at {str(place)!r}; check the path")
    if not place.is_file():
        raise NeutralizeError(
            f"checkpoint: expected a file or a folder for {str(place)!r}, got neither; check the path"
        )
    return _with_quantized(_with_config(_checked(_file(place)), place.parent))


def _file(path: Path) -> Layout:
    if path.name.endswith(".index.json"):
        raise NeutralizeError(
            f"checkpoint: expected a checkpoint, got the index {str(path)!r}; name its folder, {str(path.parent)!r}"
        )
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise NeutralizeError(
            f"checkpoint: expected a file that ends in {', '.join(_READERS)}, got {str(path)!r}; rename it, or name "
            "its folder"
        )
    return reader(path)


def _read_gguf(path: Path) -> Layout:
    from neutralize.checkpoint.gguf import read_gguf

    return read_gguf(path)


def _read_torch_file(path: Path) -> Layout:
    from neutralize.checkpoint.pickled import read_torch_file

    return read_torch_file(path)


_READERS: Mapping[str, Callable[[Path], Layout]] = {
    ".safetensors": read_safetensors,
    ".gguf": _read_gguf,
    ".pt": _read_torch_file,
    ".pth": _read_torch_file,
    ".bin": _read_torch_file,
}
_PREFERRED = ("model.safetensors", "pytorch_model.bin")
"""Among several files or indices of a folder, those that loaders take first."""


def _folder(folder: Path) -> Layout:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_symlink() or not entry.is_dir())
    if ".metadata" in names:
        from neutralize.checkpoint.distributed import read_distributed

        return read_distributed(folder)
    for suffix in (".safetensors", ".bin"):
        index = _one_of(folder, [name for name in names if name.endswith(f"{suffix}.index.json")], ".index.json")
        if index is not None and not _is_left_behind(folder, index, names):
            return _sharded(folder, index, suffix)
        single = _one_of(folder, [name for name in names if name.endswith(suffix)], "")
        if single is not None:
            return _file(inside(folder, single))
    parts = [name for name in names if name.endswith(".gguf")]
    if len(parts) > 1:
        return _split(folder, parts)
    for suffix in (".gguf", ".pt", ".pth"):
        single = _one_of(folder, [name for name in names if name.endswith(suffix)], "")
        if single is not None:
            return _file(inside(folder, single))
    raise NeutralizeError(
        f"checkpoint: expected safetensors, torch or GGUF files in {str(folder)!r}, got a folder without any; check "
        "the path"
    )


def _is_left_behind(folder: Path, index: str, names: list[str]) -> bool:
    """Whether an index is of shards that one file has taken the place of: saving a model in one leaves it.

    Raises:
        NeutralizeError: both are there: transformers loads the one file, others the shards.
    """
    single = index.removesuffix(".index.json")
    shards = set(read_weight_map(folder / index).values()) - {single} if single in names else set()
    if shards & set(names):
        raise NeutralizeError(
            f"checkpoint: expected one checkpoint in {str(folder)!r}, got {single!r} beside the shards of {index!r}, "
            "of which loaders take either; remove what is not meant"
        )
    return bool(shards)


def _split(folder: Path, names: list[str]) -> Layout:
    """The parts of a GGUF file that was split, as one layout."""
    from neutralize.checkpoint.gguf import PART, read_parts

    found = [PART.fullmatch(name) for name in names]
    sets = {(part[1], int(part[3])) for part in found if part is not None}
    if None in found or len(sets) != 1:
        _one_of(folder, names, "")  # several checkpoints: it refuses
    ((stem, count),) = sets
    if [int(part[2]) for part in found if part is not None] != list(range(1, count + 1)):
        raise NeutralizeError(
            f"checkpoint: expected the {count} parts of {stem!r} in {str(folder)!r}, got {', '.join(names[:8])}; fetch "
            "those that are missing"
        )
    return join(folder, read_parts([inside(folder, name) for name in names]))


def _one_of(folder: Path, names: list[str], ending: str) -> str | None:
    """The file to take, if there is one."""
    for preferred in _PREFERRED:
        if f"{preferred}{ending}" in names:
            return f"{preferred}{ending}"
    if ending == "" and "training_args.bin" in names:  # which the Trainer of transformers leaves beside the weights
        names = [name for name in names if name != "training_args.bin"]
    if len(names) > 1:
        raise NeutralizeError(
            f"checkpoint: expected one checkpoint in {str(folder)!r}, got {', '.join(names[:8])}"
            f"{' and more' if len(names) > 8 else ''}; name one of these files"
        )
    return names[0] if names else None


def _sharded(folder: Path, index: str, suffix: str) -> Layout:
    """The shards that an index names, as one layout."""
    weight_map = read_weight_map(folder / index)
    files = list(dict.fromkeys(weight_map.values()))
    if len(files) > _FILE_LIMIT:
        raise NeutralizeError(
            f"checkpoint: expected at most {_FILE_LIMIT} shards, got {len(files)}; it is no such index"
        )
    for file in files:
        if not file.endswith(suffix):
            raise NeutralizeError(
                f"checkpoint: expected files that end in {suffix} in {str(folder / index)!r}, got {file[:200]!r}; "
                "fetch it again"
            )
    shards = {file: _file(inside(folder, file)) for file in files}
    missing = [name for name, file in weight_map.items() if name not in shards[file].tensors]
    if missing:
        raise NeutralizeError(
            f"checkpoint: expected {missing[0][:200]!r} in {weight_map[missing[0]]!r}, as {index!r} says, got a file "
            f"without it{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}; fetch it again"
        )
    return join(folder, list(shards.values()))


def join(folder: Path, shards: list[Layout]) -> Layout:
    """Return several files of one folder as one layout.

    Raises:
        NeutralizeError: a tensor is in two of them.
    """
    tensors: dict[str, Stored] = {}
    marks: dict[str, tuple[int, bytes]] = {}
    for layout in shards:
        for name, stored in layout.tensors.items():
            if name in tensors:
                raise NeutralizeError(
                    f"checkpoint: expected each tensor once in {str(folder)!r}, got {name[:200]!r} in two of its "
                    "files; fetch it again"
                )
            tensors[name] = stored
        marks.update(layout.marks)
    files = tuple(file for layout in shards for file in layout.files)
    kind = f"{shards[0].kind}, {len(shards)} shards" if len(shards) > 1 else shards[0].kind
    checksums = tuple(
        sorted(
            (checksum for layout in shards for checksum in layout.checksums),
            key=lambda checksum: (checksum.covered.file, checksum.covered.offset),
        )
    )
    tied = {name: group for layout in shards for name, group in layout.tied.items()}
    return Layout(folder, files, tensors, marks, kind, tied=tied, checksums=checksums)


def inside(folder: Path, file: str, root: Path | None = None) -> Path:
    """Return the path of a file in a folder that an index names.

    The snapshots of a Hugging Face cache are links to the blobs beside them: those alone may lead out of the folder.

    Args:
        folder: where the file is.
        file: its name.
        root: the checkpoint's folder, if that is another one.

    Raises:
        NeutralizeError: it is no plain name, is not there, or a link leads out of the folder.
    """
    if not file or "\0" in file or Path(file).is_absolute() or Path(file).name != file or file in (".", ".."):
        raise NeutralizeError(
            f"checkpoint: expected names of files in {str(folder)!r} in its index, got {file[:200]!r}, which leads "
            "elsewhere; fetch the checkpoint again"
        )
    path = folder / file
    try:
        target, home = path.resolve(strict=True), (root or folder).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # nothing there, or links in a circle
        raise NeutralizeError(
            f"checkpoint: expected {file[:200]!r} in {str(folder)!r}, as its index says, got nothing; fetch it again"
        ) from error
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not target.is_relative_to(home) and target.parent != blobs:
        raise NeutralizeError(
            f"checkpoint: expected {file[:200]!r} to be a file of {str(folder)!r}, got a link that leads elsewhere; "
            "copy the file there"
        )
    if not target.is_file():
        raise NeutralizeError(
            f"checkpoint: expected {file[:200]!r} to be a file of {str(folder)!r}, got no file; remove it"
        )
    return path


def _with_config(layout: Layout, folder: Path) -> Layout:
    return replace(layout, config=folder) if (folder / "config.json").is_file() else layout


def _checked(layout: Layout) -> Layout:
    """The layout, if its names are text that can be printed and compared.

    Raises:
        NeutralizeError: one is not.
    """
    for name in layout.tensors:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise NeutralizeError(
                f"checkpoint: expected names that are Unicode text in {str(layout.root)!r}, got {name[:80]!a}; fetch "
                "the checkpoint again"
            ) from error
    return layout


def _with_quantized(layout: Layout) -> Layout:
    """The layout with the weights that several of its tensors store together."""
    from neutralize.checkpoint.quantized import attach

    if not layout.kind.startswith("safetensors"):
        return layout
    config = None if layout.config is None else read_json(layout.config / "config.json", "a config")
    with Files(layout.root) as files:
        return replace(layout, tensors=attach(layout.tensors, config, files))
