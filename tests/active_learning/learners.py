"""Rounds on small models, shared by tests; everything here runs on a rank."""

from __future__ import annotations

from pathlib import Path

import torch
from models import TextPairs, ds_config, tiny_t5

from fishdip_ds.active_learning.rounds import Protocol, Rounds
from fishdip_ds.active_learning.scoring import PoolScorer, ScoringOptions
from fishdip_ds.data.text2text import Collator

COLLATOR = Collator(pad_id=0)
OPTIONS = ScoringOptions(batch_size=7, max_length=6, mc_passes=3)


def engine_on(dataset, *, strategy: str = "random", threshold: int = 0, dropout: float = 0.1, global_batch: int = 12,
              lr: float = 1e-2, model=None, **fishdip: object):
    """An engine that can rewind; the loss of a fixed global batch for any number of ranks."""
    import fishdip_ds

    world = torch.distributed.get_world_size()
    torch.manual_seed(5 + torch.distributed.get_rank())
    engine = fishdip_ds.initialize(
        (tiny_t5(dropout=dropout) if model is None else model).train(),
        ds_config(micro=global_batch // world, threshold=threshold, lr=lr, strategy=strategy, **fishdip), dataset, COLLATOR,
        total_steps=8)[0]
    engine.keep_base()
    return engine


def pool_of(n: int = 40):
    """Synthetic examples, of which the last is the first again."""
    data = TextPairs(n, seed=3)
    data.items[n - 1] = {**data.items[0]}
    return data


def rounds_on(engine, data, query: str, folder: str | Path, *, options: ScoringOptions = OPTIONS, probe: bool = False,
              evaluate=None, **protocol: object) -> Rounds:
    """A learning curve that scores four examples of its own as a test set."""
    test = PoolScorer(engine, TextPairs(4, seed=77), COLLATOR, options, end_id=1)
    scores = evaluate or (lambda: {"loss": float(test.gold(range(4))["loss"].mean())})
    schedule = lambda steps: lambda: torch.optim.lr_scheduler.LambdaLR(  # noqa: E731
        engine.optimizer, lambda s: max(0.0, (steps - s) / steps))
    settings = {"warm_start": 10, "query_size": 5, "rounds": 2, "epochs": 2, "seed": 1, **protocol}
    return Rounds(engine, data, PoolScorer(engine, data, COLLATOR, options, end_id=1), query, Protocol(**settings),
                  Path(folder), evaluate=scores, schedule=schedule, probe=test if probe else None)


def plain(records: list[dict]) -> list[dict]:
    """Records without what no two runs share."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]
