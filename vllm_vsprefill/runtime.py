# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What the layers of one model share in a worker on every platform: options, estimator, gate, counts.

The layers of a model are constructed one by one and know nothing of each other; the first one to ask gets the runtime
made, the others find it.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.logger import init_logger

from vllm_vsprefill import _compat, start_log, startup
from vllm_vsprefill.checkpoint import LoadedIndexer, kv_head_range, load_checkpoint
from vllm_vsprefill.config import ConfigError, VSPrefillConfig
from vllm_vsprefill.fingerprint import read_setting
from vllm_vsprefill.kernels.types import Budgets
from vllm_vsprefill.metrics import CHECKPOINT, DENSE, DENSE_LAYERS, LAST_ROWS, NO_SPARSE_LAYER, SPARSE
from vllm_vsprefill.outlook import outlook
from vllm_vsprefill.plan import Gate, StepPlan
from vllm_vsprefill.prefill.layer import Heads, SlotLogits, SparseLayer
from vllm_vsprefill.recall_check import Recall, RecallCheck
from vllm_vsprefill.stats import LayerCounts, Recorder
from vllm_vsprefill.switch import Switch
from vllm_vsprefill.thresholds import Threshold, expected_recall, thresholds
from vllm_vsprefill.tuning import PlatformTuning, pairs_worth_choosing, platform_tuning

if TYPE_CHECKING:
    from typing_extensions import Self

logger = init_logger("vllm.vsprefill")


