"""The README's example runs, and the commands and files that it names exist."""

from __future__ import annotations

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


def test_every_strategy_is_in_the_table():
    from neutralize import STRATEGIES

    for name in STRATEGIES:
        assert f"| `{name}` |" in README, name
