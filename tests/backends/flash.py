# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Lets the CUDA backend's tests run: on a GPU as it is, elsewhere under Triton's interpreter.

Without a GPU two functions of vLLM are replaced, the FlashAttention kernel call and the kernel that writes the cache,
each by a few lines of PyTorch; metadata classes, builder and implementation around them are vLLM's own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.interpreted import DEVICE, REASON, USABLE

needs_kernels = pytest.mark.skipif(not USABLE, reason=REASON.replace("test_triton_process", "test_cuda_process"))

# Without a device, what ran is checked here: (rows, largest context, splits, schedule) of every dense call.
calls: list[dict[str, Any]] = []


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    **kwargs: Any,
) -> None:
    """What ``flash_attn_varlen_func`` computes on a paged cache ``[blocks, block, H, D]``; zeros without a context."""
    assert causal
    assert out.shape == q.shape
    starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert starts[0] == 0
    assert starts[-1] in (0, len(q))  # none where the guard wants none
    assert len(lengths) == len(starts) - 1 <= len(block_table)
    calls.append({"rows": len(q), "lengths": lengths, **kwargs})
    group = q.shape[1] // k.shape[2]
    for i, n in enumerate(lengths):
        rows = slice(starts[i], starts[i + 1])
        count = starts[i + 1] - starts[i]
        assert count <= max_seqlen_q
        assert n <= max_seqlen_k
        if n == 0:
            out[rows] = 0
            continue
        position = torch.arange(n, device=q.device)
        block = block_table[i].long()[position // k.shape[1]]
        keys, values = (x[block, position % k.shape[1]].double().repeat_interleave(group, 1) for x in (k, v))
        if k.dtype.itemsize == 1 and k_descale is not None and v_descale is not None:
            keys, values = keys * k_descale[0, 0].double(), values * v_descale[0, 0].double()
        queries = q[rows].double()
        if q.dtype.itemsize == 1 and q_descale is not None:
            queries = queries * q_descale[0, 0].double()
        logits = torch.einsum("thd,nhd->htn", queries, keys) * softmax_scale
        hidden = position > torch.arange(n - count, n, device=q.device)[:, None]
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("htn,nhd->thd", weights, values).to(out.dtype)


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """What ``reshape_and_cache_flash`` does."""
    kept = slot_mapping >= 0
    slots, size = slot_mapping[kept], key_cache.shape[1]
    for new, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        part = new[: len(slot_mapping)][kept]
        if kv_cache_dtype.startswith("fp8"):
            part = (part.float() / scale.to(part.device)).to(torch.float8_e4m3fn).view(cache.dtype)
        cache[slots // size, slots % size] = part


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make layers of this process use the CUDA backend."""
    from vllm.v1.attention.backends import cpu_attn, flash_attn

    from vllm_vsprefill import backends
    from vllm_vsprefill.backends.cuda import VSPrefillFlashBackend

    calls.clear()
    if DEVICE == "cuda":
        return
    monkeypatch.setattr(backends, "VSPrefillBackend", VSPrefillFlashBackend, raising=False)
    # vLLM 0.33 asks CPU attention, which this stands in for, about the type of the cache.
    anything = classmethod(lambda cls, kv_cache_dtype: True)
    monkeypatch.setattr(cpu_attn.CPUAttentionBackend, "supports_kv_cache_dtype", anything)
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", varlen, raising=False)
    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", write_cache, raising=False)
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *args, **kwargs: 2)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_quant_query_input", lambda: True)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *args, **kwargs: True, raising=False)
    monkeypatch.setattr(type(flash_attn.current_platform), "fp8_dtype", classmethod(lambda cls: torch.float8_e4m3fn))
