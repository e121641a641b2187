"""What building costs: the CUDA part on two cores, and the size of the wheel. Run it where nothing else runs.

    make bench-build

The CPU part is built first and apart, in a copy of the sources that is thrown away; the second build then is the CUDA
part alone, for every architecture of setup.py. Results go to benchmarks/results/build-latest.json.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "build-latest.json"
JOBS = 2
MOST_CUDA_SECONDS = 120
MOST_WHEEL_BYTES = 15_000_000


def build(folder: Path, *, cuda: bool) -> tuple[float, float]:
    """Build what is not built yet in a copy of the sources; seconds by the clock, and of all processors together."""
    environment = {**os.environ, "NEUTRALIZE_CUDA": str(int(cuda)), "MAX_JOBS": str(JOBS)}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    command = [sys.executable, "setup.py", "--quiet", "build"]
    begin, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    all_used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = all_used.ru_utime - used.ru_utime + all_used.ru_stime - used.ru_stime
    return round(time.perf_counter() - begin, 1), round(processors, 1)


def wheel_bytes(folder: Path) -> int:
    """Pack what was built as a wheel is packed, and weigh it."""
    (package,) = (folder / "build").glob("lib.*/neutralize")
    with zipfile.ZipFile(folder / "neutralize.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for path in package.rglob("*"):
            wheel.write(path, path.relative_to(package.parent))
    return (folder / "neutralize.whl").stat().st_size


def main() -> int:
    """Build, weigh, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "neutralize")
        ignore = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__", "_build.json")
        for tree in ("csrc", "src"):
            shutil.copytree(ROOT / tree, folder / tree, ignore=ignore)
        for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, folder)
        cpu_seconds, cpu_processor_seconds = build(folder, cuda=False)
        cuda_seconds, cuda_processor_seconds = build(folder, cuda=True)
        (about,) = (folder / "build").glob("lib.*/neutralize/_build.json")
        record = {
            "cpu_seconds": cpu_seconds,
            "cpu_processor_seconds": cpu_processor_seconds,
            "cuda_seconds": cuda_seconds,
            "cuda_processor_seconds": cuda_processor_seconds,
            "jobs": JOBS,
            "wheel_bytes": wheel_bytes(folder),
            "built": json.loads(about.read_text()),
        }
    goals = {
        f"CUDA part in at most {MOST_CUDA_SECONDS} s": record["cuda_seconds"] <= MOST_CUDA_SECONDS,
        f"wheel of at most {MOST_WHEEL_BYTES / 1e6:.0f} MB": record["wheel_bytes"] <= MOST_WHEEL_BYTES,
    }
    print(f"CUDA for {' '.join(record['built']['cuda_archs'])}, on {JOBS} jobs")
    print(f"CPU part  {cpu_seconds:6.1f} s, of processors {cpu_processor_seconds:6.1f} s")
    print(f"CUDA part {cuda_seconds:6.1f} s, of processors {cuda_processor_seconds:6.1f} s")
    print(f"wheel     {record['wheel_bytes'] / 1e6:6.1f} MB")
    print("\n".join(f"{'met' if met else 'MISSED'}: {goal}" for goal, met in goals.items()))
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    return int(options.check and not all(goals.values()))


if __name__ == "__main__":
    sys.exit(main())
