"""Aspect buckets: a fixed list of picture sizes per resolution, and how a picture is fitted into one of them.

All sizes are pixels, height before width. A bucket's sides are multiples of 16 (one token each 16 px).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

CELL = 16
MAX_ASPECT = 3.0
MAX_AREA_ERROR = 0.15
"""Only sides under 100 px feel it: there, rounding to 16 moves the area by more, and such a bucket is left out."""


@dataclass(frozen=True)
class Transform:
    """How an oriented picture becomes model input: resize to (resize_height, resize_width), crop, perhaps flip."""

    bucket_height: int
    bucket_width: int
    resize_height: int
    resize_width: int
    crop_top: int
    crop_left: int
    flip: bool = False

    @property
    def pixels_lost(self) -> float:
        """Share (0..1) of the resized picture that the crop cuts away."""
        return 1.0 - self.bucket_height * self.bucket_width / (self.resize_height * self.resize_width)


@cache
def buckets(side: int) -> tuple[tuple[int, int], ...]:
    """The (height, width) buckets of a resolution, from 1:3 to 3:1, sorted; 23 for 1024.

    The long side grows by a sixteenth of `side` at a time (64 px at 1024), the short one follows so that the area
    stays about side * side. Few buckets keep batches full; the price is a crop of up to 6 % (12 % under 256 px).
    """
    step = max(CELL, side // 16 // CELL * CELL)
    found = {(side, side)}
    for long in range(side + step, int(side * MAX_ASPECT) + 1, step):
        short = max(CELL, round(side * side / long / CELL) * CELL)
        if long / short <= MAX_ASPECT and abs(long * short / side**2 - 1.0) <= MAX_AREA_ERROR:
            found |= {(long, short), (short, long)}
    return tuple(sorted(found))


def fit(width: int, height: int, side: int) -> Transform | None:
    """The bucket that keeps most of a width x height picture without enlarging it; None when none does.

    The picture is scaled to cover the bucket and cropped around its centre.
    """
    fitting = [_cover(width, height, bucket) for bucket in buckets(side) if bucket[0] <= height and bucket[1] <= width]
    return min(fitting, key=lambda t: (t.pixels_lost, -t.bucket_height * t.bucket_width), default=None)


def _cover(width: int, height: int, bucket: tuple[int, int]) -> Transform:
    bucket_height, bucket_width = bucket
    scale = max(bucket_height / height, bucket_width / width)
    resize_height = max(bucket_height, round(height * scale))
    resize_width = max(bucket_width, round(width * scale))
    return Transform(
        bucket_height=bucket_height,
        bucket_width=bucket_width,
        resize_height=resize_height,
        resize_width=resize_width,
        crop_top=round((resize_height - bucket_height) / 2),
        crop_left=round((resize_width - bucket_width) / 2),
    )
