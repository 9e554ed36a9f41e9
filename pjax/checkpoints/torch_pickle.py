"""The pickle inside a torch file, read as data: nothing that is named in it is imported or called.

Python's own unpickler, even with an allow-list, lets a file set attributes of what the list allows, and takes memory for a
memo as long as the file says. So the few opcodes that torch writes are interpreted here; every other one is refused.
Source: the opcodes' documentation in Python's `pickletools`; torch/_utils.py for the arguments.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from pjax.errors import CheckpointError

STORAGE_DTYPES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
}
CALLABLE = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
MAX_RANK = 64
MAX_SIZE = 2**63

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINSTRING "
    "SHORT_BINSTRING".split()
)


@dataclass(frozen=True)
class Global:
    """A qualified name of the pickle, out of those that are allowed."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A flat array that tensors view: entry `data/<key>` of the file."""

    dtype: str
    key: str
    num_elements: int


@dataclass(frozen=True)
class TensorView:
    """A tensor; sizes and offset in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RefusedError(Exception):
    """The pickle holds something that a file of tensors does not."""


def read_pickle(data: bytes, place: str) -> dict[str, TensorView]:
    """The tensors of a pickled state dict. CheckpointError when it is damaged or holds or calls anything else."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.run(opcode.name, argument)
        top = machine.pop()
        if not isinstance(top, dict):
            raise _RefusedError(f"it holds a {type(top).__name__}, but must hold a dictionary of tensors")
        for name, value in top.items():
            if not isinstance(value, TensorView):
                raise _RefusedError(f"entry {name!r:.100} is a {type(value).__name__}, but must be a tensor")
        return top
    except _RefusedError as error:
        raise CheckpointError(f"{place}: {error}") from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError, EOFError) as error:
        raise CheckpointError(f"{place} is damaged: {type(error).__name__}: {error!s:.200}") from error


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_RANK or not all(type(size) is int and 0 <= size < MAX_SIZE for size in value):
        raise _RefusedError(f"{what} of a tensor is no tuple of up to {MAX_RANK} integers in [0, 2**63)")
    return value


class _Machine:
    """The unpickler's stack and memo."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._acts: dict[str, Callable[[], None]] = {
            "MARK": lambda: self._stack.append(_MARK),
            "EMPTY_DICT": lambda: self._stack.append({}),
            "EMPTY_LIST": lambda: self._stack.append([]),
            "EMPTY_TUPLE": lambda: self._stack.append(()),
            "TUPLE": lambda: self._stack.append(tuple(self._pop_to_mark())),
            "TUPLE1": lambda: self._tuple(1),
            "TUPLE2": lambda: self._tuple(2),
            "TUPLE3": lambda: self._tuple(3),
            "MEMOIZE": lambda: self._memo.__setitem__(len(self._memo), self._stack[-1]),
            "SETITEM": lambda: self._set_items(self._tuple_of(2)),
            "SETITEMS": lambda: self._set_items(self._pop_to_mark()),
            "APPEND": lambda: self._append(self._tuple_of(1)),
            "APPENDS": lambda: self._append(self._pop_to_mark()),
            "BINPERSID": self._storage,
            "STACK_GLOBAL": lambda: self._global(".".join(str(word) for word in self._tuple_of(2))),
            "REDUCE": self._call,
            "BUILD": self._build,
            "PROTO": lambda: None,
            "FRAME": lambda: None,
            "STOP": lambda: None,
        }

    def run(self, opcode: str, argument: Any) -> None:
        """One opcode."""
        if opcode in _LITERALS:
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode])
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif opcode == "GLOBAL":
            self._global(argument.replace(" ", ".", 1))
        elif opcode == "INST":
            _refuse_name(argument.replace(" ", ".", 1))
        elif opcode in self._acts:
            self._acts[opcode]()
        else:
            raise _RefusedError(f"its pickle has the opcode {opcode}, which a file of tensors does not need; it is not run")

    def pop(self) -> Any:
        """The top of the stack; IndexError when there is none, ValueError when it is a mark."""
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value must be")
        return value

    def _tuple_of(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def _tuple(self, count: int) -> None:
        self._stack.append(tuple(self._tuple_of(count)))

    def _pop_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items for something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise _RefusedError(f"a dictionary has a key of type {type(key).__name__}, but must have names")
            if key in target:
                raise _RefusedError(f"{key!r:.100} is there twice")
            target[key] = value

    def _append(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise ValueError("items for something that is no list")
        self._stack[-1].extend(items)

    def _global(self, name: str) -> None:
        if name not in CALLABLE and name not in STORAGE_DTYPES:
            _refuse_name(name)
        self._stack.append(Global(name))

    def _storage(self) -> None:
        """torch.serialization's persistent id: ("storage", type, key, device, number of elements)."""
        match self.pop():
            case ("storage", Global(name), str(key), str(), int(count)) if name in STORAGE_DTYPES and 0 <= count < MAX_SIZE:
                self._stack.append(Storage(STORAGE_DTYPES[name], key, count))
            case _:
                raise _RefusedError("its pickle has a persistent id that is no storage of tensors")

    def _call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise _RefusedError(f"its pickle calls a {type(function).__name__}; nothing but tensors is read")
        match function.name, arguments:
            case "collections.OrderedDict", ():
                self._stack.append({})
            case "torch._utils._rebuild_tensor_v2", (Storage() as storage, int(offset), shape, strides, *rest) if len(rest) <= 3:
                shape, strides = _sizes(shape, "the shape"), _sizes(strides, "the strides")
                if len(shape) != len(strides) or not 0 <= offset < MAX_SIZE:
                    raise _RefusedError(f"a tensor has shape {shape}, strides {strides} and offset {offset}, which do not fit")
                self._stack.append(TensorView(storage, offset, shape, strides))
            case "torch._utils._rebuild_parameter", (TensorView() as tensor, *rest) if len(rest) <= 2:
                self._stack.append(tensor)
            case _:
                raise _RefusedError(f"its pickle calls {function.name} with arguments that do not fit")

    def _build(self) -> None:
        """Attributes of a state dict (its _metadata): nobody needs them."""
        self.pop()
        if not isinstance(self._stack[-1], dict):
            raise _RefusedError(f"its pickle sets attributes of a {type(self._stack[-1]).__name__}; nothing but tensors is read")


def _refuse_name(name: str) -> NoReturn:
    raise _RefusedError(
        f"its pickle names {name!r:.200}, which is neither imported nor called; supported: {', '.join(CALLABLE)} and storages"
    )
