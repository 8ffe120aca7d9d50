# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Keys and values read back from vLLM's packed CPU cache are the ones that were written."""

import pytest
import torch

from vllm_vsprefill.backends import cpu_layout

ops = pytest.importorskip("vllm._custom_ops", reason="vLLM's CPU build is not installed")


def writer(isa: str):  # type: ignore[no-untyped-def]
    """vLLM's own cache writer for one instruction set."""

    def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        blocks, heads, tokens, _ = cache.shape
        key_cache, value_cache = cache.view(blocks, heads, 2 * tokens, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key, value, key_cache, value_cache, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )

    return write


def cases() -> list[tuple[str, torch.dtype, int, int]]:
    found = [("vec", dtype, 128, 128) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    found += [("vec", torch.float32, 32, 64), ("vec16", torch.float32, 32, 80)]
    if torch.cpu._is_amx_tile_supported():
        found += [("amx", torch.bfloat16, 128, 128), ("amx", torch.bfloat16, 32, 64), ("amx", torch.bfloat16, 96, 256)]
    return found


@pytest.mark.parametrize(("isa", "dtype", "block", "dim"), cases(), ids=str)
def test_round_trip(isa: str, dtype: torch.dtype, block: int, dim: int) -> None:
    write = writer(isa)
    heads, blocks = 3, [5, 6, 2, 9]
    reader = cpu_layout.infer(write, heads, block, dim, dtype)
    cache = torch.full((11, heads, block, 2 * dim), float("nan"), dtype=dtype)
    for n in (1, block - 1, block, 3 * block, 3 * block + block // 2):
        key, value = torch.randn(n, heads, dim).to(dtype), torch.randn(n, heads, dim).to(dtype)
        position = torch.arange(n)
        write(key, value, cache, torch.tensor(blocks)[position // block] * block + position % block)
        keys, values = torch.empty(2, heads, n, dim, dtype=dtype)
        reader.read(cache, blocks, keys, values)
        assert torch.equal(keys.transpose(0, 1), key)
        assert torch.equal(values.transpose(0, 1), value)


def test_known_orders_need_no_index() -> None:
    for isa, dtype, block, dim in cases():
        reader = cpu_layout.infer(writer(isa), 1, block, dim, dtype)
        assert reader.key_order.index is None
        assert reader.value_order.index is None


def test_an_unknown_order_is_read_through_an_index() -> None:
    block, dim, heads = 16, 32, 2
    shuffle = torch.randperm(block * dim, generator=torch.Generator().manual_seed(0))

    def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        halves = cache.view(len(cache), heads, 2, block * dim)
        for token, slot in enumerate(slots.tolist()):
            place = shuffle.view(block, dim)[slot % block]
            halves[slot // block, :, 0, place] = key[token]
            halves[slot // block, :, 1, place] = value[token]

    reader = cpu_layout.infer(write, heads, block, dim, torch.float32)
    assert reader.key_order.name == "indexed"
    cache = torch.zeros(4, heads, block, 2 * dim)
    key, value = torch.randn(2, 40, heads, dim)
    write(key, value, cache, torch.arange(40) + block)
    keys, values = torch.empty(2, heads, 40, dim)
    reader.read(cache, [1, 2, 3], keys, values)
    assert torch.equal(keys.transpose(0, 1), key)
    assert torch.equal(values.transpose(0, 1), value)


def test_a_writer_that_loses_elements_is_refused() -> None:
    def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        cache.zero_()

    with pytest.raises(RuntimeError, match="element by element"):
        cpu_layout.infer(write, 1, 16, 32, torch.float32)
