"""Loads, stores, loops and registers of a compiled kernel, read from its machine code."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;")
_SASS_ACCESS = re.compile(r"\b(LDGSTS|LDG|STG)\.E((?:\.\w+)*)")
_SASS_JUMP = re.compile(r"\b(BRA|CALL)\b.*?\b0x([0-9a-f]+)")
_SASS_NO_FALL_THROUGH = re.compile(r"BRA(\.\w+)* 0x|EXIT|RET")
_AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(\w+)")
_AMD_JUMP = re.compile(r"\bs_c?branch\w*\s+(\.?\w+)")
_AMD_BYTES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}


@dataclass(frozen=True)
class Code:
    """One kernel: its instructions in order, and its natural loops as the indices of the instructions they repeat."""

    instructions: tuple[str, ...]
    loops: tuple[frozenset[int], ...]

    def innermost(self) -> list[frozenset[int]]:
        """The loops that hold no other."""
        return [loop for loop in self.loops if not any(other < loop for other in self.loops)]

    def longest_loop(self) -> int:
        """Instructions of the longest innermost loop; 0 without loops."""
        return max(map(len, self.innermost()), default=0)

    def accesses(self, inside: bool) -> tuple[Counter[int], Counter[int]]:
        """Global loads and stores by bytes a thread, those inside any loop or those outside all."""
        repeated = frozenset().union(*self.loops)
        loads: Counter[int] = Counter()
        stores: Counter[int] = Counter()
        for index, instruction in enumerate(self.instructions):
            found = access(instruction)
            if found and (index in repeated) == inside:
                (loads if found[0] == "load" else stores)[found[1]] += 1
        return loads, stores


def access(instruction: str) -> tuple[str, int] | None:
    """("load" or "store", bytes a thread) of an instruction that reads or writes global memory; None for others."""
    if found := _SASS_ACCESS.search(instruction):
        kind, modifiers = found.groups()
        width = re.search(r"\.[US]?(8|16|32|64|128|256)\b", modifiers)
        return "store" if kind == "STG" else "load", int(width.group(1)) // 8 if width else 4
    if found := _AMD_ACCESS.search(instruction):
        kind, width = found.groups()
        words = re.match(r"dwordx(\d)", width)
        return kind, 4 * int(words.group(1)) if words else _AMD_BYTES.get(width.split("_")[0], 4)
    return None


def natural_loops(successors: list[set[int]]) -> tuple[frozenset[int], ...]:
    """The loops of code whose instruction i is followed by one of `successors[i]`, entered at instruction 0.

    A branch closes a loop if every path to it passes its target. Another backward branch only leads back from a rare
    path that the compiler laid behind the code, and repeats nothing.
    """
    predecessors: list[set[int]] = [set() for _ in successors]
    for index, nexts in enumerate(successors):
        for successor in nexts:
            predecessors[successor].add(index)
    bodies: dict[int, set[int]] = {}
    for head, sources in enumerate(predecessors):
        for source in sources if len(sources) > 1 or head == 0 else ():
            body, pending = {head}, [source]
            while pending and (head == 0 or 0 not in body):
                index = pending.pop()
                if index not in body:
                    body.add(index)
                    pending.extend(predecessors[index])
            if head == 0 or 0 not in body:
                bodies.setdefault(head, set()).update(body)
    return tuple(frozenset(bodies[head]) for head in sorted(bodies))


def sass(text: str) -> Code:
    """Of the output of `cuobjdump -sass` for one kernel. A called routine is no part of the loop that calls it."""
    lines = [(int(address, 16), instruction) for address, instruction in _SASS.findall(text)]
    index_of = {address: index for index, (address, _) in enumerate(lines)}
    successors = []
    for index, (_, instruction) in enumerate(lines):
        jump = _SASS_JUMP.search(instruction)
        target = {index_of[int(jump.group(2), 16)]} if jump and int(jump.group(2), 16) in index_of else set()
        successors.append(target | _fall_through(index, len(lines), not _SASS_NO_FALL_THROUGH.match(instruction)))
    return Code(tuple(instruction for _, instruction in lines), natural_loops(successors))


def amdgcn(text: str) -> Code:
    """Of the assembly that Triton gives for one kernel on an AMD device."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.split("s_code_end")[0].splitlines():
        line = re.split(r";|//", line)[0].strip()
        if re.fullmatch(r"[.\w$]+:", line):
            labels[line[:-1]] = len(instructions)
        elif re.match(r"[a-z]+_", line):
            instructions.append(line)
    successors = []
    for index, instruction in enumerate(instructions):
        jump = _AMD_JUMP.search(instruction)
        target = {labels[jump.group(1)]} if jump else set()
        falls_through = not instruction.startswith(("s_branch", "s_endpgm"))
        successors.append(target | _fall_through(index, len(instructions), falls_through))
    return Code(tuple(instructions), natural_loops(successors))


def _fall_through(index: int, length: int, falls_through: bool) -> set[int]:
    return {index + 1} if falls_through and index + 1 < length else set()


@dataclass(frozen=True)
class Usage:
    """Of one thread: registers and bytes spilled to memory."""

    registers: int
    spilled: int


def usage_of(assembly: dict[str, Any]) -> Usage:
    """Of a compiled kernel's `asm`."""
    if "cubin" not in assembly:
        return amd_usage(assembly["amdgcn"])
    text = _cuobjdump(assembly["cubin"], "-res-usage")
    totals = {name: sum(map(int, re.findall(rf"\b{name}:(\d+)", text))) for name in ("REG", "LOCAL", "STACK")}
    return Usage(totals["REG"], totals["LOCAL"] + totals["STACK"])


def code_of(assembly: dict[str, Any]) -> Code:
    """Of a compiled kernel's `asm`."""
    return sass(_cuobjdump(assembly["cubin"], "-sass")) if "cubin" in assembly else amdgcn(assembly["amdgcn"])


def _cuobjdump(cubin: bytes, option: str) -> str:
    """By the disassembler that ships with Triton."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def amd_usage(text: str) -> Usage:
    """From the metadata below the assembly. Scalar registers spill to vector registers, not to memory."""
    registers, private = (
        int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1]) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return Usage(registers, private)
