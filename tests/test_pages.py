"""Reports as pages: what they say, what they refuse, and what a browser makes of them."""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
import struct
import subprocess
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from browsers import BROWSER, OPTIONS, needs_browser
from networks import PreNorm, perturbed
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import neutralize as nz
from neutralize import cli
from neutralize.pages import page
from neutralize.pages.charts import Bars, Line, bars, curves
from neutralize.pages.weights import Change, heat
from neutralize.plan import Certificate, LayerPlan, Plan, Rewrite

HOSTILE = "<script>owned=1</script>\"'&<img src=x onerror=owned=1>"
"""A name that a module may have; a page must show it as it is."""


LONG = "a_name_without_any_dot_that_no_phone_is_wide_enough_for_and_no_line_breaks_by_itself"


class Reading(HTMLParser):
    """The elements of a page: names and attributes, in order; and the text of some."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "wbr", "circle", "path", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("circle", "path", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self):
        return "".join(self.texts)


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def verified():
    """A tanh layer between others, with a hostile name, and a block; inputs are scaled beyond their bound."""
    names = {
        "first": nn.Linear(24, 24),
        HOSTILE: nn.Linear(24, 24),
        "tanh": nn.Tanh(),
        "next": nn.Linear(24, 24),
        LONG: PreNorm(24),
    }
    model = perturbed(nn.Sequential(*names.values(), nn.Linear(24, 6)))
    for place, name in enumerate(names):
        model._modules = {name if key == str(place) else key: module for key, module in model._modules.items()}
    x = unit(16, 24)
    return nz.verify(model, nz.plan(model, [model.get_submodule(HOSTILE), LONG], example_inputs=x), x)


@pytest.fixture(scope="module")
def swept():
    model = perturbed(nn.Sequential(*[PreNorm(16) for _ in range(13)]))
    model._modules = {HOSTILE if key == "3" else f"{LONG}{key}": module for key, module in model._modules.items()}
    batches = [unit(4, 16, seed=seed) for seed in range(2)]
    return nz.influence(
        model, list(model), batches, loss=lambda output, batch: (output - batch).square().mean(), k=2, among=2
    )


@pytest.fixture(scope="module")
def written(verified, swept, tmp_path_factory):
    """The pages of both, by name."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        for name, found in (("verification", verified), ("sweep", swept)):
            found.to_html(folder / f"{name}.html", title=f"A {name}", command="neutralize …")
    return folder


