"""The table of methods: one line each. Classes are imported when they are asked for, so that names cost nothing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fishdip_ds.strategies.base import Strategy

STRATEGIES = {
    # a few weights, chosen by a mask
    "fish_dip": "fish_dip:FishDip",
    "fish": "fish:Fish",
    "top_loss": "fish:TopLoss",
    "random_samples": "fish:RandomSamples",
    "random": "simple:Random",
    "magnitude": "simple:Magnitude",
    "sift": "simple:Sift",
    "lisa": "simple:Lisa",
    "spiel": "spiel:Spiel",
    "child_tuning_d": "child_tuning:ChildTuningD",
    "weight_mixup_sparse": "weight_mixup:SparseWeightMixup",
    # every weight, with dense state in shards
    "child_tuning_f": "child_tuning:ChildTuningF",
    "mixout": "mixout:Mixout",
    "dps": "dps:Dps",
    "dps_mix": "dps:DpsMix",
    "lt_sft": "lt_sft:LtSft",
    "weight_mixup": "weight_mixup:WeightMixup",
}
"""Name -> module and class. A module without a dot is one of this package; a method of your own project may be added
here before ``initialize``: ``STRATEGIES["mine"] = "my_project.mine:Mine"``."""

STOCK = {
    "full": frozenset(),
    "lora": frozenset({"lora_r", "lora_alpha", "match_density"}),
    "ia3": frozenset(),
    "prefix": frozenset({"prefix_tokens", "match_density"}),
    "shira": frozenset({"shira_r", "match_density"}),
}
"""Baselines run by stock DeepSpeed, and the settings that are theirs."""


def strategy_class(name: str) -> type[Strategy]:
    """The class that ``STRATEGIES`` names."""
    module, _, attribute = STRATEGIES[name].partition(":")
    return getattr(import_module(module if "." in module else f"fishdip_ds.strategies.{module}"), attribute)


def settings_of(name: str) -> frozenset[str]:
    """The settings that belong to a method, among those that do not belong to all."""
    return STOCK[name] if name in STOCK else strategy_class(name).settings


def known() -> tuple[str, ...]:
    """All names that ``"fishdip.strategy"`` may have."""
    return (*STRATEGIES, *STOCK)
