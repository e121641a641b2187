"""Influence: what each layer is worth, against networks cut by hand; logs that resume; every bit back in any case."""

import itertools
import json
import math
import multiprocessing
import os
import signal
import time
from collections import UserDict
from dataclasses import replace

import pytest
import torch
import transformers
from bits import Block, Plain, Stack, refusal, weights
from networks import Mlp, PreNorm, perturbed
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

import neutralize as nz
from neutralize import cli, undo
from neutralize.demo.measure import hooked_out
from neutralize.influence import Log, measure
from neutralize.influence.job import Job, Task
from neutralize.influence.measure import total_divergence
from neutralize.language import LanguageModel, cut, mean_loss
from neutralize.planner import Request, drafted
from neutralize.select import blocks, select
from neutralize.strategies import resolve
from neutralize.undo import Undo

DEPTH, WINDOW = 4, 16
LAYERS = [f"layers.{number}" for number in range(DEPTH)]


class Reader(nn.Module):
    """A small language model: embedding, blocks, head; the mask is for who measures."""

    def __init__(self, vocabulary: int = 29):
        super().__init__()
        self.embed, self.layers = nn.Embedding(vocabulary, 8), nn.ModuleList(Block(8) for _ in range(DEPTH))
        self.head = nn.Linear(8, vocabulary)

    def forward(self, input_ids, use_cache=False, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        found = {"logits": logits}
        if labels is not None:
            found["loss"] = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return found


@pytest.fixture
def reader() -> Reader:
    torch.manual_seed(0)
    return perturbed(Reader())


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 29, (75,), generator=torch.Generator().manual_seed(1))


class CutByHand:
    """Blocks replaced by modules that return what they are given: the network without them, by construction."""

    def __init__(self, model, names):
        self.model, self.names = model, names

    def __enter__(self):
        self.kept = [self.model.layers[int(name.rpartition(".")[2])] for name in self.names]
        for name in self.names:
            self.model.layers[int(name.rpartition(".")[2])] = nn.Identity()

    def __exit__(self, *error):
        for name, kept in zip(self.names, self.kept, strict=True):
            self.model.layers[int(name.rpartition(".")[2])] = kept


def squared(model) -> float:
    """An evaluation of a ``Stack``: some number."""
    with torch.no_grad():
        return float(model(torch.linspace(-1, 1, 40).reshape(5, 8)).square().mean())


@pytest.fixture
def stack() -> Stack:
    torch.manual_seed(0)
    return perturbed(Stack())


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_each_loss_is_that_of_the_network_without_the_layer(stack):
    before = weights(stack)
    sweep = nz.influence(stack, "layers[:]", evaluate=squared)
    assert weights(stack) == before
    assert sweep.loss == squared(stack)
    assert [entry.layer for entry in sweep] == LAYERS
    for entry in sweep:
        with CutByHand(stack, [entry.layer]):
            assert entry.loss == squared(stack)
        assert entry.delta_loss == entry.loss - sweep.loss
        assert entry.kl is None
        assert entry.bytes_written == nz.plan(stack, entry.layer).written_bytes
    assert len({entry.loss for entry in sweep}) == DEPTH


def predictions(model, windows) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(window[None])["logits"][0].double().log_softmax(-1) for window in windows]


def test_windows_of_tokens_give_loss_divergence_and_block_influence(reader, tokens):
    sweep = nz.influence(reader, "layers[:]", tokens, window=WINDOW)
    windows = tokens.split(WINDOW)

    def loss(found) -> float:
        terms = [-p[place, token] for p, w in zip(found, windows, strict=True) for place, token in enumerate(w[1:])]
        return float(torch.stack(terms).mean())

    intact = predictions(reader, windows)
    assert sweep.loss == pytest.approx(loss(intact), abs=1e-6)
    states = [reader.embed(torch.cat(windows)).detach().double()]
    for layer in reader.layers:
        states.append(layer(states[-1].float()).detach().double())
    for number, entry in enumerate(sweep):
        with CutByHand(reader, [entry.layer]):
            found = predictions(reader, windows)
        assert entry.loss == pytest.approx(loss(found), abs=1e-6)
        divergence = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(intact, found, strict=True)]).mean()
        assert entry.kl == pytest.approx(float(divergence), rel=1e-4)
        entered, left = states[number : number + 2]
        cosine = (entered * left).sum(-1) / (entered.norm(dim=-1) * left.norm(dim=-1))
        assert entry.block_influence == pytest.approx(float((1 - cosine).mean()), rel=1e-5)
        assert entry.kl > 1e-3
    assert nz.influence(reader, "layers[:]", tokens, window=WINDOW).entries[0].loss == sweep[0].loss


def test_a_text_goes_through_the_tokenizer(reader):
    text = "abc" * 20

    def tokenizer(given, verbose):
        assert given == text
        return {"input_ids": [ord(letter) - ord("a") for letter in given]}

    ids = torch.tensor([0, 1, 2] * 20)
    by_text = nz.influence(reader, "layers[1:2]", text, tokenizer=tokenizer, window=8)
    by_ids = nz.influence(reader, "layers[1:2]", ids, window=8)
    assert (by_text.loss, by_text[0].loss, by_text[0].kl) == (by_ids.loss, by_ids[0].loss, by_ids[0].kl)


