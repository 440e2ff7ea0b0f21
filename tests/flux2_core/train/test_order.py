"""Sample order, by brute force against its definition."""

import random
import time
from collections import Counter

import numpy as np
import pytest

from flux2_core.train.order import Curriculum, Order

BUCKETS = {(64, 64): list(range(7)), (32, 96): [7, 8, 9], (96, 32): list(range(10, 21)), (16, 16): [21]}
SAMPLES = sum(len(samples) for samples in BUCKETS.values())


def order(batch_size: int, *, seed: int = 1, buckets: dict = BUCKETS) -> Order:
    return Order(buckets, batch_size=batch_size, seed=seed)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 8, 13, 40])
def test_every_sample_once_per_epoch(batch_size: int) -> None:
    """Each bucket's stream is its samples once per epoch for many epochs: leftovers begin the next epoch's batch.

    Batch k of a bucket is items k * B to (k + 1) * B - 1 of its stream, whichever step it falls on.
    """
    chosen = order(batch_size)
    steps, found = 0, {bucket: {} for bucket in BUCKETS}
    while chosen.epoch(steps) < 9:
        bucket, index = chosen._place(steps)
        assert index not in found[bucket], "a batch came twice"
        found[bucket][index] = chosen.batch(steps)
        steps += 1
    for bucket, batches in found.items():
        size = len(BUCKETS[bucket])
        assert sorted(batches) == list(range(size * 9 // batch_size)), "a batch was left out"
        stream = [sample for index in sorted(batches) for sample in batches[index]]
        assert len(stream) == len(batches) * batch_size
        for start in range(0, len(stream) - size + 1, size):
            assert sorted(stream[start : start + size]) == sorted(BUCKETS[bucket])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 30])
def test_counts_stay_level(batch_size: int) -> None:
    """At the end of every epoch each sample has been seen as often as there were epochs, give or take one.

    Where a bucket is smaller than a batch its samples wait for the rest: at most one batch is owed.
    """
    chosen, seen, step = order(batch_size), Counter[int](), 0
    for epoch in range(1, 12):
        while chosen.epoch(step) < epoch:
            seen.update(chosen.batch(step))
            step += 1
        assert step == chosen.steps(epoch)
        for samples in BUCKETS.values():
            owed = epoch * len(samples) - sum(seen[sample] for sample in samples)
            assert 0 <= owed < batch_size
            counts = [seen[sample] for sample in samples]
            assert max(counts) - min(counts) <= 1


def test_a_batch_is_of_one_bucket() -> None:
    """A batch shares one shape."""
    chosen = order(3)
    home = {sample: bucket for bucket, samples in BUCKETS.items() for sample in samples}
    assert all(len({home[sample] for sample in chosen.batch(step)}) == 1 for step in range(100))


def test_it_is_pure_in_the_step() -> None:
    """Steps asked in any order, twice, or from a new object give the same batches: nothing depends on history."""
    steps = list(range(60))
    straight = [order(4).batch(step) for step in steps]
    shuffled = random.Random(0).sample(steps, len(steps))
    one = order(4)
    again = {step: one.batch(step) for step in shuffled}
    assert [again[step] for step in steps] == straight == [one.batch(step) for step in steps]
    assert [one.epoch(step) for step in steps] == sorted(one.epoch(step) for step in steps)


def test_it_depends_on_seed_and_epoch() -> None:
    """Another seed, or another epoch, is another order of the same samples."""
    size = SAMPLES
    one, other = order(1), order(1, seed=2)
    epochs = [[x for step in range(e * size, (e + 1) * size) for x in one.batch(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [x for step in range(size) for x in other.batch(step)]
    assert epochs[0] != sorted(epochs[0])
    for samples in BUCKETS.values():  # inside a bucket too, not only which bucket's turn it is
        own = [[sample for sample in epoch if sample in samples] for epoch in epochs]
        assert len(samples) < 5 or not own[0] == own[1] == own[2]


def test_the_given_order_of_buckets_does_not_matter() -> None:
    """Buckets are a mapping: how it was put together changes nothing, and empty ones are passed over."""
    turned = {bucket: BUCKETS[bucket] for bucket in reversed(BUCKETS)} | {(8, 8): []}
    assert [order(4).batch(step) for step in range(30)] == [order(4, buckets=turned).batch(step) for step in range(30)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_deal_the_same_batch(world: int) -> None:
    """However many workers deal a batch among them, they see the same pictures in the same places."""
    chosen = order(4)
    for step in range(20):
        share = 4 // world
        parts = [order(4).batch(step)[rank * share : (rank + 1) * share] for rank in range(world)]
        assert [sample for part in parts for sample in part] == chosen.batch(step)


def test_repeats_count() -> None:
    """A sample that repeats three times comes three times an epoch, exactly as if it stood in the list three times."""
    chosen = Order({(1, 1): [0, 1], (2, 2): [2, 3]}, batch_size=2, seed=1, repeats=[3, 1, 1, 2])
    listed = order(2, buckets={(1, 1): [0, 0, 0, 1], (2, 2): [2, 3, 3]})
    assert [chosen.batch(step) for step in range(70)] == [listed.batch(step) for step in range(70)]
    assert Counter(x for step in range(70) for x in chosen.batch(step)) == {0: 60, 1: 20, 2: 20, 3: 40}


def test_repeats_are_not_listed() -> None:
    """100k samples a thousand times over are ordered without a list of a hundred million draws."""
    chosen = Order({(1, 1): range(100_000)}, batch_size=4, seed=1, repeats=np.full(100_000, 1000))
    assert sum(array.nbytes for array in (*chosen.buckets.values(), *chosen.ends.values())) < 2**21
    assert chosen.epoch(24_999_999) == 0
    assert chosen.epoch(25_000_000) == 1


def test_no_samples_are_refused() -> None:
    """There is no order of nothing."""
    with pytest.raises(ValueError, match="no samples"):
        order(1, buckets={(1, 1): []})


def test_a_step_of_100k_samples_costs_under_a_millisecond() -> None:
    """Batches of a large data set are looked up, not worked out anew each step."""
    large = order(4, buckets={(1, 1): range(70_000), (2, 2): range(70_000, 100_000)})
    large.batch(0)
    began = time.process_time()
    for step in range(200):
        large.batch(step)
        large.epoch(step)
    assert (time.process_time() - began) / 200 < 1e-3


def test_a_curriculum_is_its_orders_one_after_the_other() -> None:
    """Each begins anew at its step, as if it were alone; epochs go on counting; one alone is that order."""
    first, second = (Order({(1, 1): range(*ends)}, batch_size=2, seed=3) for ends in ((0, 6), (6, 10)))
    both = Curriculum({7: second, 0: first})
    assert [both.batch(step) for step in range(7)] == [first.batch(step) for step in range(7)]
    assert [both.batch(step) for step in range(7, 14)] == [second.batch(step) for step in range(7)]
    assert [both.epoch(step) for step in range(11)] == [0, 0, 0, 1, 1, 1, 2, 3, 3, 4, 4]
    alone = Curriculum({0: first})
    assert [alone.epoch(step) for step in range(9)] == [first.epoch(step) for step in range(9)]
