"""Causal language models: loading one, cutting text into windows, and the loss of the next token."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from neutralize.errors import NeutralizeError
from neutralize.plan import dtype_name
from neutralize.progress import Advance, silent
from neutralize.side_by_side import side_by_side


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model and its tokenizer.

    Attributes:
        model: in evaluation mode.
        tokenizer: of transformers.
        title: what it is, in words.
    """

    model: nn.Module
    tokenizer: Any
    title: str

    def tokens(self, text: str) -> torch.Tensor:
        """Return the token ids (n,), int64, of a text."""
        return tokenized(text, self.tokenizer)


def load_language_model(
    source: str | PathLike[str],
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
) -> LanguageModel:
    """Load a causal language model and its tokenizer with transformers.

    Args:
        source: a folder, a GGUF file, or a name that the Hugging Face hub or its local cache knows.
        dtype: of the weights; ``"auto"`` is that of the files, other names are those of torch.
        device: where the model goes.

    Raises:
        NeutralizeError: transformers is not installed, or cannot load this.
    """
    place, path = {"pretrained_model_name_or_path": str(source)}, Path(source)
    is_gguf = os.path.isfile(source) and path.suffix.lower() == ".gguf"
    if is_gguf:
        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    local = is_gguf or path.is_dir()
    with loading(source, "a folder, a GGUF file or a hub name of a causal language model", (".gguf",)):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(**place, local_files_only=local)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(**place, local_files_only=local, dtype=dtype)
    model = model.to(device).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    name = path.stem if is_gguf else str(source)
    stored = dtype_name(next(model.parameters()).dtype)
    title = f"{name}: {type(model).__name__}, {stored}, {count / 1e6:.1f} M parameters"
    return LanguageModel(model, tokenizer, title)


@contextlib.contextmanager
def loading(source: str | PathLike[str], expected: str, files: tuple[str, ...] = ()) -> Iterator[None]:
    """Make one clear error of what transformers says of a name, or of its absence; keep its lines off the screen.

    Args:
        source: what was given.
        expected: what could have been, in words.
        files: endings of files that can be loaded.
    """
    if importlib.util.find_spec("transformers") is None:
        raise NeutralizeError(
            "language model: expected the package transformers, got none; run: pip install 'neutralize[hf]'"
        )
    # Unlike Path.is_file, no error for a name that no file can have.
    if os.path.isfile(source) and not str(source).lower().endswith(files):
        raise NeutralizeError(
            f"language model: expected {expected}, got {str(source)!r}, another file; name a folder, "
            "or load it and call the function of Python"
        )
    with quiet_transformers():
        try:
            yield
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as error:
            remedy = "pip install 'neutralize[hf]'" if isinstance(error, ImportError) else "check the name"
            summary = next(iter(str(error).strip().splitlines()), "")
            raise NeutralizeError(
                f"language model: expected {expected}, got {str(source)!r}, "
                f"which does not load ({type(error).__name__}: {summary}); {remedy}"
            ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' log lines and progress bars off the screen; errors still raise."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # The bar of the GGUF reader is plain tqdm, which no switch of transformers reaches; tqdm writes to stderr.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def tokenized(text: str, tokenizer: Any) -> torch.Tensor:
    """Return the token ids (n,), int64, that a tokenizer of transformers gives a text of any length."""
    if not callable(tokenizer):
        raise NeutralizeError(
            f"influence: expected a tokenizer of transformers, got {type(tokenizer).__name__}; give what "
            "AutoTokenizer.from_pretrained returns"
        )
    # A text longer than the context is no problem, for it is cut into windows: verbose would warn of it.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def cut(tokens: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Cut a text into windows that do not overlap.

    Args:
        tokens: (n,), int64.
        length: tokens per window.

    Returns:
        Windows (1, length); the last one may be shorter, and is left out if it is a single token, predicting nothing.
    """
    return [window[None] for window in tokens.split(length) if window.numel() > 1]


def next_token_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy in nats of every token but the first, given those before it.

    Args:
        logits: (batch, n, vocabulary), floating point, of which the last position predicts nothing known.
        tokens: (batch, n), integers.

    Returns:
        (batch, n - 1), float32, or float64 for such logits.
    """
    scores = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    wanted = tokens[:, 1:].to(scores.device)
    return functional.cross_entropy(scores.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)


def mean_loss(model: nn.Module, windows: Sequence[torch.Tensor], advance: Advance = silent) -> float:
    """Return the cross-entropy in nats, averaged over all predicted tokens: those of every window but its first.

    Args:
        model: a causal language model.
        windows: (1, length) each, int64.
        advance: told the tokens done.
    """

    def lost(window: torch.Tensor) -> float:
        return float(next_token_losses(_logits(model, window), window).double().sum())

    total = 0.0
    for window, loss in zip(windows, side_by_side(lost, windows), strict=True):
        total += loss
        advance(window.numel())
    return total / sum(window.numel() - 1 for window in windows)


def all_logits(model: nn.Module, windows: Sequence[torch.Tensor], advance: Advance = silent) -> list[torch.Tensor]:
    """Return the scores (1, length, vocabulary) of the next token at every position of each window.

    Args:
        model: a causal language model.
        windows: (1, length) each, int64.
        advance: told the tokens done.
    """
    found = []
    for scores in side_by_side(lambda window: _logits(model, window), windows):
        found.append(scores)
        advance(scores.shape[1])
    return found


def _logits(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    scores: torch.Tensor = model(input_ids=window, use_cache=False).logits
    return scores
