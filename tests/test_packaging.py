"""What is shipped: the files of a wheel, what the binaries need of PyTorch, the version, the licence, the papers."""

from __future__ import annotations

import email
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import neutralize

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "neutralize"

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# ---- the wheel -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The pure-Python wheel of this checkout: what is in it beside the binaries is the same in every wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    return built(folder, "wheel", "*.whl")


def built(folder: Path, kind: str, pattern: str) -> Path:
    """What setuptools builds of a copy of the checkout."""
    program = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={"PATH": str(folder)},  # no compiler there
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (folder / "dist").glob(pattern)
    return path


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {f"neutralize/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")}
    expected |= {f"neutralize/{name}" for name in ("py.typed", "_build.json", "data/gpl-3.0.txt")}
    expected |= {f"neutralize/pages/templates/{path.name}" for path in (PACKAGE / "pages" / "templates").iterdir()}
    info = f"neutralize-{PROJECT['version']}.dist-info"
    expected |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")}
    expected |= {f"{info}/licenses/LICENSE"}
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == expected
        record = json.loads(archive.read("neutralize/_build.json"))
    assert not record["native"]
    assert str(ROOT) not in json.dumps(record)


def test_an_sdist_holds_all_that_its_tests_need(tmp_path):
    """They read and run the documentation, the examples, the benchmarks, and what checks the build."""
    rubbish = shutil.ignore_patterns("*.so", "*.pyc", "__pycache__", "*.egg-info", "_build.json", "*latest.json")
    for path in ROOT.iterdir():
        if path.name in ("src", "csrc", "tests", "benchmarks", "docs", "examples", ".ci"):
            shutil.copytree(path, tmp_path / path.name, ignore=rubbish)
        elif path.is_file() and path.name != ".git":  # that of a worktree
            shutil.copy(path, tmp_path)
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    with tarfile.open(built(tmp_path, "sdist", "*.tar.gz")) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {path for path in there - names if "/" in path} == set()
    assert {"Makefile", "mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff"} <= names
    assert {path for path in names - there if ".egg-info/" not in path} <= {"PKG-INFO", "setup.cfg"}


def test_the_metadata_say_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found = email.message_from_bytes(archive.read(name))
    assert found["License-Expression"] == "Apache-2.0"  # an SPDX expression
    assert found.get_all("License-File") == ["LICENSE"]
    assert found["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in found.get_all("Classifier")
    assert found["Description-Content-Type"] == "text/markdown"
    assert set(found.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])


# ---- the binaries ----------------------------------------------------------------------------------------------------
BINARIES = sorted(PACKAGE.glob("_*.so"))
# Of the C++ library and the compiler's runtime, of the C library (versioned: `free@GLIBC_2.2.5`), of CPython, of CUDA.
FOREIGN = re.compile(
    r"_ZN?K?S|_ZT[IVSN]|_Z(dl|nw|da|na)|__cx|_Unwind_|_?_?Py|_ITM_|__gmon_start__|_{0,2}cuda|.*@(GLIBC|GCC|CXXABI)"
)
STABLE = re.compile(r"(aoti_torch|torch)_\w+")


@pytest.mark.skipif(not BINARIES, reason="a pure-Python build: there is no binary to look at")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on this machine (binutils)")
@pytest.mark.parametrize("binary", BINARIES, ids=lambda path: path.name.split(".")[0])
def test_binaries_need_nothing_of_torch_but_its_stable_c_functions(binary):
    """So one binary serves every torch from 2.10 on: no mangled name of c10, at or torch is looked up at load time."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", binary], capture_output=True, text=True, check=True)
    needed = [line.split()[-1] for line in listing.stdout.splitlines()]
    of_torch = [name for name in needed if not FOREIGN.match(name)]
    assert of_torch
    assert not [name for name in of_torch if not STABLE.fullmatch(name)]
    declared = "".join(
        path.read_text(encoding="utf-8")
        for path in (Path(torch.__file__).parent / "include" / "torch" / "csrc").rglob("*shim*.h")
    )
    assert not [name for name in of_torch if not re.search(rf"\b{name}\b", declared)]


@pytest.mark.skipif(not BINARIES, reason="a pure-Python build: there is no binary to look at")
def test_binaries_are_of_one_python():
    """pybind11 is not abi3, and the file name does not claim it: one wheel per Python, any torch."""
    assert all(".abi3." not in path.name for path in BINARIES)
    assert "py_limited_api = False" in (ROOT / "setup.py").read_text(encoding="utf-8")


# ---- one version, and the papers -------------------------------------------------------------------------------------
def test_the_version_stands_in_one_place():
    assert neutralize.__version__ == PROJECT["version"] == metadata.version("neutralize")
    sources = [*PACKAGE.rglob("*.py"), ROOT / "setup.py"]
    assert not [path for path in sources if PROJECT["version"] in path.read_text(encoding="utf-8")]


def test_the_citation_is_valid():
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license", "type"} <= set(found)
    assert all(set(author) & {"name", "family-names"} for author in found["authors"])
    assert str(found["version"]) == PROJECT["version"]
    assert found["license"] == PROJECT["license"]
    assert found["type"] == "software"


def test_the_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0] == "Unreleased"
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }


def test_what_checks_everything_is_what_contributors_are_told():
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "bash .ci/run" in told
    for target in re.findall(r"^make ([a-z-]+)$", script, re.MULTILINE):
        assert f"make {target}" in told
    for path in re.findall(r"tests/test_\w+\.py", told):
        assert (ROOT / path).exists()
    assert (ROOT / "SECURITY.md").exists()
