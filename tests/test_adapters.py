"""PEFT: adapters are switched off with the layer that they add to, and a plan holds for those it was made with."""

import peft
import pytest
import torch
from bits import refusal
from networks import small_llama
from torch import nn

import neutralize as nz

IDS = {"input_ids": torch.arange(20).reshape(2, 10) * 7 % 60 + 3}
BLOCK = "base_model.model.model.layers[1]"
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}
KINDS = {
    "lora": peft.LoraConfig(**LORA),
    "lora with biases": peft.LoraConfig(**LORA, lora_bias=True),
    "ia3": peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": peft.AdaLoraConfig(target_modules=LORA["target_modules"], total_step=10),
    "trained norms": peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    "loha": peft.LoHaConfig(r=4, target_modules=["down_proj"]),
    "saved modules": peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
}


def llama() -> nn.Module:
    return small_llama(num_hidden_layers=2)


def adapted(config=KINDS["lora"], *others: str) -> nn.Module:
    """A model with adapters that have been trained, as far as anything shows."""
    model = peft.get_peft_model(llama(), config)
    for name in others:
        model.add_adapter(name, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "ia3_", "hada_", "modules_to_save", "ln_tuning")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**IDS).logits


def without(model: nn.Module) -> torch.Tensor:
    """The scores of the model with its second block cut out by a hook of our own."""
    block = model.get_submodule("base_model.model.model.layers.1")
    handle = block.register_forward_hook(lambda module, args, output: args[0])
    try:
        return run(model)
    finally:
        handle.remove()


@pytest.mark.parametrize(("kind", "edit"), [("lora", "cheapest"), *((kind, "outgoing") for kind in KINDS)])
def test_a_block_is_off_with_its_adapters(kind, edit):
    model = adapted(KINDS[kind])
    before, reference = run(model), without(model)
    plan = nz.plan(model, BLOCK, edit=edit, example_inputs=IDS)
    assert plan.certificate.kind == "exact"
    assert plan.certificate.assumption.endswith("adapter 'default' active")
    assert nz.verify(model, plan, **IDS).exact
    undo = plan.apply(model)
    assert not torch.equal(reference, before)
    assert torch.equal(run(model), reference)
    undo.restore()
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("kind", ["dora", "prefix"])
def test_magnitudes_and_prefixes_are_in_the_dataflow(kind):
    """DoRA divides by a norm that must not be 0; a prefix brings values that no norm before them takes away."""
    configs = {
        "dora": peft.LoraConfig(**LORA, use_dora=True),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }
    model = adapted(configs[kind])
    block = next(name for name, _ in model.named_modules() if name.endswith("model.layers.1"))
    handle = model.get_submodule(block).register_forward_hook(lambda module, args, output: args[0])
    reference = run(model)
    handle.remove()
    undo = nz.neutralize(model, block, example_inputs=IDS)
    assert torch.equal(run(model), reference)
    undo.restore()
    if kind == "dora":
        told = refusal(lambda: nz.plan(model, block, edit="outgoing", example_inputs=IDS))
        assert "lora_magnitude_vector.default.weight' may make it infinite or NaN" in told


def test_merged_for_good_it_is_still_off():
    model = adapted()
    nz.neutralize(model, BLOCK, edit="outgoing", example_inputs=IDS)
    model.merge_adapter()
    assert torch.equal(run(model), without(model))
    model.unmerge_adapter()  # which rounds in the other layers
    assert torch.equal(run(model), without(model))
    merged = model.merge_and_unload()
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        block = merged.model.layers[1]
        assert not block.mlp.down_proj.weight.any()
        assert torch.equal(block(x, position_embeddings=merged.model.rotary_emb(x, torch.arange(5)[None])), x)


def test_a_layer_with_an_adapter_fades_as_a_whole():
    model = adapted()
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    x = torch.randn(3, 64)
    added = layer(x)
    nz.neutralize(
        model, "base_model.model.model.layers[1].mlp.down_proj", "damp", factor=0.25, sides="in", example_inputs=IDS
    )
    assert torch.allclose(layer(x), 0.25 * added, rtol=1e-5, atol=1e-6)


def test_training_does_not_wake_a_frozen_layer():
    model = adapted()
    undo = nz.plan(model, BLOCK, edit="outgoing", example_inputs=IDS).apply(model, freeze=True)
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = run(model)
    for _ in range(3):
        made.zero_grad()
        model(**IDS, labels=IDS["input_ids"]).loss.backward()
        made.step()
    assert not torch.equal(run(model), before)
    assert torch.equal(run(model), without(model))
    undo.restore()


