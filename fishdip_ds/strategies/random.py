"""A uniformly random static mask: the anchor that any selection has to beat."""

from __future__ import annotations

from fishdip_ds.selection.mask import Mask
from fishdip_ds.selector import Selector
from fishdip_ds.strategies.base import Strategy


class Random(Strategy):
    """k weights drawn uniformly, the same for any number of ranks."""

    def select(self, selector: Selector, step: int) -> Mask:
        """The k largest of uniform scores."""
        return selector.top(selector.uniform(), self.config.density)
