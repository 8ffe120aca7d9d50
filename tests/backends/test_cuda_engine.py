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
from vllm_vsprefill.stats import read_counts

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
        additional_config={"vsprefill": {"estimator": "vsindexer", "min_context": 4096, "min_pairs": 0}},
        enable_sleep_mode=True,
        enforce_eager=True,
        max_model_len=20480,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=2 * 10**9,
        gpu_memory_utilization=0.2,
    )
    rng = np.random.default_rng(7)
    problems = [tasks.make_problem(rng, "single", tasks.HAYSTACKS[0], 16384) for _ in range(3)]
    sampling = SamplingParams(max_tokens=24, temperature=0)

    def answers() -> list[str]:
        prompts = [{"prompt_token_ids": problem.prompt_ids.tolist()} for problem in problems]
        return [output.outputs[0].text for output in llm.generate(prompts, sampling, use_tqdm=False)]

    def sparse_chunks(above: int) -> int:
        """Chunks that ran sparse in some layer, once more than ``above`` are published or time is up."""
        until = time.monotonic() + 10
        while True:
            found = sum(counts.sparse_chunks for counts in read_counts(single_process).values())
            if found > above or time.monotonic() > until:
                return found
            time.sleep(0.1)

    before = answers()
    assert all(problem.is_correct(text) for problem, text in zip(problems, before, strict=True))
    seen = sparse_chunks(0)
    assert seen > 0
    for _ in range(2):
        llm.sleep(level=1)
        llm.wake_up()
        assert answers() == before
        now = sparse_chunks(seen)
        assert now > seen
        seen = now
