# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Thousands of random problems for every GPU kernel, against float64 references.

    python -m tests.kernels.fuzz --seconds 90 --workers 12 --out fuzz.json     # on a CUDA device
    python -m tests.kernels.fuzz --tiny --seconds 60 --workers 1               # Triton's interpreter, without a device
    python -m tests.kernels.fuzz --repeat attend:123456                        # one problem again (--tiny if it was)

Triton compiles a kernel for every combination of compile-time parameters, which takes seconds, while a problem takes
milliseconds. So each worker process draws such a combination, runs ``PER_CONFIG`` problems with it and draws the next.
A problem follows from its operation and seed alone: ``seed // PER_CONFIG`` decides the combination.

References are written here once more, over whole masks, since those of ``naive.py`` loop over tiles; on small problems
they are compared with ``naive.py`` in the same run. Unused cache slots, query rows of nobody, outputs and scratch start
as NaN, block tables end in stale entries.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import platform
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from tests.kernels.interpreted import DEVICE  # first: it decides whether Triton interprets

# isort: split
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import environment
from tests.kernels.paged_problems import PagedProblem
from tests.kernels.tile_problems import random_keys, tile_index
from vllm_vsprefill.distil.mass import naive as naive_mass
from vllm_vsprefill.distil.mass.triton import column_weights, mass_sums
from vllm_vsprefill.kernels.attend import naive as naive_attend
from vllm_vsprefill.kernels.attend.paged import check_attend
from vllm_vsprefill.kernels.attend.triton import attend
from vllm_vsprefill.kernels.attend_tiles import naive as naive_tiles
from vllm_vsprefill.kernels.attend_tiles.paged import check_attend_tiles
from vllm_vsprefill.kernels.attend_tiles.triton import attend_tiles
from vllm_vsprefill.kernels.forget import paged as paged_forget
from vllm_vsprefill.kernels.forget.triton import forget
from vllm_vsprefill.kernels.gathered import allocate_gathered
from vllm_vsprefill.kernels.guard.naive import expected_density
from vllm_vsprefill.kernels.guard.triton import guard
from vllm_vsprefill.kernels.index import NONE, RANK, Index, allocate_index
from vllm_vsprefill.kernels.merge import naive as naive_merge
from vllm_vsprefill.kernels.merge.paged import check_build_index, check_build_tiles, set_flags
from vllm_vsprefill.kernels.merge.triton import build_index, build_tiles
from vllm_vsprefill.kernels.paged import FP8_DTYPES, Batch, PagedKV, is_interpreted
from vllm_vsprefill.kernels.price.paged import allocate_price, check_price
from vllm_vsprefill.kernels.price.triton import price
from vllm_vsprefill.kernels.rank.paged import allocate_rank, check_rank
from vllm_vsprefill.kernels.rank.triton import rank
from vllm_vsprefill.kernels.recall import naive as naive_recall
from vllm_vsprefill.kernels.recall.paged import SPLITS, allocate_recall, check_recall
from vllm_vsprefill.kernels.recall.triton import recall
from vllm_vsprefill.kernels.rows import spread_rows
from vllm_vsprefill.kernels.sampled import naive as naive_sampled
from vllm_vsprefill.kernels.sampled.paged import allocate_sampled, check_sampled
from vllm_vsprefill.kernels.sampled.triton import sampled
from vllm_vsprefill.kernels.score import naive as naive_score
from vllm_vsprefill.kernels.score.paged import LIMIT as LARGEST_LOGIT
from vllm_vsprefill.kernels.score.paged import (
    allocate_missing,
    check_score_missing,
    check_score_slots,
    prepare_weights,
)
from vllm_vsprefill.kernels.score.triton import score_missing, score_slots
from vllm_vsprefill.kernels.select import naive as naive_select
from vllm_vsprefill.kernels.select.paged import allocate_select, check_gather, check_select
from vllm_vsprefill.kernels.select.triton import gather, select
from vllm_vsprefill.kernels.settings import Settings, settings
from vllm_vsprefill.kernels.tile_index import EVERYTHING, TileIndex, allocate_tiles
from vllm_vsprefill.kernels.tile_scores import listable, tile_scores
from vllm_vsprefill.kernels.types import Budgets, IndexerLayerWeights, Selection, SparsePattern
from vllm_vsprefill.kernels.variance.naive import CENTRE_KEYS, LEVEL_KEYS, MOST, tiles_of_variance
from vllm_vsprefill.kernels.variance.paged import allocate_variance, check_variance
from vllm_vsprefill.kernels.variance.triton import variance

Params = dict[str, Any]

PER_CONFIG = 25
PER_CONFIG_TINY = 2  # of the 25: an interpreted problem takes as long as a compilation
GRACE = 90.0  # seconds after the end in which a worker may finish its problem, a compilation included
WORK = 2**25  # logits of a problem at most: a float64 reference of that many takes about a millisecond

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.bfloat16, torch.float16, torch.float32, *FP8_DTYPES)}
SIZES = (64, 80, 96, 128, 256)
GROUPS = (1, 2, 3, 4, 7, 8, 16)
BLOCKS = (16, 32, 48, 128)
STALE = (2**31 - 1, -5, 3)

# Relative error by norm of an attention output. A kernel rounds the weights and the output to the type, each by at most
# 2**-8 (bfloat16) or 2**-11 (float16), in root mean square 0.42 times that. Both together come to 2.3e-3 and 2.9e-4:
# the limits are four and seven times as much. In float32, sums of thousands of terms and the base-2 exponential of
# logits of a few tens cost some 1e-6. (The interpreter cuts bfloat16 outputs off instead of rounding them, which
# doubles their error.)
ATTEND_LIMIT = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# The same for the worst single row of one head, whose norm varies by chance. A row that lacks one of m equally likely
# keys is off by about 1 / sqrt(m): found up to m = 2500 in bfloat16, always in float32. (And its pairs are counted.)
ROW_FACTOR = 2.0
# Absolute, relative to 1 + |lse|: from logits that are exact products added in float32, before anything is rounded.
LSE_LIMIT = {torch.bfloat16: 1e-3, torch.float16: 1e-3, torch.float32: 2e-5}
# The interpreter multiplies float16 matrices in float16.
SCORE_LIMIT = {torch.bfloat16: 1e-4, torch.float16: 2e-3 if is_interpreted() else 1e-4, torch.float32: 1e-4}
SELECT_SLACK = 5e-6  # of the mass: a token's is known up to 2**-18, and a sum is as good as its terms


class Check:
    """Collects what a problem measured and what was wrong."""

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self.limits: dict[str, float] = {}
        self.yardstick: float | None = None
        self.faults: list[str] = []
        self.by_naive = 0  # references compared with naive.py

    def measure(self, name: str, error: float, limit: float) -> None:
        """An error that must not exceed a limit; NaN does."""
        if name not in self.errors or not error <= self.errors[name]:
            self.errors[name] = error
        self.limits[name] = limit
        if not error <= limit:
            self.faults.append(f"{name}: error {error:.3e}, limit {limit:.1e}")

    def equal(self, name: str, found: object, wanted: object) -> None:
        """Two values of which a difference is a fault."""
        if found != wanted:
            self.faults.append(f"{name}: found {found}, expected {wanted}")

    def same(self, name: str, found: Tensor, wanted: Tensor) -> None:
        """Two integer or boolean tensors, compared on the device."""
        if found.shape != wanted.shape:
            self.faults.append(f"{name}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}")
            return
        different = int((found != wanted).sum())
        if different:
            where = (found != wanted).nonzero()[0].tolist()
            self.faults.append(f"{name}: {different} of {found.numel()} entries differ, the first at {where}")

    def holds(self, name: str, value: bool) -> None:
        """A condition."""
        if not value:
            self.faults.append(name)


# Shapes


def draw_shape(rng: random.Random, tiny: bool, dtypes: list[str], cache_dtypes: dict[str, list[str]]) -> Params:
    """What kernels are compiled for, and ``reach``, the longest sequence (and the room for it)."""
    group = rng.choice((1, 2, 3, 4, 7, 8) if tiny else GROUPS)
    dtype = rng.choice(dtypes)
    shape: Params = {
        "size": rng.choice((16, 24, 64) if tiny else SIZES),
        "group": group,
        "heads": rng.choice([heads for heads in ((1, 2) if tiny else (1, 2, 3, 4, 8)) if heads * group <= 32]),
        "block": rng.choice((16, 48) if tiny else BLOCKS),
        "layout": rng.choice(("NHD", "HND", "NHD in a wider block")),
        "dtype": dtype,
        "cache": rng.choice(cache_dtypes.get(dtype, [dtype])),
        "reach": rng.choice((60, 90)) if tiny else rng.choice((300, 1023, 1024, 3071, 4000, 4000, 4096)),
    }
    if not tiny and rng.random() < 0.06:
        # Few heads: caches of several workers share the device.
        shape |= {"reach": 131072, "heads": min(shape["heads"], 2), "group": min(group, 8)}
    return shape


def draw_pattern_shape(rng: random.Random, tiny: bool) -> Params:
    block_q = rng.choice((16, 32) if tiny else (16, 32, 64, 128))
    return {"block_q": block_q, "block_k": rng.choice([k for k in (1, 2, 4, 8, 16, 32, 64) if k <= block_q])}


def draw_pattern(rng: random.Random, config: Params, dense_last: tuple[int, ...] = (0,)) -> SparsePattern:
    reach, block_q, block_k = config["reach"], config["block_q"], config["block_k"]
    return SparsePattern(
        block_q=block_q,
        block_k=block_k,
        window=rng.choice([0, 1, 2, block_q, block_k, rng.randint(0, 100), min(700, reach), reach + 1]),
        sinks=rng.choice([0, 1, block_k, 5, 64, rng.randint(0, min(reach, 400))]),
        dense_last=rng.choice(dense_last),
        parts=config.get("parts", 1),
    )


def draw_lengths(rng: random.Random, config: Params, max_requests: int = 3) -> tuple[list[int], list[int]]:
    """Rows and seq_lens of one to ``max_requests`` requests. Chunks begin and end anywhere in blocks and tiles."""
    reach, block, tile = config["reach"], config["block"], config.get("block_q", 16)
    if reach > 100_000:
        seq_lens = [rng.randint(100_000, reach) for _ in range(rng.choice((1, 1, 2)))]
    else:
        edges = [1, 2, block, block + 1, 2 * block - 1, 3 * tile, 3 * tile + 1, 63, 64, 65, 1023, 1024, 1025, reach]
        seq_lens = [
            min(reach, rng.choice((rng.choice(edges), rng.randint(1, min(reach, 300)), rng.randint(1, reach))))
            for _ in range(rng.randint(1, max_requests))
        ]
    rows, busy = [], rng.randrange(len(seq_lens))  # one request has rows; the first one may have none
    for i, n in enumerate(seq_lens):
        count = rng.choice((0, 1, 1, n, rng.randint(1, n), rng.randint(1, min(n, 2 * tile + 3)), (n - 1) % tile + 1))
        # Enough for a few tiles in any case: with long seq_lens few rows are what a reference can afford.
        room = WORK // (config["heads"] * config["group"] * n * len(seq_lens))
        rows.append(max(min(count, n, max(room, 40)), 1 if i == busy else 0))
    return rows, seq_lens


