# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Whole runs on a tiny model: resuming, stopping, failing, reporting."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distil import tiny
from vllm_vsprefill.checkpoint import CheckpointError, load_checkpoint
from vllm_vsprefill.distil import state
from vllm_vsprefill.distil.data import PackedTokens
from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.model import Teacher, wrap
from vllm_vsprefill.distil.options import TrainOptions, train_options
from vllm_vsprefill.distil.trainer import Interrupted, Trainer, learning_rate

for _name in ("accelerate", "matplotlib", "tensorboard"):
    pytest.importorskip(_name)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return wrap(tiny.model("qwen3"), "tiny")


def tokens(seed: int, count: int = 4000) -> PackedTokens:
    return PackedTokens(np.random.default_rng(seed).integers(4096, size=count, dtype=np.uint32), f"noise {seed}")


def options(**changes: Any) -> TrainOptions:
    student = {"hidden_size": 8, **changes.pop("student", {})}
    values = {
        "max_length": 64,
        "min_length": 32,
        "chunk_lengths": (16, 0),
        "steps": 6,
        "learning_rate": 5e-3,
        "compute_dtype": "float32",
        "validate_every": 3,
        "validation_sequences": 2,
        "save_every": 2,
        "calibrate": False,
    }
    return train_options(student, **{**values, **changes})


