"""One wheel under several versions of torch: `make check-wheel`, or `python .ci/check_wheel.py 2.10.0 2.14.1`.

Builds the source distribution, of it one wheel, and for each version an environment with that torch and the wheel; in
it runs the program of tests/test_install.py, which uses every op. Gigabytes are downloaded, so the tests do without;
they look at the symbols that the binaries need (tests/test_packaging.py).
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from test_install import PROGRAM  # noqa: E402


def main(versions: list[str]) -> int:
    """Build, install, run; the exit status says whether all versions did."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (source,) = folder.glob("*.tar.gz")
        subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, source], check=True)
        (wheel,) = folder.glob("*.whl")
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        for version in versions:
            environment = folder / version
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
            python = environment / "bin" / "python"
            here = [*pip, "--python", str(python), "install", "--no-cache-dir"]
            subprocess.run([*here, f"torch=={version}", "numpy", wheel], check=True)
            command = [python, "-c", PROGRAM.format(before_import="pass")]
            result = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
            failed += result.returncode != 0
            if result.returncode == 0:
                found = json.loads(result.stdout)
                print(f"torch {found['torch']}: every op, by {found['backend']} kernels", flush=True)
            else:
                print(f"torch {version}: failed\n{result.stderr[-2000:]}", flush=True)
            shutil.rmtree(environment)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
