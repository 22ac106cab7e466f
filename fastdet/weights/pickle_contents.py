"""What a pickle would make: its instructions are followed with stand-ins in place of objects, and charged for.

A pickle is a program for a machine with a stack and a memo. Nothing in it is run here, and only the stand-ins need
memory.
"""

import pickle
import pickletools
from typing import Any, NamedTuple

from fastdet.weights import pickle_calls
from fastdet.weights.limits import OutOfProportion
from fastdet.weights.pickle_calls import REFERENCE, Entries, Storage, copied_bytes
from fastdet.weights.pickle_instructions import instructions

# More than any checkpoint has: to follow them takes half a second.
_MOST_INSTRUCTIONS = 1 << 18
# Python's objects, in bytes; instructions that are left out take a reference.
_COSTS = {
    **dict.fromkeys(("EMPTY_DICT", "DICT", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"), 64),
    **dict.fromkeys(("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), 64),
    **dict.fromkeys(("EMPTY_SET", "FROZENSET"), 216),
    **dict.fromkeys(("REDUCE", "NEWOBJ", "BUILD"), 500),
}
_CONSTANT = 64
_PUTS, _GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
# Instructions that put their argument on the stack, and those that put a value there.
_CONSTANTS = {
    opcode.name for opcode in pickletools.opcodes if opcode.arg and opcode.stack_after and not opcode.stack_before
} - {*_GETS, "GLOBAL", "INST", "PERSID", "EXT1", "EXT2", "EXT4"}
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class Contents(NamedTuple):
    """What a pickle has.

    Attributes:
        value: its object, of stand-ins.
        storages: the storages of torch that it refers to, by key.
        cost: bytes that it would take.
        end: the position after it.
    """

    value: Any
    storages: dict[str, Storage]
    cost: int
    end: int


def examine(program: bytes, allowance: int, start: int = 0) -> Contents:
    """Follow the pickle that begins at `start`.

    Raises:
        OutOfProportion: it would make more than `allowance` bytes.
        UnpicklingError: it is damaged, or calls what is no part of tensors, arrays and plain values.
    """
    machine = _Machine()
    position = frame_end = start
    for number, (name, argument, end) in enumerate(instructions(program, start)):
        if number >= _MOST_INSTRUCTIONS:
            raise OutOfProportion(f"its pickle has more than {_MOST_INSTRUCTIONS} instructions")
        # Where an instruction crosses the end of a frame, Python's reader goes on from another byte.
        if position < frame_end and (end > frame_end or name == "FRAME"):
            raise pickle.UnpicklingError(f"its instruction {number}, {name}, crosses the end of a frame")
        position, frame_end = end, end + argument if name == "FRAME" else frame_end
        # The memo is a list as long as its largest index.
        if name in _PUTS and argument > 2 * number + 1024:
            raise OutOfProportion(f"its memo has an index of {argument}")
        try:
            machine.follow(name, argument)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise pickle.UnpicklingError(f"its instruction {number}, {name}, does not find what it needs") from None
        if machine.cost > allowance:
            raise OutOfProportion(f"reading it would take more than {allowance >> 20} MB")
        if name == "STOP":
            return Contents(machine.stack[-1], machine.storages, machine.cost, end)
    raise pickle.UnpicklingError("it ends before it should")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        # The stacks below the marks.
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.cost = 0

    def follow(self, name: str, argument: Any) -> None:
        """One instruction. Raises an error of Python's, or UnpicklingError, if it is not possible or not allowed."""
        stack = self.stack
        self.cost += _COSTS.get(name, REFERENCE)
        if name in _CONSTANTS:
            stack.append(argument)
            self.cost += _CONSTANT + copied_bytes(argument)
        elif name in _PUTS:
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in _GETS:
            stack.append(self.memo[argument])
        elif name in _VALUES:
            stack.append(_VALUES[name])
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [stack.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(reversed(items)))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            made, cost = pickle_calls.call(stack.pop(), arguments)
            stack.append(made)
            self.cost += cost
        elif name == "BUILD":
            state = stack.pop()
            self.cost += pickle_calls.build(stack[-1], state)
        elif name == "BINPERSID":
            key, storage = pickle_calls.storage(*stack.pop())
            if self.storages.setdefault(key, storage) != storage:
                raise pickle.UnpicklingError(f"storage {key} is referred to as two different ones")
            stack.append(storage)
        elif name == "GLOBAL":
            stack.append(pickle_calls.name(*argument.split("\n")))
        elif name == "STACK_GLOBAL":
            attribute = stack.pop()
            stack.append(pickle_calls.name(stack.pop(), attribute))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("EMPTY_DICT", "EMPTY_SET"):
            stack.append(Entries())
        elif name == "APPEND":
            item = stack.pop()
            self._extend(stack[-1], [item])
        elif name == "SETITEM":
            _, key = stack.pop(), stack.pop()
            self._set(stack[-1], [key])
        elif name == "POP":
            _ = stack.pop() if stack else self._pop_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("TUPLE", "LIST"):
            items = self._pop_mark()
            self.stack.append(tuple(items) if name == "TUPLE" else items)
        elif name == "APPENDS":
            items = self._pop_mark()
            self._extend(self.stack[-1], items)
        elif name in ("SETITEMS", "ADDITEMS"):
            items = self._pop_mark()
            self._set(self.stack[-1], items if name == "ADDITEMS" else items[::2])
        elif name in ("DICT", "FROZENSET"):
            items = self._pop_mark()
            self.stack.append(Entries())
            self._set(self.stack[-1], items if name == "FROZENSET" else items[::2])
        elif name == "POP_MARK":
            self._pop_mark()
        elif name == "STOP":
            _ = stack[-1]
        elif name not in ("PROTO", "FRAME"):
            raise pickle.UnpicklingError(f"its instruction {name} is refused")

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _extend(self, to: Any, items: list[Any]) -> None:
        if type(to) is not list:
            raise TypeError
        to += items
        self.cost += REFERENCE * len(items)

    def _set(self, to: Any, keys: list[Any]) -> None:
        if type(to) is not Entries:
            raise TypeError
        self.cost += to.add(keys)
