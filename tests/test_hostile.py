"""Inputs that anybody may have made: each is carried out and undone, or refused in one line; nothing else changes."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import resource
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import hypothesis
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import digests, header_of, save
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import neutralize as nz
from neutralize import cli
from neutralize.checkpoint import Checkpoint
from neutralize.checkpoint.setters import parse_setters
from neutralize.cli.checkpoint import apply, restore
from neutralize.cli.voice import refusals

CASES = int(os.environ.get("NEUTRALIZE_FUZZ", "500"))
SECONDS_EACH = 20
MEMORY_KIB = 512 << 10

SIZES = [0, -1, 1, 7, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**40]
ANYTHING = [*SIZES, None, True, 1.5, float("nan"), "", "..", "/etc/passwd", "../m.safetensors", "\ud800", "a\0b"]
ANYTHING += [[], {}, [[]], [-1, 4], [1 << 62, 1 << 62], {"a": {}}, "U8", "F32", "BF16", [None], "x" * 5000]


def of_safetensors(folder: Path) -> list[Path]:
    save(folder, shards=2)
    return sorted(folder.iterdir())


def of_gguf(folder: Path) -> list[Path]:
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_array("tokens", ["a", "b"])
    writer.add_array("scores", [0.5, 0.25])
    for name in ("a.weight", "b.weight"):
        writer.add_tensor(name, np.ones((4, 32), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return [folder / "m.gguf"]


def of_torch(folder: Path) -> list[Path]:
    folder.mkdir()
    torch.save({"a.weight": torch.ones(4, 8), "b.weight": torch.ones(8), "n": {"n": 3}}, folder / "m.pt")
    return [folder / "m.pt"]


def of_distributed(folder: Path) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"a.weight": torch.ones(4, 8), "b.weight": torch.ones(8)}, checkpoint_id=folder, no_dist=True)
    return [folder / ".metadata", folder / "__0_0.distcp"]


KINDS: dict[str, Callable[[Path], list[Path]]] = {
    "safetensors": of_safetensors,
    "gguf": of_gguf,
    "torch": of_torch,
    "distributed": of_distributed,
}


def changed_value(value: Any, chance: random.Random) -> Any:
    """JSON in which one thing somewhere is another."""
    if isinstance(value, dict | list) and value and chance.random() < 0.85:
        made = copy.copy(value)
        key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
        made[key] = changed_value(value[key], chance)
        if isinstance(made, dict) and chance.random() < 0.2:
            made[chance.choice(["", "__metadata__", "x"])] = made.pop(key)
        return made
    return chance.choice(ANYTHING)


def changed(path: Path, chance: random.Random) -> bytes:
    """A file in which something is not as it should be: a value of its JSON, or bytes of its head or its end."""
    content = path.read_bytes()
    if path.suffix == ".json" and chance.random() < 0.8:
        return json.dumps(changed_value(json.loads(content), chance)).encode()
    if path.suffix == ".safetensors" and chance.random() < 0.6:
        head = header_of(path)
        header = json.dumps(changed_value(json.loads(head[8:]), chance)).encode()
        return struct.pack("<Q", len(header)) + header + content[len(head) :]
    made = bytearray(content)
    reach = min(len(made), 2048)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(reach) if chance.random() < 0.7 else len(made) - 1 - chance.randrange(reach)
        place = max(place, 0)
        how = chance.randrange(5)
        if how == 0:
            made[place : place + 8] = struct.pack("<Q", chance.choice(SIZES) % (1 << 64))
        elif how == 1:
            made[place : place + 4] = struct.pack("<I", chance.choice(SIZES) % (1 << 32))
        elif how == 2:
            del made[place:]
        elif how == 3:
            made[place:place] = chance.randbytes(chance.randint(1, 9))
        else:
            made[place : place + 1] = chance.randbytes(1)
    return bytes(made)


def ended(command: Callable[..., None], *arguments: Any, **options: Any) -> tuple[int, str]:
    """Status and standard error of a command, without the time that reading a command line takes."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            with refusals(debug=False):
                command(*arguments, **options)
        except SystemExit as end:
            return int(str(end.code)), told.getvalue()
    return 0, told.getvalue()


