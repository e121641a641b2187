"""Parts of a layer that are no modules: attention heads, channels of an affine layer, experts in one fused parameter.

A selection names them by a word and an index or slice behind the module: ``"layers[3].attn.heads[2]"``,
``"layers[3].attn.kv_heads[0]"``, ``"conv1.channels[4:8]"``, ``"layers[3].mlp.experts[-1]"``. How many there are, only
the dataflow knows: an index is resolved when the part is planned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from neutralize.errors import NeutralizeError

KINDS = ("heads", "kv_heads", "channels", "experts")

_NAME = re.compile(rf"(?:(.*)\.)?({'|'.join(KINDS)})\[(-?\d{{1,9}})?(?:(:)(-?\d{{1,9}})?)?\]", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """A part as it was named.

    Attributes:
        owner: qualified name of the module that it is a part of.
        kind: one of ``KINDS``.
        start, stop: of a half-open range, counted as in a Python slice; one index is a range of one.
        text: the index or slice as it was written, for messages.
    """

    owner: str
    kind: str
    start: int | None
    stop: int | None
    text: str

    def among(self, layer: str, count: int) -> range:
        """The indices that are meant, of ``count``.

        Raises:
            NeutralizeError: there are none of them.
        """
        found = range(count)[slice(self.start, self.stop)]
        single = ":" not in self.text
        if single and self.start is not None and -count <= self.start < count:
            found = range(self.start % count, self.start % count + 1)
        elif single:
            found = range(0)
        if not found:
            raise NeutralizeError(
                f"select: expected {self.kind} from 0 to {count - 1} for {layer!r}, got [{self.text}]; it has {count}"
            )
        return found


def part_of(layer: str) -> Part | None:
    """The part that a layer's name stands for; ``None``: it is a name like any other."""
    found = _NAME.fullmatch(layer)
    if found is None or (found[3] is None and found[4] is None):
        return None
    owner, kind, first, colon, last = found.groups()
    start = None if first is None else int(first)
    stop = (None if last is None else int(last)) if colon else None
    return Part(owner or "", kind, start, stop, layer[layer.rindex("[") + 1 : -1])


def owner_of(part: Part, modules: Mapping[str, nn.Module]) -> str:
    """The module that a part belongs to: experts may be a module of that name, all in one."""
    inner = f"{part.owner}.{part.kind}" if part.owner else part.kind
    return inner if inner in modules else part.owner
