"""One plan on a live model and on its checkpoint: the same bits; from Python and from the command line."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import digests
from networks import perturbed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

import neutralize as nz
from neutralize import cli
from neutralize.report import format_bytes


def run(*arguments: object, status: int = 0) -> str:
    """Run the command, and return what it printed."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = perturbed(LlamaForCausalLM(config)).bfloat16()
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.txt").write_text("extra")
    return folder


@pytest.fixture
def llama(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "llama"))


def loaded(folder: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return copy.deepcopy(model)  # its weights are the mapped file, which is edited next


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, yours = one.state_dict(), other.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


STRATEGIES = {
    "auto": {},
    "outgoing": {"strategy": "passthrough", "edit": "outgoing"},
    "zero": {"strategy": "zero"},
    "damp": {"strategy": "damp", "factor": 0.5},
}


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_checkpoint_becomes_what_the_live_model_becomes(llama: Path, kind: str) -> None:
    before, live = digests(llama), loaded(llama)
    layers = "model.layers[1:3]"
    plan = nz.plan(llama, layers, **STRATEGIES[kind])
    assert plan.digest == nz.plan(live, layers, **STRATEGIES[kind]).digest
    plan.apply(live)
    undo = plan.apply(llama)
    assert equal(loaded(llama), live)
    undo.restore()
    assert undo.restored
    assert digests(llama) == before


def test_parts_by_name_and_experts_of_a_list(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64,
    )  # fmt: skip
    perturbed(Qwen3MoeForCausalLM(config)).save_pretrained(tmp_path)
    before, live = digests(tmp_path), loaded(tmp_path)
    layers = ["model.layers[0].mlp.experts[2]", "model.layers[1].self_attn.heads[1]"]
    undo = nz.neutralize(tmp_path, layers, "zero")
    nz.neutralize(live, layers, "zero")
    assert equal(loaded(tmp_path), live)
    undo.restore()
    assert digests(tmp_path) == before


def test_a_file_of_a_folder_is_of_the_model_of_its_config(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    perturbed(LlamaForCausalLM(config)).save_pretrained(tmp_path)
    live = loaded(tmp_path)
    nz.neutralize(tmp_path / "model.safetensors", "model.layers[1]")
    nz.neutralize(live, "model.layers[1]")
    assert equal(loaded(tmp_path), live)


def test_neutralized_off_exactly_against_the_excised_network(llama: Path) -> None:
    tokens = torch.arange(20)[None] % 64
    intact = loaded(llama)
    with nz.excised(intact, "model.layers[2]"), torch.no_grad():
        wanted = intact(tokens).logits
    nz.neutralize(llama, "model.layers[2]")
    with torch.no_grad():
        assert torch.equal(loaded(llama)(tokens).logits, wanted)


def test_the_command_line_from_plan_to_restore(llama: Path, tmp_path: Path) -> None:
    before = digests(llama)
    tree = run("inspect", llama)
    assert "layers[0:4]" in tree
    assert f"{format_bytes(sum(file.stat().st_size for file in llama.glob('*.safetensors')))} on disk" in tree
    tensors = json.loads(run("inspect", llama, "--match", "*layers.1.*norm*", "--json"))["tensors"]
    assert [entry["shape"] for entry in tensors] == [[32], [32]]
    assert "exact" in run("plan", llama, "--layers", "model.layers[1]", "--save", tmp_path / "plan.json")
    plan = nz.Plan.from_json((tmp_path / "plan.json").read_text())
    assert (
        plan.digest
        == json.loads(run("apply", llama, "--plan", tmp_path / "plan.json", "--dry-run", "--json"))["digest"]
    )
    assert "as certified for the model that was planned for" in run(
        "apply", llama, "--plan", tmp_path / "plan.json", "--dry-run"
    )
    printed = run("plan", llama, "--layers", "model.layers[1]", "--json")
    assert nz.Plan.from_json(printed) == plan
    assert json.loads(printed)["planning_s"] > 0
    assert "planned in" in run("plan", llama, "--layers", "model.layers[1]")
    assert digests(llama) == before
    assert run("status", llama).endswith("intact\n")
    assert "expected a plan with the digest 'abc'" in run(
        "apply", llama, "--plan", tmp_path / "plan.json", "--digest", "abc", "--in-place", status=2
    )
    digest = ("--digest", plan.digest[:12])
    applied = json.loads(run("apply", llama, "--plan", tmp_path / "plan.json", *digest, "--in-place", "--json"))
    assert applied["state"] == "edited"
    assert applied["bytes"] == 2 * 32 * 2
    (tmp_path / "my llama").symlink_to(llama)
    damped = ("--layers", "model.layers[3]", "--strategy", "damp", "--option", "factor=0.25")
    told = run("apply", tmp_path / "my llama", *damped, "--in-place")
    assert f"`neutralize restore '{tmp_path}/my llama'` puts every byte back" in told
    assert len(json.loads(run("status", llama, "--json"))["edits"]) == 2
    live = loaded(llama)
    run("restore", llama)
    run("restore", llama)
    assert digests(llama) == before
    intact = loaded(llama)
    plan.apply(intact)
    nz.plan(intact, "model.layers[3]", "damp", factor=0.25).apply(intact)
    assert equal(live, intact)
    assert "got none; every byte is as it was" in run("restore", llama, status=2)


def test_the_command_line_writes_copies(llama: Path, tmp_path: Path) -> None:
    before, live = digests(llama), loaded(llama)
    out = tmp_path / "out"
    printed = run("apply", llama, "--layers", "model.layers[1]", "--output", out, "--verify-copy")
    assert "untouched tensors compared" in printed
    assert digests(llama) == before
    assert digests(out).keys() == before.keys()
    nz.neutralize(live, "model.layers[1]")
    assert equal(loaded(out), live)


def test_verify_on_the_files_before_and_after_and_on_those_of_others(llama: Path, tmp_path: Path) -> None:
    found = json.loads(run("verify", llama, "--layers", "model.layers[1:3]", "--json"))
    assert found["ok"]
    assert found["exact"]
    assert found["peak_bytes"] < sum(path.stat().st_size for path in llama.glob("*.safetensors")) / 4
    run("plan", llama, "--layers", "model.layers[1:3]", "--save", tmp_path / "plan.json")
    assert (
        json.loads(run("verify", llama, "--plan", tmp_path / "plan.json", "--applied", "--json", status=1))["ok"]
        is False
    )
    run("apply", llama, "--plan", tmp_path / "plan.json", "--in-place")
    assert "bit for bit" in run("verify", llama, "--plan", tmp_path / "plan.json", "--applied")


def test_the_command_line_removes_what_killed_runs_left(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / ".neutralize").mkdir()
    (tmp_path / ".neutralize" / "000001.part").touch()
    assert ".neutralize: left by a run that was killed" in run("status", tmp_path)
    assert json.loads(run("restore", tmp_path, "--json"))["removed"] == [str(tmp_path / ".neutralize")]
    (tmp_path / ".out.partial" / "new").mkdir(parents=True)
    assert "got a copy that is not finished" in run("status", tmp_path / "out", status=2)
    assert f"removed: {tmp_path / '.out.partial'}\n" in run("restore", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_names_that_would_steer_a_terminal_are_written_out(tmp_path: Path) -> None:
    save_file({"\x1b[31ma\nb[bold]": torch.ones(2)}, tmp_path / "model.safetensors")
    assert "\\x1b[31ma\\nb[bold]" in run("inspect", tmp_path)
    run("apply", tmp_path, "--set", "*=0", "--in-place")
    assert "\x1b" not in run("status", tmp_path)


def test_a_plan_that_cannot_be_saved_is_refused(llama: Path, tmp_path: Path) -> None:
    output = run("plan", llama, "--layers", "model.layers[1]", "--save", tmp_path / "no" / "plan.json", status=2)
    assert output.startswith("plan: expected a file for --save in a folder that can be written, got ")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--in-place"], "expected one of --layers, --set and --plan"),
        (["--layers", "model.layers[1]"], "expected --in-place"),
        (["--layers", "model.layers[1]", "--in-place", "--output", "x"], "got both"),
        (["--layers", "model.layers[1]", "--in-place", "--link"], "expected --output beside --link"),
        (["--layers", "model.layers[9]", "--in-place"], "model.layers"),
        (["--layers", "model.layer", "--in-place"], "near matches"),
        (["--layers", "model.layers[1]", "--strategy", "zap", "--in-place"], "zap"),
        (["--layers", "model.layers[1]", "--strategy", "damp", "--option", "factor", "--in-place"], "NAME=VALUE"),
        (["--plan", "nowhere.json", "--in-place"], "expected a plan in"),
        (["--set", "model.norm=0", "--in-place"], "near matches"),
        (["--set", "model.norm.weight=0", "--strategy", "damp", "--in-place"], "--strategy and --option beside"),
    ],
)
def test_a_request_that_cannot_be_carried_out_changes_nothing(llama: Path, arguments: list[str], message: str) -> None:
    before = digests(llama)
    output = run("apply", llama, *arguments, status=2)
    assert message in output
    assert "Traceback" not in output
    assert digests(llama) == before


def test_a_plan_for_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(other)
    plan = nz.plan(other, "model.layers[1]")
    before = digests(llama)
    with pytest.raises(nz.NeutralizeError, match=r"(?s)made for another model.*expected shape \[16\].*got \[32\]"):
        plan.apply(llama)
    assert digests(llama) == before


def test_a_folder_of_torch_distributed_checkpoint_from_the_command_line(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "dcp"
    dcp.save(checkpoints.own_model().state_dict(), checkpoint_id=folder, no_dist=True)
    before, live = digests(folder), checkpoints.own_model()
    run("apply", folder, "--model", "checkpoints:own_model", "--layers", "1", "--in-place")
    nz.neutralize(live, "1", example_inputs=torch.randn(5, 8))
    held = {name: torch.empty_like(tensor) for name, tensor in live.state_dict().items()}
    dcp.load(held, checkpoint_id=folder, no_dist=True)
    assert all(torch.equal(held[name], tensor) for name, tensor in live.state_dict().items())
    run("restore", folder)
    assert digests(folder) == before


def test_code_in_the_folder_is_never_run(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(nz.NeutralizeError, match="code of its own, which is never run"):
        nz.plan(llama, "model.layers[1]")
    assert not (tmp_path / "ran").exists()


def test_a_plan_that_sets_and_rescales_is_not_applied_twice(tmp_path: Path) -> None:
    """What reads the layer would be scaled by 1/ε squared, and ``verify --applied`` would call that right."""
    path = tmp_path / "model.safetensors"
    save_file(checkpoints.own_model().state_dict(), path)
    own, whole = nz.Checkpoint(path, factory="checkpoints:own_model"), path.read_bytes()
    plan = nz.plan(own, "1")
    plan = replace(plan, edits=(*plan.edits, nz.Rewrite("2.weight", (4, 8), "float32", scale=4.0)))
    undo = plan.apply(own)
    applied = path.read_bytes()
    for again in (lambda: plan.apply(own), lambda: own.write(plan, tmp_path / "copy.safetensors")):
        with pytest.raises(
            nz.NeutralizeError, match=r"of edit 1, which would change '2.weight' a second time; restore"
        ):
            again()
    with pytest.raises(nz.NeutralizeError, match=r"a second time; restore it first, or verify it as applied"):
        own.verify(plan, torch.randn(5, 8))
    assert path.read_bytes() == applied
    beside = tmp_path / "beside.safetensors"  # another checkpoint, in the folder of the same journal
    beside.write_bytes(whole)
    plan.apply(nz.Checkpoint(beside, factory="checkpoints:own_model")).restore()
    undo.restore()
    plan.apply(own)
    path.write_bytes(whole)  # fetched again: the plan is not in it
    plan.apply(own)
    assert path.read_bytes() == applied
    damp = nz.plan(own, "1", "damp", factor=0.5)
    damp.apply(own)
    damp.apply(own)  # a half of a half


def test_a_model_of_ones_own_is_planned_through_its_factory(tmp_path: Path) -> None:
    model, x = checkpoints.own_model(), torch.randn(5, 8)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    run("apply", tmp_path, "--model", "checkpoints:own_model", "--layers", "1", "--in-place")
    nz.neutralize(model, "1", example_inputs=x)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert json.loads(run("verify", tmp_path, "--model", "checkpoints:own_model", "--layers", "1", "--json"))["ok"]
    torch.save({"epoch": 3, "state_dict": checkpoints.own_model().state_dict()}, tmp_path / "nested.pt")
    run("apply", tmp_path / "nested.pt", "--model", "checkpoints:own_model", "--layers", "1", "--in-place")
    found = torch.load(tmp_path / "nested.pt")["state_dict"]
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert "nobody" in run("plan", tmp_path, "--model", "checkpoints:nobody", "--layers", "1", status=2)
