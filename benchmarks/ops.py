"""The native ops against what a user would call instead, on this machine's CPU."""

import functools
from collections.abc import Callable

import torch

import neutralize as nz
from harness import Case, limit_pass, main
from neutralize import reference

MEBI = 2**20


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
    goal_ratio: float | None = None,
    goal_of_limit: float | None = None,
) -> Case:
    """`rewrite_` with these coefficients; `scaled` passes on the factor of the run: old values are read."""

    def ours(scale: float) -> None:
        scale = scale if scaled else 0.0
        nz.ops.rewrite_(tensors, scale=scale, diagonal=diagonal, fill=fill, start=start, step=step)

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


# ---- one tensor far beyond the cache: bound by memory --------------------------------------------------------------
def fill_large() -> Case:
    x = torch.randn(128 * MEBI)
    return rewriting([x], lambda _: x.fill_(0.01), "fill_", fill=0.01, goal_ratio=1.0, goal_of_limit=0.92)


def scale_large(dtype: torch.dtype, goal_ratio: float) -> Case:
    x = torch.randn(128 * MEBI).to(dtype)
    return rewriting([x], lambda scale: x.mul_(scale), "mul_", scaled=True, goal_ratio=goal_ratio)


def scale_float8(dtype: torch.dtype) -> Case:
    x = torch.randn(64 * MEBI).to(dtype)
    return rewriting(
        [x], lambda scale: x.copy_(x.float().mul_(scale)), "float, mul_, copy_", scaled=True, goal_ratio=1.0
    )


def identity() -> Case:
    x = torch.randn(8192, 8192)
    return rewriting([x], lambda _: torch.nn.init.eye_(x), "nn.init.eye_", diagonal=1.0, goal_ratio=1.0)


def damp_towards_identity() -> Case:
    x = torch.randn(8192, 8192)

    def theirs(scale: float) -> None:
        x.mul_(scale).diagonal().add_(0.5)

    return rewriting([x], theirs, "mul_, diagonal().add_", scaled=True, diagonal=0.5, goal_ratio=0.97)


def dirac() -> Case:
    x = torch.randn(2048, 2048, 3, 3)
    return rewriting(
        [x], lambda _: torch.nn.init.dirac_(x), "nn.init.dirac_", diagonal=1.0, start=4, step=9, goal_ratio=1.0
    )


def rescale_fold(dtype: torch.dtype) -> Case:
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
        goal_ratio=1.0,
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
    return rewriting(many, lambda _: torch._foreach_zero_(many), "_foreach_zero_")


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


CASES: dict[str, Callable[[], Case]] = {
    "fill, 512 MiB float32": fill_large,
    "scale, 512 MiB float32": functools.partial(scale_large, torch.float32, 0.97),
    "scale, 256 MiB bfloat16": functools.partial(scale_large, torch.bfloat16, 1.25),
    "scale, 256 MiB float16": functools.partial(scale_large, torch.float16, 1.0),
    "scale, 64 MiB float8_e4m3fn": functools.partial(scale_float8, torch.float8_e4m3fn),
    "scale, 64 MiB float8_e5m2": functools.partial(scale_float8, torch.float8_e5m2),
    "identity, 8192² float32": identity,
    "damp towards identity, 8192² float32": damp_towards_identity,
    "Dirac, 2048×2048×3×3 float32": dirac,
    "rescale and fold, 8192² float32": functools.partial(rescale_fold, torch.float32),
    "rescale and fold, 8192² bfloat16": functools.partial(rescale_fold, torch.bfloat16),
    "fill, 4,000 tensors of 1,024 floats": fill_many,
    "zero, 4,000 tensors of 1,024 floats": zero_many,
    "scale, 4,000 tensors of 1,024 floats": scale_many,
    "fill, one tensor of 8 floats": fill_one,
}

if __name__ == "__main__":
    main(CASES, __doc__)
