"""Teams: the processes that hold a model together, and how they agree before one of them writes.

Every process says what it is about to do and whether it can; each hears all the others before any of them goes on, and
once more when all are done. A process that fails, dies or comes too late is so a failure of all.
"""

from __future__ import annotations

import datetime
import weakref
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

_TALKING: weakref.WeakKeyDictionary[Any, dict[tuple[tuple[int, ...], float], Any]] = weakref.WeakKeyDictionary()
"""Per default group the groups that teams talk over: gloo ones, which keep to a timeout and need no GPU."""


class Team:
    """Processes that act together.

    Attributes:
        ranks: their ranks in the default group, in order.
        timeout: seconds to wait for the others.
    """

    def __init__(self, ranks: Iterable[int], timeout: float = TIMEOUT) -> None:
        """Take the members, this process among them."""
        self.ranks = tuple(sorted(ranks))
        self.timeout = timeout

    @property
    def place(self) -> int:
        """The number of this process among the members, from 0."""
        return self.ranks.index(dist.get_rank())

    def exchange(self, op: str, message: Message, problem: str | None) -> list[Message]:
        """Hand a message to all members and return theirs, in the order of their ranks.

        Args:
            op: what is going on, for the error.
            message: anything that pickles, small.
            problem: why this process cannot go on, or ``None``.

        Raises:
            TeamError: a member has a problem, or did not answer in time; every member gets the error.
        """
        answers: list[Any] = [None] * len(self.ranks)
        try:
            dist.all_gather_object(answers, (message, problem), group=self._group())
        except (RuntimeError, ValueError) as error:  # gloo and the store raise RuntimeErrors of several kinds
            self._forget()
            raise TeamError(
                f"{op}: expected an answer of all {len(self.ranks)} processes within {self.timeout:g} s, got none of "
                f"some ({str(error).splitlines()[0][:200]}); nothing was left written here: look at the other "
                "processes"
            ) from error
        problems = [(rank, said) for rank, (_, said) in zip(self.ranks, answers, strict=True) if said is not None]
        if problems:
            texts = {said for _, said in problems}
            if len(texts) == 1:
                where = "all processes" if len(problems) == len(self.ranks) else f"rank {_listed(problems)}"
                raise TeamError(f"{texts.pop()} [on {where}]")
            listing = "".join(f"\n  - rank {rank}: {said}" for rank, said in problems)
            raise TeamError(f"{op}: expected every process to be able to, got problems:{listing}")
        return [said for said, _ in answers]

    @contextmanager
    def telling(self, op: str) -> Iterator[None]:
        """Let the others know, who wait for the next exchange, if this process fails on the way to it."""
        try:
            yield
        except TeamError:
            raise
        except BaseException as error:
            with suppress(TeamError):
                self.exchange(op, None, str(error) or type(error).__name__)
            raise

    def _group(self) -> Any:
        known = _TALKING.setdefault(dist.group.WORLD, {})
        key = (self.ranks, self.timeout)
        if key not in known:
            known[key] = dist.new_group(
                list(self.ranks),
                timeout=datetime.timedelta(seconds=self.timeout),
                backend="gloo",
                use_local_synchronization=True,
            )
        return known[key]

    def _forget(self) -> None:
        """Do not use the group again: messages of a failed exchange may still be under way in it."""
        _TALKING.get(dist.group.WORLD, {}).pop((self.ranks, self.timeout), None)


def _listed(problems: list[tuple[int, str]]) -> str:
    return ", ".join(str(rank) for rank, _ in problems)


def team_of(
    model: object, tensors: Iterable[torch.Tensor], group: Any, timeout: float, *, described: bool = False
) -> Team | None:
    """Return the processes that hold a model together; ``None`` if this one is alone.

    Args:
        model: as it was given: one in ``DistributedDataParallel`` is held by the processes of its group.
        tensors: of the model.
        group: a process group that the caller names, or ``None``: that of the DTensors' meshes.
        timeout: in seconds.
        described: whether the caller describes shards, of all processes if there is no ``group``.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    if group is not None:
        ranks = set(dist.get_process_group_ranks(group))
    elif isinstance(model, nn.parallel.DistributedDataParallel):
        ranks = set(dist.get_process_group_ranks(model.process_group))
    elif described:
        ranks = set(range(dist.get_world_size()))
    else:
        ranks = set()
        for tensor in tensors:
            if is_dtensor(tensor):
                ranks.update(tensor.device_mesh.mesh.flatten().tolist())  # type: ignore[attr-defined]
    return Team(ranks, timeout) if len(ranks) > 1 else None


def resharded(model: nn.Module) -> None:
    """Let FSDP2 put its shards in place, where it keeps whole parameters between a forward pass and the next."""
    if not dist.is_available() or not dist.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
