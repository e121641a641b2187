"""The examples, run as a user runs them."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(*command):
    result = subprocess.run([sys.executable, *command], cwd=EXAMPLES, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return result.stdout


def test_workers_of_an_inference_engine_edit_evaluate_and_restore():
    out = run("tensor_parallel_workers.py", "--tiny")
    assert "restored: the loss is what it was, to the bit" in out
