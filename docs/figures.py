"""Draw the figures of the mathematics: `python docs/figures.py` writes docs/figures/*.svg; `make figures` calls it.

Every curve is computed here, with the library where it is the library's own behaviour that is shown.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import nn
from torch.nn import functional

import neutralize as nz

INK, MUTED, OURS, WARM, COOL = "#263238", "#90a4ae", "#00796b", "#d84315", "#1565c0"
STYLE = {
    "svg.hashsalt": "neutralize",  # the same drawing gives the same file
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


# ---- diagrams --------------------------------------------------------------------------------------------------------
def _box(
    axes: Axes, x: float, y: float, text: str, *, colour: str = INK, width: float = 1.5, off: bool = False
) -> None:
    patch = FancyBboxPatch(
        (x - width / 2, y - 0.3),
        width,
        0.6,
        boxstyle="round,pad=0.02,rounding_size=0.12",
        facecolor="#eceff1" if off else "white",
        edgecolor=colour,
        linestyle="--" if off else "-",
    )
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", color=MUTED if off else colour)


def _arrow(axes: Axes, *points: tuple[float, float], colour: str = INK, style: str = "-|>", width: float = 1.2) -> None:
    for start, end in pairwise(points):
        last = end == points[-1]
        arrow = FancyArrowPatch(
            start,
            end,
            arrowstyle=style if last else "-",
            mutation_scale=9,
            color=colour,
            linewidth=width,
            shrinkA=0,
            shrinkB=0,
        )
        axes.add_patch(arrow)


def _canvas(axes: Axes, width: float, low: float, high: float) -> None:
    axes.set_xlim(0, width)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.axis("off")


def residual() -> Figure:
    """A pre-norm block: as it is, cut out, and off by its norm's gain."""
    figure = Figure(figsize=(8.2, 1.9))
    titles = ("the block", "cut out of the forward pass (the oracle)", "off by weights: γ = 0")
    for place, (axes, title) in enumerate(zip(figure.subplots(1, 3), titles, strict=True)):
        _canvas(axes, 5.4, -0.9, 1.7)
        axes.set_title(title)
        cut, off = place == 1, place == 2
        _arrow(axes, (0.0, 0.0), (5.4, 0.0), colour=OURS if place else INK, width=2.2 if place else 1.2)
        axes.text(0.05, -0.35, "x", va="center")
        axes.text(4.6, -0.5, "y = x" if place else "y = x + f(x)", va="center", ha="center")
        if not cut:
            grey = MUTED if off else INK
            _arrow(axes, (0.5, 0.0), (0.5, 1.2), (0.8, 1.2), colour=INK)
            _box(axes, 1.6, 1.2, "norm, γ=0" if off else "norm, γ", width=1.6, colour=WARM if off else INK)
            _arrow(axes, (2.42, 1.2), (2.85, 1.2), colour=grey)
            _box(axes, 3.35, 1.2, "f", colour=INK, width=0.9)
            _arrow(axes, (3.82, 1.2), (4.3, 1.2), (4.3, 0.2), colour=grey)
            axes.text(4.45, 0.7, "0" if off else "f(x)", color=WARM if off else INK)
            axes.text(
                4.3, 0.0, "+", ha="center", va="center", bbox={"boxstyle": "circle,pad=0.15", "fc": "white", "ec": INK}
            )
    return figure


