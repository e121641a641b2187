"""Checkpoints as users hold them: plan for one, edit it in place or to a new place, put every byte back."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neutralize.audit import Deed, audited, recorded, recording
from neutralize.checkpoint.journal import Edition, Journal
from neutralize.checkpoint.layout import Layout
from neutralize.checkpoint.locate import locate
from neutralize.checkpoint.naming import Names, retarget
from neutralize.checkpoint.patch import Patch, written_bytes
from neutralize.checkpoint.region import Files
from neutralize.errors import NeutralizeError
from neutralize.plan import Edit, Plan, changed_again, dtype_name
from neutralize.progress import Advance, silent
from neutralize.select import tensors_of

if TYPE_CHECKING:
    from torch import nn

    from neutralize.checkpoint.output import Written
    from neutralize.checkpoint.streamed import StreamedVerification
    from neutralize.dataflow import Inputs
    from neutralize.distributed.team import Team

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """The state of a checkpoint that is edited in place.

    Attributes:
        path: the checkpoint.
        state: ``intact`` (no edit can be undone), ``edited`` (every edit is whole), ``changed`` (something else has
            written where an edit did; only ``check`` finds out), ``interrupted`` (an edit was cut off: the files are
            half-written until ``restore``) or ``busy`` (a process is editing it now).
        edits: those that can be undone, earliest first.
        undone: numbers of edits whose old bytes are back although nobody has restored them: the file was replaced.
        changed: numbers of edits where other bytes are than those that they wrote.
        leftovers: files that a killed run has left and nothing depends on; ``restore`` removes them.
    """

    path: Path
    state: str
    edits: tuple[Edition, ...]
    undone: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()
    leftovers: tuple[Path, ...] = ()


class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        path: the folder or file.
    """

    def __init__(self, path: str | os.PathLike[str], *, factory: str | None = None) -> None:
        """Name a checkpoint; nothing is read yet.

        Args:
            path: a folder (Hugging Face, ``torch.distributed.checkpoint``) or a ``.safetensors``, ``.gguf``, ``.pt``,
                ``.pth`` or ``.bin`` file.
            factory: ``"package.module:callable"`` that returns the model, where the folder has no ``config.json`` of
                transformers; called on the meta device.

        Raises:
            NeutralizeError: there is nothing at that path.
        """
        self.path = Path(path)
        self._factory = factory
        if not self.path.exists():
            from neutralize.checkpoint.output import partial

            got, remedy = "nothing", "check the path"
            if partial(self.path).is_dir():
                got, remedy = "a copy that is not finished", "wait, or if it was cut off: neutralize restore removes it"
            raise NeutralizeError(f"checkpoint: expected a folder or a file, got {got} at {str(self.path)!r}; {remedy}")
        self.journal = Journal(self.path if self.path.is_dir() else self.path.parent)

    # ---- reading ------------------------------------------------------------------------------------------------
    @cached_property
    def layout(self) -> Layout:
        """Where the tensors are; read at the first use."""
        return locate(self.path)

    @cached_property
    def _built(self) -> tuple[nn.Module, Names]:
        from neutralize.checkpoint.model import meta_model

        key = (self._factory, self.path.resolve(), *_described(self.layout))
        if key not in _BUILT:
            _BUILT[key] = meta_model(self.layout, self._factory)
            while len(_BUILT) > _BUILT_KEPT:
                del _BUILT[next(iter(_BUILT))]
        return _BUILT[key]

    @property
    def model(self) -> nn.Module:
        """The model on the meta device, without memory for weights; parameters have the stored dtypes."""
        return self._built[0]

    @property
    def names(self) -> Names:
        """Which stored tensors each parameter of the model comes from."""
        return self._built[1]

    @property
    def status(self) -> Status:
        """The state that the journal tells."""
        if self.journal.is_locked():
            return Status(self.path, "busy", ())
        edits = tuple(edition for edition in self.journal.editions() if self._touches(edition))
        state = "intact" if not edits else "edited" if all(edit.is_done for edit in edits) else "interrupted"
        return Status(self.path, state, edits, leftovers=tuple(self.journal.leftovers()))

    def check(self, advance: Advance = silent) -> Status:
        """Return the state that journal and files tell: every byte that an edit wrote is read and compared.

        Args:
            advance: told the bytes as they are read; what it costs depends on the edits, not on the checkpoint.
        """
        told = self.status
        if told.state != "edited":
            return told
        found = {edition.number: self.journal.found(edition, advance) for edition in told.edits}
        undone, changed = (
            tuple(n for n, state in found.items() if state == wanted) for wanted in ("undone", "changed")
        )
        return replace(told, state="changed" if undone or changed else "edited", undone=undone, changed=changed)

    def patches(self, edits: Plan | Sequence[Edit]) -> list[Patch]:
        """What a plan (edits of parameters) or edits of stored tensors do to the files.

        Raises:
            NeutralizeError: something does not fit; all problems are listed.
        """
        if not isinstance(edits, Plan):
            with Files(self.layout.root) as files:
                return self.layout.patches(edits, files)
        self._check_fits(edits)
        self._check_not_applied(edits)
        tied = [{source.stored for name in group for source in self.names.get(name, ())} for group in edits.tied]
        with Files(self.layout.root) as files:
            return self.layout.patches(retarget(edits.edits, self.names, self.layout), files, tied)

    def verify(
        self,
        plan: Plan,
        inputs: Inputs | None = None,
        *,
        applied: bool = False,
        detailed: bool = False,
        advance: Advance = silent,
    ) -> StreamedVerification:
        """Measure a plan on the files, a few tensors in memory at a time; see ``checkpoint.streamed.verify``.

        Of a plan that was ``applied`` in place the undo tells what was there before, and every byte has to be as the
        edit left it.
        """
        from neutralize.checkpoint.streamed import verify

        before = self._edition_of(plan) if applied else None
        if not applied:
            self._check_not_applied(plan, "restore it first, or verify it as applied (--applied)")
        return verify(
            self.layout,
            plan,
            inputs,
            factory=self._factory,
            applied=applied,
            before=before,
            detailed=detailed,
            advance=advance,
        )

    def _edition_of(self, plan: Plan) -> Edition | None:
        """The last edit that brought a plan into the files, if no later one has written over its bytes."""
        editions = [edition for edition in self.journal.editions() if self._touches(edition)]
        for place, edition in reversed(list(enumerate(editions))):
            if edition.digest == plan.digest and edition.is_done:
                return None if any(edition.is_under(later) for later in editions[place + 1 :]) else edition
        return None

    def _check_fits(self, plan: Plan) -> None:
        """Check that a plan was made for parameters like those of this checkpoint's model.

        Raises:
            NeutralizeError: it was made for another model; all problems are listed.
        """
        named = tensors_of(self.model)
        problems = []
        for edit in plan.edits:
            tensor = named.get(edit.parameter)
            if tensor is None:
                problems.append(f"expected a parameter {edit.parameter!r}, got a model without it")
            elif tuple(tensor.shape) != edit.shape:
                problems.append(f"expected shape {list(edit.shape)} for {edit.parameter!r}, got {list(tensor.shape)}")
            elif dtype_name(tensor.dtype) != edit.dtype:
                problems.append(f"expected {edit.dtype} for {edit.parameter!r}, got {dtype_name(tensor.dtype)}")
        if problems:
            listing = "".join(f"\n  - {problem}" for problem in dict.fromkeys(problems))
            raise NeutralizeError(
                f"checkpoint: expected a plan that fits {str(self.path)!r}, got one that was made for another "
                f"model; plan "
                f"for this checkpoint:{listing}"
            )

    def _check_not_applied(self, plan: Plan, advice: str = "restore it first") -> None:
        """Check that the files do not hold a plan that would change a second time what it has changed.

        Raises:
            NeutralizeError: they do.
        """
        name = changed_again(plan.edits)
        edition = self._edition_of(plan) if name else None
        if edition is not None and self.journal.found(edition) == "edited":
            raise NeutralizeError(
                f"checkpoint: expected a plan that is not applied to {str(self.path)!r}, got that of edit "
                f"{edition.number}, which would change {name!r} a second time; {advice}"
            )

    # ---- writing ------------------------------------------------------------------------------------------------
    def recover(self, advance: Advance = silent) -> list[Edition]:
        """Put back the bytes of an edit that was cut off, if one was.

        Args:
            advance: told bytes as they are put back.

        Returns:
            What was rolled back.

        Raises:
            NeutralizeError: another process is editing, or the disk fails.
        """
        if self.status.state == "intact":
            return []
        with self.journal.locked():
            undone = self._roll_back_what_was_cut_off(advance)
        self.__dict__.pop("layout", None)
        return undone

    def _roll_back_what_was_cut_off(self, advance: Advance = silent) -> list[Edition]:
        with recording() as record:
            undone = self.journal.recover(advance)
            for edition in undone:
                record(self._undoing(edition), None)
        return undone

    def _undoing(self, edition: Edition) -> Deed:
        about = edition.digest, edition.strategy, edition.layers, edition.tensors
        return Deed("restore", self._target, *about, edition.nbytes)

    @property
    def _target(self) -> str:
        return str(self.path.absolute())

    def _deed(self, action: str, edits: Plan | Sequence[Edit], digest: str, patches: Sequence[Patch]) -> Deed:
        count = written_bytes(patches)
        if isinstance(edits, Plan):
            return Deed.of(edits, action, self._target, count)
        names = tuple(dict.fromkeys(edit.parameter for edit in edits))
        return Deed(action, self._target, digest, tensors=names, bytes=count)

    def _edit(self, patches: Sequence[Patch], deed: Deed, *rest: Any) -> Edition:
        """Edit in place and record it; what cannot be recorded is put back."""
        edition = None
        try:
            with recorded(deed):
                edition = self.journal.edit(patches, self._marks(patches), deed, *rest)
        except BaseException:
            if edition is not None:
                self.journal.roll_back(edition)
            raise
        _LOGGER.debug("edit %d of %s: %d bytes are kept in %s", edition.number, self.path, edition.nbytes, edition.path)
        return edition

    def apply(
        self, edits: Plan | Sequence[Edit], *, digest: str = "", about: str = "", advance: Advance = silent
    ) -> FileUndo:
        """Edit in place, so that every byte can be put back; an edit that was cut off is rolled back first.

        Args:
            edits: a plan, or edits of stored tensors.
            digest: of the edits, where they are no plan.
            about: what is done, in words.
            advance: told bytes as they are kept and written.

        Raises:
            NeutralizeError: the edits do not fit, a file may not be written, another process is editing, or the disk
                fails; nothing has changed.
        """
        with self.journal.locked():
            self._roll_back_what_was_cut_off(advance)
            patches = self.patches(edits)
            if isinstance(edits, Plan):
                about = about or _about(edits)
            edition = self._edit(patches, self._deed("apply", edits, digest, patches), about, advance)
        return FileUndo(self, edition)

    def apply_together(self, plan: Plan, team: Team, advance: Advance = silent) -> FileUndo:
        """Edit in place in all processes of a team at once, each of which writes files of its own; see ``apply``.

        Raises:
            NeutralizeError: as for ``apply``, in any of them: all get the error, and nothing has changed.
        """
        from neutralize.checkpoint.together import Together

        together = Together(team)
        with self.journal.locked() if together.leads else nullcontext():
            if together.leads:
                self._roll_back_what_was_cut_off(advance)
            together.agree(plan)
            self.__dict__.pop("layout", None)
            patches = self.patches(plan)
            together.see(patches)
            if not together.leads:
                return FileUndo(self, together.follow(self, patches, advance))
            edition = self._edit(patches, self._deed("apply", plan, "", patches), _about(plan), advance, together)
        together.committed(edition)
        return FileUndo(self, edition)

    def _marks(self, patches: Sequence[Patch]) -> dict[str, tuple[int, bytes]]:
        """The marks of what is written, and of what says where everything is."""
        touched = {region.file for patch in patches for region in patch.regions}
        untouched = set(self.layout.files) - touched
        return {file: mark for file, mark in self.layout.marks.items() if file not in untouched}

    def write(
        self,
        edits: Plan | Sequence[Edit],
        output: str | os.PathLike[str],
        *,
        link: bool = False,
        verify: bool = False,
        digest: str = "",
        advance: Advance = silent,
    ) -> Written:
        """Write an edited copy; see ``neutralize.checkpoint.output.write_to``."""
        from neutralize.checkpoint.output import remove, write_to

        state = self.status.state
        if state in ("interrupted", "busy"):
            raise NeutralizeError(
                f"checkpoint: expected a whole checkpoint at {str(self.path)!r}, got one that is {state}; "
                f"{'run: neutralize restore' if state == 'interrupted' else 'wait until it is done'}"
            )
        patches = self.patches(edits)
        deed = self._deed("write", edits, digest, patches)
        deed = replace(deed, target=os.path.abspath(output), source=deed.target)
        written = None
        try:
            with recorded(deed):
                written = write_to(
                    self.path, self.layout, patches, Path(output), link=link, verify=verify, advance=advance
                )
        except BaseException:
            if written is not None:
                remove(written.path)
            raise
        return written

    def restore(self, *, everything: bool = False, force: bool = False, advance: Advance = silent) -> list[Edition]:
        """Put back the bytes of what was cut off; if nothing was, those of the last edit.

        Args:
            everything: undo all edits, the last one first.
            force: also where something else has written into the same bytes since; not into a file that was replaced
                by one with another header, where they belong nowhere.
            advance: told bytes as they are put back.

        Returns:
            The edits that were undone; none if only the leftovers of a killed run were removed.

        Raises:
            NeutralizeError: there is nothing to undo, or something else has changed the files since.
        """
        leftovers = self.journal.leftovers()
        with self.journal.locked():
            undone = self._roll_back_what_was_cut_off(advance)
            editions = [edition for edition in self.journal.editions() if self._touches(edition)]
            if not undone and not editions and not leftovers:
                raise NeutralizeError(
                    f"restore: expected an edit of {str(self.path)!r} that can be undone, got none; every byte is "
                    f"as it "
                    "was"
                )
            for edition in reversed(editions) if everything else reversed([] if undone else editions[-1:]):
                self._undo(edition, force=force, advance=advance)
                undone.append(edition)
        self.__dict__.pop("layout", None)
        return undone

    def _touches(self, edition: Edition) -> bool:
        return self.path.is_dir() or self.path.name in edition.files

    def _undo(
        self, edition: Edition, *, force: bool = False, advance: Advance = silent, also: Sequence[Path] = ()
    ) -> None:
        """Put back the bytes of an edit that is the last one of its files, and still as it was left."""
        for later in self.journal.editions():
            if later.number > edition.number and set(later.files) & set(edition.files):
                raise NeutralizeError(
                    f"restore: expected edit {edition.number} to be the last one of its files, got edit {later.number} "
                    f"after it; restore {str(self.journal.root)!r} first"
                )
        if not force:
            self.journal.check_unchanged(edition)
        with recorded(self._undoing(edition), also):
            self.journal.roll_back(edition, advance)

    def __fspath__(self) -> str:
        """Return the path."""
        return str(self.path)

    def __repr__(self) -> str:
        """Name the path."""
        return f"Checkpoint({str(self.path)!r})"


