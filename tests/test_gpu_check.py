"""`make gpu-check` without a GPU: it refuses, no figure comes from anywhere, and the rest of it runs on the CPU."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """The module with all that needs a GPU replaced; what it then measures is this machine's, and thrown away."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_check

    def seconds_of(run):
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check, "POOL_BYTES", 3 << 20)
    monkeypatch.setattr(gpu_check, "SIZES", (1 << 20, 2 << 20))
    monkeypatch.setattr(gpu_check, "LISTS", ((10, 64), (100, 64)))
    monkeypatch.setattr(gpu_check, "graph_of", lambda job, tensors: lambda: [job(tensor) for tensor in tensors])
    monkeypatch.setattr(gpu_check, "seconds_of", seconds_of)
    monkeypatch.setattr(gpu_check, "wall_seconds", seconds_of)
    monkeypatch.setattr(gpu_check, "launches_of", lambda job: 1)
    monkeypatch.setattr(gpu_check, "free_bytes", lambda: 1 << 40)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return gpu_check


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


def test_every_case_is_measured_and_saved(on_cpu, capsys):
    rows, lists = on_cpu.measure_cases(3), on_cpu.measure_lists(3)
    assert {(row.name.split()[0], row.bytes_) for row in rows} >= {
        (op, size) for op in ("fill", "scale", "rescale_fold") for size in on_cpu.SIZES
    }
    assert {(each.name, each.tensors) for each in lists} == {(op, n) for op in ("fill", "scale") for n in (10, 100)}
    for row in rows:
        assert min(row.gb_per_s, row.limit_gb_per_s, row.fraction_of_limit, row.torch_over_ours) > 0
        assert row.fraction_low <= row.fraction_of_limit <= row.fraction_high
    path = on_cpu.save({"device": "No GPU: (dry) run", "bandwidth": [asdict(row) for row in rows]})
    assert path.name == "gpu-no-gpu-dry-run.json"
    assert len(json.loads(path.read_text())["bandwidth"]) == len(rows)
    table = capsys.readouterr().out
    assert all(row.name in table for row in rows)


def test_both_sides_of_a_case_do_the_same(on_cpu):
    for make, dtype in on_cpu.CASES:
        case = make(1 << 20, dtype)
        before = case.tensors[0].clone()
        case.ours(case.tensors[0])
        ours = case.tensors[0].clone()
        case.tensors[0].copy_(before)
        case.theirs(case.tensors[0])
        assert torch.equal(ours.float(), case.tensors[0].float()), case.name
        assert not torch.equal(ours.float(), before.float()), case.name


def test_the_sizes_lists_and_goals_are_those_of_the_project(on_cpu, monkeypatch):
    monkeypatch.undo()
    assert (on_cpu.SIZES[0], on_cpu.SIZES[-1]) == (1 << 20, 8 << 30)
    assert {count for count, _ in on_cpu.LISTS} >= {10, 100, 4000, 10_000}

    def row(name, mib, fraction, over_torch):
        return on_cpu.Row(name, mib << 20, 1.0, 1.0, fraction, fraction, fraction, over_torch, "torch")

    def of_list(count, numel, over_loop, over_foreach):
        return on_cpu.ListRow("fill", count, numel, 1e-3, over_loop, over_foreach, 1)

    good = [row("fill float32", 64, 0.95, 1.0), row("scale float32", 16, 0.5, 1.0), row("identity", 64, 0.5, 1.0)]
    good_lists = [of_list(4000, 1024, 8.0, 0.5), of_list(100, 16_384, 1.0, 1.0), of_list(10, 1024, 0.5, 0.5)]
    assert on_cpu.missed_goals(good, good_lists) == []
    bad = [row("scale float32", 64, 0.949, 1.0), row("identity", 1, 0.99, 0.99)]
    bad_lists = [of_list(4000, 1024, 7.9, 2.0), of_list(100, 16_384, 9.0, 0.99)]
    assert on_cpu.missed_goals(bad, bad_lists) == [
        "scale float32, 64 MiB: 0.949 of the limit < 0.95",
        "identity, 1 MiB: 0.990 x torch < 1.0",
        "fill, 4000 tensors of 1024: 7.90 x a loop < 8.0",
        "fill, 100 tensors of 16384: 0.990 x _foreach_ < 1.0",
    ]


def test_the_exercise_of_the_memory_checker_runs_every_kernel(on_cpu):
    on_cpu.exercise()
