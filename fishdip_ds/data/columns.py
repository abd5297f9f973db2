"""CoNLL-style column files: one token per line, token first, label last, a blank line between sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fishdip_ds.errors import DataError
from fishdip_ds.tasks.base import Example, Span

_PREFIXED = re.compile(r"([BIESLU])-(.+)")
_BARE = re.compile(r"(?![BIESLU]-)[A-Za-z][\w.&/-]*")


def read_columns(path: Path) -> list[Example]:
    """All sentences of a file labelled in BIO, IOB1, BIOES (or BILOU) or IO.

    Columns are separated by tabs if the file has any, else by spaces. ``-DOCSTART-`` lines end a sentence.

    Raises:
        DataError: naming file and line: missing, empty or undecodable file, a line without a label, or a
            label that is neither ``O``, nor ``B-TYPE`` and the like, nor a bare type.
    """
    lines = _lines(path)
    separator = "\t" if any("\t" in line for line in lines) else None
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if sentences[-1][0]:
                sentences.append(([], []))
            continue
        fields = [f.strip(" ") for f in line.split(separator)]
        if len(fields) < 2 or not fields[0] or not fields[-1]:
            raise DataError(f"{path}, line {number}: found {line[:60]!r}, expected a token and a label separated by "
                            f"{'a tab' if separator else 'spaces'}; mend the line.")
        label = fields[-1]
        if label != "O" and not _PREFIXED.fullmatch(label) and not _BARE.fullmatch(label):
            raise DataError(f"{path}, line {number}: {label!r} is no label; expected O, B-TYPE, I-TYPE "
                            "(also E-, S-), or a bare TYPE.")
        sentences[-1][0].append(fields[0])
        sentences[-1][1].append(label)
    if not sentences[-1][0]:
        sentences.pop()
    if not sentences:
        raise DataError(f"{path} holds no sentence; expected lines with a token and a label.")
    return [Example(id=str(i), tokens=tuple(tokens), entities=tuple(decode_labels(labels)))
            for i, (tokens, labels) in enumerate(sentences)]


def decode_labels(labels: Sequence[str]) -> list[Span]:
    """Spans of a label sequence, by TANL's rule for any of the schemes.

    An entity starts at a label after none, at a change of type, or at B- or S- (so I- may start one); a bare
    type counts as I-.
    """
    spans: list[Span] = []
    start, current = 0, None
    for i, label in enumerate([*labels, "O"]):
        prefix, kind = _split(label)
        if current is not None and (kind != current or prefix in "BSU"):
            spans.append((start, i, current))
            current = None
        if kind is not None and current is None:
            start, current = i, kind
    return spans


def _split(label: str) -> tuple[str, str | None]:
    if label == "O":
        return "O", None
    match = _PREFIXED.fullmatch(label)
    return (match[1], match[2]) if match else ("I", label)


def _lines(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; check the path.") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte {error.start}); convert the file to UTF-8.") from None
    # Only line feeds end lines: tweets hold other characters that str.splitlines would split at.
    return [line.rstrip("\r") for line in text.removeprefix("\ufeff").split("\n")]