def trainer(teacher: Teacher, out: Path, *, resume: bool = False, data: int = 0, **changes: Any) -> Trainer:
    from accelerate import Accelerator

    lines: list[str] = []
    made = Trainer(
        options(**changes),
        teacher,
        tokens(data),
        tokens(99),
        out,
        Accelerator(cpu=True),
        resume=resume,
        log=lines.append,
    )
    made.lines = lines  # type: ignore[attr-defined]
    return made


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_checkpoint_logs_and_a_report(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_vsprefill.distil.trainer.MIN_SEQ_LEN", 0)
    out = tmp_path / "run"
    trainer(teacher, out, calibrate=True, accumulation=2).run()
    loaded = load_checkpoint(out, expected=teacher.fingerprint)
    assert loaded.config.identity == teacher.identity
    assert loaded.config.identity.name == "tiny"
    assert loaded.config.identity.weights is not None
    assert loaded.config.layers == (0, 1)
    assert set(loaded.config.thresholds) == {"accurate", "balanced", "fast"}
    assert loaded.config.training["steps"] == 6
    assert 0 < float(loaded.config.training["validation_recall"]) <= 1
    log = history(out)
    assert [e["step"] for e in log if "loss" in e] == [1, 2, 3, 4, 5, 6]
    checked = [e for e in log if "validation" in e]
    assert [e["step"] for e in checked] == [3, 6]
    recall = np.array(checked[0]["validation"]["recall"])
    assert recall.shape == (2, 2)
    assert list((out / "tensorboard").glob("events.*"))
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page  # nothing is fetched
    report = json.loads((out / "report.json").read_text())
    assert set(report["thresholds"]) == {"accurate", "balanced", "fast"}
    assert not list(out.rglob("*.pt"))


def test_a_resumed_run_is_the_uninterrupted_one(teacher: Teacher, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(teacher, whole).run()
    broken = trainer(teacher, parts)
    take = broken.step
    seen = 0

    def fail_at_step_6() -> Any:
        nonlocal seen
        seen += 1
        if seen == 6:
            raise RuntimeError("power cut")
        return take()

    broken.step = fail_at_step_6  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="power cut"):
        broken.run()
    again = trainer(teacher, parts, resume=True)
    assert again.progress.step == 4
    again.run()
    assert history(whole) == history(parts)
    for one, other in zip(load_checkpoint(whole).layers.values(), load_checkpoint(parts).layers.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_short_sequences_do_not_set_thresholds(teacher: Teacher, tmp_path: Path) -> None:
    made = trainer(teacher, tmp_path, steps=2, calibrate=True)
    made.run()
    assert load_checkpoint(tmp_path).config.thresholds == {}
    assert any("not calibrated: sequences of 64 tokens" in line for line in made.lines)  # type: ignore[attr-defined]
    assert "run vsprefill calibrate" in (tmp_path / "report.html").read_text()


@pytest.mark.gpu
def test_resuming_on_cuda(tmp_path: Path) -> None:
    from accelerate import Accelerator

    def run(out: Path, resume: bool) -> Trainer:
        teacher = wrap(tiny.model("qwen3").to("cuda", torch.bfloat16), "tiny")
        o = options(compute_dtype="bfloat16")
        return Trainer(o, teacher, tokens(0), tokens(99), out, Accelerator(), resume=resume, log=lambda line: None)

    run(tmp_path / "whole", False).run()
    broken = run(tmp_path / "parts", False)
    take = broken.step

    def step() -> Any:
        if broken.progress.step == 4:
            raise RuntimeError("power cut")
        return take()

    broken.step = step  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="power cut"):
        broken.run()
    run(tmp_path / "parts", True).run()
    for one, other in zip(history(tmp_path / "whole"), history(tmp_path / "parts"), strict=True):
        assert one.get("loss") == pytest.approx(other.get("loss"), rel=1e-4)


def test_only_the_same_run_is_resumed(teacher: Teacher, tmp_path: Path) -> None:
    trainer(teacher, tmp_path, steps=2, save_every=1).run()
    with pytest.raises(DistilError) as error:
        trainer(teacher, tmp_path, resume=True, steps=3, learning_rate=1e-2, data=1, save_every=5)
    for part in ("steps: 2 in the run so far, 3 now", "learning_rate: 0.005", "data: "):
        assert part in str(error.value)
    assert "save_every" not in str(error.value)
    with pytest.raises(DistilError, match="holds the state of another run"):
        trainer(teacher, tmp_path)
    with pytest.raises(DistilError, match="holds no state of a run to go on from"):
        trainer(teacher, tmp_path / "elsewhere", resume=True)
    tuned = wrap(tiny.model("qwen3", seed=1), "tiny")
    with pytest.raises(DistilError, match="model_weights: "):
        trainer(tuned, tmp_path, resume=True, steps=2, save_every=1)
    low = wrap(tiny.model("qwen3").bfloat16().float().half(), "tiny")
    with pytest.raises(DistilError, match="model_weights: "):
        trainer(low, tmp_path, resume=True, steps=2, save_every=1)
    other = wrap(tiny.model("llama3.1"), "other")
    with pytest.raises(DistilError, match="model: 'tiny' in the run so far"):
        trainer(other, tmp_path, resume=True, steps=2)


def test_a_state_of_another_version_is_not_resumed(teacher: Teacher, tmp_path: Path) -> None:
    trainer(teacher, tmp_path, steps=1).run()
    file = next(tmp_path.glob("state/step-*/*.json"))
    found = json.loads(file.read_text())
    found["options"]["temperature"] = 2.0
    file.write_text(json.dumps(found))
    with pytest.raises(DistilError, match=r"another version of this package wrote the state.*temperature"):
        trainer(teacher, tmp_path, steps=1, resume=True)


def test_resuming_takes_the_newest_state_that_is_whole(teacher: Teacher, tmp_path: Path) -> None:
    trainer(teacher, tmp_path, steps=4, save_every=2).run()
    (tmp_path / "state" / "step-00000004" / "tensors.safetensors").write_bytes(b"cut off")
    assert trainer(teacher, tmp_path, resume=True, steps=4).progress.step == 2


def test_a_signal_stops_after_the_step_and_saves(teacher: Teacher, tmp_path: Path) -> None:
    made = trainer(teacher, tmp_path, save_every=100)
    take = made.step

    def step() -> Any:
        if made.progress.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return take()

    made.step = step  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped after step 2 of 6; go on with --resume"):
        made.run()
    assert signal.getsignal(signal.SIGINT) is before
    again = trainer(teacher, tmp_path, resume=True)
    assert again.progress.step == 2
    again.run()
    assert load_checkpoint(tmp_path).config.training["steps"] in (3, 6)


@pytest.mark.parametrize("where", ["optimiser", "save"])
def test_a_signal_is_not_lost_wherever_it_comes(teacher: Teacher, tmp_path: Path, where: str) -> None:
    made = trainer(teacher, tmp_path, save_every=1)
    owner, name = (made.optimiser, "step") if where == "optimiser" else (made, "save_state")
    take, seen = getattr(owner, name), 0

    def interrupted() -> None:
        nonlocal seen
        take()
        seen += 1
        if seen == 2:
            os.kill(os.getpid(), signal.SIGINT)

    setattr(owner, name, interrupted)
    with pytest.raises(Interrupted):
        made.run()
    # After the file of step 2 was written, the step after it is the one in progress.
    assert made.progress.step == (2 if where == "optimiser" else 3)
    again = trainer(teacher, tmp_path, resume=True, save_every=1)
    assert again.progress.step == made.progress.step


def test_a_second_signal_stops_at_once(teacher: Teacher, tmp_path: Path) -> None:
    made = trainer(teacher, tmp_path)

    def step() -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    made.step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        made.run()


def test_nan_stops_the_run_before_it_reaches_the_weights(teacher: Teacher, tmp_path: Path) -> None:
    made = trainer(teacher, tmp_path, validate_every=2)
    learn = made.distiller.learn

    def poisoned(*args: Any) -> Any:
        figures = learn(*args)
        if made.progress.step == 3:
            figures[:, 1] = float("nan")
        return figures

    made.distiller.learn = poisoned  # type: ignore[method-assign, assignment]
    with pytest.raises(DistilError, match=r"not a number at step 4 \(layers \[1\]\).*--learning-rate"):
        made.run()
    loaded = load_checkpoint(tmp_path)  # the one of step 2
    assert loaded.config.training["steps"] == 2
    again = trainer(teacher, tmp_path, resume=True, validate_every=2)
    assert again.progress.step == 2
    again.run()


def test_a_gradient_that_is_not_finite_is_found_as_well(teacher: Teacher, tmp_path: Path) -> None:
    made = trainer(teacher, tmp_path)
    learn = made.distiller.learn

    def poisoned(*args: Any) -> Any:
        figures = learn(*args)
        next(iter(made.student.parameters())).grad[0] = float("inf")  # type: ignore[index]
        return figures

    made.distiller.learn = poisoned  # type: ignore[method-assign, assignment]
    with pytest.raises(DistilError, match="only a gradient"):
        made.run()


def test_a_validation_that_is_not_a_number_stops_the_run(teacher: Teacher, tmp_path: Path) -> None:
    made = trainer(teacher, tmp_path)
    real = made.validate

    def poisoned() -> Any:
        found = real()
        if made.progress.step == 6:
            found.loss[1] = float("nan")
        return found

    made.validate = poisoned  # type: ignore[method-assign]
    with pytest.raises(DistilError, match=r"validation loss is not a number at step 6 \(layers \[1\]\)"):
        made.run()
    assert load_checkpoint(tmp_path).config.training["steps"] == 3


def test_a_log_that_was_cut_off_does_not_keep_a_run_from_going_on(teacher: Teacher, tmp_path: Path) -> None:
    trainer(teacher, tmp_path / "whole").run()
    trainer(teacher, tmp_path / "cut").run()
    log = tmp_path / "cut" / "training.jsonl"
    shutil.rmtree(tmp_path / "cut" / "state" / "step-00000006")
    log.write_text(log.read_text()[:-40])
    trainer(teacher, tmp_path / "cut", resume=True).run()
    assert history(tmp_path / "cut") == history(tmp_path / "whole")


def test_a_disk_that_is_full_for_tensorboard(teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(teacher, tmp_path)
    from torch.utils.tensorboard import SummaryWriter

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with pytest.raises(DistilError, match="TensorBoard log could not be written: no space left"):
        made.run()


@pytest.mark.parametrize("what", ["state", "checkpoint"])
def test_a_full_disk_is_said_and_the_last_good_files_survive(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    import safetensors.torch

    made = trainer(teacher, tmp_path, validate_every=2, save_every=2)
    real = safetensors.torch.save_file
    failing = "tensors.safetensors" if what == "state" else "indexer.safetensors"

    def full(tensors: Any, file: Any, **rest: Any) -> None:
        if made.progress.step >= 4 and Path(file).name == failing:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, file, **rest)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    made._validated = lambda found: made.publish(found, {})  # type: ignore[method-assign]
    with pytest.raises(DistilError, match="no space left on the device") as error:
        made.run()
    assert "intact" in str(error.value)
    assert load_checkpoint(tmp_path).config.training["steps"] == (4 if what == "state" else 2)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.writing*"))
    again = trainer(teacher, tmp_path, resume=True, validate_every=2)
    assert again.progress.step == 2
    again.run()


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(DistilError, match="no space left"), state.writing("a file", ""), full.open("w") as file:
        file.write("x" * 100_000)


def test_early_stop_keeps_the_best(teacher: Teacher, tmp_path: Path) -> None:
    made = trainer(teacher, tmp_path, steps=40, validate_every=1, patience=2, save_every=100)
    real = made.validate

    def best_at_step_2() -> Any:
        found = real()
        found.loss[:] = {1: 2.0, 2: 1.0}.get(made.progress.step, 3.0)
        return found

    made.validate = best_at_step_2  # type: ignore[method-assign]
    made.run()
    assert made.progress.step == 4
    assert made.progress.best_step == 2
    assert any("stopped early" in line for line in made.lines)  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "report.json").read_text())["progress"]["best_step"] == 2
    assert state.latest(tmp_path) is not None


