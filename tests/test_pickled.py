"""Files of torch.save: every tensor is found, and edits are those of the live model bit for bit."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from edits import Every, every_edit, made_live, make_on_files, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from neutralize.checkpoint import archive, pickled, unpickle
from neutralize.checkpoint.layout import Elements
from neutralize.checkpoint.pickled import MARK, Listed, read_torch_file
from neutralize.checkpoint.region import Files
from neutralize.errors import NeutralizeError
from neutralize.plan import Assign, Copy, Fold, Rewrite

EVERY_DTYPE = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64),
]


@pytest.mark.parametrize("wrap", [dict, lambda state: {"epoch": 3, "state_dict": state, "note": ["a", (1, 2.5)]}])
def test_edits_are_those_of_the_live_model_and_checksums_hold(tmp_path, wrap):
    model = Every()
    path = tmp_path / "model.pt"
    content = wrap(model.state_dict())
    torch.save(content, path)
    prefix = "state_dict." if "epoch" in content else ""
    edits = tuple(_renamed(edit, prefix) for edit in every_edit(model))
    layout = read_torch_file(path)
    assert list(layout.tensors) == [prefix + name for name in model.state_dict()]
    make_on_files(layout, edits)
    got = torch.load(path, weights_only=True)
    assert same_bits(got["state_dict"] if prefix else got, made_live(model, every_edit(model)))
    assert zipfile.ZipFile(path).testzip() is None
    assert {**got, "state_dict": 0} == {**content, "state_dict": 0} if prefix else True


def _renamed(edit, prefix):
    names = {name: prefix + getattr(edit, name) for name in ("parameter", "bias", "source") if hasattr(edit, name)}
    return type(edit)(**{**edit.__dict__, **names})


def test_only_the_edited_tensor_and_its_checksum_change(tmp_path):
    path = tmp_path / "model.bin"
    torch.save({name: torch.randn(300) for name in "abc"}, path)
    before = path.read_bytes()
    layout = read_torch_file(path)
    make_on_files(layout, (Rewrite("b", (300,), "float32", scale=0.5),))
    after = path.read_bytes()
    region = layout.tensors["b"].regions[0]
    changed = {at for at, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]}
    outside = {at for at in changed if not region.offset <= at < region.end}
    assert changed - outside
    assert len(outside) <= 8
    record = zipfile.ZipFile(path).getinfo("model/data/1")
    assert all(before[at : at + 4] != after[at : at + 4] for at in (region.end + 4, before.rfind(b"model/data/1") - 30))
    assert struct.unpack_from("<L", after, region.end + 4)[0] == record.CRC


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3, 1)], ids=str)
def test_every_dtype_and_shape_is_where_the_layout_says(tmp_path, dtype, shape):
    path = tmp_path / "one.pt"
    tensor = torch.arange(-3, -3 + torch.Size(shape).numel()).to(torch.float32).to(dtype).reshape(shape)
    torch.save({"other": torch.ones(3), "t": tensor}, path)
    found = read_torch_file(path).tensors["t"]
    assert isinstance(found, Elements)
    assert (found.dtype, found.shape) == (dtype, shape)
    with Files(tmp_path) as files:
        assert same_bits({"": found.read(files)}, {"": tensor})


def test_parameters_views_and_attributes_are_tensors_too(tmp_path):
    base = torch.randn(4, 6)
    with_attribute = torch.randn(3)
    with_attribute.note = "kept"
    content = OrderedDict(
        parameter=nn.Parameter(torch.randn(2, 3)),
        row=base[1],
        rows=base[2:4],
        attribute=with_attribute,
        listed=[torch.zeros(2), {"deep": torch.ones(1)}],
        counts=torch.Size([1, 2]),
    )
    path = tmp_path / "some.pth"
    torch.save(content, path)
    layout = read_torch_file(path)
    assert list(layout.tensors) == ["parameter", "row", "rows", "attribute", "listed.0", "listed.1.deep"]
    assert layout.tied == {}  # rows of one storage that do not overlap
    with Files(tmp_path) as files:
        got = {name: layout.elements(name, "").read(files) for name in ("parameter", "row", "rows", "attribute")}
    assert same_bits(got, {name: content[name] for name in got})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "why", "call"),
    [
        (lambda: torch.randn(4, 6).t(), "float32 with strides [1, 6]", "contiguous()"),
        (lambda: torch.randn(4, 6)[:, :3], "float32 with strides [6, 1]", "contiguous()"),
        (lambda: torch.randn(1).expand(3), "float32 with strides [0]", "contiguous()"),
        (
            lambda: torch.randn(3, dtype=torch.complex64).conj(),
            "complex64, conjugated or negated",
            "resolve_conj() and resolve_neg()",
        ),
        (lambda: torch.randn(3, dtype=torch.complex64).conj().imag, "float32 with strides [2]", "contiguous()"),
        (lambda: torch.eye(3).to_sparse(), "a sparse tensor", "to_dense()"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.qint8), "a quantized tensor", "dequantize()"),
    ],
)
def test_what_is_not_one_run_of_elements_is_listed_and_refused(tmp_path, make, why, call):
    path = tmp_path / "views.pt"
    torch.save({"view": make(), "plain": torch.ones(2)}, path)
    layout = read_torch_file(path)
    assert isinstance(layout.tensors["view"], Listed)
    assert layout.tensors["view"].encoding == why
    expected = f"checkpoint: expected elements row by row for 'view', got {why}; call {call} on it and save again"
    with pytest.raises(NeutralizeError, match=f"^{re.escape(expected)}$"):
        make_on_files(layout, (Rewrite("view", (3,), "float32"),))


# ---- tied tensors --------------------------------------------------------------------------------------------------


@pytest.fixture
def tied(tmp_path):
    weight = torch.randn(4, 3)
    path = tmp_path / "tied.pt"
    torch.save({"embed": weight, "head": weight, "bias": torch.randn(4), "alone": torch.randn(4, 3)}, path)
    return path


def edit_of(name, **coefficients):
    return Rewrite(name, (4, 3), "float32", **coefficients)


@pytest.mark.parametrize(
    ("edits", "options", "factor"),
    [
        ((edit_of("embed", scale=0.5), edit_of("head", scale=0.5)), {}, 0.5),
        ((edit_of("head"), edit_of("alone"), edit_of("embed")), {}, 0.0),
        ((edit_of("embed", scale=0.5),), {"tied": [("embed", "head")]}, 0.5),
        ((edit_of("embed", scale=0.5), edit_of("head", scale=0.5)), {"tied": [("embed", "head")]}, 0.25),
    ],
)
def test_tied_tensors_are_edited_together_or_by_one_name_that_means_all(tied, edits, options, factor):
    layout = read_torch_file(tied)
    assert layout.tied == {name: frozenset(("embed", "head")) for name in ("embed", "head")}
    before = torch.load(tied)
    make_on_files(layout, edits, **options)
    after = torch.load(tied)
    assert torch.equal(after["embed"], before["embed"] * factor)
    assert torch.equal(after["head"], after["embed"])


@pytest.mark.parametrize(
    "edits",
    [
        (edit_of("embed"),),
        (edit_of("embed"), edit_of("head", fill=1.0)),
        (Fold("alone", "bias", (4, 3), "float32", 1.0, 1.0), Copy("head", "alone", (4, 3), "float32")),
        (Fold("embed", "bias", (4, 3), "float32", 1.0, 1.0), Fold("head", "bias", (4, 3), "float32", 1.0, 1.0)),
    ],
)
def test_an_edit_that_would_change_another_tensor_is_refused(tied, edits):
    before = tied.read_bytes()
    with pytest.raises(NeutralizeError, match=r"to have bytes of its own, got a tensor that is also '(embed|head)'; "):
        make_on_files(read_torch_file(tied), edits)
    assert tied.read_bytes() == before


def test_names_that_overlap_in_part_are_never_one(tmp_path):
    base = torch.randn(8)
    path = tmp_path / "parts.pt"
    torch.save({"all": base, "left": base[:4], "right": base[4:], "middle": base[2:6]}, path)
    layout = read_torch_file(path)
    assert set(layout.tied) == {"all", "left", "right", "middle"}
    edits = tuple(Rewrite(name, (4,), "float32") for name in ("left", "right", "middle"))
    with pytest.raises(
        NeutralizeError, match=r"bytes of its own, got .* shares bytes with .*; clone them and save again"
    ):
        make_on_files(layout, (*edits, Rewrite("all", (8,), "float32")))


def test_names_of_the_same_bytes_in_another_shape_are_never_one(tmp_path):
    base = torch.randn(8)
    path = tmp_path / "shapes.pt"
    torch.save({"flat": base, "square": base.view(2, 4)}, path)
    edits = tuple(Rewrite(name, (8,), "float32") for name in ("flat", "square"))
    with pytest.raises(NeutralizeError, match="bytes of its own"):
        make_on_files(read_torch_file(path), edits)


# ---- marks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weights_only": False}, {"mmap": True}, {"map_location": "meta"}], ids=str)
def test_a_marked_file_is_taken_by_no_reader(tmp_path, options):
    path = tmp_path / "model.pt"
    torch.save(Every().state_dict(), path)
    layout = read_torch_file(path)
    assert layout.marks == {"model.pt": (0, MARK)}
    with path.open("r+b") as file:
        file.write(MARK)
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        torch.load(path, **options)
    expected = (
        f"checkpoint: expected a finished file, got '{path}', in which an edit was cut off; run: neutralize restore"
    )
    with pytest.raises(NeutralizeError, match=f"^{re.escape(expected)}$"):
        read_torch_file(path)


# ---- other forms of the archive ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
def test_archives_of_other_writers_and_sizes_of_64_bits(tmp_path, monkeypatch, wide):
    """Python's zipfile puts sizes and checksums before the records, in 64 bits past a limit that is lowered here."""
    path = tmp_path / "model.pt"
    tensors = {"a": torch.randn(30), "b": torch.randn(7, 3)}
    torch.save(tensors, path)
    if wide:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 0)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 0)
    again = tmp_path / "again.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert (b"PK\6\6" in again.read_bytes()) == wide
    make_on_files(read_torch_file(again), (Rewrite("b", (7, 3), "float32", scale=0.5),))
    assert zipfile.ZipFile(again).testzip() is None
    assert same_bits(torch.load(again), {"a": tensors["a"], "b": tensors["b"] * 0.5})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle(tmp_path, protocol):
    path = tmp_path / "model.pt"
    state = {**Every().state_dict(), "k": {1: torch.ones(2), -70000: torch.ones(1), 2**40: torch.ones(1)}, "x": b"ab"}
    torch.save(state, path, pickle_protocol=protocol)
    names = list(read_torch_file(path).tensors)
    assert names == [*Every().state_dict(), "k.1", "k.-70000", f"k.{2**40}"]


