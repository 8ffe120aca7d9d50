# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Compiles the Hopper kernels for capability 9.0 with the Triton at hand and prints what came out as JSON; no GPU.

``--save FOLDER`` keeps the PTX, for ``same_code``.

A program of its own: it stands in for Triton's driver, which looks for a device when a kernel is launched.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

LIMIT = 232448  # bytes of shared memory that a program can have


class NoDevice:
    """Answers what compilation asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(
    operation: str, head_size: int, group: int, dtype: torch.dtype, save: Path | None = None
) -> dict[str, Any]:
    """Compiles one shape of an operation; facts about its code."""
    from vllm_vsprefill.kernels.attend import hopper
    from vllm_vsprefill.kernels.attend_tiles import hopper as tiles_hopper
    from vllm_vsprefill.kernels.index import allocate_index
    from vllm_vsprefill.kernels.paged import Batch, PagedKV
    from vllm_vsprefill.kernels.tile_index import allocate_tiles
    from vllm_vsprefill.kernels.types import SparsePattern

    found: list[Any] = []

    def launcher(self: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> MagicMock:
            found.append(self.run(*args, grid=grid, warmup=True, **kwargs))
            return MagicMock()  # stands for a compiled kernel with a launcher

        return launch

    JITFunction.__getitem__ = launcher
    heads, seq_len = 2, 1024
    cache = torch.zeros(seq_len // 16, 16, heads, 2 * head_size, dtype=dtype).transpose(1, 2)
    kv = PagedKV(cache, torch.arange(seq_len // 16, dtype=torch.int32)[None])
    q = torch.zeros(64, group * heads, head_size, dtype=dtype)
    batch = Batch.from_lists([64], [seq_len])
    visited = torch.zeros(1, dtype=torch.int64)
    if operation == "attend":
        index = allocate_index(1, heads, seq_len, SparsePattern(block_q=16, block_k=4, dense_last=0), "cpu")
        hopper.attend(q, kv, index, batch, scale=0.1, visited=visited)
    else:
        pattern = SparsePattern(block_q=2 * tiles_hopper.piece_positions(group), block_k=16)
        tiles = allocate_tiles(1, heads, 64, [(pattern, seq_len)], "cpu").view(pattern, 64, 1, seq_len)
        assert tiles_hopper.unsupported(q, kv, tiles) is None
        tiles_hopper.attend_tiles(q, kv, tiles, batch, scale=0.1, visited=visited)
    (kernel,) = found
    if save is not None:
        (save / f"{operation}_{head_size}_{group}.ptx").write_text(kernel.asm["ptx"])
    code = kernel.asm["ptx"].splitlines()
    arrivals = [i for i, line in enumerate(code) if re.search(r"(?<!cp\.async\.)\bmbarrier\.arrive\.", line)]
    return {
        "products": sum("wgmma.mma_async" in line for line in code),
        "arrivals": len(arrivals),
        # A consumer's one arrival speaks for all of its warps, so they must have met just before.
        "unguarded": sum(not any("bar.sync" in line for line in code[max(i - 8, 0) : i]) for i in arrivals),
        "shared": kernel.metadata.shared,
        "limit": LIMIT,
        "triton": triton.__version__,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, help="an existing folder")
    options = parser.parse_args()
    driver.set_active(NoDevice())
    shapes = (
        ("attend", 128, 4, torch.bfloat16),
        ("attend", 64, 7, torch.float16),
        ("attend_tiles", 128, 6, torch.bfloat16),
        ("attend_tiles", 64, 7, torch.float16),
    )
    print(json.dumps([compiled(*shape, options.save) for shape in shapes]))
