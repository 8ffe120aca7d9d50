# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""RULER (arXiv 2404.06654), all 13 tasks: prompts of an exact greatest length, and its score."""
