"""Edits in place: what is written, what is put back, and what is left of an edit that was cut off at any moment."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from checkpoints import digests, save
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from neutralize import ops
from neutralize.checkpoint import Checkpoint, region
from neutralize.checkpoint.journal import Journal
from neutralize.checkpoint.setters import parse_setters
from neutralize.cli import app
from neutralize.errors import NeutralizeError

SETTERS = ("a.weight=0", "b.weight[3:50,10:200]*=0.5", "conv.weight=identity", "*.bias=0.25")


def edit(folder: Path, *setters: str) -> Checkpoint:
    checkpoint = Checkpoint(folder)
    checkpoint.apply(parse_setters(setters or SETTERS, checkpoint.layout), digest="d", about="test")
    return checkpoint


def all_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


def expected(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What SETTERS make of the tensors, by the ops on live ones."""
    made = {name: tensor.clone() for name, tensor in held.items()}
    ops.rewrite_(made["a.weight"])
    ops.rewrite_(made["b.weight"][3:50, 10:200], scale=0.5)
    torch.nn.init.dirac_(made["conv.weight"])
    ops.rewrite_([made["a.bias"], made["b.bias"]], fill=0.25)
    return made


@pytest.mark.parametrize("shards", [1, 3])
def test_an_edit_writes_what_the_ops_write_and_restore_returns_every_byte(tmp_path: Path, shards: int) -> None:
    held = save(tmp_path, shards=shards)
    before = digests(tmp_path)
    checkpoint = edit(tmp_path)
    assert same(all_of(tmp_path), expected(held))
    assert checkpoint.status.state == "edited"
    checkpoint.restore()
    assert digests(tmp_path) == before  # the journal is gone too
    assert checkpoint.status.state == "intact"


def test_edits_stack_and_unwind_in_order(tmp_path: Path) -> None:
    save(tmp_path)
    states = [digests(tmp_path)]
    for setter in ("a.weight=0", "a.weight*=0.5", "b.bias=1", "a.weight+=2"):
        checkpoint = edit(tmp_path, setter)
        states.append({name: digest for name, digest in digests(tmp_path).items() if not name.startswith(".neut")})
    assert [entry.number for entry in checkpoint.status.edits] == [1, 2, 3, 4]
    for state in reversed(states[1:-1]):
        checkpoint.restore()
        assert {name: digest for name, digest in digests(tmp_path).items() if not name.startswith(".neut")} == state
    checkpoint.restore()
    assert digests(tmp_path) == states[0]
    with pytest.raises(NeutralizeError, match=r"restore: expected an edit .* that can be undone, got none"):
        checkpoint.restore()


def test_everything_is_undone_on_request(tmp_path: Path) -> None:
    save(tmp_path, shards=2)
    before = digests(tmp_path)
    for setter in ("a.weight=0", "b.weight*=0.5"):
        checkpoint = edit(tmp_path, setter)
    assert len(checkpoint.restore(everything=True)) == 2
    assert digests(tmp_path) == before


