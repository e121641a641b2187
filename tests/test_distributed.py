"""Folders of torch.distributed.checkpoint: sharded in any way, edits are those of the live model bit for bit."""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from edits import Every, every_edit, made_live, make_on_files, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex

from neutralize.checkpoint import unpickle
from neutralize.checkpoint.distributed import read_distributed
from neutralize.checkpoint.layout import Elements, Layout, Piece
from neutralize.checkpoint.pickled import MARK, Listed
from neutralize.checkpoint.region import Files, Region
from neutralize.errors import NeutralizeError
from neutralize.plan import Rewrite

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(state: dict, folder: Path, **options) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, **options), no_dist=True)


def load(folder: Path, like: dict) -> dict:
    state = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def streams_are_whole(layout: Layout) -> bool:
    """Whether Python's zipfile finds every checksum right in every archive of the folder."""
    for info in pickle.loads((layout.root / ".metadata").read_bytes()).storage_data.values():
        with (layout.root / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            stream = io.BytesIO(file.read(info.length))
        if zipfile.is_zipfile(stream) and zipfile.ZipFile(stream).testzip() is not None:
            return False
    return True


@pytest.mark.parametrize("options", [{}, {"single_file_per_rank": False}, {"thread_count": 2}], ids=str)
def test_a_folder_of_one_process(tmp_path, options):
    model = Every()
    save({"model": model.state_dict(), "epoch": 3, "lr": {"now": 0.5}}, tmp_path / "dcp", **options)
    layout = read_distributed(tmp_path / "dcp")
    assert set(layout.tensors) == {f"model.{name}" for name in model.state_dict()}
    metadata = (tmp_path / "dcp" / ".metadata").read_bytes()
    names = ("parameter", "bias", "source")
    edits = tuple(
        replace(edit, **{name: f"model.{getattr(edit, name)}" for name in names if hasattr(edit, name)})
        for edit in every_edit(model)
    )
    make_on_files(layout, edits)
    state = {"model": {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}, "epoch": 0}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert same_bits(state["model"], made_live(model, every_edit(model)))
    assert state["epoch"] == 3
    assert streams_are_whole(layout)
    assert (tmp_path / "dcp" / ".metadata").read_bytes() == metadata


def test_a_folder_of_two_processes_with_tensors_sharded_by_rows_and_by_columns(tmp_path):
    script = Path(__file__).with_name("save_sharded.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, tmp_path, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0, output.decode()
    model = Every()
    expected = made_live(model, every_edit(model))
    for name in ("rows", "columns"):
        folder = tmp_path / name
        layout = read_distributed(folder)
        shards = {name: len(stored.regions) for name, stored in layout.tensors.items()}
        assert shards["first.weight"] == 2
        assert shards["steps"] == 1  # replicated: saved once
        assert shards["first.bias"] == (2 if name == "rows" else 1)
        assert same_bits(load(folder, model.state_dict()), model.state_dict())
        make_on_files(layout, every_edit(model))
        assert same_bits(load(folder, model.state_dict()), expected)
        assert streams_are_whole(layout)


# ---- any grid of shards --------------------------------------------------------------------------------------------


def cut(name: str, tensor: torch.Tensor, cuts: list[list[int]], folder: Path) -> Elements:
    """Write a tensor in boxes, each into a file of its own, between other bytes."""
    pieces = []
    bounds = [list(itertools.pairwise([0, *own, size])) for own, size in zip(cuts, tensor.shape, strict=True)]
    for number, box in enumerate(itertools.product(*bounds)):
        part = tensor[tuple(slice(*bound) for bound in box)].contiguous()
        file = f"{name}.{number}"
        data = part.view(-1).view(torch.uint8).numpy().tobytes()
        (folder / file).write_bytes(b"before!!" + data + b"after")
        origin = tuple(first for first, _ in box)
        pieces.append(Piece(Region.run(file, 8, len(data)), tuple(part.shape), origin))
    return Elements(name, tensor.dtype, tuple(tensor.shape), tuple(pieces))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_grid_of_shards_gives_the_same_bits(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("grid")
    model = Every()
    tensors = {}
    for name, tensor in model.state_dict().items():
        # Blocks of columns count in the matrix view, so taps stay together; all else may be cut anywhere.
        cuts = [
            sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=3))) if size > 1 and dim < 2 else []
            for dim, size in enumerate(tensor.shape)
        ]
        tensors[name] = cut(name, tensor, cuts, folder)
    layout = Layout(folder, (), tensors)
    make_on_files(layout, every_edit(model))
    with Files(folder) as files:
        got = {name: stored.read(files) for name, stored in tensors.items()}
    assert same_bits(got, made_live(model, every_edit(model)))
    for path in folder.iterdir():
        content = path.read_bytes()
        assert content.startswith(b"before!!")
        assert content.endswith(b"after")


