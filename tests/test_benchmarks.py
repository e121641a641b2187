"""The benchmarks run: small cases, timed for a moment. What importing costs is in test_import.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_ops_verifies_times_compares_and_writes_its_record(tmp_path):
    name = "fill, one tensor of 8 floats"
    then, output = tmp_path / "then.json", tmp_path / "ops.json"
    then.write_text(json.dumps({"results": [{"name": name, "ratio": 123.25, "of_limit": None}]}))
    memory = "|memory: " if Path("/proc/self/clear_refs").exists() else ""  # Linux tells the peak
    options = ["--only", f"one tensor|mixed{memory}", "--seconds", "0.1", "--against", then, "--output", output]
    printed = subprocess.check_output([sys.executable, BENCHMARKS / "ops.py", *options], text=True)
    line = next(line for line in printed.splitlines() if line.startswith(f"| {name}"))
    assert "| 123.25× |" in line
    assert "then: then.json" in printed
    record = json.loads(output.read_text())
    assert len(record["results"]) == 2
    for result in record["results"]:
        assert result["ours_seconds"] > 0
        assert result["theirs_seconds"] > 0
        assert result["rounds"] >= 15
    for figure in record["figures"]:  # a plan takes the memory of its undo and no more
        assert 0.9 < figure["value"] <= figure["goal_most"] == 1.05


def test_the_last_saved_run_is_the_newest_by_date(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    assert harness.last_saved() is not None
    for name in ("cpu-b-2026-01-31", "cpu-a-2026-11-02", "cpu-c-2025-12-31", "checkpoint-2027-01-01"):
        (tmp_path / f"{name}.json").touch()
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert harness.last_saved().name == "cpu-a-2026-11-02.json"


def test_bandwidth_draws_and_saves_every_size(tmp_path):
    pytest.importorskip("matplotlib")
    picture, numbers = tmp_path / "bandwidth.png", tmp_path / "bandwidth.json"
    command = [sys.executable, BENCHMARKS / "bandwidth.py", "--most", "14", "--seconds", "0.05"]
    subprocess.check_call([*command, "--output", picture, "--numbers", numbers], stdout=subprocess.DEVNULL)
    assert picture.read_bytes().startswith(b"\x89PNG")
    panels = json.loads(numbers.read_text())["gb_per_s"]
    for points in panels.values():
        assert [point["bytes"] for point in points] == [1 << 12, 1 << 13, 1 << 14]
        assert all(point[job] > 0 for point in points for job in ("neutralize", "torch", "limit"))
