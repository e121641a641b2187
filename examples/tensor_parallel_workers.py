"""Switch a layer off inside the running workers of a tensor-parallel inference engine, evaluate, and put it back.

The workers here are built as those of vLLM or Megatron-LM are: each process holds plain tensors with its part of every
projection, q, k and v merged into one, gate and up into another; the key and value heads are divided among the workers.
The engine talks to them with calls that all of them run (vLLM: ``collective_rpc``). The plan is made once, from the
model's config, on the meta device; a table of a few lines says where the workers keep which part.

    python examples/tensor_parallel_workers.py                  # SmolLM2-135M in three workers
    python examples/tensor_parallel_workers.py --tiny           # a model of the same kind with random weights
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import neutralize as nz

# ---- the engine, which knows nothing of us ---------------------------------------------------------------------------


class Norm(nn.Module):
    """RMS norm; every worker has all of it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize and scale."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Merged(nn.Module):
    """Several projections in one weight, each divided by outputs among the workers."""

    def __init__(self, outputs: list[int], inputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.empty(sum(outputs), inputs))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Project, and take the outputs apart."""
        return F.linear(x, self.weight).split(self.outputs, -1)


class Row(nn.Module):
    """A projection divided by inputs among the workers, whose results are added up."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project, and add up over the workers."""
        out = F.linear(x, self.weight)
        dist.all_reduce(out)
        return out


class Layer(nn.Module):
    """Attention and a gated MLP, the part of one worker."""

    def __init__(self, config: LlamaConfig, workers: int) -> None:
        super().__init__()
        self.head = config.head_dim
        heads, groups = config.num_attention_heads // workers, config.num_key_value_heads // workers
        self.repeats, wide = heads // groups, config.intermediate_size // workers
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.qkv_proj = Merged([heads * self.head, groups * self.head, groups * self.head], config.hidden_size)
        self.o_proj = Row(config.hidden_size, heads * self.head)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.gate_up_proj = Merged([wide, wide], config.hidden_size)
        self.down_proj = Row(config.hidden_size, wide)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Compute x + attention(x), then that plus its MLP."""
        q, k, v = (
            part.unflatten(-1, (-1, self.head)).transpose(1, 2) for part in self.qkv_proj(self.input_layernorm(x))
        )
        q, k = (
            part * cos + torch.cat([-part[..., self.head // 2 :], part[..., : self.head // 2]], -1) * sin
            for part in (q, k)
        )
        k, v = (part.repeat_interleave(self.repeats, 1) for part in (k, v))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        gate, up = self.gate_up_proj(self.post_attention_layernorm(x))
        return x + self.down_proj(F.silu(gate) * up)


class Worker(nn.Module):
    """One worker's part of a Llama."""

    def __init__(self, config: LlamaConfig, workers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, workers) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.head, self.theta = config.head_dim, config.rope_parameters["rope_theta"]

    @torch.no_grad()
    def loss(self, ids: torch.Tensor) -> float:
        """The mean loss in nats of the next token of one text (n,)."""
        angles = torch.arange(len(ids))[:, None] * self.theta ** (-torch.arange(0, self.head, 2) / self.head)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        x = self.embed_tokens(ids[None])
        for layer in self.layers:
            x = layer(x, cos, sin)
        scores = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(scores[0, :-1], ids[1:]).item()


# ---- what we say of it -----------------------------------------------------------------------------------------------


def table(config: LlamaConfig, rank: int, workers: int) -> dict[str, nz.Shard]:
    """Where a worker keeps which part of the parameters that transformers' model has."""
    q = config.num_attention_heads * config.head_dim // workers
    k = config.num_key_value_heads * config.head_dim // workers
    wide = config.intermediate_size // workers
    own = "layers.*"
    return {
        "model.layers.*.self_attn.q_proj.weight": nz.Shard(0, rank, workers, f"{own}.qkv_proj.weight", 0),
        "model.layers.*.self_attn.k_proj.weight": nz.Shard(0, rank, workers, f"{own}.qkv_proj.weight", q),
        "model.layers.*.self_attn.v_proj.weight": nz.Shard(0, rank, workers, f"{own}.qkv_proj.weight", q + k),
        "model.layers.*.self_attn.o_proj.weight": nz.Shard(1, rank, workers, f"{own}.o_proj.weight"),
        "model.layers.*.mlp.gate_proj.weight": nz.Shard(0, rank, workers, f"{own}.gate_up_proj.weight", 0),
        "model.layers.*.mlp.up_proj.weight": nz.Shard(0, rank, workers, f"{own}.gate_up_proj.weight", wide),
        "model.layers.*.mlp.down_proj.weight": nz.Shard(1, rank, workers, f"{own}.down_proj.weight"),
        "model.*": nz.Shard(0, 0, 1, "*"),  # norms and embeddings: every worker has all of them
    }


