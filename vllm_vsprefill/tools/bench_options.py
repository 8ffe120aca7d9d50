# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Options of ``vsprefill bench``: each is a validated field, and an option of the command line by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vllm_vsprefill.eval.options import Lengths, Paths, ServerOptions, parts

Rates = Annotated[tuple[Annotated[float, Field(gt=0, le=10_000)], ...], BeforeValidator(parts)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BenchServer(_Frozen):
    """Which server is measured, and what it is compared with."""

    url: str = Field(description="Server that runs already, such as http://127.0.0.1:8000.")
    dense_url: str | None = Field(
        None, description="Server with dense attention to compare with; by default --url itself is switched to dense."
    )
    model: str | None = Field(None, description="Name of the model at --url, if it has several.")
    server: str | None = Field(
        None, description="Process id, or name by vsprefill status, of the server at --url where several run here."
    )
    tokenizer: str | None = Field(None, description="Folder or id; by default what the server has its model from.")

    def for_targets(self) -> ServerOptions:
        """As evaluations name them."""
        return ServerOptions(**self.model_dump())


class BenchCommand(_Frozen):
    """Options of ``vsprefill bench``."""

    out: Path = Field(description="Folder for figures, table and plot; the same command goes on where it stopped.")
    mode: Literal["both", "dense", "sparse"] = Field("both", description="What prefill to measure.")
    lengths: Lengths = Field(
        (4096, 16384, 32768), min_length=1, description="Tokens of a prompt and its answer: 4k,16k or 4k..32k."
    )
    samples: int = Field(6, ge=0, description="Prompts of each length in the closed loop; 0 leaves it out.")
    concurrency: int = Field(1, ge=1, le=256, description="Requests at a time in the closed loop.")
    rate: Rates = Field((), description="Open loop: requests a second, such as 0.5,1,2; by default there is none.")
    seconds: float = Field(60, gt=0, description="Open loop: for how long requests arrive, at each rate.")
    prefix_share: float = Field(0.5, ge=0, le=1, description="Open loop: share of requests that go on from a document.")
    ttft_limit: float | None = Field(None, gt=0, description="Seconds: requests with a later first token are counted.")
    output_tokens: int = Field(16, ge=1, description="Tokens of every answer.")
    data: Paths = Field(
        (), description="Text files and folders of the prompts; by default the source of Python's standard library."
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Of prompts and arrivals.")
    note: str | None = Field(None, description="Kept in the report, such as hardware and commit.")
    server: BenchServer = Field(description="Servers")

    @model_validator(mode="after")
    def _check(self) -> BenchCommand:
        if not self.samples and not self.rate:
            raise ValueError("nothing to measure: give --samples or --rate")
        if self.mode == "sparse" and self.server.dense_url is not None:
            raise ValueError("--dense-url is not asked with --mode sparse")
        if min(self.lengths) < self.output_tokens + 48:
            raise ValueError(f"--lengths: {min(self.lengths)} tokens leave no prompt beside --output-tokens")
        return self
