"""Properties over random networks: no measured error is above its bound, and restoring gives every bit back."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import GatedBlock, LayerScale, PreNorm, perturbed
from torch import nn

import neutralize as nz

ACTIVATIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "none": lambda x: x,
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDTH = 8
OUTCOMES: list[bool] = []  # whether each random network could be planned


class Act(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return ACTIVATIONS[self.name](x)


@st.composite
def networks(draw):
    """A chain of plain layers and residual blocks, a dtype, an input scale, and a selection of the square layers."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layers, selectable = [], []
    for place in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["plain", "plain", "plain", "prenorm", "scale"]))
        if kind == "plain":
            selectable.append(str(len(layers)))
            layers += [
                nn.Linear(WIDTH, WIDTH, bias=draw(st.booleans()) or place > 0),
                Act(draw(st.sampled_from([*ACTIVATIONS]))),
            ]
        else:
            selectable.append(str(len(layers)))
            layers.append(PreNorm(WIDTH) if kind == "prenorm" else LayerScale(WIDTH))
    layers.append(nn.Linear(WIDTH, 3))
    dtype = draw(st.sampled_from(DTYPES))
    chosen = draw(st.lists(st.sampled_from(selectable), min_size=1, unique=True))
    return perturbed(nn.Sequential(*layers)).to(dtype), chosen, dtype, draw(st.sampled_from([0.1, 1.0, 10.0]))


def bits(model):
    return {name: value.clone().contiguous().view(torch.uint8) for name, value in model.state_dict().items()}


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from(["passthrough", "zero"]))
def test_measured_errors_are_within_their_bounds_and_every_bit_comes_back(network, strategy):
    model, chosen, dtype, scale = network
    example = (scale * torch.randn(16, WIDTH)).to(dtype)
    before = bits(model)
    try:
        plan, refused = nz.plan(model, chosen, strategy, example_inputs=example), ""
    except nz.NeutralizeError as error:
        plan, refused = None, str(error)
    if plan is None:
        # Legitimate: a sum or another reader in the way, or no bias where one is needed.
        assert re.search("bias|only affine layers|affine layers, and nothing else|got none|stay inside", refused)
        OUTCOMES.append(False)
        return
    OUTCOMES.append(True)
    verification = nz.verify(model, plan, example)
    assert verification.assumptions_hold
    assert verification.bound_holds, (verification.per_layer, verification.bounds)
    if {certificate.kind for certificate in plan.certificates} == {"exact"}:
        assert verification.exact
    for key, value in bits(model).items():
        assert torch.equal(value, before[key]), key


def test_most_random_networks_could_be_planned():
    assert sum(OUTCOMES) > 0.5 * len(OUTCOMES) or not OUTCOMES


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 2**31), st.sampled_from(DTYPES), st.sampled_from(["cheapest", "outgoing", "incoming"]), st.booleans()
)
def test_blocks_are_off_bit_for_bit_whatever_is_in_them(seed, dtype, edit, gated):
    torch.manual_seed(seed)
    blocks = [GatedBlock(16) if gated else PreNorm(16) for _ in range(3)]
    model = perturbed(nn.Sequential(*blocks, nn.Linear(16, 3)), seed).to(dtype)
    x = (10 * torch.rand(()) * torch.randn(2, 4, 16)).to(dtype)
    before = bits(model)
    undo = nz.neutralize(model, ["0", "2"], "passthrough", example_inputs=x, edit=edit)
    with torch.no_grad():
        assert torch.equal(model(x), model[3](model[1](x)))
    undo.restore()
    for key, value in bits(model).items():
        assert torch.equal(value, before[key]), key
