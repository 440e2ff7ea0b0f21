"""Sample order: which pictures make up step s, as a pure function of (seed, step).

Every bucket has an endless stream of its draws (a sample with `repeats` 3 is drawn three times per epoch), one
permutation per epoch. Batch k of a bucket is the stream's items k * B to (k + 1) * B - 1, so that what is left over at
the end of an epoch begins the next one's first batch: nothing is dropped and nothing repeated. An epoch holds the
batches that it completes, in a shuffled order. The number of workers appears nowhere, so a resumed or resized run sees
the same batches. Draws are numbered, never listed: 100k samples repeated 20 times cost 16 MB per epoch in mind.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from flux2_core.model.seeded import numpy_generator

Bucket = tuple[int, ...]
Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Curriculum:
    """Orders that follow one another, each from a step of its own on; it begins anew with its first epoch there."""

    def __init__(self, orders: Mapping[int, Order]) -> None:
        self.orders = dict(sorted(orders.items()))
        self.starts = list(self.orders)

    def batch(self, step: int) -> list[int]:
        """Samples of optimizer step `step` (from 0), all of one bucket, in order."""
        start = self._start(step)
        return self.orders[start].batch(step - start)

    def epoch(self, step: int) -> int:
        """The epoch that step `step` belongs to, those of the orders before it counted."""
        start = self._start(step)
        before = zip(self.starts, self.starts[1:], strict=False)
        past = sum(1 + self.orders[first].epoch(end - first - 1) for first, end in before if end <= start)
        return past + self.orders[start].epoch(step - start)

    def steps(self, epochs: int) -> int:
        """How many steps so many epochs have; those of an order that another one follows are as long as they get."""
        for start, end in itertools.zip_longest(self.starts, self.starts[1:]):
            last = start + self.orders[start].steps(epochs)
            if end is None or last <= end:
                return last
            epochs -= 1 + self.orders[start].epoch(end - start - 1)
            if not epochs:
                return end
        raise AssertionError("the last order has no end")

    def _start(self, step: int) -> int:
        return self.starts[bisect.bisect_right(self.starts, step) - 1]


class Order:
    """The order of a data set, given by its buckets' samples and how often an epoch repeats each one (unsaid: once)."""

    def __init__(
        self,
        buckets: Mapping[Bucket, Sequence[int] | Numbers],
        *,
        batch_size: int,
        seed: int,
        repeats: Sequence[int] | Numbers | None = None,
    ) -> None:
        filled = sorted(bucket for bucket in buckets if len(buckets[bucket]))
        if not filled:
            raise ValueError("no samples to order")
        self.buckets = {bucket: np.asarray(buckets[bucket], dtype=np.int64) for bucket in filled}
        self.ends = {
            bucket: np.cumsum(np.ones_like(samples) if repeats is None else np.asarray(repeats)[samples])
            for bucket, samples in self.buckets.items()
        }
        self.draws = np.array([self.ends[bucket][-1] for bucket in filled])  # of an epoch, per bucket
        self.batch_size = batch_size
        self.seed = seed
        # One permutation of 100k draws takes 2 ms and a step needs one per bucket and epoch: kept for two epochs.
        self._batches = lru_cache(maxsize=2)(self._shuffled_batches)
        self._permutation = lru_cache(maxsize=2 * len(filled))(self._shuffled_draws)

    def batch(self, step: int) -> list[int]:
        """Samples of optimizer step `step` (from 0), all of one bucket, in order."""
        return self._items(*self._place(step))

    def epoch(self, step: int) -> int:
        """The epoch that step `step` belongs to."""
        low, high = 0, 1
        while self.steps(high) <= step:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.steps(middle) <= step else (low, middle)
        return low

    def steps(self, epochs: int) -> int:
        """How many steps so many epochs have."""
        return int((self.draws * epochs // self.batch_size).sum())

    def _place(self, step: int) -> tuple[Bucket, int]:
        """Bucket of a step's batch, and the batch's place in the bucket's stream."""
        epoch = self.epoch(step)
        number = int(self._batches(epoch)[step - self.steps(epoch)])
        first = self.draws * epoch // self.batch_size
        ends = np.cumsum(self.draws * (epoch + 1) // self.batch_size - first)
        place = int(np.searchsorted(ends, number, side="right"))
        return list(self.buckets)[place], int(first[place] + number - (ends[place - 1] if place else 0))

    def _shuffled_batches(self, epoch: int) -> Numbers:
        return numpy_generator(self.seed, "batches", epoch).permutation(self.steps(epoch + 1) - self.steps(epoch))

    def _items(self, bucket: Bucket, index: int) -> list[int]:
        samples, ends = self.buckets[bucket], self.ends[bucket]
        items: list[int] = []
        position = index * self.batch_size
        while len(items) < self.batch_size:
            epoch, start = divmod(position + len(items), int(ends[-1]))
            drawn = self._permutation(bucket, epoch)[start : start + self.batch_size - len(items)]
            items += samples[np.searchsorted(ends, drawn, side="right")].tolist()
        return items

    def _shuffled_draws(self, bucket: Bucket, epoch: int) -> Numbers:
        return numpy_generator(self.seed, "samples", *bucket, epoch).permutation(int(self.ends[bucket][-1]))