def test_other_inputs_train_but_are_not_served(teacher: Teacher, tmp_path: Path) -> None:
    trainer(teacher, tmp_path, steps=2, student={"inputs": "kvq"}, calibrate=True).run()
    assert (tmp_path / "report.html").is_file()
    with pytest.raises(CheckpointError, match=r"reads k\+v\+q of a token, but only k\+v can be served"):
        load_checkpoint(tmp_path)


def test_the_schedule_warms_up_and_falls() -> None:
    o = options(steps=100, learning_rate=1.0)
    rates = [learning_rate(o, step) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(o.final_share, abs=2e-3)


def test_lengths_are_halves_down_to_the_shortest() -> None:
    assert options(max_length=100, min_length=20).lengths() == [100, 50, 25]
    assert options(max_length=64, min_length=64).lengths() == [64]


def test_wrong_options_are_reported_together() -> None:
    with pytest.raises(DistilError) as error:
        train_options({"loss": "l1", "hidden_size": 0}, steps=0, max_length=64, min_length=128)
    for part in ("--loss", "'l1'", "--hidden-size", "--steps"):
        assert part in str(error.value)
    with pytest.raises(DistilError, match=r"min_length \(128\) must not exceed max_length \(64\)"):
        train_options({}, max_length=64, min_length=128)
