"""A trained model in a GGUF file: its blocks are off exactly, and every byte comes back."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import neutralize as nz
from neutralize.demo.subject import weights_file


def test_blocks_of_a_trained_model_are_off_exactly_in_its_file(tmp_path: Path) -> None:
    source = weights_file()
    shutil.copyfile(source, tmp_path / source.name)
    path = tmp_path / source.name
    intact = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=path.name, dtype=torch.float32).eval()
    tokens = torch.arange(100, 124)[None]
    with nz.excised(intact, "model.layers[4]"), torch.no_grad():
        mlp = intact.get_submodule("model.layers.9.mlp")
        handle = mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        wanted = intact(tokens).logits
        handle.remove()
    plan = nz.plan(path, "model.layers[4]")
    undo = plan.apply(path)
    assert plan.certificate.kind == "exact"
    assert undo.held_bytes == 2 * 576 * 4  # two norm gains in float32: nothing quantized is touched
    second = nz.plan(path, "model.layers[9].mlp", "zero").apply(path)
    edited = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(edited(tokens).logits, wanted)
    second.restore()
    undo.restore()
    assert path.read_bytes() == source.read_bytes()
