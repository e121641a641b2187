"""A checkpoint edited in place by several processes at once: the bytes that one writes, all or none, repairable."""

import hashlib
import os
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from networks import perturbed

import neutralize as nz
from neutralize.checkpoint import Checkpoint, together
from neutralize.checkpoint.journal import Journal
from neutralize.errors import NeutralizeError
from ranks import Ranks

SHARDED, DCP = "safetensors", "torch.distributed.checkpoint"


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """A tiny Llama in files of two kinds, several of each."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = perturbed(transformers.LlamaForCausalLM(config))
    root = tmp_path_factory.mktemp("originals")
    model.save_pretrained(root / SHARDED, max_shard_size="12KB")
    writer = dcp.FileSystemWriter(root / DCP, single_file_per_rank=False)
    dcp.save(model.state_dict(), storage_writer=writer, no_dist=True)
    config.save_pretrained(root / DCP)
    return {kind: root / kind for kind in (SHARDED, DCP)}


@pytest.fixture
def copied(originals, tmp_path):
    """Gives a copy of a checkpoint."""
    return lambda kind: Path(shutil.copytree(originals[kind], tmp_path / kind))


def plan_of(folder: Path, layer: int = 1) -> nz.Plan:
    return nz.plan(folder, f"model.layers[{layer}]", edit="outgoing")


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the journal's."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def applied(folder: Path, plans: list[nz.Plan], failing: str = "", timeout: float = 60.0) -> tuple[str, list[str], str]:
    """Apply as a member of the group; return the error, the files that this process wrote, and the plan undone."""
    rank = dist.get_rank()
    running, wrote = together.run, []

    def watched(patches, files, advance):
        wrote.extend(region.file for patch in patches for region in patch.regions)
        running(patches, files, advance)
        if failing == f"raise {rank}":
            raise OSError(5, "the disk is gone")
        if failing == f"die {rank}":
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def late(journal):
        time.sleep(0.5)  # the other process may have failed meanwhile
        with joined(journal):
            yield

    joined, together.run = Journal.joined, watched
    Journal.joined = late
    try:
        undo = plans[rank].apply(folder, group=dist.group.WORLD, timeout=timeout)
    except NeutralizeError as error:
        return str(error), wrote, ""
    finally:
        together.run, Journal.joined = running, joined
    return "", wrote, undo.digest


@pytest.mark.parametrize("kind", [SHARDED, DCP])
def test_two_processes_write_what_one_writes_each_into_files_of_its_own(two, originals, copied, kind, tmp_path):
    folder, alone = copied(kind), Path(shutil.copytree(originals[kind], tmp_path / "alone"))
    plan, before = plan_of(folder), contents(folder)
    plan.apply(alone)
    (first, own, digest), (second, others, other_digest) = two.run(applied, folder, [plan] * 2)
    assert (first, second, digest, other_digest) == ("", "", plan.digest, plan.digest)
    assert own
    assert others
    assert not set(own) & set(others)
    assert contents(folder) == contents(alone) != before
    assert Checkpoint(folder).check().state == "edited"
    Checkpoint(folder).restore()
    assert contents(folder) == before


@pytest.mark.parametrize("failing", ["raise 0", "raise 1", "another plan", "another folder"])
def test_what_fails_in_one_process_fails_both_and_every_byte_is_back(two, copied, failing):
    folder = copied(DCP)
    plan, before = plan_of(folder), contents(folder)
    plans = [plan, plan_of(folder, 2) if failing == "another plan" else plan]
    for rank in range(2):
        where = folder / "nowhere" if failing == "another folder" and rank else folder
        two.start(applied, where, plans, failing, ranks=[rank])
    answers = [two.result(rank) for rank in range(2)]
    said = {"another plan": "expected the same plan in all 2 processes", "another folder": "got nothing at"}
    for error, _, _ in answers:
        assert said.get(failing, "the disk is gone") in error
    assert contents(folder) == before
    assert not (folder / ".neutralize").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_leaves_what_restore_repairs(copied, rank):
    folder = copied(SHARDED)
    plan, before = plan_of(folder), contents(folder)
    ranks = Ranks(2)
    try:
        ranks.start(applied, folder, [plan] * 2, f"die {rank}", 3.0)
        error, _, _ = ranks.result(1 - rank)
        assert error.startswith("apply: expected an answer of all 2 processes within 3")
        if rank == 0:  # who keeps the undo is gone
            assert contents(folder) != before
            assert Checkpoint(folder).status.state == "interrupted"
            Checkpoint(folder).restore()
        assert contents(folder) == before
    finally:
        ranks.close()


def test_nobody_puts_bytes_back_while_another_process_writes(copied):
    folder = copied(SHARDED)
    checkpoint = Checkpoint(folder)
    undo = plan_of(folder).apply(folder)
    with checkpoint.journal.joined():
        assert checkpoint.status.state == "busy"
        with pytest.raises(NeutralizeError, match="got one that is being edited by"):
            checkpoint.restore()
    undo.restore()
    assert checkpoint.status.state == "intact"
