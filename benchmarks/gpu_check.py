"""`make gpu-check`: on a machine with a GPU, test the CUDA kernels, check their memory accesses, then measure them.

Every figure is measured here and now, beside the limit of the same machine in the same minute: a copy for what reads
and writes, a memset for what only writes. Results go to benchmarks/results/gpu-<device>.json; nothing is written if a
test or a check fails. Without a GPU there is nothing to measure and the command says so.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import neutralize as nz
from neutralize import _native

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEVICE = "cuda"
MIB, GIB = 1 << 20, 1 << 30
SIZES = (MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB, 4 * GIB, 8 * GIB)
POOL_BYTES = GIB  # what one pass touches at the least, so that no cache holds it from pass to pass
ROUNDS = 15
LISTS = ((10, 1024), (100, 1024), (100, 16_384), (1000, 1024), (4000, 1024), (10_000, 1024))  # tensors, float32 each
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_SECONDS = 90  # for each: the whole is to take eight minutes
LEAST_OF_LIMIT, LEAST_OF_LIMIT_FROM_BYTES = 0.95, 64 * MIB  # fill and scale
LEAST_OVER_TORCH = 1.0  # everywhere
LEAST_OVER_LOOP = 8.0  # 4,000 small tensors
SCALE = -1.0  # thousands of repeats neither overflow nor fade


@dataclass(frozen=True)
class Case:
    """One op at one size: the same job by us and by torch, and the copy or memset that bounds it.

    Attributes:
        name: op and dtype
        tensors: the pool that one pass goes through
        bytes_: of one tensor of the pool
        ours, theirs, limit: do the job once, on one tensor
        moved_per_byte: 1 where it only writes, 2 where it reads and writes
        theirs_name: what torch is asked
    """

    name: str
    tensors: list[Tensor]
    bytes_: int
    ours: Callable[[Tensor], object]
    theirs: Callable[[Tensor], object]
    limit: Callable[[Tensor], object]
    moved_per_byte: int
    theirs_name: str


@dataclass(frozen=True)
class Row:
    """What was measured of one case: medians over rounds, with the quartiles of the fraction."""

    name: str
    bytes_: int
    gb_per_s: float
    limit_gb_per_s: float
    fraction_of_limit: float
    fraction_low: float
    fraction_high: float
    torch_over_ours: float
    theirs_name: str


@dataclass(frozen=True)
class ListRow:
    """One call on a list: wall-clock seconds from the call to the end of its work, and how many kernels it took."""

    name: str
    tensors: int
    numel: int
    seconds: float
    loop_over_ours: float
    foreach_over_ours: float
    launches: int


# ---- cases -----------------------------------------------------------------------------------------------------------
def pool_of(bytes_: int, dtype: torch.dtype) -> list[Tensor]:
    """Return as many tensors of this size as exceed every cache together, with random contents."""
    numel = bytes_ // dtype.itemsize
    count = max(1, POOL_BYTES // bytes_)
    return [torch.empty(numel, device=DEVICE).uniform_(-2, 2).to(dtype) for _ in range(count)]


def copy_limit(tensors: list[Tensor]) -> Callable[[Tensor], object]:
    """Return a copy that reads and writes as many bytes as an op in place on the tensor, none of them from a cache.

    Its source is the tensor farthest away in the pool; a tensor that is alone in it is larger than any cache, and its
    halves are copied onto each other.
    """
    flat = [tensor.view(-1).view(torch.uint8) for tensor in tensors]
    if len(flat) == 1:
        half = flat[0].numel() // 2
        low, high = flat[0][:half], flat[0][half : 2 * half]

        def both_halves(_: Tensor) -> object:
            low.copy_(high)
            return high.copy_(low)

        return both_halves
    pairs = {one.data_ptr(): (one, flat[at - len(flat) // 2]) for at, one in enumerate(flat)}

    def from_afar(tensor: Tensor) -> object:
        target, source = pairs[tensor.data_ptr()]
        return target.copy_(source)

    return from_afar


def memset_limit(tensor: Tensor) -> object:
    """Fill with zeros the fastest way the driver knows."""
    return tensor.zero_()


def fill_case(bytes_: int, dtype: torch.dtype) -> Case:
    """Fill: W <- 0.01."""
    tensors = pool_of(bytes_, dtype)
    return Case(
        f"fill {str(dtype).removeprefix('torch.')}",
        tensors,
        bytes_,
        lambda t: nz.ops.rewrite_(t, fill=0.01),
        lambda t: t.fill_(0.01),
        memset_limit,
        1,
        "fill_",
    )


def scale_case(bytes_: int, dtype: torch.dtype) -> Case:
    """Rescale: W <- scale * W."""
    tensors = pool_of(bytes_, dtype)

    def upcast(tensor: Tensor) -> object:
        return tensor.copy_(tensor.float().mul_(SCALE))

    one_byte = dtype.itemsize == 1
    return Case(
        f"scale {str(dtype).removeprefix('torch.')}",
        tensors,
        bytes_,
        lambda t: nz.ops.rewrite_(t, scale=SCALE),
        upcast if one_byte else lambda t: t.mul_(SCALE),
        copy_limit(tensors),
        2,
        "float, mul_, copy_" if one_byte else "mul_",
    )


def square(tensor: Tensor) -> Tensor:
    """Return the largest square matrix in it."""
    side = int(tensor.numel() ** 0.5)
    return tensor[: side * side].view(side, side)


def identity_case(bytes_: int, dtype: torch.dtype) -> Case:
    """Rewrite to the identity: W <- I."""
    tensors = [square(tensor) for tensor in pool_of(bytes_, dtype)]
    return Case(
        f"identity {str(dtype).removeprefix('torch.')}",
        tensors,
        tensors[0].numel() * dtype.itemsize,
        lambda t: nz.ops.rewrite_(t, diagonal=1.0),
        lambda t: torch.nn.init.eye_(t),
        memset_limit,
        1,
        "nn.init.eye_",
    )


def fold_case(bytes_: int, dtype: torch.dtype) -> Case:
    """Fold and rescale: b <- b + shift * W 1, W <- scale * W."""
    tensors = [square(tensor) for tensor in pool_of(bytes_, dtype)]
    bias = torch.zeros(tensors[0].shape[0], device=DEVICE, dtype=dtype)

    def theirs(weight: Tensor) -> object:
        bias.add_(weight.sum(1), alpha=0.001)
        return weight.mul_(SCALE)

    return Case(
        f"rescale_fold {str(dtype).removeprefix('torch.')}",
        tensors,
        tensors[0].numel() * dtype.itemsize,
        lambda t: nz.ops.rescale_fold_(t, bias, scale=SCALE, shift=0.001),
        theirs,
        copy_limit(tensors),
        2,
        "sum, add_, mul_",
    )


CASES: tuple[tuple[Callable[[int, torch.dtype], Case], torch.dtype], ...] = (
    (fill_case, torch.float32),
    (fill_case, torch.bfloat16),
    (scale_case, torch.float32),
    (scale_case, torch.bfloat16),
    (scale_case, torch.float16),
    (scale_case, torch.float8_e4m3fn),
    (identity_case, torch.bfloat16),
    (fold_case, torch.float32),
    (fold_case, torch.bfloat16),
)


# ---- measuring -------------------------------------------------------------------------------------------------------
def graph_of(job: Callable[[Tensor], object], tensors: list[Tensor]) -> torch.cuda.CUDAGraph:
    """Capture one pass over the pool, so that the time between launches is the GPU's and not Python's."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        job(tensors[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for tensor in tensors:
            job(tensor)
    return graph


