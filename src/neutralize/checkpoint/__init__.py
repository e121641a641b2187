"""Checkpoints: the same plan on files, in place and with undo, or to a new folder.

A path is located and the places of its tensors are read (``locate``, ``safetensors``, ``gguf``, ``pickled``,
``distributed``); a plan's edits of parameters become edits of stored tensors (``naming``, ``model``), these become
patches of regions of files (``layout``, ``quantized``, ``blocks``, ``patch``), and patches are carried out under a
journal (``journal``) or on a copy (``output``). ``Files`` in ``region`` is the one place that writes.
"""

from neutralize.checkpoint.handle import Checkpoint, FileUndo, Status

__all__ = ["Checkpoint", "FileUndo", "Status"]
