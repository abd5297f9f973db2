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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests of one world size together: their ranks stay alive between tests."""
    items.sort(key=lambda item: (getattr(item, "callspec", None) and item.callspec.params.get("world", 0)) or 0)
