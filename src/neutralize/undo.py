"""Undo: the bytes that an application overwrote, and how to put them back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from neutralize.errors import NeutralizeError


@dataclass(frozen=True)
class Saved:
    """A copy of what was overwritten in one tensor.

    Attributes:
        name: qualified name of the parameter or buffer.
        tensor: the live tensor.
        block: gives the written part of the tensor as a view.
        values: a copy of that part, same dtype and device.
        requires_grad: the flag of the tensor before the application.
    """

    name: str
    tensor: torch.Tensor
    block: Callable[[torch.Tensor], torch.Tensor]
    values: torch.Tensor
    requires_grad: bool


class Undo:
    """Puts back every bit that an application of a plan overwrote, and the ``requires_grad`` flags.

    Several applications unwind in reverse order. A second call of ``restore`` does nothing.
    """

    def __init__(self, saved: list[Saved], digest: str) -> None:
        """Take the copies, in the order in which they were made.

        Args:
            saved: one entry per overwritten block.
            digest: digest of the plan that was applied.
        """
        self._saved = saved
        self.digest = digest

    @property
    def restored(self) -> bool:
        """Whether nothing is left to put back."""
        return not self._saved

    @property
    def held_bytes(self) -> int:
        """How many bytes of memory the copies take."""
        return sum(entry.values.numel() * entry.values.element_size() for entry in self._saved)

    def restore(self) -> None:
        """Put back every bit and every ``requires_grad`` flag; afterwards the copies are released.

        Raises:
            NeutralizeError: the dtype of a tensor was changed in the meantime; nothing was put back.
        """
        for entry in self._saved:
            if entry.tensor.dtype != entry.values.dtype:
                raise NeutralizeError(
                    f"restore: expected dtype {entry.values.dtype} for {entry.name!r}, got {entry.tensor.dtype}; "
                    "convert the model back before restoring"
                )
        with torch.no_grad():
            for entry in reversed(self._saved):
                entry.block(entry.tensor).copy_(entry.values)
                if entry.tensor.is_leaf:
                    entry.tensor.requires_grad_(entry.requires_grad)
        self._saved = []

    def __repr__(self) -> str:
        """Say what is held."""
        if self.restored:
            return "Undo(restored)"
        return f"Undo({len(self._saved)} tensors, {self.held_bytes} bytes, plan {self.digest[:12]})"
