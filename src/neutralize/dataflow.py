"""Trace a model into its dataflow: an ATen graph with parameters by name and the selected layers marked in it.

The graph comes from ``torch.export`` on fake tensors (no copy, no compute); where export fails, the same graph is
recorded
by running once on the example inputs. Selected layers are found by marks that hooks put around them while tracing, so
nothing depends on names or on how a layer is called.
"""

from __future__ import annotations

import copy
import io
import logging
import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from neutralize.errors import NeutralizeError
from neutralize.offload import without_hooks
from neutralize.select import tensors_of
from neutralize.undo import untouched

Inputs: TypeAlias = "torch.Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]"

_LOGGER = logging.getLogger(__name__)

_LIBRARY = torch.library.Library("neutralize", "FRAGMENT")
_LIBRARY.define("mark(Tensor x, str site) -> Tensor")
# A clone, because an op that returns its argument must say so in its schema, and then in-place ops reach through it.
_LIBRARY.impl("mark", lambda x, site: x.clone(), "CompositeExplicitAutograd")
_MARK = "neutralize::mark"


@dataclass(frozen=True)
class Call:
    """One call of a selected layer: where its first tensor input enters and its first tensor output leaves.

    Attributes:
        layer: qualified name of the layer.
        entry: the mark on the input.
        exit: the mark on the output.
        first, last: positions in the graph; every node between them was traced inside the layer.
    """

    layer: str
    entry: fx.Node
    exit: fx.Node
    first: int
    last: int

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """The nodes traced inside the layer in order, the mark on the output last."""
        node = self.entry
        while node is not self.exit:
            node = node.next
            yield node


