"""Crews: the processes that share a sweep, started with ``torchrun``.

Each process that has the whole model evaluates candidates of its own: it takes the next one that nobody has, and writes
the result into the one log. Of a model that is sharded over them all evaluate each candidate together.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from neutralize.bits import fingerprint
from neutralize.distributed.part import is_dtensor
from neutralize.distributed.team import Team, store_of
from neutralize.errors import NeutralizeError
from neutralize.progress import Advance, silent

Item = TypeVar("Item")
Message = TypeVar("Message")

_PATIENCE = 10.0
"""How many times as long as its own longest candidate took a process waits for the others', at the end of a phase."""

_LEAST_TIMEOUT = 300.0
"""Seconds that it waits in any case."""

_PHASES = itertools.count()
"""Numbers the phases of all sweeps of a process, so that each has a queue of its own; see ``Crew.begin``."""


class Crew:
    """The processes that share a sweep; one alone if there is no process group.

    Attributes:
        rank: the place of this process among them, from 0.
        is_sharded: the model is divided among them, so that each evaluation takes all.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        """Take all processes of the default group, and see whether the model is sharded."""
        grouped = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._team = Team(range(dist.get_world_size()), _LEAST_TIMEOUT) if grouped else None
        self.rank = dist.get_rank() if grouped else 0
        self.is_sharded = grouped and model is not None and any(map(is_dtensor, model.parameters()))
        self._phase, self._heard = 0, 0

    @property
    def is_one(self) -> bool:
        """Whether this process is alone."""
        return self._team is None

    @property
    def writes(self) -> bool:
        """Whether this process writes what it has evaluated into the log."""
        return self.rank == 0 or not self.is_sharded

    def fingerprint(self, model: nn.Module, advance: Advance = silent) -> str:
        """Return the fingerprint of the model, the same in every process; see ``neutralize.bits``."""
        own = fingerprint(model, advance)
        if self._team is None or not self.is_sharded:
            return own
        return hashlib.sha256("\n".join(self._exchange("the fingerprint", own)).encode()).hexdigest()

    def in_turn(self) -> Iterator[bool]:
        """Let the first process go on alone, then the others: yields once in each, with whether it is the first."""
        if self.rank == 0:
            yield True
            self.meet("the log")
        else:
            self.meet("the log")
            yield False
        self.meet("the others' log")

    def meet(self, where: str) -> None:
        """Wait until every process is here."""
        if self._team is not None:
            self._exchange(where, None)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Let the others know if this process fails, for they wait for it."""
        if self._team is None:
            yield
            return
        with self._team.telling("influence"):
            yield

    def begin(self) -> None:
        """Begin a phase: work that all processes share, or that each does in full."""
        number = next(_PHASES)
        # Where a sweep failed in one process, others may have begun phases that it has not: the largest is new to all.
        self._phase = number if self._team is None else max(self._exchange("a phase", number))
        self._heard = 0

    def share(self, items: Sequence[Item]) -> Iterator[Item]:
        """Yield those of the items that this process is to work on, one when the one before is done.

        All processes call this with the same items. A process that is asked to end (SIGTERM, as by ``torchrun`` when
        another one has died) is done with its item first.
        """
        if self._team is None or self.is_sharded:
            yield from items
            return
        while (place := self._store().add("taken", 1) - 1) < len(items):
            with _finishing():
                yield items[place]

    def tell(self, found: object) -> None:
        """Hand what this process found to all others, who hear of it when they ask.

        Args:
            found: anything that pickles, small.
        """
        if self._team is not None:
            store = self._store()
            store.set(f"told/{store.add('told', 1) - 1}", pickle.dumps(found))

    def heard(self) -> Iterator[Any]:
        """Yield what any process has told in this phase since this was last asked."""
        if self._team is not None:
            store = self._store()
            while store.check([f"told/{self._heard}"]):
                yield pickle.loads(store.get(f"told/{self._heard}"))
                self._heard += 1

    def finish(self, longest_s: float) -> None:
        """Wait until every process is through with the phase, and has told all that it found.

        Args:
            longest_s: seconds that the longest candidate of this process took.
        """
        if self._team is not None:
            self._team.timeout = max(_LEAST_TIMEOUT, _PATIENCE * longest_s)
            self._exchange("the results", None)

    def _store(self) -> Any:
        return store_of(f"neutralize/influence/{self._phase}")

    def _exchange(self, stage: str, message: Message) -> list[Message]:
        assert self._team is not None
        return self._team.exchange("influence", stage, message)


@contextmanager
def _finishing() -> Iterator[None]:
    """Carry a ``with`` block through before SIGTERM ends the process, if nobody else has seen to that signal."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if asked:
        raise SystemExit(128 + asked[0])


@contextmanager
def started() -> Iterator[bool]:
    """Join the processes that ``torchrun`` has started, for the length of a ``with`` block.

    Yields whether this process is to speak to the user: it is the first, or alone.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if dist.is_initialized() or not (world.isdecimal() and int(world) > 1 and "RANK" in os.environ):
        yield not dist.is_initialized() or dist.get_rank() == 0
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    store, rank, size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the addresses of killed processes may be in the store
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore(attempt, store), rank=rank, world_size=size)
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def divided(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Shard a model over all processes with FSDP2, each of its layers by itself.

    Args:
        model: a whole model, the same in every process.
        layers: its blocks.

    Raises:
        NeutralizeError: there is no process group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise NeutralizeError(
            "influence: expected several processes to shard a model over, got one; start it with torchrun"
        )
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
