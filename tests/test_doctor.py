"""`neutralize doctor`: the facts, and for every lack its reason and its remedy."""

import json
import os
import pty
import subprocess
import sys

import pytest
import torch

import neutralize as nz
from neutralize import doctor

COMMAND = [sys.executable, "-m", "neutralize", "doctor"]
FULL_BUILD = {"native": True, "cuda": True, "cuda_archs": ["7.5", "9.0+PTX"], "cxx": "g++", "nvcc": "release 13"}


def test_json_holds_what_diagnose_returns():
    printed = json.loads(subprocess.check_output([*COMMAND, "--json"], text=True))
    assert printed == json.loads(doctor.diagnose().to_json())
    assert printed["versions"] == {
        "neutralize": nz.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    assert printed["devices"][0]["name"] == "cpu"


def test_backends_are_those_the_ops_use():
    for device in doctor.diagnose().devices:
        assert device.backend == nz.ops.backend(torch.empty(1, device=device.name))


def test_prints_plain_lines_into_a_pipe():
    lines = subprocess.check_output(COMMAND, text=True).splitlines()
    assert lines[0] == f"neutralize    {nz.__version__}"
    assert [line[:14].rstrip() for line in lines[:6]] == [
        "neutralize",
        "python",
        "torch",
        "CPU kernels",
        "CUDA kernels",
        "cpu",
    ]
    assert "\x1b" not in "".join(lines)


def test_prints_colour_on_a_terminal():
    master, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(COMMAND, stdout=terminal, env=environment)
    os.close(terminal)
    text = b""
    while True:
        try:
            block = os.read(master, 65536)
        except OSError:  # Linux says EIO where the other end is closed
            break
        if not block:
            break
        text += block
    os.close(master)
    assert process.wait() == 0
    assert b"\x1b[1m" in text
    assert nz.__version__.encode() in text


@pytest.mark.parametrize(
    ("build", "load_error", "reason"),
    [
        ({}, "No module", "pure Python: this copy was never installed; run `pip install .` where setup.py is"),
        (
            {"native": False, "native_reason": "no C++ compiler was found when the package was installed"},
            "No module",
            "pure Python: no C++ compiler was found when the package was installed; "
            "install one (g++ or clang++) and reinstall neutralize",
        ),
        (
            FULL_BUILD,
            "undefined symbol: x",
            "pure Python: the extension was built but does not load (undefined symbol: x); reinstall neutralize",
        ),
    ],
)
def test_says_why_nothing_native(monkeypatch, build, load_error, reason):
    monkeypatch.setattr(doctor, "_build_record", lambda: build)
    monkeypatch.setattr(doctor, "_loaded_extension", lambda: ({}, load_error))
    diagnosis = doctor.diagnose()
    assert diagnosis.why_not_more[0] == reason
    assert dict(diagnosis.rows())["CPU kernels"] == "none: the same ops in plain PyTorch"


@pytest.mark.parametrize(
    ("build", "torch_cuda", "registered", "available", "reasons"),
    [
        (
            {**FULL_BUILD, "cuda": False, "cuda_reason": "NEUTRALIZE_CUDA=0"},
            "13.0",
            False,
            False,
            ["no CUDA kernels: NEUTRALIZE_CUDA=0; mend that and reinstall neutralize"],
        ),
        (
            FULL_BUILD,
            None,
            False,
            False,
            ["CUDA kernels: built for 7.5 9.0+PTX, not loaded: this PyTorch has no CUDA; install one that has"],
        ),
        (
            FULL_BUILD,
            "13.0",
            False,
            False,
            ["CUDA kernels: built for 7.5 9.0+PTX, not loaded; `python -c 'import neutralize._cuda'` says why"],
        ),
        (
            FULL_BUILD,
            "13.0",
            True,
            False,
            ["CUDA kernels: built and loaded for 7.5 9.0+PTX; no CUDA device on this machine"],
        ),
        (FULL_BUILD, "13.0", True, True, []),
    ],
)
def test_says_why_no_cuda(monkeypatch, build, torch_cuda, registered, available, reasons):
    monkeypatch.setattr(doctor, "_build_record", lambda: build)
    monkeypatch.setattr(doctor, "_loaded_extension", lambda: ({"isa": "avx2", "isas": ["plain", "avx2"]}, ""))
    monkeypatch.setattr(doctor, "_has_kernel", lambda key: registered)
    monkeypatch.setattr(doctor, "_devices", tuple)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert list(doctor.diagnose().why_not_more) == reasons
