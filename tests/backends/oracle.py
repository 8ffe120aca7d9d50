# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What a layer under test must compute, on any platform: plain attention, or the reference over the same selection."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.backends.simulator import LayerUnderTest, Request
from vllm_vsprefill.backends.cpu import CPURuntime
from vllm_vsprefill.kernels.attend_tiles import naive as attend_tiles
from vllm_vsprefill.kernels.rank import naive as rank
from vllm_vsprefill.kernels.score.naive import score
from vllm_vsprefill.kernels.types import Bars, IndexerLayerWeights, Selection, SparsePattern
from vllm_vsprefill.kernels.variance import naive as variance
from vllm_vsprefill.prefill.cpu import REFERENCE, CPUPrefill
from vllm_vsprefill.prefill.cpu_tiles import CPUTilePrefill
from vllm_vsprefill.recall_check import ROWS

TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def layer_with(
    model: Path, indexer: Path, folder: Path, options: dict[str, Any], estimator: str, **settings: Any
) -> LayerUnderTest:
    """A layer with these options and estimator; ``folder`` is for torch.distributed."""
    chosen = {**options, "estimator": estimator}
    if estimator == "vsindexer":
        chosen["checkpoint"] = str(indexer)
    return LayerUnderTest(model, folder / "rendezvous", chosen, **settings)


def dense(layer: LayerUnderTest, request: Request, rows: int) -> Tensor:
    """Plain causal attention of the last computed rows, float64."""
    n = request.computed
    group = layer.num_heads // layer.num_kv_heads
    query = request.query[n - rows : n].double()
    key = request.key[:n].double().repeat_interleave(group, 1)
    value = request.value[:n].double().repeat_interleave(group, 1)
    weights = torch.einsum("thd,nhd->htn", query, key) * layer.impl.scale
    hidden = torch.arange(n) > torch.arange(n - rows, n)[:, None]
    return torch.einsum("htn,nhd->thd", weights.masked_fill(hidden, float("-inf")).softmax(-1), value)


def causal_pairs(layer: LayerUnderTest, request: Request, rows: int) -> int:
    """(row, key) pairs of the last computed rows, over all KV heads."""
    n = request.computed
    return layer.num_kv_heads * sum(range(n - rows + 1, n + 1))


def reference_prefill(layer: LayerUnderTest, **changes: Any) -> CPUPrefill:
    """The prefill by plain PyTorch, with the layer's options."""
    runtime = layer.impl._runtime
    settings = {"sampled_rows": runtime.options.sampled_rows, "max_density": runtime.options.max_density, **changes}
    return CPUPrefill(runtime.pattern, runtime.budgets, operations=REFERENCE, **settings)


def columns_of(runtime: CPURuntime) -> CPUPrefill:
    """The prefill of a backend that chooses columns and diagonals."""
    assert isinstance(runtime.prefill, CPUPrefill)
    return runtime.prefill


def chosen(layer: LayerUnderTest, request: Request, rows: int, **changes: Any) -> Selection | None:
    """What follows from the logits beside the cache (or from sampled queries), for rows before the dense last ones;
    None where it exceeds ``max_density``."""
    n, tail = request.computed, layer.impl._runtime.options.dense_last_rows
    sparse, prefill = layer.impl._sparse, reference_prefill(layer, **changes)
    query, key, value = request.query[n - rows : n], request.key[:n], request.value[:n]
    if sparse.weights is None:
        q, k = query.float(), key.float()
        if isinstance(layer.impl._runtime, CPURuntime):  # the very numbers the backend used, as below
            prefill, q, k = columns_of(layer.impl._runtime), query, key
        estimate = prefill.operations.sampled(q, k, scale=layer.impl.scale, num_rows=prefill.sampled_rows)
    else:
        expected = score(key, value, IndexerLayerWeights(*(part.cpu() for part in sparse.weights)))
        logits = expected
        if layer.side is not None:
            # The numbers the backend used, so that rounding cannot tip a threshold; they must be right too.
            logits = layer.cached_logits(request)
            close = 1e-4 if layer.dtype == torch.float32 else 0.1
            torch.testing.assert_close(logits, expected, atol=close, rtol=close)
        estimate = prefill.operations.distributions(logits)
    return prefill.guard(prefill.select(sparse.tau.cpu(), *estimate, tail), rows - tail, n - tail)