def test_hostile_inputs_change_nothing(tmp_path: Path) -> None:
    """NEUTRALIZE_FUZZ=100000 makes it a long one."""
    files = {kind: make(tmp_path / kind) for kind, make in KINDS.items()}
    valid = {path: path.read_bytes() for paths in files.values() for path in paths}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    statuses = {kind: [0, 0] for kind in KINDS}
    for case in range(CASES):
        chance = random.Random(case)
        kind = list(KINDS)[case % len(KINDS)]
        path = chance.choice(files[kind])
        path.write_bytes(changed(path, chance))
        before = digests(tmp_path)
        folder, begun = tmp_path / kind, time.monotonic()
        status, told = ended(apply, folder, set_=["[ab].weight*=0.5"], in_place=True, json=True)
        statuses[kind][status // 2] += 1
        if status == 0:
            assert ended(restore, folder) == (0, ""), case
        else:
            assert status == 2
            (line,) = told.splitlines()
            assert line.startswith(("checkpoint: ", "set: ")), (case, line)
            assert len(line) < 4000, case
        assert digests(tmp_path) == before, case
        assert time.monotonic() - begun < SECONDS_EACH, case
        path.write_bytes(valid[path])
    assert all(min(counts) > 0 for counts in statuses.values()), statuses
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEMORY_KIB


# ---- configs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")
    content["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


KEYS = [
    *LlamaConfig().to_dict(),
    *("auto_map", "quantization_config", "architectures", "model_type", "attn_implementation", "_attn_implementation"),
    *("rope_parameters", "rope_scaling", "torch_dtype", "text_config", "sub_configs", "trust_remote_code"),
]
VALUES = [*ANYTHING, "gpt2", "bert", ["BertModel"], ["../x"], {"rope_type": "yarn"}, {"quant_method": "gptq"}, "silu"]


@hypothesis.settings(max_examples=max(CASES // 16, 30), deadline=None, derandomize=True)
@hypothesis.given(
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES) | st.just(...), min_size=1, max_size=3)
)
def test_a_malformed_config_gives_a_model_or_one_line(llama: Path, changes: dict[str, Any]) -> None:
    content = (llama / "config.json").read_bytes()
    made = json.loads(content) | changes
    made = {key: value for key, value in made.items() if value is not ...}
    (llama / "config.json").write_text(json.dumps(made))
    before = digests(llama)
    problem = ""
    try:
        assert len(list(Checkpoint(llama).model.parameters())) > 0
    except nz.NeutralizeError as error:
        problem = str(error)
    finally:
        assert digests(llama) == before
        (llama / "config.json").write_bytes(content)
    assert "\n" not in problem
    assert not problem or problem.startswith("checkpoint: expected ")
    assert not (llama / "ran").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"model_type": "llama"', "\ufeff{}", "[" * 100_000, '{"a": NaN, "a": 1}', "\0"]
)
def test_a_config_that_is_none_is_refused_by_the_command(llama: Path, text: str) -> None:
    content = (llama / "config.json").read_bytes()
    (llama / "config.json").write_text(text)
    before = digests(llama)
    try:
        result = CliRunner().invoke(cli.app, ["apply", str(llama), "--layers", "model.layers[1]", "--in-place"])
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.stderr
        assert result.stderr.startswith("checkpoint: expected ")
        assert digests(llama) == before
    finally:
        (llama / "config.json").write_bytes(content)


# ---- setters ---------------------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=CASES, deadline=None)
@hypothesis.given(
    st.text("ab.*?[]!=+-:,0123456789 eidntyW\n\u0663", max_size=24)
    | st.builds(
        lambda name, part, operator, value: f"{name}{part}{operator}{value}",
        st.sampled_from(["a.weight", "a.*", "conv.weight", "steps", "fp8.weight", "norm.weight", "none", "[a]*"]),
        st.sampled_from(["", "[0]", "[-1]", "[1:3]", "[::2]", "[:,0:4]", "[9999]", "[3:1]", "[]", "[0,0,0]", "[a]"]),
        st.sampled_from(["=", "*=", "+=", " *= ", "**=", "==", "-="]),
        st.sampled_from(["0", "-0", "1e3", "1e400", "nan", "inf", "identity", "0x1", "1_0", "", "zero", "٣"]),
    )
)
def test_any_setter_is_carried_out_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "set"
    if not folder.exists():
        save(folder)
    checkpoint = Checkpoint(folder)
    try:
        patches = checkpoint.patches(parse_setters([text], checkpoint.layout))
    except nz.NeutralizeError as error:
        problem = str(error)
    else:
        end = (folder / "model.safetensors").stat().st_size
        head = len(header_of(folder / "model.safetensors"))
        assert patches
        assert all(head <= region.offset < region.end <= end for patch in patches for region in patch.regions)
        return
    assert problem.startswith(("set: expected ", "checkpoint: expected ", "checkpoint: \n  - expected "))
