# %% [markdown]
# # What the classic fills of a layer really do
# A sigmoid, a tanh and a ReLU layer between two linear ones. The strategy `constant` writes the fills known for them
# (0.01, 0.001 and 1.001, bias 0); `passthrough` makes the layer hand its input on, and the next layer undo its scale.

# %%
"""Sigmoid, tanh and ReLU layers: what the constant fills make of them, and how they become their input."""

import torch
from torch import nn

import neutralize as nz

torch.manual_seed(0)
x = torch.randn(64, 16)
activations = {"sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(), "relu": nn.ReLU()}
models = {
    name: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), activation, nn.Linear(16, 4)).eval()
    for name, activation in activations.items()
}

# %% [markdown]
# ## Constant fills
# Every unit gets the same number, so the matrix has rank 1: no fill can hand anything on. What comes out of the layer
# is nearly constant for sigmoid (0.5) and tanh (0); for ReLU it is 1.001 times the positive part of the sum of
# the inputs.

# %%
for name, model in models.items():
    with nz.plan(model, "1", "constant", example_inputs=x).applied(model), torch.no_grad():
        out = model[2](model[1](model[0](x)))
    print(f"{name:8} filled with {nz.STRATEGIES['constant']().name}: from {out.min():.4f} to {out.max():.4f}")
    if name == "sigmoid":
        assert (out - 0.5).abs().max() < 0.05
    if name == "tanh":
        assert out.abs().max() < 0.05
    assert torch.allclose(out, out[:, :1])  # every unit the same: rank 1

# %% [markdown]
# ## Pass-through
# The layer works in the linear part of its activation, and the layer behind it undoes the scale. The certificates bound
# the error, at the layer and end to end; `verify` measures it against the same network with the layer cut out.

# %%
for name, model in models.items():
    plan = nz.plan(model, "1", example_inputs=x)
    measured = nz.verify(model, plan, x)
    (layer,) = plan.layers
    print(f"{name:8} operating point {layer.operating_point:.3g}, slope {layer.slope:.3g}: {plan.certificates[0]}")
    print(f"{'':8} end to end {plan.certificate}, measured {measured.output_error:.1e}")
    assert measured.bound_holds
    assert measured.relative_error < (1e-3 if name == "sigmoid" else 1e-4)
print(plan)
