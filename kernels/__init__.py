# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Operations of vertical-slash sparse prefill: score -> select -> merge -> attend.

Each operation is a folder that holds a plain PyTorch reference (``naive``) and its faster versions, all with one
signature.
"""

from vllm_vsprefill._source_tree import hand_over

from .types import IndexerLayerWeights, Selection, SparsePattern

__all__ = ["IndexerLayerWeights", "Selection", "SparsePattern"]

if __name__ == "kernels":  # found in the repository root in place of the Hugging Face library of that name
    hand_over(__name__)
