"""The trained model as an ordinary transformers folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fishdip_ds.distributed import Comm
from fishdip_ds.errors import FishdipError
from fishdip_ds.zero3.partition import gathered

Writer = Callable[[Path, dict[str, torch.Tensor]], None]


def save_pretrained(module: nn.Module, comm: Comm, folder: Path, write: Writer | None = None) -> Path:
    """Gather one tensor at a time and let the model's own ``save_pretrained`` write it. **Collective.**

    Rank 0 holds the whole model on its cpu for a moment. A module without ``save_pretrained`` gets one
    ``model.safetensors``. ``write(folder, state)``, if given, does it in the model's place.

    Raises:
        FishdipError: if a tensor would come out empty, or the disk refuses.
    """
    state: dict[str, torch.Tensor] = {}
    for name, param in module.named_parameters():
        with gathered([param]):
            if comm.rank == 0:
                state[name] = param.detach().cpu().clone()
    state.update({name: b.detach().cpu().clone() for name, b in module.named_buffers()
                  if name in module.state_dict(keep_vars=True)})
    error = None
    if comm.rank == 0:
        empty = [name for name, value in state.items() if not value.numel()]
        if empty:
            error = FishdipError(f"{empty[0]} came out empty; nothing was written to {folder}.")
        else:
            try:
                (write or partial(_write, module))(folder, state)
            except OSError as caught:
                error = FishdipError(f"could not write the model to {folder}: {caught}; free space or choose another "
                                     "folder.")
    comm.raise_together(error)
    return folder


def _write(module: nn.Module, folder: Path, state: dict[str, torch.Tensor]) -> None:
    if hasattr(module, "save_pretrained"):
        module.save_pretrained(folder, state_dict=state)
        return
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
