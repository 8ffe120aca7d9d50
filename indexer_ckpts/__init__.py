# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Trained indexers, one folder each (`config.json` and `indexer.safetensors`), found by their model fingerprint."""
