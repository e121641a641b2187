"""Bandwidth against size, from 4 KiB to 2 GiB: ours, torch's, and the limit of the same machine in the same rounds.

    make bench                                draws docs/bandwidth.png
    python benchmarks/bandwidth.py --most 26  up to 2**26 bytes

A call on a small tensor is Python; in the middle the caches answer; on the right it is the memory. Every case is
verified at the smallest size before it is timed.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
from typing import Any

import torch

import harness
from neutralize import bench
from ops import rewriting

DOCS = pathlib.Path(__file__).parent.parent / "docs"
LEAST, MOST = 12, 31  # powers of two, bytes
OURS, THEIRS, LIMIT = "neutralize", "torch", "limit"


def case_of(op: str, size: int) -> bench.Case:
    """The case of one panel on a tensor of `size` bytes of float32, with its limit at every size."""
    x = torch.empty(size // 4).uniform_(-2, 2)
    if op == "fill":
        case = rewriting([x], lambda _: x.fill_(0.01), "fill_", fill=0.01)
        limit = harness.limit_pass("streaming_store", x, 0.01)
    else:
        case = rewriting([x], lambda scale: x.mul_(scale), "mul_", scaled=True)
        limit = harness.limit_pass("read_write", x)
    return dataclasses.replace(case, limit=limit, moved_bytes=size * (1 if op == "fill" else 2))


def point(op: str, size: int, seconds: float) -> dict[str, float]:
    """Median bandwidths in GB/s at one size."""
    case, scale = case_of(op, size), bench.TIMED_SCALE
    assert case.limit is not None
    jobs = {OURS: lambda: case.ours(scale), THEIRS: lambda: case.theirs(scale), LIMIT: case.limit}
    rounds = bench.alternate(jobs, seconds, least_rounds=7)
    medians = {job: statistics.median(each[job] for each in rounds) for job in jobs}
    return {"bytes": size, **{job: case.moved_bytes / medians[job] / 1e9 for job in jobs}}


def measure(op: str, sizes: list[int], seconds: float) -> list[dict[str, float]]:
    """Verify, then go through the sizes."""
    bench.verify(f"{op}, {sizes[0]} bytes", case_of(op, sizes[0]))
    points = []
    for size in sizes:
        points.append(point(op, size, seconds))
        print(op, *(f"{key} {value:.4g}" for key, value in points[-1].items()), flush=True)
    return points


def plot(panels: dict[str, list[dict[str, float]]], about: dict[str, Any], path: pathlib.Path) -> None:
    """Draw one panel per op."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 4), sharey=True, layout="constrained")
    styles = {LIMIT: "k--", THEIRS: "C1s-", OURS: "C0o-"}
    for axis, (op, points) in zip(axes, panels.items(), strict=True):
        for job, style in styles.items():
            # The limit starts threads in each call, so on small sizes it is none.
            shown = [point for point in points if job != LIMIT or point["bytes"] >= 1 << 24]
            axis.plot([p["bytes"] for p in shown], [p[job] for p in shown], style, label=job, markersize=4)
        axis.set(yscale="log", title=f"{op}, float32", xlabel="bytes of the tensor")
        axis.set_xscale("log", base=2)
        axis.set_xticks([1 << k for k in range(12, 32, 4)], ["4 KiB", "64 KiB", "1 MiB", "16 MiB", "256 MiB"])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("GB/s, read and written")
    axes[0].legend()
    figure.suptitle(f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=MOST, help="the largest size, as a power of two")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each point")
    parser.add_argument("--output", type=pathlib.Path, default=DOCS / "bandwidth.png", help="where the picture goes")
    numbers = harness.RESULTS / "bandwidth-latest.json"
    parser.add_argument("--numbers", type=pathlib.Path, default=numbers, help="where the JSON goes")
    options = parser.parse_args()
    sizes = [1 << power for power in range(LEAST, options.most + 1)]
    about = bench.machine()
    panels = {op: measure(op, sizes, options.seconds) for op in ("fill", "scale")}
    plot(panels, about, options.output)
    content = {"machine": about, "gb_per_s": panels}
    options.numbers.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
