"""Alignment: a cheapest one, and among those the one that the tie rules choose."""

from __future__ import annotations

import random

import pytest

from fishdip_ds.tasks.align import align


def plain(tokens, words):
    """The rules as written, without shortcuts: full table, then the trace from the end."""
    n, m = len(tokens), len(words)
    cost = {}
    for i in range(n + 1):
        for j in range(m + 1):
            ways = [cost[i - 1, j - 1] + (tokens[i - 1] != words[j - 1])] if i and j else []
            ways += [cost[i - 1, j] + 1] if i else []
            ways += [cost[i, j - 1] + 1] if j else []
            cost[i, j] = min(ways, default=0)
    matched = [None] * m
    i, j = n, m
    while i and j:
        if cost[i, j] == cost[i - 1, j - 1] + (tokens[i - 1] != words[j - 1]):
            i, j = i - 1, j - 1
            matched[j] = i
        elif cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
        else:
            j -= 1
    return matched


def distance(x, y):
    """Edit distance by brute force."""
    if not x or not y:
        return len(x) + len(y)
    return min(distance(x[1:], y[1:]) + (x[0] != y[0]), distance(x[1:], y) + 1, distance(x, y[1:]) + 1)


@pytest.mark.parametrize(("tokens", "words", "expected"), [
    ("a b c", "a b c", [0, 1, 2]),
    ("a b c", "a x c", [0, 1, 2]),  # a substitution counts as a match
    ("a b", "b", [1]),
    ("a b c", "a c", [0, 2]),
    ("a c", "a b c", [0, None, 1]),
    ("a b", "x", [1]),  # traced from the end: the substitution comes before the skipped token
    ("a a", "a", [1]),
    ("a", "a a", [None, 0]),
    ("", "a", [None]),
    ("a", "", []),
])
def test_ties(tokens, words, expected):
    assert align(tokens.split(), words.split()) == expected


def test_equals_the_rules_as_written():
    rng = random.Random(0)
    for _ in range(1500):
        x, y = ([rng.choice("abc") for _ in range(rng.randint(0, 9))] for _ in range(2))
        assert align(x, y) == plain(x, y)
        noisy = [word if rng.random() < 0.8 else rng.choice("abcd") for word in x if rng.random() < 0.9]
        assert align(x, noisy) == plain(x, noisy)


def test_is_a_cheapest_one():
    rng = random.Random(1)
    for _ in range(150):
        x, y = ([rng.choice("abc") for _ in range(rng.randint(0, 6))] for _ in range(2))
        pairs = [(i, j) for j, i in enumerate(align(x, y)) if i is not None]
        assert pairs == sorted(pairs) and len({i for i, _ in pairs}) == len(pairs)
        assert len(x) + len(y) - 2 * len(pairs) + sum(x[i] != y[j] for i, j in pairs) == distance(x, y)
