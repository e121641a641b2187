"""The benchmarks run: the smallest case, timed for a moment. What importing costs is in test_import.py."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_ops_verifies_times_and_writes_its_record(tmp_path):
    record = tmp_path / "ops.json"
    command = [sys.executable, BENCHMARKS / "ops.py", "--only", "one tensor", "--seconds", "0.1", "--output", record]
    printed = subprocess.check_output(command, text=True)
    assert "| fill, one tensor of 8 floats" in printed
    (result,) = json.loads(record.read_text())["results"]
    assert result["ours_seconds"] > 0
    assert result["theirs_seconds"] > 0
    assert result["rounds"] >= 15
