# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A step on CUDA, planned once from what the host knows: the layers then only launch kernels.

Rows that run dense, the last ones of every sparse chunk among them, go to the stock kernel in contiguous runs, each
with metadata of its own and without the schedule that FlashAttention 3 made for the whole batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

from vllm_vsprefill.backends.cuda_runtime import AnyCudaPrefill, CudaRuntime
from vllm_vsprefill.backends.step import DenseRun, SparseBuilderMixin, SparseStep
from vllm_vsprefill.kernels.paged import Batch
from vllm_vsprefill.plan import RequestRows, StepPlan
from vllm_vsprefill.prefill.cuda import Round
from vllm_vsprefill.prefill.upload import Sent, Upload


@dataclasses.dataclass(frozen=True, slots=True)
class SparseRound:
    """Requests that go through the kernels together.

    Attributes:
        batches: their rows.
        block_table: int32 ``[requests, max_blocks]``, on the device.
        fallbacks: stock calls for the requests that ``guard`` sends there; the others have no rows in them.
    """

    batches: Round
    block_table: torch.Tensor
    fallbacks: tuple[DenseRun, ...]


class VSPrefillFlashMetadataBuilder(SparseBuilderMixin[SparseRound], FlashAttentionMetadataBuilder):
    """Builds the stock metadata and, when some request runs sparse, a plan beside it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The first model runner sorts a batch, decodes first, only for builders that ask for it.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._runtime: CudaRuntime = CudaRuntime.of(self.vllm_config)
        self._runtime.announce(self.vllm_config, self.layer_names)

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
            metadata.vsprefill = self.plan(common_attn_metadata, metadata)
        return metadata

    def cut(
        self, plan: StepPlan, starts: list[int], lengths: list[int], common: Any, metadata: Any
    ) -> SparseStep[SparseRound]:
        prefill, tables = self._runtime.prefill_on(self.device), common.block_table_tensor
        rounds = prefill.rounds(plan.sparse)
        upload = Upload()
        run_starts = [
            upload.add([*(rows.row_start - run[0].row_start for rows in run), run[-1].row_end - run[0].row_start])
            for run in plan.dense_runs
        ]
        places = [_describe(upload, requests, starts, lengths) for requests in rounds]
        sent = upload.send(self.device)
        return SparseStep(
            plan,
            tuple(
                _dense_run(metadata, run, sent.take(place), tables)
                for run, place in zip(plan.dense_runs, run_starts, strict=True)
            ),
            tuple(
                self._round(metadata, prefill, requests, sent, place, tables)
                for requests, place in zip(rounds, places, strict=True)
            ),
        )

    def _round(
        self,
        metadata: Any,
        prefill: AnyCudaPrefill,
        requests: tuple[RequestRows, ...],
        sent: Sent,
        places: dict[str, slice],
        tables: torch.Tensor,
    ) -> SparseRound:
        tail = self._runtime.gate.dense_last_rows
        max_rows = max(rows.rows for rows in requests)
        longest = max(rows.seq_len for rows in requests)
        lists = {name: sent.take(place) for name, place in places.items()}
        row_start, seq_len = lists["row_start"], lists["seq_len"]
        whole = Batch(row_start, lists["whole_end"], lists["whole_seq_len"], max_rows + tail, longest + tail)
        batch = Batch(row_start, lists["row_end"], seq_len, max_rows, longest)
        table = tables.index_select(0, lists["request"])
        tiles, buffers = prefill.index(requests), prefill.buffers
        if not any(prefill.may_exceed(rows) for rows in requests):
            return SparseRound(Round(whole, batch, tiles=tiles), table, ())
        guarded = batch._replace(row_end=buffers.sparse_end[: len(requests)])
        fallbacks = tuple(
            _stock_call(
                metadata,
                (rows,),
                buffers.dense_rows[2 * i : 2 * i + 2],  # all rows or none, as `guard` decides
                seq_len[i : i + 1],
                table[i : i + 1],
            )
            for i, rows in enumerate(requests)
        )
        return SparseRound(Round(whole, batch, guarded, tiles), table, fallbacks)


def _describe(
    upload: Upload, requests: tuple[RequestRows, ...], starts: list[int], lengths: list[int]
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
    """Stock call for a run of rows. Their sequences end where those of their requests do, so the device's own lengths
    are right for them, also where drafts were rejected."""
    first, last = run[0].request, run[-1].request
    return _stock_call(
        metadata, run, query_start_loc, metadata.seq_lens[first : last + 1], tables[first : last + 1]
    )  # fmt: skip


def _stock_call(
    metadata: Any,
    run: tuple[RequestRows, ...],
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
) -> DenseRun:
    """Stock metadata of neighbouring rows, as if they were a batch of their own."""
    row_start, row_end = run[0].row_start, run[-1].row_end
    own = dataclasses.replace(
        metadata,
        num_actual_tokens=row_end - row_start,
        max_query_len=max(rows.rows for rows in run),
        query_start_loc=query_start_loc,
        max_seq_len=max(rows.seq_len for rows in run),
        seq_lens=seq_lens,
        block_table=block_table,
        slot_mapping=metadata.slot_mapping[row_start:row_end],
        scheduler_metadata=None,  # made for the whole batch
        max_num_splits=0,  # FlashAttention decides: a few rows over a long sequence want their keys split
    )
    return DenseRun(row_start, row_end, own)
