"""From ``--data`` to examples: which files are which split, and how to read them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fishdip_ds.config import nearest
from fishdip_ds.errors import ConfigError, DataError
from fishdip_ds.tasks.base import Example, Schema

FILES = {
    "train": ("train.txt", "train.conll", "train.bio", "train.iob", "train.tsv", "wnut17train.conll"),
    "dev": ("dev.txt", "dev.conll", "dev.bio", "dev.iob", "dev.tsv", "valid.txt", "valid.conll", "emerging.dev.conll"),
    "test": ("test.txt", "test.conll", "test.bio", "test.iob", "test.tsv", "emerging.test.annotated"),
}
READERS = ("conll", "crossner", "wnut17")
"""Names that may stand before the folder, as in ``wnut17:PATH``; all three read the same columns."""


@dataclass(frozen=True)
class Splits:
    """A data set for one task."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    schema: Schema
    source: str
    """Where it came from, for the log."""


def load_dataset(data: str, task: str, *, seed: int = 0, labels: Path | None = None) -> Splits:
    """Read ``demo``, a folder of column files, or ``READER:FOLDER``.

    Args:
        labels: JSON file {data set label: natural label}; a label in the data that it lacks is an error.

    Raises:
        ConfigError: unknown reader or task without a reader. DataError: missing or malformed files.
    """
    from fishdip_ds.data.columns import read_columns
    from fishdip_ds.data.demo import load_demo
    from fishdip_ds.tasks.label_maps import natural_names

    if task != "ner":
        raise ConfigError(f"no reader gives examples for task {task!r} yet; use ner.")
    if data == "demo":
        return load_demo(task, seed)
    folder = _folder(data)
    found = {split: _find(folder, split) for split in FILES}
    known = _label_file(labels) if labels else None
    splits = {split: read_columns(path, known, str(labels)) for split, path in found.items()}
    types = {kind for examples in splits.values() for example in examples for _, _, kind in example.entities}
    natural = natural_names(folder.resolve().name, sorted(types)) if known is None else known
    return Splits(**splits, schema=Schema(natural), source=str(folder))


def _folder(data: str) -> Path:
    """The folder of ``PATH`` or ``READER:PATH``."""
    name, colon, rest = data.partition(":")
    if colon and not Path(data).exists():
        if name not in READERS:
            raise ConfigError(f"unknown data set reader {name!r} in {data!r}{nearest(name, READERS)}")
        return Path(rest)
    return Path(data)


def _find(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        raise DataError(f"no data folder at {folder}; give a folder with train, dev and test files, or --data demo.")
    for file in FILES[split]:
        if (folder / file).is_file():
            return folder / file
    raise DataError(f"{folder} has no {split} file; looked for {', '.join(FILES[split])}.")


def _label_file(path: Path) -> dict[str, str]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the label map {path}: {error}.") from None
    if not isinstance(loaded, dict) or not all(isinstance(v, str) for v in loaded.values()):
        raise DataError(f"{path} must hold one JSON object that maps each label to its natural name.")
    return loaded
