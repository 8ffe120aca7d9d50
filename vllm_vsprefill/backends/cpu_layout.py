# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Reading keys and values back out of vLLM's CPU cache, whose blocks are packed for the attention kernel.

The order of the elements inside a block depends on the instruction set the kernel was picked for (AVX512, AMX, NEON,
...) and is nobody's public interface. So it is not assumed: :func:`infer` writes numbered elements through vLLM's own
writer into a scratch block and looks where they went. The orders known so far are then read with views and copies; any
other order is read with an index, slower but right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

WriteBlock = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""``write(key, value, kv_cache, slot_mapping)``: vLLM's cache writer; key, value ``[num_tokens, H, D]``."""

_BASE = 128  # digits below this are exact in bfloat16 and in float16


@dataclass(frozen=True)
class ElementOrder:
    """Order of one block's ``tokens * dim`` elements: a permuted view, or an index where no view is known.

    Attributes:
        name: what the order is called in logs.
        shape: sizes of the block's axes as stored, outermost first.
        axes: permutation that brings those axes into the order (token axes, channel axes).
        token_axes: how many of the permuted axes make up the token.
        index: int64 ``[tokens * dim]``, where element ``(t, d)`` lies, for an order without a view; else None.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    token_axes: int
    index: torch.Tensor | None = None

    def copy_to(self, out: torch.Tensor, raw: torch.Tensor) -> None:
        """Copy blocks to natural order.

        Args:
            out: ``[..., tokens, dim]``, channels contiguous.
            raw: ``[..., tokens * dim]`` in cache order, same leading axes.
        """
        if self.index is not None:
            raw = raw.index_select(-1, self.index)
        stored, sizes = raw.unflatten(-1, self.shape), [self.shape[axis] for axis in self.axes]
        lead = raw.dim() - 1
        view = stored.permute(*range(lead), *(lead + axis for axis in self.axes))
        tokens, channels = sizes[: self.token_axes], sizes[self.token_axes :]
        split = out.unflatten(-1, channels).unflatten(-1 - len(channels), tokens)
        if self.axes[-1] == len(self.axes) - 1 and self.shape[-1] == 2 and raw.element_size() == 2:
            # Pairs of 16-bit channels stay together: move them as one 32-bit word, half the elements to copy.
            view, split = view.view(torch.int32).squeeze(-1), split.view(torch.int32).squeeze(-1)
        split.copy_(view)


def _known_orders(tokens: int, dim: int) -> list[ElementOrder]:
    """The orders seen so far: vector kernels (keys transposed, values natural) and the two of the AMX kernel."""
    orders = [
        ElementOrder("natural", (tokens, dim), (0, 1), 1),
        ElementOrder("transposed", (dim, tokens), (1, 0), 1),
    ]
    if tokens % 16 == 0 and dim % 16 == 0:
        orders += [
            # tiles of 16 tokens, channels in pairs
            ElementOrder("row pairs", (tokens // 16, dim // 2, 16, 2), (0, 2, 1, 3), 2),
            # tiles of 16 channels, tokens in pairs
            ElementOrder("column pairs", (dim // 16, tokens // 2, 16, 2), (1, 3, 0, 2), 2),
        ]
    return orders


@dataclass(frozen=True)
class CacheReader:
    """Reads sequences out of a CPU KV cache ``[num_blocks, H, block_size, 2 * D]``."""

    key_order: ElementOrder
    value_order: ElementOrder
    head_size: int

    def read(self, kv_cache: torch.Tensor, block_ids: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy the keys and values of a sequence into ``keys``, ``values`` ``[H, n, D]``; ``n`` tokens are read.

        Args:
            kv_cache: ``[num_blocks, H, block_size, 2 * D]``, the layer's cache.
            block_ids: the request's blocks, first one first; entries past the sequence are ignored.
            keys, values: outputs, any strides.
        """
        num_blocks, heads, tokens, _ = kv_cache.shape
        halves = kv_cache.view(num_blocks, heads, 2, tokens * self.head_size)
        n = keys.shape[1]
        whole, rest = divmod(n, tokens)
        at = 0
        # The allocator hands out mostly consecutive blocks: a run of them is one strided copy without a gather.
        for first, length in _runs(block_ids[:whole]):
            raw = halves[first : first + length].transpose(0, 1)  # [H, length, 2, elements]
            end = at + length * tokens
            self.key_order.copy_to(keys[:, at:end].unflatten(1, (length, tokens)), raw[:, :, 0])
            self.value_order.copy_to(values[:, at:end].unflatten(1, (length, tokens)), raw[:, :, 1])
            at = end
        if rest:
            raw = halves[block_ids[whole]]  # [H, 2, elements]
            last = keys.new_empty(2, heads, tokens, self.head_size)
            self.key_order.copy_to(last[0], raw[:, 0])
            self.value_order.copy_to(last[1], raw[:, 1])
            keys[:, at:] = last[0, :, :rest]
            values[:, at:] = last[1, :, :rest]


