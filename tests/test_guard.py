"""What is off stays off while the rest of the network trains: bit for bit, whatever the optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from networks import Mlp, PreNorm, perturbed
from torch import nn

import neutralize as nz

STEPS = 100
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "adam, decay in the gradient": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.1),
    "amsgrad, foreach": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, amsgrad=True, foreach=True),
    "adamw, fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "rmsprop with momentum": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9),
    "adamw in groups": lambda parameters: torch.optim.AdamW(
        [{"params": [parameter], "lr": 1e-2 / (1 + place)} for place, parameter in enumerate(parameters)]
    ),
}


def unit(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network():
    return perturbed(nn.Sequential(nn.Linear(8, 8), PreNorm(), nn.Linear(8, 4)))


def train(model, optimizer, steps, x=None, with_closure=False):
    x = unit(16, 8) if x is None else x
    goal = unit(16, 4, seed=5)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - goal).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def bits(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_null_block_is_still_neutral_after_training(optimizer):
    model, x = network(), unit(16, 8)
    made = OPTIMIZERS[optimizer](list(model.parameters()))
    train(model, made, 5)  # momentum is warm
    plan = nz.plan(model, "1", example_inputs=x)
    plan.apply(model)
    before = bits(model)
    with nz.guard(model, plan, made):
        train(model, made, STEPS)
    assert torch.equal(model[1](x), x)
    after = bits(model)
    assert all(torch.equal(after[name], before[name]) for name in plan.parameters)
    rest = [name for name in after if name not in plan.parameters and not name.startswith("1.")]
    assert all(not torch.equal(after[name], before[name]) for name in rest)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_a_guard_it_moves(optimizer):
    model, x = network(), unit(16, 8)
    made = OPTIMIZERS[optimizer](list(model.parameters()))
    train(model, made, 5)
    nz.plan(model, "1", example_inputs=x).apply(model)
    train(model, made, 1)
    assert not torch.equal(model[1](x), x)


def test_momentum_moves_a_dead_parameter_and_the_guard_stops_it_for_good():
    """Both sides are zero, so every gradient is zero: what moves the weights is momentum alone, and none is left."""
    model, x = perturbed(Mlp(torch.tanh)), unit(16, 8)
    made = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, made, 5)
    plan = nz.plan(model, "middle", "zero", example_inputs=x)
    undo = plan.apply(model)
    train(model, made, 1)
    assert model.middle.weight.any()  # a zero gradient, and it moved
    assert not model.middle.weight.grad.any()
    undo.restore()
    undo = plan.apply(model)
    nz.guard(model, plan, made).close()
    train(model, made, 3)
    assert not model.middle.weight.any()


def test_a_block_of_a_parameter_is_held_and_the_rest_of_it_trains():
    model = perturbed(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)))
    shape = (6, 8)
    rows = nz.Rewrite("0.weight", shape, "float32", rows=(1, 3))
    columns = nz.Rewrite("0.weight", shape, "float32", diagonal=1.0, rows=(3, 6), columns=(2, 5))
    entry = nz.LayerPlan("0", "fill", nz.Certificate("0", "measured"), (0, 1))
    plan = nz.Plan("by hand", (rows, columns), (entry,))
    made = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, made, 5)
    plan.apply(model)
    before = bits(model)["0.weight"]
    with nz.guard(model, plan, made):
        train(model, made, STEPS)
        moments = made.state[model[0].weight]["exp_avg"]
        assert not moments[1:3].any()
        assert bool((moments[0] != 0).all())
    after = bits(model)["0.weight"]
    held = torch.zeros(shape, dtype=torch.bool)
    held[1:3] = True
    held[3:6, 2:5] = True
    assert torch.equal(after[held], before[held])
    assert bool((after[~held] != before[~held]).all())


@pytest.mark.parametrize("rescaled", [True, False])
def test_a_passthrough_stays_one(rescaled):
    model, x = perturbed(Mlp(torch.tanh)), unit(16, 8)
    made = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    train(model, made, 5)
    plan = nz.plan(model, "middle", "passthrough", example_inputs=x, input_bound=1.0)
    plan.apply(model)
    before = bits(model)
    with nz.guard(model, plan, made, rescaled=rescaled):
        train(model, made, 20)
    after = bits(model)
    assert torch.equal(after["middle.weight"], before["middle.weight"])
    assert torch.equal(after["middle.bias"], before["middle.bias"])
    assert torch.equal(after["last.weight"], before["last.weight"]) is rescaled
    assert not torch.equal(after["last.bias"], before["last.bias"])
    assert not torch.equal(after["first.weight"], before["first.weight"])


def test_layers_that_read_each_other_are_held_as_they_were_written():
    """The second layer's identity is rescaled for the first: neither edit alone gives its values."""
    model = perturbed(
        nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 4))
    )
    x = unit(16, 8)
    made = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    train(model, made, 3)
    plan = nz.plan(model, ["2", "4"], "passthrough", example_inputs=x)
    plan.apply(model)
    before = bits(model)
    with nz.guard(model, plan, made):
        train(model, made, 10)
    after = bits(model)
    assert all(torch.equal(after[name], before[name]) for name in plan.parameters)