def make_batch(rng: random.Random, rows: list[int], seq_lens: list[int], reach: int) -> tuple[Batch, int]:
    """Requests with unused rows before, between and behind them, and generous bounds; the rows in all."""
    starts, at = [], 0
    for count in rows:
        at += rng.choice((0, 1, 1, 7))
        starts.append(at)
        at += count
    start = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    end = start + torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    length = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    bounds = max(rows) + rng.choice((0, 3)), min(max(seq_lens) + rng.choice((0, 5)), reach)
    return Batch(start, end, length, *bounds), at + rng.choice((0, 1))


def make_cache(rng: random.Random, gen: torch.Generator, config: Params, seq_lens: list[int]) -> PagedKV:
    """Blocks in random order, sometimes with a common prefix; all other slots NaN, table tails far outside or stale."""
    heads, size, block = config["heads"], config["size"], config["block"]
    dtype = DTYPES[config["cache"]]
    counts = [-(-n // block) for n in seq_lens]
    total = sum(counts) + 3
    work = torch.float32 if dtype in FP8_DTYPES else dtype
    order = torch.randperm(total, generator=gen, device=DEVICE)[: sum(counts)].split(counts)
    if config["layout"] == "HND":
        storage = torch.full((total, heads, block, 2 * size), float("nan"), dtype=work, device=DEVICE)
        cache = storage
    else:
        # Layers that share blocks: a block is not followed by the next.
        wide = 2 if "wider" in config["layout"] else 1
        storage = torch.full((total, wide, block, heads, 2 * size), float("nan"), dtype=work, device=DEVICE)
        cache = storage[:, wide - 1].transpose(1, 2)
    room = -(-max(seq_lens) // block) + rng.choice((1, 2, 5))  # bounds may be generous
    stale = rng.choice((2**31 - 1, -1, 0))
    table = torch.full((len(seq_lens) + rng.choice((0, 1)), room), stale, dtype=torch.int32, device=DEVICE)
    for i, n in enumerate(seq_lens):
        values = torch.randn(counts[i] * block, heads, 2 * size, generator=gen, device=DEVICE).to(work)
        values[n:] = float("nan")
        cache[order[i]] = values.view(counts[i], block, heads, 2 * size).transpose(1, 2)
        table[i, : counts[i]] = order[i].int()
        if i and rng.random() < 0.3:
            common = rng.randint(0, min(seq_lens[0], n) // block)
            table[i, :common] = table[0, :common]
    scales: list[Tensor | None] = [None, None]
    if dtype in FP8_DTYPES:
        cache = storage.to(dtype)
        cache = cache if config["layout"] == "HND" else cache[:, -1].transpose(1, 2)
        if config["scaled"]:
            scales = [torch.tensor([rng.uniform(0.5, 2.0)], device=DEVICE) for _ in range(2)]
    return PagedKV(cache, table, *scales)


def contiguous(kv: PagedKV, request: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values ``[n, Hkv, D]`` as stored, without an fp8 cache's scales (every fp8 number is a bfloat16)."""
    ids = kv.block_table[request, : -(-n // kv.block_size)].long()
    stored = kv.cache.view(torch.uint8)[ids].view(kv.cache.dtype) if kv.cache.dtype in FP8_DTYPES else kv.cache[ids]
    both = stored.transpose(1, 2).flatten(0, 1)[:n].to(dtype)
    return both[..., : kv.head_size], both[..., kv.head_size :]


def factor(scale: Tensor | None) -> float:
    return 1.0 if scale is None else float(scale)


def slots_of(kv: PagedKV, request: int, n: int) -> Tensor:
    position = torch.arange(n, device=DEVICE)
    return kv.block_table[request].long()[position // kv.block_size] * kv.block_size + position % kv.block_size


def make_queries(gen: torch.Generator, config: Params, batch: Batch, total: int) -> tuple[Tensor, Tensor]:
    """Queries ``[total, Hq, D]``, perhaps a slice of a fused projection; and which rows are of a request."""
    heads, size = config["heads"] * config["group"], config["size"]
    extra = 2 * config["heads"] if config["fused"] else 0
    wide = torch.randn(total, heads + extra, size, generator=gen, device=DEVICE).to(DTYPES[config["dtype"]])
    used = torch.zeros(total, dtype=torch.bool, device=DEVICE)
    for start, end in zip(batch.row_start.tolist(), batch.row_end.tolist(), strict=True):
        used[start:end] = True
    wide[~used] = float("nan")
    return wide[:, :heads], used


FLAG_KINDS = ("none", "one", "one", "few", "some", "many", "all", "run", "ends")


def draw_flags(rng: random.Random, gen: torch.Generator, heads: int, n: int, kind: str | None) -> tuple[Tensor, str]:
    """bool ``[heads, n]``: which columns or diagonals are selected."""
    flags = torch.rand(heads, n, generator=gen, device=DEVICE)
    kinds = [kind or rng.choice(FLAG_KINDS) for _ in range(heads)]
    density = {"none": 0.0, "few": 6 / n, "some": 0.05, "many": 0.5, "all": 2.0}
    chosen = flags < torch.tensor([[density.get(kind, 0.0)] for kind in kinds], device=DEVICE)
    for head, name in enumerate(kinds):
        if name == "one":
            chosen[head, rng.randrange(n)] = True
        elif name == "run":
            start = rng.randrange(n)
            chosen[head, start : start + rng.choice((3, 20, 200))] = True
        elif name == "ends":
            chosen[head, 0] = chosen[head, -1] = True
    return chosen, "/".join(kinds)


def as_selection(columns: Tensor, diagonals: Tensor, stale: int) -> Selection:
    """Ascending lists of what is flagged, in front of stale entries."""

    def lists(flags: Tensor) -> tuple[Tensor, Tensor]:
        counts = flags.sum(1, dtype=torch.int32)
        order = torch.argsort((~flags).to(torch.uint8), dim=1, stable=True).int()
        inside = torch.arange(flags.shape[1], device=DEVICE) < counts.unsqueeze(1)
        items = F.pad(torch.where(inside, order, stale), (0, 3), value=stale)
        return items[:, : int(counts.max()) + 3].contiguous(), counts

    return Selection(*lists(columns), *lists(diagonals))


class Chosen(NamedTuple):
    """A selection of one request, as flags ``[heads, n]`` and as lists."""

    columns: Tensor
    diagonals: Tensor
    selection: Selection
    kinds: str


def choose(rng: random.Random, gen: torch.Generator, heads: int, n: int) -> Chosen:
    extra = rng.choice((0, 0, 9))  # made for a longer sequence: later entries are to be left out
    everything = rng.choice((None,) * 10 + ("columns", "diagonals"))
    columns, one = draw_flags(rng, gen, heads, n + extra, "all" if everything == "columns" else None)
    diagonals, two = draw_flags(rng, gen, heads, n + extra, "all" if everything == "diagonals" else None)
    selection = as_selection(columns, diagonals, rng.choice(STALE))
    return Chosen(columns[:, :n], diagonals[:, :n], selection, f"{one} {two}")


def make_index(rng: random.Random, config: Params, kv: PagedKV, batch: Batch, chosen: list[Chosen],
               pattern: SparsePattern) -> Index:  # fmt: skip
    """An index for a selection; whatever is read of it has to be written first."""
    index = allocate_index(batch.num_requests + rng.choice((0, 1)), config["heads"], config["reach"], pattern, DEVICE)
    for tensor in index[:-1]:
        tensor.fill_(77)
    set_flags(index, [one.selection for one in chosen], batch)
    check_build_index(index, kv, batch)
    return build_index(index, kv, batch)


# Attention


def visible(columns: Tensor, diagonals: Tensor, pattern: SparsePattern, rows: int) -> Tensor:
    """bool ``[Hkv, rows, n]`` from flags ``[Hkv, n]``: what ``attend.naive`` defines, without its loop over tiles."""
    n, block_q, block_k = columns.shape[1], pattern.block_q, pattern.block_k
    place = torch.arange(n, device=DEVICE)
    i = place[n - rows :]
    first_tile = (n - rows) // block_q
    start = torch.arange(first_tile, (n - 1) // block_q + 1, device=DEVICE) * block_q
    end = (start + block_q).clamp(max=n)
    granule = torch.arange(-(-n // block_k), device=DEVICE) * block_k
    kept = diagonals.clone()
    kept[:, : max(pattern.window, 1)] = True
    below = F.pad(kept.cumsum(1), (1, 0))  # [Hkv, n + 1]: kept diagonals below d
    # Pairs of a row of the tile and a key of the granule are apart by every distance from low to high - 1.
    low = (start.unsqueeze(1) - granule - block_k + 1).clamp(0, n)
    high = (end.unsqueeze(1) - granule).clamp(0, n)
    touched = below[:, high] > below[:, low]  # [Hkv, tiles, granules]
    touched |= granule < pattern.sinks
    seen = columns.unsqueeze(1) | touched.repeat_interleave(block_k, 2)[..., :n]
    mask = seen[:, i // block_q - first_tile]
    if pattern.dense_last:
        mask[:, -pattern.dense_last :] = True
    return mask & (place <= i.unsqueeze(1))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[T, Hq, D]`` and natural log-sum-exp ``[T, Hq]`` in float64; some rows at a time."""
    rows, num_heads, _ = q.shape
    n, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float64, device=q.device)
    step = max(1, 2**23 // (group * n))
    for head in range(num_kv_heads):
        keys, values = k[:, head].double(), v[:, head].double()
        heads = slice(head * group, (head + 1) * group)
        for at in range(0, rows, step):
            part = slice(at, at + step)
            logits = torch.einsum("tgd,nd->gtn", q[part, heads].double(), keys) * scale
            logits.masked_fill_(~mask[head, part], float("-inf"))
            total = logits.logsumexp(-1)
            lse[part, heads] = total.T
            out[part, heads] = torch.einsum("gtn,nd->tgd", logits.sub_(total.unsqueeze(-1)).exp_(), values)
    return out, lse


def stock_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The yardstick: PyTorch's own attention kernel in the type of the queries under the same mask."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for head in range(k.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        queries = q[:, heads].transpose(0, 1).unsqueeze(0).contiguous()
        keys, values = (x[:, head].contiguous().expand(1, group, -1, -1) for x in (k, v))
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[head][None, None], scale=scale)
        out[:, heads] = found[0].transpose(0, 1)
    return out


def attend_settings(config: Params) -> Settings | None:
    """Tiles of the Triton kernel; the halves of two tiles share a program in some."""
    dtype = DTYPES[config["dtype"]]
    table = settings("attend", config["size"], torch.device(DEVICE), dtype.itemsize)
    # A wide head or float32 leaves no shared memory for tiles other than the table's.
    if config["tiles"] == "table" or config["size"] > 128:
        return table
    if config["tiles"] == "narrow":
        return Settings(64, 32, 4, 1) if dtype != torch.float32 else Settings(32, 16, 4, 1)
    return Settings(128, 64, 4, 1, lanes=2) if dtype != torch.float32 else Settings(64, 32, 4, 1, lanes=2)


def draw_attend(rng: random.Random, tiny: bool) -> Params:
    shape = draw_shape(
        rng, tiny, ["bfloat16", "bfloat16", "float16", "float32"],
        {"bfloat16": ["bfloat16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]},
    )  # fmt: skip
    tiles = rng.choice(("table", "narrow", "two tiles"))
    more = {"lse": rng.random() < 0.5, "fused": rng.random() < 0.3, "scaled": rng.random() < 0.7, "tiles": tiles}
    return shape | draw_pattern_shape(rng, tiny) | more


def on_hopper() -> bool:
    return DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)


def draw_hopper(rng: random.Random, tiny: bool) -> Params:
    from vllm_vsprefill.kernels.attend import hopper

    for _ in range(10_000):
        config = draw_attend(rng, tiny)
        config["cache"] = config["dtype"]
        shape = config["group"], config["block_q"], config["size"], DTYPES[config["dtype"]]
        if hopper.unsupported_shape(*shape) is None:
            return config
    raise RuntimeError("the Hopper kernel supports none of 10,000 random shapes")


class Warnings(logging.Handler):
    """Remembers that ``attend`` fell back from the Hopper kernel, which it says once a process, in the log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "Hopper" in record.getMessage():
            self.seen.append(record.getMessage())


WARNINGS = Warnings()
logging.getLogger("vllm.vsprefill").addHandler(WARNINGS)


def run_attend(config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params) -> None:
    solve_attend(config, rng, gen, check, told, attend_settings(config), (0, 0, 1, 5, 64, 200))


def run_hopper(config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params) -> None:
    # Without settings and dense last rows, attend takes the Hopper kernel.
    solve_attend(config, rng, gen, check, told, None, (0,))
    check.holds(f"the Hopper kernel did not run: {WARNINGS.seen}", not WARNINGS.seen)


def solve_attend(
    config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params, tiles: Settings | None,
    dense_last: tuple[int, ...],
) -> None:  # fmt: skip
    dtype, heads, size = DTYPES[config["dtype"]], config["heads"], config["size"]
    pattern = draw_pattern(rng, config, dense_last)
    rows, seq_lens = draw_lengths(rng, config)
    # Logits of a standard deviation of 3 make a sharp softmax, of 8 nearly one key a row: weights are rounded more or
    # less, and the running maximum moves. In float32 logits of 40 would cost more digits than the limit grants.
    scale = size**-0.5 * rng.choice((1, 1, 3) if dtype == torch.float32 else (1, 1, 3, 8))
    told |= {"rows": rows, "seq_lens": seq_lens, "pattern": str(pattern), "scale": scale}
    batch, total = make_batch(rng, rows, seq_lens, config["reach"])
    kv = make_cache(rng, gen, config, seq_lens)
    q, used = make_queries(gen, config, batch, total)
    chosen = [choose(rng, gen, heads, n) for n in seq_lens]
    told["chosen"] = [one.kinds for one in chosen]
    index = make_index(rng, config, kv, batch, chosen, pattern)
    lse = torch.full(q.shape[:2], float("nan"), device=DEVICE) if config["lse"] else None
    out = torch.full(q.shape, float("nan"), dtype=dtype, device=DEVICE)
    visited = torch.full((len(rows),), 5, dtype=torch.int64, device=DEVICE)  # they are added
    check_attend(q, kv, index, batch, scale, out, lse, visited)
    attend(q, kv, index, batch, scale=scale, out=out, lse=lse, visited=visited, config=tiles)

    check.holds("rows of no request were written", bool(out[~used].isnan().all()))
    check.holds("an output is not finite", bool(out[used].isfinite().all()))
    if lse is not None:
        check.holds("log-sum-exps of no request were written", bool(lse[~used].isnan().all()))
    k_scale, v_scale = factor(kv.k_scale), factor(kv.v_scale)
    pairs, off, stock_off, norm = [], 0.0, 0.0, 0.0
    for i, (count, n, start) in enumerate(zip(rows, seq_lens, batch.row_start.tolist(), strict=True)):
        if not count:
            pairs.append(5)
            continue
        part = q[start : start + count]
        k, v = contiguous(kv, i, n, dtype)
        mask = visible(chosen[i].columns, chosen[i].diagonals, pattern, count)
        pairs.append(5 + int(mask.sum()))
        if bool(chosen[i].columns.all()) or bool(chosen[i].diagonals.all()) or pattern.window >= n:
            check.equal("pairs with everything selected", pairs[-1] - 5, heads * SparsePattern.causal_pairs(count, n))
        wanted, wanted_lse = masked_attention(part, k, v, mask, scale * k_scale)
        wanted *= v_scale
        error = out[start : start + count].double() - wanted
        off, norm = off + float(error.square().sum()), norm + float(wanted.square().sum())
        worst = float((error.norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)).max())
        check.measure("worst row", worst, ROW_FACTOR * ATTEND_LIMIT[dtype])
        if lse is not None:
            error = (lse[start : start + count] - wanted_lse).abs() / (1 + wanted_lse.abs())
            check.measure("log-sum-exp", float(error.max()), LSE_LIMIT[dtype])
        if dtype != torch.float32:
            stock = stock_attention(part, k, v, mask, scale * k_scale).double() * v_scale
            stock_off += float((stock - wanted).square().sum())
        if count * n * q.shape[1] <= 300_000 and rng.random() < 0.3:
            exact_q, exact_k, exact_v = (x.double().cpu() for x in (part, k, v))
            by_naive, naive_pairs = naive_attend.attend(
                exact_q, exact_k, exact_v,
                Selection(*(x.cpu() for x in chosen[i].selection)).below(n), pattern, scale=scale * k_scale,
            )  # fmt: skip
            check.equal("pairs of the two references", pairs[-1] - 5, naive_pairs)
            difference = (by_naive * v_scale - wanted.cpu()).norm() / wanted.norm().cpu().clamp(min=1e-30)
            check.measure("between the references", float(difference), 1e-10)
            check.by_naive += 1
    check.equal("visited pairs", visited.tolist(), pairs)
    check.measure("output", math.sqrt(off / max(norm, 1e-60)), ATTEND_LIMIT[dtype])
    if dtype != torch.float32:
        check.yardstick = math.sqrt(stock_off / max(norm, 1e-60))


# Attention to lists of tiles


def visible_of_tiles(keys: Tensor, pattern: SparsePattern, rows: int) -> Tensor:
    """bool ``[Hkv, rows, n]`` from lists ``[Hkv, tiles, n]``: what ``attend_tiles.naive`` defines, without its loop."""
    place = torch.arange(keys.shape[2], device=DEVICE)
    i = place[len(place) - rows :]
    tile = i // pattern.block_q
    start = (tile * pattern.block_q - pattern.reach + 1).clamp(min=0) // pattern.block_k * pattern.block_k
    near = (place < pattern.sink_keys) | (place >= start.unsqueeze(1))  # [rows, n]
    return (keys[:, tile - int(tile[0])] | near) & (place <= i.unsqueeze(1))


def draw_tiles(rng: random.Random, tiny: bool) -> Params:
    config = draw_attend(rng, tiny) | {"lse": False}
    config["group"] = rng.choice((config["group"], 6))
    config["block_q"] = rng.choice((1, 7, 16, 18, 20, 32, 40, 126, 128, 200)[:: 2 if tiny else 1])
    config["block_k"] = rng.choice((1, 3, 4, 16, 64))
    return config


def draw_tiles_hopper(rng: random.Random, tiny: bool) -> Params:
    from vllm_vsprefill.kernels.attend_tiles import hopper

    for _ in range(10_000):
        config = draw_tiles(rng, tiny)
        config["cache"] = config["dtype"]
        config["block_q"] = hopper.piece_positions(config["group"]) * rng.choice((1, 1, 2, 3, 6))
        shape = config["group"], config["block_q"], config["size"], DTYPES[config["dtype"]]
        if hopper.unsupported_shape(*shape) is None:
            return config
    raise RuntimeError("the Hopper kernel supports none of 10,000 random shapes")


def run_tiles(config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params) -> None:
    table = settings("attend_tiles", config["size"], torch.device(DEVICE), DTYPES[config["dtype"]].itemsize)
    solve_tiles(config, rng, gen, check, told, attend_settings(config) if config["tiles"] == "narrow" else table)


def run_tiles_hopper(config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params) -> None:
    # Without settings attend_tiles takes the Hopper kernel.
    solve_tiles(config, rng, gen, check, told, None)
    check.holds(f"the Hopper kernel did not run: {WARNINGS.seen}", not WARNINGS.seen)


def solve_tiles(
    config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params, tiles: Settings | None
) -> None:
    dtype, heads, size = DTYPES[config["dtype"]], config["heads"], config["size"]
    pattern = draw_pattern(rng, config, (0, 64))
    rows, seq_lens = draw_lengths(rng, config)
    scale, share = size**-0.5 * rng.choice((1, 3)), rng.choice((0.0, 0.01, 0.1, 0.5))
    told |= {"rows": rows, "seq_lens": seq_lens, "pattern": str(pattern), "scale": scale, "share": share}
    batch, total = make_batch(rng, rows, seq_lens, config["reach"])
    kv = make_cache(rng, gen, config, seq_lens)
    q, used = make_queries(gen, config, batch, total)
    problem = PagedProblem(q, kv, batch, [], pattern)
    keys = random_keys(problem, share, rng.randrange(2**31))
    index = tile_index(problem, keys)
    out = torch.full(q.shape, float("nan"), dtype=dtype, device=DEVICE)
    visited = torch.full((len(rows),), 5, dtype=torch.int64, device=DEVICE)  # they are added
    check_attend_tiles(q, kv, index, batch, scale, out, visited)
    attend_tiles(q, kv, index, batch, scale=scale, out=out, visited=visited, config=tiles)

    check.holds("rows of no request were written", bool(out[~used].isnan().all()))
    check.holds("an output is not finite", bool(out[used].isfinite().all()))
    k_scale, v_scale = factor(kv.k_scale), factor(kv.v_scale)
    pairs, off, norm = [], 0.0, 0.0
    for i, (count, n, start) in enumerate(zip(rows, seq_lens, batch.row_start.tolist(), strict=True)):
        pairs.append(5)
        if not count:
            continue
        part = q[start : start + count]
        k, v = contiguous(kv, i, n, dtype)
        mask = visible_of_tiles(keys[i], pattern, count)
        pairs[i] += int(mask.sum())
        wanted, _ = masked_attention(part, k, v, mask, scale * k_scale)
        wanted *= v_scale
        error = out[start : start + count].double() - wanted
        off, norm = off + float(error.square().sum()), norm + float(wanted.square().sum())
        worst = float((error.norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)).max())
        check.measure("worst row", worst, ROW_FACTOR * ATTEND_LIMIT[dtype])
        if heads * count * n <= 100_000 and rng.random() < 0.3:
            by_naive, naive_pairs = naive_tiles.attend_tiles(
                part.double(), k.double(), v.double(), keys[i], pattern, scale=scale * k_scale
            )
            check.equal("pairs of the two references", pairs[i] - 5, naive_pairs)
            difference = (by_naive * v_scale - wanted).norm() / wanted.norm().clamp(min=1e-30)
            check.measure("between the references", float(difference), 1e-5)  # one computes in float32
            check.by_naive += 1
    check.equal("visited pairs", visited.tolist(), pairs)
    check.measure("output", math.sqrt(off / max(norm, 1e-60)), ATTEND_LIMIT[dtype])


# The chain of lists of tiles


SCORE_LIMIT = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far from the bar a key may be on the wrong side of it: means of queries are rounded."""


def draw_chain(rng: random.Random, tiny: bool) -> Params:
    config = draw_tiles(rng, tiny)
    config["priced_rows"] = rng.choice((1, 7, 16) if tiny else (1, 13, 16, 32, 64))
    config["parts"] = rng.choice((1, 2))
    config["variance"] = rng.random() < 0.5
    return config


# Relative error by norm over the keys. Queries without their mean, keys and covariances are rounded to bfloat16 (tf32
# in float32), each by at most 2**-8 (2**-11) either way, which is averaged over. The interpreter cuts bfloat16 off
# instead: queries twice and covariances once, by 2**-8 on average.
VARIANCE_LIMIT = dict.fromkeys((torch.bfloat16, torch.float16), 2e-2 if is_interpreted() else 1e-2)
VARIANCE_LIMIT[torch.float32] = 2e-3


def half_variance(q: Tensor, k: Tensor, scale: float, pattern: SparsePattern) -> tuple[Tensor, Tensor]:
    """float64 ``[Hkv, n]``: what ``variance.paged`` defines, without its loop over tiles; and before its mean is taken
    off, which is what rounding is relative to."""
    rows, n, heads = q.shape[0], k.shape[0], k.shape[1]
    position = torch.arange(n - rows, n, device=DEVICE)
    tile, some = position // pattern.block_q, tiles_of_variance(pattern, rows, n)
    looked_at = (tile - some.start) % some.step == 0
    part = (tile * pattern.parts + position % pattern.block_q // pattern.part_positions)[looked_at]
    _, place, count = part.unique(return_inverse=True, return_counts=True)
    queries = q[looked_at].double()
    sums = torch.zeros(len(count), *queries.shape[1:], dtype=torch.float64, device=DEVICE).index_add_(0, place, queries)
    apart = (queries - (sums / count.view(-1, 1, 1))[place]).unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
    keys = (k.double() - k[spread_rows(n, CENTRE_KEYS)].double().mean(0)).transpose(0, 1)
    products = torch.einsum("hnd,hde,hne->hn", keys, apart.mT @ apart / apart.shape[1], keys) * (scale * scale / 2)
    level = products[:, spread_rows(n, LEVEL_KEYS)].mean(1, keepdim=True)
    return (products - level).clamp(-MOST, MOST), products


def listed_keys(index: TileIndex, kv: PagedKV, request: int, batch: Batch, check: Check) -> Tensor:
    """What the tiles of a request list, bool ``[Hkv, tiles, n]``; each list is ascending and has its sinks."""
    start, end, n = (int(x[request]) for x in batch[:3])
    pattern, first, slots = index.pattern, n - (end - start), slots_of(kv, request, n)
    position = torch.zeros(int(slots.max()) + 1, dtype=torch.int64, device=DEVICE)
    position[slots] = torch.arange(n, device=DEVICE)
    tiles, heads = pattern.tiles(end - start, n), kv.num_kv_heads
    found = torch.zeros(heads, len(tiles), n, dtype=torch.bool, device=DEVICE)
    room = index.slots.shape[0] >= heads * index.bits.shape[1] * n
    for t, tile in enumerate(tiles):
        place, window = index.place(start, request, first, tile), pattern.window_start(tile * pattern.block_q)
        for head in range(heads):
            count, at = int(index.counts[head, place]), int(index.starts[head, place])
            if count == EVERYTHING:
                # Also where there was no room for the list.
                check.holds("a list was left out", not room or float(index.bars[request, head]) == -math.inf)
                found[head, t, pattern.sink_keys : window] = True
                continue
            keys = position[index.slots[at : at + count].long()]
            check.holds("a list is not ascending", bool((keys.diff() > 0).all()) and not bool((keys >= window).any()))
            sinks = min(pattern.sink_keys, window)
            check.equal("sinks of a list", int((keys < pattern.sink_keys).sum()), sinks)
            found[head, t, keys[sinks:]] = True
    return found


def run_chain(config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params) -> None:
    """Variance, price, rank, lists, attention on one index: every step from what the one before has decided."""
    dtype, heads, size = DTYPES[config["dtype"]], config["heads"], config["size"]
    pattern = draw_pattern(rng, config, (0,))
    rows, seq_lens = draw_lengths(rng, config)
    scale, worth = size**-0.5 * rng.choice((1, 3)), rng.choice((0.0, 0.1, 1.0, 3.0, 30.0))
    told |= {"rows": rows, "seq_lens": seq_lens, "pattern": str(pattern), "scale": scale, "price": worth}
    told["other_bars"] = rng.random() < 0.5
    batch, total = make_batch(rng, rows, seq_lens, config["reach"])
    kv = make_cache(rng, gen, config, seq_lens)
    q, used = make_queries(gen, config, batch, total)
    requests, longest, num_rows = batch.num_requests, batch.max_seq_len, max(total, batch.max_rows)
    storage = allocate_tiles(requests, heads, num_rows, [(pattern, longest)], DEVICE)
    query_heads, count = heads * config["group"], config["priced_rows"]
    prices = allocate_price(requests, query_heads, heads, size, longest, count, dtype, DEVICE, pattern.parts)
    ranks = allocate_rank(num_rows, requests, query_heads, size, pattern.block_q, dtype, DEVICE, pattern.parts)
    for part in (*storage, *prices, *ranks):
        if isinstance(part, Tensor):
            part.fill_(float("nan") if part.is_floating_point() else 2**31 - 1)
    index = storage.view(pattern, num_rows, requests, longest)
    out = torch.full(q.shape, float("nan"), dtype=dtype, device=DEVICE)
    visited = torch.full((requests,), 5, dtype=torch.int64, device=DEVICE)  # they are added
    prior = None
    if config["variance"]:
        prior = torch.full((requests, heads, longest), float("nan"), device=DEVICE)
        scratch = allocate_variance(requests, heads, size, dtype, DEVICE)
        for part in scratch:
            part.fill_(float("nan"))
        check_variance(q, kv, batch, pattern, scratch, prior, scale)
        variance(q, kv, batch, pattern, scratch, prior, scale=scale)
    check_price(q, kv, batch, index, prices, scale, worth, prior)
    check_rank(q, kv, batch, index, ranks, scale, prior)
    check_build_tiles(index, kv, batch)
    check_attend_tiles(q, kv, index, batch, scale, out, visited)
    price(q, kv, batch, index, prices, scale=scale, price=worth, prior=prior)
    if told["other_bars"]:
        # Short sequences have no step of the ladder between none and all.
        bars = torch.rand(index.bars.shape, generator=gen, device=DEVICE) * 8 - 7
        kinds = torch.rand(index.bars.shape, generator=gen, device=DEVICE)
        index.bars.copy_(torch.where(kinds < 0.1, math.inf, torch.where(kinds > 0.9, -math.inf, bars)))
    rank(q, kv, batch, index, ranks, scale=scale, prior=prior)
    build_tiles(index, kv, batch)
    attend_tiles(q, kv, index, batch, scale=scale, out=out, visited=visited)

    check.holds("rows of no request were written", bool(out[~used].isnan().all()))
    check.holds("an output is not finite", bool(out[used].isfinite().all()))
    k_scale, v_scale = factor(kv.k_scale), factor(kv.v_scale)
    pairs, off, norm = [5] * requests, 0.0, 0.0
    for i, (part_rows, n, start) in enumerate(zip(rows, seq_lens, batch.row_start.tolist(), strict=True)):
        if not part_rows:
            continue
        part, bars = q[start : start + part_rows], index.bars[i]
        density = index.density[i]
        check.holds("a density is none", bool(((density > 0) & (density <= 1.0001)).all()))
        check.holds("a bar is none", not bool(bars.isnan().any()))
        k, v = contiguous(kv, i, n, dtype)
        keys, tiles = listed_keys(index, kv, i, batch, check), pattern.tiles(part_rows, n)
        added = None
        if prior is not None:
            added = prior[i, :, :n]
            spread, whole = half_variance(part, k, scale * k_scale, pattern)
            check.measure("variance", float((added - spread).norm() / (whole.norm() + 1e-30)), VARIANCE_LIMIT[dtype])
            check.holds("a prior behind a sequence", bool(prior[i, :, n:].isnan().all()))
        scores = tile_scores(part, k, list(tiles), scale=scale * k_scale, pattern=pattern, prior=added)
        apart = scores - bars.view(-1, 1, 1)
        wrong = (keys != (apart >= 0)) & listable(pattern, tiles, n, scores.device) & bars.isfinite().view(-1, 1, 1)
        limit = SCORE_LIMIT[dtype] * max(1.0, scale * k_scale * size**0.5)
        check.measure("wrong side of a bar", float(apart.abs()[wrong].max()) if bool(wrong.any()) else 0.0, limit)
        check.holds("keys above no bar are listed", not bool(keys[bars == math.inf].any()))
        mask = visible_of_tiles(keys, pattern, part_rows)
        pairs[i] += int(mask.sum())
        wanted, _ = masked_attention(part, k, v, mask, scale * k_scale)
        wanted *= v_scale
        error = out[start : start + part_rows].double() - wanted
        off, norm = off + float(error.square().sum()), norm + float(wanted.square().sum())
    check.equal("visited pairs", visited.tolist(), pairs)
    check.measure("output", math.sqrt(off / max(norm, 1e-60)), ATTEND_LIMIT[dtype])


# The index


def draw_merge(rng: random.Random, tiny: bool) -> Params:
    shape = draw_shape(rng, tiny, ["float16"], {})
    shape |= {"size": 16, "group": 1, "fused": False}
    return shape | draw_pattern_shape(rng, tiny)


def run_merge(config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params) -> None:
    """Lists, slots, ranks and ``near`` as ``Index`` defines them, and the union of a tile as ``merge`` defines it."""
    heads, block_q, block_k = config["heads"], config["block_q"], config["block_k"]
    pattern = draw_pattern(rng, config)
    rows, seq_lens = draw_lengths(rng, config)
    told |= {"seq_lens": seq_lens, "pattern": str(pattern)}
    batch, _ = make_batch(rng, rows, seq_lens, config["reach"])
    kv = make_cache(rng, gen, config, seq_lens)
    chosen = [choose(rng, gen, heads, n) for n in seq_lens]
    told["chosen"] = [one.kinds for one in chosen]
    index = make_index(rng, config, kv, batch, chosen, pattern)
    sinks = -(-pattern.sinks // block_k) * block_k
    last_near = (max(pattern.window, 1) - 1 + block_k - 1) // block_k  # the last granule that the window reaches
    for i, n in enumerate(seq_lens):
        columns = chosen[i].columns.clone()
        columns[:, :sinks] = True
        slots = slots_of(kv, i, n)
        granules = n // block_k + 2
        # Diagonals from r * block_k - block_k + 1 on, block_q + block_k - 1 of them: the first one selected.
        span = block_q + block_k - 1
        room = granules * block_k + span
        flags = F.pad(chosen[i].diagonals, (block_k - 1, max(room - n, 0)))[:, :room]
        windows = flags.unfold(1, span, block_k)[:, :granules]
        near = torch.where(windows.any(-1), windows.to(torch.uint8).argmax(-1), NONE)
        check.same("near", index.near[i, :, :granules].long(), near)
        listed = (near < NONE) & (torch.arange(granules, device=DEVICE) > last_near)
        for head in range(heads):
            wanted = columns[head].nonzero().squeeze(1)
            check.same("columns", index.columns[i, head, : len(wanted)].long(), wanted)
            check.same("slots", index.slots[i, head, : len(wanted)].long(), slots[wanted])
            edges = torch.arange(-(-n // RANK) + 1, device=DEVICE) * RANK
            check.same("rank", index.rank[i, head, : len(edges)].long(), torch.searchsorted(wanted, edges))
            wanted = listed[head].nonzero().squeeze(1)
            check.same("granules", index.granules[i, head, : len(wanted)].long(), wanted)
            edges = torch.arange(-(-granules // RANK) + 1, device=DEVICE) * RANK
            check.same(
                "granule rank", index.granule_rank[i, head, : len(edges)].long(), torch.searchsorted(wanted, edges)
            )
        if n <= 4096:
            tile = rng.randrange(-(-n // block_q))
            start, end = tile * block_q, min((tile + 1) * block_q, n)
            head = rng.randrange(heads)
            one = chosen[i].selection.below(n)
            wanted = naive_merge.merge(
                one.columns[head, : int(one.num_columns[head])], one.diagonals[head, : int(one.num_diagonals[head])],
                tile_start=start, tile_end=end, seq_len=n, pattern=pattern,
            )  # fmt: skip
            position = torch.arange(end, device=DEVICE)
            apart = start // block_k - position // block_k  # relative granules; the tile's own are negative or 0
            covered = near[head][apart.clamp(min=0)] <= end - start + block_k - 2
            union = columns[head, :end] | covered | (apart <= last_near)
            check.same("union of a tile", union.nonzero().squeeze(1), wanted)
            check.by_naive += 1


# Scores


def draw_score(rng: random.Random, tiny: bool) -> Params:
    shape = draw_shape(
        rng, tiny, ["bfloat16", "bfloat16", "float16", "float32"],
        {"bfloat16": ["bfloat16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]},
    )  # fmt: skip
    shape |= {"group": 1, "scaled": rng.random() < 0.7, "hidden": rng.choice((16, 48) if tiny else (16, 48, 128, 512))}
    # The interpreter keeps bfloat16 as integers, of which it finds none that is NaN, and truncates instead of rounding.
    shape["logits"] = rng.choice(("float32", "float32", "float32" if is_interpreted() else "bfloat16"))
    shape["tiles"] = rng.choice(("table", "small")) if shape["size"] <= 128 else "table"
    return shape


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 numbers as a kernel stores them: rounded, but the interpreter cuts off what bfloat16 has no room for."""
    if is_interpreted() and dtype == torch.bfloat16:
        x = (x.contiguous().view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


def run_score(config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params) -> None:
    """``score_slots`` on some slots and padding, then ``score_missing`` on the rest."""
    dtype, heads, size, hidden = DTYPES[config["dtype"]], config["heads"], config["size"], config["hidden"]
    logit_dtype = DTYPES[config["logits"]]
    rows, seq_lens = draw_lengths(rng, config)
    told["seq_lens"] = seq_lens
    batch, _ = make_batch(rng, rows, seq_lens, config["reach"])
    kv = make_cache(rng, gen, config, seq_lens)
    shapes = ((heads, 2 * size, hidden), (heads, hidden), (heads, hidden, 2), (heads, 2))
    w1, b1, w2, b2 = (torch.randn(shape, generator=gen, device=DEVICE) for shape in shapes)
    weights = prepare_weights(IndexerLayerWeights(w1 / size**0.5, b1, w2 / hidden**0.5, b2), dtype)
    tiles = None if config["tiles"] == "table" else Settings(32, 32, 4, 1)

    every = torch.cat([slots_of(kv, i, n) for i, n in enumerate(seq_lens)])
    broken = int(every[-1]) if rng.random() < 0.1 and len(every) > 1 else None
    if broken is not None:
        kv.cache.view(torch.uint8)[broken // kv.block_size, :, broken % kv.block_size] = 255  # a NaN in every type
    padding = torch.tensor([-1, -1], device=DEVICE)
    some = torch.cat((every[:: rng.choice((1, 2, 3))], padding))
    logits = torch.full((kv.cache.shape[0] * kv.block_size, 2 * heads), float("nan"), dtype=logit_dtype, device=DEVICE)
    check_score_slots(kv, some, weights, logits)
    score_slots(kv, some, weights, logits, config=tiles)

    # The kernel multiplies an fp8 value by its scale and rounds to the type of the weights: so does this.
    both = kv.cache.view(torch.uint8).unflatten(-1, (2 * size, -1))[every // kv.block_size, :, every % kv.block_size]
    both = both.flatten(-2).view(kv.cache.dtype).to(dtype)
    parts = []
    for x, x_scale in ((both[..., :size], kv.k_scale), (both[..., size:], kv.v_scale)):
        parts.append(narrowed(x.float() * factor(x_scale), dtype).double())
    inputs = torch.cat(parts, -1).transpose(0, 1)
    layer = [x.double() for x in weights]
    wanted = torch.relu(torch.baddbmm(layer[1].unsqueeze(1), inputs, layer[0]))
    wanted = torch.baddbmm(layer[3].unsqueeze(1), wanted, layer[2]).transpose(0, 1).flatten(1)
    # bfloat16 logits are rounded once, by at most 2**-8 of them.
    limit = SCORE_LIMIT[dtype] + (2.0**-8 if logit_dtype == torch.bfloat16 else 0.0)

    def compare(name: str, which: Tensor, skip: int) -> None:
        fine = which & (every != (-1 if broken is None else broken)) & (every != skip)
        if bool(fine.any()):
            error = (logits[every[fine]].double() - wanted[fine]).abs() / (1 + wanted[fine].abs())
            check.measure(name, float(error.nan_to_num(nan=math.inf).max()), limit)

    done = torch.isin(every, some)
    compare("given slots", done, -1)
    check.holds("slots that were not given were scored", bool(logits[every[~done]].isnan().all()))
    kept = int(every[0])
    if kept != broken:
        logits[kept] = 5.0  # what is there already stays
    missing = allocate_missing(len(seq_lens), batch.max_seq_len, DEVICE)
    check_score_missing(kv, batch, weights, logits, missing)
    score_missing(kv, batch, weights, logits, missing, config=tiles)
    compare("missing slots", torch.ones_like(done), kept)
    check.holds("a logit was scored again", kept == broken or bool((logits[kept] == 5).all()))
    nobody = torch.ones(logits.shape[0], dtype=torch.bool, device=DEVICE)
    nobody[every] = False
    check.holds("slots of nobody were scored", bool(logits[nobody].isnan().all()))
    if broken is not None:
        check.holds("a broken token is missing still", not bool(logits[broken].isnan().any()))
    elif every.numel() <= 300:
        by_naive = naive_score.score(parts[0].float(), parts[1].float(), weights).flatten(1)
        by_naive = by_naive.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        check.measure("between the references", float((by_naive - wanted).abs().max()), 1e-4)
        check.by_naive += 1


# Selection


def draw_select(rng: random.Random, tiny: bool) -> Params:
    config = draw_shape(rng, tiny, ["float16"], {}) | {"size": 16, "group": 1}
    return config | {"logits": rng.choice(("float32", "float32", "bfloat16")), "block_q": 16, "block_k": 1}


def draw_budgets(rng: random.Random, reach: int) -> Budgets:
    bounds: list[Any] = []
    for _ in ("columns", "diagonals"):
        maximum = rng.choice([None, None, None, 0, 1, 64, reach + 900])
        minimum = rng.choice([0, 0, 0, 1, 50, reach // 2])
        bounds += [minimum if maximum is None else min(minimum, maximum), maximum]
    return Budgets(*bounds)


def draw_tau(rng: random.Random, heads: int) -> Tensor:
    # 0.8731: no number of equal tokens adds up to it, so that rounding decides nothing.
    values = [[rng.choice([-1.0, 0.0, 0.3141, 0.8731, 0.9917, 1.0]) for _ in range(heads)] for _ in range(2)]
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


def make_logits(rng: random.Random, gen: torch.Generator, n: int, heads: int, told: Params) -> Tensor:
    kind = rng.choice(("normal", "normal", "wide", "equal", "few values", "a peak", "minus infinity", "not a number"))
    told.setdefault("kinds", []).append(kind)
    values = torch.randn(n, 2 * heads, generator=gen, device=DEVICE)
    if kind == "wide":
        values *= 8
    elif kind == "equal":
        values = values * 0 + 3
    elif kind == "few values":
        values = torch.round(values * 2) / 2
    elif kind == "a peak":
        values[n // 2] += 40
    elif kind == "minus infinity":
        values[1::2] = float("-inf")
    elif kind == "not a number":
        values[rng.randrange(n)] = float("nan")
    return values


def check_choice(
    check: Check, logits: Tensor, flags: Tensor, tau: Tensor, budgets: Budgets
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether flags ``[2, H, n]`` are what ``select`` promises for logits ``[2, H, n]``.

    The order is exact: differences of 2**-18 from the maximum, equal ones by position or distance. How many are taken
    may differ where the mass is within rounding of the threshold.

    Returns:
        Chosen tokens by position ``[2, H, n]``, the distance of each from the maximum, and the doubt ``[2, H]``: how
        many counts would have done beside one.
    """
    n = logits.shape[2]
    value = torch.where(logits.isnan(), 1e30, logits.clamp(max=1e30))
    behind = ((value.amax(-1, keepdim=True) - value) * 2.0**18).clamp(max=2.0**24 - 1).nan_to_num(nan=0.0).long()
    position = torch.arange(n, device=DEVICE)
    place = torch.stack((position, n - 1 - position)).unsqueeze(1)  # diagonals: nearest first
    order = (behind * 2**22 + place).argsort(-1)
    mass = value.double().softmax(-1).gather(-1, order).cumsum(-1)
    goal = tau.unsqueeze(-1)
    bounds = []
    for slack in (-SELECT_SLACK, SELECT_SLACK):
        count = ((mass < goal + slack).sum(-1) + 1).clamp(max=n)
        count = torch.where(tau <= 0, 0, torch.where(tau >= 1, n, count))
        for kind, (minimum, maximum) in enumerate((budgets[:2], budgets[2:])):
            count[kind] = count[kind].clamp(min=minimum).clamp(max=n if maximum is None else min(maximum, n))
        bounds.append(count)
    taken = torch.stack((flags[0], flags[1].flip(-1))) != 0
    count = taken.sum(-1)
    inside = (count >= bounds[0]) & (count <= bounds[1])
    check.holds(f"counts {count.tolist()} outside {bounds[0].tolist()} .. {bounds[1].tolist()}", bool(inside.all()))
    check.same("the likeliest tokens", taken.gather(-1, order), position < count.unsqueeze(-1))
    return taken, behind, bounds[1] - bounds[0]


def run_select(config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params) -> None:
    heads, reach = config["heads"], config["reach"]
    rows, seq_lens = draw_lengths(rng, config)
    batch, _ = make_batch(rng, rows, seq_lens, reach)
    kv = make_cache(rng, gen, config, seq_lens)
    # A prefix that two requests share would get the logits of the second.
    table = kv.block_table.clone()
    dtype = DTYPES[config["logits"]]
    logits = torch.full((kv.cache.shape[0] * kv.block_size, 2 * heads), float("nan"), dtype=dtype, device=DEVICE)
    for i, n in enumerate(seq_lens):
        logits[slots_of(kv, i, n)] = make_logits(rng, gen, n, heads, told).to(dtype)
    kv = kv._replace(block_table=table)
    tau, budgets = draw_tau(rng, heads), draw_budgets(rng, reach)
    told |= {"seq_lens": seq_lens, "tau": tau.tolist(), "budgets": budgets._asdict()}
    pattern = SparsePattern(block_q=16, block_k=1, window=1, sinks=0, dense_last=0)
    index = allocate_index(len(seq_lens), heads, reach, pattern, DEVICE)
    room = len(seq_lens) + rng.choice((0, 1))
    gathered, workspace = allocate_gathered(room, heads, reach, DEVICE), allocate_select(room, heads, reach, DEVICE)
    index.flags.fill_(77)
    for name, tensor in (gathered._asdict() | workspace._asdict()).items():
        if name != "bins":
            tensor.fill_(-7)
    check_gather(logits, kv, batch, gathered)
    gather(logits, kv, batch, gathered)
    check_select(gathered, batch, tau, index, workspace, budgets)
    select(gathered, batch, tau, index, workspace, budgets=budgets)
    check.holds("bins are not left empty", not bool(workspace.bins.any()))
    for i, n in enumerate(seq_lens):
        mine = logits[slots_of(kv, i, n)].float().unflatten(1, (heads, 2)).permute(2, 1, 0)
        taken, behind, doubt = check_choice(check, mine, index.flags[i, :, :, :n], tau, budgets)
        if bool(mine.isnan().any()):
            continue  # the plain reference keeps everything then, this one the broken token
        probs = naive_select.distributions(mine.permute(2, 1, 0))
        one = naive_select.select(*probs, tau_columns=tau[0], tau_diagonals=tau[1], budgets=budgets)
        lists = ((one.columns, one.num_columns), (one.diagonals, one.num_diagonals))
        for kind, (items, counts) in enumerate(lists):
            wanted = torch.zeros(heads, n + 1, dtype=torch.bool, device=DEVICE)
            inside = torch.arange(items.shape[1], device=DEVICE) < counts.unsqueeze(1)
            wanted.scatter_(1, torch.where(inside, items.long(), n), True)
            wanted = wanted[:, :n] if kind == 0 else wanted[:, :n].flip(-1)
            different = (taken[kind] ^ wanted).sum(-1)
            # Tokens as close as 4e-6 to the last one taken may change places with it; equal ones may not.
            cut = torch.where(taken[kind], behind[kind], -1).amax(-1, keepdim=True)
            close = (behind[kind] - cut).abs() <= 1
            low = mine[kind].masked_fill(~close, math.inf).amin(-1)
            high = mine[kind].masked_fill(~close, -math.inf).amax(-1)
            ties = torch.where(high > low, close.sum(-1), 0)
            allowed = 2 * ties + doubt[kind] + 2
            check.holds(f"{different.tolist()} tokens other than the reference's", bool((different <= allowed).all()))
            check.errors["other tokens"] = max(check.errors.get("other tokens", 0.0), float(different.max()))
            check.by_naive += 1


# Estimates


def draw_sampled(rng: random.Random, tiny: bool) -> Params:
    config = draw_shape(
        rng, tiny, ["bfloat16", "float16", "float32"],
        {"bfloat16": ["bfloat16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]},
    )  # fmt: skip
    config |= {"fused": rng.random() < 0.3, "scaled": rng.random() < 0.7, "block_q": 16, "block_k": 1}
    config["num_rows"] = rng.choice((1, 5, 16) if tiny else (1, 5, 16, 64, 200))
    config["tiles"] = rng.choice(("table", "small")) if config["size"] <= 128 else "table"
    return config


def run_sampled(config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params) -> None:
    """The estimate, and ``select`` from it."""
    heads, group, reach, dtype = config["heads"], config["group"], config["reach"], DTYPES[config["dtype"]]
    rows, seq_lens = draw_lengths(rng, config)
    scale = config["size"] ** -0.5 * rng.choice((1, 3))
    told |= {"rows": rows, "seq_lens": seq_lens, "scale": scale}
    batch, total = make_batch(rng, rows, seq_lens, reach)
    kv = make_cache(rng, gen, config, seq_lens)
    q, _ = make_queries(gen, config, batch, total)
    requests = len(rows)
    workspace = allocate_sampled(requests, q.shape[1], heads, reach, config["num_rows"], DEVICE)
    into = allocate_gathered(requests, heads, reach, DEVICE)
    for tensor in (workspace.partial, workspace.diagonals, workspace.bands, into.logits, into.block_max):
        tensor.fill_(float("nan"))
    tiles = None if config["tiles"] == "table" else Settings(32, 32, 4, 1)
    check_sampled(q, kv, batch, workspace, into, scale)
    sampled(q, kv, batch, workspace, into, scale=scale, config=tiles)
    k_scale = factor(kv.k_scale)
    for i, (count, n, start) in enumerate(zip(rows, seq_lens, batch.row_start.tolist(), strict=True)):
        if not count:
            continue
        k, _ = contiguous(kv, i, n, dtype)
        row = torch.tensor(naive_sampled.sampled_rows(count, config["num_rows"]), device=DEVICE)
        distance = (row + n - count).unsqueeze(1) - torch.arange(n, device=DEVICE)
        causal = distance >= 0
        columns = torch.empty(heads, n, dtype=torch.float64, device=DEVICE)
        diagonals = torch.zeros_like(columns)
        for head in range(heads):
            queries = q[start + row, head * group : (head + 1) * group].double()
            logits = torch.einsum("tgd,nd->gtn", queries, k[:, head].double()) * (scale * k_scale)
            probs = logits.masked_fill_(~causal, float("-inf")).softmax(-1).mean(0) / len(row)
            columns[head] = probs.sum(0)
            diagonals[head].index_add_(0, distance.clamp(min=0).flatten(), probs.flatten())
        found = into.logits[i, :, :, :n].double().softmax(-1)
        for name, one, wanted in (("columns", found[0], columns), ("diagonals", found[1].flip(-1), diagonals)):
            # Relative to the probability, or to a twentieth of the mean one. Those along diagonals are rounded to
            # float16 once, 2**-11; nothing else is but to float32, so both get the limit of the tests.
            error = (one - wanted).abs() / (wanted + 0.05 / n)
            check.measure(name, float(error.nan_to_num(nan=math.inf).max()), 2e-3)
        padded = F.pad(into.logits[i, :, :, :n], (0, -n % 1024), value=float("-inf"))
        wanted = padded.unflatten(-1, (-1, 1024)).amax(-1)
        check.same("block maxima", into.block_max[i, ..., : wanted.shape[-1]], wanted)
        if n * count * q.shape[1] <= 300_000:
            by_naive = naive_sampled.sampled(
                q[start : start + count].float(), k.float(), scale=scale * k_scale, num_rows=config["num_rows"]
            )
            for one, wanted in zip(by_naive, (columns, diagonals), strict=True):
                check.measure("between the references", float(((one - wanted).abs() / (wanted + 0.05 / n)).max()), 1e-3)
            check.by_naive += 1
    if min(rows):
        tau, budgets = draw_tau(rng, heads), draw_budgets(rng, reach)
        told |= {"tau": tau.tolist(), "budgets": budgets._asdict()}
        pattern = SparsePattern(block_q=16, block_k=1, window=1, sinks=0, dense_last=0)
        index = allocate_index(requests, heads, reach, pattern, DEVICE)
        index.flags.fill_(77)
        scratch = allocate_select(requests, heads, reach, DEVICE)
        check_select(into, batch, tau, index, scratch, budgets)
        select(into, batch, tau, index, scratch, budgets=budgets)
        for i, n in enumerate(seq_lens):
            check_choice(check, into.logits[i, :, :, :n], index.flags[i, :, :, :n], tau, budgets)


def draw_recall(rng: random.Random, tiny: bool) -> Params:
    config = draw_sampled(rng, tiny) | draw_pattern_shape(rng, tiny)
    config["num_rows"] = rng.choice((1, 5, 16))
    config["splits"] = rng.choice((1, 4)) if tiny else SPLITS  # an empty program takes the interpreter long
    return config


def run_recall(config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params) -> None:
    """What selections cover of the attention of a few rows."""
    heads, group, reach, dtype = config["heads"], config["group"], config["reach"], DTYPES[config["dtype"]]
    rows, seq_lens = draw_lengths(rng, config)
    pattern, scale = draw_pattern(rng, config), config["size"] ** -0.5 * rng.choice((1, 3))
    batch, total = make_batch(rng, rows, seq_lens, reach)
    kv = make_cache(rng, gen, config, seq_lens)
    q, _ = make_queries(gen, config, batch, total)
    chosen = [choose(rng, gen, heads, n) for n in seq_lens]
    told |= {"rows": rows, "seq_lens": seq_lens, "scale": scale, "pattern": str(pattern)}
    told["kinds"] = [one.kinds for one in chosen]
    index = make_index(rng, config, kv, batch, chosen, pattern)
    workspace = allocate_recall(len(rows), q.shape[1], heads, config["num_rows"], DEVICE)
    workspace = workspace._replace(partial=workspace.partial[..., : config["splits"], :].contiguous())
    workspace.partial.fill_(float("nan"))
    totals = torch.zeros(2, device=DEVICE)
    tiles = None if config["tiles"] == "table" else Settings(32, 32, 4, 1)
    check_recall(q, kv, batch, index, workspace, totals, scale)
    recall(q, kv, batch, index, workspace, totals, scale=scale, config=tiles)
    k_scale, expected = factor(kv.k_scale), 0.0
    for i, (count, n, start) in enumerate(zip(rows, seq_lens, batch.row_start.tolist(), strict=True)):
        if not count:
            continue
        k, _ = contiguous(kv, i, n, dtype)
        row = torch.tensor(spread_rows(count, config["num_rows"]), device=DEVICE)
        mask = visible(chosen[i].columns, chosen[i].diagonals, pattern, count)[:, row]
        hidden = torch.arange(n, device=DEVICE) > (row + n - count).unsqueeze(1)
        wanted = torch.empty(heads, dtype=torch.float64, device=DEVICE)
        for head in range(heads):
            queries = q[start + row, head * group : (head + 1) * group].double()
            logits = torch.einsum("tgd,nd->gtn", queries, k[:, head].double()) * (scale * k_scale)
            probs = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
            wanted[head] = (probs * mask[head]).sum(-1).mean()
        expected += float(wanted.sum())
        if n * count * q.shape[1] <= 300_000:
            by_naive = naive_recall.recall(
                q[start : start + count].float(), k.float(), chosen[i].selection.below(n), pattern,
                scale=scale * k_scale, num_rows=config["num_rows"],
            )  # fmt: skip
            check.measure("between the references", float((by_naive - wanted).abs().max()), 1e-4)
            check.by_naive += 1
    check.equal("number", float(totals[1]), float(heads * sum(count > 0 for count in rows)))
    check.measure("recall", abs(float(totals[0]) - expected) / max(float(totals[1]), 1.0), 1e-3)


# Small kernels


def draw_forget(rng: random.Random, tiny: bool) -> Params:
    return {"dtype": rng.choice(["float32", "bfloat16", "float16"]), "width": rng.choice((2, 4, 6, 8, 16, 32))}


def run_forget(config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params) -> None:
    slots, tokens = rng.randint(1, 5000), rng.choice((0, 1, 63, 64, 65, rng.randint(0, 3000)))
    wide = config["width"] + rng.choice((0, 2))
    told |= {"slots": slots, "tokens": tokens, "row": wide}
    logits = torch.randn(slots, wide, generator=gen, device=DEVICE).to(DTYPES[config["dtype"]])
    chosen = torch.randperm(slots, generator=gen, device=DEVICE)[:tokens]
    chosen[:: rng.choice((2, 5, 1000))] = -1
    wanted = logits.clone()
    paged_forget.forget(wanted[:, : config["width"]], chosen)
    forget(logits[:, : config["width"]], chosen)
    check.same("missing", logits.isnan(), wanted.isnan())
    check.same("values", logits.nan_to_num(), wanted.nan_to_num())


def draw_guard(rng: random.Random, tiny: bool) -> Params:
    config = draw_merge(rng, tiny)
    return config | {"reach": min(config["reach"], 4096), "counts": rng.random() < 0.7}


def run_guard(config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params) -> None:
    heads = config["heads"]
    pattern = draw_pattern(rng, config)
    rows, seq_lens = draw_lengths(rng, config)
    limit = rng.choice((0.05, 0.3, 0.9, 1.0, rng.uniform(0.01, 1.0)))
    told |= {"rows": rows, "seq_lens": seq_lens, "pattern": str(pattern), "max_density": limit}
    batch, _ = make_batch(rng, rows, seq_lens, config["reach"])
    kv = make_cache(rng, gen, config, seq_lens)
    chosen = [choose(rng, gen, heads, n) for n in seq_lens]
    told["chosen"] = [one.kinds for one in chosen]
    index = make_index(rng, config, kv, batch, chosen, pattern)
    requests = len(rows)
    dense_rows = torch.full((2 * requests + 2,), -7, dtype=torch.int32, device=DEVICE)
    sparse_end = torch.full((requests + 1,), -7, dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([5, 1], device=DEVICE) if config["counts"] else None
    guard(index, batch, limit, dense_rows=dense_rows, sparse_end=sparse_end, counts=counts)
    pairs, chunks = 5, 1
    starts, ends = batch.row_start.tolist(), batch.row_end.tolist()
    for i, (count, n) in enumerate(zip(rows, seq_lens, strict=True)):
        said = dense_rows[2 * i : 2 * i + 2].tolist()
        dense = said[1] != 0
        if count:
            selection = Selection(*(x.cpu() for x in chosen[i].selection)).below(n)
            density = expected_density(selection, pattern, count, n)
            if abs(density - limit) > 1e-5:  # nearer than that the device, in float32, may decide either way
                dense = density > limit
        check.equal(f"dense rows of request {i}", said, [0, count if dense else 0])
        check.equal(f"end of the sparse rows of request {i}", int(sparse_end[i]), starts[i] if dense else ends[i])
        pairs += heads * SparsePattern.causal_pairs(count, n) if dense and count else 0
        chunks += int(dense and count > 0)
    if counts is not None:
        check.equal("counts", counts.tolist(), [pairs, chunks])
    check.equal("entries of no request", [*dense_rows[-2:].tolist(), int(sparse_end[-1])], [-7, -7, -7])


def draw_mass(rng: random.Random, tiny: bool) -> Params:
    config = draw_shape(rng, tiny, ["bfloat16", "float16", "float32"], {})
    config["reach"] = min(config["reach"], 2000)
    fits = config["size"] <= 128
    tiles = rng.choice(((16, 16), (32, 64), (64, 32), (64, 64), None)) if fits else None
    return config | {"tiles": tiles, "given": rng.random() < 0.5, "maximum": rng.random() < 0.5}


def make_sequence(
    config: Params, rng: random.Random, gen: torch.Generator, told: Params
) -> tuple[Tensor, Tensor, Params, Tensor | None, Settings | None]:
    """Queries and keys of a sequence, a range of its rows, and perhaps the log-sum-exps of those rows alone."""
    heads, group, size, reach = (config[name] for name in ("heads", "group", "size", "reach"))
    longest = max(1, min(reach, math.isqrt(WORK // (heads * group))))
    n = min(longest, rng.choice((1, 17, 63, 64, 65, rng.randint(1, 200), rng.randint(1, longest), longest)))
    start = rng.choice((0, rng.randrange(n)))
    end = rng.choice((None, n, rng.randint(start + 1, n)))
    options: Params = {"scale": rng.choice((0.3, 0.1)), "row_start": start, "row_end": end}
    told |= {"n": n, **options}
    dtype = DTYPES[config["dtype"]]
    q = torch.randn(n, heads * group, size, generator=gen, device=DEVICE).to(dtype)
    k = torch.randn(n, heads, size, generator=gen, device=DEVICE).to(dtype)
    lse = None
    if config["given"]:
        causal = torch.ones(n, n, dtype=torch.bool, device=DEVICE).tril().expand(heads, n, n)
        lse = masked_attention(q, k, k, causal, options["scale"])[1].float()
        lse[:start] = float("nan")  # rows outside the range are not read
        lse[n if end is None else end :] = float("nan")
    tiles = None if config["tiles"] is None else Settings(config["tiles"][0], config["tiles"][1], 4, 1)
    return q, k, options, lse, tiles


def check_mass(check: Check, name: str, found: Tensor, wanted: Tensor) -> None:
    # As the tests: 2e-4 of the value and 1e-7.
    error = (found.double() - wanted.double()).abs() / (wanted.double() + 5e-4)
    check.measure(name, float(error.nan_to_num(nan=math.inf).max()) if error.numel() else 0.0, 2e-4)


def run_mass(config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params) -> None:
    q, k, options, lse, tiles = make_sequence(config, rng, gen, told)
    wanted = naive_mass.mass_sums(q, k, **options)  # float64 inside, a matrix a head
    columns, diagonals = mass_sums(q, k, **options, lse=lse, config=tiles, with_columns=config["maximum"])
    if config["maximum"]:
        check_mass(check, "columns", columns, wanted[0])
    else:
        check.equal("shape without columns", tuple(columns.shape), (config["heads"], 0))
    check_mass(check, "diagonals", diagonals, wanted[1])
    check.by_naive += 1


def run_peak(config: Params, rng: random.Random, gen: torch.Generator, check: Check, told: Params) -> None:
    q, k, options, lse, tiles = make_sequence(config, rng, gen, told)
    near = rng.choice((0, 1, rng.randint(0, q.shape[0] + 3)))
    told["min_distance"] = near
    options |= {"reduce": "max" if config["maximum"] else "sum", "min_distance": near}
    found = column_weights(q, k, **options, lse=lse, config=tiles)
    check_mass(check, options["reduce"], found, naive_mass.column_weights(q, k, **options))
    check.by_naive += 1


# The run

Draw = Callable[[random.Random, bool], Params]
Run = Callable[[Params, random.Random, torch.Generator, Check, Params], None]


class Operation(NamedTuple):
    """How to draw compile-time parameters and run a problem; turns a worker takes at it in a round."""

    draw: Draw
    run: Run
    turns: int


OPERATIONS = {
    "attend": Operation(draw_attend, run_attend, 5),
    "hopper": Operation(draw_hopper, run_hopper, 5),
    "attend_tiles": Operation(draw_tiles, run_tiles, 5),
    "attend_tiles_hopper": Operation(draw_tiles_hopper, run_tiles_hopper, 5),
    "tiles": Operation(draw_chain, run_chain, 4),
    "score": Operation(draw_score, run_score, 2),
    "sampled": Operation(draw_sampled, run_sampled, 2),
    "recall": Operation(draw_recall, run_recall, 1),
    "select": Operation(draw_select, run_select, 2),
    "merge": Operation(draw_merge, run_merge, 2),
    "forget": Operation(draw_forget, run_forget, 1),
    "guard": Operation(draw_guard, run_guard, 1),
    "mass": Operation(draw_mass, run_mass, 1),
    "peak": Operation(draw_mass, run_peak, 1),
}


def available() -> list[str]:
    """Operations that this machine can run."""
    return [name for name in OPERATIONS if not name.endswith("hopper") or on_hopper()]


@dataclass
class Result:
    """One problem."""

    operation: str
    seed: int
    dtype: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    yardstick: float | None = None
    by_naive: int = 0
    faults: list[str] = field(default_factory=list)
    params: Params = field(default_factory=dict)
    raised: bool = False


def solve(name: str, seed: int, tiny: bool) -> Result:
    """Runs a problem and compares; never raises for a broken kernel."""
    operation, check, result = OPERATIONS[name], Check(), Result(name, seed)
    told: Params = {}
    try:
        config = operation.draw(random.Random(f"{name} {seed // PER_CONFIG}"), tiny)
        result.params = {"config": config, "problem": told}
        result.dtype = str(config.get("cache", config.get("dtype", "")))
        gen = torch.Generator(DEVICE).manual_seed(seed)
        operation.run(config, random.Random(f"{name} problem {seed}"), gen, check, told)
    except Exception as error:  # what a kernel may raise is open: compilers, drivers, checks
        result.raised = True
        where = "".join(traceback.format_exception(error)[-3:])
        check.faults.append(f"{type(error).__name__}: {error}"[:2000] + "\n" + where[-2000:])
    result.errors, result.limits, result.yardstick = check.errors, check.limits, check.yardstick
    result.by_naive, result.faults = check.by_naive, check.faults
    return result


def is_broken() -> bool:
    """Whether an error has spoilt this process's CUDA context for good."""
    try:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.zeros(1, device=DEVICE).item()
    except Exception:  # any error says the same
        return True
    return False


def work(pipe: Connection, number: int, seed: int, end: float, tiny: bool, names: list[str]) -> None:
    """A worker: configurations in turn, problems of each, until the time is over."""
    torch.set_num_threads(1)
    # Turns of one operation apart from each other, and workers at different places of the round.
    turns = sorted(
        (turn / OPERATIONS[name].turns + i / 100, name)
        for i, name in enumerate(names)
        for turn in range(1 if tiny else OPERATIONS[name].turns)
    )
    step = number * 5
    while time.time() < end:
        name = turns[step % len(turns)][1]
        first = ((seed * 1000 + number) * 100_000 + step) * PER_CONFIG
        step += 1
        for one in range(first, first + (PER_CONFIG_TINY if tiny else PER_CONFIG)):
            if time.time() >= end:
                break
            pipe.send((name, one))
            result = solve(name, one, tiny)
            pipe.send(result)
            if result.raised:
                if is_broken():
                    return
                break  # the other problems of this configuration would say the same
    pipe.send(None)


class Team:
    """Worker processes and what they report."""

    def __init__(self, seed: int, seconds: float, tiny: bool, names: list[str]) -> None:
        self.seed, self.tiny, self.names = seed, tiny, names
        self.end = time.time() + seconds
        self.results: list[Result] = []
        self.spawn = multiprocessing.get_context("spawn")
        self.alive: dict[Connection, Any] = {}
        self.current: dict[Connection, tuple[str, int]] = {}
        self.started = 0

    def start(self) -> None:
        ours, theirs = self.spawn.Pipe(duplex=False)
        arguments = (theirs, self.started, self.seed, self.end, self.tiny, self.names)
        process = self.spawn.Process(target=work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self.alive[ours] = process
        self.started += 1

    def _fail(self, pipe: Connection, why: str) -> None:
        name, seed = self.current.get(pipe, ("a worker before its first problem", 0))
        self.results.append(Result(name, seed, faults=[why]))

    def _ended(self, pipe: Connection) -> None:
        """The pipe broke: the process has died, or spoilt its context; another takes its place for the time left."""
        process = self.alive.pop(pipe)
        process.join(10)
        if process.exitcode:
            self._fail(pipe, f"the process ended with status {process.exitcode}")
        if time.time() < self.end and self.started < 100:
            self.start()

    def run(self, workers: int) -> None:
        for _ in range(workers):
            self.start()
        while self.alive:
            for pipe in wait(list(self.alive), timeout=1.0):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except EOFError:
                    self._ended(pipe)
                    continue
                if message is None:
                    self.alive.pop(pipe).join(10)
                elif isinstance(message, tuple):
                    self.current[pipe] = message
                else:
                    self.results.append(message)
                    for fault in message.faults:
                        print(f"{message.operation}:{message.seed}: {fault}", flush=True)
            if time.time() > self.end + GRACE:
                for pipe, process in self.alive.items():
                    self._fail(pipe, f"not finished {GRACE:.0f} seconds after the end: hangs, or compiles for long")
                    process.kill()
                self.alive.clear()


def spread(values: list[float]) -> dict[str, float]:
    return {"max": max(values), "median": statistics.median(values)} if values else {}


def summarize(results: list[Result]) -> Params:
    """By operation, and within it by type: problems, failures, errors."""
    report: Params = {}
    for name in dict.fromkeys([*OPERATIONS, *(one.operation for one in results)]):
        mine = [one for one in results if one.operation == name]
        if not mine:
            continue
        by_type: Params = {}
        for dtype in sorted({one.dtype for one in mine}):
            of_type = [one for one in mine if one.dtype == dtype]
            quantities = sorted({key for one in of_type for key in one.errors})
            by_type[dtype] = {
                "problems": len(of_type),
                "errors": {
                    key: spread([one.errors[key] for one in of_type if key in one.errors])
                    | {"limit": max((one.limits[key] for one in of_type if key in one.limits), default=None)}
                    for key in quantities
                },
                "yardstick": spread([one.yardstick for one in of_type if one.yardstick is not None]),
            }
        report[name] = {
            "problems": len(mine),
            "configurations": len({one.seed // PER_CONFIG for one in mine}),
            "compared_with_naive": sum(one.by_naive for one in mine),
            "failures": [
                {"repeat": f"{one.operation}:{one.seed}", "faults": one.faults, **one.params}
                for one in mine
                if one.faults
            ],
            "by_dtype": by_type,
        }
    return report


def print_table(report: Params) -> None:
    print(
        f"{'operation':<21}{'type':<15}{'problems':>9}{'failed':>8}  {'largest error of':<24}{'error':>10}{'limit':>10}"
    )
    for name, found in report.items():
        failed = len(found["failures"])
        for i, (dtype, one) in enumerate(found["by_dtype"].items()):
            worst = max(
                one["errors"].items(), key=lambda item: item[1]["max"] / (item[1]["limit"] or math.inf), default=None
            )
            line = f"{name if i == 0 else '':<21}{dtype:<15}{one['problems']:>9}{failed if i == 0 else '':>8}"
            if worst is not None:
                limit = "" if worst[1]["limit"] is None else f"{worst[1]['limit']:.1e}"
                line += f"  {worst[0]:<24}{worst[1]['max']:>10.2e}{limit:>10}"
            print(line)
    for name in ("attend", "hopper"):
        for dtype, one in report.get(name, {}).get("by_dtype", {}).items():
            if one["yardstick"] and "output" in one["errors"]:
                ours, stock = one["errors"]["output"], one["yardstick"]
                print(
                    f"{name} {dtype}: error {ours['max']:.2e} at most, {ours['median']:.2e} median; "
                    f"torch's attention under the same masks {stock['max']:.2e} and {stock['median']:.2e}"
                )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    try:
        found["vllm-vsprefill"] = metadata.version("vllm-vsprefill")
    except metadata.PackageNotFoundError:
        found["vllm-vsprefill"] = "not installed"
    return found | {"cuda": str(torch.version.cuda)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0, help="no problem starts later")
    parser.add_argument("--workers", type=int, default=12, help="processes on the device, a core each")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other problems")
    parser.add_argument("--only", nargs="+", choices=list(OPERATIONS), help="operations; all by default")
    parser.add_argument("--out", type=Path, help="report, as JSON")
    parser.add_argument("--tiny", action="store_true", help="sizes for Triton's interpreter")
    parser.add_argument("--repeat", metavar="OPERATION:SEED", help="run this problem alone and print all about it")
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.tiny:
        parser.error("there is no CUDA device; --tiny runs small problems under Triton's interpreter")

    if arguments.repeat:
        name, _, seed = arguments.repeat.partition(":")
        if name not in OPERATIONS or not seed.isdigit():
            parser.error(f"--repeat must be an operation and a seed like attend:123, got {arguments.repeat!r}")
        result = solve(name, int(seed), arguments.tiny)
        print(json.dumps(vars(result), indent=1))
        return 1 if result.faults else 0

    names = [name for name in available() if not arguments.only or name in arguments.only]
    skipped = [name for name in arguments.only or OPERATIONS if name not in names]
    for name in skipped:
        print(f"{name}: skipped, it needs a device of compute capability 9.0")
    if not names:
        return 0
    team = Team(arguments.seed, arguments.seconds, arguments.tiny, names)
    began = time.time()
    team.run(arguments.workers)
    report = summarize(team.results)
    print_table(report)
    failures = sum(len(one["failures"]) for one in report.values())
    missing = [name for name in names if name not in report]
    print(
        f"{len(team.results)} problems in {time.time() - began:.0f} s, {failures} failed"
        + (f"; no problem of {', '.join(missing)}: more --seconds" if missing else "")
    )
    if arguments.out:
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu (interpreter)"
        facts = environment.describe()
        head = {key: facts[key] for key in ("date", "command", "commit")}
        head |= {"versions": versions(), "device": device, "seed": arguments.seed, "tiny": arguments.tiny}
        head |= {"seconds": arguments.seconds, "workers": arguments.workers, "skipped": skipped}
        arguments.out.write_text(json.dumps(head | {"operations": report}, indent=1) + "\n")
    # An operation that never had its turn has not been checked.
    return 1 if failures or missing else 0


if __name__ == "__main__":
    sys.exit(main())
