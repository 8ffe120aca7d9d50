# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Times of the Triton kernels on one GPU, against FlashAttention 3 of vLLM's bundle in the same process.

Shape, unless a row says otherwise: 32 query heads, 8 KV heads, head size 128, bfloat16, cache blocks of 16, the last
8,192 rows of a sequence of 131,072 tokens. A figure is the median of repeated runs between device events, warmed up.
Rates count the (row, key) pairs that the kernel reports to have visited. Rows of ``attend`` are checked against plain
float32 attention over the keys that ``merge`` lists, for some tiles of the same run.

``--tune`` times candidates of the settings table instead and writes the best of each into the table. ``--crossover``
times a layer as it is served, chunk by chunk and length by length, against FlashAttention on the same rows:
where sparse prefill begins to pay.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import environment
from vllm_vsprefill.distil.mass import cpu as mass_cpu
from vllm_vsprefill.distil.mass.triton import mass_sums
from vllm_vsprefill.kernels.attend.triton import attend
from vllm_vsprefill.kernels.forget.triton import forget
from vllm_vsprefill.kernels.gathered import allocate_gathered
from vllm_vsprefill.kernels.index import Index, allocate_index
from vllm_vsprefill.kernels.merge.naive import merge
from vllm_vsprefill.kernels.merge.paged import check_build_index, set_flags
from vllm_vsprefill.kernels.merge.triton import build_index
from vllm_vsprefill.kernels.paged import Batch, PagedKV
from vllm_vsprefill.kernels.reference import keys_values
from vllm_vsprefill.kernels.sampled.paged import allocate_sampled
from vllm_vsprefill.kernels.sampled.triton import sampled
from vllm_vsprefill.kernels.score import paged as score_reference
from vllm_vsprefill.kernels.score.paged import allocate_missing, prepare_weights
from vllm_vsprefill.kernels.score.triton import score_missing, score_slots
from vllm_vsprefill.kernels.select import paged as select_reference
from vllm_vsprefill.kernels.select.paged import allocate_select, check_gather, check_select
from vllm_vsprefill.kernels.select.triton import gather, select
from vllm_vsprefill.kernels.settings import TABLE, TABLE_FILE, Settings, capability, padded, write_table
from vllm_vsprefill.kernels.types import UNLIMITED, Budgets, IndexerLayerWeights, Selection, SparsePattern
from vllm_vsprefill.prefill.buffers import DeviceBuffers, Shape
from vllm_vsprefill.prefill.cuda import CudaPrefill, Round
from vllm_vsprefill.prefill.layer import Heads, SparseLayer

QUERY_HEADS, KV_HEADS, SIZE, BLOCK = 32, 8, 128, 16
GROUP = QUERY_HEADS // KV_HEADS
SCALE = SIZE**-0.5
HIDDEN = 1024
LONG, CHUNK = 131072, 8192


