"""The documentation: its code and its commands run, they print what it says, and the site needs no network.

The blocks of a page run in order, in one namespace and in one folder, as a reader would type them. In that folder lie a
few small models with random weights, under the names that the pages use. A block with a title is also written to a file
of that name. A `text` block is what the block before it prints; `...` stands for anything.
"""

from __future__ import annotations

import doctest
import importlib
import json
import logging
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
import torch
from browsers import BROWSER, OPTIONS, needs_browser
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import neutralize
from neutralize import cli

pytestmark = pytest.mark.shown
ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(
    r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)
PAGES = sorted(path for path in DOCS.rglob("*.md") if BLOCK.search(path.read_text(encoding="utf-8")))
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(page.read_text(encoding="utf-8")))


# ---- the models that the pages name ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with ./llama, ./quantized (FP8 codes with scales), model.gguf and corpus.txt."""
    import gguf
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    words = [f"w{number}" for number in range(62)]
    (folder / "corpus.txt").write_text(" ".join(words[:40]))
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=5)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    vocabulary = Tokenizer(WordLevel({word: number for number, word in enumerate(["<unk>", "</s>", *words])}, "<unk>"))
    vocabulary.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "llama")

    small = transformers.LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=2)
    small.quantization_config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=2))
    model.save_pretrained(folder / "quantized")
    stored = load_file(folder / "quantized" / "model.safetensors")
    for name in [name for name in stored if name.endswith("proj.weight")]:
        rows, columns = stored[name].shape
        stored[name] = stored[name].to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.ones(-(-rows // 16), -(-columns // 16))
    save_file(stored, folder / "quantized" / "model.safetensors", metadata={"format": "pt"})
    small.architectures = ["LlamaForCausalLM"]
    small.save_pretrained(folder / "quantized")

    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for key, value in {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 16,
        "feed_forward_length": 32,
        "head_count": 2,
        "head_count_kv": 2,
        "vocab_size": 64,
    }.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    names = {"token_embd": (64, 16), "output": (64, 16), "output_norm": (16,)}
    for block in range(2):
        names |= {f"blk.{block}.attn_{part}": (16, 16) for part in ("q", "k", "v", "output")}
        names |= {f"blk.{block}.ffn_{part}": (32, 16) for part in ("gate", "up")}
        names |= {f"blk.{block}.ffn_down": (16, 32), f"blk.{block}.attn_norm": (16,), f"blk.{block}.ffn_norm": (16,)}
    for name, shape in names.items():
        writer.add_tensor(f"{name}.weight", torch.rand(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


# ---- the pages -------------------------------------------------------------------------------------------------------
def command(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command of a page as it stands there; of what would install or build, check that it exists."""
    words = shlex.split(line, comments=True)
    if words[0] == "neutralize":
        result = CliRunner().invoke(cli.app, words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
        print(result.output)
    elif words[0] == "torchrun":
        program = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(neutralize.__file__).parents[1])}
        result = subprocess.run(program, capture_output=True, text=True, timeout=300, env=environment, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
    elif words[0] == "bash":
        assert (ROOT / words[1]).exists(), line
    else:
        assert words[:2] == ["pip", "install"], f"expected a command that this test knows, got {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_code_of_a_page_runs(page, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if page.parent.name == "howto":
        shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    logger = logging.getLogger("neutralize")
    monkeypatch.setattr(logger, "level", logger.level)  # as it was, when the page has been run
    torch.manual_seed(0)
    namespace: dict = {}
    printed = ""
    for block in blocks(page):
        language, body = block["language"], block["body"]
        if block["title"]:
            Path(block["title"]).write_text(body)
        if language == "text":
            assert doctest.OutputChecker().check_output(body, printed, SAME), f"expected\n{body}\ngot\n{printed}"
            continue
        if language == "python" and not block["title"]:
            exec(compile(body, str(page.name), "exec"), namespace)
        elif language == "console":
            for line in body.splitlines():
                assert line.startswith("$ "), f"{page.name}: a line of output belongs into a text block: {line}"
                command(line[2:], capsys)
        else:
            assert block["title"], f"{page.name}: expected a block that can be run, got one of language {language}"
        printed = capsys.readouterr().out


def test_the_job_files_that_are_shown_elsewhere_run(models, tmp_path, monkeypatch, capsys):
    from neutralize.influence import job

    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (readme,) = re.findall(
        r"^```toml\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    for number, text in enumerate([readme, job.__doc__[job.__doc__.index("log = ") :]]):
        small = f"text = 'corpus.txt'\nwindow = 16\n{text}".replace("path/or/hub-name", "llama")
        Path("job.toml").write_text(small.replace("sweeps.jsonl", f"{number}.jsonl"))
        command("neutralize influence --job job.toml --quiet", capsys)
        logged = [json.loads(line) for line in Path(f"{number}.jsonl").read_text().splitlines()]
        off = [entry["off"] for entry in logged if "loss" in entry]
        assert [] in off  # the intact model, and each candidate
        assert any(off)


def modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(neutralize.__path__, "neutralize.")
    names = [each.name for each in found if not each.name.rpartition(".")[2].startswith("_")]
    return [importlib.import_module(name) for name in ("neutralize", *names)]


def test_the_examples_of_docstrings_run():
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner(optionflags=SAME)
    examples = {}
    for module in modules():
        for example in finder.find(module):
            if example.examples:
                examples[example.name] = example
    for example in examples.values():
        runner.run(example)
    assert not runner.failures
    assert len(examples) >= 10


# ---- the built site --------------------------------------------------------------------------------------------------
class Loaded(HTMLParser):
    """What a browser loads for a page without being asked, and what it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.images_without_text: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("img", "script", "iframe", "source", "video", "audio"):
            self.loads += [given[name] for name in ("src", "srcset") if given.get(name)]
        if tag == "img" and not given.get("alt"):
            self.images_without_text.append(given.get("src", ""))
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "modulepreload", "preconnect"):
            self.loads.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="the tools of the documentation are not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    source = str(Path(neutralize.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "NO_MKDOCS_2_WARNING": "1"}
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert not [target for target in loaded.loads if re.match(r"(https?:)?//", target)], page
        assert not loaded.images_without_text, page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@needs_browser
def test_the_search_works_from_a_disk(site, tmp_path):
    options = [*OPTIONS, f"--user-data-dir={tmp_path}", "--virtual-time-budget=8000", "--dump-dom"]
    page = f"{(site / 'index.html').as_uri()}?q=identity"
    shown = subprocess.run([BROWSER, *options, page], capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search(r"[1-9]\d* matching documents", shown)


def test_formulas_are_drawn_by_the_browser(site):
    text = (site / "mathematics.html").read_text(encoding="utf-8")
    assert text.count("<math") > 100
    assert "arithmatex" not in text


def test_the_reference_has_every_public_name_and_command(site):
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    for name in neutralize.__all__:
        public = getattr(neutralize, name)
        if name not in ("STRATEGIES", "ops"):  # what is in them has entries of its own
            places = {f"neutralize.{name}", f"{public.__module__}.{name}"}
            assert any(f'<h2 id="{place}"' in reference for place in places), name
    for strategy in neutralize.STRATEGIES.values():
        assert f'id="neutralize.strategies.{strategy.__name__}"' in reference
    for entry in cli.app.registered_commands:
        assert f"neutralize {entry.name or entry.callback.__name__}</" in reference.replace(
            '<a class="headerlink"', "</"
        )


def test_the_figures_are_what_the_script_draws(tmp_path):
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("figures", DOCS / "figures.py")
    figures = module_from_spec(spec)
    spec.loader.exec_module(figures)
    drawn = {f"{draw.__name__}.svg" for draw in figures.FIGURES}
    assert drawn == {path.name for path in (DOCS / "figures").glob("*.svg")}
    text = (DOCS / "mathematics.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(figures/([\w.]+)\)", text)) == drawn
