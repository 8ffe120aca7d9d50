# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Tile sizes and launch settings of the Triton kernels.

A table, not autotuning: nothing is measured while serving, and a new sequence length never compiles anything. The key
is what decides which setting is best, compute capability, operation and shape, never the name of the device.
``python -m benchmarks.kernels --tune`` measures candidates on a device and writes the best into ``settings.json``. The
attention kernel for capability 9.0 (``attend/hopper.py``) has one set of tiles, its shared memory holds no other.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Settings:
    """Launch settings of one kernel.

    Attributes:
        block_m: rows of a tile (query rows times heads of the group, or tokens).
        block_n: keys (or hidden units) of a tile.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        lanes: query tiles of the pattern that share one program (``attend`` only).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    lanes: int = 1


# (capability, operation, padded head size) -> settings. The capability is the lowest one the entry is for. 8.6 to 8.9
# and 12.x have entries because a program there has 99 KiB of shared memory, less than with the capabilities below.
Table = dict[tuple[int, str, int], Settings]
TABLE_FILE = Path(__file__).with_name("settings.json")


def read_table(file: Path = TABLE_FILE) -> Table:
    """The entries of a table file."""
    table: Table = {}
    for entry in json.loads(file.read_text()):
        key = (entry.pop("capability"), entry.pop("operation"), entry.pop("head_size"))
        table[key] = Settings(**entry)
    return table


def write_table(table: Table, file: Path = TABLE_FILE) -> None:
    """Writes a table, an entry a line, in order."""
    entries = [
        {
            "capability": capability,
            "operation": operation,
            "head_size": size,
            **asdict(table[capability, operation, size]),
        }
        for capability, operation, size in sorted(table)
    ]
    file.write_text("[\n" + ",\n".join(" " + json.dumps(entry) for entry in entries) + "\n]\n")


TABLE = read_table()

# Tiles of the interpreter's tests are small problems too: nothing is tuned for it.
INTERPRETED = 80


def padded(size: int) -> int:
    """Smallest power of two that is at least ``size`` and 16, the minimum of a matrix product."""
    return max(16, 1 << (size - 1).bit_length())


@functools.lru_cache
def capability(device: torch.device) -> int:
    """Compute capability of a device as one number, 90 for 9.0; that of the lowest entry for the interpreter's CPU."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device; one where a kernel is interpreted, or only compiled."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.lru_cache
def _entry(operation: str, head_size: int, have: int, element_size: int) -> Settings:
    size = max(64, padded(head_size))
    entries = [key for key in TABLE if key[1] == operation and key[2] == size and key[0] <= have]
    if not entries:
        raise ValueError(f"no settings of {operation} for head size {head_size} and capability {have / 10}")
    found = TABLE[max(entries)]
    if element_size > 2:
        found = replace(found, block_m=max(found.block_m // 2, 16), block_n=max(found.block_n // 2, 16), num_stages=1)
    return found


def settings(operation: str, head_size: int, device: torch.device, element_size: int = 2) -> Settings:
    """The entry for an operation, of the highest capability that the device has.

    Args:
        operation: ``attend``, ``attend_tiles``, ``score``, ``sampled``, ``price`` or ``mass``.
        head_size: channels of a head.
        device: device of the tensors.
        element_size: bytes of an element; with float32 the tiles are halved, they would not fit.

    Raises:
        ValueError: no entry for this operation, head size and device.
    """
    return _entry(operation, head_size, capability(device), element_size)
