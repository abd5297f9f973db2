"""Writing and reading augmented sentences: the corner cases, and every golden example."""

from __future__ import annotations

import json
import random

import pytest

from fishdip_ds.tasks.augmented import Annotation, interpret, locate, read, write
from fishdip_ds.tasks.base import Example, Schema
from fishdip_ds.tasks.ner import Ner

TOKENS = ["Tolkien", "was", "born", "here"]
TYPES, RELATIONS = frozenset({"person", "location"}), frozenset({"lives in"})
PERSON, HERE = ("person", 0, 1), ("location", 3, 4)


@pytest.mark.parametrize(("text", "entities", "errors"), [
    ("[ Tolkein | person | lives in = there ] was born [ here | place ]", {PERSON},
     {"reconstruction", "label", "entity"}),
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
    tokens = list("abcd")
    nested = [Annotation(0, 3, ("person",)), Annotation(1, 2, ("location",))]
    assert write(tokens, nested) == ("[ a [ b | location ] c | person ] d", 0)
    assert write(tokens, [Annotation(0, 2, ("person",)), Annotation(0, 2, ("location",))]) == (
        "[ [ a b | location ] | person ] c d", 0)
    assert write(tokens, [Annotation(0, 2, ("person",)), Annotation(1, 3, ("location",))]) == (
        "[ a b | person ] c d", 1)


def test_conll_example_string():
    schema = Schema({"ORG": "organization", "MISC": "miscellaneous"})
    example = Example("0", ("EU", "rejects", "German", "call", "to", "boycott", "British", "lamb", "."),
                      ((0, 1, "ORG"), (2, 3, "MISC"), (6, 7, "MISC")))
    assert Ner(schema).target_text(example) == ("[ EU | organization ] rejects [ German | miscellaneous ] call to "
                                                "boycott [ British | miscellaneous ] lamb .")


def test_nested_annotations_survive_the_round_trip():
    rng = random.Random(2)
    for _ in range(300):
        tokens = [rng.choice("abc") for _ in range(rng.randint(1, 8))]
        notes = []
        for _ in range(rng.randint(0, 4)):
            start = rng.randrange(len(tokens))
            notes.append(Annotation(start, rng.randint(start + 1, len(tokens)), (rng.choice(["person", "location"]),)))
        text, dropped = write(tokens, notes)
        reading = interpret(text, tokens, TYPES, RELATIONS)
        gold = {(n.tags[0], n.start, n.end) for n in notes}
        assert reading.entities <= gold and not reading.errors
        assert len(gold) - len(reading.entities) <= dropped
        assert read(text)[1] == tokens


def test_any_string_is_read():
    rng = random.Random(3)
    pieces = ["[", "]", "|", "=", " ", "a", "person", "\u3000"]
    for _ in range(2000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 20)))
        reading = interpret(text, ["a", "a", "b"], TYPES, RELATIONS)
        assert all(0 <= start < end <= 3 for _, start, end in reading.entities)


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
                    == sorted(prediction["relations"]))
            assert {k for k, v in prediction["errors"].items() if v} == {
                "wrong_reconstruction" if e == "reconstruction" else f"{e}_error" for e in reading.errors}
            seen += 1
    assert seen == sum(len(e["predictions"]) for e in examples) > 20
