# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The CPU backend, driven with batches over random block tables, against the reference over the same selection."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backends import oracle
from tests.backends.oracle import check, dense
from tests.backends.simulator import LAYER, LayerUnderTest, Request
from vllm_vsprefill import recall_check
from vllm_vsprefill.kernels.score.cpu import score
from vllm_vsprefill.stats import TELL, read_recall
from vllm_vsprefill.tuning import CPU
from vllm_vsprefill.worth import FIRST_PAUSE, PATIENCE, Worth

OPTIONS: dict[str, Any] = {
    "min_seq_len": 256,
    "window": 48,
    "sinks": 16,
    "dense_last_rows": 16,
    "block_q": 64,
    "block_k": 16,
    "tau_columns": 0.5,
    "tau_diagonals": 0.02,
    "min_columns": 8,
    "min_diagonals": 1,
    "max_diagonals": 4,
    "max_density": 1.0,
    "price": 1.0,  # queries and keys are random: what is left out is missed
}
ESTIMATORS = ["vsindexer", "sampled", "priced"]


@pytest.fixture
def make_layer(single_process: Path, random_model: Path, random_indexer: Path, tmp_path: Path) -> Any:
    def make(estimator: str = "vsindexer", options: dict[str, Any] | None = None, **settings: Any) -> LayerUnderTest:
        return oracle.layer_with(
            random_model, random_indexer, tmp_path, {**OPTIONS, **(options or {})}, estimator, **settings
        )

    return make


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sparse_is_not_dense(make_layer: Any, estimator: str) -> None:
    """The options of these tests do leave attention out; otherwise they would show nothing."""
    layer = make_layer(estimator)
    request = layer.request(900)
    (output,) = layer.step([(request, 900)])
    difference = (output.double() - dense(layer, request, 900)).norm() / output.double().norm()
    assert difference > 0.05
    counts = layer.impl._runtime.recorder.layers[1]
    assert counts.sparse_chunks == 1
    assert 0.05 < counts.density < 0.8


def test_metrics_of_a_layer(make_layer: Any) -> None:
    """Reused and new logits, what was chosen, decodes, a dense chunk; and what stays when the guard steps in."""
    layer = make_layer()
    request, other = layer.request(900, 2), layer.request(100)
    tally = layer.impl._runtime.recorder.tally
    layer.step([(layer.request(1), 1)], [False])  # as while graphs are captured; not counted
    for rows in (600, 300):
        layer.step([(request, rows)])
    layer.step([(request, 1), (other, 100)])
    layer.step([(request, 1)])
    counters = tally.counters()
    assert counters["vsprefill_index_logits", "scored"] == 900
    assert counters["vsprefill_index_logits", "cached"] == 600
    steps = {key[1:]: value for key, value in counters.items() if key[0] == "vsprefill_tokens" and value}
    assert steps == {
        ("sparse", "none"): 900 - 32, ("dense", "last_rows"): 32, ("dense", "decode"): 2,
        ("dense", "short_sequence"): 100,
    }  # fmt: skip
    chunks = {key[1:]: value for key, value in counters.items() if key[0] == "vsprefill_request_chunks" and value}
    assert chunks == {("sparse", "none"): 2, ("dense", "decode"): 2, ("dense", "short_sequence"): 1}
    metrics = {metric.name: metric.samples for metric in tally.collect()}
    for name in ("density_ratio", "columns", "diagonals", "choose_seconds", "attend_seconds"):
        samples = {sample.name.rsplit("_", 1)[1]: sample.value for sample in metrics[f"vsprefill_{name}"]}
        assert samples["count"] == 2
        assert samples["sum"] > 0


@pytest.mark.parametrize("given", [{}, {"tile_parts": 1, "tile_variance": False}])
def test_metrics_of_a_layer_with_lists_of_tiles(make_layer: Any, given: dict[str, Any]) -> None:
    layer = make_layer("priced", given)
    pattern = layer.impl._runtime.pattern
    assert (pattern.parts, pattern.variance) == ((1, False) if given else (2, True))
    request = layer.request(900, 2)
    expected = 0.0
    for rows in (600, 300, 1):
        check(layer, [(request, rows)])
        if rows > 1:
            keys = oracle.tile_keys(layer, request, rows)
            assert keys is not None
            expected += keys
    tally = layer.impl._runtime.recorder.tally
    found = {sample.name: sample.value for metric in tally.collect() for sample in metric.samples}
    assert found["vsprefill_tile_keys_count"] == found["vsprefill_attend_seconds_count"] == 2
    assert found["vsprefill_tile_keys_sum"] == pytest.approx(expected, rel=1e-9)
    assert "vsprefill_columns_sum" not in found


