"""Learning rates over a run."""

from __future__ import annotations

import pytest
import torch
from places import GOLDEN

from counting_zoo.schedules import WarmupCosineRestarts, WarmupHoldDecay, WarmupSteps

VECTORS = torch.load(GOLDEN / "clip_ebc_vectors.pt", weights_only=True)


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


def test_a_longer_run_takes_up_the_position_and_keeps_its_own_length() -> None:
    """Two epochs of three steps resumed to six stayed at 2 % of the rate for the last 12 of 18 steps."""
    whole = rates(WarmupHoldDecay(optimizer(1.0), total_steps=18, warmup=2), 18)
    short = WarmupHoldDecay(optimizer(1.0), total_steps=6, warmup=2)
    assert rates(short, 6)[-1] < 0.5
    resumed = optimizer(1.0)
    longer = WarmupHoldDecay(resumed, total_steps=18, warmup=2)
    resumed.load_state_dict(short.optimizer.state_dict())
    longer.load_state_dict(short.state_dict())
    assert resumed.param_groups[0]["lr"] == whole[6]
    assert rates(longer, 12) == whole[6:]


def test_warm_up_and_falls_are_the_references() -> None:
    """0.002 after 1000 steps from a thousandth of it, and a tenth at each fall; detectron2's WarmupMultiStepLR."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.002)
    schedule = WarmupSteps(optimizer)
    rates = {step: 0.002 * schedule.share(step) for step in (0, 1, 500, 1000, 299_999, 300_000, 525_000)}
    expected = {
        0: 2e-6,
        1: 2e-6 + 1.998e-6,
        500: 2e-6 + 0.999e-3,
        1000: 2e-3,
        299_999: 2e-3,
        300_000: 2e-4,
        525_000: 2e-5,
    }
    assert rates == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-6)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected[1])
    assert WarmupSteps(optimizer, warmup=0, falls=()).share(0) == 1
