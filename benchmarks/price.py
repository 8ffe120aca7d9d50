# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Time of ``price`` on one GPU, by kernel, and what its choices cost beside the best ones.

Two shapes: 12 query heads on 2 KV heads, the last 8,192 rows of 32,768; and 32 on 8, the last 8,192 of 131,072. Heads
of 128 channels, bfloat16, cache blocks of 16, tiles of 16 positions, 64 sampled rows, 16 of
the longer sequence. Heads differ in how sharp and how
local they are. A figure is the median of repeated runs between device events, warmed up; as a graph, too, without the
host's gaps.

A choice is made from estimated errors. What it costs is worked out in float32 from the true attention of the sampled
rows: ``worst_cost`` is the largest quotient of that and of the cost of the plain reference's choice, over heads and
prices. ``--candidates`` times other tile sizes and splits as well.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import environment
from benchmarks.kernels import attempt, graph_milliseconds, milliseconds
from vllm_vsprefill.kernels.paged import Batch, PagedKV
from vllm_vsprefill.kernels.price import naive, paged
from vllm_vsprefill.kernels.price.triton import price
from vllm_vsprefill.kernels.reference import keys_values
from vllm_vsprefill.kernels.rows import spread_rows
from vllm_vsprefill.kernels.settings import Settings
from vllm_vsprefill.kernels.tile_index import TileIndex, allocate_tiles
from vllm_vsprefill.kernels.tile_scores import tile_scores
from vllm_vsprefill.kernels.types import SparsePattern

SIZE, BLOCK, CHUNK, ROWS = 128, 16, 8192, 64
SCALE = SIZE**-0.5
PATTERN = SparsePattern(block_q=16, block_k=16, window=1024, sinks=64, dense_last=0)
SHAPES = {"12/2 heads, 32k": (12, 2, 32768), "32/8 heads, 128k": (32, 8, 131072)}
PRICES = (0.005, 0.02, 0.05, 0.2)
CANDIDATES = [
    Settings(m, n, warps, stages)
    for m, n, warps, stages in (
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 3), (128, 64, 4, 2), (64, 64, 4, 2),
        (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 8, 2),
    )
]  # fmt: skip
SPLITS = (4, 8, 16, 32, 64)


