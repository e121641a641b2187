"""What the tests of plans share: small models, everything that a model is, bit for bit, and the form of an error."""

import random
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import neutralize as nz


class Block(nn.Module):
    """x + W₂ φ(W₁ LN(x)): the four smallest parameters that null its branch are two gains, two biases."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class Stack(nn.Module):
    """Linear, blocks, linear."""

    def __init__(self, depth: int = 4, width: int = 8):
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Plain(nn.Module):
    """Linear layers around a batch norm and a dropout: what a run would change in a training model."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.middle = nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.middle(self.dropout(self.norm(self.first(x))))))


class Counting(Plain):
    """As Plain, but what it computes depends on data, it counts its calls, and writes into its input."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        self.latest = self.calls * 2
        x.mul_(2)
        return super().forward(x) if x.sum().item() > 0 else super().forward(x + 1)


class Bag(nn.Module):
    """Named tensors and nothing else: parameters, and as buffers what is no parameter."""

    def __init__(self, **tensors: Tensor):
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Every bit pattern there is: NaN of every payload, both zeros, both infinities, subnormals."""
    generator = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel()
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def weights(model: nn.Module) -> dict[str, tuple[bytes, bool]]:
    """Every bit of the model, and its requires_grad flags."""
    return {name: (bits(tensor), tensor.requires_grad) for name, tensor in tensors(model).items() if not tensor.is_meta}


def everything(model: nn.Module) -> dict[str, object]:
    """All that a call which only looks must leave alone."""
    return {
        "bits": weights(model),
        "tensors": {name: (id(tensor), tensor.is_meta) for name, tensor in tensors(model).items()},
        "versions": {name: tensor._version for name, tensor in tensors(model).items()},
        "grads": {name: parameter.grad for name, parameter in model.named_parameters()},
        "modules": {
            name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module)))
            for name, module in model.named_modules()
        },
        "random": (torch.get_rng_state().numpy().tobytes(), random.getstate()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def refusal(call: Callable[[], object]) -> str:
    """The message of the one NeutralizeError that a call raises, once its form is checked."""
    with pytest.raises(nz.NeutralizeError) as caught:
        call()
    text = str(caught.value)
    head, *problems = text.split("\n  - ")
    for part in problems or [head]:
        assert re.fullmatch(r"(\S[^;]*?: )?expected [^\n]+, got [^\n]+; [^\n]+", part), part
    if problems:
        assert re.fullmatch(r"\w+: expected [^\n]+, got \d+ [^\n]+:", head), head
    return text
