"""The bits of tensors and models: whether two are the same, and a fingerprint of all of them."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from neutralize.distributed.part import plain
from neutralize.progress import Advance, silent

Taken = TypeVar("Taken")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits: stricter than equal numbers, for it tells -0 from 0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def with_bytes(tensor: torch.Tensor, take: Callable[[memoryview], Taken]) -> Taken:
    """Let a function have the bytes of a tensor on the CPU, row by row, without a copy: torch does so by NumPy alone.

    Args:
        tensor: of any dtype and shape.
        take: called with them; they are its own only while it runs. What it returns is returned.
    """
    content = _bytes(tensor)
    count = content.numel()  # an empty tensor may have no address
    return take(memoryview((ctypes.c_char * count).from_address(content.data_ptr()) if count else b""))


def fingerprint(model: nn.Module, advance: Advance = silent) -> str:
    """Return the SHA-256 of the name, dtype, shape and every bit of all parameters and buffers, as hexadecimal text.

    Of a sharded model these are the bits that the process holds.

    Args:
        model: a model on any device.
        advance: told the bytes done.
    """
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        content = plain(tensor.detach()).cpu()
        with_bytes(content, digest.update)
        advance(content.nbytes)
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
