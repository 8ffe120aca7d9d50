# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A stock transformers model that is fed a prompt in chunks, as vLLM does it, its attention left to a function.

The attention is replaced through transformers' own ``AttentionInterface``; the model's code is not touched. Keys and
values of all layers are kept, so that a chunk, or a whole pass behind the same beginning, can be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from vllm_vsprefill.distil import attention
from vllm_vsprefill.distil.capture import check_heard, check_sizes, layer_index
from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.model import decoder_of

IMPLEMENTATION = "vsprefill_passes"

GRANULE = 16
"""Tokens to which the room for keys and values is rounded: a block of a paged cache has a multiple of it."""

DENSE_ROWS = 512
"""Rows of dense attention at a time on a CPU, which makes a mask for them."""


class LayerRows(NamedTuple):
    """Rows of one layer, and all keys and values up to the last of them.

    Attributes:
        layer: index of the layer in the model.
        q: ``[Hq, T, D]``, with RoPE.
        room: ``[Hkv, N, 2 * D]``, keys (with RoPE) and values side by side; those behind ``seq_len`` mean nothing.
        seq_len: tokens up to and including the last row.
        scale: factor on ``q . k`` before the softmax.
    """

    layer: int
    q: Tensor
    room: Tensor
    seq_len: int
    scale: float

    @property
    def first(self) -> int:
        """Position of the first row."""
        return self.seq_len - self.q.shape[1]

    @property
    def k(self) -> Tensor:
        """``[Hkv, n, D]``, the whole sequence."""
        return self.room[:, : self.seq_len, : self.q.shape[2]]

    @property
    def v(self) -> Tensor:
        """``[Hkv, n, D]``, the whole sequence."""
        return self.room[:, : self.seq_len, self.q.shape[2] :]


Attend = Callable[[LayerRows], Tensor]
"""Attention of some rows, ``[Hq, T, D]``."""


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of the last rows of a sequence: ``[Hq, T, D]``, ``[Hkv, n, D]`` twice -> ``[Hq, T, D]``."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0)[None] for x in (k, v))
    rows, n = q.shape[1], k.shape[2]
    if rows == n:
        return F.scaled_dot_product_attention(q[None], k, v, is_causal=True, scale=scale)[0]
    step = rows if q.is_cuda else DENSE_ROWS
    parts = []
    for r0 in range(0, rows, step):
        r1 = min(r0 + step, rows)
        end = n - rows + r1
        part, keys, values = q[None, :, r0:r1], k[:, :, :end], v[:, :, :end]
        mask = causal_lower_right(r1 - r0, end)
        parts.append(F.scaled_dot_product_attention(part, keys, values, attn_mask=mask, scale=scale)[0])
    return torch.cat(parts, 1)


def attend_dense(rows: LayerRows) -> Tensor:
    """Attention to everything."""
    return dense(rows.q, rows.k, rows.v, rows.scale)


_current: ContextVar[Passes | None] = ContextVar("vsprefill_passes", default=None)


class Passes:
    """Runs one sequence after the other through a model.

    Layers with a sliding window keep it, and never come to the function.

    Args:
        model: a causal language model of transformers.
        length: tokens of the longest sequence.
        layers: those that must come to the function.

    Raises:
        DistilError: the model's decoder cannot be told from its head.
    """

    def __init__(self, model: Any, length: int, layers: Collection[int] = ()) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(IMPLEMENTATION, _attention)
        model.set_attn_implementation(IMPLEMENTATION)
        self.model, self.decoder = model, decoder_of(model)
        self.length = -(-length // GRANULE) * GRANULE
        self.layers = layers
        self._room: dict[int, Tensor] = {}
        self._heard: set[int] = set()
        self._first = 0
        self._attend: Attend = attend_dense

    @torch.inference_mode()
    def run(self, tokens: Tensor, first: int, end: int, attend: Attend = attend_dense) -> Tensor:
        """Hidden states ``[rows, C]`` of the rows from ``first`` to ``end``; those before must have been run.

        Args:
            tokens: int64 ``[n]``, the sequence, on the model's device.
            first: first row.
            end: one past the last row.
            attend: attention of these rows.

        Raises:
            DistilError: the model asks for anything but plain causal attention.
        """
        if end > self.length:
            raise ValueError(f"end must be at most {self.length}, got {end}")
        self._first, self._attend = first, attend
        token = _current.set(self)
        places = torch.arange(first, end, device=tokens.device)[None]
        try:
            out = self.decoder(input_ids=tokens[None, first:end], position_ids=places, use_cache=False)
        finally:
            _current.reset(token)
            self._attend = attend_dense
        check_heard(self.layers, self._heard)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[rows, vocabulary]`` of hidden states ``[rows, C]``: whatever the model does behind its decoder.

        Raises:
            DistilError: its head does more than read hidden states.
        """
        from transformers.modeling_outputs import MoeModelOutputWithPast

        found = MoeModelOutputWithPast(last_hidden_state=hidden[None])
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        own = vars(self.decoder).get("forward")
        self.decoder.forward = lambda *args, **kwargs: found  # the model runs without its decoder
        try:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # The code of a model may raise anything.
            kind = self.model.config.model_type
            raise DistilError(f"the head of a {kind} model cannot be run without its decoder ({error})") from None
        finally:
            del self.decoder.forward
            if own is not None:
                self.decoder.forward = own
        return logits

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """``[Hq, T, D]`` and ``[Hkv, T, D]`` twice, the rows of a pass -> ``[Hq, T, D]``."""
        first, rows, size = self._first, q.shape[1], q.shape[2]
        if layer not in self._room:
            self._room[layer] = k.new_empty(k.shape[0], self.length, 2 * size)
        room = self._room[layer]
        room[:, first : first + rows, :size], room[:, first : first + rows, size:] = k, v
        found = LayerRows(layer, q, room, first + rows, scale)
        if window is not None and window < found.seq_len:
            return attention.sliding(q[None], found.k[None], found.v[None], scale, window)[0]
        if window is not None:
            return attend_dense(found)
        self._heard.add(layer)
        return self._attend(found)


def _attention(
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
    """transformers' attention function: query ``[1, Hq, T, D]``, key and value ``[1, Hkv, T, D]``."""
    index = layer_index(module, query, key, attention_mask, softcap, kwargs)
    check_sizes(index, key, value)
    current = _current.get()
    if current is None:
        raise DistilError("the model's attention is replaced; it runs in passes only")
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    out = current.attention(index, query[0], key[0], value[0], scale, sliding_window)
    return out.transpose(0, 1)[None].contiguous(), None
