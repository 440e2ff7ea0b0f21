"""Buckets: a fixed list, never an enlargement, little cropped away."""

import random

import pytest

from flux2_core.buckets import Transform, buckets, fit


@pytest.mark.parametrize("side", [16, 32, 64, 128, 256, 512, 768, 896, 1024, 1536])
def test_the_list_keeps_its_promises(side):
    """Sides are multiples of 16, aspects within 1:3..3:1, areas near side squared, the list symmetric and sorted."""
    listed = buckets(side)
    assert (side, side) in listed
    assert list(listed) == sorted(set(listed))
    for height, width in listed:
        assert height % 16 == width % 16 == 0
        assert 1 / 3 <= height / width <= 3
        assert abs(height * width / side**2 - 1) <= (0.15 if side < 256 else 0.06)
        assert (width, height) in listed


def test_the_list_is_fixed():
    """Bucket sizes are part of latent keys: changing the list invalidates people's caches, so it is pinned."""
    assert len(buckets(1024)) == 23
    assert buckets(1024)[:4] == ((608, 1728), (624, 1664), (656, 1600), (688, 1536))
    assert buckets(128) == tuple(sorted({(128, 128), *_both(144, 112), *_both(160, 96), *_both(176, 96),
                                         *_both(192, 80), *_both(208, 80), *_both(224, 80)}))  # fmt: skip


def _both(a, b):
    return (a, b), (b, a)


def test_fitting_covers_crops_little_and_never_enlarges():
    """For random pictures: the resized picture covers the bucket, is no larger than the source, keeps its aspect."""
    draw = random.Random(0)
    found = 0
    for _ in range(1000):
        width, height = draw.randint(1, 3000), draw.randint(1, 3000)
        side = draw.choice([128, 512, 1024])
        transform = fit(width, height, side)
        if transform is None:
            assert not any(h <= height and w <= width for h, w in buckets(side))
            continue
        found += 1
        assert (transform.bucket_height, transform.bucket_width) in buckets(side)
        assert transform.bucket_height <= transform.resize_height <= height
        assert transform.bucket_width <= transform.resize_width <= width
        touches = (transform.resize_height - transform.bucket_height, transform.resize_width - transform.bucket_width)
        assert min(touches) == 0
        assert abs(transform.resize_height / height - transform.resize_width / width) <= 1 / min(width, height)
        assert abs(transform.crop_top - touches[0] / 2) <= 0.5
        assert abs(transform.crop_left - touches[1] / 2) <= 0.5
        if max(width / height, height / width) < 2.8 and width * height > 1.3 * side * side:
            assert transform.pixels_lost < (0.065 if side > 256 else 0.125)
    assert found > 500


def test_an_exact_size_is_left_alone():
    """A picture of a bucket's size is neither resized nor cropped."""
    assert fit(1024, 1024, 1024) == Transform(1024, 1024, 1024, 1024, 0, 0)
    assert fit(1024, 1024, 1024).pixels_lost == 0


@pytest.mark.parametrize(("width", "height"), [(1, 1), (4000, 8), (1023, 1023), (500, 1024)])
def test_too_small_is_none(width, height):
    """What would have to be enlarged has no transform."""
    assert fit(width, height, 1024) is None


def test_orientation_is_not_confused():
    """A wide picture gets a wide bucket; lost share is what the crop cuts away."""
    transform = fit(4000, 1000, 512)
    assert transform.bucket_width > transform.bucket_height
    cut = 1 - transform.bucket_width / transform.resize_width
    assert transform.pixels_lost == pytest.approx(cut)
