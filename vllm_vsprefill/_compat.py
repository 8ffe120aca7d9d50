# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Everything that depends on how a particular vLLM is built, in one place.

vLLM has no public hook for an out-of-tree attention backend on CPU and none for checking a plugin's options before the
engine starts, so two class methods of the platform are wrapped. Both wrappers do nothing but call the original unless
the user selected ``VSPREFILL``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from vllm_vsprefill.registration import BACKEND_NAME

SUPPORTED_VLLM = (">=0.26", "<0.34")
"""Range of vLLM releases this package was written against."""

_MARK = "_vsprefill_wrapped"

# Fields of vLLM's AttentionSelectorConfig, as far as the running vLLM has them, and what each asks for.
_UNCOVERED = {
    "use_mm_prefix": "bidirectional attention over a multimodal prefix",
    "use_non_causal": "non-causal attention",
    "use_batch_invariant": "batch invariance (the selection depends on the chunks)",
    "use_pcp": "prefill context parallelism",
    "use_dcp": "decode context parallelism",
    "use_rswa": "reference sliding-window attention",
}


def install_platform_hooks() -> None:
    """Wrap the current platform's configuration check and its choice of attention backend. Idempotent."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    _wrap_classmethod(platform, "check_and_update_config", _checking_our_options)
    if current_platform.is_cpu():
        _wrap_classmethod(platform, "get_attn_backend_cls", _offering_our_backend)
    elif current_platform.is_cuda():
        _wrap_classmethod(platform, "get_attn_backend_cls", _leaving_the_rest_to_stock)


def is_cuda() -> bool:
    """Whether vLLM runs on its CUDA platform."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def vllm_version() -> str:
    """Version of the vLLM that is running. Read from the package: the CPU wheel's distribution has another name."""
    import vllm

    return str(vllm.__version__)


