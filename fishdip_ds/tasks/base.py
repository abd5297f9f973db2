"""What a task is: text in, text out, and back to structures that can be counted."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from fishdip_ds.config import nearest
from fishdip_ds.errors import ConfigError

Span = tuple[int, int, str]
"""(start, end, type): token indices, end exclusive."""
ERRORS = ("reconstruction", "label", "entity", "format")
"""What can be wrong with a generated string; each counted at most once per example (tanl: 0 or 1)."""
_READABLE = re.compile(r"[^\s\[\]|=]+( [^\s\[\]|=]+)*")
"""Natural labels that come back whole when an augmented sentence is read: no special token, single spaces."""


@dataclass(frozen=True)
class Example:
    """One sentence with its gold annotation."""

    id: str
    tokens: tuple[str, ...]
    entities: tuple[Span, ...] = ()
    """Types as the data set names them."""


@dataclass(frozen=True)
class Schema:
    """The entity types of a data set and the words that stand for them in text."""

    natural: dict[str, str]
    """Data set label -> natural label."""

    def __post_init__(self) -> None:
        for label, natural in self.natural.items():
            if not _READABLE.fullmatch(natural):
                raise ConfigError(f"label {label!r} has the natural name {natural!r}, expected words with single "
                                  "spaces and none of [ ] | =; give it another name with a label map.")
        doubled = [n for n, count in Counter(self.natural.values()).items() if count > 1]
        if doubled:
            raise ConfigError(f"two labels share the natural name {doubled[0]!r}; give them different names with a "
                              "label map.")

    @property
    def label_of(self) -> dict[str, str]:
        """Natural label -> data set label."""
        return {natural: label for label, natural in self.natural.items()}


@dataclass(frozen=True)
class Parsed:
    """What a generated string says about an example."""

    entities: tuple[Span, ...]
    """Sorted set of spans over the example's tokens, natural types."""
    errors: frozenset[str]
    """Which of ``ERRORS`` occurred."""


@dataclass
class Counts:
    """Integer counts that add up over examples and ranks, whatever the order."""

    examples: int = 0
    by_type: dict[str, list[int]] = field(default_factory=dict)
    """Natural type -> [gold, predicted, correct]."""
    untyped: list[int] = field(default_factory=lambda: [0, 0, 0])
    """[gold, predicted, correct] of spans without their types."""
    errors: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ERRORS, 0))
    """Examples with each kind of error."""

    def __add__(self, other: Counts) -> Counts:
        types = {t: [a + b for a, b in zip(self.by_type.get(t, [0] * 3), other.by_type.get(t, [0] * 3), strict=True)]
                 for t in self.by_type.keys() | other.by_type.keys()}
        return Counts(self.examples + other.examples, types,
                      [a + b for a, b in zip(self.untyped, other.untyped, strict=True)],
                      {e: self.errors[e] + other.errors[e] for e in ERRORS})

    @property
    def total(self) -> list[int]:
        """[gold, predicted, correct] over all types."""
        return [sum(c[i] for c in self.by_type.values()) for i in range(3)]


def ratios(gold: int, predicted: int, correct: int) -> tuple[float, float, float]:
    """Precision, recall, F1 as fractions; 0 where undefined."""
    precision = correct / predicted if predicted else 0.0
    recall = correct / gold if gold else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class Task:
    """The interface that the trainer and the scorer use. A task is stateless but for its schema."""

    name: str
    headline = "f1"
    """The metric that picks the best checkpoint."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema

    def input_text(self, example: Example) -> str:
        """What the model reads."""
        raise NotImplementedError

    def target_text(self, example: Example) -> str:
        """What the model should write."""
        raise NotImplementedError

    def unwritable(self, example: Example) -> int:
        """How many gold annotations of ``example`` the target has to leave out."""
        return 0

    def parse(self, text: str, example: Example) -> Parsed:
        """What a generated ``text`` says about ``example``."""
        raise NotImplementedError

    def count(self, example: Example, text: str) -> Counts:
        """Counts of one generated ``text`` against the gold annotation."""
        raise NotImplementedError

    def metrics(self, counts: Counts) -> dict[str, float]:
        """Flat metrics, all fractions between 0 and 1."""
        raise NotImplementedError


def get_task(name: str, schema: Schema) -> Task:
    """The task of that name over ``schema``; ``ConfigError`` names the nearest known one."""
    from fishdip_ds.tasks.ner import Ner

    tasks: dict[str, type[Task]] = {"ner": Ner}
    if name not in tasks:
        raise ConfigError(f"unknown task {name!r}{nearest(name, tasks)}")
    return tasks[name](schema)
