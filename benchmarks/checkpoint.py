"""Edits of checkpoints on disk: against loading and saving with safetensors, against size, and their memory.

    make bench-checkpoint                     everything, saved in benchmarks/results/checkpoint-latest.json
    python benchmarks/checkpoint.py --check   exit 1 if a goal is missed

Every edit is verified first: the bytes are those that the ops make of live tensors, and restore brings back the old
ones. Both sides end with fsync. The planning of layers is timed apart: it depends on the model, not on the bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import neutralize as nz
from neutralize.checkpoint import Checkpoint
from neutralize.checkpoint.setters import parse_setters

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20


def llama(folder: Path, *, hidden: int, inner: int, layers: int, vocabulary: int, shard: int, sparse: bool) -> None:
    """Write a bfloat16 Llama as transformers saves it: random weights, or files that are all holes."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if filled + nbytes > shard and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    weight_map = {}
    for number, part in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(part, file))
        if sparse:
            _write_holes(folder / file, part)
        else:
            save_file(
                {name: torch.randn(shape).bfloat16() for name, shape in part.items()}, folder / file, {"format": "pt"}
            )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_holes(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, place = {}, 0
    for name, shape in shapes.items():
        end = place + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def load_and_save(files: list[Path], change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """What a user would write: load the shards, change tensors, save them, and bring them to the disk."""
    for path in files:
        held = load_file(path)
        change(held)
        temporary = path.with_suffix(".new")
        save_file(held, temporary, {"format": "pt"})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


def against_safetensors(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Two blocks off in place, by the default edit and by all their outgoing weights, against load and save."""
    llama(folder, hidden=1024, inner=4096, layers=24, vocabulary=32000, shard=250 * MIB, sparse=False)
    checkpoint = Checkpoint(folder)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    rows = []
    for name, options in (("norm gains (default)", {}), ("outgoing weights", {"edit": "outgoing"})):
        layers = ["model.layers[3]", "model.layers[20]"]
        planning = timed(lambda: nz.plan(checkpoint, layers, "passthrough", **options))  # noqa: B023
        plan = nz.plan(checkpoint, layers, "passthrough", **options)
        before = digests(folder)
        undo = plan.apply(checkpoint)
        edited = digests(folder)
        files = [folder / file for file in sorted({r.file for p in checkpoint.patches(plan) for r in p.regions})]

        def change(held: dict[str, torch.Tensor]) -> None:
            for edit in plan.edits:  # noqa: B023
                if edit.parameter in held:
                    held[edit.parameter] = torch.zeros_like(held[edit.parameter])

        undo.restore()
        assert digests(folder) == before, "restore did not bring every byte back"
        ours, restoring, theirs = [], [], []
        for _ in range(repeats):
            started = time.perf_counter()
            undo = plan.apply(checkpoint)
            ours.append(time.perf_counter() - started)
            restoring.append(timed(undo.restore))
            kept = {path: path.read_bytes() for path in files}
            theirs.append(timed(lambda: load_and_save(files, change)))  # noqa: B023
            assert digests(folder) == edited, "the two sides differ"
            for path, content in kept.items():
                path.write_bytes(content)
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        rows.append(
            {
                "case": f"2 of 24 blocks off in {total / 1e9:.2f} GB, {name}",
                "bytes": plan.written_bytes,
                "apply_s": statistics.median(ours),
                "restore_s": statistics.median(restoring),
                "load_save_s": statistics.median(theirs),
                "ratio": statistics.median(theirs) / statistics.median(ours),
                "planning_s": planning,
                "goal": 10.0 if not options else None,
            }
        )
    return rows


def against_sizes(folder: Path) -> dict[str, list[list[float]]]:
    """Time of one edit in checkpoints of 1 to 16 GB, and of edits of 1 to 512 MiB in one checkpoint."""
    found: dict[str, list[list[float]]] = {"checkpoint": [], "edit": []}
    for gigabytes in (1, 2, 4, 8, 16):
        place = folder / f"{gigabytes}"
        place.mkdir()
        rows = gigabytes * (1 << 30) // (2 * 4096)
        _write_holes(place / "model.safetensors", {"big.weight": (rows - 4096, 4096), "small.weight": (4096, 4096)})
        found["checkpoint"].append([gigabytes * 1.0, _edit_time(place, "small.weight=0.5")])
    place = folder / "edits"
    place.mkdir()
    _write_holes(place / "model.safetensors", {"big.weight": (1 << 17, 4096)})
    with (place / "model.safetensors").open("rb+") as file:  # real blocks: what an edit meets
        file.seek(0, 2)
        end = file.tell()
        file.seek(end - (1 << 30))
        for _ in range(1024):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())
    for mebibytes in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        found["edit"].append([mebibytes * 1.0, _edit_time(place, f"big.weight[:{mebibytes * 128}]=0.5")])
    return found


def _edit_time(folder: Path, setter: str) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        checkpoint = Checkpoint(folder)
        undo = checkpoint.apply(parse_setters([setter], checkpoint.layout), digest="bench")
        times.append(time.perf_counter() - started)
        undo.restore()
    return statistics.median(times)


_CHILD = """
import sys
import torch

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

base = peak()
import neutralize as nz
plan = nz.plan(sys.argv[1], "model.layers[3:5]", sys.argv[2], **({"factor": 0.3} if sys.argv[2] == "damp" else {}))
planned = peak()
undo = plan.apply(sys.argv[1])
applied = peak()
undo.restore()
print(base, planned, applied, peak(), plan.written_bytes)
"""


def memory(folder: Path) -> list[dict[str, Any]]:
    """Peak resident memory of planning and editing 12 GB, in a process of its own; that of importing torch apart."""
    llama(folder, hidden=4096, inner=11008, layers=29, vocabulary=32000, shard=4 << 30, sparse=True)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    rows = []
    for strategy in ("auto", "damp"):
        out = subprocess.run(
            [sys.executable, "-c", _CHILD, str(folder), strategy], capture_output=True, text=True, check=True
        )
        base, planned, applied, restored, written = map(int, out.stdout.split()[-5:])
        rows.append(
            {
                "case": f"{total / 1e9:.1f} GB, 2 blocks, {strategy}",
                "bytes": written,
                "torch_mib": base / 1024,
                "planning_mib": (planned - base) / 1024,
                "editing_mib": (max(applied, restored) - planned) / 1024,
                "ours_mib": (max(applied, restored) - base) / 1024,
                "goal": 500.0,
            }
        )
    return rows


def plot(sizes: dict[str, list[list[float]]], path: Path) -> None:
    """Time against checkpoint size at a constant edit, and against edit size in one checkpoint."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, label in (
        (left, "checkpoint", "checkpoint, GB (edit: 32 MiB)"),
        (right, "edit", "edit, MiB (checkpoint: 1 GiB)"),
    ):
        x, y = zip(*sizes[key], strict=True)
        axes.plot(x, y, "o-", color="#1f5fa8")
        axes.set(
            xlabel=label,
            ylabel="seconds, undo and fsync included",
            xscale="log",
            ylim=(0, None) if axes is left else None,
        )
        axes.grid(visible=True, alpha=0.3)
    right.set_yscale("log")
    left.set_title("the checkpoint's size does not matter")
    right.set_title("the edit's size does")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run everything, print it, save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made (2 GB of disk)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        place = Path(name)
        for part in ("llama", "sizes", "sparse"):
            (place / part).mkdir()
        speed = against_safetensors(place / "llama", arguments.repeats)
        sizes = against_sizes(place / "sizes")
        peaks = memory(place / "sparse")
    for row in speed:
        print(
            f"{row['case']}: {row['bytes']} bytes, {row['apply_s']:.3f} s and {row['restore_s']:.3f} s to restore; "
            f"load and save {row['load_save_s']:.2f} s: {row['ratio']:.1f} x (planning {row['planning_s']:.1f} s)"
        )

    for key, unit in (("checkpoint", "GB"), ("edit", "MiB")):
        print(f"{key}: " + ", ".join(f"{x:g} {unit} {y:.3f} s" for x, y in sizes[key]))
    for row in peaks:
        print(f"{row['case']}: torch {row['torch_mib']:.0f} MiB, planning {row['planning_mib']:.0f} more, editing "
              f"{row['editing_mib']:.0f} more: {row['ours_mib']:.0f} MiB ours")  # fmt: skip
    flat = [seconds for _, seconds in sizes["checkpoint"]]
    missed = [row["case"] for row in speed if row["goal"] and row["ratio"] < row["goal"]]
    missed += [row["case"] for row in peaks if row["ours_mib"] >= row["goal"]]
    missed += ["time against checkpoint size is not flat"] if max(flat) > 2 * min(flat) else []
    for case in missed:
        print(f"MISSED: {case}")
    content = {"date": date.today().isoformat(), "machine": platform.machine(), "torch": torch.__version__,
               "speed": speed, "sizes": sizes, "memory": peaks}  # fmt: skip
    (RESULTS / "checkpoint-latest.json").write_text(json.dumps(content, indent=1) + "\n")
    plot(sizes, RESULTS / "checkpoint-latest.png")
    return int(arguments.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
