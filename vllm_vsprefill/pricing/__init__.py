# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Finds the price that reaches a goal on a person's own model and text: ``vsprefill calibrate`` without an indexer."""
