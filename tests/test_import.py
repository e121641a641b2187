"""Importing neutralize is quick, light, and leaves CUDA alone."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import neutralize
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds,
    "cuda_initialized": torch.cuda.is_initialized(),
    "imported": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
}))
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory):
    """Three fresh processes that import torch, then neutralize; the last two find bytecode, as when installed."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("bytecode"))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", PROGRAM]
    return [json.loads(subprocess.check_output(command, text=True, env=environment)) for _ in range(3)]


def test_takes_less_than_half_a_second_after_torch(imports):
    assert min(each["seconds"] for each in imports) < 0.5


def test_does_not_initialise_cuda(imports):
    assert not any(each["cuda_initialized"] for each in imports)


@pytest.mark.parametrize(
    "heavy", ["rich", "typer", "matplotlib", "transformers", "accelerate", "gguf", "triton", "peft", "lm_eval"]
)
def test_leaves_heavy_packages_out(imports, heavy):
    assert heavy not in imports[0]["imported"]
    assert "neutralize" in imports[0]["imported"]


def test_public_names_are_what_completion_offers():
    import neutralize as nz

    assert [name for name in dir(nz) if not name.startswith("_")] == sorted(nz.__all__)
