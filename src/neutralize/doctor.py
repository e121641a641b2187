"""Say what this installation of neutralize can do on this machine, and why not more."""

import json
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

import neutralize
from neutralize import _native, ops


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
        build: what this install holds and uses: `neutralize._native.build_info`
        devices: those of this machine
        why_not_more: what is missing, each with its reason and its remedy
    """

    versions: dict[str, str | None]
    build: dict[str, Any]
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
        if not self.build["native"]["loaded"]:
            return "none: the same ops in plain PyTorch"
        cpu, built_with = self.build["cpu"], self.build["built_with"]
        built = f"built: {', '.join(cpu['isas_compiled'])}; for torch ≥ {built_with['abi_target']}"
        return f"{cpu['isa']} ({built}), by {built_with['compiler']}"

    def _cuda_kernels(self) -> str:
        cuda = self.build["cuda"]
        if not cuda["built"]:
            return "none"
        state = "loaded" if cuda["loaded"] else "built, not loaded"
        return f"{state} ({' '.join(cuda['archs'])}), by {self.build['built_with']['nvcc']}"


def diagnose() -> Diagnosis:
    """Return what was built, what this machine would use, and why not more.

    Asks PyTorch for its devices, so where there is a GPU this initialises CUDA.
    """
    build = _native.build_info()
    return Diagnosis(
        versions={
            "neutralize": neutralize.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        build=build,
        devices=_devices(),
        why_not_more=tuple(_why_not_more(build)),
    )


def _devices() -> tuple[Device, ...]:
    devices = [Device("cpu", platform.machine(), ops.backend(torch.empty(1)))]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            model = f"{properties.name}, sm_{properties.major}{properties.minor}"
            name = f"cuda:{index}"
            devices.append(Device(name, model, ops.backend(torch.empty(1, device=name))))
    return tuple(devices)


def _why_not_more(build: dict[str, Any]) -> list[str]:
    native, cpu, cuda = build["native"], build["cpu"], build["cuda"]
    if not native["loaded"]:
        compiler = "" if native["built"] else "install a C++ compiler (g++ or clang++) and "
        return [f"pure Python: {native['reason']}; {compiler}reinstall neutralize"]
    reasons = []
    if cpu["isa"] != cpu["isas_usable"][0]:
        reasons.append(f"CPU kernels: NEUTRALIZE_CPU_ISA={cpu['isa']} holds them back; unset it")
    archs = " ".join(cuda["archs"])
    if not cuda["built"]:
        reasons.append(f"no CUDA kernels: {cuda['reason']}; reinstall neutralize where that is not so")
    elif not cuda["loaded"]:
        reasons.append(f"CUDA kernels: built for {archs}, not loaded: {cuda['reason']}")
    elif not torch.cuda.is_available():
        reasons.append(f"CUDA kernels: built and loaded for {archs}; no CUDA device on this machine")
    return reasons
