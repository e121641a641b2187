"""Checkpoints: the same plan on files, in place and with undo, or to a new folder.

A path is located and the places of its tensors are read (``locate``, ``headers``, ``safetensors``, ``gguf``,
``pickled``, ``distributed``); a plan's edits of parameters become edits of stored tensors (``naming``, ``model``),
these become patches of regions of files (``layout``, ``quantized``, ``blocks``, ``patch``), and patches are carried out
under a journal (``journal``) or on a copy (``output``). ``Files`` in ``region`` is the one place that writes.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neutralize.checkpoint.handle import Checkpoint, FileUndo, Status

__all__ = ["Checkpoint", "FileUndo", "Status"]


def __getattr__(name: str) -> Any:
    """The classes, which need PyTorch; to read a header does not."""
    if name in __all__:
        from neutralize.checkpoint import handle

        return getattr(handle, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
