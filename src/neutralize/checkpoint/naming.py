"""Naming: which tensors of a checkpoint a model's parameters come from, and edits of the one as edits of the other.

A loader may rename tensors, stack the experts of a list into one parameter, split a fused projection, transpose,
permute rows, or add one to the gain of a norm; an edit of the parameter is turned into edits of what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from neutralize.plan import Edit


@dataclass(frozen=True)
class Source:
    """A box of a stored tensor, and where a loader puts it in a parameter: ``parameter = stored + offset`` there.

    Attributes:
        stored: name of the stored tensor.
        box: half-open range of each of its dimensions.
        order: for each dimension of the parameter the dimension of the stored tensor that it comes from; ``None``: a
            new
            dimension of size 1, as when experts are stacked.
        origin: place of the box's first element in the parameter.
        offset: what the loader adds: 1 for the norms of Gemma in GGUF files is -1 here, which stores 1 + w.
        is_shuffled: the elements lie in an order of their own (rows permuted for rotary embeddings): only constants can
            be written through it.
    """

    stored: str
    box: tuple[tuple[int, int], ...]
    order: tuple[int | None, ...]
    origin: tuple[int, ...]
    offset: float = 0.0
    is_shuffled: bool = False


Names: TypeAlias = Mapping[str, tuple[Source, ...]]
"""For each parameter of a model, the boxes that cover it."""


def retarget(edits: Sequence[Edit], names: Names) -> list[Edit]:
    """Return edits of parameters as edits of stored tensors."""
    raise NotImplementedError
