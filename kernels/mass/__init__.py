# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""True attention mass per column and per diagonal, the targets of distillation."""

from .cpu import mass_sums

__all__ = ["mass_sums"]
