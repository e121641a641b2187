"""The packages that people use neutralize with: the edit goes where the model goes."""

from __future__ import annotations

import json
import math
import runpy
import sys
from types import SimpleNamespace

import numpy
import onnxruntime
import pytest
import safetensors.torch
import timm
import tokenizers
import torch
import torchvision
import transformers
from bits import refusal
from networks import perturbed, small_llama
from torch import nn

import neutralize as nz
from neutralize.integrations.transformers import RampCallback

IDS = {"input_ids": torch.arange(20).reshape(2, 10) * 7 % 60 + 3}
WORDS = "[UNK] [EOS] the a cat dog sat ran on mat road and is was red blue".split()


def llama(*, tied: bool = False, words: int = 64) -> nn.Module:
    return perturbed(small_llama(vocab_size=words, tie_word_embeddings=tied))


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**IDS).logits


def cut(block: nn.Module):
    """Cut a block out by a hook of our own."""
    return block.register_forward_hook(lambda module, args, output: args[0])


def without(model: nn.Module, block: nn.Module, *inputs) -> torch.Tensor:
    handle = cut(block)
    try:
        with torch.no_grad():
            return model(*inputs) if inputs else run(model)
    finally:
        handle.remove()


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tied", "shard"), [(False, "5GB"), (True, "20KB")])
def test_a_saved_model_comes_back_with_the_edit(tied, shard, tmp_path):
    llama(tied=tied).save_pretrained(tmp_path / "intact")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "intact").eval()
    reference = without(model, model.model.layers[1])
    undo = nz.neutralize(model, "model.layers[1]", edit="outgoing")
    model.save_pretrained(tmp_path / "off", max_shard_size=shard)
    assert (len(list((tmp_path / "off").glob("*.safetensors"))) > 1) == (shard == "20KB")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "off").eval()
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert torch.equal(run(again), reference)
    undo.restore()
    for name, tensor in transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "intact").state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def trainer(model, folder, callbacks, steps, **settings):
    ids = [torch.arange(12) * k % 64 for k in range(1, 17)]
    common = {
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "save_steps": 3,
        "logging_steps": 100,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(str(folder), **common | settings)
    data = [{"input_ids": each, "labels": each} for each in ids]
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks)


class Watch(transformers.TrainerCallback):
    def __init__(self, callback):
        self.callback, self.factors = callback, []

    def on_step_end(self, args, state, control, **kwargs):
        self.factors.append(round(self.callback.ramp.factor, 6))


def test_a_layer_fades_out_while_a_trainer_trains_also_in_two_parts(tmp_path):
    def train(model, steps, **kwargs):
        callback = RampCallback("model.layers[1]", steps=4, start=1, shape="cosine")
        watch = Watch(callback)
        trainer(model, tmp_path, [callback, watch], steps).train(**kwargs)
        return watch.factors

    model = llama()
    wanted = [1.0, *(round((1 + math.cos(math.pi * k / 4)) / 2, 6) for k in range(1, 5)), 0.0]
    assert train(model, 6) == wanted
    model.eval()
    assert torch.equal(run(model), without(model, model.model.layers[1]))
    again = llama()
    assert train(again, 6, resume_from_checkpoint=str(tmp_path / "checkpoint-3")) == wanted[3:]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_the_weights_of_the_best_step_are_as_damped_as_the_ramp_says(tmp_path):
    model, callback = llama(), RampCallback("model.layers[1]", steps=4, sides="out")
    settings = {"save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "warmup_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run_ = trainer(model, tmp_path, [callback], 4, **settings, **best)
    run_.train()
    step = run_.state.best_global_step
    assert 0 < step < 4
    assert callback.ramp.factor == 1 - step / 4
    model.eval()
    assert not torch.equal(run(model), without(model, model.model.layers[1]))
    while not callback.ramp.done:
        callback.ramp.step()
    assert torch.equal(run(model), without(model, model.model.layers[1]))


def test_training_that_is_shorter_than_the_ramp_is_warned_of(tmp_path):
    callback = RampCallback("model.layers[1]", steps=4, start=1)
    with pytest.warns(UserWarning, match="expected training of 5 steps or more, got 1, after which the layers are not"):
        trainer(llama(), tmp_path, [callback], 1).train()
    assert not callback.ramp.done


def test_the_callback_refuses_what_is_no_number_of_steps():
    for start in (-1, 0.5, True):
        assert "expected a number of steps for start" in refusal(lambda s=start: RampCallback("0", steps=2, start=s))


# ---- lm_eval ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """A model with a tokenizer in a folder, and a function that runs a task of four questions on a model."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import neutralize.integrations.lm_eval

    folder = tmp_path_factory.mktemp("harness")
    spoken = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    spoken.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=spoken, unk_token="[UNK]", eos_token="[EOS]")
    wrapped.pad_token = "[EOS]"
    wrapped.save_pretrained(folder / "model")
    llama(words=len(WORDS)).save_pretrained(folder / "model")
    questions = [{"q": f"the {who} {did} on the", "choices": ["mat", "road"], "gold": 0} for who in ("cat", "dog")
                 for did in ("sat", "ran")]  # fmt: skip
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "questions.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "q",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }
    (folder / "tiny.yaml").write_text(json.dumps(task))  # which is YAML too
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def evaluate(model, **arguments):
        found = lm_eval.simple_evaluate(
            model=model,
            model_args=arguments or None,
            tasks=["tiny"],
            task_manager=manager,
            device="cpu",
            bootstrap_iters=0,
        )
        return [sample["resps"] for sample in found["samples"]["tiny"]], found["config"]

    return SimpleNamespace(
        folder=folder / "model", evaluate=evaluate, Model=neutralize.integrations.lm_eval.NeutralizedLM
    )