def test_scores_that_do_not_fit_are_computed_anew_to_the_same_bits(reader, tokens):
    scores = WINDOW * 29 * 4
    kept, some, none = (
        nz.influence(reader, "layers[:]", tokens, window=WINDOW, kept_bytes=size) for size in (1 << 20, 2 * scores, 0)
    )
    for entry, same, also in zip(kept, some, none, strict=True):
        assert entry.kl == same.kl == also.kl
        assert entry.loss == same.loss == also.loss


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_divergence_is_the_sum_over_counted_positions(chunk, dtype, monkeypatch):
    monkeypatch.setattr(measure, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 5, 13, generator=generator).to(dtype) for _ in range(2))
    one[..., 3] = other[..., 3] = -math.inf  # a class that neither model can give
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1]])
    p, q = other.double().softmax(-1), one.double().softmax(-1)
    expected = torch.where(p > 0, p * (p / q).log(), 0).sum(-1)
    close = {"rel": 1e-12 if dtype == torch.float64 else 1e-5}
    total, count = total_divergence(one, other)
    assert (total, count) == (pytest.approx(float(expected.sum()), **close), 10)
    total, count = total_divergence(one, other, mask)
    assert (total, count) == (pytest.approx(float(expected[mask != 0].sum()), **close), 7)
    assert total_divergence(one, one)[0] == 0.0
    assert total_divergence(torch.where(p > 0, other, 1.0).to(dtype), other)[0] < math.inf


def test_batches_bring_their_own_loss_and_mask(reader, tokens, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "numpy", None)  # torch runs without NumPy, and so does this
    ids = tokens[:64].view(4, 16)
    masks = torch.ones_like(ids)
    masks[:, 11:] = 0
    batches = [
        {"input_ids": ids[half], "attention_mask": masks[half], "labels": ids[half]}
        for half in (slice(0, 2), slice(2, 4))
    ]
    sweep = nz.influence(reader, "layers[1:3]", batches)
    with torch.no_grad():
        assert sweep.loss == pytest.approx(sum(float(reader(**batch)["loss"]) for batch in batches) / 2, rel=1e-6)
    # Positions are worked on one by one in this model, so what the mask hides can as well be left out.
    short = nz.influence(reader, "layers[1:3]", [{"input_ids": ids[:, :11], "labels": ids[:, :11]}])
    for entry, without in zip(sweep, short, strict=True):
        assert entry.kl == pytest.approx(without.kl, rel=1e-5)
        assert entry.block_influence == pytest.approx(without.block_influence, rel=1e-5)
    assert nz.influence(reader, "layers[1:2]", batches, kl=False)[0].kl is None


def test_a_loss_of_the_users_is_averaged_over_batches(stack):
    batches = [torch.randn(3, 8), (torch.randn(5, 8),)]

    def loss(outputs, batch):
        return outputs.abs().mean() + len(batch[0] if isinstance(batch, tuple) else batch)

    sweep = nz.influence(stack, "layers[:]", batches, loss=loss)
    for layer, found in [([], sweep.loss), *(([entry.layer], entry.loss) for entry in sweep)]:
        with CutByHand(stack, layer), torch.no_grad():
            assert (
                found == (float(loss(stack(batches[0]), batches[0])) + float(loss(stack(*batches[1]), batches[1]))) / 2
            )
    assert all(entry.kl is None and entry.block_influence > 0 for entry in sweep)


def test_block_influence_sees_what_entered_a_layer_that_writes_into_it():
    class InPlace(PreNorm):
        def forward(self, x):
            x += self.down(functional.gelu(self.up(self.norm(x))))
            return x

    model = perturbed(nn.Sequential(nn.Linear(8, 8), InPlace(), nn.Linear(8, 2)))
    watch = measure.BlockInfluences({"1": model[1], "2": model[2]})
    x = torch.randn(4, 8)
    with torch.no_grad(), watch.watching(), watch.collecting() as moved:
        model(x)
        model(x)
    watch.add(moved)
    entered = model[0](x)
    left = PreNorm.forward(model[1], entered)
    expected = (1 - functional.cosine_similarity(entered, left, dim=-1)).mean().item()
    assert watch.values() == {"1": pytest.approx(expected, rel=1e-5)}  # 2 hands on another shape
    assert not model[1]._forward_hooks
    assert not model[1]._forward_pre_hooks


