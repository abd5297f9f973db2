"""The project's own JSON lines: one file per split, one object per example, the same for every data set.

Keys by task (``id`` and ``group``, the document or dialogue, are optional; ``text`` may stand for ``tokens`` and is
split at white space; spans are token indices, end exclusive):

ner: tokens, entities [[start, end, type], ...]
joint_er: tokens, entities, relations [{type, head, tail}, ...] with positions in entities
relation: tokens, head [start, end], tail [start, end], relation
srl: tokens, predicate [start, end], arguments [[start, end, role], ...]
dst: history [utterance, ...] (user first, taking turns), state [[domain, slot, value], ...] or ["domain-slot-value", ...]
classification: text (and text2), label; other names that are known are in ``fishdip_ds/data/readers/classification.py``
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fishdip_ds.data.readers.base import Part, ReadOptions, read_json_lines
from fishdip_ds.data.readers.classification import from_values
from fishdip_ds.errors import DataError
from fishdip_ds.tasks.base import Example

KEYS = {"ner": ("entities",), "joint_er": ("entities", "relations"), "relation": ("head", "tail", "relation"),
        "srl": ("predicate", "arguments"), "dst": ("history", "state")}


def read_jsonl(task: str):
    """A read function for the neutral files of ``task``."""

    def read(paths: list[Path], options: ReadOptions) -> Part:
        return Part([from_row(task, row, f"{path}, line {number}", options=options) for path in paths
                     for number, row in read_json_lines(path)])

    return read


def from_row(task: str, row: dict, where: str, *, gold: bool = True, options: ReadOptions | None = None) -> Example:
    """One neutral object as an example.

    Args:
        where: file and line, for errors.
        gold: whether the annotation must be there; the input alone is enough to predict.

    Raises:
        DataError: naming the key that is missing or malformed.
    """
    if task == "classification":
        return from_values(row, where.rpartition(" ")[2], where, options or ReadOptions(), gold=gold)
    inputs = {"relation": ("head", "tail"), "srl": ("predicate",), "dst": ("history",)}.get(task, ())
    for key in KEYS[task] if gold else inputs:
        if key not in row:
            raise DataError(f"{where}: an example of task {task} needs the key {key!r}; add it (keys there: "
                            f"{', '.join(row) or 'none'}).")
    try:
        tokens = _tokens(row, where) if task != "dst" else ()
        common = {"id": str(row.get("id", where.rpartition(" ")[2])), "tokens": tokens, "group": str(row.get("group", ""))}
        return _BUILD[task](row, common)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{where}: malformed example of task {task} ({type(error).__name__}: {error}); see the keys in "
                        "fishdip_ds/data/readers/neutral.py.") from None


def _tokens(row: dict, where: str) -> tuple[str, ...]:
    tokens = tuple(row["tokens"]) if "tokens" in row else tuple(str(row.get("text", "")).split())
    if not tokens or not all(isinstance(t, str) and t.strip() for t in tokens):
        raise DataError(f'{where}: found no words; give "tokens", a list of words, or "text".')
    return tokens


def _spans(rows: Iterable) -> tuple:
    return tuple((int(start), int(end), str(kind)) for start, end, kind in rows)


def _relation(row: dict, common: dict) -> Example:
    (a, b), (c, d) = row["head"], row["tail"]
    relations = ((0, str(row["relation"]), 1),) if "relation" in row else ((0, "", 1),)
    return Example(**common, entities=((a, b, "head"), (c, d, "tail")), relations=relations)


def _dialogue(row: dict, common: dict) -> Example:
    state = [entry.split("-", 2) if isinstance(entry, str) else entry for entry in row.get("state", ())]
    return Example(**common, history=tuple(map(str, row["history"])),
                   state=tuple((str(d), str(s), str(v)) for d, s, v in state))


def _predicate(row: dict, common: dict) -> Example:
    start, end = row["predicate"]
    return Example(**common, entities=_spans(row.get("arguments", ())), predicate=(start, end))


_BUILD = {
    "ner": lambda row, common: Example(**common, entities=_spans(row.get("entities", ()))),
    "joint_er": lambda row, common: Example(
        **common, entities=_spans(row.get("entities", ())),
        relations=tuple((r["head"], str(r["type"]), r["tail"]) for r in row.get("relations", ()))),
    "relation": _relation, "srl": _predicate, "dst": _dialogue}


def to_row(task: str, example: Example) -> dict:
    """The neutral object of an example; ``from_row`` gives it back."""
    row: dict = {"id": example.id, **({"group": example.group} if example.group else {})}
    if task == "dst":
        return {**row, "history": list(example.history), "state": [list(entry) for entry in example.state]}
    if task == "classification":
        names = ("text", "text2")[: len(example.texts)]
        return {**row, **dict(zip(names, example.texts, strict=True)), "label": example.label}
    row["tokens"] = list(example.tokens)
    if task == "relation":
        head, relation, tail = example.relations[0]
        return {**row, "head": list(example.entities[head][:2]), "tail": list(example.entities[tail][:2]),
                "relation": relation}
    if task == "srl":
        return {**row, "predicate": list(example.predicate), "arguments": [list(e) for e in example.entities]}
    row["entities"] = [list(e) for e in example.entities]
    if task == "joint_er":
        row["relations"] = [{"type": kind, "head": head, "tail": tail} for head, kind, tail in example.relations]
    return row


def write_jsonl(path: Path, task: str, examples: Iterable[Example]) -> None:
    """Write neutral JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(to_row(task, e), ensure_ascii=False) + "\n" for e in examples), encoding="utf-8")
