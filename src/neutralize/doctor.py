"""Say what this installation of neutralize can do on this machine, and why not more."""

import importlib
import json
import platform
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import torch

import neutralize
from neutralize import ops

REWRITE = "neutralize::rewrite_"  # the op whose kernels are looked for; every op is registered with it


@dataclass(frozen=True)
class Device:
    """A device of this machine, and who would rewrite tensors on it.

    Attributes:
        name: as PyTorch spells it
        model: what it is
        backend: "cuda", "cpu" or "torch", as `neutralize.ops.backend` says
    """

    name: str
    model: str
    backend: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything `neutralize doctor` prints.

    Attributes:
        versions: of neutralize, python, torch, and torch's cuda (None where this PyTorch has none)
        build: what the installation recorded about itself, empty where it left no record
        loaded: what the loaded extension says about itself, empty where none is loaded
        cuda_kernels: whether CUDA kernels are registered with this PyTorch
        devices: those of this machine
        why_not_more: what is missing, each with its reason and its remedy
    """

    versions: dict[str, str | None]
    build: dict[str, Any]
    loaded: dict[str, Any]
    cuda_kernels: bool
    devices: tuple[Device, ...]
    why_not_more: tuple[str, ...]

    def to_json(self) -> str:
        """Return the same facts for a machine."""
        return json.dumps(asdict(self), indent=2)

    def rows(self) -> list[tuple[str, str]]:
        """Return the same facts for a reader: label and text, in the order they are printed."""
        cuda = self.versions["cuda"]
        lines = [
            ("neutralize", str(self.versions["neutralize"])),
            ("python", str(self.versions["python"])),
            ("torch", f"{self.versions['torch']}, {f'CUDA {cuda}' if cuda else 'without CUDA'}"),
            ("CPU kernels", self._cpu_kernels()),
            ("CUDA kernels", self._cuda_kernels()),
        ]
        lines += [(device.name, f"{device.backend} backend; {device.model}") for device in self.devices]
        return lines + [("why not more", reason) for reason in self.why_not_more]

    def _cpu_kernels(self) -> str:
        if not self.loaded:
            return "none: the same ops in plain PyTorch"
        return f"{self.loaded['isa']}, of {', '.join(self.loaded['isas'])}; built by {self.build.get('cxx')}"

    def _cuda_kernels(self) -> str:
        if not self.build.get("cuda"):
            return "none"
        state = "loaded" if self.cuda_kernels else "built, not loaded"
        return f"{state}, for {' '.join(self.build['cuda_archs'])}; built by {self.build['nvcc']}"


def diagnose() -> Diagnosis:
    """Return what was built, what this machine would use, and why not more.

    Asks PyTorch for its devices, so where there is a GPU this initialises CUDA.
    """
    build = _build_record()
    loaded, load_error = _loaded_extension()
    cuda_kernels = _has_kernel("CUDA")
    return Diagnosis(
        versions={
            "neutralize": neutralize.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        build=build,
        loaded=loaded,
        cuda_kernels=cuda_kernels,
        devices=_devices(),
        why_not_more=(*_why_no_native(build, load_error), *_why_no_cuda(build, cuda_kernels)),
    )


def _build_record() -> dict[str, Any]:
    record = resources.files("neutralize") / "_build.json"
    return dict(json.loads(record.read_text(encoding="utf-8"))) if record.is_file() else {}


def _loaded_extension() -> tuple[dict[str, Any], str]:
    """Return the extension's own account, or an empty one and why it does not load."""
    try:
        extension = importlib.import_module("neutralize._C")
    except ImportError as error:
        return {}, str(error)
    return dict(extension.build_info()), ""


def _has_kernel(dispatch_key: str) -> bool:
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(REWRITE, dispatch_key))
    except RuntimeError:  # the op does not exist: nothing native is loaded
        return False


def _devices() -> tuple[Device, ...]:
    devices = [Device("cpu", platform.machine(), ops.backend(torch.empty(1)))]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            model = f"{properties.name}, sm_{properties.major}{properties.minor}"
            name = f"cuda:{index}"
            devices.append(Device(name, model, ops.backend(torch.empty(1, device=name))))
    return tuple(devices)


def _why_no_native(build: dict[str, Any], load_error: str) -> list[str]:
    if not load_error:
        return []
    if not build:
        return ["pure Python: this copy was never installed; run `pip install .` where setup.py is"]
    if not build["native"]:
        return [f"pure Python: {build['native_reason']}; install one (g++ or clang++) and reinstall neutralize"]
    return [f"pure Python: the extension was built but does not load ({load_error}); reinstall neutralize"]


def _why_no_cuda(build: dict[str, Any], cuda_kernels: bool) -> list[str]:
    if not build.get("native"):
        return []  # said once, by _why_no_native
    if not build["cuda"]:
        return [f"no CUDA kernels: {build['cuda_reason']}; mend that and reinstall neutralize"]
    archs = " ".join(build["cuda_archs"])
    if torch.version.cuda is None:
        return [f"CUDA kernels: built for {archs}, not loaded: this PyTorch has no CUDA; install one that has"]
    if not cuda_kernels:
        return [f"CUDA kernels: built for {archs}, not loaded; `python -c 'import neutralize._cuda'` says why"]
    if not torch.cuda.is_available():
        return [f"CUDA kernels: built and loaded for {archs}; no CUDA device on this machine"]
    return []
