"""Per-sample losses and who is worst."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from fishdip_ds.errors import ConfigError

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


def loss_of(out: object) -> torch.Tensor:
    """The ``.loss`` of a model's output; ``ConfigError`` if it has none."""
    loss = getattr(out, "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise ConfigError(f"the model's forward gave a {type(out).__name__} without a loss; let it return an object with "
                          ".loss, or pass loss_fn=(model, batch) -> losses [batch] to fishdip_ds.initialize.")
    return loss


def losses_of(losses: object, batch: dict) -> torch.Tensor:
    """What a ``loss_fn`` gave, [B]; ``ConfigError`` if that is not one loss for each row of the batch."""
    rows = next((v.shape[0] for v in batch.values() if isinstance(v, torch.Tensor) and v.dim()), None)
    if not isinstance(losses, torch.Tensor) or losses.dim() != 1 or (rows is not None and losses.numel() != rows):
        what = f"shape {list(losses.shape)}" if isinstance(losses, torch.Tensor) else f"a {type(losses).__name__}"
        raise ConfigError(f"loss_fn gave {what} for a batch of {rows} rows; return one for each, [batch], not their mean.")
    return losses


def row_losses(out: object, batch: dict, kind: str, shift: bool) -> torch.Tensor:
    """Losses of the samples of a training micro-batch, from what its forward pass gave: fp32 [B], local, no gradient.

    Args:
        out: has ``losses`` [B] (of a ``loss_fn``), or ``logits`` [B, T, V] or [B, C], or of one sample alone its ``loss``.

    Raises:
        ConfigError: if the output of several samples has neither.
    """
    with torch.no_grad():
        losses, logits, labels = getattr(out, "losses", None), getattr(out, "logits", None), batch.get("labels")
        if isinstance(losses, torch.Tensor):
            return losses.detach().float()
        both = isinstance(logits, torch.Tensor) and isinstance(labels, torch.Tensor)
        if both and logits.dim() == labels.dim() + 1 in (2, 3):
            return sample_losses(logits.detach(), labels, kind, shift)
        rows = next((v.shape[0] for v in batch.values() if isinstance(v, torch.Tensor) and v.dim()), 1)
        if rows == 1:
            return out.loss.detach().float().reshape(1)
    raise ConfigError('"fishdip.loss_scan" is "running", but the model gives neither logits nor losses of single samples; '
                      'pass a loss_fn, or set it to "scan".')


def update_running(table: torch.Tensor, ids: torch.Tensor, losses: torch.Tensor) -> None:
    """Write the newest losses into a running table, in place and without a device read.

    Args:
        table: fp32 [E + 1]; the last slot takes what belongs to no sample.
        ids: int64 [n], sample ids, -1 for none; of a sample that is there twice the larger loss counts.
        losses: fp32 [n].
    """
    slots = torch.where(ids < 0, table.numel() - 1, ids)
    table.index_fill_(0, slots, float("-inf"))
    table.scatter_reduce_(0, slots, losses, "amax")
    table[-1].zero_()  # what was written there may be NaN, the mean over no target


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
