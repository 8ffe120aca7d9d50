# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Stock vLLM on a GPU with the needle model: what the CPU's engine cannot do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from benchmarks.environment import NEEDLE_MODEL
from examples.needle import tasks
from vllm_vsprefill.stats import LayerCounts, read_counts


class Turn(NamedTuple):
    """Answers to all prompts, and what the layers counted meanwhile."""

    name: str
    answers: list[str]
    counts: dict[int, LayerCounts]


def differences(turn: Turn, first: Turn) -> list[str]:
    """Everything in which a turn is not as the first one, and what that means."""
    found = [
        f"{turn.name}: prompt {i} was answered {now!r}, at first {before!r}"
        for i, (now, before) in enumerate(zip(turn.answers, first.answers, strict=True))
        if now != before
    ]
    for layer in sorted(first.counts.keys() | turn.counts.keys()):
        now, before = (one.counts.get(layer, LayerCounts()) for one in (turn, first))
        if now == before:
            continue
        if now.causal != before.causal:
            why = "other rows were prefilled, so the prefix cache held other blocks"
        elif now.sparse_chunks + now.dense_chunks != before.sparse_chunks + before.dense_chunks:
            why = "prompts were cut into other chunks"
        else:
            why = "of the same rows, other pairs were selected, or other chunks sent to the stock kernel"
        found.append(f"{turn.name}: layer {layer} counted {now}, at first {before}: {why}")
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sleep_and_wake_change_no_answer(single_process: Path) -> None:
    """Asleep, the KV cache is gone and the weights are on the host; awake again, prompts are sparse as before.

    Prompts are given one after the other: side by side, the rows that one prefills beside another's decodes depend on
    when vLLM gets to see an output, and with the chunks what is selected for them.
    """
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

    def counts() -> dict[int, LayerCounts]:
        """What the layers counted so far, once no more is being published."""
        deadline = time.monotonic() + 20
        before = read_counts(single_process)
        while time.monotonic() < deadline:
            time.sleep(1)
            found = read_counts(single_process)
            if found == before:
                return found
            before = found
        raise AssertionError(f"counts still change after 20 s without a prompt: {before}")

    def turn(name: str) -> Turn:
        before = counts()
        answers = []
        for problem in problems:
            (output,) = llm.generate({"prompt_token_ids": problem.prompt_ids.tolist()}, sampling, use_tqdm=False)
            answers.append(output.outputs[0].text)
        after = counts()
        return Turn(name, answers, {layer: now - before.get(layer, LayerCounts()) for layer, now in after.items()})

    first = turn("first")
    assert all(problem.is_correct(text) for problem, text in zip(problems, first.answers, strict=True)), first.answers
    assert len(first.counts) == 6
    assert min(layer.sparse_chunks for layer in first.counts.values()) > 0
    assert llm.reset_prefix_cache() is not False  # None in releases that do not say
    found = differences(turn("again, without sleep"), first)
    for count in (1, 2):
        llm.sleep(level=1)
        llm.wake_up()
        found += differences(turn(f"after sleep {count}"), first)
    assert not found, "\n".join(found)


def test_differences_are_named() -> None:
    first = Turn("first", ["a", "b"], {0: LayerCounts(5, 10, 2, 1), 1: LayerCounts(6, 10, 3, 0)})
    assert differences(first, first) == []
    other = Turn("then", ["a", "c"], {0: LayerCounts(4, 10, 2, 1), 1: LayerCounts(6, 8, 3, 0), 2: LayerCounts()})
    answer, selected, cached = differences(other, first)
    assert answer == "then: prompt 1 was answered 'c', at first 'b'"
    assert "layer 0" in selected
    assert "other pairs" in selected
    assert "prefix cache" in cached
    cut = Turn("then", ["a", "b"], {**first.counts, 1: LayerCounts(6, 10, 4, 0)})
    assert "cut into other chunks" in differences(cut, first)[0]