def recall(layer: LayerUnderTest, request: Request, rows: int) -> Tensor:
    """Share of the true attention of some rows of a sparse chunk that was covered, ``[Hkv]``."""
    n, tail = request.computed, _tail(layer)
    selection = chosen(layer, request, rows)
    assert selection is not None
    query, key = request.query[n - rows : n].float(), request.key[:n].float()
    return reference_prefill(layer).recall(query, key, selection, rows - tail, scale=layer.impl.scale, num_rows=ROWS)


def relative_of(indexer: Path, folder: Path, **thresholds: Any) -> Path:
    """A copy of an indexer that was trained on another model of the same shapes, with thresholds of ``balanced``."""
    shutil.copytree(indexer, folder)
    config = json.loads((folder / "config.json").read_text())
    config["identity"]["weights"] = "0" * 32
    config["thresholds"] = {"balanced": thresholds}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Decisions:
    """Takes down what the ``priced`` estimator of a layer decides: from which score on tiles list a key.

    The numbers that the backend used, so that rounding cannot tip the choice of a bar; they are tested with ``price``.
    """

    def __init__(self, layer: LayerUnderTest) -> None:
        self.layer = layer
        self._calls: list[Bars] = []
        self._of: dict[int, tuple[Bars, SparsePattern]] = {}  # by id of the request

    @classmethod
    def of(cls, layer: LayerUnderTest) -> Decisions:
        """Those of a layer, from now on or from when they were first asked for."""
        found = getattr(layer, "decisions", None)
        if found is None:
            found = layer.decisions = cls(layer)  # type: ignore[attr-defined]
            if layer.impl._runtime.lists_by_tile:
                found._listen()
        assert isinstance(found, cls)
        return found

    def _listen(self) -> None:
        runtime = self.layer.impl._runtime
        on_host = isinstance(runtime, CPURuntime)
        prefill: Any = runtime.prefill if on_host else runtime.prefill_on(self.layer.device)
        price = prefill.operations.price

        def on_device(q: Tensor, kv: Any, batch: Any, index: Any, *args: Any, **kwargs: Any) -> None:
            price(q, kv, batch, index, *args, **kwargs)
            self._calls.append(Bars(index.bars.cpu().clone(), index.density.cpu().clone()))

        def here(*args: Any, **kwargs: Any) -> Bars:
            bars: Bars = price(*args, **kwargs)
            self._calls.append(Bars(bars.scores[None], bars.density[None]))
            return bars

        prefill.operations = prefill.operations._replace(price=here if on_host else on_device)

    def file(self, work: list[tuple[Request, int]]) -> None:
        """After a step: whose decisions its rounds were."""
        step, runtime = self.layer.metadata.vsprefill, self.layer.impl._runtime
        if step is None or not runtime.lists_by_tile:
            return
        calls = self._calls[len(self._calls) - len(step.rounds) :]  # before them, those of warming up
        bars = [Bars(scores, density) for call in calls for scores, density in zip(*call, strict=True)]
        if not isinstance(runtime, CPURuntime):
            tiling = runtime.prefill_on(self.layer.device).buffers.tiling
        for rows, one in zip(step.plan.sparse, bars, strict=True):
            pattern = runtime.pattern if isinstance(runtime, CPURuntime) else tiling.of(rows.seq_len)
            self._of[id(work[rows.request][0])] = one, pattern
        self._calls.clear()

    def last(self, request: Request) -> tuple[Bars, SparsePattern]:
        """What was decided for a request's last sparse chunk, and the tiles that it was cut into."""
        return self._of[id(request)]


def step(layer: LayerUnderTest, work: list[tuple[Request, int]], *args: Any) -> list[Tensor]:
    """``layer.step``, of which ``reference`` knows the bars."""
    decisions = Decisions.of(layer)
    outputs = layer.step(work, *args)
    decisions.file(work)
    return outputs


