"""What a selection strategy is."""

from __future__ import annotations

from fishdip_ds.config import FishdipConfig
from fishdip_ds.selection.mask import Mask
from fishdip_ds.selector import Selector


class Strategy:
    """Decides when to choose weights and how. It sees the selector's verbs, no shard and no process group."""

    needs_samples = False
    """Whether training samples must be at hand."""

    def __init__(self, config: FishdipConfig) -> None:
        self.config = config

    def due(self, step: int) -> bool:
        """Whether a new mask is wanted before optimizer step ``step`` (from 1). Static methods: only before 1."""
        return step == 1

    def next_due(self, step: int) -> int | None:
        """The first step >= ``step`` for which ``due`` holds; None if there is none."""
        return 1 if step == 1 else None

    def select(self, selector: Selector, step: int) -> Mask:
        """Choose the mask that serves from ``step`` on. **Collective**: the verbs are."""
        raise NotImplementedError
