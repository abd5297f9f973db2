"""What a reader of dataset files is, and how it opens them."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fishdip_ds.errors import DataError
from fishdip_ds.tasks.base import Example
from fishdip_ds.tasks.label_maps import natural_name

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class ReadOptions:
    """What a user may ask of a reader."""

    known: Mapping[str, str] | None = None
    """Label map, data set label -> natural label: labels that it lacks are errors. None: any label."""
    known_from: str = "the label map"
    fewrel_reference_spans: bool = False
    """FewRel: cut mentions to their first two tokens, as the published loader does."""
    text_columns: tuple[str, ...] = ()
    """Classification: columns or keys of the text, or of both; empty: by convention."""
    label_column: str | None = None
    """Classification: column or key of the label; None: by convention."""


@dataclass
class Part:
    """One split as it was read."""

    examples: list[Example]
    stats: dict[str, int] = field(default_factory=dict)
    """Counts of what the files hold beyond the examples: documents, dialogues, what had to be left out and why."""


@dataclass(frozen=True)
class Names:
    """Natural words for labels, and what else a data set knows about its labels."""

    entities: Mapping[str, str] = field(default_factory=dict)
    relations: Mapping[str, str] = field(default_factory=dict)
    slots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Dialogue: domain -> all its slots, seen in the examples or not."""
    rule: Callable[[str], str] = natural_name
    """Natural name of a label that no table has."""
    no_relation: str | None = None


@dataclass(frozen=True)
class Reader:
    """How one layout of files becomes examples."""

    name: str
    tasks: tuple[str, ...]
    """Tasks that the examples serve, the main one first."""
    files: Mapping[str, tuple[str, ...]]
    """Split -> glob patterns inside the folder; the first that matches counts."""
    read: Callable[[list[Path], ReadOptions], Part]
    names: Callable[[Path], Names] = lambda folder: Names()
    """Names for the labels of the data set in a folder."""
    about: str = ""

    def find(self, folder: Path) -> dict[str, list[Path]]:
        """Files of each split that is there, sorted."""
        found = {}
        for split in SPLITS:
            for pattern in self.files.get(split, ()):
                paths = sorted(p for p in folder.glob(pattern) if p.is_file())
                if paths:
                    found[split] = paths
                    break
        return found


def read_text(path: Path, *, latin1: bool = False) -> str:
    """The text of a file, unzipped where its name ends in ``.gz`` or ``.zip`` (its first member).

    Raises:
        DataError: a file that cannot be read, or is not UTF-8 (with ``latin1``, such a file is read as Latin-1).
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as stream:
                raw = stream.read()
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                raw = archive.read(archive.namelist()[0])
        else:
            raw = path.read_bytes()
    except (OSError, EOFError, zipfile.BadZipFile, IndexError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; check the path.") from None
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if latin1:
            return raw.decode("latin-1")
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: found byte 0x{raw[error.start]:02x} at offset {error.start}, which is "
                        "not UTF-8; convert the file to UTF-8.") from None


def read_json(path: Path, *, latin1: bool = False) -> object:
    """The JSON value of a file, as ``read_text`` opens it."""
    try:
        return json.loads(read_text(path, latin1=latin1))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}); mend that line.") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number from 1, object) of each filled line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error.msg}); mend that line.") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: found a JSON {type(row).__name__}, expected an object; "
                                "mend that line.")
            yield number, row


@contextmanager
def laid_out(path: Path, where: str, layout: str) -> Iterator[None]:
    """Lookups that fail in the block become one sentence: the file does not have that layout."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}, {where}: not the layout of {layout} ({type(error).__name__}: {error}); "
                        "name another reader, as in READER:FOLDER.") from None


def check_example(path: Path, example: Example) -> None:
    """``DataError`` if a span lies outside the text or a relation names no entity."""
    spans = [*example.entities, *([(*example.predicate, "predicate")] if example.predicate else [])]
    for start, end, kind in spans:
        if not (0 <= start < end <= len(example.tokens)):
            raise DataError(f"{path}, example {example.id}: span [{start}, {end}) of {kind!r} lies outside the "
                            f"{len(example.tokens)} tokens; correct it.")
    for head, kind, tail in example.relations:
        if not all(0 <= i < len(example.entities) for i in (head, tail)):
            raise DataError(f"{path}, example {example.id}: relation {kind!r} names entity {head} or {tail} of "
                            f"{len(example.entities)}; correct it.")
