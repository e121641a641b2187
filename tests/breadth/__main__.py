"""Run the breadth suite: each type in a process of its own, with a time limit; write docs/breadth.json and .md."""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from . import build, judge, table

DOCS = Path(__file__).parents[2] / "docs"


def examine(family: str, kind: str) -> dict[str, Any]:
    """Build one type and judge its stacks."""
    started = time.perf_counter()
    for noise in (0.1, 0.02):
        rows: list[dict[str, Any]] = []
        try:
            for built in build.build(family, kind, noise):
                if rows := judge.judge(built):
                    break
        except build.NotBuilt as error:
            return {"family": family, "type": kind, "verdict": "not built", "reason": str(error), "rows": []}
        rows = rows or judge.judge_lone(built)
        if all(math.isfinite(row["effect"]) for row in rows):
            break  # else the network without a block overflows, and there is nothing to compare with
    verdict = min((row["verdict"] for row in rows), key=judge.ORDER.index, default="no stack")
    seconds = round(time.perf_counter() - started, 1)
    return {"family": family, "type": kind, "model": built.kind, "verdict": verdict, "rows": rows, "seconds": seconds}


def _work(family: str, kind: str, answers: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sink = os.open(os.devnull, os.O_WRONLY)  # what libraries print while they build
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    try:
        answers.send(examine(family, kind))
    except Exception:
        answers.send(
            {"family": family, "type": kind, "verdict": "crashed", "reason": traceback.format_exc()[-600:], "rows": []}
        )


def _everything() -> list[tuple[str, str]]:
    types = [("transformers", kind) for kind in build.transformers_types()]
    try:
        types += [("timm", module) for module in build.timm_modules()]
    except ImportError:
        print("timm is not installed: pip install 'neutralize[breadth]'", file=sys.stderr)
    return types


def _warm_up() -> None:
    """Import what every worker needs before they are forked."""
    import transformers.modeling_utils
    import transformers.models.auto.modeling_auto  # noqa: F401

    import neutralize

    torch.set_num_threads(1)
    neutralize.plan(
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), "0", example_inputs=torch.ones(1, 2)
    )


def main() -> int:
    """Return 1 if a verdict is WRONG or crashed."""
    parser = argparse.ArgumentParser(prog="breadth", description=__doc__)
    parser.add_argument("only", nargs="*", help="globs over types, e.g. 'llama*' 'timm/resnet'; others keep their rows")
    parser.add_argument("--resume", action="store_true", help="only what docs/breadth.json lacks")
    parser.add_argument("--again", nargs="*", default=[], metavar="VERDICT", help="only what has one of these verdicts")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=150, help="seconds per type")
    parser.add_argument("--json", type=Path, default=DOCS / "breadth.json")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.json.read_text())["types"] if options.json.exists() else {}
    todo = []
    for family, kind in _everything():
        name = f"{family}/{kind}"
        if options.only and not any(
            fnmatch.fnmatch(name, glob) or fnmatch.fnmatch(kind, glob) for glob in options.only
        ):
            continue
        if options.resume and name in results:
            continue
        if options.again and results.get(name, {}).get("verdict") not in options.again:
            continue
        todo.append((family, kind))
    _warm_up()
    _run(todo, results, options)
    bad = [name for name, each in results.items() if each["verdict"] in ("WRONG", "crashed")]
    for name in bad:
        print(f"{results[name]['verdict']}: {name}")
    print(table.headline(results))
    return 1 if bad else 0


def _run(todo: list[tuple[str, str]], results: dict[str, Any], options: argparse.Namespace) -> None:
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[BaseProcess, str, str, float]] = {}
    queue, done = list(todo), 0
    while queue or running:
        while queue and len(running) < options.workers:
            family, kind = queue.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(family, kind, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = process, family, kind, time.monotonic()
        ready = wait(list(running), timeout=0.5)
        for receiver, (process, family, kind, started) in list(running.items()):
            late = time.monotonic() - started > options.limit
            if receiver not in ready and not late:
                continue
            result = {"family": family, "type": kind, "verdict": "not built", "rows": []}
            if receiver in ready:
                try:
                    result = receiver.recv()
                except EOFError:
                    result |= {"verdict": "crashed", "reason": "the process ended without an answer"}
            else:
                process.kill()
                result |= {"reason": f"took longer than {options.limit:.0f} s"}
            process.join()
            receiver.close()
            del running[receiver]
            done += 1
            results[f"{family}/{kind}"] = result | {"run": table.today()}
            reason = result.get("reason") or next((row["reason"] for row in result["rows"] if row["reason"]), "")
            seconds = time.monotonic() - started
            print(
                f"{done:4}/{len(todo)} {seconds:5.1f} s  {family}/{kind:32} {result['verdict']:10} {reason[:110]}",
                flush=True,
            )
            table.save(results, options.json)


if __name__ == "__main__":
    sys.exit(main())
