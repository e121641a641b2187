"""The CUDA kernels, executed on the CPU: their own text, walked thread by thread, under ASan and UBSan."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from cases import DTYPES, FOLD_SHAPES, FOLDS, REWRITES, VIEWS, assert_same_bits, random_tensor
from torch import Tensor

from neutralize import reference

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "emulation"
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZERS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def compiler() -> list[str]:
    """Return the C++ compiler as setup.py would choose it, or skip."""
    for candidate in (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"):
        words = shlex.split(candidate or "")
        if words and shutil.which(words[0]):
            return words[:1]
    pytest.skip("no C++ compiler (CXX, c++, g++, clang++) to build the emulated grid with")


def build(source: str, output: str, flags: list[str]) -> Path:
    """Compile one file of tests/emulation, unless the same text was compiled with the same flags before."""
    command = [*compiler(), *FLAGS, *flags]
    digest = hashlib.sha256(repr(command).encode())
    inputs = [*SOURCES.glob("*"), *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.*h")]
    for path in sorted(inputs):
        digest.update(path.name.encode() + path.read_bytes())
    target = ROOT / "build" / "emulation" / digest.hexdigest()[:16] / output
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{output}.{os.getpid()}")
        result = subprocess.run(
            [*command, str(SOURCES / source), "-o", str(partial)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{source} does not compile:\n{result.stderr[-4000:]}"
        assert "warning" not in result.stderr, f"{source} compiles with warnings:\n{result.stderr[-4000:]}"
        partial.replace(target)
    return target


def test_every_op_dtype_and_shape_equals_the_rule_bit_for_bit():
    program = build("emulate.cpp", "emulate", SANITIZERS)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout}{result.stderr[-8000:]}"
    cases, _, failures, _ = result.stdout.split()
    assert int(cases) > 20_000
    assert int(failures) == 0


# ---- the same kernels against the specification in Python ------------------------------------------------------------
class Item(ctypes.Structure):
    """A tensor as tests/emulation/library.cpp takes it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("storage", ctypes.c_int64),
    )

    @classmethod
    def of(cls, tensor: Tensor) -> "Item":
        rows = tensor.shape[0]
        cols = tensor.numel() // rows if rows else 0
        stride = tensor.stride(0) if rows > 1 else cols
        return cls(tensor.data_ptr(), rows, cols, stride, DTYPES.index(tensor.dtype))


@pytest.fixture(scope="module")
def grid() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build("library.cpp", "grid.so", ["-O2", "-fPIC", "-shared"])))
    library.emulate_rewrite.restype = library.emulate_rescale_fold.restype = ctypes.c_int64
    return library


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_rewrite_equals_the_reference(grid, dtype, view):
    tensors = [VIEWS[view](dtype, seed) for seed in range(len(REWRITES))]
    expected = [tensor.clone() for tensor in tensors]
    columns = [list(column) for column in zip(*REWRITES, strict=True)]
    reference.rewrite_(expected, *columns)
    count = len(tensors)
    items = (Item * count)(*map(Item.of, tensors))
    coefficients = (ctypes.c_double * (3 * count))(*(c for rewrite in REWRITES for c in rewrite[:3]))
    ones = (ctypes.c_int64 * (2 * count))(*(c for rewrite in REWRITES for c in rewrite[3:]))
    assert grid.emulate_rewrite(items, coefficients, ones, ctypes.c_int64(count)) >= 0, "a forbidden memory access"
    for actual, wanted in zip(tensors, expected, strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols", "first"), FOLD_SHAPES)
def test_rescale_fold_equals_the_reference(grid, dtype, rows, cols, first):
    count = len(FOLDS)
    weights = [random_tensor(dtype, (rows, cols + first), seed, False)[:, first:] for seed in range(count)]
    biases = [random_tensor(dtype, (rows, 2), seed + 100, False)[:, 0] for seed in range(count)]
    wanted_weights, wanted_biases = [w.clone() for w in weights], [b.clone() for b in biases]
    reference.rescale_fold_(wanted_weights, wanted_biases, [c[0] for c in FOLDS], [c[1] for c in FOLDS])
    flat = (ctypes.c_double * (2 * count))(*(c for pair in FOLDS for c in pair))
    weight_items, bias_items = (Item * count)(*map(Item.of, weights)), (Item * count)(*map(Item.of, biases))
    assert grid.emulate_rescale_fold(weight_items, bias_items, flat, ctypes.c_int64(count)) >= 0
    for actual, wanted in zip([*weights, *biases], [*wanted_weights, *wanted_biases], strict=True):
        assert_same_bits(actual, wanted)


def test_a_list_past_one_launch_takes_few_launches(grid):
    tensors = [torch.full((1024,), 2.0) for _ in range(4000)]
    items = (Item * 4000)(*map(Item.of, tensors))
    coefficients = (ctypes.c_double * 12000)(*[0.5, 0.0, 0.0] * 4000)
    launches = grid.emulate_rewrite(items, coefficients, (ctypes.c_int64 * 8000)(), ctypes.c_int64(4000))
    assert launches == 3
    assert all(bool((tensor == 1.0).all()) for tensor in tensors)
