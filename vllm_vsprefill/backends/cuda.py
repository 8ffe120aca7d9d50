# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""VSPREFILL on vLLM's CUDA platform: the stock FlashAttention backend, with long prefills routed through score, select,
attend.

A step is planned once, in the metadata builder, from what the host knows. The layers then only launch kernels: nothing
here waits for the device in the forward pass or allocates per layer (FlashAttention itself does, for log-sum-exps).
Rows that run dense, the last ones of every sparse chunk among them, go to the stock kernel in contiguous runs, each
with metadata of its own and without the schedule that FlashAttention 3 made for the whole batch.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_vsprefill import _compat
from vllm_vsprefill.backends import cuda_limits
from vllm_vsprefill.backends.cuda_buffers import CountsReader, DeviceBuffers, Shape
from vllm_vsprefill.backends.layer import DecoderBackendMixin, DenseRun, SparseLayerMixin
from vllm_vsprefill.kernels.attend.paged import check_attend
from vllm_vsprefill.kernels.attend.triton import attend
from vllm_vsprefill.kernels.forget.triton import forget
from vllm_vsprefill.kernels.guard import upper_bound
from vllm_vsprefill.kernels.guard.paged import check_guard
from vllm_vsprefill.kernels.guard.triton import guard
from vllm_vsprefill.kernels.merge.paged import check_build_index
from vllm_vsprefill.kernels.merge.triton import build_index
from vllm_vsprefill.kernels.paged import FP8_DTYPES, QUERY_DTYPES, Batch, PagedKV
from vllm_vsprefill.kernels.sampled.paged import check_sampled
from vllm_vsprefill.kernels.sampled.triton import sampled
from vllm_vsprefill.kernels.score.paged import check_score_missing, prepare_weights
from vllm_vsprefill.kernels.score.triton import score_missing
from vllm_vsprefill.kernels.select.paged import check_gather, check_select
from vllm_vsprefill.kernels.select.triton import gather, select
from vllm_vsprefill.kernels.types import IndexerLayerWeights
from vllm_vsprefill.plan import RequestRows, StepPlan, plan_step
from vllm_vsprefill.registration import BACKEND_NAME
from vllm_vsprefill.runtime import LayerState, Runtime, cache_kinds
from vllm_vsprefill.stats import LayerCounts

logger = init_logger("vllm.vsprefill")


class VSPrefillFlashBackend(DecoderBackendMixin, FlashAttentionBackend):
    """Stock FlashAttention with sparse prefill of long contexts."""

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[VSPrefillFlashImpl]:
        return VSPrefillFlashImpl

    @staticmethod
    def get_builder_cls() -> type[VSPrefillFlashMetadataBuilder]:
        return VSPrefillFlashMetadataBuilder


