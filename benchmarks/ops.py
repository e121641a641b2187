"""The native ops against what a user would call instead, on this machine's CPU."""

from collections.abc import Callable, Iterator

import torch

import neutralize as nz
from harness import Case, limit_pass, load_limits, main
from neutralize import reference

MEBI = 2**20


def rewriting(
    tensors: list[torch.Tensor],
    *,
    scaled: bool = False,
    diagonal: float = 0.0,
    fill: float = 0.0,
    start: int = 0,
    step: int = 1,
) -> dict[str, Callable[[float], object]]:
    """`rewrite_` with these coefficients, by us and by the reference; `scaled` passes on the factor of the run."""

    def ours(scale: float) -> None:
        scale = scale if scaled else 0.0
        nz.ops.rewrite_(tensors, scale=scale, diagonal=diagonal, fill=fill, start=start, step=step)

    def by_reference(scale: float) -> None:
        reference.rewrite_(tensors, [scale if scaled else 0.0], [diagonal], [fill], [start], [step])

    return {"ours": ours, "reference": by_reference}


def large_cases() -> Iterator[Case]:
    """One tensor far beyond the cache, bound by memory."""
    limits = load_limits()

    def writing(tensor: torch.Tensor) -> dict[str, object]:
        limit = limit_pass(limits, "streaming_store", tensor)
        return {"tensors": [tensor], "moved_bytes": tensor.nbytes, "limit": limit, "limit_bytes": tensor.nbytes}

    def reading(tensor: torch.Tensor) -> dict[str, object]:
        limit, both = limit_pass(limits, "read_write", tensor), 2 * tensor.nbytes
        return {"tensors": [tensor], "moved_bytes": both, "limit": limit, "limit_bytes": both}

    x = torch.randn(128 * MEBI)
    yield Case(
        "fill, 512 MiB float32",
        **writing(x),
        **rewriting([x], fill=0.01),
        theirs=lambda _: x.fill_(0.01),
        theirs_name="fill_",
        goal_ratio=1.0,
        goal_of_limit=0.92,
    )
    yield Case(
        "scale, 512 MiB float32",
        **reading(x),
        **rewriting([x], scaled=True),
        theirs=lambda scale: x.mul_(scale),
        theirs_name="mul_",
        goal_ratio=0.97,
    )
    for dtype, goal in ((torch.bfloat16, 1.25), (torch.float16, 1.0)):
        x = torch.randn(128 * MEBI).to(dtype)
        yield Case(
            f"scale, 256 MiB {str(dtype).removeprefix('torch.')}",
            **reading(x),
            **rewriting([x], scaled=True),
            theirs=lambda scale, x=x: x.mul_(scale),
            theirs_name="mul_",
            goal_ratio=goal,
        )
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        x = torch.randn(64 * MEBI).to(dtype)
        yield Case(
            f"scale, 64 MiB {str(dtype).removeprefix('torch.')}",
            **reading(x),
            **rewriting([x], scaled=True),
            theirs=lambda scale, x=x: x.copy_(x.float().mul_(scale)),
            theirs_name="float, mul_, copy_",
        )

    x = torch.randn(8192, 8192)
    yield Case(
        "identity, 8192² float32",
        **writing(x),
        **rewriting([x], diagonal=1.0),
        theirs=lambda _: torch.nn.init.eye_(x),
        theirs_name="nn.init.eye_",
        goal_ratio=1.0,
    )
    yield Case(
        "damp towards identity, 8192² float32",
        **reading(x),
        **rewriting([x], scaled=True, diagonal=0.5),
        theirs=lambda scale: x.mul_(scale).diagonal().add_(0.5),
        theirs_name="mul_, diagonal().add_",
        goal_ratio=0.97,
    )
    x = torch.randn(2048, 2048, 3, 3)
    yield Case(
        "Dirac, 2048×2048×3×3 float32",
        **writing(x),
        **rewriting([x], diagonal=1.0, start=4, step=9),
        theirs=lambda _: torch.nn.init.dirac_(x),
        theirs_name="nn.init.dirac_",
        goal_ratio=1.0,
    )
    for dtype in (torch.float32, torch.bfloat16):
        w, b = torch.randn(8192, 8192).to(dtype), torch.randn(8192).to(dtype)

        def fold_(scale: float, w: torch.Tensor = w, b: torch.Tensor = b) -> None:
            b.add_(w.sum(1), alpha=0.5)
            w.mul_(scale)

        yield Case(
            f"rescale and fold, 8192² {str(dtype).removeprefix('torch.')}",
            **{**reading(w), "tensors": [w, b]},
            ours=lambda scale, w=w, b=b: nz.ops.rescale_fold_(w, b, scale=scale, shift=0.5),
            reference=lambda scale, w=w, b=b: reference.rescale_fold_([w], [b], [scale], [0.5]),
            theirs=fold_,
            theirs_name="add_(sum), mul_",
            theirs_bits=False,
            goal_ratio=1.0,
        )


def many_cases() -> Iterator[Case]:
    """4,000 tensors of 1,024 floats, and one: bound by the cost of a call."""
    many = [torch.randn(1024) for _ in range(4000)]

    def fill_each(_: float) -> None:
        for tensor in many:
            tensor.fill_(0.01)

    yield Case(
        "fill, 4,000 tensors of 1,024 floats",
        many,
        **rewriting(many, fill=0.01),
        theirs=fill_each,
        theirs_name="loop of fill_",
        goal_ratio=2.5,
    )
    yield Case(
        "zero, 4,000 tensors of 1,024 floats",
        many,
        **rewriting(many),
        theirs=lambda _: torch._foreach_zero_(many),
        theirs_name="_foreach_zero_",
        goal_ratio=1.0,
    )
    many = [torch.randn(1024) for _ in range(4000)]
    yield Case(
        "scale, 4,000 tensors of 1,024 floats",
        many,
        **rewriting(many, scaled=True),
        theirs=lambda scale: torch._foreach_mul_(many, scale),
        theirs_name="_foreach_mul_",
        goal_ratio=3.0,
    )
    tiny = torch.randn(8)
    yield Case(
        "fill, one tensor of 8 floats",
        [tiny],
        **{**rewriting([tiny], fill=0.01), "ours": lambda _: nz.ops.rewrite_(tiny, fill=0.01)},
        theirs=lambda _: tiny.fill_(0.01),
        theirs_name="fill_",
        goal_ratio=1 / 6,
    )


def cases() -> Iterator[Case]:
    """Every case, made when its turn comes, so that one large tensor lives at a time."""
    yield from many_cases()
    yield from large_cases()


if __name__ == "__main__":
    main(cases(), __doc__)
