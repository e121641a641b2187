"""Verify on files against verify on the loaded model, with little in memory."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from bits import refusal
from networks import perturbed
from safetensors.torch import save_file
from stored import edited, located
from test_checkpoint_model import GROUPED, bert, gemma2, gpt2, llama, loaded, mixtral, saved
from test_checkpoint_quantized import FP8, Case, by_name, fp8, mxfp4, values
from torch import nn
from typer.testing import CliRunner

import neutralize as nz
from neutralize.checkpoint import Checkpoint
from neutralize.checkpoint.in_step import Turns
from neutralize.checkpoint.model import meta_model
from neutralize.checkpoint.region import Files
from neutralize.checkpoint.streamed import _Weights, verify
from neutralize.cli import app
from neutralize.language import quiet_transformers
from neutralize.progress import silent

IDS = {"input_ids": torch.arange(20).reshape(2, 10) * 7 % 90 + 5}

CASES = [
    (llama, "model.layers[1]", "auto", {}),
    (llama, "model.layers[0].mlp", "damp", {"factor": 0.3}),
    (mixtral, "model.layers[1]", "auto", {"edit": "outgoing"}),
    (gemma2, "model.layers[1]", "auto", {}),
    (gpt2, "transformer.h[1].mlp", "zero", {}),
    (bert, "bert.encoder.layer[1]", "auto", {}),
    (llama, ["model.layers[1].self_attn.heads[2]", "model.layers[0].self_attn.heads[1:3]"], "damp", {"factor": 0.4}),
    (gpt2, "transformer.h[1].attn.heads[-1]", "zero", {}),
    (mixtral, "model.layers[1].mlp.experts[2]", "zero", {}),
]


class Tower(nn.Sequential):
    """Floating-point inputs, and a layer that is off only as far as its input is small."""

    def __init__(self):
        super().__init__(nn.Linear(16, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 300))


@pytest.mark.parametrize(
    ("make", "layers", "strategy", "options", "scaled"),
    [
        (mixtral, "model.layers[0]", "damp", {"factor": 0.3}, "layers"),  # sizes of its input choose other experts
        (bert, ["bert.encoder.layer[1]"], "auto", {}, "layers"),
        (Tower, "1", "auto", {}, "inputs"),
    ],
)
def test_the_curve_over_scales_is_that_of_the_loaded_model_and_reads_nothing_more(
    make, layers, strategy, options, scaled, tmp_path
):
    given, factory = (torch.randn(5, 16), Tower) if make is Tower else (IDS, None)
    if make is Tower:
        live = perturbed(Tower())
        save_file(live.state_dict(), tmp_path / "model.safetensors")
    else:
        folder = saved(make, tmp_path, torch.float32)
        live = loaded(type(meta_model(located(folder))[0]), folder)
    layout = located(tmp_path if make is Tower else folder)
    args, kwargs = ((given,), {}) if make is Tower else ((), given)
    plan = nz.plan(live, layers, strategy, example_inputs=given, **options)
    plain, found = (verify(layout, plan, given, factory=factory, detailed=detailed) for detailed in (False, True))

    wanted = nz.verify(live, plan, *args, **kwargs)
    assert found.measured.scaled == wanted.scaled == scaled
    curve, live_curve = found.measured.at_scales(), wanted.at_scales()
    assert list(curve) == list(live_curve) == [1 / 64, 1 / 16, 1 / 4, 1, 4, 16, 64]
    for scale, one in curve.items():
        assert one.per_layer == live_curve[scale].per_layer, scale  # of numbers: NaN would not be equal
        assert one.output_error == live_curve[scale].output_error, scale
        assert (one.bound_holds, one.assumptions_hold) == (True, live_curve[scale].assumptions_hold)
    assert found.measured.per_layer == plain.per_layer
    assert len({one.output_error for one in curve.values()}) > 1 or make is bert
    buffers = sum(buffer.nbytes for buffer in live.buffers())
    drawn = 2 * sum(value.nbytes for name, value in live.named_parameters() if name in plan.parameters)
    assert plain.read_bytes <= found.read_bytes <= plain.read_bytes + drawn + 20 * buffers
    assert found.peak_bytes <= plain.peak_bytes + max(value.nbytes for value in live.parameters())
    with pytest.raises(nz.NeutralizeError, match="verify: expected some of the scales that were measured on the files"):
        found.measured.at_scales([3.0])


class Seeing(nn.Module):
    """A model of images that brings token ids, as those of transformers do."""

    main_input_name = "pixel_values"
    dummy_inputs = {"input_ids": torch.arange(4)}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.patch, self.block, self.last = nn.Conv2d(3, 4, 64, 64), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, pixel_values=None, **ignored):
        """Run it."""
        return self.last(self.block(self.patch(pixel_values).mean((2, 3))))


def test_a_model_of_images_is_verified_on_images_of_a_size_that_it_takes(tmp_path):
    model = perturbed(Seeing())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    plan = nz.plan(model, "block", example_inputs=torch.randn(2, 3, 64, 64))
    found = verify(located(tmp_path), plan, factory=Seeing)
    assert found.ok
    assert found.measured.scaled == "inputs"


def test_runs_in_step_end_together_and_the_first_error_is_told():
    turns, log = Turns(3), []

    def job(place):
        for step in range(3):
            turns.wait(lambda: False, helps_itself=True)
            log.append((step, place))
            if (step, place) == (1, 1):
                raise ValueError("the second run")

    with pytest.raises(ValueError, match="the second run"):
        turns.run([lambda place=place: job(place) for place in range(3)])
    assert log == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert Turns(2).run([lambda: 1, lambda: 2]) == [1, 2]


@pytest.mark.parametrize(("make", "layers", "strategy", "options"), CASES)
def test_it_measures_what_verify_measures_on_the_loaded_model(make, layers, strategy, options, tmp_path):
    folder = saved(make, tmp_path, torch.float32)
    layout = located(folder)
    model, _ = meta_model(layout)
    plan = nz.plan(model, layers, strategy, **options)
    told: list[float] = []
    found = verify(layout, plan, IDS, advance=told.append)

    wanted = nz.verify(loaded(type(model), folder), plan, **IDS)
    assert found.ok
    assert found.measured.exact == wanted.exact
    assert found.per_layer == wanted.per_layer
    assert found.measured.relative_error == wanted.relative_error
    assert sum(told) == found.read_bytes
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert found.peak_bytes <= 2 * largest < sum(parameter.nbytes for parameter in model.parameters())
    assert "held at a time" in str(found)


def test_files_that_hold_the_plan_pass_and_files_that_do_not_fail(tmp_path):
    layout = located(saved(llama, tmp_path))
    model, names = meta_model(layout)
    plan = nz.plan(model, "model.layers[1]")
    never = verify(layout, plan, IDS, applied=True)
    assert not never.ok
    assert never.measured.not_held == tuple(edit.parameter for edit in plan.edits)
    blamed = f"the files do not hold this plan, which leaves other values in {plan.edits[0].parameter!r} and 1 more"
    assert blamed in never.summary
    assert "bug" not in never.summary
    never.to_html(tmp_path / "never.html")
    page = (tmp_path / "never.html").read_text()
    assert "✗ A bound is exceeded: the files do not hold this plan" in page
    assert verify(layout, plan, IDS).measured.exact
    edited(layout, plan.edits, names)
    after = verify(layout, plan, IDS, applied=True)
    assert after.ok
    assert after.per_layer == {"model.layers.1": 0.0}


def test_a_wrong_byte_is_seen(tmp_path):
    layout = located(saved(llama, tmp_path))
    model, names = meta_model(layout)
    plan = nz.plan(model, "model.layers[1]", edit="outgoing")
    edited(layout, plan.edits, names)
    assert verify(layout, plan, IDS, applied=True).ok
    stored = layout.tensors["model.layers.1.mlp.down_proj.weight"]
    with (tmp_path / stored.regions[0].file).open("r+b") as file:
        file.seek(stored.regions[0].offset + 7)
        file.write(b"\x40")
    found = verify(layout, plan, IDS, applied=True)
    assert not found.ok
    assert found.measured.not_held == ("model.layers.1.mlp.down_proj.weight",)


class Chain(nn.Module):
    """A plain layer whose reader takes up its scale and its offset: folds and rewrites of the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_folds_are_made_in_memory(tmp_path):
    torch.manual_seed(0)
    live = perturbed(Chain()).eval()
    save_file({name: tensor.clone() for name, tensor in live.state_dict().items()}, tmp_path / "model.safetensors")
    x = torch.randn(5, 8)
    plan = nz.plan(live, "layers.0", example_inputs=x)
    assert {type(edit).__name__ for edit in plan.edits} >= {"Fold"}
    found = verify(located(tmp_path), plan, x, factory=Chain)
    wanted = nz.verify(live, plan, x)
    assert found.ok
    assert found.per_layer == wanted.per_layer
    assert found.measured.output_error == wanted.output_error
    message = refusal(lambda: verify(located(tmp_path), plan, x, factory=Chain, applied=True))
    assert "got 'input' for 'layers.0', which only the weights of before show; verify before applying" in message