def test_inference_mode_leaves_nothing_behind(make_layer: Any) -> None:
    """vLLM computes in inference mode; what is kept between steps can be written to outside of it, too."""
    layer = make_layer()
    request = layer.request(900)
    with torch.inference_mode():
        assert check(layer, [(request, 600)]) == (1, 0)
    assert check(layer, [(request, 300)]) == (1, 0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks(make_layer: Any, estimator: str, dtype: str) -> None:
    layer = make_layer(estimator, dtype=dtype)
    request = layer.request(1000)
    ran = [check(layer, [(request, rows)]) for rows in (100, 200, 1, 323, 80, 296)]
    # under min_seq_len; sparse; one row; sparse; sparse; sparse
    assert ran == [(0, 1), (1, 0), (0, 1), (1, 0), (1, 0), (1, 0)]


@pytest.mark.parametrize("estimator", ["vsindexer", "priced"])
@pytest.mark.parametrize("order", range(3))
def test_mixed_batch(make_layer: Any, order: int, estimator: str) -> None:
    layer = make_layer(estimator)
    running = [layer.request(30, 5), layer.request(400, 5)]
    for request in running:
        check(layer, [(request, request.prompt)])
    long, other, short = layer.request(700), layer.request(500), layer.request(60)
    work = [(running[0], 1), (long, 500), (running[1], 1), (short, 60), (other, 500)]
    random.Random(order).shuffle(work)
    assert check(layer, work) == (2, 3)
    assert check(layer, [(running[1], 1), (long, 200), (running[0], 1)]) == (1, 2)


def test_prefix_hit_reuses_logits_and_scores_only_new_tokens(make_layer: Any) -> None:
    layer = make_layer()
    first = layer.request(640)
    check(layer, [(first, 640)])
    scored: list[int] = []

    def counting(key: torch.Tensor, value: torch.Tensor, weights: Any) -> torch.Tensor:
        scored.append(len(key))
        return score(key, value, weights)

    prefill = layer.impl._runtime.prefill
    prefill.operations = prefill.operations._replace(score=counting)
    second = layer.request(900, like=first, shared=608)
    check(layer, [(second, 292)])
    assert scored == [292]


@pytest.mark.parametrize("estimator", ["vsindexer", "priced"])
def test_blocks_of_a_finished_request_bring_nothing_along(make_layer: Any, estimator: str) -> None:
    layer = make_layer(estimator, num_blocks=24)
    for length in (600, 700, 640):
        request = layer.request(length)
        check(layer, [(request, 300)])
        check(layer, [(request, length - 300)])
        layer.release(request)


def test_decoded_tokens_are_scored_when_a_later_turn_needs_them(make_layer: Any) -> None:
    layer = make_layer()
    first = layer.request(400, 48)
    check(layer, [(first, 400)])
    for _ in range(48):
        check(layer, [(first, 1)])
    assert layer.cached_logits(first)[400:].isnan().all()
    second = layer.request(700, like=first, shared=448)
    check(layer, [(second, 252)])
    assert not layer.cached_logits(second).isnan().any()


@pytest.mark.parametrize("estimator", ["vsindexer", "priced"])
def test_preempted_request_starts_over(make_layer: Any, estimator: str) -> None:
    layer = make_layer(estimator, num_blocks=40)
    victim, other = layer.request(600, 20), layer.request(500)
    check(layer, [(victim, 600)])
    check(layer, [(victim, 1)])
    layer.release(victim)
    check(layer, [(other, 500)])
    victim.prompt = 601  # the decoded token is computed again as part of the prompt
    check(layer, [(victim, 350)])
    check(layer, [(victim, 251)])
    check(layer, [(victim, 1)])


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic(make_layer: Any, seed: int) -> None:
    """Random chunking, sharing, decoding, aborting and block reuse; every output row of every step is checked."""
    rng = random.Random(seed)
    estimator = {5: "sampled", 6: "priced", 7: "priced"}.get(seed, "vsindexer")
    layer = make_layer(estimator, num_blocks=160, seed=seed)
    live: list[Request] = []
    sparse = 0
    for _ in range(14):
        while len(live) < 3:
            donor = rng.choice(live) if live and rng.random() < 0.5 else None
            shared = 32 * rng.randint(0, donor.computed // 32) if donor else 0
            prompt = shared + rng.randint(1, 600)
            request = layer.request(prompt, rng.randint(0, 4), like=donor, shared=shared)
            live.append(request)
        work = []
        for request in rng.sample(live, rng.randint(1, len(live))):
            left = request.prompt - request.computed
            work.append((request, rng.choice([left, rng.randint(1, left)]) if left > 0 else 1))
        sparse += check(layer, work)[0]
        for request in list(live):
            done = request.computed >= len(request.query)
            if done or (rng.random() < 0.1 and request.computed):
                live.remove(request)
                kept = {block for other in live for block in other.blocks}
                layer.free += [block for block in request.blocks if block not in kept]
    assert sparse > 2


def test_thresholds_of_one_equal_dense(make_layer: Any) -> None:
    layer = make_layer(options={"tau_columns": 1.0, "tau_diagonals": 1.0, "max_diagonals": None})
    request = layer.request(700)
    for rows in (450, 250):
        (output,) = layer.step([(request, rows)])
        torch.testing.assert_close(output.double(), dense(layer, request, rows), atol=1e-5, rtol=1e-4)
    assert layer.impl._runtime.recorder.layers[1].sparse_chunks == 2


@pytest.mark.parametrize("limit", [1.0, 0.5])
def test_at_no_price_everything_is_computed(make_layer: Any, limit: float) -> None:
    """Nothing is left out where all of it is worth something; or the stock kernel does it, if it may."""
    layer = make_layer("priced", {"price": 0, "max_density": limit})
    request = layer.request(700)
    for rows in (450, 250):
        (output,) = layer.step([(request, rows)])
        torch.testing.assert_close(output.double(), dense(layer, request, rows), atol=1e-5, rtol=1e-4)
    counts = layer.impl._runtime.recorder.layers[1]
    assert counts.density == 1.0
    assert (counts.sparse_chunks, counts.handed_back) == ((2, 0) if limit == 1.0 else (0, 2))


def test_the_guard_goes_by_the_expected_density(make_layer: Any) -> None:
    """Chunk by chunk: a short sequence is within reach of the window and the first steps, a long one is not."""
    layer = make_layer("priced", {"max_density": 0.7})
    request = layer.request(1500)
    for rows in (300, 500, 700):
        check(layer, [(request, rows)])
        expected = oracle.Decisions.of(layer).last(request)[0].density.mean()
        assert (oracle.listed(layer, request, rows) is None) == (expected > 0.7)
    counts = layer.impl._runtime.recorder.layers[1]
    assert counts.sparse_chunks
    assert counts.handed_back == counts.dense_chunks


def test_a_price_decides_how_dense_it_is(make_layer: Any) -> None:
    densities = []
    for price in (1e-6, 0.5, 1.0, 1e3):
        layer = make_layer("priced", {"price": price})
        request = layer.request(1200)
        check(layer, [(request, 1200)])
        densities.append(layer.impl._runtime.recorder.layers[1].density)
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > 0.99
    assert densities[-1] < 0.25


def test_tiles_are_those_that_were_asked_for(make_layer: Any) -> None:
    """Else the platform's, which are smaller than those for columns and diagonals."""
    given = make_layer("priced").impl._runtime.pattern
    assert (given.block_q, given.block_k, given.window) == (64, 16, 48)
    layer = make_layer("priced", {"block_q": None, "block_k": None})
    pattern = layer.impl._runtime.pattern
    assert (pattern.block_q, pattern.block_k) == (CPU.tile_q, CPU.tile_k)
    request = layer.request(900)
    assert [check(layer, [(request, rows)]) for rows in (333, 567)] == [(1, 0), (1, 0)]
    assert layer.impl._runtime.recorder.layers[1].density < 0.9


def test_with_lists_by_tile_nothing_is_handed_back_unless_asked_for(
    single_process: Path, random_model: Path, random_indexer: Path, tmp_path: Path
) -> None:
    """Computing everything by tiles is faster here than the stock kernel."""
    options = {name: value for name, value in OPTIONS.items() if name != "max_density"} | {"price": 0}

    def layer_with(**more: Any) -> LayerUnderTest:
        return oracle.layer_with(random_model, random_indexer, tmp_path, options | more, "priced")

    layer = layer_with()
    assert layer.impl._runtime.prefill.priced_rows == CPU.priced_rows != 64
    layer.step([(layer.request(700), 700)])
    counts = layer.impl._runtime.recorder.layers[1]
    assert (counts.sparse_chunks, counts.handed_back, counts.density) == (1, 0, 1.0)
    layer = layer_with(max_density=0.5, sampled_rows=48)
    assert layer.impl._runtime.prefill.priced_rows == 48
    layer.step([(layer.request(700), 700)])
    counts = layer.impl._runtime.recorder.layers[1]
    assert (counts.sparse_chunks, counts.handed_back) == (0, 1)


def test_a_selection_that_would_not_pay_runs_stock(make_layer: Any) -> None:
    layer = make_layer(options={"tau_columns": 1.0, "max_density": 0.5})
    request = layer.request(900)
    for rows in (500, 400):
        (output,) = layer.step([(request, rows)])
        torch.testing.assert_close(output.double(), dense(layer, request, rows), atol=1e-5, rtol=1e-4)
    counts = layer.impl._runtime.recorder.layers[1]
    assert (counts.sparse_chunks, counts.dense_chunks, counts.density) == (0, 2, 1.0)
    counters = layer.impl._runtime.recorder.tally.counters()
    assert sum(value for key, value in counters.items() if "max_density" in key) == 2


def test_switched_off_is_stock(make_layer: Any) -> None:
    layer = make_layer(options={"enabled": False})
    request = layer.request(700)
    (output,) = layer.step([(request, 700)])
    torch.testing.assert_close(output.double(), dense(layer, request, 700), atol=1e-5, rtol=1e-4)
    assert layer.side is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"per_layer_sliding_window": 128}, "sliding window"),
        ({"alibi_slopes": [0.1, 0.2, 0.3, 0.4]}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "caps its logits"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
    ],
    ids=["window", "alibi", "softcap", "sinks"],
)
def test_unsupported_layers_run_stock(make_layer: Any, settings: dict[str, Any], reason: str) -> None:
    layer = make_layer(**settings)
    assert layer.impl._sparse is None
    assert any(reason in text for text in layer.impl.unsupported_reasons())
    stock = make_layer(backend="CPU_ATTN", **settings)
    outputs = [tested.step([(tested.request(700), 700)])[0] for tested in (layer, stock)]
    assert torch.equal(*outputs)


