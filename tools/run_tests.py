"""Run the tests in two halves at the same time: many of them have one rank, and most machines two cores or more.

``python tools/run_tests.py [pytest flags]``; each half's output is printed when it has ended. Exit code 1 if one failed.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST = ("strategies", "active_learning", "planning", "zero3", "optim", "training")
"""Folders of the first half; all else is the second, so that no test can be forgotten."""


def halves() -> tuple[list[str], list[str]]:
    """Paths for pytest."""
    tests = ROOT / "tests"
    rest = [p for p in sorted(tests.iterdir()) if p.name not in FIRST
            and (p.name.startswith("test_") or (p.is_dir() and any(p.rglob("test_*.py"))))]
    return [str(tests / name) for name in FIRST], [str(p) for p in rest]


def run(number_and_paths: tuple[int, list[str]]) -> int:
    """One half; its exit code."""
    number, paths = number_and_paths
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sys.argv[1:], *paths], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"---- half {number} of the tests ----\n{done.stdout}", flush=True)
    return done.returncode


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        sys.exit(1 if any(list(pool.map(run, enumerate(halves(), start=1)))) else 0)
