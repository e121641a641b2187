"""The bits of tensors and models: whether two are the same, and a fingerprint of all of them."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from neutralize.distributed.part import plain
from neutralize.progress import Advance, silent


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits: stricter than equal numbers, for it tells -0 from 0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bytes(one), _bytes(other))


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
        content = _bytes(plain(tensor.detach())).cpu()
        digest.update(content.numpy().data)
        advance(content.numel())
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