@pytest.mark.parametrize("buffer", [1, 64, 1 << 12])
def test_a_small_buffer_gives_the_same_bits(tmp_path, monkeypatch, buffer):
    for module in ("patch", "region"):
        monkeypatch.setattr(f"neutralize.checkpoint.{module}.BUFFER_BYTES", max(buffer, 16))
    model = Every()
    shards = {
        name: [[1], [2]][: tensor.dim()] + [[]] * (tensor.dim() - 2) for name, tensor in model.state_dict().items()
    }
    tensors = {name: cut(name, tensor, shards[name], tmp_path) for name, tensor in model.state_dict().items()}
    make_on_files(Layout(tmp_path, (), tensors), every_edit(model))
    with Files(tmp_path) as files:
        got = {name: stored.read(files) for name, stored in tensors.items()}
    assert same_bits(got, made_live(model, every_edit(model)))


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("neutralize.checkpoint.region._OPEN_LIMIT", 3)
    tensor = torch.randn(12, 2)
    layout = Layout(tmp_path, (), {"w": cut("w", tensor, [list(range(1, 12)), []], tmp_path)})
    now, most = set(), 0
    open_one, close_one = os.open, os.close

    def opening(*args):
        nonlocal most
        now.add(opened := open_one(*args))
        most = max(most, len(now))
        return opened

    def closing(descriptor):
        now.discard(descriptor)
        close_one(descriptor)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "close", closing)
    make_on_files(layout, (Rewrite("w", (12, 2), "float32", scale=0.5),))
    assert (most, now) == (3, set())
    with Files(tmp_path) as files:
        assert torch.equal(layout.elements("w", "").read(files), tensor * 0.5)


def test_shards_of_later_dimensions_are_refused_for_what_needs_a_matrix(tmp_path):
    tensor = torch.randn(2, 3, 4)
    layout = Layout(tmp_path, (), {"w": cut("w", tensor, [[], [], [2]], tmp_path)})
    with pytest.raises(
        NeutralizeError, match=r"expected 'w' in shards of its first two dimensions, got one of \[2, 3, 2\]"
    ):
        make_on_files(layout, (Rewrite("w", (2, 3, 4), "float32", scale=0.5),))


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("valid") / "dcp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4), "t": torch.randn(3, 2).t(), "n": 1}, folder)
    return folder


@pytest.fixture
def folder(valid, tmp_path) -> Path:
    return Path(shutil.copytree(valid, tmp_path / "dcp"))


def test_a_marked_folder_is_taken_by_no_reader(folder):
    layout = read_distributed(folder)
    assert layout.marks == {".metadata": (0, MARK)}
    with (folder / ".metadata").open("r+b") as file:
        file.write(MARK)
    with pytest.raises(dcp.CheckpointException, match="global metadata read failed: invalid load key"):
        load(folder, {"a": torch.ones(2, 3)})
    expected = (
        f"checkpoint: expected a finished checkpoint, got '{folder}', in which an edit was cut off; run: neutralize"
    )
    with pytest.raises(NeutralizeError, match=f"^{re.escape(expected)} restore$"):
        read_distributed(folder)