def test_refusals(tmp_path):
    layout = located(saved(llama, tmp_path))
    model, _ = meta_model(layout)
    plan = nz.plan(model, "model.layers[1]")
    assert "expected a model that runs on the inputs" in refusal(lambda: verify(layout, plan, {"nothing": 1}))


def test_parts_that_files_hold_pass_and_others_fail(tmp_path):
    checkpoint = Checkpoint(saved(llama, tmp_path))
    plan = nz.plan(checkpoint, "model.layers[1].self_attn.heads[2]", "zero")
    assert not checkpoint.verify(plan, IDS, applied=True).ok
    plan.apply(checkpoint)
    assert checkpoint.verify(plan, IDS, applied=True).ok


LATER = [  # aims that only the weights of before show
    ("model.layers[0].mlp", "damp", {"factor": 0.3}),
    ("model.layers[1].self_attn.heads[2]", "damp", {"factor": 0.5}),
]


@pytest.mark.parametrize(("layers", "strategy", "options"), LATER)
def test_the_undo_of_a_plan_in_place_tells_what_the_network_was(layers, strategy, options, tmp_path):
    checkpoint = Checkpoint(saved(llama, tmp_path))
    plan = nz.plan(checkpoint, layers, strategy, **options)
    wanted = checkpoint.verify(plan, IDS)
    assert "which only the weights of before show" in refusal(lambda: checkpoint.verify(plan, IDS, applied=True))
    undo = plan.apply(checkpoint)
    nz.plan(checkpoint, "model.layers[1]").apply(checkpoint).restore()
    found = checkpoint.verify(plan, IDS, applied=True)
    assert found.ok
    assert str(found.measured) == str(wanted.measured)
    twice = nz.plan(checkpoint, layers, "damp", factor=0.25).apply(checkpoint)  # over the same bytes
    assert "which only the weights of before show" in refusal(lambda: checkpoint.verify(plan, IDS, applied=True))
    twice.restore()
    undo.restore()
    assert "which only the weights of before show" in refusal(lambda: checkpoint.verify(plan, IDS, applied=True))


