"""GGUF files: located by a bounded reader, their blocks edited, against the dequantizers of the gguf package."""

import contextlib
import struct
from pathlib import Path

import gguf
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import neutralize as nz
from neutralize.checkpoint import Checkpoint
from neutralize.checkpoint.blocks import TYPES, Blocks
from neutralize.checkpoint.gguf import read_gguf, read_header
from neutralize.checkpoint.layout import Elements
from neutralize.checkpoint.region import BUFFER_BYTES, Files, Region
from neutralize.plan import Assign, Copy, Fold, Rewrite

ROWS, BLOCKS = 6, 4


def q8_k(data: np.ndarray) -> np.ndarray:
    """Source: block_q8_K of ggml: a float32 d, 256 int8 codes, 16 sums of 16 codes."""
    blocks = data.reshape(-1, 292)
    d = blocks[:, :4].copy().view(np.float32)
    return (d * blocks[:, 4:260].view(np.int8)).reshape(*data.shape[:-1], -1)


def q1_0(data: np.ndarray) -> np.ndarray:
    """Source: block_q1_0 of ggml: a float16 d, 128 bits, each d or -d."""
    blocks = data.reshape(-1, 18)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32)
    return (d * (2 * bits - 1)).reshape(*data.shape[:-1], -1)


def decoded(kind: int, data: np.ndarray) -> np.ndarray:
    own = {"Q8_K": q8_k, "Q1_0": q1_0}.get(TYPES[kind].name)
    return own(data) if own else gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind))


def random_blocks(kind: int, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random codes, with scales of a usual magnitude: (rows, bytes), uint8."""
    block, random = TYPES[kind], np.random.default_rng(seed)
    data = random.integers(0, 256, (rows * blocks, block.nbytes), dtype=np.uint8)
    for offset in block.scales:
        if block.scale in ("float16", "float32"):
            scales = random.uniform(0.01, 0.1, (len(data), 1)).astype(block.scale).view(np.uint8)
            data[:, offset : offset + scales.shape[1]] = scales
        elif block.scale == "nibbles":
            bits = random.uniform(0.01, 0.1, len(data)).astype(np.float16).view(np.uint16)
            words = data[:, offset : offset + 8].copy().view(np.uint16) & 0xFFF
            words |= np.stack([(bits >> 4 * place & 0xF) << 12 for place in range(4)], 1)
            data[:, offset : offset + 8] = words.view(np.uint8)
        else:
            data[:, offset] = random.integers(100, 120, len(data)) if block.scale == "e8m0" else 0x30
    return data.reshape(rows, -1)


def write(path: Path, tensors: dict[str, np.ndarray | tuple[int, np.ndarray]], **metadata: object) -> None:
    """A file of plain arrays, and of (type, bytes)."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("list", [1, 2, 3])
    writer.add_bool("truth", True)
    writer.add_float64("double", 0.25)
    writer.add_int64("whole", -(1 << 40))
    for key, value in metadata.items():
        writer.add_string(key, str(value))
    for name, held in tensors.items():
        if isinstance(held, tuple):
            writer.add_tensor(name, held[1], raw_dtype=gguf.GGMLQuantizationType(held[0]))
        else:
            writer.add_tensor(name, held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def edit(path: Path, *edits: object) -> None:
    layout = read_gguf(path)
    with Files(path.parent, writable=True) as files:
        for patch in layout.patches(edits, files):
            for _ in patch.run(files):
                pass


def contents(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


# ---- the table and what is read --------------------------------------------------------------------------------------


def test_the_table_of_types_is_that_of_the_package():
    plain = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}
    sizes = {
        kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind])
        for kind in gguf.GGMLQuantizationType
        if kind.name not in plain | {"Q8_1"}
    }
    assert sizes.items() <= {kind: (block.name, block.size, block.nbytes) for kind, block in TYPES.items()}.items()


