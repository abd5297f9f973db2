"""What a benchmark ran on and with: part of every result."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def about() -> dict[str, object]:
    """Processor, cores, GPU, versions, and the commit (``+`` where files differ from it; None outside a checkout)."""
    import torch

    out = {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version(),
           "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
           "bf16_instructions": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()), "commit": _commit()}
    for package in ("torch", "deepspeed", "transformers", "peft", "bitsandbytes"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = None
    return out


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "") or None
    except OSError:
        return None
