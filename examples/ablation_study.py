# %% [markdown]
# # An ablation study: what each block of a model is worth
# A small model is trained; then each block is switched off alone, measured, and put back.

# %%
"""Train a small transformer, rank its blocks by the harm that their loss does, and draw that."""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import neutralize as nz

torch.manual_seed(0)
config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
model = LlamaForCausalLM(config)
sums = torch.randint(0, 32, (64, 1)) + torch.arange(24) * torch.randint(1, 5, (64, 1))
tokens = sums % 32  # arithmetic sequences: two tokens tell the rest
made = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(50):
    made.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    made.step()
model.eval()
print(f"trained: loss {loss.item():.3f}")

# %%
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
sweep = nz.influence(model, "model.layers[:]", [{"input_ids": tokens, "labels": tokens}], k=2)
print(sweep)
assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

# %% [markdown]
# Blocks that add little to the loss can go; `1 - cos` of a block's input and output is a cheap guess at that.

# %%
picture = Path(tempfile.mkdtemp()) / "influence.png"
sweep.plot(picture)  # in a notebook it is shown

# %%
print(f"the picture is {picture}")
assert picture.stat().st_size > 5000
