"""Words that stand for data-set labels in text (TANL's tables where it has one)."""

from __future__ import annotations

from collections.abc import Sequence

CONLL03 = {"LOC": "location", "MISC": "miscellaneous", "ORG": "organization", "PER": "person"}
ONTONOTES = {
    "CARDINAL": "cardinal", "DATE": "date", "EVENT": "event", "FAC": "facility", "GPE": "country city state",
    "LANGUAGE": "language", "LAW": "law", "LOC": "location", "MONEY": "monetary",
    "NORP": "nationality religious political group", "ORDINAL": "ordinal", "ORG": "organization",
    "PERCENT": "percent", "PERSON": "person", "PRODUCT": "product", "QUANTITY": "quantity", "TIME": "time",
    "WORK_OF_ART": "work_of_art"}
MAPS = {"conll03": CONLL03, "conll2003": CONLL03, "ontonotes": ONTONOTES}


def natural_names(dataset: str, labels: Sequence[str]) -> dict[str, str]:
    """Natural label of each label: from TANL's table of that data set, the rule for labels it lacks.

    A table counts only if it knows one of the ``labels`` (the name of a folder may mislead); then all its types
    are in the result, seen or not, as in TANL.
    """
    table = MAPS.get(dataset.lower(), {})
    if not any(label in table for label in labels):
        table = {}
    return {**table, **{label: natural_name(label) for label in labels if label not in table}}


def natural_name(label: str) -> str:
    """The rule where TANL has no table: lower case, ``_`` and ``-`` become spaces."""
    return label.lower().replace("_", " ").replace("-", " ")