def test_a_recurrent_layer_stays_off():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rnn, self.last = nn.Linear(8, 8), nn.LSTM(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.last(self.rnn(self.first(x))[0])

    model, x = perturbed(Tagger()), unit(16, 8)
    made = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, made, 5)
    plan = nz.plan(model, "rnn", example_inputs=x)
    plan.apply(model)
    before = bits(model)
    with nz.guard(model, plan, made) as guarded:
        assert guarded.held_bytes == model.last.weight.numel() * 4  # fills are filled again; only this is a copy
        train(model, made, 10)
    after = bits(model)
    assert all(torch.equal(after[name], before[name]) for name in plan.parameters)


def test_several_optimizers_and_closures():
    model, x = network(), unit(16, 8)
    halves = torch.optim.AdamW(model[:2].parameters(), lr=1e-2), torch.optim.SGD(model[2].parameters(), lr=1e-2)
    plan = nz.plan(model, ["1"], "zero", sides="both", example_inputs=x)
    plan.apply(model)
    before = bits(model)
    with nz.guard(model, plan, *halves):
        for optimizer in halves:
            train(model, optimizer, 10, with_closure=True)
    after = bits(model)
    assert all(torch.equal(after[name], before[name]) for name in plan.parameters)
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["2.weight"], before["2.weight"])


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("warm", [0, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_step_that_depends_on_all_elements_together(line_search, warm, seed):
    """LBFGS: a quasi-Newton step that is partly taken back would spoil what it knows of the curvature."""
    torch.manual_seed(seed)
    model, x = network(), unit(16, 8)
    made = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5, line_search_fn=line_search)
    train(model, made, warm, with_closure=True)
    plan = nz.plan(model, "1", example_inputs=x)
    plan.apply(model)
    before = bits(model)
    goal = unit(16, 4, seed=5)
    with torch.no_grad():
        loss = float((model(x) - goal).square().mean())
    with nz.guard(model, plan, made):
        train(model, made, 30, with_closure=True)
        assert torch.equal(model[1](x), x)
    after = bits(model)
    assert all(torch.equal(after[name], before[name]) for name in plan.parameters)
    with torch.no_grad():
        assert float((model(x) - goal).square().mean()) < loss  # and it still trains
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_and_gradients_that_accumulate(fused):
    model, x = network(), unit(16, 8)
    made = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=fused)
    train(model, made, 5)
    plan = nz.plan(model, "1", example_inputs=x)
    plan.apply(model)
    before, skipped = bits(model), 0
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    with nz.guard(model, plan, made):
        for step in range(STEPS):
            overflow = math.inf if step % 10 == 1 else 1.0
            scaler.scale(model(unit(16, 8, seed=step)).square().mean() * overflow).backward()
            if step % 2:
                scale = scaler.get_scale()
                scaler.step(made)
                scaler.update()
                made.zero_grad()
                skipped += scaler.get_scale() < scale
    assert skipped == 10
    assert torch.equal(model[1](x), x)
    after = bits(model)
    assert all(torch.equal(after[name], before[name]) for name in plan.parameters)
    assert not torch.equal(after["0.weight"], before["0.weight"])


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_is_enough_for_whole_parameters(optimizer, set_to_none):
    """A gradient from before, even one of zeros, would have an optimizer step a frozen parameter."""
    model, x = network(), unit(16, 8)
    made = OPTIMIZERS[optimizer](list(model.parameters()))

    def steps(count):
        for _ in range(count):
            made.zero_grad(set_to_none=set_to_none)
            model(x).square().mean().backward()
            made.step()

    steps(5)
    plan = nz.plan(model, "1", example_inputs=x)
    undo = plan.apply(model, freeze=True)
    before = bits(model)
    steps(STEPS)
    assert torch.equal(model[1](x), x)
    after = bits(model)
    assert all(torch.equal(after[name], before[name]) for name in plan.parameters)
    assert not torch.equal(after["0.weight"], before["0.weight"])
    undo.restore()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_does_not_get_through():
    model, x = network(), unit(16, 8)
    made = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, made, 2)
    plan = nz.plan(model, "1", "zero", sides="out", example_inputs=x)
    plan.apply(model)
    with nz.guard(model, plan, made):
        model(x).sum().backward()
        for name in plan.parameters:
            model.get_parameter(name).grad.fill_(float("nan"))
        made.step()
        train(model, made, 2)
        assert torch.equal(model[1](x), x)


