"""One edit of a checkpoint in place by several processes: one keeps the undo, and each writes files of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from neutralize.checkpoint.handle import Checkpoint
from neutralize.checkpoint.journal import Edition, explained, run
from neutralize.checkpoint.patch import Patch, written_bytes
from neutralize.checkpoint.region import Files
from neutralize.distributed.team import Team, TeamError, same_plan
from neutralize.errors import NeutralizeError
from neutralize.plan import Plan
from neutralize.progress import Advance

_SLOW = 1e7
"""Bytes per second that a disk takes at least: what has to be written makes the others wait longer by that."""


class Together:
    """The processes of a team that edit a checkpoint; the first one holds the lock and keeps the undo.

    Attributes:
        patience_s: seconds to wait for the others.
    """

    def __init__(self, team: Team) -> None:
        """Take the team."""
        self._team = team
        self.leads = team.leads

    @property
    def patience_s(self) -> float:
        """Seconds to wait for the others."""
        return self._team.timeout

    def agree(self, plan: Plan) -> None:
        """Check that all processes have the same plan."""
        same_plan(self._team.exchange("apply", "its begin", plan.digest))

    def see(self, patches: Sequence[Patch]) -> None:
        """Check that all see the same files: none has been marked yet."""
        self._team.timeout += written_bytes(patches) / _SLOW
        regions = [region for patch in patches for region in patch.regions]
        if any(other != regions for other in self._team.exchange("apply", "its files", regions)):
            raise TeamError(
                "apply: expected the same checkpoint in all processes, got others; give a path on a shared file system"
            )

    def run(self, patches: Sequence[Patch], files: Files, advance: Advance) -> None:
        """Carry out this process's share, and wait for the others; the undo is kept."""
        self._team.exchange("apply", "its undo", None)
        self._team.exchange("apply", "its writing", None)
        self._share(patches, files, advance)
        self._team.exchange("apply", "its end", None)

    def follow(self, checkpoint: Checkpoint, patches: Sequence[Patch], advance: Advance) -> Edition:
        """Carry out the share of a process that does not lead, and return the edit when it is whole."""
        self._team.exchange("apply", "its undo", None)
        journal = checkpoint.journal
        with explained("checkpoint"), journal.joined(), Files(journal.root, writable=True) as files:
            self._team.exchange("apply", "its writing", None)  # who leads must see all who may write, should it fail
            self._share(patches, files, advance)
        self._team.exchange("apply", "its end", None)
        number = self.committed(None)
        for edition in journal.editions():
            if edition.number == number:
                return edition
        raise NeutralizeError(f"apply: expected edit {number} in {str(journal.folder)!r}, got none; restore it")

    def committed(self, edition: Edition | None) -> int:
        """Tell, or hear, that the edit is whole; return its number."""
        numbers = self._team.exchange("apply", "its commit", None if edition is None else edition.number)
        return next(number for number in numbers if number is not None)

    def _share(self, patches: Sequence[Patch], files: Files, advance: Advance) -> None:
        own = shares(patches, len(self._team.ranks))[self._team.ranks.index(dist.get_rank())]
        run(own, files, advance)
        for file in dict.fromkeys(region.file for patch in own for region in patch.regions):
            files.sync(file)


def shares(patches: Sequence[Patch], count: int) -> list[list[Patch]]:
    """Divide patches so that no file is written by two processes, the largest pieces first to who has least.

    Args:
        patches: in their order, which is kept: a checksum comes after what it covers.
        count: of processes.
    """
    pieces: list[tuple[set[str], list[int]]] = []
    for number, patch in enumerate(patches):
        files, numbers = {region.file for region in patch.regions}, [number]
        for piece in [piece for piece in pieces if piece[0] & files]:
            pieces.remove(piece)
            files, numbers = files | piece[0], piece[1] + numbers
        pieces.append((files, numbers))
    sizes = {id(numbers): written_bytes([patches[number] for number in numbers]) for _, numbers in pieces}
    owned: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for _, numbers in sorted(pieces, key=lambda piece: -sizes[id(piece[1])]):
        least = loads.index(min(loads))
        owned[least] += numbers
        loads[least] += sizes[id(numbers)]
    return [[patches[number] for number in sorted(numbers)] for numbers in owned]
