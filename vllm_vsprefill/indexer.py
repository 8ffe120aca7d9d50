# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The VSIndexer: a small network per layer and KV head that rates every token's column and diagonal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vllm_vsprefill.kernels.score.naive import score
from vllm_vsprefill.kernels.types import IndexerLayerWeights

DEFAULT_HIDDEN_SIZE = 1024


class _LayerIndexer(nn.Module):
    """The four tensors of one layer, as parameters (training) or as buffers (serving)."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __init__(self, weights: IndexerLayerWeights, trainable: bool) -> None:
        super().__init__()
        for name, value in weights._asdict().items():
            if trainable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def weights(self, heads: slice) -> IndexerLayerWeights:
        return IndexerLayerWeights(self.w1[heads], self.b1[heads], self.w2[heads], self.b2[heads])


class VSIndexer(nn.Module):
    """Two linear layers per attention layer and KV head: ``relu([k ; v] @ w1 + b1) @ w2 + b2``.

    VSPrefill, arXiv 2603.04460. The query heads of one GQA group share one index. Names in ``state_dict()`` are those
    of the checkpoint format: ``layers.{i}.w1`` and so on, KV heads stacked on dimension 0.

    Args:
        layers: indices of the attention layers that have an indexer.
        num_kv_heads: KV heads, ``H``.
        head_size: size of one key or value, ``D``.
        hidden_size: width between the two linear layers.
        dtype: of the weights; the logits are float32 in any case.
        device: of the weights.
        generator: source of the initial values, for repeatable training (on the CPU).

    Raises:
        ValueError: no layer, a negative or repeated layer index, or a size below 1.
    """

    def __init__(
        self,
        layers: Iterable[int],
        num_kv_heads: int,
        head_size: int,
        hidden_size: int = DEFAULT_HIDDEN_SIZE,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        indices = list(layers)
        if not indices or min(indices) < 0 or len(set(indices)) != len(indices):
            raise ValueError(f"layers must be distinct indices >= 0 and at least one, got {indices}")
        for name, value in (("num_kv_heads", num_kv_heads), ("head_size", head_size), ("hidden_size", hidden_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        fresh = {i: _initial(num_kv_heads, head_size, hidden_size, generator) for i in sorted(indices)}
        self._set({i: _move(weights, dtype, device) for i, weights in fresh.items()}, trainable=True)

    @classmethod
    def from_weights(cls, weights: Mapping[int, IndexerLayerWeights], *, trainable: bool = False) -> VSIndexer:
        """Indexer over given tensors (not copied), keyed by layer index.

        Without ``trainable`` they are buffers: vLLM's sleep mode brings buffers back, and no optimiser takes them up.

        Raises:
            ValueError: no layer, or shapes that do not fit together; the message names the tensor.
        """
        if not weights:
            raise ValueError("weights must hold at least one layer")
        heads, inputs, hidden = next(iter(weights.values())).w1.shape
        for layer, tensors in weights.items():
            expected = weight_shapes(heads, inputs // 2, hidden)
            for name, value in tensors._asdict().items():
                if tuple(value.shape) != expected[name]:
                    raise ValueError(f"layers.{layer}.{name} has shape {list(value.shape)}, expected {expected[name]}")
        indexer = cls.__new__(cls)
        nn.Module.__init__(indexer)
        indexer._set(dict(sorted(weights.items())), trainable)
        return indexer

    def _set(self, weights: Mapping[int, IndexerLayerWeights], trainable: bool) -> None:
        self.layers = nn.ModuleDict({str(i): _LayerIndexer(tensors, trainable) for i, tensors in weights.items()})
        self.num_kv_heads, inputs, self.hidden_size = next(iter(weights.values())).w1.shape
        self.head_size = inputs // 2

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Covered layers, ascending."""
        return tuple(int(name) for name in self.layers)

    def layer_weights(self, layer_index: int, head_slice: slice | None = None) -> IndexerLayerWeights:
        """Weights of one layer, views of all KV heads or of a slice of them.

        Raises:
            KeyError: the layer is not covered.
        """
        if str(layer_index) not in self.layers:
            raise KeyError(f"layer {layer_index} has no indexer; covered are {list(self.layer_indices)}")
        layer = self.layers[str(layer_index)]
        assert isinstance(layer, _LayerIndexer)
        return layer.weights(slice(None) if head_slice is None else head_slice)

    def forward(self, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        """Logits of each token, by the reference formula: in float32 and differentiable, on any device.

        Args:
            k: ``[T, H, D]``, keys with RoPE applied.
            v: ``[T, H, D]``, values.
            layer_index: attention layer.

        Returns:
            float32 ``[T, H, 2]``: column, diagonal.
        """
        return score(k, v, self.layer_weights(layer_index))


def weight_shapes(num_kv_heads: int, head_size: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Shape of each of the four tensors of a layer."""
    return {
        "w1": (num_kv_heads, 2 * head_size, hidden_size),
        "b1": (num_kv_heads, hidden_size),
        "w2": (num_kv_heads, hidden_size, 2),
        "b2": (num_kv_heads, 2),
    }


def _initial(heads: int, head_size: int, hidden: int, generator: torch.Generator | None) -> IndexerLayerWeights:
    # He initialisation before the ReLU. The second layer starts small, so that training starts from nearly uniform
    # distributions over columns and diagonals.
    w1 = torch.randn(heads, 2 * head_size, hidden, generator=generator) * math.sqrt(1.0 / head_size)
    w2 = torch.randn(heads, hidden, 2, generator=generator) * (0.1 / math.sqrt(hidden))
    return IndexerLayerWeights(w1, torch.zeros(heads, hidden), w2, torch.zeros(heads, 2))


def _move(weights: IndexerLayerWeights, dtype: torch.dtype, device: torch.device | str | None) -> IndexerLayerWeights:
    return IndexerLayerWeights(*(value.to(device=device, dtype=dtype) for value in weights))