@pytest.mark.parametrize("strategy", ["auto", "damp"])
def test_a_part_of_a_selection_is_planned_as_if_it_were_alone(stack, strategy):
    options = {"factor": 0.5} if strategy == "damp" else {}
    for model, layers, inputs in (
        (stack, LAYERS, torch.randn(2, 8)),
        (perturbed(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))), ["1", "2"], torch.randn(2, 8)),
        (Mlp(torch.tanh, width=8), ["first", "middle"], torch.randn(2, 8)),
    ):
        whole = Request(model, select(model, layers), inputs)
        for count in range(1, len(layers) + 1):
            for part in itertools.combinations(layers, count):
                alone = nz.plan(model, list(part), strategy, example_inputs=inputs, **options)
                assert drafted(whole.part(part), resolve(strategy, options)) == alone


# ---- the search ------------------------------------------------------------------------------------------------------


def test_the_search_takes_the_least_harmful_layer_of_each_step(stack):
    sweep = nz.influence(stack, "layers[:]", evaluate=squared, k=3)
    taken: list[str] = []
    for step in sweep.steps:
        losses = {}
        for layer in LAYERS:
            if layer not in taken:
                with CutByHand(stack, [*taken, layer]):
                    losses[layer] = squared(stack)
        assert step.layer == min(losses, key=losses.get)
        assert (step.loss, step.tried) == (losses[step.layer], len(losses))
        taken.append(step.layer)
    assert sweep.chosen == tuple(taken)
    assert len(taken) == 3


def test_the_search_stays_within_its_budget(stack):
    steps = nz.influence(stack, "layers[:]", evaluate=squared, k=DEPTH).steps
    sizes = [step.delta_loss for step in steps]
    assert len(steps) == DEPTH
    budget = sizes[1]
    within = list(itertools.takewhile(lambda size: size <= budget, sizes))
    assert nz.influence(stack, "layers[:]", evaluate=squared, budget=budget).steps == steps[: len(within)]
    assert nz.influence(stack, "layers[:]", evaluate=squared, budget=min(sizes[0] - 1, -1)).steps == ()


@pytest.mark.parametrize("budget", [0.0, 0.35, 1.0, 2.05, 9.0])
def test_where_losses_add_up_the_search_finds_what_trying_every_set_finds(stack, budget):
    """A greedy search is the best there is where each layer costs something of its own."""
    costs = dict(zip(LAYERS, (0.5, 0.25, 1.25, 0.125), strict=True))
    written = {name: nz.plan(stack, name, example_inputs=torch.zeros(1, 8)).parameters for name in LAYERS}
    intact = {name: parameter.detach().clone() for name, parameter in stack.named_parameters()}

    def evaluate(model):
        now = dict(model.named_parameters())
        return 1.0 + sum(
            costs[name] for name in LAYERS if not torch.equal(now[written[name][0]], intact[written[name][0]])
        )

    sweep = nz.influence(stack, "layers[:]", evaluate=evaluate, budget=budget)
    sets = [each for size in range(DEPTH + 1) for each in itertools.combinations(LAYERS, size)]
    within = [each for each in sets if sum(costs[name] for name in each) <= budget]
    best = max(within, key=lambda each: (len(each), -sum(costs[name] for name in each)))
    assert set(sweep.chosen) == set(best)


def test_the_search_can_be_narrowed_to_the_best(stack):
    sweep = nz.influence(stack, "layers[:]", evaluate=squared, k=3, among=2)
    assert set(sweep.chosen) == {entry.layer for entry in sweep.ranked[:2]}
    assert [step.tried for step in sweep.steps] == [2, 1]


# ---- every bit back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("failing_call", [1, 2, 4])
def test_whatever_an_evaluation_raises_every_bit_is_back(stack, error, failing_call):
    before, calls = weights(stack), []

    def evaluate(model):
        calls.append(weights(model) != before)
        if len(calls) == failing_call:
            raise error("enough")
        return squared(model)

    with pytest.raises(error, match="enough"):
        nz.influence(stack, "layers[:]", evaluate=evaluate)
    assert weights(stack) == before
    assert calls == [False, *[True] * (failing_call - 1)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in stack.modules())


@pytest.mark.parametrize("moment", ["before", "within", "after", "applied"])
def test_ctrl_c_while_weights_are_written_waits_until_they_are_whole(stack, moment, monkeypatch):
    before = weights(stack)
    apply, restore, overwrite = nz.Plan.apply, Undo.restore, undo.overwrite_

    def interrupted_restore(self):
        with monkeypatch.context() as patch:
            if moment == "before":
                signal.raise_signal(signal.SIGINT)
            if moment == "within":
                patch.setattr(
                    undo, "overwrite_", lambda *given: (overwrite(*given), signal.raise_signal(signal.SIGINT))
                )
            restore(self)
            if moment == "after":
                signal.raise_signal(signal.SIGINT)

    def interrupted_apply(self, model, **kw):
        made = apply(self, model, **kw)
        signal.raise_signal(signal.SIGINT)
        return made

    if moment == "applied":
        monkeypatch.setattr(nz.Plan, "apply", interrupted_apply)
    else:
        monkeypatch.setattr(Undo, "restore", interrupted_restore)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        nz.influence(stack, "layers[:]", evaluate=squared)
    assert weights(stack) == before
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_training_model_keeps_its_statistics_and_the_random_state():
    torch.manual_seed(0)
    model = perturbed(Plain()).train()
    before, state = weights(model), torch.get_rng_state()

    def evaluate(model):
        return (model(torch.ones(4, 8)).square().mean() + torch.rand(())).item()

    first = nz.influence(model, "middle", evaluate=evaluate, strategy="zero", example_inputs=torch.ones(4, 8))
    again = nz.influence(model, "middle", evaluate=evaluate, strategy="zero", example_inputs=torch.ones(4, 8))
    assert weights(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.loss, first[0].loss) == (again.loss, again[0].loss)