def test_dense_layers_run_stock(make_layer: Any) -> None:
    layer = make_layer(options={"dense_layers": [1]})
    request = layer.request(700)
    (output,) = layer.step([(request, 700)])
    torch.testing.assert_close(output.double(), dense(layer, request, 700), atol=1e-5, rtol=1e-4)
    counts = layer.impl._runtime.recorder.layers[1]
    assert counts.density == 1.0
    assert counts.dense_chunks == 1
    counters = layer.impl._runtime.recorder.tally.counters()  # of a model without any other layer
    assert counters["vsprefill_tokens", "dense", "no_sparse_layer"] == 700
    assert sum(value for key, value in counters.items() if key[:2] == ("vsprefill_fallbacks", "dense_layers")) == 1


def test_without_a_logit_cache_everything_is_scored_anew(make_layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_vsprefill.runtime import Runtime

    monkeypatch.setattr(Runtime, "_can_keep_logits", lambda self, config: False)
    layer = make_layer()
    assert layer.side is None
    request = layer.request(900)
    assert [check(layer, [(request, rows)]) for rows in (400, 500)] == [(1, 0), (1, 0)]


def test_padding_slots_are_ignored(make_layer: Any) -> None:
    layer = make_layer()
    layer.side.kv_cache.zero_()
    layer.side.invalidate(torch.tensor([-1, 5, -1]))
    missing = layer.side.slots.isnan().any(1).nonzero().flatten().tolist()
    assert missing == [5]


def test_layer_is_found_by_name(make_layer: Any) -> None:
    layer = make_layer()
    assert layer.impl._sparse.index == 1
    assert LAYER in layer.impl._runtime.layers


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"engine": {"kv_cache_dtype": "fp8"}, "dtype": "bfloat16"}, "its KV cache is quantised (1 layer)"),
        ({"options": {"dense_layers": "0-1"}}, "the layer is listed in dense_layers (1 layer)"),
        ({"options": {"min_seq_len": 2**20}}, "it pays from 1048576 tokens of context"),
        ({}, None),
    ],
    ids=["FP8 cache", "dense layers", "gate", "nothing"],
)
def test_what_keeps_prompts_from_running_sparse_is_told_once(
    make_layer: Any, plugin_log: list[str], changes: dict[str, Any], reason: str | None
) -> None:
    """With all reasons, when the metadata builder is made: after the last layer is known."""
    make_layer(**changes)
    (told,) = [line for line in plugin_log if "run sparse" in line]
    lines = dict(line.strip().split("  ", 1) for line in told.splitlines()[1:])
    assert lines["estimator"].strip().startswith("trained indexer for random")
    assert "4 query heads on 2 KV heads" in lines["model"] or reason is not None
    assert "min_seq_len=" in lines["options"]
    if reason is None:
        assert "in 1 of 1 layers" in told
        assert lines["memory"].strip() == "index logits of 16 bytes a token beside the KV cache"
        assert "stock layers" not in lines
    else:
        assert "no prompt will run sparse" in told
        assert reason in told