def fold() -> Figure:
    """A post-norm block: where the gains and biases go."""
    figure = Figure(figsize=(8.2, 3.1))
    rows = (
        ("before", ("γ₀, β₀", "γ₁, β₁", "γ₂, β₂"), False),
        ("after the fold", ("k, 0", "k, 0", "γ₀, β₀"), True),
    )
    for axes, (title, gains, off) in zip(figure.subplots(2, 1), rows, strict=True):
        _canvas(axes, 15.0, -0.8, 1.7)
        axes.set_title(title, loc="left", pad=2)
        _arrow(axes, (0.0, 0.0), (15.0, 0.0), colour=OURS if off else INK, width=2.0 if off else 1.2)
        for x, name, gain in zip((1.6, 7.2, 12.8), ("LN₀", "LN₁", "LN₂"), gains, strict=True):
            moved = off and name != "LN₁"
            _box(axes, x, 0.0, f"{name}   {gain}", width=2.3, colour=WARM if moved else INK)
        for x, name in ((3.6, "attention"), (9.0, "MLP")):
            _arrow(axes, (x - 0.55, 0.0), (x - 0.55, 1.1), (x - 0.1, 1.1), colour=INK)
            _box(axes, x + 0.75, 1.1, name, colour=INK, off=off, width=1.6)
            _arrow(axes, (x + 1.55, 1.1), (x + 2.0, 1.1), (x + 2.0, 0.05), colour=MUTED if off else INK)
            axes.text(
                x + 2.0,
                0.0,
                "+",
                ha="center",
                va="center",
                bbox={"boxstyle": "circle,pad=0.12", "fc": "white", "ec": INK},
            )
            if off:
                axes.text(x + 2.15, 0.65, "0", color=WARM)
        if off:
            for x, text in ((3.0, "k n"), (8.6, "k n"), (14.5, "x")):
                axes.text(x, -0.42, text, ha="center", color=OURS)
        else:
            axes.text(3.0, -0.42, "x", ha="center")
    return figure


# ---- what the fills do -----------------------------------------------------------------------------------------------
def fills() -> Figure:
    """One layer's weight under three strategies, and the outputs for two inputs."""
    torch.manual_seed(3)
    figure = Figure(figsize=(8.2, 3.6))
    axes = figure.subplots(2, 4, height_ratios=(3, 1.6))
    x = torch.randn(8, generator=torch.Generator().manual_seed(1))
    # read by a plain layer, so that a pass-through has somewhere to undo its scale
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    settings = (("as trained", None), ("constant", {}), ("zero", {"sides": "in"}), ("passthrough", {}))
    for column, (strategy, options) in enumerate(settings):
        if options is None:
            weight, out = model[0].weight.detach().clone(), model[:2](x).detach()
        else:
            plan = nz.plan(model, "0", strategy, example_inputs=x[None], **options)
            with plan.applied(model):
                weight, out = model[0].weight.detach().clone(), model[:2](x).detach()
        top, bottom = axes[0, column], axes[1, column]
        limit = float(weight.abs().max()) or 1.0
        top.imshow(weight, cmap="RdBu_r", vmin=-limit, vmax=limit)
        top.set_title(f"{strategy}\nlargest |w| = {float(weight.abs().max()):.3g}")
        top.set_xticks([])
        top.set_yticks([])
        bottom.axhline(0, color=MUTED, linewidth=0.6)
        scaled = out / float(out.abs().max()) if strategy == "passthrough" else out
        bottom.bar(range(8), scaled, color=OURS if strategy == "passthrough" else COOL, width=0.7)
        bottom.plot(range(8), x / float(x.abs().max()), "o", color=INK, markersize=3)
        bottom.set_ylim(-1.1, 1.1)
        bottom.set_xticks([])
        bottom.set_yticks([])
        bottom.set_xlabel("output × 1/ε" if strategy == "passthrough" else "output")
    return figure


# ---- linear regimes --------------------------------------------------------------------------------------------------
def regimes() -> Figure:
    """Six activations with their operating points."""
    cases: tuple[tuple[str, Callable[[torch.Tensor], torch.Tensor], float, float, float, str], ...] = (
        ("tanh: a = 0", torch.tanh, 0.0, 1.0, 0.5, "error ε²X³/3"),
        ("GELU: a = 0, slope ½", functional.gelu, 0.0, 0.5, 0.35, "error 0.8 εX²"),
        ("sigmoid: a = 0, slope ¼", torch.sigmoid, 0.0, 0.25, 0.8, "error ε²X³/12 and a floor"),
        ("ReLU: a ≥ X", torch.relu, 2.0, 1.0, 1.8, "exact, but for rounding"),
        ("ReLU6: a = 3", functional.relu6, 3.0, 1.0, 2.9, "exact, but for rounding"),
        ("softplus: a ≫ X", functional.softplus, 4.5, 1.0, 1.5, "error exp(-(a - X))"),
    )
    figure = Figure(figsize=(8.2, 4.4))
    for axes, (title, function, point, slope, reach, error) in zip(figure.subplots(2, 3).flat, cases, strict=True):
        z = torch.linspace(-3.2, 7.0, 400, dtype=torch.float64)
        value = float(function(torch.tensor(point, dtype=torch.float64)))
        axes.axvspan(point - reach, point + reach, color=OURS, alpha=0.12, linewidth=0)
        axes.plot(z, function(z), color=INK)
        near = torch.linspace(point - 1.6 * reach, point + 1.6 * reach, 2, dtype=torch.float64)
        axes.plot(near, value + slope * (near - point), color=OURS, linewidth=2.4, alpha=0.8)
        axes.plot([point], [value], "o", color=WARM, markersize=4.5)
        axes.set_title(title)
        axes.text(0.03, 0.9, error, transform=axes.transAxes, fontsize=8, color=INK)
        low, high = float(function(z).min()), float(function(z).max())
        axes.set_ylim(low - 0.15 * (high - low), high + 0.25 * (high - low))
    return figure


