"""Plans made on models without weights, written into real checkpoints, against the same plans on the loaded models."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bits import refusal
from networks import perturbed
from safetensors.torch import load_file, save_file
from stored import edited, located
from torch import nn

import neutralize as nz
from neutralize.checkpoint.model import meta_model
from neutralize.checkpoint.naming import retarget

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


def test_old_names_of_norms_are_found(tmp_path):
    folder = saved(bert, tmp_path / "new")
    old = {}
    for path in folder.glob("*.safetensors"):
        old |= load_file(path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in old.items()
    }
    assert any("gamma" in name for name in old)
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "config.json", tmp_path / "old")
    kind = type(bert())
    live = loaded(kind, folder)
    plan = nz.plan(live, "bert.encoder.layer[1]")
    plan.apply(live)

    layout = located(tmp_path / "old")
    model, names = meta_model(layout)
    assert nz.plan(model, "bert.encoder.layer[1]").edits == plan.edits
    edited(layout, plan.edits, names)
    assert_same(loaded(kind, layout.root), live)


def test_a_base_models_names_and_tensors_that_nobody_asks_for(tmp_path):
    folder = saved(lambda: transformers.LlamaModel(transformers.LlamaConfig(**GROUPED)), tmp_path)
    save_file({"notes": torch.zeros(3, dtype=torch.bfloat16)}, folder / "notes.safetensors")
    content = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(content))
    model, names = meta_model(located(folder))
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert names["model.layers.0.mlp.up_proj.weight"][0].stored == "layers.0.mlp.up_proj.weight"
    assert "lm_head.weight" not in names
    assert "'lm_head.weight' to be stored" in refusal(
        lambda: retarget(nz.plan(model, "lm_head", "zero", sides="in").edits, names, located(folder))
    )


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_tied_weights_stored_once_twice_or_under_one_name_but_different(copies, tmp_path):
    config = transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)
    folder = saved(lambda: transformers.LlamaForCausalLM(config), tmp_path)
    if copies > 1:
        (path,) = (path for path in folder.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(path))
        head = load_file(path)["model.embed_tokens.weight"] + (copies == 3)
        save_file({"lm_head.weight": head}, folder / "head.safetensors")
    model, names = meta_model(located(folder))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (copies < 3)
    stored = [source.stored for source in names["lm_head.weight"]]
    assert (
        stored
        == [["model.embed_tokens.weight"], ["model.embed_tokens.weight", "lm_head.weight"], ["lm_head.weight"]][
            copies - 1
        ]
    )


class Own(nn.Module):
    """A network that no library has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.head.weight = self.second.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("angles", torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.norm(self.first(x)) + self.angles))


def own_from(folder: Path) -> nn.Module:
    assert folder.is_dir()
    return Own()


def test_a_factory_makes_the_model(tmp_path):
    torch.manual_seed(0)
    live = Own().half()
    state = live.state_dict()
    save_file({name: state[name].clone() for name in state if name != "head.weight"}, tmp_path / "model.safetensors")
    layout = located(tmp_path)
    assert layout.config is None
    for factory in ("test_checkpoint_model:Own", "test_checkpoint_model:own_from", Own):
        model, names = meta_model(layout, factory)
        assert isinstance(model, Own)
        assert not model.training
        assert model.angles.is_meta
        assert model.first.weight.is_meta
        assert model.first.weight.dtype == torch.float16
        assert names["head.weight"] == names["second.weight"]
        assert names["norm.running_mean"][0].stored == "norm.running_mean"
    plan = nz.plan(model, ["first"], "zero", example_inputs=torch.zeros(2, 4, dtype=torch.float16))
    plan.apply(live)
    edited(layout, plan.edits, names)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["first.weight"], live.first.weight)

    model, _ = meta_model(layout, Own, buffers=True)
    assert torch.equal(model.angles, torch.arange(4.0))
    assert model.norm.running_mean.is_meta
    assert model.first.weight.is_meta


def test_buffers_that_no_file_holds_are_computed(tmp_path):
    folder = saved(gemma2, tmp_path)
    model, _ = meta_model(located(folder), buffers=True)
    live = loaded(type(model), folder)
    assert all(parameter.is_meta for parameter in model.parameters())
    for name, buffer in live.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


FACTORIES = [
    ("json", "expected 'package.module:callable' for model, got 'json'; name a function that returns the model"),
    ("no.such.module:f", "expected something that can be imported for model, got 'no.such.module:f' (ModuleNotFound"),
    ("json:nothing", "expected something that can be imported for model, got 'json:nothing' (AttributeError"),
    ("json:loads", "expected no error from calling 'json:loads', got TypeError"),
    ("math:pi", "expected a callable for model, got 3.14"),
    ("builtins:dict", "expected a torch.nn.Module from 'builtins:dict', got dict; return the model"),
    (
        lambda: nn.Linear(3, 3),
        "expected the parameters of Linear, got others: 'weight' is not stored; 'bias' is not stored",
    ),
    (
        lambda: nn.Sequential(nn.Linear(3, 3)),
        "'0.weight' is [4, 4], not [3, 3]; '0.bias' is not stored; give the model",
    ),
]


