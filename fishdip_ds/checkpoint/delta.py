"""Sparse deltas: what a run changed, small enough to mail, put onto a plain model and taken off again.

A delta folder holds ``delta.safetensors`` (``index/<tensor>``: int32 flat indices, sorted; ``value/<tensor>``: the new
values, in the weight's dtype), ``delta.json`` (base model, fingerprint of every base tensor, hashes) and a model card.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fishdip_ds.checkpoint.files import STATE, read_folder, sha256
from fishdip_ds.errors import ConfigError, FishdipError
from fishdip_ds.fingerprint import fingerprint

DELTA, FACTS = "delta.safetensors", "delta.json"
RULES = ("refuse", "sum", "mean", "last")
"""How entries that several deltas change are merged: not at all, sum or mean of the differences, the last one's value."""


def export_delta(checkpoints: Path, out: Path, tag: str | None = None, facts: dict | None = None) -> Path:
    """Write the delta of a checkpoint: all ever-trained weights. Local; needs no model.

    Args:
        facts: what else ``delta.json`` should tell (base model's name, scores, flags).

    Raises:
        FishdipError: no readable checkpoint, or the disk refuses.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder, manifest = read_folder(checkpoints, tag)
    if manifest["dense"]:
        raise FishdipError(f'{folder} is of strategy "{manifest["strategy"]}", which trains every weight: a delta would be as '
                           "large as the model; train with --export and use the model folder that it writes.")
    tensors = {}
    with safe_open(folder / STATE, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  safe_open is no mapping
            kind, _, name = key.partition("/")
            if kind in ("ever", "value"):
                tensors[f"{'index' if kind == 'ever' else 'value'}/{name}"] = file.get_tensor(key)
    count = sum(v.numel() for k, v in tensors.items() if k.startswith("index/"))
    total = sum(_numel(t["shape"]) for t in manifest["tensors"].values())
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / DELTA)
        value = {"format": 1, "tensors": manifest["tensors"], "entries": count, "weights": total,
                 "steps": manifest["global_steps"], "strategy": manifest["strategy"],
                 "sha256": sha256(out / DELTA), **(facts or {})}
        (out / FACTS).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        (out / "README.md").write_text(_card(value), encoding="utf-8")
    except Exception as error:  # safetensors has an error class of its own for a full disk
        raise FishdipError(f"could not write the delta to {out}: {error}; free space or choose another folder.") from error
    return out


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _card(facts: dict) -> str:
    scores = "\n".join(f"| {split} | {metric} | {100 * value:.2f} |" for split, metrics in facts.get("scores", {}).items()
                       for metric, value in metrics.items() if "error" not in metric)
    return (f"# Sparse delta\n\nBase model: `{facts.get('base_model', 'unnamed')}`. Changes {facts['entries']:,} of "
            f"{facts['weights']:,} weights ({100 * facts['entries'] / facts['weights']:.3f} %), trained by strategy "
            f"`{facts['strategy']}` for {facts['steps']} steps.\n\n```python\nimport fishdip_ds\n"
            "applied = fishdip_ds.load_delta(model, \"this folder\")   # model: the base, loaded by transformers\n"
            "applied.revert()                                          # bitwise the base again\n```\n"
            + (f"\n| split | metric | % |\n|---|---|---|\n{scores}\n" if scores else ""))


@dataclass
class Delta:
    """A delta in memory."""

    name: str
    facts: dict
    entries: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Tensor -> (int64 flat indices, values)."""

    @classmethod
    def read(cls, folder: str | Path) -> Delta:
        """Read and check a delta folder.

        Raises:
            FishdipError: missing, truncated or altered files, or a newer format.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FishdipError(f"{folder} is no delta: {FACTS} cannot be read ({error}); give a folder made by "
                               "launch/export.py delta.") from None
        if facts.get("format") != 1:
            raise FishdipError(f"{folder / FACTS} has format {facts.get('format')!r}, this version reads 1; update "
                               "fishdip_ds.")
        if not (folder / DELTA).is_file() or sha256(folder / DELTA) != facts["sha256"]:
            raise FishdipError(f"{folder / DELTA} is missing, truncated or altered (its hash differs from {FACTS}); export it "
                               "again.")
        loaded = load_file(folder / DELTA)
        return cls(folder.name, facts, {name: (loaded[f"index/{name}"].long(), loaded[f"value/{name}"])
                                        for name in (k.removeprefix("index/") for k in loaded if k.startswith("index/"))})


@dataclass
class Applied:
    """Deltas that are on a model; ``revert`` takes them off."""

    model: nn.Module
    base: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Tensor -> (indices, the values that the base has there)."""

    @torch.no_grad()
    def revert(self) -> None:
        """Put back the base's values, bitwise. Once; a second call does nothing."""
        params = dict(self.model.named_parameters())
        for name, (at, values) in self.base.items():
            params[name].data.view(-1)[at] = values
        self.base = {}


