"""What the tests of the ops share: dtypes, tensors of every layout, coefficients, and equality of bits."""

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int, every_pattern: bool) -> Tensor:
    """Return numbers in [-2, 2), or any bit patterns at all: NaN, infinities and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    if not every_pattern:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 4 - 2).to(dtype)
    numel = torch.Size(shape).numel()
    words = torch.randint(0, 256, (max(numel * dtype.itemsize, 1),), generator=generator, dtype=torch.uint8)
    return words[: numel * dtype.itemsize].view(dtype).reshape(shape)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, any NaN being as good as any other."""
    bits = BITS[actual.dtype.itemsize]
    differs = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    if actual.dtype.itemsize == 1:
        nan = actual.float().isnan() & expected.float().isnan()
    else:
        nan = actual.isnan() & expected.isnan()
    wrong = (differs & ~nan).nonzero()
    assert len(wrong) == 0, f"{len(wrong)} elements differ, the first at {wrong[0].tolist()}"


# Whole tensors, Dirac kernels, column and row blocks of a wider matrix, and rows of every misalignment.
VIEWS = {
    "vector": lambda dtype, seed: random_tensor(dtype, (65_537,), seed, True),
    "misaligned": lambda dtype, seed: random_tensor(dtype, (65_540,), seed, True)[3:],
    "linear": lambda dtype, seed: random_tensor(dtype, (257, 300), seed, True),
    "convolution": lambda dtype, seed: random_tensor(dtype, (40, 20, 3, 3), seed, True),
    "columns": lambda dtype, seed: random_tensor(dtype, (70, 400), seed, True)[:, 33:290],
    "rows": lambda dtype, seed: random_tensor(dtype, (70, 401), seed, True)[5:60],
    "empty": lambda dtype, seed: random_tensor(dtype, (0, 7), seed, True),
}
REWRITES = (
    # scale, diagonal, fill, start, step
    (0.0, 0.0, 0.01, 0, 1),
    (0.0, 1.0, 0.0, 0, 1),
    (0.0, 1.0, 0.0, 4, 9),
    (-0.7, 0.0, 0.0, 0, 1),
    (0.3, 0.7, 0.0, 0, 1),
    (1.5, -1.0, 0.25, 60, -1),
    (0.0, 1.0, -0.5, -7, 3),
)
FOLD_SHAPES = ((9, 1000, 0), (33, 129, 3), (8, 4099, 0), (3, 0, 0), (70, 31, 1))  # rows, cols, first column of a block
FOLDS = ((0.5, -1.5), (1.0, 0.25), (0.0, 1.0), (-3.0, 0.0))  # scale, shift