def test_an_optimizer_beside_the_model(tmp_path):
    model = nn.Linear(3, 2)
    state = {number: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)} for number in range(2)}
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "foreach": None, "params": [0, 1]}]}
    path = tmp_path / "train.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer}, path)
    layout = read_torch_file(path)
    assert list(layout.tensors)[:3] == ["model.weight", "model.bias", "optimizer.state.0.step"]
    make_on_files(layout, (Assign("model.bias", (2,), "float32", (1.0, 2.0)),))
    after = torch.load(path)
    assert torch.equal(after["model"]["bias"], torch.tensor([1.0, 2.0]))
    assert after["optimizer"]["param_groups"] == optimizer["param_groups"]


# ---- refusals ------------------------------------------------------------------------------------------------------


class _Payload:
    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def test_a_pickle_that_wants_more_is_refused_and_nothing_is_called(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"a": torch.ones(2), "b": _Payload(tmp_path / "made")}, path)
    expected = (
        f"checkpoint: expected nothing but tensors, numbers and text in '{path}', got a pickle that wants "
        f"'{os.mkdir.__module__}.mkdir'; save the state dict alone, as torch.load(..., weights_only=True) takes it"
    )
    with pytest.raises(NeutralizeError, match=f"^{re.escape(expected)}$"):
        read_torch_file(path)
    assert not (tmp_path / "made").exists()


