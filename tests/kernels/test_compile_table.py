# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The settings of the table against the shared memory of the devices they are for; needs no GPU."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from tests.kernels.interpreted import REASON, USABLE
from tests.kernels.programs import run_compiler
from vllm_vsprefill.kernels import settings as settings_module
from vllm_vsprefill.kernels.settings import TABLE, settings

OPERATIONS = ("attend", "attend_tiles", "score", "sampled", "price", "mass")


@pytest.mark.slow
def test_kernels_fit_into_shared_memory() -> None:
    done = run_compiler("compile_table", OMP_NUM_THREADS="1")
    assert done.stdout, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["misfits"] == []
    assert done.returncode == 0, done.stderr[-3000:]
    assert told["compiled"] > 0


@pytest.mark.parametrize(("have", "row"), [(80, 80), (86, 86), (89, 86), (90, 90), (100, 90), (103, 90), (120, 120)])
def test_row_of_a_device(have: int, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices with less shared memory than their number suggests have rows of their own."""
    monkeypatch.setattr(settings_module, "capability", lambda _: have)
    device = torch.device("cpu")
    for operation, size in itertools.product(OPERATIONS, (64, 128, 256)):
        # With tensor memory `price` takes smaller tiles, too.
        own = 100 if row == 90 and have >= 100 and operation == "price" else row
        assert settings(operation, size, device) == TABLE[own, operation, size]


@pytest.mark.skipif(not USABLE, reason=REASON)
def test_few_hidden_units_take_small_tiles() -> None:
    from vllm_vsprefill.kernels.paged import PagedKV
    from vllm_vsprefill.kernels.score.paged import prepare_weights
    from vllm_vsprefill.kernels.score.triton import table_settings
    from vllm_vsprefill.kernels.types import IndexerLayerWeights

    kv = PagedKV(torch.zeros(1, 1, 16, 256, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int32))
    table = settings("score", 128, kv.cache.device)
    for hidden in (16, 2 * table.block_n, 2 * table.block_n + 16, 1024):
        weights = IndexerLayerWeights(
            torch.zeros(1, 256, hidden), torch.zeros(1, hidden), torch.zeros(1, hidden, 2), torch.zeros(1, 2)
        )
        found = table_settings(kv, prepare_weights(weights, torch.bfloat16))
        few = hidden <= 2 * table.block_n
        assert found.block_m == (min(table.block_m, 64) if few else table.block_m)
        assert found.num_stages == (1 if few else table.num_stages)
