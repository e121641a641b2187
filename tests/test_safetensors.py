"""Where the tensors of safetensors files lie, and files that lie about it."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import hypothesis
import pytest
import torch
from checkpoints import digests, header_of, save
from hypothesis import strategies as st
from safetensors.torch import load_file

from neutralize.checkpoint.layout import Elements
from neutralize.checkpoint.locate import locate
from neutralize.checkpoint.region import Files
from neutralize.checkpoint.safetensors import read_safetensors
from neutralize.errors import NeutralizeError


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_found_where_the_safetensors_package_finds_it(tmp_path: Path, shards: int) -> None:
    held = save(tmp_path, shards=shards)
    found = {
        name: stored
        for path in tmp_path.glob("*.safetensors")
        for name, stored in read_safetensors(path).tensors.items()
    }
    assert found.keys() == held.keys() == locate(tmp_path).tensors.keys()
    with Files(tmp_path) as files:
        for name, tensor in held.items():
            stored = found[name]
            assert isinstance(stored, Elements)
            read = stored.read(files)
            assert read.dtype == tensor.dtype
            assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_the_order_is_that_of_the_file(tmp_path: Path) -> None:
    save(tmp_path)
    offsets = [stored.regions[0].offset for stored in locate(tmp_path).tensors.values()]
    assert offsets == sorted(offsets)


def file(header: object, data: int = 16, *, length: int | None = None) -> bytes:
    """A file with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no header": struct.pack("<Q", 0),
    "a header of 2^64-1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header longer than the file": file({"a": entry()}, length=10_000),
    "no JSON": file(b"{a"),
    "no Unicode": file(b'{"\xff": 1}'),
    "a list": file([]),
    "a number": file(b"1"),
    "deep": file(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "deep objects": file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "many objects": file(b'{"a":[' + b"{}," * 4_000_000 + b"{}]}"),
    "a key twice": file(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"),
    "a field twice": file(b'{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "an entry that is a list": file({"a": [1]}),
    "an entry without a shape": file({"a": {"dtype": "F32", "data_offsets": [0, 16]}}),
    "an unknown field": file({"a": entry() | {"more": 1}}),
    "an unknown dtype": file({"a": entry(dtype="F33")}),
    "a dtype that is a list": file({"a": entry(dtype=["F32"])}),
    "a wrong dtype": file({"a": entry(dtype="F64")}),
    "a wrong shape": file({"a": entry(shape=[5])}),
    "a negative size": file({"a": entry(shape=[-4])}),
    "two negative sizes": file({"a": entry(shape=[-2, -2])}),
    "a size that is true": file({"a": entry(shape=[True, 4])}),
    "a size of 4.0": file({"a": entry(shape=[4.0])}),
    "sizes whose product overflows": file({"a": entry(shape=[2**62, 2**62, 2**62])}),
    "huge sizes times zero": file({"a": entry(shape=[2**63, 0], offsets=[0, 0])}, data=0),
    "more sizes than there are": file({"a": entry(shape=[1] * 100_000 + [4])}),
    "offsets past the end": file({"a": entry(offsets=[0, 17])}),
    "offsets of 2^64": file({"a": entry(offsets=[0, 2**64])}),
    "offsets that go back": file({"a": entry(offsets=[16, 0])}),
    "negative offsets": file({"a": entry(offsets=[-16, 0])}),
    "one offset": file({"a": entry(offsets=[16])}),
    "tensors that overlap": file({"a": entry(), "b": entry(offsets=[8, 24])}, data=24),
    "the same bytes twice": file({"a": entry(), "b": entry()}),
    "a hole": file({"a": entry(offsets=[4, 20])}, data=20),
    "bytes left over": file({"a": entry()}, data=20),
    "truncated": file({"a": entry()}, data=15),
    "metadata that is no table": file({"__metadata__": [1], "a": entry()}),
    "metadata of numbers": file({"__metadata__": {"a": 1}, "a": entry()}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_lies_gets_one_clear_message(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[kind])
    before, started = digests(tmp_path), time.perf_counter()
    with pytest.raises(NeutralizeError, match=r"^checkpoint: expected .*, got .*; ") as caught:
        read_safetensors(path)
    assert time.perf_counter() - started < 5
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert digests(tmp_path) == before


@hypothesis.settings(
    deadline=None,
    max_examples=int(os.environ.get("NEUTRALIZE_FUZZ", "300")),
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(data=st.data())
def test_any_change_of_a_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """NEUTRALIZE_FUZZ=100000 makes it a long one. What is read must lie inside the file."""
    folder = tmp_path_factory.mktemp("fuzz")
    save(folder)
    path = folder / "model.safetensors"
    content, reach = bytearray(path.read_bytes()), len(header_of(path))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, reach - 1))
        change = data.draw(st.sampled_from(("replace", "remove", "insert", "cut")))
        if change == "cut":
            del content[place:]
        else:
            new = data.draw(st.binary(min_size=1, max_size=8)) if change != "remove" else b""
            content[place : place + (0 if change == "insert" else max(1, len(new)))] = new
    path.write_bytes(content)
    try:
        layout = read_safetensors(path)
    except NeutralizeError:
        return
    for stored in layout.tensors.values():
        for region in stored.regions:
            assert 0 <= region.offset <= region.end <= len(content)


# ---- folders ---------------------------------------------------------------------------------------------------------


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("file", "match"),
    [
        ("../outside.safetensors", "which leads elsewhere"),
        ("/etc/passwd.safetensors", "which leads elsewhere"),
        ("sub/../../outside.safetensors", "which leads elsewhere"),
        ("link.safetensors", "a link that leads elsewhere"),
        ("circle.safetensors", "got nothing"),
        ("missing.safetensors", "got nothing"),
        ("folder.safetensors", "to be a file of .*, got no file"),
        ("x\0.safetensors", "which leads elsewhere"),
        ("model.txt", "expected files that end in .safetensors"),
    ],
)
def test_an_index_may_not_lead_out_of_its_folder(tmp_path: Path, file: str, match: str) -> None:
    folder = tmp_path / "model"
    save(folder)
    save(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to("../outside.safetensors")
    (folder / "circle.safetensors").symlink_to("circle.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "model.safetensors").unlink()
    index(folder, {"a.weight": file})
    with pytest.raises(NeutralizeError, match=match):
        locate(folder)


def test_one_file_is_taken_before_an_index_of_shards_that_are_gone(tmp_path: Path) -> None:
    """As loaders do: a sharded model that is saved again in one file keeps its index."""
    save(tmp_path, shards=2)
    save(tmp_path)
    message = (
        "got 'model.safetensors' beside the shards of 'model.safetensors.index.json', of which loaders take either"
    )
    with pytest.raises(NeutralizeError, match=message):
        locate(tmp_path)
    for shard in tmp_path.glob("model-*"):
        shard.unlink()
    assert locate(tmp_path).files == ("model.safetensors",)


def test_the_snapshot_of_a_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    held = save(snapshot)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "abcd")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcd")
    assert locate(snapshot).tensors.keys() == held.keys()
    assert load_file(snapshot / "model.safetensors").keys() == held.keys()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[]", "a JSON object"),
        ("{", "JSON"),
        ('{"weight_map": 3}', "a weight_map"),
        ('{"weight_map": {"a": 3}}', "a weight_map"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "occurs twice"),
        ('{"weight_map": ' + "[" * 100_000, "nested too deeply|JSON"),
        ('{"weight_map": {"nowhere": "model.safetensors"}}', "got a file without it"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str, match: str) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(NeutralizeError, match=match):
        locate(tmp_path)


def test_an_index_that_names_another_shard_is_refused(tmp_path: Path) -> None:
    save(tmp_path, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"]["a.bias"] = content["weight_map"]["a.weight"]
    path.write_text(json.dumps(content))
    with pytest.raises(NeutralizeError, match=r"expected 'a.bias' in 'model-00001-.* got a file without it"):
        locate(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(NeutralizeError, match=r"got no file|to be a file"):
        locate(tmp_path)


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file(b'{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'))
    with pytest.raises(NeutralizeError, match="expected names that are Unicode text"):
        locate(path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NeutralizeError, match="got a folder without any"):
        locate(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(NeutralizeError, match=r"a file that ends in .safetensors, .gguf"):
        locate(tmp_path / "a.txt")
    with pytest.raises(NeutralizeError, match="got nothing at"):
        locate(tmp_path / "b.safetensors")
    save(tmp_path / "two")
    (tmp_path / "two" / "model.safetensors").rename(tmp_path / "two" / "x.safetensors")
    save(tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "two" / "y.safetensors")
    with pytest.raises(NeutralizeError, match=r"got x.safetensors, y.safetensors; name one"):
        locate(tmp_path / "two")
