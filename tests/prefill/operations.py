# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The references over a paged cache, in the place of the Triton kernels."""

from __future__ import annotations

from vllm_vsprefill.kernels.attend import paged as attend
from vllm_vsprefill.kernels.attend_tiles import paged as attend_tiles
from vllm_vsprefill.kernels.guard import paged as guard
from vllm_vsprefill.kernels.merge import paged as merge
from vllm_vsprefill.kernels.price import paged as price
from vllm_vsprefill.kernels.rank import paged as rank
from vllm_vsprefill.kernels.recall import paged as recall
from vllm_vsprefill.kernels.sampled import paged as sampled
from vllm_vsprefill.kernels.score import paged as score
from vllm_vsprefill.kernels.select import paged as select
from vllm_vsprefill.kernels.variance import paged as variance
from vllm_vsprefill.prefill.cuda import PagedOperations
from vllm_vsprefill.prefill.cuda_tiles import TileOperations

REFERENCE = PagedOperations(
    sampled.sampled,
    score.score_missing,
    select.gather,
    select.select,
    merge.build_index,
    guard.guard,
    attend.attend,
    recall.recall,
)
TILE_REFERENCE = TileOperations(
    variance.variance,
    price.price,
    guard.guard_tiles,
    rank.rank,
    merge.build_tiles,
    attend_tiles.attend_tiles,
)
