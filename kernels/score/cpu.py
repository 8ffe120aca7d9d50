# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Per-token logits of the VSIndexer in blocks of tokens: the fast path for CPUs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..parallel import run_pieces
from ..types import IndexerLayerWeights
from .naive import check_score

# Tokens of a block: its hidden activations stay in the cache of a core (512 x 1024 float32 are 2 MiB).
ROWS = 512


def score(k: Tensor, v: Tensor, weights: IndexerLayerWeights) -> Tensor:
    """Same contract as ``naive.score``.

    With bfloat16 keys the first layer takes bfloat16 inputs and weights, sums in float32 and rounds the hidden
    activations to bfloat16; the second layer is float32. Other inputs are computed in float32 throughout.
    """
    check_score(k, v, weights)
    dtype = torch.bfloat16 if k.dtype == torch.bfloat16 else torch.float32
    num_tokens, num_heads, _ = k.shape
    w1, b1 = weights.w1.to(dtype), weights.b1.to(dtype)
    w2, b2 = weights.w2.float(), weights.b2.float()
    logits = torch.empty(num_tokens, num_heads, 2, dtype=torch.float32, device=k.device)

    def piece(head: int, start: int) -> None:
        rows = slice(start, start + ROWS)
        x = torch.cat((k[rows, head], v[rows, head]), dim=-1).to(dtype)
        hidden = torch.addmm(b1[head], x, w1[head]).relu_()
        logits[rows, head] = torch.addmm(b2[head], hidden.float(), w2[head])

    run_pieces([partial(piece, head, start) for start in range(0, num_tokens, ROWS) for head in range(num_heads)])
    return logits
