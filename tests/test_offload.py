"""Models that accelerate has dispatched: the weights are edited where they are, and put back."""

from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from bits import refusal
from networks import perturbed, small_llama
from torch import nn

import neutralize as nz
from neutralize.offload import offloaded

IDS = {"input_ids": torch.arange(20).reshape(2, 10) * 7 % 90 + 5}


def llama(tied: bool = False) -> nn.Module:
    return perturbed(small_llama(vocab_size=99, tie_word_embeddings=tied)).to(torch.bfloat16).eval()


def on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    return accelerate.dispatch_model(model, places, offload_dir=str(folder), force_hooks=True)


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**IDS).logits


@pytest.mark.parametrize("place", [on_cpu, on_disk, dispatched])
@pytest.mark.parametrize("edit", ["cheapest", "outgoing"])
def test_it_becomes_what_the_model_becomes_that_is_not_offloaded(place, edit, tmp_path):
    live = llama()
    before = run(live)
    plan = nz.plan(live, "model.layers[1]", edit=edit)
    model = place(llama(), tmp_path)
    assert next(model.model.layers[1].parameters()).is_meta
    assert torch.equal(run(model), before)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    undo = plan.apply(model)
    plan.apply(live)
    assert not torch.equal(run(live), before)
    assert torch.equal(run(model), run(live))
    damped = nz.plan(live, "model.layers[1:3]", "damp", factor=0.5).apply(model)
    assert not torch.equal(run(model), run(live))
    damped.restore()
    assert torch.equal(run(model), run(live))
    undo.restore()
    assert torch.equal(run(model), before)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("place", [on_disk, dispatched])
def test_a_plan_can_be_made_on_an_offloaded_model(place, tmp_path):
    model = place(llama(), tmp_path)
    before = run(model)
    assert nz.plan(model, "model.layers[1]").edits == nz.plan(llama(), "model.layers[1]").edits
    assert torch.equal(run(model), before)


def test_tied_weights_are_written_where_they_are_one_and_refused_where_they_are_two(tmp_path):
    plan = nz.plan(llama(tied=True), ["model.embed_tokens", "lm_head"], "constant", weight=0.5)
    live, model = llama(tied=True), on_cpu(llama(tied=True), tmp_path)
    plan.apply(live)
    plan.apply(model)
    assert torch.equal(run(model), run(live))
    told = refusal(lambda: plan.apply(on_disk(llama(tied=True), tmp_path)))
    assert "expected 'model.embed_tokens.weight' and 'lm_head.weight' to be offloaded as the one tensor" in told


def test_a_checkpoint_that_the_offload_points_into_is_not_touched(tmp_path):
    llama().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=str(tmp_path / "offload")
    )
    told = refusal(lambda: nz.plan(llama(), "model.layers[1]").apply(model))
    assert "model.safetensors' itself, which others may read; edit the checkpoint, or offload a copy" in told
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    nz.plan(llama(), "model.layers[0]").apply(model)  # what is in memory can be edited


def test_broken_offload_folders_are_refused(tmp_path):
    model = on_disk(llama(), tmp_path)
    plan = nz.plan(llama(), "model.layers[1]")
    path = tmp_path / "model.layers.1.input_layernorm.weight.dat"
    path.write_bytes(path.read_bytes()[:-1])
    assert "63 bytes instead of 64 in" in refusal(lambda: plan.apply(model))
    path.unlink()
    assert "(No such file or directory); offload it again" in refusal(lambda: plan.apply(model))


def test_a_model_that_is_not_offloaded_has_nothing_elsewhere():
    assert offloaded(llama()) == ({}, {})
