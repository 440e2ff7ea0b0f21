"""Sample order: which pictures make up step s, as a pure function of (seed, step).

Every bucket has an endless stream of its samples, one permutation per epoch. Batch k of a bucket is the stream's items
k * B to (k + 1) * B - 1, so that what is left over at the end of an epoch begins the next one's first batch: nothing is
dropped and nothing repeated. An epoch holds the batches that it completes, in a shuffled order. The number of workers
appears nowhere, so a resumed or resized run sees the same batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

Bucket = tuple[int, int]


class Order:
    """The order of a data set, given by its buckets' sample lists (a repeated sample stands in it several times)."""

    def __init__(self, buckets: Mapping[Bucket, Sequence[int]], *, batch_size: int, seed: int) -> None:
        self.buckets = {bucket: list(buckets[bucket]) for bucket in sorted(buckets) if buckets[bucket]}
        self.batch_size = batch_size
        self.seed = seed
        if not self.buckets:
            raise ValueError("no samples to order")
        # One permutation of 100k samples takes 2 ms and a step needs one per bucket and epoch: kept for two epochs.
        self._batches = lru_cache(maxsize=2)(self._shuffled_batches)
        self._permutation = lru_cache(maxsize=2 * len(self.buckets))(self._shuffled_samples)

    def batch(self, step: int) -> list[int]:
        """Samples of optimizer step `step` (from 0), all of one bucket, in order."""
        epoch = self.epoch(step)
        bucket, index = self._batches(epoch)[step - self._before(epoch)]
        return self._items(bucket, index)

    def epoch(self, step: int) -> int:
        """The epoch that step `step` belongs to."""
        low, high = 0, 1
        while self._before(high) <= step:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._before(middle) <= step else (low, middle)
        return low

    def _before(self, epoch: int) -> int:
        return sum(len(samples) * epoch // self.batch_size for samples in self.buckets.values())

    def _shuffled_batches(self, epoch: int) -> list[tuple[Bucket, int]]:
        batches = [
            (bucket, index)
            for bucket, samples in self.buckets.items()
            for index in range(len(samples) * epoch // self.batch_size, len(samples) * (epoch + 1) // self.batch_size)
        ]
        shuffled = _rng(self.seed, "batches", epoch).permutation(len(batches))
        return [batches[i] for i in shuffled]

    def _items(self, bucket: Bucket, index: int) -> list[int]:
        samples = self.buckets[bucket]
        items: list[int] = []
        position = index * self.batch_size
        while len(items) < self.batch_size:
            epoch, start = divmod(position + len(items), len(samples))
            order = self._permutation(bucket, epoch)
            items += [samples[i] for i in order[start : start + self.batch_size - len(items)]]
        return items

    def _shuffled_samples(self, bucket: Bucket, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return _rng(self.seed, "samples", *bucket, epoch).permutation(len(self.buckets[bucket]))


def _rng(seed: int, *key: int | str) -> np.random.Generator:
    text = "/".join(str(part) for part in (seed, *key))
    return np.random.default_rng(np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint64))
