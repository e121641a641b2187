"""Fixtures that several test files share."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from neutralize import _native
from ranks import Ranks

# A busy machine is no fault of a test.
settings.register_profile("neutralize", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("neutralize")


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


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two processes of one group, kept for all tests of a file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()