# ---- what a page says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["verification", "sweep"])
def test_a_page_is_complete_in_itself_and_well_formed(name, written):
    text = (written / f"{name}.html").read_text()
    reading = Reading(text)
    assert not reading.open
    assert dict(reading.elements)["html"] == {"lang": "en"}
    assert f"A {name} – neutralize" in reading.text
    assert not [tag for tag, _ in reading.elements if tag in ("script", "link", "iframe", "object", "form", "base")]
    assert "default-src 'none'" in next(a["content"] for a in reading.all("meta") if "http-equiv" in a)
    assert all(
        value.startswith("data:image/png") for _, a in reading.elements for key, value in a.items() if key == "src"
    )
    assert not [key for _, attrs in reading.elements for key in attrs if key.startswith("on") or key == "href"]
    assert not re.findall(r"url\(|@import|https?:", text)
    levels = [int(tag[1]) for tag, _ in reading.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert levels.count(1) == 1
    ids = [attrs["id"] for _, attrs in reading.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in reading.elements:
        assert attrs.get("aria-labelledby", ids[0]) in ids
    assert all(attrs["scope"] in ("col", "row") for attrs in reading.all("th"))
    assert all(attrs["alt"] for attrs in reading.all("img"))
    charts = [attrs for attrs in reading.all("svg") if "aria-hidden" not in attrs]
    assert charts
    assert all(attrs["role"] == "img" and attrs["aria-labelledby"] in ids for attrs in charts)
    scrolled = [attrs for attrs in reading.all("div") if attrs.get("class") == "scroll"]
    assert len(scrolled) == len(reading.all("table"))
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolled)


def test_a_verification_shows_plan_certificates_errors_curves_weights_and_provenance(verified, written):
    reading = Reading((written / "verification.html").read_text())
    plan = verified._details().plan
    text = reading.text
    for entry in plan.layers:
        assert entry.layer in text
        assert page.figure(verified.per_layer[entry.layer]) in text
        assert entry.certificate.reason in text
        assert entry.certificate.assumption in text
    assert all(edit.describe() in text for edit in plan.edits)
    assert "An error bound is proven, as long as its assumption holds" in text
    assert "bit for bit" in text
    assert plan.digest in text
    for told in (torch.__version__, "2023-11-14 22:13:20 UTC", "neutralize …", "do not hold", "Sequential on cpu"):
        assert told in text
    drawn = reading.all("img")
    by_layer = [name for layer in plan.layers for edit in layer.edits for name in plan.edits[edit].parameters]
    assert [attrs["alt"].split(" before, ")[0] for attrs in drawn[::2]] == list(dict.fromkeys(by_layer))


def test_a_sweep_shows_its_table_search_plans_and_provenance(swept, written):
    reading = Reading((written / "sweep.html").read_text())
    text = reading.text
    for entry in swept:
        assert entry.layer in text
        assert f"{entry.loss:.4f}" in text
        assert f"{entry.delta_loss:+.4f}".replace("-", "−") in text
    assert swept.steps[-1].layer in text
    assert all(digest in text for digest in swept.digests.values())
    assert set(swept.digests) == {"the plans", "the data"}
    assert all(edit.describe() in text for plan in swept.plans for edit in plan.edits)
    assert "1 more" in text  # the row that is folded away
    assert "plans" not in swept.to_dict()


def test_a_sweep_of_one_layer_compares_it_with_no_other(swept, tmp_path):
    one = replace(swept, entries=swept.entries[:1], steps=(), plans=swept.plans[:1])
    one.to_html(tmp_path / "one.html")
    text = Reading((tmp_path / "one.html").read_text()).text
    assert f"Without {one[0].layer} the loss changes by" in text
    assert "the least (" not in text
    assert "From " not in text


def test_the_same_is_the_same_page_but_for_its_date(verified, swept, written, tmp_path, monkeypatch):
    for name, found in (("verification", verified), ("sweep", swept)):
        monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
        found.to_html(tmp_path / "again.html", title=f"A {name}", command="neutralize …")
        once, now = (
            (folder / file).read_text().split("<dt>date</dt>")
            for folder, file in ((written, f"{name}.html"), (tmp_path, "again.html"))
        )
        assert once[0] == now[0]
        assert once[1].partition("</dd>")[2] == now[1].partition("</dd>")[2]


@pytest.fixture(scope="module")
def tokens():
    """A model of token ids: a block off exactly, another damped up to rounding, behind an embedding."""
    torch.manual_seed(0)
    model = perturbed(nn.Sequential(nn.Embedding(9, 16), PreNorm(16), PreNorm(16), nn.Linear(16, 5)))
    return model.requires_grad_(False), torch.arange(8).reshape(2, 4)


def test_of_a_model_of_token_ids_what_enters_each_layer_is_scaled(tokens):
    model, ids = tokens
    plan = nz.plan(model, "2", "damp", factor=0.3, example_inputs=ids)
    entering = model[:2](ids).detach()
    found = nz.verify(model, plan, ids)
    assert found.scaled == "layers"
    for scale, one in found.at_scales([0.25, 1, 1024]).items():
        given = scale * entering
        wanted = given + 0.3 * (model[2](given) - given)
        with plan.applied(model):
            got = model[2](given)
        error = float((got.double() - wanted.double()).abs().max() / wanted.abs().max())
        assert one.per_layer == {"2": pytest.approx(error, rel=1e-6)}
        assert 0 < error < 1e-6
    with pytest.raises(nz.NeutralizeError, match=r"verify: expected positive finite scales, got .*; leave them out"):
        found.at_scales([0.0])


def test_a_layer_that_reads_a_pass_through_is_scaled_by_what_enters_that():
    torch.manual_seed(0)
    layers = (nn.Embedding(9, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2))
    model, ids = perturbed(nn.Sequential(*layers)).requires_grad_(False), torch.arange(8).reshape(2, 4)
    plan = nz.plan(model, ["1", "3"], example_inputs=ids)
    inside, beyond = nz.verify(model, plan, ids).at_scales([1, 4096]).values()
    assert inside.assumptions_hold
    assert not beyond.assumptions_hold
    first = plan.layers[0]
    with plan.applied(model):
        entered = 4096 * model[0](ids).double()
        handed_on = (model[1:3](4096 * model[0](ids)).double() - first.value) / (first.epsilon * first.slope)
    error = float((handed_on - entered).abs().max()) / first.input_bound
    assert error > 1
    assert beyond.per_layer["1"] == pytest.approx(error, rel=1e-6)
    assert beyond.per_layer["3"] > 100 * inside.per_layer["3"]


def test_the_page_of_a_model_of_token_ids_says_what_was_scaled_and_draws_zeros(tokens, tmp_path):
    model, ids = tokens
    nz.verify(model, nz.plan(model, ["1", "2"], example_inputs=ids), ids).to_html(tmp_path / "exact.html")
    reading = Reading((tmp_path / "exact.html").read_text())
    assert "What was scaled: the hidden states that enter the layer" in reading.text
    assert "1 and 2: 0, bit for bit at every scale" in reading.text
    assert "1/64" in reading.text
    assert [attrs["id"] for attrs in reading.all("h3") if "id" in attrs] == ["layers"]
    marks = [
        attrs for tag, attrs in reading.elements if attrs.get("class") == "mark circle k1" and "transform" in attrs
    ]
    assert len(marks) == 1 + 2 * 7  # in the legend, and at seven scales in both widths
    damped = nz.verify(model, nz.plan(model, "2", "damp", factor=0.3, example_inputs=ids), ids)
    damped.to_html(tmp_path / "damped.html")
    for name, aim in (
        ("exact", "those of the network without the layers"),
        ("damped", "those of the network that the plan aims at"),
    ):
        assert f"The outputs are {aim}" in Reading((tmp_path / f"{name}.html").read_text()).text
    off = nz.verify(model, nz.plan(model, "0", "zero", example_inputs=ids), ids)
    assert off.scaled == ""
    off.to_html(tmp_path / "off.html")
    assert "neither the model's inputs nor what enters the layers" in Reading((tmp_path / "off.html").read_text()).text


def test_a_verification_without_its_model_has_a_page_too(verified, tmp_path):
    replace(verified, _details=None, bound_holds=False, exact=False).to_html(tmp_path / "a.html")
    text = Reading((tmp_path / "a.html").read_text()).text
    assert "A bound is exceeded: please report this as a bug, unless the plan is that of another model." in text
    assert "Not drawn" in text
    assert "Not measured" in text


def test_many_layers_with_many_tensors_stay_a_page_that_a_phone_opens(tmp_path):
    edits = tuple(Rewrite(f"model.layers.{n // 50}.part{n % 50}.weight", (512, 512), "float32") for n in range(4000))
    layers = tuple(
        LayerPlan(f"model.layers.{n}", "input", Certificate(f"model.layers.{n}", "exact", 0.0, "", f"reason {n}"),
                  tuple(range(50 * n, 50 * n + 50)))
        for n in range(80)
    )  # fmt: skip
    plan = Plan("auto", edits, layers)
    model = nn.Sequential(nn.Linear(4, 4))
    found = nz.verify(model, nz.plan(model, "0", "zero", example_inputs=unit(2, 4)), unit(2, 4))
    details = found._details()
    found = replace(found, _details=lambda: replace(details, plan=plan), per_layer=dict.fromkeys((
        layer.layer for layer in layers), 0.0))  # fmt: skip
    found.to_html(tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert len(text) < 1_000_000
    assert "68 more" in text
    assert "10 are not shown" in text


def test_notebooks_show_short_pieces_without_colours(verified, swept):
    plan = verified._details().plan
    for found, told in ((plan, plan.digest[:12]), (verified, "Bit for bit"), (swept, f"{swept.loss:.4f}")):
        piece = found._repr_html_()
        reading = Reading(piece)
        assert not reading.open
        assert told in reading.text
        assert HOSTILE in reading.text
        assert reading.all("table")
        assert not [tag for tag, _ in reading.elements if tag in ("script", "img", "html", "body")]
        assert not re.findall(r"#[0-9a-f]{3,6}|rgb", piece.replace("&#3", ""))
        assert all(rule.startswith(".neutralize-report") for rule in re.findall(r"[^{},]+(?=[^{}]*{)", re.findall(
            "<style>(.*)</style>", piece)[0]))  # fmt: skip


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0.0, "0"), (1.5, "1.5"), (-0.25, "−0.25"), (1.234e-7, "1.23 × 10⁻⁷"), (1e30, "1 × 10³⁰"),
     (float("nan"), "not seen"), (float("-inf"), "−∞"), (None, "")],
)  # fmt: skip
def test_numbers_are_written_as_people_do(number, shown):
    assert page.figure(number).replace("\u00a0", " ") == shown


