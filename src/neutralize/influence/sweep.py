"""Leave-one-out: each layer switched off in place, the model evaluated, every bit put back; and a greedy search."""

from __future__ import annotations

import hashlib
import logging
import math
import numbers
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
from torch import nn

from neutralize.dataflow import Inputs, own_inputs
from neutralize.distributed.wrapped import as_whole
from neutralize.errors import NeutralizeError, require_finite
from neutralize.influence.crew import Crew
from neutralize.influence.log import Identity, Log, Measurement, jsonable
from neutralize.influence.measure import Batches, BlockInfluences, Evaluate, Evaluation, Loss, Subject, Windows
from neutralize.language import cut, tokenized
from neutralize.plan import Plan
from neutralize.planner import Request, Strategy, drafted
from neutralize.progress import silent
from neutralize.report import Shown
from neutralize.select import Layers, select, unwrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Influence:
    """What one layer is worth, found by switching it off alone.

    Attributes:
        layer: qualified name.
        loss: the loss without it.
        delta_loss: the same, less the loss of the intact model.
        kl: mean divergence from the intact model's predictions in nats; ``None`` where the outputs have no ``logits``.
        block_influence: mean of ``1 - cos(input, output)`` over tokens in the intact model; ``None`` where the layer
            hands on another shape than it is given.
        bytes_written: what switching it off wrote.
        evaluating_s: seconds of the evaluation.
        rewriting_s: seconds of switching off and restoring, checks and copies included.
    """

    layer: str
    loss: float
    delta_loss: float
    kl: float | None
    block_influence: float | None
    bytes_written: int
    evaluating_s: float
    rewriting_s: float


@dataclass(frozen=True)
class Step:
    """One step of the greedy search: the layer whose loss is the least of all that could be switched off next.

    Attributes:
        layer: the layer that goes, beside those of the steps before.
        loss: the loss without all of them.
        delta_loss: the same, less the loss of the intact model.
        kl: mean divergence from the intact model's predictions in nats, or ``None``.
        tried: how many layers were tried in this step.
    """

    layer: str
    loss: float
    delta_loss: float
    kl: float | None
    tried: int