def seconds_of(graph: torch.cuda.CUDAGraph) -> float:
    """Time one replay with device events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def measure(case: Case, rounds: int) -> Row:
    """Time limit, ours and theirs back to back in every round; a ratio is the median of its rounds' ratios."""
    graphs = {job: graph_of(getattr(case, job), case.tensors) for job in ("limit", "ours", "theirs")}
    for graph in graphs.values():
        seconds_of(graph)
    times: dict[str, list[float]] = {job: [] for job in graphs}
    for turn in range(rounds):
        jobs = list(graphs)
        for job in jobs[turn % 3 :] + jobs[: turn % 3]:
            times[job].append(seconds_of(graphs[job]))
    fractions = sorted(limit / ours for limit, ours in zip(times["limit"], times["ours"], strict=True))
    against = [theirs / ours for theirs, ours in zip(times["theirs"], times["ours"], strict=True)]
    moved = case.moved_per_byte * case.bytes_ * len(case.tensors)
    return Row(
        case.name,
        case.bytes_,
        moved / statistics.median(times["ours"]) / 1e9,
        moved / statistics.median(times["limit"]) / 1e9,
        statistics.median(fractions),
        fractions[len(fractions) // 4],
        fractions[-1 - len(fractions) // 4],
        statistics.median(against),
        case.theirs_name,
    )


def free_bytes() -> int:
    """Return how much GPU memory could be allocated."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def wall_seconds(job: Callable[[], object]) -> float:
    """Time a call from Python to the end of its work on the GPU."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    job()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def launches_of(job: Callable[[], object]) -> int:
    """Count our kernels in one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        job()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "neutralize" in event.key)


def measure_list(op: str, count: int, numel: int, rounds: int) -> ListRow:
    """Time a list in one call against a Python loop and torch's _foreach_ op."""
    tensors = [torch.ones(numel, device=DEVICE) for _ in range(count)]
    jobs: dict[str, Callable[[], object]]
    if op == "fill":
        jobs = {
            "ours": lambda: nz.ops.rewrite_(tensors, fill=0.0),
            "loop": lambda: [tensor.fill_(0.0) for tensor in tensors],
            "foreach": lambda: torch._foreach_zero_(tensors),
        }
    else:
        jobs = {
            "ours": lambda: nz.ops.rewrite_(tensors, scale=SCALE),
            "loop": lambda: [tensor.mul_(SCALE) for tensor in tensors],
            "foreach": lambda: torch._foreach_mul_(tensors, SCALE),
        }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        wall_seconds(job)
    for _ in range(rounds):
        for name, job in jobs.items():
            times[name].append(wall_seconds(job))

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times["ours"], strict=True))

    return ListRow(
        op, count, numel, statistics.median(times["ours"]), ratio("loop"), ratio("foreach"), launches_of(jobs["ours"])
    )


