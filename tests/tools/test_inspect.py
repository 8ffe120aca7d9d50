# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""``vsprefill inspect``: its figures against whole matrices, its page, and a run on the needle model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vllm_vsprefill import cli
from vllm_vsprefill.distil.capture import LayerCall
from vllm_vsprefill.kernels.types import Budgets, SparsePattern
from vllm_vsprefill.prefill.cpu import CPUPrefill
from vllm_vsprefill.prefill.cpu_tiles import CPUTilePrefill
from vllm_vsprefill.tools import pages
from vllm_vsprefill.tools.inspecting import tokenised
from vllm_vsprefill.tools.inspection import BINS, LayerReport, inspect_layer, inspect_tiles
from vllm_vsprefill.tuning import CPU

ROOT = Path(__file__).resolve().parents[2]
NEEDLE = ROOT / "examples" / "needle" / "model"
PATTERN = SparsePattern(block_q=32, block_k=16, window=24, sinks=8, dense_last=0)
TAIL = 20


def call(n: int, heads: int = 4, kv_heads: int = 2, size: int = 16) -> LayerCall:
    rng = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(n, h, size, generator=rng) for h in (heads, kv_heads, kv_heads))
    return LayerCall(3, 2 * q, k, v, size**-0.5, None)


def look(given: LayerCall, tau: float, max_density: float = 1.0) -> LayerReport:
    prefill = CPUPrefill(PATTERN, Budgets(), sampled_rows=16, max_density=max_density)
    return inspect_layer(given, prefill, None, torch.full((2, 2), tau, dtype=torch.float64), TAIL)


