"""A sparse mask: which entries of which tensors are trained."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Mask:
    """Sorted global flat indices per tensor; the same object content on every rank.

    Costs 4 bytes per selected entry on every rank, because every rank picks the entries of its own
    (full, local) gradients.
    """

    names: tuple[str, ...]
    """All tensors of the model, in ``named_parameters()`` order, tied storage once."""
    numels: tuple[int, ...]
    """Global elements per tensor."""
    eligible_numel: int
    """Global elements that were up for selection: the base of ``density``."""
    by_tensor: tuple[torch.Tensor, ...] = field(repr=False)
    """Per tensor: int32 [k_t], sorted, global, flat inside the tensor; empty where nothing is selected."""

    @property
    def count(self) -> int:
        """Selected entries, k."""
        return sum(i.numel() for i in self.by_tensor)

    @property
    def density(self) -> float:
        """Selected share of the eligible weights, 0 to 1."""
        return self.count / self.eligible_numel

    @cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Per tensor: its range [lo, hi) in the k-vector, the concatenation of all selected entries."""
        ends = np.cumsum([i.numel() for i in self.by_tensor]).tolist()
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    def indices(self, name: str) -> torch.Tensor:
        """Selected entries of one tensor: int32 [k_t], sorted, global, flat. ``KeyError`` names what is known."""
        try:
            return self.by_tensor[self.names.index(name)]
        except ValueError:
            raise KeyError(f"no tensor {name!r} in the mask; tensors are named as in "
                           f"model.named_parameters(), for example {self.names[0]!r}") from None

    def global_indices(self) -> np.ndarray:
        """All selected entries as indices into the concatenation of all tensors: int64 [k], sorted."""
        offsets = np.cumsum([0, *self.numels[:-1]])
        parts = [i.cpu().numpy().astype("<i8") + o for i, o in zip(self.by_tensor, offsets, strict=True)]
        return np.concatenate(parts) if parts else np.zeros(0, "<i8")

    def hash(self) -> str:
        """sha256 hex digest of ``global_indices`` as little-endian int64."""
        return hashlib.sha256(self.global_indices().tobytes()).hexdigest()

    def shared_count(self, other: Mask) -> int:
        """Entries that both masks hold."""
        return sum(int(torch.isin(a, b, assume_unique=True).sum())
                   for a, b in zip(self.by_tensor, other.by_tensor, strict=True) if a.numel() and b.numel())

    def jaccard(self, other: Mask) -> float:
        """Overlap with another mask of the same model: intersection over union, 0 to 1."""
        shared = self.shared_count(other)
        union = self.count + other.count - shared
        return shared / union if union else 1.0


def union_sorted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sorted union of two sorted 1-D integer tensors without repeats."""
    if not a.numel():
        return b
    if not b.numel():
        return a
    return torch.unique(torch.cat([a, b]))