@dataclass
class Dataflow:
    """The traced graph of a model.

    Attributes:
        graph: functional ATen graph.
        names: placeholder to qualified name, for parameters and buffers.
        calls: selected layer to its calls, in order.
        position: node to its place in the graph.
        tied: name to every name of the same tensor (itself included).
        shapes, dtypes: of parameters and buffers, by name.
        unwritable: what no plan may write, with the reason: buffers that are not saved, or that the model writes.
        overwriting: layers that write into their input while something else reads that later, with the ops that do;
            without them where the graph no longer has them.
        lost: values that the recording lost sight of: views of memory that an op wrote through another view.
        is_quick: it was recorded on the meta device, which holds no data for the control flow to depend on.
        is_recorded: the graph is what one run on the example inputs did; on others the control flow may be another.
    """

    graph: fx.Graph
    names: dict[fx.Node, str]
    calls: dict[str, list[Call]]
    tied: dict[str, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    is_recorded: bool = False
    is_quick: bool = False
    unwritable: dict[str, str] = field(default_factory=dict)
    overwriting: dict[str, tuple[fx.Node, ...]] = field(default_factory=dict)
    lost: frozenset[fx.Node] = frozenset()
    position: dict[fx.Node, int] = field(default_factory=dict, init=False)
    _users: dict[str, list[fx.Node]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Index the graph."""
        self.position = {node: place for place, node in enumerate(self.graph.nodes)}
        for node, name in self.names.items():
            for alias in self.tied.get(name, (name,)):
                self._users.setdefault(alias, []).extend(node.users)

    def users(self, name: str) -> list[fx.Node]:
        """Every node that reads the tensor of that name, under any of its names."""
        return list(dict.fromkeys(self._users.get(name, [])))

    @property
    def is_patchy(self) -> bool:
        """Whether a selected layer reads a value that was lost."""
        return any(self.reads_lost(call) for calls in self.calls.values() for call in calls)

    def reads_lost(self, call: Call) -> bool:
        """Whether a call reads a value that was lost."""
        readers = (self.position[user] for node in self.lost for user in node.users)
        return any(call.first < place <= call.last for place in readers)

    def nbytes(self, name: str) -> int:
        """Size of a parameter in bytes."""
        return torch.Size(self.shapes[name]).numel() * self.dtypes[name].itemsize


def op_name(node: fx.Node) -> str:
    """Return ``"aten::linear"`` for a call of ``aten.linear.default``, ``"getitem"``, or ``""`` for what is no call.

    An in-place op goes by the name of its functional twin: the graph holds what it returns.
    """
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(node.target)
    name: str = schema.name
    return name.removesuffix("_") if schema.is_mutable else name


def is_mark(node: fx.Node) -> bool:
    """Whether the node is a mark around a selected layer."""
    return op_name(node) == _MARK


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of the node's tensor, or ``None`` if it is no tensor, or if its sizes depend on the data."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    sizes = [size if isinstance(size, int) else size.node.maybe_as_int() for size in value.shape]
    return None if None in sizes else tuple(sizes)


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """Dtype of the node's tensor, or ``None`` if it is no tensor."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def is_empty(node: fx.Node) -> bool:
    """Whether the node has no elements (the key-value cache before the first token): whatever is asked of all holds."""
    shape = shape_of(node)
    return shape is not None and 0 in shape


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """Return an argument of an op call by its name in the schema, positional or not."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return default
    if name in node.kwargs:
        return node.kwargs[name]
    for place, parameter in enumerate(schema.arguments):
        if parameter.name == name:
            if place < len(node.args):
                return node.args[place]
            return parameter.default_value if parameter.has_default_value() else default
    return default


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split example inputs into positional and keyword arguments of the model."""
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise NeutralizeError(
        "plan: expected a tensor, a tuple of positional arguments or a dict of keyword arguments for example_inputs, "
        "got "
        f"{type(inputs).__name__}; wrap it accordingly"
    )


def own_inputs(model: nn.Module) -> Inputs | None:
    """Example inputs that the model brings itself (the ``dummy_inputs`` of transformers), or ``None``."""
    try:
        brought = getattr(model, "dummy_inputs", None)
    except Exception:  # a property of the user's model, which may need what a meta model lacks
        return None
    if isinstance(brought, Mapping) and brought:
        return dict(brought)
    return None


def guessed_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Inputs that a plain chain of layers accepts, guessed from its first layer; they serve for shapes only."""
    for module in model.modules():
        own = module.parameters(recurse=False)
        dtype = next((parameter.dtype for parameter in own if parameter.is_floating_point()), None)
        if isinstance(module, nn.Linear):
            yield torch.zeros(2, module.in_features, dtype=dtype)
            yield torch.zeros(2, 3, module.in_features, dtype=dtype)
            return
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            yield torch.zeros(2, *module.normalized_shape, dtype=dtype)
            yield torch.zeros(2, 3, *module.normalized_shape, dtype=dtype)
            return
        if isinstance(module, nn.Embedding):
            yield torch.zeros(2, 8, dtype=torch.long)
            return
        if isinstance(module, nn.RNNBase):
            yield torch.zeros(2, 5, module.input_size, dtype=dtype)
            return
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            for extent in (32, 64, 224):
                yield torch.zeros(2, module.in_channels, *[extent] * len(module.kernel_size), dtype=dtype)
            return
        if next(module.children(), None) is None and next(module.parameters(recurse=False), None) is not None:
            return


def first_tensor(tree: Any) -> torch.Tensor | None:
    """The first tensor in nested tuples, lists, dicts and model outputs."""
    return next(tensors_in(tree), None)


def replace_first_tensor(tree: Any, replacement: torch.Tensor) -> Any:
    """Copy ``tree`` with its first tensor replaced; a tree without a tensor is returned as it is."""
    replaced, found = _replace(tree, replacement)
    return replaced if found else tree


def _replace(tree: Any, replacement: torch.Tensor) -> tuple[Any, bool]:
    if isinstance(tree, torch.Tensor):
        return replacement, True
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            new, found = _replace(value, replacement)
            if found:
                changed: Any = copy.copy(tree)
                changed[key] = new
                return changed, True
    elif isinstance(tree, tuple | list):
        for place, value in enumerate(tree):
            new, found = _replace(value, replacement)
            if found:
                items = [*tree[:place], new, *tree[place + 1 :]]
                return (type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)), True
    return tree, False


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor of nested containers; what is no container (a cache object, say) is passed over."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from tensors_in(value)


class _TensorsOnly(nn.Module):
    """The model with its output flattened to a tuple of tensors, so that any output type can be traced."""

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(tensors_in(self.model(*args, **kwargs)))


@contextmanager
def _marked(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put a mark on the first tensor input and output of each layer while tracing."""
    handles = []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tensor = first_tensor((args, kwargs))
            if tensor is None:
                return None
            return replace_first_tensor((args, kwargs), torch.ops.neutralize.mark(tensor, f"{name}:in"))

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            tensor = first_tensor(output)
            return (
                None
                if tensor is None
                else replace_first_tensor(output, torch.ops.neutralize.mark(tensor, f"{name}:out"))
            )

        return hook

    for name, module in layers.items():
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
    # Before the user's own hooks on the way out and after them on the way in: a layer is what it computes itself. Of
    # the stacked layers of one module the last one leaves last, as it does within the module.
    for name, module in reversed(list(layers.items())):
        handles.append(module.register_forward_hook(leave(name), prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    example_inputs: Inputs | None,
    *,
    is_thorough: bool = False,
    partial: bool = False,
) -> Dataflow:
    """Trace ``model`` with the given layers marked.

    Args:
        model: live or on the meta device; nothing of it is changed, copied or computed (the recording that stands in
            for a
            failed export computes once).
        layers: qualified name to module.
        example_inputs: arguments for the model, or ``None`` for what it brings itself.
        is_thorough: export a meta model too, which takes several times as long as recording it.
        partial: let layers be that are not called, or not with tensors.

    Raises:
        NeutralizeError: no inputs, or the model can neither be exported nor recorded on them, or a layer was not
            called.
    """
    candidates: list[Inputs] = []
    if example_inputs is not None:
        candidates.append(example_inputs)
    else:
        brought = own_inputs(model)
        candidates.extend([] if brought is None else [brought])
        candidates.extend(guessed_inputs(model))
    failures: list[str] = []
    for inputs in candidates:
        try:
            with without_hooks(model):
                args, kwargs = placed_inputs(model, inputs)
                flow = _trace(model, layers, args, kwargs, is_thorough=is_thorough, partial=partial)
        except NeutralizeError:
            raise
        except Exception as error:
            failures.append(
                f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"
            )
            continue
        missing = [name for name in layers if not (partial or flow.calls.get(name))]
        if missing:
            raise NeutralizeError(
                f"plan: expected every selected layer to take and return a tensor on the example inputs, got none for "
                f"{', '.join(map(repr, missing))}; give example_inputs that reach it, or select the layer that calls it"
            )
        how = "recorded on the meta device" if flow.is_quick else "recorded" if flow.is_recorded else "exported"
        _LOGGER.debug("trace %s: %s, %d ops", type(model).__name__, how, len(flow.position))
        return flow
    if example_inputs is not None:
        raise NeutralizeError(
            f"plan: expected example_inputs that the model accepts, got a failing trace ({failures[0]}); give "
            "others that it runs on"
        )
    reason = f", and those guessed for it failed ({failures[-1]})" if failures else ""
    raise NeutralizeError(
        f"plan: expected example_inputs for a {type(model).__name__}, which brings none that work{reason}, got None; "
        "pass a "
        "tensor, a tuple of positional arguments or a dict of keyword arguments"
    )


def placed_inputs(model: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs on the device of the model's first parameter: meta inputs for a meta model."""
    first = next(iter(model.parameters()), None)
    device = first.device if first is not None else torch.device("cpu")
    args, kwargs = as_call(inputs)

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    args, kwargs = pytree.tree_map(move, (args, kwargs))
    return args, kwargs


def _trace(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    is_thorough: bool,
    partial: bool,
) -> Dataflow:
    wrapped = _TensorsOnly(model)
    wrapped.training = model.training
    on_meta = [tensor.is_meta for tensor in model.parameters()]
    with torch.no_grad(), _marked(layers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if on_meta and all(on_meta) and not is_thorough:
            try:
                flow = _recorded(wrapped, args, kwargs)
            except Exception:  # control flow that depends on data, an op without a meta kernel: the export says which
                flow = None
            if flow is not None and (partial or all(map(flow.calls.get, layers))) and not flow.is_patchy:
                return replace(flow, is_recorded=False, is_quick=True)
        try:
            return _exported(wrapped, args, kwargs)
        except Exception as error:
            if any(on_meta):
                raise
            _LOGGER.debug("trace %s: no export (%s); one run is recorded", type(model).__name__, type(error).__name__)
            try:
                return _recorded(wrapped, args, kwargs)
            except Exception as second:
                raise second from error


def _exported(wrapped: _TensorsOnly, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dataflow:
    """Export the model on fake tensors: nothing is computed or copied."""
    with redirect_stderr(io.StringIO()):  # a failing export prints the graph that it had so far
        program = torch.export.export(wrapped, args, kwargs, strict=False)
    _erase_checks(program.graph)
    memory = _Memory(program.graph)
    overwriting = memory.overwriting()
    is_nested = any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in program.graph.nodes)  # autocast
    if is_nested or memory.reads_stale_values:
        program = program.run_decompositions({})
        _erase_checks(program.graph)
        overwriting = dict.fromkeys(overwriting, ())  # those nodes are in the graph no more
        memory = _Memory(program.graph)
    signature = program.graph_signature
    by_name = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = {
        node: by_name[node.name].removeprefix("model.")
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in by_name
    }
    mutated = {name.removeprefix("model.") for name in signature.buffers_to_mutate.values()}
    return _dataflow(wrapped.model, memory, names, overwriting, mutated)


def _erase_checks(graph: fx.Graph) -> None:
    """Take out the ops that only check what they read: casts of the export leave such a one beside them."""
    for node in list(graph.nodes):
        if op_name(node).startswith("aten::_assert_") and not node.users:
            graph.erase_node(node)


def _recorded(wrapped: _TensorsOnly, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dataflow:
    """Run once on the real inputs and record the ops, for models whose control flow depends on data."""
    from neutralize.record import Recorder, print_of

    with untouched(wrapped):
        tensors: dict[str, torch.Tensor] = dict(wrapped.model.named_parameters(remove_duplicate=False))
        tensors.update(wrapped.model.named_buffers(remove_duplicate=False))
        recorder = Recorder(tensors)
        prints = {name: print_of(tensor) for name, tensor in tensors.items()}
        with recorder:
            outputs = wrapped(*pytree.tree_map(copied, args), **pytree.tree_map(copied, kwargs))
        mutated = {name for name, tensor in tensors.items() if print_of(tensor) != prints[name]}
    memory = _Memory(recorder.finish(outputs))
    overwriting = {**dict.fromkeys(recorder.overwritten, ()), **memory.overwriting()}
    flow = _dataflow(wrapped.model, memory, recorder.names, overwriting, mutated)
    return replace(flow, is_recorded=True, lost=frozenset(recorder.lost))


def copied(value: Any) -> Any:
    """A copy of an input tensor, so that an in-place op of the model does not reach the caller's."""
    return value.clone() if isinstance(value, torch.Tensor) else value


@dataclass
class _Memory:
    """Which nodes of a graph live in the same memory, and which of them ops write.

    Attributes:
        home: node to the first node of the memory that it lives in.
        sharing: that first node to all that live there, in order.
        writes: in-place ops, with what they write.
        is_complete: no op writes or hands on a list of tensors, which is not followed.
    """

    graph: fx.Graph
    home: dict[fx.Node, fx.Node] = field(default_factory=dict)
    sharing: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    writes: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    is_complete: bool = True

    def __post_init__(self) -> None:
        """Follow every tensor through the ops that return it, or a view of it."""
        for node in self.graph.nodes:
            schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
            base = node
            if schema is None and node.op == "call_function":
                base = next(iter(node.all_input_nodes), node)  # a part of a tuple
            for place, operand in enumerate(schema.arguments if schema is not None else ()):
                value = node.args[place] if place < len(node.args) else node.kwargs.get(operand.name)
                if operand.alias_info is None or value is None:
                    continue
                if not isinstance(value, fx.Node):
                    self.is_complete = False
                    continue
                base = value
                if operand.alias_info.is_write:
                    self.writes.append((node, value))
            self.home[node] = self.home.get(base, node)
            self.sharing.setdefault(self.home[node], []).append(node)

    @property
    def reads_stale_values(self) -> bool:
        """Whether a value is read under an old name after an in-place op has changed it.

        Where none is, the node of the in-place op stands for the new value everywhere: the graph is as good as
        functional.
        """
        if not self.is_complete:
            return True  # let functionalization sort it out
        position = {node: place for place, node in enumerate(self.graph.nodes)}
        return any(
            position[old] < position[node] < position[user]
            for node, value in self.writes
            for old in self.sharing[self.home[value]]
            for user in old.users
        )

    def overwriting(self) -> dict[str, tuple[fx.Node, ...]]:
        """Selected layers that write into what enters them while something else reads it later, and where they do.

        A mark is a clone: in the graph what a layer does to its input does not reach whoever else holds it.
        """
        position = {node: place for place, node in enumerate(self.graph.nodes)}
        found: dict[str, tuple[fx.Node, ...]] = {}
        for node, value in self.writes:
            entry = self.home[value]
            if not is_mark(entry):
                continue
            layer, _, side = str(entry.args[1]).rpartition(":")
            entering = entry.args[0]
            assert isinstance(entering, fx.Node)
            holders = self.sharing[self.home[entering]]
            if side == "in" and any(position[user] > position[entry] for each in holders for user in each.users):
                found[layer] = (*found.get(layer, ()), node)
        return found


def _dataflow(
    model: nn.Module,
    memory: _Memory,
    names: dict[fx.Node, str],
    overwriting: dict[str, tuple[fx.Node, ...]],
    mutated: set[str],
) -> Dataflow:
    from neutralize.apply import aliases_of

    graph = memory.graph
    tensors = tensors_of(model)
    unsaved = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    mutated |= {names[memory.home[value]] for _, value in memory.writes if memory.home[value] in names}
    entries: dict[str, list[fx.Node]] = {}
    calls: dict[str, list[Call]] = {}
    position = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not is_mark(node):
            continue
        layer, _, side = str(node.args[1]).rpartition(":")
        if side == "in":
            entries.setdefault(layer, []).append(node)
        elif entries.get(layer):
            entry = entries[layer].pop()
            calls.setdefault(layer, []).append(Call(layer, entry, node, position[entry], position[node]))
    return Dataflow(
        graph=graph,
        names=names,
        calls=calls,
        tied=aliases_of(tensors),
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        unwritable={
            **dict.fromkeys(unsaved, "is a buffer that is not saved with the model"),
            **dict.fromkeys(mutated, "is written by the model itself when it runs"),
        },
        overwriting=overwriting,
    )
