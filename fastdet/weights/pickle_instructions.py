"""The instructions of a pickle, with their arguments: as `pickletools.genops`, without copies of long arguments."""

import codecs
import pickle
import pickletools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Longer texts are no names.
_LONGEST_NAME = 256
# Python's limit, which older versions do not have.
_MOST_DIGITS = 4300


class Data(NamedTuple):
    """Stands in for bytes, a long text or a large number."""

    size: int


def _text(content: bytes) -> str | Data:
    text = str(content, "utf-8", "surrogatepass")
    return text if len(text) <= _LONGEST_NAME else Data(sys.getsizeof(text))


def _old_text(content: bytes) -> str | Data:
    """Of Python 2, where texts were bytes."""
    return content.decode("latin1") if len(content) <= _LONGEST_NAME else Data(len(content))


def _escaped_text(line: bytes) -> str | Data:
    text = str(line[:-1], "raw-unicode-escape")
    return text if len(text) <= _LONGEST_NAME else Data(sys.getsizeof(text))


def _quoted_text(line: bytes) -> str | Data:
    """Of Python 2, likewise escaped."""
    return _old_text(codecs.escape_decode(line[1:-2])[0])


def _signed(content: bytes) -> int | Data:
    return int.from_bytes(content, "little", signed=True) if len(content) <= 16 else Data(len(content))


def _decimal(content: bytes) -> int | Data:
    if len(content) > _MOST_DIGITS:
        raise pickle.UnpicklingError(f"a number in it has more than {_MOST_DIGITS} digits")
    number = int(content.rstrip(b"L\n"))
    return number if abs(number) < 1 << 127 else Data(len(content))


# What an argument is made into, by the name that pickletools gives its kind. Others are bytes, of which the number is
# enough. Floating numbers are not needed.
_READERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(("uint1", "uint2", "uint4", "uint8"), lambda content: int.from_bytes(content, "little")),
    **dict.fromkeys(("int4", "long1", "long4"), _signed),
    **dict.fromkeys(("decimalnl_short", "decimalnl_long"), _decimal),
    **dict.fromkeys(("float8", "floatnl"), lambda content: 0.0),
    **dict.fromkeys(("unicodestring1", "unicodestring4", "unicodestring8"), _text),
    "unicodestringnl": _escaped_text,
    **dict.fromkeys(("string1", "string4"), _old_text),
    "stringnl": _quoted_text,
    **dict.fromkeys(("stringnl_noescape", "stringnl_noescape_pair"), lambda content: _old_text(content[:-1])),
}
_LINE = pickletools.UP_TO_NEWLINE


def _describe(opcode: pickletools.OpcodeInfo) -> tuple[str, int, int, Callable[[bytes], Any] | None]:
    """Its name, the width of its argument, that of the length which it begins with, and the reader."""
    if opcode.arg is None:
        return opcode.name, 0, 0, lambda content: None
    # The names of kinds that have a length end in its width.
    prefix = 0 if opcode.arg.n >= _LINE else int(opcode.arg.name[-1])
    return opcode.name, opcode.arg.n, prefix, _READERS.get(opcode.arg.name)


_INSTRUCTIONS = {ord(opcode.code): _describe(opcode) for opcode in pickletools.opcodes}


def instructions(program: bytes, position: int) -> Iterator[tuple[str, Any, int]]:
    """Names, arguments, and the positions behind them."""
    length = len(program)
    while position < length:
        if program[position] not in _INSTRUCTIONS:
            raise pickle.UnpicklingError(f"it has no instruction {program[position]}")
        name, width, prefix, reader = _INSTRUCTIONS[program[position]]
        position += 1
        if width == _LINE:
            end = program.find(b"\n", position) + 1 or length + 1
            if name in ("GLOBAL", "INST"):
                end = program.find(b"\n", end) + 1 or length + 1
        elif prefix:
            start = position + prefix
            end = start + int.from_bytes(program[position:start], "little")
            position = start
        else:
            end = position + width
        if end > length:
            raise pickle.UnpicklingError("it ends before it should")
        yield name, reader(program[position:end]) if reader else Data(end - position), end
        position = end
