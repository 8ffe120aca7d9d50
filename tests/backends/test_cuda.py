# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The CUDA backend as vLLM sees it, where no kernel runs: registration, refusals, metadata classes, buffers."""

from __future__ import annotations

import dataclasses
import importlib.util
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_vsprefill import _compat
from vllm_vsprefill.backends import cuda_limits, cuda_runtime
from vllm_vsprefill.backends.cuda import VSPrefillFlashBackend, VSPrefillFlashImpl
from vllm_vsprefill.backends.cuda_builder import VSPrefillFlashMetadataBuilder
from vllm_vsprefill.backends.cuda_counts import CountsReader
from vllm_vsprefill.config import VSPrefillConfig
from vllm_vsprefill.plan import StepPlan
from vllm_vsprefill.prefill.buffers import MAX_REQUESTS
from vllm_vsprefill.recall_check import STEPS, Recall, RecallCheck
from vllm_vsprefill.runtime import Runtime, shares_of_heads
from vllm_vsprefill.stats import LayerCounts, Recorder
from vllm_vsprefill.tuning import CUDA, cuda_tuning


def test_classes_are_the_stock_ones_with_our_name() -> None:
    assert issubclass(VSPrefillFlashBackend, flash_attn.FlashAttentionBackend)
    assert VSPrefillFlashBackend.get_name() == "VSPREFILL"
    assert VSPrefillFlashBackend.get_impl_cls() is VSPrefillFlashImpl
    assert VSPrefillFlashBackend.get_builder_cls() is VSPrefillFlashMetadataBuilder
    assert VSPrefillFlashBackend.supports_attn_type(AttentionType.DECODER)
    for attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY, AttentionType.ENCODER_DECODER):
        assert not VSPrefillFlashBackend.supports_attn_type(attn_type)
    assert not VSPrefillFlashBackend.supports_mm_prefix()
    assert not VSPrefillFlashBackend.supports_batch_invariance()
    assert VSPrefillFlashBackend.supports_kv_cache_update_bypass is False  # an attribute in vLLM, not a method
    assert not VSPrefillFlashBackend.is_sparse()  # vLLM means models with sparse attention of their own
    # Inheriting the wrong value would leave the cache unwritten.
    assert VSPrefillFlashBackend.forward_includes_kv_cache_update is False
    assert not VSPrefillFlashImpl.supports_dcp
    assert not VSPrefillFlashImpl.supports_pcp


def test_trimming_drafts_on_the_device_is_refused() -> None:
    """Adaptive verification (vLLM 0.29 and later) moves the rows of requests behind the host's back."""
    assert not VSPrefillFlashBackend.supports_device_cpu_query_lens_mismatch()
    if "use_adaptive_verification" not in AttentionSelectorConfig._fields:
        pytest.skip("this vLLM has no adaptive verification")

    def reasons(wanted: bool) -> list[str]:
        selector = AttentionSelectorConfig(128, torch.bfloat16, "auto", 16, use_adaptive_verification=wanted)
        return VSPrefillFlashBackend.validate_configuration(
            device_capability=DeviceCapability(9, 0), **selector._asdict()
        )

    assert reasons(False) == []
    (reason,) = reasons(True)
    assert "adaptive verification" in reason


@pytest.mark.parametrize("stock", list(AttentionCGSupport))
def test_full_graphs_are_for_decodes_only(stock: AttentionCGSupport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VSPrefillFlashMetadataBuilder, "_cudagraph_support", stock)
    found = VSPrefillFlashMetadataBuilder.get_cudagraph_support(None, None)
    assert found.value == min(stock.value, AttentionCGSupport.UNIFORM_BATCH.value)


def test_no_cascade_and_no_shared_plan() -> None:
    assert VSPrefillFlashMetadataBuilder.supports_update_block_table is False
    builder = VSPrefillFlashMetadataBuilder.__new__(VSPrefillFlashMetadataBuilder)
    assert builder.use_cascade_attention(1000, None, 8, 2, False, False, False, 100, 1) is False


def test_metadata_has_what_a_run_replaces() -> None:
    """``dataclasses.replace`` on the stock metadata: a field that goes away must be noticed here."""
    fields = {field.name for field in dataclasses.fields(flash_attn.FlashAttentionMetadata)}
    wanted = "num_actual_tokens max_query_len query_start_loc max_seq_len seq_lens block_table slot_mapping"
    assert fields >= {*wanted.split(), "scheduler_metadata", "max_num_splits", "causal"}


