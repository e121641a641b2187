"""The native kernels against the reference: shapes, dtypes, layouts, every rounding, every refusal."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from neutralize import _native, ops, reference
from neutralize.errors import NeutralizeError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]

# rows, columns: none, one, around 2^16, odd, square, narrow, wide; the last is cut between threads.
SHAPES = [(), (0,), (0, 4), (4, 0), (1,), (1, 1), (65535,), (1, 65536), (65537, 1), (257, 255), (64, 64), (3, 1001)]
SHAPES += [(7, 5, 3, 3), (1001, 1003)]

# scale, diagonal, fill, start, step
COEFFICIENTS = [
    (0.0, 0.0, 0.0, 0, 1),
    (0.0, 0.0, 0.01, 0, 1),
    (0.0, 1.0, 0.0, 0, 1),
    (0.0, 1.0, 1e-3, 4, 9),
    (0.7, 0.0, 0.0, 0, 1),
    (0.7, 0.0, 0.3, 0, 1),
    (0.7, 0.3, 0.0, 1, 2),
    (-1.1, 0.5, 0.1, 60, -1),
    (1.0, 0.25, 0.0, 0, 0),
    (1.0, 0.0, 0.0, 0, 1),
    (1.0, 1.0, 0.0, -(2**61), 2**40),
]


def values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Numbers of all sizes, with zeros of both signs, infinities where the dtype has them, and NaN."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    tensor = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-20, 20, shape, generator=generator)
    flat = tensor.reshape(-1)
    for i, special in enumerate((0.0, -0.0, math.inf, -math.inf, math.nan)):
        flat[i::97] = special
    return flat.reshape(shape).to(dtype).to(device)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, context: object = None) -> None:
    """Bit for bit, where any NaN counts as any other."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[actual.dtype.itemsize]
    differ = actual.contiguous().view(kind) != expected.contiguous().view(kind)
    if differ.any():
        differ &= ~(actual.contiguous().double().isnan() & expected.contiguous().double().isnan())
        where = differ.nonzero()
        assert not len(where), f"{context}: {len(where)} differ, first at {where[0].tolist()}"


def stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What .to() of torch >= 2.13 gives; earlier ones turn what is too large for float8_e4m3fn into NaN."""
    return (values.clamp(-448, 448) if dtype == torch.float8_e4m3fn else values).to(dtype)


def both(tensor: torch.Tensor, coefficients: tuple[float, float, float, int, int], context: object = None) -> None:
    """Rewrite a copy by the reference, one through the dispatcher, and the tensor by ops, and compare."""
    expected = tensor.clone()
    reference.rewrite_([expected], *[[c] for c in coefficients])
    dispatched = tensor.clone()
    if ops.backend(dispatched) != "torch":
        torch.ops.neutralize.rewrite_([dispatched], *[[c] for c in coefficients])
        assert_same_bits(dispatched, expected, context or coefficients)
    scale, diagonal, fill, start, step = coefficients
    ops.rewrite_(tensor, scale=scale, diagonal=diagonal, fill=fill, start=start, step=step)
    assert_same_bits(tensor, expected, context or coefficients)


# ---- rewrite_ --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rewrite_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    tensor = values(shape, dtype, device)
    assert ops.backend(tensor) in (device.type, "torch")
    for coefficients in COEFFICIENTS:
        both(tensor.clone(), coefficients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rewrite_misaligned(dtype: torch.dtype, device: torch.device) -> None:
    """Every start and end within a vector: heads and tails of the loops, and nothing written beside them."""
    for first in range(0, 70, 3):
        for length in (0, 1, 5, 63, 64, 65, 200, 700):
            whole = values((800,), dtype, device)
            before = whole.clone()
            both(whole[first : first + length], (0.7, 0.0, 0.3, 0, 1))
            both(whole[first : first + length], (0.0, 0.5, 0.1, 0, 0))
            assert_same_bits(whole[:first], before[:first])
            assert_same_bits(whole[first + length :], before[first + length :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rewrite_blocks_of_a_matrix(dtype: torch.dtype, device: torch.device) -> None:
    """Row and column slices are rewritten in place by the kernels; their surroundings stay."""
    for rows, cols in ((slice(3, 90), slice(None)), (slice(None), slice(5, 60)), (slice(2, 99, 3), slice(1, 2))):
        for coefficients in COEFFICIENTS:
            whole = values((100, 77), dtype, device)
            expected = whole.clone()
            block = whole[rows, cols]
            assert ops.backend(block) in (device.type, "torch")
            assert ops.backend(block) == ops.backend(whole)
            dense = block.clone(memory_format=torch.contiguous_format)
            reference.rewrite_([dense], *[[c] for c in coefficients])
            expected[rows, cols] = dense
            both(block, coefficients)
            assert_same_bits(whole, expected, coefficients)


def test_rewrite_large_blocks_across_threads() -> None:
    """Cuts between threads, in contiguous memory and in rows that are apart."""
    for view in (lambda t: t, lambda t: t[:, 3:1900], lambda t: t[1:, :5]):
        for coefficients in COEFFICIENTS:
            both(view(values((1500, 2000), torch.float32)), coefficients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_layouts_go_through_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    for view in (lambda t: t.t(), lambda t: t[:, ::2], lambda t: t.view(6, 5, 4).permute(2, 0, 1)):
        tensor = view(values((12, 10), dtype, device))
        assert ops.backend(tensor) == "torch"
        for coefficients in COEFFICIENTS:
            dense = tensor.clone(memory_format=torch.contiguous_format)
            ops.rewrite_(
                [dense, tensor],
                scale=coefficients[0],
                diagonal=coefficients[1],
                fill=coefficients[2],
                start=coefficients[3],
                step=coefficients[4],
            )
            assert_same_bits(tensor, dense, coefficients)


def test_a_view_off_its_alignment_goes_through_the_reference() -> None:
    tensor = torch.frombuffer(bytearray(41), dtype=torch.float32, offset=1)
    assert ops.backend(tensor) == "torch"
    ops.rewrite_(tensor, fill=2.0)
    assert tensor.tolist() == [2.0] * 10


def test_rewrite_a_mixed_list(device: torch.device) -> None:
    """More tensors than a launch holds, of all dtypes, shapes and layouts, each with its own coefficients."""
    tensors, expected = [], []
    for i in range(5000):
        shape = [(3,), (4, 4), (2, 3, 2), (0,), (), (17, 5)][i % 6]
        tensor = values(shape, DTYPES[i % 5], device)
        if i % 11 == 0 and tensor.dim() == 2:
            tensor = tensor.t()
        tensors.append(tensor)
        expected.append(tensor.clone())
    coefficients = [COEFFICIENTS[i % len(COEFFICIENTS)] for i in range(5000)]
    scale, diagonal, fill, start, step = (list(column) for column in zip(*coefficients, strict=True))
    ops.rewrite_(tensors, scale=scale, diagonal=diagonal, fill=fill, start=start, step=step)
    for i, (tensor, copy) in enumerate(zip(tensors, expected, strict=True)):
        reference.rewrite_([copy], *[[c] for c in coefficients[i]])
        assert_same_bits(tensor, copy, i)


def test_rewrite_accepts_what_sequences_look_like() -> None:
    tensors = tuple(torch.zeros(2, 2) for _ in range(2))
    ops.rewrite_(iter(tensors), fill=np.array([1.0, 2.0]), start=np.int64(0), step=torch.tensor(1))
    assert [t[0, 0].item() for t in tensors] == [1.0, 2.0]
    ops.rewrite_({"a": tensors[0], "b": tensors[1]}.values(), fill=3)
    assert all(t.eq(3).all() for t in tensors)
    ops.rewrite_([])
    ops.rescale_fold_([], [], scale=1.0, shift=0.0)
    module = torch.nn.Linear(3, 3)
    ops.rewrite_(module.parameters(), diagonal=1.0)
    assert torch.equal(module.weight, torch.eye(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_zero_does_not_read(dtype: torch.dtype, device: torch.device) -> None:
    tensor = torch.full((130, 130), math.nan).to(dtype).to(device)
    ops.rewrite_(tensor, diagonal=1.0)
    assert torch.equal(tensor.float().cpu(), torch.eye(130))


def test_streaming_fill_beyond_the_cache() -> None:
    """What exceeds the last-level cache is written around it; a diagonal then lands on those lines."""
    cache = _native.build_info()["cpu"]["last_level_cache_bytes"] or (32 << 20)
    if cache > (256 << 20):
        pytest.skip("a cache of more than 256 MiB")
    side = math.isqrt(cache // 4) + 129
    tensor = torch.full((side, side), math.nan)
    ops.rewrite_([tensor[:100], tensor[100:]], diagonal=2.0, fill=0.5, start=[1, 101])
    diagonal = tensor.diagonal(offset=1)
    assert diagonal.eq(2.5).all()
    diagonal.fill_(0.5)
    assert tensor.eq(0.5).all()
    ops.rewrite_(tensor[:, 1:], fill=-1.0)
    assert tensor[:, 0].eq(0.5).all()
    assert tensor[:, 1:].eq(-1.0).all()


def test_more_than_two_to_the_31_elements() -> None:
    """Sizes and offsets of 64 bits, in a dtype of one byte; looked at around the ends and around 2^31."""
    if not _native.cpu_isas():
        pytest.skip("no native extension in this install; the reference has no sizes of its own")
    rows, cols = 65_538, 32_771  # 2,147,746,... elements: a little more than 2^31, in rows of odd length
    assert rows * cols > 2**31
    bits = torch.empty(rows, cols, dtype=torch.uint8)
    tensor = bits.view(torch.float8_e4m3fn)
    ops.rewrite_(tensor, diagonal=2.0, fill=1.0, start=-(rows - cols))  # ends in the last corner
    one, three = 0x38, 0x44

    def look(expected: int, expected_one: int) -> None:
        flat = bits.view(-1)
        for around in (0, 2**31, rows * cols):
            begin, end = max(around - 100_000, 0), min(around + 100_000, rows * cols)
            piece = flat[begin:end]
            index = torch.arange(begin, end)
            on_diagonal = index % cols == index // cols - (rows - cols)
            assert piece[on_diagonal].eq(expected_one).all()
            assert piece[~on_diagonal].eq(expected).all()
        assert bits[-1, -1] == expected_one
        assert on_diagonal.any()

    look(one, three)
    ops.rewrite_(tensor, scale=2.0)
    look(0x40, 0x4C)


# ---- rounding --------------------------------------------------------------------------------------------------------
def all_codes(dtype: torch.dtype) -> torch.Tensor:
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(5).view(dtype)  # enough for the table


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FP8], ids=str)
def test_every_code_through_scale(dtype: torch.dtype, cpu_isa: str) -> None:
    codes = all_codes(dtype)
    for scale in (1.5, -0.3, 1 / 3, 2.0**-9, 2.0**-20, 1e3, 3e38, 1 + 2.0**-11, 0.5, -1.0):
        for fill in (0.0, 0.1):
            for tensor in (codes.clone(), codes[3:250].clone()):  # by table and one by one
                product = tensor.float() * torch.tensor(scale)
                expected = stored(product + fill if fill else product, dtype)
                ops.rewrite_(tensor, scale=scale, fill=fill)
                assert_same_bits(tensor, expected, (scale, fill))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FP8], ids=str)
def test_rounding_is_torchs(dtype: torch.dtype, cpu_isa: str) -> None:
    """Float to small type: as .to() does, over ties, subnormals and overflow. Each value enters as a fill and, scaled
    up from a code of the type to the float in question, through the rounding of the loops."""
    codes = all_codes(dtype).float()
    numbers = codes[codes.isfinite()].unique()
    ties = ((numbers[1:].double() + numbers[:-1].double()) / 2).float()
    near = torch.cat([ties, ties.nextafter(torch.tensor(math.inf)), ties.nextafter(torch.tensor(-math.inf))])
    largest = numbers.max()
    tail = torch.tensor([1.0, 1.01, 1.02, 1.03, 1.0357, 1.04, 1.0713, 1.08, 1.1, 1.125, 1.2, 2.0, 4.0, 1e9]) * largest
    chosen = torch.cat([near[:: max(len(near) // 3000, 1)], tail[tail.isfinite()], -tail[tail.isfinite()]])
    expected = stored(chosen, dtype)
    tensors = [torch.ones(1, dtype=dtype) for _ in range(len(chosen))]
    ops.rewrite_(tensors, fill=chosen.tolist())
    assert_same_bits(torch.cat([t.view(torch.uint8) for t in tensors]).view(dtype), expected, "fill")
    # 1 * value + 0: every lane of a vector, not only heads and tails.
    integer = torch.uint8 if dtype.itemsize == 1 else torch.int16
    tensors = [torch.ones(67, dtype=dtype) for _ in range(0, len(chosen), 5)]
    ops.rewrite_(tensors, scale=chosen[::5].tolist())
    for tensor, value, code in zip(tensors, chosen[::5], expected[::5], strict=True):
        assert_same_bits(tensor, code.view(integer).repeat(67).view(dtype), value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_agree(dtype: torch.dtype, cpu_isa: str) -> None:
    for shape in ((513, 300), (9, 1300), (5000,), (3, 5, 7), (70, 1)):
        for coefficients in COEFFICIENTS:
            both(values(shape, dtype), coefficients, (cpu_isa, shape, coefficients))
        if len(shape) > 1:
            for scale in (0.7, -1.5, 1.0, 0.0):
                fold_both(finite(shape, dtype), finite(shape[:1], dtype), scale, 0.3, (cpu_isa, shape, scale))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "plain", "mmx"])
def test_instruction_set_by_environment(isa: str) -> None:
    if not _native.cpu_isas():
        pytest.skip("no native extension in this install")
    code = "import torch\nfrom neutralize import _native, ops\nt = torch.zeros(2)\nops.rewrite_(t, fill=1)\n"
    code += "print(_native.build_info()['cpu']['isa'])"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "NEUTRALIZE_CPU_ISA": isa}, capture_output=True, text=True
    )
    if isa in _native.cpu_isas():
        assert result.stdout.strip() == isa
    else:
        assert result.returncode != 0
        assert (
            f"expected one of auto, {', '.join(_native.cpu_isas())} for NEUTRALIZE_CPU_ISA, got {isa}" in result.stderr
        )


# ---- threads ---------------------------------------------------------------------------------------------------------
class ThreadsOfAWorker(torch.utils.data.Dataset):
    """Its one item: torch's threads, and the threads of the process before and after a large rewrite."""

    def __len__(self):
        return 1

    def __getitem__(self, _):
        tensor = torch.zeros(16 << 20)
        before = len(os.listdir("/proc/self/task"))
        ops.rewrite_(tensor, fill=1.0)
        return torch.get_num_threads(), before, len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no Linux to count the threads of")
