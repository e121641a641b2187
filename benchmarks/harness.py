"""Verify first, then time both sides alternating in one process, and report ratios beside the bandwidth limit.

How it is measured stands in `neutralize.bench`; here are the limits compiled for this machine, the goals and the table.
"""

import argparse
import ctypes
import datetime
import functools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from neutralize.bench import Case, Result, duration, machine, run

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Figure:
    """A number that is not a ratio of two times, and must not be large.

    Attributes:
        measure: returns it
        goal_most: the most that it may be
    """

    measure: Callable[[], float]
    goal_most: float


# ---- the limits of this machine ------------------------------------------------------------------------------------
@functools.cache
def load_limits() -> ctypes.CDLL:
    """Compile limits.cpp for this very machine and load it."""
    with tempfile.TemporaryDirectory() as folder:
        library = str(pathlib.Path(folder, "limits.so"))
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        subprocess.run(["c++", *flags, str(HERE / "limits.cpp"), "-o", library], check=True)
        limits = ctypes.CDLL(library)
    for name in ("streaming_store", "read_write"):
        getattr(limits, name).argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float]
    return limits


def limit_pass(name: str, tensor: torch.Tensor, value: float = 0.0) -> Callable[[], object]:
    """One pass of a limit over the memory of `tensor`, on as many threads as PyTorch uses.

    `value` is what a streaming store writes: the same as the case writes, for zeros may be faster than anything else.
    """
    function, address, threads = getattr(load_limits(), name), tensor.data_ptr(), torch.get_num_threads()
    return lambda: function(address, tensor.nbytes, threads, value)


# ---- report --------------------------------------------------------------------------------------------------------
COLUMNS = ("case", "ours", "instead", "", "ratio", "25–75 %", "then", "GB/s", "of limit", "25–75 %", "then", "goal")
WIDTHS = (44, 8, 31, 8, 6, 11, 6, 6, 8, 11, 4, 1)


def last_saved() -> pathlib.Path | None:
    """The newest run that was saved under a name of its own, by the date in its name."""
    return max(RESULTS.glob("cpu-*.json"), key=lambda path: path.stem[-len("2000-01-01") :], default=None)


def saved_results(path: pathlib.Path | None) -> dict[str, dict[str, Any]]:
    """The results of a saved run by case. Ratios and shares can be compared between machines; seconds cannot."""
    if path is None:
        return {}
    return {result["name"]: result for result in json.loads(path.read_text(encoding="utf-8"))["results"]}


def row(result: Result, then: dict[str, Any]) -> tuple[str, ...]:
    """The cells of one result, as COLUMNS names them; ``then`` is what a saved run has of it, or nothing."""
    goals = [f"≥ {result.goal_ratio:.3g}×"] if result.goal_ratio is not None else []
    goals += [f"≥ {result.goal_of_limit:g} of limit"] if result.goal_of_limit is not None else []
    verdict = ("MISSED " if result.missed else "") + ", ".join(goals)
    return (
        result.name,
        duration(result.ours_seconds),
        result.theirs_name,
        duration(result.theirs_seconds),
        f"{result.ratio:.2f}×",
        "{:.2f}–{:.2f}".format(*result.ratio_quartiles),
        f"{then['ratio']:.2f}×" if then else "",
        f"{result.gb_per_s:.1f}" if result.gb_per_s else "",
        f"{result.of_limit:.2f}" if result.of_limit is not None else "",
        "{:.2f}–{:.2f}".format(*result.of_limit_quartiles) if result.of_limit_quartiles else "",
        f"{then['of_limit']:.2f}" if then.get("of_limit") is not None else "",
        verdict,
    )


def print_row(cells: Iterable[str]) -> None:
    """One line of a Markdown table, as soon as it is known."""
    print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)) + " |", flush=True)


def main(cases: dict[str, Callable[[], Case]], figures: dict[str, Figure], description: str) -> None:
    """Run all cases, print the table, write the JSON; with --check, exit 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    parser.add_argument("--only", default="", help="run the cases in whose name this regular expression is found")
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each case")
    parser.add_argument("--against", type=pathlib.Path, default=last_saved(), help="the run to compare with: the last")
    parser.add_argument("--save", action="store_true", help="keep this run, under the name of the CPU and the day")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "latest.json", help="where the JSON goes")
    options = parser.parse_args()

    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    then = saved_results(options.against)
    if options.against is not None:
        print(f"then: {options.against.name}")
    print_row(COLUMNS)
    print_row("-" * 3 for _ in COLUMNS)
    results, measured = [], []
    for name, make in cases.items():  # made when its turn comes, so that one large tensor lives at a time
        if re.search(options.only, name):
            results.append(run(name, make(), options.seconds))
            print_row(row(results[-1], then.get(name, {})))
    for name, figure in figures.items():
        if re.search(options.only, name):
            value = figure.measure()
            missed = [f"{value:.3g} > {figure.goal_most:g}"] if value > figure.goal_most else []
            measured.append({"name": name, "value": value, "goal_most": figure.goal_most, "missed": missed})
            print(f"{name}: {value:.3g}, goal ≤ {figure.goal_most:g}{' MISSED' if missed else ''}", flush=True)
    record = {"machine": about, "results": [asdict(result) for result in results], "figures": measured}
    outputs = [options.output]
    if options.save:
        cpu = re.sub(r"[^a-z0-9]+", "-", str(about["cpu"]).lower()).strip("-")
        outputs.append(RESULTS / f"cpu-{cpu}-{datetime.date.today().isoformat()}.json")
    for output in outputs:
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    misses = [f"{each['name']}: {reason}" for each in (*record["results"], *measured) for reason in each["missed"]]
    print("\n".join(["", *misses]) if misses else "\nevery goal met")
    if options.check and misses:
        sys.exit(1)
