"""GGUF: where the tensors lie, what blocks decode to after an edit, files that lie, and a real model."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import gguf
import hypothesis
import numpy as np
import pytest
import torch
from checkpoints import digests
from gguf import GGMLQuantizationType as Type
from gguf import quants
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import neutralize as nz
from neutralize.checkpoint import Checkpoint
from neutralize.checkpoint.blocks import TYPES, Blocks
from neutralize.checkpoint.gguf import read_gguf
from neutralize.checkpoint.layout import Elements
from neutralize.checkpoint.region import Files
from neutralize.checkpoint.setters import parse_setters
from neutralize.demo.subject import weights_file

ROWS, COLUMNS = 6, 512


def blocks_of(kind: Type, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """Random blocks whose scales are finite numbers."""
    random = np.random.default_rng(int(kind))
    numel, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (rows, columns // numel, nbytes), dtype=np.uint8)
    for place in TYPES[int(kind)].scales if TYPES[int(kind)].scale == "float16" else ():
        scales = random.uniform(-2, 2, raw.shape[:2]).astype(np.float16)
        raw[..., place : place + 2] = scales[..., None].view(np.uint8)
    if kind == Type.MXFP4:
        raw[..., 0] = random.integers(100, 140, raw.shape[:2])
    if kind == Type.IQ1_M:  # its scale is spread over the high four bits of four numbers: 0x3C00 is 1
        raw[..., -8:] = np.array([0, 0, 0, 0, 0, 0xC0, 0, 0x30], np.uint8)
    return raw.reshape(rows, -1)


def written(path: Path, kind: Type) -> np.ndarray:
    """A file with one quantized tensor between two plain ones; returns its values."""
    raw = blocks_of(kind)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("some.words", ["a", "bc"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_tensor("before", np.arange(7, dtype=np.float32))
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.add_tensor("after", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return quants.dequantize(raw, kind)


def values(path: Path) -> dict[str, np.ndarray]:
    """What the decoder of the gguf package makes of a file."""
    reader = gguf.GGUFReader(path)
    return {tensor.name: quants.dequantize(tensor.data, tensor.tensor_type).copy() for tensor in reader.tensors}


def edit(path: Path, setter: str) -> Checkpoint:
    checkpoint = Checkpoint(path)
    checkpoint.apply(parse_setters([setter], checkpoint.layout), digest="d")
    return checkpoint


DECODED = [kind for kind in quants._type_traits if kind != Type.BF16]


def test_every_type_that_files_have_is_known_with_its_sizes() -> None:
    plain = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64", "Q8_1"}
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items() if kind.name not in plain}
    assert {number: (known.size, known.nbytes) for number, known in TYPES.items()} == sizes
    assert {int(kind) for kind in DECODED} == TYPES.keys() - {Type.Q8_K, Type.Q1_0}


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_zeros_decode_to_zeros_and_the_rest_is_as_it_was(tmp_path: Path, kind: Type) -> None:
    path = tmp_path / "model.gguf"
    old = written(path, kind)
    before = digests(tmp_path)
    assert old.any()
    stored = read_gguf(path).tensors["w"]
    assert isinstance(stored, Blocks)
    assert stored.shape == (ROWS, COLUMNS)
    for setter, block in (("w=0", np.s_[:]), ("w[1:3]=0", np.s_[1:3]), ("w[2:,256:]=0", np.s_[2:, 256:])):
        checkpoint = edit(path, setter)
        expected = old.copy()
        expected[block] = 0
        assert np.array_equal(values(path)["w"], expected, equal_nan=True)
        assert np.array_equal(values(path)["after"], np.arange(5))
        checkpoint.restore()
        assert digests(tmp_path) == before


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("factor", [0.5, -0.3])
def test_a_factor_multiplies_the_scales(tmp_path: Path, kind: Type, factor: float) -> None:
    path = tmp_path / "model.gguf"
    old = written(path, kind)
    before = digests(tmp_path)
    if kind == Type.NVFP4 or (kind == Type.MXFP4 and factor < 0):
        with pytest.raises(nz.NeutralizeError, match=r"whose scales (have 3 bits|are powers of two)"):
            edit(path, f"w*={factor}")
        assert digests(tmp_path) == before
        return
    edit(path, f"w[1:]*={factor}")
    new = values(path)["w"]
    assert np.array_equal(new[0], old[0])
    # Rounded once per scale, to float16; types with a minimum are a difference of two such products.
    largest = np.abs(old).max(axis=1, keepdims=True)[1:]
    slack = 0 if factor == 0.5 else 2**-10 * (1 if len(TYPES[int(kind)].scales) == 1 else 64)
    assert (np.abs(new[1:] - factor * old[1:]) <= slack * largest + 1e-6).all()


@pytest.mark.parametrize("setter", ["w=1", "w=identity", "w+=1"])
def test_what_blocks_cannot_hold_is_refused(tmp_path: Path, setter: str) -> None:
    path = tmp_path / "model.gguf"
    written(path, Type.Q4_K)
    before = digests(tmp_path)
    with pytest.raises(nz.NeutralizeError, match="which Q4_K blocks, whose 256 values share a scale, cannot hold"):
        edit(path, setter)
    with pytest.raises(nz.NeutralizeError, match="cuts through blocks of 256 elements"):
        edit(path, "w[:,128:256]=0")
    with pytest.raises(nz.NeutralizeError, match="a scale past the largest float16"):
        edit(path, "w*=100000")
    assert digests(tmp_path) == before


@pytest.mark.parametrize(("kind", "nbytes", "scale"), [(Type.Q8_K, 292, np.float32), (Type.Q1_0, 18, np.float16)])
def test_types_without_a_decoder_have_their_scale_in_front(
    tmp_path: Path, kind: Type, nbytes: int, scale: type
) -> None:
    path = tmp_path / "model.gguf"
    raw = np.random.default_rng(0).integers(0, 256, (2, 2, nbytes), dtype=np.uint8)
    width = np.dtype(scale).itemsize
    raw[..., :width] = np.full((2, 2, 1), 3, scale).view(np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", raw.reshape(2, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    edit(path, "w*=0.5")
    new = np.array(gguf.GGUFReader(path).tensors[0].data).reshape(2, 2, nbytes)
    assert (new[..., :width].copy().view(scale) == 1.5).all()
    assert np.array_equal(new[..., width:], raw[..., width:])
    edit(path, "w=0")
    assert not gguf.GGUFReader(path).tensors[0].data.any()


def test_plain_tensors_are_found_where_the_package_finds_them(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    written(path, Type.Q8_0)
    layout = read_gguf(path)
    reader = gguf.GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == list(layout.tensors)
    with Files(layout.root) as files:
        for tensor in reader.tensors:
            stored = layout.tensors[tensor.name]
            assert stored.regions[0].offset == tensor.data_offset
            assert stored.regions[0].nbytes == tensor.n_bytes
            if isinstance(stored, Elements):
                assert np.array_equal(stored.read(files).numpy(), tensor.data)


# ---- files that lie --------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def file(tensors: bytes = b"", count: int = 0, keys: bytes = b"", key_count: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, key_count) + keys + tensors + bytes(64)


def tensor(name: str = "w", sizes: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


HOSTILE = {
    "empty": b"",
    "another magic": b"GGML" + bytes(100),
    "version 1": file(version=1),
    "version 99": file(version=99),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64),
    "2^64-1 tensors": file(count=2**64 - 1),
    "2^40 keys": file(key_count=2**40),
    "more tensors than there are": file(tensor(), 2),
    "a name of 2^63 bytes": file(struct.pack("<Q", 2**63), 1),
    "a name that is no UTF-8": file(struct.pack("<Q", 2) + b"\xff\xff" + bytes(60), 1),
    "a value of an unknown type": file(keys=text("a") + struct.pack("<I", 77), key_count=1),
    "an array of 2^60": file(keys=text("a") + struct.pack("<IIQ", 9, 4, 2**60), key_count=1),
    "an array of 2^60 texts": file(keys=text("a") + struct.pack("<IIQ", 9, 8, 2**60), key_count=1),
    "arrays in arrays": file(keys=text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 1000, key_count=1),
    "a key twice": file(keys=(text("a") + struct.pack("<IB", 0, 1)) * 2, key_count=2),
    "an alignment of 0": file(keys=text("general.alignment") + struct.pack("<II", 4, 0), key_count=1),
    "an alignment of 3": file(keys=text("general.alignment") + struct.pack("<II", 4, 3), key_count=1),
    "an alignment that is a text": file(keys=text("general.alignment") + struct.pack("<I", 8) + text("x"), key_count=1),
    "an alignment of 2^31": file(tensor(), 1, text("general.alignment") + struct.pack("<II", 4, 2**31), 1),
    "9 dimensions": file(tensor(sizes=(1,) * 9), 1),
    "2^31 dimensions": file(text("w") + struct.pack("<I", 2**31) + bytes(64), 1),
    "sizes whose product overflows": file(tensor(sizes=(2**62, 2**62)), 1),
    "an unknown type": file(tensor(kind=999), 1),
    "a removed type": file(tensor(kind=4), 1),
    "a row that is no whole number of blocks": file(tensor(sizes=(33,), kind=2), 1),
    "no row at all": file(tensor(sizes=(), kind=2), 1),
    "a tensor past the end": file(tensor(sizes=(1000,)), 1),
    "an offset past the end": file(tensor(offset=2**40), 1),
    "an offset of 2^64-32": file(tensor(offset=2**64 - 32), 1),
    "an offset that is not aligned": file(tensor(offset=1), 1),
    "tensors that overlap": file(tensor("a", (12,)) + tensor("b", (4,), offset=32), 2),
    "a tensor twice": file(tensor() + tensor(offset=32), 2),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_lies_gets_one_clear_message(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[kind])
    before = digests(tmp_path)
    with pytest.raises(nz.NeutralizeError, match=r"^checkpoint: expected .*, got .*; ") as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)
    assert digests(tmp_path) == before


@hypothesis.settings(
    deadline=None,
    max_examples=int(os.environ.get("NEUTRALIZE_FUZZ", "200")),
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(data=st.data())
def test_any_change_of_a_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    written(path, Type.Q4_0)
    content = bytearray(path.read_bytes())
    reach = read_gguf(path).tensors["before"].regions[0].offset
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(4, reach - 1))
        new = data.draw(st.binary(min_size=1, max_size=8))
        content[place : place + len(new)] = new
    path.write_bytes(content)
    try:
        layout = read_gguf(path)
    except nz.NeutralizeError:
        return
    for stored in layout.tensors.values():
        assert all(0 <= region.offset <= region.end <= len(content) for region in stored.regions)


# ---- a real model ----------------------------------------------------------------------------------------------------


def test_blocks_of_a_trained_model_are_off_exactly_in_its_file(tmp_path: Path) -> None:
    source = weights_file()
    shutil.copyfile(source, tmp_path / source.name)
    path = tmp_path / source.name
    intact = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=path.name, dtype=torch.float32).eval()
    tokens = torch.arange(100, 124)[None]
    with nz.excised(intact, "model.layers[4]"), torch.no_grad():
        mlp = intact.get_submodule("model.layers.9.mlp")
        handle = mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        wanted = intact(tokens).logits
        handle.remove()
    plan = nz.plan(path, "model.layers[4]")
    undo = plan.apply(path)
    assert plan.certificate.kind == "exact"
    assert undo.held_bytes == 2 * 576 * 4  # two norm gains in float32: nothing quantized is touched
    second = nz.plan(path, "model.layers[9].mlp", "zero").apply(path)
    edited = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(edited(tokens).logits, wanted)
    second.restore()
    undo.restore()
    assert path.read_bytes() == source.read_bytes()
