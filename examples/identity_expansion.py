# %% [markdown]
# # A deeper model that computes the same, and then learns
# A block is copied into a trained model and switched off on its outgoing side. The deeper model gives the same bits;
# its gradient reaches the new block's last projections, so further training wakes it up.

# %%
"""Insert an identity block into a small transformer, and let it wake up in training."""

import copy

import torch
from torch import nn

import neutralize as nz

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, norm_first=True, batch_first=True)
model = nn.Sequential(nn.Embedding(17, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
model.append(nn.Linear(32, 17))
data = torch.randint(0, 17, (64, 12))
wanted = (data.cumsum(1)) % 17


def train(steps: int) -> float:
    """Learn the running sum modulo 17 with causal attention; return the last loss."""
    made = torch.optim.AdamW(model.parameters(), lr=2e-3)
    mask = nn.Transformer.generate_square_subsequent_mask(12)
    for _ in range(steps):
        made.zero_grad()
        scores = model[2](model[1](model[0](data), mask=mask, is_causal=True))
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten())
        loss.backward()
        made.step()
    return loss.item()


print(f"two blocks, trained: loss {train(60):.4f}")

# %% [markdown]
# The new block is a copy of the one before it.

# %%
with torch.no_grad():
    model.eval()
    before = model(data)
    model[1].layers.insert(1, copy.deepcopy(model[1].layers[0]))
    model[1].num_layers = 3
    assert not torch.equal(model(data), before)
plan = nz.plan(model, "1.layers[1]", edit="outgoing", example_inputs=data)
plan.apply(model)
print(plan)
with torch.no_grad():
    assert torch.equal(model(data), before)
print("three blocks, one of them an identity: the same outputs, bit for bit")

# %%
model.train()
last = train(60)
new = model[1].layers[1]
awake = new.linear2.weight.abs().max().item()
print(f"three blocks, trained on: loss {last:.4f}; the new block's last weights reach {awake:.4f}")
assert awake > 0
