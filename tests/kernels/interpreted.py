# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Loads the Triton kernels so that tests can run them: on the GPU, or under Triton's interpreter where there is none.

The interpreter must be asked for before Triton's first import. Where something else (vLLM) has imported it already,
the tests of this process are skipped and ``test_triton_process.py`` runs them in a process of their own.
"""

# ruff: noqa: F401 (modules are imported for what importing them does)
from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    late = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
else:
    late = False
try:
    if not late:
        # The first launch imports this, and it looks at the variable.
        import triton.experimental.gluon

        import vllm_vsprefill.distil.mass.triton
        import vllm_vsprefill.kernels.attend.triton
        import vllm_vsprefill.kernels.attend_tiles.triton
        import vllm_vsprefill.kernels.forget.triton
        import vllm_vsprefill.kernels.guard.triton
        import vllm_vsprefill.kernels.merge.triton
        import vllm_vsprefill.kernels.price.triton
        import vllm_vsprefill.kernels.rank.triton
        import vllm_vsprefill.kernels.recall.triton
        import vllm_vsprefill.kernels.sampled.triton
        import vllm_vsprefill.kernels.score.triton
        import vllm_vsprefill.kernels.select.triton
        import vllm_vsprefill.kernels.variance.triton
finally:
    # Child processes of other tests must not inherit it.
    if DEVICE == "cpu":
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def patch_language_once() -> None:
    """Spare the interpreter a quarter of its time and more: before every call of a device function it looks for all
    operations of ``triton.language`` to put its own in their place, though the launch has done so. Once a launch and
    function do."""
    from triton.runtime import interpreter

    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[Any] = set()

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()  # a launch takes its patches back
        return launch(self, *args, **kwargs)

    def patch_once(fn: Any) -> Any:
        if fn in patched:
            return None  # which the launch does not get, only what it calls
        patched.add(fn)
        return patch(fn)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_anew, patch_once


def leave_out_overflow_checks() -> None:
    """Another third: sums and products of integers are done again in 64 bits, for an assertion that a kernel has only
    when it is debugged, which the interpreter never does."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


if DEVICE == "cpu" and not late:
    patch_language_once()
    leave_out_overflow_checks()

USABLE = not late
REASON = "Triton was imported without its interpreter; test_triton_process.py runs these tests"
