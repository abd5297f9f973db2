"""Writing and reading augmented sentences: the corner cases, and every golden example."""

from __future__ import annotations

import json
import random

import pytest

from fishdip_ds.tasks.align import align
from fishdip_ds.tasks.augmented import Annotation, interpret, locate, write
from fishdip_ds.tasks.base import Counts, Example, Schema
from fishdip_ds.tasks.ner import Ner

TOKENS = "Tolkien was born here".split()
TYPES, RELATIONS = frozenset({"person", "location"}), frozenset({"lives in"})
PERSON, HERE = ("person", 0, 1), ("location", 3, 4)


@pytest.mark.parametrize(("text", "entities", "errors"), [
    ("[ Tolkein | person | lives in = there ] was born [ here | place ]", {PERSON}, {"reconstruction", "label", "entity"}),
    ("[ Tolkien | person was born [ here | location ]", set(), {"reconstruction", "format"}),
    ("[ Tolkien | person | lives in = here ] was born [ here | location", {PERSON}, {"entity", "format"}),
    ("Tolkien | person ] was born [ here | location ]", {HERE}, {"reconstruction", "format"}),
    ("[ Tolkien ] was born [ here | location ]", {HERE}, {"format"}),
    ("[ Tolkien | person | lives in ] was born [ here | location ]", {PERSON, HERE}, {"format"}),
    ("[ Tolkien | person | born = here ] was born [ here | location ]", {PERSON, HERE}, {"label"}),
    ("[Tolkien|person|lives in=here] was born [here|location]", {PERSON, HERE}, set()),
    ("[ [ Tolkien | person ] was | person ] born here", {PERSON, ("person", 0, 2)}, set()),
    ("[ | person ] Tolkien was born here", set(), set()),
    ("", set(), {"reconstruction"}),
])
def test_worked_cases(text, entities, errors):
    reading = interpret(text, TOKENS, TYPES, RELATIONS)
    assert (set(reading.entities), set(reading.errors)) == (entities, errors)


def test_source_with_brackets_breaks_its_own_gold():
    reading = interpret("[ a ]", ["[", "a", "]"], TYPES, RELATIONS)
    assert set(reading.errors) == {"format", "reconstruction"}


def test_write_nested_same_span_and_crossing():
    tokens = "a b c d".split()
    nested = [Annotation(0, 3, ("person",)), Annotation(1, 2, ("location",))]
    assert write(tokens, nested) == ("[ a [ b | location ] c | person ] d", 0)
    assert write(tokens, [Annotation(0, 2, ("person",)), Annotation(0, 2, ("location",))]) == (
        "[ [ a b | location ] | person ] c d", 0)
    assert write(tokens, [Annotation(0, 2, ("person",)), Annotation(1, 3, ("location",))]) == (
        "[ a b | person ] c d", 1)


def test_conll_example_string():
    schema = Schema({"ORG": "organization", "MISC": "miscellaneous"})
    example = Example("0", tuple("EU rejects German call to boycott British lamb .".split()),
                      ((0, 1, "ORG"), (2, 3, "MISC"), (6, 7, "MISC")))
    assert Ner(schema).target_text(example) == ("[ EU | organization ] rejects [ German | miscellaneous ] call to "
                                                "boycott [ British | miscellaneous ] lamb .")


def test_alignment_is_a_cheapest_one_and_prefers_matches():
    rng = random.Random(0)
    for _ in range(300):
        x, y = ([rng.choice("abc") for _ in range(rng.randint(0, 7))] for _ in range(2))
        matched = align(x, y)
        pairs = [(i, j) for j, i in enumerate(matched) if i is not None]
        assert pairs == sorted(pairs) and len({i for i, _ in pairs}) == len(pairs)
        cost = len(x) + len(y) - 2 * len(pairs) + sum(x[i] != y[j] for i, j in pairs)
        assert cost == _distance(x, y)
    assert align(list("ab"), list("b")) == [1]


def _distance(x: list, y: list) -> int:
    if not x or not y:
        return len(x) + len(y)
    return min(_distance(x[1:], y[1:]) + (x[0] != y[0]), _distance(x[1:], y) + 1, _distance(x, y[1:]) + 1)


