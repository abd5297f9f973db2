"""Put what a run trained into a plain model, without an engine: a checkpoint for good, deltas for a while."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fishdip_ds.checkpoint.delta import Delta, packed_kind
from fishdip_ds.checkpoint.files import STATE, read_folder
from fishdip_ds.checkpoint.rules import check_rule, merge
from fishdip_ds.errors import FishdipError
from fishdip_ds.fingerprint import fingerprint
from fishdip_ds.zero3.packed import round_trip

logger = logging.getLogger("fishdip_ds")


@torch.no_grad()
def apply_checkpoint(model: nn.Module, load_dir: Path, tag: str | None = None) -> Path:
    """Write the ever-trained values of a checkpoint into ``model`` in place; returns the checkpoint's folder. Local.

    Weights of a base that was trained on in 4 or 8 bits become what that rounds them to, in their own dtype.

    Args:
        model: unsharded, with the base weights and dtypes that the run started from.

    Raises:
        FishdipError: no checkpoint, a damaged one, or one of another model or other base weights; nothing has changed then.
    """
    from safetensors import safe_open

    folder, manifest = read_folder(load_dir, tag)
    params = dict(model.named_parameters())
    _check(str(folder), manifest["tensors"], params, fingerprints=True)
    for name, facts in manifest["tensors"].items():
        if "packed" in facts:
            params[name].data = round_trip(params[name].data, facts["packed"])
    with safe_open(folder / STATE, framework="pt") as file:
        dense = manifest.get("dense", False)  # then every weight is there
        for key in file.keys():  # noqa: SIM118  safe_open is no mapping
            kind, _, name = key.partition("/")
            if kind == "value":
                at = slice(None) if dense else file.get_tensor(f"ever/{name}").long().to(params[name].device)
                params[name].data.view(-1)[at] = file.get_tensor(key).to(params[name])
    return folder


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
        model: unsharded, with the base weights that the deltas were trained from. A delta that was trained on a base in 4
            or 8 bits goes onto the unrounded base: it changes no other entry, so scores differ a little from training's.
        deltas: folders, or deltas that are read already (switching between those takes milliseconds).
        rule: what happens where several change one entry; see ``fishdip_ds.checkpoint.rules``.
        weights: for the rule of that name, the factor of each delta's differences.
        check: compare every base tensor's fingerprint first; leave it out when switching on a base that was checked.

    Raises:
        FishdipError: another model or other base weights; nothing has changed then. ConfigError: overlapping deltas under
            the rule ``refuse``, an unknown rule, or weights that do not fit.
    """
    read = [d if isinstance(d, Delta) else Delta.read(d) for d in deltas]
    factors = check_rule(rule, weights, len(read))
    params = dict(model.named_parameters())
    for delta in read:
        _check(f"delta {delta.name}", delta.facts["tensors"], params, check)
        kind = packed_kind(delta.facts["tensors"])
        if kind is not None and check:
            logger.warning(f"delta {delta.name} was trained on a base in {kind}: on the full base outputs differ a little "
                           "from training's; launch/export.py merged gives the very model that was trained.")
    names = list({name: None for d in read for name in d.entries})
    merged = {name: merge(name, read, params[name].data.view(-1), rule, factors) for name in names}
    applied = Applied(model)
    for name, (at, values) in merged.items():
        flat = params[name].data.view(-1)
        applied.base[name] = (at, flat[at])
        flat[at] = values
    return applied


def _check(whose: str, tensors: Mapping[str, dict], params: Mapping[str, nn.Parameter], fingerprints: bool) -> None:
    """Refuse a model that is not the base."""
    for name, facts in tensors.items():
        if name not in params or list(params[name].shape) != facts["shape"]:
            raise FishdipError(f"{whose} is of another model: {name} of shape {facts['shape']} is not in this one; "
                               "load the model it was made with.")
        if fingerprints and fingerprint(params[name].data) != facts["base"]:
            raise FishdipError(f"{whose} was trained from other base weights: {name} differs; load the same pretrained model "
                               f"in {facts['dtype']}, and revert what is on it.")
