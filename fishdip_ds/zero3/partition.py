"""Let DeepSpeed partition a model, with no optimizer of its own."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from fishdip_ds.errors import ConfigError

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

OURS = ("fishdip", "optimizer", "scheduler", "gradient_clipping")
"""Sections of the JSON that the compact engine serves itself and DeepSpeed must not see."""


def partition(model: nn.Module, ds_config: dict) -> DeepSpeedEngine:
    """Shard ``model`` in place over all ranks and return the DeepSpeed engine around it. **Collective.**

    The engine has hooks that gather and release parameters, and the monitor; it has no optimizer and
    no gradient buffer, so the persistent cost is the weight shard alone. A model that was loaded under
    ``HfDeepSpeedConfig`` is sharded already and is taken as it is.
    """
    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its start-up says hundreds of lines
    config = {key: copy.deepcopy(value) for key, value in ds_config.items() if key not in OURS}
    _refuse_half(model)
    engine = deepspeed.initialize(model=model, config=config)[0]
    if not isinstance(engine.optimizer, DeepSpeedZeRoOffload):
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} built {type(engine.optimizer).__name__} instead of a bare ZeRO-3 "
            "parameter partitioner; install the deepspeed version of constraints.txt.")
    return engine


def _refuse_half(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.dtype == torch.float16:
            raise ConfigError(f"parameter {name} is float16, which T5 and Fisher scores overflow; "
                              "load the model in bfloat16 or float32.")


def backward(engine: DeepSpeedEngine, loss: torch.Tensor) -> None:
    """``loss.backward()`` with everything gathered that DeepSpeed's hooks miss, and nothing left behind. **Collective.**

    The hook that gathers a module's own parameters again for backward sits on the tensors it returns; the
    outermost module may return any object, in which DeepSpeed finds none. And some parameters stay gathered
    because their module's post-backward hook never fires: on T5 the shared embedding and the position biases.
    """
    with gathered(list(engine.module.parameters(recurse=False))):
        loss.backward()
    engine.optimizer.release_backward_leftovers()


def gathered(params: list[nn.Parameter]):
    """Context in which ``params`` hold their full values on every rank (read only). **Collective.**"""
    import deepspeed

    return deepspeed.zero.GatheredParameters(params, modifier_rank=None)