def test_the_time_is_split_into_evaluating_and_rewriting(stack):
    sweep = nz.influence(
        stack, "layers[:]", evaluate=lambda model: (torch.randn(400, 400) @ torch.randn(400, 400)).sum()
    )
    assert sweep.evaluating_s > sum(entry.evaluating_s for entry in sweep) > 0
    assert sweep.rewriting_s == pytest.approx(sum(entry.rewriting_s for entry in sweep))
    assert all(entry.rewriting_s > 0 for entry in sweep)
    assert sweep.overhead == sweep.rewriting_s / sweep.evaluating_s


# ---- the log ---------------------------------------------------------------------------------------------------------


class Counted:
    """An evaluation that counts its calls, and can break off."""

    digest = "squared"

    def __init__(self, stop_at: int = -1):
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, model) -> float:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return squared(model)


def test_an_interrupted_sweep_goes_on_where_it_stopped(stack, tmp_path):
    path, whole = tmp_path / "log.jsonl", nz.influence(stack, "layers[:]", evaluate=squared, k=2)
    broken = Counted(stop_at=4)
    with pytest.raises(KeyboardInterrupt):
        nz.influence(stack, "layers[:]", evaluate=broken, k=2, log=path)
    lines = path.read_bytes().splitlines()
    assert [json.loads(line).get("off") for line in lines] == [None, [], ["layers.0"], ["layers.1"]]
    path.write_bytes(path.read_bytes() + lines[-1][:25])  # what a killed process leaves
    rest = Counted()
    sweep = nz.influence(stack, "layers[:]", evaluate=rest, k=2, log=path, resume=True)
    assert rest.calls == 1 + DEPTH + (DEPTH - 1) - 3
    assert sweep.resumed == 3
    assert [replace(e, evaluating_s=0, rewriting_s=0) for e in sweep] == [
        replace(e, evaluating_s=0, rewriting_s=0) for e in whole
    ]
    assert sweep.steps == whole.steps
    again = Counted()
    assert nz.influence(stack, "layers[:]", evaluate=again, k=2, log=path, resume=True).entries == sweep.entries
    assert again.calls == 0


class Stuck(Counted):
    """An evaluation that says when three are done and a layer is off, and does not end."""

    def __init__(self, before, told):
        super().__init__()
        self.before, self.told = before, told

    def __call__(self, model) -> float:
        if self.calls == 3:
            self.told.send(weights(model) != self.before)
            time.sleep(600)
        return super().__call__(model)


def stuck_sweep(path, told) -> None:
    """What a process of its own does; it ends with 130 if Ctrl-C has put every bit back."""
    torch.manual_seed(0)
    model = perturbed(Stack())
    before = weights(model)
    try:
        nz.influence(model, "layers[:]", evaluate=Stuck(before, told), k=2, log=path)
    except KeyboardInterrupt:
        os._exit(130 if weights(model) == before else 1)


@pytest.mark.parametrize("kill", ["SIGINT", "SIGKILL"])
def test_a_process_that_is_ended_by_a_signal_loses_and_repeats_nothing(stack, tmp_path, kill):
    path = tmp_path / "log.jsonl"
    context = multiprocessing.get_context("spawn")
    reached, told = context.Pipe(duplex=False)
    process = context.Process(target=stuck_sweep, args=(path, told), daemon=True)
    process.start()
    assert reached.poll(120)
    assert reached.recv()
    os.kill(process.pid, getattr(signal, kill))
    process.join(60)
    assert process.exitcode == {"SIGINT": 130, "SIGKILL": -signal.SIGKILL}[kill]
    kept = path.read_bytes()
    rest = Counted()
    found = nz.influence(stack, "layers[:]", evaluate=rest, k=2, log=path, resume=True)
    assert (found.resumed, rest.calls) == (3, 1 + DEPTH + DEPTH - 1 - 3)
    assert path.read_bytes().startswith(kept)
    measured = [json.loads(line)["off"] for line in path.read_text().splitlines()[1:]]
    assert len(measured) == len({*map(tuple, measured)}) == 1 + DEPTH + DEPTH - 1


