"""`neutralize doctor`: the facts, and for every lack its reason and its remedy."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from terminals import on_terminal

import neutralize as nz
from neutralize import doctor

COMMAND = [sys.executable, "-m", "neutralize", "doctor"]
VERSION = metadata.version("neutralize")
# An install that lacks nothing, as neutralize._native.build_info describes it.
FULL = {
    "native": {"built": True, "loaded": True, "reason": "loaded"},
    "cpu": {"isas_compiled": ["avx2", "plain"], "isas_usable": ["avx2", "plain"], "isa": "avx2"},
    "cuda": {"built": True, "loaded": True, "reason": "loaded", "archs": ["7.5", "9.0+PTX"]},
    "built_with": {"abi_target": "2.10", "compiler": "g++ 12", "nvcc": "release 13.0"},
}


def test_json_holds_what_diagnose_returns():
    printed = json.loads(subprocess.check_output([*COMMAND, "--json"], text=True))
    assert printed == json.loads(doctor.diagnose().to_json())
    assert printed["versions"] == {
        "neutralize": VERSION,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    assert printed["devices"][0]["name"] == "cpu"


def test_sources_that_are_not_installed_have_no_version(monkeypatch):
    monkeypatch.setattr(metadata.Distribution, "discover", lambda **asked: iter(()))
    assert nz.__version__ == doctor.diagnose().versions["neutralize"] == "0+unknown"


def test_backends_are_those_the_ops_use():
    for device in doctor.diagnose().devices:
        assert device.backend == nz.ops.backend(torch.empty(1, device=device.name))


def test_prints_plain_lines_into_a_pipe():
    lines = subprocess.check_output(COMMAND, text=True).splitlines()
    assert lines[0] == f"neutralize    {VERSION}"
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
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    environment.pop("NO_COLOR", None)
    status, text = on_terminal(COMMAND, env=environment)
    assert status == 0
    assert "\x1b[1m" in text
    assert VERSION in text


def less(part, **facts):
    """The full install, but for these facts about one part of it."""
    return {**FULL, part: {**FULL[part], **facts}}


@pytest.mark.parametrize(
    ("build", "has_device", "reasons"),
    [
        (FULL, True, []),
        (
            FULL,
            False,
            ["CUDA kernels: built and loaded for 7.5 9.0+PTX; no CUDA device on this machine"],
        ),
        (
            less("cuda", loaded=False, reason="torch 2.13.0+cpu has no CUDA"),
            False,
            ["CUDA kernels: built for 7.5 9.0+PTX, not loaded: torch 2.13.0+cpu has no CUDA"],
        ),
        (
            less("cuda", built=False, loaded=False, reason="NEUTRALIZE_CUDA=0"),
            True,
            ["no CUDA kernels: NEUTRALIZE_CUDA=0; reinstall neutralize where that is not so"],
        ),
        (
            less("cpu", isa="plain"),
            True,
            ["CPU kernels: NEUTRALIZE_CPU_ISA=plain holds them back; unset it"],
        ),
        (
            less(
                "native", built=False, loaded=False, reason="no C++ compiler was found when the package was installed"
            ),
            False,
            [
                "pure Python: no C++ compiler was found when the package was installed; "
                "install a C++ compiler (g++ or clang++) and reinstall neutralize"
            ],
        ),
        (
            less("native", loaded=False, reason="the native extension is there but does not load: undefined symbol"),
            False,
            ["pure Python: the native extension is there but does not load: undefined symbol; reinstall neutralize"],
        ),
    ],
)
def test_says_what_is_missing_why_and_what_to_do(monkeypatch, build, has_device, reasons):
    monkeypatch.setattr(doctor._native, "build_info", lambda: build)
    monkeypatch.setattr(doctor, "_devices", tuple)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_device)
    diagnosis = doctor.diagnose()
    assert list(diagnosis.why_not_more) == reasons
    assert diagnosis.rows()[5:] == [("why not more", reason) for reason in reasons]


def test_says_when_an_isa_is_held_back():
    usable = nz._native.build_info()["cpu"]["isas_usable"]
    if usable in ([], ["plain"]):
        pytest.skip("this install has no kernels beyond the plain ones to hold back")
    environment = {**os.environ, "NEUTRALIZE_CPU_ISA": "plain"}
    reasons = json.loads(subprocess.check_output([*COMMAND, "--json"], text=True, env=environment))["why_not_more"]
    assert "CPU kernels: NEUTRALIZE_CPU_ISA=plain holds them back; unset it" in reasons
