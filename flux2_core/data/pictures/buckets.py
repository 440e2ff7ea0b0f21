"""Aspect buckets: a fixed list of picture sizes per resolution, and how pictures are fitted into them.

All sizes are pixels, height before width. A bucket's sides are multiples of 16 (one token each 16 px).
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache

from flux2_core.config.dataset import Data
from flux2_core.data.pictures.transform import Transform

CELL = 16
CENTRE = (0.5, 0.5)
MAX_ASPECT = 3.0
MAX_AREA_ERROR = 0.15
"""Only sides under 100 px feel it: there, rounding to 16 moves the area by more, and such a bucket is left out."""


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


def own_aspect(width: int, height: int, area: float) -> tuple[int, int] | None:
    """The (height, width) of about so many px that keeps most of a picture without enlarging it, sides to 16 px.

    None where the picture has less than about that area, or a side under 16 px.
    """
    ideal = round(math.sqrt(area * height / width), 6), round(math.sqrt(area * width / height), 6)
    if ideal[0] > height or ideal[1] > width:
        return None
    sides = [(math.floor(side / CELL) * CELL, math.ceil(side / CELL) * CELL) for side in ideal]
    fitting = [(h, w) for h in sides[0] for w in sides[1] if CELL <= h <= height and CELL <= w <= width]
    return min(
        fitting, key=lambda size: (round(lost(width, height, size), 9), abs(math.prod(size) - area)), default=None
    )


def choose(width: int, height: int, side: int, *, aspect: str, upscale: bool) -> tuple[int, int] | None:
    """The (height, width) at which a picture is trained at one resolution.

    Args:
        width: Of the oriented picture.
        height: Of the oriented picture.
        side: The resolution.
        aspect: `closest`: the bucket that keeps most of the picture. `square`: side x side. `preserve`: `own_aspect`.
        upscale: Whether a picture that would have to be enlarged is; otherwise it gets None.
    """
    if aspect == "preserve":
        grown = max(1.0, side / math.sqrt(width * height)) if upscale else 1.0
        return own_aspect(math.ceil(width * grown), math.ceil(height * grown), side * side)
    listed = ((side, side),) if aspect == "square" else buckets(side)
    fitting = [bucket for bucket in listed if fits(width, height, bucket)]
    return nearest(width, height, fitting or (listed if upscale else ()))


def fits(width: int, height: int, bucket: tuple[int, int]) -> bool:
    """Whether a picture covers a bucket without being enlarged."""
    return bucket[0] <= height and bucket[1] <= width


def nearest(width: int, height: int, sizes: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """The (height, width) that keeps most of a picture; among equals the largest."""
    return min(sizes, key=lambda size: (lost(width, height, size), -math.prod(size), size), default=None)


def lost(width: int, height: int, bucket: tuple[int, int]) -> float:
    """Share (0..1) of a picture that is cut away when it is scaled to cover a bucket."""
    return 1.0 - math.prod(bucket) / math.prod(_cover(width, height, bucket))


def place(width: int, height: int, bucket: tuple[int, int], *, at: tuple[float, float] = CENTRE) -> Transform:
    """Scale a picture to cover a bucket and cut the bucket out of it.

    Args:
        width: Of the oriented picture.
        height: Of the oriented picture.
        bucket: Its (height, width).
        at: Where, as shares (0..1) of what is cut away above and to the left.
    """
    resize = _cover(width, height, bucket)
    top, left = (round((whole - kept) * share) for whole, kept, share in zip(resize, bucket, at, strict=True))
    return Transform(*bucket, *resize, crop_top=top, crop_left=left)


def _cover(width: int, height: int, bucket: tuple[int, int]) -> tuple[int, int]:
    scale = max(bucket[0] / height, bucket[1] / width)
    return max(bucket[0], round(height * scale)), max(bucket[1], round(width * scale))


def crops(style: str, variants: int, sha256: str) -> list[tuple[float, float]]:
    """Where to cut, as shares of what is cut away above and to the left; one place, or `variants` random ones.

    Random places follow from the picture's content alone, so that keys stay when anything else changes.
    """
    if style == "random":
        return [_draw(sha256, number) for number in range(variants)]
    return [(0.0, 0.0) if style == "corner" else CENTRE]


def _draw(sha256: str, number: int) -> tuple[float, float]:
    drawn = hashlib.sha256(f"crop\0{sha256}\0{number}".encode()).digest()
    top, left = (int.from_bytes(drawn[at : at + 6], "big") / (2**48 - 1) for at in (0, 6))
    return top, left


def merge(
    sizes: Sequence[tuple[int, int]], buckets_of: Sequence[tuple[int, int]], *, least: int, upscale: bool
) -> list[tuple[int, int]]:
    """Empty buckets of fewer than `least` pictures into fuller ones; smallest first, until none is left that can be.

    Args:
        sizes: (width, height) of each picture.
        buckets_of: The bucket of each picture.
        least: Pictures that a bucket should have.
        upscale: Whether a picture may be enlarged for it.

    Returns:
        The new bucket of each picture: the one, of those at least as full, that keeps most of it. A picture that
        fits none of them stays.
    """
    chosen = list(buckets_of)
    members: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for number, bucket in enumerate(chosen):
        members[bucket].append(number)
    settled: set[tuple[int, int]] = set()
    while small := [b for b, there in members.items() if len(there) < least and b not in settled]:
        bucket = min(small, key=lambda b: (len(members[b]), b))
        fuller = [b for b, there in members.items() if b != bucket and len(there) >= len(members[bucket])]
        stay: list[int] = []
        for number in members[bucket]:
            width, height = sizes[number]
            other = nearest(width, height, [b for b in fuller if upscale or fits(width, height, b)])
            (stay if other is None else members[other]).append(number)
            chosen[number] = other or bucket
        members[bucket] = stay
        settled.add(bucket)
    return chosen


def places(sizes: Sequence[tuple[int, int]], data: Data) -> list[dict[int, tuple[int, int]]]:
    """The bucket of each picture, by resolution, wherever it is large enough; buckets under `bucket_min` merged.

    Args:
        sizes: (width, height) of the oriented pictures of one data set.
        data: Its section of the configuration.
    """
    found: list[dict[int, tuple[int, int]]] = [{} for _ in sizes]
    for side in data.resolutions:
        chosen = [choose(*size, side, aspect=data.crop_aspect, upscale=data.upscale) for size in sizes]
        fitting = [(number, bucket) for number, bucket in enumerate(chosen) if bucket is not None]
        merged = merge(
            [sizes[number] for number, _ in fitting],
            [bucket for _, bucket in fitting],
            least=data.bucket_min,
            upscale=data.upscale,
        )
        for (number, _), bucket in zip(fitting, merged, strict=True):
            found[number][side] = bucket
    return found


def transforms(
    size: tuple[int, int], placed: Mapping[int, tuple[int, int]], *, data: Data, sha256: str
) -> list[tuple[int, Transform]]:
    """(resolution, transform) of each variant of a picture: resolutions x crops x flips, in that order, each once.

    Args:
        size: (width, height) of the oriented picture.
        placed: Its bucket by resolution.
        data: The section of its data set.
        sha256: Hash of its file, from which random crops follow.
    """
    made: dict[Transform, int] = {}
    for side, bucket in placed.items():
        for at in crops(data.crop, data.crop_variants, sha256):
            transform = place(*size, bucket, at=at)
            for flip in (False, True) if data.flip else (False,):
                made.setdefault(replace(transform, flip=flip), side)
    return [(side, transform) for transform, side in made.items()]