@dataclass(frozen=True)
class Sweep(Sequence[Influence], Shown):
    """What a sweep found: a sequence of influences in model order.

    Attributes:
        loss: of the intact model.
        entries: one per layer, in model order.
        steps: of the greedy search, if there was one.
        budget: what the search was allowed to add to the loss, or ``None``.
        evaluating_s: seconds of all evaluations that the sweep stands on, those of the log included.
        rewriting_s: seconds of all switching off and restoring.
        resumed: how many evaluations were taken from the log.
        plans: those that switch each layer off alone. They are not compared, nor in ``to_dict``.
        digests: of what was measured: the plans, the data, and with a log the model. They are not compared, nor
            in ``to_dict``.
    """

    loss: float
    entries: tuple[Influence, ...]
    steps: tuple[Step, ...] = ()
    budget: float | None = None
    evaluating_s: float = 0.0
    rewriting_s: float = 0.0
    resumed: int = 0
    plans: tuple[Plan, ...] = field(default=(), repr=False, compare=False)
    digests: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def overhead(self) -> float:
        """Seconds of rewriting per second of evaluation."""
        return self.rewriting_s / self.evaluating_s if self.evaluating_s else 0.0

    @property
    def ranked(self) -> tuple[Influence, ...]:
        """The influences, the least harmful layer first."""
        return tuple(sorted(self.entries, key=lambda entry: _order(entry.loss)))

    @property
    def chosen(self) -> tuple[str, ...]:
        """The layers that the greedy search would switch off, in the order of its steps."""
        return tuple(step.layer for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it; numbers that are not finite become their names."""
        found = asdict(replace(self, plans=(), digests={}))
        del found["plans"], found["digests"]
        content: dict[str, Any] = jsonable({**found, "overhead": self.overhead, "chosen": self.chosen})
        return content

    def plot(self, path: str | os.PathLike[str] | None = None, *, title: str = "") -> Figure:
        """Draw the change of the loss and the divergence of every layer above its block influence, in model order.

        Args:
            path: where it is saved too: a file whose ending names the format, png, svg or pdf.
            title: what is shown above it.

        Returns:
            A matplotlib figure, made without pyplot.

        Raises:
            NeutralizeError: matplotlib is not installed, or the file cannot be written.
        """
        from neutralize.influence.plot import plot

        return plot(self, path, title=title)

    def to_html(self, path: str | os.PathLike[str], *, title: str = "", command: str = "") -> None:
        """Write a page: the influences as charts and a table, the plans, their certificates, provenance.

        The page needs nothing else: no network, no script.

        Args:
            path: an html file; it appears whole, in place of an older one, or not at all.
            title: what was measured, in words.
            command: the command line, for the provenance.

        Raises:
            NeutralizeError: no page can be written there.
        """
        from neutralize.pages.page import write
        from neutralize.pages.swept import page

        write(path, page(self, title=title, command=command))

    def _repr_html_(self) -> str:
        """Return a short table for a notebook, the least harmful layer first."""
        from neutralize.pages.swept import fragment

        return fragment(self)

    @overload
    def __getitem__(self, index: int) -> Influence: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Influence, ...]: ...
    def __getitem__(self, index: int | slice) -> Influence | tuple[Influence, ...]:
        return self.entries[index]

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        """Return a table, the least harmful layer first."""
        from neutralize.influence.report import sweep_table

        return sweep_table(self)


@dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Attributes:
        done: evaluations done, with the part of the one that is going on.
        total: evaluations in all, as far as is known: the greedy search may stop earlier.
        doing: the layers that are off at the moment.
        finished: what was just finished, here or in another process, or ``None``.
        resumed: whether that was taken from the log.
    """

    done: float
    total: int
    doing: tuple[str, ...]
    finished: Measurement | None = None
    resumed: bool = False


Report: TypeAlias = Callable[[Progress], None]


def influence(
    model: nn.Module,
    layers: Layers,
    batches: Iterable[Any] | torch.Tensor | str | None = None,
    *,
    evaluate: Evaluate | None = None,
    loss: Loss | None = None,
    tokenizer: Any = None,
    window: int = 512,
    strategy: str | Strategy = "auto",
    example_inputs: Inputs | None = None,
    k: int | None = None,
    budget: float | None = None,
    among: int | None = None,
    kl: bool = True,
    kept_bytes: int = 1 << 30,
    log: str | os.PathLike[str] | Log | None = None,
    resume: bool = False,
    progress: Report | None = None,
    **options: Any,
) -> Sweep:
    """Measure what each layer is worth: switch it off alone, evaluate, and put every bit back, layer after layer.

    The intact model is evaluated once; the same pass gives the block influence of every layer. With ``k`` or ``budget``
    a greedy search goes on from there: the layer that harms least, then the one that harms least without it, and so on.
    Whatever ends the sweep, an exception or Ctrl-C, every bit is put back first.

    Where ``torch.distributed`` is initialized, all processes call this: each has the whole model and evaluates
    candidates of its own, or the model is sharded over them (its parameters are DTensors) and they evaluate each
    candidate together. All return the same sweep, and share one log.

    Args:
        model: with weights, in the mode (``model.eval()``) that it is to be measured in.
        layers: the candidates; see ``neutralize.select``.
        batches: a text (with ``tokenizer``) or its token ids (n,), int64, for the loss of the next token of a causal
            language model; or batches as the model takes them (tensors, tuples, dicts of keyword arguments), for
            ``loss``.
        evaluate: ``evaluate(model) -> float``, instead of ``batches``.
        loss: ``loss(outputs, batch) -> scalar``, averaged over batches; by default ``outputs.loss``.
        tokenizer: of transformers, for a text.
        window: tokens per window that a text or its ids are cut into.
        strategy: see ``neutralize.plan``.
        example_inputs: see ``neutralize.plan``; by default the first batch.
        k: how many layers the search switches off at most.
        budget: how much the search may add to the loss.
        among: how many of the layers that harm least alone the search tries in its later steps; by default all.
        kl: measure the divergence from the intact model's predictions, where the outputs have ``logits``.
        kept_bytes: how much memory the intact model's scores may take for that; beyond it they are computed anew.
        log: a file that every evaluation is appended to.
        resume: go on with the evaluations in ``log``.
        progress: told how far the sweep is.
        **options: parameters of the strategy.

    Returns:
        The influences in model order, with the loss of the intact model and the steps of the search.

    Raises:
        NeutralizeError: a layer cannot be switched off this way, the arguments do not fit together, the intact model's
            loss is not finite, or the log is that of another sweep.

    Examples:
        >>> from torch import nn
        >>> model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
        >>> sweep = influence(model, ["0", "1"], [x], loss=lambda outputs, batch: outputs.square().mean())
        >>> [each.layer for each in sweep]
        ['0', '1']
    """
    model = unwrap(model)
    crew = Crew(model)
    for name, function in (("evaluate", evaluate), ("loss", loss), ("progress", progress)):
        if function is not None and not callable(function):
            raise NeutralizeError(
                f"influence: expected a function for {name}, got {type(function).__name__}; see help(influence)"
            )
    _check_search(k, budget, among)
    subject, example = _subject(model, batches, evaluate, loss, tokenizer, window, kl=kl, kept_bytes=kept_bytes)
    with crew.telling():
        plans = _Plans(model, layers, strategy, example_inputs if example_inputs is not None else example, options)
    own = isinstance(log, str | os.PathLike)
    opened = open_log(log, crew, resume=resume) if isinstance(log, str | os.PathLike) else log
    try:
        pool = len(plans.layers) if among is None else min(among, len(plans.layers))
        most = 0 if k is None and budget is None else pool if k is None else min(k, pool)
        with crew.telling():
            run = _Run(model, subject, plans, opened, progress, crew)
            run.total = 1 + len(plans.layers) + sum(pool - taken for taken in range(1, most))
            run.leave_one_out()
            return run.sweep(run.search(pool, most, budget), budget)
    finally:
        if own and opened is not None:
            opened.close()


def open_log(path: str | os.PathLike[str], crew: Crew, *, resume: bool, many: bool = False) -> Log:
    """Open the log of a sweep in every process of a crew; see ``Log``.

    Raises:
        NeutralizeError: it cannot be opened; every process gets the error.
    """
    again = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # torchrun has started us again
    log: list[Log] = []
    with crew.telling():
        for first in crew.in_turn():
            log.append(Log(path, resume=again or not first, many=many, shared=not crew.is_one))
    return log[0]


def _check_search(k: int | None, budget: float | None, among: int | None) -> None:
    for name, value in (("k", k), ("among", among)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise NeutralizeError(f"influence: expected 1 or more for {name}, got {value!r}; give a count of layers")
    if budget is not None:
        require_finite("influence", budget=budget)
    if among is not None and k is None and budget is None:
        raise NeutralizeError(f"influence: expected k or budget beside among={among}, got neither; give one")


def _subject(
    model: nn.Module,
    batches: Iterable[Any] | torch.Tensor | str | None,
    evaluate: Evaluate | None,
    loss: Loss | None,
    tokenizer: Any,
    window: int,
    *,
    kl: bool,
    kept_bytes: int,
) -> tuple[Subject, Inputs | None]:
    """What to evaluate on, and example inputs for the trace if there are any."""
    if (batches is None) == (evaluate is None):
        given = "neither" if batches is None else "both"
        raise NeutralizeError(f"influence: expected either batches or evaluate, got {given}; give one of them")
    if evaluate is not None:
        if loss is not None:
            raise NeutralizeError(
                "influence: expected no loss beside evaluate, got one; let evaluate(model) return the loss"
            )
        return Evaluation(evaluate), None
    if isinstance(batches, str):
        if tokenizer is None:
            raise NeutralizeError("influence: expected a tokenizer for a text, got none; give tokenizer=, or token ids")
        batches = tokenized(batches, tokenizer)
    if isinstance(batches, torch.Tensor):
        if batches.dim() != 1 or batches.is_floating_point() or loss is not None:
            raise NeutralizeError(
                f"influence: expected token ids (n,) and no loss, or a list of batches, got one tensor "
                f"{list(batches.shape)} of {batches.dtype}{' and a loss' if loss is not None else ''}; put batches "
                f"into a list{', or flatten() the ids of a text' if batches.dtype == torch.long else ''}"
            )
        if not isinstance(window, int) or window < 2:
            raise NeutralizeError(
                f"influence: expected 2 or more for window, got {window!r}; one token predicts nothing"
            )
        windows = cut(batches.long(), window)
        subject = Windows(windows, kl=kl, kept_bytes=kept_bytes)
        return subject, None if own_inputs(model) is not None else {"input_ids": windows[0]}
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise NeutralizeError(
            f"influence: expected a list of batches, got one {type(batches).__name__}; put batches into a list"
        )
    held = list(batches)
    if held and isinstance(held[0], numbers.Integral):
        raise NeutralizeError(
            f"influence: expected token ids as a tensor, got numbers in {type(batches).__name__}; give "
            "torch.tensor(ids)"
        )
    if held and isinstance(held[0], str):
        raise NeutralizeError(
            "influence: expected batches as the model takes them, got texts; give one text with tokenizer=, or what "
            "the tokenizer makes of them"
        )
    return Batches(held, loss, kl=kl, kept_bytes=kept_bytes), held[0]


class _Plans:
    """The plan for any set of the candidates, made from one trace; that of each alone is made at once, as a check."""

    def __init__(
        self, model: nn.Module, layers: Layers, strategy: str | Strategy, example: Inputs | None, options: Any
    ) -> None:
        from neutralize.strategies import resolve

        self._request = Request(model, select(model, layers), example)
        self._strategy = resolve(strategy, options)
        self.layers = self._request.layers
        self._made: dict[tuple[str, ...], Plan] = {}
        problems = []
        for layer in self.layers:
            try:
                self.plan((layer,))
            except NeutralizeError as error:
                problems.append(str(error))
        if len(problems) == 1:
            raise NeutralizeError(problems[0])
        if problems:
            listing = "".join(f"\n  - {problem}" for problem in dict.fromkeys(problems))
            raise NeutralizeError(
                f"influence: expected layers that can be switched off, got {len(problems)} that cannot:{listing}"
            )

    def plan(self, off: tuple[str, ...]) -> Plan:
        """The plan that switches these layers off, and no other."""
        if off in self._made:
            return self._made[off]
        with as_whole(self._request.model):
            made = drafted(self._request.part(off), self._strategy)
        if len(off) == 1:
            self._made[off] = made
        return made

    def digest(self) -> str:
        """SHA-256 of the digests of the single plans: it differs for another strategy or other options."""
        singles = [self.plan((layer,)).digest for layer in self.layers]
        return hashlib.sha256("\n".join(singles).encode()).hexdigest()


class _Run:
    """A sweep that is going on."""

    def __init__(
        self,
        model: nn.Module,
        subject: Subject,
        plans: _Plans,
        log: Log | None,
        progress: Report | None,
        crew: Crew,
    ) -> None:
        self._model = model
        self._subject = subject
        self._plans = plans
        self._log = log
        self._crew = crew
        self._report = progress or (lambda progress: None)
        self._known: dict[tuple[str, ...], Measurement] = {}
        self._ready = False  # whether the subject has seen the intact model
        self._used: dict[tuple[str, ...], Measurement] = {}
        self._resumed = 0
        self._done = 0.0
        self.total = 0  # evaluations to be told of
        self._digests = {"the plans": plans.digest(), "the data": subject.digest()}
        if log is not None:
            self._digests["the model"] = crew.fingerprint(model)
            identity = Identity(
                f"{type(model).__module__}.{type(model).__qualname__} {self._digests['the model']}",
                f"{type(subject).__name__} {self._digests['the data']}",
                tuple(plans.layers),
                self._digests["the plans"],
            )
            self._known = log.begin(identity, writes=crew.rank == 0)
            crew.meet("the sweep")  # before any of its lines

    def leave_one_out(self) -> None:
        """Evaluate the intact model, and each candidate off alone."""
        intact = self._measure([()], everywhere=self._subject.compares)[0]
        if not math.isfinite(intact.loss):
            raise NeutralizeError(
                f"influence: expected a finite loss of the intact model, got {intact.loss}; check the model and data"
            )
        self._measure([(layer,) for layer in self._plans.layers])

    def search(self, pool: int, most: int, budget: float | None) -> tuple[Step, ...]:
        """Switch off greedily what harms least.

        Args:
            pool: how many of the layers that harm least alone are tried.
            most: how many are switched off at most.
            budget: how much they may add to the loss.
        """
        base = self._used[()].loss
        candidates = sorted(self._plans.layers, key=lambda layer: _order(self._used[(layer,)].loss))[:pool]
        steps: list[Step] = []
        while len(steps) < most:
            taken = [step.layer for step in steps]
            tried = self._measure([self._set([*taken, layer]) for layer in candidates if layer not in taken])
            best = min(tried, key=lambda measurement: _order(measurement.loss))
            delta = best.loss - base
            if math.isnan(delta) or (budget is not None and delta > budget):
                break
            (layer,) = set(best.off) - set(taken)
            steps.append(Step(layer, best.loss, delta, best.kl, len(tried)))
        return tuple(steps)

    def sweep(self, steps: tuple[Step, ...], budget: float | None) -> Sweep:
        """Put together what was found."""
        intact = self._used[()]
        entries = []
        for layer in self._plans.layers:
            found = self._used[(layer,)]
            entries.append(
                Influence(
                    layer,
                    found.loss,
                    found.loss - intact.loss,
                    found.kl,
                    intact.block_influence.get(layer),
                    found.bytes_written,
                    found.evaluating_s,
                    found.rewriting_s,
                )
            )
        evaluating = sum(found.evaluating_s for found in self._used.values())
        rewriting = sum(found.rewriting_s for found in self._used.values())
        plans = tuple(self._plans.plan((layer,)) for layer in self._plans.layers)
        return Sweep(
            intact.loss, tuple(entries), steps, budget, evaluating, rewriting, self._resumed, plans, self._digests
        )

    def _measure(self, sets: list[tuple[str, ...]], *, everywhere: bool = False) -> list[Measurement]:
        """Evaluate with each of these sets of layers off, or take it from the log.

        Args:
            sets: the same in every process.
            everywhere: every process evaluates them all, for it needs what an evaluation leaves behind.
        """
        for off in sets:
            if off not in self._used and off in self._known:
                self._resumed += 1
                self._note(self._known[off], resumed=True)
        missing = [off for off in dict.fromkeys(sets) if off not in self._used]
        if missing:
            self._crew.begin()
            longest = 0.0
            for off in missing if everywhere else self._crew.share(missing):
                found = self._measured(off)
                longest = max(longest, found.evaluating_s + found.rewriting_s)
                if self._crew.rank == 0 or (self._crew.writes and not everywhere):
                    if self._log is not None:
                        self._log.add(found)
                    self._crew.tell(found)
                self._note(found)
                self._listen()
            self._crew.finish(longest)
            self._listen()
        return [self._used[off] for off in sets]

    def _listen(self) -> None:
        """Take in what other processes have found; of what several did, all take the one that was told."""
        for found in self._crew.heard():
            self._note(found)

    def _note(self, found: Measurement, *, resumed: bool = False) -> None:
        """Take a measurement in."""
        is_new = found.off not in self._used
        self._used[found.off] = found
        if is_new:
            self._done = len(self._used)
            off = ", ".join(found.off) or "nothing"
            _LOGGER.info("influence: loss %.6g with %s off%s", found.loss, off, " (from the log)" if resumed else "")
            self._report(Progress(self._done, self.total, found.off, found, resumed))

    def _measured(self, off: tuple[str, ...]) -> Measurement:
        self._report(Progress(self._done, self.total, off))

        def advance(part: float) -> None:
            self._done = min(self._done + part, len(self._used) + 1.0)
            self._report(Progress(self._done, self.total, off))

        if not off:
            watch = BlockInfluences(self._plans.layers)
            started = time.perf_counter()
            reading = self._subject.intact(self._model, watch, advance)
            seconds = time.perf_counter() - started
            self._ready = True
            return Measurement((), reading.loss, reading.kl, 0, seconds, 0.0, watch.values())
        if self._subject.compares and not self._ready:  # what is known of the intact model is not its predictions
            self._subject.intact(self._model, BlockInfluences({}), silent)
            self._ready = True
        plan = self._plans.plan(off)
        rewriting = _Stopwatch()
        started = time.perf_counter()
        reading = self._subject.off(self._model, lambda: _switched_off(plan, self._model, rewriting), advance)
        seconds = time.perf_counter() - started
        return Measurement(
            off, reading.loss, reading.kl, plan.written_bytes, seconds - rewriting.seconds, rewriting.seconds
        )

    def _set(self, layers: list[str]) -> tuple[str, ...]:
        """The layers in model order: a set of them is measured once."""
        return tuple(layer for layer in self._plans.layers if layer in layers)


@dataclass
class _Stopwatch:
    """Adds up seconds."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run for the length of a ``with`` block."""
        _settle()
        started = time.perf_counter()
        try:
            yield
        finally:
            _settle()
            self.seconds += time.perf_counter() - started


def _settle() -> None:
    """Wait for what a GPU has been told to do: its time would count for the evaluation."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def _switched_off(plan: Plan, model: nn.Module, rewriting: _Stopwatch) -> Iterator[None]:
    """Apply a plan for the length of a ``with`` block; a Ctrl-C waits until what is being written is whole."""
    undo = None
    try:
        with _uninterrupted(), rewriting.running():
            undo = plan.apply(model)
        yield
    finally:
        if undo is not None:
            try:
                with _uninterrupted(), rewriting.running():
                    undo.restore()
            finally:
                undo.restore()  # nothing is left to do, unless a Ctrl-C came before the first one began


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back for the length of a ``with`` block, and let it have its way afterwards."""
    if threading.current_thread() is not threading.main_thread():  # signals are handled in the main thread alone
        yield
        return
    came: list[tuple[int, Any]] = []
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # ignored, left to the system, or not installed from Python
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[-1])


def _order(loss: float) -> tuple[bool, float]:
    """Sort by the loss, with what is no number last."""
    return math.isnan(loss), loss
