# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Sizes of what the layers share on a device, and the way of small lists to it."""

from __future__ import annotations

import pytest
import torch

from vllm_vsprefill.kernels.types import SparsePattern
from vllm_vsprefill.prefill.buffers import (
    MAX_REQUESTS,
    ROUND_BYTES,
    DeviceBuffers,
    Shape,
    bytes_per_request,
    requests_per_round,
)
from vllm_vsprefill.prefill.upload import Upload

PATTERN = SparsePattern(16, 4, 512, 64, 0)


@pytest.mark.parametrize("sampled", [None, 64])
@pytest.mark.parametrize("longest", [8192, 131072, 262144, 1048576])
def test_requests_of_a_round_fit_into_their_share(longest: int, sampled: int | None) -> None:
    shape = Shape(32, 8, longest, 36, sampled)
    size = bytes_per_request(shape, PATTERN)
    count = requests_per_round(shape, PATTERN, 256, 8192)
    assert 1 <= count <= MAX_REQUESTS
    assert count == 1 or count * size <= ROUND_BYTES
    assert requests_per_round(shape, PATTERN, 1, 8192) == 1
    assert requests_per_round(shape, PATTERN, 256, 32) == 1


def test_all_buffers_are_counted() -> None:
    shape = Shape(4, 2, 4096, 3, 16, 8)
    buffers = DeviceBuffers.allocate(shape, PATTERN, max_num_seqs=4, max_tokens=2048, device=torch.device("cpu"))
    assert buffers.requests == 4
    work = buffers.work
    parts = [*work.gathered, *work.select, *work.index, *work.missing, *(work.sampled or ()), *(work.recall or ())]
    parts += [buffers.dense_rows, buffers.sparse_end, buffers.counts, buffers.recall]
    assert buffers.num_bytes == sum(part.numel() * part.element_size() for part in parts if hasattr(part, "numel"))
    assert buffers.num_bytes < 4 * bytes_per_request(shape, PATTERN) + buffers.counts.numel() * 8 + 64
    for layer in range(3):
        assert buffers.visited(layer).data_ptr() % 16 == 0
        assert buffers.guarded(layer).data_ptr() % 16 == 0
        assert buffers.covered(layer).data_ptr() % 16 == 0


def test_missing_logits_and_queries_reuse_their_room() -> None:
    shape = Shape(4, 2, 4096, 3, None)
    buffers = DeviceBuffers.allocate(
        shape, PATTERN, max_num_seqs=4, max_tokens=256, device=torch.device("cpu"), slots=100
    )  # fmt: skip
    buffers.reserve_queries((256, 4, 64), torch.bfloat16)
    room = buffers.logits.data_ptr(), buffers.queries.data_ptr()
    for count in (100, 7):
        logits = buffers.missing_logits(count)
        assert logits.shape == (count, 4)
        assert logits.isnan().all()
        logits.zero_()
        query = torch.randn(count, 4, 64).to(torch.float8_e4m3fn)
        assert torch.equal(buffers.unquantised(query, torch.bfloat16), query.to(torch.bfloat16))
    assert room == (buffers.logits.data_ptr(), buffers.queries.data_ptr())
    assert buffers.missing_logits(101).shape == (101, 4)


def test_upload_keeps_lists_apart_and_aligned() -> None:
    upload = Upload()
    lists = [[1], [2, 3, 4], [], [5, 6, 7, 8], [9]]
    places = [upload.add(values) for values in lists]
    sent = upload.send(torch.device("cpu"))
    assert [sent.take(place).tolist() for place in places] == lists
    assert all(place.start % 4 == 0 for place in places)
