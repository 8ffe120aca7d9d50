# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Estimates against what models and kernels really take."""

from __future__ import annotations

import pytest
import torch

from tests.distil import tiny
from vllm_vsprefill.distil import estimate
from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.model import wrap
from vllm_vsprefill.distil.options import train_options
from vllm_vsprefill.distil.student import Student


def test_parameters_are_counted() -> None:
    config = tiny.config("gemma3")
    options = train_options({"hidden_size": 24}, max_length=512, min_length=64)
    found = estimate.estimate(config, options, 4)
    teacher = wrap(tiny.model("gemma3"), "tiny")
    student = Student("s", options.student, teacher.layers.covered, 2, 16, 0)
    assert found.indexer_parameters == sum(p.numel() for p in student.parameters())
    assert found.model_parameters == sum(p.numel() for p in teacher.decoder.parameters())
    assert found.covered == 1
    assert list(found.left_out) == [0]


def test_work_grows_as_it_should() -> None:
    config = tiny.config("qwen3")
    short, long = (
        estimate.estimate(config, train_options({}, max_length=n, min_length=16, chunk_lengths=(0,)))
        for n in (1024, 4096)
    )
    assert long.attention_flops == pytest.approx(16 * short.attention_flops)
    assert long.dense_flops == pytest.approx(4 * short.dense_flops)
    assert long.target_flops == pytest.approx(long.attention_flops)
    assert long.state_bytes == short.state_bytes
    assert long.seconds(1e12) > 4 * short.seconds(1e12)
    # Two of many chunks: a part of the rows.
    part = estimate.estimate(
        config, train_options({}, max_length=4096, min_length=16, chunk_lengths=(512,), chunks_per_sequence=2)
    )
    assert part.target_flops == pytest.approx(long.target_flops / 4)


def test_a_well_known_shape() -> None:
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    options = train_options({}, max_length=131072, min_length=2048)
    found = estimate.estimate(config, options)
    assert found.model_parameters == pytest.approx(4.02e9, rel=0.01)
    assert found.indexer_parameters == 36 * 8 * (256 * 1024 + 1024 + 2048 + 2)
    assert found.total_bytes < 120e9
    text = estimate.describe(found, options, torch.device("cpu"), 500e12, 1)
    assert "36 layers get an indexer" in text
    assert "GiB" in text


def test_the_probe_measures_something() -> None:
    assert estimate.matmul_rate(torch.device("cpu"), torch.float32) > 1e8


def test_models_without_full_attention_are_refused() -> None:
    with pytest.raises(DistilError, match="nothing to train"):
        estimate.estimate(tiny.config("mistral", sliding_window=64), train_options({}))