def test_a_worker_of_a_dataloader_starts_no_threads():
    loader = torch.utils.data.DataLoader(ThreadsOfAWorker(), num_workers=1, multiprocessing_context="spawn")
    (item,) = loader
    threads, before, after = (int(number) for number in item)
    assert threads == 1
    assert after == before


# ---- past the dispatcher ---------------------------------------------------------------------------------------------
FILL = ([0.0], [0.0], [1.5], [0], [1])


@pytest.fixture
def direct():
    """The short way in; skipped where this build or torch has none."""
    if not _native.rewrite_direct([torch.zeros(1)], *FILL):
        pytest.skip("no native extension, or a torch without the DLPack exchange table")
    return _native.rewrite_direct


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3, 4).t(),
        lambda: torch.randn(2).expand(3, 2),
        lambda: torch.randn(3).to(torch.float8_e4m3fnuz),
        lambda: torch.zeros(3, dtype=torch.int32),
        lambda: torch.zeros(3, dtype=torch.complex64),
        lambda: torch.randn(3, 3).to_sparse(),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch._to_functional_tensor(torch.zeros(3)),
    ],
    ids=["strides", "expanded", "fnuz", "integers", "complex", "sparse", "meta", "functional"],
)
def test_the_short_way_leaves_to_the_dispatcher_what_it_cannot_judge(direct, make) -> None:
    plain, odd = torch.zeros(3), make()
    assert not direct([plain, odd], *FILL)
    assert plain.eq(0).all()


