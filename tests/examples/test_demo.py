# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The demo's arguments and read-outs; what it says when it cannot do what it was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from examples import demo
from vllm_vsprefill.eval.density import Densities

app = typer.Typer()
app.command()(demo.main)


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mistake here is found before a server is started."""

    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a server was started")

    monkeypatch.setattr(demo, "server", refuse)


def shown(*arguments: str) -> str:
    """Output of a run that must end with exit code 2."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("flags : fpu avx2", False), ("flags : avx512f avx512_bf16", True), ("Features : fp bf16", True), ("", True)],
)
def test_processors_with_bfloat16(text: str, expected: bool, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert demo.computes_bfloat16(file) is expected
    assert demo.computes_bfloat16(tmp_path / "missing")


def test_missing_prompt_file(tmp_path: Path) -> None:
    assert "No such file" in shown("--prompt", str(tmp_path / "a[/b].txt"))


def test_empty_prompt_file(tmp_path: Path) -> None:
    file = tmp_path / "empty.txt"
    file.write_text(" \n")
    assert "is empty" in shown("--prompt", str(file))


def test_prompt_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "binary"
    file.write_bytes(b"\xff\xfe\x00")
    assert "decode" in shown("--prompt", str(file))
    assert "directory" in shown("--prompt", str(tmp_path))


def test_prompt_longer_than_the_model_takes(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("the magic number " * 60000)
    text = shown("--prompt", str(file))
    assert "takes 180," in text
    assert "131,072 in all" in text


def test_unknown_model() -> None:
    assert "cannot be read" in shown("--model", "nonsense/that-does-not-exist")


def test_limits_of_the_needle_model() -> None:
    limits = demo.Limits.of(str(demo.NEEDLE_MODEL))
    assert limits.positions == 131072
    assert limits.bytes_per_token == 6 * 2 * 2 * 128 * 2  # layers, KV heads, key and value, channels, bytes
    question = demo.needle_question(3000, 0)
    assert limits.count(question.content) == 3000


@pytest.mark.parametrize("tokens", [2048, 20000])
def test_generic_question_fits(tokens: int) -> None:
    limits = demo.Limits.of(str(demo.NEEDLE_MODEL))
    question = demo.generic_question(tokens, 0, limits.count)
    assert 0.9 * tokens < limits.count(question.content) <= tokens
    assert question.expected is not None
    assert question.content.count(question.expected) == 1


def test_densities_are_read_off_metrics() -> None:
    text = """
vsprefill_pairs_computed_total{layer="0"} 30.0
vsprefill_pairs_computed_total{layer="1"} 1e+02
vsprefill_pairs_causal_total{layer="0"} 100.0
vsprefill_pairs_causal_total{layer="1"} 100.0
vsprefill_chunks_total{layer="0",path="dense"} 4.0
vsprefill_chunks_total{layer="0",path="sparse"} 2.0
"""
    counted = Densities.parse(text)
    assert counted.layers == {0: 0.3, 1: 1.0}
    assert counted.mean == 0.65
    assert counted.ran_sparse
    assert not counted.since(counted).ran_sparse
    assert counted.since(counted).mean == 1.0


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gemma4_text", {"head_dim": 32, "global_head_dim": 64}),
        ("qwen3", {}),
        ("gpt2", {}),
        ("bloom", {}),
        ("mamba", {}),
    ],
)
def test_limits_of_unusual_models(
    model_type: str, settings: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of different shapes, other names, no length at all: limits, or a message."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type](**settings)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda model: config)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda model: None)
    if model_type in ("bloom", "mamba"):
        with pytest.raises(demo.DemoError, match="does not say"):
            demo.Limits.of(model_type)
    else:
        limits = demo.Limits.of(model_type)
        assert limits.positions >= 1024
        assert limits.bytes_per_token > 0
