"""Which weights to train: one method per file, and the table that names them."""

from fishdip_ds.strategies.base import Strategy
from fishdip_ds.strategies.fish import Fish
from fishdip_ds.strategies.fish_dip import FishDip
from fishdip_ds.strategies.random import Random

STRATEGIES: dict[str, type[Strategy]] = {"fish_dip": FishDip, "fish": Fish, "random": Random}

__all__ = ["STRATEGIES", "Strategy"]