def test_everything_handed_back_is_told_the_first_times(make_layer: Any, plugin_log: list[str]) -> None:
    layer = make_layer(options={"tau_columns": 1.0, "max_density": 0.5})
    for _ in range(TELL + 2):
        layer.impl._runtime.recorder.worth = Worth()  # as if others had been worth it in between
        layer.step([(layer.request(400), 400)])
    assert sum("gave a prompt's rows back" in line for line in plugin_log) == TELL
    counts = layer.impl._runtime.recorder.layers[1]
    assert counts.handed_back == counts.dense_chunks == TELL + 2
    assert not counts.sparse_chunks


def test_what_is_not_worth_it_runs_stock_without_an_estimate(make_layer: Any) -> None:
    layer = make_layer(options={"tau_columns": 1.0, "max_density": 0.5})
    for _ in range(PATIENCE + FIRST_PAUSE + 1):
        request = layer.request(400)
        layer.step([(request, 400)])
        layer.release(request)
    counts = layer.impl._runtime.recorder.layers[1]
    assert counts.handed_back == PATIENCE + 1
    assert counts.dense_chunks == PATIENCE + FIRST_PAUSE + 1
    everything = make_layer(options={"tau_columns": 1.0, "max_density": 1.0})
    for _ in range(PATIENCE + 2):
        request = everything.request(400)
        everything.step([(request, 400)])
        everything.release(request)
    assert everything.impl._runtime.recorder.layers[1].sparse_chunks == PATIENCE + 2