def test_the_harness_measures_the_network_without_the_layers(harness, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(harness.folder)
    handles = [cut(model.model.layers[1]), cut(model.model.layers[2])]
    from lm_eval.models.huggingface import HFLM

    loaded = HFLM(model, tokenizer=str(harness.folder))
    reference, _ = harness.evaluate(loaded)
    for handle in handles:
        handle.remove()
    intact, _ = harness.evaluate(loaded)
    place = str(harness.folder)
    off, config = harness.evaluate("neutralize", pretrained=place, layers="model.layers[1:3]")
    assert off == reference != intact
    plan = nz.plan(model, "model.layers[1:3]", edit="outgoing")
    (tmp_path / "plan.json").write_text(plan.to_json())
    from_file, other = harness.evaluate("neutralize", pretrained=place, plan=str(tmp_path / "plan.json"))
    assert from_file == reference
    assert other["neutralize_plan"] == plan.digest != config["neutralize_plan"]
    wrapped = harness.Model(model, layers="model.layers[1]", strategy="damp", factor=0.5, tokenizer=place)
    assert harness.evaluate(wrapped)[0] not in (intact, reference)
    wrapped.undo.restore()
    assert harness.evaluate(wrapped)[0] == intact


def test_the_harness_is_told_what_is_wrong(harness):
    assert "expected either layers or plan, got none" in refusal(lambda: harness.Model(str(harness.folder)))
    assert "near matches" in refusal(lambda: harness.Model(str(harness.folder), layers="model.layer.1", device="cpu"))
    for arguments, told in {
        (
            "layers=model.layers[1]",
            "factor=0.5",
        ): "expected parameters of strategy 'auto', got factor; give strategy=damp",
        ("plan=none.json",): "expected a file with a plan, got 'none.json', which cannot be read",
        ("plan=none.json", "strategy=zero"): "expected a plan alone, which has its strategy in it, got 'zero' with it",
    }.items():
        given = dict(argument.split("=", 1) for argument in arguments)
        assert told in refusal(lambda given=given: harness.Model("no model is loaded", **given))


def test_the_harness_command_line_says_it_in_one_line(harness, monkeypatch, capsys):
    from neutralize.integrations import lm_eval

    given = ["run", "--model", "neutralize", "--model_args", f"pretrained={harness.folder}", "--tasks", "arc_easy"]
    monkeypatch.setattr("sys.argv", ["lm_eval", *given])
    with pytest.raises(SystemExit) as ended:
        lm_eval.main()
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("lm_eval: expected either layers or plan, got none; give")
    )


