"""Learning-rate schedules that know how long the run is."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupHoldDecay(LRScheduler):
    """Linear warm-up, a constant stretch, then linear decay; steps are optimizer steps.

    Args:
        optimizer: whose groups are scheduled.
        total_steps: length of the run; the module fills it in from the trainer where it is ``None``.
        warmup: steps of warm-up.
        hold: share of the run after which decay begins.
        final: share of the learning rate at the end.
    """

    interval = "step"

    def __init__(
        self, optimizer: Optimizer, total_steps: int | None = None, warmup: int = 100, hold: float = 0.6,
        final: float = 0.02,
    ) -> None:  # fmt: skip
        self.total_steps, self.warmup, self.hold, self.final = total_steps, warmup, hold, final
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if not self.total_steps:
            return 1.0
        done = min(1.0, step / self.total_steps)
        left = (1 - done) / (1 - self.hold) if done > self.hold else 1.0
        return max(self.final, left)

    def get_lr(self) -> list[Any]:
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]


__all__ = ["WarmupHoldDecay"]
