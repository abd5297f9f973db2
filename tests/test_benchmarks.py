"""Benchmarks run at a small size; their figures are not looked at, but for what does not depend on time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_checkpoint_benchmark(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/checkpoint.py"), "--size", "tiny", "--steps", "1", "--saves",
                           "1", "--threads", "1", "--disk", str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["methods"]) == {"fish_dip", "full", "lora"} and not list(tmp_path.iterdir())
    assert all(row["bytes"] > 0 and row["seconds"] > 0 for row in result["methods"].values())
    assert result["bytes_ratio_full"] < 0.5 and result["methods"]["fish_dip"]["wait_ms"] > 0
