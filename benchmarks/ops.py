"""The native ops, plans and undo against what a user would call instead, on this machine's CPU."""

import functools
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import nn

import neutralize as nz
from harness import Figure, limit_pass, main
from neutralize import bench, reference
from neutralize.bench import MEBI, Case
from neutralize.demo import subject

rewriting = functools.partial(bench.rewriting, limit_pass=limit_pass)


# ---- one tensor far beyond the cache: bound by memory --------------------------------------------------------------
def fill_large() -> Case:
    x = torch.randn(128 * MEBI)
    return rewriting([x], lambda _: x.fill_(0.01), "fill_", fill=0.01, goal_ratio=1.05, goal_of_limit=0.92)


def zero_large() -> Case:
    x = torch.randn(128 * MEBI)
    return rewriting([x], lambda _: x.fill_(0.0), "fill_(0)", goal_ratio=1.05, goal_of_limit=0.92)


def scale_large(dtype: torch.dtype, goal_ratio: float, numel: int = 128 * MEBI) -> Case:
    x = torch.randn(numel).to(dtype)
    return rewriting([x], lambda scale: x.mul_(scale), "mul_", scaled=True, goal_ratio=goal_ratio, goal_of_limit=0.92)


def scale_float8(dtype: torch.dtype) -> Case:
    x = torch.randn(64 * MEBI).to(dtype)
    return rewriting(
        [x], lambda scale: x.copy_(x.float().mul_(scale)), "float, mul_, copy_", scaled=True, goal_ratio=15.0
    )


def identity() -> Case:
    x = torch.randn(8192, 8192)
    return rewriting(
        [x], lambda _: torch.nn.init.eye_(x), "nn.init.eye_", diagonal=1.0, goal_ratio=1.0, goal_of_limit=0.88
    )


def damp_towards_identity() -> Case:
    x = torch.randn(8192, 8192)

    def theirs(scale: float) -> None:
        x.mul_(scale).diagonal().add_(0.5)

    return rewriting([x], theirs, "mul_, diagonal().add_", scaled=True, diagonal=0.5, goal_ratio=0.97)


def dirac() -> Case:
    x = torch.randn(2048, 2048, 3, 3)
    return rewriting(
        [x],
        lambda _: torch.nn.init.dirac_(x),
        "nn.init.dirac_",
        diagonal=1.0,
        start=4,
        step=9,
        goal_ratio=3.0,
        goal_of_limit=0.85,
    )


def rescale_fold(dtype: torch.dtype, goal_ratio: float) -> Case:
    w, b = torch.randn(8192, 8192).to(dtype), torch.randn(8192).to(dtype)

    def theirs(scale: float) -> None:
        b.add_(w.sum(1), alpha=0.5)
        w.mul_(scale)

    return Case(
        [w, b],
        lambda scale: nz.ops.rescale_fold_(w, b, scale=scale, shift=0.5),
        theirs,
        lambda scale: reference.rescale_fold_([w], [b], [scale], [0.5]),
        "add_(sum), mul_",
        theirs_bits=False,  # the order of the sum is theirs
        limit=limit_pass("read_write", w),
        moved_bytes=2 * w.nbytes,
        goal_ratio=goal_ratio,
    )


# ---- small tensors: bound by the cost of a call --------------------------------------------------------------------
def four_thousand() -> list[torch.Tensor]:
    return [torch.randn(1024) for _ in range(4000)]


def fill_many() -> Case:
    many = four_thousand()

    def theirs(_: float) -> None:
        for tensor in many:
            tensor.fill_(0.01)

    return rewriting(many, theirs, "loop of fill_", fill=0.01, goal_ratio=2.5)


def zero_many() -> Case:
    many = four_thousand()
    return rewriting(many, lambda _: torch._foreach_zero_(many), "_foreach_zero_", goal_ratio=0.6)


def scale_many() -> Case:
    many = four_thousand()
    return rewriting(many, lambda scale: torch._foreach_mul_(many, scale), "_foreach_mul_", scaled=True, goal_ratio=3.0)


def fill_one() -> Case:
    x = torch.randn(8)
    return Case(
        [x],
        lambda _: nz.ops.rewrite_(x, fill=0.01),
        lambda _: x.fill_(0.01),
        lambda _: reference.rewrite_([x], [0.0], [0.0], [0.01], [0], [1]),
        "fill_",
        goal_ratio=1 / 6,
    )


