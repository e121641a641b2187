"""Unpickle: what a pickle would build, as data. Nothing that it names is imported or called.

Source: the opcodes as the ``pickletools`` module of Python documents them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from neutralize.errors import NeutralizeError

SIZE_LIMIT = 64 << 20
"""Bytes of a pickle that are read at all; that of 100,000 tensors has some 15 MB."""

_STEP_LIMIT = 8_000_000
"""Steps of a pickle; a tensor takes some 40."""

_MADE_LIMIT = 2_000_000
"""Objects that a pickle may make, each of which takes some 100 bytes; a shard of a tensor takes 9."""


@dataclass(frozen=True)
class Named:
    """Something that a pickle names.

    Attributes:
        name: with its module: ``"torch.FloatStorage"``.
    """

    name: str


@dataclass(eq=False, repr=False, slots=True)
class Made:
    """Something that a pickle would make.

    Attributes:
        what: ``"dict"``, ``"list"``, ``"set"``; ``"persistent"`` for what lies outside of the pickle; otherwise the
            name of what would be called.
        args: what it would be called with.
        elements: what would be appended to it.
        items: what keys of it would be set to, in order.
        state: what its state would be set to.
    """

    what: str
    args: tuple[Value, ...] = ()
    elements: Sequence[Value] = ()
    items: Sequence[tuple[Value, Value]] = ()
    state: Value = None

    def fields(self) -> dict[str, Value]:
        """Return the attributes that its state would give it; none if the state is no table of names."""
        if not isinstance(self.state, Made) or self.state.what != "dict":
            return {}
        return {key: value for key, value in self.state.items if isinstance(key, str)}


Value: TypeAlias = "bool | int | float | str | bytes | tuple[Value, ...] | Named | Made | None"


class _Broken(Exception):
    """A pickle that is none, in words."""


def read_pickle(data: bytes, is_known: Callable[[str], bool], what: str) -> Value:
    """Return what a pickle holds.

    Args:
        data: all of it.
        is_known: whether a name is one that it may use.
        what: names it in messages.

    Raises:
        NeutralizeError: it is no pickle, is too large, or uses any other name.
    """
    if len(data) > SIZE_LIMIT:
        raise NeutralizeError(
            f"checkpoint: expected a pickle of at most {SIZE_LIMIT} bytes for {what}, got {len(data)}; it is no such "
            "file"
        )
    try:
        return _Reader(data, is_known, what).read()
    except (_Broken, IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        about = str(error) if isinstance(error, _Broken) else "it does not fit together"
        raise NeutralizeError(
            f"checkpoint: expected a pickle for {what}, got bytes that are none ({about}); fetch it again"
        ) from error


_CONSTANTS: dict[int, Value] = {ord("N"): None, 0x88: True, 0x89: False, ord(")"): ()}
_NUMBERS = {ord("K"): "<B", ord("M"): "<H", ord("J"): "<i", ord("G"): ">d"}
_TEXTS = {0x8C: "<B", ord("X"): "<I", 0x8D: "<Q"}
_BYTES = {ord("U"): "<B", ord("T"): "<I", ord("C"): "<B", ord("B"): "<I", 0x8E: "<Q", 0x96: "<Q"}
_EMPTY = {ord("}"): "dict", ord("]"): "list", 0x8F: "set"}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_GETS = {ord("h"): "<B", ord("j"): "<I"}
_PUTS = {ord("q"): "<B", ord("r"): "<I"}


class _Reader:
    """The machine that a pickle is a program of: a stack, marks on it, and a memo."""

    def __init__(self, data: bytes, is_known: Callable[[str], bool], what: str) -> None:
        self._data = data
        self._at = 0
        self._made = 0
        self._is_known = is_known
        self._what = what
        self._stack: list[Value] = []
        self._below: list[list[Value]] = []
        self._memo: dict[int, Value] = {}

    def read(self) -> Value:
        for _ in range(_STEP_LIMIT):
            code = self._data[self._at]
            self._at += 1
            if code == ord("."):
                return self._stack.pop()
            self._step(code)
        raise _Broken(f"it has more than {_STEP_LIMIT} steps")

    def _step(self, code: int) -> None:
        stack = self._stack
        if code in _GETS:
            stack.append(self._memo[int(self._number(_GETS[code]))])
        elif code in _PUTS:
            self._memo[int(self._number(_PUTS[code]))] = stack[-1]
        elif code == 0x94:
            self._memo[len(self._memo)] = stack[-1]
        elif code in _NUMBERS:
            stack.append(self._number(_NUMBERS[code]))
        elif code in _TEXTS:
            stack.append(self._take(int(self._number(_TEXTS[code]))).decode())
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code == ord("("):
            self._below.append(stack)
            self._stack = []
        elif code == ord("t"):
            values = tuple(self._to_mark())
            self._stack.append(values)
        elif code in _TUPLES:
            count = _TUPLES[code]
            if len(stack) < count:
                raise _Broken("a tuple of more than there is")
            stack[-count:] = [tuple(stack[-count:])]
        elif code in _EMPTY:
            self._make(Made(_EMPTY[code]))
        elif code == ord("c"):
            self._name(self._line(), self._line())
        elif code == 0x93:
            name, module = stack.pop(), stack.pop()
            self._name(module, name)
        elif code == ord("R") or code == 0x81:
            arguments, called = stack.pop(), stack.pop()
            if not isinstance(called, Named) or not isinstance(arguments, tuple):
                raise _Broken("a call of something without a name")
            self._make(Made(called.name, arguments))
        elif code == ord("Q"):
            self._make(Made("persistent", (stack.pop(),)))
        else:
            self._fill(code)

    def _fill(self, code: int) -> None:
        """The rarer steps, most of which put something into what was made."""
        if code == ord("b"):
            state = self._stack.pop()
            self._target().state = state
        elif code == ord("s"):
            value, key = self._stack.pop(), self._stack.pop()
            self._set([(key, value)])
        elif code == ord("u"):
            values = self._to_mark()
            if len(values) % 2:
                raise _Broken("a key without a value")
            self._set(zip(values[::2], values[1::2], strict=True))
        elif code == ord("a"):
            self._append([self._stack.pop()])
        elif code in (ord("e"), 0x90):
            self._append(self._to_mark())
        elif code == 0x91:
            values = self._to_mark()
            self._make(Made("set", elements=values))
        elif code in _BYTES:
            self._stack.append(self._take(int(self._number(_BYTES[code]))))
        elif code == 0x8A:
            self._stack.append(int.from_bytes(self._take(int(self._number("<B"))), "little", signed=True))
        elif code == 0x80:
            self._take(1)  # the version, which adds steps and changes none
        elif code == 0x95:
            self._take(8)  # the length of a frame, a help for streams
        else:
            raise _Broken(f"a step {bytes([code])!r} that no list of tensors needs")

    def _make(self, made: Made) -> None:
        self._made += 1
        if self._made > _MADE_LIMIT:
            raise _Broken(f"it makes more than {_MADE_LIMIT} objects")
        self._stack.append(made)

    def _target(self) -> Made:
        target = self._stack[-1]
        if not isinstance(target, Made):
            raise _Broken("something put into what holds nothing")
        return target

    def _append(self, values: list[Value]) -> None:
        target = self._target()
        if not isinstance(target.elements, list):  # most things hold nothing: a list each would double their size
            target.elements = []
        target.elements.extend(values)

    def _set(self, items: Iterable[tuple[Value, Value]]) -> None:
        target = self._target()
        if not isinstance(target.items, list):
            target.items = []
        target.items.extend(items)

    def _to_mark(self) -> list[Value]:
        values, self._stack = self._stack, self._below.pop()
        return values

    def _name(self, module: Value, name: Value) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Broken("a name that is no text")
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if not self._is_known(full):
            raise NeutralizeError(
                f"checkpoint: expected nothing but tensors, numbers and text in {self._what}, got a pickle that wants "
                f"{full[:200]!r}; save the state dict alone, as torch.load(..., weights_only=True) takes it"
            )
        self._stack.append(Named(full))

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + 512)
        if end < 0:
            raise _Broken("a name without end")
        line = self._data[self._at : end].decode()
        self._at = end + 1
        return line

    def _number(self, kind: str) -> int | float:
        (number,) = struct.unpack(kind, self._take(struct.calcsize(kind)))
        return number  # type: ignore[no-any-return]

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise _Broken("it ends too early")
        self._at += count
        return self._data[self._at - count : self._at]