def _saved(content, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def _script() -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), stream)
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda: _saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False),
            "got another format; load it and ",
        ),
        (lambda: b"", "got another format; "),
        (lambda: b"version https://git-lfs.github.com/spec/v1\n", "got another format; "),
        (_script, "expected a state dict in .*, got a TorchScript program; save its state_dict"),
        (lambda: _saved(nn.Linear(2, 2)), "got a pickle that wants 'torch.nn.modules.linear.Linear'; "),
        (lambda: _saved(torch.ones(2)), "expected a state dict in .*, got something else; save one"),
        (lambda: _saved({"epoch": 3}), "expected tensors in .*, got a file without any; "),
        (lambda: _saved({"a": {"b": torch.ones(2)}, "a.b": torch.ones(2)}), "got two of the name 'a.b'"),
        (lambda: _saved({(1, 2): torch.ones(2)}), "expected keys of text or numbers in "),
        (lambda: _saved(torch.nn.ParameterDict({"a": torch.ones(2)})), "got a pickle that wants 'torch.nn.modules."),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, message):
    path = tmp_path / "file.pt"
    path.write_bytes(content())
    with pytest.raises(NeutralizeError, match=f"^checkpoint: .*{message}"):
        read_torch_file(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(NeutralizeError, match=r"^checkpoint: expected a file that can be read, got No such file"):
        read_torch_file(tmp_path / "none.pt")


# ---- hostile archives ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "m.pt"
    torch.save({"a": torch.arange(40.0), "n": {"b": torch.ones(3, 2), "epoch": 3}}, path)
    return path.read_bytes()


def repacked(valid: bytes, **changed: bytes) -> bytes:
    """The archive with other records: names as keyword arguments, with ``_`` for ``/``."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(valid)) as old, zipfile.ZipFile(stream, "w") as new:
        for entry in old.infolist():
            key = entry.filename.removeprefix("m/").replace("/", "_").replace(".", "_")
            new.writestr(entry.filename, changed.get(key, old.read(entry)))
    return stream.getvalue()


def pickle_of(valid: bytes) -> bytes:
    return zipfile.ZipFile(io.BytesIO(valid)).read("m/data.pkl")


def in_directory(data: bytes, name: bytes, offset: int, value: bytes) -> bytes:
    """The archive with bytes of the central directory's entry for a record changed."""
    at = data.rindex(b"m/" + name) - 46 + offset
    return data[:at] + value + data[at + len(value) :]


def at_end(data: bytes, offset: int, value: bytes) -> bytes:
    at = len(data) - 22 + offset
    return data[:at] + value + data[at + len(value) :]


BIG = b"\xff\xff\xff\x7f"
HOSTILE = {
    "cut in the middle": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "a byte more": lambda data: data + b"\0",
    "a start alone": lambda data: data[:4],
    "an absurd count": lambda data: at_end(data, 10, b"\xff\x7f"),
    "an absurd count of 64 bits": lambda data: at_end(at_end(data, 10, b"\xff\xff"), -20 - 56 + 32, BIG + BIG),
    "an absurd place of the end of 64 bits": lambda data: at_end(data, -20 + 8, BIG + BIG),
    "an absurd directory": lambda data: at_end(data, 12, BIG),
    "a directory past the end": lambda data: at_end(data, 16, BIG),
    "a directory elsewhere": lambda data: at_end(data, 16, b"\0\0\0\0"),
    "a record past the end": lambda data: in_directory(data, b"data/0", 42, BIG),
    "a record on another": lambda data: in_directory(data, b"data/1", 42, data[data.rindex(b"m/data/0") - 4 :][:4]),
    "a size beyond the file": lambda data: in_directory(data, b"data/0", 20, BIG + BIG),
    "a compressed record": lambda data: in_directory(data, b"data/0", 10, b"\x08\0"),
    "an encrypted record": lambda data: in_directory(data, b"data/0", 8, b"\x09\x08"),
    "sizes that differ": lambda data: in_directory(data, b"data/0", 20, BIG),
    "a size of 64 bits that is not there": lambda data: in_directory(data, b"data/0", 24, b"\xff" * 4),
    "a name beyond the directory": lambda data: in_directory(data, b"data/0", 28, b"\xff\xff"),
    "two records of a name": lambda data: in_directory(data, b"data/1", 46, b"m/data/0"),
    "a name that is no text": lambda data: in_directory(data, b"data/1", 46, b"\xff\xff"),
    "no pickle": lambda data: data.replace(b"data.pkl", b"data.plk"),
    "a storage of another size": lambda data: repacked(data, data_0=b"\0" * 8),
    "no storage": lambda data: data.replace(b"m/data/0", b"m/data/7"),
    "the other byte order": lambda data: repacked(data, byteorder=b"big"),
    "an empty pickle": lambda data: repacked(data, data_pkl=b""),
    "a pickle cut off": lambda data: repacked(data, data_pkl=pickle_of(data)[:-10]),
    "text beyond the pickle": lambda data: repacked(data, data_pkl=b"\x80\x02}X\xff\xff\xff\xff."),
    "bytes beyond the pickle": lambda data: repacked(data, data_pkl=b"\x80\x04}\x8e" + b"\xff" * 8 + b"."),
    "an absurd memo": lambda data: repacked(data, data_pkl=b"\x80\x02}r\xff\xff\xff\xff}j\xff\xff\xff\xfes."),
    "a value of no memo": lambda data: repacked(data, data_pkl=b"\x80\x02}(h\x07."),
    "pop of nothing": lambda data: repacked(data, data_pkl=b"\x80\x02t."),
    "set of nothing": lambda data: repacked(data, data_pkl=b"\x80\x02NNs."),
    "a dict of itself": lambda data: repacked(data, data_pkl=b"\x80\x02}q\x00X\x01\0\0\0ah\x00s."),
    "a huge array": lambda data: repacked(
        data, data_pkl=b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + BIG * 2 + b"\x85R."
    ),
    "an unknown step": lambda data: repacked(data, data_pkl=b"\x80\x02\xff."),
    "a name without end": lambda data: repacked(data, data_pkl=b"\x80\x02c" + b"a" * 5000),
    "negative sizes": lambda data: repacked(
        data, data_pkl=pickle_of(data).replace(b"K(\x85", b"J\xff\xff\xff\xff\x85")
    ),
    "sizes beyond the storage": lambda data: repacked(data, data_pkl=pickle_of(data).replace(b"K(\x85", b"K)\x85")),
    "an offset": lambda data: repacked(data, data_pkl=pickle_of(data).replace(b"QK\0K(\x85", b"QK\1K(\x85")),
    "more sizes than strides": lambda data: repacked(data, data_pkl=pickle_of(data).replace(b"K(\x85", b"K\1K(\x86")),
    "another dtype": lambda data: repacked(data, data_pkl=pickle_of(data).replace(b"FloatStorage", b"HalfStorage")),
    "no dtype": lambda data: repacked(data, data_pkl=pickle_of(data).replace(b"torch\nFloatStorage", b"torch\nSize")),
    "another key": lambda data: repacked(data, data_pkl=pickle_of(data).replace(b"X\1\0\0\x000", b"X\1\0\0\0/")),
    "endless ways to one list": lambda data: repacked(data, data_pkl=many_ways()),
}


def many_ways() -> bytes:
    """A dict with a list of one list twice, of one list twice, and so on: 2^50 ways in 500 bytes."""
    out = b"\x80\x02}X\1\0\0\0a]q\x00"
    for level in range(1, 50):
        out += b"](h" + bytes([level - 1]) + b"h" + bytes([level - 1]) + b"eq" + bytes([level])
    return out + b"s."


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_with_one_message(tmp_path, valid, what):
    path = tmp_path / "m.pt"
    bad = HOSTILE[what](valid)
    assert bad != valid
    path.write_bytes(bad)
    with pytest.raises(NeutralizeError, match=r"^checkpoint: expected .*, got .*[;,] .+") as error:
        read_torch_file(path)
    assert len(str(error.value)) < 1000
    assert path.read_bytes() == bad


def test_a_directory_too_large_is_refused_before_it_is_read(tmp_path, valid, monkeypatch):
    path = tmp_path / "m.pt"
    path.write_bytes(valid)
    monkeypatch.setattr(archive, "_DIRECTORY_LIMIT", 100)
    with pytest.raises(NeutralizeError, match="expected a directory of at most 100 bytes"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("module", "limit", "message"),
    [
        (pickled, "SIZE_LIMIT", "expected at most 5 bytes in 'm/data.pkl'"),
        (unpickle, "SIZE_LIMIT", "expected a pickle of at most 5 bytes"),
        (unpickle, "_STEP_LIMIT", "it has more than 5 steps"),
        (unpickle, "_MADE_LIMIT", "it makes more than 5 objects"),
    ],
)
def test_a_pickle_too_large_is_refused(tmp_path, valid, monkeypatch, module, limit, message):
    path = tmp_path / "m.pt"
    path.write_bytes(valid)
    monkeypatch.setattr(module, limit, 5)
    with pytest.raises(NeutralizeError, match=message):
        read_torch_file(path)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(st.integers(0, 1 << 20), st.sampled_from(["set", "cut", "insert", "repeat"]), st.binary(max_size=9)),
        min_size=1,
        max_size=4,
    )
)
def test_a_damaged_file_gives_a_layout_or_one_error(tmp_path_factory, valid, changes):
    data = bytearray(valid)
    for place, how, value in changes:
        at = 4 + place % max(len(data) - 4, 1)
        if how == "set":
            data[at : at + len(value)] = value
        elif how == "cut":
            del data[at : at + 1 + len(value)]
        elif how == "insert":
            data[at:at] = value
        else:
            data[at:at] = data[at : at + 200]
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    path.write_bytes(data)
    try:
        layout = read_torch_file(path)
    except NeutralizeError:
        return
    for stored in layout.tensors.values():
        assert all(0 <= region.offset <= region.end <= len(data) for region in stored.regions)