def test_only_the_bytes_that_change_are_written(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    before = path.read_bytes()
    checkpoint = edit(tmp_path, "b.weight[3:50,10:200]=0")
    (entry,) = checkpoint.status.edits
    assert entry.nbytes == 47 * 190 * 2
    after = path.read_bytes()
    begin = checkpoint.layout.tensors["b.weight"].regions[0].offset
    changed = [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    wide = range(begin, begin + 64 * 600)
    inside = {place for place in wide if 3 <= (place - begin) // 600 < 50 and 20 <= (place - begin) % 600 < 400}
    assert changed
    assert set(changed) <= inside


def test_a_file_that_something_else_changed_is_not_overwritten(tmp_path: Path) -> None:
    save(tmp_path)
    checkpoint = edit(tmp_path, "a.weight=0")
    path = tmp_path / "model.safetensors"
    offset = checkpoint.layout.tensors["a.weight"].regions[0].offset
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"x")
    with pytest.raises(NeutralizeError, match="something else has written there; --force"):
        checkpoint.restore()
    checkpoint.restore(force=True)
    assert torch.equal(load_file(path)["a.weight"], save(tmp_path / "again")["a.weight"])


def poke(folder: Path, tensor: str) -> None:
    """Another program writes a byte into a tensor."""
    region = Checkpoint(folder).layout.tensors[tensor].regions[0]
    with (folder / region.file).open("r+b") as file:
        file.seek(region.offset + 1)
        file.write(b"x")


def test_status_reads_what_edits_wrote_and_sees_what_something_else_did(tmp_path: Path) -> None:
    save(tmp_path, shards=3)
    assert Checkpoint(tmp_path).check().state == "intact"
    edit(tmp_path, "a.weight*=0.5", "b.bias=0")
    edit(tmp_path, "a.weight[0:4]=0")  # over some of the same bytes
    edit(tmp_path, "norm.weight=1")
    told: list[float] = []
    found = Checkpoint(tmp_path).check(told.append)
    assert (found.state, found.undone, found.changed) == ("edited", (), ())
    assert sum(told) <= sum(edition.nbytes for edition in found.edits)
    poke(tmp_path, "a.bias")
    assert Checkpoint(tmp_path).check().state == "edited"  # where no edit has written
    poke(tmp_path, "b.bias")
    found = Checkpoint(tmp_path).check()
    assert (found.state, found.undone, found.changed) == ("changed", (), (1,))
    assert Checkpoint(tmp_path).status.state == "edited"  # what the journal alone says

    def status(*options: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["status", str(tmp_path), *options])
        return result.exit_code, result.output

    code, told_user = status()
    assert code == 1
    assert "changed" in told_user
    assert told_user.count("CHANGED: something else has written there since") == 1
    assert '"changed": [1]' in status("--json")[1].replace("\n", "")
    assert status("--quick")[0] == 0


@pytest.mark.parametrize("stacked", [False, True])
def test_of_a_file_that_was_fetched_again_the_edit_is_forgotten(tmp_path: Path, stacked: bool) -> None:
    save(tmp_path)
    path, before = tmp_path / "model.safetensors", digests(tmp_path)
    original = path.read_bytes()
    edit(tmp_path)
    fetched = tmp_path / "fetched"
    fetched.write_bytes(original)
    fetched.rename(path)
    found = Checkpoint(tmp_path).check()
    assert (found.state, found.undone) == ("changed", (1,))
    assert "NOT THERE" in CliRunner().invoke(app, ["status", str(tmp_path)]).output
    if stacked:
        edit(tmp_path, "b.weight=0")
        Checkpoint(tmp_path).restore()
    Checkpoint(tmp_path).restore()  # without force: nothing of anybody's is lost
    assert digests(tmp_path) == before


def test_in_a_file_that_was_replaced_by_another_nothing_is_put_back(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    edit(tmp_path, "a.weight=0")
    other = save(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / "model.safetensors", path)
    assert Checkpoint(tmp_path).check().changed == (1,)
    with pytest.raises(NeutralizeError, match="something else has written there; --force"):
        Checkpoint(tmp_path).restore()
    edit(tmp_path, "b.weight=0")  # what is there now is edited, and put back
    Checkpoint(tmp_path).restore()
    assert same(load_file(path), other)
    Checkpoint(tmp_path).restore(force=True)  # only the bytes of the edit, as asked for
    assert same(load_file(path), other | {"a.weight": save(tmp_path / "again")["a.weight"]})


@pytest.mark.parametrize("becomes", ["another header", "nothing", "a part"])
def test_old_bytes_are_forced_into_no_file_that_they_do_not_fit(tmp_path: Path, becomes: str) -> None:
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    checkpoint = edit(tmp_path, "a.weight=0")
    if becomes == "another header":
        save_file({"other": torch.ones(200_000)}, path)
    elif becomes == "nothing":
        path.unlink()
    else:
        os.truncate(path, checkpoint.layout.tensors["a.weight"].regions[0].offset + 100)
    content = path.read_bytes() if path.exists() else b""
    assert checkpoint.check().changed == (1,)
    with pytest.raises(NeutralizeError, match=r"^restore: expected"):
        checkpoint.restore(force=True)
    if becomes != "another header":
        with pytest.raises(
            NeutralizeError, match=r"got no such file or a shorter one; put it back, or remove '.*undo'"
        ):
            checkpoint.restore()
    assert (path.read_bytes() if path.exists() else b"") == content
    if becomes == "another header":
        with pytest.raises(NeutralizeError, match=r"whose tensors lie elsewhere; remove '.*000001.undo' to forget"):
            checkpoint.restore(force=True)


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(folder: Path, match: str) -> None:
    before = digests(folder)
    with pytest.raises(NeutralizeError, match=match):
        edit(folder)
    assert digests(folder) == before


def test_links_and_shared_and_read_only_files_are_refused(tmp_path: Path) -> None:
    for kind in ("symlink", "hardlink", "readonly"):
        folder = tmp_path / kind
        save(folder)
        path = folder / "model.safetensors"
        if kind == "symlink":
            path.rename(folder / "blob")
            path.symlink_to("blob")
            refused(folder, r"expected a file of its own .* got a link to .* use --output")
        elif kind == "hardlink":
            os.link(path, folder / "other")
            refused(folder, "got one with 2 hard links, which would all change; use --output")
        else:
            path.chmod(0o444)
            refused(folder, "got a read-only one; use --output, or chmod")


def test_a_checkpoint_that_is_being_edited_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    with checkpoint.journal.locked():
        assert Checkpoint(tmp_path).status.state == "busy"
        with pytest.raises(NeutralizeError, match=f"is being edited by process {os.getpid()}; wait"):
            edit(tmp_path)
    edit(tmp_path)


def test_an_edit_that_does_not_fit_writes_nothing_and_all_problems_are_listed(tmp_path: Path) -> None:
    save(tmp_path)
    before = digests(tmp_path)
    with pytest.raises(NeutralizeError, match=r"(?s)got int64; only floating-point .*within 65504 for 'conv.weight'"):
        edit(tmp_path, "a.weight=0", "steps=0", "conv.weight=1e6")
    assert digests(tmp_path) == before


def test_an_edit_of_no_byte_is_refused(tmp_path: Path) -> None:
    save_file({"empty": torch.ones(0, 4), "full": torch.ones(2)}, tmp_path / "model.safetensors")
    before = digests(tmp_path)
    with pytest.raises(NeutralizeError, match=r"expected an edit of a byte or more .* without elements"):
        edit(tmp_path, "empty=0")
    assert digests(tmp_path) == before
    edit(tmp_path, "*=0")
    Checkpoint(tmp_path).restore()
    assert digests(tmp_path) == before


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(NeutralizeError, match=r"expected a file system with locks .* got No locks available; mount it"):
        edit(tmp_path)


def test_what_a_killed_run_left_is_named_and_removed(tmp_path: Path) -> None:
    save(tmp_path)
    before = digests(tmp_path)
    journal = tmp_path / ".neutralize"
    journal.mkdir()
    (journal / "000001.part").write_bytes(b"half an undo")
    status = Checkpoint(tmp_path).status
    assert (status.state, status.leftovers) == ("intact", (journal,))
    assert Checkpoint(tmp_path).restore() == []
    assert digests(tmp_path) == before
    edit(tmp_path)
    (journal / "000002.part").write_bytes(b"half an undo")
    status = Checkpoint(tmp_path).status
    assert (status.state, status.leftovers) == ("edited", (journal / "000002.part",))
    Checkpoint(tmp_path).restore()
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"width": 1 << 40},
        {"stride": 0},
        {"rows": 1 << 62},
        {"file": "../outside"},
        {"file": ["model.safetensors"]},
        {"offset": -1},
        {"held": "zz"},
        {"held": "00"},
        {"mark": 3},
    ],
)
def test_an_undo_that_lies_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    """Anybody may put one into a checkpoint that others fetch, its digests in order."""
    save(tmp_path)
    edit(tmp_path, "a.weight[:,:4]=0")
    path = tmp_path / ".neutralize" / "000001.undo"
    data = path.read_bytes()
    length = int.from_bytes(data[-8:], "little")
    content = json.loads(data[-40 - length : -40])
    fields = ("file", "offset", "rows", "width", "stride", "digest", "place")
    content["kept"][0] = [change.get(key, value) for key, value in zip(fields, content["kept"][0], strict=True)]
    fields = ("file", "offset", "held", "mark")
    content["marks"][0] = [change.get(key, value) for key, value in zip(fields, content["marks"][0], strict=True)]
    footer = json.dumps(content).encode()
    path.write_bytes(
        data[: -40 - length] + footer + hashlib.sha256(footer).digest() + len(footer).to_bytes(8, "little")
    )
    before = digests(tmp_path)
    for call in (lambda: Checkpoint(tmp_path).status, Checkpoint(tmp_path).restore):
        with pytest.raises(NeutralizeError, match=r"expected the undo of an edit in .* got a damaged file"):
            call()
    assert digests(tmp_path) == before


