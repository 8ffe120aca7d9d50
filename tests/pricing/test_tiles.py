# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A chunk at a price is what the backend computes of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.prefill.operations import TILE_REFERENCE
from vllm_vsprefill.config import VSPrefillConfig
from vllm_vsprefill.prefill.cpu_tiles import REFERENCE, CPUTilePrefill
from vllm_vsprefill.prefill.layer import Heads, SparseLayer
from vllm_vsprefill.prefill.tiles import tiling_of
from vllm_vsprefill.pricing.passes import LayerRows, dense
from vllm_vsprefill.pricing.tiles import ContiguousTiles, PagedTiles, Priced, Served, Tiles
from vllm_vsprefill.tuning import CPU, PlatformTuning, cuda_tuning

HEADS, SCALE, N, ROWS = Heads(6, 2, 16), 0.5, 430, 200
CUDA = cuda_tuning((9, 0))
SMALL = {"window": 24, "sinks": 6, "sampled_rows": 16, "min_rows": 0, "max_density": 1}
LAYER = SparseLayer(0, 0, HEADS, None, torch.zeros(2, 2, dtype=torch.float64))


def served(tuning: PlatformTuning, **options: Any) -> Served:
    made = VSPrefillConfig.from_sources(SMALL | options).resolved(tuning).for_estimator(False, tuning)
    return Served(made, tuning, HEADS, (1, 3), N)


def layer_rows(layer: int = 1) -> LayerRows:
    rng = torch.Generator().manual_seed(3)
    room = torch.full((2, 432, 32), float("nan"))
    room[:, :N] = torch.randn(2, N, 32, generator=rng)
    return LayerRows(layer, 1.5 * torch.randn(6, ROWS, 16, generator=rng), room, N, SCALE)


def made(kind: str, **options: Any) -> Tiles:
    if kind == "cpu":
        return ContiguousTiles(served(CPU, **options))
    tiles = PagedTiles(served(CUDA, **options), N, torch.float32, torch.device("cpu"), TILE_REFERENCE)
    # The first layer's arguments are checked, for a GPU among other things; this is the last one of one.
    tiles.layer = dataclasses.replace(tiles.layer, place=-1)
    return tiles


def backend(tiles: Tiles, rows: LayerRows, price: float) -> tuple[Tensor, float]:
    """As the layer of the CPU backend asks for it, by the references: the whole chunk, whose last rows are dense.

    Returns the sparse rows ``[Hq, T, D]``, and pairs over all KV heads.
    """
    options = tiles.served.options
    pattern = tiling_of(options, tiles.served.tuning, HEADS, N).of(N - options.dense_last_rows)
    prefill = CPUTilePrefill(pattern, price, priced_rows=16, operations=REFERENCE)
    query, key, value = (x.transpose(0, 1) for x in (rows.q, rows.k, rows.v))
    sparse = ROWS - options.dense_last_rows
    chosen = prefill.choose(LAYER, query, key, value, sparse, scale=SCALE)
    assert chosen is not None
    out, visited = prefill.attend(query, key, value, chosen, sparse, scale=SCALE)
    return out.transpose(0, 1), visited


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("price", [0.0, 1.0, 100.0])
def test_a_chunk_is_that_of_the_backend(kind: str, price: float) -> None:
    tiles, rows = made(kind, dense_last_rows=40), layer_rows()
    expected, visited = backend(tiles, rows, price)
    attend = Priced(tiles, price, 1.0)
    out = attend(rows)
    torch.testing.assert_close(out[:, :160], expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out[:, 160:], dense(rows.q, rows.k, rows.v, SCALE)[:, 160:], atol=2e-5, rtol=1e-4)
    causal = sum(range(N - ROWS + 1, N + 1))
    assert attend.causal == causal
    assert attend.computed == pytest.approx(visited / 2 + sum(range(N - 40 + 1, N + 1)))
    assert (attend.density == 1.0) == (price == 0.0)
    if price == 100.0:
        assert attend.density < 0.5


def test_tiles_are_those_of_the_platform() -> None:
    assert made("cpu").tiling.of(N).block_q == 64
    assert made("cuda").tiling.of(N).block_q == 42  # three heads of a group fill a program
    fixed = made("cuda", block_q=32, block_k=8).tiling.of(N)
    assert (fixed.block_q, fixed.block_k, fixed.window, fixed.sinks, fixed.dense_last) == (32, 8, 24, 6, 0)
    facts = served(CPU).facts()
    assert {name: facts[name] for name in ("block_q", "window", "dense_layers")} == {
        "block_q": 64, "window": 24, "dense_layers": [],
    }  # fmt: skip
    assert [served(CPU, **given).facts()["tile_parts"] for given in ({}, {"tile_parts": 1})] == [2, 1]
    wide = served(CPU)._replace(heads=Heads(8, 1, 256))
    assert wide.facts()["tile_parts"] == 2
    assert wide._replace(tuning=dataclasses.replace(CPU, tile_any_parts=False)).facts()["tile_parts"] == 1


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_a_server_leaves_to_the_stock_kernel_is_dense(kind: str) -> None:
    rows = layer_rows()
    want = dense(rows.q, rows.k, rows.v, SCALE)
    for options, price, limit, layer, counted in (
        ({}, 0.0, 0.9, 1, True),  # more than max_density
        ({"dense_layers": [1]}, 100.0, 1.0, 1, True),
        ({"min_rows": 300}, 100.0, 1.0, 1, True),
        ({"dense_last_rows": 150}, 100.0, 1.0, 1, True),  # 64 rows beside them are the least
        ({}, 100.0, 1.0, 2, False),  # no layer of full attention
    ):
        attend = Priced(made(kind, **options), price, limit)
        torch.testing.assert_close(attend(rows._replace(layer=layer)), want)
        assert attend.density == 1.0
        assert (attend.causal > 0) == counted
    allowed = Priced(made(kind), 100.0, 0.9)
    assert not torch.equal(allowed(rows), want)
    assert allowed.density < 0.9


def test_rows_that_pay_depend_on_the_platform() -> None:
    assert served(CPU, min_rows=None).gate().min_rows == 0
    assert served(CUDA, min_rows=None).gate().min_rows == 960


@pytest.mark.gpu
@pytest.mark.parametrize("price", [0.0, 1.0, 100.0])
def test_kernels_compute_what_the_references_do(price: float) -> None:
    rows, expected = layer_rows(), Priced(made("cuda", dense_last_rows=40), price, 1.0)
    want = expected(rows)
    device = torch.device("cuda", torch.cuda.current_device())
    tiles = PagedTiles(served(CUDA, dense_last_rows=40), N, torch.float32, device)
    found = Priced(tiles, price, 1.0)
    out = found(rows._replace(q=rows.q.to(device), room=rows.room.to(device)))
    torch.testing.assert_close(out.cpu(), want, atol=2e-3, rtol=1e-2)
    assert found.density == pytest.approx(expected.density, rel=1e-3)
