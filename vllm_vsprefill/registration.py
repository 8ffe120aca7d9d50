# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Entry point of the plugin: makes ``--attention-backend VSPREFILL`` known to vLLM.

vLLM calls :func:`register` once per process, before it parses the command line. Nothing here has an effect on a server
that selects another backend.

A spawned engine or worker unpickles its configuration *before* it loads plugins, and an enum member pickles by value.
The member registered here therefore pickles as a call of :func:`restore_backend`, which registers it on the other side.
This module stays light for that reason: importing it pulls in neither torch nor vLLM's platform code.
"""

from __future__ import annotations

from typing import Any

BACKEND_NAME = "VSPREFILL"
"""Name of the member of ``AttentionBackendEnum``. Upper case: vLLM upper-cases what the user typed."""

BACKEND_PATH = "vllm_vsprefill.backends.VSPrefillBackend"
"""Where vLLM imports the backend from; the package picks the class for the platform."""


def register() -> None:
    """Register the backend and the hooks it needs. Safe to call any number of times in one process."""
    register_backend_member()

    from vllm_vsprefill import _compat, stats

    _compat.install_platform_hooks()
    stats.install_collector()


def register_backend_member() -> Any:
    """Add ``VSPREFILL`` to vLLM's ``AttentionBackendEnum`` and return the member."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND_NAME in AttentionBackendEnum.__members__:
        return AttentionBackendEnum[BACKEND_NAME]
    enum_register = getattr(AttentionBackendEnum, "register", None)
    if enum_register is not None:
        member = enum_register(BACKEND_NAME, BACKEND_PATH)
    else:  # vLLM before 0.32 can only override members that exist
        member = _insert_member(AttentionBackendEnum)
    # Looked up on the instance by pickle and by copyreg; an Enum's own __reduce_ex__ would pickle the class path,
    # which a process without the plugin cannot turn back into a member.
    member.__reduce_ex__ = lambda protocol: (restore_backend, ())
    return member


def restore_backend() -> Any:
    """Unpickle the member: register it in this process if that has not happened yet, and return it."""
    return register_backend_member()


def _insert_member(enum: Any) -> Any:
    """Insert a member into an enum class that offers no way to do so (vLLM 0.26 to 0.31)."""
    member = object.__new__(enum)
    member._name_ = BACKEND_NAME
    member._value_ = BACKEND_PATH
    type.__setattr__(enum, BACKEND_NAME, member)
    enum._member_map_[BACKEND_NAME] = member
    enum._value2member_map_[BACKEND_PATH] = member
    enum._member_names_.append(BACKEND_NAME)
    return member
