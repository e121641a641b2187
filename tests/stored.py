"""Checkpoints for tests that need no index: every safetensors file of a folder, and edits carried out on them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from neutralize.checkpoint.layout import Layout
from neutralize.checkpoint.locate import join
from neutralize.checkpoint.naming import Names, retarget
from neutralize.checkpoint.region import Files
from neutralize.checkpoint.safetensors import read_safetensors
from neutralize.plan import Edit


def located(folder: Path) -> Layout:
    """The layout of a folder of safetensors files, with its config if it has one."""
    layout = join(folder, [read_safetensors(path) for path in sorted(folder.glob("*.safetensors"))])
    return replace(layout, config=folder) if (folder / "config.json").exists() else layout


def edited(layout: Layout, edits: Sequence[Edit], names: Names) -> None:
    """Carry edits of parameters out on the files."""
    with Files(layout.root, writable=True) as files:
        for patch in layout.patches(retarget(edits, names, layout), files):
            for _ in patch.run(files):
                pass
