"""AdamW on every owned weight: what the dense methods need."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fishdip_ds.optim.adamw import bias_table
from fishdip_ds.optim.compact import CompactOptimizer


def dense_adamw_update(weight: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, *,
                       step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
                       movable: torch.Tensor | None = None) -> None:
    """One AdamW step in place on fp32 [n] (Loshchilov & Hutter 2019, algorithm 2), number ``step`` from 1.

    Args:
        movable: bool [n]; the other entries keep weight and moments. None: all move.
    """
    if movable is not None:
        parts = [v[movable] for v in (weight, grad, exp_avg, exp_avg_sq)]
        dense_adamw_update(*parts, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for whole, part in zip((weight, exp_avg, exp_avg_sq), (parts[0], parts[2], parts[3]), strict=True):
            whole[movable] = part
        return
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if weight_decay:
        weight.mul_(1 - lr * weight_decay)
    correction1, correction2 = float(bias_table(beta1, step)[-1]), float(bias_table(beta2, step)[-1])
    denominator = exp_avg_sq.sqrt().div_(correction2**0.5).add_(eps)
    weight.addcdiv_(exp_avg, denominator, value=-lr / correction1)


class DenseAdamW(CompactOptimizer):
    """Master and two moments of all owned eligible weights, flat: 12 bytes per owned weight."""

    ENTRY_STATE = (("exp_avg", torch.float32), ("exp_avg_sq", torch.float32))

    def __init__(self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0) -> None:
        super().__init__({"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.steps = 0
        self.slices: dict[int, slice] = {}
        """Tensor index -> its place in the flat vectors."""

    def adopt(self, indices: Sequence[int], weights: Sequence[torch.Tensor]) -> None:
        """Take over the owned weights of tensors: any float dtype, 1-D, local; moments start at zero."""
        device = self.master.device if not weights else weights[0].device
        at = 0
        for index, weight in zip(indices, weights, strict=True):
            self.slices[index] = slice(at, at + weight.numel())
            at += weight.numel()
        self.param_groups[0]["params"][0].data = torch.cat([w.float() for w in weights]) if weights else torch.zeros(0)
        self.entry_state = {name: torch.zeros(at, dtype=dtype, device=device) for name, dtype in self.ENTRY_STATE}
        self.steps = 0

    def part(self, index: int, name: str = "master") -> torch.Tensor:
        """View of one tensor's owned elements of a state vector: fp32 [numel], local."""
        return self.vectors()[name][self.slices[index]]

    def step_tensor(self, index: int, grad: torch.Tensor, movable: torch.Tensor | None) -> None:
        """Update one tensor's owned weights; the count of steps is the caller's. Local."""
        group = self.param_groups[0]
        dense_adamw_update(self.part(index), grad, self.part(index, "exp_avg"), self.part(index, "exp_avg_sq"),
                           step=self.steps, lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
                           weight_decay=group["weight_decay"], movable=movable)

    def forget(self) -> None:
        """Zero the moments; the masters are the caller's to put back. Local."""
        for vector in self.entry_state.values():
            vector.zero_()
        self.steps = 0

    def dense_state(self) -> dict[str, torch.Tensor]:
        """Step count: int64 [1]."""
        return {"steps": torch.tensor([self.steps])}

    def load_dense_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the step count."""
        self.steps = int(state["steps"])
