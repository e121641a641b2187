"""The examples, run as a user runs them."""

import runpy
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
import torch

pytestmark = pytest.mark.shown
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(*command):
    result = subprocess.run([sys.executable, *command], cwd=EXAMPLES, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return result.stdout


def test_workers_of_an_inference_engine_edit_evaluate_and_restore():
    out = run("tensor_parallel_workers.py", "--tiny")
    assert "restored: the loss is what it was, to the bit" in out


def test_processes_with_a_sharded_model_edit_it_together():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert "off as in the whole model without the block, bit for bit; restored" in run(*torchrun, "fsdp2.py")


NOTEBOOKS = {
    "classic_layers": "sigmoid  operating point 0, slope 0.25: bounded",
    "language_model": "blocks 4 and 14 off",
    "vision": "resnet18  layer1[1]",
    "identity_expansion": "three blocks, one of them an identity: the same outputs, bit for bit",
    "ablation_study": "the picture is",
    "gradual_damping": "the model computes what it would without the block, bit for bit",
    "edit_checkpoint": "restored: every byte is what it was",
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_checks_itself(name, capsys):
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert NOTEBOOKS[name] in capsys.readouterr().out


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_opens_as_a_notebook(name):
    kinds = [cell.cell_type for cell in jupytext.read(EXAMPLES / f"{name}.py").cells]
    assert kinds[0] == "markdown"
    assert kinds.count("code") >= 2


def test_every_example_is_run():
    scripts = {"tensor_parallel_workers", "fsdp2"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NOTEBOOKS, *scripts}
