# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Measurements behind the numbers this project quotes. Each command prints a table and can write its raw figures."""