def test_a_resumed_sweep_compares_with_the_intact_model_again(reader, tokens, tmp_path):
    whole = nz.influence(reader, "layers[:]", tokens, window=WINDOW)
    path = tmp_path / "log.jsonl"
    nz.influence(reader, "layers[:]", tokens, window=WINDOW, log=path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    sweep = nz.influence(reader, "layers[:]", tokens, window=WINDOW, log=path, resume=True)
    assert sweep.resumed == 2
    assert [(e.loss, e.kl, e.block_influence) for e in sweep] == [(e.loss, e.kl, e.block_influence) for e in whole]


def test_a_log_of_another_sweep_is_refused_and_left_alone(stack, reader, tokens, tmp_path):
    path = tmp_path / "log.jsonl"
    nz.influence(stack, "layers[:2]", evaluate=Counted(), log=path)
    content = path.read_bytes()

    def resumed(**changed):
        given = {"layers": "layers[:2]", "evaluate": Counted(), **changed}
        return lambda: nz.influence(stack, log=path, resume=True, **given)

    assert "another candidates, another plans" in refusal(resumed(layers="layers[:3]"))
    assert "one of another plans" in refusal(resumed(edit="outgoing"))
    assert "one of another data" in refusal(resumed(evaluate=squared))
    kept = stack.head.bias.detach().clone()
    with torch.no_grad():
        stack.head.bias[0] += 1
    assert "one of another model;" in refusal(resumed())
    with torch.no_grad():
        stack.head.bias.copy_(kept)
    assert "resume it" in refusal(lambda: nz.influence(stack, "layers[:2]", evaluate=Counted(), log=path))
    assert path.read_bytes() == content
    resumed()()


def test_other_tokens_windows_or_losses_are_other_data(reader, tokens, tmp_path):
    path = tmp_path / "log.jsonl"
    nz.influence(reader, "layers[:1]", tokens, window=WINDOW, log=path)
    for changed, window, options in ((tokens.flip(0), WINDOW, {}), (tokens, 8, {}), (tokens, WINDOW, {"kl": False})):

        def resumed(changed=changed, window=window, options=options):
            nz.influence(reader, "layers[:1]", changed, window=window, log=path, resume=True, **options)

        assert "one of another data;" in refusal(resumed)


@pytest.mark.parametrize(
    "content", ["no log\n", '{"a": 1}', '{"format": 2, "sweep": "0"}\n', '{"sweep": "0"}\n', "[1]\n"]
)
def test_a_file_of_another_kind_is_refused_and_left_alone(content, stack, tmp_path):
    path = tmp_path / "precious.json"
    path.write_text(content)
    said = refusal(lambda: nz.influence(stack, "layers[:]", evaluate=squared, log=path, resume=True))
    assert "expected a log of format 1" in said
    assert path.read_text() == content


def test_a_log_that_another_process_writes_is_refused(stack, tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "log.jsonl"
    held = Log(path)
    assert "nobody else writes" in refusal(lambda: Log(path, resume=True))
    held.close()
    Log(path).close()
    assert "can be written" in refusal(lambda: Log(tmp_path / "nowhere" / "log.jsonl"))


def test_losses_that_are_no_numbers_survive_the_log(stack, tmp_path):
    losses = iter([1.0, math.nan, math.inf, 0.5, 2.0])
    path = tmp_path / "log.jsonl"
    nz.influence(stack, "layers[:]", evaluate=lambda model: next(losses), log=path)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    sweep = nz.influence(stack, "layers[:]", evaluate=lambda model: next(losses), log=path, resume=True)
    assert [entry.loss for entry in sweep][1:] == [math.inf, 0.5, 2.0]
    assert math.isnan(sweep[0].loss)
    assert [entry.layer for entry in sweep.ranked] == ["layers.2", "layers.3", "layers.1", "layers.0"]
    json.dumps(sweep.to_dict(), allow_nan=False)
    assert "nan" in str(sweep)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "expected either batches or evaluate, got neither"),
        ({"batches": [torch.zeros(1, 8)], "evaluate": squared}, "expected either batches or evaluate, got both"),
        ({"evaluate": squared, "loss": lambda outputs, batch: 0.0}, "expected no loss beside evaluate"),
        ({"batches": "text"}, "expected a tokenizer for a text"),
        ({"batches": []}, "expected at least one batch"),
        ({"batches": torch.zeros(3, 8)}, "put batches into a list"),
        ({"batches": torch.zeros(3, 8, dtype=torch.long)}, "put batches into a list, or flatten() the ids of a text"),
        ({"batches": UserDict(x=torch.zeros(3, 8))}, "expected a list of batches, got one UserDict"),
        ({"batches": 3}, "expected a list of batches, got one int"),
        ({"batches": [1, 2, 3]}, "expected token ids as a tensor, got numbers in list; give torch.tensor(ids)"),
        ({"batches": "text", "tokenizer": "gpt2"}, "expected a tokenizer of transformers, got str"),
        ({"batches": torch.zeros(9, dtype=torch.long), "window": "8"}, "expected 2 or more for window, got '8'"),
        ({"evaluate": squared, "progress": True}, "expected a function for progress, got bool"),
        ({"batches": ["text"]}, "expected batches as the model takes them, got texts"),
        ({"batches": [torch.zeros(1, 8)], "loss": "ce"}, "expected a function for loss, got str"),
        ({"evaluate": 0.5}, "expected a function for evaluate, got float"),
        ({"batches": torch.zeros(9, dtype=torch.long), "window": 1}, "expected 2 or more for window, got 1"),
        ({"batches": torch.zeros(1, dtype=torch.long)}, "expected a text of at least two tokens"),
        ({"batches": [torch.zeros(1, 8)]}, "expected outputs with a loss"),
        ({"batches": [torch.zeros(1, 8)], "loss": lambda outputs, batch: outputs}, "expected one number from loss"),
        ({"evaluate": lambda model: None}, "expected one number from evaluate(model), got NoneType"),
        ({"evaluate": lambda model: math.nan}, "expected a finite loss of the intact model, got nan"),
        ({"evaluate": squared, "k": 0}, "expected 1 or more for k, got 0"),
        ({"evaluate": squared, "k": 1, "among": 0}, "expected 1 or more for among"),
        ({"evaluate": squared, "among": 2}, "expected k or budget beside among=2"),
        ({"evaluate": squared, "budget": math.nan}, "expected a finite number for budget"),
        ({"evaluate": squared, "strategy": "nul"}, "expected one of"),
        ({"evaluate": squared, "factor": 2}, "expected edit"),
    ],
)
def test_what_does_not_fit_is_refused(given, said, stack):
    before = weights(stack)
    assert said in refusal(lambda: nz.influence(stack, "layers[:]", **given)).replace("expected gain", "expected edit")
    assert weights(stack) == before