@pytest.mark.parametrize(("factory", "message"), FACTORIES)
def test_factories_that_make_no_model_of_the_checkpoint(factory, message, tmp_path):
    save_file({"0.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    assert message in refusal(lambda: meta_model(located(tmp_path), factory))


# ---- configs that anybody may have written ---------------------------------------------------------------------------

NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000
BAD_CONFIGS: list[tuple[str | bytes | dict[str, Any], str]] = [
    ("", "expected JSON for"),
    ("{", "expected JSON for"),
    (b"\xff\xfe\x00", "expected JSON for"),
    ("[1, 2]", "expected a JSON object for"),
    (NESTED, "expected"),
    ('{"a":' * 70 + "1" + "}" * 70, "expected at most 64 levels in"),
    ('{"vocab_size": ' + "9" * 10_000 + "}", "expected JSON for"),
    (
        {"model_type": "mine", "auto_map": {"AutoModel": "evil.Model"}},
        "got 'mine' with code of its own, which is never run",
    ),
    ({"model_type": "mine"}, "expected a model_type that transformers has in"),
    ({"model_type": ["llama"]}, "expected a model_type that transformers has in"),
    ({"model_type": None}, "expected a model_type that transformers has in"),
    ({"architectures": "LlamaForCausalLM"}, "expected a list of names for architectures in"),
    ({"architectures": [1]}, "expected a list of names for architectures in"),
    ({"num_hidden_layers": 10**9}, "expected at most 65536 for 'num_hidden_layers' in"),
    ({"num_hidden_layers": 60_000}, "expected a model of at most 4000 parameters for a checkpoint of"),
    ({"hidden_size": 10**12}, "expected at most 16777216 for 'hidden_size' in"),
    ({"vocab_size": -(10**30)}, "expected at most 16777216 for 'vocab_size' in"),
    ({"hidden_size": -32}, "expected no error from"),
    ({"hidden_size": "32"}, "expected no error from"),
    ({"hidden_size": 64}, "expected tensors of the shapes that LlamaForCausalLM has, got others for"),
    ({"num_attention_heads": 0}, "expected no error from"),
    ({"rope_parameters": [1]}, "expected no error from"),
    ({"rope_parameters": {"rope_type": "\u2028"}}, "expected no error from"),
    ({"hidden_act": "os.system"}, "expected no error from"),
    ({"model_type": "bert", "architectures": ["BertModel"]}, "expected tensors of"),
    ({"__class__": 3, "dtype": "float12"}, "expected no error from"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(llama, tmp_path_factory.mktemp("llama"))


def with_config(folder: Path, to: Path, content: str | bytes | dict[str, Any]) -> Path:
    """The folder again, with links to its files and another config."""
    for path in folder.glob("*.safetensors"):
        (to / path.name).symlink_to(path)
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / "config.json").read_text()) | content)
    (to / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    return to


@pytest.mark.parametrize(("content", "message"), BAD_CONFIGS)
def test_malformed_configs_are_refused_at_once(content, message, folder, tmp_path):
    layout = located(with_config(folder, tmp_path, content))
    started = time.monotonic()
    assert message in refusal(lambda: meta_model(layout))
    assert time.monotonic() - started < 10


def test_nothing_in_the_folder_is_run(folder, tmp_path, monkeypatch):
    evil = tmp_path / "evil.py"
    evil.write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nModel = Config = None\n")
    content = {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "attn_implementation": "somebody/kernels",
        "_attn_implementation": "somebody/kernels",
        "use_kernels": True,
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    monkeypatch.chdir(with_config(folder, tmp_path, content))
    model, _ = meta_model(located(tmp_path))
    assert type(model) is transformers.LlamaForCausalLM
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert not (tmp_path / "ran").exists()


def test_a_config_without_architectures_gives_the_usual_class(folder, tmp_path):
    for architectures in (None, [], ["NoSuchModel"], ["BertModel"], ["__name__"]):
        to = tmp_path / str(architectures)
        to.mkdir()
        model, _ = meta_model(located(with_config(folder, to, {"architectures": architectures})))
        assert type(model) is transformers.LlamaForCausalLM


def test_a_bare_file_has_no_model(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert refusal(lambda: meta_model(located(tmp_path))) == (
        "checkpoint: expected a config.json beside the weights, got none; name the model as 'package.module:callable', "
        "or edit tensors by name"
    )
