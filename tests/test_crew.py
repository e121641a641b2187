"""Sweeps that several processes share, in real ones: what one by itself finds, each evaluation once in the log."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from networks import perturbed
from tokenizers import Tokenizer
from tokenizers.models import BPE
from typer.testing import CliRunner

from neutralize import cli
from neutralize.influence.crew import Crew
from ranks import free_port

DEPTH = 4
SHORT = ("--characters", 600, "--window", 32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A folder with a tiny Llama and a tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("llama")
    letters = {letter: number for number, letter in enumerate(map(chr, range(32, 127)))}
    tokenizer = Tokenizer(BPE(vocab=letters, merges=[], unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(letters), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    perturbed(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
    return folder


def command(*arguments: object) -> tuple[int, str, str]:
    """What the command line gives in this process."""
    result = CliRunner().invoke(cli.app, ["influence", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def alone(*arguments: object) -> dict:
    """What a process by itself finds, with as many threads as each of several has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        code, out, err = command(*arguments, "--json", "--quiet")
    finally:
        torch.set_num_threads(threads)
    assert code == 0, err
    return json.loads(out)


def numbers(sweep: dict) -> list:
    """All that was measured, without the seconds."""
    entries = [[entry[key] for key in ("layer", "loss", "kl", "block_influence")] for entry in sweep["entries"]]
    return [sweep["loss"], entries, sweep["steps"]]


def evaluated(log: Path) -> list[str]:
    """What the lines of a log say was off, each parsed."""
    lines = [json.loads(line) for line in log.read_bytes().removesuffix(b"\n").split(b"\n")]
    return sorted(",".join(line["off"]) for line in lines if "off" in line)


def each_layer() -> list[str]:
    return ["", *(f"model.layers.{number}" for number in range(DEPTH))]


def test_two_processes_find_what_one_finds_and_log_each_evaluation_once(two, llama, tmp_path):
    log = tmp_path / "log.jsonl"
    (code, out, err), (other_code, other_out, other_err) = two.run(
        command, llama, *SHORT, "--k", 2, "--json", "--log", log
    )
    assert (code, other_code, other_out, other_err) == (0, 0, "", "")  # the first one speaks
    expected = alone(llama, *SHORT, "--k", 2)
    assert numbers(json.loads(out)) == numbers(expected)
    off = evaluated(log)
    assert len(off) == len(set(off)) == 1 + DEPTH + DEPTH - 1
    assert set(each_layer()) <= set(off)
    told = [line.partition("]")[0] for line in err.splitlines()]  # of every evaluation, whoever made it
    assert told == [f"[{number}/{len(off)}" for number in range(1, len(off) + 1)]
    assert "from the log" not in err
    assert [code for code, _, _ in two.run(command, llama, *SHORT, "--log", log, "--quiet")] == [2, 2]
    (code, out, err), _ = two.run(command, llama, *SHORT, "--k", 2, "--json", "--log", log, "--resume")
    assert numbers(json.loads(out)) == numbers(expected)
    assert err.count("(from the log)") == len(off)
    assert evaluated(log) == off


JOB = """
log = "sweeps.jsonl"
characters = 600
window = 32
shard = true

[[sweep]]
model = "{model}"
k = 2

[[sweep]]
model = "{model}"
layers = "model.layer.9"

[[sweep]]
model = "./nowhere"

[[sweep]]
model = "{model}"
shard = false
"""