def test_all_layers_that_cannot_be_switched_off_are_named_before_anything_is_evaluated(stack):
    counted = Counted()
    said = refusal(lambda: nz.influence(stack, ["layers.0.up", "head", "layers.1"], evaluate=counted))
    assert "'layers.0.up'" in said
    assert "'head'" in said
    assert counted.calls == 0


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_progress_reaches_its_end_step_by_step(reader, tokens):
    told = []
    nz.influence(reader, "layers[:]", tokens, window=WINDOW, k=2, progress=told.append)
    done = [one.done for one in told]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(told[-1].total) == 1 + DEPTH + DEPTH - 1
    assert {one.total for one in told} == {1 + DEPTH + DEPTH - 1}
    assert len({round(value, 6) for value in done}) > 5 * (DEPTH + 1)  # windows count too
    assert [one.finished.off for one in told if one.finished][: DEPTH + 1] == [(), *((layer,) for layer in LAYERS)]


def test_the_table_ranks_the_layers_and_says_what_rewriting_took(stack):
    sweep = nz.influence(stack, "layers[:]", evaluate=squared, k=2, budget=1e9)
    text = str(sweep)
    places = [text.index(entry.layer) for entry in sweep.ranked]
    assert places == sorted(places)
    for entry in sweep:
        assert f"{entry.delta_loss:+.4f}" in text
    assert "greedy search, at most 1e+09 more loss: 2 off" in text
    assert f"({sweep.overhead:.2%} of it)" in text


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
@pytest.mark.parametrize("losses", [(1.0, 1.5, 9.0, 1.1, 2.0), (1.0, 0.5, math.nan, math.inf, 1.0), (1.0,) * 5])
def test_the_picture_is_drawn_whatever_the_losses(ending, losses, stack, tmp_path):
    pytest.importorskip("matplotlib")
    given = iter(losses)
    sweep = nz.influence(stack, "layers[:]", evaluate=lambda model: next(given))
    path = tmp_path / f"picture.{ending}"
    sweep.plot(path, title="a title")
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)
    assert sweep.plot().axes  # without a file
    assert "expected a file name that ends in" in refusal(lambda: sweep.plot(tmp_path / "picture.txt"))


@pytest.mark.parametrize(("losses", "scale"), [((0.9, 0.5, 0.3, 0.2), "linear"), ((9.0, 0.5, 0.3, 0.2), "log")])
def test_bars_stand_on_zero_unless_they_span_more_than_a_decade(losses, scale):
    pytest.importorskip("matplotlib")
    from neutralize.influence.plot import drawn

    entries = tuple(nz.Influence(f"layers.{n}", loss, loss, loss, loss, 4, 1.0, 0.0) for n, loss in enumerate(losses))
    for axes in drawn(nz.Sweep(0.0, entries)).axes:
        assert axes.get_yscale() == scale
        assert (axes.get_ylim()[0] == 0.0) == (scale == "linear")


def test_the_blocks_of_a_model_are_its_largest_list(reader):
    assert blocks(reader) == "layers[:]"
    assert "expected a ModuleList of blocks" in refusal(lambda: blocks(nn.Linear(2, 2)))


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(reader, monkeypatch):
    """Whatever model is asked for is the reader; ``missing`` is not there."""

    def tokenizer(text, verbose):
        return {"input_ids": [ord(letter) % 29 for letter in text]}

    def load(self):
        if self.model == "missing":
            raise nz.NeutralizeError("language model: expected a model, got none; check the name")
        return LanguageModel(reader, tokenizer, "a reader")

    monkeypatch.setattr(Task, "load", load)
    return reader


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["influence", *map(str, arguments)])


