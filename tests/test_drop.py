"""Blocks that leave a model for good: the smaller model computes what the neutralized one does, to the bit."""

import json

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from bits import refusal, weights
from networks import perturbed
from safetensors.torch import save_file
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


KEPT_IN_STEP = {
    "Qwen3Moe": (
        SMALL | {"mlp_only_layers": [0, 2], "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
        [1],
        {"num_hidden_layers": 3, "mlp_only_layers": [0, 1]},
    ),
    "DeepseekV2": (
        {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
        | {"num_hidden_layers": 3, "num_key_value_heads": 4, "first_k_dense_replace": 2, "n_routed_experts": 2}
        | {"num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8}
        | {"q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        [0],
        {"num_hidden_layers": 2, "first_k_dense_replace": 1},
    ),
    "Lfm2": (
        {name: value for name, value in SMALL.items() if name != "head_dim"} | {"full_attn_idxs": [1, 3]},
        [0, 2],
        {"num_hidden_layers": 2, "full_attn_idxs": [0, 1], "layer_types": ["full_attention"] * 2},
    ),
    "SmolLM3": (
        SMALL | {"no_rope_layers": [1, 0, 0, 1], "pad_token_id": 0},
        [1],
        {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 4},
    ),
}
"""Entries of the config that name places of blocks, or count some of them."""


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
    model.name_or_path = "where/it/came/from"
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
    assert told["source"] == "where/it/came/from"
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
    offloaded = cpu_offload(made("Llama"), execution_device=torch.device("cpu"))
    assert "weights are in memory, got 'model.embed_tokens.weight' on the meta device" in refusal(
        lambda: nz.drop(offloaded, "model.layers[1]")
    )
    grown = peft.get_peft_model(made("Llama"), peft.LoraConfig(r=2, target_modules=["o_proj"])).get_base_model()
    assert "got one with adapter 'default' active; call merge_and_unload() first" in refusal(
        lambda: nz.drop(grown.eval(), "model.layers[1]")
    )
    dropped = nz.drop(model, "model.layers[1]")
    (tmp_path / "there").mkdir()
    assert "expected nothing at" in refusal(lambda: dropped.save(tmp_path / "there"))
    dropped.model.generation_config.temperature = 0.5
    assert "expected a model that save_pretrained takes, got GenerationConfig is invalid: - `temperature`" in refusal(
        lambda: dropped.save(tmp_path / "invalid")
    )
    assert {path.name for path in tmp_path.iterdir()} == {"there"}
    dropped.model.generation_config.temperature = 1.0
    (tmp_path / "file").touch()
    assert "expected a folder that can be written" in refusal(lambda: dropped.save(tmp_path / "file" / "folder"))


@pytest.mark.parametrize("kind", KEPT_IN_STEP)
def test_what_the_config_says_of_single_blocks_keeps_step(kind, tmp_path):
    entries, gone, wanted = KEPT_IN_STEP[kind]
    torch.manual_seed(0)
    model = perturbed(AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**entries)))
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    expected = without(model, model.model.layers, gone, ids)
    dropped = nz.drop(model, [f"model.layers[{place}]" for place in gone])
    with torch.no_grad():
        assert torch.equal(dropped.model(input_ids=ids).logits, expected)
    again = transformers.AutoConfig.from_pretrained(dropped.save(tmp_path / "smaller"))
    assert {name: getattr(again, name) for name in wanted} == wanted


def test_a_block_that_would_be_another_at_its_new_place_stays():
    """A window that is longer than any input that is tried shows all the same."""

    class Windowed(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for place, block in enumerate(self.model.layers):
                block.self_attn.window = 4096 if place % 2 else None

    model = Windowed(transformers.LlamaConfig(**SMALL)).eval()
    for block in model.model.layers:
        block.gradient_checkpointing = True  # as a Trainer leaves them: it has nothing to do with the place
    told = refusal(lambda: nz.drop(model, "model.layers[1]"))
    assert "got 4096 instead of None for 'window' of 'model.layers.2.self_attn', which depends on its place" in told
    assert nz.drop(model, "model.layers[1:3]").model.model.layers[1].self_attn.window == 4096


def test_encoder_and_decoder_are_counted_apart():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = perturbed(transformers.T5ForConditionalGeneration(config))
    dropped = nz.drop(model, "decoder.block[1]")
    assert dropped.config == {"num_decoder_layers": (2, 1)}
    assert "got T5Config, of which no count" in refusal(lambda: nz.drop(model, "decoder.block[0]"))  # its biases


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_proven_too(dtype, tmp_path):
    made("Llama").to(dtype).save_pretrained(tmp_path / "whole")  # frequencies stay float32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    dropped = nz.drop(model, "model.layers[1]")
    assert {parameter.dtype for parameter in dropped.model.parameters()} == {dtype}
    ids = torch.arange(30)[None]
    expected = without(model, model.model.layers, [1], ids)
    with torch.no_grad():
        nn.init.zeros_(model.lm_head.weight)  # the smaller model has weights of its own
        assert torch.equal(dropped.model(input_ids=ids).logits, expected)


def test_post_norm_blocks_are_not_exact_and_stay():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    model = perturbed(transformers.BertModel(config))
    assert "expected blocks that are proven exact" in refusal(lambda: nz.drop(model, "encoder.layer[1]"))


def test_the_command_writes_the_smaller_model(tmp_path):
    model = made("Llama")
    model.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    letters = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>").save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "LICENSE").write_text("do as you like")
    (tmp_path / "whole" / "generation_config.json").write_text('{"temperature": 0.5}')  # which loads, but is not saved
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
    nz.neutralize(model, "model.layers[1:3]")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))
    for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert loaded.generation_config.temperature == 0.5
    again = run(app, arguments)
    assert again.exit_code == 2
    assert "expected nothing at" in again.stderr


def test_the_command_takes_any_model_with_all_its_weights(tmp_path):
    """A classifier without a tokenizer keeps its head; a missing weight is not made up."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL | {"pad_token_id": 0, "num_labels": 3})
    model = perturbed(transformers.LlamaForSequenceClassification(config))
    model.save_pretrained(tmp_path / "whole")
    run = CliRunner().invoke
    answer = run(app, ["export", str(tmp_path / "whole"), "--drop", "model.layers[1]", "--output", str(tmp_path / "a")])
    assert answer.exit_code == 0, answer.output
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a").eval()
    ids = torch.arange(9)[None] + 1
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, without(model, model.model.layers, [1], ids))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "score.weight"}
    save_file(state, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    answer = run(app, ["export", str(tmp_path / "whole"), "--drop", "model.layers[1]", "--output", str(tmp_path / "b")])
    assert answer.exit_code == 2
    assert "expected all weights of a LlamaForSequenceClassification" in answer.stderr
    assert "got none for 'score.weight'; fetch it again" in answer.stderr
    weights = str(tmp_path / "whole" / "model.safetensors")
    answer = run(app, ["export", weights, "--drop", "model.layers[1]", "--output", str(tmp_path / "b")])
    assert answer.exit_code == 2
    assert f"got {weights!r}, another file; name a folder" in answer.stderr
    assert not (tmp_path / "b").exists()
