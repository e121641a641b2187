"""Heads, channels and experts against networks that miss them by hooks made by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from networks import perturbed
from torch import nn

import neutralize as nz
from neutralize.errors import NeutralizeError
from neutralize.parts import part_of

IDS = {"input_ids": torch.arange(20).reshape(2, 10) * 7 % 90 + 5}
TINY = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "bos_token_id": 1}
GROUPED = {**TINY, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 2}


def llama(attention: str = "sdpa") -> nn.Module:
    config = transformers.LlamaConfig(**GROUPED, attn_implementation=attention)
    return perturbed(transformers.LlamaForCausalLM(config))


def mixtral() -> nn.Module:
    """Exported, unlike Llama: its reshapes become views that only the strides of the real values allow."""
    config = transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    return perturbed(transformers.MixtralForCausalLM(config))


def eager() -> nn.Module:
    return llama("eager")


def gpt2() -> nn.Module:
    return perturbed(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
            )
        )
    )


def bert() -> nn.Module:
    return perturbed(transformers.BertModel(transformers.BertConfig(**TINY, intermediate_size=64)))


class Folded(nn.Module):
    """Attention whose batch and heads are one dimension, as in older models."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape

        def fold(part: torch.Tensor) -> torch.Tensor:
            return part.view(batch, length, 3, 8).transpose(1, 2).reshape(batch * 3, length, 8)

        q, k, v = map(fold, self.qkv(x).chunk(3, -1))
        read = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)
        return self.out(read.view(batch, 3, length, 8).transpose(1, 2).reshape(batch, length, 24))


