# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""How much each KV head keeps: what removes most of the output error for its pairs."""