def test_metadata_and_tensors_are_those_of_the_package(tmp_path):
    path = tmp_path / "m.gguf"
    random = np.random.default_rng(0)
    tensors = {"f32": random.normal(size=(3, 5)).astype(np.float32), "f16": np.ones((2, 3, 4), np.float16)}
    tensors |= {"f64": np.ones(7), "i32": np.arange(9, dtype=np.int32)}
    tensors |= {TYPES[kind].name: (kind, random_blocks(kind, ROWS, BLOCKS)) for kind in TYPES if kind != 41}
    tensors["bf16"] = (30, random.integers(0, 256, (4, 6), dtype=np.uint8))
    write(path, tensors, name="käse")
    header, reader = read_header(path), gguf.GGUFReader(path)
    own = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert dict(header.metadata) == own
    assert (header.version, header.architecture) == (3, "llama")
    for tensor in reader.tensors:
        stored = header.tensors[tensor.name]
        assert stored.shape == tuple(tensor.shape.tolist()[::-1])
        assert stored.regions == (Region.run("m.gguf", tensor.data_offset, tensor.n_bytes),)
        plain = {"F32": "float32", "F16": "float16", "F64": "float64", "I32": "int32", "BF16": "bfloat16"}
        kind = tensor.tensor_type.name
        assert stored.encoding == plain.get(kind, kind)
        assert isinstance(stored, Elements if kind in plain else Blocks)
    assert read_gguf(path).marks == {"m.gguf": (0, b"NTRL")}


def test_an_edit_in_place_marks_the_file_and_is_undone(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, {"w": (12, random_blocks(12, ROWS, BLOCKS)), "b": np.ones(4, np.float32)})
    before = path.read_bytes()
    checkpoint = Checkpoint(path)
    undo = checkpoint.apply([Rewrite("w", (ROWS, 1024), "float32"), Rewrite("b", (4,), "float32", scale=0.5)])
    assert path.read_bytes()[:4] == b"GGUF"
    assert not decoded(12, contents(path)["w"]).any()
    assert contents(path)["b"].tolist() == [0.5] * 4
    undo.restore()
    assert path.read_bytes() == before
    path.write_bytes(b"NTRL" + before[4:])
    with pytest.raises(
        nz.NeutralizeError, match=r"checkpoint: expected a finished file, got .*; run: neutralize restor"
    ):
        read_gguf(path)
    with pytest.raises(ValueError, match="magic"):
        gguf.GGUFReader(path)


# ---- blocks ----------------------------------------------------------------------------------------------------------

PARTS = {
    "all": (None, None, np.s_[:, :]),
    "rows": ((1, 4), None, np.s_[1:4, :]),
    "columns": (None, (1, 3), np.s_[:, 1:3]),
    "both": ((2, 5), (0, 1), np.s_[2:5, 0:1]),
    "a row": ((2, 3), (3, 4), np.s_[2:3, 3:4]),
}


@pytest.fixture(params=TYPES, ids=[block.name for block in TYPES.values()])
def kind(request) -> int:
    return request.param


