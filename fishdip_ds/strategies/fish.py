"""FISH Mask: one Fisher mask of random samples, never refreshed (Sung et al., NeurIPS 2021)."""

from __future__ import annotations

from fishdip_ds.selection.mask import Mask
from fishdip_ds.selector import Selector
from fishdip_ds.strategies.base import Strategy


class Fish(Strategy):
    """Static baseline: what FISH-DIP is without sample-awareness and without change."""

    needs_samples = True

    def select(self, selector: Selector, step: int) -> Mask:
        """Fisher of ``fisher_samples`` random training samples, then the global top-k."""
        chosen = selector.random_samples(self.config.fisher_samples)
        selector.report.worst = [(i, float("nan")) for i in chosen[:25]]
        return selector.top(selector.fisher(chosen), self.config.density)
