# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What sparse prefill does to answers, measured on any OpenAI-compatible server: ``vsprefill eval``.

Nothing here imports torch or vLLM; servers are other processes.
"""
