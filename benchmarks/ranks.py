"""What applying a plan costs on 1, 2 and 4 processes: bytes that each writes, messages and their size, seconds.

    make bench-ranks                          saved in benchmarks/results/ranks-latest.json

The model's blocks are sharded with FSDP2. Every application is verified first: gathered, it has the bits of the plan
applied to the whole model, and restored, those from before. Processes share one machine here: the seconds say what
agreeing costs, not what a network does.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import pickle
import platform
import socket
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import neutralize as nz
from neutralize.bits import same_bits
from neutralize.distributed import team
from neutralize.distributed.part import parts_of
from neutralize.plan import Rewrite

RESULTS = Path(__file__).parent / "results"
WORLDS = (1, 2, 4)
ROUNDS = 7


class Block(nn.Module):
    """x + W₂ silu(W₁ x̂), x̂ the RMS norm of x."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the branch."""
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


def model_of(width: int, inner: int, depth: int) -> nn.Sequential:
    """Blocks in bfloat16, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width, inner) for _ in range(depth))).to(torch.bfloat16)


def measured(world: int, width: int, inner: int, depth: int, edit: str) -> dict[str, Any]:
    """Verify and time one plan in this process."""
    model = model_of(width, inner, depth)
    plan = nz.plan(model, "[1:3]", edit=edit, example_inputs=torch.ones(1, 2, width, dtype=torch.bfloat16))
    expected = copy.deepcopy(model)
    plan.apply(expected)
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    undo = plan.apply(model)
    gathered = {name: p.full_tensor() if world > 1 else p.detach() for name, p in model.named_parameters()}
    assert all(same_bits(gathered[name], p.detach()) for name, p in expected.named_parameters())
    undo.restore()
    parts, _ = parts_of(plan, dict(model.named_parameters()), {}, {})
    written = sum(
        placed.window(parts[edit.parameter].local).numel() * 2
        for edit in plan.edits
        for placed in (parts[edit.parameter].block(edit) if isinstance(edit, Rewrite) else [])
    )
    sizes: list[int] = []
    dumps = pickle.dumps

    def counted(content: Any) -> bytes:
        data = dumps(content)
        sizes.append(len(data))
        return data

    team.pickle.dumps = counted  # type: ignore[attr-defined]
    plan.apply(model).restore()
    team.pickle.dumps = dumps  # type: ignore[attr-defined]
    applying, restoring = [], []
    for _ in range(ROUNDS):
        if world > 1:
            dist.barrier()
        began = time.perf_counter()
        undo = plan.apply(model)
        middle = time.perf_counter()
        undo.restore()
        applying.append(middle - began)
        restoring.append(time.perf_counter() - middle)
    return {
        "processes": world,
        "edit": edit,
        "plan_bytes": plan.written_bytes,
        "bytes_per_process": written,
        "messages": len(sizes),
        "message_bytes": max(sizes, default=0),
        "apply_s": statistics.median(applying),
        "restore_s": statistics.median(restoring),
    }


def serve(pipe: Any, rank: int, world: int, port: int, sizes: tuple[int, int, int]) -> None:
    """Measure in one process of a group."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    pipe.send([measured(world, *sizes, edit) for edit in ("cheapest", "outgoing")])


def run(world: int, sizes: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Start the processes; return the slowest of them for each plan."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, rank, world, port, sizes))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    answers = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return [max(rows, key=lambda row: row["apply_s"]) for rows in zip(*answers, strict=True)]


def main() -> None:
    """Measure, print a table, save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS / "ranks-latest.json")
    options = parser.parse_args()
    sizes = (options.width, options.inner, options.depth)
    rows = [row for world in WORLDS for row in run(world, sizes)]
    print("processes  edit       plan MB  MB per process  messages  bytes each  apply ms  restore ms")
    for row in rows:
        print(
            f"{row['processes']:9}  {row['edit']:9}  {row['plan_bytes'] / 1e6:7.3f}  "
            f"{row['bytes_per_process'] / 1e6:14.3f}  {row['messages']:8}  {row['message_bytes']:10}  "
            f"{row['apply_s'] * 1e3:8.2f}  {row['restore_s'] * 1e3:10.2f}"
        )
    content = {"date": date.today().isoformat(), "machine": platform.machine(), "cpus": os.cpu_count(),
               "torch": torch.__version__, "sizes": sizes, "results": rows}  # fmt: skip
    options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
