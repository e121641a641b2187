"""Quantized weights in safetensors checkpoints: several stored tensors that together are one weight.

``formats`` says what belongs together and how, ``weight`` what can be done to it (make it exactly zero, by what the
format decodes to zero, or multiply it, by its scales), and ``decode`` what it stands for.
"""

from neutralize.checkpoint.quantized.formats import attach

__all__ = ["attach"]
