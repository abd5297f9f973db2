"""The method of ``docs/add-a-method.md``, word for word, trains and resumes."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from ranks import run
from twins import engine_of, go, shards

DOC = Path(__file__).parents[2] / "docs" / "add-a-method.md"


def _trained(code: str, line: str, folder: str) -> str:
    from fishdip_ds.strategies import registry

    module = ModuleType("fishdip_ds.strategies.taylor")
    exec(code, module.__dict__)
    sys.modules[module.__name__] = module
    registry.STRATEGIES.update(eval("{" + line + "}"))
    engine = engine_of("taylor", 7, refresh_interval=3)
    base = shards(engine)
    go(engine, 4)
    engine.save_checkpoint(folder)
    losses, weights = go(engine, 7), shards(engine)
    again = engine_of("taylor", 7, refresh_interval=3)
    again.load_checkpoint(folder)
    assert go(again, 7) == losses and torch.equal(shards(again), weights) and not torch.equal(weights, base)
    return engine.mask.hash()


@pytest.mark.parametrize("world", [1, 2])
def test_the_documented_method_works(world, tmp_path):
    code, line = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)[:2]
    assert len(code.splitlines()) <= 30
    assert len(set(run(world, _trained, code, line.strip(), str(tmp_path)))) == 1
