"""The benchmark: both sides verified first, then timed in turn in one process, as ratios beside the memory's limit.

A case holds two callables that do the same job on the same tensors. Times on a shared machine drift by tens of per
cent within seconds, so no two numbers from different moments are ever divided: each round times ours, theirs and the
limit back to back, in an order that changes, and the ratio of a case is the median of its rounds' ratios.

``neutralize bench`` runs the cases below; ``benchmarks/`` has more of them, with goals.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import neutralize
from neutralize import ops, reference
from neutralize.bits import same_bits
from neutralize.errors import NeutralizeError

if TYPE_CHECKING:
    from rich.table import Table

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


# ---- verify ----------------------------------------------------------------------------------------------------
def verify(name: str, case: Case) -> None:
    """Check that ours gives the bits of the reference, and theirs the same bits or values.

    Raises:
        NeutralizeError: it does not.
    """
    before = [tensor.clone() for tensor in case.tensors]

    def outcome(job: Callable[[float], object]) -> list[torch.Tensor]:
        job(VERIFIED_SCALE)
        after = [tensor.clone() for tensor in case.tensors]
        for tensor, old in zip(case.tensors, before, strict=True):
            tensor.copy_(old)
        return after

    ours, expected = outcome(case.ours), outcome(case.reference)
    if not all(map(same_bits, ours, expected)):
        raise NeutralizeError(f"bench: expected the bits of the reference for {name!r}, got others; please report this")
    del expected
    theirs = outcome(case.theirs)
    for mine, yours in zip(ours, theirs, strict=True):
        if case.theirs_bits:
            same = same_bits(mine, yours)
        else:
            same = torch.allclose(mine.float(), yours.float(), rtol=2e-2, atol=2e-2)
        if not same:
            raise NeutralizeError(f"bench: expected what {case.theirs_name} gives for {name!r}, got other values")


# ---- time ----------------------------------------------------------------------------------------------------
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
    names, rounds = list(jobs), list[dict[str, float]]()
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


# ---- cases ----------------------------------------------------------------------------------------------------
MEBI = 2**20

LimitPass = Callable[[str, torch.Tensor, float], Callable[[], object]]
"""Takes ``streaming_store`` or ``read_write``, a tensor, and what a store writes; returns one pass over its memory."""


def libc_pass(name: str, tensor: torch.Tensor, value: float = 0.0) -> Callable[[], object]:
    """One pass over the memory of a tensor by the C library, on as many threads as PyTorch uses.

    Args:
        name: ``streaming_store``: one memset; ``read_write``: each half copied onto the other, which reads and writes
            every byte once.
        tensor: contiguous; its values are lost.
        value: not used: memset writes bytes.
    """
    address, size, threads = tensor.data_ptr(), tensor.nbytes, torch.get_num_threads()
    pool, half = _pool(threads), tensor.nbytes // 2
    if name == "streaming_store":
        return lambda: list(pool.map(lambda at: ctypes.memset(address + at[0], 0, at[1]), _shares(size, threads)))
    there = [(address + half + start, address + start, count) for start, count in _shares(half, threads)]
    back = [(source, target, count) for target, source, count in there]
    return lambda: [list(pool.map(lambda copy: ctypes.memmove(*copy), copies)) for copies in (there, back)]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _shares(size: int, count: int) -> list[tuple[int, int]]:
    """Starts and lengths of ``count`` parts."""
    edges = [size * place // count for place in range(count + 1)]
    return [(first, last - first) for first, last in pairwise(edges)]


def rewriting(
    tensors: list[torch.Tensor],
    theirs: Callable[[float], object],
    theirs_name: str,
    *,
    scaled: bool = False,
    diagonal: float = 0.0,
    fill: float = 0.0,
    start: int = 0,
    step: int = 1,
    limit_pass: LimitPass = libc_pass,
    goal_ratio: float | None = None,
    goal_of_limit: float | None = None,
) -> Case:
    """`rewrite_` with these coefficients; `scaled` passes on the factor of the run: old values are read."""

    def ours(scale: float) -> None:
        scale = scale if scaled else 0.0
        ops.rewrite_(tensors, scale=scale, diagonal=diagonal, fill=fill, start=start, step=step)

    def by_reference(scale: float) -> None:
        reference.rewrite_(tensors, [scale if scaled else 0.0], [diagonal], [fill], [start], [step])

    large = len(tensors) == 1 and tensors[0].nbytes >= 32 * MEBI
    return Case(
        tensors,
        ours,
        theirs,
        by_reference,
        theirs_name,
        limit=limit_pass("read_write" if scaled else "streaming_store", tensors[0], fill) if large else None,
        moved_bytes=tensors[0].nbytes * (2 if scaled else 1) if large else 0,
        goal_ratio=goal_ratio,
        goal_of_limit=goal_of_limit,
    )


def cases(most: int) -> dict[str, Callable[[], Case]]:
    """The cases of ``neutralize bench``: a tensor inside the cache, at its border and beyond it, and many small ones.

    Args:
        most: size of the largest tensor in MiB.
    """
    made: dict[str, Callable[[], Case]] = {}
    for size in sorted({min(size, most) for size in (1, 16, most)}):
        made[f"fill, {size} MiB float32"] = functools.partial(_fill, size)
        for dtype in (torch.float32, torch.bfloat16):
            made[f"scale, {size} MiB {str(dtype).removeprefix('torch.')}"] = functools.partial(_scale, size, dtype)
    made["fill, 1,000 tensors of 1,024 float32"] = _fill_many
    return made


def _fill(size: int) -> Case:
    x = torch.rand(size * MEBI // 4)
    return rewriting([x], lambda _: x.fill_(0.01), "fill_", fill=0.01)


def _scale(size: int, dtype: torch.dtype) -> Case:
    x = torch.rand(size * MEBI // dtype.itemsize).to(dtype)
    return rewriting([x], lambda factor: x.mul_(factor), "mul_", scaled=True)


def _fill_many() -> Case:
    many = [torch.rand(1024) for _ in range(1000)]

    def theirs(_: float) -> None:
        for tensor in many:
            tensor.fill_(0.01)

    return rewriting(many, theirs, "loop of fill_", fill=0.01)


# ---- report ----------------------------------------------------------------------------------------------------
def machine() -> dict[str, object]:
    """What the numbers depend on; nothing that names the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "neutralize": neutralize.__version__,
        "backend": ops.backend(torch.empty(1)),
    }


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def results_rich(results: Sequence[Result]) -> Table:
    """Results as a rich table."""
    from rich.table import Table

    table = Table(title="PyTorch's time over ours, and our share of what the memory allows")
    table.add_column("case")
    for heading in ("ours", "PyTorch", "ratio", "25-75 %", "GB/s", "of limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in results:
        table.add_row(
            f"{each.name} ({each.theirs_name})",
            duration(each.ours_seconds),
            duration(each.theirs_seconds),
            f"{each.ratio:.2f}",
            "{:.2f}-{:.2f}".format(*each.ratio_quartiles),
            "" if each.gb_per_s is None else f"{each.gb_per_s:.1f}",
            "" if each.of_limit is None else f"{each.of_limit:.2f}",
        )
    return table