class Interleaved(nn.Module):
    """Attention whose heads lie interleaved in what the projection reads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (8, 3)).permute(0, 3, 1, 2) for part in self.qkv(x).chunk(3, -1))
        read = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(read.permute(0, 2, 3, 1).flatten(2))


def without_features(columns: Any) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        read = args[0].clone()
        read[..., columns] = 0.0
        return (read, *args[1:])

    return hook


def first(outputs: Any) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def outputs_with_hook(model: nn.Module, module: str, hook: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
    handle = model.get_submodule(module).register_forward_pre_hook(hook)
    with torch.no_grad():
        found = first(model(**inputs))
    handle.remove()
    return found


def check(model: nn.Module, plan: nz.Plan, inputs: dict[str, Any], wanted: torch.Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        intact = first(model(**inputs))
        with plan.applied(model):
            got = first(model(**inputs))
    assert torch.equal(got, wanted)
    assert not torch.equal(got, intact)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert nz.verify(model, plan, **inputs).exact
    assert {certificate.kind for certificate in plan.certificates} == {"exact"}


X24 = {"x": torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize(
    ("make", "selection", "projection", "columns", "inputs"),
    [
        (llama, "model.layers[1].self_attn.heads[2]", "model.layers.1.self_attn.o_proj", slice(16, 24), IDS),
        (llama, "model.layers[1].self_attn.heads[-1]", "model.layers.1.self_attn.o_proj", slice(24, 32), IDS),
        (llama, "model.layers[1].heads[0]", "model.layers.1.self_attn.o_proj", slice(0, 8), IDS),
        (llama, "model.layers[1].self_attn.heads[1:3]", "model.layers.1.self_attn.o_proj", slice(8, 24), IDS),
        (llama, "model.layers[1].self_attn.kv_heads[1]", "model.layers.1.self_attn.o_proj", slice(16, 32), IDS),
        (eager, "model.layers[0].self_attn.kv_heads[0]", "model.layers.0.self_attn.o_proj", slice(16), IDS),
        (eager, "model.layers[2].self_attn.heads[3]", "model.layers.2.self_attn.o_proj", slice(24, 32), IDS),
        (mixtral, "model.layers[1].self_attn.heads[2]", "model.layers.1.self_attn.o_proj", slice(16, 24), IDS),
        (gpt2, "transformer.h[1].attn.heads[1]", "transformer.h.1.attn.c_proj", slice(8, 16), IDS),
        (bert, "encoder.layer[1].attention.heads[3]", "encoder.layer.1.attention.output.dense", slice(24, 32), IDS),
        (lambda: perturbed(nn.Sequential(Folded())), "0.heads[1]", "0.out", slice(8, 16), X24),
        (lambda: perturbed(nn.Sequential(Interleaved())), "0.heads[1]", "0.out", slice(1, None, 3), X24),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_heads(make: Any, selection: str, projection: str, columns: slice, inputs: dict[str, Any]) -> None:
    model = make()
    if isinstance(model, nn.Sequential):
        model, inputs = model, {"input": inputs["x"]}
    plan = nz.plan(model, selection, example_inputs=inputs)
    check(model, plan, inputs, outputs_with_hook(model, projection, without_features(columns), inputs))


def test_several_parts_of_one_module() -> None:
    model, root = llama(), "model.layers.1.self_attn"
    plan = nz.plan(model, [f"{root}.heads[0]", f"{root}.heads[3]"], example_inputs=IDS)
    columns = [*range(8), *range(24, 32)]
    check(model, plan, IDS, outputs_with_hook(model, f"{root}.o_proj", without_features(columns), IDS))
    with pytest.raises(NeutralizeError, match=r"contain each other, got 'model\.layers\.1\.self_attn' and its part"):
        nz.plan(model, [root, f"{root}.heads[0]"], example_inputs=IDS)


def test_heads_of_every_layer_by_a_glob() -> None:
    plan = nz.plan(llama(), "*.self_attn.heads[1]", example_inputs=IDS)
    assert [entry.layer for entry in plan.layers] == [f"model.layers.{place}.self_attn.heads[1]" for place in range(3)]


def test_heads_of_torchs_own_attention() -> None:
    """Its projection is never called as a module: head 1 is compared with one whose values are zero."""
    attention = perturbed(nn.MultiheadAttention(20, 4, batch_first=True))
    x = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(3))
    inputs = {"query": x, "key": x, "value": x, "need_weights": False}
    plan = nz.plan(nn.ModuleDict({"a": attention})["a"], "heads[1]", example_inputs=inputs)
    with torch.no_grad(), plan.applied(attention):
        got = attention(**inputs)[0]
    with torch.no_grad():
        attention.in_proj_weight[45:50] = 0
        attention.in_proj_bias[45:50] = 0
        assert torch.equal(attention(**inputs)[0], got)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.ConvTranspose2d(8, 5, 3)
        self.third = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(torch.relu(self.first(x))).flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "index", "dim", "chosen"),
    [("first", "0:2", 1, slice(0, 2)), ("second", "-1", 1, slice(4, 5)), ("third", "2", -1, slice(2, 3))],
)
def test_channels(name: str, index: str, dim: int, chosen: slice) -> None:
    model = perturbed(Convolutions())
    inputs = {"x": torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(4))}

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output.movedim(dim, 0)[chosen] = 0.0
        return output

    handle = model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        wanted = model(**inputs)
    handle.remove()
    check(model, nz.plan(model, f"{name}.channels[{index}]", "zero", example_inputs=inputs), inputs, wanted)


def test_channels_damped() -> None:
    model = perturbed(Convolutions())
    inputs = {"x": torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(4))}
    plan = nz.plan(model, "first.channels[3]", "damp", factor=0.5, example_inputs=inputs)
    assert plan.layers[0].target == "scaled"
    before = model.first.weight.detach().clone()
    with plan.applied(model):
        assert torch.equal(model.first.weight[3], 0.5 * before[3])
        assert torch.equal(model.first.weight[4], before[4])
    assert nz.verify(model, plan, **inputs).relative_error <= 1e-6


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_of_one_fused_parameter(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(
        **GROUPED, moe_intermediate_size=32, num_local_experts=4, num_experts=4, num_experts_per_tok=2
    )
    model = perturbed(getattr(transformers, f"{kind}ForCausalLM")(config))

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, index, weights = args
        return hidden, index, torch.where(index == 2, 0.0, weights)

    wanted = outputs_with_hook(model, "model.layers.1.mlp.experts", hook, IDS)
    plan = nz.plan(model, "model.layers[1].mlp.experts[2]", example_inputs=IDS)
    assert {edit.parameter for edit in plan.edits} == {"model.layers.1.mlp.experts.down_proj"}
    check(model, plan, IDS, wanted)


@pytest.mark.parametrize(
    ("selection", "strategy", "message"),
    [
        ("model.layers[1].self_attn.heads[9]", "auto", r"expected heads from 0 to 3 for .*, got \[9\]; it has 4"),
        (
            "model.layers[1].self_attn.kv_heads[2:]",
            "auto",
            r"expected kv_heads from 0 to 1 for .*, got \[2:\]",
        ),
        ("model.layers[1].mlp.heads[0]", "auto", r"expected one attention with an output projection .*, got none"),
        (
            "model.layers[1].mlp.channels[0]",
            "zero",
            r"expected one affine layer .*, got '\S+mlp', a Llama",
        ),
        ("model.layers[1].mlp.experts[0]", "zero", r"expected experts in fused parameters"),
        (
            "model.layers[1].self_attn.heads[0]",
            "constant",
            r"expected a module .*'constant', got .*heads of one",
        ),
        ("model.layers[1].self_atn.heads[0]", "auto", r"which is unknown; near matches: .*self_attn"),
    ],
    ids=str,
)
def test_refused(selection: str, strategy: str, message: str) -> None:
    with pytest.raises(NeutralizeError, match=message):
        nz.plan(llama(), selection, strategy, example_inputs=IDS)


def test_no_excised_network_without_heads() -> None:
    model = llama()
    with (
        pytest.raises(NeutralizeError, match="excised: expected modules, got"),
        nz.excised(model, "*.self_attn.heads[0]"),
    ):
        pass


def test_a_module_of_that_name_comes_first() -> None:
    model = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    assert list(nz.select(model, "heads[1]")) == ["heads.1"]
    assert part_of("a.heads[]") is None
    assert part_of("heads[1:]").start == 1