@pytest.fixture
def quantized(tmp_path, kind) -> Path:
    """A file with a tensor of each kind between two others."""
    path = tmp_path / "m.gguf"
    around = {name: np.full(37, 7.0, np.float32) for name in ("before", "after")}
    # The writer knows no shapes for types without a dequantizer: the header is written by hand.
    data = random_blocks(kind, ROWS, BLOCKS)
    path.write_bytes(
        file_of(
            tensor_info("before", (37,), 0, 0),
            tensor_info("w", (BLOCKS * TYPES[kind].size, ROWS), kind, 160),
            tensor_info("after", (37,), 0, 160 + (-(-data.nbytes // 32) * 32)),
            data=around["before"].tobytes().ljust(160, b"\1")
            + data.tobytes().ljust(-(-data.nbytes // 32) * 32, b"\2")
            + around["after"].tobytes(),
        )
    )
    return path


def stored_bytes(path: Path, kind: int) -> np.ndarray:
    region = read_gguf(path).tensors["w"].regions[0]
    return np.frombuffer(path.read_bytes()[region.offset : region.end], np.uint8).reshape(ROWS, -1)


def a_rewrite(kind: int, part: str, **coefficients: float) -> Rewrite:
    size = TYPES[kind].size
    rows, columns, _ = PARTS[part]
    columns = columns and (columns[0] * size, columns[1] * size)
    return Rewrite("w", (ROWS, BLOCKS * size), "float32", rows=rows, columns=columns, **coefficients)


@pytest.mark.parametrize("part", PARTS)
def test_zero_bytes_decode_to_zeros_and_nothing_else_changes(quantized, kind, part):
    before, whole = stored_bytes(quantized, kind), quantized.read_bytes()
    edit(quantized, a_rewrite(kind, part))
    wanted = before.reshape(ROWS, BLOCKS, -1).copy()
    wanted[PARTS[part][2]] = 0
    after = stored_bytes(quantized, kind)
    assert np.array_equal(after, wanted.reshape(ROWS, -1))
    values = decoded(kind, after).reshape(ROWS, BLOCKS, -1)
    assert not values[PARTS[part][2]].any()
    region = read_gguf(quantized).tensors["w"].regions[0]
    assert quantized.read_bytes()[: region.offset] == whole[: region.offset]
    assert quantized.read_bytes()[region.end :] == whole[region.end :]


@pytest.mark.parametrize("kind", TYPES)
def test_reading_is_what_the_dequantizer_makes_of_the_blocks_bit_for_bit(quantized, kind):
    stored = read_gguf(quantized).tensors["w"]
    with Files(quantized.parent) as files:
        if TYPES[kind].name in ("Q8_K", "Q1_0"):  # which the package has no dequantizer for
            with pytest.raises(
                nz.NeutralizeError, match=f"a type that the package gguf decodes, got {stored.encoding}"
            ):
                stored.read(files)
            return
        wanted = decoded(kind, stored_bytes(quantized, kind))
        assert stored.read(files).numpy().tobytes() == wanted.tobytes()
        assert stored.read(files, (2, 5)).numpy().tobytes() == wanted[2:5].tobytes()


def test_elements_of_a_quantized_vector_are_read(tmp_path):
    data = random_blocks(2, 1, 4).reshape(-1)
    write(tmp_path / "m.gguf", {"v": (2, data)})
    stored = read_gguf(tmp_path / "m.gguf").tensors["v"]
    with Files(tmp_path) as files:
        assert np.array_equal(stored.read(files, (30, 70)).numpy(), decoded(2, data)[30:70])


@pytest.mark.parametrize("kind", [kind for kind, block in TYPES.items() if block.scale != "e4m3"], indirect=True)
@pytest.mark.parametrize("part", ["all", "both"])
def test_a_factor_multiplies_the_scales(quantized, kind, part):
    block = TYPES[kind]
    before, whole = stored_bytes(quantized, kind), quantized.read_bytes()
    place = PARTS[part][2]
    for factor in (0.5, 4.0) if block.scale == "e8m0" else (0.5, -2.0, 0.7):
        quantized.write_bytes(whole)
        edit(quantized, a_rewrite(kind, part, scale=factor))
        after = stored_bytes(quantized, kind)
        old, new = (decoded(kind, data).reshape(ROWS, BLOCKS, -1).astype(np.float64) for data in (before, after))
        wanted = old.copy()
        wanted[place] *= factor
        if factor == 0.7:  # each of two terms is off by half a unit in the last place of a float16
            largest = np.abs(random_terms(kind, before)).reshape(ROWS, BLOCKS, -1)
            assert (np.abs(new - wanted) <= 2.0**-11 * 0.71 * largest + 1e-7).all()
        else:
            assert np.array_equal(new, wanted)
        untouched = np.ones((ROWS, BLOCKS), bool)
        untouched[place] = False
        rows = [data.reshape(ROWS, BLOCKS, -1)[untouched] for data in (before, after)]
        assert np.array_equal(*rows)


def random_terms(kind: int, data: np.ndarray) -> np.ndarray:
    """For each value the sum of the magnitudes of the terms that the scales give."""
    block, total = TYPES[kind], 0.0
    for offset in block.scales:
        alone = data.reshape(-1, block.nbytes).copy()
        for other in block.scales:
            if other != offset:
                alone[:, other : other + 2] = 0
        total = total + np.abs(decoded(kind, alone.reshape(data.shape)).astype(np.float64))
    return total


def test_a_factor_is_computed_in_single_precision_and_rounded_once(tmp_path):
    path = tmp_path / "m.gguf"
    data = random_blocks(12, ROWS, BLOCKS)
    write(path, {"w": (12, data)})
    edit(path, Rewrite("w", (ROWS, 1024), "float32", scale=0.7))
    scales = data.reshape(-1, 144)[:, :4].copy().view(np.float16)
    wanted = (scales.astype(np.float32) * np.float32(0.7)).astype(np.float16)
    assert np.array_equal(contents(path)["w"].reshape(-1, 144)[:, :4].copy().view(np.float16), wanted)


def test_large_tensors_go_through_a_bounded_buffer(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    data = random_blocks(8, 64, 4)
    write(path, {"w": (8, data)})
    for module in ("blocks", "patch"):
        monkeypatch.setattr(f"neutralize.checkpoint.{module}.BUFFER_BYTES", 100)
    chunks = Region.chunks
    monkeypatch.setattr(Region, "chunks", lambda self, limit=BUFFER_BYTES: chunks(self, min(limit, 100)))
    largest = []
    read = Files.read
    monkeypatch.setattr(Files, "read", lambda self, region: largest.append(region.nbytes) or read(self, region))
    edit(path, Rewrite("w", (64, 128), "float32", scale=0.5, columns=(32, 128)))
    assert max(largest) <= 100
    wanted = decoded(8, data)
    wanted[:, 32:] *= 0.5
    assert np.array_equal(decoded(8, contents(path)["w"]), wanted)


def test_experts_and_vectors_are_cut_at_blocks(tmp_path):
    path = tmp_path / "m.gguf"
    experts, vector = random_blocks(8, 2 * 3, 2), random_blocks(8, 1, 4)
    write(path, {"experts": (8, experts.reshape(2, 3, -1)), "vector": (8, vector.reshape(-1))})
    edit(
        path,
        Rewrite("experts", (2, 3, 64), "float32", rows=(1, 2), columns=(64, 160)),
        Rewrite("vector", (128,), "float32", rows=(32, 96)),
    )
    wanted = decoded(8, experts).reshape(2, 192)
    wanted[1, 64:160] = 0
    assert np.array_equal(decoded(8, contents(path)["experts"]).reshape(2, 192), wanted)
    wanted = decoded(8, vector).reshape(-1)
    wanted[32:96] = 0
    assert np.array_equal(decoded(8, contents(path)["vector"]).reshape(-1), wanted)


W = {"parameter": "w", "shape": (ROWS, 1024), "dtype": "float32"}
HOLDS = (
    r"checkpoint: expected zeros or a multiple for '.*', got {}; choose another strategy, or take a file in F16 or F32"
)
SHARES = "which Q4_K blocks, whose 256 values share a scale, cannot hold"
REFUSED = {
    "identity": (Rewrite(**W, diagonal=1.0), HOLDS.format(f"an identity, {SHARES}")),
    "constant": (Rewrite(**W, fill=0.5), HOLDS.format(f"a constant, {SHARES}")),
    "assign": (Assign(**W, values=(0.0,) * ROWS * 1024), HOLDS.format(f"single values, {SHARES}")),
    "copy": (Copy(**W, source="w"), HOLDS.format(f"a copy, {SHARES}")),
    "fold": (Fold(**W, bias="b", scale=1.0, shift=1.0), HOLDS.format(f"a fold, {SHARES}")),
    "overflow": (Rewrite(**W, scale=1e7), HOLDS.format("a scale past the largest float16")),
    "columns": (
        Rewrite(**W, columns=(0, 128)),
        r"expected a part of 'w' that begins and ends with a block for '.*', got one that cuts through blocks of 256 "
        r"elements \(Q4_K\); choose a range of whole blocks, or take a file in F16 or F32",
    ),
    "shape": (Rewrite("w", (ROWS, 512), "float32"), r"expected shape \[6, 512\] for 'w', got \[6, 1024\]; plan for"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_block_cannot_hold_is_refused(tmp_path, case):
    path = tmp_path / "m.gguf"
    write(path, {"w": (12, random_blocks(12, ROWS, BLOCKS)), "b": np.ones(ROWS, np.float32)})
    before = path.read_bytes()
    change, message = REFUSED[case]
    with pytest.raises(nz.NeutralizeError, match=message):
        Checkpoint(path).apply([change])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "scale", "got"),
    [
        (39, 0.7, "0.7 for MXFP4, whose scales are powers of two"),
        (39, -0.5, "-0.5 for MXFP4, whose scales are powers of two"),
        (39, 2.0**150, "a scale past the largest e8m0"),
        (40, 0.5, "a factor for NVFP4, whose scales have 3 bits after the first"),
    ],
)
def test_factors_that_scales_cannot_take_are_refused(tmp_path, kind, scale, got):
    path = tmp_path / "m.gguf"
    write(path, {"w": (kind, random_blocks(kind, ROWS, BLOCKS))})
    with pytest.raises(nz.NeutralizeError, match=HOLDS.format(got)):
        edit(path, Rewrite("w", (ROWS, BLOCKS * TYPES[kind].size), "float32", scale=scale))


# ---- files that lie --------------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def tensor_info(name: str | bytes, ne: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def file_of(
    *infos: bytes,
    keys: tuple[bytes, ...] = (),
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensors, entries = counts or (len(infos), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(keys) + b"".join(infos)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


F = tensor_info("w", (8,), 0, 0)
HUGE = 1 << 62
BAD = {
    "empty": (b"", "4 bytes for the magic"),
    "magic": (b"GGML" + bytes(64), "'GGUF' as its first bytes"),
    "version 1": (file_of(version=1), "GGUF version 2 or 3"),
    "version 4": (file_of(version=4), "GGUF version 2 or 3"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "expected little endian"),
    "no counts": (file_of()[:12], "8 bytes for the number of tensors"),
    "tensors": (file_of(F, counts=(HUGE, 0)), f"got {HUGE} tensors"),
    "keys": (file_of(F, counts=(1, HUGE)), f"got {HUGE} keys"),
    "cut off": (file_of(F, data=bytes(31)), "expected 95 bytes in .*up to byte 96|up to byte"),
    "key too long": (file_of(keys=(struct.pack("<Q", HUGE),), data=bytes(64)), "65535 at most"),
    "name too long": (file_of(struct.pack("<Q", HUGE) + bytes(64)), "1024 at most"),
    "key twice": (file_of(keys=(key("a", 0, b"\1"),) * 2, data=bytes(32)), "the key 'a' twice"),
    "key not text": (file_of(keys=(key(b"\xff", 0, b"\1"),), data=bytes(32)), "no UTF-8"),
    "value type": (file_of(keys=(key("a", 13, b"\1"),), data=bytes(32)), "a value of type 13"),
    "truth": (file_of(keys=(key("a", 7, b"\2"),), data=bytes(32)), "a truth value other than 0 and 1"),
    "string": (file_of(keys=(key("a", 8, struct.pack("<Q", HUGE)),), data=bytes(32)), "at most"),
    "array": (file_of(keys=(key("a", 9, struct.pack("<IQ", 0, HUGE)),), data=bytes(32)), "values of 'a'"),
    "array of texts": (file_of(keys=(key("a", 9, struct.pack("<IQ", 8, HUGE)),), data=bytes(32)), "values of 'a'"),
    "nested": (file_of(keys=(key("a", 9, struct.pack("<IQ", 9, 1) * 99),), data=bytes(32)), "arrays in arrays"),
    "alignment": (file_of(keys=(key("general.alignment", 4, struct.pack("<I", 24)),), data=bytes(32)), "power of two"),
    "no alignment": (file_of(keys=(key("general.alignment", 4, bytes(4)),), data=bytes(32)), "power of two"),
    "alignment type": (file_of(keys=(key("general.alignment", 10, bytes(8)),), data=bytes(32)), "a 32-bit number"),
    "rank": (file_of(tensor_info("w", (1,) * 5, 0, 0), data=bytes(32)), "5 dimensions"),
    "rank without end": (file_of(text("w") + struct.pack("<I", 1 << 31), data=bytes(64)), "dimensions for 'w'"),
    "shape": (file_of(tensor_info("w", (HUGE,) * 4, 0, 0), data=bytes(32)), "up to byte"),
    "type": (file_of(tensor_info("w", (8,), 99, 0), data=bytes(32)), "got number 99"),
    "removed type": (file_of(tensor_info("w", (32,), 4, 0), data=bytes(32)), "got number 4"),
    "blocks": (file_of(tensor_info("w", (33,), 8, 0), data=bytes(64)), "blocks of 32 whole"),
    "offset": (file_of(tensor_info("w", (8,), 0, HUGE), data=bytes(32)), "up to byte"),
    "between": (file_of(tensor_info("w", (8,), 0, 4), data=bytes(64)), "a multiple of 32"),
    "overlap": (file_of(F, tensor_info("v", (8,), 0, 0), data=bytes(32)), "over each other"),
    "name twice": (file_of(F, tensor_info("w", (8,), 0, 32), data=bytes(64)), "two tensors 'w'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_lies_is_refused_in_one_error(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(nz.NeutralizeError, match=message) as caught:
        read_gguf(path)
    assert str(caught.value).startswith("checkpoint: expected ")


SPARSE = {
    "many values": (key("a", 9, struct.pack("<IQ", 0, 5 << 20)), "more values in its metadata"),
    "long header": (key("a", 8, struct.pack("<Q", 64 << 20)), "got a longer header"),
}


@pytest.mark.parametrize("case", SPARSE)
def test_a_large_file_that_lies_is_refused_before_it_is_held(tmp_path, case):
    start, message = SPARSE[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of(keys=(start,)))
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(nz.NeutralizeError, match=message):
        read_gguf(path)


def test_what_is_unusual_but_right_is_read(tmp_path):
    path = tmp_path / "m.gguf"
    nested = key("a", 9, struct.pack("<IQ", 9, 2) + 2 * struct.pack("<IQHH", 2, 2, 5, 6))
    path.write_bytes(
        file_of(
            F,
            tensor_info("none", (0, 4), 0, 32),
            tensor_info("one", (), 0, 32),
            keys=(nested,),
            data=bytes(36),
            version=2,
        )
    )
    header = read_header(path)
    assert header.metadata == {"a": [[5, 6], [5, 6]]}
    assert {name: stored.shape for name, stored in header.tensors.items()} == {"w": (8,), "none": (4, 0), "one": ()}
    assert (header.version, header.architecture) == (2, "")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(nz.NeutralizeError, match="checkpoint: expected a file that can be read, got No such file"):
        read_gguf(tmp_path / "none.gguf")


VALID = file_of(
    F,
    tensor_info("q", (32, 2), 8, 32),
    keys=(
        key("general.architecture", 8, text("llama")),
        key("a", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yz")),
        key("b", 6, bytes(4)),
    ),
    data=bytes(32 + 68),
)


@hypothesis.settings(max_examples=250, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=8)), max_size=4),
    st.integers(0, len(VALID)),
)
def test_a_file_with_any_bytes_is_read_or_refused(tmp_path_factory, changes, cut):
    content = bytearray(VALID)
    for place, data in changes:
        content[place : place + len(data)] = data
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(bytes(content[:cut] if cut % 3 == 0 else content))
    with contextlib.suppress(nz.NeutralizeError):
        layout = read_gguf(path)
        assert all(region.end <= len(content) for stored in layout.tensors.values() for region in stored.regions)
