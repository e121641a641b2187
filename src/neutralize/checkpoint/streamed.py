"""Verify a plan on files that are too large for memory: weights are read when an op asks for them, and let go again.

The model stands on the meta device; each of its parameters is replaced by a tensor that has no elements until an op
takes it as an argument. So the whole of ``neutralize.verify`` runs as it does on a live model, with two tensors in
memory at a time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from neutralize.checkpoint.in_step import EnteredInStep, Turns
from neutralize.checkpoint.journal import Edition
from neutralize.checkpoint.layout import Layout, Stored
from neutralize.checkpoint.model import meta_model
from neutralize.checkpoint.naming import Names, Source, placed, retarget
from neutralize.checkpoint.region import Files, Region
from neutralize.dataflow import Inputs, as_call, guessed_inputs, own_inputs
from neutralize.errors import NeutralizeError
from neutralize.plan import Assign, Edit, Plan, Rewrite, dtype_name
from neutralize.progress import Advance, silent
from neutralize.report import Shown
from neutralize.unread import Unread
from neutralize.verify import SCALES, Verification, compared

_DECODED = 1 << 20
"""How many elements are decoded at a time; some formats take 32 bytes of memory for each meanwhile."""


@dataclass(frozen=True)
class StreamedVerification(Shown):
    """What was measured on a checkpoint.

    Attributes:
        measured: as on a live model, without gradients.
        ok: every bound that a certificate states holds; where the plan is exact, bit for bit.
        peak_bytes: the most bytes of weights that were held at a time.
        read_bytes: how many bytes of weights were read in all.
    """

    measured: Verification
    ok: bool
    peak_bytes: int
    read_bytes: int

    @property
    def per_layer(self) -> dict[str, float]:
        """For each layer the largest error of what it hands on, relative to its input; NaN: not seen from outside."""
        return self.measured.per_layer

    def to_html(self, path: str | PathLike[str], *, title: str = "", command: str = "") -> None:
        """Write a page; see ``neutralize.Verification.to_html``. Curves and weights are there if ``detailed``.

        Raises:
            NeutralizeError: no page can be written there.
        """
        from neutralize.pages.page import check_target, write
        from neutralize.pages.verified import page

        check_target(path)
        beside = None if self.measured._details is None else self.measured._details()
        write(path, page(self.measured, beside, title=title, command=command, facts={"files": self._weights_read()}))

    def __str__(self) -> str:
        """Return a table: layer, measured error, bound; then the end-to-end figures."""
        from neutralize.report import as_text, verification_rich

        return f"{as_text(verification_rich(self.measured))}{self.summary}\n"

    def _repr_html_(self) -> str:
        """Return a short table for a notebook."""
        return self.measured._repr_html_()

    @property
    def summary(self) -> str:
        """The end-to-end figures in two lines."""
        from neutralize.report import verdict

        return f"{verdict(self.measured)}\n{self._weights_read()}"

    def _weights_read(self) -> str:
        from neutralize.report import format_bytes

        return (
            f"{format_bytes(self.read_bytes)} of weights read, at most {format_bytes(self.peak_bytes)} held at a time"
        )


def verify(
    layout: Layout,
    plan: Plan,
    inputs: Inputs | None = None,
    *,
    factory: str | Callable[..., nn.Module] | None = None,
    applied: bool = False,
    before: Edition | None = None,
    detailed: bool = False,
    advance: Advance = silent,
) -> StreamedVerification:
    """Measure how far a plan for a checkpoint is from its aim, with two tensors of it in memory at a time.

    Args:
        layout: the checkpoint; it is only read.
        plan: a plan for its model.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments for the model; by default those
            that the model brings itself, or random ones of the shape that its first layer tells.
        factory: see ``meta_model``.
        applied: the files already hold the plan. Otherwise its edits are made in memory, on what is read.
        before: with ``applied``, the edit that brought it there: its undo tells what the network was before. Without it
            only what shows by itself can be measured: layers that hand on their input, or nothing.
        detailed: also measure what a page shows: errors at other scales (see ``neutralize.Verification.at_scales``),
            in step with the measurement itself, and the weights before and after.
        advance: told how many bytes of weights were read; in all it is about twice the size of the model.

    Returns:
        What was measured against the network without the layers.

    Raises:
        NeutralizeError: the plan does not fit, a parameter cannot be read, the model does not run, or ``applied`` is
            asked of a plan whose aim the edited files no longer show.
    """
    if applied and before is None:
        _check_seen(plan)
    model, names = meta_model(layout, factory, buffers=True)
    given = _inputs_for(model, lambda: meta_model(layout, factory)[0]) if inputs is None else inputs
    if given is None:
        raise NeutralizeError(
            "checkpoint: expected inputs for the model, got none; pass its arguments, token ids for example"
        )
    call = as_call(given)
    edits = [] if applied else retarget(plan.edits, names, layout)
    # One model for each scale: hooks belong to a model.
    others = [scale for scale in SCALES if scale != 1.0] if detailed else []
    models = [model, *(meta_model(layout, factory, buffers=True)[0] for _ in others)]
    turns = Turns(len(models))
    entered = EnteredInStep(turns)

    def comparison(model: nn.Module, scale: float | None) -> Callable[[], Verification]:
        return lambda: compared(
            model, plan, call, lambda: weights.edited(model), differentiate=False, scale=scale, entered=entered
        )

    beside = None
    with Files(layout.root) as files, Files(layout.root) if before is None else _Before(layout.root, before) as old:
        weights = _Weights(layout, names, old, files, edits, advance, turns)
        with ExitStack() as stack:
            for each in models:
                stack.enter_context(weights.placed_in(each))
            try:
                found, *at = turns.run(list(map(comparison, models, [None, *others])))
                is_exact = found.exact or plan.certificate.kind != "exact"
                is_ok = found.bound_holds and is_exact
                if applied and not is_ok:
                    written = _connected(retarget(plan.edits, names, layout))
                    found = replace(found, not_held=_not_held(layout, written, old if before else None, files))
                weights.alone()
                if detailed:
                    measured = dict(zip(others, at, strict=True)) if found.scaled else {}
                    from neutralize.pages.verified import details

                    beside = details(model, plan, lambda: weights.edited(model), measured)
            except NeutralizeError:
                raise
            except Exception as error:  # the user's model, on the user's inputs
                told = " ".join(str(error).split())[:300]
                raise NeutralizeError(
                    f"checkpoint: expected a model that runs on the inputs, got {type(error).__name__}: {told}; give "
                    "others, or verify the loaded model"
                ) from error
    # The weights can be read no more: what would run the model again is what it has found, or gone.
    measured = {} if beside is None or not beside.at else {**beside.at, 1.0: found}
    found = replace(
        found, _again=_measured_at(measured) if measured else None, _details=None if beside is None else lambda: beside
    )
    return StreamedVerification(found, is_ok, weights.peak_bytes, weights.read_bytes)


def _not_held(layout: Layout, groups: Mapping[str, list[Edit]], before: Files | None, files: Files) -> tuple[str, ...]:
    """The tensors that edits leave otherwise than they are in the files.

    Args:
        layout: the checkpoint.
        groups: for each tensor that is written, its edits.
        before: the files as they were before. Without them only edits that read no old value can be compared.
        files: the files as they are.
    """
    found = []
    for name, group in groups.items():
        if before is None and not all(_reads_nothing(edit) for edit in group):
            continue
        regions = layout.tensors[name].regions
        tensors = dict.fromkeys(each for edit in group for each in edit.parameters)
        with _Held(
            layout.root, [region for each in tensors for region in layout.tensors[each].regions], before
        ) as held:
            for patch in layout.patches(group, held):
                for _ in patch.run(held):
                    pass
            if any(not torch.equal(held.read(region), files.read(region)) for region in regions):
                found.append(name)
    return tuple(found)


def _reads_nothing(edit: Edit) -> bool:
    """Whether an edit leaves the same values whatever was there."""
    return isinstance(edit, Assign) or (isinstance(edit, Rewrite) and edit.scale == 0)


def _measured_at(at: Mapping[float, Verification]) -> Callable[[Sequence[float]], list[Verification]]:
    """What has been measured at some scales, as what measures it."""

    def again(scales: Sequence[float]) -> list[Verification]:
        if not set(scales) <= set(at):
            raise NeutralizeError(
                f"verify: expected some of the scales that were measured on the files, {sorted(at)}, got "
                f"{list(scales)}; verify the loaded model at others"
            )
        return [at[scale] for scale in scales]

    return again


def _inputs_for(model: nn.Module, on_meta: Callable[[], nn.Module]) -> Inputs | None:
    """What the model brings itself, or random numbers of the shape that its first layer tells.

    Args:
        model: the model.
        on_meta: makes it on the meta device, to see which of several shapes it takes.
    """
    own = own_inputs(model)
    main = getattr(model, "main_input_name", None)  # of transformers, whose models of images may bring token ids
    if isinstance(own, dict) and (not isinstance(main, str) or main in own):
        return own
    guesses = [guess for guess in guessed_inputs(model) if isinstance(guess, torch.Tensor)]
    if not guesses:
        return own
    guess = guesses[0]
    if len(guesses) > 1:
        trial = on_meta()
        guess = next((each for each in guesses if _runs(trial, each)), guess)
    if not guess.is_floating_point():
        return guess.clone()
    return torch.randn(guess.shape, generator=torch.Generator().manual_seed(0)).to(guess.dtype)


def _runs(on_meta: nn.Module, inputs: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            on_meta(inputs.to("meta"))
    except Exception:  # whatever a model says of inputs that are not for it
        return False
    return True


def _check_seen(plan: Plan) -> None:
    """Check that files which hold a plan show by themselves whether they do."""
    for entry in plan.layers:
        # A factor, or a scale that the next layer undoes, shows only against the weights of before.
        is_seen = entry.target == "input" and entry.epsilon is None and entry.sides not in ("around", "within")
        if not is_seen and entry.target != "null":
            raise NeutralizeError(
                f"checkpoint: expected a plan whose layers hand on their input or nothing, or that was applied in "
                f"place and can be undone, got {entry.target!r} for {entry.layer!r}, which only the weights of before "
                "show; verify before applying"
            )


class _Weights:
    """Reads parameters from a checkpoint for models that run in step, keeps the last few, and counts."""

    def __init__(
        self,
        layout: Layout,
        names: Names,
        before: Files,
        after: Files,
        edits: Sequence[Edit],
        advance: Advance,
        turns: Turns | None = None,
    ) -> None:
        self._layout, self._names, self._before, self._after, self._advance = layout, names, before, after, advance
        self._groups = _connected(edits)
        self._turns = turns
        self._edited = False
        self._all_edited: Callable[[], bool] = lambda: (
            self._edited or (turns is not None and turns.all_wait_for(self._all_edited))
        )
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._budget = 0
        self.peak_bytes = 0
        self.read_bytes = 0

    @contextmanager
    def placed_in(self, model: nn.Module) -> Iterator[None]:
        """Put tensors that are read when they are needed in the place of a model's parameters; they are put back."""
        held = [(module._parameters, name, tensor) for module in model.modules() for name, tensor in _own(module)]
        prefixes = {id(module): prefix for prefix, module in model.named_modules()}
        owners = {id(module._parameters): prefixes[id(module)] for module in model.modules()}
        buffers = [(module._buffers, name, old) for module in model.modules() for name, old in module._buffers.items()]
        self._budget = max((tensor.nbytes for _, _, tensor in held), default=0)
        try:
            for parameters, name, tensor in held:
                full = f"{owners[id(parameters)]}.{name}".lstrip(".")
                parameters[name] = self._unread(full, tensor)  # type: ignore[assignment]
            self._read_buffers(model)
            yield
        finally:
            for parameters, name, tensor in held:
                parameters[name] = tensor
            for registered, name, old in buffers:
                registered[name] = old
            self._kept.clear()

    @contextmanager
    def edited(self, model: nn.Module) -> Iterator[None]:
        """Read what the files are after the plan, and what the edits make of it; for all models from then on."""
        if self._turns is not None:
            self._turns.wait(self._all_edited)
        if not self._edited:
            self._kept.clear()
        self._edited = True
        try:
            self._read_buffers(model)
            yield
        finally:
            if self._turns is None:
                self._edited = False
                self._kept.clear()

    def alone(self) -> None:
        """Read for one model again, what the files are before the plan."""
        self._turns, self._edited = None, False
        self._kept.clear()

    def _read_buffers(self, model: nn.Module) -> None:
        for prefix, module in model.named_modules():
            for name, buffer in module._buffers.items():
                full = f"{prefix}.{name}".lstrip(".")
                if buffer is not None and full in self._names:
                    module._buffers[name] = self._read(full, buffer.shape, buffer.dtype)

    def _unread(self, name: str, like: torch.Tensor) -> Unread:
        """What stands for a parameter."""
        shape, dtype = like.shape, like.dtype

        def read() -> torch.Tensor:
            if name not in self._kept and self._turns is not None:
                self._turns.wait(lambda: name in self._kept, helps_itself=True)
            if name not in self._kept:
                self._make_room(like.nbytes)
                self._kept[name] = self._read(name, shape, dtype)
            self._kept.move_to_end(name)
            return self._kept[name]

        return Unread(shape, dtype, read, lambda: self._kept.get(name))

    def _make_room(self, needed: int) -> None:
        """Let the oldest weights go, until what stays has the size of one tensor."""
        held = sum(tensor.nbytes for tensor in self._kept.values())
        while self._kept and held > self._budget:
            held -= self._kept.popitem(last=False)[1].nbytes
        self.peak_bytes = max(self.peak_bytes, held + needed)

    def _read(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        sources = self._names.get(name, ())
        if not sources:
            raise NeutralizeError(
                f"checkpoint: expected {name!r} to be stored, for the model runs with it, got a checkpoint without it; "
                "verify the loaded model"
            )
        out = None
        for source in sources:  # the copies of a tied weight are equal
            if source.is_computed or (source.is_shuffled and not source.rows):
                raise NeutralizeError(
                    f"checkpoint: expected {name!r} to lie in the checkpoint element by element, got one that the "
                    f"loader rearranges from {source.stored!r}; verify the loaded model"
                )
            content = placed(self._content(source, dtype), source)
            if content.shape == shape:
                out = content.contiguous()  # products of a transposed matrix may be summed in another order
                break
            out = torch.empty(shape, dtype=dtype) if out is None else out
            out[tuple(slice(*extent) for extent in source.place())] = content
        assert out is not None
        self.read_bytes += out.nbytes
        self._advance(out.nbytes)
        return out

    def _content(self, source: Source, dtype: torch.dtype) -> torch.Tensor:
        """What the loader makes of a source's box, with the dimensions of the stored tensor."""
        stored = self._layout.tensors[source.stored]
        group = self._groups.get(source.stored) if self._edited else None
        if group is None:
            return _box(stored, source, dtype, self._after if self._edited else self._before)
        tensors = dict.fromkeys(name for edit in group for name in edit.parameters)
        regions = [region for name in tensors for region in self._layout.tensors[name].regions]
        with _Held(self._layout.root, regions) as held:
            for patch in self._layout.patches(group, held):
                for _ in patch.run(held):
                    pass
            return _box(stored, source, dtype, held)


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module._parameters.items() if parameter is not None]