class Runtime:
    """Shared state of the layers of one model in one worker. Get it with :meth:`of`."""

    _instances: ClassVar[weakref.WeakValueDictionary[int, Runtime]] = weakref.WeakValueDictionary()

    def __init__(self, vllm_config: Any) -> None:
        self.layers: dict[str, SparseLayer] = {}
        self.known_layers: dict[str, None] = {}  # all of this model with this backend, sparse or not, in order
        self.options = startup.read_options(vllm_config)
        self.is_doubtful = False
        self.indexer = self._load_indexer(vllm_config)
        self.options = self.options.for_estimator(self.indexer is not None, platform_tuning())
        # The plan gives a chunk's dense last rows to the stock kernel.
        self.pattern = dataclasses.replace(self.options.pattern(), dense_last=0)
        self.price = self.options.price
        if self.lists_by_tile:
            self.pattern = dataclasses.replace(self.options.tile_pattern(platform_tuning()), dense_last=0)
            self.price *= shares_of_heads(vllm_config)
        self.gate = gate_of(self.options, vllm_config, self.indexer is not None)
        shipped = startup.shipped(vllm_config)
        exchange = None if shipped is None or shipped.exchange is None else Path(shipped.exchange)
        made = shipped is None or shipped.exchange_made
        self.recorder = Recorder(get_tensor_model_parallel_rank(), exchange, exists=made)
        self.recorder.num_layers = _num_layers(vllm_config)
        self._counts_steps = get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank
        self.recall_check: RecallCheck | None = None
        """Of an indexer that may have been trained on another model; one rank looks for all."""
        if self.is_doubtful and get_tensor_model_parallel_rank() == 0:
            self.recall_check = RecallCheck(self._expected_recall, self._tell_recall)
        self.switch = Switch.of(exchange)
        self._prefilled = False
        self._worth = True
        self._logits_note = ""
        self.keeps_logits = self.indexer is not None and self._can_keep_logits(vllm_config)
        self._last_layer = -1
        self._stock_layers: dict[str, list[int]] = {}  # by reason
        self._announced = False
        # Held so that the id this runtime is filed under stays taken while it lives.
        self._context = vllm_config.compilation_config.static_forward_context
        if not self.options.enabled:
            self._announced = True
            if get_tensor_model_parallel_rank() == 0:
                logger.info("VSPREFILL: switched off (enabled: false); every layer runs the stock backend.")
        self.recorder.mode = "sparse" if self.options.enabled else "off"
        self.recorder.write()  # lets `vsprefill status` find the server before its first prompt

    @classmethod
    def of(cls, vllm_config: Any) -> Self:
        """The runtime of the model that ``vllm_config`` describes, made on first use."""
        key = id(vllm_config.compilation_config.static_forward_context)
        runtime = cls._instances.get(key)
        if not isinstance(runtime, cls):
            cls._instances[key] = runtime = cls(vllm_config)
        return runtime

    def look_at_switch(self) -> None:
        """Follow ``vsprefill mode``; called once a step, looks at the file a few times a second."""
        if not self.options.enabled or not self.switch.look():
            return
        self.gate = dataclasses.replace(self.gate, enabled=self.switch.mode == "sparse")
        self.recorder.mode = self.switch.mode
        self.recorder.write()
        if get_tensor_model_parallel_rank() == 0:
            logger.info("VSPREFILL: switched to %s prefill.", self.switch.mode)

    def worth_choosing(self, first: bool) -> bool:
        """Whether the chunks of a step are worth choosing for, by what those of the last ones computed.

        ``first``: of the builders of metadata that a step has; the others get the same answer.
        """
        if self.options.max_density >= 1.0:
            return True  # the user wants all of them sparse
        if first:
            self._worth = self.recorder.worth.ask()
        return self._worth

    def note_step(self, plan: StepPlan) -> None:
        """Tell prompts apart for the read-out: a new one begins after a step without prefill, or at position 0 with
        nothing else being prefilled."""
        if plan.prefill_pairs and (not self._prefilled or plan.starts_alone):
            self.recorder.begin_prompt()
        self._prefilled = bool(plan.prefill_pairs)

    def count_step(self, plan: StepPlan) -> None:
        """Count the chunks and rows of a step: once, not for every layer or builder of metadata."""
        if not self._counts_steps or not self.recorder.prompt:
            return  # before the first prompt vLLM captures graphs, with made-up decodes
        for (path, reason), (chunks, rows) in plan.shares.items():
            labels = path, reason
            if not self.layers and (path == SPARSE or reason == LAST_ROWS):
                labels = DENSE, NO_SPARSE_LAYER
            self.recorder.count(chunks, "vsprefill_request_chunks", *labels)
            self.recorder.count(rows, "vsprefill_tokens", *labels)

    def reason_for_stock(self, index: int, heads: Heads) -> str | None:
        """Why a layer that could run sparse does not, by the user's or the checkpoint's choice."""
        if choice := chosen_stock(self.options, None if self.indexer is None else self.indexer.layers, index):
            return choice
        if self.indexer is not None:
            kv_heads, channels, _ = self.indexer.layer_weights(index).w1.shape
            if (kv_heads, channels) != (heads.num_kv_heads, 2 * heads.head_size):
                return (
                    f"the indexer was made for {kv_heads} KV heads of {channels // 2} channels, the layer has "
                    f"{heads.num_kv_heads} of {heads.head_size}"
                )
        return None

    def kind_of_choice(self, index: int) -> str:
        """``reason_for_stock`` as a label of the metrics."""
        return DENSE_LAYERS if index in self.options.dense_layers else CHECKPOINT

    def new_layer(self, index: int, heads: Heads, logits: SlotLogits | None) -> SparseLayer:
        """A layer that runs sparse, with this rank's weights as they were loaded and thresholds on the CPU."""
        weights = None if self.indexer is None else self.indexer.layer_weights(index)
        tau = torch.empty(2, heads.num_kv_heads, dtype=torch.float64, device="cpu")
        for row, value in zip(tau, self.thresholds(index), strict=True):
            # Not in PyTorch's default dtype and device, which are the model's while weights are loaded.
            row.copy_(torch.as_tensor(value, dtype=torch.float64, device="cpu"))
        return SparseLayer(index, len(self.layers), heads, weights, tau, logits)

    def thresholds(self, index: int) -> tuple[Threshold, Threshold]:
        """``(tau_columns, tau_diagonals)`` of a layer: one number each, or one for each KV head of this rank."""
        return thresholds(self.options, self.indexer, index)

    def _expected_recall(self, index: int) -> float | None:
        return None if self.indexer is None else expected_recall(self.options, self.indexer, index)

    def _tell_recall(self, recall: Recall) -> None:
        """Say how much the indexer covers; also called by a thread that waits for a device."""
        self.recorder.recall = recall
        assert self.indexer is not None
        found = (
            f"the indexer {self.indexer.name} covered {recall.found:.1%} of this model's attention in the first "
            f"{recall.steps} sparse steps"
        )
        if recall.expected is None:
            logger.info("VSPREFILL: %s, with the thresholds and bounds that were given.", found)
        elif not recall.is_low:
            logger.info("VSPREFILL: %s; %.1f%% are expected.", found, 100 * recall.expected)
        else:
            given = self.options.checkpoint is not None and self.options.estimator == "auto"
            without = "leave checkpoint out" if given else 'set estimator to "priced"'
            logger.warning(
                "VSPREFILL: %s, where %.1f%% are expected: it does not fit this model, and answers to long prompts may "
                "suffer. For the training-free estimator (priced) %s; or make an indexer for this model (vsprefill "
                "train), or thresholds (vsprefill calibrate).", found, 100 * recall.expected, without,
            )  # fmt: skip

    def explain_stock(self, reasons: list[str], index: int = -1) -> None:
        """Note why a layer runs the stock backend; what comes after the start-up message is logged, once a reason.

        ``index``: of the layer, or -1 where it has none.
        """
        text = "; ".join(reasons)
        if self._announced and text not in self._stock_layers and self.options.enabled:
            logger.info("VSPREFILL leaves a kind of layer to the stock backend: %s.", text)
        self._stock_layers.setdefault(text, []).append(index)

    def announce(self, vllm_config: Any, layer_names: Iterable[str]) -> None:
        """Write the start-up message: from where chunks run sparse, or everything that keeps them from it, and what it
        follows from. Once, when all layers are known.

        ``layer_names``: some layers of the engine; nothing is said where all of them are a draft model's.
        """
        context = vllm_config.compilation_config.static_forward_context
        if self._announced or all(_compat.is_draft_layer(vllm_config, name, context.get(name)) for name in layer_names):
            return
        self._announced = True
        if get_tensor_model_parallel_rank() == 0:
            counts = {reason: len(layers) for reason, layers in self._stock_layers.items()}
            found = outlook(vllm_config, self.gate, len(self.layers), counts)
            text = start_log.block(found.text, self._start_lines(vllm_config))
            (logger.warning if found.is_warning else logger.info)("%s", text)

    def _start_lines(self, vllm_config: Any) -> list[tuple[str, str]]:
        """Names and texts of the lines of the start-up message."""
        model, options = vllm_config.model_config, self.options
        heads = next((f", {one.heads}" for one in self.layers.values()), "")
        ranks = get_tensor_model_parallel_world_size()
        return [
            ("model", f"{model.model}: {self.recorder.num_layers} layers{heads}" + (" a rank" if ranks > 1 else "")),
            ("estimator", self._estimator()),
            ("options", start_log.given_options(options)),
            ("no effect", start_log.without_effect(options, self.indexer is not None)),
            ("selection", describe(options, self.lists_by_tile, platform_tuning())),
            ("gates", start_log.gates(self.gate)),
            ("stock layers", start_log.dense_layers(self._stock_layers)),
            ("memory", "; ".join(self.memory())),
        ]

    def memory(self) -> list[str]:
        """What this plugin holds beside the model and its KV cache, as far as it is known."""
        if self._logits_note:
            return [self._logits_note]
        if self.keeps_logits and self.layers:
            size = sum(8 * layer.heads.num_kv_heads for layer in self.layers.values())
            return [f"index logits of {size} bytes a token beside the KV cache"]
        return []

    def note_layer(self, index: int) -> None:
        """Register a layer, sparse or not, whose counts are recorded; the last one publishes."""
        self._last_layer = max(self._last_layer, index)
        self.recorder.num_layers = max(self.recorder.num_layers, index + 1)

    @property
    def lists_by_tile(self) -> bool:
        """Whether every tile of queries gets a list of its own, instead of columns and diagonals for a chunk."""
        return self.options.lists_by_tile(self.indexer is not None)

    @property
    def budgets(self) -> Budgets:
        """How many columns and diagonals ``select`` keeps at least and at most."""
        options = self.options
        return Budgets(options.min_columns, options.max_columns, options.min_diagonals, options.max_diagonals)

    def record(self, index: int, counts: LayerCounts) -> None:
        """Add a step's counts of one layer and, after the model's last layer, publish."""
        self.recorder.record(index, counts)
        if index == self._last_layer:
            self.publish()

    def publish(self) -> None:
        """Make the counts of the steps so far visible."""
        self.recorder.publish()

    def _load_indexer(self, vllm_config: Any) -> LoadedIndexer | None:
        if not self.options.enabled:
            return None
        located = startup.locate_checkpoint(self.options, vllm_config)
        startup.check_agreement(vllm_config, located.folder is not None)
        if get_tensor_model_parallel_rank() == 0:
            located.log()
        if located.folder is None:
            return None
        self.is_doubtful = located.is_doubtful
        total = vllm_config.model_config.get_total_num_kv_heads()
        heads = kv_head_range(total, get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank())
        return load_checkpoint(located.folder, expected=located.model, kv_head_range=heads)

    def _can_keep_logits(self, vllm_config: Any) -> bool:
        """Logits live beside the KV cache only where every slot's key and value pass through this plugin."""
        kinds = set(cache_kinds(vllm_config.compilation_config.static_forward_context.values()))
        if getattr(vllm_config, "kv_transfer_config", None) is not None:
            reason = "a KV connector may fill cache blocks"
        elif _compat.draft_mixes_caches(vllm_config):
            reason = "the draft model may mix KV cache kinds"
        elif kinds - {"full"}:
            reason = f"the model mixes KV cache kinds ({', '.join(sorted(kinds))})"
        else:
            return True
        self._logits_note = f"{reason}; index logits are computed for every chunk"
        return False

    def _estimator(self) -> str:
        """The estimator, and why it is this one."""
        if self.indexer is not None:
            taus = [self.thresholds(index) for index in self.indexer.layers]
            columns, diagonals = (_interval(values) for values in zip(*taus, strict=True))
            source = "given" if self.options.checkpoint is not None else "found for this model"
            trained = f"trained indexer for {self.indexer.config.model} ({self.indexer.folder.name}, {source})"
            return f"{trained}; thresholds by layer: columns {columns}, diagonals {diagonals}"
        name = "priced" if self.lists_by_tile else "sampled"
        if self.options.estimator == name:
            return f"training-free estimator ({name}), as asked for"
        return f"training-free estimator ({name}): no trained indexer for this model was found"


