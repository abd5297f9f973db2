"""Low-resource subsets: the reference's, and k-shot ones."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from fishdip_ds.data.sampling import by_count, by_fraction, by_shots
from fishdip_ds.errors import ConfigError


def test_golden_subsets(shared_dir):
    rows = json.loads((shared_dir / "golden/tanl/subsets.json").read_text())
    for row in rows:
        assert by_fraction(row["N"], row["fraction"], row["seed"]) == row["indices"]
    assert rows and len(by_fraction(922, 0.05, 1)) == 46


def test_sampling_leaves_the_global_stream_alone():
    random.seed(5)
    expected = random.random()
    random.seed(5)
    by_fraction(100, 0.1, 3)
    by_shots([["x"]], 1, 3)
    assert random.random() == expected


def test_rounding_is_half_to_even():
    assert [len(by_fraction(n, 0.05, 0)) for n in (50, 70, 90)] == [2, 4, 4]  # of 2.5, 3.5, 4.5


@pytest.mark.parametrize("seed", range(20))
def test_every_type_gets_its_shots_or_all_there_are(seed):
    rng = random.Random(seed)
    labels = [[rng.choice("abcd") for _ in range(rng.randint(0, 4))] for _ in range(25)]
    shots = rng.randint(1, 6)
    chosen = by_shots(labels, shots, seed)
    total = Counter(kind for row in labels for kind in row)
    have = Counter(kind for i in chosen for kind in labels[i])
    assert len(set(chosen)) == len(chosen) and chosen == by_shots(labels, shots, seed)
    assert all(have[kind] >= min(shots, total[kind]) for kind in total)


def test_shots_and_counts():
    labels = [["x" if i % 10 else "rare"] for i in range(60)]
    chosen = by_shots(labels, 4, seed=3)
    assert len(chosen) == len(set(chosen)) == 8
    assert sum(labels[i] == ["rare"] for i in chosen) == 4
    assert by_count(10, 99, 0) == by_count(10, 10, 0)
    for bad in (lambda: by_fraction(10, 0.01, 0), lambda: by_fraction(10, 2.0, 0), lambda: by_shots(labels, 0, 0)):
        with pytest.raises(ConfigError):
            bad()
