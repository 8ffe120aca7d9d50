# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""An indexer in training: its weights per layer in float32, what it reads, and its loss on one layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from vllm_vsprefill.checkpoint import PARTS
from vllm_vsprefill.distil.capture import LayerCall
from vllm_vsprefill.distil.losses import LOSSES, kl
from vllm_vsprefill.distil.options import Inputs, StudentOptions
from vllm_vsprefill.distil.scoring import score
from vllm_vsprefill.distil.targets import Range, TargetKind, Targets


def features(inputs: Inputs, call: LayerCall, dtype: torch.dtype) -> Tensor:
    """What an indexer reads of each token, ``[Hkv, n, len(inputs) * D]``; "q" is the mean query of the GQA group."""
    heads = call.k.shape[1]
    parts = {"k": call.k, "v": call.v}
    if "q" in inputs:
        parts["q"] = call.q.unflatten(1, (heads, -1)).mean(2)
    return torch.cat([parts[name].to(dtype).transpose(0, 1) for name in inputs], -1)


def initial_weights(layers: Iterable[int], heads: int, width: int, hidden: int, seed: int) -> dict[str, Tensor]:
    """Weights of an indexer before training, by their names in a checkpoint.

    Args:
        layers: covered layers of the model.
        heads: KV heads, on dimension 0 of every tensor.
        width: inputs of a token, 2 D for ``[k ; v]``.
        hidden: width between the two linear layers.
        seed: of the random numbers.
    """
    rng = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for i in layers:
        # He initialisation before the ReLU. The second layer starts small, so that training starts from nearly uniform
        # distributions.
        w1 = torch.randn(heads, width, hidden, generator=rng) * math.sqrt(2.0 / width)
        w2 = torch.randn(heads, hidden, 2, generator=rng) * (0.1 / math.sqrt(hidden))
        parts = (w1, torch.zeros(heads, hidden), w2, torch.zeros(heads, 2))
        made |= {f"layers.{i}.{part}": value for part, value in zip(PARTS, parts, strict=True)}
    return made


class Student(nn.Module):
    """Weights of one indexer, by their names in a checkpoint.

    Args:
        name: for logs and files.
        options: what it reads, its width, its loss and its targets.
        layers: covered layers of the model.
        heads: KV heads.
        size: head size.
        seed: of the initial weights.
    """

    def __init__(
        self, name: str, options: StudentOptions, layers: Iterable[int], heads: int, size: int, seed: int
    ) -> None:
        super().__init__()
        self.name, self.options = name, options
        self.kind = TargetKind(options.target, options.exclude_window, options.peak_power)
        self.layer_indices = tuple(layers)
        start = initial_weights(self.layer_indices, heads, len(options.inputs) * size, options.hidden_size, seed)
        # Dots are not allowed in the names of a ParameterDict.
        self.weights = nn.ParameterDict(
            {name.removeprefix("layers.").replace(".", "_"): nn.Parameter(value) for name, value in start.items()}
        )

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``w1, b1, w2, b2`` of a layer, the KV heads on dimension 0."""
        w1, b1, w2, b2 = (self.weights[f"{index}_{part}"] for part in PARTS)
        return w1, b1, w2, b2

    def tensors(self) -> dict[str, Tensor]:
        """The weights by their names in a checkpoint, not copied and without gradients."""
        return {
            f"layers.{i}.{part}": self.weights[f"{i}_{part}"].detach() for i in self.layer_indices for part in PARTS
        }

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy weights in, by the names that ``tensors`` gives."""
        for name, target in self.tensors().items():
            target.copy_(tensors[name])

    def logits(self, call: LayerCall, x: Tensor) -> Tensor:
        """float32 ``[Hkv, n, 2]`` for the features ``x`` of a layer."""
        return score(x, *self.layer(call.layer))

    def losses(self, logits: Tensor, ranges: Sequence[Range], targets: Sequence[Targets]) -> tuple[Tensor, Tensor]:
        """Loss to descend and KL divergence, each ``[2]`` (columns, diagonals), mean over heads and ranges."""
        measure = LOSSES[self.options.loss]
        found, divergences = [], []
        # [2, H, n]: softmax over the innermost axis is many times faster.
        planes = logits.permute(2, 0, 1).contiguous()
        for part, true in zip(ranges, targets, strict=True):
            columns, reversed_diagonals = torch.log_softmax(planes[..., : part.end], dim=-1).unbind(0)
            diagonals = reversed_diagonals.flip(-1)
            found.append(
                torch.stack((measure(true.columns, columns).mean(), measure(true.diagonals, diagonals).mean()))
            )
            if self.options.loss != "kl":
                with torch.no_grad():
                    divergences.append(
                        torch.stack((kl(true.columns, columns).mean(), kl(true.diagonals, diagonals).mean()))
                    )
        loss = torch.stack(found).mean(0)
        return loss, loss.detach() if self.options.loss == "kl" else torch.stack(divergences).mean(0)
