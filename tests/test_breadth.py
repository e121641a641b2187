"""A sample of the breadth suite that covers every pattern; `make breadth` runs all of it."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from breadth import build, judge
from breadth.__main__ import examine
from torch import nn

transformers = pytest.importorskip("transformers")

EXACT = [
    # norms, parallel parts
    "llama", "gemma2", "gemma3_text", "qwen3", "phi", "gpt_neox", "falcon", "gpt2", "bloom", "opt",
    "mixtral", "qwen3_moe", "deepseek_v3", "jetmoe",  # experts: fused, shared, routed by data
    "mamba", "mamba2", "rwkv", "t5", "whisper",  # mixers, two stacks
    "vit", "dinov2", "swin", "convnext", "resnet", "regnet",  # images: LayerScale, windows, ReLU behind the sum
]  # fmt: skip
FOLDED = ["bert", "bart", "longformer"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are split by threads: bit comparisons need the same split
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", EXACT)
def test_a_block_is_off_bit_for_bit(kind):
    result = examine("transformers", kind)
    assert result["rows"], result
    for row in result["rows"]:
        assert (row["verdict"], row["error"], row["certificate"]) == ("exact", 0.0, "exact"), row
        assert row["effect"] > 1e-4  # with the block on, the outputs are others
        assert 0 < row["written"] < row["total"]


@pytest.mark.parametrize("kind", FOLDED)
def test_a_post_norm_block_is_off_within_its_tolerance(kind):
    result = examine("transformers", kind)
    assert result["verdict"] == "folded", result
    assert all(0 < row["error"] <= judge.TOLERANCE < row["effect"] for row in result["rows"])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("albert", "called 3 times"),
        ("fnet", "no skip connection around parameters"),
        ("minimax", "no skip connection around"),
    ],
)
def test_what_cannot_be_off_is_refused_with_the_reason(kind, reason):
    result = examine("transformers", kind)
    assert result["verdict"] == "refused", result
    assert all(reason in row["reason"] for row in result["rows"] if row["verdict"] == "refused"), result


# ---- the judge itself ------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, gate=False):
        super().__init__()
        self.norm, self.lin, self.gate = nn.LayerNorm(8), nn.Linear(8, 8), gate

    def forward(self, x):
        y = self.lin(self.norm(x))
        return x * y.sigmoid() if self.gate else x + y


class Net(nn.Module):
    def __init__(self, gate=False):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Residual(gate) for _ in range(3)), nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def built(gate=False):
    torch.manual_seed(0)
    return build.Built(build.perturbed(Net(gate), 0.1), {"x": torch.randn(4, 8)}, "Net")


def test_the_judge_finds_the_stack_and_its_skip():
    assert judge.stacks(built()) == [("blocks", "blocks.1", True)]
    assert judge.stacks(built(gate=True)) == [("blocks", "blocks.1", False)]


def test_the_judge_calls_a_false_claim_wrong(monkeypatch):
    """A plan that writes half of what is needed and claims to be exact."""
    import neutralize as nz

    honest = nz.plan

    def false(model, layers, **options):
        from dataclasses import replace

        plan = honest(model, layers, **options)
        return replace(plan, edits=plan.edits[:1])

    monkeypatch.setattr(judge.nz, "plan", false)
    (row,) = judge.judge(built())
    assert row["verdict"] == "WRONG"
    assert row["error"] > 1e-4


class Narrowing(nn.Module):
    """Blocks of which none keeps the shape of what it takes."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = self.part(8, 6), self.part(6, 4), nn.Linear(4, 2)

    def part(self, entering, leaving):
        return nn.Sequential(nn.Linear(entering, leaving), nn.ReLU())

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def test_a_model_without_a_stack_is_judged_by_a_lone_block():
    model = Net()
    model.blocks = nn.Sequential(Residual())
    model.forward = lambda x: model.head(model.blocks[0](x))
    lone = build.Built(build.perturbed(model, 0.1), {"x": torch.randn(4, 8)}, "Net")
    (row,) = judge.judge_lone(lone)
    assert (row["block"], row["verdict"], row["has_skip"]) == ("blocks.0", "exact", True)
    (row,) = judge.judge_lone(build.Built(build.perturbed(Narrowing(), 0.1), {"x": torch.randn(4, 8)}, "Narrowing"))
    assert (row["verdict"], row["has_skip"], row["inputs"]) == ("refused", False, 0)
    assert "from 6 to 4 features" in row["reason"]


def test_slim_networks_have_a_part_of_their_channels():
    with build.slim():
        conv, depthwise, norm = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, groups=64), nn.BatchNorm2d(64)
        head = nn.Linear(64, 10)
    assert (conv.weight.shape, depthwise.weight.shape) == ((32, 3, 3, 3), (32, 1, 3, 3))
    assert (norm.weight.shape, head.weight.shape) == ((32,), (5, 32))
    assert nn.Conv2d(4, 8, 1).weight.shape == (8, 4, 1, 1)
