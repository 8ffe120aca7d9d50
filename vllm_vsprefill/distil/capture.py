# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Hands the RoPE'd queries, keys and values of each layer to a listener while a stock model runs.

An attention implementation is registered through transformers' own ``AttentionInterface``; the model's code is not
touched. A layer's tensors are given away as soon as they exist and can be dropped before the next layer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_vsprefill.distil import attention
from vllm_vsprefill.distil.errors import DistilError

IMPLEMENTATION = "vsprefill_capture"


class LayerCall(NamedTuple):
    """What one attention layer was given for one sequence.

    Attributes:
        layer: index of the layer in the model.
        q: ``[n, Hq, D]``, with RoPE.
        k: ``[n, Hkv, D]``, with RoPE.
        v: ``[n, Hkv, D]``.
        scale: factor on ``q . k``.
        lse: float32 ``[n, Hq]``, log-sum-exp of the scaled causal logits, or None.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    lse: Tensor | None


class _Listener(NamedTuple):
    layers: frozenset[int]
    call: Callable[[LayerCall], None]
    heard: set[int]


_listener: ContextVar[_Listener | None] = ContextVar("vsprefill_listener", default=None)


def layer_index(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    softcap: float | None,
    kwargs: Mapping[str, Any],
) -> int:
    """The layer that asks for attention, by the arguments of transformers' attention function.

    Raises:
        DistilError: it asks for anything but plain causal attention of the rows of one sequence among themselves.
    """
    n, index = query.shape[2], getattr(module, "layer_idx", None)
    if attention_mask is not None or query.shape[0] != 1 or key.shape[2] != n or not isinstance(index, int):
        raise DistilError(
            f"{type(module).__name__} asked for attention that cannot be followed: expected one whole causal "
            f"sequence without a mask and a layer index, got query {tuple(query.shape)}, key {tuple(key.shape)}, "
            f"{'a mask' if attention_mask is not None else 'no mask'}, layer {index}"
        )
    if kwargs.get("s_aux") is not None:
        raise DistilError(f"layer {index} has attention sinks, which no kernel here computes")
    if softcap is not None:
        raise DistilError(f"layer {index} caps its attention logits (softcap {softcap}); no kernel here computes that")
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise DistilError(f"layer {index} looks ahead: its attention is not causal")
    return index


def check_sizes(index: int, key: Tensor, value: Tensor) -> None:
    """DistilError if a layer's keys and values are not of the same size."""
    if value.shape[3] != key.shape[3]:
        raise DistilError(f"layer {index} has keys of size {key.shape[3]} but values of size {value.shape[3]}")


def check_heard(layers: Collection[int], heard: Collection[int]) -> None:
    """DistilError if a layer did not go through transformers' attention interface."""
    if missing := sorted(set(layers) - set(heard)):
        raise DistilError(
            f"attention layers {missing} of the model did not pass through transformers' attention interface; "
            "this architecture cannot be followed"
        )


def capture_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query ``[1, Hq, n, D]``, key and value ``[1, Hkv, n, D]``."""
    index = layer_index(module, query, key, attention_mask, softcap, kwargs)
    n, scale = query.shape[2], query.shape[3] ** -0.5 if scaling is None else float(scaling)
    listener = _listener.get()
    wanted = listener is not None and index in listener.layers
    lse = None
    if sliding_window is not None and sliding_window < n:
        if wanted:
            raise DistilError(f"layer {index} has a sliding window of {sliding_window}; it cannot run sparse")
        out = attention.sliding(query, key, value, scale, sliding_window)
    else:
        out, lse = attention.causal(query, key, value, scale)
    if wanted and listener is not None:
        check_sizes(index, key, value)
        listener.heard.add(index)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        listener.call(LayerCall(index, q, k, v, scale, lse))
    return out.transpose(1, 2), None


def register() -> None:
    """Make ``attn_implementation="vsprefill_capture"`` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, capture_attention)


@contextmanager
def listening(layers: frozenset[int], call: Callable[[LayerCall], None]) -> Iterator[None]:
    """Calls ``call`` for each of the layers while a model runs in the block.

    Raises:
        DistilError: at its end, if a layer of these was not heard of: the model does not go through transformers'
            attention interface.
    """
    listener = _Listener(layers, call, set())
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
    check_heard(layers, listener.heard)
