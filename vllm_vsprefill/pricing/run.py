# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What ``vsprefill calibrate`` does without an indexer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_vsprefill.backends.cuda_limits import block_problems, head_reasons
from vllm_vsprefill.checkpoint import find_checkpoints
from vllm_vsprefill.config import ConfigError, VSPrefillConfig
from vllm_vsprefill.distil import calibrate as calibration
from vllm_vsprefill.distil import prepare
from vllm_vsprefill.distil.data import PackedTokens
from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.model import Layers, check, load_model, read_config, text_config
from vllm_vsprefill.distil.options import CalibrateCommand, ModelOptions
from vllm_vsprefill.distil.rehearsal import rehearse
from vllm_vsprefill.distil.runs import fits
from vllm_vsprefill.fingerprint import ModelFingerprint
from vllm_vsprefill.identity import model_name, read_identity
from vllm_vsprefill.plan import MIN_ROWS
from vllm_vsprefill.prefill.layer import Heads
from vllm_vsprefill.pricing.comparison import Comparison, enough_memory
from vllm_vsprefill.pricing.passes import Passes
from vllm_vsprefill.pricing.report import HEAD, Report, line_of
from vllm_vsprefill.pricing.search import STEPS, Goal, Measured, search
from vllm_vsprefill.pricing.tiles import ContiguousTiles, PagedTiles, Served, Tiles
from vllm_vsprefill.tuning import PlatformTuning

SEQUENCES = 2
"""That a price is looked for on by default."""

DENSE_FIRST = 4096


def goal_of(command: CalibrateCommand) -> Goal:
    """The goal of a command that has one."""
    if command.price.top1 is not None:
        return Goal("top1", command.price.top1)
    if command.price.error is not None:
        return Goal("error", command.price.error)
    assert command.goal.density is not None
    return Goal("density", command.goal.density)


def options_of(given: dict[str, Any], tuning: PlatformTuning, layers: Layers) -> VSPrefillConfig:
    """Options of a server that is to be given a price, with what its platform fills in.

    Raises:
        DistilError: options that are none, or under which a price says nothing.
    """
    odd = [name for name in ("price", "checkpoint") if name in given]
    if odd:
        raise DistilError(f"--options: {' and '.join(odd)} cannot be given where a price is looked for")
    try:
        options = VSPrefillConfig.from_sources(given)
        options.check_layers(len(layers.covered) + len(layers.skipped))
    except ConfigError as error:
        raise DistilError(f"--options: {error}") from None
    if not options.enabled or options.estimator not in ("auto", "priced"):
        what = "enabled is false" if not options.enabled else f"estimator is {options.estimator!r}"
        raise DistilError(f"--options: {what}; only the estimator 'priced' has a price")
    if set(layers.covered) <= set(options.dense_layers):
        raise DistilError("--options: dense_layers leaves no layer that could run sparse")
    return options.resolved(tuning).for_estimator(False, tuning)


