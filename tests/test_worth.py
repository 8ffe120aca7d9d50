# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""When chunks are no longer worth choosing for."""

from __future__ import annotations

from vllm_vsprefill.plan import Gate, plan_step
from vllm_vsprefill.stats import LayerCounts, Recorder
from vllm_vsprefill.worth import FIRST_PAUSE, LIMIT, LONGEST_PAUSE, PATIENCE, Worth


def test_steps_that_pay_go_on() -> None:
    worth = Worth()
    for density in (0.1, LIMIT, 0.99, 0.3, 0.99, 0.2):
        assert worth.ask()
        worth.observe(density)
    assert worth.density == 0.2


def test_steps_that_do_not_pay_pause_ever_longer() -> None:
    worth, pauses = Worth(), []
    for _ in range(PATIENCE + 6):
        skipped = 0
        while not worth.ask():
            skipped += 1
        pauses.append(skipped)
        worth.observe(0.95)
    assert pauses[:PATIENCE] == [0] * PATIENCE
    assert pauses[PATIENCE : PATIENCE + 3] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]
    assert max(pauses) == LONGEST_PAUSE
    while not worth.ask():
        pass
    worth.observe(0.2)
    worth.observe(0.95)
    assert worth.ask()


def test_a_late_report_does_not_lengthen_a_pause() -> None:
    """On a GPU the figures of a step arrive while later steps are planned."""
    worth = Worth()
    for _ in range(PATIENCE + 3):
        worth.observe(1.0)
    skipped = 0
    while not worth.ask():
        skipped += 1
    assert skipped == FIRST_PAUSE


def test_the_recorder_tells_what_a_step_computed() -> None:
    recorder = Recorder()
    recorder.record(0, LayerCounts(50, 100, sparse_chunks=1, given=40))  # 10 of 60 beside what the gate kept
    recorder.record(1, LayerCounts(100, 100, handed_back=1, given=40))
    recorder.publish()
    assert recorder.worth.density == (10 + 60) / 120
    recorder.record(0, LayerCounts(30, 30, given=30))
    recorder.publish()
    assert recorder.worth.density == (10 + 60) / 120  # nothing of this step could run sparse


def test_the_gate_says_so() -> None:
    gate = Gate(min_seq_len=100, dense_last_rows=8, worth=False)
    assert gate.reason(200, 300, True) == "not_worth"
    assert gate.reason(200, 50, True) == "short_sequence"
    plan = plan_step([0, 200], [300], [True], gate)
    assert not plan.sparse
    assert plan.shares == {("dense", "not_worth"): (1, 200)}