SAID = {
    None: "with the thresholds and bounds that were given",
    0.1: "; 10.0% are expected",
    0.95: "where 95.0% are expected: it does not fit this model",
}


@pytest.mark.parametrize("expected", list(SAID))
def test_recall_of_another_models_indexer_is_looked_at(
    expected: float | None, random_model: Path, random_indexer: Path, tmp_path: Path, plugin_log: list[str],
    monkeypatch: pytest.MonkeyPatch, single_process: Path,
) -> None:  # fmt: skip
    """With the first sparse steps: of what the reference chooses for them, and in the log once."""
    monkeypatch.setattr(recall_check, "STEPS", 3)
    known = {} if expected is None else {"recall": [expected] * 2}
    indexer = oracle.relative_of(
        random_indexer, tmp_path / "relative", tau_columns=[0.5] * 2, tau_diagonals=[0.02] * 2, **known
    )
    given = [] if expected is None else ["tau_columns", "tau_diagonals", "max_diagonals", "window"]
    options = {name: value for name, value in OPTIONS.items() if name not in given}
    layer = oracle.layer_with(random_model, indexer, tmp_path, options, "vsindexer", num_blocks=128)
    runtime = layer.impl._runtime
    request, other = layer.request(1500), layer.request(700)
    recalls = []
    for work in ([(request, 900)], [(other, 100)], [(request, 300), (other, 600)], [(request, 300)]):
        assert runtime.recall_check.is_due
        layer.step(work)
        recalls += [oracle.recall(layer, one, rows) for one, rows in work if rows > 100]
    assert not runtime.recall_check.is_due
    mean = float(torch.cat(recalls).mean())
    found = runtime.recorder.recall
    assert (found.found, found.expected, found.steps) == (pytest.approx(mean, abs=1e-5), expected, 3)
    assert 0.2 < mean < 0.85
    (text,) = [line for line in plugin_log if "covered" in line]
    assert f"the indexer relative covered {mean:.1%} of this model's attention in the first 3 sparse steps" in text
    assert SAID[expected] in text
    (shown,) = read_recall(next(single_process.glob("vsprefill-*")))
    assert shown == (found.found, expected)


def test_the_recall_of_the_models_own_indexer_costs_nothing(make_layer: Any) -> None:
    for estimator in ESTIMATORS:
        assert make_layer(estimator).impl._runtime.recall_check is None
