"""Time and memory of counting."""

from __future__ import annotations

import resource
import sys

import pytest
import torch
from tiny_zoo import TinyCounter
from torch import nn

from counting_zoo.errors import InputError
from counting_zoo.evaluation.counting import measure_costs
from counting_zoo.types import CountOutput

MEBI = 2**20


class Hungry(TinyCounter):
    """Takes 64 MiB for each picture and gives them back."""

    calls = 0

    def forward(self, image, queries) -> CountOutput:
        type(self).calls += 1
        held = torch.ones(16 * MEBI)
        return CountOutput(super().forward(image, queries).density + 0 * held.sum())


def peak_of_process() -> float:
    """The high-water mark of resident memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MEBI if sys.platform == "darwin" else 1024)


def test_memory_and_speed_are_those_of_counting() -> None:
    Hungry.calls, before = 0, peak_of_process()
    found = measure_costs(Hungry().eval(), [torch.zeros(3, 16, 24)] * 4, [["figs"]] * 4, repeats=2)
    assert Hungry.calls == 4 * 3
    assert found["pictures_per_second"] == pytest.approx(1 / found["seconds_per_picture"])
    assert found["parameters"] == sum(p.numel() for p in TinyCounter().parameters())
    assert found["megapixels"] == pytest.approx(16 * 24 / 1e6)
    assert found["peak_memory_mib"] is not None
    assert before <= found["peak_memory_mib"] <= peak_of_process()


def test_no_image_no_cost() -> None:
    with pytest.raises(InputError, match="cost"):
        measure_costs(TinyCounter().eval(), [], [])


def test_parameters_are_counted_once() -> None:
    model = TinyCounter()
    model.again = nn.ModuleList([model.layers])
    found = measure_costs(model.eval(), [torch.zeros(3, 8, 8)], [["figs"]], repeats=1)
    assert found["parameters"] == sum(p.numel() for p in TinyCounter().parameters())