def test_statistics_that_a_plan_wrote_are_put_back_too():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norm = nn.Linear(8, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.lin(x))

    model = perturbed(Normed()).train()
    edit = nz.Assign("norm.running_mean", (4,), "float32", (1.0, 2.0, 3.0, 4.0))
    entry = nz.LayerPlan("norm", "fill", nz.Certificate("norm", "measured"), (0,))
    plan = nz.Plan("by hand", (edit,), (entry,))
    plan.apply(model)
    made = torch.optim.SGD(model.parameters(), lr=1e-2)
    with nz.guard(model, plan, made):
        train(model, made, 3)
    assert model.norm.running_mean.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_it_lets_go():
    model, x = network(), unit(16, 8)
    made = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    plan = nz.plan(model, "1", "zero", sides="out", example_inputs=x)
    plan.apply(model)
    hooks = len(made._optimizer_step_post_hooks)
    guarded = nz.guard(model, plan, made)
    assert repr(guarded) == f"Guard({len(plan.parameters)} blocks, 0 bytes, 1 optimizer(s))"
    with pytest.raises(KeyError), guarded:
        raise KeyError
    assert guarded.closed
    assert repr(guarded) == "Guard(closed)"
    assert len(made._optimizer_step_post_hooks) == hooks
    guarded.close()
    train(model, made, 1)
    assert not torch.equal(model[1](x), x)


def test_it_makes_no_state_that_the_optimizer_lacks():
    model, x = network(), unit(16, 8)
    made = torch.optim.SGD(model.parameters(), lr=1e-2)
    plan = nz.plan(model, "1", example_inputs=x)
    plan.apply(model)
    with nz.guard(model, plan, made):
        assert not made.state


def test_restoring_after_the_guard_gives_every_bit_back():
    model, x = network(), unit(16, 8)
    made = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plan = nz.plan(model, "1", example_inputs=x)
    before = bits(model)
    undo = plan.apply(model)
    with nz.guard(model, plan, made):
        train(model, made, 3)
    undo.restore()
    assert all(torch.equal(bits(model)[name], before[name]) for name in plan.parameters)


def test_misuse_is_named():
    model, x = network(), unit(16, 8)
    made = torch.optim.SGD(model.parameters(), lr=1e-2)
    plan = nz.plan(model, "1", example_inputs=x)
    with pytest.raises(nz.NeutralizeError, match=r"guard: expected a Plan for plan, got str; make one by nz\.plan"):
        nz.guard(model, "1", made)
    with pytest.raises(nz.NeutralizeError, match=r"guard: expected an optimizer to watch, got none"):
        nz.guard(model, plan)
    with pytest.raises(nz.NeutralizeError, match=r"expected a torch\.optim\.Optimizer, got list"):
        nz.guard(model, plan, list(model.parameters()))
    with pytest.raises(nz.NeutralizeError, match=r"expected the plan to be applied, got other values in '1\."):
        nz.guard(model, plan, made)
    with pytest.raises(
        nz.NeutralizeError, match=r"expected the model that the plan is applied to, got one without '1\."
    ):
        nz.guard(nn.Linear(2, 2), plan, made)
    assert not made._optimizer_step_post_hooks
