"""What `import neutralize` costs a program that has already imported torch."""

import argparse
import statistics
import subprocess
import sys

GOAL_SECONDS = 0.5
PROGRAM = """
import time, torch
start = time.perf_counter()
import neutralize
print(time.perf_counter() - start)
assert not torch.cuda.is_initialized(), "importing neutralize initialised CUDA"
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the goal is missed")
    options = parser.parse_args()
    seconds = [float(subprocess.check_output([sys.executable, "-c", PROGRAM], text=True)) for _ in range(5)]
    median = statistics.median(seconds)
    print(f"import neutralize after torch: {median:.3f} s (goal < {GOAL_SECONDS} s), of {sorted(seconds)}")
    sys.exit(options.check and median >= GOAL_SECONDS)
