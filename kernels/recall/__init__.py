# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""How much of the true attention a selection covers, by a few of the chunk's own rows."""
