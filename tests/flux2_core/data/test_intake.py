"""The plan: one row per picture and resolution, or one quarantine row; nothing is lost in between."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from flux2_core.config.sections import Config
from flux2_core.data import intake, samples
from flux2_core.store.schemas import quarantine_schema, samples_schema
from tests.flux2_core.pictures import inspect


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
    keys = samples.Keys(
        text=lambda text: f"T({text})",
        latent=lambda sha256, t: f"L({sha256},{t})",
        mask=lambda sha256, t: f"M({sha256},{t})",
    )
    return intake.build(config, keys, **options)


def rows(result, *columns):
    return [tuple(row[column] for column in columns) for row in result.samples.to_pylist()]


def test_a_row_says_all_that_encoding_and_training_need(tmp_path):
    """Every column of one row, by hand."""
    add(tmp_path, "in/a.png", picture(200, 100), "a [trigger]")
    result = plan(configuration(tmp_path, trigger="sks", repeats=3))
    (row,) = result.samples.to_pylist()
    sha256 = inspect(tmp_path / "in/a.png", decode=False).sha256
    assert row.pop("latent_key").startswith(f"L({sha256},Transform(bucket_height=48, bucket_width=96")
    assert row.pop("pixels_lost") == pytest.approx(0)
    assert row == {
        "id": "in/a", "variant": 0, "uri": str(tmp_path / "in/a.png"), "sha256": sha256, "width": 200, "height": 100,
        "captions": ["a sks"], "text_keys": ["T(a sks)"], "bucket_height": 48, "bucket_width": 96,
        "resize_height": 48, "resize_width": 96, "crop_top": 0, "crop_left": 0, "flip": False, "dataset": 0,
        "repeats": 3, "weight": 1.0, "regularisation": False, "split": "train", "mask": None, "references": [],
        "roles": [{"role": "trigger_only", "text": "sks", "key": "T(sks)"}],
    }  # fmt: skip
    assert result.samples.schema.equals(samples_schema())
    assert result.quarantine.schema.equals(quarantine_schema())
    assert result.warnings == []
    assert set(result.looks) == {sha256}


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


@pytest.mark.parametrize(("check", "found"), [(None, True), (True, True), (False, False)])
def test_who_decides_whether_pictures_are_decoded(tmp_path, check, found):
    """`check_images` does; unset, a small data set is decoded: a cut JPEG shows the difference."""
    add(tmp_path, "cut.jpg", picture(fmt="JPEG")[:-900])
    result = plan(configuration(tmp_path, check_images=check))
    assert result.quarantine.num_rows == int(found)


def test_large_data_sets_are_read_by_header_only_and_it_is_said(tmp_path, monkeypatch):
    """Over the limit pictures are not decoded, with a warning that names the setting."""
    monkeypatch.setattr(intake, "DECODE_UP_TO", 1)
    add(tmp_path, "a.png", picture())
    add(tmp_path, "b.jpg", picture(fmt="JPEG")[:-900])
    result = plan(configuration(tmp_path))
    assert len(rows(result, "id")) == 2
    assert any("data.0.check_images=true" in warning for warning in result.warnings)


def test_the_plan_does_not_depend_on_the_mapper(tmp_path):
    """Threads or plain `map`: the same tables, in the order of data sets and paths."""
    for number in range(30):
        add(tmp_path, f"{number:02}.png", picture(seed=number))
    threaded, plain = (plan(configuration(tmp_path), mapper=mapper) for mapper in (intake.threads, map))
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

    def rank(sha256):
        return hashlib.sha256(b"validation split\0" + sha256.encode()).digest()

    def held_out(folder):
        found = rows(plan(configuration(tmp_path / folder, held_out=0.25, resolutions=[32, 16])), "sha256", "split")
        assert len(set(found)) == len(found) / 2
        chosen = {sha256 for sha256, split in found if split == "validation"}
        assert chosen == set(sorted(dict(found), key=rank)[:10]), "another order would move pictures of caches that are"
        return chosen

    assert held_out("a") == held_out("b")
    assert len(held_out("a") - held_out("c")) <= 1


def test_ids_are_unique_over_data_sets(tmp_path):
    """Equal relative paths in two data sets get different ids; rows say which data set they are of."""
    add(tmp_path, "one/a.png", picture())
    add(tmp_path, "two/a.png", picture(seed=1))
    result = plan(configuration(tmp_path / "one", tmp_path / "two"))
    assert rows(result, "id", "dataset") == [("a", 0), ("a@1", 1)]
    add(tmp_path, "two/a@1.png", picture(seed=2))
    result = plan(configuration(tmp_path / "one", tmp_path / "two"))
    assert rows(result, "id", "dataset") == [("a", 0), ("a@1", 1), ("a@1@1", 1)]


def test_rows_become_columns_in_batches(tmp_path, monkeypatch):
    """However many rows are Python objects at a time, all of them are in the table, in order."""
    for number in range(8):
        add(tmp_path, f"{number}.png", picture(seed=number))
    whole = plan(configuration(tmp_path, flip=True))
    monkeypatch.setattr(intake, "AT_ONCE", 3)
    parts = plan(configuration(tmp_path, flip=True))
    assert parts.samples.column("id").num_chunks == 5
    assert parts.samples.equals(whole.samples)


def test_what_a_person_should_know_is_said_once_per_kind(tmp_path):
    """Missing triggers ("risks" is not "sks"), heavy crops and orphan texts are warnings with a count and a path."""
    add(tmp_path, "a.png", picture(), "risks")
    add(tmp_path, "b.png", picture(seed=1), "a dog")
    add(tmp_path, "c.png", picture(400, 64, seed=2), "sks dog")
    (tmp_path / "orphan.txt").write_text("?")
    warnings = plan(configuration(tmp_path, trigger="sks", inject_trigger=False)).warnings
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
    assert intake.refusal(config, plan(config)) is None
    config = configuration(tmp_path, max_quarantined=0.09)
    message = intake.refusal(config, plan(config))
    assert "1 of 10 pictures (10.0%)" in message
    assert f"{tmp_path}/bad.png: the file is empty" in message


def test_refusal_when_nothing_is_left(tmp_path):
    """With no usable picture there is nothing to allow; at most ten files are listed."""
    for number in range(12):
        add(tmp_path, f"{number:02}.png", b"")
    config = configuration(tmp_path, max_quarantined=1.0)
    message = intake.refusal(config, plan(config))
    assert message.startswith("no picture can be used")
    assert message.count(".png: ") == 10
    assert "2 more" in message


def test_pictures_left_out_by_wish_are_no_quarantine(tmp_path):
    """`min_size` and `max_size`: listed with their reason, warned about, not counted as broken."""
    for name, size in {"small.png": (70, 300), "fine.png": (100, 100), "large.png": (100, 301)}.items():
        add(tmp_path, name, picture(*size))
    config = configuration(tmp_path, min_size=71, max_size=300)
    result = plan(config)
    assert rows(result, "id") == [("fine",)]
    assert {row["path"].rsplit("/", 1)[1]: row["reason"] for row in result.excluded.to_pylist()} == {
        "large.png": "longer side over max_size=300",
        "small.png": "shorter side under min_size=71",
    }
    assert result.quarantine.num_rows == 0
    assert intake.refusal(config, result) is None
    assert sum("left out by wish" in warning for warning in result.warnings) == 2
    nothing = configuration(tmp_path, min_size=1000)
    assert "small.png: shorter side under min_size=1000" in intake.refusal(nothing, plan(nothing))


def test_enlarging_is_asked_for_and_said(tmp_path):
    """Without `upscale` a small picture is quarantined, with it kept with a warning."""
    add(tmp_path, "a.png", picture(40, 40))
    assert plan(configuration(tmp_path)).quarantine.num_rows == 1
    result = plan(configuration(tmp_path, upscale=True))
    assert rows(result, "bucket_height", "resize_height", "height") == [(64, 64, 40)]
    assert any("enlarged for resolution 64" in warning for warning in result.warnings)


def test_crops_and_flips_are_variants(tmp_path):
    """Resolutions x crops x flips in that order, numbered from 0, all in one split; the same again another time."""
    add(tmp_path, "a.png", picture(300, 128))
    options = {"resolutions": [128, 64], "crop": "random", "crop_variants": 2, "crop_aspect": "square", "flip": True}
    result = plan(configuration(tmp_path, **options))
    found = rows(result, "variant", "bucket_height", "flip")
    assert found == [(n, (128, 64)[n // 4], bool(n % 2)) for n in range(8)]
    lefts = [left for (left,) in rows(result, "crop_left")]
    assert lefts[0] == lefts[1] != lefts[2] == lefts[3]
    assert len({key for (key,) in rows(result, "latent_key")}) == 8
    assert plan(configuration(tmp_path, **options)).samples.equals(result.samples)


def beside(tmp_path, **sizes):
    """A data set of one 96 x 64 picture `a`, with a mask and two references of these sizes."""
    add(tmp_path / "set", "a.png", picture(96, 64))
    for number, (folder, size) in enumerate(sizes.items()):
        add(tmp_path / folder, "a.png", size if isinstance(size, bytes) else picture(*size, seed=number + 1), None)
    folders = {"masks": str(tmp_path / "masks")} if "masks" in sizes else {}
    references = [str(tmp_path / folder) for folder in sizes if folder != "masks"]
    return configuration(tmp_path / "set", **folders, references=references, flip=True)


def test_masks_and_references_go_with_every_variant(tmp_path):
    """The mask has the picture's transform; references their own, about as large, never enlarged; all flip together."""
    result = plan(beside(tmp_path, masks=(48, 32), first=(400, 100), second=(40, 40)))
    assert result.samples.num_rows == 2
    for row in result.samples.to_pylist():
        transform = ", ".join(f"{name}={row[name]}" for name in samples.TRANSFORM)
        assert row["mask"]["uri"] == str(tmp_path / "masks/a.png")
        assert row["mask"]["latent_key"] == f"M({row['mask']['sha256']},Transform({transform}))"
        first, second = row["references"]
        assert (first["uri"], second["uri"]) == (str(tmp_path / "first/a.png"), str(tmp_path / "second/a.png"))
        assert (first["bucket_height"], first["bucket_width"]) == (32, 128)
        assert (second["bucket_height"], second["bucket_width"]) == (32, 32)
        assert first["flip"] == second["flip"] == row["flip"]
    assert any("its mask is of another size" in warning for warning in result.warnings)
    wanted = samples.wanted(result.samples)
    assert len(wanted) == 8
    assert sorted(row.mask for row in wanted.values()) == [False] * 6 + [True] * 2