def test_a_plan_for_other_adapters_is_neither_applied_nor_verified():
    model = adapted(KINDS["lora"], "other")
    plan = nz.plan(model, BLOCK, edit="outgoing", example_inputs=IDS)
    model.set_adapter("other")
    before = run(model)
    for attempt in (lambda: plan.apply(model), lambda: nz.verify(model, plan, **IDS)):
        told = refusal(attempt)
        assert "was planned with, got a model with adapter 'other' active; plan on this model as it is" in told
    with model.disable_adapter():
        assert "got a model with no adapter active" in refusal(lambda: plan.apply(model))
    assert torch.equal(run(model), before)
    model.base_model.set_adapter(["default", "other"])
    both = nz.plan(model, BLOCK, edit="outgoing", example_inputs=IDS)
    assert "adapters 'default', 'other' active" in both.certificate.assumption
    assert nz.verify(model, both, **IDS).exact
    model.set_adapter("default")
    plan.apply(model)
    assert torch.equal(run(model), without(model))


def test_a_plan_for_the_model_without_adapters_does_not_fit():
    model = llama()
    outgoing, cheapest = nz.plan(model, "model.layers[1]", edit="outgoing"), nz.plan(model, "model.layers[1]")
    peft.get_peft_model(model, KINDS["lora"])  # changes the model itself
    told = refusal(lambda: outgoing.apply(model))
    assert "expected a parameter 'model.layers.1.mlp.down_proj.weight', got model.layers.1.mlp.down_proj.base_" in told
    assert "in a layer that an adapter was added to; plan on the model with its adapters" in told
    assert "got a model with adapter 'default' active" in refusal(lambda: nz.verify(model, cheapest, **IDS))


def test_an_adapter_that_comes_after_the_plan_is_told_of():
    model = llama()
    before = run(model)
    undo = nz.neutralize(model, "model.layers[1]", edit="outgoing")
    undo.check()
    elsewhere = peft.LoraConfig(r=4, target_modules=["lm_head"])
    undo_all = [undo, nz.neutralize(model, "model.layers[0].mlp", "zero", example_inputs=IDS)]
    grown = peft.get_peft_model(model, elsewhere, adapter_name="elsewhere")
    for each in undo_all:
        each.check()  # the layers are as they were
    grown.add_adapter("late", KINDS["lora"])
    grown.set_adapter("late")
    told = "expected no adapter in what is off, as at its application, got adapter 'late' active"
    for each in undo_all:
        assert f"check: {told}; restore, and plan on the model as it is then" in refusal(each.check)
    with pytest.warns(UserWarning, match="every bit is back, but the layers were not off"):
        undo_all[1].restore()
    with pytest.warns(UserWarning, match=told):
        undo.restore()
    with grown.disable_adapter():
        assert torch.equal(run(grown), before)


def test_an_adapter_that_is_switched_while_layers_are_off_is_told_of(recwarn):
    model = adapted(KINDS["lora"], "other")
    undo = nz.plan(model, BLOCK, edit="outgoing", example_inputs=IDS).apply(model)
    model.set_adapter("other")
    assert "got adapter 'other' active" in refusal(undo.check)
    model.set_adapter("default")
    undo.check()
    model.merge_adapter()
    assert "got adapter 'default' merged" in refusal(undo.check)
    model.unmerge_adapter()
    undo.restore()
    assert not [warning for warning in recwarn if "layers were not off" in str(warning.message)]


def test_what_an_adapter_is_merged_into_is_not_written():
    model = adapted()
    plan = nz.plan(model, BLOCK, edit="outgoing", example_inputs=IDS)
    model.merge_adapter()
    wanted = "got adapter 'default' merged into it, which is taken out again later; call unmerge_adapter() first"
    assert wanted in refusal(lambda: nz.plan(model, BLOCK, edit="outgoing", example_inputs=IDS))
    assert wanted in refusal(lambda: plan.apply(model))
    nz.neutralize(model, BLOCK, example_inputs=IDS)  # the gains of its norms are no adapter's
    assert torch.equal(run(model), without(model))
    model.unmerge_adapter()
    assert torch.equal(run(model), without(model))


def test_models_without_adapters_say_nothing_of_them():
    assert nz.plan(llama(), "model.layers[1]").certificate.assumption == "finite activations"
