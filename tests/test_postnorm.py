"""Post-norm blocks against networks with the block cut out by hand."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
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


class Turned(Block):
    """Normalised with its features the other way around: the gain of its norm meets others than its output has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.flip(-1) + torch.tanh(self.branch(x))).flip(-1)


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


class Spelled(nn.Module):
    """A norm in plain ops; ``formula`` takes the values in float32, and the gain and bias for their order of work."""

    def __init__(self, formula: Any, offset: float = 0.0, has_bias: bool = True) -> None:
        super().__init__()
        self.formula, self.offset = formula, offset
        self.scale = nn.Parameter(torch.ones(16) - offset)
        self.shift = nn.Parameter(torch.zeros(16)) if has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.formula(x, self.offset + self.scale if self.offset else self.scale, self.shift)


def deberta(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    mean = wide.mean(-1, keepdim=True)
    variance = (wide - mean).pow(2).mean(-1, keepdim=True)
    return gain * ((wide - mean) / torch.sqrt(variance + 1e-7)).to(x.dtype) + bias


def textbook(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return gain * (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) + bias


def annotated(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return gain * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + bias


def together(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True)  # the unbiased one
    return (x - mean) * (variance + 1e-5).rsqrt() * gain.view(1, -1) + bias


def reciprocal(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return bias + (1.0 / ((centred * centred).mean(dim=(-1,), keepdim=True) + 1e-5).sqrt()) * centred * gain


def t5(x: torch.Tensor, gain: torch.Tensor, bias: None) -> torch.Tensor:
    variance = (x.float() if x.dtype != torch.float64 else x).pow(2).mean(-1, keepdim=True)
    return gain * (x * torch.rsqrt(variance + 1e-6)).to(gain.dtype)


def gemma(x: torch.Tensor, gain: torch.Tensor, bias: None) -> torch.Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    return (wide * torch.pow(wide.square().mean(-1, keepdim=True) + 1e-6, -0.5) * gain.to(wide.dtype)).type_as(x)


def functional(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(x, (16,), None, None, 1e-5) * gain + bias


def torch_rms(x: torch.Tensor, gain: torch.Tensor, bias: None) -> torch.Tensor:
    return torch.rms_norm(x, [16], None, 1e-5) * gain


class Spelt(nn.Module):
    """A stem, a norm, three post-norm blocks of two norms each, and a head."""

    class Block(nn.Module):
        def __init__(self, norm: Any) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
            self.norm, self.last = norm(), norm()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(x + torch.tanh(self.one(x)))
            return self.last(x + torch.relu(self.two(x)))

    def __init__(self, norm: Any, other: Any = None) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(8, 16), (other or norm)()
        self.blocks = nn.ModuleList(self.Block(norm) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


SPELLINGS = {
    **{norm.__name__: partial(Spelled, norm) for norm in (deberta, textbook, annotated, together, reciprocal)},
    **{norm.__name__: partial(Spelled, norm, has_bias=False) for norm in (t5, gemma, torch_rms)},
    "functional": partial(Spelled, functional),
    "gemma, 1 + w": partial(Spelled, gemma, offset=1.0, has_bias=False),
    "deberta, 1 + w": partial(Spelled, deberta, offset=1.0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_norms_spelled_out(spelling: str) -> None:
    """Folded as the norms of torch are, alone, in a row, and beside these."""
    make = SPELLINGS[spelling]
    has_bias = make().shift is not None
    theirs = (lambda: nn.LayerNorm(16)) if has_bias else (lambda: nn.RMSNorm(16, eps=1e-6))
    cases = [
        (torch.float32, 5e-6, [0, 1], None),
        (torch.float32, 5e-6, [0], theirs),
        (torch.float64, 1e-12, [1], None),
        (torch.bfloat16, 3e-2, [1], None),
    ]
    for dtype, limit, names, other in cases:
        torch.manual_seed(5)
        model = perturbed(Spelt(make, other)).to(dtype)
        x = torch.randn(4, 7, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
        plan = nz.plan(model, [f"blocks.{place}" for place in names], example_inputs=x)
        assert {edit.parameter for edit in plan.edits if isinstance(edit, nz.Copy)} == {
            f"blocks.{names[-1]}.last.{kind}" for kind in ("scale", "shift")[: 1 + has_bias]
        }
        with torch.no_grad():
            wanted = model.norm(model.stem(x))
            for place, block in enumerate(model.blocks):
                wanted = wanted if place in names else block(wanted)
            wanted = model.head(wanted).double()
            with plan.applied(model):
                got = model(x).double()
        assert (got - wanted).norm() / wanted.norm() <= limit
        assert nz.verify(model, plan, x).bound_holds
        is_coarse = dtype == torch.bfloat16 and "1 + w" in spelling
        assert {each.kind for each in plan.certificates} == {"measured" if is_coarse else "bounded"}
        assert nz.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("kind", ["Deberta", "DebertaV2"])
def test_deberta(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"])
    for dtype, limit in [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)]:
        torch.manual_seed(0)
        model = perturbed(getattr(transformers, f"{kind}Model")(config)).to(dtype)
        names = ["encoder.layer.1", "encoder.layer.2"]
        plan = nz.plan(model, names, example_inputs={"input_ids": IDS})
        assert error(model, plan, {"input_ids": IDS}, *names) <= limit


def test_what_is_no_norm_is_not_folded() -> None:
    """One part of it is another: over other dimensions, of another value, or not added but taken away."""
    over = {"dim": -1, "keepdim": True}

    def off_centre(x: torch.Tensor, part: float = 1.0, dim: int = -1) -> torch.Tensor:
        return x - part * x.mean(dim, keepdim=True)

    def square(x: torch.Tensor) -> torch.Tensor:
        return x.square().mean(**over)

    wrong = {
        "half the mean": lambda x, g, b: g * off_centre(x, 0.5) * (x.var(-1, False, True) + 1e-5).rsqrt() + b,
        "over the rows": lambda x, g, b: g * off_centre(x, dim=1) * (x.var(1, False, True) + 1e-5).rsqrt() + b,
        "more than an epsilon": lambda x, g, b: g * x * (square(x) + x).rsqrt() + b,
        "centred, then not": lambda x, g, b: g * off_centre(x) * (square(x) + 1e-5).rsqrt() + b,
        "not centred, then so": lambda x, g, b: g * x * (square(off_centre(x)) + 1e-5).rsqrt() + b,
        "less than": lambda x, g, b: g * x * (square(x) - 1e-5).rsqrt() + b,
        "a sum": lambda x, g, b: g * x * (x.square().sum(**over) + 1e-5).rsqrt() + b,
        "another root": lambda x, g, b: g * x * (square(x) + 1e-5).pow(-0.25) + b,
        "a gain along the rows": lambda x, g, b: g.view(1, -1, 1) * x * (square(x) + 1e-5).rsqrt() + b,
        "a gain turned around": lambda x, g, b: g.flip(0) * x * (square(x) + 1e-5).rsqrt() + b,
    }
    x = torch.randn(4, 16, 8)
    for name, formula in wrong.items():
        model = perturbed(Spelt(partial(Spelled, formula)))
        with pytest.raises(NeutralizeError, match=r"blocks\.1"):
            pytest.fail(f"{name}: {nz.plan(model, 'blocks.1', example_inputs=x)}")


def test_a_spelled_norm_with_other_readers() -> None:
    class Shared(Spelt):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            start = x = self.norm(self.stem(x))
            for block in self.blocks:
                x = block(x)
            return self.head(x + start)

    x = torch.randn(4, 7, 8)
    shared = perturbed(Shared(partial(Spelled, deberta)))
    with pytest.raises(NeutralizeError, match=r"got add, which reads what enters the block too \(the norm 'norm'"):
        nz.plan(shared, "blocks[0]", example_inputs=x)
    assert nz.verify(shared, nz.plan(shared, "blocks[1]", example_inputs=x), x).relative_error <= 5e-6
    tied = perturbed(Spelt(partial(Spelled, gemma, offset=1.0, has_bias=False)))
    tied.blocks[1].norm.scale = tied.norm.scale
    with pytest.raises(NeutralizeError, match=r"'\S+\.scale', which add with '\S*norm\.scale' reads too; untie"):
        nz.plan(tied, "blocks[0]", example_inputs=x)


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


def test_a_gain_that_meets_other_features_is_not_folded() -> None:
    model = perturbed(nn.Sequential(nn.LayerNorm(16), Turned(nn.LayerNorm)))
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