def _connected(edits: Iterable[Edit]) -> dict[str, list[Edit]]:
    """For each tensor that is written the edits that its new value depends on, in order."""
    groups: dict[str, list[Edit]] = {}
    for edit in edits:
        before = {id(groups[name]): groups[name] for name in edit.parameters if name in groups}
        group = [*(earlier for joined in before.values() for earlier in joined), edit]
        members = {name for earlier in group for name in earlier.parameters}
        groups.update(dict.fromkeys(members, group))
    return groups


def _box(stored: Stored, source: Source, dtype: torch.dtype, files: Files) -> torch.Tensor:
    """What the loader makes of the box of a stored tensor; what is decoded or converted is so a few rows at a time."""
    inside = (slice(None), *(slice(*extent) for extent in source.box[1:]))

    def rows(span: tuple[int, int] | None) -> torch.Tensor:
        content = stored.read(files, span)
        content = content[inside] if stored.shape else content
        return (content.float() + source.offset if source.offset else content).to(dtype)

    if not stored.shape or (stored.encoding == dtype_name(dtype) and not source.offset):
        return rows(source.box[0] if stored.shape else None)
    first, last = source.box[0]
    at_once = max(1, _DECODED // max(1, math.prod(stored.shape[1:])))
    if last - first <= at_once:
        return rows((first, last))
    out = torch.empty([end - begin for begin, end in source.box], dtype=dtype)
    for begin in range(first, last, at_once):
        end = min(begin + at_once, last)
        out[begin - first : end - first] = rows((begin, end))
    return out


class _Held(Files):
    """Files of which some regions are held in memory: what is written goes there, and is read from there."""

    def __init__(self, root: Path, regions: Sequence[Region], origin: Files | None = None) -> None:
        super().__init__(root)
        self._regions: list[tuple[Region, torch.Tensor]] = []
        for region in regions:
            content = torch.empty(region.end - region.offset, dtype=torch.uint8)
            if origin is None:
                super()._read_into(region.file, region.offset, content)
            else:
                origin._read_into(region.file, region.offset, content)
            self._regions.append((region, content))

    def _held(self, file: str, offset: int, size: int) -> torch.Tensor | None:
        for region, content in self._regions:
            if region.file == file and region.offset <= offset and offset + size <= region.end:
                return content[offset - region.offset : offset - region.offset + size]
        return None

    def _read_into(self, file: str, offset: int, out: torch.Tensor) -> None:
        held = self._held(file, offset, out.numel())
        if held is None:
            super()._read_into(file, offset, out)
        else:
            out.copy_(held)

    def _write_from(self, file: str, offset: int, data: torch.Tensor) -> None:
        held = self._held(file, offset, data.numel())
        if held is None:
            raise NeutralizeError(
                f"checkpoint: expected to write only into tensors of the plan, got {offset} of {file!r}; report this"
            )
        held.copy_(data)

    def _zero_range(self, region: Region) -> bool:
        return False


class _Before(Files):
    """Files as they were before an edit: what it wrote over is read from its undo."""

    def __init__(self, root: Path, edition: Edition) -> None:
        super().__init__(root)
        self._edition = edition
        self._undo = Files(edition.path.parent)

    def __exit__(self, *error: object) -> None:
        self._undo.__exit__()
        super().__exit__(*error)

    def _read_into(self, file: str, offset: int, out: torch.Tensor) -> None:
        super()._read_into(file, offset, out)
        end = offset + out.numel()
        for entry in self._edition.kept:
            region = entry.region
            if region.file != file or region.offset >= end or region.end <= offset:
                continue
            first = max(0, (offset - region.offset) // region.stride)
            last = min(region.rows, -(-(end - region.offset) // region.stride))
            for row in range(first, last):
                start = region.offset + row * region.stride
                begin, stop = max(start, offset), min(start + region.width, end)
                if begin < stop:
                    place = entry.place + row * region.width + begin - start
                    held = self._undo.read(Region.run(self._edition.path.name, place, stop - begin))
                    out[begin - offset : stop - offset] = held.view(-1)
