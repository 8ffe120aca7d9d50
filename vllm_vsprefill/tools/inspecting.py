# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A run of ``vsprefill inspect``: model, text, the layers one after the other, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vllm_vsprefill import startup
from vllm_vsprefill.checkpoint import LoadedIndexer, load_checkpoint
from vllm_vsprefill.config import VSPrefillConfig
from vllm_vsprefill.distil import model as models
from vllm_vsprefill.distil import prepare
from vllm_vsprefill.distil.calibrate import platform_tuning
from vllm_vsprefill.distil.capture import LayerCall
from vllm_vsprefill.kernels.types import Budgets, SparsePattern
from vllm_vsprefill.plan import MIN_ROWS
from vllm_vsprefill.prefill.cpu import CPUPrefill
from vllm_vsprefill.prefill.cpu_tiles import CPUTilePrefill
from vllm_vsprefill.prefill.layer import Heads
from vllm_vsprefill.prefill.tiles import tiling_of
from vllm_vsprefill.runtime import describe
from vllm_vsprefill.thresholds import thresholds
from vllm_vsprefill.tools import pages
from vllm_vsprefill.tools.errors import ToolError
from vllm_vsprefill.tools.inspection import LayerReport, inspect_layer, inspect_tiles
from vllm_vsprefill.tools.options import InspectCommand
from vllm_vsprefill.tuning import PlatformTuning

CHARACTERS = 16
"""Of a token at most, when a text is cut before it is tokenised."""


def run(command: InspectCommand, say: Callable[[str], None]) -> None:
    """Inspect a text and write ``inspect.html``, ``inspect.json`` and a picture for each layer.

    Raises:
        ToolError: a text that is too short, layers that are not there, a folder that cannot be written.
        DistilError, CheckpointError, ConfigError: a model, an indexer or options that cannot be used.
    """
    place = prepare.device(command.model.device)
    options = VSPrefillConfig.from_sources(command.options).resolved(platform_tuning(place))
    try:
        command.out.mkdir(parents=True, exist_ok=True)
        text = command.text.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ToolError(f"{error.filename}: {error.strerror}") from None
    config = models.read_config(command.model)
    _, layers = models.check(config)
    wanted = tuple(sorted(set(command.layers))) or layers.covered
    if absent := [layer for layer in wanted if layer not in layers.covered]:
        raise ToolError(f"--layers: {absent} cannot run sparse; those that can are {list(layers.covered)}")
    tokenizer = models.load_tokenizer(command.model)
    ids, tokens = tokenised(tokenizer, text[: CHARACTERS * command.max_tokens], command.max_tokens)
    shortest = options.dense_last_rows + MIN_ROWS
    if len(ids) < shortest:
        raise ToolError(f"--text {command.text}: {len(ids)} tokens, expected at least {shortest}; give a longer text")

    served = SimpleNamespace(model=command.model.model, hf_config=config, hf_text_config=models.text_config(config))
    located = startup.locate_checkpoint(options, SimpleNamespace(model_config=served))
    indexer = None if located.folder is None else load_checkpoint(located.folder, expected=located.model)
    tuning = platform_tuning(place)
    options = options.for_estimator(indexer is not None, tuning)
    by_tile = options.lists_by_tile(indexer is not None)
    kind = "priced" if by_tile else "sampled"
    estimator = f"training-free ({kind})" if indexer is None else f"trained indexer {indexer.name}"
    say(f"{len(ids):,} tokens, {len(wanted)} layers, {estimator}")
    teacher = models.load(command.model, place)
    reports = _layers(teacher, ids, wanted, options, indexer, tuning)

    rows = len(ids) - options.dense_last_rows
    pictures = [pages.picture(command.out / f"layer_{one.index:03d}.png", one, rows) for one in reports]
    facts = [
        ("model", teacher.name),
        ("text", f"{command.text.name}, {len(ids):,} tokens, as one chunk"),
        ("estimator", estimator),
        ("options", describe(options, by_tile, tuning)),
        ("mean recall", f"{_mean(reports, 'recall'):.1%}"),
        ("mean density", f"{_mean(reports, 'density'):.1%}"),
        ("mean error", f"{_mean(reports, 'error'):.1%}"),
    ]
    notes = [located.note] if located.note else []
    if len(ids) < options.min_seq_len:
        notes.append(f"A server runs a text of this length dense: min_seq_len is {options.min_seq_len:,}.")
    if dense := [layer for layer in wanted if layer in options.dense_layers]:
        notes.append(f"A server runs the layers {dense} dense: dense_layers.")
    if missing := [layer for layer in wanted if indexer is not None and layer not in indexer.layers]:
        notes.append(f"The indexer does not cover the layers {missing}; a server runs them dense, they are not shown.")
    (command.out / "inspect.html").write_text(pages.page(facts, notes, reports, pictures, tokens), encoding="utf-8")
    (command.out / "inspect.json").write_text(json.dumps(_figures(facts, notes, reports), indent=1), encoding="utf-8")
    for name, value in facts[4:]:
        say(f"{name}: {value}")
    for note in notes:
        say(f"note: {note}")
    say(f"written to {command.out / 'inspect.html'}")


