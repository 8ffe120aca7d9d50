# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Stock vLLM in this process, with a tiny random model: scheduling, caching, preemption, refusals."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import LLM, SamplingParams

from benchmarks.environment import NEEDLE_MODEL
from examples.needle import tasks
from tests import models
from tests.backends import oracle
from vllm_vsprefill.checkpoint import CheckpointError
from vllm_vsprefill.startup import StartupError
from vllm_vsprefill.stats import LayerCounts, read_counts, read_recall
from vllm_vsprefill.worth import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # several vLLMs a test

EVERYTHING = {"tau_columns": 1.0, "tau_diagonals": 1.0, "min_seq_len": 512, "max_density": 1.0}
SPARSE = {
    "tau_columns": 0.3,
    "tau_diagonals": 0.01,
    "min_columns": 16,
    "min_diagonals": 0,
    "max_diagonals": 2,
    "min_seq_len": 512,
    "window": 64,
    "block_k": 16,
    "max_density": 1.0,
}

PRICE = 0.3
"""What random weights and tokens make worth choosing at: some heads list little, others much."""


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((length, seed)).integers(0, 512, length).tolist()


class Engine:
    """One engine and what it counted."""

    def __init__(self, llm: LLM, folder: Path) -> None:
        self.llm = llm
        self.folder = folder

    def tokens(self, prompts: list[list[int]], decoded: int = 8) -> list[list[int]]:
        """Greedy continuations."""
        sampling = SamplingParams(max_tokens=decoded, temperature=0, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    @property
    def counts(self) -> dict[int, LayerCounts]:
        return read_counts(self.folder)


@pytest.fixture
def engine(single_process: Path, random_model: Path) -> Iterator[Callable[..., Engine]]:
    """Makes engines, one after the other; each replaces the last."""
    from vllm.distributed import cleanup_dist_env_and_memory

    made: list[Engine] = []

    def make(
        backend: str, options: dict[str, Any] | None = None, model: Path = random_model, **settings: Any
    ) -> Engine:
        while made:
            del made.pop().llm
            cleanup_dist_env_and_memory()
        for file in single_process.rglob("*.json"):
            file.unlink()
        defaults: dict[str, Any] = {
            "max_model_len": 6144,
            "max_num_batched_tokens": 1024,
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
        }
        extra = {"vsprefill": options} if options is not None else {}
        llm = LLM(str(model), attention_backend=backend, additional_config=extra, **{**defaults, **settings})
        made.append(Engine(llm, single_process))
        return made[-1]

    yield make
    while made:
        del made.pop().llm


@pytest.mark.parametrize("chunk", [512, 2048])
@pytest.mark.parametrize("caching", [False, True], ids=["no-caching", "caching"])
def test_everything_selected_equals_stock_token_by_token(
    engine: Any, random_indexer: Path, chunk: int, caching: bool
) -> None:
    prompts = [prompt(n) for n in (3000, 700, 5000, 100, 513)]
    prompts.append(prompts[2][:4000] + prompt(300, 7))  # shares a prefix with another one
    settings = {"max_num_batched_tokens": chunk, "enable_prefix_caching": caching}
    stock = engine("CPU_ATTN", **settings)
    expected = [stock.tokens(prompts), stock.tokens(prompts)]
    ours = engine("VSPREFILL", {**EVERYTHING, "checkpoint": str(random_indexer)}, **settings)
    assert [ours.tokens(prompts), ours.tokens(prompts)] == expected
    for counts in ours.counts.values():
        assert counts.sparse_chunks > 4
        assert counts.density == 1.0


def test_compiled_mode(engine: Any, random_indexer: Path) -> None:
    prompts = [prompt(n) for n in (2000, 60)]
    expected = engine("CPU_ATTN", enforce_eager=False).tokens(prompts)
    ours = engine("VSPREFILL", {**EVERYTHING, "checkpoint": str(random_indexer)}, enforce_eager=False)
    assert ours.tokens(prompts) == expected
    assert all(counts.sparse_chunks for counts in ours.counts.values())


def test_prefix_cache_hits_stay_sparse_and_give_the_same_answer(engine: Any, random_indexer: Path) -> None:
    options = {**SPARSE, "checkpoint": str(random_indexer)}
    first, second = prompt(3000), prompt(3000)[:2560] + prompt(900, 3)
    ours = engine("VSPREFILL", options)
    ours.tokens([first])
    before = ours.counts[0]
    cached = ours.tokens([second])
    after = ours.counts[0]
    assert after.sparse_chunks > before.sparse_chunks
    computed, causal = after.computed - before.computed, after.causal - before.causal
    rows = len(second) - 2560
    assert causal <= 2 * rows * len(second)  # only the new rows were computed
    assert computed < 0.7 * causal
    assert engine("VSPREFILL", options).tokens([second]) == cached


def test_sparse_is_sparse_whatever_the_chunks(engine: Any, random_indexer: Path) -> None:
    for chunk in (300, 1000, 4096):
        ours = engine("VSPREFILL", {**SPARSE, "checkpoint": str(random_indexer)}, max_num_batched_tokens=chunk)
        ours.tokens([prompt(4000), prompt(4000, 1)], 2)
        for counts in ours.counts.values():
            assert counts.sparse_chunks
            assert counts.density < 0.7


def test_preemption(engine: Any, random_indexer: Path) -> None:
    """A cache too small for all requests at once: some are thrown out and computed again."""
    prompts = [prompt(1500, seed) for seed in range(4)]
    settings = {"block_size": 32, "max_model_len": 2048, "enable_prefix_caching": False}
    expected = engine("CPU_ATTN", **settings).tokens(prompts, 400)
    ours = engine(
        "VSPREFILL",
        {**EVERYTHING, "checkpoint": str(random_indexer)},
        num_gpu_blocks_override=150,
        disable_log_stats=False,
        **settings,
    )
    assert ours.tokens(prompts, 400) == expected
    metrics = {metric.name: metric for metric in ours.llm.get_metrics()}
    assert metrics["vllm:num_preemptions"].value > 0


def test_at_no_price_the_tokens_are_the_stock_kernels(engine: Any, plugin_log: list[str]) -> None:
    """Nothing is left out then, whatever the chunks and however requests mix."""
    prompts = [prompt(n) for n in (3000, 700, 2100, 100, 513)]
    prompts.append(prompts[0][:2000] + prompt(300, 7))  # shares a prefix with another one
    for chunk in (512, 2048):
        stock = engine("CPU_ATTN", max_num_batched_tokens=chunk)
        expected = [stock.tokens(prompts), stock.tokens(prompts)]
        options = {"price": 0, "min_seq_len": 512, "max_density": 1.0}
        ours = engine("VSPREFILL", options, max_num_batched_tokens=chunk)
        assert [ours.tokens(prompts), ours.tokens(prompts)] == expected
        for counts in ours.counts.values():
            assert counts.sparse_chunks > 4
            assert counts.density == 1.0


@pytest.mark.parametrize("chunk", [700, 4096])
def test_answers_are_found_with_lists_of_tiles(engine: Any, chunk: int) -> None:
    """By a model that was trained to look things up, of which every tile then attends to a small part."""
    rng = np.random.default_rng(5)
    problems = [tasks.make_problem(rng, task, tasks.HAYSTACKS[0], 5000) for task in tasks.TASKS]
    options = {"estimator": "priced", "min_seq_len": 1024}
    ours = engine(
        "VSPREFILL", options, NEEDLE_MODEL, max_num_batched_tokens=chunk, dtype="auto", skip_tokenizer_init=False
    )
    sampling = SamplingParams(max_tokens=64, temperature=0)
    prompts: Any = [{"prompt_token_ids": problem.prompt_ids.tolist()} for problem in problems]
    outputs = ours.llm.generate(prompts, sampling, use_tqdm=False)
    right = [problem.is_correct(one.outputs[0].text) for problem, one in zip(problems, outputs, strict=True)]
    assert sum(right) >= 4, [one.outputs[0].text for one in outputs]
    total = sum(ours.counts.values(), LayerCounts())
    assert total.sparse_chunks > total.handed_back
    assert total.density < 0.7


def test_auto_takes_priced_where_no_indexer_fits(engine: Any, plugin_log: list[str]) -> None:
    ours = engine("VSPREFILL", {**SPARSE, "price": PRICE})
    assert "training-free estimator (priced): no trained indexer for this model was found" in "\n".join(plugin_log)
    ours.tokens([prompt(3000)], 2)
    for counts in ours.counts.values():
        assert counts.sparse_chunks
        assert counts.density < 0.9


def test_another_models_indexer_is_told_to_cover_too_little(
    engine: Any, random_indexer: Path, tmp_path: Path, plugin_log: list[str]
) -> None:
    relative = oracle.relative_of(
        random_indexer, tmp_path / "relative", tau_columns=[0.3] * 2, tau_diagonals=[0.01] * 2, recall=[0.97] * 2
    )
    options = {name: SPARSE[name] for name in ("min_columns", "min_seq_len", "block_k", "max_density")}
    ours = engine("VSPREFILL", {**options, "checkpoint": str(relative)}, max_num_batched_tokens=512)
    ours.tokens([prompt(3072)], 2)  # six chunks
    assert [line for line in plugin_log if "covered" in line] == []
    ours.tokens([prompt(2048, 1)], 2)
    (text,) = [line for line in plugin_log if "covered" in line]
    assert "in the first 8 sparse steps, where 97.0% are expected: it does not fit this model" in text
    assert "leave checkpoint out" in text
    ((found, expected),) = read_recall(next(ours.folder.glob("vsprefill-*")))
    assert 0.2 < found < 0.9
    assert expected == 0.97


def test_short_prompts_run_stock(engine: Any, random_indexer: Path, plugin_log: list[str]) -> None:
    ours = engine("VSPREFILL", {**SPARSE, "min_seq_len": 4096, "checkpoint": str(random_indexer)})
    assert "chunks of 1024 prompt tokens run sparse from 4096 tokens of context" in "\n".join(plugin_log)
    prompts = [prompt(n) for n in (10, 900, 3000)]
    tokens = ours.tokens(prompts)
    assert all(counts.sparse_chunks == 0 and counts.density == 1.0 for counts in ours.counts.values())
    assert engine("CPU_ATTN").tokens(prompts) == tokens


def test_layers_with_sliding_windows_stay_stock(engine: Any, tmp_path: Path, plugin_log: list[str]) -> None:
    """A model that mixes both kinds: window layers are left alone, full ones run without a logit cache."""
    model = models.save_random_mixed_model(tmp_path / "mixed")
    indexer = models.save_random_indexer(tmp_path / "indexer", model)
    prompts = [prompt(3000), prompt(900)]
    expected = engine("CPU_ATTN", model=model).tokens(prompts)
    ours = engine("VSPREFILL", {**EVERYTHING, "checkpoint": str(indexer)}, model=model)
    assert ours.tokens(prompts) == expected
    assert "it has a sliding window" in "\n".join(plugin_log)
    assert "mixes KV cache kinds" in "\n".join(plugin_log)
    assert [layer for layer, counts in ours.counts.items() if counts.sparse_chunks] == [1, 3]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(engine: Any, random_indexer: Path, dtype: str) -> None:
    ours = engine("VSPREFILL", {**SPARSE, "checkpoint": str(random_indexer)}, dtype=dtype)
    tokens = ours.tokens([prompt(3000)], 16)
    assert len(tokens[0]) == 16
    assert all(counts.sparse_chunks for counts in ours.counts.values())


def refusal(engine: Any, options: Any, **settings: Any) -> str:
    with pytest.raises((StartupError, CheckpointError)) as caught:
        engine("VSPREFILL", options, **settings)
    return str(caught.value)


def test_refusal_names_every_bad_option(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSPREFILL_SINKS", "-1")
    wrong = {"tau_column": 0.5, "window": "wide", "min_columns": 9, "max_columns": 3, "checkpoint": "./nowhere"}
    text = refusal(engine, wrong)
    assert "no such folder" in text
    for part in (
        "VSPREFILL cannot start",
        "tau_columns",
        "window",
        "'wide'",
        "VSPREFILL_SINKS",
        "min_columns must not",
    ):
        assert part in text


def test_refusal_of_a_misspelt_section(single_process: Path, random_model: Path) -> None:
    with pytest.raises(StartupError, match="did you mean 'vsprefill'"):
        LLM(str(random_model), attention_backend="VSPREFILL", additional_config={"vsprefil": {}})


def test_cache_of_another_dtype_runs_stock(engine: Any, random_indexer: Path, plugin_log: list[str]) -> None:
    """Tokens are not compared: over such a cache stock attention itself answers differently from run to run."""
    settings = {"dtype": "float32", "kv_cache_dtype": "bfloat16"}
    ours = engine("VSPREFILL", {**SPARSE, "checkpoint": str(random_indexer)}, **settings)
    (answer,) = ours.tokens([prompt(3000)])
    assert len(answer) == 8
    assert "holds another type" in "\n".join(plugin_log)
    assert all(not counts.sparse_chunks for counts in ours.counts.values())


def test_draft_models_run_stock(engine: Any, random_model: Path, random_indexer: Path) -> None:
    """Whatever backend is asked for them; and they are no part of the served model's densities."""
    options = {**SPARSE, "checkpoint": str(random_indexer)}
    asked = [prompt(3000)]
    plain = engine("VSPREFILL", options)
    expected, counts = plain.tokens(asked, 4), plain.counts
    speculative = {
        "model": str(random_model),
        "method": "draft_model",
        "num_speculative_tokens": 2,
        "attention_backend": "VSPREFILL",
    }
    drafted = engine("VSPREFILL", options, speculative_config=speculative)
    assert drafted.tokens(asked, 4) == expected
    assert {layer: c.causal for layer, c in drafted.counts.items()} == {layer: c.causal for layer, c in counts.items()}


def test_why_nothing_runs_sparse_is_told_once_all_layers_are_known(engine: Any, plugin_log: list[str]) -> None:
    ours = engine("VSPREFILL", {**SPARSE, "dense_layers": "0-1", "min_seq_len": 8192})
    (told,) = [line for line in plugin_log if "run sparse" in line]
    assert "no prompt will run sparse: the layer is listed in dense_layers (2 layers); the longest prompt has" in told
    ours.tokens([prompt(2000)], 2)
    assert not any(counts.sparse_chunks for counts in ours.counts.values())


def test_everything_handed_back_is_told_the_first_times(engine: Any, plugin_log: list[str]) -> None:
    """Random tokens with random weights: no selection leaves out enough."""
    ours = engine("VSPREFILL", {"min_seq_len": 512, "estimator": "sampled", "max_density": 0.01})
    assert "in 2 of 2 layers" in "\n".join(plugin_log)
    assert PATIENCE > 5  # or the last ones would run stock without an estimate
    for seed in range(5):
        ours.tokens([prompt(1000, seed)], 2)
    assert sum("gave a prompt's rows back" in line for line in plugin_log) == 3
    for counts in ours.counts.values():
        assert counts.handed_back == counts.dense_chunks == 5
        assert not counts.sparse_chunks


def test_gates_that_no_prompt_passes_are_reported(engine: Any, random_indexer: Path, plugin_log: list[str]) -> None:
    ours = engine("VSPREFILL", {**SPARSE, "min_pairs": 2**23, "checkpoint": str(random_indexer)})
    told = "\n".join(plugin_log)
    assert "no prompt will run sparse" in told
    assert "pays from 8192 tokens" in told
    ours.tokens([prompt(3000)], 2)
    assert not any(counts.sparse_chunks for counts in ours.counts.values())


def test_refusal_of_a_missing_checkpoint(engine: Any) -> None:
    text = refusal(engine, {"checkpoint": "./nowhere/to/be/found"})
    assert "nowhere/to/be/found" in text
    assert "no such folder" in text


def test_refusal_of_the_trained_estimator_without_one(engine: Any) -> None:
    assert "no installed indexer was trained for this model" in refusal(engine, {"estimator": "vsindexer"})


def test_refusal_of_another_models_checkpoint(engine: Any, random_indexer: Path, tmp_path: Path) -> None:
    other = models.save_random_model(tmp_path / "other", layers=3, kv_heads=4)
    text = refusal(engine, {"checkpoint": str(random_indexer)}, model=other)
    assert "num_layers" in text
    assert "num_kv_heads" in text


def test_refusal_of_a_damaged_checkpoint(engine: Any, random_indexer: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text((random_indexer / "config.json").read_text())
    (damaged / "indexer.safetensors").write_bytes((random_indexer / "indexer.safetensors").read_bytes()[:5000])
    assert "indexer.safetensors" in refusal(engine, {"checkpoint": str(damaged)})


def test_refusal_of_nan_weights(engine: Any, random_indexer: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    damaged = tmp_path / "nan"
    damaged.mkdir()
    (damaged / "config.json").write_text((random_indexer / "config.json").read_text())
    tensors = load_file(random_indexer / "indexer.safetensors")
    tensors["layers.1.w1"][0, 0, 0] = float("nan")
    save_file(tensors, damaged / "indexer.safetensors")
    assert "layers.1.w1" in refusal(engine, {"checkpoint": str(damaged)})


def test_refusal_of_a_layer_that_is_not_there(engine: Any) -> None:
    assert "the model has 2 layers" in refusal(engine, {"dense_layers": [0, 7]})


RANKS = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model, prompts, settings = json.loads(sys.argv[1])
    llm = LLM(model, max_model_len=4096, max_num_batched_tokens=1024, skip_tokenizer_init=True, dtype="float32",
              **settings)
    sampling = SamplingParams(max_tokens=8, temperature=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    from vllm_vsprefill import exchange, stats
    counts = stats.read_counts(exchange.opened()[-1])
    series = stats.read_tally(exchange.opened()[-1])
    found = [
        [list(o.outputs[0].token_ids) for o in outputs],
        {k: [v.computed, v.causal] for k, v in counts.items()},
        {s.name + str(s.labels): s.value for m in series.collect() for s in m.samples},
    ]
    # Written at once: ranks log to the same stream.
    sys.stdout.write("\\nRESULT " + json.dumps(found) + "\\n")
"""


@pytest.fixture(scope="module")
def ranks(
    random_model: Path, random_indexer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[list[list[int]], dict[str, list[float]], dict[str, float]]]:
    """Runs a server of its own with so many ranks, a core each; the tokens, what every layer counted, all metrics."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores, one a rank")
    script = tmp_path_factory.mktemp("ranks") / "ranks.py"
    script.write_text(RANKS)

    @functools.lru_cache
    def run(
        size: int, kind: str = "tensor", price: float | None = None
    ) -> tuple[list[list[int]], dict[str, list[float]], dict[str, float]]:
        options = {**SPARSE, "checkpoint": str(random_indexer)} if price is None else {**SPARSE, "price": price}
        environ = {
            **os.environ,
            # The engine in the process that asks, with one rank the worker, too: each process starts for seconds.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(size))),
        }
        settings: dict[str, Any] = {
            "attention_backend": "vsprefill",
            "additional_config": {"vsprefill": options},
            f"{kind}_parallel_size": size,
        }
        if kind == "pipeline":
            # vLLM's CPU workers make what later stages receive into while they warm up, which eager ones never do.
            settings["compilation_config"] = {"backend": "eager"}
        else:
            settings["enforce_eager"] = True
        argument = json.dumps([str(random_model), [prompt(2500), prompt(90)], settings])
        done = subprocess.run(
            [sys.executable, str(script), argument], env=environ, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        tokens, counts, series = json.loads(done.stdout.split("RESULT", 1)[1].splitlines()[0])
        return tokens, counts, series

    return run


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_parallel_ranks(ranks: Any, kind: str) -> None:
    """Two ranks, a KV head of every layer or a layer with all heads each: the same tokens as one, as sparse."""
    tokens, counts, series = ranks(1)
    parallel_tokens, parallel_counts, parallel_series = ranks(2, kind)
    assert parallel_tokens == tokens
    assert set(parallel_counts) == set(counts)
    for layer, (computed, causal) in counts.items():
        assert computed < causal
        assert parallel_counts[layer] == pytest.approx([computed, causal], rel=1e-3)
    # Chunks, tokens and observations are those of one rank of a layer.
    once = [
        name
        for name in series
        if name.startswith(("vsprefill_tokens", "vsprefill_request_chunks", "vsprefill_chunks", "vsprefill_index"))
        or ("_count" in name and "density" in name)
    ]
    assert {name: parallel_series[name] for name in once} == {name: series[name] for name in once}
    assert sum(series[name] for name in once if "tokens" in name and "decode" not in name) == 2590


def test_parallel_ranks_with_lists_of_tiles(ranks: Any) -> None:
    """Stages compute what one rank does. Ranks with a KV head each measure errors against their own share of the
    output: about as dense, and the same tokens where nothing is left out."""
    tokens, counts, _ = ranks(1, price=PRICE)
    staged_tokens, staged_counts, _ = ranks(2, "pipeline", price=PRICE)
    assert (staged_tokens, staged_counts) == (tokens, counts)
    _, parallel_counts, _ = ranks(2, "tensor", price=PRICE)
    for layer, (computed, causal) in counts.items():
        assert 0.1 < computed / causal < 0.9
        assert parallel_counts[layer][1] == causal
        assert parallel_counts[layer][0] == pytest.approx(computed, rel=0.25)
    whole_tokens, whole_counts, _ = ranks(2, "tensor", price=0.0)
    assert whole_tokens == ranks(1, price=0.0)[0]
    assert all(computed == causal for computed, causal in whole_counts.values())