def test_a_job_of_sharded_and_replicated_models_reports_each_failure_once(two, llama, tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(model=llama).replace("./nowhere", str(tmp_path)))
    (code, out, err), (other_code, other_out, other_err) = two.run(command, "--job", path, "--json", "--quiet")
    assert (code, other_code, other_out, other_err) == (1, 1, "", "")
    sharded, layer, model, whole = map(json.loads, out.splitlines())
    assert "near matches" in layer["error"]
    assert "expected a folder, a GGUF file or a hub name of a causal language model" in model["error"]
    assert err.count("near matches") == err.count("does not load") == 1
    expected = alone(llama, *SHORT, "--k", 2)
    assert numbers(whole)[:2] == numbers(expected)[:2]
    assert sharded["chosen"] == expected["chosen"]
    for found, wanted in zip(sharded["entries"], expected["entries"], strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert found["kl"] == pytest.approx(wanted["kl"], rel=1e-4)
        assert found["block_influence"] == pytest.approx(wanted["block_influence"], rel=1e-4)
        assert found["bytes_written"] == wanted["bytes_written"]
    off = evaluated(tmp_path / "sweeps.jsonl")
    assert len(off) == 2 * (1 + DEPTH) + DEPTH - 1
    assert all(off.count(layer) == 2 for layer in each_layer())


def test_what_is_wrong_is_said_once_and_ends_every_process_with_2(two, llama, tmp_path):
    for arguments, said in [
        ([tmp_path], "expected a folder, a GGUF file or a hub name"),
        ([llama, "--layers", "model.layer.9"], "near matches"),
        ([llama, "--text", tmp_path / "none"], "expected a file of UTF-8 text"),
        ([llama, "--log", tmp_path], "expected a file that can be written for log"),
        ([llama, "--window", 1 << 20, "--characters", 1], "influence: expected"),
    ]:
        (code, out, err), (other_code, other_out, other_err) = two.run(command, *arguments, "--quiet")
        assert (code, other_code, out, other_out, other_err) == (2, 2, "", "", ""), err
        assert err.count(said) == 1


def lone_reader(llama: Path, text: Path) -> tuple[int, str, str]:
    """Of two processes only the first finds the text."""
    return command(llama, "--text", text if dist.get_rank() == 0 else text.parent / "none", "--quiet")


def test_a_file_that_one_process_lacks_fails_both_at_once(two, llama, tmp_path):
    text = tmp_path / "text"
    text.write_text("a text" * 20)
    began = time.monotonic()
    (code, _, err), (other_code, _, _) = two.run(lone_reader, llama, text)
    assert (code, other_code) == (2, 2)
    assert "expected a file of UTF-8 text" in err
    assert time.monotonic() - began < 60
    log = tmp_path / "log.jsonl"  # the next sweep is shared as ever, though one process had begun this one
    assert [code for code, _, _ in two.run(command, llama, *SHORT, "--log", log, "--quiet")] == [0, 0]
    assert evaluated(log) == each_layer()


def asked_to_end() -> tuple[list[int], list[int], object]:
    """What each process has in hand when it is asked to end, what it carries through, and how it ends."""
    crew = Crew()
    crew.begin()
    taken: list[int] = []
    done: list[int] = []
    code: object = None
    try:
        for item in crew.share(range(100)):
            taken.append(item)
            if len(taken) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)  # it is still there
            done.append(item)
    except SystemExit as end:
        code = end.code
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return taken, done, code


def test_who_is_asked_to_end_has_its_candidate_done_first(two):
    found = two.run(asked_to_end)
    for taken, done, code in found:
        assert len(taken) == 2
        assert done == taken
        assert code == 128 + signal.SIGTERM
    assert len({item for taken, _, _ in found for item in taken}) == 4  # nobody has what another has


# ---- under torchrun --------------------------------------------------------------------------------------------------


def workers_of(launcher: int) -> list[int]:
    """The processes that torchrun has started."""
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
    return []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are looked up in /proc, which Linux has")
def test_a_killed_process_loses_only_what_was_in_hand(llama, tmp_path):
    """Torchrun starts all again, which go on by themselves; killed again, a process goes on by itself."""
    log, text = tmp_path / "log.jsonl", tmp_path / "text"
    text.write_text("switched off, the layer hands on what it is given; " * 200)
    arguments = (llama, "--text", text, "--characters", 0, "--window", 64, "--log-file", log)
    launch = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
        "--master-port",
        str(free_port()),
    )
    done: list[list[str]] = []
    with subprocess.Popen(
        [
            sys.executable,
            *launch,
            "--master-port",
            str(free_port()),
            "-m",
            "neutralize",
            "influence",
            *map(str, arguments),
            "--quiet",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as launcher:
        began = time.monotonic()
        while launcher.poll() is None:
            if time.monotonic() - began > 300:
                launcher.terminate()  # torchrun ends its processes
            lines = log.read_bytes().count(b"\n") if log.exists() else 0
            if lines >= 2 + 2 * len(done) and len(done) < 2 and (workers := workers_of(launcher.pid)):
                os.kill(workers[len(done)], signal.SIGKILL)
                done.append(log.read_text().splitlines())
                time.sleep(1.0)  # the others are still there
            time.sleep(0.01)
        out, err = launcher.communicate()
    print(err.decode()[:6000])
    assert launcher.returncode != 0
    assert len(done) == 2
    assert out == b""  # nobody came to the end
    text_of_log = log.read_text()
    for lines in done:
        assert text_of_log.startswith("".join(f"{line}\n" for line in lines))  # nothing was lost
    found = alone(*arguments, "--resume")
    assert 3 <= found["resumed"] <= 1 + DEPTH
    assert evaluated(log) == each_layer()  # and nothing repeated
    assert numbers(found) == numbers(alone(*arguments[:-2]))