def config(**parallel: Any) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        model_config=SimpleNamespace(use_mla=False, rswa_window=None, max_model_len=4096),
    )


def test_nothing_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_limits, "_capability", lambda: (9, 0))
    for tuning in CUDA.values():
        assert cuda_limits.problems(config(), VSPrefillConfig.from_sources().resolved(tuning)) == []


def test_all_problems_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_limits, "_capability", lambda: (7, 5))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options = VSPrefillConfig.from_sources({"block_q": 48, "block_k": 24})
    bad = config(decode_context_parallel_size=2, prefill_context_parallel_size=2, enable_dbo=True)
    bad.model_config = SimpleNamespace(use_mla=True, rswa_window=8, max_model_len=2**22)
    text = "\n".join(cuda_limits.problems(bad, options))
    for part in (
        "block_q is 48",
        "block_k is 24",
        "capability 7.5",
        "Triton is not installed",
        "--decode-context-parallel-size",
        "--prefill-context-parallel-size",
        "--enable-dbo",
        "MLA",
        "sliding-window",
        "--max-model-len",
    ):
        assert part in text


def test_ubatches_are_refused_like_dual_batch_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM splits steps for ``--ubatch-size``, too, without ``--enable-dbo``."""
    from vllm.config import ParallelConfig

    monkeypatch.setattr(cuda_limits, "_capability", lambda: (9, 0))
    bad, options = config(), VSPrefillConfig.from_sources().resolved(cuda_tuning((9, 0)))
    bad.parallel_config = ParallelConfig(ubatch_size=2)
    (problem,) = cuda_limits.problems(bad, options)
    assert "--ubatch-size" in problem


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((257, 8, 8), "head size 257 is above 256"), ((100, 8, 8), "multiple of 8"), ((128, 130, 2), "more than 64")],
)
def test_heads_the_kernels_cannot_compute(shape: tuple[int, int, int], reason: str) -> None:
    assert any(reason in text for text, holds in cuda_limits.head_reasons(*shape).items() if holds)
    assert not any(cuda_limits.head_reasons(128, 32, 8).values())


def test_tuning_fits_the_kernels() -> None:
    for capability, tuning in CUDA.items():
        assert capability >= cuda_limits.MIN_CAPABILITY
        options = VSPrefillConfig.from_sources().resolved(cuda_tuning(capability))
        assert (options.block_q, options.block_k) == (tuning.block_q, tuning.block_k)
        assert cuda_limits.block_problems(options) == []


def test_slots_that_kinds_of_caches_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rarest kind decides how large groups are, and so how many slots fit into memory."""
    monkeypatch.setattr(cuda_runtime, "cache_kinds", lambda layers: layers)

    def min_layers(**kinds: int) -> int:
        layers = dict(enumerate(kind for kind, count in kinds.items() for _ in range(count)))
        found = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
        return cuda_runtime.min_layers_of_a_slot(found, kinds["full"])

    assert min_layers(full=36) == 36
    assert min_layers(full=10, window=52) == 10
    assert min_layers(full=30, window=10) == 10


@pytest.mark.parametrize(("ranks", "shares"), [(1, 1.0), (2, 2.0), (4, 2.0)])
def test_a_price_is_of_the_whole_layer(random_model: Path, ranks: int, shares: float) -> None:
    """A rank knows the output of its own heads only, and pays for its share of the pairs where it shares KV heads."""
    from vllm.config import ModelConfig

    parallel = SimpleNamespace(tensor_parallel_size=ranks)
    found = SimpleNamespace(model_config=ModelConfig(str(random_model)), parallel_config=parallel)
    assert shares_of_heads(found) == shares


