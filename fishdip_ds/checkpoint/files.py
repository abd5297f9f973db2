"""Files that are either whole or not there: written aside, flushed, renamed; safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch

from fishdip_ds.errors import FishdipError

MANIFEST, STATE, LATEST = "manifest.json", "state.safetensors", "latest"


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], manifest: dict) -> None:
    """Commit a checkpoint folder at once and point ``latest`` at it afterwards. Local: one rank calls it.

    Raises:
        FishdipError: if the disk refuses; the folder is then not there and ``latest`` is unchanged.
    """
    from safetensors.torch import save_file

    aside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, aside / STATE)
        manifest = {**manifest, "files": {STATE: {"bytes": (aside / STATE).stat().st_size, "sha256": sha256(aside / STATE)}}}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for name in (STATE, MANIFEST):
            _flush(aside / name)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
        pointer = folder.parent / f".{LATEST}.partial"
        pointer.write_text(folder.name + "\n", encoding="utf-8")
        _flush(pointer)
        pointer.replace(folder.parent / LATEST)
    except Exception as error:  # safetensors has an error class of its own for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise FishdipError(f"could not save the checkpoint {folder}: {error}; free space or choose another folder. "
                           "Earlier checkpoints are untouched.") from error


def read_folder(load_dir: Path, tag: str | None) -> tuple[Path, dict]:
    """Find a checkpoint and check it against its manifest; returns (folder, manifest). Local.

    Raises:
        FishdipError: if there is none, or a file is missing, truncated or altered.
    """
    if tag is None:
        pointer = load_dir / LATEST
        if not pointer.is_file():
            raise FishdipError(f"no checkpoint in {load_dir}: there is no file {LATEST!r}; give the folder that holds it.")
        tag = pointer.read_text(encoding="utf-8").strip()
    folder = load_dir / tag
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FishdipError(f"the checkpoint {folder} has no readable {MANIFEST} ({error}); {_others(load_dir, tag)}") from None
    if manifest.get("format") != 1:
        raise FishdipError(f"{folder / MANIFEST} has format {manifest.get('format')!r}, this version reads 1; "
                           "update fishdip_ds.")
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
            raise FishdipError(f"{path} is missing, truncated or altered (its hash differs from the manifest); "
                               f"{_others(load_dir, tag)}")
    return folder, manifest


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _others(load_dir: Path, tag: str) -> str:
    others = sorted((p.parent.name for p in load_dir.glob(f"*/{MANIFEST}") if p.parent.name != tag
                     and not p.parent.name.startswith(".")), reverse=True)
    return f"earlier ones are {', '.join(others)}." if others else "there is no other checkpoint beside it."


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
