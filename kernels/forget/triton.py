# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Marks the logits of cache slots as missing, for CUDA devices.

One launch whose grid follows from shapes alone, nothing allocated and nothing read on the host: it runs with every
write to the KV cache, also inside captured CUDA graphs, where padded tokens have negative slots.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launch, next_power_of_2

BLOCK = 64  # tokens of a program


@triton.jit(do_not_specialize=["num_tokens"])
def _forget_kernel(
    p_logits, p_slot_mapping, num_tokens, stride_slot, WIDTH: tl.constexpr, BW: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of tokens; every value of their rows becomes NaN."""
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_w = tl.arange(0, BW)
    # [BLOCK]
    b_slot = tl.load(p_slot_mapping + o_t, mask=o_t < num_tokens, other=-1)
    m_store = (b_slot >= 0)[:, None] & (o_w < WIDTH)[None, :]
    b_nan = tl.full([BLOCK, BW], float("nan"), tl.float32).to(p_logits.dtype.element_ty)
    tl.store(p_logits + b_slot[:, None] * stride_slot + o_w[None, :], b_nan, mask=m_store)


def forget(logits: Tensor, slot_mapping: Tensor) -> None:
    """As ``paged.forget``."""
    num_tokens, width = slot_mapping.shape[0], logits.shape[1]
    if num_tokens == 0 or width == 0:
        return
    launch(
        _forget_kernel, (cdiv(num_tokens, BLOCK),), (logits, slot_mapping, num_tokens, logits.stride(0)),
        WIDTH=width, BW=next_power_of_2(width), BLOCK=BLOCK,
    )  # fmt: skip
