"""Small networks for the tests, and the excised network written by hand for each: no code of the library in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def perturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and running statistic off its initial value, so that nothing is trivially 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model.eval()


class Mlp(nn.Module):
    """Linear, φ, Linear, φ, Linear; the activation is a function call in ``forward``."""

    def __init__(self, activation, width: int = 16, bias: bool = True):
        super().__init__()
        self.first = nn.Linear(8, width, bias=bias)
        self.middle = nn.Linear(width, width, bias=bias)
        self.last = nn.Linear(width, 4, bias=bias)
        self.activation = activation

    def forward(self, x):
        return self.last(self.activation(self.middle(self.activation(self.first(x)))))

    def without_middle(self, x):
        """The network with the middle layer and its activation cut out."""
        return self.last(self.activation(self.first(x)))


class PreNorm(nn.Module):
    """x + W₂ φ(W₁ LN(x))."""

    def __init__(self, width: int = 8, scale: float = 1.0):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = scale

    def forward(self, x):
        return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))


class OneRms(nn.Module):
    """RMS norm that multiplies by 1 + w, in float32, as Gemma's does."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).to(x.dtype)


class GatedBlock(nn.Module):
    """A bias-free block of attention and gated MLP with (1 + w) norms, several heads and grouped keys."""

    def __init__(self, width: int = 16, heads: int = 4, groups: int = 2):
        super().__init__()
        head = width // heads
        self.heads, self.groups, self.head = heads, groups, head
        self.entry, self.middle = OneRms(width), OneRms(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, groups * head, bias=False)
        self.v = nn.Linear(width, groups * head, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 24, bias=False), nn.Linear(width, 24, bias=False)
        self.down = nn.Linear(24, width, bias=False)

    def forward(self, x):
        batch, length, width = x.shape
        y = self.entry(x)
        q = self.q(y).view(batch, length, self.heads, self.head).transpose(1, 2)
        k = self.k(y).view(batch, length, self.groups, self.head).transpose(1, 2)
        v = self.v(y).view(batch, length, self.groups, self.head).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, width))
        y = self.middle(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LayerScale(nn.Module):
    """x + dropout(γ · W LN(x))."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.norm, self.lin, self.gamma = nn.LayerNorm(width), nn.Linear(width, width), nn.Parameter(torch.ones(width))
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(self.gamma * self.lin(self.norm(x)))


class Gated(nn.Module):
    """α x + β W LN(x), α and β functions of one gate: α² = (1 - β) (1 + β)."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.norm, self.lin, self.gate = nn.LayerNorm(width), nn.Linear(width, width), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        gate = self.gate / 1.5
        beta = torch.sigmoid(gate)
        alpha = torch.sqrt(torch.clamp(torch.sigmoid(-gate) * (1.0 + beta), min=1e-3))
        return alpha * x + beta * self.lin(self.norm(x))


class Bottleneck(nn.Module):
    """relu(x + BN(conv(relu(BN(conv(x)))))), in place where it can be, with squeeze-excitation."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.squeeze = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y = y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))
        y += x
        return self.relu(y)


class Shifted(nn.Module):
    """A window block: roll, partition, mix, undo; the skip is flattened and unflattened."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.norm, self.lin = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        batch, height, width, features = x.shape
        y = torch.roll(self.norm(x), (1, 1), (1, 2)).view(batch, height // 2, 2, width // 2, 2, features)
        y = self.lin(y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, features))
        y = y.view(batch, height // 2, width // 2, 2, 2, features).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        return x.flatten(1, 2).unflatten(1, (height, width)) + torch.roll(y, (-1, -1), (1, 2))


class Dictionary(nn.Module):
    """A block that is called by keyword and returns its state in a tuple with other things."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.norm, self.lin = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, *, mask=None, hidden):
        return hidden + self.lin(self.norm(hidden)) * mask, None, {"about": 1}


class KeywordNet(nn.Module):
    """A stack of ``Dictionary`` blocks."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Dictionary() for _ in range(3)), nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(hidden=x, mask=1.0)[0]
        return self.head(x)


class Experts(nn.Module):
    """x + Σ over the chosen experts, in a fused 3-D parameter, plus a shared expert; the router stays."""

    def __init__(self, width: int = 8, experts: int = 4):
        super().__init__()
        self.norm, self.router = nn.RMSNorm(width), nn.Linear(width, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, width, 12))
        self.w2 = nn.Parameter(torch.randn(experts, 12, width))
        self.shared = nn.Sequential(nn.Linear(width, 12, bias=False), nn.SiLU(), nn.Linear(12, width, bias=False))

    def forward(self, x):
        y = self.norm(x)
        weight, choice = self.router(y).softmax(-1).topk(2)
        every = torch.einsum("btd,edh->bteh", y, self.w1)
        every = torch.einsum("bteh,ehd->bted", F.silu(every), self.w2)
        chosen = every.gather(2, choice.unsqueeze(-1).expand(*choice.shape, y.shape[-1]))
        return x + (chosen * weight.unsqueeze(-1)).sum(2) + self.shared(y)


class ExpertList(nn.Module):
    """x + Σ over the chosen experts of a ModuleList, each on its own tokens: how many these are, the data say."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.router = nn.Linear(d, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(x).flatten(0, -2)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        mixed = torch.zeros_like(tokens)
        for place, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == place)
            mixed.index_add_(0, token, expert(tokens[token]) * weights[token, slot, None])
        return x + mixed.view_as(x)


class Halves(nn.Module):
    """Two streams, each with a branch that reads the other: reversible networks."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(d // 2, d // 2), nn.Linear(d // 2, d // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = x.chunk(2, -1)
        one = one + torch.relu(self.first(other))
        return torch.cat([one, other + torch.relu(self.second(one))], -1)


class Cropping(nn.Module):
    """A skip that crops, strides or pads: what is left of the input when the branch is null is no whole of it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        channels, options = {"crop": (8, {}), "pad": (12, {"padding": 1}), "stride": (12, {"padding": 1, "stride": 2})}[
            kind
        ]
        self.branch = nn.Conv2d(8, channels, 3, **options)

    def skip(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "crop":
            return x[:, :, 1:-1, 1:-1]
        x = x[:, :, ::2, ::2] if self.kind == "stride" else x
        return nn.functional.pad(x, (0, 0, 0, 0, 1, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.skip(x) + torch.relu(self.branch(x))


class RecurrentBranch(nn.Module):
    """x + GRU(LN(x))."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(d), nn.GRU(d, d, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mixer(self.norm(x))[0]


class DataDependent(nn.Module):
    """A model whose control flow depends on its data: it cannot be exported."""

    def __init__(self):
        super().__init__()
        self.block, self.head = PreNorm(), nn.Linear(8, 4)

    def forward(self, x):
        x = self.block(x)
        if x.sum().item() > 0:
            x = x * 2
        return self.head(x)


class Routed(nn.Module):
    """x + the output of each token's expert, from a list, with biases; an expert that gets no token is called too."""

    def __init__(self, width: int = 8, experts: int = 4):
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x):
        choice, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            rows = torch.where(choice == place)[0]
            y = y.index_add(0, rows, expert(x[rows]))
        return x + y


class Flipped(nn.Module):
    """A skip that is not the identity: no parameters can make this block hand its input on by nulling a branch."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.lin = nn.Linear(width, width)

    def forward(self, x):
        return x.flip(-1) + self.lin(x)


def small_llama(**changes):
    """A Llama of transformers, 32 features wide, the same in every call with the same changes to its config."""
    import transformers

    torch.manual_seed(0)
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **changes})).eval()
