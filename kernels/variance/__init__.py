# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What single queries of a tile may find in a key that their mean does not: the variance of their logits."""
