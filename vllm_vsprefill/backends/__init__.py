# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""vLLM glue. ``VSPrefillBackend`` is the class for the platform vLLM runs on."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "VSPrefillBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm_vsprefill.backends.cpu import VSPrefillCPUBackend

        return VSPrefillCPUBackend
    if current_platform.is_cuda():
        from vllm_vsprefill.backends.cuda import VSPrefillFlashBackend

        return VSPrefillFlashBackend
    # vLLM turns an ImportError into a refusal that shows this text.
    raise ImportError(
        f"VSPREFILL has no kernels for {current_platform.device_name}; it runs on vLLM's CUDA and CPU platforms. "
        "Remove --attention-backend VSPREFILL to serve with the stock backend."
    )
