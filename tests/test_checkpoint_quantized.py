"""Quantized weights on files: each format's own decoder says what an edit of its bytes has done.

Each case is a checkpoint of one layer beside an untouched one, quantized by the format's own package where that runs on
a CPU. GPTQ has none that does: its decoder here is written from the published layout.
"""

import contextlib
import itertools
import json
import math
import struct
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import neutralize as nz
from neutralize.checkpoint.layout import Elements, Layout
from neutralize.checkpoint.quantized import attach
from neutralize.checkpoint.quantized.weight import Axis, Grid, Quantized, Unknown
from neutralize.checkpoint.region import Files
from neutralize.errors import NeutralizeError
from neutralize.plan import Assign, Copy, Fold, Rewrite

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
ROWS, COLUMNS = 128, 128
State = Mapping[str, torch.Tensor]


# ---- files -----------------------------------------------------------------------------------------------------------


def elements_of(path: Path) -> dict[str, Elements]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    return {
        name: Elements.whole(
            name, DTYPES[entry["dtype"]], entry["shape"], path.name, 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read(path: Path) -> dict[str, torch.Tensor]:
    return load(path.read_bytes())  # not load_file, whose tensors change with the file


def layout_of(path: Path, config: Mapping | None) -> Layout:
    with Files(path.parent) as files:
        return Layout(path.parent, (path.name,), attach(elements_of(path), config, files))


def edit_in_place(layout: Layout, *edits) -> int:
    """Returns how many bytes were written."""
    with Files(layout.root, writable=True) as files:
        return sum(count for patch in layout.patches(edits, files) for count in patch.run(files))


# ---- the formats -----------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A format: its tensors for a weight, its configuration, its decoder, and what its groups allow."""

    name: str
    tensors: Callable[[torch.Tensor], State]
    settings: Mapping
    decode: Callable[[State], torch.Tensor]
    weight: str = "weight"
    shape: tuple[int, ...] = (ROWS, COLUMNS)
    row_step: int | None = 1  # the smallest block of rows that can be zero; None: only all of them
    column_step: int | None = 1
    row_damp: int | None = 1  # the same for a factor
    column_damp: int | None = None
    rounding: float = 2.0**-22  # of a factor of 0.3, relative to each weight; of a power of two: 0
    only_powers: bool = False

    def __str__(self) -> str:
        return self.name


def values(shape=(ROWS, COLUMNS), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.logspace(-1, 0, shape[-1])


def scheme(strategy, *, bits=8, kind="int", symmetric=True, group=None, block=None, **more):
    args = QuantizationArgs(
        num_bits=bits,
        type=kind,
        symmetric=symmetric,
        strategy=strategy,
        group_size=group,
        block_structure=block,
        **more,
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


def scales_of(weight, strategy, limit, group=None, block=None):
    """One scale for what a strategy groups: shapes as compressed-tensors has them."""
    if strategy == "tensor":
        return weight.abs().max().view(1) / limit
    if strategy == "channel":
        return weight.abs().amax(1, keepdim=True) / limit
    if strategy == "block":
        rows, columns = block
        return weight.view(weight.shape[0] // rows, rows, -1, columns).abs().amax((1, 3)) / limit
    return weight.view(weight.shape[0], -1, group).abs().amax(2) / limit


def compressed(name, format_, strategy, limit, *, cast=torch.float32, shared=None, points=False, **options):
    """A case of compressed-tensors: its own compressor and decompressor."""
    made = scheme(strategy, **options)
    group, block = options.get("group"), options.get("block")
    compressor = BaseCompressor.get_value_from_registry(format_)

    def tensors(weight):
        scale = scales_of(weight, strategy, limit, group, block)
        state = {"weight": weight.to(cast), "weight_scale": scale.to(cast)}
        if shared is not None:
            state["weight_global_scale"] = torch.tensor([shared])
            state["weight_scale"] = (scale * shared).to(torch.float8_e4m3fn).float()
        if points:
            state["weight_zero_point"] = torch.randint(-3, 3, scale.shape, dtype=torch.int8)
        if format_ == "mxfp4-pack-quantized":
            state["weight_scale"] = torch.exp2(scale.log2().ceil())
        return compressor.compress(state, made)

    weights = json.loads(made.weights.model_dump_json())
    settings_ = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    return Case(name, tensors, settings_, lambda state: compressor.decompress(dict(state), made)["weight"])


def fp8(weight, dtype, block=None, cast=torch.float32, suffix="weight_scale_inv"):
    limit = torch.finfo(dtype).max
    strategy = "block" if block else "tensor"
    scale = scales_of(weight, strategy, limit, block=block)
    if cast == torch.uint8:
        exponents = scale.log2().ceil()
        scale, stored = exponents.exp2(), (exponents + 127).to(torch.uint8)
    else:
        stored = scale.to(cast)
    spread = scale if not block else scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return {"weight": (weight / spread).to(dtype), suffix: stored}


def fp8_experts(weight):
    """Experts in one tensor, as transformers stacks them."""
    each = [fp8(expert, torch.float8_e4m3fn, (32, 32)) for expert in weight]
    return {
        "": torch.stack([one["weight"] for one in each]),
        "_scale_inv": torch.stack([one["weight_scale_inv"] for one in each]),
    }


def fp8_decode(state, suffix="weight_scale_inv"):
    scale = state[suffix]
    scale = scale.view(1, 1) if scale.numel() == 1 else scale
    return Fp8Dequantize(SimpleNamespace())._dequantize_one(state["weight"], scale, torch.float32)


def pack_rows(codes, bits):
    """(n, m) integers as (n * bits / 32, m) int32, the first in the lowest bits, as GPTQ has them."""
    streams = (codes.unsqueeze(1) >> torch.arange(bits).view(1, -1, 1)) & 1  # (n, bits, m)
    words = streams.reshape(-1, 32, codes.shape[1]).to(torch.int64)
    return (words << torch.arange(32).view(1, -1, 1)).sum(1).to(torch.int32)


def unpack_rows(words, bits):
    streams = (words.to(torch.int64).unsqueeze(1) >> torch.arange(32).view(1, -1, 1)) & 1
    codes = streams.reshape(-1, bits, words.shape[1])
    return (codes << torch.arange(bits).view(1, -1, 1)).sum(1)


def gptq(bits, group, *, order=None):
    def tensors(weight):
        rows, columns = weight.shape
        groups = -(-columns // group)
        index = torch.arange(columns) // group if order is None else order
        scales = torch.stack([weight[:, index == one].abs().amax(1) for one in range(groups)]) / 2 ** (bits - 1)
        zeros = torch.randint(1, 2**bits - 1, (groups, rows))
        codes = (weight.T / scales[index] + zeros[index]).round().clamp(0, 2**bits - 1).long()
        return {
            "qweight": pack_rows(codes, bits),
            "qzeros": pack_rows((zeros - 1).T.contiguous(), bits).T.contiguous(),
            "scales": scales.half(),
            "g_idx": index.int(),
        }

    def decode(state):
        codes, zeros = unpack_rows(state["qweight"], bits), unpack_rows(state["qzeros"].T, bits).T + 1
        index = state["g_idx"].long()
        return ((codes - zeros[index]) * state["scales"].float()[index]).T

    settings_ = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order is not None}
    return tensors, settings_, decode


def awq(weight, group=32):
    scales = scales_of(weight, "group", 7, group).T.contiguous()
    zeros = torch.randint(6, 10, scales.shape)
    codes = (weight.T / scales.repeat_interleave(group, 0) + zeros.repeat_interleave(group, 0)).round().clamp(0, 15)

    def pack(codes):
        nibbles = codes.long().view(codes.shape[0], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return (nibbles << torch.arange(0, 32, 4)).sum(2).to(torch.int32)

    return {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales.half()}


def awq_decode(state):
    """compressed-tensors reads AWQ by turning it into its own packing."""
    named = {f"m.{name}": tensor.clone() for name, tensor in state.items()}
    converted = AutoAWQConverter(group_size=32).process(named)
    made = scheme("group", bits=4, symmetric=False, group=32)
    packed = {name.removeprefix("m."): tensor for name, tensor in converted.items()}
    return BaseCompressor.get_value_from_registry("pack-quantized").decompress(packed, made)["weight"]


def bitsandbytes_4bit(kind, *, nested=False, storage=torch.uint8, blocksize=64):
    def tensors(weight):
        linear = bnb.nn.Linear4bit(*weight.shape[::-1], bias=False, quant_type=kind)
        codes, state = bnb.functional.quantize_4bit(
            weight, blocksize=blocksize, quant_type=kind, compress_statistics=nested, quant_storage=storage
        )
        linear.weight = bnb.nn.Params4bit.from_prequantized(codes, state.as_dict(packed=True), device="cpu")
        return dict(linear.state_dict())

    def decode(state):
        stats = {name: tensor for name, tensor in state.items() if name != "weight"}
        loaded = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
        shape, loaded.quant_state.shape = (
            loaded.quant_state.shape,
            torch.Size((loaded.data.nbytes * 2 // blocksize, blocksize)),
        )
        # A block a row: with AVX-512, 0.50.2 takes the scales of other blocks where one goes over several rows.
        return bnb.functional.dequantize_4bit(loaded.data, loaded.quant_state).reshape(shape)

    return tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}, decode


def bitsandbytes_int8(weight):
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def mxfp4(weight):
    """(experts, in, out) as gpt-oss stores it; codes drawn at random, for all of them are values."""
    experts, columns, rows = weight.shape
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(115, 125, (experts, rows, columns // 32), generator=generator).to(torch.uint8)
    return {"_blocks": blocks, "_scales": scales}


def modelopt_decode(state):
    named = {f"m.{name}": tensor.clone() for name, tensor in state.items()}
    converted = ModelOptNvfp4Converter(targets=["re:.*"]).process(named)
    packed = {name.removeprefix("m."): tensor for name, tensor in converted.items()}
    made = scheme("tensor_group", bits=4, kind="float", group=16)
    return BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(packed, made)["weight"]


NVFP4 = compressed(
    "compressed-tensors nvfp4", "nvfp4-pack-quantized", "tensor_group", 6, bits=4, kind="float", group=16, shared=64.0
)


def modelopt(weight):
    state = NVFP4.tensors(weight)
    return {
        "weight": state["weight_packed"],
        "weight_scale": state["weight_scale"],
        "weight_scale_2": 1 / state["weight_global_scale"].view(()),
        "input_scale": torch.tensor(0.5),
    }


FP8 = {"quant_method": "fp8", "weight_block_size": [64, 64]}
ORDER = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3)) // 32
ORDERED = torch.tensor([0, 2] * 32 + [3, 1] * 32)  # each half of the columns has groups of its own
HALF = 2.0**-10  # scales in float16, decoded in float32
TINY = 2.0**-3  # scales in FP8, which a block is multiplied by

CASES = [
    Case(
        "fp8 blocks",
        lambda w: fp8(w, torch.float8_e4m3fn, (128, 128)),
        {**FP8, "weight_block_size": [128, 128]},
        fp8_decode,
        shape=(256, 256),
        row_damp=128,
        column_damp=128,
    ),
    Case(
        "fp8 blocks bfloat16",
        lambda w: fp8(w, torch.float8_e4m3fn, (64, 64), torch.bfloat16),
        FP8,
        fp8_decode,
        row_damp=64,
        column_damp=64,
        rounding=2.0**-8,
    ),
    Case(
        "fp8 blocks e8m0",
        lambda w: fp8(w, torch.float8_e4m3fn, (64, 64), torch.uint8),
        {**FP8, "scale_fmt": "ue8m0"},
        fp8_decode,
        row_damp=64,
        column_damp=64,
        only_powers=True,
    ),
    Case(
        "fp8 blocks ue8m0 in float32",
        lambda w: fp8(w, torch.float8_e4m3fn, (64, 64)),
        {**FP8, "scale_fmt": "ue8m0"},
        fp8_decode,
        row_damp=64,
        column_damp=64,
        only_powers=True,
    ),
    Case(
        "fp8 experts",
        fp8_experts,
        {**FP8, "weight_block_size": [32, 32]},
        lambda state: Fp8Dequantize(SimpleNamespace())._dequantize_one(state[""], state["_scale_inv"], torch.float32),
        weight="",
        shape=(4, 64, 96),
        column_damp=32 * 96,
    ),
    Case(
        "fp8 e5m2 tensor",
        lambda w: fp8(w, torch.float8_e5m2, suffix="weight_scale"),
        {"quant_method": "fp8"},
        lambda state: fp8_decode(state, "weight_scale"),
        row_damp=None,
    ),
    compressed("compressed-tensors fp8 channel", "float-quantized", "channel", 448, kind="float"),
    replace(compressed("compressed-tensors fp8 tensor", "float-quantized", "tensor", 448, kind="float"), row_damp=None),
    replace(
        compressed("compressed-tensors fp8 block", "float-quantized", "block", 448, kind="float", block=[64, 64]),
        row_damp=64,
        column_damp=64,
    ),
    compressed("compressed-tensors int8 channel", "int-quantized", "channel", 127),
    replace(
        compressed(
            "compressed-tensors int8 channel asymmetric",
            "int-quantized",
            "channel",
            100,
            symmetric=False,
            points=True,
        ),
        column_step=None,
    ),
    replace(compressed("compressed-tensors int8 tensor", "int-quantized", "tensor", 127), row_damp=None),
    replace(
        compressed("compressed-tensors int4 group", "pack-quantized", "group", 7, bits=4, group=64),
        column_step=2,
        column_damp=64,
    ),
    replace(
        compressed(
            "compressed-tensors int4 group asymmetric",
            "pack-quantized",
            "group",
            7,
            bits=4,
            group=32,
            symmetric=False,
            points=True,
        ),
        column_step=32,
        column_damp=32,
    ),
    replace(
        compressed(
            "compressed-tensors int4 channel bfloat16", "pack-quantized", "channel", 7, bits=4, cast=torch.bfloat16
        ),
        column_step=2,
        rounding=2.0**-7,
    ),
    compressed("compressed-tensors int8 packed", "pack-quantized", "channel", 127, bits=8),
    replace(
        compressed("compressed-tensors int3 packed", "pack-quantized", "group", 3, bits=3, group=32),
        column_step=32,
        column_damp=32,
    ),
    replace(
        compressed("compressed-tensors mxfp4", "mxfp4-pack-quantized", "group", 6, bits=4, kind="float", group=32),
        column_step=2,
        column_damp=32,
        only_powers=True,
    ),
    replace(NVFP4, column_step=2, column_damp=16, rounding=TINY),
    Case(
        "modelopt nvfp4",
        modelopt,
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        modelopt_decode,
        column_step=2,
        column_damp=16,
        rounding=TINY,
    ),
    Case("gptq 4 bit", *gptq(4, 64), column_step=64, column_damp=64, rounding=HALF),
    Case("gptq 3 bit", *gptq(3, 32), column_step=32, column_damp=32, rounding=HALF),
    Case("gptq 8 bit", *gptq(8, COLUMNS), column_step=None, rounding=HALF),
    Case("gptq act-order", *gptq(4, 32, order=ORDER), column_step=None, rounding=HALF),
    Case("gptq ordered groups", *gptq(4, 32, order=ORDERED), column_step=64, column_damp=64, rounding=HALF),
    Case(
        "awq",
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        awq_decode,
        column_step=32,
        column_damp=32,
        rounding=2 * HALF,  # decoded in float16
    ),
    Case("bitsandbytes nf4", *bitsandbytes_4bit("nf4"), column_step=2, column_damp=64),
    Case("bitsandbytes fp4", *bitsandbytes_4bit("fp4"), column_step=2, column_damp=64),
    Case(
        "bitsandbytes nf4 nested",
        *bitsandbytes_4bit("nf4", nested=True),
        column_step=2,
        row_damp=None,
        rounding=2.0**-20,
    ),
    Case(
        "bitsandbytes fp4 nested", *bitsandbytes_4bit("fp4", nested=True), column_step=2, row_damp=None, rounding=1e-6
    ),
    Case(
        "bitsandbytes nf4 in bfloat16", *bitsandbytes_4bit("nf4", storage=torch.bfloat16), column_step=2, column_damp=64
    ),
    Case("bitsandbytes nf4 long blocks", *bitsandbytes_4bit("nf4", blocksize=256), column_step=2, row_damp=2),
    Case(
        "bitsandbytes int8",
        bitsandbytes_int8,
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        lambda state: bnb.functional.int8_vectorwise_dequant(state["weight"], state["SCB"]),
    ),
    Case(
        "mxfp4 experts",
        mxfp4,
        {"quant_method": "mxfp4"},
        lambda state: convert_moe_packed_tensors(state["_blocks"], state["_scales"], dtype=torch.float32),
        weight="",
        shape=(4, 64, 48),
        column_step=2 * 48,
        column_damp=32 * 48,
        only_powers=True,
    ),
]
by_name = {case.name: case for case in CASES}
assert len(by_name) == len(CASES)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@dataclass
class Checkpoint:
    """A saved case: the layer ``a``, and ``b`` like it that stays as it is."""

    case: Case
    path: Path
    layout: Layout
    before: torch.Tensor
    name: str

    def state(self, layer: str = "a") -> State:
        prefix = f"{layer}." if self.case.weight else f"{layer}.experts"
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in read(self.path).items()
            if name.startswith(prefix) and name != "a.bias"
        }

    def weight(self) -> torch.Tensor:
        return self.case.decode(self.state()).float()

    def edit(self, scale: float = 0.0, **block) -> Rewrite:
        return Rewrite(self.name, self.case.shape, "bfloat16", scale=scale, **block)


def saved(case: Case, folder: Path) -> Checkpoint:
    torch.manual_seed(0)
    tensors = {"a.bias": torch.ones(3), "norm.weight": torch.ones(5, dtype=torch.bfloat16)}
    for seed, layer in enumerate("ab"):
        prefix = f"{layer}." if case.weight else f"{layer}.experts"
        made = case.tensors(values(case.shape, seed))
        tensors |= {prefix + name: tensor.contiguous() for name, tensor in made.items()}
    path = folder / "model.safetensors"
    save_file(tensors, path)
    layout = layout_of(path, {"quantization_config": case.settings})
    checkpoint = Checkpoint(case, path, layout, torch.empty(0), "a.weight" if case.weight else "a.experts")
    checkpoint.before = checkpoint.weight()
    return checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Each case is quantized once; a test that writes puts the bytes back."""
    made: dict[str, tuple[Checkpoint, bytes]] = {}

    def one(case: Case) -> tuple[Checkpoint, bytes]:
        if case.name not in made:
            checkpoint = saved(case, tmp_path_factory.mktemp("case"))
            made[case.name] = checkpoint, checkpoint.path.read_bytes()
        return made[case.name]

    return one


@pytest.fixture
def checkpoint(case, checkpoints):
    checkpoint, original = checkpoints(case)
    yield checkpoint
    checkpoint.path.write_bytes(original)


def same(one, other):
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


@every_case
def test_what_belongs_together_is_one_weight_and_its_parts_stay_listed(checkpoint):
    stored = checkpoint.layout.tensors[checkpoint.name]
    assert isinstance(stored, Quantized), stored
    assert stored.shape == checkpoint.case.shape == tuple(checkpoint.before.shape)
    assert checkpoint.before.abs().max() > 0.1
    plain = elements_of(checkpoint.path)
    assert {*plain, checkpoint.name, checkpoint.name.replace("a.", "b.")} == set(checkpoint.layout.tensors)
    for name in stored.names:
        if name != checkpoint.name:
            assert checkpoint.layout.tensors[name] == plain[name]


@every_case
def test_reading_is_decoding_as_the_format_does_bit_for_bit(checkpoint):
    """Rounded once to what the decoder computes in; all rows, some of them, and those at the end."""
    stored, wanted = checkpoint.layout.tensors[checkpoint.name], checkpoint.case.decode(checkpoint.state())
    with Files(checkpoint.layout.root) as files:
        got = stored.read(files)
        assert same(got.to(wanted.dtype) + 0.0, wanted + 0.0)  # without the sign of zeros
        rows = stored.shape[0]
        for span in ((0, 1), (1, 2), (rows // 3, rows // 3 + 2), (rows - 1, rows)):
            assert same(stored.read(files, span), got[slice(*span)]), span


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_of_gptq_wrap_and_those_of_its_second_version_are_stored_as_they_are(bits, tmp_path):
    make, settings_, _ = gptq(bits, 32)
    state = dict(make(values()))
    zeros = torch.arange(4 * ROWS).view(4, ROWS) % 2**bits  # as they are stored: all there are
    state["qzeros"] = pack_rows(zeros.T.contiguous(), bits).T.contiguous()
    codes, index = unpack_rows(state["qweight"], bits), state["g_idx"].long()
    for packing, points in ((None, (zeros + 1) % 2**bits), ("gptq", (zeros + 1) % 2**bits), ("gptq_v2", zeros)):
        config = settings_ if packing is None else settings_ | {"checkpoint_format": packing}
        layout = stored(tmp_path, {f"a.{n}": t for n, t in state.items()}, {"quantization_config": config})
        wanted = ((codes - points[index]) * state["scales"].float()[index]).T
        with Files(tmp_path) as files:
            assert torch.equal(layout.tensors["a.weight"].read(files), wanted)


def test_awq_without_zero_points_counts_from_the_middle(tmp_path):
    state = {name: tensor for name, tensor in awq(values()).items() if name != "qzeros"}
    converter = AutoAWQConverter(group_size=32, zero_point=False)
    packed = converter.process({f"a.{name}": tensor.clone() for name, tensor in state.items()})
    made = scheme("group", bits=4, group=32)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    wanted = compressor.decompress({name.removeprefix("a."): tensor for name, tensor in packed.items()}, made)["weight"]
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False}
    layout = stored(tmp_path, {f"a.{name}": tensor for name, tensor in state.items()}, {"quantization_config": config})
    with Files(tmp_path) as files:
        assert torch.equal(layout.tensors["a.weight"].read(files).to(wanted.dtype), wanted)


@every_case
def test_zero_is_exact_and_touches_nothing_else(checkpoint):
    parts = checkpoint.layout.tensors[checkpoint.name].names
    others = {name: tensor for name, tensor in read(checkpoint.path).items() if name not in parts}
    assert {"a.bias", "norm.weight"} < others.keys()
    head = checkpoint.path.read_bytes()[: checkpoint.layout.tensors["a.bias"].regions[0].offset]
    edit_in_place(checkpoint.layout, checkpoint.edit())
    assert not checkpoint.weight().any()
    after = read(checkpoint.path)
    assert all(same(tensor, after[name]) for name, tensor in others.items())
    assert checkpoint.path.read_bytes().startswith(head[: 8 + struct.unpack("<Q", head[:8])[0]])


def blocks(case, row_step, column_step):
    """Blocks of rows, of columns, and of both, that start and end at a multiple of a step."""
    rows, columns = case.shape[0], math.prod(case.shape[1:])
    row = {"rows": (row_step, min(3 * row_step, rows))} if row_step and row_step < rows else {}
    column = {"columns": (column_step, min(3 * column_step, columns))} if column_step else {}
    return [block for block in (row, column, row | column if row and column else {}) if block]


WRITTEN = {  # what zero costs, of 128 x 128 weights: the scales where they have a zero, else the codes
    "bitsandbytes nf4": 256 * 4,
    "bitsandbytes nf4 nested": 128 * 128 // 2,
    "bitsandbytes int8": 128 * 4,
    "gptq 4 bit": 2 * 128 * 2,
    "awq": 4 * 128 * 2,
    "modelopt nvfp4": 128 * 128 // 16,
    "compressed-tensors int4 group": 2 * 128 * 4,
    "compressed-tensors fp8 channel": 128 * 128,
    "compressed-tensors mxfp4": 128 * 128 // 2,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_zero_writes_the_fewest_bytes_that_are_zero_for_sure(name, checkpoints):
    checkpoint, original = checkpoints(by_name[name])
    assert edit_in_place(checkpoint.layout, checkpoint.edit()) == WRITTEN[name]
    checkpoint.path.write_bytes(original)


@every_case
def test_zero_of_blocks_leaves_every_other_weight_as_it_was(checkpoint):
    case, original = checkpoint.case, checkpoint.path.read_bytes()
    for block in blocks(case, case.row_step, case.column_step):
        checkpoint.path.write_bytes(original)
        edit = checkpoint.edit(**block)
        edit_in_place(checkpoint.layout, edit)
        expected = checkpoint.before.contiguous().clone()
        edit.block(expected).zero_()
        after = checkpoint.weight()
        assert torch.equal(after, expected), block


@every_case
def test_a_power_of_two_multiplies_exactly(checkpoint):
    case, original = checkpoint.case, checkpoint.path.read_bytes()
    for block in [{}, *blocks(case, case.row_damp, case.column_damp)]:
        checkpoint.path.write_bytes(original)
        edit = checkpoint.edit(0.5, **block)
        edit_in_place(checkpoint.layout, edit)
        expected = checkpoint.before.contiguous().clone()
        edit.block(expected).mul_(0.5)
        assert torch.equal(checkpoint.weight(), expected), block


@every_case
def test_another_factor_multiplies_up_to_the_rounding_of_the_scales(checkpoint):
    case, original = checkpoint.case, checkpoint.path.read_bytes()
    if case.only_powers:
        with pytest.raises(NeutralizeError, match=r"its scales are powers of two, and 0\.3 is none"):
            edit_in_place(checkpoint.layout, checkpoint.edit(0.3))
        assert checkpoint.path.read_bytes() == original
        return
    for block in [{}, *blocks(case, case.row_damp, case.column_damp)]:
        checkpoint.path.write_bytes(original)
        edit = checkpoint.edit(0.3, **block)
        edit_in_place(checkpoint.layout, edit)
        expected = checkpoint.before.contiguous().clone()
        edit.block(expected).mul_(0.3)
        error = (checkpoint.weight() - expected).abs()
        assert (error <= case.rounding * expected.abs()).all(), (block, (error / expected.abs()).nan_to_num().max())


@pytest.mark.parametrize("name", ["compressed-tensors nvfp4", "modelopt nvfp4"])
def test_a_whole_nvfp4_weight_is_multiplied_by_its_one_scale_in_float32(name, checkpoints):
    checkpoint, original = checkpoints(by_name[name])
    assert edit_in_place(checkpoint.layout, checkpoint.edit(0.3)) == 4
    error = (checkpoint.weight() - 0.3 * checkpoint.before).abs()
    checkpoint.path.write_bytes(original)
    assert (error <= 2.0**-8 * checkpoint.before.abs()).all()  # decoded in bfloat16


def test_any_cut_through_a_stored_tensor_is_the_bytes_of_its_cells(tmp_path):
    tensor = torch.arange(3 * 4 * 5, dtype=torch.int32).view(3, 4, 5)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    (stored,) = elements_of(tmp_path / "x.safetensors").values()
    grid = Grid(stored, (3, 4, 5), 4, (Axis(0), Axis(1), Axis(2)))
    spans = [[(0, size), (0, 1), (1, size), (1, 2)] for size in (3, 4, 5)]
    with Files(tmp_path) as files:
        for box in itertools.product(*spans):
            regions = grid.regions(box, (3, 4, 5), files)
            found = torch.cat([files.read(region).view(-1).view(torch.int32) for region in regions])
            assert torch.equal(found, tensor[tuple(slice(*span) for span in box)].reshape(-1)), box
            assert len(regions) == 1 or (box[1] != (0, 4) and box[2] != (0, 5))


# ---- refusals --------------------------------------------------------------------------------------------------------


@every_case
def test_what_a_format_cannot_represent_is_refused_with_its_name(checkpoint):
    name, shape, encoding = checkpoint.name, checkpoint.case.shape, checkpoint.layout.tensors[checkpoint.name].encoding
    original = checkpoint.path.read_bytes()
    for edit in (
        checkpoint.edit(fill=0.001),
        checkpoint.edit(diagonal=1.0),
        checkpoint.edit(1.0, diagonal=0.5),
        Fold(name, "a.bias", shape, "float32", 0.5, 1.0),
        Copy(name, "b.weight", shape, "float32"),
        Assign(name, shape, "float32", (0.0,) * math.prod(shape)),
    ):
        with pytest.raises(NeutralizeError, match="expected zero, or a multiple of itself") as refused:
            edit_in_place(checkpoint.layout, edit)
        assert encoding in str(refused.value)
    with pytest.raises(NeutralizeError, match=r"multiplied by numbers above 0 that float32 holds, and -0\.5 is none"):
        edit_in_place(checkpoint.layout, checkpoint.edit(-0.5))
    with pytest.raises(NeutralizeError, match=r"expected shape \[7, 7\] for"):
        edit_in_place(checkpoint.layout, Rewrite(name, (7, 7), "float32"))
    assert edit_in_place(checkpoint.layout, checkpoint.edit(1.0)) == 0
    assert checkpoint.path.read_bytes() == original


SHARED = {
    "gptq 4 bit": "64 elements along dimension 1 go together, by 'a.g_idx'",
    "gptq act-order": "32 elements along dimension 1 go together, by 'a.g_idx'",
    "gptq ordered groups": "32 elements along dimension 1 go together, by 'a.g_idx'",
    "gptq 8 bit": "128 elements along dimension 1 go together, by 'a.g_idx'",
    "awq": "32 elements along dimension 1 go together",
    "compressed-tensors int8 channel asymmetric": "all elements along dimension 1 go together",
    "compressed-tensors int3 packed": "32 elements along dimension 1 go together",
    "bitsandbytes nf4": "2 elements along dimension 1 go together",
}


@pytest.mark.parametrize("name", SHARED)
def test_zero_of_a_part_of_a_group_is_refused(name, checkpoints):
    checkpoint, original = checkpoints(by_name[name])
    with pytest.raises(NeutralizeError, match=f"{SHARED[name]}.*; edit whole groups, or dequantize"):
        edit_in_place(checkpoint.layout, checkpoint.edit(columns=(0, 33)))
    assert checkpoint.path.read_bytes() == original


@pytest.mark.parametrize("name", ["bitsandbytes nf4 nested", "bitsandbytes fp4 nested"])
def test_nested_scales_are_multiplied_only_together(name, checkpoints):
    checkpoint, _ = checkpoints(by_name[name])
    with pytest.raises(NeutralizeError, match="nested scales have one offset for the whole weight"):
        edit_in_place(checkpoint.layout, checkpoint.edit(0.5, rows=(0, 64)))


@pytest.mark.parametrize(
    ("name", "factor"),
    [("awq", 1e6), ("awq", 1e-6), ("mxfp4 experts", 2.0**-120), ("gptq 4 bit", 1e7)],
)
def test_a_factor_that_leaves_the_range_of_the_scales_is_refused(name, factor, checkpoints):
    checkpoint, original = checkpoints(by_name[name])
    with pytest.raises(NeutralizeError, match=r"would leave (its|their) range"):
        edit_in_place(checkpoint.layout, checkpoint.edit(factor))
    assert checkpoint.path.read_bytes() == original


def test_columns_that_are_no_box_of_the_experts_are_refused(checkpoints):
    checkpoint, _ = checkpoints(by_name["fp8 experts"])
    with pytest.raises(NeutralizeError, match=r"its columns are no box of \[4, 64, 96\]"):
        edit_in_place(checkpoint.layout, checkpoint.edit(columns=(90, 100)))


def test_a_scale_that_is_not_a_number_stays_one(tmp_path):
    """E8M0 has a NaN, which adding to the exponents would make a number."""
    checkpoint = saved(by_name["mxfp4 experts"], tmp_path)
    with Files(tmp_path, writable=True) as files:
        first = checkpoint.layout.elements("a.experts_scales", "the scales").regions[0].part(0, 1, 0, 1)
        files.write(first, torch.full((1, 1), 255, dtype=torch.uint8))
    for scale in (0.5, 2.0, 0.0):
        with pytest.raises(NeutralizeError, match=r"would leave their range|its scales hold Inf or NaN"):
            edit_in_place(checkpoint.layout, checkpoint.edit(scale))


def test_zero_codes_under_scales_that_are_not_finite_are_refused(tmp_path):
    checkpoint = saved(by_name["fp8 blocks"], tmp_path)
    stored = checkpoint.layout.elements("a.weight_scale_inv", "the scales")
    with Files(tmp_path, writable=True) as files:
        files.write(stored.regions[0].part(0, 1, 4, 8), torch.tensor([math.nan]).view(torch.uint8).view(1, 4))
    with pytest.raises(NeutralizeError, match="its scales hold Inf or NaN"):
        edit_in_place(checkpoint.layout, checkpoint.edit())
    edit_in_place(checkpoint.layout, checkpoint.edit(rows=(128, 256)))  # which the NaN does not reach
    assert not checkpoint.weight()[128:].any()


# ---- what is not known -----------------------------------------------------------------------------------------------


def stored(tmp_path, tensors, config) -> Layout:
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return layout_of(path, config)


def refusal(layout, name, shape=None):
    shape = layout.tensors[name].shape if shape is None else shape
    before = (layout.root / layout.files[0]).read_bytes()
    with pytest.raises(NeutralizeError) as refused:
        edit_in_place(layout, Rewrite(name, shape, "bfloat16"))
    assert (layout.root / layout.files[0]).read_bytes() == before
    return str(refused.value)


@every_case
def test_names_alone_are_not_believed(checkpoint, tmp_path):
    """Without the configuration, or with that of another format, the same tensors are listed and not edited."""
    for config in (None, {}, {"quantization_config": {"quant_method": "quanto"}}):
        layout = layout_of(checkpoint.path, config)
        assert isinstance(layout.tensors[checkpoint.name], Unknown)
        message = refusal(layout, checkpoint.name)
        assert "an unknown quantization suffix (" in message
        assert ("no quantization_config" if not config else "the quant_method 'quanto'") in message


UNFIT = {  # a case, what is done to its tensors, and what is said
    "fp8 without a scale": ("fp8 blocks", {"weight_scale_inv": None}, "unknown quantization suffix"),
    "fp8 with an unknown scale": (
        "fp8 blocks",
        {"weight_scale_inv": None, "scale_weight": torch.ones(1)},
        "unknown quantization suffix ('.bias', '.scale_weight' beside 'a.weight'",
    ),
    "fp8 with two scales": ("fp8 blocks", {"weight_scale": torch.ones(1)}, "several scales"),
    "fp8 with scales of another shape": ("fp8 blocks", {"weight_scale_inv": torch.ones(3, 2)}, "[3, 2] of"),
    "gptq with too few scales": ("gptq 4 bit", {"scales": torch.ones(1, ROWS).half()}, "[1, 128] of 'a.scales' fits"),
    "gptq without zeros": ("gptq 4 bit", {"qzeros": None}, "no 'a.qzeros'"),
    "gptq with a weight beside it": ("gptq 4 bit", {"weight": torch.ones(2, 2)}, "both 'a.qweight' and 'a.weight'"),
    "gptq in a cube": ("gptq 4 bit", {"qweight": torch.ones(2, 2, 2).int()}, "the shape [2, 2, 2] for 'a.qweight'"),
    "awq with scales in integers": ("awq", {"scales": torch.ones(4, 128).int()}, "[4, 128] of int32 for 'a.scales'"),
    "awq that is gptq": ("awq", {"qweight": torch.ones(16, 128).int()}, "for 'a.scales', not [1, 1024]"),
    "nvfp4 with scales for 32": (
        "modelopt nvfp4",
        {"weight_scale": torch.ones(128, 4).to(torch.float8_e4m3fn)},
        "[128, 4] of float8_e4m3fn for 'a.weight_scale', not [128, 8]",
    ),
    "nvfp4 with two shared scales": ("modelopt nvfp4", {"weight_scale_2": torch.ones(2)}, "not one number"),
    "packed with another shape": (
        "compressed-tensors int4 group",
        {"weight_shape": torch.tensor([128, 150])},
        "no group of the configuration",
    ),
    "packed with a shape of negative numbers": (
        "compressed-tensors int4 group",
        {"weight_shape": torch.tensor([128, -(2**62)])},
        "[128, -4611686018427387904] in 'a.weight_shape'",
    ),
    "packed with a shape of too many": (
        "compressed-tensors int4 group",
        {"weight_shape": torch.ones(5, dtype=torch.int64)},
        "[5] for 'a.weight_shape'",
    ),
    "int8 in tiles": (
        "bitsandbytes int8",
        {"weight_format": torch.tensor(2, dtype=torch.uint8)},
        "tiles of a GPU, by 'a.weight_format'",
    ),
    "int8 with many words on its order": (
        "bitsandbytes int8",
        {"weight_format": torch.zeros(3, dtype=torch.uint8)},
        "[3] for 'a.weight_format', not one number",
    ),
    "int8 with too few scales": ("bitsandbytes int8", {"SCB": torch.ones(3)}, "[3] of float32 for 'a.SCB', not [128]"),
    "nf4 with too few codes": ("bitsandbytes nf4", {"weight": torch.ones(5, 1).byte()}, "5 bytes for 16384 codes"),
    "mxfp4 in blocks of 8": ("mxfp4 experts", {"_blocks": torch.ones(4, 48, 2, 8).byte()}, "the shape [4, 48, 2, 8]"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_tensors_that_do_not_fit_together_are_not_guessed_at(what, tmp_path):
    name, changes, message = UNFIT[what]
    case = by_name[name]
    prefix = "a." if case.weight else "a.experts"
    tensors = {prefix + suffix: tensor for suffix, tensor in case.tensors(values(case.shape)).items()} | {
        prefix + suffix: tensor for suffix, tensor in changes.items()
    }
    tensors["a.bias"] = torch.ones(2)
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    layout = stored(tmp_path, kept, {"quantization_config": case.settings})
    assert message in refusal(layout, "a.weight" if case.weight else "a.experts")
    assert edit_in_place(layout, Rewrite("a.bias", (2,), "float32")) == 8  # what is plain is edited all the same


STATES = {
    "not JSON": b"nf4",
    "not text": b"\xff\xfe\x00\x01",
    "deep": b"[" * 50_000,
    "an array": b"[1, 2]",
    "no shape": b'{"blocksize": 64}',
    "a shape of text": b'{"blocksize": 64, "shape": ["a", 1]}',
    "a shape of negative numbers": b'{"blocksize": 64, "shape": [-256, 256]}',
    "an absurd shape": b'{"blocksize": 64, "shape": [99999999999999999999999, 256]}',
    "many dimensions": b'{"blocksize": 64, "shape": [1, 1, 1, 1, 1, 256]}',
    "blocks of nothing": b'{"blocksize": 0, "shape": [128, 128]}',
    "blocks of one and a half": b'{"blocksize": 1.5, "shape": [128, 128]}',
    "an offset of NaN": b'{"blocksize": 64, "shape": [128, 128], "nested_offset": NaN, "nested_blocksize": 256}',
    "no nested blocks": b'{"blocksize": 64, "shape": [128, 128], "nested_offset": 1.0, "nested_blocksize": 0}',
    "too long": b" " * 100_000,
}


@pytest.mark.parametrize("what", STATES)
def test_a_hostile_state_of_4_bit_weights_is_not_believed(what, tmp_path):
    case = by_name["bitsandbytes nf4"]
    tensors = {f"a.{name}": tensor for name, tensor in case.tensors(values()).items()}
    tensors["a.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(STATES[what]), dtype=torch.uint8)
    layout = stored(tmp_path, tensors, {"quantization_config": case.settings})
    assert "expected a known quantization format for 'a.weight'" in refusal(layout, "a.weight")


CONFIGS = {
    "a list": [],
    "a method of numbers": {"quant_method": 4},
    "bits of text": {"quant_method": "gptq", "bits": "four"},
    "bits of truth": {"quant_method": "gptq", "bits": True},
    "absurd bits": {"quant_method": "gptq", "bits": 10**30},
    "groups of text": {"quant_method": "gptq", "bits": 4, "group_size": "128"},
    "no bits": {"quant_method": "gptq"},
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_malformed_configuration_is_one_clear_error(what, checkpoints):
    checkpoint, _ = checkpoints(by_name["gptq 4 bit"])
    with pytest.raises(NeutralizeError, match=r"^checkpoint: expected .* in quantization_config, got .*malformed"):
        layout_of(checkpoint.path, {"quantization_config": CONFIGS[what]})


def test_of_several_groups_of_a_configuration_the_one_that_fits_counts(checkpoints):
    checkpoint, _ = checkpoints(by_name["compressed-tensors int4 group"])
    (weights,) = [group["weights"] for group in checkpoint.case.settings["config_groups"].values()]
    for other in ({"group_size": 32}, {"num_bits": 8}, {}, {"strategy": "channel"}):
        groups = {"group_0": {"weights": {**weights, **other}}, "group_1": {"weights": weights}, "group_2": {}}
        layout = layout_of(
            checkpoint.path, {"quantization_config": {**checkpoint.case.settings, "config_groups": groups}}
        )
        assert isinstance(layout.tensors["a.weight"], Quantized)
    groups = {"group_0": {"weights": {**weights, "group_size": 32}}}
    layout = layout_of(checkpoint.path, {"quantization_config": {**checkpoint.case.settings, "config_groups": groups}})
    assert "no group of the configuration" in refusal(layout, "a.weight")


def test_plain_checkpoints_are_left_alone(tmp_path):
    tensors = {"w.weight": torch.ones(4, 4), "num_blocks": torch.ones(3), "x.position_ids": torch.arange(4)}
    layout = stored(tmp_path, tensors, {"model_type": "llama"})
    assert layout.tensors == elements_of(tmp_path / "model.safetensors")


def test_bytes_of_no_known_format_are_listed_and_not_edited(tmp_path):
    tensors = {"a.weight": torch.ones(4, 4).to(torch.int8), "a.weight_zero": torch.ones(4), "a.mystery": torch.ones(1)}
    layout = stored(tmp_path, tensors, {"quantization_config": {"quant_method": "bitsandbytes"}})
    assert layout.tensors["a.weight"].encoding == "int8, unknown quantization"
    assert "no 'a.SCB'" in refusal(layout, "a.weight")
    with pytest.raises(NeutralizeError, match=r"expected plain elements for 'a\.weight'"):
        layout.elements("a.weight", "the source")


def test_bitsandbytes_is_recognised_by_the_flags_of_older_configurations(checkpoints):
    checkpoint, _ = checkpoints(by_name["bitsandbytes int8"])
    layout = layout_of(checkpoint.path, {"quantization_config": {"load_in_8bit": True}})
    assert isinstance(layout.tensors["a.weight"], Quantized)


def test_the_configuration_of_a_text_part_counts(checkpoints):
    checkpoint, _ = checkpoints(by_name["awq"])
    layout = layout_of(checkpoint.path, {"text_config": {"quantization_config": by_name["awq"].settings}})
    assert isinstance(layout.tensors["a.weight"], Quantized)


@given(data=st.data())
@settings(max_examples=60, deadline=None, database=None)
def test_any_mixture_of_tensors_is_edited_or_refused(data, checkpoints):
    """Shapes and dtypes at random under the names of a format: every error is one of ours, and nothing is outside."""
    case = data.draw(st.sampled_from(CASES))
    checkpoint, _ = checkpoints(case)
    size = checkpoint.path.stat().st_size
    tensors = elements_of(checkpoint.path)
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=3)):
        old = tensors[name]
        shape = data.draw(
            st.sampled_from(
                [(), (0,), (1,), (256,), (16,), (2, 2), (256, 1), (1, 256), (3, 5, 7), (1,) * 9, old.shape[::-1]]
            )
        )
        dtype = data.draw(st.sampled_from([old.dtype, *DTYPES.values()]))
        if math.prod(shape) * dtype.itemsize <= size - old.regions[0].offset:
            tensors[name] = Elements.whole(name, dtype, shape, checkpoint.path.name, old.regions[0].offset)
    junk = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.lists(st.integers(-1, 200), max_size=3))
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(case.settings)), junk, max_size=1))
    with Files(checkpoint.path.parent) as files:
        try:
            attached = attach(tensors, {"quantization_config": {**case.settings, **changes}}, files)
        except NeutralizeError:
            return
        layout = Layout(checkpoint.path.parent, (checkpoint.path.name,), attached)
        for stored in attached.values():
            assert all(region.end <= size for region in stored.regions)
            with contextlib.suppress(NeutralizeError):
                assert tuple(stored.read(files).shape) == tuple(stored.shape)
            for scale in (0.0, 0.5):
                rows, columns = stored.shape[0] if stored.shape else 1, math.prod(stored.shape[1:])
                block = {"rows": (0, rows // 2)} if rows > 1 and columns and data.draw(st.booleans()) else {}
                if columns > 1 and rows and data.draw(st.booleans()):
                    block["columns"] = (0, columns // 2)
                edit = Rewrite(stored.name, stored.shape, "float32", scale=scale, **block)
                try:
                    patches = stored.patches(edit, layout, files)
                except NeutralizeError:
                    continue
                held = [region for one in attached.values() for region in one.regions]
                for region in (region for patch in patches for region in patch.regions):
                    assert any(own.offset <= region.offset and region.end <= own.end for own in held)


# ---- a model ---------------------------------------------------------------------------------------------------------


def test_a_block_of_a_quantized_llama_is_off_through_its_norm_gains(tmp_path):
    """Nothing quantized is touched: the loaded model is the network without the block, bit for bit."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    quantize, settings_, decode = bitsandbytes_4bit("nf4")
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name.endswith("_proj.weight"):
            made = quantize(parameter)
            tensors |= {name.removesuffix("weight") + suffix: tensor for suffix, tensor in made.items()}
        else:
            tensors[name] = parameter
    layout = stored(tmp_path, tensors, {"quantization_config": settings_})

    with torch.device("meta"):
        meta = LlamaForCausalLM(config).eval()
    tokens = torch.arange(8).view(1, 8)
    plan = nz.plan(meta, "model.layers[1]", example_inputs={"input_ids": tokens.to("meta")})
    before = read(tmp_path / "model.safetensors")
    assert edit_in_place(layout, *plan.edits) == 2 * 64 * 4
    after = read(tmp_path / "model.safetensors")
    changed = {name for name, tensor in before.items() if not same(tensor, after[name])}
    assert changed == {f"model.layers.1.{norm}_layernorm.weight" for norm in ("input", "post_attention")}

    def loaded(tensors):
        state = {name: tensors[name] for name in model.state_dict()}
        for name in state:
            if name.endswith("_proj.weight"):
                stem = name.removesuffix("weight")
                parts = {full.removeprefix(stem): tensor for full, tensor in tensors.items() if full.startswith(stem)}
                state[name] = decode(parts)
        network = LlamaForCausalLM(deepcopy(config)).eval()
        network.load_state_dict(state)
        return network

    network, excised = loaded(after), loaded(before)
    del excised.model.layers[1]
    excised.config.num_hidden_layers = 2
    with torch.no_grad():
        assert torch.equal(network(tokens).logits, excised(tokens).logits)