def calibrate(command: CalibrateCommand, say: Callable[[str], None]) -> None:
    """Look for the price that reaches a goal.

    Args:
        command: options, without a checkpoint.
        say: takes a line for the user.

    Raises:
        DistilError: nothing can be measured.
        KeyboardInterrupt: stopped; what was measured was said and written.
    """
    goal, out = goal_of(command), command.price.out
    place = prepare.device(command.model.device)
    tuning = calibration.platform_tuning(
        place if command.goal.platform is None else torch.device(command.goal.platform)
    )
    config = read_config(command.model)
    fingerprint, layers = check(config)
    options = options_of(command.price.options, tuning, layers)
    heads = heads_of(fingerprint, options, place)
    if out is not None:
        check_out(out)
    rehearse(config, fingerprint, layers, command.model.trust_remote_code, "no price can be found")
    fits(config, "--length", command.goal.length)
    sequences, described = _sequences(command, text_config(config).vocab_size, say)
    longest = max(map(len, sequences))
    dense_first = command.price.dense_first or min(DENSE_FIRST, longest // 4)
    served = Served(options, tuning, heads, layers.covered, longest)
    chunks = [command.goal.chunk_lengths[i % len(command.goal.chunk_lengths)] for i in range(len(sequences))]
    _check_rows(served, sequences, chunks, dense_first)
    say(layers.describe("can run sparse"))
    if longest < options.min_seq_len:
        say(f"note: a server runs texts of this length dense: min_seq_len is {options.min_seq_len:,}")

    model = load_model(command.model, config, place, head=True).eval().requires_grad_(False)
    passes = Passes(model, longest, layers.covered)
    tiles: Tiles = ContiguousTiles(served)
    if place.type == "cuda":
        most, dtype = max(chunk or longest for chunk in chunks), next(model.parameters()).dtype
        with enough_memory(place, longest):
            tiles = PagedTiles(served, most, dtype, place)
    from tqdm import tqdm

    with tqdm(unit="token", unit_scale=True, disable=None) as bar:
        texts = Comparison(passes, [x.to(place) for x in sequences], chunks, dense_first, bar.update)
        bar.total = texts.rows * (2 + STEPS)
        facts = {
            "model": model_name(command.model.model),
            "data": described,
            "device": str(place),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "tokens": [len(x) for x in sequences],
            "chunks": chunks,
            "dense_first": dense_first,
            "served": served.facts(),
        }
        report = Report(goal, facts, texts.rows, _to_serve(command, fingerprint, say))
        what = "sequence" if len(sequences) == 1 else "sequences"
        cut = " and ".join(f"{chunk:,}" if chunk else "all rows" for chunk in dict.fromkeys(chunks))
        say(
            f"{len(sequences)} {what} of {longest:,} tokens in chunks of {cut}; {texts.rows:,} rows behind the first "
            f"{dense_first:,} of each are compared with dense attention"
        )

        def measure(price: float) -> Measured:
            bar.set_description(f"price {price:g}")
            # The floor is what the kernels make of everything; a server that leaves it to the stock kernel has none.
            found = texts.measure(tiles, price, options.max_density if price else 1.0)
            if price:
                report.found.append(found)
            else:
                report.floor = found
            if out is not None:
                report.write(out)
            with tqdm.external_write_mode():
                cells = zip(HEAD, line_of(found, report.floor or found), strict=True)
                say(", ".join(f"{name} {cell}" for name, cell in cells if cell))
            return found

        try:
            bar.set_description("dense")
            texts.dense()
            search(goal, measure(0.0), measure)
            report.complete = True
        finally:
            bar.close()
            if report.floor is not None:
                if out is not None:
                    report.write(out)
                for line in report.lines():
                    say(line)


def check_out(out: Path) -> None:
    """DistilError if a file cannot be written: found out before anything heavy."""
    if out.is_dir() or not out.parent.is_dir():
        raise DistilError(f"--out {out}: expected a file in a folder that is there")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise DistilError(f"--out {out}: cannot be written ({error.strerror})") from None


def heads_of(fingerprint: ModelFingerprint, options: VSPrefillConfig, place: torch.device) -> Heads:
    """Heads of a layer.

    Raises:
        DistilError: the kernels for this device do not take them, or the options' tiles.
    """
    heads = Heads(fingerprint.num_query_heads, fingerprint.num_kv_heads, fingerprint.head_size)
    if place.type == "cuda":
        found = head_reasons(heads.head_size, heads.num_heads, heads.num_kv_heads)
        wrong = [reason for reason, holds in found.items() if holds] + block_problems(options)
        if wrong:
            raise DistilError(f"the layers of this model run stock on CUDA: {'; '.join(wrong)}")
    return heads


def _sequences(
    command: CalibrateCommand, vocabulary: int, say: Callable[[str], None]
) -> tuple[list[torch.Tensor], str]:
    """Sequences of tokens, and what they are of."""
    goal = command.goal
    count, length = goal.sequences or SEQUENCES, max(goal.length, 16)
    _, source, longest = prepare.sources(
        command.data,
        command.model,
        vocabulary,
        tokens=2 * count * length,
        min_length=min(length, calibration.MIN_SEQ_LEN),
        max_length=length,
        seed=goal.seed,
        log=say,
    )
    if isinstance(source, PackedTokens) and count > (enough := max(len(source.tokens) // longest, 1)):
        say(f"the text suffices for {enough} of {count} sequences")
        count = enough
    position, sequences = 0, []
    for _ in range(count):
        sequences.append(torch.from_numpy(source.sequence(position, longest)))
        position = source.after(position, longest)
    return sequences, source.description


def _check_rows(served: Served, sequences: list[torch.Tensor], chunks: list[int], dense_first: int) -> None:
    """DistilError if the chunks of a sequence would all run dense."""
    gate = served.gate()
    for tokens, chunk in zip(sequences, chunks, strict=True):
        left = len(tokens) - dense_first
        rows = min(chunk or left, left)
        if not gate.admits(rows, len(tokens), True):
            least = gate.dense_last_rows + MIN_ROWS
            raise DistilError(
                f"chunks of {max(rows, 0):,} rows (--chunk-lengths), of sequences of {len(tokens):,} tokens (--length) "
                f"behind {dense_first:,} dense ones (--dense-first), all run dense: at least "
                f"{max(gate.min_rows, least):,} rows are needed"
            )


def _to_serve(command: CalibrateCommand, fingerprint: ModelFingerprint, say: Callable[[str], None]) -> dict[str, Any]:
    """What a server is to be given beside the price."""
    given = dict(command.price.options)
    if given.get("estimator", "auto") == "auto" and _finds_indexer(command.model, fingerprint):
        say("note: an indexer is installed for this model; a server takes the price with estimator 'priced' only")
        given["estimator"] = "priced"
    return given


def _finds_indexer(model: ModelOptions, fingerprint: ModelFingerprint) -> bool:
    """Whether a server would choose keys by an installed indexer."""
    identity = read_identity(model.model, fingerprint.num_layers, revision=model.revision)
    return any(config.identity.relation(identity) != "other" for _, config in find_checkpoints(fingerprint))