def tokenised(tokenizer: Any, text: str, limit: int) -> tuple[list[int], list[str]]:
    """Ids of the first tokens of a text, and the piece of text that each stands for, spaces before it included; what
    the tokenizer puts in front has a name of its own."""
    if not getattr(tokenizer, "is_fast", False):  # it does not say where its tokens are
        ids = list(tokenizer(text)["input_ids"])[:limit]
        return ids, [tokenizer.decode([one]) for one in ids]
    found = tokenizer(text, return_offsets_mapping=True)
    ids, pieces, done = list(found["input_ids"])[:limit], [], 0
    for one, (start, end) in zip(ids, found["offset_mapping"], strict=False):
        pieces.append(tokenizer.decode([one]) if start == end else text[done : max(end, done)])
        done = max(end, done)
    return ids, pieces


def _layers(
    teacher: models.Teacher,
    ids: list[int],
    wanted: tuple[int, ...],
    options: VSPrefillConfig,
    indexer: LoadedIndexer | None,
    tuning: PlatformTuning,
) -> list[LayerReport]:
    from tqdm import tqdm

    pattern = options.pattern()
    # The chunk's dense last rows are cut off before, as a server does.
    pattern = SparsePattern(pattern.block_q, pattern.block_k, pattern.window, pattern.sinks, 0)
    prefill = CPUPrefill(
        pattern,
        Budgets(options.min_columns, options.max_columns, options.min_diagonals, options.max_diagonals),
        sampled_rows=options.sampled_rows,
        max_density=options.max_density,
    )
    reports: list[LayerReport] = []
    with tqdm(total=len(wanted), unit="layer", disable=None) as bar:

        def layer(call: LayerCall) -> None:
            if call.layer not in wanted or (indexer is not None and call.layer not in indexer.layers):
                return
            if options.lists_by_tile(indexer is not None):
                reports.append(inspect_tiles(call, tile_prefill(call, options, tuning), options.dense_last_rows))
                bar.update()
                return
            tau = torch.empty(2, call.k.shape[1], dtype=torch.float64)
            for row, value in zip(tau, thresholds(options, indexer, call.layer), strict=True):
                row.copy_(torch.as_tensor(value, dtype=torch.float64))
            weights = None if indexer is None else indexer.layer_weights(call.layer)
            reports.append(inspect_layer(call, prefill, weights, tau, options.dense_last_rows))
            bar.update()

        whole: Tensor = torch.tensor(ids, dtype=torch.int64)
        teacher.run(whole, layer)
    if not reports:
        raise ToolError("no layer to look at: the indexer covers none of those asked for")
    return reports


def tile_prefill(call: LayerCall, options: VSPrefillConfig, tuning: PlatformTuning) -> CPUTilePrefill:
    """The prefill of a layer with a list for every tile, cut as a server on this platform cuts a text of this length.

    Args:
        call: the layer's queries, keys and values.
        options: with the platform's defaults filled in.
        tuning: the platform's.
    """
    rows, heads, size = call.q.shape
    tiling = tiling_of(options, tuning, Heads(heads, call.k.shape[1], size), rows)
    pattern = tiling.of(rows - options.dense_last_rows)
    return CPUTilePrefill(pattern, options.price, priced_rows=options.sampled_rows, max_density=options.max_density)


def _mean(reports: list[LayerReport], name: str) -> float:
    values = [float(getattr(head, name)) for report in reports for head in report.heads]
    return sum(values) / len(values)


def _figures(facts: list[tuple[str, str]], notes: list[str], reports: list[LayerReport]) -> dict[str, object]:
    heads = [
        {
            "layer": report.index,
            "kv_head": number,
            "recall": head.recall,
            "density": head.density,
            "error": head.error,
            "handed_back": report.handed_back,
            **(
                {"columns": head.columns.tolist(), "diagonals": head.diagonals.tolist()}
                if head.tile_keys is None
                else {"tile_keys": head.tile_keys}
            ),
        }
        for report in reports
        for number, head in enumerate(report.heads)
    ]
    return {"facts": dict(facts), "notes": notes, "heads": heads}
