"""Guard: what a plan wrote stays as it is, bit for bit, while training goes on.

An optimizer moves a parameter that nothing pulls at: weight decay shrinks it, and momentum from before carries it on
with a gradient of zero. Freezing does not help a block of a parameter whose other rows train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from neutralize import ops
from neutralize.apply import aliases_of
from neutralize.audit import Deed, audited, recorded
from neutralize.distributed.part import Block, Placed, Window, part_of, plain
from neutralize.distributed.team import team_of
from neutralize.distributed.wrapped import resharded
from neutralize.errors import NeutralizeError
from neutralize.plan import TIMEOUT, Assign, Copy, Edit, Fold, Plan, Rewrite, require_plan
from neutralize.select import tensors_of, unwrap
from neutralize.undo import overwrite_


@dataclass
class _Held:
    """A block that is put back.

    Attributes:
        name: qualified name of the tensor.
        tensor: the live tensor.
        block: gives the written part of the tensor, or of its optimizer state, as a view: what this process holds.
        edit: writes the values again, where it needs nothing of the old ones; its ``start`` is that of the block.
        values: a copy of the values where ``edit`` is ``None``.
    """

    name: str
    tensor: torch.Tensor
    block: Callable[[torch.Tensor], torch.Tensor]
    edit: Rewrite | None
    values: torch.Tensor | None


class Guard:
    """Puts what a plan wrote back, bit for bit, after every step of the given optimizers, until it is closed.

    The optimizers' state of those elements (momentum, second moments) is zeroed as well, at once and after every step:
    nothing collects there that would move them later. Elements of the same parameter that the plan does not write go
    on training. Blocks that the plan fills are filled again and need no memory; of others a copy is held.

    Between two evaluations within one step (a closure called several times) the elements may have moved; when ``step``
    returns they are back. LBFGS, which builds a step for all elements together from what the last ones did to the
    gradient, would be misled by that: it starts anew, and sees gradients of zero for these elements.
    """

    def __init__(self, held: list[_Held], optimizers: tuple[Optimizer, ...], deed: Deed, *, leads: bool = True) -> None:
        """Register with the optimizers.

        Args:
            held: the blocks.
            optimizers: whose steps are watched.
            deed: what is done, for the audit.
            leads: whether this process records it for the others.
        """
        self._held = held
        self._optimizers = optimizers
        self._deed, self._leads, self._files = deed, leads, audited()
        self._steps = 0
        with recorded(deed, only=None if leads else ()):
            for optimizer in optimizers:
                self._put_back(optimizer)
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                self._handles.extend(_without_gradients(optimizer, self._due(optimizer)))

    @property
    def closed(self) -> bool:
        """Whether the guard no longer holds anything."""
        return not self._handles

    @property
    def held_bytes(self) -> int:
        """How many bytes of memory the copies take."""
        copies = [entry.values for entry in self._held if entry.values is not None]
        return sum(copy.numel() * copy.element_size() for copy in copies)

    def close(self) -> None:
        """Let go of the optimizers; the weights stay as they are. A second call does nothing."""
        was_on = not self.closed
        for handle in self._handles:
            handle.remove()
        self._handles, self._held = [], []
        if was_on:
            with recorded(
                replace(self._deed, action="release", steps=self._steps), self._files, None if self._leads else ()
            ):
                pass

    def __enter__(self) -> Guard:
        """Return the guard, which is on already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the guard."""
        self.close()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._put_back(optimizer)
        self._steps += 1

    def _due(self, optimizer: Optimizer) -> list[_Held]:
        """The blocks of the tensors that an optimizer steps, and of buffers, which any forward pass may move."""
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [
            entry for entry in self._held if id(entry.tensor) in stepped or not isinstance(entry.tensor, nn.Parameter)
        ]

    def _put_back(self, optimizer: Optimizer) -> None:
        due = self._due(optimizer)
        for entry in due:
            if entry.values is not None:
                overwrite_(entry.block(entry.tensor.detach()), entry.values)
            # ``get``: looking a parameter up in the state would make an entry for it.
            for state in optimizer.state.get(entry.tensor, {}).values():
                if isinstance(state, torch.Tensor) and state.shape == entry.tensor.shape and state.dim():
                    with torch.no_grad():
                        entry.block(state).zero_()
        _write_again([entry for entry in due if entry.edit is not None])

    def __repr__(self) -> str:
        """Say what is held."""
        if self.closed:
            return "Guard(closed)"
        return f"Guard({len(self._held)} blocks, {self.held_bytes} bytes, {len(self._optimizers)} optimizer(s))"


def guard(model: nn.Module, plan: Plan, *optimizers: Optimizer, rescaled: bool = True) -> Guard:
    """Keep what an applied plan wrote from being moved by optimizers.

    Use it in a ``with`` block around the training loop, or call ``close`` on what it returns. Of a sharded model each
    process holds its own part.

    Args:
        model: the model that the plan is applied to.
        plan: the plan.
        *optimizers: whose steps are watched; fused and foreach ones too.
        rescaled: also hold what was only multiplied, such as the weights that read a pass-through and undo its scale.
            With ``False`` these go on training; the layer itself stays off.

    Raises:
        NeutralizeError: no optimizer is given, or the plan is not applied to the model at the moment.

    Examples:
        >>> from neutralize import plan
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> null = plan(model, "0", "zero", sides="in")
        >>> undo = null.apply(model)
        >>> with guard(model, null, optimizer):
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        >>> bool(model[0].weight.any())
        False
    """
    require_plan("guard", plan)
    if not optimizers:
        raise NeutralizeError("guard: expected an optimizer to watch, got none; pass those that train the model")
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise NeutralizeError(
                f"guard: expected a torch.optim.Optimizer, got {type(optimizer).__name__}; pass the optimizer itself"
            )
    resharded(unwrap(model))
    named = tensors_of(unwrap(model))
    aliases = aliases_of({name: plain(tensor) for name, tensor in named.items()})
    held = [_held(named, plan, place, name, aliases, rescaled=rescaled) for place, name in _written(plan)]
    team = team_of(model, named.values(), None, TIMEOUT)
    count, leads = (1, True) if team is None else (len(team.ranks), team.leads)
    deed = Deed.of(plan, "guard", unwrap(model), plan.written_bytes, processes=count)
    return Guard([entry for entries in held for entry in entries], optimizers, deed, leads=leads)


def _without_gradients(optimizer: torch.optim.LBFGS, held: list[_Held]) -> list[Any]:
    """Make LBFGS forget its history, and give it gradients of zero for the blocks, until the handles are removed."""
    for state in optimizer.state.values():
        state["n_iter"] = 0  # as before its first iteration, which takes nothing over
    handles = []
    for entry in held:
        if not entry.tensor.requires_grad:
            continue

        def clear(tensor: torch.Tensor, block: Callable[[torch.Tensor], torch.Tensor] = entry.block) -> None:
            if tensor.grad is not None:
                block(tensor.grad).zero_()

        clear(entry.tensor)
        handles.append(entry.tensor.register_post_accumulate_grad_hook(clear))
    return handles


def _written(plan: Plan) -> list[tuple[int, str]]:
    """Place of an edit and name of a tensor that it writes; of several writes of the same part only the first."""
    found: dict[tuple[object, ...], tuple[int, str]] = {}
    for place, edit in enumerate(plan.edits):
        for name in edit.parameters:
            is_part = not isinstance(edit, Assign | Copy) and name == edit.parameter
            part = (getattr(edit, "rows", None), getattr(edit, "columns", None)) if is_part else (None, None)
            found.setdefault((name, *part), (place, name))
    return list(found.values())


def _held(
    named: dict[str, torch.Tensor],
    plan: Plan,
    place: int,
    name: str,
    aliases: dict[str, tuple[str, ...]],
    *,
    rescaled: bool,
) -> Iterator[_Held]:
    """Yield the blocks that this process holds of what an edit wrote in a tensor."""
    edit = plan.edits[place]
    tensor = named.get(name)
    if tensor is None or tuple(tensor.shape) != tuple(edit.shape if name == edit.parameter else tensor.shape):
        raise NeutralizeError(
            f"guard: expected the model that the plan is applied to, got one without {name!r} of shape "
            f"{list(edit.shape)}; pass that model"
        )
    others = [other for other in plan.edits if other is not edit and {*aliases[name]} & {*other.parameters}]
    if not rescaled and not any(_is_absolute(other) for other in (edit, *others)):
        return
    part = part_of(name, tensor)
    if isinstance(part, str):
        raise NeutralizeError(f"guard: {part}")
    is_absolute = _is_absolute(edit) and not any(_overlap(edit, other) for other in others)
    if isinstance(edit, Fold) and name == edit.parameter:
        edit = edit.rescale
    for placed in part.block(edit) if isinstance(edit, Rewrite) else [Placed(Window())]:
        block = Block(part.inside, placed.window)
        now = block(tensor.detach())
        if isinstance(edit, Rewrite) and is_absolute:
            again, wanted = replace(edit, start=placed.start(edit)), now.clone()
            _rewrite([wanted], [again])
            _check_applied(name, now, wanted)
            yield _Held(name, tensor, block, again, None)
        else:
            if isinstance(edit, Assign) and is_absolute:
                wanted = torch.tensor(edit.values, dtype=torch.float64).reshape(edit.shape)
                _check_applied(name, now, part.pick(wanted).to(now))
            yield _Held(name, tensor, block, None, now.clone())


def _is_absolute(edit: Edit) -> bool:
    """Whether an edit sets values whatever was there."""
    return isinstance(edit, Assign | Copy) or (isinstance(edit, Rewrite) and edit.scale == 0)


def _overlap(one: Edit, other: Edit) -> bool:
    """Whether two edits of the same memory may write the same elements."""
    if not isinstance(one, Rewrite) or not isinstance(other, Rewrite) or one.parameter != other.parameter:
        return True
    for first, second in ((one.rows, other.rows), (one.columns, other.columns)):
        if first is not None and second is not None and (first[1] <= second[0] or second[1] <= first[0]):
            return False
    return True


def _check_applied(name: str, now: torch.Tensor, wanted: torch.Tensor) -> None:
    if not torch.equal(now, wanted):
        raise NeutralizeError(
            f"guard: expected the plan to be applied, got other values in {name!r}; apply it first, and guard before "
            "the next step"
        )


def _write_again(entries: list[_Held]) -> None:
    edits = [entry.edit for entry in entries if entry.edit is not None]
    if edits:
        _rewrite([entry.block(entry.tensor.detach()) for entry in entries], edits)


def _rewrite(blocks: list[torch.Tensor], edits: list[Rewrite]) -> None:
    ops.rewrite_(
        blocks,
        scale=0.0,
        diagonal=[edit.diagonal for edit in edits],
        fill=[edit.fill for edit in edits],
        start=[edit.start for edit in edits],
        step=[edit.step for edit in edits],
    )
