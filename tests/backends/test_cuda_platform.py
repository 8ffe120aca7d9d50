# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Which backend vLLM's own CUDA platform gives a layer when VSPREFILL is selected. The device is made up, the rest is
vLLM's code."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from vllm import logger as vllm_logger
from vllm.platforms.interface import DeviceCapability
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_vsprefill import _compat, backends, registration
from vllm_vsprefill.backends.cuda import VSPrefillFlashBackend


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's CUDA platform on an imagined Hopper GPU, with the plugin's hook."""
    load_general_plugins()
    for compiled in ("vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C"):  # kernels that the CPU build does not have
        if importlib.util.find_spec(compiled) is None:
            monkeypatch.setitem(sys.modules, compiled, ModuleType(compiled))
    cuda = importlib.import_module("vllm.platforms.cuda")

    class Hopper(cuda.CudaPlatformBase):  # type: ignore[name-defined]
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

    monkeypatch.setattr(backends, "VSPrefillBackend", VSPrefillFlashBackend, raising=False)

    class Hooked(Hopper):
        pass

    _compat._wrap_classmethod(Hooked, "get_attn_backend_cls", _compat._leaving_the_rest_to_stock)
    return Hooked


def choose(platform: Any, backend: str | None = "VSPREFILL", **changes: Any) -> str:
    settings: dict[str, Any] = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16}
    selector = AttentionSelectorConfig(**{**settings, **changes})
    selected = None if backend is None else AttentionBackendEnum[backend]
    return str(platform.get_attn_backend_cls(selected, selector, 32))


def test_plain_layers_get_our_backend(platform: Any) -> None:
    ours = choose(platform)
    assert ours in (
        registration.BACKEND_PATH,
        f"{VSPrefillFlashBackend.__module__}.{VSPrefillFlashBackend.__qualname__}",
    )
    assert choose(platform, kv_cache_dtype="bfloat16") == ours
    assert choose(platform, "FLASH_ATTN") == choose(platform, None) != ours


@pytest.mark.parametrize(
    "changes",
    [
        {"use_mm_prefix": True},
        {"attn_type": AttentionType.ENCODER},
        {"attn_type": AttentionType.ENCODER_ONLY},
        {"attn_type": AttentionType.ENCODER_DECODER},
        {"use_batch_invariant": True},
        {"dtype": torch.float32},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_other_layers_get_what_vllm_chooses_without_it(platform: Any, changes: dict[str, Any]) -> None:
    """A model with images, an encoder: the server starts, and those layers run as they would without VSPREFILL."""
    with pytest.raises(ValueError, match="not valid for this configuration"):
        platform.__mro__[1].get_attn_backend_cls(AttentionBackendEnum["VSPREFILL"], selector_of(changes), 32)
    assert choose(platform, **changes) == choose(platform, None, **changes)


def selector_of(changes: dict[str, Any]) -> AttentionSelectorConfig:
    settings: dict[str, Any] = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16}
    return AttentionSelectorConfig(**{**settings, **changes})


def test_the_reason_and_the_remedy_are_logged(platform: Any, plugin_log: list[str]) -> None:
    for printer in (vllm_logger._print_warning_once, vllm_logger._print_info_once):
        printer.cache_clear()  # said before, by the tests above
    choose(platform, use_mm_prefix=True)
    choose(platform, attn_type=AttentionType.ENCODER_ONLY)
    text = "\n".join(plugin_log)
    assert "partial multimodal token full attention" in text
    assert "--limit-mm-per-prompt" in text
    assert "encoder_only layers" in text


def test_what_no_backend_takes_is_still_vllms_own_refusal(platform: Any) -> None:
    with pytest.raises(ValueError, match="No valid attention backend found"):
        choose(platform, dtype=torch.float64)


def test_stock_flash_attention_is_what_is_subclassed() -> None:
    assert issubclass(VSPrefillFlashBackend, flash_attn.FlashAttentionBackend)
