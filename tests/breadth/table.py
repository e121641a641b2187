"""The results as docs/breadth.json and, readable, as docs/breadth.md."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any


def save(results: dict[str, Any], path: Path) -> None:
    """Write both files, whole or not at all."""
    ordered = dict(sorted(results.items()))
    for file, text in (
        (path, json.dumps({"types": ordered}, indent=1) + "\n"),
        (path.with_suffix(".md"), _page(ordered)),
    ):
        draft = file.with_name(f".{file.name}")
        draft.write_text(text)
        draft.replace(file)


def today() -> str:
    """The day and the versions that a type is run with."""
    return f"{date.today().isoformat()}, {', '.join(f'{name} {version}' for name, version in _versions().items())}"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("neutralize", "torch", "transformers", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def headline(results: dict[str, Any], family: str = "") -> str:
    """Built, exact, folded, in one line."""
    chosen = [each for name, each in results.items() if name.startswith(family)]
    built = [each for each in chosen if each["verdict"] not in ("not built", "no stack")]
    counts = Counter(each["verdict"] for each in built)
    exact, folded = counts["exact"], counts["folded"]
    share = f"{exact / len(built):.0%} exact, {(exact + folded) / len(built):.0%} exact or folded" if built else "none"
    listing = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    return f"{len(built)} types built of {len(chosen)}: {share} ({listing})"


def _page(results: dict[str, Any]) -> str:
    runs = Counter(each["run"] for each in results.values())
    built = {name: each for name, each in results.items() if each["rows"]}
    lines = [
        "# Breadth",
        "",
        "Made by `make breadth`; do not edit. A middle block of every repeated stack of every architecture that",
        "transformers and timm build offline (tiny, random, every parameter perturbed) is switched off by",
        "`nz.plan(model, block)` and compared, output by output, with the same network with the block cut out by a",
        "forward hook, on the inputs of the plan, on fresh ones of their shapes and, where the model takes them, on",
        "fresh ones of other shapes; then restored, and compared bit by bit. The error is the worst of them.",
        "",
        f"**transformers**: {headline(results, 'transformers/')}.",
        "",
        f"**timm**: {headline(results, 'timm/')}.",
        "",
        *(f"Run on {run}: {count} types." for run, count in sorted(runs.items())),
        "",
        "| verdict | meaning |",
        "|-|-|",
        "| exact | certificate `exact`, and every output equal bit for bit (-0 equals 0) |",
        "| folded | certificate with a bound, and the outputs within 2e-5, float32, relative |",
        "| measured | no bound is claimed; the error is what was measured |",
        "| refused | an error that says why; nothing was written |",
        "",
        "A type counts as its worst stack.",
        "",
        "## Refused and unsupported",
        "",
        "| reason | stacks | of |",
        "|-|-|-|",
    ]
    grouped: dict[str, list[str]] = {}
    for name, each in built.items():
        for row in each["rows"]:
            if row["verdict"] not in ("exact", "folded"):
                grouped.setdefault(f"{row['verdict']}: {_general(row)}", []).append(name.partition("/")[2])
    for reason, names in sorted(grouped.items(), key=lambda item: -len(item[1])):
        unique = list(dict.fromkeys(names))
        lines.append(f"| {_cell(reason)} | {len(names)} | {', '.join(unique)} |")
    lines += [
        "",
        "## Every type",
        "",
        "| type | model | block | verdict | error | inputs | certificate | bytes written | of |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for name, each in built.items():
        for row in each["rows"]:
            error = "" if row["error"] is None else f"{row['error']:.1e}" if row["error"] else "0"
            lines.append(
                f"| {name} | {each['model']} | `{row['block']}` ({row['kind']}) | {row['verdict']} | {error} | "
                f"{row['inputs']} | {row['certificate']} | {row['written'] or ''} | {row['total']} |"
            )
    lines += ["", "## Not built, or without a stack", "", "| reason | types |", "|-|-|"]
    absent: dict[str, list[str]] = {}
    for name, each in results.items():
        if not each["rows"]:
            reason = each.get("reason") or "no repeated block that keeps its shape"
            absent.setdefault(_short(reason), []).append(name)
    for reason, names in sorted(absent.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {_cell(reason)} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def _general(row: dict[str, Any]) -> str:
    """The reason without the names in it, so that like ones are counted together."""
    text = row["reason"].partition("\n")[0]
    text = re.sub(r"'[^']*'", "…", text).replace(row["kind"], "block")
    text = re.sub(r"\[[\d, ]+\]", "[…]", text)
    return re.sub(r"^plan: expected ", "expected ", text)[:230]


def _short(reason: str) -> str:
    return re.sub(r"^\w+: ", "", reason)[:110]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def refusals(results: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Every refused stack with its reason."""
    for name, each in results.items():
        for row in each["rows"]:
            if row["verdict"] == "refused":
                yield name, row["reason"]
