"""Every sample once in evaluation for any number of ranks; training order and seeds are functions of seed and epoch."""

from __future__ import annotations

from collections import Counter

import pytest

from counting_zoo.data.dataset import EvaluationSampler, TrainingSampler

WORLDS = range(1, 5)
SIZES = range(1, 10)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("n", SIZES)
def test_evaluation_deals_every_index_to_one_rank(n: int, world: int) -> None:
    ranks = [list(EvaluationSampler(range(n), rank=rank, world_size=world)) for rank in range(world)]
    seen = Counter(index for indices in ranks for index in indices)
    assert set(seen) == set(range(n))
    if n >= world:
        assert set(seen.values()) == {1}
    assert all(ranks), "a rank without samples would hang the others"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("n", SIZES)
def test_even_ranks_have_equal_length_and_repeat_less_than_a_round(n: int, world: int) -> None:
    samplers = [EvaluationSampler(range(n), rank=rank, world_size=world, even=True) for rank in range(world)]
    assert {len(sampler) for sampler in samplers} == {-(-n // world)}
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)
    seen = [index for sampler in samplers for index in sampler]
    assert set(seen) == set(range(n))
    assert len(seen) - n < world


def test_no_samples() -> None:
    assert list(EvaluationSampler([], rank=0, world_size=2)) == []


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("n", SIZES)
def test_training_ranks_share_one_shuffle(n: int, world: int) -> None:
    samplers = [TrainingSampler(range(n), seed=3, rank=rank, world_size=world) for rank in range(world)]
    for epoch in range(3):
        drawn = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            drawn.append(list(sampler))
            assert len(drawn[-1]) == len(sampler) == -(-n // world)
        indices = [index for rank in drawn for index, _ in rank]
        assert set(indices) == set(range(n))
        seeds = [seed for rank in drawn for _, seed in rank]
        assert len(set(seeds)) == len(seeds)  # a repeated image is augmented differently
        assert all(0 <= seed < 2**31 for seed in seeds)


def test_training_order_depends_on_seed_and_epoch_only() -> None:
    def draw(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = TrainingSampler(range(50), seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert draw(0, 1) == draw(0, 1)
    orders = {tuple(index for index, _ in draw(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    seeds = [seed for epoch in range(4) for _, seed in draw(0, epoch)]
    assert len(set(seeds)) > 0.99 * len(seeds)


def test_one_rank_gets_the_image_sequence_that_ranks_get_together() -> None:
    alone = list(TrainingSampler(range(12), seed=1))
    together = [list(TrainingSampler(range(12), seed=1, rank=rank, world_size=3)) for rank in range(3)]
    assert [pair for step in zip(*together, strict=True) for pair in step] == alone
