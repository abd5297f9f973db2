"""Put what a checkpoint trained into a plain model, without an engine."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fishdip_ds.checkpoint.files import STATE, read_folder
from fishdip_ds.errors import FishdipError
from fishdip_ds.fingerprint import fingerprint


@torch.no_grad()
def apply_checkpoint(model: nn.Module, load_dir: Path, tag: str | None = None) -> Path:
    """Write the ever-trained values of a checkpoint into ``model`` in place; returns the checkpoint's folder. Local.

    Args:
        model: unsharded, with the base weights and dtypes that the run started from.

    Raises:
        FishdipError: no checkpoint, a damaged one, or one of another model or other base weights; nothing has changed then.
    """
    from safetensors import safe_open

    folder, manifest = read_folder(load_dir, tag)
    params = dict(model.named_parameters())
    for name, facts in manifest["tensors"].items():
        if name not in params or list(params[name].shape) != facts["shape"]:
            raise FishdipError(f"{folder} is of another model: {name} of shape {facts['shape']} is not in this one; load the "
                               "model it was made with.")
        if fingerprint(params[name].data) != facts["base"]:
            raise FishdipError(f"{folder} was trained from other base weights: {name} differs; load the same pretrained "
                               f"model in {facts['dtype']}.")
    with safe_open(folder / STATE, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  safe_open is no mapping
            kind, _, name = key.partition("/")
            if kind == "value":
                at = slice(None) if manifest["dense"] else file.get_tensor(f"ever/{name}").long().to(params[name].device)
                params[name].data.view(-1)[at] = file.get_tensor(key).to(params[name])
    return folder
