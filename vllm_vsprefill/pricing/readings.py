# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What a pass says of the next token of its rows, and how far two passes over the same rows are apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.eval.fidelity import Differences

TOP = 32
"""Likeliest tokens of dense attention over which the divergence is summed, the others taken together."""

ROWS = 256
"""Rows whose logits over the vocabulary are held at a time."""


@dataclass
class Readings:
    """What a pass says about its rows.

    Attributes:
        nll: float32 ``[rows]``: negative log-probability of the token that follows.
        best: int64 ``[rows]``: likeliest token.
        top: int64 ``[rows, TOP]``: likeliest tokens of dense attention.
        top_logprobs: float32 ``[rows, TOP]``: their log-probabilities in this pass.
    """

    nll: Tensor
    best: Tensor
    top: Tensor
    top_logprobs: Tensor

    def __getitem__(self, rows: slice) -> Readings:
        return Readings(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def joined(cls, parts: list[Readings]) -> Readings:
        """Readings of rows that follow each other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@torch.inference_mode()
def read(
    logits_of: Callable[[Tensor], Tensor], hidden: Tensor, following: Tensor, like: Readings | None = None
) -> Readings:
    """Readings of some rows; logits over the vocabulary are made for ``ROWS`` of them at a time.

    Args:
        logits_of: hidden states ``[rows, C]`` -> logits ``[rows, vocabulary]``.
        hidden: ``[rows, C]``.
        following: int64 ``[rows]``, the tokens that follow, or one less where the last row has none: its likeliest
            token stands for it.
        like: readings of the same rows with dense attention; None where these are those.

    Raises:
        DistilError: logits that are no numbers.
    """
    parts = []
    for r0 in range(0, len(hidden), ROWS):
        logits = logits_of(hidden[r0 : r0 + ROWS])
        rows = slice(r0, r0 + len(logits))
        norm = torch.logsumexp(logits.float(), -1)
        if not bool(norm.isfinite().all()):
            raise DistilError(
                f"logits that are no numbers {'with' if like is None else 'without'} dense attention: there is nothing "
                "to compare. float16 overflows in some models (--dtype bfloat16 or float32); otherwise the model's "
                "weights are damaged"
            )
        best = logits.argmax(-1)
        after = torch.cat((following[rows], best[-1:]))[: len(logits)]
        nll = norm - logits.gather(1, after[:, None])[:, 0].float()
        top = logits.topk(min(TOP, logits.shape[1]), -1).indices if like is None else like.top[rows]
        parts.append(Readings(nll, best, top, logits.gather(1, top).float() - norm[:, None]))
    return Readings.joined(parts)


def compare(dense: Readings, found: Readings) -> Differences:
    """How far a pass is from the dense one over the same rows; sums over these.

    The divergence is that of the dense pass's likeliest tokens, one by one, and all others together as one more: a
    lower bound of the one over the vocabulary.
    """
    p, q = (torch.cat((one.top_logprobs, _rest(one.top_logprobs)), 1) for one in (dense, found))
    change = (found.nll - dense.nll).double()
    return Differences(
        len(dense.nll),
        float((found.best == dense.best).sum()),
        float(change.sum()),
        float(change.abs().sum()),
        float((p.exp() * (p - q)).sum(1).double().sum()),
    )


def _rest(logprobs: Tensor) -> Tensor:
    """Log-probability of everything else, ``[rows, 1]``."""
    return torch.log((1 - logprobs.exp().sum(1, keepdim=True)).clamp(min=1e-6))
