"""``--profile``: the trace holds the steps asked for and is written once."""

from __future__ import annotations

import json

import torch

from fishdip_ds.training.profiling import WARM_UP, StepTrace


def _run(trace: StepTrace, steps: int) -> None:
    for number in range(steps):
        with trace.step(), torch.profiler.record_function(f"step {number}"):
            torch.ones(3).add(1)
    trace.close()


def _steps_in(path) -> list[str]:
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    return sorted(name for name in names if name.startswith("step "))


def test_trace_holds_the_steps_after_the_warm_up(tmp_path):
    trace = StepTrace(2, tmp_path / "run")
    _run(trace, WARM_UP + 5)
    assert trace.written and _steps_in(trace.path) == [f"step {WARM_UP}", f"step {WARM_UP + 1}"]


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path):
    trace = StepTrace(9, tmp_path)
    _run(trace, WARM_UP + 1)
    assert _steps_in(trace.path) == [f"step {WARM_UP}"]


def test_nothing_is_written_unless_asked(tmp_path):
    trace = StepTrace(0, tmp_path)
    _run(trace, WARM_UP + 2)
    assert not trace.written and not trace.path.exists()
