# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Says whether two PTX files do the same, whatever registers are called: ``python -m tests.kernels.same_code A B``.

A refactoring of a kernel moves integer arithmetic about and renames registers, so that the text differs although
nothing has changed. Here every register gets a label from the instructions that write it and the labels of what those
read, over and over, as in colour refinement of graphs. Then what a program does to the world (loads, stores, copies,
barriers, matrix products, branches) is compared, in its order and with the labels of its operands. Line information
must be off (``TRITON_DISABLE_LINE_INFO=1``); ``compile_hopper --save FOLDER`` writes such files.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROUNDS = 60  # a label sees this far back
REGISTER = re.compile(r"%[A-Za-z]+\d+")
COMMUTATIVE = re.compile(r"(add|mul|and|or|xor|min|max)\.")
FUSED = re.compile(r"(mad|fma)\.")  # their first two operands can be swapped
WITHOUT_RESULT = ("st.", "bra", "bar.", "ret", "mbarrier", "cp.async", "red.", "setmaxnreg", "fence", "wgmma.fence",
                  "wgmma.commit", "wgmma.wait", "{", "}", ".", "$")  # fmt: skip
EFFECTS = ("st.", "ld.", "bra", "bar.", "ret", "mbarrier", "cp.async", "red.", "atom", "setmaxnreg", "fence", "wgmma",
           "$")  # fmt: skip


class Instruction(NamedTuple):
    """An instruction: text, name, predicate, registers that it writes, operands that it reads."""

    text: str
    name: str
    predicate: str
    written: list[str]
    read: str


def parse(text: str) -> list[Instruction]:
    """The instructions of a PTX file."""
    found = []
    for line in re.sub(r"//.*", "", text).splitlines():
        line = line.strip()
        if not line or line.startswith((".reg", ".loc", ".file")):
            continue
        guarded = re.match(r"@(!?%\w+)\s+(.*)", line)
        predicate, plain = (guarded[1], guarded[2]) if guarded else ("", line)
        name, operands = [*plain.split(None, 1), ""][:2]
        if name.startswith(WITHOUT_RESULT) or not REGISTER.search(operands):
            found.append(Instruction(line, name, predicate, [], operands))
            continue
        end = operands.index("}") + 1 if operands.startswith("{") else operands.index(",")
        # A matrix product adds to what it writes.
        read = operands if name.startswith("wgmma") else operands[end:]
        found.append(Instruction(line, name, predicate, REGISTER.findall(operands[:end]), read.strip(" ,;")))
    return found


def _named(text: str, labels: dict[str, str]) -> str:
    return REGISTER.sub(lambda match: labels.get(match[0], "?"), text)


def _operands(instruction: Instruction, labels: dict[str, str]) -> str:
    """Operands by their labels, in an order that does not depend on how they were written."""
    read = _named(instruction.read, labels)
    if COMMUTATIVE.match(instruction.name):
        return ",".join(sorted(part.strip() for part in read.split(",")))
    if FUSED.match(instruction.name):
        first, second, third = (part.strip() for part in read.split(","))
        return ",".join([*sorted((first, second)), third])
    return read


def effects(text: str) -> list[str]:
    """What a PTX file does to the world, in its order, with labels for registers and numbers for jump targets."""
    instructions = parse(text)
    labels: dict[str, str] = {}
    for _ in range(ROUNDS):
        writers: dict[str, set[str]] = {}
        for one in instructions:
            how = f"{_named(one.predicate, labels)}|{one.name}|{_operands(one, labels)}"
            for place, register in enumerate(one.written):
                writers.setdefault(register, set()).add(f"{place}|{how}")
        labels = {
            register: hashlib.sha256(";".join(sorted(hows)).encode()).hexdigest()[:16]
            for register, hows in writers.items()
        }
    targets: dict[str, str] = {}
    found = []
    for one in instructions:
        if one.name.startswith(EFFECTS):
            line = _named(one.text, labels)
            found.append(re.sub(r"\$\w+", lambda match: targets.setdefault(match[0], f"L{len(targets)}"), line))
    return found


def main() -> None:
    first, second = (effects(Path(name).read_text()) for name in sys.argv[1:3])
    if first == second:
        print(f"the same: {len(first)} effects in the same order with the same operands")
        return
    unequal = [pair for pair in zip(first, second, strict=False) if pair[0] != pair[1]]
    print(f"{len(first)} and {len(second)} effects; {len(unequal)} differ, or their operands do")
    for pair in unequal[:5]:
        print(*(line[:200] for line in pair), sep="\n", end="\n\n")
    sys.exit(1)


if __name__ == "__main__":
    main()
