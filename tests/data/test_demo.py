"""The demo corpus: the same for a seed, sound annotations, and a test split that training has not seen."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from fishdip_ds.data import demo, demo_words
from fishdip_ds.data.demo import SIZES, TASKS, TYPES, World, demo_view, facts, load_demo, main, write_fact
from fishdip_ds.errors import ConfigError
from fishdip_ds.tasks.ner import Ner

HELD_OUT_PARTS = {part for names in (demo_words.FIRST, demo_words.STEMS, demo_words.COMPANY_STEMS)
                  for part in names[2::3]}


def words_of(tokens, spans):
    return {" ".join(tokens[start:end]) for start, end, _ in spans}


def test_same_seed_gives_the_same_splits_and_another_seed_others():
    assert load_demo("ner", 3) == load_demo("ner", 3)
    assert load_demo("ner", 3).train != load_demo("ner", 4).train
    assert facts("train", 0, 20) == facts("train", 0)[:20]


def test_sizes_and_lengths():
    splits = load_demo("ner", 0)
    for name, size in SIZES.items():
        examples = getattr(splits, name)
        assert len(examples) == size == len({e.tokens for e in examples}) == len({e.id for e in examples})
        assert sum(len(e.tokens) for e in examples) / size <= 16
        assert {kind for e in examples for *_, kind in e.entities} == set(TYPES.values())
        assert any(not e.entities for e in examples)


@pytest.mark.parametrize("seed", [0, 1])
def test_names_of_test_are_unseen(seed):
    splits = load_demo("ner", seed)
    seen = {name for e in splits.train + splits.dev
            for name in words_of(e.tokens, [s for s in e.entities if s[2] != "date"])}
    unseen = {name for e in splits.test for name in words_of(e.tokens, [s for s in e.entities if s[2] != "date"])}
    assert len(seen) > 300 and len(unseen) > 200
    assert not seen & unseen
    assert not {e.tokens for e in splits.train + splits.dev} & {e.tokens for e in splits.test}
    assert not {e.tokens for e in splits.train} & {e.tokens for e in splits.dev}


def test_pools_share_no_part():
    seen, unseen = (World(random.Random(0), held_out) for held_out in (False, True))
    for pool in ("first", "stems", "companies"):
        ours, theirs = set(getattr(unseen, pool)), set(getattr(seen, pool))
        assert ours and theirs and not ours & theirs
        assert ours <= HELD_OUT_PARTS


def test_some_patterns_are_only_in_test():
    only = [p for p, _ in demo_words.TEST_PATTERNS]
    assert not set(only) & {p for p, _ in demo_words.TRAIN_PATTERNS}
    verbs = {demo_word(f) for f in facts("test", 0)} - {demo_word(f) for f in facts("train", 0)}
    assert {"tested", "borrowed", "led"} <= verbs


def demo_word(fact):
    start, end, _ = next(r for r in fact.roles if r[2] == "V")
    return " ".join(fact.tokens[start:end])


@pytest.mark.parametrize("pattern", demo_words.TRAIN_PATTERNS + demo_words.TEST_PATTERNS, ids=lambda p: p[0][:40])
def test_every_pattern_yields_sound_annotations(pattern):
    world = World(random.Random(5), held_out=False)
    for _ in range(5):
        fact = write_fact(*pattern, world)
        assert not set("<>{}()") & set("".join(fact.tokens))
        assert all(0 <= s < e <= len(fact.tokens) for s, e, _ in fact.entities + fact.roles)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(fact.entities))  # no overlap
        assert [r[2] for r in fact.roles].count("V") == 1
        for start, end, kind in fact.entities:
            assert fact.tokens[start][0].isupper() or kind == "date"
            assert fact.tokens[end - 1] not in (",", ".", "the")


def test_names_are_ambiguous():
    """One string can be of two types, which is what makes the corpus more than a look-up."""
    world = World(random.Random(0), held_out=False)
    drawn = {kind: {world.name(kind) for _ in range(4000)} for kind in "POLWD"}
    assert drawn["P"] & drawn["L"] and drawn["O"] & drawn["W"]
    firsts = {n.split()[0] for n in drawn["P"]}
    assert firsts & {d.split()[0] for d in drawn["D"]}
    assert any(town in name for name in drawn["O"] for town in drawn["L"] if len(town) > 5)


def test_articles_and_dates_fit():
    text = [" ".join(f.tokens) for split in SIZES for f in facts(split, 0)]
    assert not [t for t in text if " a A" in t or " a E" in t or "In Monday" in t]
    assert any(" an " in t for t in text)


@pytest.mark.parametrize("split", SIZES)
def test_views_agree_with_the_facts(split):
    rows = {task: demo_view(task, split, 0) for task in TASKS}
    assert json.loads(json.dumps(rows)) == json.loads(json.dumps({t: demo_view(t, split, 0) for t in TASKS}))
    assert [tuple(r["tokens"]) for r in rows["ner"]] == [e.tokens for e in getattr(load_demo("ner", 0), split)]
    for row in rows["joint_er"]:
        for relation in row["relations"]:
            assert relation["head"] != relation["tail"]
            assert max(relation["head"], relation["tail"]) < len(row["entities"])
    assert {r["type"] for row in rows["joint_er"] for r in row["relations"]} == {
        demo_words.WORKS, demo_words.LIVES, demo_words.BASED, demo_words.BORN, demo_words.FOUNDED, demo_words.MAKES,
        demo_words.PART}
    assert len(rows["relation"]) == sum(len(r["relations"]) for r in rows["joint_er"])
    for row in rows["relation"]:
        for start, end in (row["head"], row["tail"]):
            assert 0 <= start < end <= len(row["tokens"])
    for row in rows["srl"]:
        assert row["predicate"][1] == row["predicate"][0] + 1
        spans = sorted([(s, e) for s, e, _ in row["arguments"]] + [tuple(row["predicate"])])
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert {"ARG0", "ARG1", "AM-TMP", "AM-LOC"} <= {r for row in rows["srl"] for *_, r in row["arguments"]}
    for row in rows["dst"]:
        assert row["history"] and row["state"] == sorted(row["state"])
        for entry in row["state"]:
            domain, slot, value = entry.split("-", 2)
            assert slot in demo._SLOTS[domain] and any(value in said for said in row["history"][::2])


def test_the_writer_covers_every_entity():
    splits = load_demo("ner", 0)
    task = Ner(splits.schema)
    for example in splits.train + splits.test:
        assert task.unwritable(example) == 0
        assert task.metrics(task.count(example, task.target_text(example)))["f1"] in (1.0, 0.0)
        assert sorted(task.parse(task.target_text(example), example).entities) == sorted(example.entities)


def test_unknown_task():
    with pytest.raises(ConfigError, match="no view for task"):
        load_demo("parsing", 0)


def test_command_writes_files_that_read_back(tmp_path):
    from fishdip_ds.data.datasets import load_dataset

    main(["--out", str(tmp_path), "--seed", "0"])
    for split in SIZES:
        for task in TASKS:
            lines = (tmp_path / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
            assert len(lines) == len(demo_view(task, split, 0))
    from_files, direct = load_dataset(str(tmp_path), "ner"), load_demo("ner", 0)
    for split in SIZES:
        assert [(e.tokens, e.entities) for e in getattr(from_files, split)] == [
            (e.tokens, e.entities) for e in getattr(direct, split)]
