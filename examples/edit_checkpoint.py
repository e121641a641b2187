# %% [markdown]
# # Edit a checkpoint on disk
# The weights are never loaded: only the bytes that change are written, and the undo is on the disk before.

# %%
"""Switch a block off in a sharded checkpoint, load it, and put every byte back."""

import hashlib
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import neutralize as nz

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp()) / "model"
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
model = LlamaForCausalLM(config).eval()
model.save_pretrained(folder, max_shard_size="40KB")


def digests() -> dict[str, str]:
    """The digest of each file with weights."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}


intact = digests()
print(f"{len(intact)} shards")

# %%
undo = nz.neutralize(folder, "model.layers[1]")
changed = [name for name, digest in digests().items() if digest != intact[name]]
print(f"changed: {', '.join(changed)}")
ids = torch.arange(10)[None]
with torch.no_grad(), nz.excised(model, "model.layers[1]"):
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits)
assert 0 < len(changed) < len(intact)

# %%
undo.restore()
assert digests() == intact
print("restored: every byte is what it was")
