"""Post-norm blocks against networks with the block cut out by hand."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from networks import perturbed
from torch import nn

import neutralize as nz
from neutralize.errors import NeutralizeError

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
ATTENTION = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
IDS = torch.arange(20).reshape(2, 10) * 7 % 90 + 5


def bert() -> tuple[nn.Module, dict[str, Any]]:
    return perturbed(transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))), {"input_ids": IDS}


def distilbert() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=4, n_heads=4, hidden_dim=64, max_position_embeddings=40
    )
    return perturbed(transformers.DistilBertModel(config)), {"input_ids": IDS}


def roberta() -> tuple[nn.Module, dict[str, Any]]:
    return perturbed(transformers.RobertaModel(transformers.RobertaConfig(**SMALL))), {"input_ids": IDS}


def bart() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.BartConfig(
        vocab_size=99, d_model=32, encoder_layers=3, decoder_layers=3, max_position_embeddings=40, **ATTENTION
    )
    return perturbed(transformers.BartModel(config)), {"input_ids": IDS, "decoder_input_ids": IDS.flip(0)}


class Original(nn.Module):
    """The encoder of "Attention is all you need", with or without a norm before its first block."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm = norm(32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(32, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.norm(x)))


def original(norm: type[nn.Module] = nn.LayerNorm) -> tuple[nn.Module, dict[str, Any]]:
    x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(2))
    return perturbed(Original(norm)), {"x": x}


class Block(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.branch = nn.Linear(16, 16, bias=False)
        self.norm = norm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + torch.tanh(self.branch(x)))


class Deep(Block):
    """DeepNorm: the stream is multiplied before each norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x * 3.7 + torch.tanh(self.branch(x)))


class Joined(Block):
    """Normalised together, but not by the same factor: no gain of one norm undoes that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = (x + torch.tanh(self.branch(x))).chunk(2, -1)
        return self.norm(torch.cat([one, 2.0 * other], -1))


class Stack(nn.Module):
    def __init__(self, norms: tuple[type[nn.Module], ...], skips_first: bool = False) -> None:
        super().__init__()
        self.first = norms[0](16)
        self.blocks = nn.ModuleList(Block(norm) for norm in norms[1:])
        self.skips_first = skips_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x + start if self.skips_first else x


