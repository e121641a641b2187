"""The command `neutralize`: what it offers, how it speaks, and what its exit status says."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import checkpoints
import pytest
import typer
from safetensors.torch import save_file
from terminals import on_terminal
from typer.testing import CliRunner

import neutralize
from neutralize import cli
from neutralize.cli.printing import text_table
from neutralize.strategies import STRATEGIES

COMMANDS = typer.main.get_command(cli.app).commands
BOX = re.compile("[\u2500-\u257f\x1b\r]")


def run(*arguments: object, status: int = 0):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    assert not BOX.search(result.output)  # nobody watches: no boxes, no colours, no bars
    return result


def refused(*arguments: object, status: int = 2) -> str:
    """Run a command that cannot be carried out; return its one line."""
    result = run(*arguments, status=status)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model that transformers does not know; its code is in `plain_model.py` beside it."""
    folder = tmp_path_factory.mktemp("plain")
    save_file(checkpoints.own_model().state_dict(), folder / "model.safetensors")
    (folder / "plain_model.py").write_text("from checkpoints import own_model\n")
    return folder


OWN = ("--model", "checkpoints:own_model")


# ---- what there is -------------------------------------------------------------------------------------------------
def test_is_installed_as_a_command():
    (entry,) = metadata.entry_points(group="console_scripts", name="neutralize")
    assert entry.load() is cli.main


def test_help_lists_every_command_with_its_first_sentence_in_full():
    told = " ".join(run("--help").output.split())
    assert told == " ".join(run().output.split())  # without arguments too
    for name, command in COMMANDS.items():
        assert " ".join(f"{name} {command.help.split(chr(10) * 2)[0]}".split()) in told
    assert run("--version").output == f"{metadata.version('neutralize')}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_quiet_and_examples(name):
    told = run(name, "--help").output
    assert "--json" in told
    assert "--quiet" in told
    assert max(map(len, told.splitlines())) <= 80
    assert f"Examples:\n  neutralize {name}" in told


@pytest.mark.parametrize(
    ("name", "example"),
    [(name, example) for name, command in COMMANDS.items() for example in command.epilog.splitlines()]
    + [(line.split()[1], line) for line in typer.main.get_command(cli.app).epilog.splitlines()],
)
def test_every_example_parses(name, example):
    program, command, *words = shlex.split(example)
    assert (program, command) == ("neutralize", name)
    with COMMANDS[name].make_context(name, words) as context:
        assert context.params


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("--help", 0, "Switch layers of PyTorch models off in place"),
        ("--version", 0, metadata.version("neutralize")),
        ("plan --hlep", 2, "No such option: --hlep"),
        ("in|", 0, "inspect\ninfluence"),
        ("plan {folder} --la|", 0, "--layers"),
        ("plan {folder} --strategy pa|", 0, "passthrough"),
        ("plan {folder} --layers co|", 0, "conv"),
        ("influence smollm2 --layers co|", 0, ""),
        ("plan {folder}/model-00001-of-00002.safetensors --layers fp|", 0, "fp8"),
    ],
)
def test_who_asks_for_help_or_a_completion_does_not_wait_for_pytorch(tmp_path, line, status, said):
    checkpoints.save(tmp_path, shards=2)
    words = line.format(folder=tmp_path).rstrip("|").split()
    environment = {**os.environ, "PYTHONPATH": str(Path(neutralize.__file__).parents[1])}
    if line.endswith("|"):
        environment |= {"_NEUTRALIZE_COMPLETE": "complete_bash", "COMP_CWORD": str(len(words))}
        environment["COMP_WORDS"], words = " ".join(["neutralize", *words]), []
    script = Path(sys.executable).parent / "neutralize"
    for program in (["-m", "neutralize"], [str(script)])[: 1 + (line == "--version" and script.exists())]:
        command = [sys.executable, "-X", "importtime", *program, *words]
        told = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert told.returncode == status, told.stderr
        assert said in told.stdout + told.stderr
        imported = {
            entry.rpartition("|")[2].strip() for entry in told.stderr.splitlines() if entry.startswith("import ")
        }
        assert "neutralize.cli" in imported
        assert not {"torch", "numpy", "neutralize.api"} & imported


