"""What happens in the demo, in order."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import neutralize as nz
from neutralize.bits import fingerprint, same_bits
from neutralize.demo.measure import Harm, Speed, block_inputs, hooked_out, only, speed, unequal
from neutralize.demo.proofs import KNOWN_LOSSES, Figure, Proof
from neutralize.demo.stage import Stage
from neutralize.demo.subject import Subject
from neutralize.language import all_logits, cut, mean_loss
from neutralize.plan import Plan


@dataclass(frozen=True)
class Script:
    """What is shown, and on how much text.

    Attributes:
        characters: how much of the text is read.
        window: tokens per window.
        block: number of the block that is shown in detail.
        blocks: numbers of the blocks whose harm is measured; ``block`` is one of them.
        compared: how many windows the bit-for-bit comparison is made on.
        known: the losses to be met, by the block that is off; ``None`` is the intact model.
    """

    characters: int = 20_000
    window: int = 512
    block: int = 4
    blocks: tuple[int, ...] = (0, 4, 14, 19, 29)
    compared: int = 2
    known: Mapping[int | None, Figure] = field(default_factory=lambda: KNOWN_LOSSES)


def perform(subject: Subject, script: Script, stage: Stage) -> None:
    """Show everything after the loading; the proofs are left on the stage, the weights as they were.

    Args:
        subject: the model and its text.
        script: what is shown.
        stage: where it is shown.
    """
    before = _fingerprint(subject, stage)
    plan = _show_plan(subject, script, stage)
    _compare_with_excised(subject, script, plan, stage)
    intact, off = _off_and_back(subject, script, plan, before, stage)
    plans = _switch_off_every_block(subject, script, stage)
    _rank(subject, script, plans["cheapest"], intact, off, stage)
    _time(subject, script, plans, stage)
    after = _fingerprint(subject, stage)
    stage.prove(Proof("at the end every bit of every weight is as it was loaded", after == before, after[:16]))


def _show_plan(subject: Subject, script: Script, stage: Stage) -> Plan:
    layer = subject.name(script.block)
    stage.heading(f"The plan for block {script.block}: nz.plan(model, {layer!r})")
    with stage.waiting("tracing the model and searching for the cheapest switch"):
        plan = nz.plan(subject.model, layer)
    stage.plan(plan)
    return plan


def _compare_with_excised(subject: Subject, script: Script, plan: Plan, stage: Stage) -> None:
    stage.heading(f"Block {script.block} off, against the network without it")
    model = subject.model
    windows = cut(subject.tokens, script.window)[: script.compared]
    networks: dict[str, AbstractContextManager[None]] = {
        "excised": nz.excised(model, subject.name(script.block)),
        "hook": hooked_out(subject.block(script.block)),
        "intact": nullcontext(),
    }
    same = {}
    tokens = (1 + len(networks)) * sum(window.numel() for window in windows)
    with stage.progress("rewritten, excised, by hook, intact", tokens, "tokens") as advance:
        with plan.applied(model):
            rewritten = all_logits(model, windows, advance)
        for name, network in networks.items():
            with network:
                found = all_logits(model, windows, advance)
            same[name] = [same_bits(one, other) for one, other in zip(rewritten, found, strict=True)]
    (certificate,) = plan.certificates
    stage.say(f"certificate: {certificate}; {certificate.reason}; assumes {certificate.assumption}")
    evidence = f"{len(windows)} windows, every logit"
    stage.prove(Proof("the logits are those of nz.excised, bit for bit", all(same["excised"]), evidence))
    stage.prove(Proof("the logits are those of a hook that skips the block, bit for bit", all(same["hook"]), evidence))
    stage.prove(Proof("the logits are not those of the intact model", not any(same["intact"]), evidence))


def _off_and_back(subject: Subject, script: Script, plan: Plan, before: str, stage: Stage) -> tuple[float, float]:
    """Measure the loss before, off and after restore; return the first two."""
    model, windows = subject.model, cut(subject.tokens, script.window)
    count = sum(window.numel() for window in windows)
    stage.heading(f"Mean loss on {count:,} tokens, in windows of {script.window} that do not overlap")
    with stage.progress("before, off, restored", 3 * count, "tokens") as advance:
        intact = mean_loss(model, windows, advance)
        undo = plan.apply(model)
        try:
            off = mean_loss(model, windows, advance)
        finally:
            undo.restore()
        restored = mean_loss(model, windows, advance)
    after = _fingerprint(subject, stage)
    stage.say(f"before {intact:.4f}, block {script.block} off {off:.4f}, restored {restored:.4f} nats per token")
    _meet(script, None, intact, stage)
    _meet(script, script.block, off, stage)
    stage.prove(Proof("after restore every bit of every weight is back", after == before, f"SHA-256 {after[:16]}"))
    stage.prove(Proof("after restore the loss is exactly what it was", restored == intact, f"{restored!r}"))
    return intact, off


def _switch_off_every_block(subject: Subject, script: Script, stage: Stage) -> dict[str, Plan]:
    """Check ``block(x) == x`` on every block under two edits; return the plans by the name of the edit."""
    count = subject.block_count
    stage.heading(f"Every one of the {count} blocks alone: block(x) == x, bit for bit")
    blocks = [subject.block(block) for block in range(count)]
    inputs = block_inputs(subject.model, blocks, cut(subject.tokens, script.window)[0])
    plans = {}
    for edit in ("cheapest", "outgoing"):
        with stage.waiting(f"planning all blocks, edit={edit!r}"):
            plans[edit] = nz.plan(subject.model, f"{subject.blocks}[:]", edit=edit)
        with plans[edit].applied(subject.model), stage.progress("running each block", count, "blocks") as advance:
            wrong = unequal(blocks, inputs, advance)
        evidence = f"not so in {', '.join(map(str, wrong))}" if wrong else f"{count} of {count} blocks"
        stage.prove(Proof(f"with {_written(plans[edit])}, block(x) is x", not wrong, evidence))
    moving = len(unequal(blocks, inputs))
    stage.prove(Proof("switched on, no block returns its input", moving == count, f"{moving} of {count} blocks"))
    return plans


def _written(plan: Plan) -> str:
    """Say what a plan writes into each layer, once for all layers that are written alike."""
    edits = ((entry.layer, plan.edits[index]) for entry in plan.layers for index in entry.edits)
    return ", ".join(dict.fromkeys(edit.describe().removeprefix(f"{layer}.") for layer, edit in edits))


def _rank(subject: Subject, script: Script, plan: Plan, intact: float, off: float, stage: Stage) -> None:
    stage.heading("What each block is worth: the loss with it alone switched off")
    windows = cut(subject.tokens, script.window)
    others = [block for block in script.blocks if block != script.block]
    losses = {script.block: off}
    total = len(others) * sum(window.numel() for window in windows)
    with stage.progress(f"blocks {', '.join(map(str, others))}", total, "tokens") as advance:
        for block in others:
            with only(plan, subject.name(block)).applied(subject.model):
                losses[block] = mean_loss(subject.model, windows, advance)
    stage.harms([Harm(block, loss, loss - intact) for block, loss in losses.items()])
    for block in others:
        _meet(script, block, losses[block], stage)


def _time(subject: Subject, script: Script, plans: Mapping[str, Plan], stage: Stage) -> None:
    stage.heading("How fast the weights are rewritten")
    layer = subject.name(script.block)
    timed: list[tuple[str, Speed]] = []
    for edit, plan in plans.items():
        timed.append((f"block {script.block}, {edit}", speed(subject.model, only(plan, layer))))
        timed.append((f"all blocks, {edit}", speed(subject.model, plan)))
    stage.speeds(timed)
    stage.say("rewrite: the writes alone. apply: checks, a copy for the undo, the writes. Medians.")
    stage.say("What fits the cache is written faster than memory; of a few kB the time is the call.")


def _meet(script: Script, block: int | None, loss: float, stage: Stage) -> None:
    """Compare a loss with the known figure, if there is one."""
    if block in script.known:
        what = "the loss of the intact model" if block is None else f"the loss with block {block} off"
        stage.prove(script.known[block].proof(what, loss))


def _fingerprint(subject: Subject, stage: Stage) -> str:
    size = sum(t.numel() * t.element_size() for t in (*subject.model.parameters(), *subject.model.buffers()))
    with stage.progress("SHA-256 of all weights", size, "bytes") as advance:
        return fingerprint(subject.model, advance)
