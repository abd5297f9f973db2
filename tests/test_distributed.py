"""Joining ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ranks import run


def _port() -> str:
    return os.environ["MASTER_PORT"]


@pytest.mark.parametrize("world", [1, 2])
def test_no_shared_memory_is_left_behind(world):
    port = run(world, _port)[0]
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