def measure_cases(rounds: int) -> list[Row]:
    """Measure every op at every size that fits into the GPU's memory, and print a table."""
    print(f"  {'':22}{'size':>8}{'GB/s':>9}{'limit':>9}{'of limit':>10}  {'quartiles':<13}{'torch / ours':>12}")
    rows: list[Row] = []
    for make, dtype in CASES:
        for bytes_ in SIZES:
            # A one-byte tensor is upcast to float by the other side.
            needed = max(bytes_, POOL_BYTES) * 2 + bytes_ * (8 if dtype.itemsize == 1 else 2) + GIB
            if free_bytes() < needed:
                print(f"  {make.__name__} {dtype} at {bytes_ // MIB} MiB: left out, it needs {needed // GIB} GiB free")
                continue
            row = measure(make(bytes_, dtype), rounds)
            rows.append(row)
            print(
                f"  {row.name:22}{bytes_ // MIB:>4} MiB{row.gb_per_s:>9.0f}{row.limit_gb_per_s:>9.0f}"
                f"{row.fraction_of_limit:>10.3f}  {row.fraction_low:.3f}–{row.fraction_high:.3f}"
                f"{row.torch_over_ours:>10.2f} x  {row.theirs_name}"
            )
    return rows


def measure_lists(rounds: int) -> list[ListRow]:
    """Measure lists of every length, and print a table."""
    print(f"  {'':8}{'tensors':>8}{'each':>8}{'µs':>10}{'loop / ours':>13}{'_foreach / ours':>17}{'launches':>10}")
    rows: list[ListRow] = []
    for op in ("fill", "scale"):
        for count, numel in LISTS:
            row = measure_list(op, count, numel, rounds)
            rows.append(row)
            print(
                f"  {op:8}{count:>8}{numel:>8}{row.seconds * 1e6:>10.1f}{row.loop_over_ours:>11.2f} x"
                f"{row.foreach_over_ours:>15.2f} x{row.launches:>10}"
            )
    return rows


def missed_goals(rows: list[Row], lists: list[ListRow]) -> list[str]:
    """Say which figures fall short of a goal, and by how much."""
    missed = []
    for row in rows:
        where = f"{row.name}, {row.bytes_ // MIB} MiB"
        bound = row.name.startswith(("fill", "scale")) and row.bytes_ >= LEAST_OF_LIMIT_FROM_BYTES
        if bound and row.fraction_of_limit < LEAST_OF_LIMIT:
            missed.append(f"{where}: {row.fraction_of_limit:.3f} of the limit < {LEAST_OF_LIMIT}")
        if row.torch_over_ours < LEAST_OVER_TORCH:
            missed.append(f"{where}: {row.torch_over_ours:.3f} x {row.theirs_name} < {LEAST_OVER_TORCH}")
    for each in lists:
        where = f"{each.name}, {each.tensors} tensors of {each.numel}"
        if each.tensors == 4000 and each.loop_over_ours < LEAST_OVER_LOOP:
            missed.append(f"{where}: {each.loop_over_ours:.2f} x a loop < {LEAST_OVER_LOOP}")
        if (each.tensors, each.numel) == (100, 16_384) and each.foreach_over_ours < LEAST_OVER_TORCH:
            missed.append(f"{where}: {each.foreach_over_ours:.3f} x _foreach_ < {LEAST_OVER_TORCH}")
    return missed