# ---- what cannot be carried out ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dotcor"], "No such command 'dotcor'. Did you mean 'doctor'?; see neutralize --help"),
        (["restore", "x", "--al"], "neutralize restore: No such option: --al"),
        (["restore"], "neutralize restore: Missing argument"),
        (["plan", "x", "--layers"], "neutralize plan: Option '--layers' requires an argument; see neutralize plan"),
        (["bench", "--most", "many"], "neutralize bench: Invalid value for '--most'"),
        (["bench", "--most", "999999999"], "for --most, a quarter of this machine's memory, got 999999999; give less"),
        (["bench", "--only", "nothing"], "bench: expected a part of a case's name for --only, got 'nothing'"),
        (["status", "/nowhere\n/at all"], "checkpoint: expected a folder or a file, got nothing at '/nowhere\\n/at"),
    ],
)
def test_a_refusal_is_one_line(arguments, said):
    assert said in refused(*arguments)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plan no --layers 1 --strategy mean", "got 'mean', which needs batches; give that in Python"),
        ("plan no --layers 1 --strategy damp", "expected --option factor=VALUE for strategy 'damp', got none; give it"),
        ("plan no --layers 1 --strategy zreo", "got 'zreo'; did you mean 'zero'?"),
        ("plan no --layers 1 --save no/p.json", "plan: expected a file for --save in a folder that can be written"),
        ("influence no --strategy damp", "got 'damp', which needs factor; give that in Python"),
        ("influence no --text no.txt", "UTF-8 text for text, got 'no.txt' (No such file or directory); give another"),
        ("influence no --device cuda:9999", "influence: expected a device of this machine for device, got 'cuda:9999'"),
    ],
)
def test_what_needs_no_model_is_checked_before_one_is_looked_for(line, said):
    assert said in refused(*line.split())


