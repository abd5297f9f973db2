"""Acceptance tests of Child-Tuning F and D, by the numbers of the method's page. Equality (4) is in test_twins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models import TextPairs, collate, ds_config
from ranks import run
from torch import nn
from twins import ADAMW, SAMPLES, engine_of, go, model, order, owned, shards

from fishdip_ds.reference import siblings

SMALL_EPS = {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0}}


def _draws(density: float) -> list[torch.Tensor]:
    """The mask of step 3 of every tensor, put together from the ranks' parts."""
    engine = engine_of("child_tuning_f", 4, density=density)
    parts = {t.name: t.view.uniform(42, 3, 5) < density for t in engine.layout.tensors}
    gathered = engine.comm.gather_objects(parts)
    return [torch.cat([rank[t.name] for rank in gathered]) for t in engine.layout.tensors]


def test_1_f_draws_the_same_mask_on_any_ranks_and_keeps_its_share():
    alone = run(1, _draws, 0.3)[0]
    kept, n = sum(int(m.sum()) for m in alone), sum(m.numel() for m in alone)
    assert abs(kept / n - 0.3) < 3 * (0.3 * 0.7 / n) ** 0.5
    for world in (2, 3, 4):
        for masks in run(world, _draws, 0.3):
            assert all(torch.equal(a, b) for a, b in zip(masks, alone, strict=True))


def _rescaled(steps: int) -> float:
    """Relative distance of a run from one that does not divide by p."""
    engine = engine_of("child_tuning_f", steps, optimizer=SMALL_EPS, clip=0.0)
    data, base = TextPairs(SAMPLES), shards(engine)
    batches = [collate([data[i] for i in ids]) for ids in order(engine.loader, steps)]
    records = siblings.child_tuning_f(model(), batches, p=0.3, seed=42, lr=1e-3, clip=1e9, eps=1e-8, weight_decay=0.0,
                                      rescale=False)
    go(engine, steps)
    expected = owned(engine.layout, records[-1]["weights"])
    assert not torch.equal(shards(engine), base)
    return float((shards(engine) - expected).norm() / expected.norm())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_1_f_scaling_by_the_share_does_nothing_under_adam(world):
    distance = max(run(world, _rescaled, 6))
    print(f"\nrelative distance without the factor 1/p: {distance:.1e}")
    assert distance < 1e-5


def _moved_by_momentum() -> tuple[int, int]:
    engine = engine_of("child_tuning_f", 6, optimizer=SMALL_EPS)
    go(engine, 4)
    before, momentum = engine.optimizer.master.clone(), engine.optimizer.entry_state["exp_avg"].clone()
    go(engine, 5)
    has = momentum != 0
    return int(has.sum()), int((has & (engine.optimizer.master != before)).sum())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_2_f_moves_every_weight_that_has_momentum(world):
    for has, moved in run(world, _moved_by_momentum):
        assert has > 1000 and moved == has


def _child(fisher: str, decay: bool) -> dict:
    engine = engine_of("child_tuning_d", 5, fisher=fisher, decay_frozen=decay, density=0.1, layers=("*block*",),
                       always_on=("shared*",), threshold=0)
    base, rates = shards(engine), []
    go(engine, 5, lambda e: rates.append(e.last.lr))
    in_layers = [t for t in engine.layout.tensors if "block" in t.name]
    n = sum(t.numel for t in in_layers)
    table = engine.mask.indices("shared.weight").numel()
    factor = 1.0
    for lr in rates:
        factor *= 1 - lr * ADAMW["weight_decay"]
    for t, w0 in zip(engine.layout.tensors, base.split([t.stop - t.start for t in engine.layout.tensors]), strict=True):
        chosen = torch.zeros(t.numel, dtype=torch.bool)
        chosen[engine.mask.indices(t.name).long()] = True
        out = ~chosen[t.start : t.stop]
        if t not in in_layers and t.name != "shared.weight":
            assert out.all(), t.name  # 7: no tensor outside the list is masked
        if decay and t in in_layers:  # 5
            assert torch.allclose(t.owned()[out], w0[out] * factor, rtol=1e-6, atol=0)
        else:
            assert torch.equal(t.owned()[out], w0[out])
    first = engine.layout.tensors[0]
    table_size = first.stop - first.start
    moved = int((engine.layout.by_name["shared.weight"].owned() != base[: table_size]).sum())
    return {"chosen": engine.mask.count - table, "n": n, "table": table, "moved": moved,
            "state": sum(v.numel() for v in engine.optimizer.vectors().values())}


@pytest.mark.parametrize(("fisher", "decay"), [("sample", False), ("global", True)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_3_5_7_d_counts_freezes_and_keeps_tensors_on(world, fisher, decay):
    results = run(world, _child, fisher, decay)
    r = results[0]
    assert r["chosen"] == (1 + int(0.1 * (r["n"] - 1)) if fisher == "global" else int(0.1 * r["n"]))
    assert r["table"] == 61 * 18 and all(x["moved"] > 0 for x in results)
    assert sum(x["state"] for x in results) == 4 * (r["chosen"] + r["table"])  # always-on ones are in the inventory


class Opposed(nn.Module):
    """Two samples whose gradients cancel: loss = sign * (w . x)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(5, 1, bias=False)

    def forward(self, x, sign):
        return SimpleNamespace(loss=(self.layer(x).squeeze(-1) * sign).mean())


class Pair(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict:
        return {"x": torch.arange(1.0, 6.0), "sign": torch.tensor(1.0 - 2 * index)}


def _stack(items: list[dict]) -> dict:
    return {key: torch.stack([i[key] for i in items]) for key in items[0]}


def _opposed() -> tuple[float, float]:
    import fishdip_ds

    world = torch.distributed.get_world_size()
    config = ds_config(micro=max(1, 2 // world), strategy="child_tuning_d", density=0.4)
    engine = fishdip_ds.initialize(Opposed().train(), config, Pair(), _stack)[0]
    return tuple(float(sum(s.sum() for s in scores.values())) for scores in (
        engine.selector.fisher([0, 1]), engine.selector.fisher_of_batches([[0, 1]])))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_6_d_squares_samples_before_they_cancel(world):
    results = run(world, _opposed)
    assert sum(r[0] for r in results) == pytest.approx(2 * 55) and all(r[1] == 0 for r in results)


def _loss_after(lowest: bool) -> float:
    engine = engine_of("child_tuning_d", 12, density=0.05)
    if lowest:
        scores = engine.selector.fisher(list(range(SAMPLES)))
        highest = max(float(s.max()) if s.numel() else 0.0 for s in scores.values())
        ceiling = float(engine.comm.all_reduce(torch.tensor([highest]), tag="checks"))
        engine.set_mask(engine.selector.top({i: ceiling - s for i, s in scores.items()}, 0.05))
    return sum(go(engine, 12)[-3:])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_8_d_the_lowest_fisher_trains_worse_than_the_highest(world):
    best, worst = run(world, _loss_after, False)[0], run(world, _loss_after, True)[0]
    print(f"\nsum of the last three losses: highest Fisher {best:.3f}, lowest {worst:.3f}")
    assert worst > best + 0.1