def test_a_transposed_shard_is_listed_and_refused(folder):
    layout = read_distributed(folder)
    assert isinstance(layout.tensors["t"], Listed)
    with pytest.raises(NeutralizeError, match="expected a contiguous tensor for 't', got float32 with strides"):
        make_on_files(layout, (Rewrite("t", (2, 3), "float32"),))


class _Payload:
    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def test_metadata_that_wants_more_is_refused_and_nothing_is_called(folder, tmp_path):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = _Payload(tmp_path / "made")
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(NeutralizeError, match=r"got a pickle that wants '\w+.mkdir'; "):
        read_distributed(folder)
    assert not (tmp_path / "made").exists()


def rewritten(change):
    """A folder whose metadata was changed by ``change(metadata)``."""

    def rewrite(folder: Path) -> None:
        path = folder / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))

    return rewrite


def info_of(metadata, name):
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def set_info(name, **values):
    return rewritten(lambda metadata: info_of(metadata, name).__dict__.update(values))


def set_chunk(**values):
    return rewritten(lambda metadata: metadata.state_dict_metadata["a"].chunks[0].__dict__.update(values))


def set_tensor(**values):
    return rewritten(lambda metadata: metadata.state_dict_metadata["a"].__dict__.update(values))


def same_stream(metadata):
    info_of(metadata, "b").__dict__.update(info_of(metadata, "a").__dict__)


def overlapping(metadata):
    one, other = sorted((info_of(metadata, name) for name in "ab"), key=lambda info: info.offset)
    other.offset = one.offset + 1


def twice(metadata):
    found = metadata.state_dict_metadata["a"].chunks
    found.append(found[0])


def of_another_shape(metadata):
    metadata.state_dict_metadata["a"].size = torch.Size([3, 2])
    metadata.state_dict_metadata["a"].chunks[0].sizes = torch.Size([3, 2])


def of_another_dtype(metadata):
    metadata.state_dict_metadata["a"].properties.dtype = torch.int32


def two_places(metadata):
    metadata.storage_data = [(index, info) for index, info in metadata.storage_data.items()] * 2