# ---- heat maps and charts --------------------------------------------------------------------------------------------


def decoded(uri):
    """The palette and the levels (rows of bytes) of a PNG with a palette."""
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    chunks, place = {}, 8
    while place < len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        kind, held = content[place + 4 : place + 8], content[place + 8 : place + 8 + size]
        assert struct.unpack(">I", content[place + 8 + size : place + 12 + size])[0] == zlib.crc32(kind + held)
        chunks[kind] = held
        place += 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = zlib.decompress(chunks[b"IDAT"])
    return chunks[b"PLTE"], [rows[row * (width + 1) + 1 : (row + 1) * (width + 1)] for row in range(height)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_a_cell_is_the_weight_of_the_largest_magnitude_in_its_part(dtype):
    tensor = (unit(200, 96) * 8).to(dtype)
    tensor.view(torch.uint8)[64:131] = 0
    found = heat(tensor)
    values = tensor.double()
    assert (len(found.cells), len(found.cells[0])) == (64, 31)
    for row, band in zip(found.cells, values.tensor_split(64), strict=True):
        for cell, part in zip(row, band.tensor_split(31, 1), strict=True):
            assert cell == max(part.flatten().tolist(), key=lambda value: (abs(value), value))
    assert found.largest == float(values.abs().max())
    assert found.zeros == float((values == 0).double().mean())
    palette, rows = decoded(found.picture(found.largest))
    assert [[level == 127 for level in row] for row in rows] == [[cell == 0 for cell in row] for row in found.cells]
    assert [[level > 127 for level in row] for row in rows] == [[cell > 0 for cell in row] for row in found.cells]
    assert palette[3 * 127 : 3 * 128] == bytes((247, 247, 245))


def test_what_is_not_finite_is_seen_and_not_in_the_scale():
    tensor = torch.tensor([[1.0, float("nan")], [float("-inf"), 1e-30]])
    found = heat(tensor)
    assert (found.largest, found.not_finite, found.zeros) == (1.0, 2, 0.0)
    assert decoded(found.picture(1.0))[1] == [bytes((254, 255)), bytes((255, 128))]


@pytest.mark.parametrize(
    ("before", "after", "peaks"),
    [(1.0, 0.5, (1.0, 1.0)), (0.5, 8.0, (8.0, 8.0)), (0.5, 1e-6, (0.5, 1e-6)), (0.0, 1.0, (1.0, 1.0))],
)
def test_what_would_be_all_white_has_colours_of_its_own(before, after, peaks):
    found = Change("w", (2,), "float64", heat(torch.tensor([before, 0.0])), heat(torch.tensor([after, 0.0])))
    assert found.peaks == pytest.approx(peaks)


@pytest.mark.parametrize("shape", [(), (5,), (700,), (1, 4096), (4096, 2), (3, 4, 5, 5)])
def test_every_shape_has_a_picture(shape):
    cells = heat(torch.ones(shape)).cells
    assert 1 <= len(cells) <= 64
    assert 1 <= len(cells[0]) <= 64
    assert {cell for row in cells for cell in row} == {1.0}


def test_a_chart_keeps_the_order_of_values_and_shows_what_is_0():
    points = ((0.01, 0.0), (1.0, 3e-9), (100.0, 2e-3))
    chart = curves("key", "title", "told", "x", "y", [Line("a", points)])
    for drawing in chart.drawings:
        ((_, placed),) = drawing.lines
        assert [x for x, _ in placed] == sorted(x for x, _ in placed)
        assert placed[0][1] > placed[1][1] > placed[2][1]  # pixels count downwards
        assert placed[0][1] in [y for y, label in drawing.up if label == "0"]
        assert all(drawing.left <= x <= drawing.right and drawing.top <= y <= drawing.bottom for x, y in placed)
        assert len(drawing.up) >= 3
        assert all(drawing.top <= y <= drawing.bottom for y, _ in drawing.up)


@pytest.mark.parametrize("values", [(0.1, 2.0, 30.0), (-0.5, 0.0, 4.0), (float("nan"), float("inf"), 1.0), (0.0,),
                                    (-1.0, -2.0, -1.5), (1e-300, 1.0, 1e300)])  # fmt: skip
def test_bars_are_drawn_whatever_the_losses(values):
    names = tuple(map(str, range(len(values))))
    chart = bars("key", "title", "told", "x", "y", names, Bars("b", values, names))
    for drawing in chart.drawings:
        assert len(drawing.bars) == sum(map(float.__lt__, map(abs, values), [float("inf")] * len(values)))
        for x, y, width, height, _, _ in drawing.bars:
            assert drawing.left <= x < x + width <= drawing.right
            assert drawing.top <= y <= y + height <= drawing.bottom + 1


# ---- where it goes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("page.txt", "its name does not end in .html"),
        ("nowhere/page.html", "No such file"),
        ("folder.html", "it is a folder"),
        ("", "it is a folder"),
    ],
)
def test_a_bad_target_is_refused_before_anything_runs(name, reason, verified, tmp_path):
    (tmp_path / "folder.html").mkdir()

    def details():
        raise AssertionError("it has begun")

    with pytest.raises(nz.NeutralizeError, match=f"report: expected an html file in a folder .*{reason}.*; give one"):
        replace(verified, _details=details).to_html(tmp_path / name)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "folder.html"]


