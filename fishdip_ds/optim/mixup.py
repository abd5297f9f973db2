"""AdamW as weight mixup needs it: steps on trial, and a running sum over folds beside the moments."""

from __future__ import annotations

import torch

from fishdip_ds.optim.adamw import AdamW, adamw_update
from fishdip_ds.optim.dense import DenseAdamW, dense_adamw_update

FOLD_SUM = (("fold_sum", torch.float32),)


class TrialDenseAdamW(DenseAdamW):
    """Of all owned weights."""

    ENTRY_STATE = DenseAdamW.ENTRY_STATE + FOLD_SUM

    @property
    def steps_taken(self) -> int:
        """Steps since the moments were zero."""
        return self.steps

    def _step(self, vectors: list[torch.Tensor], step: int) -> None:
        group = self.param_groups[0]
        dense_adamw_update(*vectors, step=step, lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
                           weight_decay=group["weight_decay"])

    def peek(self, grad: torch.Tensor) -> torch.Tensor:
        """What ``step_owned`` would make of the weights, without doing it: fp32 [n], local."""
        weight, *moments = (self.vectors()[name].clone() for name in ("master", "exp_avg", "exp_avg_sq"))
        self._step([weight, grad, *moments], self.steps + 1)
        return weight

    def peek_second(self, grad: torch.Tensor) -> torch.Tensor:
        """The second moment that ``step_owned`` would leave: fp32 [n], local."""
        beta2 = self.param_groups[0]["betas"][1]
        return self.entry_state["exp_avg_sq"] * beta2 + (1 - beta2) * grad * grad

    def step_owned(self, grad: torch.Tensor) -> None:
        """One AdamW step on the owned weights: ``grad`` fp32 [n], local."""
        self.steps += 1
        self._step([self.master, grad, self.entry_state["exp_avg"], self.entry_state["exp_avg_sq"]], self.steps)

    def forget(self) -> None:
        """Zero the moments; the sum over folds stays. Local."""
        for name in ("exp_avg", "exp_avg_sq"):
            self.entry_state[name].zero_()
        self.steps = 0


class TrialAdamW(AdamW):
    """Of the owned entries of a mask that does not change."""

    ENTRY_STATE = AdamW.ENTRY_STATE + FOLD_SUM

    @property
    def steps_taken(self) -> int:
        """Steps since the moments were zero."""
        return self.oldest

    def _step(self, vectors: list[torch.Tensor]) -> None:
        group = self.param_groups[0]
        adamw_update(*vectors, oldest=self.oldest, lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
                     weight_decay=group["weight_decay"])

    def peek(self, grad: torch.Tensor) -> torch.Tensor:
        """See ``TrialDenseAdamW.peek``."""
        weight, *state = (self.vectors()[name].clone() for name in ("master", "exp_avg", "exp_avg_sq", "age"))
        self._step([weight, grad, *state])
        return weight

    peek_second = TrialDenseAdamW.peek_second

    def step_owned(self, grad: torch.Tensor) -> None:
        """See ``TrialDenseAdamW.step_owned``."""
        self._step([self.master, grad, *(self.entry_state[name] for name in ("exp_avg", "exp_avg_sq", "age"))])
        self.oldest += 1

    def restart(self, weights: torch.Tensor) -> None:
        """Masters to ``weights`` (fp32 [n], local), moments and ages to zero; the sum over folds stays."""
        self.master.copy_(weights)
        for name in ("exp_avg", "exp_avg_sq", "age"):
            self.entry_state[name].zero_()
        self.oldest = 0