def test_the_short_way_under_torch_func(direct) -> None:
    answers = []

    def look(x: torch.Tensor) -> torch.Tensor:
        answers.append(direct([x], *FILL))
        return x.sum()

    torch.vmap(look)(torch.zeros(2, 3))
    torch.func.grad(look)(torch.zeros(3))
    torch.func.functionalize(look)(torch.zeros(3))
    assert answers == [False] * 3


def test_the_short_way_copies_what_is_copied_on_write(direct) -> None:
    original = torch.zeros(3)
    assert direct([torch._lazy_clone(original)], *FILL)
    assert original.eq(0).all()


def test_who_watches_sees_the_op() -> None:
    """Modes and profilers see nothing of the short way, so it is not taken under them."""

    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    weight = torch.zeros(3)
    with Watch():
        ops.rewrite_(weight, fill=1.0)
    assert seen == ["neutralize.rewrite_.default"]
    with torch.profiler.profile() as profile:
        ops.rewrite_(weight, fill=2.0)
    assert "neutralize::rewrite_" in [event.name for event in profile.events()]
    assert weight.eq(2).all()


# ---- rescale_fold_ ---------------------------------------------------------------------------------------------------
def finite(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def fold_both(weight: torch.Tensor, bias: torch.Tensor, scale: float, shift: float, context: object = None) -> None:
    expected_weight, expected_bias = weight.clone(), bias.clone()
    reference.rescale_fold_([expected_weight], [expected_bias], [scale], [shift])
    ops.rescale_fold_(weight, bias, scale=scale, shift=shift)
    assert_same_bits(weight, expected_weight, ("weight", context))
    assert_same_bits(bias, expected_bias, ("bias", context))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_shapes(dtype: torch.dtype, device: torch.device) -> None:
    shapes = [
        (0, 3),
        (3, 0),
        (1, 1),
        (5,),
        (3, 63),
        (3, 64),
        (3, 65),
        (2, 511),
        (2, 512),
        (2, 1025),
        (4, 3, 3, 3),
        (999, 1000),
    ]
    for shape in shapes:
        for scale, shift in ((0.7, 0.3), (0.0, 0.3), (1.0, -2.0), (0.5, 0.0)):
            fold_both(
                finite(shape, dtype, device), finite(shape[:1], dtype, device), scale, shift, (shape, scale, shift)
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_layouts(dtype: torch.dtype, device: torch.device) -> None:
    base = finite((40, 50), dtype, device)
    fold_both(base[:, 3:37], finite((40,), dtype, device), 0.7, 0.3)  # a block, by the kernels
    fold_both(finite((40, 50), dtype, device), base[:, 0], 0.7, 0.3)  # a bias that is a column
    fold_both(base.t(), finite((50,), dtype, device), 0.7, 0.3)  # by the reference


def test_fold_a_list(device: torch.device) -> None:
    shapes = [(3, 4), (5, 700), (0, 2), (2, 3, 3), (6,)] * 300
    weights = [finite(shape, DTYPES[i % 5], device) for i, shape in enumerate(shapes)]
    biases = [finite(shape[:1], DTYPES[i % 5], device) for i, shape in enumerate(shapes)]
    weights[6] = finite((700, 5), DTYPES[1], device).t()
    copies = [t.clone() for t in weights], [t.clone() for t in biases]
    scale, shift = [0.5 + i % 3 for i in range(len(shapes))], [float(i % 4) for i in range(len(shapes))]
    ops.rescale_fold_(weights, biases, scale=scale, shift=shift)
    reference.rescale_fold_(*copies, scale, shift)
    for i, pair in enumerate(zip(weights + biases, copies[0] + copies[1], strict=True)):
        assert_same_bits(*pair, i)


def test_fold_is_right() -> None:
    """Against the definition in float64: x = a z + c before a Linear layer."""
    weight, bias = finite((50, 70), torch.float64), finite((50,), torch.float64)
    z = finite((8, 70), torch.float64)
    before = torch.nn.functional.linear(0.5 * z + 3.0, weight, bias)
    ops.rescale_fold_(weight, bias, scale=0.5, shift=3.0)
    assert torch.allclose(torch.nn.functional.linear(z, weight, bias), before, rtol=1e-12)


# ---- refusals --------------------------------------------------------------------------------------------------------
class Quantized(torch.Tensor):
    """A wrapper whose memory is elsewhere."""

    @staticmethod
    def __new__(cls) -> "Quantized":
        return torch.Tensor._make_wrapper_subclass(cls, (2, 2))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("an op has reached the wrapper")


class Named(torch.nn.Parameter):
    """A parameter with more attributes, as serving engines have them: plain memory all the same."""


BASE = torch.ones(6, 6)
NAMES = "float64, float32, float16, bfloat16, float8_e4m3fn, float8_e5m2"
REFUSED_TENSORS = [
    (lambda: 3, "rewrite_: expected a tensor or a sequence of tensors for tensors, got int; pass torch tensors"),
    (lambda: "ab", "rewrite_: expected a tensor or a sequence of tensors for tensors, got str; pass torch tensors"),
    (lambda: [np.ones(2)], "rewrite_: expected a tensor for tensors[1], got ndarray; pass torch tensors"),
    *[
        (
            lambda dtype=dtype: [torch.zeros(2, dtype=dtype)],
            f"rewrite_: expected one of {NAMES} for the dtype of tensors[1], got {str(dtype)[6:]}; dequantize "
            f"or cast it "
            "first",
        )
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fnuz)
    ],
    (
        lambda: [torch.zeros(2, device="meta")],
        "rewrite_: expected a tensor with memory for tensors[1], got one on the meta device; load the weights first",
    ),
    (
        lambda: [torch.zeros(2, 2).to_sparse()],
        "rewrite_: expected a dense tensor for tensors[1], got torch.sparse_coo; call to_dense() first",
    ),
    (
        lambda: [torch._efficientzerotensor(2)],
        "rewrite_: expected a tensor with memory for tensors[1], got one without, or with too little (freed, inside "
        "torch.vmap, or all zeros by construction); gather or clone it first",
    ),
    (
        lambda: [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])],
        "rewrite_: expected a dense tensor for tensors[1], got a nested one; call to_dense() first",
    ),
    (
        lambda: [Quantized()],
        "rewrite_: expected a plain tensor for tensors[1], got the subclass Quantized; rewrite the plain "
        "tensors inside it",
    ),
    (
        lambda: [torch.nn.LazyLinear(3).weight],
        "rewrite_: expected a tensor with memory for tensors[1], got UninitializedParameter; run the lazy "
        "module once first",
    ),
    (
        lambda: [BASE, BASE],
        "rewrite_: expected tensors with memory of their own, got tensors[1] and tensors[2] sharing some; name "
        "shared memory "
        "once, it would be rewritten twice",
    ),
    (lambda: [BASE[:3], BASE[2:]], "got tensors[1] and tensors[2] sharing some"),
    (lambda: [BASE[:, :3], BASE[:, 2:]], "got tensors[1] and tensors[2] sharing some"),
    (lambda: [BASE[:, :3], BASE[2]], "got tensors[1] and tensors[2] sharing some"),
    (lambda: [BASE.t(), BASE], "got tensors[1] and tensors[2] sharing some"),
    (lambda: [BASE[::2], BASE[::3]], "got tensors[1] and tensors[2] sharing some"),
    (lambda: [BASE.view(-1)[:8].view(torch.bfloat16), BASE[1]], "got tensors[1] and tensors[2] sharing some"),
    (
        lambda: [torch.ones(1, 3).expand(4, 3)],
        "rewrite_: expected memory of its own for every element of tensors[1], got elements that share memory "
        "(an expanded "
        "tensor?); call contiguous() first",
    ),
    (lambda: [BASE.as_strided((4, 3), (2, 1))], "got elements that share memory"),
]


