"""The audit: a line for every plan that is applied or undone, and nothing written where a line cannot be."""

from __future__ import annotations

import copy
import getpass
import json
import logging
import os
import platform
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from importlib import metadata
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import digests
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import neutralize as nz
from neutralize import cli
from neutralize.audit import audited

LAYER = "1"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def model() -> nn.Module:
    return checkpoints.own_model()


@pytest.fixture
def plan(model: nn.Module) -> nz.Plan:
    return nz.plan(model, LAYER, "zero", example_inputs=torch.zeros(1, 8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoints.save(tmp_path / "folder", shards=2)
    return tmp_path / "folder"


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stderr


def test_a_line_says_who_when_what_where_and_how_it_ended(model, plan, tmp_path):
    path = tmp_path / "audit.jsonl"
    with nz.audit(path):
        undo = plan.apply(model)
    undo.restore()  # later, and recorded all the same
    undo.restore()  # nothing is done
    plan.apply(model).restore()  # not asked for
    applied, restored = lines(path)
    when = datetime.fromisoformat(applied.pop("time").replace("Z", "+00:00"))
    assert timedelta() <= datetime.now(timezone.utc) - when < timedelta(minutes=10)
    restored.pop("time")
    assert applied == {
        "format": 1,
        "user": getpass.getuser(),
        "host": platform.node(),
        "pid": os.getpid(),
        "command": Path(sys.argv[0]).name,
        "neutralize": metadata.version("neutralize"),
        "action": "apply",
        "target": "Sequential",
        "digest": plan.digest,
        "strategy": "zero",
        "layers": ["1"],
        "tensors": list(plan.parameters),
        "bytes": plan.written_bytes,
        "source": "",
        "processes": 1,
        "outcome": "done",
    }
    assert restored == applied | {"action": "restore"}


def test_an_undo_that_another_process_loads_knows_what_it_undoes(model, plan, tmp_path):
    path = tmp_path / "audit.jsonl"
    plan.apply(model).save(tmp_path / "undo.pt")
    with nz.audit(path):
        nz.Undo.load(tmp_path / "undo.pt", model).restore()
    (entry,) = lines(path)
    assert (entry["layers"], entry["strategy"], entry["tensors"]) == (["1"], "zero", list(plan.parameters))
    assert (entry["digest"], entry["bytes"]) == (plan.digest, plan.written_bytes)


def test_the_steps_of_a_ramp_and_what_a_guard_holds_are_recorded(model, tmp_path):
    path, x = tmp_path / "audit.jsonl", torch.zeros(1, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nz.audit(path):
        ramp = nz.ramp(model, LAYER, steps=2, example_inputs=x)
        assert lines(path) == []  # nothing is written yet
        for _ in range(3):
            ramp.step()  # the third changes no factor
        with nz.guard(model, ramp.plan, optimizer) as held:
            optimizer.step()
            optimizer.step()
        held.close()  # a second time
    ramp.restore()
    entries = lines(path)
    told = [(entry["action"], entry.get("factor"), entry.get("steps")) for entry in entries]
    assert told == [
        ("ramp", 0.5, None),
        ("ramp", 0.0, None),
        ("guard", None, None),
        ("release", None, 2),
        ("restore", None, None),
    ]
    about = {(entry["digest"], entry["bytes"], *entry["layers"], *entry["tensors"]) for entry in entries}
    assert about == {(ramp.plan.digest, ramp.plan.written_bytes, "1", *ramp.plan.parameters)}


def test_a_step_of_a_ramp_that_cannot_be_recorded_is_taken_back(model, tmp_path, full_disk):
    before = copy.deepcopy(model)
    with nz.audit(tmp_path / "audit.jsonl"):
        ramp = nz.ramp(model, LAYER, steps=4, example_inputs=torch.zeros(1, 8))
        with full_disk(), pytest.raises(nz.NeutralizeError, match="audit: expected a file that can be appended to"):
            ramp.step()
        assert (same(model, before), ramp.factor) == (True, 1.0)
        ramp.step()
    assert [entry["factor"] for entry in lines(tmp_path / "audit.jsonl")] == [0.75]


def test_a_line_that_nobody_has_ended_is_ended_first(model, plan, tmp_path):
    path = tmp_path / "audit.jsonl"
    path.write_text('{"earlier": "li')
    with nz.audit(path):
        plan.apply(model)
    earlier, applied = path.read_text().splitlines()
    assert (earlier, json.loads(applied)["action"]) == ('{"earlier": "li', "apply")


def test_two_files_get_a_line_each_and_one_named_twice_gets_one(model, plan, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    with nz.audit(one), nz.audit(other), nz.audit(one):
        undo = plan.apply(model)
        with nz.audit(one):
            undo.restore()
    assert [entry["action"] for entry in lines(one)] == ["apply", "restore"] == [e["action"] for e in lines(other)]
    assert audited() == ()


def test_other_threads_are_recorded(model, plan, tmp_path):
    path = tmp_path / "audit.jsonl"
    with nz.audit(path):
        thread = threading.Thread(target=lambda: plan.apply(model).restore())
        thread.start()
        thread.join()
    assert len(lines(path)) == 2


@pytest.mark.parametrize("kind", ["folder", "missing", "pipe", "device"])
def test_a_file_that_cannot_be_appended_to_is_told_at_once(model, plan, tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    path = {"missing": tmp_path / "no" / "audit", "pipe": tmp_path / "pipe", "device": Path("/dev/null")}
    with (
        pytest.raises(nz.NeutralizeError, match="audit: expected a file that can be appended to, got"),
        nz.audit(path.get(kind, tmp_path)),
    ):
        raise AssertionError("the block was begun")


def test_nothing_is_written_where_the_file_has_gone(model, plan, tmp_path):
    before, path = copy.deepcopy(model), tmp_path / "logs" / "audit.jsonl"
    path.parent.mkdir()
    with nz.audit(path):
        undo = plan.apply(model)
        off = copy.deepcopy(model)
        path.unlink()
        path.parent.rmdir()
        with pytest.raises(nz.NeutralizeError, match="audit: expected a file"):
            undo.restore()
        assert same(model, off)
        assert not undo.restored
        with pytest.raises(nz.NeutralizeError, match="audit: expected a file"):
            plan.apply(model)
        assert same(model, off)
    path.parent.mkdir()
    undo.restore()
    assert same(model, before)


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that has no room for a line of the audit, or only for its beginning."""

    @contextmanager
    def full(*, short=False):
        real = os.write

        def write(file, data):
            if data.startswith(b'{"format"'):
                if not short:
                    raise OSError(28, "No space left on device")
                data = data[:10]
            return real(file, data)

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", write)
            yield

    return full


@pytest.mark.parametrize("short", [True, False])
def test_what_cannot_be_recorded_is_put_back(model, plan, folder, tmp_path, full_disk, short):
    before, bytes_, path = copy.deepcopy(model), digests(folder), tmp_path / "audit.jsonl"
    path.write_text('{"earlier": "line"}\n')
    with full_disk(short=short):
        check_put_back(model, plan, folder, path)
    assert same(model, before)
    assert {name: digest for name, digest in digests(folder).items() if ".neutralize" not in name} == bytes_
    assert path.read_text() == '{"earlier": "line"}\n'  # no half line
    assert sorted(each.name for each in tmp_path.iterdir()) == ["audit.jsonl", "folder"]  # no copy


def check_put_back(model, plan, folder, path):
    with nz.audit(path), pytest.raises(nz.NeutralizeError, match="audit: expected a file that can be appended to"):
        plan.apply(model)
    for target in (["--in-place"], ["--output", folder.parent / "copy"]):
        assert run("apply", folder, "--set", "a.bias=0", *target, "--audit", path, status=2).count("\n") == 1


def test_an_application_that_fails_is_recorded_as_failed(model, plan, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the kernel failed")

    before = copy.deepcopy(model)
    monkeypatch.setattr(nz.ops, "rewrite_", broken)
    with nz.audit(tmp_path / "audit.jsonl"), pytest.raises(RuntimeError):
        plan.apply(model)
    (entry,) = lines(tmp_path / "audit.jsonl")
    assert (entry["outcome"], entry["error"]) == ("failed", "RuntimeError: the kernel failed")
    assert same(model, before)


def test_lines_of_several_processes_do_not_mix(tmp_path):
    path = tmp_path / "audit.jsonl"
    program = """
import sys
from pathlib import Path
from neutralize.audit import Deed, audit, recorded
with audit(sys.argv[1]):
    for number in range(8):
        with recorded(Deed("apply", sys.argv[2], "", tensors=("x" * 20000,))):
            pass
"""
    crew = [subprocess.Popen([sys.executable, "-c", program, str(path), str(number)]) for number in range(2)]
    assert [process.wait() for process in crew] == [0, 0]
    found = lines(path)
    assert sorted(entry["target"] for entry in found) == ["0"] * 8 + ["1"] * 8


def test_the_commands_append_to_the_file(folder, tmp_path):
    path, bytes_ = tmp_path / "audit.jsonl", digests(folder)
    run("apply", folder, "--set", "a.bias=0", "--set", "norm.*=1", "--in-place", "--audit", path)
    run("apply", folder, "--set", "a.bias=0", "--output", tmp_path / "copy", "--audit", path)
    run("restore", folder, "--audit", path)
    applied, written, restored = lines(path)
    assert [entry["action"] for entry in (applied, written, restored)] == ["apply", "write", "restore"]
    assert applied["tensors"] == ["a.bias", "norm.weight"]
    assert applied["bytes"] == restored["bytes"] == 48 * 4 + 64 * 8
    assert applied["tensors"] == restored["tensors"]
    assert applied["digest"] == restored["digest"] != written["digest"]
    assert applied["target"] == restored["target"] == str(folder)
    assert (written["target"], written["source"]) == (str(tmp_path / "copy"), str(folder))
    assert digests(folder) == bytes_


def test_what_is_undone_in_a_file_is_told_by_its_layers(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    path, factory = tmp_path / "audit.jsonl", "checkpoints:own_model"
    own = nz.Checkpoint(tmp_path / "model.safetensors", factory=factory)
    plan = nz.plan(own, LAYER, "zero")
    with nz.audit(path):
        plan.apply(own)
        nz.Checkpoint(tmp_path / "model.safetensors").restore()  # as another process would: from the undo alone
    applied, restored = lines(path)
    assert (restored["layers"], restored["strategy"], restored["action"]) == (["1"], "zero", "restore")
    about = {"action": "restore", "time": restored["time"]}
    assert restored == applied | about


@pytest.mark.parametrize("command", ["apply", "restore"])
def test_a_command_writes_nothing_without_its_audit(folder, tmp_path, command):
    run("apply", folder, "--set", "b.bias=0", "--in-place")
    before = digests(folder)
    edit = ["--set", "a.bias=0", "--in-place"] if command == "apply" else []
    told = run(command, folder, *edit, "--audit", tmp_path / "no" / "audit.jsonl", status=2)
    assert told.startswith("audit: expected a file that can be appended to, got No such file or directory for ")
    assert told.count("\n") == 1
    assert digests(folder) == before


def test_an_edit_that_was_cut_off_is_recorded_when_it_is_rolled_back(folder, tmp_path, monkeypatch):
    opened = nz.Checkpoint(folder)
    monkeypatch.setattr(type(opened.journal), "roll_back", lambda *_: None)  # killed: nothing tidies up
    run("apply", folder, "--set", "a.bias=0", "--in-place")
    monkeypatch.undo()
    monkeypatch.setattr("neutralize.checkpoint.journal.Edition.is_done", property(lambda self: False))
    with nz.audit(tmp_path / "audit.jsonl"):
        assert len(opened.recover()) == 1
    (entry,) = lines(tmp_path / "audit.jsonl")
    assert (entry["action"], entry["target"], entry["outcome"]) == ("restore", str(folder), "done")


def test_the_logger_is_silent_until_it_is_asked(model, plan, caplog, capfd):
    plan.apply(model).restore()
    assert capfd.readouterr() == ("", "")
    assert any(isinstance(each, logging.NullHandler) for each in logging.getLogger("neutralize").handlers)
    with caplog.at_level("INFO", logger="neutralize"):
        again = nz.plan(model, LAYER, "zero", example_inputs=torch.zeros(1, 8))
        again.apply(model).restore()
    size, digest = plan.written_bytes, plan.digest[:12]
    told = [record.getMessage() for record in caplog.records if record.name.startswith("neutralize")]
    assert told == [
        f"plan Sequential: 1 by zero, exact, {size} bytes, {again.planning_s:.2f} s, plan {digest}",
        f"apply Sequential: done, {size} bytes, plan {digest}",
        f"restore Sequential: done, {size} bytes, plan {digest}",
    ]


def test_the_log_tells_more_at_debug_and_of_sweeps_and_measurements(model, plan, caplog):
    x = torch.randn(2, 8)
    with caplog.at_level("DEBUG", logger="neutralize"):
        again = nz.plan(model, LAYER, "zero", example_inputs=x)
        nz.verify(model, again, x)
        nz.influence(model, [LAYER], [x], loss=lambda outputs, batch: outputs.square().mean())
    records = [record for record in caplog.records if record.name.startswith("neutralize")]
    told = {level: [r.getMessage() for r in records if r.levelname == level] for level in ("INFO", "DEBUG")}
    assert any(line.startswith("trace Sequential: exported, ") for line in told["DEBUG"])
    assert any(line.startswith("plan: 1 is off as exact") for line in told["DEBUG"])
    assert [f"plan: {edit.describe()}" for edit in plan.edits] == [
        line for line in told["DEBUG"] if line.startswith("plan: ") and " is off " not in line
    ]
    assert "verify Sequential: bit for bit, every bound holds" in told["INFO"]
    assert sum(line.startswith("influence: loss ") for line in told["INFO"]) == 2
    assert len(told["INFO"]) == 1 + 3 + 2 + 2  # plan; verify, which applies and restores; as the sweep does once
