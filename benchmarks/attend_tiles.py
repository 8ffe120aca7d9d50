# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Times of attention to lists of tiles on one GPU, against FlashAttention 3 of vLLM's bundle in the same process.

The last 8,192 rows of a sequence; each tile lists so many random keys below its window of 256, another list for each KV
head. A figure is the median of repeated runs between device events, warmed up. Rates count the (row, key) pairs that
the kernel reports to have visited. Every output is compared with the plain reference, row by row.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from benchmarks import environment
from benchmarks.kernels import CHUNK, Case, attempt, flash_attention, milliseconds
from vllm_vsprefill.kernels.attend_tiles import paged
from vllm_vsprefill.kernels.attend_tiles.triton import attend_tiles, without_hopper
from vllm_vsprefill.kernels.reference import cache_slots
from vllm_vsprefill.kernels.settings import Settings, settings
from vllm_vsprefill.kernels.tile_index import EVERYTHING, TileIndex, allocate_tiles
from vllm_vsprefill.kernels.types import SparsePattern


class Layer(NamedTuple):
    """Heads of a layer, a sequence, and tiles."""

    query_heads: int
    kv_heads: int
    size: int
    seq_len: int
    block_q: int

    def __str__(self) -> str:
        return f"{self.query_heads} / {self.kv_heads} heads of {self.size}, {self.seq_len} tokens"


# Tiles are whole pieces of the kernel for capability 9.0: 20, 18 and 32 positions.
LAYERS = (Layer(12, 2, 128, 32768, 120), Layer(14, 2, 64, 32768, 126), Layer(32, 8, 128, 131072, 128))
LISTED = (2048, 4096)


def random_lists(case: Case, pattern: SparsePattern, listed: int, dense_heads: int = 0) -> TileIndex:
    """An index whose tiles list so many random keys; those of the first ``dense_heads`` attend to everything."""
    rng = torch.Generator("cuda").manual_seed(1)
    rows, n, heads = case.q.shape[0], case.seq_len, case.kv.num_kv_heads
    index = allocate_tiles(1, heads, rows, [(pattern, n)], "cuda").view(pattern, rows, 1, n)
    slots = cache_slots(case.kv, 0, n)
    parts, at = [], 0
    for tile in pattern.tiles(rows, n):
        place, below = index.place(0, 0, n - rows, tile), pattern.window_start(tile * pattern.block_q)
        for head in range(heads):
            if head < dense_heads:
                index.counts[head, place] = EVERYTHING
                continue
            keys = torch.randperm(below, generator=rng, device="cuda")[:listed].sort().values
            index.starts[head, place], index.counts[head, place] = at, len(keys)
            parts.append(slots[keys].int())
            at += len(keys)
    return index._replace(slots=torch.cat(parts) if parts else index.slots[:1])


def row(case: Case, index: TileIndex, config: Settings | None = None) -> dict[str, Any]:
    """Time, rate and visited keys."""
    size, group = case.kv.head_size, case.q.shape[1] // case.kv.num_kv_heads
    scale, out = size**-0.5, torch.empty_like(case.q)
    visited, counted = (torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(2))
    paged.check_attend_tiles(case.q, case.kv, index, case.batch, scale, out, visited)
    attend_tiles(case.q, case.kv, index, case.batch, scale=scale, out=out, visited=visited, config=config)
    expected = paged.attend_tiles(case.q, case.kv, index, case.batch, scale=scale, visited=counted)
    errors = (out.float() - expected.float()).norm(dim=(1, 2)) / expected.float().norm(dim=(1, 2))
    error, pairs = float(errors.max()), int(visited)
    time = milliseconds(lambda: attend_tiles(case.q, case.kv, index, case.batch, scale=scale, out=out, config=config))
    reason = "tile sizes were given" if config else without_hopper(case.q, case.kv, index)
    return {
        "ms": time,
        "tflops": pairs * group * 4 * size / time / 1e9,
        "keys_a_row": pairs / (case.kv.num_kv_heads * case.q.shape[0]),
        "largest_relative_error_of_a_row": error,
        "correct": error < 2e-2 and pairs == int(counted),
        "without_hopper": reason,
    }


def dense_row(case: Case, call: Callable[[], Any]) -> dict[str, Any]:
    """FlashAttention 3 over everything."""
    time = milliseconds(call)
    pairs = SparsePattern.causal_pairs(case.q.shape[0], case.seq_len)
    return {"ms": time, "tflops": pairs * case.q.shape[1] * 4 * case.kv.head_size / time / 1e9}


def run(record: dict[str, Any], save: Callable[[], None], layers: tuple[Layer, ...]) -> None:
    """Every row of the table."""
    for layer in layers:
        case = Case.make(layer.seq_len, CHUNK, layer.query_heads, layer.kv_heads, layer.size)
        pattern = SparsePattern(block_q=layer.block_q, block_k=64, window=256, sinks=64, dense_last=0)
        stock, dense = flash_attention(case), None
        if stock is None:
            print("vLLM's FlashAttention is not installed", flush=True)
        else:
            dense = attempt(record, f"{layer}: FA3 dense", lambda: dense_row(case, stock), save)  # noqa: B023
        table = settings("attend_tiles", layer.size, case.q.device)
        rows: dict[str, tuple[int, int, Settings | None]] = {
            **{f"lists of {listed}": (listed, 0, None) for listed in LISTED},
            "lists of 4096, half of the heads everything": (4096, layer.kv_heads // 2, None),
            "everything": (0, layer.kv_heads, None),
            "lists of 4096, portable kernel": (4096, 0, table),
        }
        for name, (listed, dense_heads, config) in rows.items():
            index = random_lists(case, pattern, listed, dense_heads)
            found = attempt(record, f"{layer}: {name}", lambda: row(case, index, config), save)  # noqa: B023
            if found and dense:
                found["of_fa3_dense"] = found["ms"] / dense["ms"]
                save()
        torch.cuda.empty_cache()


def main(
    out: Annotated[Path, typer.Option(help="Write the figures to this file, row by row.")],
    first: Annotated[bool, typer.Option("--first", help="Only the first shape.")] = False,
) -> None:
    """Measure attention to lists of tiles on this machine's GPU."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks.attend_tiles needs a CUDA device")
    import triton

    record: dict[str, Any] = {**environment.describe(), "triton": triton.__version__, "rows": {}}
    out.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        out.write_text(json.dumps(record, indent=1) + "\n")

    with torch.inference_mode():
        run(record, save, LAYERS[:1] if first else LAYERS)
    failed = [name for name, found in record["rows"].items() if "error" in found or not found.get("correct", True)]
    if failed:
        sys.exit("wrong or failed: " + "; ".join(failed))


if __name__ == "__main__":
    typer.run(main)
