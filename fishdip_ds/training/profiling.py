"""A trace of a few training steps, for ``chrome://tracing`` or https://ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

WARM_UP = 4
"""Steps before the trace: DeepSpeed records the order of modules in the first ones and plans by it in the next."""


class StepTrace:
    """Records ``steps`` optimizer steps of this rank after ``WARM_UP`` others into ``trace.json``. Local."""

    def __init__(self, steps: int, folder: Path) -> None:
        self._from, self._until, self._seen = WARM_UP, WARM_UP + steps, 0
        self.path = folder / "trace.json"
        self.written = False
        """Whether the trace is there."""
        self._profile: torch.profiler.profile | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each optimizer step."""
        if self._seen == self._from < self._until:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()
        yield
        self._seen += 1
        if self._seen == self._until:
            self.close()

    def close(self) -> None:
        """Write what has been recorded so far, if anything is still being recorded."""
        if self._profile is not None:
            self._profile.stop()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self.path))
            self._profile, self.written = None, True
