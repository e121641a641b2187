"""The anatomy of a model: its tree, what stands in it, and that a strategy can what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import own_model
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import neutralize as nz
from neutralize import anatomy as module
from neutralize import cli
from neutralize.anatomy import Anatomy, Entry, anatomy
from neutralize.report import format_bytes


class OffsetNorm(nn.Module):
    """A norm whose gain is 1 + w, in ops."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight.float())).to(x.dtype)


class Block(nn.Module):
    """A block of two branches, with its norms where a test wants them."""

    def __init__(self, norms: str, width: int = 8, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norms = norms
        self.before, self.behind = norm(width), norm(width)
        self.up, self.act, self.down = nn.Linear(width, 12), nn.Tanh(), nn.Linear(12, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.norms in ("pre-norm", "sandwich norm")
        branch = self.down(self.act(self.up(self.before(x) if before else x)))
        if self.norms in ("sandwich norm", "normed branch"):
            branch = self.behind(branch)
        if self.norms == "none":
            return branch
        return self.behind(x + branch) if self.norms == "post-norm" else x + branch


def found(entries: tuple[Entry, ...], name: str) -> Entry:
    return next(each for entry in entries for _, each in entry.walk() if each.name == name)


@pytest.mark.parametrize("norm", [nn.LayerNorm, OffsetNorm])
@pytest.mark.parametrize("norms", ["pre-norm", "post-norm", "sandwich norm", "normed branch", "plain", "none"])
def test_the_residual_kind_is_read_off_the_dataflow(norms, norm):
    model = nn.Sequential(nn.LayerNorm(8), nn.ModuleDict(), *(Block(norms, norm=norm) for _ in range(2)))
    del model[1]
    tree = anatomy(model, example_inputs=torch.zeros(2, 8))
    block = found(tree.entries, "1")
    assert (block.names, block.residual, block.activation) == (("1", "2"), norms, "tanh")
    assert found(tree.entries, "1.up").widths == (8, 12)
    assert found(tree.entries, "1.up").activation == "tanh"


def test_blocks_are_one_entry_if_they_are_alike_and_two_if_they_are_not():
    kinds = ["pre-norm", "pre-norm", "plain", "pre-norm"]
    model = nn.Sequential(*map(Block, kinds), nn.Linear(8, 8))
    tree = anatomy(model, example_inputs=torch.zeros(2, 8))
    assert [entry.names for entry in tree.entries] == [("0", "1", "3"), ("2",), ("4",)]
    assert tree.parameters == sum(each.numel() for each in model.parameters())
    assert tree.entries[0].bytes == 4 * tree.entries[0].parameters == 4 * (2 * 16 + 8 * 12 * 2 + 12 + 8)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tree(llama) -> Anatomy:
    return anatomy(llama)


LAYERS = ["model.layers.0", "model.layers.0.mlp", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("strategy", module.STRATEGIES)
def test_a_strategy_can_what_is_said_of_it(llama, tree, layer, strategy):
    (ability,) = (each for each in found(tree.entries, layer).abilities if each.strategy == strategy)
    options = {"factor": 0.5} if strategy == "damp" else {}
    if ability.certificate is None:
        with pytest.raises(nz.NeutralizeError) as refusal:
            nz.plan(llama, layer, strategy, **options)
        assert str(refusal.value) == ability.why_not
        return
    plan = nz.plan(llama, layer, strategy, **options)
    assert (ability.certificate, ability.bound) == (plan.certificates[0].kind, plan.certificates[0].bound)
    assert ability.bytes == plan.written_bytes


def test_alike_blocks_are_analysed_once(llama, monkeypatch):
    drafted = []
    strategies = {name: Counting(strategy, drafted) for name, strategy in module.STRATEGIES.items()}
    monkeypatch.setattr(module, "STRATEGIES", strategies)
    block = found(anatomy(llama).entries, "model.layers.0")
    assert block.names == ("model.layers.0", "model.layers.1", "model.layers.2")
    assert not [layer for layer in drafted if layer.startswith(("model.layers.1", "model.layers.2"))]
    assert drafted.count("model.layers.0") == len(strategies)  # each once: a second time would take an export


class Counting:
    def __init__(self, strategy, drafted):
        self.strategy, self.drafted = strategy, drafted

    def draft(self, request, layer):
        self.drafted.append(layer)
        return self.strategy.draft(request, layer)


def test_without_strategies_nothing_is_traced(llama, monkeypatch):
    monkeypatch.setattr(module, "trace", None)
    tree = anatomy(llama, strategies=())
    assert found(tree.entries, "model.layers.0").names[-1] == "model.layers.2"
    assert found(tree.entries, "model.layers.0").abilities == ()


def test_what_cannot_be_traced_is_said_and_the_tree_shown():
    tree = anatomy(nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 6)), example_inputs=torch.zeros(1, 3))
    assert "got a failing trace" in tree.not_traced
    assert [entry.kind for entry in tree.entries] == ["Linear", "Linear"]


# ---- neutralize inspect ----------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(own_model().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def inspect(*arguments: object, status: int = 0):
    result = CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def test_the_command_prints_the_tree_and_what_could_be_done(folder):
    lines = inspect(folder, "--model", "checkpoints:own_model").stdout.splitlines()
    size = (folder / "model.safetensors").stat().st_size
    assert lines[0] == f"{folder}: Sequential, 0.0 M parameters, 720 B; safetensors, {format_bytes(size)} on disk"
    rows = [line.split() for line in lines]
    assert ["[0:2]", "2", "x", "Linear", "8", "->", "8", "576", "B"] in rows
    assert ["2", "Linear", "8", "->", "4", "144", "B"] in rows
    assert ["layer", "auto", "zero", "constant", "damp"] in rows
    assert ["[0:2]", "exact", "exact", "-", "rounding"] in rows


def test_for_chosen_layers_the_command_says_why_not(folder):
    told = inspect(folder, "--model", "checkpoints:own_model", "--layers", "2").stdout
    assert "2, auto: plan: expected a layer with as many outputs as inputs, got '2' from 8 to 4 features" in told
    assert "Linear" in told
    assert "[0:2]" not in told


def test_json_holds_the_same(folder):
    printed = json.loads(inspect(folder, "--model", "checkpoints:own_model", "--json").stdout)
    expected = anatomy(nz.Checkpoint(folder, factory="checkpoints:own_model").model).to_dict()
    files = {"kind": "safetensors", "files": ["model.safetensors"]}
    files["stored_bytes"] = (folder / "model.safetensors").stat().st_size
    assert printed == {**files, **json.loads(json.dumps(expected))}


def test_without_a_model_the_tensors_are_listed_and_it_is_said_why(folder):
    lines = inspect(folder).stdout.splitlines()
    assert [line.split()[0] for line in lines[3:9]] == [
        "0.bias",
        "0.weight",
        "1.bias",
        "1.weight",
        "2.bias",
        "2.weight",
    ]
    assert lines[-1].startswith("only tensors: ")
    printed = json.loads(inspect(folder, "--json").stdout)
    assert printed["tensors"][0]["name"] == "0.bias"
    assert "config.json" in printed["no_model"]
    assert inspect(folder, "--layers", "0", status=2).stdout == ""


def test_match_lists_tensors(folder):
    printed = json.loads(inspect(folder, "--match", "*.bias", "--json").stdout)
    assert [(each["name"], each["shape"], each["bytes"]) for each in printed["tensors"]] == [
        ("0.bias", [8], 32),
        ("1.bias", [8], 32),
        ("2.bias", [4], 16),
    ]
