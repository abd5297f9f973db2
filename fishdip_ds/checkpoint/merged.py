"""A run's result as an ordinary transformers folder, made from files alone: no engine, never the whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from fishdip_ds.checkpoint.delta import Delta
from fishdip_ds.errors import FishdipError

_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
"""Names under which files may hold a tied embedding."""


def write_merged(base: Path, delta: Delta, out: Path) -> Path:
    """Copy the safetensors folder ``base`` to ``out`` with the delta's entries changed, one file at a time. Local.

    Raises:
        FishdipError: no safetensors in ``base``, a tensor of the delta that its files lack, or the disk refuses.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise FishdipError(f"{base} has no safetensors files; load the model, apply the delta by fishdip_ds.load_delta and "
                           "save it by save_pretrained.")
    missing = set(delta.entries)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in files:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open is no mapping
                about = file.metadata()
            for key, tensor in tensors.items():
                name = _name_in(delta, key)
                if name is not None:
                    at, values = delta.entries[name]
                    stored = tensor.contiguous().view(-1).clone()
                    stored[at] = values.to(stored.dtype)
                    tensors[key] = stored.view(tensor.shape)
                    missing.discard(name)
            save_file(tensors, out / path.name, metadata=about)
            del tensors
        if missing:
            raise FishdipError(f"the files of {base} hold no tensor {sorted(missing)[0]!r}; give the folder of the base "
                               "model.")
        for path in base.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copy2(path, out / path.name)
    except OSError as error:
        raise FishdipError(f"could not write the merged model to {out}: {error}; free space or choose another "
                           "folder.") from None
    return out


def _name_in(delta: Delta, key: str) -> str | None:
    """The delta's name of a stored tensor; a tied embedding may be stored under another name."""
    if key in delta.entries:
        return key
    tied = key in _ALIASES and key not in delta.facts["tensors"]
    return next((n for n in ("shared.weight", "model.embed_tokens.weight") if tied and n in delta.entries), None)


def same_base(base: Path, delta: Delta) -> None:
    """``FishdipError`` unless the files of ``base`` hold the weights that the delta was trained from (dtype included)."""
    from safetensors import safe_open

    from fishdip_ds.fingerprint import fingerprint

    facts = delta.facts["tensors"]
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  safe_open is no mapping
                if key in facts:
                    stored = file.get_tensor(key).to(getattr(torch, facts[key]["dtype"]))
                    if fingerprint(stored) != facts[key]["base"]:
                        raise FishdipError(f"{base} is not the base of delta {delta.name}: {key} differs; give the model that "
                                           f"{json.dumps(delta.facts.get('base_model', 'the run'))} names.")
