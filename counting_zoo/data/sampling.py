"""Samplers that hold all randomness of the data, so that workers, restarts and ranks cannot change it."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import numpy as np
from torch.utils.data import DistributedSampler


class TrainingSampler(DistributedSampler):
    """Yields ``(index, seed)`` pairs: a shuffled index and the seed of everything random done to that sample.

    Both are functions of ``(seed, epoch)`` alone, so an epoch is the same with any number of workers and after a
    restart. (albumentations 2.0.8 repeats its crops in every worker; here no worker draws anything of its own.)

    Args:
        data: anything with a length.
        seed: the run's seed.
        rank, world_size: this process and how many there are; all ranks get equally many samples.
    """

    def __init__(self, data: Sized, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(data, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        rng = np.random.default_rng([self.seed, self.epoch])
        order = np.resize(rng.permutation(len(self.dataset)), self.total_size)  # type: ignore[arg-type]
        seeds = rng.integers(2**31 - 1, size=self.total_size)
        mine = slice(self.rank, self.total_size, self.num_replicas)
        return iter(list(zip(order[mine].tolist(), seeds[mine].tolist(), strict=True)))


class EvaluationSampler(DistributedSampler):
    """Deals every index to exactly one rank.

    Two cases would leave ranks with unequal numbers of collective calls, and hang: fewer samples than ranks, and
    validation inside ``fit``, where DDP broadcasts buffers in every forward (``even=True``). There the last ranks
    repeat an index, and metrics and writers, which are keyed by image id, count it once.
    """

    def __init__(self, data: Sized, *, rank: int = 0, world_size: int = 1, even: bool = False) -> None:
        super().__init__(data, num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        n = len(data)
        total = self.total_size if even or n < world_size else n
        self.indices = [i % n for i in range(rank, total, world_size)] if n else []

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


__all__ = ["EvaluationSampler", "TrainingSampler"]
