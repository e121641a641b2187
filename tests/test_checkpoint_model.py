"""Plans made on models without weights, written into real checkpoints, against the same plans on the loaded models."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from networks import perturbed
from stored import edited, located
from torch import nn

import neutralize as nz
from neutralize.checkpoint.model import meta_model

SHARD = "40KB"
TINY = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1}
GROUPED = {
    **TINY,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    )


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **GROUPED, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1)
    )


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TINY, intermediate_size=64))


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=99, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8)
    )


def gemma2() -> nn.Module:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GROUPED, head_dim=8))


def mamba() -> nn.Module:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=99, hidden_size=32, state_size=8, num_hidden_layers=2)
    )


def phi3() -> nn.Module:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**GROUPED))


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))


CASES: list[tuple[Callable[[], nn.Module], str, str, dict[str, Any]]] = [
    (llama, "model.layers[1]", "auto", {}),
    (llama, "model.layers[1].self_attn.heads[2]", "zero", {}),
    (llama, "*.mlp", "damp", {"factor": 0.3}),
    (mixtral, "model.layers[1]", "auto", {"edit": "outgoing"}),
    (qwen3_moe, "model.layers[0].mlp.experts[1:3]", "zero", {}),
    (gpt2, "transformer.h[1].attn.heads[1]", "zero", {}),
    (gpt2, "transformer.h[1].mlp", "damp", {"factor": 0.5}),
    (bert, "bert.encoder.layer[1]", "auto", {}),
    (t5, "encoder.block[1]", "auto", {}),
    (gemma2, "model.layers[1]", "auto", {}),
    (mamba, "backbone.layers[1]", "auto", {"edit": "outgoing"}),
    (phi3, "model.layers[1].self_attn.heads[0]", "zero", {}),
    (phi3, "model.layers[1]", "auto", {"edit": "incoming"}),
    (vit, "vit.layers[0].attention.heads[1]", "zero", {}),
]


def saved(make: Callable[[], nn.Module], folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A sharded checkpoint with no weight left as it was initialised."""
    torch.manual_seed(0)
    perturbed(make()).to(dtype).save_pretrained(folder, max_shard_size=SHARD)
    return folder


def loaded(kind: type, folder: Path, dtype: Any = "auto") -> nn.Module:
    return kind.from_pretrained(folder, dtype=dtype).eval()


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    found, wanted = dict(actual.state_dict()), dict(expected.state_dict())
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(("make", "layers", "strategy", "options"), CASES)
def test_files_become_what_the_loaded_model_becomes(make, layers, strategy, options, tmp_path):
    kind = type(make())
    folder = saved(make, tmp_path / "original")
    assert len(list(folder.glob("*.safetensors"))) > 1

    # A copy is edited: what the loader gives is mapped onto the files, and would change with them.
    layout = located(shutil.copytree(folder, tmp_path / "edited"))
    model, names = meta_model(layout)
    assert type(model) is kind
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    plan = nz.plan(model, layers, strategy, **options)

    live = loaded(kind, folder)
    plan.apply(live)

    edited(layout, plan.edits, names)

    assert_same(loaded(kind, layout.root), live)
    before = loaded(kind, folder)
    assert any(not torch.equal(old, new) for old, new in zip(before.parameters(), live.parameters(), strict=True))