@dataclass
class Case:
    """One chunk at the end of one sequence, in a cache whose blocks lie in random order."""

    q: Tensor
    kv: PagedKV
    batch: Batch
    seq_len: int

    @classmethod
    def make(
        cls, seq_len: int, rows: int, query_heads: int = QUERY_HEADS, kv_heads: int = KV_HEADS, size: int = SIZE
    ) -> Case:
        rng = torch.Generator("cuda").manual_seed(0)
        blocks = -(-seq_len // BLOCK)
        storage = torch.empty(blocks, BLOCK, kv_heads, 2 * size, dtype=torch.bfloat16, device="cuda")
        for part in storage.split(4096):  # float32 random numbers of the whole would not fit beside it at 1M tokens
            part.copy_(torch.randn(part.shape, generator=rng, device="cuda"))
        table = torch.randperm(blocks, generator=rng, device="cuda").int().unsqueeze(0)
        q = torch.randn(rows, query_heads, size, generator=rng, device="cuda").bfloat16()
        kv = PagedKV(storage.transpose(1, 2), table)
        return cls(q, kv, Batch.from_lists([rows], [seq_len], "cuda"), seq_len)

    @property
    def slots(self) -> Tensor:
        """int64 cache slots of the chunk."""
        position = torch.arange(self.seq_len - self.q.shape[0], self.seq_len, device="cuda")
        return self.kv.block_table[0].long()[position // BLOCK] * BLOCK + position % BLOCK


def milliseconds(call: Callable[[], Any], runs: int = 20, budget_ms: float = 4000.0) -> float:
    """Median time of a call on the device."""
    call()
    torch.cuda.synchronize()
    first = _timed(call)
    count = max(3, min(runs, int(budget_ms / max(first, 1e-3))))
    for _ in range(min(3, count)):
        call()
    return statistics.median(_timed(call) for _ in range(count))


def ten_in_a_row(call: Callable[[], Any], runs: int = 5) -> float:
    """Median time of one of ten calls in a row, where the host prepares the next while the device computes."""

    def several() -> None:
        for _ in range(10):
            call()

    return milliseconds(several, runs=runs, budget_ms=800.0) / 10


def _timed(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def flash_attention(case: Case, empty: bool = False) -> Callable[[], Any] | None:
    """FA3 from vLLM's bundle on the same cache, or None where there is none; ``empty``: with no row to compute."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    cache = case.kv.cache.transpose(1, 2)
    rows = torch.tensor([0, 0 if empty else case.q.shape[0]], dtype=torch.int32, device="cuda")
    out = torch.empty_like(case.q)

    def call() -> Any:
        return flash_attn_varlen_func(
            q=case.q,
            k=cache[..., : case.kv.head_size],
            v=cache[..., case.kv.head_size :],
            out=out,
            cu_seqlens_q=rows,
            max_seqlen_q=case.q.shape[0],
            seqused_k=case.batch.seq_len,
            max_seqlen_k=case.seq_len,
            block_table=case.kv.block_table,
            softmax_scale=case.kv.head_size**-0.5,
            causal=True,
            fa_version=3,
            return_softmax_lse=True,
        )

    return call


def random_selection(seq_len: int, columns: int, diagonals: int, nearest: int) -> Selection:
    """Random columns, and diagonals from ``nearest`` up, per KV head."""
    rng = torch.Generator("cuda").manual_seed(1)

    def some(count: int, low: int) -> tuple[Tensor, Tensor]:
        picks = [torch.randperm(seq_len - low, generator=rng, device="cuda")[:count] for _ in range(KV_HEADS)]
        items = (torch.stack(picks) + low).sort(-1).values.int()
        return items, torch.full((KV_HEADS,), count, dtype=torch.int32, device="cuda")

    return Selection(*some(columns, 0), *some(diagonals, nearest))


def index_for(case: Case, selection: Selection, pattern: SparsePattern) -> Index:
    """A built index."""
    index = allocate_index(1, KV_HEADS, case.seq_len, pattern, "cuda")
    set_flags(index, [selection], case.batch)
    return build_index(index, case.kv, case.batch)


def exact_keys(case: Case, selection: Selection, window: int, rows: int = 16) -> float:
    """Mean number of keys a row attends to if nothing is rounded to tiles or granules, over some rows and heads."""
    n, total = case.seq_len, 0
    picks = torch.linspace(n - case.q.shape[0], n - 1, rows).long().tolist()
    for i, head in itertools.product(picks, range(KV_HEADS)):
        columns, diagonals = selection.columns[head].long(), selection.diagonals[head].long()
        near = torch.arange(max(i - window + 1, 0), i + 1, device="cuda")
        along = i - diagonals[diagonals <= i]
        total += int(torch.cat((columns[columns <= i], along, near)).unique().numel())
    return total / (rows * KV_HEADS)


def error_of(case: Case, out: Tensor, selection: Selection, pattern: SparsePattern, tiles: int = 3) -> float:
    """Largest relative error of some tiles and heads against float32 attention over the keys of the reference."""
    n, rows = case.seq_len, case.q.shape[0]
    k, v = keys_values(case.kv, 0, n)
    starts = torch.linspace(n - rows, n - pattern.block_q, tiles).long() // pattern.block_q * pattern.block_q
    worst = 0.0
    for start, head in itertools.product(starts.tolist(), (0, KV_HEADS - 1)):
        start = max(start, -(-(n - rows) // pattern.block_q) * pattern.block_q)
        end = min(start + pattern.block_q, n)
        columns = selection.columns[head, : int(selection.num_columns[head])].cpu()
        diagonals = selection.diagonals[head, : int(selection.num_diagonals[head])].cpu()
        keys = merge(columns, diagonals, tile_start=start, tile_end=end, seq_len=n, pattern=pattern).cuda()
        position = torch.arange(start, end, device="cuda")
        heads = slice(head * GROUP, (head + 1) * GROUP)
        part = slice(start - n + rows, end - n + rows)
        logits = torch.einsum("tgd,nd->gtn", case.q[part, heads].float(), k[keys, head].float()) * SCALE
        logits.masked_fill_(keys > position.unsqueeze(1), float("-inf"))
        expected = torch.einsum("gtn,nd->tgd", logits.softmax(-1), v[keys, head].float())
        worst = max(worst, float((out[part, heads].float() - expected).norm() / expected.norm()))
    return worst


def attend_row(
    case: Case, columns: int, diagonals: int, pattern: SparsePattern, config: Settings | None = None
) -> dict[str, Any]:
    """Time, rate and visited keys of one selection."""
    selection = random_selection(case.seq_len, columns, diagonals, pattern.window)
    index = index_for(case, selection, pattern)
    visited = torch.zeros(1, dtype=torch.int64, device="cuda")
    out = torch.empty_like(case.q)
    attend(case.q, case.kv, index, case.batch, scale=SCALE, out=out, visited=visited, config=config)
    pairs = int(visited)
    error = error_of(case, out, selection, pattern)
    time = milliseconds(lambda: attend(case.q, case.kv, index, case.batch, scale=SCALE, out=out, config=config))
    keys = pairs / (KV_HEADS * case.q.shape[0])
    return {
        "ms": time,
        "tflops": pairs * GROUP * 4 * SIZE / time / 1e9,
        "keys_a_row": keys,
        "visited_over_exact": keys / exact_keys(case, selection, pattern.window),
        "relative_error": error,
        "correct": error < 1e-2,
        "pattern": asdict(pattern),
    }


def indexer(dtype: torch.dtype = torch.bfloat16) -> IndexerLayerWeights:
    """Random weights of one layer."""
    rng = torch.Generator("cuda").manual_seed(2)
    shapes = ((KV_HEADS, 2 * SIZE, HIDDEN), (KV_HEADS, HIDDEN), (KV_HEADS, HIDDEN, 2), (KV_HEADS, 2))
    w1, b1, w2, b2 = (torch.randn(shape, generator=rng, device="cuda") for shape in shapes)
    return prepare_weights(IndexerLayerWeights(w1 / (2 * SIZE) ** 0.5, b1, 4 * w2 / HIDDEN**0.5, b2), dtype)


def score_row(case: Case, config: Settings | None = None) -> dict[str, Any]:
    """Scoring the chunk's tokens, and what a sequence without missing logits costs."""
    weights, slots = indexer(), case.slots
    logits = torch.full((case.kv.cache.shape[0] * BLOCK, 2 * KV_HEADS), float("nan"), device="cuda")
    expected = logits.clone()
    missing = allocate_missing(1, case.seq_len, "cuda")
    time = milliseconds(lambda: score_slots(case.kv, slots, weights, logits, config=config))
    some = slots[:: len(slots) // 64]
    score_reference.score_slots(case.kv, some, weights, expected)
    error = float((logits[some] - expected[some]).norm() / expected[some].norm())
    score_missing(case.kv, case.batch, weights, logits, missing)
    again = milliseconds(lambda: score_missing(case.kv, case.batch, weights, logits, missing))

    def new_tokens() -> None:
        forget(logits, slots)
        score_missing(case.kv, case.batch, weights, logits, missing)

    chunk = milliseconds(new_tokens)
    work = 2.0 * len(slots) * KV_HEADS * (2 * SIZE + 2) * HIDDEN
    return {
        "ms": time,
        "tflops": work / time / 1e9,
        "nothing_missing_ms": again,
        "forget_and_score_missing_ms": chunk,
        "relative_error": error,
        "correct": error < 1e-2,
    }


def select_row(case: Case, pattern: SparsePattern) -> dict[str, Any]:
    """Selection and index over the whole sequence, by cumulative threshold.

    Arguments are checked once a step, so the times are without the checks, and one with them.
    """
    rng = torch.Generator("cuda").manual_seed(3)
    logits = torch.randn(case.kv.cache.shape[0] * BLOCK, 2 * KV_HEADS, generator=rng, device="cuda") * 2
    tau = torch.tensor([[0.5] * KV_HEADS, [0.1] * KV_HEADS], dtype=torch.float64, device="cuda")
    index, plain = (allocate_index(1, KV_HEADS, case.seq_len, pattern, "cuda") for _ in range(2))
    gathered = allocate_gathered(1, KV_HEADS, case.seq_len, "cuda")
    workspace = allocate_select(1, KV_HEADS, case.seq_len, "cuda")

    def choose() -> None:
        gather(logits, case.kv, case.batch, gathered)
        select(gathered, case.batch, tau, index, workspace)

    def with_checks() -> None:
        check_gather(logits, case.kv, case.batch, gathered)
        check_select(gathered, case.batch, tau, index, workspace, UNLIMITED)
        choose()

    def both() -> None:
        choose()
        build_index(index, case.kv, case.batch)

    check_build_index(index, case.kv, case.batch)
    with_checks()
    select_reference.select(gathered, case.batch, tau, plain, workspace)
    counts, expected = (one.flags[0, :, :, : case.seq_len].sum(-1, dtype=torch.int64) for one in (index, plain))
    wrong = int((counts - expected).abs().max())
    return {
        "ms": milliseconds(choose, runs=100),
        "with_checks_ms": milliseconds(with_checks, runs=100),
        "of_ten_in_a_row_ms": ten_in_a_row(choose, runs=20),
        "graph_ms": graph_milliseconds(choose),
        "with_index_ms": milliseconds(both, runs=100),
        "with_index_graph_ms": graph_milliseconds(both),
        "columns": int(expected[0, 0]),
        "diagonals": int(expected[1, 0]),
        "largest_difference_of_counts": wrong,
        "correct": wrong <= 2,
    }


def graph_milliseconds(call: Callable[[], Any]) -> float | None:
    """The same as a replayed graph, without the host's launch gaps; None where it cannot be captured."""
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return milliseconds(graph.replay)
    except RuntimeError:
        return None


def sampled_row(case: Case, pattern: SparsePattern, config: Settings | None = None) -> dict[str, Any]:
    """The training-free estimate alone, and with selection."""
    workspace = allocate_sampled(1, QUERY_HEADS, KV_HEADS, case.seq_len, 64, "cuda")
    into = allocate_gathered(1, KV_HEADS, case.seq_len, "cuda")
    scratch = allocate_select(1, KV_HEADS, case.seq_len, "cuda")
    index = allocate_index(1, KV_HEADS, case.seq_len, pattern, "cuda")
    tau = torch.full((2, KV_HEADS), 0.5, dtype=torch.float64, device="cuda")

    def estimate() -> None:
        sampled(case.q, case.kv, case.batch, workspace, into, scale=SCALE, config=config)

    def both() -> None:
        estimate()
        select(into, case.batch, tau, index, scratch, budgets=Budgets(max_columns=4096, max_diagonals=64))

    estimate()
    sums = into.logits[0, :, :, : case.seq_len].exp().sum(-1)
    # Both add up to the number of (row, head) pairs.
    error = float((sums / (64 * GROUP) - 1).abs().max())
    return {
        "ms": milliseconds(estimate),
        "with_select_ms": milliseconds(both),
        "correct": error < 2e-2,
        "sum_error": error,
    }


class Served:
    """The prefill of a layer as the backend calls it, from a step's second layer on, whose arguments are not checked.

    Args:
        kv: keys and values of one sequence.
        part: the chunk, one round.
        pattern: without dense last rows.
        budgets: how much is chosen at least and at most.
        tau: threshold of columns and diagonals.
        trained: whether the indexer estimates; its logits are kept beside the cache. Else 64 sampled rows do.
    """

    def __init__(
        self, kv: PagedKV, part: Round, pattern: SparsePattern, budgets: Budgets, tau: float, trained: bool
    ) -> None:
        shape = Shape(QUERY_HEADS, KV_HEADS, part.whole.max_seq_len, 2, None if trained else 64)
        device = torch.device("cuda")
        buffers = DeviceBuffers.allocate(shape, pattern, max_num_seqs=1, max_tokens=CHUNK, device=device)
        guarded = None if part.guarded is None else part.rows._replace(row_end=buffers.sparse_end[:1])
        self.prefill, self.kv, self.part = CudaPrefill(budgets, buffers), kv, replace(part, guarded=guarded)
        self.slots = torch.empty(0)
        if trained:
            self.slots = torch.full((kv.cache.shape[0] * BLOCK, 2 * KV_HEADS), float("nan"), device=device)
        self.layer = SparseLayer(
            index=1,
            place=1,
            heads=Heads(QUERY_HEADS, KV_HEADS, SIZE),
            weights=indexer() if trained else None,
            tau=torch.full((2, KV_HEADS), tau, dtype=torch.float64, device=device),
            logits=self if trained else None,
        )

    def check(self, q: Tensor, out: Tensor) -> None:
        """Run once as a step's first layer, with all checks; the whole sequence is scored."""
        first = replace(self.layer, place=0)
        self.prefill.choose(first, q, self.kv, self.part, scale=SCALE)
        self.prefill.attend(first, q, self.kv, self.part, scale=SCALE, out=out)

    def choose(self, q: Tensor, new: Tensor) -> None:
        """Choose, with the logits of the ``new`` slots missing."""
        if self.layer.weights is not None:
            forget(self.slots, new)
        self.prefill.choose(self.layer, q, self.kv, self.part, scale=SCALE)

    def attend(self, q: Tensor, out: Tensor) -> None:
        """Attend to what was chosen."""
        self.prefill.attend(self.layer, q, self.kv, self.part, scale=SCALE, out=out)


def pipeline_row(case: Case, pattern: SparsePattern) -> dict[str, Any]:
    """Score, select, index, attend, as they are served: which tokens are new, the device finds out. Without the guard
    and the dense last rows, which ``--crossover`` has."""
    budgets = Budgets(min_columns=4096, max_columns=4096, max_diagonals=0)
    served = Served(case.kv, Round(case.batch, case.batch), pattern, budgets, 0.0, trained=True)
    slots, out = case.slots, torch.empty_like(case.q)
    served.check(case.q, out)

    def call() -> None:
        served.choose(case.q, slots)
        served.attend(case.q, out)

    return {
        "ms": milliseconds(call, runs=50),
        "of_ten_in_a_row_ms": ten_in_a_row(call, runs=20),
        "graph_ms": graph_milliseconds(call),
        "correct": bool(out.isfinite().all()),
    }


CROSSOVER_CONTEXTS = (8192, 10240, 12288, 16384, 24576, 32768, 65536, 131072)
CROSSOVER_ROWS = (256, 512, 1024, 2048, 4096, 8192)
DENSE_ROWS = 64  # last ones of a chunk, by default


def crossover_row(case: Case, seq_len: int, rows: int) -> dict[str, Any]:
    """One layer's attention of a chunk, called ten times in a row: stock, and as it is served.

    Columns are a sixteenth of the sequence, with the window and the sinks of the preset "balanced" and 16 diagonals:
    more than the needle model's indexer chooses. The guard looks at every selection, as it does with the presets, and
    the dense kernel is called for what it sends away, which is nothing.
    """
    blocks = -(-seq_len // BLOCK)
    kv = PagedKV(case.kv.cache, case.kv.block_table[:, :blocks].contiguous())
    whole = Case(case.q[:rows], kv, Batch.from_lists([rows], [seq_len], "cuda"), seq_len)
    pattern = SparsePattern(block_q=16, block_k=4, window=512, sinks=64, dense_last=0)
    tail = Case(case.q[rows - DENSE_ROWS : rows], kv, Batch.from_lists([DENSE_ROWS], [seq_len], "cuda"), seq_len)
    head = Batch.from_lists([rows - DENSE_ROWS], [seq_len - DENSE_ROWS], "cuda")
    stock, last, none = flash_attention(whole), flash_attention(tail), flash_attention(whole, empty=True)
    if stock is None or last is None or none is None:
        raise RuntimeError("vLLM's FlashAttention is not installed")
    budgets = Budgets(min_columns=seq_len // 16, max_columns=seq_len // 16, max_diagonals=16)
    slots, out = whole.slots, torch.empty_like(whole.q)

    def layer(served: Served) -> None:
        last()
        served.choose(whole.q, slots)
        none()
        served.attend(whole.q, out)

    dense = ten_in_a_row(stock)
    found = {"context": seq_len, "rows": rows, "stock_ms": dense}
    for name, trained in (("vsindexer", True), ("sampled", False)):
        served = Served(kv, Round(whole.batch, head, guarded=head), pattern, budgets, 0.9, trained)
        served.check(whole.q, out)
        time = ten_in_a_row(lambda served=served: layer(served))  # type: ignore[misc]
        found |= {f"{name}_ms": time, f"{name}_times_stock": dense / time}
    return found


def mass_row(n: int, config: Settings | None = None) -> dict[str, Any]:
    """Mass sums of a full prompt, with the log-sum-exp given."""
    rng = torch.Generator("cuda").manual_seed(4)
    q = torch.randn(n, QUERY_HEADS, SIZE, generator=rng, device="cuda").bfloat16()
    k = torch.randn(n, KV_HEADS, SIZE, generator=rng, device="cuda").bfloat16()
    small = mass_sums(q[:2048], k[:2048], scale=SCALE, config=config)
    expected = mass_cpu.mass_sums(q[:2048].float(), k[:2048].float(), scale=SCALE)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(small, expected, strict=True))
    # Any finite numbers take the same time.
    lse = torch.full((n, QUERY_HEADS), 8.0, device="cuda")
    time = milliseconds(lambda: mass_sums(q, k, scale=SCALE, lse=lse, config=config), runs=5)
    without = milliseconds(lambda: mass_sums(q, k, scale=SCALE, config=config), runs=5)
    return {"ms": time, "without_lse_ms": without, "relative_error": error, "correct": error < 1e-2}


def dense_row(case: Case) -> dict[str, Any]:
    """FA3 over everything."""
    call = flash_attention(case)
    if call is None:
        raise RuntimeError("vLLM's FlashAttention is not installed")
    time = milliseconds(call)
    rows, n = case.q.shape[0], case.seq_len
    pairs = rows * n - rows * (rows - 1) / 2
    return {"ms": time, "tflops": pairs * QUERY_HEADS * 4 * SIZE / time / 1e9}


# Nothing but the window runs along diagonals.
LOCAL = SparsePattern(block_q=32, block_k=1, window=2048, sinks=0, dense_last=0)
# Scattered diagonals: tiles of 16 positions keep their union small.
SCATTERED = SparsePattern(block_q=16, block_k=1, window=1024, sinks=0, dense_last=0)

ATTEND_CANDIDATES = [
    Settings(128, n, warps, stages, lanes)
    for n, warps, stages, lanes in itertools.product((32, 64, 128), (4, 8), (2, 3), (1, 2))
    if not (n == 128 and warps == 4)
]
SCORE_CANDIDATES = [
    Settings(m, n, warps, stages)
    for m, n, warps, stages in itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (2, 3))
    if m * n <= 128 * 32 * warps
]
MASS_CANDIDATES = [
    Settings(m, n, warps, stages)
    for m, n, warps, stages in itertools.product((64, 128, 256), (64, 128), (4, 8), (2, 3))
    if m * n <= 128 * 32 * warps
]


SAMPLED_CANDIDATES = [
    Settings(m, n, warps, stages)
    for m, n, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3))
    if m * n <= 128 * 32 * warps
]


def tuning_row(operation: str, config: Settings, seq_len: int = LONG, rows: int = CHUNK) -> dict[str, Any]:
    """One candidate."""
    if operation == "mass":
        return mass_row(min(seq_len, 32768), config)
    case = Case.make(seq_len, rows)
    if operation == "score":
        return score_row(case, config)
    if operation == "sampled":
        return sampled_row(case, LOCAL, config)
    pattern, columns, diagonals = (LOCAL, 4096, 0) if operation == "attend local" else (SCATTERED, 1024, 64)
    return attend_row(case, min(columns, seq_len // 2), diagonals, pattern, config)


def _compile(task: tuple[str, Settings]) -> None:
    """Fills Triton's cache on disk with one candidate; failures show when it is timed."""
    try:
        tuning_row(*task, seq_len=4096, rows=2048)
    except Exception:
        return


def tune(record: dict[str, Any], save: Callable[[], None], workers: int, table_file: Path) -> None:
    """Times every candidate and writes the best of each operation into the settings table."""
    tasks = [(op, c) for op in ("attend local", "attend scattered") for c in ATTEND_CANDIDATES]
    tasks += [("score", c) for c in SCORE_CANDIDATES] + [("mass", c) for c in MASS_CANDIDATES]
    tasks += [("sampled", c) for c in SAMPLED_CANDIDATES]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_compile, tasks, chunksize=1)
    best: dict[str, tuple[float, Settings]] = {}
    for operation, config in tasks:
        name = f"{operation} {config}"
        found = attempt(record, name, lambda: tuning_row(operation, config), save)  # noqa: B023 (called at once)
        if found and found["correct"] and found["ms"] < best.get(operation, (float("inf"), config))[0]:
            best[operation] = (found["ms"], config)
    table = dict(TABLE)
    device = capability(torch.device("cuda", torch.cuda.current_device()))
    for operation, (time, config) in best.items():
        print(f"best {operation}: {config}, {time:.3f} ms")
        if operation != "attend scattered":  # one row serves both; the other selection is the more frequent one
            table[device, operation.split()[0], padded(SIZE)] = config
    write_table(table, table_file)
    print(f"wrote {table_file}")


def attempt(
    record: dict[str, Any], name: str, call: Callable[[], dict[str, Any]], save: Callable[[], None]
) -> dict[str, Any] | None:
    """Runs one row; an error becomes its result, and what was measured so far is on disk at any time."""
    try:
        found = call()
    except Exception as error:
        traceback.print_exc()
        record["rows"][name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        save()
        return None
    record["rows"][name] = found
    save()
    shown = "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in found.items()
        if not isinstance(value, dict)
    )
    print(f"{name}: {shown}", flush=True)
    return found


def run(record: dict[str, Any], save: Callable[[], None], longest: int) -> None:
    """Every row of the table. Each part frees its cache before the next."""

    def against_dense(name: str, case: Case, rows: dict[str, Callable[[], dict[str, Any]]]) -> None:
        dense = attempt(record, f"FA3 dense, {name}", lambda: dense_row(case), save)
        for row, call in rows.items():
            found = attempt(record, row, call, save)
            if found and dense:
                found["of_fa3_dense"] = found["ms"] / dense["ms"]
                save()

    def chunk() -> None:
        case = Case.make(LONG, CHUNK)
        rows: dict[str, Callable[[], dict[str, Any]]] = {
            "attend, 4096 columns + 2048 local": lambda: attend_row(case, 4096, 0, LOCAL),
            "attend, 1024 columns + 64 diagonals + 1024 local": lambda: attend_row(case, 1024, 64, SCATTERED),
            "score, 8192 tokens": lambda: score_row(case),
            "select, 128k": lambda: select_row(case, LOCAL),
            "sampled, 64 rows, 128k": lambda: sampled_row(case, LOCAL),
            "score + select + attend": lambda: pipeline_row(case, LOCAL),
        }
        against_dense("last 8k of 128k", case, rows)

    def whole() -> None:
        case = Case.make(LONG, LONG)
        against_dense("whole 128k", case, {"attend, whole 128k": lambda: attend_row(case, 4096, 0, LOCAL)})

    def mass() -> None:
        case = Case.make(32768, 32768)
        against_dense("whole 32k", case, {"mass sums, 32k": lambda: mass_row(32768)})

    def far() -> None:
        case = Case.make(longest, CHUNK)
        attempt(record, f"select, {longest}", lambda: select_row(case, LOCAL), save)
        attempt(record, f"attend, {longest}, 4096 columns + 2048 local", lambda: attend_row(case, 4096, 0, LOCAL), save)

    for part in (chunk, whole, mass, far):
        if part is not far or longest > LONG:
            part()
            torch.cuda.empty_cache()


def crossover(record: dict[str, Any], save: Callable[[], None]) -> None:
    """Every length and chunk. A first call compiles what all of them use."""
    case = Case.make(LONG, CHUNK)
    crossover_row(case, CROSSOVER_CONTEXTS[0], CROSSOVER_ROWS[0])
    for n, rows in itertools.product(CROSSOVER_CONTEXTS, CROSSOVER_ROWS):
        attempt(record, f"crossover {n} {rows}", lambda: crossover_row(case, n, rows), save)  # noqa: B023 (called at once)


def main(
    out: Annotated[Path, typer.Option(help="Write the figures to this file, row by row.")],
    longest: Annotated[int, typer.Option(help="Context of the last rows, in tokens.")] = 1048576,
    tune_settings: Annotated[bool, typer.Option("--tune", help="Time candidates for the settings table.")] = False,
    crossover_only: Annotated[bool, typer.Option("--crossover", help="Time layers of many sizes instead.")] = False,
    table: Annotated[Path, typer.Option(help="Where --tune writes the table.")] = TABLE_FILE,
    workers: Annotated[int, typer.Option(help="Processes that compile candidates.", min=1)] = 8,
) -> None:
    """Measure the kernels on this machine's GPU."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a CUDA device")
    import triton

    record: dict[str, Any] = {**environment.describe(), "triton": triton.__version__, "rows": {}}
    out.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        out.write_text(json.dumps(record, indent=1) + "\n")

    with torch.inference_mode():
        if tune_settings:
            tune(record, save, workers, table)
        elif crossover_only:
            crossover(record, save)
        else:
            run(record, save, longest)
    failed = [name for name, row in record["rows"].items() if "error" in row or not row.get("correct", True)]
    if failed and not tune_settings:
        sys.exit("wrong or failed: " + "; ".join(failed))


if __name__ == "__main__":
    typer.run(main)