def mixed() -> Case:
    """What a plan of many small layers comes to: fills, scales and identities in four dtypes, one call."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    filled, scaled, identities = (
        {dtype: [torch.randn(shape).to(dtype) for _ in range(250)] for dtype in dtypes}
        for shape in ((1024,), (1024,), (32, 32))
    )
    tensors = [tensor for kind in (filled, scaled, identities) for group in kind.values() for tensor in group]
    third = len(tensors) // 3
    fills, diagonals = [0.01] * third + [0.0] * 2 * third, [0.0] * 2 * third + [1.0] * third

    def scales(scale: float) -> list[float]:
        return [0.0] * third + [scale] * third + [0.0] * third

    def theirs(scale: float) -> None:
        for group in filled.values():
            for tensor in group:
                tensor.fill_(0.01)
        for dtype, group in scaled.items():
            if dtype.itemsize > 1:
                torch._foreach_mul_(group, scale)
                continue
            for tensor in group:
                tensor.copy_(tensor.float().mul_(scale))
        for group in identities.values():
            torch._foreach_zero_(group)
            for tensor in group:
                tensor.diagonal().fill_(1)

    return Case(
        tensors,
        lambda scale: nz.ops.rewrite_(tensors, scale=scales(scale), diagonal=diagonals, fill=fills),
        theirs,
        lambda scale: reference.rewrite_(tensors, scales(scale), diagonals, fills, [0], [1]),
        "_foreach_ and loops",
        theirs_bits=False,  # _foreach_mul_ rounds the factor to the tensors' dtype
        goal_ratio=3.0,
    )


# ---- more than one op ----------------------------------------------------------------------------------------------
def linears(count: int) -> nn.Sequential:
    """Weights of 64 MiB each, made without a copy."""
    model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False, device="meta") for _ in range(count))).to_empty(
        device="cpu"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    return model


def snapshot_and_restore() -> Case:
    model = linears(30)
    weights = [parameter.detach() for parameter in model.parameters()]
    plan = nz.plan(model, "*", strategy="constant", weight=0.01)

    def ours(_: float) -> None:
        plan.apply(model).restore()

    def theirs(_: float) -> None:
        copies = [torch.empty_like(weight).copy_(weight) for weight in weights]
        for weight in weights:
            weight.fill_(0.01)
        for weight, copy in zip(weights, copies, strict=True):
            weight.copy_(copy)

    return Case(weights, ours, theirs, lambda _: None, "copy_, fill_, copy_ back", goal_ratio=0.9, least_rounds=5)


def threads() -> Case:
    """All of torch's threads against one: the same call, so the ratio is what the threads bring."""
    w, b = torch.randn(4096, 4096).bfloat16(), torch.randn(4096).bfloat16()
    every = torch.get_num_threads()

    def fold(scale: float) -> None:
        nz.ops.rescale_fold_(w, b, scale=scale, shift=0.5)

    def on_one_thread(scale: float) -> None:
        torch.set_num_threads(1)
        fold(scale)
        torch.set_num_threads(every)

    return Case(
        [w, b],
        fold,
        on_one_thread,
        lambda scale: reference.rescale_fold_([w], [b], [scale], [0.5]),
        "one thread",
        goal_ratio=0.7 * min(every, 4) if every > 1 else None,
    )


MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import neutralize as nz
from ops import linears

def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))

model = linears(3)
plan = nz.plan(model, "*", strategy="constant", weight=0.01)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = peak_bytes()
undo = plan.apply(model)
print((peak_bytes() - before) / undo.held_bytes)
"""


def peak_over_undo() -> float:
    """What applying a plan adds to the peak of resident memory, over the bytes of its undo."""
    program = MEMORY.format(folder=str(__file__).rpartition("/")[0])
    return float(subprocess.check_output([sys.executable, "-c", program], text=True))


def rewriting_over_evaluating() -> float:
    """The share of a leave-one-out sweep over blocks of SmolLM2-135M that is rewriting and restoring."""
    smollm = subject.load(4_000)
    window = smollm.tokens[:512].view(1, 512)
    layers = [smollm.name(block) for block in (5, 25)]
    batches = [{"input_ids": window, "labels": window, "use_cache": False}]
    return nz.influence(smollm.model, layers, batches).overhead


CASES: dict[str, Callable[[], Case]] = {
    "fill, 512 MiB float32": fill_large,
    "zero, 512 MiB float32": zero_large,
    "scale, 512 MiB float32": functools.partial(scale_large, torch.float32, 0.97),
    "scale, 256 MiB bfloat16": functools.partial(scale_large, torch.bfloat16, 1.25),
    "scale, 16 MiB bfloat16": functools.partial(scale_large, torch.bfloat16, 1.25, 8 * MEBI),
    "scale, 256 MiB float16": functools.partial(scale_large, torch.float16, 1.0),
    "scale, 64 MiB float8_e4m3fn": functools.partial(scale_float8, torch.float8_e4m3fn),
    "scale, 64 MiB float8_e5m2": functools.partial(scale_float8, torch.float8_e5m2),
    "identity, 8192² float32": identity,
    "damp towards identity, 8192² float32": damp_towards_identity,
    "Dirac, 2048×2048×3×3 float32": dirac,
    "rescale and fold, 8192² float32": functools.partial(rescale_fold, torch.float32, 1.5),
    "rescale and fold, 8192² bfloat16": functools.partial(rescale_fold, torch.bfloat16, 1.8),
    "fill, 4,000 tensors of 1,024 floats": fill_many,
    "zero, 4,000 tensors of 1,024 floats": zero_many,
    "scale, 4,000 tensors of 1,024 floats": scale_many,
    "mixed, 3,000 tensors of 1,024 elements": mixed,
    "fill, one tensor of 8 floats": fill_one,
    "threads: fold, 32 MiB bfloat16": threads,
    "snapshot, fill and restore, 2 GB": snapshot_and_restore,
}

FIGURES: dict[str, Figure] = {
    "memory: what a plan adds to the peak, over its undo": Figure(peak_over_undo, 1.05),
    "influence: rewriting and restore, over evaluation (SmolLM2-135M)": Figure(rewriting_over_evaluating, 0.01),
}

if __name__ == "__main__":
    main(CASES, FIGURES, __doc__)