@torch.no_grad()
def load_delta(model: nn.Module, *deltas: str | Path | Delta, rule: str = "refuse", weights: Sequence[float] | None = None,
               check: bool = True) -> Applied:
    """Put deltas onto a plain model in place; returns the handle that reverts. Local.

    Args:
        model: unsharded, with the base weights that the deltas were trained from.
        deltas: folders, or deltas that are read already (switching between those takes milliseconds).
        rule: what happens where several change one entry; see ``RULES``.
        weights: factor of each delta's differences, for the rules sum and mean; default 1.
        check: compare every base tensor's fingerprint first; leave it out when switching on a base that was checked.

    Raises:
        FishdipError: another model or other base weights; nothing has changed then. ConfigError: overlapping deltas under
            the rule ``refuse``, or an unknown rule.
    """
    if rule not in RULES:
        raise ConfigError(f"merge rule {rule!r} is unknown; known are {', '.join(RULES)}.")
    read = [d if isinstance(d, Delta) else Delta.read(d) for d in deltas]
    factors = list(weights) if weights is not None else [1.0] * len(read)
    if len(factors) != len(read):
        raise ConfigError(f"{len(factors)} weights were given for {len(read)} deltas; give one for each.")
    params = dict(model.named_parameters())
    for delta in read:
        _check(delta, params, check)
    merged = {name: _merge(name, [(d, f) for d, f in zip(read, factors, strict=True) if name in d.entries], params[name], rule)
              for name in {name: None for d in read for name in d.entries}}
    applied = Applied(model)
    for name, (at, values) in merged.items():
        flat = params[name].data.view(-1)
        applied.base[name] = (at, flat[at].clone())
        flat[at] = values
    return applied


def _check(delta: Delta, params: dict[str, nn.Parameter], fingerprints: bool) -> None:
    for name, facts in delta.facts["tensors"].items():
        if name not in params or list(params[name].shape) != facts["shape"]:
            raise FishdipError(f"delta {delta.name} is of another model: {name} of shape {facts['shape']} is not in this one; "
                               "load the model it was made with.")
        if fingerprints and fingerprint(params[name].data) != facts["base"]:
            raise FishdipError(f"delta {delta.name} was trained from other base weights: {name} differs; load the same "
                               f"pretrained model in {facts['dtype']}, and revert what is on it.")


def _merge(name: str, parts: list[tuple[Delta, float]], param: nn.Parameter,
           rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, new values) of one tensor under all its deltas."""
    device = param.device
    pieces = [(d.entries[name][0].to(device), d.entries[name][1].to(device), f) for d, f in parts]
    if len(pieces) == 1 and pieces[0][2] == 1.0:
        return pieces[0][0], pieces[0][1].to(param.dtype)
    every, place = torch.cat([at for at, _, _ in pieces]).unique(return_inverse=True)
    if rule == "refuse" and every.numel() < place.numel():
        names = ", ".join(d.name for d, _ in parts)
        raise ConfigError(f"deltas {names} both change {place.numel() - every.numel()} entries of {name}; choose a merge rule "
                          "(sum, mean or last).")
    base = param.data.view(-1)[every].float()
    if rule == "last":
        values = base.clone()
        for at, value, factor in pieces:
            where = torch.searchsorted(every, at)
            values[where] = base[where] + factor * (value.float() - base[where])
        return every, values.to(param.dtype)
    change, count = torch.zeros_like(base), torch.zeros_like(base)
    for at, value, factor in pieces:
        where = torch.searchsorted(every, at)
        change[where] += factor * (value.float() - base[where])
        count[where] += 1
    return every, (base + (change / count if rule == "mean" else change)).to(param.dtype)