SHORT = ("--characters", 60, "--window", 16)


def test_the_command_prints_json_and_draws(loaded, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "influence.png"
    result = run(*SHORT, "--json", "--k", 2, "--plot", picture)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    ids = torch.tensor([ord(letter) % 29 for letter in Task(characters=60).read()])
    sweep = nz.influence(loaded, LAYERS, ids, window=16, k=2)
    assert found["loss"] == sweep.loss
    assert [entry["loss"] for entry in found["entries"]] == [entry.loss for entry in sweep]
    assert found["chosen"] == list(sweep.chosen)
    assert picture.stat().st_size > 5000
    assert result.stderr.count("evaluations/min") == 1 + DEPTH + DEPTH - 1


def test_the_command_logs_and_resumes(loaded, tmp_path):
    log = tmp_path / "run.jsonl"
    first = run(*SHORT, "--log", log, "--quiet")
    assert first.exit_code == 0
    assert first.stderr == ""
    assert "layers.0" in first.stdout
    assert run(*SHORT, "--log", log).exit_code == 2
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-2]))
    assert run(*SHORT, "--log", log, "--resume").stderr.count("(from the log)") == 1 + DEPTH - 2
    again = run(*SHORT, "--log", log, "--resume")
    assert again.exit_code == 0
    assert again.stderr.count("(from the log)") == 1 + DEPTH
    assert f"{1 + DEPTH} of the evaluations from the log" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing"], "expected a model, got none"),
        (["--resume"], "expected --log beside --resume"),
        (["--text", "/nowhere/to/be/found"], "expected a file of UTF-8 text"),
        (["--plot", "/nowhere/to/be/found.png"], "expected a png, svg or pdf file in a folder that can be written"),
        (["--layers", "layer.9"], "near matches"),
        (["--job", "/nowhere/to/be/found"], "expected a TOML file"),
        (["--job", "x", "--layers", "y"], "alone, got --layers; write that into the job file"),
        (["--job", "x", "--k", "2", "--no-kl", "other"], "alone, got --k, --kl, MODEL; write that"),
        (["--log", "/dev/full"], "expected a regular file for log"),
    ],
)
def test_the_command_says_what_is_wrong_and_ends_with_2(arguments, said, loaded):
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_ends_the_command_with_130_and_every_bit_back(loaded, tmp_path, monkeypatch):
    before, log = weights(loaded), tmp_path / "run.jsonl"
    forward, calls = Reader.forward, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Reader, "forward", interrupted)
    result = run(*SHORT, "--log", log)
    assert result.exit_code == 130
    said = "neutralize: interrupted; every bit of the model was put back; --resume goes on from here"
    assert result.stderr.splitlines()[-1] == said
    assert weights(loaded) == before
    monkeypatch.undo()


# ---- jobs ------------------------------------------------------------------------------------------------------------

JOB = """
log = "sweeps.jsonl"
characters = 60
window = 16

[[sweep]]
model = "one"

[[sweep]]
model = "missing"

[[sweep]]
model = "two"
layers = ["layers[1:3]"]
options = { edit = "outgoing" }
k = 2
"""


