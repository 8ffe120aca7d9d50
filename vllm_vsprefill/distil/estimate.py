# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What a training run will take, from the model's configuration alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from vllm_vsprefill.distil.model import check, decoder_of, text_config
from vllm_vsprefill.distil.options import TrainOptions
from vllm_vsprefill.distil.rehearsal import blueprint

# Shares of a device's measured rate of large matrix products that the parts of a run reach. Assumptions, stated in the
# output: dense layers and flash attention run close to it, the target kernels at about half.
DENSE_SHARE, ATTENTION_SHARE, TARGET_SHARE = 0.8, 0.6, 0.4


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes, work in floating-point operations of the longest sequence."""

    model_parameters: int
    indexer_parameters: int
    covered: int
    left_out: dict[int, str]
    model_bytes: int
    state_bytes: int
    activation_bytes: int
    dense_flops: float
    attention_flops: float
    target_flops: float
    indexer_flops: float

    @property
    def total_bytes(self) -> int:
        return self.model_bytes + self.state_bytes + self.activation_bytes

    def seconds(self, rate: float) -> float:
        """Of one sequence of the longest length, at a rate of large matrix products in operations per second."""
        return (
            (self.dense_flops + self.indexer_flops) / (rate * DENSE_SHARE)
            + self.attention_flops / (rate * ATTENTION_SHARE)
            + self.target_flops / (rate * TARGET_SHARE)
        )


def estimate(config: Any, options: TrainOptions, element: int = 2, trust_remote_code: bool = False) -> Estimate:
    """Estimate a run.

    Args:
        config: the model's transformers configuration.
        options: settings of the run.
        element: bytes of a weight or activation of the model.
        trust_remote_code: run code that lies with the model.

    Raises:
        DistilError: the model has no layer for an indexer.
    """
    fingerprint, layers = check(config)
    text = text_config(config)
    decoder = decoder_of(blueprint(config, trust_remote_code))
    parameters = sum(p.numel() for p in decoder.parameters())
    embedding = decoder.get_input_embeddings().weight.numel()
    n, heads, size = options.max_length, fingerprint.num_query_heads, fingerprint.head_size
    kv, hidden = fingerprint.num_kv_heads, options.student.hidden_size
    width = len(options.student.inputs) * size
    per_layer = kv * (width * hidden + hidden + 2 * hidden + 2)
    covered = len(layers.covered)
    indexer = covered * per_layer
    # Chunks of a sequence whose rows are summed: all of them, or as many as are drawn.
    chunk = sum(c or n for c in options.chunk_lengths) / len(options.chunk_lengths)
    rows = min(n, options.chunks_per_sequence * chunk)
    causal = n * n / 2
    inner = int(getattr(text, "intermediate_size", 4 * fingerprint.hidden_size) or 4 * fingerprint.hidden_size)
    # Alive together: residual stream and its copy in float32, the widest of attention (queries, expanded keys and
    # values, output) and the feed-forward layer, and the indexer's inputs and blocks.
    attention = 4 * heads * size * element
    feed_forward = 3 * inner * element
    activations = n * (fingerprint.hidden_size * (2 * element + 4) + max(attention, feed_forward))
    activations += n * kv * (2 * size + width) * element + 6 * 2**27 + 6 * n * kv * 4 * options.chunks_per_sequence
    return Estimate(
        model_parameters=parameters,
        indexer_parameters=indexer,
        covered=covered,
        left_out=layers.skipped,
        model_bytes=parameters * element,
        state_bytes=16 * indexer,
        activation_bytes=int(activations),
        dense_flops=2.0 * (parameters - embedding) * n,
        attention_flops=4.0 * causal * heads * size * fingerprint.num_layers,
        # Columns and bands each compute the logits again; a range of rows costs its share of the causal area.
        target_flops=4.0 * causal * heads * size * covered * min(1.0, rows / n),
        indexer_flops=2.0 * 4 * n * kv * width * hidden * covered,
    )


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, measured in about a fifth of a second."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    count, begin = 0, time.perf_counter()
    while True:
        torch.mm(a, b)
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = time.perf_counter() - begin
        if spent > 0.2:
            return 2.0 * size**3 * count / spent


def describe(e: Estimate, options: TrainOptions, device: torch.device, rate: float, processes: int) -> str:
    """The estimate for people to read."""
    gib = 2**30
    one = e.seconds(rate)
    mean_share = sum(length / options.max_length for length in options.lengths()) / len(options.lengths())
    # Attention makes longer sequences dearer than their length; the linear share is the upper end for shorter ones.
    total = one * mean_share * options.steps * options.accumulation
    lines = [
        f"model: {e.model_parameters / 1e9:.3f} G parameters in its decoder, {e.covered} layers get an indexer",
        f"indexer: {e.indexer_parameters / 1e6:.2f} M parameters, all of them trained",
        f"memory at {options.max_length:,} tokens: about {e.total_bytes / gib:.1f} GiB (model "
        f"{e.model_bytes / gib:.1f}, indexer with gradients and optimiser {e.state_bytes / gib:.1f}, "
        f"activations {e.activation_bytes / gib:.1f})",
        f"work per sequence of {options.max_length:,} tokens: {e.dense_flops / 1e12:.1f} TFLOP dense layers, "
        f"{e.attention_flops / 1e12:.1f} attention, {e.target_flops / 1e12:.1f} targets, {e.indexer_flops / 1e12:.1f} "
        "indexer",
        f"measured on {device}: {rate / 1e12:.2f} TFLOP/s in matrix products; assumed of it: {DENSE_SHARE:.0%} in "
        f"dense layers, {ATTENTION_SHARE:.0%} in attention, {TARGET_SHARE:.0%} in the target kernels",
        f"time: about {one:.2f} s per sequence, at most {_duration(total)} for {options.steps} steps of "
        f"{options.accumulation * processes} sequences (lengths {', '.join(f'{x:,}' for x in options.lengths())})",
    ]
    if device.type == "cuda":
        free = torch.cuda.get_device_properties(device).total_memory
        if e.total_bytes > free:
            lines.append(f"this does not fit into the {free / gib:.0f} GiB of {device}: lower --max-length")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