@pytest.mark.parametrize(
    ("make", "message"), REFUSED_TENSORS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_refused_tensors(make, message: str) -> None:
    """One bad tensor at the end of the list, and nothing in the list is written."""
    first = torch.full((3,), 7.0)
    BASE.fill_(1.0)
    bad = make()
    with pytest.raises(NeutralizeError) as caught:
        ops.rewrite_([first, *bad] if isinstance(bad, list) else bad, scale=2.0)
    assert message in str(caught.value)
    assert first.tolist() == [7.0] * 3
    assert first._version == 0
    assert BASE.eq(1.0).all()


ACCEPTED_TOGETHER = [
    lambda: [BASE[:, :3], BASE[:, 3:]],
    lambda: [BASE[:2], BASE[2:]],
    lambda: [BASE[:3, :3], BASE[3:, :3], BASE[:3, 3:], BASE[3:, 3:]],
    lambda: [BASE[:2, 1:4], BASE[3:, :3]],
    lambda: [BASE[::2], BASE[1::2]],
    lambda: [BASE[:, ::2], BASE[:, 1::2]],
    lambda: [BASE.t()[:3], BASE.t()[3:]],
    lambda: [BASE.as_strided((2, 3), (3, 2))],
    lambda: [BASE[0], BASE[1:].t()],
    lambda: [BASE.view(-1)[:6].view(torch.float64), BASE[1]],
    lambda: [torch.ones(0), torch.ones(0), BASE],
    lambda: [Named(torch.ones(2, 2)), BASE],
]


@pytest.mark.parametrize("make", ACCEPTED_TOGETHER)
def test_accepted_together(make) -> None:
    BASE.fill_(1.0)
    tensors = make()
    ops.rewrite_(tensors, fill=2.0)
    assert all(tensor.eq(2.0).all() for tensor in tensors)


REFUSED_COEFFICIENTS = [
    ({"scale": math.nan}, "rewrite_: expected a finite number for scale, got nan; pass finite coefficients"),
    ({"fill": -math.inf}, "rewrite_: expected a finite number for fill, got -inf; pass finite coefficients"),
    (
        {"diagonal": [1.0, math.inf]},
        "rewrite_: expected a finite number for diagonal, got inf; pass finite coefficients",
    ),
    ({"fill": 10**400}, "rewrite_: expected a finite number for fill, got inf; pass finite coefficients"),
    (
        {"scale": 1e39},
        "rewrite_: expected a number that float32 holds for scale, got 1e+39 for tensors[0]; pass a smaller one",
    ),
    (
        {"diagonal": 3e38, "fill": 3e38},
        "expected a number that float32 holds for diagonal + fill, got 6e+38 for tensors[0]",
    ),
    (
        {"scale": [1.0]},
        "rewrite_: expected one number or a sequence of 2 numbers for scale, got a sequence of 1; "
        "pass one for all tensors or one for each",
    ),
    (
        {"scale": [1.0] * 3},
        "rewrite_: expected one number or a sequence of 2 numbers for scale, got a sequence of 3; "
        "pass one for all tensors or one for each",
    ),
    (
        {"step": [1] * 3},
        "rewrite_: expected one number or a sequence of 2 integers for step, got a sequence of 3; "
        "pass one for all tensors or one for each",
    ),
    ({"scale": "1"}, "rewrite_: expected numbers for scale, got str; pass one for all tensors or one for each"),
    ({"scale": None}, "rewrite_: expected numbers for scale, got NoneType; pass one for all tensors or one for each"),
    ({"scale": np.array(0.5)}, "rewrite_: expected numbers for scale, got ndarray; pass one for all"),
    ({"fill": torch.tensor(0.5)}, "rewrite_: expected numbers for fill, got Tensor; pass one for all"),
    ({"scale": 1j}, "rewrite_: expected numbers for scale, got complex; pass one for all tensors or one for each"),
    ({"scale": [1.0, "2"]}, "rewrite_: expected numbers for scale, got str; pass Python floats, one or one per tensor"),
    ({"start": 1.5}, "rewrite_: expected integers for start, got float; pass Python ints, one or one per tensor"),
    (
        {"start": [1, None]},
        "rewrite_: expected integers for start, got NoneType; pass Python ints, one or one per tensor",
    ),
    (
        {"start": 2**62},
        f"rewrite_: expected less than 2^62 in magnitude for start, got {2**62}; no tensor has a column there",
    ),
    (
        {"step": -(2**70)},
        f"rewrite_: expected less than 2^62 in magnitude for step, got {-(2**70)}; no tensor has a column",
    ),
]


@pytest.mark.parametrize(
    ("keywords", "message"), REFUSED_COEFFICIENTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_refused_coefficients(keywords: dict[str, object], message: str) -> None:
    tensors = [torch.full((3,), 7.0), torch.full((3,), 7.0)]
    with pytest.raises(NeutralizeError) as caught:
        ops.rewrite_(tensors, **keywords)
    assert message in str(caught.value)
    assert all(tensor.tolist() == [7.0] * 3 for tensor in tensors)


def test_the_largest_coefficients_are_those_that_round_to_a_number() -> None:
    half_above = 2.0**128 - 2.0**103
    tensor = torch.zeros(2)
    ops.rewrite_(tensor, fill=math.nextafter(half_above, 0))
    assert tensor.tolist() == [torch.finfo(torch.float32).max] * 2
    with pytest.raises(NeutralizeError, match="that float32 holds for fill"):
        ops.rewrite_(tensor, fill=half_above)


def test_refuses_inside_vmap() -> None:
    def scale(x: torch.Tensor) -> torch.Tensor:
        ops.rewrite_(x, scale=2.0)
        return x

    tensor = torch.ones(2, 3)
    with pytest.raises(NeutralizeError, match=r"expected a tensor with memory for tensors\[0\]"):
        torch.vmap(scale)(tensor)
    assert tensor.eq(1).all()


def test_float64_holds_what_float32_does_not() -> None:
    tensor = torch.zeros(2, dtype=torch.float64)
    ops.rewrite_(tensor, fill=1e300)
    assert tensor.tolist() == [1e300] * 2


REFUSED_FOLDS = [
    (
        lambda w, b: ([w], []),
        "rescale_fold_: expected 1 tensors for biases, one per weight, got 0; pair them up",
    ),
    (
        lambda w, b: ([w], [torch.zeros(5)]),
        "rescale_fold_: expected shape (out,) for biases[0] and (out, ...) for weights[0], got (5,) and (4, 3); "
        "pair weights "
        "and biases of the same layer",
    ),
    (lambda w, b: ([w], [torch.zeros(4, 1)]), "got (4, 1) and (4, 3)"),
    (lambda w, b: ([torch.tensor(1.0)], [torch.zeros(1)]), "got (1,) and ()"),
    (
        lambda w, b: ([w], [b.double()]),
        "rescale_fold_: expected one dtype for weights[0] and biases[0], got torch.float32 and torch.float64; "
        "move or cast "
        "one first",
    ),
    (lambda w, b: ([w], [b.long()]), f"rescale_fold_: expected one of {NAMES} for the dtype of biases[0], got int64"),
    (
        lambda w, b: ([w], [w[:, 0]]),
        "rescale_fold_: expected tensors with memory of their own, got weights[0] and biases[0]",
    ),
    (lambda w, b: ([w, w.clone()], [b, b]), "got biases[0] and biases[1] sharing some"),
    (lambda w, b: ([w, w], [b, b.clone()]), "got weights[0] and weights[1] sharing some"),
    (lambda w, b: ([w], [torch.zeros(1).expand(4)]), "of every element of biases[0]".replace("of every", "for every")),
    (lambda w, b: (w, 3), "rescale_fold_: expected a tensor or a sequence of tensors for biases, got int"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED_FOLDS, ids=lambda value: value if isinstance(value, str) else "")
def test_refused_folds(make, message: str) -> None:
    weight, bias = torch.ones(4, 3), torch.ones(4)
    with pytest.raises(NeutralizeError) as caught:
        ops.rescale_fold_(*make(weight, bias), scale=2.0, shift=1.0)
    assert message in str(caught.value)
    assert weight.eq(1).all()
    assert bias.eq(1).all()


def test_refused_fold_coefficients() -> None:
    weight, bias = torch.ones(4, 3), torch.ones(4)
    for keywords, message in (
        ({"scale": math.nan, "shift": 0.0}, "rescale_fold_: expected a finite number for scale, got nan"),
        ({"scale": 1.0, "shift": -4e38}, "expected a number that float32 holds for shift, got -4e+38 for weights[0]"),
        (
            {"scale": [1.0, 2.0], "shift": 1.0},
            "rescale_fold_: expected one number or a sequence of 1 numbers for scale, got a sequence of 2",
        ),
    ):
        with pytest.raises(NeutralizeError) as caught:
            ops.rescale_fold_(weight, bias, **keywords)
        assert message in str(caught.value)
        assert weight.eq(1).all()
        assert bias.eq(1).all()


def test_refused_by_the_kernels_themselves() -> None:
    """torch.ops, called directly: the same refusals in C++, before anything is written."""
    if not _native.cpu_isas():
        pytest.skip("no native extension in this install")
    rewrite, fold = torch.ops.neutralize.rewrite_, torch.ops.neutralize.rescale_fold_
    first = torch.full((3,), 7.0)
    one = ([1.5], [0.0], [0.0], [0], [1])
    for tensors, coefficients, message in (
        (
            [torch.zeros(2, dtype=torch.int32)],
            one,
            "rewrite_: expected float64, float32, float16, bfloat16, float8_e4m3fn or",
        ),
        (
            [torch.ones(3, 3).t()],
            one,
            "rewrite_: expected contiguous memory or rows of contiguous memory for tensors[1]",
        ),
        ([torch.ones(1, 3).expand(3, 3)], one, "rewrite_: expected contiguous memory or rows of contiguous memory"),
        ([BASE[:3], BASE[2:]], one, "got tensors[1] and tensors[2] sharing some; name shared memory once"),
        ([BASE[:, :3], BASE[:, 2:]], one, "got tensors[1] and tensors[2] sharing some; name shared memory once"),
        ([BASE], ([1.5] * 3, *one[1:]), "rewrite_: expected 1 or 2 numbers for scale, got 3"),
        ([BASE], ([math.nan], *one[1:]), "rewrite_: expected a finite float32 for scale, got nan"),
        ([BASE], ([1e39], *one[1:]), "rewrite_: expected a finite float32 for scale, got 1e+39"),
        ([BASE], ([1.5], [3e38], [3e38], [0], [1]), "rewrite_: expected a finite float32 for diagonal + fill"),
        ([BASE], (*one[:3], [2**62], [1]), "rewrite_: expected less than 2^62 in magnitude for start"),
    ):
        with pytest.raises(RuntimeError) as caught:
            rewrite([first, *tensors], *coefficients)
        assert message in str(caught.value)
        assert first.tolist() == [7.0] * 3
    weight, bias = torch.ones(4, 3), torch.ones(4)
    for weights, biases, message in (
        ([weight], [], "rescale_fold_: expected 1 tensors for biases, one per weight, got 0"),
        ([weight], [torch.ones(5)], "rescale_fold_: expected shape (4,) for biases[0]"),
        ([weight], [bias.double()], "rescale_fold_: expected one dtype for weights[0] and biases[0]"),
        ([weight], [weight[:, 0]], "rescale_fold_: expected tensors with memory of their own"),
    ):
        with pytest.raises(RuntimeError) as caught:
            fold(weights, biases, [2.0], [1.0])
        assert message in str(caught.value)
        assert weight.eq(1).all()
        assert bias.eq(1).all()


def test_backend() -> None:
    native = "cpu" if _native.cpu_isas() else "torch"
    weight = torch.zeros(4, 6)
    assert ops.backend(weight) == native
    assert ops.backend(weight[:, 2:]) == native
    assert ops.backend(torch.zeros(())) == native
    assert ops.backend(weight.t()) == "torch"
    assert ops.backend(weight.long()) == "torch"
    assert ops.backend(torch.zeros(2, device="meta")) == "torch"
    assert ops.backend(torch._neg_view(weight)) == "torch"
    with pytest.raises(NeutralizeError, match="backend: expected a tensor for tensor, got int; pass a torch tensor"):
        ops.backend(3)


def test_negative_views() -> None:
    weight = torch.ones(3)
    ops.rewrite_(torch._neg_view(weight), scale=0.0, fill=2.0)
    assert weight.tolist() == [-2.0] * 3
