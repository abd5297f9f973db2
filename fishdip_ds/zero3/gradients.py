"""Gradients as they appear: a hook per parameter hands each full local gradient to one sink, then frees it.

ZeRO-3's own gradient path is not in use (no DeepSpeed optimizer), so the gradient that a
post-accumulate hook sees is this rank's own, unreduced, of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager

import torch

from fishdip_ds.selection.mask import Mask
from fishdip_ds.zero3.shards import ShardLayout, TensorShard

CHUNK = 1 << 20
"""Elements squared at a time on one rank, so that the fp32 copy of a large bf16 gradient stays small."""
EXCHANGE = 1 << 24
"""Squares that ranks exchange at a time, all pieces together, so that a large tensor's stay small too."""
Sink = Callable[[TensorShard, torch.Tensor], None]


class GradientTap:
    """Post-accumulate hooks on every trainable parameter. At most one sink listens at a time.

    Without a sink gradients are dropped at once: nothing of a gradient ever outlives its layer.
    """

    def __init__(self, layout: ShardLayout) -> None:
        self._sink: Sink | None = None
        self._handles = [
            t.param.register_post_accumulate_grad_hook(self._hook(t)) for t in layout.tensors if t.param.requires_grad]

    def _hook(self, tensor: TensorShard) -> Callable[[torch.Tensor], None]:
        def take(param: torch.Tensor) -> None:
            grad, param.grad = param.grad, None
            if self._sink is not None and tensor.eligible and grad is not None:
                self._sink(tensor, grad.to_dense() if grad.is_sparse else grad)

        return take

    @contextmanager
    def into(self, sink: Sink):
        """Send the gradients of backward passes inside the block to ``sink``."""
        before, self._sink = self._sink, sink
        try:
            yield
        finally:
            self._sink = before

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()


class MaskedAccumulator:
    """Sum of weighted gradients at the masked entries over the micro-batches of one optimizer step.

    One flat fp32 buffer holds the k-vector and behind it what else the step must sum over ranks, so that
    a step needs a single all-reduce: [k gradient sums | weight | weight x loss | stop | used flag per tensor].
    """

    def __init__(self, layout: ShardLayout, mask: Mask, device: torch.device) -> None:
        self._k = mask.count
        self.buffer = torch.zeros(self._k + 3 + len(layout.tensors), dtype=torch.float32, device=device)
        self._views = {
            index: (indices, self.buffer[lo:hi])
            for index, (indices, (lo, hi)) in enumerate(zip(mask.by_tensor, mask.segments, strict=True)) if hi > lo}
        self._weight = 0.0

    def begin(self, weight: float, loss: torch.Tensor) -> None:
        """Note the coming backward pass: its ``weight`` (target tokens or samples) and mean loss (0-D)."""
        self._weight = weight
        if weight:
            self.buffer[self._k] += weight
            self.buffer[self._k + 1] += loss.detach().float() * weight

    def __call__(self, tensor: TensorShard, grad: torch.Tensor) -> None:
        if not self._weight:  # a filler batch only keeps the ranks in step; its gradient may be anything
            return
        sums = self.use(tensor.index)
        if sums is not None:
            sums.add_(grad.reshape(-1).index_select(0, self._views[tensor.index][0]).float(), alpha=self._weight)

    @property
    def weight(self) -> float:
        """Weight of the backward pass that was begun last."""
        return self._weight

    def use(self, index: int) -> torch.Tensor | None:
        """Note that a tensor has a gradient; its piece of the k-vector, fp32 [k_t], or None if the mask has none of it."""
        self.buffer[self._k + 3 + index] = 1.0
        return self._views[index][1] if index in self._views else None

    @property
    def gradient(self) -> torch.Tensor:
        """The k-vector: fp32 [k], sums over micro-batches (and over ranks after the all-reduce)."""
        return self.buffer[: self._k]

    @property
    def totals(self) -> torch.Tensor:
        """fp32 [3]: summed weight, summed weight x loss, ranks that were asked to stop."""
        return self.buffer[self._k : self._k + 3]

    def ask_to_stop(self) -> None:
        """Tell all ranks with the coming all-reduce that this one was asked to stop."""
        self.buffer[self._k + 2] = 1.0

    @property
    def used(self) -> torch.Tensor:
        """fp32 [tensors]: how many ranks saw a gradient of each tensor in this step (after the all-reduce)."""
        return self.buffer[self._k + 3 :]

    def reset(self) -> None:
        """Start the next optimizer step."""
        self.buffer.zero_()


class SquareAccumulator:
    """Owned shards of the sum over samples of squared per-sample gradients: the empirical Fisher diagonal.

    Each backward pass inside is one sample on each rank. Squares are taken before any reduction and
    travel to their owner, who adds them **in sample order**: a reduce-scatter would send as many bytes,
    but adds in an order that depends on N, and with it the mask. So scores are bitwise the same for
    every number of ranks, as long as rank r takes samples r, r+N, r+2N, ...
    """

    def __init__(self, layout: ShardLayout, device: torch.device,
                 within: Mapping[int, tuple[int, int]] | None = None) -> None:
        """``within``: tensor index -> range of each rank's piece (the same on all ranks) to score; None scores all."""
        self._layout = layout
        self._live = True
        self._ranges = within if within is not None else {t.index: (0, layout.piece_numel(t)) for t in layout.eligible}
        self.scores: dict[int, torch.Tensor] = {}
        """Per scored tensor index: fp32, the owned part of its range, local, no padding."""
        for t in layout.eligible:
            if t.index in self._ranges:
                begin, end = (min(at, t.stop - t.start) for at in self._ranges[t.index])
                self.scores[t.index] = torch.zeros(end - begin, dtype=torch.float32, device=device)

    def begin(self, live: bool) -> None:
        """Note whether this rank's coming backward pass is a real sample or a filler that must count as zero."""
        self._live = live

    def __call__(self, tensor: TensorShard, grad: torch.Tensor) -> None:
        if tensor.index not in self._ranges:
            return
        comm, score, (begin, end) = self._layout.comm, self.scores[tensor.index], self._ranges[tensor.index]
        flat = grad.reshape(-1)
        if comm.world == 1:
            if self._live:
                for part, into in zip(flat[begin:end].split(CHUNK), score.split(CHUNK), strict=True):
                    into.add_(part.float().square_())  # not addcmul: a fused multiply-add rounds differently
            return
        piece = self._layout.piece_numel(tensor)
        width = max(1, EXCHANGE // comm.world)
        for lo in range(begin, end, width):
            hi = min(lo + width, end)
            pieces = torch.zeros(comm.world, hi - lo, dtype=torch.float32, device=grad.device)
            if self._live:
                for rank, row in enumerate(pieces):
                    part = flat[rank * piece + lo : min(rank * piece + hi, tensor.numel)]
                    row[: part.numel()] = part
                pieces.square_()
            into = score[lo - begin : hi - begin]
            for from_rank in comm.all_to_all(pieces, tag="scores"):
                into.add_(from_rank[: into.numel()])
