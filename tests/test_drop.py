"""Blocks that leave a model for good: the smaller model computes what the neutralized one does, to the bit."""

import json

import pytest
import torch
import transformers
from bits import refusal, weights
from networks import perturbed
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import neutralize as nz
from neutralize.cli import app

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MODELS = {
    "Llama": SMALL,
    "Gemma3Text": SMALL | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8},
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
}


def made(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**MODELS[kind])
    return perturbed(AutoModelForCausalLM.from_config(config))


def without(model, blocks, gone, ids):
    """The logits of the model with blocks cut out by hooks: they hand their input on."""
    hooks = [
        blocks[place].register_forward_hook(
            lambda module, args, kwargs, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0],
            with_kwargs=True,
        )
        for place in gone
    ]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("kind", MODELS)
def test_the_smaller_model_is_the_network_without_the_blocks(kind, tmp_path):
    model = made(kind)
    before = weights(model)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 4)
    (name,) = (name for name, module in model.named_modules() if module is blocks)
    gone = [1, 2]
    dropped = nz.drop(model, [f"{name}.{place}" for place in gone])
    assert weights(model) == before
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    expected = without(model, blocks, gone, ids)
    with nz.audit(tmp_path.parent / "audit.jsonl"):
        dropped.save(tmp_path / "smaller")
    told = json.loads((tmp_path.parent / "audit.jsonl").read_text().splitlines()[-1])
    size = sum(tensor.numel() * tensor.element_size() for tensor in dropped.model.parameters())
    assert (told["action"], told["target"], told["bytes"]) == ("export", str(tmp_path / "smaller"), size)
    assert (told["digest"], told["layers"]) == (dropped.digest, list(dropped.layers))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert dropped.parameters == sum(p.numel() for place in gone for p in blocks[place].parameters())
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    assert 2 in (config.get("num_hidden_layers"), config.get("n_layer"))
    if "layer_types" in MODELS[kind]:
        kinds = MODELS[kind]["layer_types"]
        assert config["layer_types"] == [kinds[place] for place in range(4) if place not in gone]
    assert [path.name for path in tmp_path.iterdir()] == ["smaller"]


def test_what_cannot_leave_is_refused(tmp_path):
    model = made("Llama")
    assert "expected a block of a ModuleList" in refusal(lambda: nz.drop(model, "model.layers[1].mlp"))
    assert "expected a block of 'model.layers' to stay" in refusal(lambda: nz.drop(model, "model.layers[:]"))
    assert "expected a model of transformers" in refusal(lambda: nz.drop(nn.Sequential(nn.Linear(2, 2)), "0"))
    assert "call model.eval()" in refusal(lambda: nz.drop(made("Llama").train(), "model.layers[1]"))
    dropped = nz.drop(model, "model.layers[1]")
    (tmp_path / "there").mkdir()
    assert "expected nothing at" in refusal(lambda: dropped.save(tmp_path / "there"))
    (tmp_path / "file").touch()
    assert "expected a folder that can be written" in refusal(lambda: dropped.save(tmp_path / "file" / "folder"))


def test_blocks_whose_place_counts_are_kept():
    """RoPE on all blocks but every fourth, by their number: without one the others would change."""
    torch.manual_seed(0)
    config = transformers.SmolLM3Config(**SMALL | {"no_rope_layer_interval": 2, "pad_token_id": 0})
    model = perturbed(AutoModelForCausalLM.from_config(config))
    dropped = nz.drop(model, "model.layers[1]")  # its per-block list says it, and is cut with it
    assert len(dropped.config["no_rope_layers"][1]) == 3


def test_post_norm_blocks_are_not_exact_and_stay():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    model = perturbed(transformers.BertModel(config))
    assert "expected blocks that are proven exact" in refusal(lambda: nz.drop(model, "encoder.layer[1]"))


def test_the_command_writes_the_smaller_model(tmp_path):
    model = made("Llama")
    model.save_pretrained(tmp_path / "whole")
    letters = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>").save_pretrained(tmp_path / "whole")
    run = CliRunner().invoke
    arguments = ["export", str(tmp_path / "whole"), "--drop", "model.layers[1:3]", "--output", str(tmp_path / "out")]
    answer = run(app, [*arguments, "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["config"]["num_hidden_layers"] == [4, 2]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(9)[None]
    blocks = model.model.layers
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, without(model, blocks, [1, 2], ids))
    again = run(app, arguments)
    assert again.exit_code == 2
    assert "expected nothing at" in again.stderr
