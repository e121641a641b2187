"""What the tests of checkpoint readers share: a model with an edit of every kind, made live and made on files."""

from __future__ import annotations

import copy

import torch
from torch import nn

from neutralize.checkpoint.layout import Layout
from neutralize.checkpoint.region import Files
from neutralize.plan import Assign, Copy, Edit, Fold, Plan, Rewrite, dtype_name


class Every(nn.Module):
    """A layer of each form that edits know; rows are longer than a row sum has lanes."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(300, 7)
        self.second = nn.Linear(300, 6)
        self.square = nn.Linear(9, 9)
        self.block = nn.Linear(10, 12)
        self.half = nn.Linear(523, 5).to(torch.bfloat16)
        self.conv = nn.Conv2d(4, 6, 3)
        self.up = nn.ConvTranspose2d(6, 4, 3, groups=2)
        self.turned = nn.ParameterDict({"weight": torch.randn(13, 8), "bias": torch.randn(8)})  # (in, out), as GPT-2's
        self.norm = nn.LayerNorm(5)
        self.other = nn.LayerNorm(5)
        self.register_buffer("steps", torch.arange(4))
        with torch.no_grad():
            for parameter in (*self.norm.parameters(), *self.other.parameters()):
                parameter.copy_(torch.randn(5))


def every_edit(model: nn.Module) -> tuple[Edit, ...]:
    """Edits of every kind, of tensors that ``Every`` has."""
    tensors = model.state_dict()

    def of(name: str) -> dict:
        return {"parameter": name, "shape": tuple(tensors[name].shape), "dtype": dtype_name(tensors[name].dtype)}

    return (
        Fold(**of("first.weight"), bias="first.bias", scale=0.3, shift=1.7),
        Fold(**of("second.weight"), bias="second.bias", scale=0.3, shift=-1.7, columns=(101, 290)),
        Fold(**of("half.weight"), bias="half.bias", scale=2.5, shift=0.7),
        Fold(**of("conv.weight"), bias="conv.bias", scale=0.5, shift=0.3),
        Fold(**of("up.weight"), bias="up.bias", scale=0.5, shift=0.3, transposed=True, groups=2),
        Fold(**of("turned.weight"), bias="turned.bias", scale=0.5, shift=0.3, transposed=True, columns=(2, 12)),
        Rewrite(**of("square.weight"), scale=0.7, diagonal=1.5, fill=0.25),
        Rewrite(**of("square.bias"), scale=0.7),
        Rewrite(**of("block.weight"), rows=(1, 11), columns=(3, 9), diagonal=1.0, start=8, step=-1),
        Rewrite(**of("block.weight"), rows=(5, 12), scale=2.0, diagonal=0.5, start=1, step=2),
        Rewrite(**of("block.weight"), columns=(8, 10)),
        Rewrite(**of("conv.weight"), scale=2.0, diagonal=1.0, start=4, step=9),
        Copy(**of("norm.weight"), source="other.weight", scale=0.3),
        Assign(**of("other.weight"), values=(1.0, -2.5, 0.1, 0.0, 3e-5)),
        Rewrite(**of("other.bias")),
    )


def made_live(model: nn.Module, edits: tuple[Edit, ...]) -> dict[str, torch.Tensor]:
    """The tensors of an edited copy."""
    model = copy.deepcopy(model)
    Plan("by hand", edits, ()).apply(model)
    return model.state_dict()


def make_on_files(layout: Layout, edits: tuple[Edit, ...], **options) -> None:
    """Edit files in place."""
    with Files(layout.root, writable=True) as files:
        for patch in layout.patches(edits, files, **options):
            for _ in patch.run(files):
                pass


def same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether tensors have the same names, shapes, dtypes and bits."""

    def bits(tensor: torch.Tensor) -> bytes:
        return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return got.keys() == expected.keys() and all(
        got[name].shape == tensor.shape and got[name].dtype == tensor.dtype and bits(got[name]) == bits(tensor)
        for name, tensor in expected.items()
    )