@pytest.mark.parametrize(("size", "wanted"), [
    (None, [(32, 128), (32, 32), (16, 16)]),  # 64 x 64 px, never enlarged
    (32, [(16, 64), (32, 32), (16, 16)]),
    ("target", [(32, 128), (48, 48), (48, 48)]),  # up to as many pixels as 48 x 80, of small ones too
])  # fmt: skip
def test_references_have_the_size_that_is_asked_for(tmp_path, size, wanted):
    """A resolution's, a side's, or the target's own; each in its own aspect ratio; unset, nothing has changed."""
    config = beside(tmp_path, first=(400, 100), second=(40, 40), third=(20, 20))
    config = config.model_copy(update={"data": (config.data[0].model_copy(update={"reference_size": size}),)})
    row = plan(config).samples.to_pylist()[0]
    assert (row["bucket_height"], row["bucket_width"]) == (48, 80)
    assert [(each["bucket_height"], each["bucket_width"]) for each in row["references"]] == wanted


@pytest.mark.parametrize(("which", "kind"), [("masks", "mask"), ("first", "reference"), ("second", "reference")])
def test_a_broken_companion_quarantines_its_sample_by_name(tmp_path, which, kind):
    """The reason names the mask or reference, the path is the picture's."""
    sizes = {"masks": (96, 64), "first": (64, 64), "second": (64, 64)}
    result = plan(beside(tmp_path, **{**sizes, which: b""}))
    (row,) = result.quarantine.to_pylist()
    assert row["path"] == str(tmp_path / "set/a.png")
    assert row["reason"].startswith(f"{kind} {tmp_path}/{which}/a.png: the file is empty")
    tiny = plan(beside(tmp_path / "tiny", first=(10, 200)))
    assert "too small: 10x200" in tiny.quarantine.to_pylist()[0]["reason"]