def _num_layers(vllm_config: Any) -> int:
    """Layers of the model as its configuration says, or 0."""
    try:
        layers = read_setting(vllm_config.model_config.hf_text_config, "num_hidden_layers")
    except (AttributeError, ConfigError):
        return 0
    return layers if isinstance(layers, int) else 0


def gate_of(options: VSPrefillConfig, vllm_config: Any, trained: bool) -> Gate:
    """Which chunks of this rank run sparse: by the user's choice, else by what was measured.

    Args:
        options: with the platform's defaults filled in.
        vllm_config: vLLM's configuration.
        trained: whether a trained indexer chooses the keys.
    """
    min_pairs, min_rows = options.min_pairs or 0, options.min_rows
    if "min_pairs" not in options.model_fields_set:  # measured for the heads of another rank
        model = vllm_config.model_config
        min_pairs = pairs_worth_choosing(
            min_pairs, model.get_num_attention_heads(vllm_config.parallel_config), model.get_head_size()
        )
    if min_rows is None:
        min_rows = 0 if trained else platform_tuning().min_rows_sampled
    return Gate(
        min_seq_len=options.min_seq_len,
        dense_last_rows=options.dense_last_rows,
        min_pairs=min_pairs,
        min_rows=min_rows,
        enabled=options.enabled,
    )


