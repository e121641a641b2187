"""The three kinds of install, each made for real: with CUDA kernels, with CPU kernels only, and as pure Python."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

# Run in a fresh process: does the package that stands first on the path do its job, and who does it?
PROGRAM = """
import json
import torch
{before_import}
import neutralize as nz
from neutralize.doctor import diagnose

for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
    w = torch.arange(-6.0, 6.0).reshape(3, 4).to(dtype)
    expected = (w.double() * 0.5 + 2.0 * torch.eye(3, 4) + 1.0).to(dtype)
    nz.ops.rewrite_([w], scale=0.5, diagonal=2.0, fill=1.0)
    assert torch.equal(w.double(), expected.double()), (dtype, w, expected)
w, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 20.0])
nz.ops.rescale_fold_([w], [b], scale=2.0, shift=-1.0)
assert w.tolist() == [[2.0, 4.0], [6.0, 8.0]] and b.tolist() == [7.0, 13.0], (w, b)

diagnosis = diagnose()
print(json.dumps({{
    "file": nz.__file__,
    "torch": torch.__version__,
    "backend": nz.ops.backend(torch.empty(1)),
    "cuda_kernels": torch._C._dispatch_has_kernel_for_dispatch_key("neutralize::rewrite_", "CUDA"),
    "why_not_more": diagnosis.why_not_more,
}}))
"""


def ask(*paths, before_import="pass"):
    """What PROGRAM finds in a fresh process with `paths` before everything that is installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", PROGRAM.format(before_import=before_import)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd="/")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution: what is missing from it cannot be built."""
    folder = tmp_path_factory.mktemp("sdist")
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = folder.glob("neutralize-*.tar.gz")
    return archive


def install(sdist, folder, **environment):
    """Build a wheel from the source distribution and install it into `folder`/site; the wheel's path."""
    environment = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
    build = [*PIP, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(sdist)]
    result = subprocess.run(build, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("neutralize-*.whl")
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return wheel


def cpu_torch(cache):
    """The path of an unpacked PyTorch without CUDA, from what pip finds on this machine without an index; else skip."""
    site = Path(cache.mkdir("cpu-torch"))
    complete = site / ".complete"
    if not complete.exists():
        wheels = site / "wheels"
        download = [
            *PIP,
            "download",
            "--no-index",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            str(wheels),
            "torch>=2.10",
        ]
        subprocess.run(download, capture_output=True, check=False)
        found = list(wheels.glob("torch-*+cpu-*.whl"))
        if not found:
            pytest.skip("pip finds no CPU-only PyTorch on this machine without an index (find-links)")
        install_command = [
            *PIP,
            "install",
            "--no-index",
            "--no-deps",
            "--upgrade",
            "--target",
            str(site),
            str(found[0]),
        ]
        subprocess.run(install_command, capture_output=True, check=True)
        shutil.rmtree(wheels)
        complete.touch()
    return site


# ---- a PyTorch with CUDA, and a toolkit ----------------------------------------------------------------------------
@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch was built without CUDA")
@pytest.mark.skipif(
    not (shutil.which("nvcc") or os.environ.get("CUDA_HOME")), reason="no CUDA toolkit: neither nvcc nor CUDA_HOME"
)
@pytest.mark.skipif(os.environ.get("NEUTRALIZE_CUDA") == "0", reason="NEUTRALIZE_CUDA=0 is set")
class TestCudaBuild:
    def test_registers_cuda_kernels(self):
        import neutralize  # noqa: F401  the import registers the ops

        for op in ("neutralize::rewrite_", "neutralize::rescale_fold_"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")
            assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU")

    def test_doctor_names_the_architectures(self):
        found = ask()
        assert found["backend"] == "cpu"
        assert found["cuda_kernels"]
        if not torch.cuda.is_available():
            (reason,) = found["why_not_more"]
            assert reason.startswith("CUDA kernels: built and loaded for ")
            assert reason.endswith("; no CUDA device on this machine")

    def test_serves_a_real_cpu_torch_as_well(self, request):
        """The package that was built under this CUDA PyTorch, imported under another one without CUDA."""
        site = cpu_torch(request.config.cache)
        found = ask(site)
        assert found["torch"].endswith("+cpu")
        assert found["backend"] == "cpu"
        assert not found["cuda_kernels"]
        (reason,) = found["why_not_more"]
        assert reason.endswith(f"not loaded: torch {found['torch']} has no CUDA")

    def test_leaves_the_cuda_part_alone_where_torch_reports_no_cuda(self):
        """Simulated: this PyTorch, told to say that it has no CUDA."""
        found = ask(before_import="torch.version.cuda = None")
        assert found["backend"] == "cpu"
        assert not found["cuda_kernels"]


# ---- CPU kernels only ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("under", ["NEUTRALIZE_CUDA=0", "a PyTorch without CUDA"])
def test_cpu_build_works_natively_and_says_why_no_cuda(request, sdist, tmp_path, under):
    if under == "NEUTRALIZE_CUDA=0":
        wheel = install(sdist, tmp_path, NEUTRALIZE_CUDA="0")
        reason = "NEUTRALIZE_CUDA=0"
    else:  # built there, and then used under this environment's PyTorch; DEBUG=1 compiles quickest
        site = cpu_torch(request.config.cache)
        wheel = install(sdist, tmp_path, NEUTRALIZE_CUDA=None, DEBUG="1", PYTHONPATH=str(site))
        (version,) = (
            path.name.removeprefix("torch-").removesuffix(".dist-info") for path in site.glob("torch-*.dist-info")
        )
        reason = f"torch {version} was built without CUDA"
    assert "-none-any" not in wheel.name
    assert not list((tmp_path / "site" / "neutralize").glob("_cuda*"))
    found = ask(tmp_path / "site")
    assert Path(found["file"]).is_relative_to(tmp_path)
    assert found["backend"] == "cpu"
    assert not found["cuda_kernels"]
    assert found["why_not_more"] == [f"no CUDA kernels: {reason}; reinstall neutralize where that is not so"]


# ---- no compiler ---------------------------------------------------------------------------------------------------
def test_installs_as_pure_python_without_a_compiler(sdist, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    wheel = install(sdist, tmp_path, PATH=str(empty), CC=None, CXX=None, CUDA_HOME=None, NEUTRALIZE_CUDA=None)
    assert wheel.name.endswith("-py3-none-any.whl")
    found = ask(tmp_path / "site")
    assert Path(found["file"]).is_relative_to(tmp_path)
    assert found["backend"] == "torch"
    assert not found["cuda_kernels"]
    assert found["why_not_more"] == [
        "pure Python: no C++ compiler was found when the package was installed; "
        "install a C++ compiler (g++ or clang++) and reinstall neutralize"
    ]


def test_a_rebuild_in_place_takes_away_what_it_no_longer_builds(sdist, tmp_path):
    shutil.unpack_archive(sdist, tmp_path)
    (sources,) = tmp_path.glob("neutralize-*")
    package = sources / "src" / "neutralize"
    left_over = [package / f"{part}{sysconfig.get_config_var('EXT_SUFFIX')}" for part in ("_C", "_cuda")]
    for path in left_over:
        path.touch()
    program = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    environment = {key: value for key, value in os.environ.items() if key not in ("CC", "CXX", "CUDA_HOME")}
    environment["PATH"] = str(tmp_path)
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, cwd=sources, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not any(path.exists() for path in left_over)
    assert not json.loads((package / "_build.json").read_text())["native"]
