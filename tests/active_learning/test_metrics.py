"""Learning curves, forgetting, cartography and similarity on tables made by hand."""

from __future__ import annotations

import pytest
import torch

from fishdip_ds.active_learning.metrics import area_under_curve, cartography, forgetting_events, linear_cka, ripl
from fishdip_ds.active_learning.pool import Pool, warm_start
from fishdip_ds.errors import ConfigError, FishdipError


def test_area_is_by_trapezoids_over_the_range():
    assert area_under_curve([100, 150, 250], [0.5, 0.7, 0.9]) == pytest.approx((50 * 0.6 + 100 * 0.8) / 150)
    assert area_under_curve([100, 1000], [0.8, 0.8]) == pytest.approx(0.8)
    assert area_under_curve([100], [0.4]) == 0.4


def test_ripl():
    assert ripl(0.9, 0.8) == pytest.approx(0.5) and ripl(0.7, 0.8) == pytest.approx(-0.5) and ripl(0.8, 0.8) == 0
    assert ripl(1.0, 1.0) == 0


def test_forgetting_events():
    table = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 0]]).T
    assert forgetting_events(table).tolist() == [2, 1000, 0, 0, 1]
    assert forgetting_events(torch.tensor([[0, 0, 0]]).T).tolist() == [1000]
    assert forgetting_events(torch.tensor([[1, 0]])).tolist() == [0, 1000]


def test_cartography():
    found = cartography(torch.tensor([[0.2, 1.0], [0.6, 1.0]]), torch.tensor([[False, True], [True, True]]))
    assert found["correctness"].tolist() == [0.5, 1.0]
    assert found["confidence"].tolist() == pytest.approx([0.4, 1.0])
    assert found["variability"].tolist() == pytest.approx([0.2, 0.0])


def test_cka_is_one_for_rotations_and_multiples():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 7, generator=generator), torch.randn(40, 5, generator=generator)
    turn = torch.linalg.qr(torch.randn(7, 7, generator=generator, dtype=torch.float64)).Q
    assert linear_cka(x, x) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(x, x.double() @ turn * 3.7 + 2) == pytest.approx(1.0, abs=1e-9)
    assert linear_cka(x, y) == pytest.approx(linear_cka(x.double() @ turn * 0.1, y), abs=1e-9)
    assert 0 < linear_cka(x, y) < 0.6 and linear_cka(x, torch.ones(40, 3)) == 0


def test_pool_and_labelled_set_are_disjoint_and_complete():
    pool = Pool(1200)
    pool.acquire(warm_start(1200, 100, seed=1))
    sizes = [len(pool.labelled)]
    while len(pool.labelled) < 1000:
        pool.acquire(pool.unlabelled[:50])
        assert not set(pool.labelled) & set(pool.unlabelled)
        assert sorted(pool.labelled + pool.unlabelled) == list(range(1200))
        sizes.append(len(pool.labelled))
    assert sizes == list(range(100, 1001, 50))


def test_an_example_is_acquired_once():
    pool = Pool(4)
    pool.acquire([2])
    for ids in ([2], [1, 1], [4]):
        with pytest.raises(FishdipError, match="cannot be acquired"):
            pool.acquire(ids)
    assert pool.labelled == [2]


def test_warm_start():
    assert warm_start(50, 10, 1) == warm_start(50, 10, 1) != warm_start(50, 10, 2)
    classes = ["a"] * 40 + ["b"] * 8 + ["c"] * 2
    chosen = [classes[i] for i in warm_start(50, 12, 1, classes)]
    assert {k: chosen.count(k) for k in "abc"} == {"a": 5, "b": 5, "c": 2}
    with pytest.raises(ConfigError, match="warm start of 51 labels from a pool of 50"):
        warm_start(50, 51, 1)
