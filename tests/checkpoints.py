"""Small checkpoints for tests, and their bytes: written with the safetensors package, compared byte by byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Matrices, vectors and a convolution in five dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "a.weight": random(48, 64),
        "a.bias": random(48),
        "b.weight": random(64, 300, dtype=torch.bfloat16),
        "b.bias": random(64, dtype=torch.bfloat16),
        "conv.weight": random(6, 4, 3, 3, dtype=torch.float16),
        "norm.weight": random(64, dtype=torch.float64),
        "fp8.weight": random(32, 32).to(torch.float8_e4m3fn),
        "steps": torch.arange(5),
    }


def save(folder: Path, *, shards: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write a folder as transformers does: one file, or shards and an index; returns what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    held = tensors(seed)
    if shards == 1:
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return held
    names = list(held)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: held[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return held


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def header_of(path: Path) -> bytes:
    """The header of a safetensors file, length included."""
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def own_model() -> nn.Module:
    """A model that transformers does not know."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
