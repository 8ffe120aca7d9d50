# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What a server will do with prompts, told in one line once all its layers are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_vsprefill.plan import Gate


@dataclass(frozen=True, slots=True)
class Outlook:
    """The line for the log, and whether it is a warning: nothing, or not everything that looks like it, runs sparse."""

    is_warning: bool
    text: str


def outlook(vllm_config: Any, gate: Gate, sparse_layers: int, stock: Mapping[str, int]) -> Outlook:
    """The outlook of one worker.

    Args:
        vllm_config: vLLM's configuration.
        gate: which chunks run sparse.
        sparse_layers: how many layers of this worker can.
        stock: why others cannot, and how many layers each reason is of.
    """
    problems = []
    if not sparse_layers:
        problems += [f"{reason} ({count} {'layer' if count == 1 else 'layers'})" for reason, count in stock.items()]
        if not stock:
            problems.append(
                f"no layer was set up, as vLLM does after loading weights: the loader "
                f"({getattr(vllm_config.load_config, 'load_format', 'unknown')}) leaves that out"
            )
    chunk, limit = longest_chunk(vllm_config)
    longest = vllm_config.model_config.max_model_len
    shortest = gate.shortest_seq_len(chunk)
    if shortest is None or shortest > longest:
        pays = "it does not pay at any context" if shortest is None else f"it pays from {shortest} tokens of context"
        lower = "min_rows or dense_last_rows" if shortest is None else "min_seq_len or min_pairs"
        problems.append(
            f"the longest prompt has {longest} tokens (max_model_len) and its chunks have {chunk} ({limit}), for which "
            f"{pays}; raise {limit}, or lower {lower}"
        )
    if problems:
        return Outlook(True, f"no prompt will run sparse: {'; '.join(problems)}.")
    text = (
        f"chunks of {chunk} prompt tokens run sparse from {shortest} tokens of context, in {sparse_layers} of "
        f"{sparse_layers + sum(stock.values())} layers."
    )
    threshold = getattr(vllm_config.scheduler_config, "long_prefill_token_threshold", 0)
    if 0 < threshold < chunk and not getattr(
        vllm_config.scheduler_config, "long_prefill_token_threshold_adaptive", False
    ):
        least = gate.shortest_seq_len(threshold)
        if least is None or least > longest:
            # vLLM 0.32 leaves a prompt alone that is the only request; releases before it cut that up, too.
            return Outlook(
                True,
                f"{text} But long_prefill_token_threshold cuts prompts into chunks of {threshold} tokens, at least "
                "while several requests run, and chunks of that size run dense; raise it.",
            )
    return Outlook(False, text)


def longest_chunk(vllm_config: Any) -> tuple[int, str]:
    """Most tokens of one prompt that a step computes, and the setting that decides it."""
    scheduler = vllm_config.scheduler_config
    limits = [(scheduler.max_num_batched_tokens, "max_num_batched_tokens")]
    if scheduled := getattr(scheduler, "max_num_scheduled_tokens", None):
        limits.append((scheduled, "max_num_scheduled_tokens"))
    limits.append((vllm_config.model_config.max_model_len, "max_model_len"))
    return min(limits, key=lambda limit: limit[0])
