"""Named entity recognition as text: ``[ EU | organization ] rejects [ German | miscellaneous ] call``."""

from __future__ import annotations

from fishdip_ds.tasks.augmented import Annotation, interpret, write
from fishdip_ds.tasks.base import ERRORS, Counts, Example, Parsed, Task, ratios


class Ner(Task):
    """TANL's NER: the input is the plain sentence, the output repeats it with entities in brackets."""

    name = "ner"

    def input_text(self, example: Example) -> str:
        """Tokens joined by one space."""
        return " ".join(example.tokens)

    def target_text(self, example: Example) -> str:
        """The sentence with ``[ words | natural type ]``."""
        return write(example.tokens, self._annotations(example))[0]

    def unwritable(self, example: Example) -> int:
        """Gold entities that cross another and so cannot be written."""
        return write(example.tokens, self._annotations(example))[1]

    def _annotations(self, example: Example) -> list[Annotation]:
        return [Annotation(start, end, (self.schema.natural[kind],)) for start, end, kind in example.entities]

    def parse(self, text: str, example: Example) -> Parsed:
        """Entities as (start, end, natural type), sorted."""
        reading = interpret(text, example.tokens, frozenset(self.schema.natural.values()), frozenset())
        return Parsed(tuple(sorted((s, e, t) for t, s, e in reading.entities)), reading.errors)

    def count(self, example: Example, text: str) -> Counts:
        """Sets of (type, start, end), compared exactly."""
        parsed = self.parse(text, example)
        gold = {(s, e, self.schema.natural[t]) for s, e, t in example.entities}
        predicted = set(parsed.entities)
        counts = Counts(1, errors={name: int(name in parsed.errors) for name in ERRORS})
        for i, spans in enumerate((gold, predicted, gold & predicted)):
            for _, _, kind in spans:
                counts.by_type.setdefault(kind, [0, 0, 0])[i] += 1
        bare_gold, bare_predicted = {s[:2] for s in gold}, {s[:2] for s in predicted}
        counts.untyped = [len(bare_gold), len(bare_predicted), len(bare_gold & bare_predicted)]
        return counts

    def metrics(self, counts: Counts) -> dict[str, float]:
        """Micro precision, recall, F1 (typed and untyped), macro F1 over the schema, and the four error rates."""
        precision, recall, f1 = ratios(*counts.total)
        untyped = ratios(*counts.untyped)
        each = [ratios(*counts.by_type.get(t, [0, 0, 0])) for t in self.schema.natural.values()]
        macro = [sum(r[i] for r in each) / len(each) if each else 0.0 for i in range(3)]
        return {"precision": precision, "recall": recall, "f1": f1, "precision_untyped": untyped[0],
                "recall_untyped": untyped[1], "f1_untyped": untyped[2], "precision_macro": macro[0],
                "recall_macro": macro[1], "f1_macro": macro[2],
                **{f"error_{name}": counts.errors[name] / max(1, counts.examples) for name in ERRORS}}