def _about(plan: Plan) -> str:
    return f"{plan.strategy}: {', '.join(entry.layer for entry in plan.layers)}"


_BUILT: dict[tuple[object, ...], tuple[nn.Module, Names]] = {}
"""The last models that were built: a path is often planned for, edited and restored in one process."""

_BUILT_KEPT = 4


def _described(layout: Layout) -> tuple[object, ...]:
    """All that a model is built from: its config, and what the tensors are called and look like."""
    config = b"" if layout.config is None else (layout.config / "config.json").read_bytes()
    return config, tuple((name, stored.shape, stored.encoding) for name, stored in layout.tensors.items())


class FileUndo:
    """Puts back every byte that an edit of a checkpoint overwrote; it outlives the process: ``neutralize restore``."""

    def __init__(self, checkpoint: Checkpoint, edition: Edition) -> None:
        """Take what was done.

        Args:
            checkpoint: the checkpoint.
            edition: the edit.
        """
        self._checkpoint = checkpoint
        self._audited = audited()
        self.edition = edition

    @property
    def digest(self) -> str:
        """Digest of the plan."""
        return self.edition.digest

    @property
    def held_bytes(self) -> int:
        """How many bytes of the disk the copies take."""
        return self.edition.nbytes

    @property
    def restored(self) -> bool:
        """Whether nothing is left to put back."""
        return not self.edition.path.exists()

    def restore(self) -> None:
        """Put back every byte, also under later edits of other bytes; a second call does nothing.

        Raises:
            NeutralizeError: a later edit or something else has written there since.
        """
        if self.restored:
            return
        journal = self._checkpoint.journal
        with journal.locked():
            self._checkpoint._roll_back_what_was_cut_off()
            if self.restored:
                return
            self._checkpoint._undo(self.edition, also=self._audited)

    def __repr__(self) -> str:
        """Say what is held."""
        return f"FileUndo({'restored' if self.restored else f'edit {self.edition.number}, {self.held_bytes} bytes'})"


def as_checkpoint(target: Any) -> Checkpoint | None:
    """Return the checkpoint that a path names, or ``None`` for what is no path."""
    if isinstance(target, Checkpoint):
        return target
    return Checkpoint(target) if isinstance(target, str | os.PathLike) else None
