"""Buckets: a fixed list, never an enlargement, little cropped away."""

import random

import pytest

from flux2_core.config.dataset import Data
from flux2_core.data.pictures.buckets import (  # fmt: skip
    Transform,
    buckets,
    choose,
    crops,
    fits,
    lost,
    merge,
    nearest,
    own_aspect,
    place,
    places,
    transforms,
)
from tests.flux2_core.pictures import fit


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


def test_preserve_keeps_the_aspect_at_about_the_area():
    """For random pictures: sides to 16 px, never enlarged, and under 3:1 at most 24 px of a side cut."""
    draw = random.Random(1)
    found = 0
    for _ in range(1000):
        width, height = draw.randint(16, 4000), draw.randint(16, 4000)
        bucket = choose(width, height, 512, aspect="preserve", upscale=False)
        if bucket is None:
            assert width * height < 512 * 512 or min(width, height) < 16
            continue
        found += 1
        transform = place(width, height, bucket)
        assert bucket[0] % 16 == bucket[1] % 16 == 0
        assert transform.resize_height <= height
        assert transform.resize_width <= width
        if max(width / height, height / width) < 3:
            assert max(transform.resize_height - bucket[0], transform.resize_width - bucket[1]) <= 24
            assert abs(bucket[0] * bucket[1] / 512**2 - 1) < 0.08
    assert found > 500
    assert choose(1024, 1024, 1024, aspect="preserve", upscale=False) == (1024, 1024)
    assert choose(3000, 1000, 512, aspect="preserve", upscale=False) == (288, 880)


def test_a_reference_is_never_enlarged_and_never_refused():
    """Of the resolution's area at most, of its own at most, sides to 16: whatever has sides of 16 px has a size."""
    draw = random.Random(2)
    for _ in range(500):
        width, height = draw.randint(16, 900), draw.randint(16, 900)
        size = own_aspect(width, height, min(512 * 512, width * height))
        assert size is not None
        assert size[0] <= height
        assert size[1] <= width
    assert own_aspect(640, 480, 640 * 480) == (480, 640)
    assert own_aspect(15, 480, 15 * 480) is None


def test_the_aspect_setting():
    """`square` takes the square only; `closest` the nearest aspect; `upscale` gives a bucket to what is too small."""
    assert choose(2000, 1000, 512, aspect="square", upscale=False) == (512, 512)
    assert choose(2000, 500, 512, aspect="square", upscale=False) is None
    for aspect in ("closest", "square", "preserve"):
        assert choose(300, 200, 512, aspect=aspect, upscale=False) is None
        height, width = choose(300, 200, 512, aspect=aspect, upscale=True)
        assert abs(height * width / 512**2 - 1) < 0.07
        assert place(300, 200, (height, width)).resize_width > 300
    assert choose(900, 600, 512, aspect="closest", upscale=True) == choose(
        900, 600, 512, aspect="closest", upscale=False
    ), "what is large enough is not enlarged for a better aspect"


def test_random_crops_follow_from_the_content():
    """K places per picture, the same each time, others for another picture, the first ones the same for a larger K."""
    assert crops("random", 4, "a" * 64) == crops("random", 4, "a" * 64)
    assert crops("random", 4, "a" * 64)[:2] == crops("random", 2, "a" * 64)
    assert crops("random", 1, "a" * 64) == [(0.989473443253079, 0.49546024516592446)], "other places: another cache"
    assert crops("random", 4, "a" * 64) != crops("random", 4, "b" * 64)
    drawn = [share for number in range(500) for at in crops("random", 2, str(number)) for share in at]
    assert 0 <= min(drawn) < 0.01
    assert 0.99 < max(drawn) <= 1
    assert abs(sum(drawn) / len(drawn) - 0.5) < 0.03
    assert crops("center", 1, "x") == [(0.5, 0.5)]
    assert crops("corner", 1, "x") == [(0.0, 0.0)]


def test_every_crop_lies_inside():
    """Whatever the place, the bucket lies within the resized picture."""
    for number in range(300):
        for at in [*crops("random", 2, str(number)), (0.0, 0.0), (1.0, 1.0)]:
            t = place(1000 + number, 700, (512, 512), at=at)
            assert 0 <= t.crop_top <= t.resize_height - 512
            assert 0 <= t.crop_left <= t.resize_width - 512


def variants(size=(300, 200), **options):
    data = Data(path="x", **{"resolutions": (128, 64), **options})
    (placed,) = places([size], data)
    return transforms(size, placed, data=data, sha256="c" * 64)


def test_variants_are_numbered_resolutions_by_crops_by_flips():
    """The order is fixed (people address `ID#n`), and coinciding transforms are made once."""
    found = variants(crop="random", crop_variants=2, crop_aspect="square", flip=True)
    assert [(side, t.flip) for side, t in found] == [(s, f) for s in (128, 64) for _ in range(2) for f in (False, True)]
    assert found[0][1].crop_left == found[1][1].crop_left != found[2][1].crop_left
    assert len(variants((128, 128), crop="random", crop_variants=8)) == 2, "no pixel to move: one crop a resolution"
    assert len(variants((132, 128), resolutions=(128,), crop="random", crop_variants=30)) <= 5


def test_merging_small_buckets():
    """Against its definition: none is enlarged, and only what fits no fuller bucket stays alone."""
    draw = random.Random(3)
    for _ in range(40):
        sizes = [(draw.randint(200, 700), draw.randint(200, 700)) for _ in range(draw.randint(1, 60))]
        kept = [size for size in sizes if choose(*size, 256, aspect="closest", upscale=False)]
        before = [choose(*size, 256, aspect="closest", upscale=False) for size in kept]
        after = merge(kept, before, least=8, upscale=False)
        assert merge(kept[::-1], before[::-1], least=8, upscale=False) == after[::-1], "order does not matter"
        assert all(fits(*size, bucket) for size, bucket in zip(kept, after, strict=True))
        assert set(after) <= set(before)
        for size, old, new in zip(kept, before, after, strict=True):
            if after.count(new) < 8:
                fuller = [b for b in set(after) if after.count(b) >= 8 and fits(*size, b)]
                assert not fuller or new == old
            if new != old:
                assert before.count(old) < 8
        assert merge(kept, before, least=1, upscale=False) == before


def test_a_lone_picture_joins_the_nearest_fuller_bucket():
    """By hand: 5 squares, 4 wide, 1 a little wide: with 2 asked for it goes where less of it is lost."""
    sizes = [(512, 512)] * 5 + [(900, 400)] * 4 + [(640, 520)]
    data = Data(path="x", resolutions=(256,), bucket_min=2)
    found = [placed[256] for placed in places(sizes, data)]
    square, wide = found[0], found[5]
    assert found == [square] * 5 + [wide] * 4 + [nearest(640, 520, [square, wide])]
    assert found[-1] == square
    assert lost(640, 520, square) < lost(640, 520, wide)
    assert places(sizes, Data(path="x", resolutions=(256,)))[-1][256] not in (square, wide)
