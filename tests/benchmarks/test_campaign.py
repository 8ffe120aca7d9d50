# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Campaigns of measurements: what fails or takes too long does not keep the rest from running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.campaign import read_steps
from vllm_vsprefill.eval.settings import chosen

HERE = Path(__file__).resolve().parents[2]

PLAN = """# what steps do
fails - python -c 'import sys; sys.exit(3)'
hangs 1 sh -c 'sleep 600 & echo $! > {out}/child; wait'

missing 5 no-such-program-anywhere
works - python -c 'import sys; print(sys.argv[1:])' {texts*} {{literal}} {model}/x
dear 5000 python -c pass
"""
VALUES = {"texts": "a b.txt,c.txt", "model": "m", "out": "o"}


def campaign(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    sets = [word for name in ("texts", "model") for word in ("--set", f"{name}={VALUES[name]}")]
    command = [sys.executable, "-m", "benchmarks.campaign", str(folder / "plan.txt"), "--out", str(folder / "out")]
    return subprocess.run([*command, *sets, *more], cwd=HERE, capture_output=True, text=True, check=False)


def test_a_step_for_another_model_is_not_done(tmp_path: Path) -> None:
    (tmp_path / "plan.txt").write_text("works - python -c 'import sys; print(sys.argv[1:])' {model}\n")
    for models in (["one"], ["one"], ["two"]):
        done = campaign(tmp_path, *(word for model in models for word in ("--set", f"model={model}")))
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "works.log").read_text() == "['one']\n['two']\n"


@pytest.mark.parametrize(
    ("line", "report", "more", "said"),
    [
        ("a/b - true", None, (), "plan.txt:1: 'a/b' cannot be the name of a log"),
        ("a - echo 'b", None, (), "plan.txt:1: No closing quotation"),
        ("a - true", "[]", (), "campaign.json is damaged"),
        ("a - true", None, ("--set", "foo"), "--set foo: expected NAME=VALUE"),
        ("a - true", None, ("--out", "{folder}/plan.txt"), "plan.txt: File exists"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, line: str, report: str | None, more: tuple[str, ...], said: str) -> None:
    (tmp_path / "plan.txt").write_text(line + "\n")
    if report is not None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "campaign.json").write_text(report)
    done = campaign(tmp_path, *(word.format(folder=tmp_path) for word in more))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"


def test_every_step_gets_its_turn_and_what_is_done_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "plan.txt").write_text(PLAN)
    begin = time.monotonic()
    done = campaign(tmp_path, "--seconds", "300")
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - begin < 100
    steps = json.loads((tmp_path / "out" / "campaign.json").read_text())["steps"]
    assert {name: step["rc"] for name, step in steps.items()} == {
        "fails": 3,
        "hangs": None,
        "missing": None,
        "works": 0,
    }
    assert "no-such-program" in steps["missing"]["error"]
    assert (tmp_path / "out" / "works.log").read_text() == "['a b.txt', 'c.txt', '{literal}', 'm/x']\n"
    assert "dear: left out" in done.stdout
    child = int((tmp_path / "out" / "child").read_text())
    deadline = time.monotonic() + 20
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(child)
    whole = (tmp_path / "out" / "campaign.json").read_text()
    (tmp_path / "out" / "campaign.json").write_text(whole[:-9])
    damaged = campaign(tmp_path)
    assert damaged.returncode == 1
    assert "is damaged" in damaged.stderr
    assert "Traceback" not in damaged.stderr
    (tmp_path / "out" / "campaign.json").write_text(whole)
    again = campaign(tmp_path, "--only", "works,fails")
    assert again.returncode == 1
    assert "works" not in again.stdout
    assert "fails: exit status 3" in again.stdout


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("a 5 x {nothing}", "needs --set nothing"),
        ("a 5 x {out.parts}", "needs --set"),
        ("a 5 x\na 6 y", "one name"),
        ("a five x", "expected name, seconds"),
        ("a 5", "expected name, seconds"),
        ("# nothing", "no step"),
    ],
)
def test_a_plan_that_is_wrong_is_refused(tmp_path: Path, plan: str, message: str) -> None:
    (tmp_path / "plan.txt").write_text(plan)
    with pytest.raises(ValueError, match=message):
        read_steps(tmp_path / "plan.txt", VALUES)
    done = campaign(tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_plans_of_the_repository_can_be_read() -> None:
    values = dict.fromkeys(("model", "yarn", "texts", "essays", "out"), "x")
    plans = sorted((HERE / "benchmarks" / "campaigns").glob("*.txt"))
    assert plans
    for plan in plans:
        for step in read_steps(plan, values):
            if step.command[1] == "-m":
                module = HERE / step.command[2].replace(".", "/")
                assert step.command[2] == "pytest" or module.is_dir() or module.with_suffix(".py").is_file()
            if "--compare" in step.command:
                names = tuple(step.command[step.command.index("--compare") + 1].split(","))
                file = step.command[step.command.index("--settings") + 1] if "--settings" in step.command else None
                chosen(names, None if file is None else HERE / file)
            for word in step.command:
                assert not word.startswith("tests/") or (HERE / word).is_file(), word