def shares_of_heads(vllm_config: Any) -> float:
    """Over how many ranks the output of a layer is spread, as ``price`` measures errors against the heads that it sees.

    A rank of tensor parallelism has its share of a layer's squared output on average. Where ranks have the same KV head
    each, pairs of it cost each of them its share only.
    """
    model = vllm_config.model_config
    return float(model.get_total_num_kv_heads() / model.get_num_kv_heads(vllm_config.parallel_config))


def describe(options: VSPrefillConfig, by_tile: bool, tuning: PlatformTuning) -> str:
    """The options that count, in one line, with what a platform has filled in."""
    return (options.for_tiles(tuning) if by_tile else options).describe(by_tile)


def chosen_stock(options: VSPrefillConfig, covered: Container[int] | None, index: int) -> str | None:
    """Why a layer runs the stock kernel by the options, or by the layers that a checkpoint covers; None if it does
    not."""
    if not options.enabled:
        return "VSPREFILL is switched off (enabled: false)"
    if index in options.dense_layers:
        return "the layer is listed in dense_layers"
    if covered is not None and index not in covered:
        return "the indexer checkpoint does not cover the layer"
    return None


def _interval(thresholds: Iterable[Threshold]) -> str:
    values = [value for tau in thresholds for value in (tau if isinstance(tau, tuple) else (tau,))]
    return f"{min(values):g}..{max(values):g}"


def cache_kinds(layers: Iterable[Any]) -> Iterable[str]:
    """Kind of KV cache of each attention layer; vLLM manages each kind in groups of its own."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    from vllm_vsprefill.side_cache import LogitCache

    for layer in layers:
        if not isinstance(layer, AttentionLayerBase) or isinstance(layer, LogitCache):
            continue
        if not isinstance(layer, Attention):
            yield type(layer).__name__
        elif getattr(layer, "sliding_window", None) is not None:
            yield "sliding window"
        elif getattr(layer.attn_type, "value", layer.attn_type) != "decoder":
            yield str(layer.attn_type)
        elif type(layer) is not Attention:
            yield type(layer).__name__  # chunked local attention, static sinks: caches of their own kind
        else:
            yield "full"


def find_layer_name(vllm_config: Any, impl: Any) -> str | None:
    """Name of the attention layer that owns ``impl``: vLLM does not tell an implementation where it sits."""
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if getattr(layer, "impl", None) is impl:
            return str(name)
    return None
