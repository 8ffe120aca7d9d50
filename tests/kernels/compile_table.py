# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Compiles the Triton kernels with the settings of the table and compares what memory they need with what there is.

``python -m tests.kernels.compile_table`` compiles what comes closest to the limits, ``--all`` every shape (half an hour
on two cores); ``--only 86 score`` leaves out other capabilities and operations. Needs no GPU. The last line is JSON:
the Triton at hand, how many kernels were compiled, those that do not fit, and the capabilities that this Triton does
not know.

A program of its own: it stands in for Triton's driver, which looks for a device when a kernel is launched. Compilation
ends where memory has been allocated; the machine code, most of the work, changes nothing about that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest.mock import MagicMock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_vsprefill.distil.mass import triton as mass_module
from vllm_vsprefill.kernels import launch as launch_module
from vllm_vsprefill.kernels import settings as settings_module
from vllm_vsprefill.kernels.attend import triton as attend_module
from vllm_vsprefill.kernels.attend_tiles import triton as tiles_module
from vllm_vsprefill.kernels.forget import triton as forget_module
from vllm_vsprefill.kernels.gathered import allocate_gathered
from vllm_vsprefill.kernels.guard import triton as guard_module
from vllm_vsprefill.kernels.index import Index, allocate_index
from vllm_vsprefill.kernels.merge import triton as merge_module
from vllm_vsprefill.kernels.paged import FP8_DTYPES, Batch, PagedKV
from vllm_vsprefill.kernels.price import triton as price_module
from vllm_vsprefill.kernels.price.paged import allocate_price
from vllm_vsprefill.kernels.rank import triton as rank_module
from vllm_vsprefill.kernels.rank.paged import allocate_rank
from vllm_vsprefill.kernels.recall import triton as recall_module
from vllm_vsprefill.kernels.recall.paged import allocate_recall
from vllm_vsprefill.kernels.sampled import triton as sampled_module
from vllm_vsprefill.kernels.sampled.paged import allocate_sampled
from vllm_vsprefill.kernels.score import triton as score_module
from vllm_vsprefill.kernels.score.paged import allocate_missing, prepare_weights
from vllm_vsprefill.kernels.select import triton as select_module
from vllm_vsprefill.kernels.select.paged import allocate_select
from vllm_vsprefill.kernels.tile_index import TileIndex, allocate_tiles
from vllm_vsprefill.kernels.types import IndexerLayerWeights, SparsePattern
from vllm_vsprefill.kernels.variance import triton as variance_module
from vllm_vsprefill.kernels.variance.paged import allocate_variance
from vllm_vsprefill.prefill.tiles import MOST_CHANNELS

# Bytes of shared memory that a program can have, by compute capability.
LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
TENSOR_COLUMNS = 512  # of tensor memory, on 10.0
GROUPS = (1, 4, 8, 16)
PATTERNS = ((1, 16), (1, 128), (4, 16), (4, 64), (8, 16), (16, 16), (64, 16))  # heads of a group and block_q
HIDDEN = (16, 64, 256, 1024, 2048)
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp8": (torch.float8_e4m3fn, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
}  # of the cache, of the queries
# float16 takes what bfloat16 takes, and sizes from 80 to 112 the tiles of 128: not everything of each.
SHAPES = [
    *itertools.product((64, 80, 128, 192, 256), ("bf16", "fp8", "fp32")), (96, "bf16"), (112, "bf16"), (128, "fp16"),
]  # fmt: skip
HEADS, SEQ_LEN, ROWS = 2, 1024, 128

Case = tuple[int, str, dict[str, Any]]  # capability, operation, arguments of its function below