def unsupported_version() -> str | None:
    """Why this vLLM is not supported, or None. A version that cannot be parsed (a local build) counts as supported."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    found = vllm_version()
    try:
        version = Version(found)
    except InvalidVersion:
        return None
    if version.is_devrelease or SpecifierSet(",".join(SUPPORTED_VLLM)).contains(version, prereleases=True):
        return None
    return f"vLLM {found} is installed; this version of vllm-vsprefill supports {', '.join(SUPPORTED_VLLM)}"


def is_selected(vllm_config: Any) -> bool:
    """Whether the user chose VSPREFILL for this engine, for every layer or for some kind of layer."""
    attention = getattr(vllm_config, "attention_config", None)
    chosen = [getattr(attention, "backend", None)]
    per_kind = getattr(attention, "backend_per_kind", None)
    if isinstance(per_kind, dict):
        chosen += per_kind.values()
    # A draft model runs stock attention also with this backend, which reads its options all the same.
    chosen.append(getattr(getattr(vllm_config, "speculative_config", None), "attention_backend", None))
    return any(getattr(backend, "name", backend) == BACKEND_NAME for backend in chosen)


def is_draft(vllm_config: Any) -> bool:
    """Whether this is the configuration of a speculative draft model, not of the model that is served."""
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None or draft is getattr(speculative, "target_model_config", None):
        return False
    return getattr(vllm_config, "model_config", None) is draft


def draft_mixes_caches(vllm_config: Any) -> bool:
    """Whether a draft model may bring KV caches of another kind than full attention, which vLLM then lays out anew."""
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None or draft is getattr(speculative, "target_model_config", None):
        return False
    if getattr(speculative, "method", None) not in ("eagle", "eagle3", "mtp", "draft_model"):
        return True
    config = getattr(draft, "hf_text_config", None) or getattr(draft, "hf_config", None)
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return bool(window) or any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())


def is_draft_layer(vllm_config: Any, name: str, layer: Any) -> bool:
    """Whether an attention layer belongs to a draft model, as far as the running vLLM lets it be seen.

    Draft models have a name prefix of their own or, where they continue the served model (EAGLE, MTP), layer indices
    beyond its last one; newer releases also mark their layers, some of them only after loading.
    """
    if getattr(layer, "is_draft_layer", False) or is_draft(vllm_config) or name.startswith("draft_model."):
        return True
    hf_config = getattr(getattr(vllm_config, "model_config", None), "hf_text_config", None)
    layers = getattr(hf_config, "num_hidden_layers", None)
    index = layer_index(name)
    return isinstance(layers, int) and index is not None and index >= layers


def layer_index(name: str) -> int | None:
    """Index of a layer in its model, read off its name as vLLM does; None if the name carries not exactly one."""
    from vllm.model_executor.models.utils import extract_layer_index

    try:
        return int(extract_layer_index(name))
    except AssertionError:
        return None


def cpu_seq_lens(common: Any) -> list[int] | None:
    """Sequence lengths of a step's requests as the host knows them, without asking the device; None if it does not.

    Exact for rows that prefill. A row that verifies drafts may be shorter in truth: nothing may rely on its length.
    """
    lengths = getattr(common, "seq_lens_cpu_upper_bound", None)
    if lengths is None:
        lengths = getattr(common, "_seq_lens_cpu", None)  # the field; the property of that name would wait
    if lengths is None and common.seq_lens.device.type == "cpu":
        lengths = common.seq_lens
    return None if lengths is None else [int(length) for length in lengths.tolist()]


def prefill_flags(common: Any) -> list[bool]:
    """Whether each request of a step still computes its prompt. Padded requests behind the known ones do not."""
    starts = common.query_start_loc_cpu.tolist()
    prefilling = common.is_prefilling
    if prefilling is None:  # callers other than the model runner; a decode has a single row
        return [end - start > 1 for start, end in itertools.pairwise(starts)]
    flags = [bool(flag) for flag in prefilling.tolist()]
    return (flags + [False] * (len(starts) - 1 - len(flags)))[: len(starts) - 1]


def attach_side_layer(vllm_config: Any, name: str, layer: Any) -> None:
    """Add a pseudo attention layer to the model so that vLLM budgets, allocates and binds a cache for it."""
    context = vllm_config.compilation_config.static_forward_context
    if name not in context:
        context[name] = layer


def _wrap_classmethod(cls: type, name: str, make: Callable[[Any], Any]) -> None:
    original = getattr(cls, name).__func__
    if getattr(original, _MARK, False):
        return
    wrapper = make(original)
    setattr(wrapper, _MARK, True)
    wrapper.__doc__ = original.__doc__
    setattr(cls, name, classmethod(wrapper))


def _checking_our_options(original: Any) -> Any:
    """Refuse a bad configuration where vLLM checks its own: in the parent process, before anything is spawned."""

    def check_and_update_config(cls: type, vllm_config: Any) -> Any:
        from vllm_vsprefill import exchange, startup

        result = original(cls, vllm_config)
        if is_draft(vllm_config):
            return result
        if is_selected(vllm_config):
            startup.check(vllm_config)
            startup.ship(vllm_config, exchange.open_exchange)
        elif reason := startup.unread(vllm_config):
            from vllm.logger import init_logger

            init_logger("vllm.vsprefill").warning_once("VSPREFILL does not run: %s", reason)
        return result

    return check_and_update_config


def _leaving_the_rest_to_stock(original: Any) -> Any:
    """On CUDA, give layers that the backend does not take to the one that vLLM would choose without it. The stock
    method would end the engine for the first of them."""

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if getattr(selected_backend, "name", None) != BACKEND_NAME:
            return original(cls, selected_backend, attn_selector_config, *args, **kwargs)
        try:
            reasons = selected_backend.get_class().validate_configuration(
                device_capability=cls.get_device_capability(), **attn_selector_config._asdict()
            )
        except ImportError:
            reasons = []  # the stock method says what cannot be imported
        if not reasons:
            return original(cls, selected_backend, attn_selector_config, *args, **kwargs)
        from vllm.logger import init_logger

        logger = init_logger("vllm.vsprefill")
        attn_type = getattr(attn_selector_config.attn_type, "value", attn_selector_config.attn_type)
        if attn_type != "decoder":
            logger.info_once("VSPREFILL leaves %s layers to another backend.", attn_type)
            return original(cls, None, attn_selector_config, *args, **kwargs)
        hint = ""
        if getattr(attn_selector_config, "use_mm_prefix", False):
            hint = (
                " Images are attended to in both directions; text alone can run sparse, with --limit-mm-per-prompt set "
                "to 0 for every kind of input."
            )
        logger.warning_once(
            "VSPREFILL does not cover layers of this model (%s); none of their rows run sparse, vLLM chooses their "
            "backend.%s",
            "; ".join(reasons),
            hint,
        )
        return original(cls, None, attn_selector_config, *args, **kwargs)

    return get_attn_backend_cls


def _offering_our_backend(original: Any) -> Any:
    """Let CPU layers use the backend. The stock method answers CPU_ATTN to whatever was selected."""

    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if getattr(selected_backend, "name", None) != BACKEND_NAME:
            return original(cls, selected_backend, attn_selector_config, *args, **kwargs)
        from vllm.logger import init_logger
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        logger = init_logger("vllm.vsprefill")
        # The stock method also refuses what CPU attention cannot do; keep that by asking it first.
        stock = original(cls, AttentionBackendEnum.CPU_ATTN, attn_selector_config, *args, **kwargs)
        if stock != AttentionBackendEnum.CPU_ATTN.get_path():
            logger.info_once("VSPREFILL does not cover layers that need %s; they use it unchanged.", stock)
            return stock
        attn_type = getattr(attn_selector_config.attn_type, "value", attn_selector_config.attn_type)
        reasons = [f"{attn_type} layers"] if attn_type != "decoder" else []
        reasons += [text for field, text in _UNCOVERED.items() if getattr(attn_selector_config, field, False)]
        if reasons:
            logger.info_once("VSPREFILL does not cover %s: stock CPU attention.", ", ".join(reasons))
            return stock
        logger.info_once("Using VSPREFILL on top of stock CPU attention.")
        return selected_backend.get_path()

    return get_attn_backend_cls
