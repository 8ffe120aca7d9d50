# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Options of training and calibration: each is a validated field, and an option of the command line by its name.

Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vllm_vsprefill.command_line import JsonObject, flag, option_problems
from vllm_vsprefill.distil.errors import DistilError

Loss = Literal["kl", "mse", "cosine"]
Target = Literal["mass", "peak", "mixed"]
Metric = Literal["mass", "strong"]

# May differ between a run and its continuation.
FREE_ON_RESUME = frozenset({"save_every", "calibrate"})


def _letters(value: Any) -> Any:
    return value.replace("+", "").replace(",", "").lower() if isinstance(value, str) else value


def _numbers(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return tuple(int(part) for part in value.replace(" ", "").split(","))
    except ValueError:
        raise ValueError(f"expected whole numbers with commas between them, found {value!r}") from None


# "k+v" and "kv" are the same.
Inputs = Annotated[Literal["kv", "k", "v", "q", "kq", "kvq"], BeforeValidator(_letters)]
Chunks = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_numbers), Field(min_length=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StudentOptions(_Frozen):
    """What one indexer reads, how wide it is and what it learns."""

    inputs: Inputs = Field(
        "kv", description="What the indexer reads of a token: kv, or k, v, q, kq, kvq to compare (not servable)."
    )
    hidden_size: int = Field(1024, ge=1, le=65536, description="Width of the indexer, between its two linear layers.")
    loss: Loss = Field("kl", description="Distance between the true and the predicted distribution.")
    target: Target = Field(
        "mass", description="Worth of a column: mass (its total), peak (its largest probability) or mixed."
    )
    peak_power: float = Field(
        1.0,
        gt=0,
        le=16,
        description="Power that peaks are raised to: above 1, few columns with high peaks outweigh many with low ones.",
    )
    exclude_window: int = Field(
        0,
        ge=0,
        description="Diagonals below this do not count in the targets: the local window keeps them in any case.",
    )


class TrainOptions(_Frozen):
    """Settings of a training run, stored with it so that it can be resumed exactly. Lengths in tokens."""

    student: StudentOptions = Field(StudentOptions(), description="Indexer")
    max_length: int = Field(32768, ge=16, description="Longest sequence, in tokens.")
    min_length: int = Field(
        default_factory=lambda earlier: min(2048, earlier["max_length"]),
        ge=16,
        description="Shortest sequence; lengths are the longest and its halves. By default 2048.",
    )
    chunk_lengths: Chunks = Field(
        (2048, 8192, 0), description="Prefill chunks that targets are made for, in tokens; 0 is the whole sequence."
    )
    chunks_per_sequence: int = Field(4, ge=1, description="Chunks of each sequence that are learnt from.")
    steps: int = Field(1000, ge=1, description="Optimiser steps.")
    accumulation: int = Field(1, ge=1, description="Sequences per step and process.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak of the cosine schedule.")
    warmup_share: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    final_share: float = Field(0.02, ge=0, le=1, description="Share of the peak that the rate falls to.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's.")
    seed: int = Field(0, ge=0, description="Of weights, order of documents, lengths and chunks.")
    compute_dtype: Literal["bfloat16", "float32"] | None = Field(
        None, description="Of the indexer's products; by default bfloat16 on CUDA, float32 elsewhere."
    )
    validate_every: int = Field(100, ge=1, description="Steps between validations.")
    validation_sequences: int = Field(4, ge=1, description="Sequences of a validation.")
    density: float = Field(0.1, gt=0, le=1, description="Density at which validation reports recall.")
    patience: int = Field(0, ge=0, description="Stop after this many validations without a better one; 0: never.")
    save_every: int = Field(100, ge=1, description="Steps between states that --resume can go on from.")
    calibrate: bool = Field(True, description="Calibrate the presets' thresholds at the end.")

    @model_validator(mode="after")
    def _check(self) -> TrainOptions:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length ({self.min_length}) must not exceed max_length ({self.max_length})")
        return self

    def on(self, device: str) -> TrainOptions:
        """These options with what depends on the type of the device, ``cuda`` or another one."""
        dtype = self.compute_dtype or ("bfloat16" if device == "cuda" else "float32")
        return self.model_copy(update={"compute_dtype": dtype})

    def shortened(self, length: int) -> TrainOptions:
        """These options with sequences of at most ``length`` tokens."""
        longest = min(self.max_length, length)
        return self.model_copy(update={"max_length": longest, "min_length": min(self.min_length, longest)})

    def lengths(self) -> list[int]:
        """Sequence lengths that are drawn: the longest and its halves down to the shortest."""
        out = [self.max_length]
        while out[-1] // 2 >= self.min_length:
            out.append(out[-1] // 2)
        return out

    def differences(self, other: TrainOptions) -> list[str]:
        """Settings in which a continuation would not be the same run."""
        mine, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        return [
            f"{name}: {theirs[name]!r} in the run so far, {mine[name]!r} now"
            for name in mine
            if name not in FREE_ON_RESUME and mine[name] != theirs[name]
        ]


class ModelOptions(_Frozen):
    """Which model, and how it is loaded."""

    model: str = Field(description="The model that the indexer is for: Hugging Face id or folder.")
    revision: str | None = Field(None, description="Branch, tag or commit of the id, of its tokenizer too.")
    hf_overrides: JsonObject = Field(
        {}, description="Settings that replace those of the model's config.json, as for vllm serve."
    )
    trust_remote_code: bool = Field(False, description="Run code that lies with the model or its tokenizer.")
    tokenizer: str | None = Field(None, description="Tokenizer, if not the model's.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="Of the model's weights.")
    device: str | None = Field(None, description="cuda, cuda:N or cpu; by default what there is.")


class DataOptions(_Frozen):
    """Where text comes from and how it is read."""

    data: str = Field(
        description="Text, .jsonl or .parquet file, folder of such files, id of a Hugging Face dataset, or 'synthetic' "
        "for generated long documents."
    )
    text_field: str = Field("text", description="Column or key that holds the text.")
    split: str = Field("train", description="Split of a dataset.")
    subset: str | None = Field(None, description="Configuration of a dataset.")


class Packing(_Frozen):
    """How text becomes sequences to train with."""

    packing: bool = Field(True, description="Cut sequences from documents laid end to end.")
    validation_share: float = Field(0.02, gt=0, lt=1, description="Share of the text that is held out.")


class TrainCommand(_Frozen):
    """Options of ``vsprefill train``."""

    out: Path = Field(description="Folder for the checkpoint, the run's state, logs and report.")
    resume: bool = Field(False, description="Go on with the run in --out, exactly.")
    dry_run: bool = Field(False, description="Print parameters, memory and time, and stop.")
    model: ModelOptions = Field(description="Model")
    data: DataOptions = Field(description="Data")
    packing: Packing = Field(Packing(), description="Sequences")
    run: TrainOptions = Field(TrainOptions(), description="Training")


class CalibrateOptions(_Frozen):
    """What is to be reached, and what that is measured on. Lengths in tokens."""

    density: float | None = Field(None, gt=0, le=1, description="Share of the causal entries that are kept.")
    length: int = Field(32768, ge=1, description="Tokens of a sequence.")
    sequences: int | None = Field(None, ge=1, description="Sequences; by default 8, for a price 2.")
    chunk_lengths: Chunks = Field((2048, 8192), description="Prefill chunks, in tokens, in turns; 0: whole.")
    seed: int = Field(0, ge=0, description="Of the order of texts, and of the sampled rows.")
    platform: Literal["cuda", "cpu"] | None = Field(
        None, description="Where it will be served: tile sizes differ; by default the device it runs on."
    )


class ThresholdOptions(_Frozen):
    """What the thresholds of an indexer are to reach."""

    recall: float | None = Field(None, gt=0, le=1, description="Share of the true attention that every layer reaches.")
    preset: Literal["accurate", "balanced", "fast"] | None = Field(
        None, description="Preset to set; all with their default recalls if neither a recall nor a density is given."
    )
    per_head: bool = Field(False, description="Thresholds for each KV head.")
    metric: Metric = Field(
        "mass", description="What recall counts: mass, or strong (entries weigh as much as their probability)."
    )
    rows: int = Field(32, ge=1, description="Rows sampled of each chunk.")


class PriceOptions(_Frozen):
    """What a price is to reach."""

    top1: float | None = Field(
        None, gt=0, le=100, description="Points of top-1 agreement with dense attention below the floor, at most."
    )
    error: float | None = Field(
        None,
        gt=0,
        description="Mean KL divergence of the next token from dense attention's, in nats above the floor's, at most.",
    )
    dense_first: int | None = Field(
        None,
        ge=1,
        description="First rows of a sequence, which run dense and are not compared; by default 4096, and a quarter of "
        "the sequence at most.",
    )
    options: JsonObject = Field({}, description="Other options of VSPREFILL to serve with, such as window.")
    out: Path | None = Field(None, description="File for all figures, as JSON.")


class CalibrateCommand(_Frozen):
    """Options of ``vsprefill calibrate``."""

    checkpoint: Path | None = Field(
        None, description="Folder of an indexer, whose thresholds are replaced. Without one a price is looked for."
    )
    model: ModelOptions = Field(description="Model")
    data: DataOptions = Field(description="Data")
    goal: CalibrateOptions = Field(CalibrateOptions(), description="Goal")
    thresholds: ThresholdOptions = Field(ThresholdOptions(), description="With --checkpoint: thresholds")
    price: PriceOptions = Field(PriceOptions(), description="Without --checkpoint: a price")

    @model_validator(mode="after")
    def _check(self) -> CalibrateCommand:
        if problem := self._price_problem() if self.checkpoint is None else self._threshold_problem():
            raise ValueError(problem)
        return self

    def _threshold_problem(self) -> str | None:
        density, recall = self.goal.density, self.thresholds.recall
        if odd := self.price.model_fields_set:
            return (
                f"{_flags(odd)} of a price, which is looked for without --checkpoint; the goals of an indexer's "
                "thresholds are --recall and --density"
            )
        if recall is not None and density is not None:
            return "give either --recall or --density, not both"
        if (recall is not None or density is not None) and self.thresholds.preset is None:
            return "with --recall or --density say which preset it is for: --preset accurate, balanced or fast"
        return None

    def _price_problem(self) -> str | None:
        if odd := self.thresholds.model_fields_set:
            return (
                f"{_flags(odd)} of an indexer's thresholds: give the indexer with --checkpoint. The goals of a price, "
                "which is looked for without one, are --top1, --error and --density"
            )
        goals = [goal for goal in (self.price.top1, self.price.error, self.goal.density) if goal is not None]
        if len(goals) != 1:
            return (
                "say what a price is to reach, by one of --top1 POINTS, --error KL and --density SHARE; for the "
                "thresholds of an indexer give --checkpoint"
            )
        return None


def _flags(names: Iterable[str]) -> str:
    """Options as the subject of a sentence."""
    found = [flag(name) for name in sorted(names)]
    return f"{', '.join(found)} {'is an option' if len(found) == 1 else 'are options'}"


def train_options(student: dict[str, Any], **values: Any) -> TrainOptions:
    """Options from loose values.

    Raises:
        DistilError: every value that is out of range, by the name of its command-line option.
    """
    try:
        return TrainOptions.model_validate({"student": student, **values})
    except ValidationError as error:
        lines = [f"  - {problem}" for problem in option_problems(TrainOptions, error)]
        raise DistilError("options that cannot be used:\n" + "\n".join(lines)) from None
