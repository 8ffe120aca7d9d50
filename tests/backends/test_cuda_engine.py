# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Stock vLLM on a GPU with the needle model: what the CPU's engine cannot do."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.environment import NEEDLE_MODEL
from examples.needle import tasks
from vllm_vsprefill.stats import LayerCounts, read_counts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_sleep_and_wake_change_no_answer(single_process: Path) -> None:
    """Asleep, the KV cache is gone and the weights are on the host; awake again, prompts are sparse as before."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(NEEDLE_MODEL),
        attention_backend="VSPREFILL",
        additional_config={"vsprefill": {"estimator": "vsindexer", "min_seq_len": 4096, "min_pairs": 0}},
        enable_sleep_mode=True,
        enforce_eager=True,
        max_model_len=20480,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=2 * 10**9,
        gpu_memory_utilization=0.2,
    )
    rng = np.random.default_rng(7)
    problems = [tasks.make_problem(rng, "multi_key", tasks.HAYSTACKS[0], 16384) for _ in range(3)]
    sampling = SamplingParams(max_tokens=24, temperature=0)

    def answers() -> list[str]:
        prompts = [{"prompt_token_ids": problem.prompt_ids.tolist()} for problem in problems]
        return [output.outputs[0].text for output in llm.generate(prompts, sampling, use_tqdm=False)]

    def counts(least_chunks: int) -> dict[int, LayerCounts]:
        """What the layers counted so far, once every one has so many sparse chunks and no more are being published."""
        deadline = time.monotonic() + 10
        before: dict[int, LayerCounts] = {}
        while time.monotonic() < deadline:
            found = read_counts(single_process)
            chunks = min((layer.sparse_chunks for layer in found.values()), default=0)
            if chunks >= least_chunks and found == before:
                return found
            before = found
            time.sleep(0.5)
        raise AssertionError(f"of {least_chunks} sparse chunks a layer were published: {before}")

    before = answers()
    assert all(problem.is_correct(text) for problem, text in zip(problems, before, strict=True))
    first = counts(1)
    chunks = min(layer.sparse_chunks for layer in first.values())
    assert chunks > 0
    for turn in (2, 3):
        llm.sleep(level=1)
        llm.wake_up()
        assert answers() == before
        # Equal prompts select equally many pairs, or some logit was not what it was.
        now = counts(turn * chunks)
        for index, layer in first.items():
            assert now[index].sparse_chunks == turn * layer.sparse_chunks
            assert now[index].computed == turn * layer.computed
