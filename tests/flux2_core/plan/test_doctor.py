"""The data set doctor: what looks alike, what is cut off, what lacks its trigger."""

import io
import itertools

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from flux2_core.config.sections import Config, Latents
from flux2_core.data.pictures import likeness, load
from flux2_core.plan import doctor


def soft(seed, width=96, height=64):
    """A smooth picture, as photographs are: few large forms."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(picture, fmt="PNG", **options):
    out = io.BytesIO()
    picture.save(out, fmt, **options)
    return Image.open(io.BytesIO(out.getvalue())).convert("RGB")


COPIES = {
    "recompressed": lambda p: saved(p, "JPEG", quality=50),
    "half the size": lambda p: p.resize((48, 32), Image.Resampling.BICUBIC),
    "twice the size": lambda p: p.resize((192, 128), Image.Resampling.BICUBIC),
    "a little brighter": lambda p: p.point(lambda v: min(255, round(v * 1.02))),
    "one corner marked": lambda p: Image.composite(p, Image.new("RGB", p.size), corner(p.size)),
}


def corner(size):
    mask = Image.new("L", size, 255)
    mask.paste(0, (0, 0, 4, 4))
    return mask


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found_among_others(name):
    """A copy that was recompressed, resized, brightened by 2 % or marked is grouped with its original; no other is."""
    pictures = [soft(seed) for seed in range(40)] + [COPIES[name](soft(7))]
    assert likeness.alike([likeness.look(picture) for picture in pictures]) == [[7, 40]]


def test_what_only_has_the_same_edges_is_not_alike():
    """Flat pictures of different colours, and a picture and its mirror image or its negative, are not alike."""
    flat = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "white", "black")]
    others = [soft(1), soft(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT), soft(1).point(lambda v: 255 - v)]
    assert likeness.alike([likeness.look(picture) for picture in [*flat, *others]]) == []
    assert likeness.alike([]) == []


def test_pairs_are_those_of_brute_force():
    """Groups equal the connected pairs that comparing all with all finds, for looks that differ in 0 to 8 bits."""
    rng = np.random.default_rng(3)
    looks = []
    for _ in range(60):
        base = int(rng.integers(0, 2**63))
        for _ in range(int(rng.integers(1, 4))):
            flips = rng.choice(64, size=int(rng.integers(0, 9)), replace=False)
            changed = base ^ sum(1 << int(bit) for bit in flips)
            looks.append(changed.to_bytes(8, "little") + bytes(48))
    groups = [{place} for place in range(len(looks))]
    for one, other in itertools.combinations(range(len(looks)), 2):
        hashes = (int.from_bytes(looks[place][:8], "little") for place in (one, other))
        if (next(hashes) ^ next(hashes)).bit_count() <= likeness.ALIKE_BITS:
            joined = groups[one] | groups[other]
            for member in joined:
                groups[member] = joined
    expected = sorted({tuple(sorted(group)) for group in groups if len(group) > 1})
    assert [tuple(group) for group in likeness.alike(looks)] == expected
    assert len(expected) > 10


def test_a_crowd_of_equals_is_one_group():
    """10,000 equal looks and as many that differ from their neighbours in one bit: found without comparing all."""
    equal = [bytes(56)] * 10_000
    chain = [(2**64 - 1 << number % 60 & 2**64 - 1).to_bytes(8, "little") + bytes(48) for number in range(10_000)]
    assert [len(group) for group in likeness.alike(equal)] == [10_000]
    assert sum(len(group) for group in likeness.alike(chain)) == 10_000


def test_inspection_sees_the_oriented_picture(tmp_path):
    """A decoded picture has a look, the same for a file that EXIF turns; an undecoded one has none."""
    upright, turned = tmp_path / "a.png", tmp_path / "b.jpg"
    soft(5).save(upright)
    exif = Image.Exif()
    exif[0x0112] = 6
    soft(5).transpose(Image.Transpose.ROTATE_90).save(turned, quality=95, exif=exif)
    looks = [load.inspect(str(path), decode=True, latents=Latents()).look for path in (upright, turned)]
    assert likeness.alike(looks) == [[0, 1]]
    assert load.inspect(str(upright), decode=False, latents=Latents()).look is None


@pytest.mark.parametrize("limit", [16, 60, 512])
def test_the_histogram_counts_every_text(limit):
    """Bins are adjacent from 1 to the limit, the last one is open; each length falls into its bin."""
    counts = np.random.default_rng(limit).integers(1, limit + 40, 500)
    told = doctor.token_lengths(counts, limit=limit)
    bins = told["histogram"]
    assert [entry["from"] for entry in bins] == [1, *(entry["to"] + 1 for entry in bins[:-1])]
    assert (bins[-2]["to"], bins[-1]["to"]) == (limit, None)
    for entry in bins:
        inside = (counts >= entry["from"]) & (counts <= (entry["to"] or counts.max()))
        assert entry["texts"] == inside.sum()
    assert (told["longest"], told["mean"]) == (counts.max(), round(counts.mean(), 1))


def pictures(*captions, dataset=0):
    ids = [f"p{place}" for place in range(len(captions))]
    return pa.table({"id": ids, "captions": [list(texts) for texts in captions], "dataset": [dataset] * len(captions)})


def test_truncated_samples_are_named():
    """Samples with any caption over the limit, in order, with the longest; others and an empty table give none."""
    texts, counts = ["", "short", "long", "longer"], np.array([5, 7, 70, 90])
    table = pictures(("short",), ("short", "long"), ("longer", "long"), ("short",))
    assert doctor.truncated(table, texts, counts, limit=64) == [{"id": "p1", "tokens": 70}, {"id": "p2", "tokens": 90}]
    assert doctor.truncated(table, texts, counts, limit=70) == [{"id": "p2", "tokens": 90}], "70 of 70 fit"
    assert doctor.truncated(table, texts, counts, limit=128) == []
    assert doctor.truncated(table.slice(0, 0), texts, counts, limit=64) == []


def test_trigger_coverage_is_counted_by_data_set():
    """Captions with the trigger as a word, pictures without any, and what was injected; a regularisation set is not."""
    config = Config.model_validate(
        {"model": {"path": "m"},
         "data": [{"path": "a", "trigger": "sks"}, {"path": "b"},
                  {"path": "c", "trigger": "x y", "regularisation": True}]}
    )  # fmt: skip
    table = pictures(("a sks", "risks"), ("risks",), ("sks, b",))
    (found,) = doctor.trigger_coverage(config, table, injected={0: 1})
    expected = {"dataset": 0, "trigger": "sks", "captions": 4, "mentioned": 2, "injected": 1, "without": ["p1"]}
    assert found == expected
