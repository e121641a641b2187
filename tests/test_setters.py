"""Edits written as text: what they name, what they write, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import save, tensors
from safetensors.torch import load_file, save_file

from neutralize.checkpoint import Checkpoint
from neutralize.checkpoint.setters import parse_setters
from neutralize.errors import NeutralizeError


def after(folder: Path, *setters: str) -> dict[str, torch.Tensor]:
    save(folder)
    checkpoint = Checkpoint(folder)
    checkpoint.apply(parse_setters(setters, checkpoint.layout), digest="d")
    return load_file(folder / "model.safetensors")


CASES = {
    "a.weight=0": ("a.weight", lambda w: torch.zeros_like(w)),
    "a.weight = 1.5": ("a.weight", lambda w: torch.full_like(w, 1.5)),
    "b.weight*=0.5": ("b.weight", lambda w: w * 0.5),
    "b.weight*=-2": ("b.weight", lambda w: w * -2),
    "norm.weight+=1": ("norm.weight", lambda w: w + 1),
    "a.weight=identity": ("a.weight", lambda w: torch.eye(48, 64)),
    "b.weight=identity": ("b.weight", lambda w: torch.eye(64, 300).bfloat16()),
    "conv.weight=identity": ("conv.weight", lambda w: torch.nn.init.dirac_(w.clone())),
    "a.weight[3]=0": ("a.weight", lambda w: w.index_fill(0, torch.tensor([3]), 0)),
    "a.weight[-1]=0": ("a.weight", lambda w: w.index_fill(0, torch.tensor([47]), 0)),
    "a.weight[2:5, 10:]=0": ("a.weight", lambda w: torch.where(_inside(w, 2, 5, 10, 64), 0.0, w)),
    "a.weight[:, :7]*=0.25": ("a.weight", lambda w: torch.where(_inside(w, 0, 48, 0, 7), w * 0.25, w)),
    "a.weight[8:16,8:16]=identity": ("a.weight", lambda w: _eye_block(w)),
    "conv.weight[1:3,2]=0": ("conv.weight", lambda w: _conv_block(w)),
    "a.weight=-0.0": ("a.weight", lambda w: torch.full_like(w, -0.0)),
}


def _inside(w: torch.Tensor, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
    rows, columns = torch.arange(w.shape[0])[:, None], torch.arange(w.shape[1])
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def _eye_block(w: torch.Tensor) -> torch.Tensor:
    w = w.clone()
    w[8:16, 8:16] = torch.eye(8)
    return w


def _conv_block(w: torch.Tensor) -> torch.Tensor:
    w = w.clone()
    w[1:3, 2] = 0
    return w


@pytest.mark.parametrize("setter", CASES)
def test_a_setter_writes_its_tensor_and_nothing_else(tmp_path: Path, setter: str) -> None:
    name, wanted = CASES[setter]
    expected = tensors() | {name: wanted(tensors()[name])}
    found = after(tmp_path, setter)
    for key, value in expected.items():
        assert torch.equal(found[key].view(torch.uint8), value.contiguous().view(torch.uint8)), key


def test_a_glob_stands_for_every_name_that_fits(tmp_path: Path) -> None:
    found = after(tmp_path, "?.bias=2", "*orm* =3", "conv.*=0")
    assert not found["conv.weight"].any()
    assert all((found[name] == 2).all() for name in ("a.bias", "b.bias"))
    assert (found["norm.weight"] == 3).all()


def test_a_glob_takes_a_quantized_weight_and_not_its_parts_too(tmp_path: Path) -> None:
    weight, scale = torch.randn(8, 16).to(torch.float8_e4m3fn), torch.tensor([0.5])
    held = {"l.weight": weight, "l.weight_scale": scale, "l.bias": torch.ones(8)}
    save_file(held, tmp_path / "model.safetensors")
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": group}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    checkpoint = Checkpoint(tmp_path)
    edits = parse_setters(["l.**=0.5"], checkpoint.layout)
    assert {edit.parameter for edit in edits} == {"l.weight", "l.bias"}
    checkpoint.apply(edits, digest="d")
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["l.weight"].float() * found["l.weight_scale"], weight.float() * 0.25)
    assert torch.equal(found["l.bias"], torch.full((8,), 0.5))
    (edit,) = parse_setters(["l.weight_scale=0"], checkpoint.layout)
    assert edit.parameter == "l.weight_scale"


def test_setters_work_one_after_the_other(tmp_path: Path) -> None:
    assert (after(tmp_path, "a.bias=2", "a.bias*=3", "a.bias+=0.5")["a.bias"] == 6.5).all()


@pytest.mark.parametrize(
    ("setter", "match"),
    [
        ("a.weight", "expected NAME=VALUE"),
        ("=0", "expected NAME=VALUE"),
        ("a.weight=", "expected NAME=VALUE"),
        ("a.weigth=0", "near matches: a.weight"),
        ("zzz*=0", "which none has"),
        ("a.weight=half", "a finite number or identity"),
        ("a.weight=nan", "a finite number or identity"),
        ("a.weight=1e999", "a finite number or identity"),
        ("a.weight*=identity", "a finite number or identity"),
        ("a.bias=identity", "expected a matrix or a convolution"),
        ("a.weight[48]=0", "expected a range inside 0:48"),
        ("a.weight[5:5]=0", "expected a range inside 0:48"),
        ("a.weight[0:4:2]=0", "without a step"),
        ("a.weight[0,0,0]=0", "expected up to 2 ranges"),
        ("conv.weight[:,1]=identity", "expected all columns of a convolution"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, setter: str, match: str) -> None:
    save(tmp_path)
    with pytest.raises(NeutralizeError, match=match):
        parse_setters([setter], Checkpoint(tmp_path).layout)
