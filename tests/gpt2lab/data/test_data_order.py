"""The order of the data is a function of (seed, step): a permutation each epoch, the same for any number of ranks."""

import numpy as np
import pytest

from gpt2lab.data.data_order import micro_batch_rows, permute, step_samples


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_every_epoch_visits_every_sample_once(size: int) -> None:
    for epoch in range(3):
        assert sorted(permute(np.arange(size), size, 7, epoch)) == list(range(size))


def test_epochs_and_seeds_give_different_orders() -> None:
    orders = [tuple(permute(np.arange(500), 500, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == len(orders)


def test_order_is_uncorrelated() -> None:
    order = permute(np.arange(10_000), 10_000, 1, 0)
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.01


def test_a_step_spanning_two_epochs_ends_one_and_begins_the_next() -> None:
    stream = np.concatenate([step_samples(step, 6, 10, 3) for step in range(5)])
    assert [sorted(stream[first : first + 10]) for first in (0, 10, 20)] == [list(range(10))] * 3


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (4, 1), (1, 2), (2, 2), (3, 2)])
def test_ranks_and_accumulation_share_one_global_batch(accumulate: int, world: int) -> None:
    samples = step_samples(5, 32, 1000, 0)
    parts = [micro_batch_rows(samples, number, accumulate * world) for number in range(accumulate * world)]
    assert np.concatenate(parts).tolist() == samples.tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