@pytest.mark.parametrize(
    "line", ["apply no --layers 1 --in-place", "restore no", "export no --drop 1 --output no/where"]
)
def test_several_processes_of_torchrun_do_not_each_write(line, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "expected one process, got 2 of torchrun, each of which would write; run it without" in refused(
        *line.split()
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "got nothing at 'no'" in refused("restore", "no")


def test_a_plan_is_a_file_that_appears_whole(plain, tmp_path):
    (tmp_path / "other").write_text("hello")
    applied = ("apply", plain, *OWN, "--dry-run", "--plan")
    assert f"plan: expected a plan in '{tmp_path / 'no'}', got No such file" in refused(*applied, tmp_path / "no")
    assert f"plan: expected a plan in '{tmp_path / 'other'}', got something" in refused(*applied, tmp_path / "other")
    planned = ("plan", plain, *OWN, "--layers", "1", "--save")
    assert "got '/dev/full' (something else is there)" in refused(*planned, "/dev/full")
    run(*planned, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert json.loads(run(*applied, tmp_path / "other", "--json").stdout)["state"] == "untouched"


def test_nothing_is_intact_that_is_no_checkpoint(plain, tmp_path):
    assert "got a folder without any" in refused("status", tmp_path, "--json")
    cut = tmp_path / "model.safetensors"
    cut.write_bytes((plain / "model.safetensors").read_bytes()[:-1])
    assert "it was cut off or damaged" in refused("status", cut)
    assert run("status", cut, "--quick").stdout == f"{cut}: intact\n"  # the journal says nothing else


def test_inspect_refuses_what_it_would_not_show(plain):
    assert "got 'x*', which none has; near matches: 0.bias" in refused("inspect", plain, "--match", "x*", "--json")
    assert "expected --layers or --match, got both" in refused("inspect", plain, "--match", "*", "--layers", "1")


def test_near_matches_are_named(plain):
    assert "(Possible options: --layers" in refused("plan", plain, "--layer", "1").replace("Did you mean", "(Possible")
    assert "did you mean 'damp'?" in refused("plan", plain, *OWN, "--layers", "1", "--strategy", "dampp")
    assert "the model's layers begin with: 0, 1, 2" in refused("plan", plain, *OWN, "--layers", "x")
    assert "expected factor, sides for strategy 'damp', got factr" in refused(
        "plan", plain, *OWN, "--layers", "1", "--strategy", "damp", "--option", "factr=0.5"
    )


def test_a_list_of_problems_is_one_line_too(plain):
    line = refused("plan", plain, *OWN, "--layers", "*", "--strategy", "constant")
    assert "got 3 that cannot: - plan: expected an activation" in line


@pytest.mark.parametrize("arguments", [["--debug", "status", "/nowhere"], ["status", "/nowhere", "--debug"]])
def test_debug_shows_the_traceback_and_the_same_line_and_status(arguments):
    told = run(*arguments, status=2).stderr.splitlines()
    assert told[0] == "Traceback (most recent call last):"
    assert told[-1] == refused("status", "/nowhere")


def test_an_output_that_cannot_be_written_is_one_line_and_one_that_nobody_reads_is_none():
    environment = {**os.environ, "PYTHONPATH": str(Path(neutralize.__file__).parents[1])}
    command = [sys.executable, "-m", "neutralize", "--version"]
    options = {"shell": True, "capture_output": True, "text": True, "env": environment, "check": False}
    full = subprocess.run(f"{shlex.join(command)} >/dev/full", **options)
    said = "neutralize: expected files and an output that can be used, got No space left on device; check them\n"
    assert (full.returncode, full.stderr) == (2, said)
    unread, unwritten = os.pipe()
    os.close(unread)
    broken = subprocess.run(command, stdout=unwritten, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(unwritten)
    assert (broken.returncode, broken.stderr) == (1, "")
    closed = subprocess.run(f"{shlex.join(command)} >&-", **options)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_an_output_that_is_closed_or_knows_few_letters_gets_what_it_can(tmp_path, monkeypatch):
    checkpoints.save(tmp_path / "ü")
    latin = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for output, command in ((None, ["doctor"]), (latin, ["status", str(tmp_path / "ü")])):
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as ended:
            cli.app(command)
        assert ended.value.code == 0
    assert latin.buffer.getvalue() == f"{tmp_path}/\\xfc: intact\n".encode()


def test_after_two_dashes_debug_is_a_name():
    assert "nothing at '--debug'" in refused("status", "--", "--debug")


def test_debug_shows_what_is_logged(tmp_path):
    checkpoints.save(tmp_path)
    told = run("apply", tmp_path, "--set", "a.bias=0", "--in-place", "--debug").stderr
    assert re.search(rf"neutralize: apply {re.escape(str(tmp_path))}: done, 192 bytes, plan [0-9a-f]{{12}}\n", told)
    assert run("restore", tmp_path).stderr == ""


def test_a_bug_has_a_status_of_its_own(monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr("neutralize.doctor.diagnose", broken)
    said = "neutralize: expected no such error, got ZeroDivisionError: float division by zero; --debug shows where"
    assert refused("doctor", status=70).startswith(said)
    assert "in broken" in run("doctor", "--debug", status=70).stderr


def test_an_output_that_is_in_the_way_is_told_before_planning(plain, tmp_path):
    refusal = refused("apply", plain, "--model", "no:such", "--layers", "1", "--output", tmp_path)
    assert "expected nothing at" in refusal


# ---- what is printed -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("status", [0, 1])
def test_demo_hands_on_whether_its_proofs_held(monkeypatch, status):
    monkeypatch.setattr(neutralize, "demo", types.SimpleNamespace(main=lambda **_: status), raising=False)
    run("demo", status=status)


def test_bench_verifies_times_and_says_what_with():
    options = ("bench", "--only", "1,000", "--seconds", "0.01")
    found = json.loads(run(*options, "--json").stdout)
    assert found["machine"]["backend"] in ("cpu", "torch")
    (result,) = found["results"]
    assert result["ours_seconds"] > 0
    assert result["theirs_name"] == "loop of fill_"
    printed = run(*options).stdout.splitlines()
    assert printed[0].startswith("cpu ")
    assert printed[-1].startswith("fill, 1,000 tensors of 1,024 float32 (loop of fill_)")


def test_bench_refuses_to_time_what_is_wrong(monkeypatch):
    monkeypatch.setattr("neutralize.ops.rewrite_", lambda *_, **__: None)
    assert "bench: expected the bits of the reference for 'fill, 1 MiB float32'" in refused("bench", "--most", 1)


def test_text_from_a_file_cannot_move_the_cursor():
    table = text_table("\x1b[31m", ("a\nb",), [("two\nlines \x1b[2J",)])
    assert str(table.title) == "\\x1b[31m"
    assert [str(cell) for cell in table.columns[0]._cells] == ["two\\nlines \\x1b[2J"]


PROGRAM = """
import os, sys
import torch
from neutralize import cli
sys.argv[0] = "neutralize"
folder = sys.argv[1]
layers = ("--model", "plain_model:own_model", "--layers", "1")
for environment in ({}, {"NO_COLOR": "1"}, {"TERM": "dumb"}):
    os.environ.update(environment)
    for words in (["doctor"], ["plan", folder, *layers], ["inspect", folder, *layers], ["verify", folder, *layers],
                  ["inspect", folder], ["plan", folder, *layers[:2], "--layers", "9"]):
        print(f"$ {environment} {words[0]}", flush=True)
        try:
            cli.app(words)
        except SystemExit as end:
            print(f"status {end.code}", flush=True)
    for name in environment:
        os.environ[name] = "xterm-256color" if name == "TERM" else ""
"""


def test_a_terminal_of_80_columns(plain):
    """With colour, without it, and on one that can do nothing but print letters."""
    source = Path(neutralize.__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join([str(source), str(Path(__file__).parent)])}
    command = [sys.executable, "-c", PROGRAM, str(plain)]
    status, seen = on_terminal(command, columns=80, streams="stdin stdout stderr", env=environment, cwd=plain)
    assert status == 0, seen
    parts = re.split(r"\$ (\{.*?\}) (\w+)\r\n", seen)[1:]
    shown = list(zip(parts[0::3], parts[1::3], parts[2::3], strict=True))
    assert len(shown) == 18
    for environment, command, text in shown:
        assert text.rstrip().endswith("status 2" if "unknown" in text else "status 0"), text
        plain_text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\x1b[2K", "\n"))
        lines = [line for part in plain_text.splitlines() for line in part.split("\r")]
        tables = [line for line in lines if "select: expected" not in line and "plan: expected" not in line]
        if environment == "{'TERM': 'dumb'}":
            assert not BOX.search(text.replace("\r\n", "\n")), text
        else:
            assert max(map(len, tables)) <= 80, (command, plain_text)
        if environment == "{'NO_COLOR': '1'}":
            assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", text), text
    assert any("\x1b[1m" in text for environment, command, text in shown if environment == "{}")


def test_the_command_as_it_is_run_with_a_model_of_the_users(plain):
    """Its bar on the terminal takes nothing from the pipe; and its module has all names of the package."""
    (plain / "user.py").write_text(
        "import neutralize as nz\n"
        "from neutralize import *\n"
        "assert all(getattr(nz, name) is getattr(nz.api, name) for name in nz.__all__)\n"
        "assert callable(plan) and callable(nz.verify)\n"  # names of modules too, which are none
        "from checkpoints import own_model\n"
    )
    master, terminal = pty.openpty()
    options = ("--model", "user:own_model", "--layers", "1", "--json")
    command = [sys.executable, "-m", "neutralize", "verify", str(plain), *options]
    path = os.pathsep.join([str(Path(neutralize.__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": path}
    printed = subprocess.check_output(command, stderr=terminal, text=True, env=environment, cwd=plain)
    os.close(terminal)
    os.close(master)
    assert json.loads(printed)["exact"]


# ---- what the shell completes --------------------------------------------------------------------------------------
def completed(monkeypatch, *words: str) -> list[str]:
    line = ["neutralize", *words]
    monkeypatch.setenv("_NEUTRALIZE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(line))
    monkeypatch.setenv("COMP_CWORD", str(len(line) - 1))
    return CliRunner().invoke(cli.app, [], prog_name="neutralize").stdout.split()


def test_commands_options_strategies_and_layers_are_completed(monkeypatch, tmp_path):
    checkpoints.save(tmp_path, shards=2)
    assert completed(monkeypatch, "in") == ["inspect", "influence"]
    assert "--layers" in completed(monkeypatch, "plan", "--la")
    assert completed(monkeypatch, "plan", "x", "--strategy", "pa") == ["passthrough"]
    assert {*completed(monkeypatch, "plan", "x", "--strategy", ""), "mean"} == STRATEGIES.keys()
    assert completed(monkeypatch, "plan", "x", "--strategy", "damp", "--option", "fa") == ["factor="]
    assert completed(monkeypatch, "plan", str(tmp_path), "--layers", "co") == ["conv"]
    assert completed(monkeypatch, "plan", str(tmp_path / "absent"), "--layers", "co") == []
