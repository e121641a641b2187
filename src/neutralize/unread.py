"""Unread: tensors whose elements are read each time an op takes them; a model with these needs no room for weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from neutralize.errors import NeutralizeError


class Unread(torch.Tensor):
    """A tensor on the CPU whose elements are read each time an op takes it.

    Attributes:
        read: returns the elements.
        held: returns them if they are in memory since the last time they were read, else ``None``.
    """

    read: Callable[[], torch.Tensor]
    held: Callable[[], torch.Tensor | None]

    @staticmethod
    def __new__(
        cls: type[Unread],
        shape: torch.Size,
        dtype: torch.dtype,
        read: Callable[[], torch.Tensor],
        held: Callable[[], torch.Tensor | None] = lambda: None,
    ) -> Unread:
        """Make one of a shape and a dtype."""
        made: Unread = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))
        made.read, made.held = read, held
        return made

    def changed(self, change: Callable[[torch.Tensor], None]) -> Unread:
        """Return one whose elements are changed in place, in a copy, each time they are read."""

        def read() -> torch.Tensor:
            copy = self.read().clone()
            change(copy)
            return copy

        return Unread(self.shape, self.dtype, read)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Read what is asked for, and run the op."""
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Unread(args[0].shape, args[0].dtype, args[0].read, args[0].held)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, Unread) and argument.alias_info is not None and argument.alias_info.is_write:
                raise NeutralizeError(
                    f"verify: expected a model that only reads its parameters, got {func} on one; verify the "
                    "loaded model"
                )
        args, kwargs = pytree.tree_map_only(Unread, lambda tensor: tensor.read(), (args, kwargs))
        return func(*args, **kwargs)
