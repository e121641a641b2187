"""Build the native parts of neutralize. What to build is decided here; everything declarative is in pyproject.toml.

Three kinds of install come out of this file (``python -m neutralize doctor`` says which one it is):

=====================  ==========================================================================================
``_C``                 schemas, CPU and Meta kernels, the pybind11 module; wherever there is a C++ compiler
``_cuda``              the CUDA kernels, a shared object of their own, so that one install serves CPU and CUDA torch
neither                pure Python: the same ops in plain torch; only where there is no C++ compiler
=====================  ==========================================================================================

Environment: ``NEUTRALIZE_CUDA=auto|0|1``, ``DEBUG=1``, ``CXX``; torch's ``TORCH_CUDA_ARCH_LIST`` and ``MAX_JOBS``.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Command, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ABI_TARGET = "0x020a000000000000"  # torch 2.10: one binary serves every torch from there on
DEFAULT_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
CPU_SOURCES = [
    "csrc/ops.cpp",
    "csrc/meta.cpp",
    "csrc/module.cpp",
    "csrc/direct.cpp",
    "csrc/cpu/ops.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/plain.cpp",
    "csrc/cpu/avx2.cpp",
    "csrc/cpu/avx512.cpp",
    "csrc/cpu/neon.cpp",
]
CUDA_SOURCES = ["csrc/cuda/ops.cpp", "csrc/cuda/kernels.cu"]
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")


def cxx_compiler() -> str | None:
    """Return the C++ compiler the build would call, or None where the machine has none."""
    candidates = [os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    if os.environ.get("CXX"):  # asked for by name: that one or nothing
        candidates = candidates[:1]
    for candidate in candidates:
        words = shlex.split(candidate or "")
        if words and shutil.which(words[0]):
            return candidate
    return None


def first_line(command: list[str]) -> str:
    """Return the first line a command prints, or an empty string where it cannot be run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return ""
    return (result.stdout or result.stderr).strip().split("\n")[0]


def cuda_toolkit() -> Path | None:
    """Return the root of the CUDA toolkit, looking through an ``nvcc`` that is only a wrapper script."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        named = os.environ.get(variable)
        if named and (Path(named) / "bin" / "nvcc").exists():
            return Path(named)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        default = Path("/usr/local/cuda")
        return default if (default / "bin" / "nvcc").exists() else None
    root = Path(nvcc).resolve().parent.parent
    if (root / "include" / "cuda_runtime.h").exists():
        return root
    # A wrapper: a dry run prints the environment of the real compiler, the toolkit's root as TOP.
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, timeout=60, check=False
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    if top:
        root = Path(top.group(1).strip()).resolve()
        if (root / "bin" / "nvcc").exists():
            return root
    return None


def cuda_archs(nvcc: Path) -> str:
    """Return TORCH_CUDA_ARCH_LIST, or the shipped architectures that this nvcc knows, with PTX of the newest."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return given
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, timeout=60, check=False)
    known = set(re.findall(r"sm_(\d+)\b", listing.stdout))
    archs = [arch for arch in DEFAULT_ARCHS if not known or arch.replace(".", "") in known]
    return " ".join(archs) + "+PTX"


def plan_cuda(torch: Any) -> tuple[Path | None, str]:
    """Decide on the CUDA part: the toolkit to use (None: don't build it) and the reason in words.

    ``torch.cuda.is_available()`` is never asked: it speaks of the machine that builds, not of the one that will run.
    """
    wanted = os.environ.get("NEUTRALIZE_CUDA", "auto").lower()
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"setup: expected auto, 0 or 1 for NEUTRALIZE_CUDA, got {wanted!r}; unset it for auto")
    if wanted == "0":
        return None, "NEUTRALIZE_CUDA=0"
    toolkit = cuda_toolkit()
    reason = ""
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    elif toolkit is None:
        reason = "no CUDA toolkit found (nvcc on PATH, or CUDA_HOME)"
    elif not all((ROOT / source).exists() for source in CUDA_SOURCES):
        reason = "the CUDA sources are not there"
    else:
        release = re.search(r"release (\d+)\.", " ".join(nvcc_version(toolkit)))
        if release is None:
            reason = f"the nvcc of {toolkit} does not run"
        elif release.group(1) != torch.version.cuda.split(".")[0]:
            reason = f"the toolkit is CUDA {release.group(1)}, torch was built with CUDA {torch.version.cuda}"
    if not reason:
        return toolkit, "built"
    if wanted == "1":
        raise SystemExit(f"setup: NEUTRALIZE_CUDA=1, but {reason}; install what is missing or set NEUTRALIZE_CUDA=0")
    return None, reason


