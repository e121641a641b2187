"""The README's example runs, and the commands and files that it names exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_examples_run(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for heading in ("layer", "strategy", "edits", "bytes", "certificate", "exact") if "print(plan)" in code else ():
        assert heading in printed


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)", README))))
def test_the_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target


def test_the_map_names_files_that_exist():
    text = README.partition("## The map of the code")[2].partition("**Trace one call.**")[0]
    missing, folder = [], ROOT
    for line in text.splitlines():
        indented = line.startswith("  ")
        for name in re.findall(r"(?<![\w/])[\w/]+(?:\.(?:cpp|h|py|cu|cuh)|/)(?!\w)", line):
            if not indented and name.endswith("/"):
                folder = ROOT / name
            places = [folder / name, ROOT / name, *(ROOT / "csrc").glob(f"*/{name}"), ROOT / "src/neutralize" / name]
            if not any(place.exists() for place in places):
                missing.append(name)
    assert not missing


def test_the_map_names_every_module():
    text = README.partition("## The map of the code")[2].partition("**Trace one call.**")[0]
    package = ROOT / "src/neutralize"
    modules = [
        path.stem
        for folder in ("", "checkpoint", "influence", "distributed")
        for path in (package / folder).glob("*.py")
    ]
    assert not [name for name in modules if name[:2] != "__" and not re.search(rf"\b{name}\b", text)]


def test_figures_are_those_of_the_saved_runs():
    verdicts = [entry["verdict"] for entry in json.loads((ROOT / "docs/breadth.json").read_text())["types"].values()]
    built = [verdict for verdict in verdicts if verdict in ("exact", "folded", "measured", "refused")]
    exact, folded = built.count("exact"), built.count("folded")
    assert f"of {len(built)} model types of transformers and timm" in README
    assert f"{exact} ({exact / len(built):.0%})".replace("%", " %") in README
    assert f"{folded} more ({(exact + folded) / len(built):.0%} in all)".replace("%", " %") in README

    results = ROOT / "benchmarks/results"
    fastest = json.loads((results / "checkpoint-latest.json").read_text())["speed"][0]
    assert f"0.94 GB Llama: {fastest['apply_s']:.3f} s" in README
    assert f"against {fastest['load_save_s']:.1f} s for loading and saving" in README

    table = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
    names = {"cheapest": "norm gains", "outgoing": "outgoing weights"}
    for row in json.loads((results / "ranks-latest.json").read_text())["results"]:
        line = next(
            line for line in table.splitlines() if line.startswith(f"| {row['processes']} | {names[row['edit']]} |")
        )
        cells = line.strip("| ").split(" | ")
        assert cells[4:6] == [str(row["messages"]), str(row["message_bytes"] or "-")]
        seconds = [row["apply_s"], row["restore_s"]]
        assert [float(cell.removesuffix(" ms")) for cell in cells[6:]] == [
            float(f"{each * 1e3:.2g}") for each in seconds
        ]


def test_every_strategy_is_in_the_table():
    from neutralize import STRATEGIES

    for name in STRATEGIES:
        assert f"| `{name}` |" in README, name