@pytest.mark.parametrize(
    ("module", "lacks", "extra"),
    [("lm_eval", "lm_eval.__main__", "integrations"), ("transformers", "transformers", "hf")],
)
def test_a_package_that_is_lacking_is_named_with_how_to_install_it(monkeypatch, capsys, module, lacks, extra):
    monkeypatch.setitem(sys.modules, lacks, None)
    with pytest.raises(ModuleNotFoundError, match=rf"got none named {lacks}; pip install 'neutralize\[{extra}\]'$"):
        runpy.run_module(f"neutralize.integrations.{module}")
    if module == "lm_eval":
        with pytest.raises(SystemExit, match="2"):
            runpy.run_module("neutralize.integrations.lm_eval", run_name="__main__")
        assert capsys.readouterr().err.count("\n") == 1


# ---- models of vision, and where compiled and exported ones go -------------------------------------------------------

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VISION = {
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=5), "layer2[1]"),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 3, 4, 32, 64, num_classes=5),
        "encoder.layers.encoder_layer_1",
    ),
    "torchvision convnext": (lambda: torchvision.models.convnext_tiny(num_classes=5), "features[1][1]"),
    "timm vit": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5
        ),
        "blocks[1]",
    ),
    "timm resnet": (lambda: timm.create_model("resnet18", num_classes=5), "layer2[1]"),
}


def seeing(name: str) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    make, block = VISION[name]
    return perturbed(make()).eval(), block


@pytest.mark.parametrize("name", VISION)
def test_blocks_of_vision_models_are_off(name):
    model, selection = seeing(name)
    (block,) = nz.select(model, selection).values()
    reference = without(model, block, IMAGE)
    plan = nz.plan(model, selection, example_inputs=IMAGE)
    with torch.no_grad():
        assert not torch.equal(model(IMAGE), reference)
        with plan.applied(model):
            assert torch.equal(model(IMAGE), reference)
    assert plan.certificate.kind == "exact"


def test_a_compiled_model_runs_on_the_new_weights_without_compiling_again():
    model = llama()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    before = run(compiled)
    count = len(graphs)
    undo = nz.neutralize(compiled, "model.layers[1]")
    off = run(compiled)
    assert torch.equal(off, without(model, model.model.layers[1]))
    undo.restore()
    assert torch.equal(run(compiled), before)
    assert len(graphs) == count > 0


def test_an_exported_program_carries_the_edit():
    model, block = seeing("timm vit")
    reference = without(model, model.blocks[1], IMAGE)
    nz.neutralize(model, block, example_inputs=IMAGE)
    with torch.no_grad():
        program = torch.export.export(model, (IMAGE,))
        assert torch.allclose(program.module()(IMAGE), reference, rtol=1e-5, atol=1e-6)


def test_onnx_carries_the_edit(tmp_path):
    import onnx

    model, block = seeing("timm vit")
    with torch.no_grad():
        intact = model(IMAGE)
    reference = without(model, model.blocks[1], IMAGE)
    plan = nz.plan(model, block, edit="outgoing", example_inputs=IMAGE)
    plan.apply(model)
    torch.onnx.export(model, (IMAGE,), tmp_path / "off.onnx", dynamo=True, optimize=False, verbose=False)
    (got,) = onnxruntime.InferenceSession(tmp_path / "off.onnx").run(None, {"x": IMAGE.numpy()})
    assert numpy.allclose(got, reference.numpy(), rtol=1e-4, atol=1e-5)
    assert not numpy.allclose(got, intact.numpy(), rtol=1e-2, atol=1e-2)
    stored = onnx.load(tmp_path / "off.onnx")
    found = {tensor.name: onnx.numpy_helper.to_array(tensor, str(tmp_path)) for tensor in stored.graph.initializer}
    for name in plan.parameters:  # the same names, the same values
        assert not found[name].any()


def test_safetensors_carry_the_edit(tmp_path):
    model, block = seeing("timm vit")
    nz.neutralize(model, block, example_inputs=IMAGE)
    safetensors.torch.save_model(model, str(tmp_path / "off.safetensors"))
    again, _ = seeing("timm vit")
    safetensors.torch.load_model(again, str(tmp_path / "off.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(IMAGE), model(IMAGE))
        assert torch.equal(again(IMAGE), without(again, again.blocks[1], IMAGE))