def test_counts_do_not_depend_on_order_or_split():
    task = Ner(Schema({"p": "person", "l": "location"}))
    rng = random.Random(1)
    rows = []
    for i in range(40):
        text = " ".join(rng.choice(["[ Tolkien | person ]", "was", "[ here | location ]", "born", "[ x", "| person ]"])
                        for _ in range(5))
        rows.append(task.count(Example(str(i), tuple(TOKENS), ((0, 1, "p"), (3, 4, "l"))), text))
    whole = sum(rows, Counts())
    rng.shuffle(rows)
    halves = sum(rows[:13], Counts()) + sum(rows[13:], Counts())
    assert whole == halves and task.metrics(whole) == task.metrics(halves)


@pytest.mark.parametrize("name", ["ner_crossner_ai", "joint_er_edge", "joint_er_redocred", "srl_ewt"])
def test_golden_parses(shared_dir, name):
    schema = json.loads((shared_dir / f"golden/tanl/{name}.json").read_text())
    types = frozenset(natural for _, natural in schema["entity_types"])
    relations = frozenset(natural for _, natural in schema["relation_types"] or [])
    examples = [json.loads(line) for line in (shared_dir / f"golden/tanl/{name}.jsonl").read_text().splitlines()]
    seen = 0
    for example in examples:
        for prediction in example["predictions"]:
            found, _ = locate(prediction["text"], example["tokens"])
            assert [[f.name, [list(t) for t in f.tags], f.start, f.end] for f in found] == prediction["parse"]
            reading = interpret(prediction["text"], example["tokens"], types, relations)
            assert sorted(map(list, reading.entities)) == sorted(prediction["entities"])
            assert (sorted([k, list(h), list(t)] for k, h, t in reading.relations)
                    == sorted([k, _span(h), _span(t)] for k, h, t in prediction["relations"]))
            assert {k for k, v in prediction["errors"].items() if v} == {
                "wrong_reconstruction" if e == "reconstruction" else f"{e}_error" for e in reading.errors}
            seen += 1
    assert seen == sum(len(e["predictions"]) for e in examples) > 20


def _span(value: list) -> list:
    return [value[0], *value[1:]]


def test_golden_ner_counts_and_metrics(shared_dir):
    stored = json.loads((shared_dir / "golden/tanl/ner_crossner_ai.json").read_text())
    task = Ner(Schema(dict(stored["entity_types"])))
    systems: dict[str, Counts] = {}
    for line in (shared_dir / "golden/tanl/ner_crossner_ai.jsonl").read_text().splitlines():
        row = json.loads(line)
        example = Example(row["id"], tuple(row["tokens"]),
                          tuple((e["start"], e["end"], e["type"]) for e in row["entities"]))
        assert (task.input_text(example), task.target_text(example)) == (row["input"], row["target"])
        for prediction in row["predictions"]:
            counts = task.count(example, prediction["text"])
            expected = prediction["counts"]
            assert counts.total == [expected[f"{k}_entities"] for k in ("gt", "predicted", "correct")]
            assert counts.untyped == [expected[f"{k}_entities_no_type"] for k in ("gt", "predicted", "correct")]
            for system in (prediction["system"], "all_predictions"):
                systems[system] = systems.get(system, Counts()) + counts
    for system, values in stored["metrics"].items():
        if system not in systems:
            continue
        metrics, full = task.metrics(systems[system]), values["full"]
        for ours, theirs in (("precision", "entity_precision"), ("recall", "entity_recall"), ("f1", "entity_f1"),
                             ("f1_untyped", "entity_f1_no_type"), ("f1_macro", "entity_macro_f1"),
                             ("error_reconstruction", "wrong_reconstruction"), ("error_label", "label_error"),
                             ("error_format", "format_error"), ("error_entity", "entity_error")):
            assert metrics[ours] == pytest.approx(full[theirs], abs=1e-12), (system, ours)
    assert set(stored["metrics"]) <= set(systems)
