"""Checkpoints: the same plan on files, in place and with undo, or to a new folder."""