@dataclasses.dataclass(frozen=True, slots=True)
class SparseRound:
    """Requests that go through the kernels together; all tensors are on the device.

    Attributes:
        whole: their chunks with all rows on the whole context; columns and diagonals are chosen for it.
        rows: without the dense last rows.
        guarded: ``rows`` as ``guard`` leaves them, or None where no selection can exceed ``max_density``.
        block_table: int32 ``[requests, max_blocks]``.
        fallbacks: stock calls for the requests that ``guard`` sends there; the others have no rows in them.
    """

    whole: Batch
    rows: Batch
    guarded: Batch | None
    block_table: torch.Tensor
    fallbacks: tuple[DenseRun, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SparseStep:
    """Attached to the stock metadata.

    Attributes:
        plan: which rows run sparse.
        dense_runs: stock metadata of the other rows; empty if all rows are dense.
        rounds: the sparse rows.
    """

    plan: StepPlan
    dense_runs: tuple[DenseRun, ...] = ()
    rounds: tuple[SparseRound, ...] = ()


class VSPrefillFlashMetadataBuilder(FlashAttentionMetadataBuilder):
    """Builds the stock metadata and, when some request runs sparse, a plan beside it."""

    # The plan belongs to one step; vLLM must not copy metadata from one KV cache group to another.
    supports_update_block_table = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The first model runner sorts a batch, decodes first, only for builders that ask for it.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._runtime = Runtime.of(self.vllm_config)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Graphs for decodes only: a replayed graph of a mixed batch would never come by here."""
        stock = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(stock, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        return False  # its metadata describes the whole batch and cannot be cut into runs

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any) -> Any:
        """The stock metadata with the attribute ``vsprefill``: a :class:`SparseStep`, or None without a prefill."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        metadata.vsprefill = None
        if not fast_build and metadata.causal is True:  # a fast build is for a draft model
            metadata.vsprefill = self._plan(common_attn_metadata, metadata)
        return metadata

    def _plan(self, common: Any, metadata: Any) -> SparseStep | None:
        runtime = self._runtime
        if not any(name in runtime.known_layers for name in self.layer_names):
            return None  # layers of a draft model
        runtime.look_at_switch()
        if common.max_query_len <= 1:
            runtime.note_step(_NOTHING)
            return None
        lengths = _compat.cpu_seq_lens(common)
        if lengths is None:
            logger.warning_once("VSPREFILL: this vLLM does not tell the host how long contexts are; all is dense.")
            return None
        flags = _compat.prefill_flags(common)
        if not any(flags):  # drafts are verified
            runtime.note_step(_NOTHING)
            return None
        starts = common.query_start_loc_cpu.tolist()
        plan = plan_step(starts, lengths, flags, runtime.gate)
        runtime.note_step(plan)
        if not plan.prefill_pairs:
            return None
        if not plan.sparse or not any(name in runtime.layers for name in self.layer_names):
            return SparseStep(plan)
        buffers = device_buffers(runtime, self.vllm_config, self.device)
        rounds = [plan.sparse[i : i + buffers.requests] for i in range(0, len(plan.sparse), buffers.requests)]
        upload = _Upload()
        run_starts = [
            upload.add([*(rows.row_start - run[0].row_start for rows in run), run[-1].row_end - run[0].row_start])
            for run in plan.dense_runs
        ]
        places = [_describe(upload, requests, starts, lengths) for requests in rounds]
        sent = upload.send(self.device)
        tables = common.block_table_tensor
        return SparseStep(
            plan,
            tuple(
                _dense_run(metadata, run, sent.take(place), tables)
                for run, place in zip(plan.dense_runs, run_starts, strict=True)
            ),
            tuple(
                self._round(metadata, buffers, requests, sent, place, tables)
                for requests, place in zip(rounds, places, strict=True)
            ),
        )

    def _round(
        self,
        metadata: Any,
        buffers: DeviceBuffers,
        requests: tuple[RequestRows, ...],
        sent: _Sent,
        places: dict[str, slice],
        tables: torch.Tensor,
    ) -> SparseRound:
        runtime = self._runtime
        tail = runtime.gate.dense_last_rows
        max_rows = max(rows.rows for rows in requests)
        longest = max(rows.seq_len for rows in requests)
        row_start = sent.take(places["row_start"])
        seq_len = sent.take(places["seq_len"])
        whole = Batch(
            row_start, sent.take(places["whole_end"]), sent.take(places["whole_seq_len"]), max_rows + tail,
            longest + tail,
        )  # fmt: skip
        batch = Batch(row_start, sent.take(places["row_end"]), seq_len, max_rows, longest)
        table = tables.index_select(0, sent.take(places["request"]))
        guarded, fallbacks = None, []
        if any(self._may_exceed(rows) for rows in requests):
            count = len(requests)
            guarded = batch._replace(row_end=buffers.sparse_end[:count])
            for i, rows in enumerate(requests):
                part = dataclasses.replace(
                    metadata,
                    num_actual_tokens=rows.rows,
                    max_query_len=rows.rows,
                    query_start_loc=buffers.dense_rows[2 * i : 2 * i + 2],  # all rows or none, as `guard` decides
                    max_seq_len=rows.seq_len,
                    seq_lens=seq_len[i : i + 1],
                    block_table=table[i : i + 1],
                    slot_mapping=metadata.slot_mapping[rows.row_start : rows.row_end],
                    scheduler_metadata=None,
                    max_num_splits=0,
                )
                fallbacks.append(DenseRun(rows.row_start, rows.row_end, part))
        return SparseRound(whole, batch, guarded, table, tuple(fallbacks))

    def _may_exceed(self, rows: RequestRows) -> bool:
        """Whether a selection for these rows could compute more than the user's ``max_density`` of them."""
        options = self._runtime.options
        if options.max_density >= 1.0:
            return False
        bound = upper_bound(self._runtime.pattern, rows.rows, rows.seq_len, self._runtime.budgets)
        return bound > options.max_density


_NOTHING = StepPlan((), (), 0)


def _is_checked(state: LayerState) -> bool:
    """Whether the model's first sparse layer has gone through the kernels' checks in this step: layers are alike, and
    checking takes the host as long as launching."""
    return bool(state.row)


def _describe(
    upload: _Upload, requests: tuple[RequestRows, ...], starts: list[int], lengths: list[int]
) -> dict[str, slice]:
    """Queue what the device must know about the requests of a round."""
    return {
        "row_start": upload.add([rows.row_start for rows in requests]),
        "row_end": upload.add([rows.row_end for rows in requests]),
        "seq_len": upload.add([rows.seq_len for rows in requests]),
        "whole_end": upload.add([starts[rows.request + 1] for rows in requests]),
        "whole_seq_len": upload.add([lengths[rows.request] for rows in requests]),
        "request": upload.add([rows.request for rows in requests]),
    }


def _dense_run(
    metadata: Any, run: tuple[RequestRows, ...], query_start_loc: torch.Tensor, tables: torch.Tensor
) -> DenseRun:
    """Stock metadata of a run of rows, as if they were a batch of their own. Their contexts end where those of their
    requests do, so the device's own lengths are right for them, also where drafts were rejected."""
    row_start, row_end = run[0].row_start, run[-1].row_end
    first, last = run[0].request, run[-1].request
    assert last - first + 1 == len(run), "requests without rows lie behind all others"
    part = dataclasses.replace(
        metadata,
        num_actual_tokens=row_end - row_start,
        max_query_len=max(rows.rows for rows in run),
        query_start_loc=query_start_loc,
        max_seq_len=max(rows.seq_len for rows in run),
        seq_lens=metadata.seq_lens[first : last + 1],
        block_table=tables[first : last + 1],
        slot_mapping=metadata.slot_mapping[row_start:row_end],
        scheduler_metadata=None,  # made for the whole batch
        max_num_splits=0,  # FlashAttention decides: a few rows over a long context want their keys split
    )
    return DenseRun(row_start, row_end, part)


class _Upload:
    """Small lists of int32 that go to the device in one copy. Each begins at a multiple of 16 bytes: Triton compiles
    a kernel anew for a pointer that is aligned differently."""

    def __init__(self) -> None:
        self._values: list[int] = []

    def add(self, values: list[int]) -> slice:
        """Queue a list; where it will lie."""
        self._values += [0] * (-len(self._values) % 4)
        place = slice(len(self._values), len(self._values) + len(values))
        self._values += values
        return place

    def send(self, device: torch.device) -> _Sent:
        """Copy without waiting. The pinned source is PyTorch's: it is not handed out again before the copy is done."""
        source = torch.tensor(self._values, dtype=torch.int32, pin_memory=device.type == "cuda")
        return _Sent(source.to(device, non_blocking=True))


@dataclasses.dataclass(frozen=True, slots=True)
class _Sent:
    values: torch.Tensor

    def take(self, place: slice) -> torch.Tensor:
        return self.values[place]


def device_buffers(runtime: Runtime, vllm_config: Any, device: torch.device) -> DeviceBuffers:
    """The buffers of a model, allocated on first use: in vLLM's profiling run, or later where there was none."""
    if runtime.device is None:
        layers = list(runtime.layers.values())
        num_heads, num_kv_heads, head_size = layers[0].shape
        shape = Shape(
            num_heads,
            num_kv_heads,
            vllm_config.model_config.max_model_len,
            len(layers),
            runtime.options.sampled_rows if any(layer.weights is None for layer in layers) else None,
        )
        scheduler = vllm_config.scheduler_config
        buffers = DeviceBuffers.allocate(
            shape,
            runtime.pattern,
            max_num_seqs=scheduler.max_num_seqs,
            max_tokens=scheduler.max_num_batched_tokens,
            device=device,
        )
        if any(layer.weights is not None and layer.logits is None for layer in layers) and device.type == "cuda":
            share = min_layers_of_a_slot(vllm_config, len(layers))
            slots = _max_slots(vllm_config, device, share * num_kv_heads * 2 * head_size)
            buffers.scratch = torch.empty(slots, 2 * num_kv_heads, dtype=torch.float32, device=device)
        runtime.device = buffers
        runtime.counts_reader = CountsReader(runtime.recorder, [layer.index for layer in layers])
        logger.info_once(
            "VSPREFILL: workspaces for %d sparse requests at a time take %.0f MiB.",
            buffers.requests,
            buffers.num_bytes / 2**20,
        )
    found: DeviceBuffers = runtime.device
    return found


def min_layers_of_a_slot(vllm_config: Any, sparse: int) -> int:
    """How many layers at least share a slot number, of ``sparse`` ones: the more, the fewer slots fit into memory.

    Caches of several kinds share one pool of blocks, in groups of as many layers as the rarest kind has.
    """
    kinds = Counter(cache_kinds(vllm_config.compilation_config.static_forward_context.values()))
    return min(sparse, *kinds.values()) if kinds else sparse


def _max_slots(vllm_config: Any, device: torch.device, values_per_token: int) -> int:
    """Slots that the KV cache cannot exceed, asked for before vLLM has sized it."""
    cache = vllm_config.cache_config
    size = 1 if str(cache.cache_dtype).startswith("fp8") else 2
    share = cache.gpu_memory_utilization * torch.cuda.get_device_properties(device).total_memory
    max_bytes = getattr(cache, "kv_cache_memory_bytes", None) or share
    return int(max_bytes) // (values_per_token * size) + 1


class VSPrefillFlashImpl(SparseLayerMixin, FlashAttentionImpl):
    """Attention of one layer."""

    _backend = VSPrefillFlashBackend
    _forget = staticmethod(forget)

    def platform_reasons(self) -> dict[str, bool]:
        model = self._vllm_config.model_config
        shape = (self.num_heads, self.num_kv_heads, self.head_size)
        others = [] if self._runtime is None else [state.shape for state in self._runtime.layers.values()]
        return {
            **cuda_limits.head_reasons(self.head_size, self.num_heads, self.num_kv_heads),
            f"the model computes in {model.dtype}": model.dtype not in QUERY_DTYPES,
            f"its KV cache is of type {self.kv_cache_dtype}": not self._reads_cache(),
            "its heads differ from those of the model's first layer, which workspaces are shared with": any(
                other != shape for other in others
            ),
        }

    def _reads_cache(self) -> bool:
        if self.kv_cache_dtype.startswith("fp8"):
            return self.kv_cache_dtype in ("fp8", "fp8_e4m3", "fp8_e5m2")
        return not self.cache_differs() and self.kv_cache_dtype in ("auto", "float16", "bfloat16")

    def set_up(self, layer: Any, state: LayerState, act_dtype: torch.dtype) -> None:
        """Bring the indexer to the device. Its tensors are buffers of the layer, so that sleep mode brings them back.

        All layers share one set of workspaces, so their KV heads must be alike.
        """
        runtime = self._runtime
        assert runtime is not None
        state.shape = (self.num_heads, self.num_kv_heads, self.head_size)
        state.row = len(runtime.layers) - 1
        device = torch.device(current_platform.device_type)
        tau = torch.empty(2, self.num_kv_heads, dtype=torch.float64)
        for row, value in zip(tau, (state.tau_columns, state.tau_diagonals), strict=True):
            # Not in PyTorch's default dtype, which is the model's while weights are loaded.
            row.copy_(torch.as_tensor(value, dtype=torch.float64))
        layer.register_buffer("vsprefill_tau", tau.to(device), persistent=False)
        if state.weights is None:
            return
        ready = prepare_weights(IndexerLayerWeights(*(part.to(device) for part in state.weights)), act_dtype)
        for name, tensor in ready._asdict().items():
            layer.register_buffer(f"vsprefill_{name}", tensor, persistent=False)
        state.weights = ready

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of a step; shapes as in the stock backend. Writes into ``output`` and returns it."""
        if attn_metadata is None and self._state is not None and self._runtime is not None:
            buffers = device_buffers(self._runtime, self._vllm_config, output.device)
            if self.kv_cache_dtype.startswith("fp8") and buffers.query is None:
                tokens = self._vllm_config.scheduler_config.max_num_batched_tokens
                buffers.query = self._query_buffer(tokens, output.device)
        elif self._state is not None:
            self._warm_up(layer, query, kv_cache, output)
        step: SparseStep | None = getattr(attn_metadata, "vsprefill", None)
        if step is None or self._runtime is None:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            return output
        plan = step.plan
        if self._state is None or not step.rounds or not self._takes(layer, query):
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            pairs = self.num_kv_heads * plan.prefill_pairs
            self._record(LayerCounts(pairs, pairs, dense_chunks=1))
            return output

        def stock(run: DenseRun) -> None:
            rows = slice(run.row_start, run.row_end)
            super(VSPrefillFlashImpl, self).forward(
                layer,
                query[rows],
                None if key is None else key[rows],
                None if value is None else value[rows],
                kv_cache,
                run.metadata,
                output[rows],
                *args,
                **kwargs,
            )

        for run in step.dense_runs:
            stock(run)
        cache = self._cache(kv_cache)
        tokens = attn_metadata.num_actual_tokens
        rows, scale = self._queries(layer, query[:tokens])
        for part in step.rounds:
            kv = PagedKV(cache, part.block_table, *self._scales(layer, cache))
            self._choose(layer, self._state, rows, scale, kv, part)
            for run in part.fallbacks:
                stock(run)
            self._attend(self._state, rows, scale, kv, part, output[:tokens])
        dense, causal = plan.dense_prefill_pairs, plan.prefill_pairs
        self._record(LayerCounts(self.num_kv_heads * dense, self.num_kv_heads * causal, sparse_chunks=len(plan.sparse)))
        return output

    def _warm_up(self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor) -> None:
        """Compile the kernels at start-up, with the first batch that has a KV cache, not with the first long prompt.

        A made-up request reads and scores the cache's first block, which vLLM gives to nobody.
        """
        runtime, state = self._runtime, self._state
        assert runtime is not None
        assert state is not None
        if runtime.device is not None and runtime.device.warmed:
            return
        if kv_cache.numel() == 0 or not self._takes(layer, query):
            return
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        buffers = device_buffers(runtime, self._vllm_config, output.device)
        buffers.warmed = True
        rows = 64
        device = query.device
        q = self._query_buffer(rows, device).zero_()
        cache = self._cache(kv_cache)
        table = torch.zeros(1, -(-rows // kv_cache.shape[2]), dtype=torch.int32, device=device)
        batch = Batch.from_lists([rows], [rows], device)
        limits = torch.zeros(2, 4, dtype=torch.int32, device=device)
        counts = torch.zeros(2, 8, dtype=torch.int64, device=device)
        kv = PagedKV(cache, table, *self._scales(layer, cache))
        self._choose(layer, state, q, self.scale, kv, SparseRound(batch, batch, None, table, ()))
        guard(buffers.index, batch, 1.0, dense_rows=limits[0], sparse_end=limits[1], counts=counts[0])
        attend(q, kv, buffers.index, batch, scale=self.scale, dense_last=0, out=torch.empty_like(q), visited=counts[1])

    def _takes(self, layer: Any, query: torch.Tensor) -> bool:
        """Whether the kernels can use these queries and the scales that belong to them and to the cache."""
        reasons = []
        quantised = query.dtype in FP8_DTYPES
        if not quantised and query.dtype not in QUERY_DTYPES:
            reasons.append(f"its queries arrive as {query.dtype}")
        if self.kv_cache_dtype.startswith("fp8"):
            scales = [layer._k_scale, layer._v_scale, *([layer._q_scale] if quantised else [])]
            if any(scale.numel() != 1 for scale in scales):
                reasons.append("its quantisation has a scale for each head")
        if reasons:
            assert self._runtime is not None
            self._runtime.explain_stock(reasons)
        return not reasons

    def _queries(self, layer: Any, query: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Queries in the model's type, and the factor on the logits. FlashAttention 3 is given quantised queries with a
        quantised cache; the kernels here compute in the model's type."""
        if query.dtype not in FP8_DTYPES:
            return query, self.scale
        assert self._runtime is not None
        buffers: DeviceBuffers = self._runtime.device
        if buffers.query is None or buffers.query.shape[0] < query.shape[0]:
            buffers.query = self._query_buffer(query.shape[0], query.device)
        rows = buffers.query[: query.shape[0]]
        rows.copy_(query)
        return rows, self.scale * float(layer._q_scale_float)

    def _query_buffer(self, tokens: int, device: torch.device) -> torch.Tensor:
        dtype = self._vllm_config.model_config.dtype
        return torch.empty(tokens, self.num_heads, self.head_size, dtype=dtype, device=device)

    def _cache(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """The cache as the kernels read it: ``[num_blocks, H, block, 2 * D]``."""
        if kv_cache.dim() != 4 or kv_cache.shape[1] != self.num_kv_heads or kv_cache.shape[3] != 2 * self.head_size:
            raise RuntimeError(
                f"VSPREFILL does not know a KV cache of shape {tuple(kv_cache.shape)} for {self.num_kv_heads} heads of "
                f"{self.head_size}; this vLLM lays it out differently"
            )
        if self.kv_cache_dtype.startswith("fp8"):
            dtype = torch.float8_e5m2 if self.kv_cache_dtype == "fp8_e5m2" else current_platform.fp8_dtype()
            return kv_cache.view(dtype)
        return kv_cache

    def _scales(self, layer: Any, cache: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if cache.dtype not in FP8_DTYPES:
            return None, None
        return layer._k_scale, layer._v_scale

    def _choose(
        self, layer: Any, state: LayerState, query: torch.Tensor, scale: float, kv: PagedKV, part: SparseRound
    ) -> None:
        """Columns and diagonals of a round, with the whole context in view, as an index for the sparse rows."""
        runtime = self._runtime
        assert runtime is not None
        buffers: DeviceBuffers = runtime.device
        tau, budgets = layer.vsprefill_tau, runtime.budgets
        gathered, index = buffers.gathered, buffers.index
        unchecked = not _is_checked(state)
        if state.weights is None:
            assert buffers.sampled is not None
            if unchecked:
                check_sampled(query, kv, part.whole, buffers.sampled, gathered, scale)
            sampled(query, kv, part.whole, buffers.sampled, gathered, scale=scale)
        else:
            logits = self._scratch(kv) if state.logits is None else state.logits.slots
            if unchecked:
                check_score_missing(kv, part.whole, state.weights, logits, buffers.missing)
                check_gather(logits, kv, part.whole, gathered)
            score_missing(kv, part.whole, state.weights, logits, buffers.missing)
            gather(logits, kv, part.whole, gathered)
        if unchecked:
            check_select(gathered, part.whole, tau, index, buffers.select, budgets)
            check_build_index(index, kv, part.rows)
        select(gathered, part.whole, tau, index, buffers.select, budgets=budgets)
        build_index(index, kv, part.rows)
        if part.guarded is not None:
            max_density, counts = runtime.options.max_density, buffers.guarded(state.row)
            dense_rows, sparse_end = buffers.dense_rows, buffers.sparse_end
            if unchecked:
                check_guard(index, part.rows, max_density, dense_rows, sparse_end, counts)
            guard(index, part.rows, max_density, dense_rows=dense_rows, sparse_end=sparse_end, counts=counts)

    def _scratch(self, kv: PagedKV) -> torch.Tensor:
        """Logits for every slot of the cache, all missing: for layers that cannot keep them."""
        runtime = self._runtime
        assert runtime is not None
        buffers: DeviceBuffers = runtime.device
        slots = kv.cache.shape[0] * kv.block_size
        if buffers.scratch is None or buffers.scratch.shape[0] < slots:
            buffers.scratch = torch.empty(slots, 2 * kv.num_kv_heads, dtype=torch.float32, device=kv.cache.device)
        return buffers.scratch[:slots].fill_(float("nan"))

    def _attend(
        self,
        state: LayerState,
        query: torch.Tensor,
        scale: float,
        kv: PagedKV,
        part: SparseRound,
        output: torch.Tensor,
    ) -> None:
        runtime = self._runtime
        assert runtime is not None
        buffers: DeviceBuffers = runtime.device
        rows = part.rows if part.guarded is None else part.guarded
        visited = buffers.visited(state.row)
        if not _is_checked(state):
            check_attend(query, kv, buffers.index, rows, scale, output, None, visited)
        attend(query, kv, buffers.index, rows, scale=scale, dense_last=0, out=output, visited=visited)

    def _record(self, counts: LayerCounts) -> None:
        """Add a step's counts that the host knows and, after the model's last layer, queue those of the device."""
        runtime = self._runtime
        assert runtime is not None
        runtime.recorder.record(self._layer_index, counts)
        if runtime.is_last(self._layer_index):
            if runtime.device is None:
                runtime.recorder.publish()
            else:
                runtime.counts_reader.enqueue(runtime.device.counts)