class NoDevice:
    """Answers what compilation asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what Triton knows about a device, its target too, is kept by its number

    def get_current_stream(self, device: int) -> int:
        return 0


class Allocated(Exception):
    """Ends a compilation."""


def instrument(found: list[tuple[str, int, int]]) -> None:
    """Makes launches compile only, up to the allocation of memory, and note name, shared and tensor memory."""

    passes = nvidia_compiler.nvidia.passes.ttgpuir
    whole = nvidia_compiler.CUDABackend.make_llir
    module: list[Any] = []

    def make_llir(self: Any, src: Any, *args: Any) -> None:
        module[:] = [src]
        whole(self, src, *args)

    def end(manager: Any, *_: Any) -> None:
        """In place of the pass that follows those that allocate memory."""
        (src,) = module
        manager.run(src, "allocate")
        raise Allocated(src.get_int_attr("ttg.shared"), src.get_int_attr("ttg.tensor_memory_size") or 0)

    def launcher(self: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> MagicMock:
            try:
                self.run(*args, grid=grid, warmup=True, **kwargs)
            except Allocated as end:
                found.append((self.__name__, *end.args))
            return MagicMock()  # stands for a compiled kernel, which the operation may launch again

        return launch

    passes.add_to_llvmir = end
    nvidia_compiler.CUDABackend.make_llir = make_llir
    JITFunction.__getitem__ = launcher


def _paged(size: int, dtype: str, group: int = 1) -> tuple[PagedKV, torch.Tensor]:
    """A cache and queries."""
    kept, asked = DTYPES[dtype]
    if kept == torch.float8_e4m3fn and driver.active.capability < 89:
        kept = torch.float8_e5m2  # Triton has no e4m3 there
    cache = torch.zeros(SEQ_LEN // 16, 16, HEADS, 2 * size, dtype=kept).transpose(1, 2)
    kv = PagedKV(cache, torch.arange(SEQ_LEN // 16, dtype=torch.int32)[None])
    return kv, torch.zeros(ROWS, group * HEADS, size, dtype=asked)


def _index(block_q: int = 16, block_k: int = 4) -> Index:
    pattern = SparsePattern(block_q=block_q, block_k=block_k, dense_last=0)
    return allocate_index(1, HEADS, SEQ_LEN, pattern, "cpu")


def _tile_index(block_q: int = 16, parts: int = 1) -> TileIndex:
    pattern = SparsePattern(block_q=block_q, block_k=16, parts=parts)
    return allocate_tiles(1, HEADS, ROWS, [(pattern, SEQ_LEN)], "cpu").view(pattern, ROWS, 1, SEQ_LEN)


def attend(size: int, dtype: str, group: int, block_q: int) -> None:
    kv, q = _paged(size, dtype, group)
    visited, lse = torch.zeros(1, dtype=torch.int64), torch.zeros(q.shape[:2])
    batch = Batch.from_lists([ROWS], [SEQ_LEN])
    attend_module.attend(q, kv, _index(block_q), batch, scale=0.1, lse=lse, visited=visited)


def attend_tiles(size: int, dtype: str, group: int, block_q: int) -> None:
    kv, q = _paged(size, dtype, group)
    index, visited = _tile_index(block_q), torch.zeros(1, dtype=torch.int64)
    tiles_module.attend_tiles(q, kv, index, Batch.from_lists([ROWS], [SEQ_LEN]), scale=0.1, visited=visited)


def score(size: int, dtype: str, hidden: int) -> None:
    kv, q = _paged(size, dtype)
    weights = IndexerLayerWeights(
        torch.zeros(HEADS, 2 * size, hidden), torch.zeros(HEADS, hidden), torch.zeros(HEADS, hidden, 2),
        torch.zeros(HEADS, 2),
    )  # fmt: skip
    prepared = prepare_weights(weights, q.dtype)
    logits = torch.zeros(SEQ_LEN, 2 * HEADS)
    score_module.score_slots(kv, torch.arange(ROWS), prepared, logits)
    missing = allocate_missing(1, SEQ_LEN, "cpu")
    score_module.score_missing(kv, Batch.from_lists([ROWS], [SEQ_LEN]), prepared, logits, missing)


def sampled(size: int, dtype: str, group: int) -> None:
    kv, q = _paged(size, dtype, group)
    into = allocate_gathered(1, HEADS, SEQ_LEN, "cpu")
    workspace = allocate_sampled(1, group * HEADS, HEADS, SEQ_LEN, 32, "cpu")
    batch = Batch.from_lists([ROWS], [SEQ_LEN])
    sampled_module.sampled(q, kv, batch, workspace, into, scale=0.1)


def recall(size: int, dtype: str, group: int) -> None:
    kv, q = _paged(size, dtype, group)
    workspace, batch = allocate_recall(1, group * HEADS, HEADS, 16, "cpu"), Batch.from_lists([ROWS], [SEQ_LEN])
    recall_module.recall(q, kv, batch, _index(), workspace, torch.zeros(2), scale=0.1)


def price(size: int, dtype: str, group: int, parts: int = 1, prior: bool = False) -> None:
    kv, q = _paged(size, dtype, group)
    index, batch = _tile_index(16, parts), Batch.from_lists([ROWS], [SEQ_LEN])
    workspace = allocate_price(1, group * HEADS, HEADS, size, SEQ_LEN, 64, q.dtype, "cpu", parts)
    added = torch.zeros(1, HEADS, SEQ_LEN) if prior else None
    price_module.price(q, kv, batch, index, workspace, scale=0.1, price=0.02, prior=added)


def rank(size: int, dtype: str, group: int, block_q: int, parts: int = 1, prior: bool = False) -> None:
    kv, q = _paged(size, dtype, group)
    workspace = allocate_rank(ROWS, 1, group * HEADS, size, block_q, q.dtype, "cpu", parts)
    batch = Batch.from_lists([ROWS], [SEQ_LEN])
    added = torch.zeros(1, HEADS, SEQ_LEN) if prior else None
    rank_module.rank(q, kv, batch, _tile_index(block_q, parts), workspace, scale=0.1, prior=added)


def variance(size: int, dtype: str, group: int, block_q: int, parts: int = 1) -> None:
    kv, q = _paged(size, dtype, group)
    workspace, prior = allocate_variance(1, HEADS, size, q.dtype, "cpu"), torch.zeros(1, HEADS, SEQ_LEN)
    pattern = SparsePattern(block_q=block_q, block_k=16, parts=parts)
    batch = Batch.from_lists([ROWS], [SEQ_LEN])
    variance_module.variance(q, kv, batch, pattern, workspace, prior, scale=0.1)


def mass(size: int, dtype: str, group: int) -> None:
    _, q = _paged(size, dtype, group)
    mass_module.mass_sums(q, q[:, :HEADS].contiguous(), scale=0.1)


def peak(size: int, dtype: str, group: int) -> None:
    _, q = _paged(size, dtype, group)
    k, lse = q[:, :HEADS].contiguous(), torch.zeros(q.shape[:2])  # given, the kernel for it is compiled for mass
    mass_module.column_weights(q, k, scale=0.1, lse=lse, reduce="max")
    mass_module.column_weights(q, k, scale=0.1, lse=lse, reduce="sum")


def others(block_q: int, block_k: int, logits: str) -> None:
    """Kernels whose tiles depend on no head size: select, merge, guard, forget."""
    kv, _ = _paged(64, "bf16")
    values = torch.zeros(SEQ_LEN, 2 * HEADS, dtype=torch.float32 if logits == "fp32" else torch.bfloat16)
    index, batch = _index(block_q, block_k), Batch.from_lists([ROWS], [SEQ_LEN])
    tau = torch.full((2, HEADS), 0.9, dtype=torch.float64)
    gathered = allocate_gathered(1, HEADS, SEQ_LEN, "cpu")
    select_module.gather(values, kv, batch, gathered)
    select_module.select(gathered, batch, tau, index, allocate_select(1, HEADS, SEQ_LEN, "cpu"))
    merge_module.build_index(index, kv, batch)
    merge_module.build_tiles(_tile_index(), kv, batch)
    ends = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    counts = torch.zeros(2, dtype=torch.int64)
    guard_module.guard(index, batch, 0.5, dense_rows=ends[0], sparse_end=ends[1], counts=counts)
    guard_module.guard_tiles(_tile_index(), batch, 0.5, dense_rows=ends[0], sparse_end=ends[1], counts=counts)
    forget_module.forget(values, torch.arange(ROWS))


OPERATIONS: dict[str, Callable[..., None]] = {
    "attend": attend, "attend_tiles": attend_tiles, "score": score, "sampled": sampled, "recall": recall,
    "price": price, "rank": rank, "variance": variance, "mass": mass, "peak": peak, "others": others,
}  # fmt: skip


def cases(everything: bool) -> Iterator[Case]:
    """What to compile."""
    if not everything:
        for capability in (80, 86, 90, 100, 120):
            for size, hidden in itertools.product((128, 256), (64, 256)):
                yield capability, "score", {"size": size, "dtype": "bf16", "hidden": hidden}
            yield capability, "attend", {"size": 256, "dtype": "fp32", "group": 64, "block_q": 16}
            for size, dtype in ((128, "bf16"), (256, "fp32")):
                yield capability, "attend_tiles", {"size": size, "dtype": dtype, "group": 6, "block_q": 60}
            yield capability, "sampled", {"size": 128, "dtype": "bf16", "group": 1}
            for size, dtype in ((128, "bf16"), (256, "fp32")):
                yield capability, "recall", {"size": size, "dtype": dtype, "group": 4}
            for size in (128, 256):
                yield capability, "price", {"size": size, "dtype": "bf16", "group": 4, "prior": True}
                yield capability, "rank", {"size": size, "dtype": "bf16", "group": 16, "block_q": 20, "prior": True}
            for size, dtype in ((128, "bf16"), (256, "fp32")):
                yield capability, "variance", {"size": size, "dtype": dtype, "group": 4, "block_q": 150}
            yield capability, "price", {"size": 128, "dtype": "bf16", "group": 16, "parts": 2, "prior": True}
            yield capability, "mass", {"size": 256, "dtype": "fp32", "group": 16}
        for capability in (86, 120):
            yield capability, "attend", {"size": 128, "dtype": "bf16", "group": 4, "block_q": 16}
        return
    for capability, (size, dtype) in itertools.product(LIMITS, SHAPES):
        fp8 = DTYPES[dtype][0] in FP8_DTYPES
        if capability == 89 and not fp8:
            continue  # all else is as for 8.6
        shape = {"size": size, "dtype": dtype}
        for hidden in HIDDEN:
            yield capability, "score", {**shape, "hidden": hidden}
        for group, block_q in PATTERNS if dtype == "bf16" else PATTERNS[::3]:
            yield capability, "attend", {**shape, "group": group, "block_q": block_q}
            yield capability, "attend_tiles", {**shape, "group": group, "block_q": block_q}
        yield capability, "attend_tiles", {**shape, "group": 6, "block_q": 60}
        for block_q in (1, 20, 150):
            yield capability, "variance", {**shape, "group": 4, "block_q": block_q}
        for group in GROUPS:
            yield capability, "sampled", {**shape, "group": group}
            yield capability, "recall", {**shape, "group": group}
            for prior in (False, True):
                yield capability, "price", {**shape, "group": group, "prior": prior}
                if size <= MOST_CHANNELS:
                    yield capability, "price", {**shape, "group": group, "parts": 2, "prior": prior}
                yield capability, "rank", {**shape, "group": group, "block_q": 20, "prior": prior}
            if not fp8:  # these read the keys of a calibration run, not a cache
                yield capability, "mass", {**shape, "group": group}
                yield capability, "peak", {**shape, "group": group}
    for capability, block_q, logits in itertools.product(LIMITS, (16, 128), ("fp32", "bf16")):
        yield capability, "others", {"block_q": block_q, "block_k": block_q // 16, "logits": logits}


_found: list[tuple[str, int, int]] = []


def take_host_tensors() -> None:
    """Makes the operations launch on tensors of the host."""
    mass_module.check_device = lambda *_: None  # type: ignore[attr-defined]  # the others leave checks to their callers


def prepare() -> None:
    """Makes a process compile without a device."""
    instrument(_found)
    take_host_tensors()


def compiled(case: Case) -> list[dict[str, Any]]:
    """Compiles the kernels of one case; what they need and may have."""
    capability, operation, arguments = case
    driver.set_active(NoDevice(capability))
    settings_module.capability = lambda _: capability  # type: ignore[assignment]
    launch_module._compiled.clear()
    _found.clear()
    about = {"capability": capability, "operation": operation, **arguments}
    try:
        OPERATIONS[operation](**arguments)
    except Exception as error:
        return [{**about, "error": f"{type(error).__name__}: {error}"[:300], "fits": False}]
    limit = LIMITS[capability]
    return [
        {**about, "kernel": name, "shared": shared, "tensor": tensor, "limit": limit,
         "fits": shared <= limit and tensor <= TENSOR_COLUMNS}
        for name, shared, tensor in dict.fromkeys(_found)
    ]  # fmt: skip


def unknown(capability: int) -> str | None:
    """Why the Triton at hand cannot compile for a capability, None if it can."""
    assembler = nvidia_compiler.get_ptxas(capability).path
    told = subprocess.run([assembler, "--help"], capture_output=True, text=True, check=True).stdout
    name = nvidia_compiler.sm_arch_from_capability(capability)
    return None if f"'{name}'" in told else f"the ptxas of Triton {triton.__version__} has no {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every shape")
    parser.add_argument("--only", nargs="+", default=[], help="capabilities and operations")
    parser.add_argument("--verbose", action="store_true", help="print every kernel")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # nothing of these halves of compilations is kept
        prepare()
        skipped = {capability: reason for capability in LIMITS if (reason := unknown(capability)) is not None}
        for capability, reason in skipped.items():
            print(f"capability {capability / 10}: skipped, {reason}")
        todo = [case for case in cases(options.all) if case[0] not in skipped]
        for digits, place in ((True, 0), (False, 1)):
            wanted = {name for name in options.only if name.isdigit() == digits}
            todo = [case for case in todo if not wanted or str(case[place]) in wanted]
        random.Random(0).shuffle(todo)  # the long ones not all at the end
        misfits, count = [], 0
        with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
            for results in pool.map(compiled, todo):
                count += len(results)
                for result in results:
                    if options.verbose or not result["fits"]:
                        print(json.dumps(result), flush=True)
                misfits += [result for result in results if not result["fits"]]
    print(json.dumps({"triton": triton.__version__, "compiled": count, "misfits": misfits, "skipped": skipped}))
    sys.exit(bool(misfits))


if __name__ == "__main__":
    main()
