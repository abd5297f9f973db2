"""The base model's own files: its tensors by the names that a run knows them by, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from fishdip_ds.errors import FishdipError
from fishdip_ds.fingerprint import fingerprint

INDEX = "model.safetensors.index.json"
_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
"""Names under which files may hold a tied embedding."""
_TIED = ("shared.weight", "model.embed_tokens.weight")


class BaseFiles:
    """The safetensors of a transformers folder. Nothing is read before it is asked for. Local.

    Args:
        folder: a model folder.
        facts: tensor -> ``{"shape", "dtype", "base"}``, as manifests and deltas hold them.

    Raises:
        FishdipError: a folder without safetensors, or one whose index names files that are not there.
    """

    def __init__(self, folder: Path, facts: Mapping[str, dict]) -> None:
        self.folder, self.facts = folder, facts
        self.places: dict[str, Path] = {}
        """Key in the files -> the file that holds it."""
        from safetensors import SafetensorError, safe_open

        for path in _files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    self.places.update({key: path for key in file.keys()})  # noqa: SIM118  safe_open is no mapping
            except (OSError, SafetensorError) as error:
                raise FishdipError(f"{path} of the base model cannot be read ({error}); fetch it again.") from None

    def read(self, key: str) -> torch.Tensor:
        """The tensor under a key of the files, as stored; mapped from the file, so memory fills as it is used."""
        from safetensors import safe_open

        with safe_open(self.places[key], framework="pt") as file:
            return file.get_tensor(key)

    def key_of(self, name: str) -> str:
        """The files' key of a run's tensor; a tied embedding may be stored under another name.

        Raises:
            FishdipError: the files do not hold it.
        """
        if name in self.places:
            return name
        found = next((key for key in _ALIASES if key in self.places), None) if name in _TIED else None
        if found is None:
            raise FishdipError(f"the files of {self.folder} hold no tensor {name!r}; give the folder of the base model.")
        return found

    def name_of(self, key: str) -> str | None:
        """The run's name of a key; None for one that the run does not know (a buffer, a second copy of a tied table is
        known by the name of the first).
        """
        if key in self.facts:
            return key
        return next((name for name in _TIED if name in self.facts), None) if key in _ALIASES else None

    def weight(self, name: str) -> torch.Tensor:
        """A run's tensor in the dtype that the run trained in."""
        return self.read(self.key_of(name)).to(getattr(torch, self.facts[name]["dtype"]))

    def check(self, whose: str, named: str | None) -> None:
        """``FishdipError`` unless the files hold the very weights that ``whose`` was trained from (dtype included)."""
        for name, fact in self.facts.items():
            weight = self.weight(name)
            if list(weight.shape) != fact["shape"] or fingerprint(weight) != fact["base"]:
                raise FishdipError(f"{self.folder} is not the base of {whose}: {name} differs; give the model that "
                                   f"{json.dumps(named or 'the run')} names.")


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise FishdipError(f"{folder} has no safetensors files; load the model, apply the delta by fishdip_ds.load_delta and "
                           "save it by save_pretrained.")
    return files