def save(record: dict[str, Any]) -> Path:
    """Write the record under the device's name; the file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', str(record['device'])).strip('-').lower()}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


# ---- checks ----------------------------------------------------------------------------------------------------------
def exercise() -> None:
    """Run every kernel on small tensors of awkward shapes: what the memory checker watches."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        wide = torch.ones(37, 1029, device=DEVICE).to(dtype)
        views = [wide, wide[:, 3:900], wide[5:30], wide.view(-1)[7:], torch.zeros(40_000, device=DEVICE).to(dtype)]
        for view in views:
            for scale, diagonal, fill in ((0.0, 0.0, 0.5), (0.0, 1.0, 0.0), (0.5, 0.0, 0.0), (0.5, 1.0, 0.25)):
                nz.ops.rewrite_(view, scale=scale, diagonal=diagonal, fill=fill, start=1)
        for view in views[:3]:
            nz.ops.rescale_fold_(view, torch.zeros(view.shape[0], device=DEVICE).to(dtype), scale=0.5, shift=1.0)
        nz.ops.rewrite_([torch.ones(5 + i % 90, device=DEVICE).to(dtype) for i in range(1500)], scale=0.5)
    torch.cuda.synchronize()


def sanitize() -> dict[str, str]:
    """Run the exercise under each of compute-sanitizer's tools; the outcome by tool."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return dict.fromkeys(SANITIZERS, "not run: compute-sanitizer is not on this machine")
    outcome = {}
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation of its own
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", "9"]
        try:
            result = subprocess.run(
                [*command, sys.executable, __file__, "--exercise"],
                capture_output=True,
                text=True,
                env=environment,
                check=False,
                timeout=SANITIZER_SECONDS,
            )
        except subprocess.TimeoutExpired:
            outcome[name] = f"not run to its end: longer than {SANITIZER_SECONDS} s"
            continue
        lines = [line for line in result.stdout.splitlines() if line.startswith("=========")]
        outcome[name] = "clean" if result.returncode == 0 else "\n".join(lines[-20:]) or result.stderr[-2000:]
    return outcome


def build_here() -> None:
    """Build the CUDA part for this GPU, then start over with it."""
    major, minor = torch.cuda.get_device_capability()
    environment = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", **os.environ, "NEUTRALIZE_CUDA": "1"}
    reason = _native.build_info()["cuda"]["reason"]
    print(f"gpu-check: the CUDA part is not loaded ({reason}); building it for this GPU")
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True
    )
    os.execv(sys.executable, [sys.executable, __file__, "--built", *sys.argv[1:]])


def main() -> int:
    """Test, check, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exercise", action="store_true", help="only run every kernel once: for the memory checker")
    parser.add_argument("--built", action="store_true", help="don't build, fail")
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    begin = time.perf_counter()

    if not torch.cuda.is_available():
        print(
            f"gpu-check: expected a CUDA GPU, got none that torch {torch.__version__} can use; "
            "run it on a machine with one. `make test` runs the kernels emulated and reads their machine code; "
            "no figure is estimated.",
            file=sys.stderr,
        )
        return 2
    if nz.ops.backend(torch.empty(1, device=DEVICE)) != "cuda":
        if arguments.built:
            print(f"gpu-check: the CUDA part does not load: {_native.build_info()['cuda']['reason']}", file=sys.stderr)
            return 1
        build_here()
    if arguments.exercise:
        exercise()
        return 0

    device = torch.cuda.get_device_name()
    print(f"gpu-check: {device}, torch {torch.__version__}\n\n[1/4] tests")
    tests = ["-m", "gpu", "tests/test_gpu.py", "tests/test_sharded.py"]
    if subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT, check=False).returncode:
        print("gpu-check: a test failed; nothing was measured", file=sys.stderr)
        return 1

    print("\n[2/4] memory and race checks")
    checks = sanitize()
    for name, outcome in checks.items():
        print(f"  {name:10} {outcome}")
    if any(outcome != "clean" and not outcome.startswith("not run") for outcome in checks.values()):
        print("gpu-check: a check failed; nothing was measured", file=sys.stderr)
        return 1

    print("\n[3/4] bandwidth, of the limit measured beside it (a copy, or a memset for what only writes)")
    rows = measure_cases(arguments.rounds)
    print("\n[4/4] lists in one call, wall clock")
    lists = measure_lists(arguments.rounds)
    missed = missed_goals(rows, lists)
    print("\n" + "\n".join(missed or ["every goal met"]))

    properties = torch.cuda.get_device_properties(0)
    path = save(
        {
            "device": device,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "build": _native.build_info()["built_with"],
            "archs": _native.build_info()["cuda"]["archs"],
            "checks": checks,
            "seconds": round(time.perf_counter() - begin),
            "bandwidth": [asdict(row) for row in rows],
            "lists": [asdict(each) for each in lists],
            "missed": missed,
        }
    )
    print(f"\nwritten to {path.relative_to(ROOT)} after {time.perf_counter() - begin:.0f} s")
    return int(arguments.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
