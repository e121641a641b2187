"""Independent pieces of inference side by side, each on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 8
"""Each piece holds the logits of a window, some 100 MB, twice."""


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield ``work(item)`` for every item in order, without gradients, as many at a time as torch has threads.

    Threads that share the work inside an op wait for each other at its end, hundreds of times per window, and wait
    actively: on a machine that is busy otherwise that costs several times the work itself. Whole pieces need no such
    meeting. An op on one thread also gives the same bits each time, whoever else computes.

    Args:
        work: called in other threads: it sees the hooks of modules, but no context of the calling thread.
        items: what it is called with.
    """

    def without_gradients(item: Item) -> Result:
        with torch.inference_mode():
            return work(item)

    workers = max(1, min(torch.get_num_threads(), len(items), _MOST))
    with _one_thread_per_op(), ThreadPoolExecutor(workers) as pool:
        yield from pool.map(without_gradients, items)


@contextmanager
def _one_thread_per_op() -> Iterator[None]:
    """Let ops use one thread, in this thread and in those started meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