class Problem:
    """One chunk at the end of one sequence, in a cache whose blocks lie in random order."""

    def __init__(self, query_heads: int, kv_heads: int, seq_len: int) -> None:
        rng = torch.Generator("cuda").manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, device="cuda")

        position = torch.arange(seq_len, device="cuda")
        angles = position[:, None] / torch.logspace(0.5, 4, SIZE // 2, device="cuda")
        places = torch.cat((angles.cos(), angles.sin()), 1)
        blocks = seq_len // BLOCK
        storage = torch.empty(blocks, BLOCK, kv_heads, 2 * SIZE, dtype=torch.bfloat16, device="cuda")
        q = torch.empty(CHUNK, query_heads, SIZE, dtype=torch.bfloat16, device="cuda")
        table = torch.randperm(blocks, generator=rng, device="cuda").int()
        group = query_heads // kv_heads
        for head in range(kv_heads):
            sharp, local = 0.5 + 2.5 * (head / max(kv_heads - 1, 1)), 1.5 * (head % 3)
            kv = noise(seq_len, 2 * SIZE)
            kv[:, :SIZE] += places
            storage[table.long(), :, head] = kv.view(blocks, BLOCK, -1).bfloat16()
            own = noise(CHUNK, group, SIZE) * 0.5 + sharp * noise(group, SIZE) + local * places[-CHUNK:, None]
            q[:, head * group : (head + 1) * group] = own.bfloat16()
        self.q, self.seq_len = q, seq_len
        self.kv = PagedKV(storage.transpose(1, 2), table.unsqueeze(0))
        self.batch = Batch.from_lists([CHUNK], [seq_len], "cuda")
        self.workspace = paged.allocate_price(1, query_heads, kv_heads, SIZE, seq_len, ROWS, torch.bfloat16, "cuda")
        self.index: TileIndex = allocate_tiles(1, kv_heads, CHUNK, [(PATTERN, seq_len)], "cuda").view(
            PATTERN, CHUNK, 1, seq_len
        )

    def call(self, worth: float, config: Settings | None = None, splits: int | None = None) -> Callable[[], None]:
        """The operation, ready to run."""
        workspace = self.workspace
        if splits is not None:
            shape = list(workspace.sums.shape)
            shape[2] = splits
            maxima, sums = (torch.empty(s, dtype=torch.float32, device="cuda") for s in (shape[:4], shape))
            workspace = workspace._replace(maxima=maxima, sums=sums)

        def run() -> None:
            price(self.q, self.kv, self.batch, self.index, workspace, scale=SCALE, price=worth, config=config)

        return run

    def costs(self) -> Callable[[Tensor, float], Tensor]:
        """What bars ``[Hkv]`` cost at a price, of each head, by the true attention of the sampled rows."""
        n, device = self.seq_len, self.q.device
        first = n - CHUNK
        rows = torch.tensor(spread_rows(CHUNK, naive.rows_of(ROWS, n)), device=device)
        tiles = ((rows + first) // PATTERN.block_q).tolist()
        k, v = keys_values(self.kv, 0, n)
        scores = tile_scores(self.q, k, tiles, scale=SCALE, pattern=PATTERN)
        starts = torch.tensor([PATTERN.window_start(tile * PATTERN.block_q) for tile in tiles], device=device)
        position = torch.arange(n, device=device)
        seen = position <= (rows + first).unsqueeze(1)
        listed = (position >= PATTERN.sink_keys) & (position < starts.unsqueeze(1))
        heads = k.shape[1]
        queries = self.q[rows].unflatten(1, (heads, -1)).permute(1, 2, 0, 3)

        def outputs(head: int, bar: float) -> tuple[Tensor, Tensor]:
            kept = seen & (~listed | (scores[head] >= bar))
            logits = queries[head].float() @ k[:, head].float().T * SCALE
            probs = logits.masked_fill_(~kept, float("-inf")).softmax(-1)
            return probs @ v[:, head].float(), kept.sum() / seen.sum()

        true = [outputs(head, float("-inf"))[0] for head in range(heads)]
        total = sum(out.square().sum() for out in true)

        def cost(bars: Tensor, worth: float) -> Tensor:
            found = []
            for head, bar in enumerate(bars.tolist()):
                out, density = outputs(head, bar)
                found.append((out - true[head]).square().sum() / total + worth * density)
            return torch.stack(found)

        return cost


def kernel_times(call: Callable[[], None], runs: int = 10) -> dict[str, float]:
    """Microseconds of each kernel, the mean of some runs."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if str(event.device_type).endswith("CUDA"):
            times[event.name] += event.time_range.elapsed_us() / runs
    return dict(times)


def row(problem: Problem) -> dict[str, Any]:
    """Times with the settings of the table, and costs."""
    cost = problem.costs()
    worst, same, heads = 1.0, 0, 0
    kept: dict[str, list[float]] = {}
    for worth in PRICES:
        problem.call(worth)()
        found, density = problem.index.bars[0].clone(), problem.index.density[0].clone()
        arguments = (problem.q, problem.kv, problem.batch, problem.index, problem.workspace)
        paged.price(*arguments, scale=SCALE, price=worth)
        expected = problem.index.bars[0].clone()
        worst = max(worst, float((cost(found, worth) / cost(expected, worth)).max()))
        same += int(((found == expected) | ((found - expected).abs() < 0.126)).sum())  # a bin is 1/8
        heads += len(found)
        kept[str(worth)] = density.tolist()
    call = problem.call(0.02)
    return {
        "ms": milliseconds(call, runs=100),
        "graph_ms": graph_milliseconds(call),
        "kernels_us": kernel_times(call),
        "worst_cost": worst,
        "same_choice": same / heads,
        "density": kept,
        "correct": worst < 1.1,
    }


def main(
    out: Annotated[Path, typer.Option(help="Write the figures to this file, row by row.")],
    candidates: Annotated[bool, typer.Option("--candidates", help="Time other tile sizes and splits, too.")] = False,
) -> None:
    """Measure ``price`` on this machine's GPU."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks.price needs a CUDA device")
    import triton

    record: dict[str, Any] = {**environment.describe(), "triton": triton.__version__, "rows": {}}
    out.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        out.write_text(json.dumps(record, indent=1) + "\n")

    def all_of(name: str, problem: Problem) -> None:
        def timed(config: Settings | None, splits: int | None) -> dict[str, Any]:
            call = problem.call(0.02, config, splits)
            return {"graph_ms": graph_milliseconds(call), "kernels_us": kernel_times(call)}

        attempt(record, name, lambda: row(problem), save)
        for config in CANDIDATES if candidates else ():
            attempt(record, f"{name}, {config}", lambda: timed(config, None), save)  # noqa: B023 (called at once)
        for splits in SPLITS if candidates else ():
            attempt(record, f"{name}, {splits} splits", lambda: timed(None, splits), save)  # noqa: B023 (called at once)

    with torch.inference_mode():
        for name, shape in SHAPES.items():
            all_of(name, Problem(*shape))
            torch.cuda.empty_cache()
    failed = [name for name in SHAPES if not record["rows"].get(name, {}).get("correct", False)]
    if failed:
        sys.exit("wrong or failed: " + "; ".join(failed))


if __name__ == "__main__":
    typer.run(main)