def listed(layer: LayerUnderTest, request: Request, rows: int) -> Tensor | None:
    """Keys that the tiles of a sparse chunk list, bool ``[Hkv, tiles, n]``, without the dense last rows; None where
    the choice exceeds ``max_density``."""
    runtime, n = layer.impl._runtime, request.computed
    tail, scale = runtime.options.dense_last_rows, layer.impl.scale
    bars, pattern = Decisions.of(layer).last(request)
    if float(bars.density.mean()) > runtime.options.max_density:
        return None
    query, key = request.query[n - rows : n - tail], request.key[: n - tail]
    operation, term = rank.rank, variance.variance
    if isinstance(runtime, CPURuntime):  # keys on a bar are on the side where the backend put them
        assert isinstance(runtime.prefill, CPUTilePrefill)
        operation, term = runtime.prefill.operations.rank, runtime.prefill.operations.variance
    prior = term(query, key, scale=scale, pattern=pattern) if pattern.variance else None
    return operation(query, key, bars.scores, scale=scale, pattern=pattern, prior=prior)


def tile_keys(layer: LayerUnderTest, request: Request, rows: int) -> float | None:
    """Keys before its window that a tile attends to, mean of tiles and KV heads; None where it has no list."""
    found = listed(layer, request, rows)
    if found is None:
        return None
    _, pattern = Decisions.of(layer).last(request)
    total = 0
    for lists in found:
        for tile, keys in zip(pattern.tiles(rows - _tail(layer), found.shape[2]), lists, strict=True):
            seen = keys.clone()
            seen[: pattern.sink_keys] = True
            total += int(seen[: pattern.window_start(tile * pattern.block_q)].sum())
    return total / found.shape[0] / found.shape[1]


def _tail(layer: LayerUnderTest) -> int:
    return int(layer.impl._runtime.options.dense_last_rows)


def reference(layer: LayerUnderTest, request: Request, rows: int) -> tuple[Tensor, int]:
    """A sparse chunk's rows, the dense last ones among them, and the pairs computed for them."""
    tail, n = layer.impl._runtime.options.dense_last_rows, request.computed
    by_tile = layer.impl._runtime.lists_by_tile
    selection = listed(layer, request, rows) if by_tile else chosen(layer, request, rows)
    if selection is None:
        return dense(layer, request, rows), causal_pairs(layer, request, rows)
    query, key, value = (getattr(request, name)[:n].double() for name in ("query", "key", "value"))
    if isinstance(selection, Tensor):
        _, pattern = Decisions.of(layer).last(request)
        sparse, visited = attend_tiles.attend_tiles(
            query[n - rows : n - tail], key[: n - tail], value[: n - tail], selection, pattern, scale=layer.impl.scale
        )
    else:
        sparse, visited = reference_prefill(layer).attend(
            query[n - rows :], key, value, selection, rows - tail, scale=layer.impl.scale
        )
    pairs = int(visited) + causal_pairs(layer, request, tail)
    return (torch.cat((sparse, dense(layer, request, tail))) if tail else sparse), pairs


def check(
    layer: LayerUnderTest,
    work: list[tuple[Request, int]],
    prefilling: list[bool] | None = None,
    rejected: int = 0,
    tolerance: float | None = None,
) -> tuple[int, int]:
    """Run a step and compare every row; how many requests ran sparse and dense."""
    gate = layer.impl._runtime.gate
    flags = prefilling or [request.computed < request.prompt for request, _ in work]
    sparse = [
        gate.admits(rows, request.computed + rows, flag) for (request, rows), flag in zip(work, flags, strict=True)
    ]
    outputs = step(layer, work, prefilling, rejected)
    for (request, rows), output, is_sparse in zip(work, outputs, sparse, strict=True):
        expected = reference(layer, request, rows)[0] if is_sparse else dense(layer, request, rows)
        error = float((output.double() - expected).norm() / expected.norm())
        assert error < (tolerance or TOLERANCE[layer.dtype]), (
            f"{rows} rows at {request.computed}, sparse={is_sparse}: {error:.2e}"
        )
    return sum(sparse), len(sparse) - sum(sparse)
