# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What VSPREFILL on CUDA cannot do, checked before an engine process starts. Imports neither Triton nor kernels."""

from __future__ import annotations

import importlib.util
from typing import Any

from vllm_vsprefill.config import VSPrefillConfig

MIN_CAPABILITY = (8, 0)
MAX_HEAD_SIZE = 256
MAX_GROUP = 64
"""Query heads of one KV head; their rows share a tile."""

MAX_SEQ_LEN = 2**21 - 1
"""The selection counts tokens of a bin in 21 bits."""


def head_reasons(head_size: int, num_heads: int, num_kv_heads: int) -> dict[str, bool]:
    """Why the kernels cannot compute heads of some shape, and whether each reason holds."""
    return {
        f"its head size {head_size} is above {MAX_HEAD_SIZE}": head_size > MAX_HEAD_SIZE,
        f"its head size {head_size} is not a multiple of 8": head_size % 8 != 0,
        f"more than {MAX_GROUP} query heads share a KV head": num_heads > MAX_GROUP * num_kv_heads,
    }


def block_problems(options: VSPrefillConfig) -> list[str]:
    """Tile sizes that the kernels do not have."""
    problems = []
    q, k = options.block_q, options.block_k
    if q is not None and (q & (q - 1) or not 16 <= q <= 128):
        problems.append(f"block_q is {q}; on CUDA it must be 16, 32, 64 or 128. Leave it out for the default.")
    if k is not None and (k & (k - 1) or (q is not None and k > q)):
        problems.append(
            f"block_k is {k}; on CUDA it must be a power of two of at most block_q ({q}). Leave it out for the default."
        )
    return problems


def problems(vllm_config: Any, options: VSPrefillConfig) -> list[str]:
    """Everything that keeps a server from starting, each with its remedy."""
    found = block_problems(options)
    capability = _capability()
    if capability is not None and capability < MIN_CAPABILITY:
        found.append(
            f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 (Ampere) or later. "
            "Remove --attention-backend VSPREFILL to serve with the stock backend."
        )
    if importlib.util.find_spec("triton") is None:
        found.append("Triton is not installed; the kernels are written in it. Install the triton package.")
    parallel = getattr(vllm_config, "parallel_config", None)
    if getattr(parallel, "decode_context_parallel_size", 1) > 1:
        found.append("decode context parallelism splits the KV cache; remove --decode-context-parallel-size.")
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        found.append("prefill context parallelism splits the prompt; remove --prefill-context-parallel-size.")
    if getattr(parallel, "enable_dbo", False):
        found.append("dual-batch overlap runs two half steps at once, which share buffers here; remove --enable-dbo.")
    elif getattr(parallel, "use_ubatching", False):
        found.append("parts of a step would run at once, but share buffers here; remove --ubatch-size.")
    model = getattr(vllm_config, "model_config", None)
    if getattr(model, "use_mla", False):
        found.append("the model uses MLA, which has no keys and values per head; use the stock backend.")
    if getattr(model, "rswa_window", None) is not None:
        found.append("the model uses reference sliding-window attention; use the stock backend.")
    longest = getattr(model, "max_model_len", None)
    if isinstance(longest, int) and longest > MAX_SEQ_LEN:
        found.append(f"max_model_len is {longest}, the selection takes at most {MAX_SEQ_LEN}; set --max-model-len.")
    return found


def _capability() -> tuple[int, int] | None:
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    return None if capability is None else (int(capability.major), int(capability.minor))
