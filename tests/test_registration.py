# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Registration with stock vLLM: every way to select the backend, spawned processes, and no effect on anyone else."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_vsprefill import _compat, registration

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def plugins() -> None:
    load_general_plugins()


def run(program: str, cwd: Path = ROOT) -> str:
    """Output of a Python program in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_member_exists_and_registering_again_changes_nothing() -> None:
    member = AttentionBackendEnum["VSPREFILL"]
    registration.register()
    registration.register()
    assert AttentionBackendEnum["VSPREFILL"] is member
    assert member.get_path() == registration.BACKEND_PATH
    assert list(AttentionBackendEnum.__members__).count("VSPREFILL") == 1


def test_member_survives_copies_and_pickle_in_this_process() -> None:
    member = AttentionBackendEnum["VSPREFILL"]
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member


def test_member_unpickles_where_no_plugin_was_loaded(tmp_path: Path) -> None:
    """The first thing an engine or worker process does is unpickle its configuration."""
    file = tmp_path / "member"
    file.write_bytes(pickle.dumps({"backend": AttentionBackendEnum["VSPREFILL"]}))
    program = f"import pickle; print(pickle.load(open({str(file)!r}, 'rb'))['backend'].name)"
    assert run(program).split()[-1] == "VSPREFILL"


def test_member_can_be_inserted_where_vllm_offers_no_way() -> None:
    """vLLM before 0.32 has no registration of new names; this is what is done there."""
    program = (
        "from vllm.v1.attention.backends import registry\n"
        "from vllm_vsprefill import registration\n"
        "del registry.AttentionBackendEnum.register\n"
        "member = registration.register_backend_member()\n"
        "enum = registry.AttentionBackendEnum\n"
        "import pickle, copy\n"
        "assert enum['VSPREFILL'] is member and enum(registration.BACKEND_PATH) is member\n"
        "assert member in list(enum) and member.name == 'VSPREFILL'\n"
        "assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member\n"
        "assert member.get_class().get_name() == 'VSPREFILL'\n"
        "print('inserted')\n"
    )
    assert run(program).split()[-1] == "inserted"


@pytest.mark.parametrize("spelling", ["VSPREFILL", "vsprefill", "VSPrefill"])
def test_command_line(spelling: str, tmp_path: Path) -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    model = ["--model", str(tmp_path)]
    for arguments in (["--attention-backend", spelling], ["-ac.backend", spelling]):
        args = EngineArgs.from_cli_args(parser.parse_args([*model, *arguments]))
        chosen = args.attention_backend or args.attention_config.backend
        assert getattr(chosen, "name", str(chosen).upper()) == "VSPREFILL"
    args = EngineArgs.from_cli_args(parser.parse_args([*model, "--attention-config", f'{{"backend": "{spelling}"}}']))
    assert args.attention_config.backend.name == "VSPREFILL"


def selector_config(**changes: Any) -> AttentionSelectorConfig:
    import torch

    return AttentionSelectorConfig(128, torch.bfloat16, "auto", 128, **changes)


def test_cpu_selects_the_backend_only_when_asked() -> None:
    def choose(backend: Any, **changes: Any) -> str:
        return current_platform.get_attn_backend_cls(backend, selector_config(**changes))

    stock = AttentionBackendEnum.CPU_ATTN.get_path()
    ours = AttentionBackendEnum["VSPREFILL"]
    assert choose(ours) == registration.BACKEND_PATH
    assert choose(None) == stock
    assert choose(AttentionBackendEnum.CPU_ATTN) == stock
    assert choose(AttentionBackendEnum.FLASH_ATTN) == stock
    assert choose(ours, attn_type=AttentionType.ENCODER_ONLY) == stock
    assert "mla" in choose(ours, use_mla=True)
    for feature in ("use_mm_prefix", "use_non_causal", "use_batch_invariant", "use_pcp", "use_dcp", "use_rswa"):
        assert choose(ours, **{feature: True}) == stock


def test_stock_refusals_remain() -> None:
    with pytest.raises(NotImplementedError):
        current_platform.get_attn_backend_cls(AttentionBackendEnum["VSPREFILL"], selector_config(use_sparse=True))


def test_platform_hooks_are_installed_once() -> None:
    before = type(current_platform).check_and_update_config.__func__
    _compat.install_platform_hooks()
    assert type(current_platform).check_and_update_config.__func__ is before


def test_a_server_with_another_backend_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a bad VSPREFILL option matters to it."""
    monkeypatch.setenv("VSPREFILL_TAU_COLUMNS", "nonsense")

    class Config:
        speculative_config: Any = None

        class attention_config:
            backend = AttentionBackendEnum.CPU_ATTN
            backend_per_kind = None

    assert not _compat.is_selected(Config)
    Config.speculative_config = SimpleNamespace(attention_backend=AttentionBackendEnum["VSPREFILL"])
    assert _compat.is_selected(Config)  # a draft model's backend reads the options, too
    Config.speculative_config = None
    Config.attention_config.backend = AttentionBackendEnum["VSPREFILL"]
    assert _compat.is_selected(Config)


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.25.1", False), ("0.26.0", True), ("0.32.0+cpu", True), ("0.33.2", True), ("0.34.0", False), ("local", True)],
)
def test_version_range(monkeypatch: pytest.MonkeyPatch, version: str, supported: bool) -> None:
    monkeypatch.setattr(_compat, "vllm_version", lambda: version)
    reason = _compat.unsupported_version()
    assert (reason is None) is supported
    if reason is not None:
        assert version in reason
        assert ">=0.26" in reason


def test_draft_layers_are_recognised() -> None:
    class Model:
        class hf_text_config:
            num_hidden_layers = 4

    class Config:
        speculative_config = None
        model_config = Model

    class Marked:
        is_draft_layer = True

    served = "model.layers.3.self_attn.attn"
    assert not _compat.is_draft_layer(Config, served, object())
    assert _compat.is_draft_layer(Config, served, Marked)
    assert _compat.is_draft_layer(Config, "draft_model.model.layers.0.self_attn.attn", object())
    assert _compat.is_draft_layer(Config, "model.layers.4.self_attn.attn", object())
    assert _compat.layer_index("model.attn") is None
    assert _compat.layer_index(served) == 3
