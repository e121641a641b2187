"""Teams: the processes that hold a model together, and how they agree before one of them writes.

Every process says what it is about to do and whether it can; each hears all the others before any of them goes on, and
once more when all are done. A process that fails, dies or comes too late is so a failure of all.
"""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from neutralize.distributed.part import is_dtensor
from neutralize.errors import NeutralizeError
from neutralize.plan import TIMEOUT


class TeamError(NeutralizeError):
    """What every process of a team is told: one of them has a problem, or did not answer."""


Message = TypeVar("Message")

_COUNTS: dict[tuple[int, ...], int] = {}
"""How many times each set of ranks has exchanged messages; never reset, for a store may outlive a process group."""


def same_plan(digests: Iterable[str]) -> None:
    """Check that the processes of a team have one plan: what this finds in one process it finds in all.

    Args:
        digests: of the plan of each.

    Raises:
        TeamError: they have several.
    """
    found = list(digests)
    different = sorted(set(found))
    if len(different) > 1:
        raise TeamError(
            f"apply: expected the same plan in all {len(found)} processes, got {len(different)} different ones "
            f"({', '.join(digest[:12] for digest in different)}); make it once and hand it on, or plan from the same "
            "model everywhere"
        )


class Team:
    """Processes that act together. They talk over the store through which the process group came together.

    Attributes:
        ranks: their ranks in the default group, in order.
        timeout: seconds to wait for the others.
    """

    def __init__(self, ranks: Iterable[int], timeout: float = TIMEOUT) -> None:
        """Take the members, this process among them."""
        self.ranks = tuple(sorted(ranks))
        self.timeout = timeout

    @property
    def leads(self) -> bool:
        """Whether this process is the first member."""
        return bool(dist.get_rank() == self.ranks[0])

    def exchange(self, op: str, stage: str, message: Message, problem: str | None = None) -> list[Message]:
        """Hand a message to all members and return theirs, in the order of their ranks.

        Args:
            op: what is going on, for the error.
            stage: how far it has come; all members must be at the same.
            message: anything that pickles, small.
            problem: why this process cannot go on, or ``None``.

        Raises:
            TeamError: a member has a problem, is elsewhere, or did not answer in time; every member gets the error.
        """
        number = _COUNTS[self.ranks] = _COUNTS.get(self.ranks, 0) + 1
        store = store_of(f"neutralize/{'.'.join(map(str, self.ranks))}")
        rank = dist.get_rank()
        waited = datetime.timedelta(seconds=self.timeout)
        keys = [f"{number}/{member}" for member in self.ranks]
        verdict, said = "go on", "another process has given up waiting"
        try:
            store.set(f"{number}/{rank}", pickle.dumps((stage, message, problem)))
            try:
                store.wait(keys, waited)
            except RuntimeError as error:
                verdict, said = "give up", str(error)
            # Whoever is first decides for all: no process goes on while another gives up.
            if store.compare_set(f"{number}/verdict", "", verdict) != b"go on":
                raise RuntimeError(said)
            answers = [pickle.loads(answer) for answer in store.multi_get(keys)]
            for past in (rank, "verdict"):
                store.delete_key(f"{number - 1}/{past}")  # all have read it, or they would not have answered
        except RuntimeError as error:  # a timeout, or the store is gone with the process that holds it
            raise TeamError(
                f"{op}: expected an answer of all {len(self.ranks)} processes within {self.timeout:g} s, got none of "
                f"some ({str(error).strip().splitlines()[0][:120]}); nothing was written: look at the other processes"
            ) from error
        problems = {member: said for member, (_, _, said) in zip(self.ranks, answers, strict=True) if said is not None}
        texts = set(problems.values())
        if len(texts) == 1:
            where = "" if len(problems) == len(self.ranks) else f" [rank {', '.join(map(str, problems))}]"
            raise TeamError(f"{texts.pop()}{where}")
        if problems:
            listing = "".join(f"\n  - rank {member}: {said}" for member, said in problems.items())
            raise TeamError(f"{op}: expected every process to be able to, got {len(problems)} problems:{listing}")
        stages = {said for said, _, _ in answers}
        if len(stages) > 1:
            raise TeamError(
                f"{op}: expected all processes at the same point, got {' and '.join(sorted(stages))}; make the same "
                "calls in the same order in each"
            )
        return [said for _, said, _ in answers]

    @contextmanager
    def telling(self, op: str) -> Iterator[None]:
        """Let the others know, who wait for the next exchange, if this process fails on the way to it."""
        try:
            yield
        except (TeamError, SystemExit):  # who is asked to end (SIGTERM) cannot wait for others, which are ending too
            raise
        except BaseException as error:
            with suppress(TeamError):
                self.exchange(op, "", None, str(error) or type(error).__name__)
            raise


def store_of(prefix: str) -> Any:
    """The store of the default process group, for keys of our own."""
    from torch.distributed import distributed_c10d

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun may keep the store when it starts all again
    return distributed_c10d.PrefixStore(f"{prefix}/{attempt}", distributed_c10d._get_default_store())


def team_of(
    model: object, tensors: Iterable[torch.Tensor], group: Any, timeout: float, *, together: bool = False
) -> Team | None:
    """Return the processes that hold a model together; ``None`` if this one is alone, or holds nothing of it.

    Args:
        model: as it was given: one in ``DistributedDataParallel`` is held by the processes of its group.
        tensors: of the model.
        group: a process group that the caller names, or ``None``: that of the DTensors' meshes, or all processes if
            none of these has all the ranks of the others.
        timeout: in seconds.
        together: whether the caller says that processes hold it together: all of them if there is no ``group``.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    if group is not None:
        ranks = set(dist.get_process_group_ranks(group))
    elif isinstance(model, nn.parallel.DistributedDataParallel):
        ranks = set(dist.get_process_group_ranks(model.process_group))
    elif together:
        ranks = set(range(dist.get_world_size()))
    else:
        meshes = {frozenset(tensor.device_mesh.mesh.flatten().tolist()) for tensor in tensors if is_dtensor(tensor)}  # type: ignore[attr-defined]
        ranks = set().union(*meshes)
        if ranks and ranks not in meshes:  # experts on one axis, attention on another: no process sees all the others
            ranks = set(range(dist.get_world_size()))
    return Team(ranks, timeout) if len(ranks) > 1 and dist.get_rank() in ranks else None
