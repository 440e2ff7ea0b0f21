"""The plan: one row per picture and resolution, or one quarantine row; nothing is lost in between."""

import io

import numpy as np
import pytest
from PIL import Image

from flux2_core import images, sampleplan
from flux2_core.config import Config
from flux2_core.tables import quarantine_schema, samples_schema


def picture(width=64, height=64, seed=0, fmt="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, fmt)
    return out.getvalue()


def add(folder, name, data, caption="a thing"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def configuration(*folders, max_quarantined=0.02, held_out=0.05, **options):
    sets = [{"path": str(folder), "resolutions": [64], **options} for folder in folders]
    return Config.model_validate(
        {"model": {"path": "m"}, "data": sets, "max_quarantined": max_quarantined, "validate": {"held_out": held_out}}
    )


def plan(config, **options):
    keys = {"text_key": lambda text: f"T({text})", "latent_key": lambda sha256, t: f"L({sha256},{t})"}
    return sampleplan.build(config, **keys, **options)


def rows(result, *columns):
    return [tuple(row[column] for column in columns) for row in result.samples.to_pylist()]


def test_a_row_says_all_that_encoding_and_training_need(tmp_path):
    """Every column of one row, by hand."""
    add(tmp_path, "in/a.png", picture(200, 100), "a [trigger]")
    result = plan(configuration(tmp_path, trigger="sks", repeats=3))
    (row,) = result.samples.to_pylist()
    sha256 = images.inspect(tmp_path / "in/a.png", decode=False).sha256
    assert row.pop("latent_key").startswith(f"L({sha256},Transform(bucket_height=48, bucket_width=96")
    assert row.pop("pixels_lost") == pytest.approx(0)
    assert row == {
        "id": "in/a", "variant": 0, "uri": str(tmp_path / "in/a.png"), "sha256": sha256, "width": 200, "height": 100,
        "captions": ["a sks"], "text_keys": ["T(a sks)"], "bucket_height": 48, "bucket_width": 96,
        "resize_height": 48, "resize_width": 96, "crop_top": 0, "crop_left": 0, "flip": False, "dataset": 0,
        "repeats": 3, "weight": 1.0, "regularisation": False, "split": "train",
    }  # fmt: skip
    assert result.samples.schema.equals(samples_schema())
    assert result.quarantine.schema.equals(quarantine_schema())
    assert result.warnings == []


def test_one_row_per_resolution_that_fits(tmp_path):
    """Variants are numbered from 0 in the order of `resolutions`; what is too small for one is said."""
    add(tmp_path, "big.png", picture(130, 130))
    add(tmp_path, "small.png", picture(70, 70, seed=1))
    result = plan(configuration(tmp_path, resolutions=[128, 64]))
    assert rows(result, "id", "variant", "bucket_height") == [("big", 0, 128), ("big", 1, 64), ("small", 0, 64)]
    (warning,) = result.warnings
    assert "small.png" in warning
    assert "128" in warning
    assert result.quarantine.num_rows == 0


def test_too_small_for_all_is_left_out_with_sizes(tmp_path):
    """The reason names the picture's size and the smallest resolution; 1x1 and 4000x8 are such pictures."""
    for name, size in {"one.png": (1, 1), "strip.png": (4000, 8), "near.png": (63, 63)}.items():
        add(tmp_path, name, picture(*size))
    result = plan(configuration(tmp_path, resolutions=[128, 64]))
    reasons = {row["path"].rsplit("/", 1)[1]: row["reason"] for row in result.quarantine.to_pylist()}
    assert "1x1" in reasons["one.png"]
    assert "4000x8" in reasons["strip.png"]
    assert all("resolution 64" in reason for reason in reasons.values())
    assert len(reasons) == 3


def test_nothing_is_lost(tmp_path):
    """Every picture file is in exactly one of the two tables, whatever is wrong with it."""
    good = picture()
    files = {
        "a.png": good,
        "b.jpg": b"",
        "c.jpg": b"<html>",
        "d.png": good[: len(good) // 2],
        "e.jpg": good,
        "f.png": good,
    }
    for name, data in files.items():
        add(tmp_path, name, data, None if name == "f.png" else "x")
    result = plan(configuration(tmp_path))
    kept = [uri.rsplit("/", 1)[1] for (uri,) in rows(result, "uri")]
    left_out = [row["path"].rsplit("/", 1)[1] for row in result.quarantine.to_pylist()]
    assert sorted(kept) == ["a.png", "e.jpg"]
    assert sorted(left_out) == ["b.jpg", "c.jpg", "d.png", "f.png"]
    assert any("e.jpg" in warning and "is PNG" in warning for warning in result.warnings)
    assert any("same bytes" in warning and warning.startswith("2 pictures") for warning in result.warnings)


@pytest.mark.parametrize(("check", "decode", "found"), [
    (None, None, True), (True, None, True), (False, None, False), (True, False, False), (False, True, True),
])  # fmt: skip
def test_who_decides_whether_pictures_are_decoded(tmp_path, check, decode, found):
    """`decode` wins over `check_images`; unset, a small data set is decoded: a cut JPEG shows the difference."""
    add(tmp_path, "cut.jpg", picture(fmt="JPEG")[:-900])
    result = plan(configuration(tmp_path, check_images=check), decode=decode)
    assert result.quarantine.num_rows == int(found)


def test_large_data_sets_are_read_by_header_only_and_it_is_said(tmp_path, monkeypatch):
    """Over the limit pictures are not decoded, with a warning that names the setting."""
    monkeypatch.setattr(sampleplan, "DECODE_UP_TO", 1)
    add(tmp_path, "a.png", picture())
    add(tmp_path, "b.jpg", picture(fmt="JPEG")[:-900])
    result = plan(configuration(tmp_path))
    assert len(rows(result, "id")) == 2
    assert any("data.0.check_images=true" in warning for warning in result.warnings)


def test_the_plan_does_not_depend_on_the_mapper(tmp_path):
    """Threads or plain `map`: the same tables, in the order of data sets and paths."""
    for number in range(30):
        add(tmp_path, f"{number:02}.png", picture(seed=number))
    threaded, plain = (plan(configuration(tmp_path), mapper=mapper) for mapper in (sampleplan.threads, map))
    assert threaded.samples.equals(plain.samples)
    assert [sample_id for (sample_id,) in rows(plain, "id")] == [f"{number:02}" for number in range(30)]


@pytest.mark.parametrize(("count", "share", "expected"), [(19, 0.5, 0), (20, 0.05, 1), (39, 0.05, 1), (50, 0.29, 14),
                                                          (100, 0.29, 29), (20, 0.04, 0), (25, 0.0, 0)])  # fmt: skip
def test_exactly_the_share_is_held_out(tmp_path, count, share, expected):
    """floor(n * held_out) pictures, none under 20; 100 * 0.29 is 29 whatever floats say."""
    for number in range(count):
        add(tmp_path, f"{number}.png", picture(16, 16, seed=number))
    result = plan(configuration(tmp_path, held_out=share, resolutions=[16]))
    assert [split for (split,) in rows(result, "split")].count("validation") == expected


def test_the_split_follows_content(tmp_path):
    """All variants of a picture share a split; renaming changes nothing; growing moves few pictures."""
    for number in range(40):
        add(tmp_path, f"a/{number}.png", picture(32, 32, seed=number))
        add(tmp_path, f"b/renamed-{99 - number}.png", picture(32, 32, seed=number))
        add(tmp_path, f"c/{number}.png", picture(32, 32, seed=number))
    add(tmp_path, "c/more.png", picture(32, 32, seed=1000))

    def held_out(folder):
        found = rows(plan(configuration(tmp_path / folder, held_out=0.25, resolutions=[32, 16])), "sha256", "split")
        assert len(set(found)) == len(found) / 2
        return {sha256 for sha256, split in found if split == "validation"}

    assert len(held_out("a")) == 10
    assert held_out("a") == held_out("b")
    assert len(held_out("a") - held_out("c")) <= 1


def test_ids_are_unique_over_data_sets(tmp_path):
    """Equal relative paths in two data sets get different ids; rows say which data set they are of."""
    add(tmp_path, "one/a.png", picture())
    add(tmp_path, "two/a.png", picture(seed=1))
    result = plan(configuration(tmp_path / "one", tmp_path / "two"))
    assert rows(result, "id", "dataset") == [("a", 0), ("a@1", 1)]


def test_what_a_person_should_know_is_said_once_per_kind(tmp_path):
    """Missing triggers ("risks" is not "sks"), heavy crops and orphan texts are warnings with a count and a path."""
    add(tmp_path, "a.png", picture(), "risks")
    add(tmp_path, "b.png", picture(seed=1), "a dog")
    add(tmp_path, "c.png", picture(400, 64, seed=2), "sks dog")
    (tmp_path / "orphan.txt").write_text("?")
    warnings = plan(configuration(tmp_path, trigger="sks")).warnings
    assert any(warning.startswith("2 pictures: the caption does not contain the trigger 'sks'") for warning in warnings)
    assert any("c.png: the crop cuts away more than 25%" in warning for warning in warnings)
    assert any("orphan.txt" in warning for warning in warnings)
    assert len(warnings) == 3


def test_refusal_by_share(tmp_path):
    """At the allowed share the run goes on, above it the files and reasons are listed."""
    for number in range(9):
        add(tmp_path, f"{number}.png", picture(seed=number))
    add(tmp_path, "bad.png", b"")
    config = configuration(tmp_path, max_quarantined=0.1)
    assert sampleplan.refusal(config, plan(config)) is None
    config = configuration(tmp_path, max_quarantined=0.09)
    message = sampleplan.refusal(config, plan(config))
    assert "1 of 10 pictures (10.0%)" in message
    assert f"{tmp_path}/bad.png: the file is empty" in message


def test_refusal_when_nothing_is_left(tmp_path):
    """With no usable picture there is nothing to allow; at most ten files are listed."""
    for number in range(12):
        add(tmp_path, f"{number:02}.png", b"")
    config = configuration(tmp_path, max_quarantined=1.0)
    message = sampleplan.refusal(config, plan(config))
    assert message.startswith("no picture can be used")
    assert message.count(".png: ") == 10
    assert "2 more" in message
