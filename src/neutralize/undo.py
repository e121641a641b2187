"""Undo: the bytes that an application overwrote, and how to put them back."""

from __future__ import annotations

import os
import pickle
import warnings
import weakref
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from neutralize import adapters
from neutralize.audit import Deed, recorded, source_of
from neutralize.distributed.part import Block, Window
from neutralize.distributed.wrapped import note_written, resharded
from neutralize.errors import NeutralizeError
from neutralize.offload import offloaded
from neutralize.select import tensors_of, unwrap


@dataclass
class Saved:
    """A copy of what was overwritten in one tensor.

    Attributes:
        name: qualified name of the parameter or buffer.
        tensor: the live tensor.
        block: gives the written part of the tensor as a view.
        values: a copy of that part, same dtype and device.
        requires_grad: the flag of the tensor before the application.
        shape: the tensor's.
    """

    name: str
    tensor: torch.Tensor
    block: Block
    values: torch.Tensor
    requires_grad: bool
    shape: torch.Size


_FORMAT = "neutralize undo 1"

_OPEN: MutableMapping[torch.Tensor, list[weakref.ref[Undo]]] = WeakIdKeyDictionary()
"""Per tensor the applications that can still be undone, earliest first."""


def bytes_of(saved: Iterable[Saved]) -> int:
    """How many bytes of memory copies take."""
    return sum(entry.values.nbytes for entry in saved)


def open_on(tensor: torch.Tensor) -> list[Undo]:
    """The applications that have written in a tensor and can still be undone, earliest first."""
    return [undo for reference in _OPEN.get(tensor, []) if (undo := reference()) is not None]


