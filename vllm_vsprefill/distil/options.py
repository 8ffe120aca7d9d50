# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Settings of one training run: one validated model, stored with the run so that it can be resumed exactly."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_vsprefill.distil.errors import DistilError

Inputs = Literal["kv", "k", "v", "q", "kq", "kvq"]
Loss = Literal["kl", "mse", "cosine"]
Target = Literal["mass", "peak", "mixed"]

# May differ between a run and its continuation.
FREE_ON_RESUME = frozenset({"save_every", "device", "calibrate"})


class StudentOptions(BaseModel):
    """What one indexer reads, how wide it is and what it learns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: Inputs = Field("kv", description="What the indexer reads of a token; the server computes 'kv' only.")
    hidden_size: Annotated[int, Field(ge=1, le=65536)] = Field(1024, description="Width between the two linear layers.")
    loss: Loss = Field("kl", description="Distance between the true and the predicted distribution.")
    target: Target = Field("mass", description="What a column is worth: its total, its largest probability, or both.")
    peak_power: Annotated[float, Field(gt=0, le=16)] = Field(
        1.0,
        description="Power that peaks are raised to: above 1, few columns with high peaks outweigh many with low ones.",
    )
    exclude_window: Annotated[int, Field(ge=0)] = Field(
        0, description="Diagonals below this do not count in the targets: the local window keeps them in any case."
    )


class TrainOptions(BaseModel):
    """Settings of a training run, besides the indexer's own. Lengths in tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    student: StudentOptions = StudentOptions()
    max_length: Annotated[int, Field(ge=16)] = 32768
    min_length: Annotated[int, Field(ge=16)] = 2048
    # Rows of one prefill chunk as servers cut prompts; 0 is the whole sequence.
    chunk_lengths: tuple[Annotated[int, Field(ge=0)], ...] = Field((2048, 8192, 0), min_length=1)
    chunks_per_sequence: Annotated[int, Field(ge=1)] = 4
    steps: Annotated[int, Field(ge=1)] = 1000
    accumulation: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.03
    final_share: Annotated[float, Field(ge=0, le=1)] = 0.02
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    validate_every: Annotated[int, Field(ge=1)] = 100
    validation_sequences: Annotated[int, Field(ge=1)] = 4
    density: Annotated[float, Field(gt=0, le=1)] = 0.1
    patience: Annotated[int, Field(ge=0)] = 0
    save_every: Annotated[int, Field(ge=1)] = 100
    device: str | None = None
    calibrate: bool = True

    @model_validator(mode="after")
    def _check(self) -> TrainOptions:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length ({self.min_length}) must not exceed max_length ({self.max_length})")
        return self

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


def train_options(student: dict[str, Any], **values: Any) -> TrainOptions:
    """Options from loose values.

    Raises:
        DistilError: every value that is out of range, by the name of its command-line option.
    """
    try:
        return TrainOptions.model_validate({"student": student, **values})
    except ValidationError as error:
        lines = [f"  - {problem}" for problem in option_problems(error)]
        raise DistilError("options that cannot be used:\n" + "\n".join(lines)) from None


def option_problems(error: ValidationError) -> list[str]:
    """What is wrong with some options, each by the name of its command-line option."""
    found = []
    for detail in error.errors(include_url=False):
        names = [str(part) for part in detail["loc"] if part != "student" and not isinstance(part, int)]
        given = f", found {detail['input']!r}" if names else ""
        flag = "--" + "-".join(names).replace("_", "-") + ": " if names else ""
        found.append(f"{flag}{detail['msg'].removeprefix('Value error, ')}{given}")
    return found