def test_what_fails_late_takes_exactly_its_samples(tmp_path):
    """`without`: every variant of a sample goes when its picture, mask or reference fails; the others stay."""
    result = plan(beside(tmp_path, masks=(96, 64), first=(64, 64)))
    add(tmp_path / "set", "b.png", picture(64, 64, seed=9))
    add(tmp_path / "masks", "b.png", picture(64, 64, seed=8), None)
    add(tmp_path / "first", "b.png", picture(64, 64, seed=7), None)
    result = plan(beside(tmp_path, masks=(96, 64), first=(64, 64)))
    row = result.samples.to_pylist()[1]
    assert row["id"] == "a"
    for key, words in [
        (row["latent_key"], "damaged"),
        (row["mask"]["latent_key"], f"mask {tmp_path}/masks/a.png: damaged"),
        (row["references"][0]["latent_key"], f"reference {tmp_path}/first/a.png: damaged"),
    ]:
        left = intake.without(result, {key: "damaged"})
        assert rows(left, "id") == [("b",), ("b",)]
        assert left.quarantine.to_pylist() == [{"path": str(tmp_path / "set/a.png"), "reason": words, "dataset": 0}]
        assert left.samples.schema.equals(samples_schema())
    both = intake.without(result, {row["mask"]["latent_key"]: "mask", row["latent_key"]: "picture"})
    assert both.quarantine.column("reason").to_pylist() == ["picture"], "the picture's own reason goes first"
    assert intake.without(result, {}) is result


def test_regularisation_sets_are_never_held_out(tmp_path):
    """Their pictures teach what the class is; the validation loss is about the concept."""
    for number in range(25):
        add(tmp_path, f"one/{number}.png", picture(seed=number))
        add(tmp_path, f"two/{number}.png", picture(seed=100 + number))
    tree = configuration(tmp_path / "one", tmp_path / "two", held_out=0.2).model_dump(by_alias=True)
    tree["data"][1]["regularisation"] = True
    splits = rows(plan(Config.model_validate(tree)), "dataset", "split")
    assert splits.count((0, "validation")) == 5
    assert splits.count((1, "validation")) == 0