def nvcc_version(toolkit: Path) -> list[str]:
    """Return the lines of ``nvcc --version``."""
    result = subprocess.run(
        [toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    return result.stdout.split("\n")


def plan() -> tuple[list[Any], type[Command], dict[str, Any]]:
    """Return the extensions, the command that builds them, and the record that goes into the package."""
    record: dict[str, Any] = {
        "native": False,
        "native_reason": "",
        "cuda": False,
        "cuda_reason": "",
        "cuda_archs": [],
        "torch": None,
        "cxx": None,
        "nvcc": None,
        "debug": DEBUG,
    }
    compiler = cxx_compiler()
    if compiler is None:
        record["native_reason"] = record["cuda_reason"] = "no C++ compiler was found when the package was installed"
        if os.environ.get("NEUTRALIZE_CUDA") == "1":
            raise SystemExit("setup: NEUTRALIZE_CUDA=1, but there is no C++ compiler; install one or unset it")
        return [], build_ext, record
    try:
        # The toolkit is looked up first: cpp_extension reads CUDA_HOME once, when it is imported.
        toolkit = cuda_toolkit()
        if toolkit is not None:
            os.environ["CUDA_HOME"] = str(toolkit)
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            f"setup: expected torch >= 2.10 and pybind11 in the environment that builds, got {error}; "
            "install them and use pip's --no-build-isolation, or leave build isolation on"
        ) from error

    record["torch"] = torch.__version__
    record["cxx"] = first_line([*shlex.split(compiler), "--version"])
    toolkit, reason = plan_cuda(torch)

    # Contracting a*b+c to an fma would change bits between ISAs and against CUDA: off, everywhere.
    cxx_flags = ["-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    cxx_flags += (
        ["-O0", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-g0"]
    )  # Python's own flags may say -g: 14 times the size
    macros = [("TORCH_TARGET_VERSION", ABI_TARGET)]
    extensions = [
        cpp_extension.CppExtension(
            "neutralize._C",
            CPU_SOURCES,
            include_dirs=[pybind11.get_include()],
            define_macros=macros,
            extra_compile_args={"cxx": cxx_flags},
            py_limited_api=True,  # here: don't link libtorch_python
        )
    ]
    record["native"] = True
    record["native_reason"] = "built"
    record["cuda_reason"] = reason
    if toolkit is not None:
        archs = cuda_archs(toolkit / "bin" / "nvcc")
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
        # No flag may contain the word "arch" (torch would then ignore TORCH_CUDA_ARCH_LIST), and none sets -std.
        nvcc_flags = ["--fmad=false", "--expt-relaxed-constexpr", *(["-O0", "-g", "-G"] if DEBUG else ["-O3"])]
        # 32 KiB of kernel parameters are as many zeros in every kernel's image: compressed, a fifth of it is left.
        nvcc_flags += ["-Xfatbin=-compress-all", "--threads=2"]
        extensions.append(
            cpp_extension.CUDAExtension(
                "neutralize._cuda",
                CUDA_SOURCES,
                include_dirs=[str(ROOT / "csrc")],
                define_macros=[*macros, ("USE_CUDA", None)],
                extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
                py_limited_api=True,
            )
        )
        record["cuda"] = True
        record["cuda_archs"] = archs.replace(";", " ").split()
        record["nvcc"] = next((line for line in nvcc_version(toolkit) if "release" in line), "").strip()
    for extension in extensions:
        extension.py_limited_api = False  # pybind11 is not abi3: only the linking was wanted
    return extensions, cpp_extension.BuildExtension, record


EXTENSIONS, BUILD_EXT, RECORD = plan()


class BuildPy(build_py):
    """Put the record of the build beside the package: also a pure-Python install can say why it is one."""

    def run(self) -> None:
        super().run()
        root = ROOT / "src" if self.editable_mode else Path(self.build_lib)
        path = root / "neutralize" / "_build.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(RECORD, indent=2) + "\n")
        for part, planned in (("_C", RECORD["native"]), ("_cuda", RECORD["cuda"])):
            for left_over in path.parent.glob(f"{part}.*.so"):  # of an earlier build in this checkout, and loadable
                if not planned:
                    left_over.unlink()

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / "neutralize" / "_build.json")]


class BuildExt(BUILD_EXT):  # type: ignore[misc, valid-type]
    """Build, then say in one line what was built."""

    def run(self) -> None:
        if self.editable_mode:
            self.inplace = True
        super().run()
        print(summary(RECORD), file=sys.stderr)


def summary(record: dict[str, Any]) -> str:
    """Return one line: what was built and why not more."""
    if not record["native"]:
        return f"neutralize: pure Python, {record['native_reason']}"
    cuda = f"CUDA for {' '.join(record['cuda_archs'])}" if record["cuda"] else f"no CUDA ({record['cuda_reason']})"
    return f"neutralize: CPU and Meta kernels, {cuda}; torch {record['torch']}, {record['cxx']}"


if not EXTENSIONS:
    print(summary(RECORD), file=sys.stderr)

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
