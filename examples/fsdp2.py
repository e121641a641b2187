"""Switch a block off in a model that FSDP2 has sharded over the processes of torchrun, and put it back.

Each process writes its own shard; none writes before all have the same plan.

    torchrun --nproc-per-node 2 examples/fsdp2.py
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import neutralize as nz

IDS = torch.arange(10)[None]


def llama() -> LlamaForCausalLM:
    """A small model, the same in every process."""
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=3)).eval()


def main() -> None:
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # who the others are, torchrun has put into the environment
    whole, model = llama(), llama()
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    with torch.no_grad():
        intact = model(IDS).logits
        undo = nz.neutralize(model, "model.layers[1]", edit="outgoing")
        off = model(IDS).logits
        with nz.excised(whole, "model.layers[1]"):
            assert torch.equal(off, whole(IDS).logits)
        undo.restore()
        assert torch.equal(model(IDS).logits, intact)
        assert not torch.equal(off, intact)
    if dist.get_rank() == 0:
        local = model.model.layers[1].mlp.down_proj.weight.to_local()
        print(f"each process wrote its {tuple(local.shape)} of a (32, 64) weight")
        print("off as in the whole model without the block, bit for bit; restored")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit("fsdp2.py: expected the processes of torchrun, got one; torchrun --nproc-per-node 2 fsdp2.py")
    main()
