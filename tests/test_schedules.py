"""Learning rates over a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counting_zoo.schedules import WarmupCosineRestarts, WarmupHoldDecay

VECTORS = torch.load(Path(__file__).parent / "golden" / "clip_ebc_vectors.pt", weights_only=True)


def optimizer(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(schedule: torch.optim.lr_scheduler.LRScheduler, n: int) -> list[float]:
    found = []
    for _ in range(n):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return [float(rate) for rate in found]


@pytest.mark.parametrize(("name", "start"), [("lr", 1e-6), ("lr_vpt", 1e-3)])
def test_restarts_are_the_references(name: str, start: float) -> None:
    expected = {int(epoch): rate for epoch, rate in VECTORS[name].items()}
    found = rates(WarmupCosineRestarts(optimizer(1e-4), warmup_lr=start), max(expected) + 1)
    for epoch, rate in expected.items():
        assert found[epoch] == pytest.approx(rate, rel=1e-9), epoch


def test_restarts_resume_where_they_were() -> None:
    whole = rates(WarmupCosineRestarts(optimizer(1e-4), warmup=3, first=2), 20)
    first = WarmupCosineRestarts(optimizer(1e-4), warmup=3, first=2)
    rates(first, 9)
    again = WarmupCosineRestarts(optimizer(1e-4), warmup=3, first=2)
    again.load_state_dict(first.state_dict())
    assert rates(again, 11) == pytest.approx(whole[9:])


def test_warm_up_hold_and_decay() -> None:
    found = rates(WarmupHoldDecay(optimizer(1.0), total_steps=100, warmup=10, hold=0.5, final=0.1), 101)
    assert found[0] == pytest.approx(0.1)
    assert found[9] == found[10] == found[50] == 1.0
    assert found[75] == pytest.approx(0.5)
    assert found[100] == pytest.approx(0.1)
