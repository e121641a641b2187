"""Edited copies: whole or not there, everything else as it was."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from checkpoints import digests, header_of, save
from safetensors.torch import load_file

from neutralize.checkpoint import Checkpoint
from neutralize.checkpoint import output as output_module
from neutralize.checkpoint.output import write_to
from neutralize.checkpoint.setters import parse_setters
from neutralize.errors import NeutralizeError


def edits(checkpoint: Checkpoint, setter: str = "a.weight=0") -> list:
    return parse_setters([setter], checkpoint.layout)


def folder_with_more(place: Path) -> Path:
    """Shards, and what else lies in such folders."""
    save(place, shards=3)
    (place / "config.json").write_text("{}")
    (place / "tokenizer").mkdir()
    (place / "tokenizer" / "vocab.txt").write_text("a b c")
    return place


@pytest.mark.parametrize("link", [False, True])
def test_the_copy_differs_in_the_edited_tensor_alone(tmp_path: Path, link: bool) -> None:
    source = folder_with_more(tmp_path / "in")
    before = digests(source)
    written = Checkpoint(source).write(edits(Checkpoint(source)), tmp_path / "out", link=link, verify=True)
    assert written.verified == 7
    assert digests(source) == before
    after = digests(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    assert after.keys() == before.keys()
    assert changed == {"model-00001-of-00003.safetensors"}
    (name,) = changed
    assert header_of(source / name) == header_of(tmp_path / "out" / name)
    assert not load_file(tmp_path / "out" / name)["a.weight"].any()
    shared = {entry for entry in before if (source / entry).stat().st_ino == (tmp_path / "out" / entry).stat().st_ino}
    assert shared == (set(before) - changed if link else set())
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_single_file_is_copied_to_a_single_file(tmp_path: Path) -> None:
    save(tmp_path)
    checkpoint = Checkpoint(tmp_path / "model.safetensors")
    checkpoint.write(edits(checkpoint), tmp_path / "new.safetensors")
    assert not load_file(tmp_path / "new.safetensors")["a.weight"].any()
    assert load_file(tmp_path / "model.safetensors")["a.weight"].any()


def test_a_hub_snapshot_becomes_files_of_its_own(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    save(snapshot)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(tmp_path / "models--a--b" / "blobs" / "abcd")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcd")
    (tmp_path / "models--a--b" / "blobs" / "abcd").chmod(0o444)
    (snapshot / "sub").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "ef").write_text("more")
    (snapshot / "sub" / "more.txt").symlink_to("../../../blobs/ef")
    checkpoint = Checkpoint(snapshot)
    with pytest.raises(NeutralizeError, match="got a link to"):
        checkpoint.apply(edits(checkpoint), digest="d")
    checkpoint.write(edits(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert (tmp_path / "out" / "sub" / "more.txt").read_text() == "more"
    assert not load_file(tmp_path / "out" / "model.safetensors")["a.weight"].any()


def test_what_is_in_the_way_is_refused(tmp_path: Path) -> None:
    source = folder_with_more(tmp_path / "in")
    checkpoint = Checkpoint(source)
    (tmp_path / "there").mkdir()
    for output, match in (
        (tmp_path / "there", "expected nothing at"),
        (source / "out", "expected an output outside of"),
        (tmp_path / "no" / "out", "expected a folder to write"),
    ):
        with pytest.raises(NeutralizeError, match=match):
            checkpoint.write(edits(checkpoint), output)
    (source / "secret").symlink_to("/etc/hostname")
    with pytest.raises(NeutralizeError, match="a link that leads elsewhere"):
        checkpoint.write(edits(checkpoint), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "there"]


def test_an_output_of_another_kind_or_on_another_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_with_more(tmp_path / "in")
    checkpoint = Checkpoint(source / "model-00001-of-00003.safetensors")
    with pytest.raises(NeutralizeError, match=r"expected an output that ends in .safetensors, .* got 'out.bin'"):
        checkpoint.write(edits(checkpoint), tmp_path / "out.bin")

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(NeutralizeError, match="got Invalid cross-device link; leave --link out"):
        Checkpoint(source).write(edits(Checkpoint(source)), tmp_path / "out", link=True)
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_a_disk_that_fails_leaves_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_with_more(tmp_path / "in")
    before = digests(source)

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("pwritev", "fsync", "copy_file_range"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, fail)
            patched.setattr(output_module, "_cloned", lambda old, new: False)
            with pytest.raises(NeutralizeError, match="No space left on device"):
                Checkpoint(source).write(edits(Checkpoint(source)), tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["in"]
    assert digests(source) == before


def test_a_copy_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_with_more(tmp_path / "in")
    real = output_module._copy

    def damaged(old: Path, new: Path, advance: object) -> int:
        size = real(old, new, advance)
        if new.name.endswith("3.safetensors"):
            with new.open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"\x55")
        return size

    monkeypatch.setattr(output_module, "_copy", damaged)
    with pytest.raises(NeutralizeError, match="to be copied as it is, got other bytes"):
        Checkpoint(source).write(edits(Checkpoint(source)), tmp_path / "out", verify=True)
    assert sorted(os.listdir(tmp_path)) == ["in"]


def _write_slowly(source: Path, output: Path) -> None:
    checkpoint = Checkpoint(source)
    patches = checkpoint.patches(edits(checkpoint))
    write_to(source, checkpoint.layout, patches, output, advance=lambda count: time.sleep(0.2))


def test_a_killed_run_leaves_no_output_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    source = folder_with_more(tmp_path / "in")
    child = multiprocessing.get_context("forkserver").Process(target=_write_slowly, args=(source, tmp_path / "out"))
    child.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.partial" / "new").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(NeutralizeError, match="another run is writing"):
        Checkpoint(source).write(edits(Checkpoint(source)), tmp_path / "out")
    child.kill()
    child.join()
    assert not (tmp_path / "out").exists()
    with pytest.raises(NeutralizeError, match=r"got a copy that is not finished .* neutralize restore removes it"):
        Checkpoint(tmp_path / "out")
    shutil.copytree(tmp_path / ".out.partial", tmp_path / ".other.partial")
    assert output_module.discard(tmp_path / "other") == [str(tmp_path / ".other.partial")]
    Checkpoint(source).write(edits(Checkpoint(source)), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_the_bytes_of_a_copy_are_those_of_an_edit_in_place(tmp_path: Path) -> None:
    source = folder_with_more(tmp_path / "in")
    Checkpoint(source).write(edits(Checkpoint(source), "?.weight*=0.5"), tmp_path / "out")
    Checkpoint(source).apply(edits(Checkpoint(source), "?.weight*=0.5"), digest="d")
    here = {name: digest for name, digest in digests(source).items() if not name.startswith(".neutralize")}
    assert here == digests(tmp_path / "out")
    assert isinstance(load_file(source / "model-00001-of-00003.safetensors")["a.weight"], torch.Tensor)