# ---- the disk fails --------------------------------------------------------------------------------------------------


class Failing:
    """Lets a system call fail after some calls: once, or from then on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, after: int, code: int, *, once: bool) -> None:
        self.real, self.left, self.code, self.once = getattr(os, name), after, code, once
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args: object) -> object:
        self.left -= 1
        if self.left == -1 or (self.left < 0 and not self.once):
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*args)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(("name", "calls"), [("pwritev", 9), ("fsync", 8), ("preadv", 14)])
def test_a_disk_that_fails_once_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int, code: int
) -> None:
    failures = 0
    for after in range(calls):
        folder = tmp_path / str(after)
        save(folder, shards=2)
        before = digests(folder)
        with monkeypatch.context() as patched:
            Failing(patched, name, after, code, once=True)
            try:
                edit(folder)
            except NeutralizeError as error:
                failures += 1
                assert os.strerror(code) in str(error)  # noqa: PT017
                assert digests(folder) == before
                continue
        Checkpoint(folder).restore()
        assert digests(folder) == before
    assert failures >= calls - 2


@pytest.mark.parametrize("name", ["pwritev", "fsync"])
def test_a_disk_that_goes_on_failing_leaves_what_restore_mends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    states = set()
    for after in range(10):
        folder = tmp_path / str(after)
        save(folder, shards=2)
        before = digests(folder)
        with monkeypatch.context() as patched:
            Failing(patched, name, after, errno.EIO, once=False)
            try:
                edit(folder)
            except NeutralizeError as error:
                assert os.strerror(errno.EIO) in str(error)  # noqa: PT017
        state = Checkpoint(folder).status.state
        states.add(state)
        if state != "intact":
            Checkpoint(folder).restore()
        assert digests(folder) == before
    assert "interrupted" in states


def test_a_disk_without_a_free_byte_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal(tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with journal.locked():
        assert journal.is_locked()
    assert not journal.is_locked()


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    before = digests(tmp_path)
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(NeutralizeError, match=r"free bytes beside .* got 1000; make room, or use --output"):
        edit(tmp_path)
    assert digests(tmp_path) == before


def test_a_half_written_file_is_taken_for_a_whole_one_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    before = digests(tmp_path)
    with monkeypatch.context() as patched:
        Failing(patched, "pwritev", 2, errno.EIO, once=False)
        with pytest.raises(NeutralizeError, match="run neutralize restore when the disk works again"):
            edit(tmp_path)
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "model.safetensors")
    with pytest.raises(NeutralizeError, match=r"an edit was cut off; run: neutralize restore"):
        _ = Checkpoint(tmp_path).layout
    assert [edition.number for edition in Checkpoint(tmp_path).recover()] == [1]
    assert digests(tmp_path) == before


# ---- killed ----------------------------------------------------------------------------------------------------------


def forked(folder: Path, started: Event) -> None:
    region.BUFFER_BYTES = 4096
    started.set()
    while True:
        checkpoint = Checkpoint(folder)
        undo = checkpoint.apply(
            parse_setters(["a.weight=0.5", "b.weight*=0.5", "*.bias=1"], checkpoint.layout), digest="d"
        )
        undo.restore()


def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path) -> None:
    """NEUTRALIZE_KILLS=200 makes it two hundred."""
    save(tmp_path, shards=2)
    before = digests(tmp_path)
    chance = random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["neutralize.checkpoint.handle", "neutralize.checkpoint.setters", "safetensors.torch"]
    )
    states: list[str] = []
    longest, kills = 0.2, int(os.environ.get("NEUTRALIZE_KILLS", "10"))
    while len(states) < kills or (len(set(states)) == 1 and longest < 30):
        if len(states) >= kills:  # all at one point: the machine is busier than that
            longest *= 2
        started = context.Event()
        child = context.Process(target=forked, args=(tmp_path, started))
        child.start()
        assert started.wait(300)
        time.sleep(chance.uniform(0.01, longest))
        child.kill()
        child.join()
        checkpoint = Checkpoint(tmp_path)
        states.append(checkpoint.status.state)
        if states[-1] != "intact":
            checkpoint.restore()
        assert {name: digest for name, digest in digests(tmp_path).items() if not name.startswith(".neutr")} == before
    assert len(set(states)) > 1, states
