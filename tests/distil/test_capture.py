# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What is captured from stock models, against an independent computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distil import tiny
from vllm_vsprefill.distil import attention, capture
from vllm_vsprefill.distil.capture import LayerCall
from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.model import attention_layers, positions, wrap


def captured(model: Any, ids: Tensor) -> tuple[dict[int, LayerCall], Tensor]:
    calls: dict[int, LayerCall] = {}
    hidden = wrap(model, "tiny").run(ids, lambda call: calls.update({call.layer: call}))
    return calls, hidden


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_keys_values_and_queries_are_those_of_the_stock_model(name: str) -> None:
    ids = torch.randint(4096, (40,), generator=torch.Generator().manual_seed(1))
    stock = tiny.model(name)
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        expected = stock.get_decoder()(input_ids=ids[None], use_cache=True, output_attentions=True)
    calls, hidden = captured(tiny.model(name), ids)
    torch.testing.assert_close(hidden, expected.last_hidden_state[0], rtol=1e-4, atol=1e-4)
    layers = attention_layers(stock.config)
    assert set(calls) == set(layers.covered)
    assert set(layers.covered) | set(layers.skipped) == {0, 1}
    assert (name in ("gemma2", "gemma3")) == (layers.covered == (1,))
    for index, call in calls.items():
        # The stock model's own cache holds keys with RoPE, and values.
        cached = expected.past_key_values.layers[index]
        torch.testing.assert_close(call.k, cached.keys[0].transpose(0, 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(call.v, cached.values[0].transpose(0, 1), rtol=1e-4, atol=1e-4)
        # Its eager attention weights tell whether queries and scale are right.
        keys = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
        logits = torch.einsum("thd,nhd->htn", call.q, keys) * call.scale
        logits = logits.masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), float("-inf"))
        torch.testing.assert_close(logits.softmax(-1), expected.attentions[index][0], rtol=1e-3, atol=1e-5)


def test_gemma3_scales_by_its_own_factor() -> None:
    calls, _ = captured(tiny.model("gemma3", query_pre_attn_scalar=100), torch.arange(12))
    assert calls[1].scale == pytest.approx(0.1)


def test_the_model_is_left_alone_outside_a_run_and_keeps_no_graph() -> None:
    model = tiny.model("qwen3")
    teacher = wrap(model, "tiny")
    calls: list[LayerCall] = []
    teacher.run(torch.arange(9), calls.append)
    assert len(calls) == 2
    assert not any(x.requires_grad for call in calls for x in call[1:4])
    assert all(not p.requires_grad for p in model.parameters())
    teacher.run(torch.arange(9))
    assert len(calls) == 2


def test_layers_without_full_attention_are_left_out_with_a_reason() -> None:
    layers = attention_layers(tiny.config("gemma3"))
    assert "sliding window of 8" in layers.describe()
    assert attention_layers(tiny.config("mistral", sliding_window=128)).covered == ()
    capped = tiny.model("gemma2", attn_logit_softcapping=30.0)
    with pytest.raises(DistilError, match=r"soft-capped \(at 30\)"):
        wrap(capped, "tiny")


def test_a_model_that_goes_its_own_way_is_found_out() -> None:
    teacher = wrap(tiny.model("qwen3"), "tiny")
    config: Any = teacher.decoder.config
    config._attn_implementation = "eager"
    with pytest.raises(DistilError, match=r"layers \[0, 1\] of the model did not pass through"):
        teacher.run(torch.arange(9), lambda call: None)


def test_masks_and_batches_are_refused() -> None:
    module: Any = torch.nn.Module()
    module.layer_idx = 0
    q = torch.zeros(2, 2, 4, 8)
    with pytest.raises(DistilError, match="one whole causal sequence"):
        capture.capture_attention(module, q, q, q, None)
    with pytest.raises(DistilError, match="a mask"):
        capture.capture_attention(module, q[:1], q[:1], q[:1], torch.zeros(1, 1, 4, 4))


def test_too_little_memory_is_said_whoever_listens() -> None:
    teacher = wrap(tiny.model("qwen3"), "tiny")

    def exhausted(call: LayerCall) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(DistilError, match=r"out of memory on cpu with a sequence of 9 tokens.*--length of calibrate"):
        teacher.run(torch.arange(9), exhausted)


def test_attention_sinks_are_refused() -> None:
    module: Any = torch.nn.Module()
    module.layer_idx = 3
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(DistilError, match="layer 3 has attention sinks"):
        capture.capture_attention(module, q, q, q, None, s_aux=torch.zeros(2))


def test_positions_of_scaled_rope() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 4096}
    assert positions(tiny.config("qwen3")) == 4096
    assert positions(tiny.config("qwen3", rope_parameters=yarn)) == 16384
    assert positions(tiny.config("qwen3", rope_parameters=yarn, max_position_embeddings=16384)) == 16384
    assert positions(tiny.config("llama3.1")) == 4096


def test_sliding_attention_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WINDOW_ROWS", 7)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 30, 8, generator=rng) for h in (4, 2, 2))
    distance = torch.arange(30)[:, None] - torch.arange(30)
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) * 0.3
    logits = logits.masked_fill((distance < 0) | (distance >= 5), float("-inf"))
    expected = logits.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(attention.sliding(q, k, v, 0.3, 5), expected)
    torch.testing.assert_close(attention.sliding(q[:, :, 11:], k, v, 0.3, 5), expected[:, :, 11:])  # the last rows


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_the_log_sum_exp_of_cuda_kernels(heads: tuple[int, int]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert attention.lse_kernel(device, torch.bfloat16, *heads, 128) is not None
    q, k, v = (
        torch.randn(1, 300, h, 128, device=device).bfloat16().transpose(1, 2) for h in (heads[0], heads[1], heads[1])
    )
    _, lse = attention.causal(q, k, v, 0.1)
    keys = k.repeat_interleave(heads[0] // heads[1], 1)
    logits = (q.float() @ keys.float().transpose(-1, -2)) * 0.1
    logits.masked_fill_(torch.ones(300, 300, dtype=torch.bool, device=device).triu(1), float("-inf"))
    assert lse is not None
    torch.testing.assert_close(lse, logits.logsumexp(-1)[0].T, rtol=1e-3, atol=2e-3)
