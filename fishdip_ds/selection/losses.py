"""Per-sample losses and who is worst."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

IGNORE = -100
"""Label that counts in no loss."""


def shifts_labels(model: nn.Module) -> bool:
    """True for decoder-only language models, whose forward predicts ``labels[:, 1:]`` from ``logits[:, :-1]``."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__.endswith(("CausalLM", "LMHeadModel"))


def target_count(labels: torch.Tensor, shift: bool) -> float:
    """How many targets the mean loss of a batch averages over: labels that are not -100, else rows."""
    if labels.is_floating_point():
        return float(labels.shape[0])
    counted = labels[:, 1:] if shift and labels.dim() > 1 else labels
    return float((counted != IGNORE).sum())


def sample_losses(logits: torch.Tensor, labels: torch.Tensor, kind: str, shift: bool) -> torch.Tensor:
    """Loss of each sample of a batch: fp32 [B], local. Cross-entropy, or the squared error where labels are floats.

    Args:
        logits: [B, T, V] of any float dtype; of a classifier [B, C]; of a regressor [B, 1].
        labels: int64 [B, T] or [B], -100 ignored; float [B].
        kind: ``token_mean`` (over the sample's own targets), ``sum``, or ``padded_mean`` (sum divided by T,
            the reference code's ranking: with targets padded to one length it ranks by the sum).
        shift: see ``shifts_labels``.

    A classifier's sample has one target, so that ``kind`` changes nothing.
    """
    if labels.dim() == 1:
        labels = labels.to(logits.device)
        if labels.is_floating_point():
            return (logits.float().view(-1) - labels.float()).square()
        return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    total = torch.stack([  # one sample at a time: an fp32 copy of all logits would be the peak of the pass
        functional.cross_entropy(row.float(), target, ignore_index=IGNORE, reduction="none").sum()
        for row, target in zip(logits, labels.to(logits.device), strict=True)])
    if kind == "sum":
        return total
    if kind == "padded_mean":
        return total / labels.shape[1]
    return total / (labels != IGNORE).sum(1).clamp(min=1).to(total.device)


def worst(losses: torch.Tensor, n: int) -> list[int]:
    """The n sample ids with the largest losses, largest first, ties to the lower id.

    Args:
        losses: fp32 [E], global (the same on every rank).
    """
    return torch.sort(losses.cpu(), descending=True, stable=True).indices[:n].tolist()


def reference_worst_count(n_samples: int, global_batch: int) -> int:
    """How many worst samples the FISH-DIP code takes: a tenth of the number of *batches*, within 3..25, below E."""
    batches = -(-n_samples // global_batch)
    return min(min(max(int(0.1 * batches), 3), 25), n_samples - 1)