@contextmanager
def cut_by_hand(model: nn.Module, *names: str) -> Iterator[None]:
    """Each block hands its first argument on."""

    def hand_on(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        entering = args[0] if args else kwargs["hidden_states"]
        return (entering, *output[1:]) if isinstance(output, tuple) else entering

    handles = [model.get_submodule(name).register_forward_hook(hand_on, with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first(outputs: Any) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def error(model: nn.Module, plan: nz.Plan, inputs: dict[str, Any], *names: str) -> float:
    """The relative error of the rewritten network against the cut one; every bit comes back."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        with cut_by_hand(model, *names):
            wanted = first(model(**inputs)).double()
        with plan.applied(model):
            got = first(model(**inputs)).double()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return float((got - wanted).norm() / wanted.norm())


WIDE, HALF = (torch.float64, 1e-13), (torch.bfloat16, 3e-2)


@pytest.mark.parametrize(
    ("make", "names", "others"),
    [
        (bert, ["bert.encoder.layer.0"], []),
        (bert, ["bert.encoder.layer.2"], []),
        (bert, ["bert.encoder.layer.3"], []),
        (bert, ["bert.encoder.layer.1", "bert.encoder.layer.2"], [WIDE, HALF]),
        (bert, [f"bert.encoder.layer.{place}" for place in range(4)], []),
        (bert, ["bert.encoder.layer.0", "bert.encoder.layer.2"], []),
        (bert, ["bert.encoder.layer.2.attention"], []),
        (distilbert, ["transformer.layer.1"], []),
        (roberta, ["encoder.layer.1"], []),
        (bart, ["encoder.layers.1", "decoder.layers.0"], [WIDE, HALF]),
        (bart, ["decoder.layers.1", "decoder.layers.2"], []),
        (original, ["encoder.layers.0"], [WIDE, HALF]),
        (original, ["encoder.layers.1", "encoder.layers.2"], []),
        (lambda: original(nn.Identity), ["encoder.layers.1"], []),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_block_hands_its_input_on(make: Any, names: list[str], others: list[tuple[torch.dtype, float]]) -> None:
    for dtype, limit in [(torch.float32, 2e-6), *others]:
        model, inputs = make()
        model.to(dtype)
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        plan = nz.plan(model, names, example_inputs=inputs)
        assert error(model, plan, inputs, *names) <= limit
        measured = nz.verify(model, plan, **inputs)
        assert measured.bound_holds
        assert measured.relative_error <= limit
        assert all(certificate.kind == "bounded" for certificate in plan.certificates)
        assert nz.Plan.from_json(plan.to_json()) == plan


def test_nulling_the_branches_alone_would_not_do() -> None:
    """What the folding is for: without it the norms of the block stay, and the input does not pass."""
    model, inputs = bert()
    plan = nz.plan(model, "bert.encoder.layer.1", example_inputs=inputs)
    nulls = [edit for edit in plan.edits if "LayerNorm" not in edit.parameter]
    assert {edit.parameter for edit in nulls} == {
        f"bert.encoder.layer.1.{part}.dense.{kind}"
        for part in ("attention.output", "output")
        for kind in ("weight", "bias")
    }
    alone = nz.Plan("by hand", tuple(nulls), ())
    assert error(model, alone, inputs, "bert.encoder.layer.1") > 1e-2


def test_a_large_epsilon_is_not_applied_twice() -> None:
    """With ε as large as the variance a norm of a norm is far from it: the multiples keep the norms inside linear."""
    model, inputs = bert()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.5
    plan = nz.plan(model, "bert.encoder.layer[1:3]", example_inputs=inputs)
    assert error(model, plan, inputs, "bert.encoder.layer.1", "bert.encoder.layer.2") <= 2e-6


def test_float16_and_an_epsilon_of_zero() -> None:
    model, inputs = bert()
    plan = nz.plan(model.half(), "bert.encoder.layer[1]", example_inputs=inputs)
    assert plan.certificates[0].kind == "measured"  # its ε beside an unknown variance
    assert error(model, plan, inputs, "bert.encoder.layer.1") <= 1e-2
    model, inputs = bert()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.0
    plan = nz.plan(model, "bert.encoder.layer[1]", example_inputs=inputs)
    assert error(model, plan, inputs, "bert.encoder.layer.1") <= 2e-6
    assert any(edit.describe().endswith("LayerNorm.weight <- 1") for edit in plan.edits)


@pytest.mark.parametrize("norms", [(nn.RMSNorm,) * 3, (nn.LayerNorm, nn.LayerNorm, nn.RMSNorm)], ids=str)
def test_rms_norms(norms: tuple[type[nn.Module], ...]) -> None:
    model = perturbed(Stack(norms))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    if norms[-1] is nn.RMSNorm and norms[0] is nn.LayerNorm:
        with pytest.raises(NeutralizeError, match=r"a last norm without a bias to take 'blocks\.0\.norm\.bias'"):
            nz.plan(model, "blocks[0:2]", example_inputs=x)
        return
    plan = nz.plan(model, "blocks[0:2]", example_inputs=x)
    with torch.no_grad():
        wanted = model.first(x)
        with plan.applied(model):
            got = model(x)
    assert (got - wanted).norm() / wanted.norm() <= 2e-6


def test_deep_norm() -> None:
    model = perturbed(nn.Sequential(nn.LayerNorm(16), Deep(nn.LayerNorm), Deep(nn.LayerNorm), nn.Linear(16, 3)))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    for names in (["1"], ["2"], ["1", "2"]):
        plan = nz.plan(model, names, example_inputs=x)
        with torch.no_grad():
            wanted = nn.Sequential(*(part for place, part in enumerate(model) if str(place) not in names))(x)
            with plan.applied(model):
                assert (model(x) - wanted).norm() / wanted.norm() <= 2e-6
        assert nz.verify(model, plan, x).bound_holds


def test_a_stream_of_two_multiples_is_refused() -> None:
    model = perturbed(nn.Sequential(nn.LayerNorm(16), Joined(nn.LayerNorm)))
    with pytest.raises(NeutralizeError, match="got '1'"):
        nz.plan(model, "1", example_inputs=torch.randn(5, 16))


def test_a_layer_norm_of_an_rms_norm_is_something_else() -> None:
    """An RMS norm leaves a mean, which a layer norm would take away."""
    model = perturbed(Stack((nn.RMSNorm, nn.LayerNorm)))
    with pytest.raises(NeutralizeError, match=r"'blocks\.0'"):
        nz.plan(model, "blocks[0]", example_inputs=torch.randn(5, 16))


def test_refused_with_the_reason() -> None:
    model, inputs = original(nn.Identity)
    with pytest.raises(
        NeutralizeError, match=r"expected a norm before the post-norm block 'encoder\.layers\.0', got the mo"
    ):
        nz.plan(model, "encoder.layers[0]", example_inputs=inputs)
    shared = perturbed(Stack((nn.LayerNorm, nn.LayerNorm, nn.LayerNorm), skips_first=True))
    x = torch.randn(5, 16)
    with pytest.raises(NeutralizeError, match=r"got add, which reads what enters the block too \(the norm 'first'"):
        nz.plan(shared, "blocks[0]", example_inputs=x)
    assert nz.verify(shared, nz.plan(shared, "blocks[1]", example_inputs=x), x).relative_error <= 2e-6
    tied = perturbed(Stack((nn.LayerNorm, nn.LayerNorm, nn.LayerNorm)))
    tied.blocks[1].norm.weight = tied.first.weight
    with pytest.raises(NeutralizeError, match=r"'\S+\.weight', which a norm \(layer_norm.*\) reads too"):
        nz.plan(tied, "blocks[0]", example_inputs=x)


def test_a_plan_for_another_model_copies_from_nowhere() -> None:
    model, inputs = bert()
    plan = nz.plan(model, "bert.encoder.layer[1]", example_inputs=inputs)
    text = json.loads(plan.to_json())
    for edit in text["edits"]:
        if edit["kind"] == "copy":
            edit["source"] = "nowhere"
    before = model.state_dict()["bert.encoder.layer.1.output.LayerNorm.weight"].clone()
    with pytest.raises(NeutralizeError, match="expected a parameter 'nowhere', got a model without it"):
        nz.Plan.from_json(json.dumps(text)).apply(model)
    assert torch.equal(model.state_dict()["bert.encoder.layer.1.output.LayerNorm.weight"], before)


def test_stays_off_while_the_rest_trains() -> None:
    model, inputs = bert()
    plan = nz.plan(model, "bert.encoder.layer[1]", example_inputs=inputs)
    plan.apply(model)
    written = {name: model.get_parameter(name).detach().clone() for name in plan.parameters}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    with nz.guard(model, plan, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            first(model(**inputs)).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in written.items())