def epsilon() -> Figure:
    """Total error against ε: measured, and the two terms of the bound."""
    figure = Figure(figsize=(8.2, 3.2))
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(200_000, generator=generator, dtype=torch.float64) * 2 - 1) * 1.0
    powers = torch.arange(-24, 1, dtype=torch.float64)
    unit = 2.0**-24
    cases = (
        ("tanh, float32", torch.tanh, 1.0, 0.0, 1 / 3, 0.0),
        ("sigmoid, float32", torch.sigmoid, 0.25, 0.5, 1 / 12, 2.0),
    )
    for axes, (title, function, slope, value, cubic, floor) in zip(
        figure.subplots(1, 2, sharey=True), cases, strict=True
    ):
        measured = []
        for power in powers:
            eps = 2.0 ** float(power)
            handed = function(x.float() * eps).double()
            measured.append(float(((handed - value) / (eps * slope) - x.float().double()).abs().max()))
        grid = 2.0**powers
        axes.loglog(grid, cubic * grid**2, color=COOL, linestyle="--", linewidth=1, label="not linear: cubic term")
        if floor:
            axes.loglog(grid, floor * unit / grid, color=WARM, linestyle="--", linewidth=1, label="rounding: 2u/ε")
            best = (12 * unit) ** (1 / 3)
            axes.axvline(best, color=MUTED, linewidth=0.8)
            axes.text(best * 1.3, 2e-8, "ε* = (12u)^⅓", color=INK)
        axes.loglog(grid, measured, "o-", color=INK, markersize=3, linewidth=0.8, label="measured, X = 1")
        axes.axhline(unit, color=MUTED, linestyle=":", linewidth=0.9)
        axes.text(grid[0], unit * 1.3, "u", color=INK)
        axes.set_title(title)
        axes.set_xlabel("ε")
        axes.set_ylim(5e-9, 2)
        axes.legend(loc="upper right" if floor else "upper left", fontsize=8)
    figure.axes[0].set_ylabel("largest error, relative to X")
    return figure


def pair() -> Figure:
    """φ(x) - φ(-x) = x."""
    figure = Figure(figsize=(8.2, 2.7))
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    cases: tuple[tuple[str, Callable[[torch.Tensor], torch.Tensor]], ...] = (
        ("ReLU", torch.relu),
        ("GELU", functional.gelu),
        ("softplus", functional.softplus),
    )
    for axes, (title, function) in zip(figure.subplots(1, 3), cases, strict=True):
        axes.plot(x, function(x), color=COOL, label="φ(x)")
        axes.plot(x, -function(-x), color=WARM, label="-φ(-x)")
        axes.plot(x, function(x) - function(-x), color=OURS, linewidth=2.4, alpha=0.8, label="sum = x")
        axes.set_title(title)
        axes.legend(fontsize=8)
    return figure