def test_folds_in_place_are_measured_against_their_undo(tmp_path):
    located_chain(tmp_path / "chain")
    plan = nz.plan(Chain().eval(), "layers.0", example_inputs=torch.randn(5, 8))
    checkpoint = Checkpoint(tmp_path / "chain", factory="test_checkpoint_streamed:Chain")
    wanted = checkpoint.verify(plan)
    plan.apply(checkpoint)
    assert str(checkpoint.verify(plan, applied=True).measured) == str(wanted.measured)
    bias = checkpoint.layout.tensors["layers.2.bias"].regions[0]
    with (tmp_path / "chain" / bias.file).open("r+b") as file:
        file.seek(bias.offset)
        file.write(b"\0\0\0\x43")
    assert checkpoint.verify(plan, applied=True).measured.not_held == ("layers.2.bias",)


def test_the_first_layer_tells_inputs_where_a_model_brings_none(tmp_path):
    plan = nz.plan(Chain().eval(), "layers.4", "zero")
    assert verify(located_chain(tmp_path / "chain"), plan, factory=Chain).ok


def located_chain(folder: Path):
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in Chain().state_dict().items()}, folder / "model.safetensors")
    return located(folder)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_stays_small(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8}
    config = transformers.LlamaConfig(**(GROUPED | sizes))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.config.save_pretrained(tmp_path)
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert total > 200 << 20
    for name, parameter in model.named_parameters():
        save_file({name: torch.full(parameter.shape, 0.01)}, tmp_path / f"{name}.safetensors")
    layout = located(tmp_path)
    plan = nz.plan(meta_model(layout)[0], "model.layers[1:3]")
    seen = [resident()]
    found = verify(layout, plan, IDS, advance=lambda _: seen.append(resident()))
    assert found.ok
    assert found.read_bytes > 1.9 * total
    assert found.peak_bytes <= 2 * 4096 * 512 * 4
    assert max(seen) - seen[0] < total / 2


# ---- quantized weights -----------------------------------------------------------------------------------------------

FORMATS = ["compressed-tensors nvfp4", "gptq 4 bit", "awq", "bitsandbytes nf4 nested"]  # and below FP8, MXFP4 and NF4


