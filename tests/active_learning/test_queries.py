"""Query strategies against plain computations of the same rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fishdip_ds.active_learning import uncertainty
from fishdip_ds.active_learning.coreset import k_centre
from fishdip_ds.active_learning.discriminative import logistic_regression
from fishdip_ds.active_learning.loss import carried_losses
from fishdip_ds.active_learning.queries import QUERIES, PoolView, get_query
from fishdip_ds.errors import ConfigError


def view(n: int = 60, labelled: int = 12, *, seed: int = 3, classes: int = 3) -> PoolView:
    """A pool of random examples; ids are not their positions."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(n, classes, generator=generator).softmax(-1)
    points = torch.randn(n + labelled, 6, generator=generator)
    signals = uncertainty.class_signals(probs)
    return PoolView(list(range(100, 100 + n)), list(range(labelled)), {**signals, "mc": signals["entropy"],
                    "embedding": points[labelled:]}, {"embedding": points[:labelled],
                    "loss": torch.rand(labelled, generator=generator)}, seed)


@pytest.mark.parametrize("name", QUERIES)
def test_every_strategy_returns_distinct_ids_of_the_pool(name):
    for count in (1, 7, 25, 60, 90):
        chosen = get_query(name).choose(view(), count)
        assert len(chosen) == len(set(chosen)) == min(count, 60) and set(chosen) <= set(range(100, 160))
        assert chosen == get_query(name).choose(view(), count)


@pytest.mark.parametrize("name", ["random", "dal"])
def test_chance_comes_from_the_seed_alone(name):
    torch.manual_seed(1)
    first = get_query(name).choose(view(400), 20)
    torch.manual_seed(2)
    other = view(400)
    assert first == get_query(name).choose(other, 20)
    assert first != get_query(name).choose(PoolView(other.ids, other.labelled, other.signals, other.known, 4), 20)


def test_an_unknown_strategy_is_named():
    with pytest.raises(ConfigError, match="'entropi'; did you mean \"entropy\""):
        get_query("entropi")


def test_entropy_equals_a_dense_computation():
    logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) * 8
    e = np.exp(logits - logits.max(1, keepdims=True))
    p = np.clip(e / e.sum(1, keepdims=True), 1e-6, None)
    want = -(p * np.log(p)).sum(1)
    got = uncertainty.entropy(torch.from_numpy(logits).softmax(-1))
    assert np.allclose(got.numpy(), want, rtol=1e-5, atol=1e-7)
    ids = list(range(50))
    chosen = get_query("entropy").choose(PoolView(ids, [], {"entropy": got}), 10)
    assert chosen == sorted(ids, key=lambda i: (-float(got[i]), i))[:10] == np.argsort(-want, kind="stable")[:10].tolist()


def test_margin_prefers_the_smallest_gap():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.39, 0.21], [0.9, 0.05, 0.05]])
    signals = uncertainty.class_signals(probs)
    assert torch.allclose(signals["margin"], torch.tensor([0.2, 0.01, 0.85]))
    assert get_query("margin").choose(PoolView([4, 5, 6], [], signals), 2) == [5, 4]


@pytest.mark.parametrize("name", ["entropy", "margin", "mc", "coreset", "pseudo_loss"])
def test_ties_go_to_the_lower_id(name):
    same = torch.full((9,), 0.25)
    points = torch.ones(9, 3)
    pool = PoolView(list(range(10, 19)), [0], {"entropy": same, "margin": same, "mc": same, "pseudo_loss": same,
                                               "embedding": points}, {"embedding": torch.zeros(1, 3)})
    assert get_query(name).choose(pool, 4) == [10, 11, 12, 13]


def test_core_set_equals_brute_force_on_200_points():
    generator = torch.Generator().manual_seed(5)
    points, centres = torch.randn(200, 8, generator=generator), torch.randn(11, 8, generator=generator)
    points[150] = points[20]
    covered, want = [c.tolist() for c in centres], []
    for _ in range(40):  # the definition, with no running minimum
        gaps = [min(sum((a - b) ** 2 for a, b in zip(p, c, strict=True)) for c in covered) for p in points.tolist()]
        best = max(range(200), key=lambda i: (gaps[i] if i not in want else -1.0, -i))
        want.append(best)
        covered.append(points[best].tolist())
    assert k_centre(points, centres, 40) == want


def test_logistic_regression_is_at_the_minimum_that_scikit_learn_finds():
    sklearn = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 5, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(5, generator=generator, dtype=torch.float64) + torch.randn(80, generator=generator) > 0.3).double()
    theirs = sklearn.LogisticRegression(C=0.5, tol=1e-10, max_iter=1000).fit(x.numpy(), y.numpy())
    ours = logistic_regression(x, y, strength=2.0)
    assert np.allclose(ours.numpy(), [*theirs.coef_[0], theirs.intercept_[0]], atol=1e-5)


def test_discriminative_asks_for_what_is_unlike_the_labelled_set():
    generator = torch.Generator().manual_seed(1)
    near, far = torch.randn(50, 4, generator=generator), torch.randn(10, 4, generator=generator) + 4
    pool = PoolView(list(range(60)), [60], {"embedding": torch.cat([near, far])},
                    {"embedding": torch.randn(20, 4, generator=generator)}, 7)
    first = get_query("dal").choose(pool, 10)[:1]  # later ones are unlike it, too: it counts as labelled then
    assert set(first) <= set(range(50, 60)) and len(set(get_query("dal").choose(pool, 1)) & set(range(50, 60))) == 1


def test_losses_are_carried_over_from_the_nearest_labelled_examples():
    known, losses = torch.tensor([[0.0], [1.0], [2.0], [10.0]]), torch.tensor([1.0, 2.0, 4.0, 9.0])
    assert carried_losses(torch.tensor([[0.1], [9.0]]), known, losses, k=2).tolist() == [1.5, 6.5]
    known = torch.cat([known, torch.full((5, 1), 20.0)])
    losses = torch.cat([losses, torch.full((5,), 8.0)])
    pool = PoolView([5, 6, 7], range(9), {"embedding": torch.tensor([[0.1], [19.0], [19.0]]), "pseudo_loss": torch.tensor(
        [3.0, 0.1, 0.2])}, {"embedding": known, "loss": losses})
    assert get_query("loss").choose(pool, 3) == [7, 6, 5]  # the largest losses; of equals the less certain


def test_sequence_uncertainties_differ_and_are_what_they_are_called():
    probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.7, 0.2, 0.1]])
    tokens = torch.tensor([0, 0, 0])
    h = [np.log(2), 0.0, -(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1))]
    nll = [np.log(2), 0.0, -np.log(0.7)]
    want = {"mean_entropy": sum(h) / 3, "sum_entropy": sum(h), "max_entropy": max(h), "mean_nll": sum(nll) / 3,
            "least_confident": 0.5}
    assert set(want) == set(uncertainty.SEQ_UNCERTAINTIES)
    for kind, value in want.items():
        got = uncertainty.sequence_signals(probs, tokens, kind)
        assert float(got["entropy"]) == pytest.approx(value, abs=1e-6)
        assert float(got["margin"]) == pytest.approx((0.0 + 1.0 + 0.5) / 3, abs=1e-6)
        assert float(got["pseudo_loss"]) == pytest.approx(sum(nll) / 3, abs=1e-6)
