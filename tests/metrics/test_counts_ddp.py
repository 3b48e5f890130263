"""Metrics over 2 to 4 processes equal the single process, for uneven, repeated and empty shards."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch import multiprocessing as mp

from counting_zoo.data.dataset import EvaluationSampler
from counting_zoo.metrics.counts import CountTable, PromptErrors, grid_errors

LENGTHS = (1, 2, 3, 4, 5, 7, 8)  # fewer than the processes, as many, one more, and their multiples


def image(i: int) -> dict[str, Any]:
    """What one picture of the data set contributes; a function of its index alone."""
    rng = torch.Generator().manual_seed(i)
    prompts = torch.rand(5, 1, generator=rng)
    prompts[3] = float("nan") if i % 3 else 1.0  # not every image has a hard absent name
    return {
        "id": f"{i}.jpg",
        "density": torch.rand(2, 3, 5, generator=rng) * 1000 / 3,
        "points": torch.rand(i, 2, generator=rng) * 40,
        "labels": torch.randint(0, 2, (i,), generator=rng),
        "prompts": prompts,
        "names": (["figs", "dates"], ["dates", "figs"], ["plums", "figs"])[i % 3],  # each rank has its own first ones
    }


def score(indices: list[int]) -> dict[str, float]:
    """All metrics over some pictures, batches of two."""
    table, prompts = CountTable({"mean": 3.3}), PromptErrors()
    for first in range(0, len(indices), 2):
        batch = [image(i) for i in indices[first : first + 2]]
        ids = [p["id"] for p in batch]
        labels = [p["labels"] for p in batch]
        predicted = torch.stack([p["density"].sum((-2, -1)) for p in batch])
        target = torch.stack([one.bincount(minlength=2) for one in labels]).float()
        grids = [grid_errors(p["density"], p["points"], (40, 40), p["labels"]) for p in batch]
        bounds = torch.stack([predicted - 9, predicted + 9], -1)
        table.update(ids, [p["names"] for p in batch], predicted, target, game=torch.stack(grids), interval=bounds)
        prompts.update(ids, *torch.cat([p["prompts"] for p in batch], 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a rank without images computes before it updates
        result = {
            f"{type(metric).__name__}.{key}": value
            for metric in (table, prompts)
            for key, value in metric.compute().items()
        }
    assert set(table.image) == {image(i)["id"] for i in indices}  # rows stay local
    return result


def shards(n: int, rank: int, world: int) -> dict[str, list[int]]:
    """Ways in which samplers deal n pictures to ranks."""
    return {
        "once": list(EvaluationSampler(range(n), rank=rank, world_size=world)),
        "even": list(EvaluationSampler(range(n), rank=rank, world_size=world, even=True)),
        "bare": list(range(rank, n, world)),  # leaves ranks empty where n < world
        "all on the last": list(range(n)) if rank == world - 1 else [],
    }


def run_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = {f"{n} {way}": score(part) for n in LENGTHS for way, part in shards(n, rank, world).items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_equals_one_process(world, tmp_path):
    mp.start_processes(run_rank, (world, str(tmp_path)), nprocs=world, start_method="fork")
    alone = {n: score(list(range(n))) for n in LENGTHS}
    for rank in range(world):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(results) == 4 * len(LENGTHS)
        for case, result in results.items():
            assert result == pytest.approx(alone[int(case.split()[0])], rel=1e-9), case
            n = int(case.split()[0])
            assert result["CountTable.sum_n"] == n
            assert result["CountTable.n_classes"] == (2 if n < 3 else 3)