# ---- post-norm, gates, gradients -------------------------------------------------------------------------------------
def multiples() -> Figure:
    """The error of one norm that reads k times a normalised vector, against k."""
    figure = Figure(figsize=(8.2, 2.9))
    axes = figure.subplots(1, 1)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(64, 768, generator=generator, dtype=torch.float64)
    powers = torch.linspace(-40, 0, 41, dtype=torch.float64)
    for colour, eps in ((COOL, 1e-12), (WARM, 1e-5)):
        n = functional.layer_norm(v, (768,), eps=eps)
        errors = []
        for power in powers:
            k = 2.0 ** float(power)
            got = functional.layer_norm(k * n, (768,), eps=eps)
            # what a linear norm would give for values of variance 1; for k = 1 the norm that a plain reset leaves
            wanted = n * (k / math.sqrt(eps) if k * k < eps else k / math.sqrt(k * k + eps))
            errors.append(float(((got - wanted).abs().max() / wanted.abs().max()).clamp_min(1e-17)))
        axes.loglog(2.0**powers, errors, "o-", markersize=3, linewidth=0.8, color=colour, label=f"ε = {eps:g}")
        axes.axvline(math.sqrt(eps), color=colour, linewidth=0.8, linestyle=":")
    axes.set_xlabel("k, the multiple that the norm reads (dotted: √ε)")
    axes.set_ylabel("relative error")
    axes.legend(fontsize=8)
    return figure


def gates() -> Figure:
    """The error of an LSTM that hands its input on, against ε, for three gate biases."""
    figure = Figure(figsize=(8.2, 2.9))
    axes = figure.subplots(1, 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 12, 8, generator=generator, dtype=torch.float64) * 2 - 1
    powers = torch.arange(-20, 0, dtype=torch.float64)
    for colour, bias in ((WARM, 6.0), (COOL, 15.0), (OURS, 30.0)):
        errors = []
        for power in powers:
            eps = 2.0 ** float(power)
            layer = nn.LSTM(8, 8, batch_first=True, dtype=torch.float64)
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.zero_()
                layer.weight_ih_l0[16:24] = eps * torch.eye(8, dtype=torch.float64)  # gates in the order i, f, g, o
                layer.bias_ih_l0[:8] = bias
                layer.bias_ih_l0[8:16] = -bias
                layer.bias_ih_l0[24:] = bias
                errors.append(float((layer(x)[0] / eps - x).abs().max()))
        axes.loglog(2.0**powers, errors, "o-", markersize=3, linewidth=0.8, color=colour, label=f"B = {bias:g}")
    axes.set_xlabel("ε")
    axes.set_ylabel("largest error of h/ε, |x| ≤ 1")
    axes.legend(fontsize=8)
    return figure


def gradients() -> Figure:
    """Training on from a block that is off, by what was zeroed."""
    figure = Figure(figsize=(8.2, 2.9))
    left, right = figure.subplots(1, 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator)
    target = torch.tanh(x @ torch.randn(16, 16, generator=generator) * 0.4)
    for colour, sides in ((MUTED, "both"), (OURS, "out"), (WARM, "in")):
        torch.manual_seed(0)
        model = _Residual(16)
        layer = "block"
        nz.neutralize(model, layer, "zero", sides=sides, example_inputs=x)
        # plain gradient descent: no momentum and no decay, so what has no gradient does not move
        optimizer = torch.optim.SGD(model.block.parameters(), lr=0.3)
        losses, sizes = [], []
        for _ in range(150):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            sizes.append(float((model.block(x) - x).detach().square().mean().sqrt()))
        left.plot(losses, color=colour, label=f"zero, sides='{sides}'")
        right.plot(sizes, color=colour)
    left.set_ylabel("loss")
    right.set_ylabel("size of what the block adds")
    for axes in (left, right):
        axes.set_xlabel("step of gradient descent")
    left.legend(fontsize=8)
    return figure


class _Residual(nn.Module):
    """One residual block and what reads it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = _Block(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.gelu(self.up(x)))


FIGURES: tuple[Callable[[], Any], ...] = (
    residual,
    fills,
    regimes,
    epsilon,
    pair,
    fold,
    multiples,
    gates,
    gradients,
)


def main() -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "figures")
    parser.add_argument("--only", nargs="*", help="names of figures")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with mpl.rc_context(STYLE):
        for draw in FIGURES:
            if not arguments.only or draw.__name__ in arguments.only:
                path = arguments.output / f"{draw.__name__}.svg"
                draw().savefig(path, metadata={"Date": None})
                print(path)


if __name__ == "__main__":
    main()
