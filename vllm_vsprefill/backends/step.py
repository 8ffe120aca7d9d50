# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""One scheduler step, planned on the host before any layer runs: which rows are sparse, which ones stock."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from vllm.logger import init_logger

from vllm_vsprefill import _compat
from vllm_vsprefill.metrics import DENSE
from vllm_vsprefill.plan import StepPlan, plan_step
from vllm_vsprefill.runtime import Runtime

logger = init_logger("vllm.vsprefill")

RoundT = TypeVar("RoundT")
"""Requests that go through the kernels together, as the platform describes them."""

_NOTHING = StepPlan((), (), 0)


@dataclass(frozen=True, slots=True)
class DenseRun:
    """Rows next to each other in the batch that the stock kernel computes in one call."""

    row_start: int
    row_end: int
    metadata: Any


@dataclass(frozen=True, slots=True)
class SparseStep(Generic[RoundT]):
    """Attached to the stock metadata, as its attribute ``vsprefill``.

    Attributes:
        plan: which rows run sparse.
        dense_runs: stock metadata of the other rows; empty if all rows are dense.
        rounds: the sparse rows.
    """

    plan: StepPlan
    dense_runs: tuple[DenseRun, ...] = ()
    rounds: tuple[RoundT, ...] = ()


class SparseBuilderMixin(Generic[RoundT]):
    """Comes before the stock metadata builder, and puts a plan beside what that builds.

    Attributes:
        layer_names: attention layers that share the metadata.
    """

    # The plan belongs to one step; vLLM must not copy metadata from one KV cache group to another.
    supports_update_block_table: bool = False

    layer_names: list[str]
    _runtime: Runtime

    def cut(self, plan: StepPlan, starts: list[int], lengths: list[int], common: Any, metadata: Any) -> Any:
        """The :class:`SparseStep` of a plan with sparse rows.

        Args:
            plan: the plan.
            starts: first row of each request, and the number of rows.
            lengths: tokens of each request, those of this step included.
            common: what vLLM tells every builder.
            metadata: what the stock builder made of it.
        """
        raise NotImplementedError

    def plan(self, common: Any, metadata: Any) -> SparseStep[RoundT] | None:
        """What the layers do in this step, or None where no prompt is being computed."""
        runtime = self._runtime
        if not any(name in runtime.known_layers for name in self.layer_names):
            return None  # layers of a draft model
        # Groups of layers have builders of their own; a step counts once.
        counts = next(iter(runtime.known_layers)) in self.layer_names
        runtime.look_at_switch()
        if common.max_query_len <= 1:
            runtime.note_step(_NOTHING)
            if counts:
                runtime.count_step(_decodes(common))
            return None
        lengths = _compat.cpu_seq_lens(common)
        if lengths is None:
            logger.warning_once("VSPREFILL: this vLLM does not tell the host how long sequences are; all is dense.")
            return None
        flags = _compat.prefill_flags(common)
        if not any(flags):  # drafts are verified
            runtime.note_step(_NOTHING)
            if counts:
                runtime.count_step(_decodes(common))
            return None
        starts = common.query_start_loc_cpu.tolist()
        plan = plan_step(starts, lengths, flags, runtime.gate)
        if plan.sparse and not runtime.worth_choosing(counts):
            plan = plan_step(starts, lengths, flags, dataclasses.replace(runtime.gate, worth=False))
        runtime.note_step(plan)
        if counts:
            runtime.count_step(plan)
        if not plan.prefill_pairs:
            return None
        if not plan.sparse or not any(name in runtime.layers for name in self.layer_names):
            return SparseStep(plan)
        step: SparseStep[RoundT] = self.cut(plan, starts, lengths, common, metadata)
        return step


def _decodes(common: Any) -> StepPlan:
    """A step without prefill, of which nothing but the numbers of requests and rows matter."""
    starts = common.query_start_loc_cpu
    chunks = int(torch.count_nonzero(starts[1:] > starts[:-1]))  # padded requests have no rows
    return StepPlan((), (), 0, shares={(DENSE, "decode"): (chunks, int(starts[-1]))})
