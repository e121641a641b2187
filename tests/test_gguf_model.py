"""Models of GGUF files: where their parameters are stored, and plans for them, against what transformers loads."""

import functools
import struct
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import transformers
from stored import edited
from test_gguf import random_blocks
from torch import nn
from typer.testing import CliRunner

import neutralize as nz
from neutralize.checkpoint import Checkpoint
from neutralize.checkpoint.gguf import read_header
from neutralize.checkpoint.model import meta_model
from neutralize.checkpoint.naming import placed
from neutralize.checkpoint.region import Files
from neutralize.checkpoint.streamed import _Weights
from neutralize.cli import app
from neutralize.cli.options import complete_layers
from neutralize.demo.subject import weights_file
from neutralize.language import quiet_transformers
from neutralize.plan import Rewrite
from neutralize.progress import silent

V, H, F, HEADS, KV, EXPERTS = 96, 64, 96, 4, 2, 4
TOKENS = 5000  # more than what is shown to transformers
COMMON = {"block_count": 2, "context_length": 64, "embedding_length": H, "attention.head_count": HEADS}
DENSE = {
    **COMMON,
    "feed_forward_length": F,
    "attention.head_count_kv": KV,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 1e4,
    "vocab_size": V,
}
ATTENTION = {
    "attn_norm.weight": (H,),
    "attn_q.weight": (H, H),
    "attn_k.weight": (H // 2, H),
    "attn_v.weight": (H // 2, H),
    "attn_output.weight": (H, H),
    "ffn_norm.weight": (H,),
}
MLP = {"ffn_gate.weight": (F, H), "ffn_up.weight": (F, H), "ffn_down.weight": (H, F)}
NORM = {"attn_norm.weight": (H,), "attn_norm.bias": (H,), "ffn_norm.weight": (H,), "ffn_norm.bias": (H,)}
FUSED = {
    **NORM,
    "attn_qkv.weight": (3 * H, H),
    "attn_qkv.bias": (3 * H,),
    "attn_output.weight": (H, H),
    "attn_output.bias": (H,),
    "ffn_up.weight": (4 * H, H),
    "ffn_up.bias": (4 * H,),
    "ffn_down.weight": (H, 4 * H),
    "ffn_down.bias": (H,),
}
ENDS = {"token_embd.weight": (V, H), "output_norm.weight": (H,)}
# architecture: metadata, tensors of a block, tensors outside, name of the blocks
MODELS = {
    "llama": (DENSE | {"rope.dimension_count": 16}, ATTENTION | MLP, ENDS, "model.layers"),
    "gemma2": (
        DENSE | {"attention.key_length": 16, "attention.sliding_window": 32},
        ATTENTION | MLP | {"post_attention_norm.weight": (H,), "post_ffw_norm.weight": (H,)},
        ENDS,
        "model.layers",
    ),
    "gpt2": (
        COMMON | {"attention.layer_norm_epsilon": 1e-5, "feed_forward_length": 4 * H},
        FUSED,
        {
            "token_embd.weight": (TOKENS, H),
            "position_embd.weight": (1024, H),
            "output_norm.weight": (H,),
            "output_norm.bias": (H,),
        },
        "transformer.h",
    ),
    "qwen2moe": (
        DENSE | {"expert_count": EXPERTS, "expert_used_count": 2},
        ATTENTION
        | {"attn_q.bias": (H,), "attn_k.bias": (H // 2,), "attn_v.bias": (H // 2,), "ffn_gate_inp.weight": (EXPERTS, H)}
        | {"ffn_gate_exps.weight": (EXPERTS, 1408, H), "ffn_up_exps.weight": (EXPERTS, 1408, H)}
        | {"ffn_down_exps.weight": (EXPERTS, H, 1408), "ffn_gate_inp_shexp.weight": (H,)}
        | {"ffn_gate_shexp.weight": (5632, H), "ffn_up_shexp.weight": (5632, H), "ffn_down_shexp.weight": (H, 5632)},
        ENDS | {"output.weight": (V, H)},
        "model.layers",
    ),
    "bloom": (
        COMMON | {"attention.layer_norm_epsilon": 1e-5, "feed_forward_length": 4 * H, "vocab_size": V},
        FUSED,
        ENDS | {"token_embd_norm.weight": (H,), "token_embd_norm.bias": (H,), "output_norm.bias": (H,)},
        "transformer.h",
    ),
}


def write(
    path: Path, architecture: str, dtype: type = np.float32, quantized: int | None = None, per_part: int = 0
) -> None:
    """A small model with random weights; matrices in a dtype or a quantized type, vectors in float32."""
    metadata, block, outside, _ = MODELS[architecture]
    writer, random = gguf.GGUFWriter(path, architecture, split_max_tensors=per_part), np.random.default_rng(0)
    for key, value in metadata.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{architecture}.{key}", value)
    if "vocab_size" not in metadata:
        writer.add_array("tokenizer.ggml.tokens", [f"t{number}" for number in range(TOKENS)])
    shapes = {f"blk.{number}.{name}": shape for number in range(2) for name, shape in block.items()} | outside
    for name, shape in shapes.items():
        values = random.normal(size=shape, scale=0.2 if len(shape) > 1 else 0.05).astype(np.float32)
        if "norm" in name and name.endswith("weight"):
            values += 1
        if len(shape) == 1:
            writer.add_tensor(name, values)
        elif quantized is not None and shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType(quantized)
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loaded(path: Path) -> nn.Module:
    with quiet_transformers():
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
        ).eval()


def logits(model: nn.Module, without: tuple[str, ...] = ()) -> torch.Tensor:
    """Of a fixed text; blocks that are cut out hand on what they are given."""

    def cut(block: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    hooks = [model.get_submodule(name).register_forward_hook(cut, with_kwargs=True) for name in without]
    tokens = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        result = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return result


@pytest.mark.parametrize("architecture", MODELS)
def test_sources_tell_where_the_loader_takes_each_element_from(tmp_path, architecture):
    path = tmp_path / "m.gguf"
    write(path, architecture)
    checkpoint, model = Checkpoint(path), loaded(path)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert set(parameters) <= set(checkpoint.names)
    seen = set()
    with Files(tmp_path) as files:
        for name, parameter in parameters.items():
            covered = 0
            for source in checkpoint.names[name]:
                content = checkpoint.layout.tensors[source.stored].read(files)
                content = content[tuple(slice(*span) for span in source.box)]
                assert not source.is_computed
                part = parameter[tuple(slice(*span) for span in source.place())]
                assert torch.equal(placed(content, source) + source.offset, part)
                if source.is_shuffled:
                    assert not torch.equal(content.flatten(), parameter.flatten())
                    seen.add("shuffled")
                else:
                    seen |= {"offset"} if source.offset else set()
                    seen |= {"transposed"} if source.order == (1, 0) else set()
                    seen |= {"part"} if part.shape != parameter.shape else set()
                covered += content.numel()
            assert covered == parameter.numel()
    wanted = {
        "llama": {"shuffled"},
        "gemma2": {"offset"},
        "gpt2": {"transposed"},
        "qwen2moe": {"part"},
        "bloom": {"shuffled"},
    }
    assert seen == wanted[architecture]


@pytest.mark.parametrize(
    ("architecture", "edit"),
    [
        ("llama", "cheapest"),
        ("gemma2", "cheapest"),
        ("bloom", "cheapest"),
        ("gpt2", "outgoing"),
        ("qwen2moe", "outgoing"),
    ],
)
def test_a_block_of_a_small_model_is_off_bit_for_bit_and_back(tmp_path, architecture, edit):
    path = tmp_path / "m.gguf"
    write(path, architecture)
    before, block = path.read_bytes(), f"{MODELS[architecture][3]}.1"
    wanted = logits(loaded(path), (block,))
    assert complete_layers(SimpleNamespace(params={"checkpoint": path}, args=[]), block) == [
        block
    ]  # not the file's own names
    plan = nz.plan(path, block, edit=edit)
    assert plan.layers[0].certificate.kind == "exact"
    undo = plan.apply(path)
    assert torch.equal(logits(loaded(path)), wanted)
    undo.restore()
    assert path.read_bytes() == before


def test_a_block_of_a_quantized_model_is_off_or_damped(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, "llama", quantized=gguf.GGMLQuantizationType.Q4_0)
    before = path.read_bytes()
    original = loaded(path)
    off, damped = nz.plan(path, "model.layers.0", edit="outgoing"), nz.plan(path, "model.layers.1", "damp", factor=0.5)
    off.apply(path)
    assert torch.equal(logits(loaded(path)), logits(original, ("model.layers.0",)))
    damped.apply(path)
    with damped.applied(original):
        assert torch.equal(logits(loaded(path)), logits(original, ("model.layers.0",)))
    Checkpoint(path).restore(everything=True)
    assert path.read_bytes() == before


# A Llama with a type for each tensor; those of 256 elements to a block have no quantizer, and get random blocks.
MIXED = dict(
    zip(MODELS["llama"][1], [None, "Q4_K", "Q6_K", "IQ4_XS", "Q5_K", None, "IQ2_XS", "Q3_K", "Q2_K"], strict=True)
)


def write_mixed(path: Path) -> None:
    writer, wide = gguf.GGUFWriter(path, "llama"), 256
    metadata = MODELS["llama"][0] | {"embedding_length": wide, "feed_forward_length": wide, "rope.dimension_count": 64}
    for key, value in metadata.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
    random = np.random.default_rng(0)
    for name, kind in {f"blk.{number}.{name}": kind for number in range(2) for name, kind in MIXED.items()}.items():
        if kind is None:
            writer.add_tensor(name, random.normal(1, 0.1, wide).astype(np.float32))
        else:
            kind = gguf.GGMLQuantizationType[kind]
            rows = wide // 2 if name.endswith(("attn_k.weight", "attn_v.weight")) else wide
            writer.add_tensor(name, random_blocks(kind, rows, 1, seed=len(name)), raw_dtype=kind)
    writer.add_tensor("token_embd.weight", random.normal(size=(V, wide)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(wide, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_of_many_types_is_run_from_its_file_and_proven(tmp_path):
    path, tokens = tmp_path / "m.gguf", torch.arange(1, 25).view(2, 12)
    write_mixed(path)
    checkpoint = Checkpoint(path)
    model, names = meta_model(checkpoint.layout, buffers=True)
    with Files(tmp_path) as files, torch.no_grad():
        weights = _Weights(checkpoint.layout, names, files, files, [], silent)
        with weights.placed_in(model):
            got = model(tokens, use_cache=False).logits
    assert got.isfinite().all()
    assert got.std() > 0.1
    assert torch.equal(got, logits(loaded(path)))

    block = ["--layers", "model.layers.1", "--option", "edit=outgoing", "--quiet"]

    def run(*options: str) -> int:
        return CliRunner().invoke(app, [options[0], str(path), *block, *options[1:]]).exit_code

    assert run("verify") == 0
    assert run("verify", "--applied") == 1
    assert run("apply", "--in-place") == 0
    assert run("verify", "--applied") == 0
    region = checkpoint.layout.tensors["blk.1.ffn_down.weight"].regions[0]
    with path.open("r+b") as file:
        file.seek(region.offset)
        file.write(b"\x3c" * 84)  # one block of Q2_K
    assert run("verify", "--applied") == 1


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_what_is_permuted_is_damped_as_a_whole(tmp_path, architecture):
    path = tmp_path / "m.gguf"
    write(path, architecture)
    checkpoint, original = Checkpoint(path), dict(loaded(path).named_parameters())
    permuted = [name for name, sources in checkpoint.names.items() if any(source.is_shuffled for source in sources)]
    assert len(permuted) >= 4
    for name in permuted:
        shape = tuple(original[name].shape)
        edited(checkpoint.layout, [Rewrite(name, shape, "float32", scale=0.5)], checkpoint.names)
        with pytest.raises(nz.NeutralizeError, match="the same for all of what is stored"):
            edited(checkpoint.layout, [Rewrite(name, shape, "float32", rows=(0, 3))], checkpoint.names)
    for name, parameter in loaded(path).named_parameters():
        assert torch.equal(parameter, original[name] * (0.5 if name in permuted else 1))


def tensors_of(folder: Path) -> dict[str, bytes]:
    """The tensors of all files of a folder, as the package reads them."""
    readers = [gguf.GGUFReader(path) for path in sorted(folder.glob("*.gguf"))]
    return {tensor.name: tensor.data.tobytes() for reader in readers for tensor in reader.tensors}


def test_a_file_in_parts_is_one_checkpoint(tmp_path):
    whole, split = tmp_path / "whole", tmp_path / "split"
    whole.mkdir()
    split.mkdir()
    write(whole / "m.gguf", "llama", quantized=8)
    write(split / "m.gguf", "llama", quantized=8, per_part=7)
    names = sorted(path.name for path in split.iterdir())
    assert names == [f"m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    before = tensors_of(split)
    assert before == tensors_of(whole)

    plan = nz.plan(split, "model.layers[:]", edit="outgoing")
    assert plan == nz.plan(whole, "model.layers[:]", edit="outgoing")
    undo, _ = plan.apply(split), plan.apply(whole)
    assert len(undo.edition.files) > 1
    assert tensors_of(split) == tensors_of(whole) != before
    assert Checkpoint(split).verify(plan, applied=True).ok
    undo.restore()
    assert tensors_of(split) == before
    Checkpoint(split).write(plan, tmp_path / "copy")
    assert tensors_of(tmp_path / "copy") == tensors_of(whole)

    with pytest.raises(nz.NeutralizeError, match="got one of 3 parts; name the folder"):
        nz.plan(split / names[0], "model.layers.0")
    (split / names[1]).rename(tmp_path / "kept")
    with pytest.raises(nz.NeutralizeError, match=r"expected the 3 parts of 'm' in .*; fetch those that are missing"):
        nz.plan(split, "model.layers.0")
    (tmp_path / "copy" / names[0]).rename(split / names[1])
    with pytest.raises(nz.NeutralizeError, match=r"expected split.no 1 in .*, got 0; it is no part of the files"):
        nz.plan(split, "model.layers.0")
    (split / "other.gguf").write_bytes(b"")
    with pytest.raises(nz.NeutralizeError, match="expected one checkpoint in"):
        nz.plan(split, "model.layers.0")


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_parameters_have_the_dtype_of_most_elements(tmp_path, dtype):
    path = tmp_path / "m.gguf"
    write(path, "llama", dtype)
    model = Checkpoint(path).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.from_numpy(np.empty(0, dtype)).dtype}
    assert all(parameter.is_meta for parameter in model.parameters())
    plan = nz.plan(path, "model.layers.1", edit="outgoing")
    plan.apply(path)
    (down,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_down.weight")
    assert not down.data.any()
    assert down.data.dtype == dtype


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "unknown": (
        "clip",
        {},
        r"an architecture that transformers loads in .*, got 'clip' \(GGUF model with architecture",
    ),
    "followed nowhere": (
        "lfm2",
        {},
        r"an architecture .*, got 'lfm2', which it loads in a way that is not followed here; edit tensors by",
    ),
    "a part": (
        "llama",
        {"split.count": 3},
        r"a whole model in .*, got one of 3 parts; name the folder that holds all of them",
    ),
    "huge": ("llama", {"llama.embedding_length": 1 << 31}, r"at most 16777216 for 'hidden_size' in .*, got 2147483648"),
    "deep": ("llama", {"llama.block_count": 1 << 30}, r"at most 65536 for 'num_hidden_layers' in .*, got 1073741824"),
    "other shapes": ("llama", {"llama.feed_forward_length": 2 * F}, r"tensors of the shapes that LlamaForCausalLM has"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_not_understood_are_refused(tmp_path, case):
    architecture, changed, message = REFUSED[case]
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in ({f"llama.{key}": value for key, value in MODELS["llama"][0].items()} | changed).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, shape in ({f"blk.0.{name}": shape for name, shape in MODELS["llama"][1].items()} | ENDS).items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(nz.NeutralizeError, match=f"checkpoint: expected {message}"):
        nz.plan(path, "model.layers.0")


# ---- a trained model -------------------------------------------------------------------------------------------------


def without_vocabulary(source: Path, path: Path) -> None:
    """The same model without the lists of tokens, which transformers takes most of its time to read."""
    header, content = read_header(source), source.read_bytes()
    kept = [key for key, value in header.metadata.items() if not isinstance(value, list)]
    keys = b"".join(content[slice(*header.spans[key])] for key in kept)
    infos = max(end for _, end in header.spans.values())
    length = sum(24 + len(name.encode()) + 8 * len(stored.shape) for name, stored in header.tensors.items())
    head = content[:8] + struct.pack("<QQ", len(header.tensors), len(kept)) + keys + content[infos : infos + length]
    data = min(stored.regions[0].offset for stored in header.tensors.values())
    path.write_bytes(head + bytes(-len(head) % 32) + content[data:])


def test_a_block_of_smollm2_is_off_bit_for_bit_and_back(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    without_vocabulary(weights_file(), path)
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))  # once per module else
    before = path.read_bytes()
    original, checkpoint = loaded(path), Checkpoint(path)
    block, head = "model.layers[4]", "model.layers[12].self_attn.heads[3]"
    plans = [nz.plan(checkpoint, block), nz.plan(checkpoint, ["model.layers[9]", head], edit="outgoing")]
    assert all(entry.certificate.kind == "exact" for plan in plans for entry in plan.layers)
    undos = [plan.apply(checkpoint) for plan in plans]
    wanted = original.get_submodule("model.layers.12.self_attn.o_proj").weight
    wanted.data[:, 3 * 64 : 4 * 64] = 0
    assert torch.equal(logits(loaded(path)), logits(original, ("model.layers.4", "model.layers.9")))
    for undo in reversed(undos):
        undo.restore()
    assert path.read_bytes() == before
