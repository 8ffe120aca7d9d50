# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Drives one attention layer with batches, without a model runner: blocks, chunks, shared prefixes, reused blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backend import CommonAttentionMetadata

LAYER = "model.layers.1.self_attn.attn"
POISON = 1e4  # what unused cache slots hold: reading one ruins a result; a NaN would get through stock kernels' masks


@dataclass(eq=False)  # compared by identity: the fields are tensors
class Request:
    """One sequence: all of its queries, keys and values, and how far it has been computed."""

    query: torch.Tensor  # [length, Hq, D]
    key: torch.Tensor  # [length, H, D]
    value: torch.Tensor
    prompt: int  # tokens of the prompt; the rest is decoded one by one
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


class LayerUnderTest:
    """An ``Attention`` layer with VSPREFILL, a KV cache of ``num_blocks`` blocks and a pool of free ones."""

    def __init__(
        self,
        model: Path,
        rendezvous: Path,
        options: dict[str, Any],
        *,
        dtype: str = "float32",
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_size: int = 64,
        num_blocks: int = 96,
        seed: int = 0,
        backend: str = "VSPREFILL",
        device: str = "cpu",
        engine: dict[str, Any] | None = None,
        quantised_queries: bool = False,
        **attention: Any,
    ) -> None:
        load_general_plugins()
        self.device = torch.device(device)
        self.config = EngineArgs(
            model=str(model),
            attention_backend=backend,
            additional_config={"vsprefill": options},
            dtype=dtype,
            block_size=32,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=4096,
            **(engine or {}),
        ).create_engine_config()
        self.generator = torch.Generator().manual_seed(seed)
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.dtype = getattr(torch, dtype)
        with set_current_vllm_config(self.config):
            if not model_parallel_is_initialized():
                init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
                initialize_model_parallel()
            previous = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            try:
                self.layer = Attention(
                    num_heads,
                    head_size,
                    head_size**-0.5,
                    num_kv_heads=num_kv_heads,
                    cache_config=self.config.cache_config,
                    prefix=LAYER,
                    **attention,
                )
            finally:
                torch.set_default_dtype(previous)
            self.layer.process_weights_after_loading(self.dtype)
        self.impl: Any = self.layer.impl
        self.quantised_queries = quantised_queries
        self.scales: dict[str, float] = {}
        if self.layer.kv_cache_torch_dtype.itemsize == 1:
            self.scales = {"query": 0.5, "key": 0.25, "value": 2.0}
            for name, scale in self.scales.items():
                setattr(self.layer, f"_{name[0]}_scale", torch.tensor(scale, device=self.device))
                setattr(self.layer, f"_{name[0]}_scale_float", scale)
        context = self.config.compilation_config.static_forward_context
        self.side = next((value for name, value in context.items() if name != LAYER), None)
        self.block_size = 32
        shape = (num_blocks, num_kv_heads, self.block_size, 2 * head_size)
        # [num_blocks, H, block, 2D] over memory in which the heads of a token lie side by side, as vLLM has it.
        blocks_first = (shape[0], shape[2], shape[1], shape[3])
        stored = self.layer.kv_cache_torch_dtype
        if "Flash" not in type(self.impl).__name__:
            self.layer.kv_cache = torch.full(shape, POISON, dtype=self.dtype)
        else:
            cache = torch.full(blocks_first, POISON, dtype=self.dtype, device=device)
            if stored.itemsize == 1:
                cache = torch.full(blocks_first, 0x7E, dtype=stored, device=device)  # the largest finite number
            self.layer.kv_cache = cache.transpose(1, 2)
        if self.side is not None:
            # Zeros look like logits that somebody computed; the backend must not take them for that.
            self.side.kv_cache = torch.zeros(num_blocks, 1, self.block_size, 2 * num_kv_heads, device=device)
        with set_current_vllm_config(self.config):
            spec = self.layer.get_kv_cache_spec(self.config)
            builder: Any = self.layer.get_attn_backend().get_builder_cls()
            self.builder = builder(spec, [LAYER], self.config, self.device)
        self.free = torch.randperm(num_blocks, generator=self.generator).tolist()

    def request(self, prompt: int, decoded: int = 0, *, like: Request | None = None, shared: int = 0) -> Request:
        """A new sequence; its first ``shared`` tokens, whole blocks, are those of ``like`` and already cached."""
        length = prompt + decoded

        def random(heads: int) -> torch.Tensor:
            return torch.randn(length, heads, self.head_size, generator=self.generator).to(self.dtype)

        new = Request(random(self.num_heads) * 2, random(self.num_kv_heads), random(self.num_kv_heads), prompt)
        for name, scale in self.scales.items():  # numbers that fp8 holds exactly
            if name != "query" or self.quantised_queries:
                rounded = (getattr(new, name) / scale).to(torch.float8_e4m3fn).to(self.dtype) * scale
                setattr(new, name, rounded)
        if like is not None and shared:
            assert shared % self.block_size == 0
            assert like.computed >= shared
            for name in ("query", "key", "value"):
                getattr(new, name)[:shared] = getattr(like, name)[:shared]
            new.blocks = like.blocks[: shared // self.block_size]
            new.computed = shared
        return new

    def release(self, request: Request, *, keep: int = 0) -> None:
        """Give a request's blocks back, except the first ``keep``, which somebody shares."""
        self.free += request.blocks[keep:]
        request.blocks = request.blocks[:keep]
        request.computed = min(request.computed, keep * self.block_size)

    def step(
        self, work: list[tuple[Request, int]], prefilling: list[bool] | None = None, rejected: int = 0
    ) -> list[torch.Tensor]:
        """Compute the next rows of some requests as one batch; the output rows of each, ``[rows, Hq, D]``.

        ``prefilling`` says which requests compute their prompt, by default those that have not got through it. What
        the host is told about the lengths of the others is ``rejected`` tokens too much.
        """
        width = 128
        table = torch.full((len(work), width), 10_000_000, dtype=torch.int32)  # a stale tail must not be read
        slots: list[torch.Tensor] = []
        for row, (request, rows) in enumerate(work):
            end = request.computed + rows
            while len(request.blocks) * self.block_size < end:
                request.blocks.append(self.free.pop())
            table[row, : len(request.blocks)] = torch.tensor(request.blocks)
            position = torch.arange(request.computed, end)
            slots.append(torch.tensor(request.blocks)[position // self.block_size] * self.block_size + position % 32)
        counts = torch.tensor([rows for _, rows in work])
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).to(torch.int32)
        lengths = torch.tensor([request.computed + rows for request, rows in work], dtype=torch.int32)
        slot_mapping = torch.cat(slots).to(self.device)
        if prefilling is None:
            prefilling = [request.computed < request.prompt for request, _ in work]
        upper = lengths + torch.tensor([0 if flag else rejected for flag in prefilling], dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(self.device),
            seq_lens_cpu_upper_bound=upper,
            num_reqs=len(work),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(counts.max()),
            max_seq_len=int(upper.max()),
            block_table_tensor=table.to(self.device),
            slot_mapping=slot_mapping,
            is_prefilling=torch.tensor(prefilling),
        )
        metadata = self.metadata = self.builder.build(0, common)

        def gather(name: str) -> torch.Tensor:
            return torch.cat([getattr(r, name)[r.computed : r.computed + rows] for r, rows in work]).to(self.device)

        query, key, value = gather("query"), gather("key"), gather("value")
        if self.quantised_queries:
            query = (query / self.scales["query"]).to(torch.float8_e4m3fn)
        padded = len(query) + 3  # vLLM pads batches; what lies behind the rows must stay untouched
        output = torch.full((padded, self.num_heads, self.head_size), POISON, dtype=self.dtype, device=self.device)
        with set_forward_context({LAYER: metadata}, self.config, slot_mapping={LAYER: slot_mapping}):
            self.impl.do_kv_cache_update(self.layer, key, value, self.layer.kv_cache, slot_mapping)
            self.impl.forward(self.layer, query, key, value, self.layer.kv_cache, metadata, output)
        assert bool((output[len(query) :] == POISON).all())
        for request, rows in work:
            request.computed += rows
        return list(output[: len(query)].cpu().split([rows for _, rows in work]))

    def cached_logits(self, request: Request) -> torch.Tensor:
        """Logits beside the cache for a request's computed tokens, ``[n, H, 2]``; NaN where missing."""
        assert self.side is not None
        position = torch.arange(request.computed)
        slots = torch.tensor(request.blocks)[position // self.block_size] * self.block_size + position % self.block_size
        return self.side.slots[slots.to(self.device)].cpu().view(request.computed, self.num_kv_heads, 2)
