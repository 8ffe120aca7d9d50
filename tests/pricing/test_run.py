# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""``vsprefill calibrate`` without an indexer, as its users meet it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.distil import tiny
from tests.distil.conftest import NEEDLE
from vllm_vsprefill import cli
from vllm_vsprefill.config import VSPrefillConfig
from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.model import check
from vllm_vsprefill.pricing import run as module
from vllm_vsprefill.pricing.comparison import Comparison
from vllm_vsprefill.pricing.search import GRID, Goal, Measured

OPTIONS = {"window": 16, "sinks": 4, "dense_last_rows": 8}
SMALL = (
    "--data", "synthetic", "--length", 480, "--sequences", 1, "--chunk-lengths", 160,
    "--options", json.dumps(OPTIONS),
)  # fmt: skip


def run(*arguments: Any) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["calibrate", *(str(a) for a in arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, re.sub(r"\s+", " ", done.output)


def served(output: str) -> dict[str, Any]:
    """The options of VSPREFILL that a server is to be given, by the command that is shown."""
    found = re.search(r"serve with: (--attention-backend VSPREFILL --additional-config '.*?')", output)
    assert found is not None, output
    words = shlex.split(found[1])
    options: dict[str, Any] = json.loads(words[3])["vsprefill"]
    VSPrefillConfig.from_sources(options)
    return options


def test_a_price_for_a_density(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "price.json"
    code, output = run("--model", model_folder, "--density", 0.45, "--out", out, *SMALL)
    assert code == 0, output
    for part in ("2 layers can run sparse", "1 sequence of 480 tokens in chunks of 160; 360 rows", "below the floor"):
        assert part in output
    assert "a server runs texts of this length dense: min_seq_len is 8,192" in output
    record = json.loads(out.read_text())
    assert (record["complete"], record["reached"], record["rows"]) == (True, True, 360)
    assert record["served"]["window"] == 16
    assert record["floor"]["density"] == 1.0
    assert record["floor"]["top1"] > 0.99
    prices = {one["price"]: one for one in record["measured"]}
    best = prices[record["price"]]
    assert best["density"] <= 0.45
    assert all(one["density"] > 0.45 for price, one in prices.items() if price < record["price"])
    assert best["below_floor"] == pytest.approx(100 * (record["floor"]["top1"] - best["top1"]))
    assert served(output) == {**OPTIONS, "price": record["price"]} == record["additional_config"]["vsprefill"]
    assert str(tmp_path) not in out.read_text()
    assert str(model_folder.parent) not in out.read_text()


@pytest.mark.parametrize(("goal", "limit"), [("--top1", 12.0), ("--error", 0.003)])
def test_a_price_for_a_fidelity(model_folder: Path, tmp_path: Path, goal: str, limit: float) -> None:
    out = tmp_path / "price.json"
    code, output = run("--model", model_folder, goal, limit, "--out", out, *SMALL)
    assert code == 0, output
    record = json.loads(out.read_text())
    assert record["goal"] == {goal[2:]: limit}
    assert record["reached"] is True
    wanted = Goal(goal[2:], limit)  # type: ignore[arg-type]
    floor, *found = (
        Measured(*(one[name] for name in ("price", "density", "top1", "nll", "kl")))
        for one in (record["floor"], *record["measured"])
    )
    best = wanted.best(found, floor)
    assert best is not None
    assert best.price == record["price"] == served(output)["price"]
    assert f"{limit:g}" in output


def test_a_goal_out_of_reach_is_said_and_the_nearest_price_named(model_folder: Path) -> None:
    code, output = run("--model", model_folder, "--density", 0.01, *SMALL)
    assert code == 0, output
    found = re.search(r"out of reach: density at most 0.01; ([\d.]+) is the nearest price. Window, sinks", output)
    assert found is not None, output
    assert served(output)["price"] == float(found[1])


class Scripted:
    """Figures in the place of passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: int = 100) -> None:
        self.prices: list[float] = []
        self.stop_after = stop_after
        monkeypatch.setattr(Comparison, "dense", lambda comparison: None)
        monkeypatch.setattr(Comparison, "measure", lambda comparison, tiles, price, limit: self.measure(price))

    def measure(self, price: float) -> Measured:
        if len(self.prices) == self.stop_after:
            raise KeyboardInterrupt
        self.prices.append(price)
        return Measured(price, 1 / (1 + price), 0.99 - price / 20, price, price / 10)


def test_ctrl_c_keeps_what_was_measured(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted, out = Scripted(monkeypatch, stop_after=3), tmp_path / "price.json"
    code, output = run("--model", model_folder, "--top1", 2, "--out", out, *SMALL)
    assert code == 130
    assert scripted.prices == [0.0, GRID[15], GRID[23]]
    record = json.loads(out.read_text())
    assert record["complete"] is False
    assert [one["price"] for one in record["measured"]] == scripted.prices[1:]
    assert served(output)["price"] == GRID[15]
    assert "not complete: a price that was not tried may do better than 0.032" in output
    assert "stopped; what was measured, if anything, is above" in output
    scripted.prices = []
    code, output = run("--model", model_folder, "--density", 0.1, *SMALL)
    assert code == 130
    assert "not complete" in output
    assert "out of reach" not in output  # nobody knows yet
    scripted.prices, scripted.stop_after = [], 0
    out.unlink()
    code, output = run("--model", model_folder, "--top1", 2, "--out", out, *SMALL)
    assert code == 130
    assert "below the floor" not in output
    assert not out.exists()


def test_an_installed_indexer_does_not_take_the_price_away(monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch)
    code, output = run("--model", NEEDLE, "--top1", 2, *SMALL)
    assert code == 0, output
    assert "note: an indexer is installed for this model" in output
    options = served(output)
    assert options["estimator"] == "priced"
    code, output = run("--model", NEEDLE, "--top1", 2, *SMALL[:-1], '{"estimator": "priced"}')
    assert "an indexer is installed" not in output
    assert served(output)["estimator"] == "priced"


def test_short_texts_give_fewer_sequences(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch)
    text = tmp_path / "text.txt"
    text.write_text("The code of the kettle is 4711. " * 80)
    given = ("--model", model_folder, "--data", text, "--error", 0.1)
    code, output = run(*given, "--length", 400)
    assert code == 0, output
    assert "the text suffices for 1 of 2 sequences" in output
    code, output = run(*given, "--length", 4000)
    assert code == 1
    assert "too little text" in output
    code, output = run(*given, "--length", 400, "--dense-first", 300)
    assert code == 1
    assert "chunks of 100 rows (--chunk-lengths), of sequences of 400 tokens (--length)" in output
    assert "at least 128 rows are needed" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say what a price is to reach, by one of --top1 POINTS, --error KL and --density SHARE"),
        (("--top1", 1, "--density", 0.2), "say what a price is to reach, by one of"),
        (("--top1", 0), "--top1: expected a number greater than 0, found '0'"),
        (("--error", -1), "--error: expected a number greater than 0, found '-1'"),
        (("--recall", 0.9), "--recall is an option of an indexer's thresholds: give the indexer with --checkpoint"),
        (
            ("--top1", 1, "--per-head", "--preset", "fast"),
            "--per-head, --preset are options of an indexer's",
        ),
        (
            ("--top1", 1, "--checkpoint", "x"),
            "--top1 is an option of a price, which is looked for without",
        ),
        (("--top1", 1, "--options", '{"price": 1}'), "--options: price cannot be given where a price is looked for"),
        (("--top1", 1, "--options", '{"windw": 1}'), "unknown option 'windw'; did you mean window?"),
        (("--top1", 1, "--options", '{"estimator": "sampled"}'), "only the estimator 'priced' has a price"),
        (("--top1", 1, "--options", '{"enabled": false}'), "--options: enabled is false"),
        (("--top1", 1, "--options", '{"dense_layers": [0, 1]}'), "dense_layers leaves no layer"),
        (("--top1", 1, "--options", '{"dense_layers": [7]}'), "the model has 2 layers"),
        (("--top1", 1, "--out", "/nowhere/x.json"), "--out /nowhere/x.json: expected a file in a folder that is there"),
        (("--top1", 1, "--out", "/proc/x.json"), "--out /proc/x.json: cannot be written"),
        (("--top1", 1, "--length", 400, "--data", "missing.txt"), "--data missing.txt: no such file or folder"),
        (("--top1", 1, "--length", 100000), "--length 100000: the model has 4096 positions"),
        (("--top1", 1, "--model", "/nowhere/model"), "--model /nowhere/model: no such folder"),
        (("--top1", 1, "--device", "warp"), "--device warp"),
    ],
)
def test_what_is_wrong_is_said(model_folder: Path, arguments: tuple[Any, ...], message: str) -> None:
    code, output = run("--model", model_folder, "--data", "synthetic", *arguments)
    assert code == 1
    assert message in output
    assert "Traceback" not in output


def test_models_that_cannot_be_compared(model_folder: Path, tmp_path: Path) -> None:
    import transformers

    transformers.GptOssConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64, pad_token_id=0
    ).save_pretrained(tmp_path / "sinks")
    code, output = run("--model", tmp_path / "sinks", "--data", "missing.txt", "--top1", 1)
    assert code == 1
    assert "no price can be found for a gpt_oss model: layer 0 has attention sinks" in output
    for name, change in (
        ("headless", lambda tensors: tensors.pop("lm_head.weight")),
        ("nan", lambda tensors: tensors["model.layers.1.self_attn.k_proj.weight"].fill_(float("nan"))),
    ):
        folder = tmp_path / name
        shutil.copytree(model_folder, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        code, output = run("--model", folder, "--top1", 1, *SMALL)
        assert code == 1, output
        wanted = {
            "headless": "1 of its weights are not there and would be random: lm_head.weight",
            "nan": "logits that are no numbers with dense attention",
        }
        assert wanted[name] in output


def test_heads_that_no_kernel_has_are_refused_on_a_gpu() -> None:
    fingerprint, _ = check(tiny.config("qwen3", head_dim=20))
    options = VSPrefillConfig.from_sources({"block_q": 48})
    assert module.heads_of(fingerprint, options, torch.device("cpu")).head_size == 20
    with pytest.raises(DistilError, match=r"run stock on CUDA: its head size 20 is not a multiple of 8; block_q is 48"):
        module.heads_of(fingerprint, options, torch.device("cuda"))
