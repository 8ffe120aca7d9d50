# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Methods of sparse prefill on one plot: how close each stays to dense attention, at which density.

Plain PyTorch in a patched Hugging Face forward pass. ``python -m benchmarks.pareto --help`` says how to run it.
"""
