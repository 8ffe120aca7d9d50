# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Fixtures of the tests of prices: those of distillation, whose models these are."""

from __future__ import annotations

from tests.distil.conftest import model_folder, one_thread

__all__ = ["model_folder", "one_thread"]
