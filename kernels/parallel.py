# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Independent pieces of work on several CPU cores, each piece on one core.

PyTorch splits every single operator over its OpenMP threads and waits for the slowest at its end. An operation made of
hundreds of short operators then suffers badly as soon as another process takes a core for a moment: each operator can
cost a scheduler time slice. Pieces that run on one core each wait for each other only once, at the very end, and a
core that is held up simply takes fewer of them.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

# Pieces per core at least: with fewer the last ones leave cores idle, and splitting operators is the better way.
PIECES_PER_CORE = 2


# vLLM's CPU worker replaces torch.set_num_threads by a function that only warns, to protect its own binding of cores.
# What is set here concerns the pool's threads alone.
_set_num_threads: Callable[[int], None] = torch._C.set_num_threads


def _cores() -> frozenset[int]:
    """Cores that a thread started now may run on; it inherits the caller's binding."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


@functools.cache
def _pool(process: int, num_workers: int, cores: frozenset[int]) -> ThreadPoolExecutor:
    """Threads whose operators are not split. One pool a process: threads do not survive a fork."""
    before = torch.get_num_threads()
    started = threading.Barrier(num_workers + 1)

    def start() -> None:
        # The first use of PyTorch in a thread adopts the process's default, so that has to come first. Setting the
        # number counts for this thread, but also becomes the default; hence the barrier, and the repair behind it.
        torch.get_num_threads()
        _set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="vsprefill", initializer=start)
    for _ in range(num_workers):
        pool.submit(int)
    started.wait()
    _set_num_threads(before)
    return pool


def run_pieces(pieces: Sequence[Callable[[], T]]) -> list[T]:
    """Runs independent functions, several at a time where that pays, and returns their results in order.

    As many run at once as PyTorch has threads and the caller's core binding has cores. If there are too few pieces
    or cores, or if the caller is such a piece itself, they run one after the other in the calling thread.

    The first exception in the order of the pieces is raised, after all have ended.
    """
    cores = _cores()
    num_workers = min(torch.get_num_threads(), len(cores))
    if num_workers < 2 or len(pieces) < PIECES_PER_CORE * num_workers:
        return [piece() for piece in pieces]
    inference = torch.is_inference_mode_enabled()

    def run(piece: Callable[[], T]) -> T:
        # The mode belongs to a thread; tensors made in inference mode can only be written in it.
        with torch.inference_mode(inference), torch.no_grad():
            return piece()

    futures = [_pool(os.getpid(), num_workers, cores).submit(run, piece) for piece in pieces]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
    return [future.result() for future in futures]
