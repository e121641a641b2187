"""Fixtures that several test files share."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from neutralize import _native
from ranks import Ranks

# A busy machine is no fault of a test.
settings.register_profile("neutralize", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("neutralize")


if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers whose threads wait for each other on the same cores took three times the processor time. What they start
    # inherits the variable; a test of threads asks for its own.
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that has kernels of its own; CUDA only where there is a GPU (`make gpu-check`)."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU on this machine; the CUDA kernels run emulated in test_emulation.py")
    return torch.device(name)


@pytest.fixture(params=["avx512", "avx2", "neon", "plain"])
def cpu_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the CPU kernels that this machine runs, in use during the test."""
    name: str = request.param
    if name not in _native.cpu_isas():
        pytest.skip(f"{name} kernels: not in this build or not on this processor")
    _native.use_cpu_isa(name)
    yield name
    _native.use_cpu_isa("auto")


def group_of(count: int, backend: str) -> Iterator[Ranks]:
    """Processes of one group, until they are no longer needed."""
    if backend == "nccl" and torch.cuda.device_count() < count:
        pytest.skip(f"NCCL on {count} processes: needs {count} GPUs, got {torch.cuda.device_count()}")
    ranks = Ranks(count, backend)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Two processes of one group, kept for all tests of a file; a file may parametrize the backend."""
    yield from group_of(2, getattr(request, "param", "gloo"))


@pytest.fixture(scope="module")
def four(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Four processes of one group, kept for all tests of a file; a file may parametrize the backend."""
    yield from group_of(4, getattr(request, "param", "gloo"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of a file that says so (``BACKENDS``) with NCCL too, on a GPU per process."""
    for name in {"two", "four"} & set(metafunc.fixturenames):
        if backends := getattr(metafunc.module, "BACKENDS", None):
            marks = {"nccl": [pytest.mark.gpu]}
            params = [pytest.param(backend, marks=marks.get(backend, [])) for backend in backends]
            metafunc.parametrize(name, params, indirect=True, scope="module")