def overwrite_(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values into a tensor, whatever autograd thinks of it; its version is bumped.

    Args:
        tensor: any floating-point tensor, one made under ``torch.inference_mode`` included.
        values: of its shape.
    """
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(values)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a model without leaving a trace in it: copies stand in for its buffers, and the random state comes back.

    A batch norm in training mode moves its statistics, a dropout draws, some modules count their calls.
    """
    held = [(module._buffers, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    copies = {id(buffer): buffer.detach().clone() for _, _, buffer in held if buffer is not None}
    devices = {tensor.device.index for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(devices):
        try:
            for buffers, name, buffer in held:
                buffers[name] = None if buffer is None else copies[id(buffer)]
            yield
        finally:
            for buffers, name, buffer in held:
                buffers[name] = buffer


class Undo:
    """Puts back every bit that an application of a plan overwrote, and the ``requires_grad`` flags.

    Several applications to the same tensors unwind in reverse order. In another order too every bit comes back in the
    end: ``restore`` then puts back its own part at once, also under a later application, and takes it out of what that
    one will put back. A second call of ``restore`` does nothing.
    """

    def __init__(
        self, saved: list[Saved], deed: Deed, model: nn.Module, *, files: Iterable[Path] = (), leads: bool = True
    ) -> None:
        """Take the copies, in the order in which they were made.

        Args:
            saved: one entry per overwritten block.
            deed: the application, for the audit.
            model: the model that it was applied to.
            files: audit files that it was recorded in here, and its undo will be.
            leads: whether this process records for the others what they undo with it, in other files too.
        """
        self._saved = saved
        self._model = weakref.ref(model)
        self._deed = deed
        self._files, self._leads = tuple(files), leads
        self._adapters = adapters.premise(model, self._scope(saved))
        for tensor in self._tensors():
            _OPEN[tensor] = [weakref.ref(undo) for undo in (*open_on(tensor), self)]

    @property
    def digest(self) -> str:
        """Digest of the plan that was applied."""
        return self._deed.digest

    @property
    def restored(self) -> bool:
        """Whether nothing is left to put back."""
        return not self._saved

    @property
    def held_bytes(self) -> int:
        """How many bytes of memory the copies take."""
        return bytes_of(self._saved)

    def check(self) -> None:
        """Check that nothing was put between the model and what was written: the layers are off as they were planned.

        An adapter that is added, loaded, switched on or merged after the application adds its part to a layer that is
        off. So may what code of yours writes into the weights: that is not looked at.

        Raises:
            NeutralizeError: a tensor was replaced, other adapters are in the layers than were at the application, or
                everything is restored already.
        """
        if self.restored:
            raise NeutralizeError("check: expected a plan that is applied, got one that was restored; apply it again")
        self._check("check")
        if told := self._other_adapters():
            raise NeutralizeError(f"check: {told}; restore, and plan on the model as it is then")

    def restore(self) -> None:
        """Put back every bit and every ``requires_grad`` flag; afterwards the copies are released.

        If there are other adapters in the layers than at the application, it warns: what was measured in between was
        not the model without them.

        Raises:
            NeutralizeError: a tensor was replaced, its dtype or shape changed, or the audit cannot be written; nothing
                was put back.
        """
        if not self.restored:
            told = self._other_adapters()
            only = None if self._leads else self._files
            with recorded(replace(self._deed, action="restore"), self._files, only):
                self.put_back()
            if told:
                warnings.warn(f"restore: {told}; every bit is back, but the layers were not off", stacklevel=2)

    def put_back(self) -> None:
        """Do what ``restore`` does, unrecorded: for an application that fails."""
        model = self._model()
        if model is not None:
            resharded(model)
        self._check("restore")
        for entry in self._saved:  # in any order: all were taken before the first write
            overwrite_(entry.block(entry.tensor.detach()), entry.values)
            if entry.tensor.requires_grad != entry.requires_grad and entry.tensor.is_leaf:
                entry.tensor.requires_grad_(entry.requires_grad)
        torch.clear_autocast_cache()  # as after an application
        if model is not None:
            note_written(model, self._tensors())
        for tensor in self._tensors():
            later = open_on(tensor)
            _OPEN.pop(tensor, None)
            for undo in later[later.index(self) + 1 :]:
                undo._forget(tensor, self._saved)
            if later := [undo for undo in later if undo is not self]:
                _OPEN[tensor] = [weakref.ref(undo) for undo in later]
        self._saved = []

    def save(self, path: str | PathLike[str]) -> None:
        """Write the copies to a file, so that another process can restore the model: one file per process of a team.

        Args:
            path: of the file (``torch.save``); one that is there is replaced once the new one is complete.

        Raises:
            NeutralizeError: everything is restored already, the model is gone, or the file cannot be written.
        """
        model = self._model()
        if model is None or self.restored:
            raise NeutralizeError("save: expected an application that is not undone yet, got one that is; apply again")
        self._check("save")
        names = {id(tensor): name for name, tensor in _named(model).items()}
        entries = [
            {
                "name": entry.name,
                "tensor": names[id(entry.tensor)],
                "shape": list(entry.shape),
                "requires_grad": entry.requires_grad,
                "inside": asdict(entry.block.inside),
                "window": asdict(entry.block.window),
            }
            for entry in self._saved
        ]
        values = [entry.values.cpu() for entry in self._saved]
        content = {
            "format": _FORMAT,
            "digest": self.digest,
            "entries": entries,
            "values": values,
            "about": {
                name: getattr(self._deed, name) for name in ("strategy", "layers", "tensors", "bytes", "processes")
            },
            "leads": self._leads,
        }
        target = Path(path)
        partial = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            torch.save(content, partial)
            partial.replace(target)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeErrors
            partial.unlink(missing_ok=True)
            raise NeutralizeError(
                f"save: expected a file that can be written, got {str(error).splitlines()[0]} for "
                f"{str(target)!r}; name another"
            ) from error

    @staticmethod
    def load(path: str | PathLike[str], model: nn.Module) -> Undo:
        """Read what ``save`` wrote, to restore a model that has the application's weights.

        Args:
            path: of the file; where several processes hold the model, the file of this one.
            model: with the same tensors, sharded in the same way.

        Raises:
            NeutralizeError: the file is none of ``save``, or the model's tensors are others.
        """
        model = unwrap(model)
        resharded(model)
        named = _named(model)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["format"] != _FORMAT:
                raise KeyError("another version")
            pairs = zip(content["entries"], content["values"], strict=True)
            about = content.get("about", {})  # earlier files say nothing of the plan but its digest
            deed = Deed("apply", type(model).__name__, content["digest"], source=source_of(model), **about)
            saved = [_fitting(entry, values, named) for entry, values in pairs]
            return Undo(saved, deed, model, leads=bool(content.get("leads", True)))
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, IndexError, pickle.UnpicklingError) as error:
            raise NeutralizeError(
                f"load: expected a file of Undo.save for {str(path)!r}, got {str(error).splitlines()[0]}; name that "
                "file"
            ) from error

    def _tensors(self) -> list[torch.Tensor]:
        return list({id(entry.tensor): entry.tensor for entry in self._saved}.values())

    def _scope(self, saved: list[Saved]) -> tuple[str, ...]:
        return (*self._deed.layers, *dict.fromkeys(entry.name for entry in saved))

    def _other_adapters(self) -> str:
        """Say which adapters are in the layers now and were not at the application, or the reverse."""
        model = self._model()
        now = self._adapters if model is None else adapters.premise(model, self._scope(self._saved))
        if now == self._adapters:
            return ""
        then, now = (said or "no adapter" for said in (self._adapters, now))
        return f"expected {then} in what is off, as at its application, got {now}"

    def _check(self, op: str) -> None:
        """Check that every copy still fits the tensor that it was taken from, and that the model still has it."""
        model = self._model()
        held = None
        if model is not None:
            held = {id(tensor) for tensor in _named(model).values()}
        for entry in self._saved:
            if entry.tensor.dtype != entry.values.dtype:
                raise NeutralizeError(
                    f"{op}: expected dtype {entry.values.dtype} for {entry.name!r}, got {entry.tensor.dtype}; "
                    "convert the model back before restoring"
                )
            if entry.tensor.shape != entry.shape:
                raise NeutralizeError(
                    f"{op}: expected shape {list(entry.shape)} for {entry.name!r}, got {list(entry.tensor.shape)}; "
                    "put the old weights back before restoring"
                )
            if held is not None and id(entry.tensor) not in held:
                raise NeutralizeError(
                    f"{op}: expected the tensor that was written for {entry.name!r}, got a model in which it was "
                    "replaced; put the old parameter back before restoring"
                )

    def _forget(self, tensor: torch.Tensor, undone: list[Saved]) -> None:
        """Replace what an earlier application had left in this one's copies of a tensor by what was there before it."""
        for entry in self._saved:
            if entry.tensor is not tensor:
                continue
            whole = torch.empty_like(tensor)
            overwrite_(entry.block(whole), entry.values)
            for earlier in undone:
                if earlier.tensor is tensor:
                    overwrite_(earlier.block(whole), earlier.values)
                    entry.requires_grad = earlier.requires_grad
            overwrite_(entry.values, entry.block(whole))

    def __repr__(self) -> str:
        """Say what is held."""
        if self.restored:
            return "Undo(restored)"
        return f"Undo({len(self._saved)} tensors, {self.held_bytes} bytes, plan {self.digest[:12]})"


def _named(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that hold a model's weights, wherever they are."""
    return tensors_of(model) | offloaded(model)[0]


def _window(fields: dict[str, Any]) -> Window:
    box = fields["box"]
    return Window(
        None if box is None else tuple((int(first), int(last)) for first, last in box),
        *(
            None if fields[name] is None else (int(fields[name][0]), int(fields[name][1]))
            for name in ("rows", "columns")
        ),
    )


def _fitting(entry: dict[str, Any], values: torch.Tensor, named: dict[str, torch.Tensor]) -> Saved:
    """A saved entry, for the tensor of the model that it fits."""
    name, shape, tensor = entry["name"], torch.Size(entry["shape"]), named.get(entry["tensor"])
    block = Block(_window(entry["inside"]), _window(entry["window"]))
    if tensor is None:
        raise NeutralizeError(
            f"load: expected a tensor {entry['tensor']!r}, got a model without it; load into the model that it is of"
        )
    if tensor.shape != shape or tensor.dtype != values.dtype:
        raise NeutralizeError(
            f"load: expected {list(shape)} of {values.dtype} for {name!r}, got {list(tensor.shape)} of {tensor.dtype}; "
            "load into the model that it is of"
        )
    try:
        view = block(tensor.detach())
    except (RuntimeError, IndexError):
        view = values.new_empty(0)
    if view.shape != values.shape:
        raise NeutralizeError(
            f"load: expected a part of {list(values.shape)} for {name!r}, got {list(view.shape)}; load each process's "
            "own file, into a model that is sharded as it was"
        )
    return Saved(name, tensor, block, values.to(view.device), entry["requires_grad"], shape)
