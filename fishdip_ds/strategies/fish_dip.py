"""FISH-DIP: Fisher scores on the samples with the worst losses, chosen again as training goes on.

Das et al. 2023, "Unified low-resource sequence labeling by sample-aware dynamic sparse finetuning"
(arXiv 2311.03748), section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fishdip_ds.selection.losses import reference_worst_count, worst
from fishdip_ds.strategies.base import MASK_SETTINGS, Periodic

if TYPE_CHECKING:
    from fishdip_ds.selection.mask import Mask
    from fishdip_ds.verbs import Verbs

RANKING_SETTINGS = frozenset({"worst_samples", "sample_loss", "worst_count_unit", "select_mode_first", "select_mode_refresh"})
"""Settings of methods that look for the worst samples."""


class FishDip(Periodic):
    """Before step 1 and before every multiple of ``refresh_interval``: losses, worst n, Fisher, global top-k."""

    needs_samples = True
    settings = MASK_SETTINGS | RANKING_SETTINGS | {"refresh_interval"}

    def select(self, verbs: Verbs, step: int) -> Mask:
        """See the class."""
        mode = self.config.select_mode_first if step == 1 else self.config.select_mode_refresh
        train_mode = mode == "train"
        losses = verbs.losses(kind=self.config.sample_loss, train_mode=train_mode)
        n = self.worst_count(verbs.n_samples, verbs.global_batch)
        if self.config.worst_count_unit == "samples" and n < self.config.worst_samples >= 1:
            verbs.note(f"worst_samples {self.config.worst_samples} is capped at {n}: "
                          f"there are {verbs.n_samples} training samples.")
        chosen = worst(losses, n)
        verbs.report.worst = [(i, float(losses[i])) for i in chosen]
        return self.top(verbs, verbs.fisher(chosen, train_mode=train_mode))

    def worst_count(self, n_samples: int, global_batch: int) -> int:
        """n: as configured, at least 1, and below the number of samples (unless there is but one)."""
        if self.config.worst_count_unit == "batches":
            return max(1, reference_worst_count(n_samples, global_batch))
        asked = self.config.worst_samples
        n = round(asked * n_samples) if isinstance(asked, float) else asked
        return max(1, min(n, n_samples - 1))