def quantized_llama(folder: Path, case: Case) -> nn.Module:
    """Save a Llama whose matrices are quantized, and return it with what the format's own decoder makes of them."""
    dtype = case.decode(case.tensors(values())).dtype
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 128) | {"num_key_value_heads": 4}
    config = transformers.LlamaConfig(**(GROUPED | sizes), dtype=dtype)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name.endswith("_proj.weight"):
            state = {part: tensor.contiguous() for part, tensor in case.tensors(parameter.float()).items()}
            tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in state.items()}
            parameter.copy_(case.decode(state))
        else:
            tensors[name] = parameter
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    content = config.to_dict() | {"quantization_config": dict(case.settings), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(content))
    return model


def loaders_logits(folder: Path) -> torch.Tensor:
    """What transformers makes of a quantized checkpoint, on a machine without a GPU: it decodes the weights."""
    with quiet_transformers(), torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(**IDS).logits


def streamed_logits(folder: Path) -> torch.Tensor:
    checkpoint = Checkpoint(folder)
    model, names = meta_model(checkpoint.layout, buffers=True)
    with (
        Files(folder) as files,
        torch.no_grad(),
        _Weights(checkpoint.layout, names, files, files, [], silent).placed_in(model),
    ):
        return model(**IDS).logits


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_model_is_run_as_its_format_decodes_it_and_proven(name, tmp_path):
    decoded = quantized_llama(tmp_path, by_name[name])
    checkpoint = Checkpoint(tmp_path)
    with torch.no_grad():
        assert torch.equal(streamed_logits(tmp_path), decoded(**IDS).logits)
    plan = nz.plan(checkpoint, "model.layers[1]", edit="outgoing")
    assert checkpoint.verify(plan, IDS).measured.exact
    undo = plan.apply(checkpoint)
    assert checkpoint.verify(plan, IDS, applied=True).ok
    region = undo.edition.kept[0].region
    with (tmp_path / region.file).open("r+b") as file:
        file.seek(region.offset)
        file.write(b"\x3c" * 8)
    assert not checkpoint.verify(plan, IDS, applied=True).ok


def test_what_is_not_known_of_a_format_is_not_guessed(tmp_path):
    quantized_llama(tmp_path, by_name["gptq 4 bit"])
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "marlin"
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(lambda: streamed_logits(tmp_path))
    assert "a weight that can be decoded for 'model.layers.0.self_attn.q_proj.weight' (GPTQ 4 bit" in message
    assert "got the checkpoint_format 'marlin', not 'gptq' or 'gptq_v2'; verify the loaded model" in message


def test_verify_of_a_quantized_checkpoint_exits_with_1_after_a_wrong_byte(tmp_path):
    quantized_llama(tmp_path, by_name["bitsandbytes nf4"])
    verify_ = ["verify", str(tmp_path), "--layers", "model.layers[1]", "--option", "edit=outgoing", "--quiet"]
    plan = nz.plan(str(tmp_path), "model.layers[1]", edit="outgoing")
    assert CliRunner().invoke(app, verify_).exit_code == 0
    region = plan.apply(str(tmp_path)).edition.kept[-1].region
    assert CliRunner().invoke(app, [*verify_, "--applied"]).exit_code == 0
    with (tmp_path / region.file).open("r+b") as file:
        file.seek(region.offset + 3)
        file.write(b"\x3c")
    assert CliRunner().invoke(app, [*verify_, "--applied"]).exit_code == 1


def test_fp8_is_read_as_transformers_loads_it(tmp_path):
    case = replace(by_name["fp8 blocks"], tensors=lambda w: fp8(w, torch.float8_e4m3fn, (64, 64)))
    quantized_llama(tmp_path, replace(case, settings=FP8 | {"activation_scheme": "dynamic"}))
    assert torch.equal(streamed_logits(tmp_path), loaders_logits(tmp_path))


def test_experts_of_gpt_oss_are_read_as_transformers_loads_them(tmp_path):
    config = transformers.GptOssConfig(
        **(GROUPED | {"hidden_size": 64, "head_dim": 16, "num_local_experts": 4}), dtype="bfloat16"
    )
    torch.manual_seed(0)
    tensors = {}
    for name, parameter in transformers.GptOssForCausalLM(config).state_dict().items():
        is_quantized = name.endswith(("gate_up_proj", "down_proj"))
        made = mxfp4(parameter) if is_quantized else {"": parameter.to(torch.bfloat16)}
        tensors |= {name + part: tensor.contiguous() for part, tensor in made.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = {"quantization_config": {"quant_method": "mxfp4"}, "architectures": ["GptOssForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | settings))
    assert torch.equal(streamed_logits(tmp_path), loaders_logits(tmp_path))
    plan = nz.plan(tmp_path, "model.layers[0].mlp", "zero")
    assert Checkpoint(tmp_path).verify(plan, IDS).measured.exact
