# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""VSPrefill for vLLM: sparse prefill over vertical columns and diagonals, as a backend that stock vLLM loads.

Importing this package is cheap on purpose: vLLM's plugin entry point imports it in every process, before it has decided
on a platform, so neither torch nor vLLM is imported here.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
