# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Fixtures of the distillation tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distil import tiny

ROOT = Path(__file__).resolve().parents[2]
NEEDLE = ROOT / "examples" / "needle" / "model"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems are small: splitting their operators over cores gains nothing, and costs much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 on disk, with the needle model's tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    tiny.model("qwen3").save_pretrained(folder)
    AutoTokenizer.from_pretrained(NEEDLE).save_pretrained(folder)
    return folder
