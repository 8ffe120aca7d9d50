# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Times of ``rank`` and of the lists of tiles on one GPU, as replayed graphs: means with what they pay to sinks and
window, marks, lists, and all of it; and of what ``variance`` adds, the operation itself and marks with a prior.
Bfloat16, head size 128, blocks of 16, one sequence of random numbers; the bar is such that a tile lists about 1,000
keys. Marks and lists are checked against the plain references for some tiles, variances for all keys.
"""

from __future__ import annotations

import json
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import environment
from benchmarks.kernels import attempt, graph_milliseconds, milliseconds
from vllm_vsprefill.kernels.merge import triton as merge_version
from vllm_vsprefill.kernels.merge.paged import check_build_tiles
from vllm_vsprefill.kernels.paged import Batch, PagedKV
from vllm_vsprefill.kernels.rank import triton as version
from vllm_vsprefill.kernels.rank.paged import RankWorkspace, allocate_rank, check_rank
from vllm_vsprefill.kernels.reference import cache_slots, keys_values
from vllm_vsprefill.kernels.settings import Settings
from vllm_vsprefill.kernels.tile_index import TileIndex, allocate_tiles
from vllm_vsprefill.kernels.tile_scores import tile_scores
from vllm_vsprefill.kernels.types import SparsePattern
from vllm_vsprefill.kernels.variance import paged as variance_reference
from vllm_vsprefill.kernels.variance import triton as variance_version

SIZE, BLOCK, LISTED = 128, 16, 1000
SCALE = SIZE**-0.5
CANDIDATES = (
    Settings(64, 128, 4, 3), Settings(64, 64, 4, 2), Settings(64, 64, 4, 3), Settings(128, 128, 8, 2),
    Settings(64, 256, 8, 2), Settings(64, 128, 8, 2),
)  # fmt: skip
# Query heads, KV heads, rows, tokens, positions of a tile
SHAPES = ((12, 2, 8192, 32768, 20), (32, 8, 8192, 131072, 128), (12, 2, 2048, 16384, 20), (12, 2, 8192, 32768, 64))


def wrong(
    q: torch.Tensor, kv: PagedKV, index: TileIndex, n: int, prior: torch.Tensor | None = None
) -> dict[str, float]:
    """Listed keys that should not be, or the other way, over all keys of some tiles that have a score away from the
    bar; and lists that are not what the bits say."""
    tiles, first = index.pattern.tiles(q.shape[0], n), n - q.shape[0]
    some = sorted({tiles[0], tiles[len(tiles) // 3], tiles[-2], tiles[-1]})
    k, _ = keys_values(kv, 0, n)
    slots = cache_slots(kv, 0, n).int()
    scores = tile_scores(q, k, some, scale=SCALE, pattern=index.pattern, prior=prior)
    off = lists = 0
    bit = torch.arange(32, device=q.device)
    for i, tile in enumerate(some):
        place, window = index.place(0, 0, first, tile), index.pattern.window_start(tile * index.pattern.block_q)
        for head in range(k.shape[1]):
            marked = ((index.bits[head, place].unsqueeze(1) >> bit & 1).flatten() != 0)[:window]
            margin = scores[head, i, :window] - index.bars[0, head]
            clear = margin.abs() > 0.05
            clear[: index.pattern.sink_keys] = False
            off += int((marked != (margin >= 0))[clear].sum())
            marked[: index.pattern.sink_keys] = True
            start, count = int(index.starts[head, place]), int(index.counts[head, place])
            lists += not torch.equal(index.slots[start : start + max(count, 0)], slots[:window][marked])
    return {"wrong_marks": off, "wrong_lists": lists}


def with_variance(
    q: torch.Tensor, kv: PagedKV, batch: Batch, index: TileIndex, workspace: RankWorkspace
) -> tuple[dict[str, float | None], dict[str, float]]:
    """What the option ``tile_variance`` costs here: times, and errors. ``means`` must have run."""
    n, heads = batch.max_seq_len, kv.num_kv_heads
    rng = torch.Generator("cuda").manual_seed(1)
    # Queries of a tile are all the same here but for this.
    apart = (q.float() + torch.randn(q.shape, generator=rng, device="cuda")).bfloat16()
    scratch = variance_reference.allocate_variance(1, heads, SIZE, q.dtype, "cuda")
    prior = torch.empty(1, heads, n, device="cuda")
    variance_reference.check_variance(apart, kv, batch, index.pattern, scratch, prior, SCALE)

    def variance() -> None:
        variance_version.variance(apart, kv, batch, index.pattern, scratch, prior, scale=SCALE)

    def marks() -> None:
        version.marks(q, kv, batch, index, workspace, scale=SCALE, prior=prior)

    times = {"variance_ms": graph_milliseconds(variance), "marks_with_prior_ms": graph_milliseconds(marks)}
    expected = torch.empty_like(prior)
    variance_reference.variance(apart, kv, batch, index.pattern, scratch, expected, scale=SCALE)
    error = float((prior - expected).norm() / expected.norm())
    merge_version.build_tiles(index, kv, batch)
    errors = {f"{name}_with_prior": count for name, count in wrong(q, kv, index, n, prior[0]).items()}
    return times | {"variance_error": error}, errors | {"wrong_variance": float(not error < 0.01)}


def row(query_heads: int, kv_heads: int, rows: int, n: int, block_q: int) -> dict[str, Any]:
    """One shape."""
    rng = torch.Generator("cuda").manual_seed(0)
    blocks = n // BLOCK
    cache = torch.randn(blocks, BLOCK, kv_heads, 2 * SIZE, generator=rng, device="cuda").bfloat16()
    table = torch.randperm(blocks, generator=rng, device="cuda").int().unsqueeze(0)
    kv = PagedKV(cache.transpose(1, 2), table)
    # Means of a tile are as long as a query of a model is: they are what is asked with.
    q = torch.randn(rows // block_q + 2, query_heads, SIZE, generator=rng, device="cuda")
    q = q.repeat_interleave(block_q, 0)[:rows].contiguous().bfloat16()
    batch = Batch.from_lists([rows], [n], "cuda")
    pattern = SparsePattern(block_q=block_q, block_k=1, window=256, sinks=16, dense_last=0)
    index = allocate_tiles(1, kv_heads, rows, [(pattern, n)], "cuda").view(pattern, rows, 1, n)
    workspace = allocate_rank(rows, 1, query_heads, SIZE, block_q, q.dtype, "cuda")
    k, _ = keys_values(kv, 0, n)
    scores = tile_scores(q, k, [pattern.tiles(rows, n)[-1]], scale=SCALE, pattern=pattern)[:, 0]
    index.bars[0] = scores.topk(LISTED, 1).values[:, -1]
    check_rank(q, kv, batch, index, workspace, SCALE)
    check_build_tiles(index, kv, batch)

    def means() -> None:
        version.means_and_near(q, kv, batch, index, workspace, scale=SCALE)

    def marks() -> None:
        version.marks(q, kv, batch, index, workspace, scale=SCALE)

    def lists() -> None:
        merge_version.build_tiles(index, kv, batch)

    def everything() -> None:
        version.rank(q, kv, batch, index, workspace, scale=SCALE)
        lists()

    everything()
    found: dict[str, Any] = {"listed": float(index.counts[:, : len(pattern.tiles(rows, n))].float().mean())}
    for name, call in (("means", means), ("marks", marks), ("lists", lists), ("all", everything)):
        found[f"{name}_ms"] = graph_milliseconds(call)
    found["launched_ms"] = milliseconds(everything)
    errors = wrong(q, kv, index, n)
    times, others = with_variance(q, kv, batch, index, workspace)
    found |= times
    errors |= others
    for config in CANDIDATES:
        index.bits.zero_()
        name = "marks_{}x{}_{}_warps_{}_stages_ms".format(*astuple(config))
        found[name] = graph_milliseconds(
            lambda: version.marks(q, kv, batch, index, workspace, scale=SCALE, config=config)  # noqa: B023 (called at once)
        )
        lists()
        errors |= {name: errors[name] + more for name, more in wrong(q, kv, index, n).items()}
    found |= errors
    pairs = sum(pattern.window_start(tile * block_q) for tile in pattern.tiles(rows, n)) * query_heads
    if found["marks_ms"]:
        found["marks_tflops"] = 2 * SIZE * pairs / found["marks_ms"] / 1e9
    return found | {"correct": not any(errors.values())}


def main(out: Annotated[Path, typer.Option(help="Write the figures to this file, row by row.")]) -> None:
    """Measure ranking on this machine's GPU."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks.rank needs a CUDA device")
    record: dict[str, Any] = {**environment.describe(), "rows": {}}
    out.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        out.write_text(json.dumps(record, indent=1) + "\n")

    with torch.inference_mode():
        for shape in SHAPES:
            name = "{}/{} heads, {} rows of {}, tiles of {}".format(*shape)
            attempt(record, name, lambda: row(*shape), save)  # noqa: B023 (called at once)
    failed = [name for name, found in record["rows"].items() if not found.get("correct")]
    if failed:
        sys.exit("wrong or failed: " + "; ".join(failed))


if __name__ == "__main__":
    typer.run(main)
