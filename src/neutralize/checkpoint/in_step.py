"""Runs of one model on several inputs, in step, so that what one reads serves all: threads that take turns.

One thread runs at a time. It goes on until it needs a weight that is not in memory; then the others come up to the same
place, and the weight is read once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from neutralize.verify import Entered

T = TypeVar("T")


class _Ended(BaseException):
    """Another run has failed: this one is of no use any more."""


class Turns:
    """Whose turn it is."""

    def __init__(self, count: int) -> None:
        """Have ``count`` runs take turns."""
        self._passed = threading.Condition()
        # What each run waits for, with whether it can help itself; ``None``: it is over.
        self._waiting: list[tuple[Callable[[], bool], bool] | None] = [(lambda: True, False)] * count
        self._helped = [0] * count
        self._turn = 0
        self._own = threading.local()
        self._error: BaseException | None = None

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Do all jobs, and return what they return; the first error of one ends all and is raised."""
        results: dict[int, T] = {}

        def work(place: int, job: Callable[[], T]) -> None:
            self._own.place = place
            try:
                self._await()
                results[place] = job()
            except _Ended:
                pass
            except BaseException as error:
                self._error = self._error or error
            finally:
                with self._passed:
                    self._waiting[place] = None
                    self._pass_on()

        threads = [threading.Thread(target=work, args=each, daemon=True) for each in enumerate(jobs)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C
            self._error = self._error or error
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        if self._error is not None:
            raise self._error
        return [results[place] for place in range(len(jobs))]

    def wait(self, is_ready: Callable[[], bool], *, helps_itself: bool = False) -> None:
        """Let others have their turn until something is so.

        Args:
            is_ready: whether it is.
            helps_itself: go on without it where no other can go on.
        """
        state = torch.get_rng_state()  # each run draws its own random numbers
        with self._passed:
            self._waiting[self._own.place] = is_ready, helps_itself
            self._pass_on()
        self._await()
        torch.set_rng_state(state)

    def all_wait_for(self, is_ready: Callable[[], bool]) -> bool:
        """Whether every run that is not over waits for this very thing."""
        return all(each is None or each[0] is is_ready for each in self._waiting)

    def _pass_on(self) -> None:
        places = [place for place, waiting in enumerate(self._waiting) if waiting is not None]
        ready = [place for place in places if self._waiting[place][0]()]  # type: ignore[index]
        if not ready and self._error is None:
            able = [place for place in places if self._waiting[place][1]]  # type: ignore[index]
            ready = sorted(able, key=lambda place: self._helped[place])[:1]  # the one that is furthest behind
            for place in ready:
                self._helped[place] += 1
        self._turn = ready[0] if ready else -1
        self._passed.notify_all()

    def _await(self) -> None:
        with self._passed:
            self._passed.wait_for(lambda: self._error is not None or self._turn == self._own.place)
        if self._error is not None:
            raise _Ended


class EnteredInStep(Entered):
    """What entered modules in the first of the runs; the others wait for it."""

    def __init__(self, turns: Turns) -> None:
        """Know the turns that are taken."""
        super().__init__()
        self._turns = turns

    def of(self, name: str, *, edited: bool) -> torch.Tensor | None:
        """Return what entered a module; ``None`` if it was not called."""
        if not self.is_settled(name, edited=edited):
            self._turns.wait(lambda: self.is_settled(name, edited=edited))
        return super().of(name, edited=edited)
