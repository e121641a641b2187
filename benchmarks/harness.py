"""Verify first, then time both sides alternating in one process, and report ratios beside the bandwidth limit.

A case holds two callables that do the same job on the same tensors. Times on a shared machine drift by tens of per
cent within seconds, so no two numbers from different moments are ever divided: each round times ours, theirs and the
limit back to back, in an order that changes, and the ratio of a case is the median of its rounds' ratios.
"""

import argparse
import ctypes
import datetime
import functools
import json
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch

import neutralize as nz

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
VERIFIED_SCALE = 0.7  # inexact in every format, so a wrong rounding shows
TIMED_SCALE = -1.0  # thousands of repeats neither overflow nor fade into denormals, which are slow
SAMPLE_SECONDS = 2e-3  # a sample shorter than this is repeated until it is that long


@dataclass(frozen=True)
class Case:
    """One job, done by us and by what a user would call instead, on the same tensors.

    Attributes:
        tensors: what both sides write
        ours, theirs: take the factor of those cases that scale
        reference: the same job by the specification, `neutralize.reference`
        theirs_name: how the other side reads in PyTorch
        theirs_bits: whether the other side must give the same bits (else the same values but for rounding)
        limit: the native pass over the same memory that nothing can beat, if the case is bound by memory
        moved_bytes: what that pass moves, reads and writes together, and the case at the least
        goal_ratio: least of theirs / ours
        goal_of_limit: least share of the limit's bandwidth
        least_rounds: however long they take
    """

    tensors: list[torch.Tensor]
    ours: Callable[[float], object]
    theirs: Callable[[float], object]
    reference: Callable[[float], object]
    theirs_name: str
    theirs_bits: bool = True
    limit: Callable[[], object] | None = None
    moved_bytes: int = 0
    goal_ratio: float | None = None
    goal_of_limit: float | None = None
    least_rounds: int = 15


@dataclass(frozen=True)
class Figure:
    """A number that is not a ratio of two times, and must not be large.

    Attributes:
        measure: returns it
        goal_most: the most that it may be
    """

    measure: Callable[[], float]
    goal_most: float


@dataclass
class Result:
    """Medians over the rounds of one case; spreads are the quartiles."""

    name: str
    theirs_name: str
    ours_seconds: float
    theirs_seconds: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    rounds: int
    gb_per_s: float | None = None
    of_limit: float | None = None
    of_limit_quartiles: tuple[float, float] | None = None
    limit_gb_per_s: float | None = None
    goal_ratio: float | None = None
    goal_of_limit: float | None = None
    missed: list[str] = field(default_factory=list)


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


# ---- verify --------------------------------------------------------------------------------------------------------
def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor, so that NaN equals NaN and -0 is not 0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def verify(name: str, case: Case) -> None:
    """Raise unless ours gives the bits of the reference, and theirs the same bits or values."""
    before = [tensor.clone() for tensor in case.tensors]

    def outcome(job: Callable[[float], object]) -> list[torch.Tensor]:
        job(VERIFIED_SCALE)
        after = [tensor.clone() for tensor in case.tensors]
        for tensor, old in zip(case.tensors, before, strict=True):
            tensor.copy_(old)
        return after

    ours, expected = outcome(case.ours), outcome(case.reference)
    if not all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(ours, expected, strict=True)):
        raise AssertionError(f"{name}: ours differs from the reference")
    del expected
    theirs = outcome(case.theirs)
    for a, b in zip(ours, theirs, strict=True):
        if case.theirs_bits:
            assert torch.equal(as_bytes(a), as_bytes(b)), f"{name}: {case.theirs_name} gives other bits"
        else:
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)


# ---- time ----------------------------------------------------------------------------------------------------------
def seconds_of(job: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, over `repeats` of them."""
    start = time.perf_counter()
    for _ in range(repeats):
        job()
    return (time.perf_counter() - start) / repeats


def alternate(
    jobs: dict[str, Callable[[], object]], budget_seconds: float, least_rounds: int
) -> list[dict[str, float]]:
    """Time all jobs back to back, round after round, each round in another order; seconds per call by job."""
    repeats = {}
    for name, job in jobs.items():
        job()
        repeats[name] = max(1, round(SAMPLE_SECONDS / seconds_of(job, 1)))
        repeats[name] = max(1, round(SAMPLE_SECONDS / seconds_of(job, repeats[name])))
    names, rounds = list(jobs), []
    end = time.perf_counter() + budget_seconds
    while len(rounds) < least_rounds or time.perf_counter() < end:
        names = names[1:] + names[:1] if len(rounds) % 2 else names[::-1]
        rounds.append({name: seconds_of(jobs[name], repeats[name]) for name in names})
    return rounds


def quartiles(values: list[float]) -> tuple[float, float]:
    """The 25th and the 75th percentile."""
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def run(name: str, case: Case, budget_seconds: float) -> Result:
    """Verify a case, time it, and name the goals it missed."""
    verify(name, case)
    jobs: dict[str, Callable[[], object]] = {
        "ours": lambda: case.ours(TIMED_SCALE),
        "theirs": lambda: case.theirs(TIMED_SCALE),
    }
    if case.limit:
        jobs["limit"] = case.limit
    rounds = alternate(jobs, budget_seconds, case.least_rounds)
    ratios = [each["theirs"] / each["ours"] for each in rounds]
    result = Result(
        name=name,
        theirs_name=case.theirs_name,
        ours_seconds=statistics.median(each["ours"] for each in rounds),
        theirs_seconds=statistics.median(each["theirs"] for each in rounds),
        ratio=statistics.median(ratios),
        ratio_quartiles=quartiles(ratios),
        rounds=len(rounds),
        goal_ratio=case.goal_ratio,
        goal_of_limit=case.goal_of_limit,
    )
    if case.moved_bytes:
        result.gb_per_s = case.moved_bytes / result.ours_seconds / 1e9
    if case.limit:
        shares = [each["limit"] / each["ours"] for each in rounds]
        result.of_limit, result.of_limit_quartiles = statistics.median(shares), quartiles(shares)
        result.limit_gb_per_s = case.moved_bytes / statistics.median(each["limit"] for each in rounds) / 1e9
    if case.goal_ratio is not None and result.ratio < case.goal_ratio:
        result.missed.append(f"ratio {result.ratio:.3f} < {case.goal_ratio:.3g}")
    if case.goal_of_limit is not None and result.of_limit is not None and result.of_limit < case.goal_of_limit:
        result.missed.append(f"of the limit {result.of_limit:.2f} < {case.goal_of_limit:g}")
    return result


# ---- report --------------------------------------------------------------------------------------------------------
def machine() -> dict[str, object]:
    """What the numbers depend on; nothing that names the machine."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "neutralize": metadata.version("neutralize"),
        "backend": nz.ops.backend(torch.empty(1)),
    }


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"


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
