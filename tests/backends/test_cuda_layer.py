# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The CUDA backend, driven with batches over random block tables, against the reference over the same selection."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.backends import flash, oracle, simulator
from tests.backends.oracle import check, dense
from tests.backends.simulator import LayerUnderTest
from tests.kernels.interpreted import DEVICE
from vllm_vsprefill import recall_check
from vllm_vsprefill.backends import cuda_probe, cuda_runtime
from vllm_vsprefill.kernels.price import paged as price_paged
from vllm_vsprefill.kernels.recall import paged as recall_paged
from vllm_vsprefill.kernels.tile_index import TileIndex
from vllm_vsprefill.prefill import tiles
from vllm_vsprefill.worth import Worth

pytestmark = [flash.needs_kernels, pytest.mark.gpu] if DEVICE == "cuda" else [flash.needs_kernels]

OPTIONS: dict[str, Any] = {
    "min_seq_len": 128,
    "min_pairs": 0,
    "min_rows": 0,
    "window": 24,
    "sinks": 8,
    "dense_last_rows": 16,
    "block_q": 32,
    "block_k": 8,
    "tau_columns": 0.5,
    "tau_diagonals": 0.02,
    "min_columns": 8,
    "min_diagonals": 1,
    "max_diagonals": 4,
    "max_density": 1.0,
    "sampled_rows": 16,
    # As on a GPU; the platform is a CPU where there is none
    "tile_parts": 1,
    "tile_variance": False,
    "price": 1.0,  # queries and keys are random: what is left out is missed
}
ESTIMATORS = ["vsindexer", "sampled", "priced"]
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"


