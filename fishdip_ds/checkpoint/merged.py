"""Deltas merged into their base as an ordinary transformers folder, from files alone: no engine, never the whole model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from fishdip_ds.checkpoint.base_files import INDEX, BaseFiles
from fishdip_ds.checkpoint.delta import Delta, packed_kind
from fishdip_ds.checkpoint.rules import check_rule, merge
from fishdip_ds.errors import ConfigError, FishdipError
from fishdip_ds.zero3.packed import round_trip

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".onnx", ".gguf")
"""Files of a model folder that hold weights: those of the base must not stand beside the merged ones."""


def write_merged(base: Path, deltas: Sequence[Delta], out: Path, *, max_shard_size: str | int = "5GB", rule: str = "refuse",
                 weights: Sequence[float] | None = None) -> Path:
    """Write the safetensors folder ``base`` to ``out`` with the deltas' entries changed. Local.

    Memory: one shard at a time, of which only changed tensors are copied; the others stay mapped from the base's files.
    Weights that were trained on in 4 or 8 bits are written as what that rounds them to, so that the folder is the model that
    was trained.

    Args:
        max_shard_size: bytes of tensors in a file, or text such as ``"500MB"``; one tensor is never cut.
        rule, weights: see ``fishdip_ds.checkpoint.rules``.

    Raises:
        FishdipError: other base weights, no safetensors in ``base``, a tensor that its files lack, or the disk refuses.
        ConfigError: deltas that overlap under ``refuse``, a rule or size that cannot be read.
    """
    from safetensors.torch import save_file

    factors, limit = check_rule(rule, weights, len(deltas)), parse_size(max_shard_size)
    files = BaseFiles(base, deltas[0].facts["tensors"])
    for delta in deltas:
        BaseFiles(base, delta.facts["tensors"]).check(f"delta {delta.name}", delta.facts.get("base_model"))
    shards = _plan(files, limit)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = ["model.safetensors"] if len(shards) == 1 else names
    total = 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        for keys, file in zip(shards, names, strict=True):
            tensors = {key: _changed(files, key, deltas, rule, factors) for key in keys}
            total += sum(t.numel() * t.element_size() for t in tensors.values())
            save_file(tensors, out / file, metadata={"format": "pt"})
            del tensors
        if len(shards) > 1:
            places = {key: file for keys, file in zip(shards, names, strict=True) for key in keys}
            value = {"metadata": {"total_size": total}, "weight_map": places}
            (out / INDEX).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        for path in base.iterdir():
            if path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
                shutil.copy2(path, out / path.name)
        (out / "README.md").write_text(_card(deltas, rule), encoding="utf-8")  # the base's own would tell of another model
    except (FishdipError, ConfigError):
        raise
    except Exception as error:  # safetensors has an error class of its own for a full disk
        raise FishdipError(f"could not write the merged model to {out}: {error}; free space or choose another "
                           "folder.") from None
    return out


def _card(deltas: Sequence[Delta], rule: str) -> str:
    """What the folder holds, as a model card."""
    named = deltas[0].facts.get("base_model", "unnamed")
    lines = [f"# Finetuned from `{named}`", "", f"The base's weights with the entries of {len(deltas)} sparse delta"
             f"{'s' if len(deltas) > 1 else ''} in place" + (f" (rule `{rule}`)" if len(deltas) > 1 else "") + ":", ""]
    lines += [f"* {d.facts['entries']:,} of {d.facts['weights']:,} weights, strategy `{d.facts['strategy']}`, "
              f"{d.facts['steps']} steps" for d in deltas]
    kind = packed_kind(deltas[0].facts["tensors"])
    if kind is not None:
        lines += ["", f"Trained on a base in {kind}: linear weights are what that rounds them to."]
    return "\n".join(lines) + "\n"


def _changed(files: BaseFiles, key: str, deltas: Sequence[Delta], rule: str, factors: Sequence[float]) -> torch.Tensor:
    stored, name = files.read(key), files.name_of(key)
    if name is None:
        return stored
    kinds = {d.facts["tensors"][name].get("packed") for d in deltas}
    if len(kinds) > 1:
        raise ConfigError(f"of deltas {', '.join(d.name for d in deltas)} some were trained on a base in 4 or 8 bits and some "
                          "were not; merge only deltas of one kind.")
    kind = kinds.pop()
    if kind is not None:
        stored = round_trip(stored.to(getattr(torch, files.facts[name]["dtype"])), kind).to(stored.dtype)
    if not any(name in d.entries for d in deltas):
        return stored
    flat = stored.reshape(-1)
    at, values = merge(name, deltas, flat.to(getattr(torch, files.facts[name]["dtype"])), rule, factors)
    flat = flat.clone()
    flat[at] = values.to(flat.dtype)
    return flat.view(stored.shape)


def _plan(files: BaseFiles, limit: int) -> list[list[str]]:
    """Keys of each shard, in the order of the base's files, filled up to ``limit`` bytes."""
    from safetensors import safe_open

    shards, room = [[]], limit
    for path in dict.fromkeys(files.places.values()):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  safe_open is no mapping
                piece = file.get_slice(key)
                bits = re.search(r"\d+", piece.get_dtype())  # F32, BF16, F8_E4M3, BOOL
                size = prod(piece.get_shape()) * (int(bits[0]) if bits else 8) // 8
                if size > room and shards[-1]:
                    shards.append([])
                    room = limit
                shards[-1].append(key)
                room -= size
    return shards


def parse_size(text: str | int) -> int:
    """Bytes of ``"5GB"``, ``"20 KB"`` or a number, decimal as transformers counts them.

    Raises:
        ConfigError: anything else, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(text).upper())
    size = int(float(found[1]) * 1000 ** ("KMGT".index(found[2]) + 1 if found[2] else 0)) if found else 0
    if size < 1:
        raise ConfigError(f"the shard size {text!r} is no number of bytes; give one such as 5GB or 500MB.")
    return size