def load(state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Fill a worker from the whole model, by the same table: what an engine's own loader does."""
    for name, tensor in tensors.items():
        for key, shard in state["table"].items():
            before, _, after = key.partition("*")
            if name.startswith(before) and name.endswith(after):
                own = state["worker"].get_parameter(shard.name.replace("*", name[len(before) : len(name) - len(after)]))
                part = tensor.detach().chunk(shard.count, shard.dim)[shard.index]
                own.data.narrow(shard.dim, shard.start, part.shape[shard.dim]).copy_(part)
                break


def loss(state: dict[str, Any], ids: torch.Tensor) -> float:
    """Evaluate."""
    return float(state["worker"].loss(ids))


def neutralize(state: dict[str, Any], text: str) -> int:
    """Apply a plan to a worker's part, with all other workers or not at all; return the bytes that the undo holds."""
    undo = nz.Plan.from_json(text).apply(state["worker"], shards=state["table"])
    state["undo"] = undo
    return undo.held_bytes


def restore(state: dict[str, Any]) -> None:
    """Put every bit of a worker's part back."""
    state.pop("undo").restore()


# ---- the engine's processes ------------------------------------------------------------------------------------------


def serve(pipe: Any, rank: int, workers: int, port: int, config: LlamaConfig) -> None:
    """Run what the engine sends, until it hangs up."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    state: dict[str, Any] = {"worker": Worker(config, workers), "table": table(config, rank, workers)}
    while (call := pipe.recv()) is not None:
        function, arguments = call
        try:
            pipe.send((function(state, *arguments), None))
        except Exception as error:
            pipe.send((None, error))
    dist.destroy_process_group()


class Engine:
    """Workers that run the same calls together."""

    def __init__(self, config: LlamaConfig, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.pipes = []
        for rank in range(workers):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, rank, workers, port, config), daemon=True).start()
            self.pipes.append(ours)

    def collective_rpc(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Let every worker run a function, and return what each returns."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() for pipe in self.pipes]
        for _, error in answers:
            if error is not None:
                raise error
        return [value for value, _ in answers]

    def close(self) -> None:
        """Let the workers end."""
        for pipe in self.pipes:
            pipe.send(None)


def main() -> None:
    """Load, evaluate, neutralize, evaluate, restore, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="random weights instead of SmolLM2-135M")
    options = parser.parse_args()
    if options.tiny:
        torch.manual_seed(0)
        whole = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=4,
                num_attention_heads=6,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            )
        )
        ids = torch.arange(200) * 7 % 256
    else:
        from neutralize.demo.subject import gpl, weights_file
        from neutralize.language import load_language_model

        language = load_language_model(weights_file())
        whole, ids = language.model, language.tokens(gpl()[:2000])
    with torch.no_grad():
        scores = whole(input_ids=ids[None]).logits[0]
    expected = F.cross_entropy(scores[:-1], ids[1:]).item()

    engine = Engine(whole.config, options.workers)
    engine.collective_rpc(load, dict(whole.named_parameters()))
    intact = engine.collective_rpc(loss, ids)
    print(f"intact: loss {intact[0]:.4f} in {options.workers} workers, {expected:.4f} in transformers' own model")
    assert math.isclose(intact[0], expected, rel_tol=1e-4)

    with torch.device("meta"):
        blueprint = AutoModelForCausalLM.from_config(whole.config)
    for layers, edit in (("model.layers[1]", "cheapest"), ("model.layers[2]", "outgoing")):
        plan = nz.plan(blueprint, layers, edit=edit)
        held = engine.collective_rpc(neutralize, plan.to_json())
        off = engine.collective_rpc(loss, ids)
        engine.collective_rpc(restore)
        again = engine.collective_rpc(loss, ids)
        undo = plan.apply(whole)
        with torch.no_grad():
            scores = whole(input_ids=ids[None]).logits[0]
        undo.restore()
        there = F.cross_entropy(scores[:-1], ids[1:]).item()
        print(f"{layers} off by {edit}: loss {off[0]:.4f}, {there:.4f} in transformers; {sum(held)} bytes written")
        assert off[0] != intact[0]
        assert math.isclose(off[0], there, rel_tol=1e-4)
        assert again == intact
    engine.close()
    print("restored: the loss is what it was, to the bit")


if __name__ == "__main__":
    main()