def test_a_job_runs_every_sweep_into_one_log_and_resumes(loaded, tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    result = run("--job", path, "--json", "--quiet")
    assert result.exit_code == 1
    one, missing, two = map(json.loads, result.stdout.splitlines())
    assert [entry["layer"] for entry in one["entries"]] == LAYERS
    assert "expected a model" in missing["error"]
    assert [entry["layer"] for entry in two["entries"]] == ["layers.1", "layers.2"]
    assert len(two["chosen"]) == 2
    assert two["entries"][0]["bytes_written"] > one["entries"][1]["bytes_written"]
    log = tmp_path / "sweeps.jsonl"
    content = log.read_text().splitlines(keepends=True)
    assert len(content) == 2 + (1 + DEPTH) + (1 + 2 + 1)
    assert run("--job", path).exit_code == 2  # it is there already
    log.write_text("".join(content[:9]))
    again = run("--job", path, "--json", "--quiet", "--resume")
    resumed_one, _, resumed_two = map(json.loads, again.stdout.splitlines())
    assert (resumed_one["resumed"], resumed_two["resumed"]) == (5, 2)
    assert [entry["loss"] for entry in resumed_two["entries"]] == [entry["loss"] for entry in two["entries"]]
    assert sorted(json.loads(line).get("off", []) for line in log.read_text().splitlines()) == sorted(
        json.loads(line).get("off", []) for line in content
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("log = 3\n[[sweep]]\n", "expected a file name for log"),
        ("log = 'x'\n", "expected [[sweep]] tables"),
        ("log = 'x'\n[[sweep]]\nlayer = 'y'\n", "got layer; leave out"),
        ("log = 'x'\n[[sweep]]\nk = true\n", "expected int for k of sweep 1, got True"),
        ("log = 'x'\nwindow = 'wide'\n[[sweep]]\n", "expected int for window of sweep 1"),
        ("log = 'x'\nwindow = 1\n[[sweep]]\n", "expected 2 or more for window of sweep 1, got 1"),
        ("log = 'x'\n[[sweep]]\n[[sweep]]\nk = 0\n", "expected 1 or more for k of sweep 2, got 0"),
        ("log = 'x'\ncharacters = -1\n[[sweep]]\n", "expected 0 or more for characters of sweep 1, got -1"),
        ("log = 'x'\n[[sweep]]\nlayers = ['a', 3]\n", "expected names for layers of sweep 1"),
        ("log = 'x'\n[[sweep]]\nmodel = './gone'\n", "got './gone', which is not there"),
        ("log = \n", "expected a TOML file"),
    ],
)
def test_a_job_file_that_is_wrong_is_refused(text, said, tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(text)
    assert said in refusal(lambda: Job.read(path))
    assert list(tmp_path.iterdir()) == [path]


def test_paths_of_a_job_are_beside_its_file(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "job.toml").write_text(
        "log = 'log'\ntext = 'read.txt'\ncharacters = 0\n[[sweep]]\nmodel = 'one'\n[[sweep]]\nmodel = 'a/hub'\n"
    )
    job = Job.read(tmp_path / "job.toml")
    assert [task.model for task in job.tasks] == [str(tmp_path / "one"), "a/hub"]
    assert {(task.text, task.characters) for task in job.tasks} == {(str(tmp_path / "read.txt"), None)}
    assert job.log == tmp_path / "log"


def test_a_job_whose_model_fails_goes_on_with_the_others(loaded, tmp_path, monkeypatch):
    def forward(self, input_ids, **given):
        if input_ids.shape[1] == 10:  # the last window of 25
            raise IndexError("out of\x1b[2J range")
        return Reader_forward(self, input_ids, **given)

    Reader_forward = Reader.forward
    monkeypatch.setattr(Reader, "forward", forward)
    path = tmp_path / "job.toml"
    path.write_text(
        "log = 'log'\ncharacters = 60\n[[sweep]]\nmodel = 'wide'\nwindow = 25\n"
        "[[sweep]]\nmodel = 'other'\nwindow = 15\n"
    )
    result = run("--job", path, "--json", "--quiet", "--debug")
    assert result.exit_code == 1
    wide, other = map(json.loads, result.stdout.splitlines())
    assert "windows of 25 tokens, got 'wide', which fails (IndexError: out of\x1b[2J range)" in wide["error"]
    logged = result.stderr.splitlines()
    (line,) = (each for each in logged if each.startswith("wide: influence: "))
    assert "(IndexError: out of\\x1b[2J range)" in line
    assert any("in forward" in each for each in logged)
    assert len(other["entries"]) == DEPTH


def test_no_minus_stands_before_a_zero():
    from neutralize.influence.report import _figure

    assert [_figure(value) for value in (-1e-8, 0.0, -0.25, None)] == ["0.0000", "0.0000", "-0.2500", ""]


def test_a_task_refuses_what_torch_does_not_know():
    assert "expected a floating-point dtype" in refusal(Task(dtype="int8").load)
    assert "expected a device of this machine" in refusal(Task(device="nowhere").load)


# ---- a model of transformers -----------------------------------------------------------------------------------------


def test_a_tiny_llama_is_swept_exactly():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = perturbed(transformers.LlamaForCausalLM(config))
    ids = torch.randint(0, 64, (40,))
    before = weights(model)
    sweep = nz.influence(model, blocks(model), ids, window=20)
    assert weights(model) == before
    for number, entry in enumerate(sweep):
        with hooked_out(model.model.layers[number]):
            assert entry.loss == mean_loss(model, cut(ids, 20))
        assert entry.kl > 0
    labelled = [model(window, labels=window).loss.item() for window in ids.split(20) for window in [window[None]]]
    assert sweep.loss == pytest.approx(sum(labelled) / 2, rel=1e-5)


def test_heads_are_worth_something_and_hand_nothing_on():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.arange(12).reshape(1, 12), "labels": torch.arange(12).reshape(1, 12)}]
    sweep = nz.influence(model, "model.layers[0].self_attn.heads[0:1]", batches)
    more = nz.influence(model, ["model.layers[0].self_attn.heads[1]", "model.layers[1].self_attn.kv_heads[0]"], batches)
    for each in (*sweep, *more):
        assert each.delta_loss != 0
        assert each.block_influence is None or each.block_influence != each.block_influence


def test_stacked_layers_are_looked_at_one_by_one():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.LSTM(6, 6, num_layers=2, batch_first=True))

    class First(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = model[0], torch.nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    batches = [torch.randn(2, 5, 6)]
    found = nz.influence(First(), ["rnn[0]", "rnn[1]"], batches, loss=lambda outputs, batch: outputs.square().mean())
    assert found[0].block_influence != found[1].block_influence