HOSTILE = {
    "no metadata": (lambda folder: (folder / ".metadata").unlink(), "expected a file .metadata"),
    "empty metadata": (lambda folder: (folder / ".metadata").write_bytes(b""), "expected a pickle for"),
    "metadata cut off": (
        lambda folder: (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-30]),
        "expected a pickle for",
    ),
    "a pickle of another thing": (
        lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({"a": 1})),
        "expected the metadata of torch.distributed.checkpoint",
    ),
    "no file": (lambda folder: (folder / "__0_0.distcp").unlink(), "as its index says, got nothing"),
    "a file cut off": (lambda folder: os.truncate(folder / "__0_0.distcp", 1000), "expected bytes of its own for"),
    "a file outside": (set_info("a", relative_path="../dcp/__0_0.distcp"), "leads elsewhere"),
    "an absolute path": (set_info("a", relative_path="/etc/passwd"), "leads elsewhere"),
    "a folder as a file": (set_info("a", relative_path=".."), "leads elsewhere"),
    "a path with a zero byte": (set_info("a", relative_path="a\0b"), "leads elsewhere"),
    "a path that is none": (set_info("a", relative_path=7), "names, files and sizes"),
    "an offset past the end": (set_info("a", offset=1 << 40), "expected bytes of its own for 'a'"),
    "a negative offset": (set_info("a", offset=-5), "names, files and sizes"),
    "an absurd offset": (set_info("a", offset=1 << 80), "names, files and sizes"),
    "an offset into the middle": (set_info("a", offset=3), "."),
    "an absurd length": (set_info("a", length=1 << 60), "expected bytes of its own for 'a'"),
    "no length": (set_info("a", length=0), "a zip archive as torch.save writes it"),
    "a transform": (set_info("a", transform_descriptors=["stream.zstd"]), "got compressed or otherwise transformed"),
    "one stream for two": (rewritten(same_stream), "expected bytes of its own for"),
    "streams that overlap": (rewritten(overlapping), "expected bytes of its own for"),
    "no place": (rewritten(lambda metadata: metadata.storage_data.clear()), r"expected a place of 'a' at \[0, 0\]"),
    "no tensors": (rewritten(lambda metadata: metadata.state_dict_metadata.clear()), "expected tensors"),
    "no tables": (rewritten(lambda metadata: setattr(metadata, "storage_data", None)), "expected a table storage_data"),
    "a chunk twice": (rewritten(twice), "expected shards that cover 'a' once"),
    "no chunk": (set_tensor(chunks=[]), "expected shards that cover 'a' once"),
    "chunks that are none": (set_tensor(chunks=[7]), "expected offsets and sizes"),
    "a hole": (set_chunk(sizes=torch.Size([1, 3])), "expected shards that cover 'a' once"),
    "a chunk elsewhere": (set_chunk(offsets=torch.Size([1, 0])), "expected shards that cover 'a' once"),
    "an absurd chunk": (set_chunk(sizes=torch.Size([1 << 60, 1 << 60])), "expected shards that cover 'a' once"),
    "a chunk of other dimensions": (set_chunk(sizes=torch.Size([6])), "expected offsets and sizes"),
    "an absurd size": (set_tensor(size=torch.Size([1 << 61] * 3)), "expected offsets and sizes"),
    "a size that is none": (set_tensor(size="ab"), "expected dtype, size and chunks"),
    "a chunk of nothing": (set_tensor(size=torch.Size([0, 3])), "expected shards that cover 'a' once"),
    "another shape": (rewritten(of_another_shape), r"expected a tensor of \[3, 2\]"),
    "another dtype": (rewritten(of_another_dtype), "expected int32 in"),
    "a list of places": (rewritten(two_places), "expected a table storage_data"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_folder_is_refused_with_one_message(folder, what):
    change, message = HOSTILE[what]
    change(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(NeutralizeError, match=r"^checkpoint: expected .*, got .*; .+") as error:
        read_distributed(folder)
    assert re.search(message, str(error.value))
    assert len(str(error.value)) < 1000
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_place_twice_is_refused(folder):
    """A pickle can hold a key twice, which no dict can."""

    def add(metadata):
        metadata.storage_data[MetadataIndex("z", (0, 0))] = info_of(metadata, "b")

    rewritten(add)(folder)
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"\x8c\x01z", b"\x8c\x01a"))
    with pytest.raises(NeutralizeError, match=r"expected one place of 'a' at \[0, 0\]"):
        read_distributed(folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    (folder / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NeutralizeError, match="leads elsewhere"):
        read_distributed(folder)


def test_metadata_too_large_is_refused(folder, monkeypatch):
    monkeypatch.setattr(unpickle, "SIZE_LIMIT", 100)
    with pytest.raises(NeutralizeError, match="expected a pickle of at most 100 bytes"):
        read_distributed(folder)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(max_size=5), st.booleans()), min_size=1, max_size=3))
def test_damaged_metadata_gives_a_layout_or_one_error(tmp_path_factory, valid, changes):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        shutil.copytree(valid, folder)
    data = bytearray((valid / ".metadata").read_bytes())
    for place, value, is_cut in changes:
        at = place % max(len(data), 1)
        data[at : at + (9 if is_cut else len(value))] = value
    (folder / ".metadata").write_bytes(data)
    size = (folder / "__0_0.distcp").stat().st_size
    try:
        layout = read_distributed(folder)
    except NeutralizeError:
        return
    for stored in layout.tensors.values():
        assert all(0 <= region.offset <= region.end <= size for region in stored.regions)
        assert math.prod(stored.shape) >= 0
