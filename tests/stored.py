"""Real checkpoints for tests: written by transformers, located by a reader of a few lines, edited, loaded again."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import torch

from neutralize.checkpoint.layout import Elements, Layout
from neutralize.checkpoint.naming import Names, retarget
from neutralize.checkpoint.region import Files
from neutralize.plan import Edit

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


def located(folder: Path) -> Layout:
    """The layout of a folder of safetensors files, as this test reads them."""
    tensors = {}
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, about in header.items():
            if name != "__metadata__":
                offset = 8 + length + about["data_offsets"][0]
                tensors[name] = Elements.whole(name, DTYPES[about["dtype"]], about["shape"], path.name, offset)
    config = folder if (folder / "config.json").exists() else None
    return Layout(folder, tuple(path.name for path in files), tensors, kind="safetensors", config=config)


def edited(layout: Layout, edits: Sequence[Edit], names: Names) -> None:
    """Carry edits of parameters out on the files."""
    with Files(layout.root, writable=True) as files:
        for patch in layout.patches(retarget(edits, names, layout), files):
            for _ in patch.run(files):
                pass
