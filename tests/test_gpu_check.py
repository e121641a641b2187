"""`make gpu-check` where there is nothing to check: it refuses, and no figure comes from anywhere."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU; run `make gpu-check`")
def test_without_a_gpu_it_refuses_and_writes_nothing():
    results = set((ROOT / "benchmarks" / "results").glob("gpu-*"))
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("gpu-check: expected a CUDA GPU, got none that torch")
    assert "no figure is estimated" in run.stderr
    assert set((ROOT / "benchmarks" / "results").glob("gpu-*")) == results
