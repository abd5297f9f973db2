"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with golden numbers and real data sets, named by ``FISHDIP_SHARED``; without it the test is skipped."""
    named = os.environ.get("FISHDIP_SHARED")
    if not named:
        pytest.skip("FISHDIP_SHARED names no folder with golden numbers and data sets")
    folder = Path(named).resolve()
    assert folder.is_dir(), f"FISHDIP_SHARED is {named!r}, but there is no such folder"
    return folder


PENDING = Path(__file__).with_name("pending.txt")
"""Tests that have not been seen to pass on an idle machine, one id a line; ``FISHDIP_PENDING=1`` runs them too."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave pending tests out, and run those of one world size together: their ranks stay alive between tests."""
    if "FISHDIP_PENDING" not in os.environ and PENDING.is_file():
        names = set(PENDING.read_text(encoding="utf-8").splitlines())
        left = [item for item in items if item.nodeid in names]
        if left:
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if item.nodeid not in names]
    items.sort(key=lambda item: (getattr(item, "callspec", None) and item.callspec.params.get("world", 0)) or 0)