def test_counts_of_host_and_device_are_joined_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts, copied while later steps go on: each step's numbers are those of its own time."""
    monkeypatch.setattr(CountsReader, "_run", lambda self, device: None)
    recorder = Recorder()
    recorder.record(0, LayerCounts(5, 5, 0, 1))
    reader = CountsReader(recorder, [1, 3])
    counts = torch.zeros(2, 2 * MAX_REQUESTS, dtype=torch.int64)
    assert not reader.drain()
    for prompt in range(2):
        recorder.begin_prompt()
        for _ in range(2):
            recorder.record(1, LayerCounts(10, 100, 2, 0))
            recorder.record(3, LayerCounts(10, 100, 2, 0))
            counts[0, :2] += 20  # two requests of a round
            counts[1, MAX_REQUESTS:][:2] += torch.tensor([90 - 40 * prompt, 1])  # the guard sent one away
            reader.enqueue(counts)
    assert reader.drain()
    assert recorder._totals[1] == LayerCounts(4 * 50, 400, 8, 0)
    assert recorder._totals[3] == LayerCounts(4 * 10 + 2 * 90 + 2 * 50, 400, 4, 4, 4)
    assert recorder._totals[0] == LayerCounts(5, 5, 0, 1)
    last = {layer: now - recorder._before_prompt[layer] for layer, now in recorder._totals.items()}
    assert last[3] == LayerCounts(2 * 10 + 2 * 50, 200, 2, 2, 2)


def test_recall_is_read_step_by_step_while_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountsReader, "_run", lambda self, device: None)
    told: list[Recall] = []
    check = RecallCheck({1: 0.9, 3: 0.7}.__getitem__, told.append)
    reader = CountsReader(Recorder(), [1, 3], check=check)
    counts, covered = torch.zeros(2, 2 * MAX_REQUESTS, dtype=torch.int64), torch.zeros(2, 4)
    for step in range(STEPS + 2):
        if step != 1:  # nothing ran sparse
            assert check.is_due  # nobody has read anything yet
            check.mark()
            covered += torch.tensor([[1.0, 2, 0, 0], [1.2, 2, 0, 0]])
        reader.enqueue(counts, covered)
    assert told == []
    assert reader.drain()
    assert not check.is_due
    assert told == [Recall(pytest.approx(0.55), pytest.approx(0.8), STEPS)]  # type: ignore[arg-type]


def test_counts_appear_without_asking() -> None:
    recorder = Recorder()
    recorder.record(0, LayerCounts(1, 10, 1, 0))
    reader = CountsReader(recorder, [0])
    reader.enqueue(torch.ones(1, 2 * MAX_REQUESTS, dtype=torch.int64) * 0)
    deadline = time.monotonic() + 10
    while recorder._totals.get(0) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert recorder._totals[0] == LayerCounts(1, 10, 1, 0)


def test_counts_are_awaited_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins on the first GPU; waiting there for another one's event would take memory of the first."""
    seen: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append((threading.current_thread().name, device)))
    reader = CountsReader(Recorder(), [0])
    drained = threading.Event()
    monkeypatch.setattr(reader, "drain", lambda first: drained.set())
    reader._queue.put(None)  # type: ignore[arg-type]
    threading.Thread(target=reader._run, args=(torch.device("cuda", 1),), name="counts", daemon=True).start()
    assert drained.wait(10)
    assert seen == [("counts", torch.device("cuda", 1))]


def test_prompts_are_told_apart() -> None:
    """A new one after a step without prefill, or at position 0 with nothing else prefilling; not with each chunk."""
    runtime = Runtime.__new__(Runtime)
    runtime.recorder, runtime._prefilled = Recorder(), False
    seen = []
    for pairs, starts_alone in ((9, True), (9, False), (0, False), (9, False), (9, False), (9, True), (9, False)):
        runtime.note_step(StepPlan((), (), pairs, starts_alone))
        seen.append(runtime.recorder.prompt)
    assert seen == [1, 1, 1, 2, 2, 3, 3]


def test_lengths_come_from_the_host() -> None:
    """Never from the device: a tensor that cannot be read stands for one."""
    far = torch.empty(2, dtype=torch.int32, device="meta")
    starts = torch.tensor([0, 5, 6])
    common = SimpleNamespace(seq_lens=far, seq_lens_cpu_upper_bound=torch.tensor([7, 8]), query_start_loc_cpu=starts)
    assert _compat.cpu_seq_lens(common) == [7, 8]
    common = SimpleNamespace(seq_lens=far, seq_lens_cpu_upper_bound=None, _seq_lens_cpu=torch.tensor([3, 4]))
    assert _compat.cpu_seq_lens(common) == [3, 4]
    assert _compat.cpu_seq_lens(SimpleNamespace(seq_lens=far)) is None
    # A padded batch has more rows than known requests.
    padded = SimpleNamespace(query_start_loc_cpu=torch.tensor([0, 5, 6, 6]), is_prefilling=torch.tensor([True, False]))
    assert _compat.prefill_flags(padded) == [True, False, False]