@pytest.mark.parametrize("n", [200, 700])
def test_figures_against_whole_matrices(n: int) -> None:
    given = call(n)
    report = look(given, 0.3)
    rows = n - TAIL
    q, k, v = given.q[:rows].double(), given.k[:rows].double(), given.v[:rows].double()
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    for number, head in enumerate(report.heads):
        kept = torch.zeros(rows, rows, dtype=torch.bool)
        for start in range(0, rows, PATTERN.block_q):
            end = min(start + PATTERN.block_q, rows)
            kept[start:end, PATTERN.tile_keys(head.columns, head.diagonals, start, end)] = True
        kept &= causal
        logits = torch.einsum("igd,jd->gij", q[:, 2 * number : 2 * number + 2], k[:, number]) * given.scale
        truth = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        sparse = logits.masked_fill(~kept, -torch.inf).softmax(-1)
        wanted, got = truth @ v[:, number], sparse @ v[:, number]
        assert 0.05 < head.density < 0.95
        assert head.density == pytest.approx(float(kept.sum() / causal.sum()), rel=1e-6)
        assert head.recall == pytest.approx(float((truth * kept).sum() / (2 * rows)), rel=1e-4)
        assert head.error == pytest.approx(float((got - wanted).norm() / wanted.norm()), rel=1e-3)
        size = -(-rows // BINS)
        assert head.attention.shape == head.kept.shape == (-(-rows // size),) * 2
        torch.testing.assert_close(head.attention.sum(1), torch.ones(len(head.attention)))
        block = slice(40 * size, 41 * size), slice(20 * size, 21 * size)
        assert float(head.kept[40, 20]) == pytest.approx(float(kept[block].float().mean()))
        assert float(head.attention[40, 20]) == pytest.approx(float(truth.mean(0)[block].sum() / size), rel=1e-4)


@pytest.mark.parametrize("n", [200, 700])
def test_figures_of_lists_of_tiles_against_whole_matrices(n: int) -> None:
    given, rows = call(n), n - TAIL
    prefill = CPUTilePrefill(PATTERN, 1.0, priced_rows=16)
    report = inspect_tiles(given, prefill, TAIL)
    q, k, v = given.q[:rows], given.k[:rows], given.v[:rows]
    lists = prefill.listed(q, k, prefill.bars(q, k, v, None, scale=given.scale), None, scale=given.scale)
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    for number, (head, listed) in enumerate(zip(report.heads, lists, strict=True)):
        row, key = torch.arange(rows)[:, None], torch.arange(rows)
        starts = (row // 32 * 32 - 23).clamp(min=0) // 16 * 16
        kept = causal & ((key < 16) | (key >= starts) | listed[row[:, 0] // 32])
        logits = torch.einsum("igd,jd->gij", q[:, 2 * number : 2 * number + 2].double(), k[:, number].double())
        logits *= given.scale
        truth = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        sparse = logits.masked_fill(~kept, -torch.inf).softmax(-1)
        wanted, got = truth @ v[:, number].double(), sparse @ v[:, number].double()
        assert 0.05 < head.density < 0.95
        assert head.density == pytest.approx(float(kept.sum() / causal.sum()), rel=1e-6)
        assert head.recall == pytest.approx(float((truth * kept).sum() / (2 * rows)), rel=1e-4)
        assert head.error == pytest.approx(float((got - wanted).norm() / wanted.norm()), rel=1e-3)
        assert head.tile_keys == pytest.approx(float(listed.sum(1).double().mean()))
        assert head.shares is not None
        assert head.shares[rows - 20 :].tolist() == [0.0] * 20
        behind = [tile for tile in range(len(listed)) if PATTERN.window_start(32 * tile) > 40]
        assert float(head.shares[40]) == pytest.approx(float(listed[behind, 40].double().mean()))
        assert len(head.columns) == len(head.diagonals) == 0


def test_lists_of_tiles_on_a_page(tmp_path: Path) -> None:
    report = inspect_tiles(call(300), CPUTilePrefill(PATTERN, 0.2, priced_rows=16, max_density=0.01), TAIL)
    assert report.handed_back
    file = pages.picture(tmp_path / "layer.png", report, 280)
    text = pages.page([("a", "b")], [], [report], [file], ["x"] * 300)
    assert "Listed keys in the text" in text
    assert "keys of a tile" in text
    assert "diagonals" not in text
    data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    assert [len(shares) for shares in data["shares"]] == [280, 280]
    assert 0 < max(data["shares"][0]) <= 1


def test_everything_kept_is_no_error() -> None:
    report = look(call(200), 1.0, max_density=0.5)
    assert report.handed_back
    for head in report.heads:
        assert head.recall == pytest.approx(1.0)
        assert head.density == 1.0
        assert head.error < 1e-5


def test_a_page_needs_nothing_else_and_tokens_are_text(tmp_path: Path) -> None:
    report = look(call(200), 0.3)
    file = pages.picture(tmp_path / "layer.png", report, 180)
    assert file.read_bytes().startswith(b"\x89PNG")
    text = pages.page([("a", "<b>")], ["mind & this"], [report], [file], ["</div><script>alert(1)</script>", "b"])
    assert not re.findall(r"https?://|@import|url\(|<link", text)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]{30})', text))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "mind &amp; this" in text


def test_pieces_of_text() -> None:
    class Fast:
        is_fast = True

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            return {"input_ids": [9, 1, 2, 3, 4], "offset_mapping": [(0, 0), (0, 2), (3, 5), (3, 5), (6, 7)]}

        def decode(self, ids: list[int]) -> str:
            return f"<{ids[0]}>"

    assert tokenised(Fast(), "ab cd e", 5) == ([9, 1, 2, 3, 4], ["<9>", "ab", " cd", "", " e"])
    assert tokenised(Fast(), "ab cd e", 2) == ([9, 1], ["<9>", "ab"])


def run(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.output


def test_the_needle_model(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text((ROOT / "README.md").read_text()[:3000])
    code, said = run("--model", NEEDLE, "--text", text, "--out", out, "--max-tokens", "400", "--layers", "1,3-3")
    assert code == 0, said
    assert "trained indexer needle" in said
    assert "min_seq_len is 8,192" in said
    found = json.loads((out / "inspect.json").read_text())
    assert [(one["layer"], one["kv_head"]) for one in found["heads"]] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert all(0 < one["recall"] <= 1.0001 and 0 < one["density"] <= 1 for one in found["heads"])
    assert sorted(file.name for file in out.iterdir()) == [
        "inspect.html", "inspect.json", "layer_001.png", "layer_003.png"
    ]  # fmt: skip


def test_the_needle_model_without_its_indexer(tmp_path: Path) -> None:
    """What would run without one: lists of tiles, by the platform's window and tiles and the user's price."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text((ROOT / "README.md").read_text()[:6000])
    options = json.dumps({"estimator": "priced", "price": 0.2, "window": 64})
    arguments = ("--text", text, "--out", out, "--max-tokens", "900", "--layers", "1,4", "--options", options)
    code, said = run("--model", NEEDLE, *arguments)
    assert code == 0, said
    assert "training-free (priced)" in said
    found = json.loads((out / "inspect.json").read_text())
    assert f"blocks={CPU.tile_q}x{CPU.tile_k}" in found["facts"]["options"]
    assert "price=0.2" in found["facts"]["options"]
    assert [(one["layer"], one["kv_head"]) for one in found["heads"]] == [(1, 0), (1, 1), (4, 0), (4, 1)]
    assert all(one["tile_keys"] >= 0 and "columns" not in one for one in found["heads"])
    assert any(one["density"] < 0.9 for one in found["heads"])


def test_a_picture_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text((ROOT / "README.md").read_text()[:3000])
    (out / "layer_000.png").mkdir(parents=True)
    code, said = run("--model", NEEDLE, "--text", text, "--out", out, "--max-tokens", "256", "--layers", "0")
    assert code == 1
    assert "layer_000.png" in said


def test_mistakes(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("too short")
    there = ("--model", NEEDLE, "--out", tmp_path / "out")
    for arguments, part in (
        (("--text", text), "expected at least 128; give a longer text"),
        (("--text", tmp_path / "none"), "No such file"),
        (("--text", text, "--layers", "4-7"), "[6, 7] cannot run sparse"),
        (("--text", text, "--layers", "x"), "expected layers such as 0,3-5"),
        (("--text", text, "--options", '{"presett": 1}'), "did you mean preset?"),
    ):
        code, said = run(*there, *arguments)
        assert code == 1
        assert part in said
