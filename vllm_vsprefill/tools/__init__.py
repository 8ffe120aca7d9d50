# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Commands that look: at checkpoints, at an installation, at what is kept of a text, at a server's speed."""
