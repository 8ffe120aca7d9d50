# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The VSIndexer as a module."""

from __future__ import annotations

import pytest
import torch

from vllm_vsprefill.indexer import DEFAULT_HIDDEN_SIZE, VSIndexer, weight_shapes
from vllm_vsprefill.kernels.score.naive import score
from vllm_vsprefill.kernels.types import IndexerLayerWeights


def small(**kwargs: object) -> VSIndexer:
    return VSIndexer([4, 1], 3, 8, 16, generator=torch.Generator().manual_seed(0), **kwargs)  # type: ignore[arg-type]


def test_shapes_names_and_defaults() -> None:
    indexer = small()
    assert indexer.layer_indices == (1, 4)
    assert (indexer.num_kv_heads, indexer.head_size, indexer.hidden_size) == (3, 8, 16)
    shapes = weight_shapes(3, 8, 16)
    assert {name: tuple(value.shape) for name, value in indexer.state_dict().items()} == {
        f"layers.{layer}.{part}": shape for layer in (1, 4) for part, shape in shapes.items()
    }
    assert all(isinstance(value, torch.nn.Parameter) for value in indexer.parameters())
    assert VSIndexer([0], 1, 4).hidden_size == DEFAULT_HIDDEN_SIZE == 1024


def test_forward_is_the_formula() -> None:
    indexer = small()
    k, v = torch.randn(5, 3, 8), torch.randn(5, 3, 8)
    logits = indexer(k, v, 4)
    assert logits.shape == (5, 3, 2)
    assert logits.dtype == torch.float32
    w1, b1, w2, b2 = indexer.layer_weights(4)
    for head in range(3):
        hidden = torch.relu(torch.cat((k[:, head], v[:, head]), -1) @ w1[head] + b1[head])
        torch.testing.assert_close(logits[:, head], hidden @ w2[head] + b2[head])


def test_every_weight_gets_a_gradient() -> None:
    indexer = small()
    indexer(torch.randn(64, 3, 8), torch.randn(64, 3, 8), 1).square().sum().backward()
    for name, value in indexer.named_parameters():
        if name.startswith("layers.1."):
            assert value.grad is not None, name
            assert value.grad.abs().sum() > 0, name
        else:
            assert value.grad is None, name


def test_starts_near_uniform() -> None:
    logits = VSIndexer([0], 2, 64, 256, generator=torch.Generator().manual_seed(1))(
        torch.randn(100, 2, 64), torch.randn(100, 2, 64), 0
    )
    assert logits.abs().max() < 2.0
    assert logits.std() > 0.01


def test_generator_makes_it_repeatable() -> None:
    first, second = small().state_dict(), small().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_head_slices_are_views_and_score_alike() -> None:
    indexer = small()
    k, v = torch.randn(5, 3, 8), torch.randn(5, 3, 8)
    part = indexer.layer_weights(1, slice(1, 3))
    assert part.w1.data_ptr() == indexer.layer_weights(1).w1[1:].data_ptr()
    torch.testing.assert_close(score(k[:, 1:], v[:, 1:], part), indexer(k, v, 1)[:, 1:])


def test_dtype() -> None:
    indexer = small(dtype=torch.bfloat16)
    assert {value.dtype for value in indexer.parameters()} == {torch.bfloat16}
    k = torch.randn(5, 3, 8, dtype=torch.bfloat16)
    assert indexer(k, k, 1).dtype == torch.float32


def test_from_weights_makes_buffers_or_parameters() -> None:
    weights = {layer: small().layer_weights(layer) for layer in (4, 1)}
    weights = {layer: IndexerLayerWeights(*(t.detach() for t in tensors)) for layer, tensors in weights.items()}
    frozen = VSIndexer.from_weights(weights)
    assert frozen.layer_indices == (1, 4)
    assert not list(frozen.parameters())
    assert {name for name, _ in frozen.named_buffers()} == set(small().state_dict())
    assert frozen.layer_weights(4).w1.data_ptr() == weights[4].w1.data_ptr()
    trainable = VSIndexer.from_weights(weights, trainable=True)
    assert len(list(trainable.parameters())) == 8
    k = torch.randn(5, 3, 8)
    assert torch.equal(frozen(k, k, 4), trainable(k, k, 4))


def test_refusals() -> None:
    with pytest.raises(KeyError, match=r"layer 2 has no indexer; covered are \[1, 4\]"):
        small().layer_weights(2)
    for layers in ([], [1, 1], [-1]):
        with pytest.raises(ValueError, match="layers must be distinct indices >= 0 and at least one"):
            VSIndexer(layers, 1, 4)
    for name, sizes in {"num_kv_heads": (0, 4, 8), "head_size": (1, 0, 8), "hidden_size": (1, 4, 0)}.items():
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            VSIndexer([0], *sizes)
    with pytest.raises(ValueError, match="at least one layer"):
        VSIndexer.from_weights({})
    good = small().layer_weights(1)
    with pytest.raises(ValueError, match=r"layers\.5\.b1 has shape \[3, 15\], expected \(3, 16\)"):
        VSIndexer.from_weights({1: good, 5: good._replace(b1=good.b1[:, 1:])})
