"""Learning-rate schedules that know how long the run is."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

POSITION = ("last_epoch", "_step_count", "_last_lr", "base_lrs")
"""The state of a schedule that a checkpoint restores; its settings, among them its length, are those of the run."""


class ResumableSchedule(LRScheduler):
    """A schedule that a longer or shorter run takes up where a checkpoint left it.

    torch restores every attribute, so that a run resumed with more epochs kept the rates of the old length.
    """

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name in POSITION}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state_dict.items() if name in POSITION})
        # The optimizer's groups hold the rates of the old length until the next step.
        self._last_lr = [float(rate) for rate in self.get_lr()]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


class WarmupHoldDecay(ResumableSchedule):
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
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup: int = 100,
        hold: float = 0.6,
        final: float = 0.02,
    ) -> None:
        self.total_steps, self.warmup, self.hold, self.final = total_steps, warmup, hold, final
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """Compute the factor of the learning rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if not self.total_steps:
            return 1.0
        done = min(1.0, step / self.total_steps)
        left = (1 - done) / (1 - self.hold) if done > self.hold else 1.0
        return max(self.final, left)

    def get_lr(self) -> list[Any]:
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]


class WarmupCosineRestarts(ResumableSchedule):
    """Linear warm-up, then cosine decay that restarts; steps are epochs (CLIP-EBC: trainer.py).

    Args:
        optimizer: whose groups are scheduled.
        warmup: epochs of warm-up.
        warmup_lr: learning rate at its start; above the optimizer's it warms down, as for visual prompts (1e-3).
        first: epochs until the first restart.
        factor: every stretch is this many times as long as the one before.
        final: learning rate at the end of a stretch.
    """

    interval = "epoch"

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int = 50,
        warmup_lr: float = 1e-6,
        first: int = 5,
        factor: int = 2,
        final: float = 1e-7,
    ) -> None:
        self.warmup, self.warmup_lr, self.first, self.factor, self.final = warmup, warmup_lr, first, factor, final
        super().__init__(optimizer)

    def rate(self, epoch: int, base: float) -> float:
        """Compute the learning rate of an epoch, the first one being 0."""
        if epoch < self.warmup:
            return self.warmup_lr + (base - self.warmup_lr) * epoch / self.warmup
        done, length = epoch - self.warmup, self.first
        while done >= length:
            done, length = done - length, length * self.factor
        return self.final + (base - self.final) * (1 + math.cos(math.pi * done / length)) / 2

    def get_lr(self) -> list[Any]:
        return [self.rate(self.last_epoch, float(base)) for base in self.base_lrs]


class WarmupSteps(ResumableSchedule):
    """Linear warm-up, then a constant rate that falls at some steps (RegionCLIP, as detectron2 has it).

    Args:
        optimizer: whose groups are scheduled.
        warmup: optimizer steps of warm-up.
        start: share of the learning rate that warm-up begins with.
        falls: optimizer steps at which the rate falls.
        factor: what it is multiplied by there.
    """

    interval = "step"

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int = 1000,
        start: float = 1e-3,
        falls: tuple[int, ...] = (300_000, 525_000),
        factor: float = 0.1,
    ) -> None:
        self.warmup, self.start, self.falls, self.factor = warmup, start, tuple(falls), factor
        super().__init__(optimizer)

    def share(self, step: int) -> float:
        """Compute the factor of the learning rate at a step."""
        done = min(1.0, step / self.warmup) if self.warmup else 1.0
        return (self.start + (1 - self.start) * done) * self.factor ** sum(step >= fall for fall in self.falls)

    def get_lr(self) -> list[Any]:
        return [base * self.share(self.last_epoch) for base in self.base_lrs]
