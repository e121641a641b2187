# %% [markdown]
# # A layer that fades out while training goes on
# A `Trainer` of transformers trains; the callback takes the contribution of block 1 from 1 to exactly 0. The rest of
# the model learns to do without it.

# %%
"""Damp a block to nothing while a Trainer trains; it ends at exactly nothing."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import neutralize as nz
from neutralize.integrations.transformers import RampCallback

torch.manual_seed(0)
config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
model = LlamaForCausalLM(config)
data = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(16) * k % 32 for k in range(1, 9))]
arguments = TrainingArguments(
    tempfile.mkdtemp(),
    max_steps=20,
    per_device_train_batch_size=8,
    learning_rate=3e-3,
    use_cpu=True,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
ramp = RampCallback("model.layers[1]", start=5, steps=10, shape="cosine")
Trainer(model, arguments, train_dataset=data, callbacks=[ramp]).train()

# %%
model.eval()
ids = data[0]["input_ids"][None]
with torch.no_grad():
    with nz.excised(model, "model.layers[1]"):
        without = model(ids).logits
    assert torch.equal(model(ids).logits, without)
print(f"factor {ramp.ramp.factor}: the model computes what it would without the block, bit for bit")
