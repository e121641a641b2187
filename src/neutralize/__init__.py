"""Switch layers of very large PyTorch models off in place, prove how exactly they are off, and put every bit back."""

from neutralize import ops

__all__ = ["ops"]
