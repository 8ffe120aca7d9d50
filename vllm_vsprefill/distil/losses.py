# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Diagonals between a true and a predicted distribution, per KV head."""

from __future__ import annotations

import torch
from torch import Tensor


def kl(true: Tensor, log_predicted: Tensor) -> Tensor:
    """KL(true || predicted), natural logarithm; ``[H, n]`` each, returns ``[H]``."""
    entropy: Tensor = torch.special.xlogy(true, true).sum(-1)
    return entropy - (true * log_predicted).sum(-1)


def mse(true: Tensor, log_predicted: Tensor) -> Tensor:
    """Squared error summed over positions: the mean would vanish in long contexts."""
    return (true - log_predicted.exp()).square().sum(-1)


def cosine(true: Tensor, log_predicted: Tensor) -> Tensor:
    """One minus the cosine of the angle between the two."""
    similarity: Tensor = torch.nn.functional.cosine_similarity(true, log_predicted.exp(), dim=-1, eps=1e-12)
    return 1 - similarity


LOSSES = {"kl": kl, "mse": mse, "cosine": cosine}