def test_a_page_appears_whole_or_not_at_all(swept, tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    target.write_text("the old one")
    (tmp_path / "link.html").symlink_to(target)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(page.os, "fsync", full)
        with pytest.raises(nz.NeutralizeError, match="No space left"):
            swept.to_html(target)
    assert target.read_text() == "the old one"
    swept.to_html(tmp_path / "link.html")
    assert "<!DOCTYPE html>" in target.read_text()
    assert (tmp_path / "link.html").is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.html", "page.html"]


class Stored(nn.Module):
    """A model that a checkpoint names."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.tanh, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)

    def forward(self, x):
        """Run it."""
        return self.last(self.tanh(self.second(self.first(x))))


def test_verify_of_files_writes_a_page(tmp_path):
    save_file(perturbed(Stored()).state_dict(), tmp_path / "model.safetensors")
    arguments = ["verify", tmp_path / "model.safetensors", "--layers", "first", "--model", f"{__name__}:Stored"]
    more = ["--report", str(tmp_path / "out.html"), "--quiet", "--json"]
    result = CliRunner().invoke(cli.app, [*map(str, arguments), *more])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["scaled"] == "inputs"
    assert [one["scale"] for one in told["scales"]] == [1 / 64, 1 / 16, 1 / 4, 1, 4, 16, 64]
    assert told["scales"][3]["per_layer"] == told["per_layer"]
    assert told["read_bytes"] < 3 * (tmp_path / "model.safetensors").stat().st_size
    reading = Reading((tmp_path / "out.html").read_text())
    assert "model.safetensors" in reading.text
    assert "command line" in reading.text
    assert "weights read" in reading.text
    assert len(reading.all("img")) == 2 * 2
    refused = CliRunner().invoke(cli.app, ["verify", "nowhere", "--layers", "x", "--report", str(tmp_path / "out.pdf")])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("report: expected an html file")


def test_influence_writes_a_page(monkeypatch, tmp_path, swept):
    from neutralize.influence.job import Task
    from neutralize.language import LanguageModel

    monkeypatch.setattr(Task, "load", lambda self: LanguageModel(nn.Identity(), None, "a reader"))
    monkeypatch.setattr(Task, "run", lambda self, language, log, progress: swept)
    result = CliRunner().invoke(cli.app, ["influence", "--json", "--report", str(tmp_path / "out.html")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["loss"] == swept.loss
    assert "a reader – neutralize" in (tmp_path / "out.html").read_text()
    refused = CliRunner().invoke(cli.app, ["influence", "--report", str(tmp_path / "no" / "out.html")])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("report: expected an html file")


# ---- in a browser ----------------------------------------------------------------------------------------------------

MEASURE = """
<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(part => { part.open = true; });
  const luminance = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const colour = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const ground = element => {
    for (; element; element = element.parentElement) {
      const found = colour(getComputedStyle(element).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const contrast = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const texts = [], marks = [];
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    if (!box.width || !box.height || element.closest("script,title")) continue;
    const inked = [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim());
    const scale = element.getScreenCTM ? element.getScreenCTM().a : 1;
    if (inked) texts.push({
      what: element.tagName + " " + element.textContent.trim().slice(0, 40), size: parseFloat(style.fontSize) * scale,
      contrast: contrast(colour(element.ownerSVGElement ? style.fill : style.color).slice(0, 3), ground(element)),
    });
    if (element.matches("rect.bar:not(.marked), .mark:not(.cross)"))
      marks.push(contrast(colour(style.fill).slice(0, 3), ground(element)));
    if (element.matches(".join, rect.marked"))
      marks.push(contrast(colour(style.stroke).slice(0, 3), ground(element)));
  }
  const wide = [...document.querySelectorAll(".scroll")];
  const seen = document.createElement("pre");
  seen.id = "measured";
  seen.textContent = JSON.stringify({
    width: innerWidth, content: document.documentElement.scrollWidth, texts, marks,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    scrolling: wide.filter(box => box.scrollWidth > box.clientWidth).length,
    outside: [...document.body.querySelectorAll("*")].filter(element => !element.closest(".scroll")
      && element.getBoundingClientRect().right > innerWidth + 1).map(element => element.tagName),
    charts: [...document.querySelectorAll(".chart svg[role=img]")].filter(svg => svg.getBoundingClientRect().width)
      .map(svg => svg.getAttribute("class")),
    broken: [...document.querySelectorAll(".figures dd")].filter(number => number.getBoundingClientRect().height
      > 1.5 * parseFloat(getComputedStyle(number).lineHeight)).map(number => number.textContent),
    overlapping: [...document.querySelectorAll(".chart svg[role=img]")].flatMap(svg => {
      const boxes = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect());
      const meet = (one, other) => one.left < other.right && other.left < one.right
        && one.top + 2 < other.bottom && other.top + 2 < one.bottom;
      return boxes.filter((one, place) => boxes.some((other, beside) => beside > place && meet(one, other)))
        .map(() => svg.textContent);
    }),
    pictures: [...document.images].map(image => image.naturalWidth),
    loaded: performance.getEntriesByType("resource").map(entry => entry.name),
    owned: "owned" in window, scripts: document.scripts.length,
  });
  parent.document.body.append(seen);
});
</script>
"""


FRAME = """<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<style>body {{ margin: 0 }} iframe {{ display: block; border: 0; width: {}px; height: {}px }}</style>
<iframe srcdoc="{}"></iframe>"""
"""What a page is looked at through: a window of Chromium is never narrower than 500 pixels, but a frame is."""


def rendered(source, folder, width, height, *, dark=False):
    """What Chromium measures on a page in a frame of this size, and its screenshot (height, width, 3), 0 to 1."""
    drawn = pytest.importorskip(
        "matplotlib.image", reason="matplotlib is not installed: pip install 'neutralize[plot]'"
    )
    text = source.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    copy, shot = folder / "page.html", folder / "page.png"
    copy.write_text(FRAME.format(width, height, html.escape(text.replace("</body>", f"{MEASURE}</body>"))))
    options = [
        *OPTIONS,
        f"--window-size={width},{height}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--user-data-dir={folder / 'profile'}",
        f"--screenshot={shot}",
        "--dump-dom",
    ]
    told = subprocess.run([BROWSER, *options, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    measured = re.search(r'<pre id="measured">(.*?)</pre>', told.stdout, re.DOTALL)
    assert measured, told.stderr
    return json.loads(html.unescape(measured[1])), torch.from_numpy(drawn.imread(shot)[:, :, :3].copy())


def share_of(picture, colour):
    """The fraction of a picture's pixels that have a colour, written as #rrggbb."""
    wanted = torch.tensor([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return float(((picture - wanted).abs().amax(-1) < 0.02).double().mean())


@needs_browser
@pytest.mark.parametrize(
    ("name", "width", "height", "dark", "ground", "inks"),
    [
        ("verification", 390, 844, False, "#fdfdfc", ("#1d2126", "#17673b")),
        ("verification", 1000, 3600, True, "#15181b", ("#79b3e8", "#ec9a5f", "#e4e7ea")),
        ("sweep", 390, 1600, True, "#15181b", ("#79b3e8", "#e4e7ea")),
        ("sweep", 1280, 1400, False, "#fdfdfc", ("#2a6aa8", "#78459c", "#1d2126")),
    ],
)
def test_a_browser_shows_the_page(name, width, height, dark, ground, inks, written, tmp_path):
    seen, picture = rendered(written / f"{name}.html", tmp_path, width, height, dark=dark)
    assert (seen["width"], seen["dark"]) == (width, dark)
    assert seen["content"] <= width  # tables scroll in their own boxes
    assert seen["outside"] == []
    assert (seen["scrolling"] > 0) == (width < 400)
    assert set(seen["charts"]) == {"narrow" if width < 640 else "wide"}
    assert seen["overlapping"] == []
    assert seen["broken"] == []  # a power of ten stays with its number
    assert all(size > 0 for size in seen["pictures"])
    assert seen["loaded"] == []  # no network
    assert not seen["owned"]  # no name was run as a script
    assert seen["scripts"] == 1
    assert len(seen["texts"]) > 100
    assert [text for text in seen["texts"] if text["contrast"] < 4.5] == []  # WCAG AA
    assert [text for text in seen["texts"] if text["size"] < 10.5] == []
    assert seen["marks"]
    assert min(seen["marks"]) >= 3.0  # WCAG AA for what is no text
    assert tuple(picture.shape) == (height, width, 3)
    assert 0.5 < share_of(picture, ground) < 0.99
    for ink in inks:
        assert share_of(picture, ink) > 1e-4, ink


@needs_browser
def test_pieces_for_notebooks_are_readable_in_light_and_dark_ones(verified, swept, tmp_path):
    pieces = "".join(found._repr_html_() for found in (verified._details().plan, verified, swept))
    themes = "".join(
        f'<div style="background: {ground}; color: {ink}; font: 13px sans-serif">{pieces}</div>'
        for ground, ink in (("#ffffff", "#212121"), ("#111111", "#dedede"))
    )
    (tmp_path / "notebook.html").write_text(f'<!DOCTYPE html><html lang="en"><body>{themes}</body></html>')
    seen, picture = rendered(tmp_path / "notebook.html", tmp_path, 390, 1200)
    assert seen["content"] <= 390
    assert len(seen["texts"]) > 100
    assert [text for text in seen["texts"] if text["contrast"] < 4.5] == []
    assert share_of(picture, "#ffffff") > 0.3
