# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Whether a selection is small enough for sparse attention to pay."""

from .naive import expected_density, upper_bound

__all__ = ["expected_density", "upper_bound"]
