"""The CUDA kernels on a GPU: what test_emulation.py and test_sass.py cannot show. `make gpu-check` runs it."""

import os
import subprocess
import sys

import pytest
import torch
from cases import DTYPES, FOLD_SHAPES, FOLDS, REWRITES, VIEWS, assert_same_bits, random_tensor

import neutralize as nz
from neutralize import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine; run `make gpu-check` on one"),
]

GIB = 1 << 30


def needs_memory(bytes_: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < bytes_:
        pytest.skip(f"needs {bytes_ / GIB:.1f} GiB of GPU memory, {free / GIB:.1f} GiB are free")


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same view of the same memory layout on the GPU: strides and misalignment are what is tested."""
    base = tensor._base if tensor._base is not None else tensor
    storage = base.untyped_storage()
    copy = torch.empty(len(storage), dtype=torch.uint8, device="cuda")
    copy.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
    moved = torch.empty(0, dtype=tensor.dtype, device="cuda")
    return moved.set_(copy.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def test_the_kernels_are_there():
    assert nz.ops.backend(torch.empty(1, device="cuda")) == "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_rewrite_equals_the_reference(dtype, view):
    expected = [VIEWS[view](dtype, seed) for seed in range(len(REWRITES))]
    actual = [on_gpu(tensor) for tensor in expected]
    scale, diagonal, fill, start, step = (list(column) for column in zip(*REWRITES, strict=True))
    reference.rewrite_(expected, scale, diagonal, fill, start, step)
    nz.ops.rewrite_(actual, scale=scale, diagonal=diagonal, fill=fill, start=start, step=step)
    for one, wanted in zip(actual, expected, strict=True):
        assert_same_bits(one.cpu(), wanted)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize <= 2], ids=str)
@pytest.mark.parametrize("scale", [0.3, -1.0, 1e-4, 300.0, 2.0**-14, 1.0009765625])
def test_every_pattern_is_converted_as_the_reference_does(dtype, scale):
    # The conversion instructions stand in for affine.h on a GPU alone, so here are all of their inputs.
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    expected = patterns.clone().view(dtype)
    actual = expected.to("cuda")
    reference.rewrite_([expected], [scale], [0.0], [0.25 * scale], [0], [1])
    nz.ops.rewrite_(actual, scale=scale, fill=0.25 * scale)
    assert_same_bits(actual.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols", "first"), FOLD_SHAPES)
def test_rescale_fold_equals_the_reference(dtype, rows, cols, first):
    weights = [random_tensor(dtype, (rows, cols + first), seed, False)[:, first:] for seed in range(len(FOLDS))]
    biases = [random_tensor(dtype, (rows, 2), seed + 100, False)[:, 0] for seed in range(len(FOLDS))]
    gpu_weights, gpu_biases = [on_gpu(w) for w in weights], [on_gpu(b) for b in biases]
    scale, shift = (list(column) for column in zip(*FOLDS, strict=True))
    reference.rescale_fold_(weights, biases, scale, shift)
    nz.ops.rescale_fold_(gpu_weights, gpu_biases, scale=scale, shift=shift)
    for actual, wanted in zip([*gpu_weights, *gpu_biases], [*weights, *biases], strict=True):
        assert_same_bits(actual.cpu(), wanted)


def test_a_fold_is_the_same_in_every_run():
    weight, bias = torch.randn(4096, 5000, device="cuda"), torch.randn(4096, device="cuda")
    results = []
    for _ in range(20):
        w, b = weight.clone(), bias.clone()
        nz.ops.rescale_fold_(w, b, scale=0.5, shift=1.0)
        results.append(b)
    assert all(torch.equal(results[0], other) for other in results)


def test_thousands_of_tensors_of_every_dtype_in_one_call():
    sizes = torch.Generator().manual_seed(0)
    shapes = torch.randint(0, 70, (5000, 2), generator=sizes).tolist()
    expected = [random_tensor(DTYPES[i % len(DTYPES)], tuple(shape), i, True) for i, shape in enumerate(shapes)]
    actual = [tensor.to("cuda") for tensor in expected]
    scale = [(0.0, 0.5, -1.5)[i % 3] for i in range(len(actual))]
    fill = [(0.0, 0.25)[i % 2] for i in range(len(actual))]
    reference.rewrite_(expected, scale, [1.0], fill, [0], [1])
    nz.ops.rewrite_(actual, scale=scale, diagonal=1.0, fill=fill)
    for one, wanted in zip(actual, expected, strict=True):
        assert_same_bits(one.cpu(), wanted)


def test_4000_alike_tensors_take_three_launches():
    tensors = [torch.ones(1024, device="cuda") for _ in range(4000)]
    nz.ops.rewrite_(tensors, scale=0.5)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        nz.ops.rewrite_(tensors, scale=0.5)
        torch.cuda.synchronize()
    launches = sum(event.count for event in profile.key_averages() if "neutralize" in event.key)
    assert launches == 3


def test_more_than_2_to_the_31_elements():
    numel = (1 << 31) + 4099
    needs_memory(numel + GIB)
    weight = torch.full((numel,), 0x38, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)  # ones
    nz.ops.rewrite_(weight, scale=2.0)
    values = weight.view(torch.uint8)
    assert bool((values == 0x40).all())  # twos
    cols = 257
    matrix = weight[: numel // cols * cols].view(-1, cols)
    nz.ops.rewrite_(matrix, scale=0.0, diagonal=1.0, start=0, step=0)
    assert bool((matrix.view(torch.uint8)[:, 0] == 0x38).all())
    assert int(matrix.view(torch.uint8).count_nonzero()) == matrix.shape[0]
    assert bool((values[matrix.numel() :] == 0x40).all())


def test_capture_in_a_graph():
    weight, bias = torch.full((300, 500), 8.0, device="cuda"), torch.zeros(300, device="cuda")
    others = [torch.empty(100 + i, device="cuda", dtype=torch.float16) for i in range(2000)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nz.ops.rescale_fold_(weight, bias, scale=0.5, shift=1.0)
        nz.ops.rewrite_(others, fill=3.0)
    assert bool((weight == 8.0).all())
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert bool((weight == 2.0).all())
    assert bool((bias == 8.0 * 500 + 4.0 * 500).all())
    assert all(bool((other == 3.0).all()) for other in others)


def test_the_current_stream_is_used_and_nothing_waits():
    weight = torch.zeros(1 << 20, device="cuda")
    nz.ops.rewrite_(weight, scale=1.0, fill=1.0)  # loads the kernels: that may wait
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)
        weight.fill_(3.0)
        nz.ops.rewrite_(weight, scale=2.0)
        nz.ops.rescale_fold_(weight.view(1024, 1024), torch.zeros(1024, device="cuda"), scale=0.5, shift=1.0)
        assert not stream.query(), "the call came back after the stream had drained"
    stream.synchronize()
    assert bool((weight == 3.0).all())


def test_calls_on_several_streams_at_once():
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(8)]
    weights = [torch.full((1 << 20,), float(i), device="cuda") for i in range(len(streams))]
    lists = [[torch.ones(100 + j, device="cuda", dtype=torch.bfloat16) for j in range(300)] for _ in streams]
    torch.cuda.synchronize()
    for turn in range(20):
        for weight, others, stream in zip(weights, lists, streams, strict=True):
            with torch.cuda.stream(stream):
                nz.ops.rewrite_(weight, scale=2.0 if turn % 2 == 0 else 0.5)
                nz.ops.rewrite_(others, scale=-1.0)
    # What one stream wrote, another goes on with once it has waited.
    with torch.cuda.stream(streams[0]):
        for weight, stream in zip(weights, streams, strict=True):
            streams[0].wait_stream(stream)
            nz.ops.rewrite_(weight, scale=1.0, fill=1.0)
    torch.cuda.synchronize()
    assert all(bool((weight == i + 1.0).all()) for i, weight in enumerate(weights))
    assert all(bool((other == 1.0).all()) for others in lists for other in others)


EXPANDABLE = """
import torch
import neutralize as nz

small = [torch.ones(1000 + i, device="cuda") for i in range(3000)]
large = torch.ones(30_000_000, device="cuda")
assert any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    nz.ops.rewrite_([*small, large], scale=0.5)
more = [torch.ones(60_000_000, device="cuda") for _ in range(4)]  # the segment grows
graph.replay()
nz.ops.rewrite_([*small, large], scale=1.0, fill=1.0)
torch.cuda.synchronize()
assert all(bool((tensor == 1.5).all()) for tensor in [*small, large])
"""


def test_memory_of_expandable_segments():
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    run = subprocess.run(
        [sys.executable, "-c", EXPANDABLE], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_nothing_is_allocated():
    tensors = [torch.ones(1000, device="cuda") for _ in range(3000)]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    nz.ops.rewrite_(tensors, scale=0.5)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none on this machine")
def test_several_devices_in_one_call():
    tensors = [torch.ones(5000, device=f"cuda:{i % torch.cuda.device_count()}") for i in range(64)]
    nz.ops.rewrite_(tensors, scale=4.0)
    assert torch.cuda.current_device() == 0
    assert all(bool((tensor == 4.0).all()) for tensor in tensors)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none on this machine")
def test_one_kernel_call_takes_one_device():
    tensors = [torch.ones(8, device="cuda:0"), torch.ones(8, device="cuda:1")]
    with pytest.raises(RuntimeError, match="rewrite_: expected one device for all tensors, got cuda:0 and cuda:1"):
        torch.ops.neutralize.rewrite_(tensors, [2.0], [0.0], [0.0], [0], [1])
    assert all(bool((tensor == 1.0).all()) for tensor in tensors)
