# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Sparse prefill of one layer: what is computed, in which order. Knows nothing of vLLM.

The way of the data is the same on every platform, and each of the two classes states it once::

    estimate   how important is every key, and every distance behind the query?
    select     the fewest that hold the wanted share of that importance
    merge      one list of keys for every tile of queries
    guard      is the list short enough to pay?
    attend     softmax over the keys of the list

:class:`~vllm_vsprefill.prefill.cuda.CudaPrefill` reads a paged cache and never waits for the device;
:class:`~vllm_vsprefill.prefill.cpu.CPUPrefill` reads contiguous keys and values. Each has a call that chooses and one
that attends. Backends, benchmarks, examples and tests all use these.
"""
