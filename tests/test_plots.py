"""Pictures of plans and verifications: what their lines hold, against the plan and hand-made measurements."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from networks import PreNorm, perturbed
from torch import nn

import neutralize as nz

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'neutralize[plot]'")


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(activation):
    return perturbed(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), activation, nn.Linear(8, 3)))


def line(axes, label):
    (found,) = [line for line in axes.get_lines() if label in str(line.get_label())]
    return torch.tensor(found.get_xdata()).double(), torch.tensor(found.get_ydata()).double()


def labels(axes):
    return " | ".join(text.get_text() for text in axes.get_legend().get_texts())


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (nn.Sigmoid(), torch.sigmoid),
        (nn.GELU(), F.gelu),
        (nn.Hardtanh(-0.3, 2.0), lambda z: F.hardtanh(z, -0.3, 2.0)),
        (nn.LeakyReLU(0.3), lambda z: F.leaky_relu(z, 0.3)),
        (nn.CELU(0.4), lambda z: F.celu(z, 0.4)),
        (nn.ELU(0.5), lambda z: F.elu(z, 0.5)),
        (nn.Softplus(3.0), lambda z: F.softplus(z, 3.0)),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, nn.Module) else "",
)
def test_a_plan_shows_its_activation_and_where_it_is_linear(module, function):
    plan = nz.plan(network(module), "1", example_inputs=unit(32, 8))
    entry = plan.layers[0]
    left, right = plan.plot().axes
    z, drawn = line(left, "φ = ")
    assert torch.allclose(drawn, function(z), atol=1e-6)
    z, drawn = line(left, "tangent")
    assert torch.allclose(drawn, entry.value + entry.slope * (z - entry.operating_point), atol=1e-12)
    point, value = line(left, "operating point")
    assert (float(point), float(value)) == (entry.operating_point, entry.value)
    assert f"± {entry.epsilon * entry.input_bound:.3g}" in labels(left)
    x, error = line(right, "curvature")
    window = x.abs() <= 1
    assert float(error[window].abs().max()) <= entry.certificate.bound
    assert f"X = {entry.input_bound:.4g}" in labels(right)
    for axes in (left, right):
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.get_title()
    if entry.certificate.bound > 1e-14:
        _, bound = line(right, "certificate")
        assert set(bound.tolist()) == {entry.certificate.bound}


def test_a_plan_of_blocks_shows_what_is_written():
    model = perturbed(nn.Sequential(PreNorm(), PreNorm(), nn.Linear(8, 3)))
    plan = nz.plan(model, ["0", "1"], example_inputs=unit(4, 8))
    (axes,) = plan.plot().axes
    assert [bar.get_width() for bar in axes.patches] == [
        sum(plan.edits[index].written_bytes for index in entry.edits) for entry in plan.layers
    ]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "1"]
    assert "exact" in labels(axes)


def test_a_verification_shows_measured_errors_bounds_and_where_they_are_valid():
    torch.manual_seed(1)  # up to where the bound is valid depends on the weights
    model, x = network(nn.Sigmoid()), unit(32, 8)
    plan = nz.plan(model, "1", example_inputs=x)
    scales = [0.1, 1.0, 1.2, 3.0, 10.0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    left, right = nz.verify(model, plan, x).plot(scales).axes
    drawn_scales, drawn = line(right, "measured")
    assert drawn_scales.tolist() == scales
    for scale, shown in zip(scales, drawn.tolist(), strict=True):
        with torch.no_grad():
            wanted = model[3](model[0](scale * x))
            with plan.applied(model):
                assert shown == float((model(scale * x).double() - wanted.double()).abs().max())
    peak = lambda scale: float(model[0](scale * x).detach().abs().max())  # noqa: E731
    ends, bound = line(right, "bound")
    assert set(bound.tolist()) == {plan.certificate.bound}
    assert peak(float(ends[1])) <= plan.layers[0].input_bound < peak(1.05 * float(ends[1]))
    assert 1.2 < float(ends[1]) < 3.0
    assert "inputs larger than assumed" in labels(left)
    _, bound = line(left, "'1' bound")
    assert set(bound.tolist()) == {plan.certificates[0].bound}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_exact_plan_has_no_error_at_any_scale():
    model, x = perturbed(nn.Sequential(PreNorm(), nn.Linear(8, 3))), unit(4, 8)
    left, right = nz.verify(model, nz.plan(model, "0", example_inputs=x), x).plot([0.5, 2.0]).axes
    for axes, label in ((left, "'0' measured: 0 everywhere"), (right, "measured: 0 everywhere")):
        assert line(axes, label)[1].tolist() == [0.0, 0.0]
        assert "larger than assumed" not in labels(axes)


def test_of_a_model_of_token_ids_the_layers_alone_are_drawn():
    model = perturbed(nn.Sequential(nn.Embedding(5, 8), PreNorm(), PreNorm(), nn.Linear(8, 3)))
    ids = torch.tensor([[1, 2]])
    (axes,) = nz.verify(model, nz.plan(model, ["1", "2"], example_inputs=ids), ids).plot([0.5, 2.0]).axes
    assert line(axes, "'2' measured: 0 everywhere")[1].tolist() == [0.0, 0.0]
    assert axes.get_xlabel() == "scale of what enters each layer"


def test_pictures_are_drawn_without_pyplot_and_saved(tmp_path):
    import subprocess

    model, x = network(nn.Tanh()), unit(8, 8)
    nz.plan(model, "1", example_inputs=x).plot().savefig(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert nz.plan(model, "1", example_inputs=x).plot()._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    code = (
        "import sys, torch, neutralize as nz; m = torch.nn.Sequential(torch.nn.Linear(4, 4)); x = torch.ones(1, 4); "
        "p = nz.plan(m, '0', example_inputs=x); assert 'matplotlib' not in sys.modules; p.plot(); "
        "nz.verify(m, p, x).plot([1, 2]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_cannot_be_drawn_is_refused(monkeypatch):
    model, x = network(nn.Tanh()), unit(8, 8)
    plan = nz.plan(model, "1", example_inputs=x)
    verification = nz.verify(model, plan, x)
    for scales in (2.0, [1.0], [0.0, 1.0], [1.0, float("inf")]):
        with pytest.raises(nz.NeutralizeError, match=r"expected (two or more )?positive finite scales, got \["):
            verification.plot(scales)
    tokens = perturbed(nn.Sequential(nn.Embedding(5, 8), PreNorm(), nn.Linear(8, 3)))
    ids = torch.tensor([[1, 2]])
    off = nz.verify(tokens, nz.plan(tokens, "0", "zero", example_inputs=ids), ids)
    with pytest.raises(nz.NeutralizeError, match="expected floating-point inputs or hidden states to scale, got none"):
        off.plot()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(nz.NeutralizeError, match=r"expected matplotlib, got none installed; pip install"):
        plan.plot()
    with pytest.raises(nz.NeutralizeError, match=r"expected matplotlib, got none installed; pip install"):
        verification.plot()
