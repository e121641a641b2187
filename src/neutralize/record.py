"""Record the ops of one real run as a graph, where a model cannot be exported."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from neutralize.dataflow import is_mark


class Recorder(TorchDispatchMode):
    """A dispatch mode that writes down every op with what it read and returned.

    In-place ops are recorded as what they return: the tensor that was written stands for the new value from then on,
    and
    every other view of its memory becomes unknown.

    What is written past the dispatcher (through a numpy array, say, or by a kernel that torch does not know) shows in
    the bits of what is read next: that value becomes unknown too.

    On the meta device, what comes of no parameter and no input (positions, masks) is computed beside it, and control
    flow may depend on that.

    Attributes:
        names: placeholder to qualified name, for parameters and buffers.
        lost: placeholders of what became unknown.
        overwritten: selected layers that write past the dispatcher into what enters them.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        """Start with the model's tensors.

        Args:
            tensors: parameters and buffers by qualified name.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: dict[fx.Node, str] = {}
        self.lost: set[fx.Node] = set()
        self.overwritten: set[str] = set()
        self._graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}
        self._values: dict[int, torch.Tensor] = {}  # of meta tensors, where they are known
        self._known: list[torch.Tensor] = []  # those of `_values`, also those inside an op that is written down whole
        self._prints: dict[int, int | None] = {}  # of what ops returned: the bits that it had then
        self._kept: list[torch.Tensor] = []  # an id stays that of its tensor as long as the tensor lives
        self._count = 0
        self._is_paused = False
        self._whole = _WholeOps(self)
        for name, tensor in tensors.items():
            if id(tensor) not in self._nodes:
                self.names[self._remember(tensor, self._placeholder(tensor))] = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the op and write it down."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and id(args[0]) in self._values:
            return self._values[id(args[0])].item()
        if not self._is_paused:
            self._look_at(args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.is_meta and result.numel() <= _MOST_KNOWN:
            self._note_value(func, args, kwargs, result)
        if not self._is_paused:
            self._write_down(func, args, kwargs, result)
        return result

    def __enter__(self) -> Recorder:
        """Start recording."""
        super().__enter__()  # type: ignore[no-untyped-call]
        self._whole.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop recording."""
        self._whole.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def whole(self, op: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function and write it down as one op, whatever it is made of."""
        self._is_paused = True
        try:
            self._look_at(args, kwargs)
            result = func(*args, **kwargs)
            self._write_down(op, args, kwargs, result)
        finally:
            self._is_paused = False
        return result

    def _write_down(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        is_mutable = func._schema.is_mutable
        if not is_mutable and not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(result)):
            return
        node_args, node_kwargs = pytree.tree_map(self._node_of, (args, kwargs))
        node = self._graph.create_node("call_function", func, node_args, node_kwargs)
        node.meta["val"] = pytree.tree_map(_shape_only, result)
        if is_mutable:
            self._values.clear()  # some may be views of what was written
            self._forget_views_of(_written(func, args, kwargs), result)
        if isinstance(result, torch.Tensor):
            self._note_result(result, node)
        else:
            for place, part in enumerate(result or ()):
                if isinstance(part, torch.Tensor):
                    picked = self._graph.create_node("call_function", operator.getitem, (node, place))
                    picked.meta["val"] = _shape_only(part)
                    self._note_result(part, picked)

    def _look_at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the operands unknown that are no more what the op that returned them made them."""
        for operand in pytree.tree_leaves((args, kwargs)):
            if isinstance(operand, torch.Tensor) and self._prints.get(id(operand)) not in (None, print_of(operand)):
                node = self._nodes[id(operand)]
                layer, _, side = str(node.args[1]).rpartition(":") if is_mark(node) else ("", "", "")
                if side == "in":
                    self.overwritten.add(layer)
                self._lose(operand)

    def _note_value(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> None:
        """Compute a meta tensor that is made of known ones alone, or of none."""
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_random = torch.Tag.nondeterministic_seeded in func.tags or "empty" in func._schema.name
        if func._schema.is_mutable or is_random or not all(id(operand) in self._values for operand in operands):
            return

        def known(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return self._values[id(leaf)]
            return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

        self._values[id(result)] = func(*pytree.tree_map(known, args), **pytree.tree_map(known, kwargs))
        self._known.append(result)

    def finish(self, outputs: Any) -> fx.Graph:
        """Close the graph with what the model returned."""
        self._look_at((outputs, [tensor for tensor in self._kept if is_mark(self._nodes[id(tensor)])]), {})
        self._graph.output(pytree.tree_map(self._node_of, outputs))
        return self._graph

    def _node_of(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        node = self._nodes.get(id(value))
        return node if node is not None else self._remember(value, self._placeholder(value))

    def _placeholder(self, tensor: torch.Tensor) -> fx.Node:
        self._count += 1
        # Placeholders come first in a graph, wherever they are first seen.
        root = next(iter(self._graph.nodes), None)
        if root is None:
            node = self._graph.placeholder(f"value_{self._count}")
        else:
            with self._graph.inserting_before(root):
                node = self._graph.placeholder(f"value_{self._count}")
        node.meta["val"] = _shape_only(tensor)
        return node

    def _remember(self, tensor: torch.Tensor, node: fx.Node) -> fx.Node:
        self._kept.append(tensor)
        self._nodes[id(tensor)] = node
        return node

    def _note_result(self, tensor: torch.Tensor, node: fx.Node) -> None:
        self._remember(tensor, node)
        self._prints[id(tensor)] = print_of(tensor)

    def _lose(self, tensor: torch.Tensor) -> None:
        """Make a tensor unknown."""
        self._nodes[id(tensor)] = self._placeholder(tensor)
        self._prints.pop(id(tensor), None)
        self.lost.add(self._nodes[id(tensor)])

    def _forget_views_of(self, written: list[torch.Tensor], result: Any) -> None:
        """Make every other tensor in the memory of a written one unknown: it holds something new."""
        memory = {_memory_of(tensor) for tensor in written if tensor.numel()}
        returned = {id(leaf) for leaf in pytree.tree_leaves(result)}
        for tensor in self._kept:
            other = id(tensor) not in returned and self._nodes[id(tensor)] not in self.names
            if other and tensor.numel() and _memory_of(tensor) in memory:
                self._lose(tensor)


def print_of(tensor: torch.Tensor) -> int | None:
    """A number that tells the bits of a tensor, and their order; ``None`` where it has none to look at."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return None
    content = tensor.detach().resolve_conj().resolve_neg().contiguous()
    lanes = (torch.view_as_real(content) if content.is_complex() else content).view(-1)
    try:
        lanes = lanes.view(_LANES[lanes.element_size()])
    except (KeyError, RuntimeError):  # a dtype or a subclass without plain memory
        return None
    odd = torch.arange(1, 2 * min(lanes.numel(), _LANES_AT_ONCE) + 1, 2, device=lanes.device)
    total = 0
    for chunk in lanes.split(_LANES_AT_ONCE) if lanes.numel() else ():
        total = total * 3 + int((chunk * odd[: chunk.numel()]).sum())
    return total


_LANES_AT_ONCE = 1 << 22  # what is multiplied takes 8 bytes each
_LANES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MOST_KNOWN = 1 << 20  # elements of what is computed on the meta device


class _WholeOps(TorchFunctionMode):
    """Gives composite ops to the recorder as the export shows them: the dispatcher shows what they are made of."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name not in _WHOLE or not any(getattr(home, name, None) is func for home in (torch, nn.functional)):
            return func(*args, **(kwargs or {}))
        packet = getattr(torch.ops.aten, name)
        if "data" in packet.overloads():  # of a packed sequence: the parameters are the fourth operand, not the third
            op = packet.data if isinstance(args[3], list | tuple) else packet.input
        else:
            op = packet.default
        return self._recorder.whole(op, func, args, kwargs or {})


# Those whose function in torch or torch.nn.functional takes what the op of that name takes, in the same order.
_WHOLE = frozenset(
    """lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell _pad_packed_sequence
    linear layer_norm rms_norm group_norm scaled_dot_product_attention""".split()
)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an op writes, by its schema."""
    found: list[Any] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def _memory_of(tensor: torch.Tensor) -> int:
    """The memory that a tensor is a view of; on the meta device, which has none, what stands for it."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata


def _shape_only(value: Any) -> Any:
    """A stand-in with the shape and dtype of a tensor and no memory."""
    return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value