@pytest.fixture
def make_layer(
    single_process: Path, random_model: Path, random_indexer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    flash.install(monkeypatch)
    if DEVICE == "cpu":
        # The interpreter takes as long for an empty program as for one with work.
        monkeypatch.setattr(price_paged, "PROGRAMS", 1)

    def make(estimator: str = "vsindexer", options: dict[str, Any] | None = None, **settings: Any) -> LayerUnderTest:
        settings = {"dtype": DTYPE, "device": DEVICE, **settings}
        indexer = settings.pop("indexer", random_indexer)
        return oracle.layer_with(random_model, indexer, tmp_path, {**OPTIONS, **(options or {})}, estimator, **settings)

    return make


def totals(layer: LayerUnderTest) -> Any:
    """Counts of the layer as they are published."""
    layer.impl._runtime.drain()
    time.sleep(0.3)  # the reader's own thread may have been faster
    return layer.impl._runtime.recorder._totals[1]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sparse_is_not_dense(make_layer: Any, estimator: str) -> None:
    """The options of these tests do leave attention out; otherwise they would show nothing."""
    layer = make_layer(estimator)
    request = layer.request(400)
    (output,) = layer.step([(request, 400)])
    difference = (output.double() - dense(layer, request, 400)).norm() / output.double().norm()
    assert difference > 0.05
    counts = totals(layer)
    assert counts.sparse_chunks == 1
    assert 0.05 < counts.density < 0.9


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_chunks(make_layer: Any, estimator: str) -> None:
    layer = make_layer(estimator)
    request = layer.request(500)
    ran = [check(layer, [(request, rows)]) for rows in (100, 90, 1, 145, 80, 84)]
    # under min_seq_len; sparse; one row; sparse; sparse; sparse
    assert ran == [(0, 1), (1, 0), (0, 1), (1, 0), (1, 0), (1, 0)]


@pytest.mark.parametrize(("estimator", "order"), [*(("vsindexer", order) for order in range(3)), ("priced", 0)])
def test_mixed_batch(make_layer: Any, estimator: str, order: int) -> None:
    layer = make_layer(estimator)
    running = [layer.request(30, 5), layer.request(200, 5)]
    for request in running:
        check(layer, [(request, request.prompt)])
    work = [
        (running[0], 1),
        (running[1], 1),
        (layer.request(300), 210),
        (layer.request(60), 60),
        (layer.request(150), 150),
    ]
    random.Random(order).shuffle(work)
    assert check(layer, work) == (2, 3)
    # The second chunk of one, the decode of others, in another order.
    work = [
        (request, 1 if request.computed >= request.prompt else request.prompt - request.computed)
        for request, _ in work
        if request.computed < len(request.query)
    ]
    random.Random(order + 3).shuffle(work)
    check(layer, work)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_more_requests_than_fit_a_round(make_layer: Any, monkeypatch: pytest.MonkeyPatch, estimator: str) -> None:
    from vllm_vsprefill.backends import cuda_counts
    from vllm_vsprefill.prefill import buffers

    for module in (buffers, tiles, cuda_counts):
        monkeypatch.setattr(module, "MAX_REQUESTS", 2)
    layer = make_layer(estimator)
    work = [(layer.request(length), length) for length in (150, 200, 70, 180)]
    assert check(layer, work) == (3, 1)
    assert layer.impl._runtime.prefill_on(layer.device).buffers.requests == 2
    assert len(layer.metadata.vsprefill.rounds) == 2
    assert totals(layer).sparse_chunks == 3


@pytest.mark.parametrize("parts", [1, 2])
def test_variance_of_logits_is_added_to_scores(make_layer: Any, parts: int) -> None:
    """Several requests in a step, chunks of one prompt, and rows that the stock kernel computes."""
    layer = make_layer("priced", {"tile_variance": True, "tile_parts": parts})
    buffers = layer.impl._runtime.prefill_on(layer.device).buffers
    pattern = buffers.tiling.of(900)
    assert (pattern.variance, pattern.parts) == (True, parts)
    first = layer.request(900)
    assert check(layer, [(first, 600), (layer.request(60), 60), (layer.request(150), 150)]) == (2, 1)
    assert check(layer, [(first, 300)]) == (1, 0)
    assert bool(buffers.storage.bars[0].isfinite().any())  # shorter sequences list all keys or none


def test_variance_of_logits_moves_what_is_listed(make_layer: Any) -> None:
    """What the test above compares with is not the same without it."""
    layer, other = make_layer("priced"), make_layer("priced", {"tile_variance": True})
    assert layer.impl._runtime.prefill_on(layer.device).buffers.prior is None
    request, like = layer.request(900), other.request(900)
    for name in ("query", "key", "value"):
        getattr(like, name).copy_(getattr(request, name))
    (without,), (added,) = layer.step([(request, 900)]), other.step([(like, 900)])
    assert float((added.double() - without.double()).norm() / without.double().norm()) > 0.01


@pytest.mark.parametrize("estimator", ["vsindexer", "priced"])
def test_prefix_hit_and_reused_blocks(make_layer: Any, estimator: str) -> None:
    layer = make_layer(estimator, num_blocks=24)
    first = layer.request(300)
    check(layer, [(first, 300)])
    second = layer.request(320, like=first, shared=224)
    before = None if layer.side is None else layer.cached_logits(second).clone()
    assert check(layer, [(second, 96)]) == (1, 0)
    if before is not None:
        assert not before.isnan().any()
        torch.testing.assert_close(layer.cached_logits(second)[:224], before)  # scored once
    layer.release(second, keep=8)
    layer.release(first)
    layer.free = sorted(set(layer.free))
    third = layer.request(500)
    assert check(layer, [(third, 250)]) == (1, 0)
    assert check(layer, [(third, 250)]) == (1, 0)


def test_reloaded_weights_leave_the_indexer(make_layer: Any) -> None:
    """``reload_weights`` takes every tensor that was not there before loading away, and puts it back at the end."""
    from vllm.model_executor.model_loader.reload import layerwise

    layer = make_layer()
    request = layer.request(400)
    check(layer, [(request, 200)])
    model = torch.nn.ModuleDict({"attention": layer.layer})
    own = {name: layer.layer._buffers.pop(name) for name in list(layer.layer._buffers) if name.startswith("vsprefill")}
    assert len(own) == 5
    layerwise.record_metadata_for_reloading(model)
    layer.layer._buffers.update(own)
    layerwise.initialize_layerwise_reload(model)
    assert not hasattr(layer.layer, "vsprefill_tau")
    layerwise.finalize_layerwise_reload(model, layer.config.model_config)
    assert all(getattr(layer.layer, name) is tensor for name, tensor in own.items())
    assert check(layer, [(request, 200)]) == (1, 0)


@pytest.mark.parametrize("estimator", ["vsindexer", "priced"])
def test_preempted_and_resumed(make_layer: Any, estimator: str) -> None:
    """A resumed request computes its generated tokens again as if they were prompt."""
    layer = make_layer(estimator)
    request = layer.request(200, 100)
    check(layer, [(request, 200)])
    for _ in range(3):
        check(layer, [(request, 1)])
    layer.release(request)
    assert check(layer, [(request, 203)], prefilling=[True]) == (1, 0)


@pytest.mark.parametrize("rejected", [0, 3])
def test_speculative_verification_is_dense(make_layer: Any, rejected: int) -> None:
    """Rows that verify drafts go to the stock kernel, with the device's lengths where the host's are too long."""
    layer = make_layer()
    running = [layer.request(150, 90), layer.request(260, 90)]
    for request in running:
        check(layer, [(request, request.prompt)])
    assert check(layer, [(running[0], 5), (running[1], 5), (layer.request(220), 220)], None, rejected) == (1, 2)
    assert check(layer, [(running[0], 80), (running[1], 5)], None, rejected) == (0, 2)


def test_verification_alone_is_not_planned(make_layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of drafts only costs the host no look at each request."""
    from vllm_vsprefill.backends import step

    layer = make_layer()
    request = layer.request(150, 20)
    check(layer, [(request, 150)])
    monkeypatch.delattr(step, "plan_step")
    assert check(layer, [(request, 5)]) == (0, 1)
    assert layer.metadata.vsprefill is None


def test_only_decodes_have_no_plan(make_layer: Any) -> None:
    layer = make_layer()
    request = layer.request(200, 3)
    check(layer, [(request, 200)])
    assert layer.metadata.vsprefill is not None
    check(layer, [(request, 1)])
    assert layer.metadata.vsprefill is None


def test_dense_runs_do_not_see_the_batches_schedule(make_layer: Any) -> None:
    layer = make_layer()
    layer.step([(layer.request(300), 300), (layer.request(40), 40)])
    step = layer.metadata.vsprefill
    (run,) = step.dense_runs  # the last rows of the long prompt and the short prompt
    assert (run.row_start, run.row_end) == (300 - 16, 340)
    assert run.metadata.scheduler_metadata is None
    assert run.metadata.max_num_splits == 0
    assert run.metadata.max_query_len == 40
    assert run.metadata.max_seq_len == 300
    assert run.metadata.query_start_loc.tolist() == [0, 16, 56]
    assert run.metadata.seq_lens.tolist() == [300, 40]
    assert layer.metadata.num_actual_tokens == 340


def test_uploads_are_aligned(make_layer: Any) -> None:
    """Triton compiles a kernel anew for a pointer that is not a multiple of 16 bytes."""
    layer = make_layer()
    layer.step([(layer.request(length), length) for length in (140, 150, 160)])
    (part,) = layer.metadata.vsprefill.rounds
    for batch in (part.batches.whole, part.batches.rows):
        for tensor in (batch.row_start, batch.row_end, batch.seq_len):
            assert tensor.data_ptr() % 16 == 0


@pytest.mark.parametrize(
    ("limit", "lengths", "expected"),
    [(0.95, (500, 700), [False, False]), (0.95, (140, 700), [True, False]), (0.01, (140, 700), [True, True])],
)
def test_guard_sends_wide_selections_to_the_stock_kernel(
    make_layer: Any, limit: float, lengths: tuple[int, int], expected: list[bool]
) -> None:
    """Request by request; the two paths in one round, and the counts of both."""
    options = {"max_density": limit, "tau_columns": 0.4, "max_diagonals": 2, "tau_diagonals": 0.9}
    layer = make_layer(options=options)
    work = [(layer.request(length), length) for length in lengths]
    check(layer, work)
    (part,) = layer.metadata.vsprefill.rounds
    assert part.batches.guarded is not None
    for (request, _), flag in zip(work, expected, strict=True):
        assert (oracle.chosen(layer, request, request.computed) is None) == flag
    bounds = layer.impl._runtime.prefill_on(layer.device).buffers.dense_rows[:4].tolist()
    rows = [length - 16 if flag else 0 for length, flag in zip(lengths, expected, strict=True)]
    assert bounds == [0, rows[0], 0, rows[1]]
    counts = totals(layer)
    assert (counts.sparse_chunks, counts.dense_chunks) == (2 - sum(expected), sum(expected))
    assert (counts.density == 1.0) == all(expected)


def test_at_no_price_the_output_is_the_stock_kernels(make_layer: Any) -> None:
    layer = make_layer("priced", {"price": 0})
    work = [(layer.request(length), length) for length in (300, 180)]
    outputs = layer.step(work)
    for (request, rows), output in zip(work, outputs, strict=True):
        expected = dense(layer, request, rows)
        assert (output.double() - expected).norm() / expected.norm() < oracle.TOLERANCE[layer.dtype]
    counts = totals(layer)
    assert (counts.density, counts.sparse_chunks, counts.handed_back) == (1.0, 2, 0)


def test_guard_goes_by_the_expected_density(make_layer: Any) -> None:
    """Request by request, as the bars of each want it; dense rows of both kinds and the counts of both."""
    layer = make_layer("priced", {"max_density": 0.5})
    work = [(layer.request(length), length) for length in (500, 140, 260)]
    check(layer, work)
    (part,) = layer.metadata.vsprefill.rounds
    assert part.batches.guarded is not None
    assert len(part.fallbacks) == 3
    decisions = oracle.Decisions.of(layer)
    away = [float(decisions.last(request)[0].density.mean()) > 0.5 for request, _ in work]
    assert away in ([False, True, False], [False, True, True])
    buffers = layer.impl._runtime.prefill_on(layer.device).buffers
    rows = [length - 16 if flag else 0 for (_, length), flag in zip(work, away, strict=True)]
    assert buffers.dense_rows[:6].tolist() == [number for count in rows for number in (0, count)]
    pairs = sum(oracle.reference(layer, request, rows)[1] for request, rows in work)
    counts = totals(layer)
    assert (counts.sparse_chunks, counts.handed_back) == (3 - sum(away), sum(away))
    assert counts.computed == pytest.approx(pairs, abs=0 if DTYPE == "float32" else 2e-3 * counts.causal)


@pytest.mark.parametrize("fixed", [True, False], ids=["given", "platform"])
def test_sequences_with_other_tiles_in_one_step(make_layer: Any, monkeypatch: pytest.MonkeyPatch, fixed: bool) -> None:
    """Longer sequences have longer tiles, in rounds of their own, unless the user has said how long tiles are."""
    monkeypatch.setattr(tiles, "LONGER", (150, 300))
    layer = make_layer("priced", {} if fixed else {"block_q": None})
    buffers = layer.impl._runtime.prefill_on(layer.device).buffers
    sizes = [pattern.block_q for pattern, _ in buffers.tiling.patterns]
    assert sizes == ([32] if fixed else [64, 128, 256])
    oracle.Decisions.of(layer)
    work = [(layer.request(length), length) for length in (200, 140, 160, 410, 60)]
    assert check(layer, work) == (4, 1)
    assert len(layer.metadata.vsprefill.rounds) == (1 if fixed else 3)
    # All kinds of tiles were compiled before, with made-up requests that nobody counts.
    counts = totals(layer)
    assert counts.sparse_chunks == 4
    assert counts.causal == sum(oracle.causal_pairs(layer, request, request.computed) for request, _ in work)


def test_warming_up_comes_by_all_kinds_of_tiles(make_layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first step that has a cache, prompts or not; their compilation would fall into the first long prompt."""
    monkeypatch.setattr(tiles, "LONGER", (150, 300))
    layer = make_layer("priced", {"block_q": None})
    prefill = layer.impl._runtime.prefill_on(layer.device)
    seen: list[tuple[str, int]] = []

    def noting(name: str, operation: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            index = next(arg for arg in args if isinstance(arg, TileIndex))
            seen.append((name, index.pattern.block_q))
            return operation(*args, **kwargs)

        return call

    names = ("price", "rank", "build_tiles", "attend_tiles")
    changed = {name: noting(name, getattr(prefill.operations, name)) for name in names}
    prefill.operations = prefill.operations._replace(**changed)
    layer.step([(layer.request(20), 20)])
    assert seen == [(name, size) for size in (64, 128, 256) for name in names]
    assert totals(layer).computed == totals(layer).causal  # of the one dense prompt
    assert not prefill.buffers.counts.any()


@pytest.mark.parametrize("group", [3, 7])
def test_tiles_of_no_power_of_two(make_layer: Any, group: int) -> None:
    """What the platform takes for groups that do not divide a program's rows: 42 positions, and 18 in two parts."""
    layer = make_layer("priced", {"block_q": None, "tile_parts": 1 + group // 4}, num_heads=2 * group)
    tiling = layer.impl._runtime.prefill_on(layer.device).buffers.tiling
    assert tiling.of(300).block_q == {3: 42, 7: 18}[group]
    request = layer.request(330)
    assert [check(layer, [(request, rows)]) for rows in (181, 149)] == [(1, 0), (1, 0)]


def test_tiles_of_large_groups_have_one_part_and_that_is_said(make_layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    logger = Mock(warning_once=lambda text, *args: said.append(text % args))
    monkeypatch.setattr(cuda_runtime, "logger", logger)
    for group, parts in ((16, 2), (17, 1)):
        layer = make_layer("priced", {"block_q": None, "tile_parts": 2}, num_heads=2 * group)
        assert layer.impl._runtime.prefill_on(layer.device).buffers.tiling.of(300).parts == parts
        assert len(said) == 2 - parts
    assert "not the 2 of tile_parts" in said[0]


def test_without_dense_last_rows(make_layer: Any) -> None:
    layer = make_layer("priced", {"dense_last_rows": 0})
    work = [(layer.request(length), length) for length in (150, 233)]
    assert check(layer, work) == (2, 0)
    assert layer.metadata.vsprefill.dense_runs == ()


def test_no_guard_where_budgets_make_it_needless(make_layer: Any) -> None:
    options = {"max_density": 0.9, "max_columns": 16, "max_diagonals": 1}
    layer = make_layer(options=options)
    request = layer.request(600)
    check(layer, [(request, 600)])
    (part,) = layer.metadata.vsprefill.rounds
    assert part.batches.guarded is None
    assert part.fallbacks == ()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_counts_are_those_of_the_kernel(make_layer: Any, estimator: str) -> None:
    """Visited pairs as the reference counts them, over two steps with dense rows between."""
    layer = make_layer(estimator)
    request, other = layer.request(400), layer.request(50)
    expected = causal = 0
    for one, rows in ((request, 200), (other, 50), (request, 200)):
        oracle.step(layer, [(one, rows)])
        pairs = oracle.causal_pairs(layer, one, rows)
        causal += pairs
        expected += pairs if one is other else oracle.reference(layer, one, rows)[1]
    counts = totals(layer)
    assert counts.causal == causal
    # Products of half precision put some keys on the other side of a bar.
    slack = 2e-3 * causal if estimator == "priced" and DTYPE != "float32" else 0
    assert counts.computed == pytest.approx(expected, abs=slack)
    assert (counts.sparse_chunks, counts.dense_chunks) == (2, 1)


def test_a_closer_look_at_steps(make_layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the probe reads from the workspaces is what the reference chooses; every other step here is looked at."""
    monkeypatch.setattr(cuda_probe, "EVERY", 3)  # `totals` publishes once more
    layer = make_layer()
    request = layer.request(460)
    tally = layer.impl._runtime.recorder.tally
    columns = diagonals = 0.0
    for step, rows in enumerate((180, 140, 140)):
        layer.step([(request, rows)])
        totals(layer)  # the look is over before the next one
        if step != 1:
            chosen = oracle.chosen(layer, request, rows)
            assert chosen is not None
            columns += float(chosen.num_columns.double().mean())
            diagonals += float(chosen.num_diagonals.double().mean())
    counters = tally.counters()
    assert counters["vsprefill_index_logits", "scored"] == 180 + 140
    assert counters["vsprefill_index_logits", "cached"] == 320
    found = {sample.name: sample.value for metric in tally.collect() for sample in metric.samples}
    assert found["vsprefill_columns_count"] == found["vsprefill_attend_seconds_count"] == 2
    assert found["vsprefill_density_ratio_count"] == 3
    assert found["vsprefill_columns_sum"] == columns
    assert found["vsprefill_diagonals_sum"] == diagonals
    assert 0 < found["vsprefill_attend_seconds_sum"] < 60
    assert 0 < found["vsprefill_choose_seconds_sum"] < 60


@pytest.mark.parametrize("limit", [1.0, 0.6])
def test_a_closer_look_at_tiles(make_layer: Any, monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    """Of the first request of a step; nothing is said of what the guard sends away."""
    monkeypatch.setattr(cuda_probe, "EVERY", 1)
    layer = make_layer("priced", {"max_density": limit})
    one, other = layer.request(460), layer.request(200)
    found: list[float] = []
    for rows in (180, 140, 140):
        layer.impl._runtime.recorder.worth = Worth()  # as if others had been worth it in between
        work = [(one, rows)] if other.computed else [(one, rows), (other, 200)]
        check(layer, work)
        totals(layer)  # the look is over before the next one
        keys = oracle.tile_keys(layer, one, rows)
        found += [] if keys is None else [keys]
    tally = layer.impl._runtime.recorder.tally
    series = {sample.name: sample.value for metric in tally.collect() for sample in metric.samples}
    assert len(found) == 3 if limit == 1.0 else 0 < len(found) < 3
    assert series["vsprefill_tile_keys_count"] == len(found)
    assert series["vsprefill_tile_keys_sum"] == pytest.approx(sum(found), abs=3 if DTYPE == "float32" else 12)
    assert series["vsprefill_attend_seconds_count"] == 3
    assert "vsprefill_columns_sum" not in series


@pytest.mark.parametrize("limit", [1.0, 0.6])
def test_recall_of_another_models_indexer_is_looked_at(
    make_layer: Any, random_indexer: Path, tmp_path: Path, plugin_log: list[str], monkeypatch: pytest.MonkeyPatch,
    limit: float,
) -> None:  # fmt: skip
    """On the device, of what the reference chooses; what the guard sends away is left out. Then never again."""
    monkeypatch.setattr(recall_check, "STEPS", 3)
    monkeypatch.setattr(recall_paged, "SPLITS", 4)
    relative = oracle.relative_of(random_indexer, tmp_path / "relative")
    layer = make_layer("vsindexer", {"max_density": limit}, indexer=relative)
    runtime = layer.impl._runtime
    work = [layer.request(460), layer.request(230)]
    recalls, steps = [], 0
    for rows in ([180, 140], [140], [140], [0, 90]):
        runtime.recorder.worth = Worth()  # as if others had been worth it in between
        layer.step([(one, count) for one, count in zip(work, rows, strict=False) if count])
        totals(layer)
        if steps < 3:
            chosen = [(one, n) for one, n in zip(work, rows, strict=False) if n and oracle.chosen(layer, one, n)]
            recalls += [oracle.recall(layer, one, n) for one, n in chosen]
            steps += bool(chosen)
        assert runtime.recall_check.is_due == (steps < 3)
    buffers = runtime.prefill_on(layer.device).buffers
    mean = float(torch.cat(recalls).mean())
    close = 1e-4 if DTYPE == "float32" else 1e-2
    assert buffers.covered(0).tolist() == pytest.approx([2 * len(recalls) * mean, 2 * len(recalls)], rel=close)
    said = [line for line in plugin_log if "covered" in line]
    if limit == 1.0:
        assert len(recalls) == 4
        assert runtime.recorder.recall.found == pytest.approx(mean, rel=close)
        assert said == [
            f"VSPREFILL: the indexer relative covered {runtime.recorder.recall.found:.1%} of this model's attention in "
            "the first 3 sparse steps, with the thresholds and bounds that were given."
        ]
    else:
        assert 0 < len(recalls) < 4
        assert said == []
    assert make_layer().impl._runtime.prefill_on(layer.device).buffers.work.recall is None


def test_switch(make_layer: Any, single_process: Path) -> None:
    """``vsprefill mode`` while the layer runs, and what it says about the last prompt."""
    from vllm_vsprefill import exchange, stats
    from vllm_vsprefill.switch import write_mode

    layer = make_layer()
    runtime = layer.impl._runtime
    (server,) = exchange.servers(single_process)

    def run(mode: str) -> float:
        write_mode(server.folder, mode)
        runtime.switch._next = 0.0
        runtime.look_at_switch()
        check(layer, [(layer.request(300), 300)])
        totals(layer)
        assert stats.read_modes(single_process) == [mode]
        return stats.read_last_prompt(single_process)[1].density

    assert stats.read_modes(single_process) == ["sparse"]  # before the first prompt
    assert run("sparse") < 0.95
    assert run("dense") == 1.0
    assert layer.metadata.vsprefill.rounds == ()
    assert run("sparse") < 0.95


def test_with_a_connector_no_logits_are_kept(make_layer: Any) -> None:
    """Others may fill blocks, whose keys and values no logits were computed of: a chunk scores its whole context."""
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    layer = make_layer(engine={"kv_transfer_config": transfer})
    assert not layer.impl._runtime.keeps_logits
    assert layer.side is None
    request = layer.request(400)
    assert [check(layer, [(request, 200)]) for _ in range(2)] == [(1, 0), (1, 0)]


SHAPES = [(head_size, num_heads) for head_size in (64, 128) for num_heads in (2, 6, 16)]
if DEVICE == "cpu":
    SHAPES = [(64, 2), (128, 6), (64, 16)]  # the interpreter is slow: each value once


@pytest.mark.parametrize(("head_size", "num_heads"), SHAPES)
@pytest.mark.parametrize("estimator", ["sampled", "priced"])
def test_shapes(make_layer: Any, head_size: int, num_heads: int, estimator: str) -> None:
    layer = make_layer(estimator, head_size=head_size, num_heads=num_heads)
    request = layer.request(260)
    assert check(layer, [(request, 260)]) == (1, 0)


REASONS = [
    ({"per_layer_sliding_window": 64}, "it has a sliding window"),
    ({"logits_soft_cap": 30.0}, "it caps its logits"),
    ({"head_size_v": 32}, "its keys have 64 channels, its values 32"),
    ({"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]}, "it has ALiBi slopes"),
]


@pytest.mark.parametrize(("attention", "reason"), REASONS, ids=[reason for _, reason in REASONS])
def test_stock_layers_say_why(make_layer: Any, plugin_log: list[str], attention: dict[str, Any], reason: str) -> None:
    layer = make_layer(**attention)
    assert layer.impl._sparse is None
    assert any(reason in message for message in plugin_log)


def test_layers_with_sinks_or_a_shared_cache_are_stock(make_layer: Any) -> None:
    """FlashAttention's own setup for sinks needs a GPU, and another layer's cache that layer."""
    layer = make_layer()
    assert layer.impl.unsupported_reasons() == []
    layer.impl.kv_sharing_target_layer_name = "model.layers.0.self_attn.attn"
    layer.impl.sinks = torch.zeros(4)
    assert layer.impl.unsupported_reasons() == ["it has attention sinks", "it shares the KV cache of another layer"]


@pytest.mark.parametrize(
    ("estimator", "given"), [("vsindexer", {}), ("priced", {}), ("priced", {"tile_variance": True})]
)
def test_nothing_of_what_a_cache_held_before_sleep_is_used(
    make_layer: Any, estimator: str, given: dict[str, Any]
) -> None:  # fmt: skip
    """vLLM gives the memory of the caches back and gets some with anything in it; no block counts as cached then.
    Nothing in the workspaces is used again either."""
    layer = make_layer(estimator, given)
    request = layer.request(400)
    check(layer, [(request, 400)])
    layer.release(request)
    if layer.side is not None:
        layer.side.kv_cache.copy_(torch.randn_like(layer.side.kv_cache) * 5)
    else:
        for scratch in layer.impl._runtime.prefill_on(layer.device).buffers.workspaces():
            scratch.view(torch.uint8).fill_(0xFF)  # NaN, or -1
    layer.layer.kv_cache.fill_(-simulator.POISON)
    awake = layer.request(400)
    assert [check(layer, [(awake, 200)]) for _ in range(2)] == [(1, 0), (1, 0)]


def test_layers_behind_another_builder_are_stock(
    make_layer: Any, plugin_log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked local attention hands the builder made-up requests, one for each stretch of a context; its cache is of
    another kind, with which no logits can lie in one group."""
    from functools import partial

    from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention

    from vllm_vsprefill.runtime import cache_kinds

    monkeypatch.setattr(simulator, "Attention", partial(ChunkedLocalAttention, attention_chunk_size=256))
    layer = make_layer()
    assert layer.impl._sparse is None
    assert layer.side is None
    assert list(cache_kinds([layer.layer])) == ["ChunkedLocalAttention"]
    assert any("ChunkedLocalAttentionBuilder" in message for message in plugin_log)
    request = layer.request(256)  # longer ones attend to parts of themselves
    (output,) = layer.step([(request, 256)])
    expected = dense(layer, request, 256)
    assert (output.double() - expected).norm() / expected.norm() < oracle.TOLERANCE[layer.dtype]


def test_all_reasons_at_once(make_layer: Any, plugin_log: list[str]) -> None:
    make_layer(per_layer_sliding_window=64, logits_soft_cap=30.0, head_size=256, num_heads=256, num_kv_heads=2)
    (message,) = [text for text in plugin_log if "stock layers" in text]
    for reason in ("sliding window", "caps its logits", "more than 64 query heads"):
        assert reason in message


@pytest.mark.parametrize("quantised_queries", [True] if DEVICE == "cuda" else [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fp8_cache(make_layer: Any, estimator: str, quantised_queries: bool) -> None:
    """Keys, values and, as FlashAttention 3 wants them, queries in fp8 with scales."""
    layer = make_layer(estimator, engine={"kv_cache_dtype": "fp8"}, quantised_queries=quantised_queries)
    request = layer.request(300)
    tolerance = 8e-2 if DEVICE == "cuda" else None  # FlashAttention rounds its weights to fp8, too
    assert check(layer, [(request, 150)], tolerance=tolerance) == (1, 0)
    assert check(layer, [(request, 150)], tolerance=tolerance) == (1, 0)