def infer(write: WriteBlock, num_kv_heads: int, block_size: int, head_size: int, dtype: torch.dtype) -> CacheReader:
    """Find the element order of keys and of values by writing numbered elements through ``write``.

    Raises:
        RuntimeError: the writer does not store each element exactly once (a quantised or shared layout).
    """
    token = torch.arange(block_size)[:, None].expand(block_size, head_size)
    channel = torch.arange(head_size)[None, :].expand(block_size, head_size)
    digits = [token // _BASE, token % _BASE, channel // _BASE, channel % _BASE]
    slots = torch.arange(block_size, dtype=torch.int64)
    seen = []
    for digit in digits:
        cache = torch.full((1, num_kv_heads, block_size, 2 * head_size), -1, dtype=dtype)
        numbered = digit[:, None, :].expand(block_size, num_kv_heads, head_size).to(dtype).contiguous()
        write(numbered, numbered, cache, slots)
        seen.append(cache.view(num_kv_heads, 2, block_size * head_size).to(torch.int64))
    element = (seen[0] * _BASE + seen[1]) * head_size + seen[2] * _BASE + seen[3]  # [H, 2, elements]
    everything = torch.arange(block_size * head_size)
    for head in range(num_kv_heads):
        for half in range(2):
            if not torch.equal(element[head, half].sort().values, everything):
                raise RuntimeError("vLLM's CPU cache writer does not store keys and values element by element")
            if not torch.equal(element[head, half], element[0, half]):
                raise RuntimeError("vLLM's CPU cache orders the elements of its KV heads differently")
    orders = [_classify(element[0, half], block_size, head_size) for half in range(2)]
    return CacheReader(orders[0], orders[1], head_size)


def _classify(element: torch.Tensor, tokens: int, dim: int) -> ElementOrder:
    wanted = torch.arange(tokens * dim).view(tokens, dim)
    for order in _known_orders(tokens, dim):
        found = torch.empty_like(wanted)
        order.copy_to(found, element)
        if torch.equal(found, wanted):
            return order
    return ElementOrder("indexed", (tokens, dim), (0, 1), 1, torch.argsort(element))


def _runs(block_ids: list[int]) -> list[tuple[int, int]]:
    """``(first, length)`` of maximal runs of consecutive ids, in order."""
    runs: list[tuple[int, int]] = []
    for block in block_ids:
        if runs and block == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


def slots(block_ids: list[int], seq_len: int, block_size: int) -> torch.Tensor:
    """int64 ``[seq_len]``, cache slots of a sequence."""
    position = torch.arange(seq_len)
    return torch.tensor(block_ids, dtype=torch.int64)[position // block_size] * block_size + position % block_size


class Workspace:
    """Two scratch tensors for the keys and values of one sequence, shared by all layers and grown when needed."""

    def __init__(self) -> None:
        self._storage: torch.Tensor | None = None

    def keys_values(self, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised ``[heads, tokens, dim]`` tensors; valid until the next call."""
        needed = 2 * heads * tokens * dim
        if self._storage is None or self._storage.dtype != dtype or self._storage.numel() < needed:
            # Powers of two: a prompt that arrives in chunks grows the scratch a few times, not at every chunk.
            # An ordinary tensor also when vLLM asks for it in inference mode: one made there is closed to writers
            # outside of it, and the scratch outlives the engine that asked first.
            with torch.inference_mode(False):
                self._storage = torch.empty(1 << (needed - 1).bit_length(), dtype=dtype)
        both = self._storage[:needed].view(2, heads, tokens, dim)
        return both[0], both[1]
