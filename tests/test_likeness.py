"""Blocks that are alike are analysed once: the same plans as when each is analysed, and none shared that differ."""

from dataclasses import replace

import pytest
import torch
from networks import perturbed
from torch import nn

import neutralize as nz
from neutralize.strategies import passthrough

COUNT = 6


class Branch(nn.Module):
    """A residual block with everything that may tell two of them apart."""

    def __init__(self, width=8, hidden=16, eps=1e-5, act=torch.relu, factor=1.0, bias=True):
        super().__init__()
        self.norm, self.act, self.factor = nn.LayerNorm(width, eps=eps), act, factor
        self.up, self.down = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        return x + self.factor * self.down(self.act(self.up(self.norm(x))))


class AfterSum(nn.Module):
    """A block whose sum goes through a ReLU: off if what enters is known not to be negative."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        return torch.relu(x + self.lin(x))


@pytest.fixture
def analysed(monkeypatch):
    """The layers that were searched, in order."""
    found = []
    search = passthrough.identity_assignment

    def counted(request, layer, edit):
        found.append(layer)
        return search(request, layer, edit)

    monkeypatch.setattr(passthrough, "identity_assignment", counted)
    return found


def stack(*blocks) -> nn.Sequential:
    torch.manual_seed(0)
    return perturbed(nn.Sequential(nn.Linear(8, 8), *blocks, nn.Linear(8, 8)))


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("edit", ["cheapest", "outgoing", "incoming"])
def test_repeated_blocks_are_analysed_once_to_the_same_plan(edit, analysed, monkeypatch):
    model = stack(*(Branch() for _ in range(COUNT)))
    layers = [str(place) for place in range(1, COUNT + 1)]
    plan = nz.plan(model, layers, example_inputs=X, edit=edit)
    assert len(analysed) == 1
    monkeypatch.setattr(passthrough, "likeness", lambda *given: None)
    each = nz.plan(model, layers, example_inputs=X, edit=edit)
    assert len(analysed) == 1 + COUNT
    assert plan == each
    assert plan.digest == each.digest
    intact = model[-1](model[0](X))
    with plan.applied(model):
        assert torch.equal(model(X), intact)


def test_a_sweep_analyses_repeated_blocks_once(analysed):
    model = stack(*(Branch() for _ in range(COUNT)))
    sweep = nz.influence(model, [str(place) for place in range(1, COUNT + 1)], [X], loss=lambda out, batch: out.mean())
    assert len(sweep) == COUNT
    assert len(analysed) == 1


class WithConstants(Branch):
    """A block that makes constants for itself, as the masks of some attention do."""

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x)))) * torch.tensor(2) * torch.full((), 0.5)


def test_constants_that_each_block_makes_for_itself_do_not_tell_blocks_apart(analysed):
    model = stack(*(WithConstants() for _ in range(3)))
    plan = nz.plan(model, ["1", "2", "3"], example_inputs=X)
    assert len(analysed) == 1
    intact = model[-1](model[0](X))
    with plan.applied(model):
        assert torch.equal(model(X), intact)


@pytest.mark.parametrize(
    "other",
    [
        {"hidden": 24}, {"eps": 1e-6}, {"act": torch.tanh}, {"factor": 2.0}, {"bias": False},
    ],
)  # fmt: skip
def test_blocks_that_differ_are_analysed_each(other, analysed):
    model = stack(Branch(), Branch(**other), Branch(), Branch(**other))
    plan = nz.plan(model, ["1", "2", "3", "4"], example_inputs=X)
    assert len(analysed) == 2
    intact = model[-1](model[0](X))
    with plan.applied(model):
        assert torch.equal(model(X), intact)


def test_what_is_known_of_the_sign_of_the_input_tells_blocks_apart():
    model = perturbed(nn.Sequential(nn.Linear(8, 8), AfterSum(), AfterSum(), AfterSum(), nn.Linear(8, 8)))
    plan = nz.plan(model, ["2", "3"], example_inputs=X)  # both behind the ReLU of another
    assert [certificate.kind for certificate in plan.certificates] == ["exact", "exact"]
    with pytest.raises(nz.NeutralizeError, match="'1'"):
        nz.plan(model, ["1", "2", "3"], example_inputs=X)
    with pytest.raises(nz.NeutralizeError, match="'1'"):
        nz.plan(model, ["3", "1"], example_inputs=X)


class ReadElsewhere(nn.Module):
    """Of like blocks one has a gain that the model reads elsewhere."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Branch() for _ in range(4)), nn.Linear(8, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.blocks[1].norm.weight


def test_a_parameter_that_is_read_elsewhere_tells_a_block_apart(analysed):
    model = perturbed(ReadElsewhere())
    plan = nz.plan(model, "blocks[:]", example_inputs=X)
    assert len(analysed) == 2
    assert "blocks.1.norm.weight" not in plan.parameters
    intact = model.head(X) * model.blocks[1].norm.weight
    with plan.applied(model):
        assert torch.equal(model(X), intact)


def test_a_tied_parameter_is_not_shared(analysed):
    model = stack(*(Branch() for _ in range(3)))
    model[3].down = model[2].down
    plan = nz.plan(model, ["1", "2", "3"], "passthrough", example_inputs=X, edit="outgoing")
    assert len(analysed) == 3
    intact = model[-1](model[0](X))
    with plan.applied(model):
        assert torch.equal(model(X), intact)


def test_a_plan_says_how_long_it_took_and_neither_json_nor_digest_do():
    model = stack(Branch())
    plan = nz.plan(model, "1", example_inputs=X)
    assert plan.planning_s > 0
    assert f"planned in {plan.planning_s:.1f} s" in str(plan)
    slower = replace(plan, planning_s=4.94)
    assert "planned in 4.9 s" in str(slower)
    assert slower == plan
    assert (slower.digest, slower.to_json()) == (plan.digest, plan.to_json())
    read = nz.Plan.from_json(plan.to_json())
    assert read == plan
    assert "planned in" not in str(read)


class Divided(Branch):
    """A block that divides by the gain of another one, which lies behind it."""

    def forward(self, x):
        branch = self.norm(x) if self.divisor is None else self.norm(x) / self.divisor[0].norm.weight
        return x + self.down(self.up(branch))


def test_a_block_that_divides_by_what_is_nulled_for_another_is_refused():
    model = stack(*(Divided() for _ in range(3)))
    for place in (1, 2, 3):
        model[place].divisor = [model[place + 1]] if place < 3 else None
    with pytest.raises(nz.NeutralizeError, match=r"'2\.norm\.weight', written for another, and may divide by it"):
        nz.plan(model, ["1", "2"], example_inputs=X, edit="incoming")
    plan = nz.plan(model, ["1", "2", "3"], example_inputs=X, edit="outgoing")
    intact = model[-1](model[0](X))
    with plan.applied(model):
        assert torch.equal(model(X), intact)
