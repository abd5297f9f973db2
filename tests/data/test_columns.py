"""Column files: schemes, separators, real data, and what is wrong with malformed ones."""

from __future__ import annotations

import json

import pytest

from fishdip_ds.data.columns import decode_labels, read_columns
from fishdip_ds.data.datasets import load_dataset
from fishdip_ds.data.sampling import by_count, by_fraction, by_shots
from fishdip_ds.errors import ConfigError, DataError
from fishdip_ds.tasks.base import Counts, Example
from fishdip_ds.tasks.ner import Ner


@pytest.mark.parametrize(("labels", "spans"), [
    ("B-x I-x O B-x", [(0, 2, "x"), (3, 4, "x")]),
    ("I-x I-x B-x O", [(0, 2, "x"), (2, 3, "x")]),
    ("B-x E-x S-x S-y", [(0, 2, "x"), (2, 3, "x"), (3, 4, "y")]),
    ("x x O y", [(0, 2, "x"), (3, 4, "y")]),
    ("I-x I-y", [(0, 1, "x"), (1, 2, "y")]),
    ("B-a-b I-a-b", [(0, 2, "a-b")]),
])
def test_schemes(labels, spans):
    assert decode_labels(labels.split()) == spans


def test_docstart_spaces_and_blank_runs(tmp_path):
    file = tmp_path / "train.txt"
    file.write_text("-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\n\nPeter NNP B-NP B-PER\n")
    assert [(e.tokens, e.entities) for e in read_columns(file)] == [
        (("EU", "rejects"), ((0, 1, "ORG"),)), (("Peter",), ((0, 1, "PER"),))]


@pytest.mark.parametrize(("content", "message"), [
    (b"EU B-ORG\nrejects\n", "line 2: found 'rejects', expected a token and a label separated by spaces"),
    (b"EU\tB-ORG\nrejects O\n", "line 2: found 'rejects O', expected a token and a label separated by a tab"),
    (b"EU B-\n", "line 1: 'B-' is no label"),
    (b"EU B-ORG\n\xff\xfe O\n", "line 2: not UTF-8"),
    (b"\n\n", "holds no sentence"),
])
def test_malformed_files_name_file_and_line(tmp_path, content, message):
    file = tmp_path / "train.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match="train.txt") as caught:
        read_columns(file)
    assert message in str(caught.value)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(DataError, match="cannot read .*nowhere"):
        read_columns(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no data folder at"):
        load_dataset(str(tmp_path / "nowhere"), "ner")
    (tmp_path / "train.txt").write_text("a O\n")
    with pytest.raises(DataError, match="has no dev file; looked for dev.txt"):
        load_dataset(str(tmp_path), "ner")
    with pytest.raises(ConfigError, match='did you mean "wnut17"'):
        load_dataset(f"wnut7:{tmp_path}", "ner")


def test_unknown_label_is_named(tmp_path):
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.txt").write_text("EU B-ORG\n")
    (tmp_path / "labels.json").write_text('{"PER": "person"}')
    with pytest.raises(DataError, match=r"train.txt, sentence 0: label 'ORG' at token 1 is not in .*labels.json"):
        load_dataset(str(tmp_path), "ner", labels=tmp_path / "labels.json")


@pytest.mark.parametrize(("folder", "sizes", "types"), [
    ("wnut17", (3394, 1009, 1287), 6), ("crossner/politics", (200, 541, 651), 9), ("crossner/science", (200, 450, 543), 17),
    ("crossner/music", (100, 380, 465), 13)])
def test_real_sets_read_whole_and_round_trip(shared_dir, folder, sizes, types):
    splits = load_dataset(str(shared_dir / "data" / folder), "ner")
    task = Ner(splits.schema)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == sizes
    assert len(splits.schema.natural) == types
    for examples in (splits.train, splits.dev, splits.test):
        counts = sum((task.count(e, task.target_text(e)) for e in examples), Counts())
        special = sum(any(s in token for token in e.tokens for s in "[]|=") for e in examples)
        assert counts.errors["reconstruction"] <= special  # only where the text itself holds special tokens
        assert task.metrics(counts)["f1"] > 0.998


def test_golden_bio_decode(shared_dir):
    rows = [json.loads(line) for line in (shared_dir / "golden/tanl/bio_decode.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["reader"] == "ner"]
    for row in rows:
        assert [[t, s, e] for s, e, t in decode_labels(row["labels"])] == row["entities"], row
    assert len(rows) >= 5


def test_golden_subsets(shared_dir):
    rows = json.loads((shared_dir / "golden/tanl/subsets.json").read_text())
    for row in rows:
        assert by_fraction(row["N"], row["fraction"], row["seed"]) == row["indices"]
    assert rows and len(by_fraction(922, 0.05, 1)) == 46


def test_shots_and_counts():
    examples = [Example(str(i), ("a",), ((0, 1, "x" if i % 10 else "rare"),)) for i in range(60)]
    chosen = by_shots(examples, 4, seed=3)
    assert len(chosen) == len(set(chosen)) == 8
    assert sum(examples[i].entities[0][2] == "rare" for i in chosen) == 4
    assert by_count(10, 99, 0) == by_count(10, 10, 0)
    for bad in (lambda: by_fraction(10, 0.01, 0), lambda: by_fraction(10, 2.0, 0), lambda: by_shots(examples, 0, 0)):
        with pytest.raises(ConfigError):
            bad()
