"""The plan of data sets with planted faults: every fault is named, nothing is written, nothing is invented."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from flows import wording
from flux2_core import accelerator
from flux2_core.cache import fingerprints
from flux2_core.config.sections import Config
from flux2_core.model.folder import resolve
from flux2_core.plan import describe, rates, survey
from flux2_core.plan.rates import Rate
from flux2_core.run import recorded
from flux2_core.run.folder import RunFolder
from tests.flux2_core.plan.test_doctor import soft

PARTS = ("text_encoder", "tokenizer", "vae", "transformer")
Make = Callable[..., Config]


def add(folder: Path, name: str, picture: Image.Image, caption: str = "a [trigger]") -> None:
    folder.mkdir(exist_ok=True)
    picture.save(folder / name)
    (folder / name).with_suffix(".txt").write_text(caption)


def plan(config: Config) -> dict[str, Any]:
    model = resolve(config.model, parts=PARTS)
    told = describe.describe(config, model, survey.survey(config, model))
    json.dumps(told, allow_nan=False)
    assert wording.plan(told, "my.toml")
    return told


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty pictures of two shapes, among them a copy, a recompressed one, a long caption and one too small."""
    folder = tmp_path / "data"
    for number in range(16):
        add(folder, f"p{number:02}.png", soft(number, *((64, 96) if number % 4 else (96, 64))))
    add(folder, "copy.png", soft(3, 64, 96))
    add(folder, "lossy.jpg", soft(5, 64, 96))
    add(folder, "long.png", soft(100, 64, 64), "[trigger] " + "word " * 120)
    add(folder, "without.png", soft(101, 64, 64), "a dog")
    add(folder, "small.png", soft(102, 40, 40))
    return folder


def config_of(make_config: Make, folder: Path, **sections: Any) -> Config:
    return make_config(
        data=[{"path": str(folder), "trigger": "sks", "resolutions": [64], "min_size": 50, **sections.pop("data", {})}],
        max_quarantined=0.5,
        **sections,
    )


def test_each_planted_fault_is_named(make_config: Make, data: Path, tmp_path: Path) -> None:
    """Copies, look-alikes, a cut caption, an injected trigger, a small picture: each in its field, by its id."""
    told = plan(config_of(make_config, data))
    assert told["duplicates"]["identical"] == [["copy", "p03"]]
    assert ["lossy", "p05"] in told["duplicates"]["alike"]
    assert len(told["duplicates"]["alike"]) == 1
    assert told["duplicates"]["looked_at"] == told["samples"]["kept"] == 20
    (cut,) = told["tokens"]["truncated"]
    assert (cut["id"], cut["tokens"] > 96) == ("long", True)
    (trigger,) = told["triggers"]
    assert (trigger["injected"], trigger["mentioned"], trigger["without"]) == (1, trigger["captions"], [])
    left_out = told["samples"]["excluded"] + told["samples"]["quarantined"]
    assert [Path(entry["path"]).name for entry in left_out] == ["small.png"]
    assert sum(bucket["samples"] for bucket in told["buckets"]) == 20
    assert all(0 <= bucket["pixels_lost"] <= bucket["most_lost"] < 1 for bucket in told["buckets"])
    assert told["bytes"]["to_write"] == told["bytes"]["total"] == told["bytes"]["text"] + told["bytes"]["latents"]
    assert sum(entry["texts"] for entry in told["tokens"]["histogram"]) == told["rows"]["text"]["needed"]
    for words in ("long (", "lossy = p05"):
        assert any(words in warning for warning in told["warnings"])
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "runs").exists()


def test_without_decoding_nothing_is_said_of_looks(make_config: Make, data: Path) -> None:
    """Where only headers are read, no picture was looked at, and equal bytes are still found."""
    told = plan(config_of(make_config, data, data={"check_images": False}))
    assert (told["duplicates"]["looked_at"], told["duplicates"]["alike"]) == (0, [])
    assert told["duplicates"]["identical"] == [["copy", "p03"]]


def test_times_are_predicted_from_measurements_alone(make_config: Make, data: Path) -> None:
    """Nothing measured: nothing predicted; each part when it is; hours and cost when all parts are."""
    config = config_of(make_config, data, cluster={"price": 3.6, "workers": 2}, train={"steps": 1000})
    model = resolve(config.model, parts=PARTS)
    nothing = dict.fromkeys(("text", "latents", "train", "gpu_hours", "cost")) | {"rough": False}
    told = plan(config)
    assert told["time"] == nothing
    estimate = told["estimate"]
    assert estimate["train"]["likely"] == pytest.approx(1000 * estimate["step"]["likely"], rel=0.01)
    assert min(estimate[part]["least"] for part in ("text", "latents")) > 0, "all of it is to be encoded"
    for fingerprint in (fingerprints.text_fingerprint(model, config), fingerprints.latents_fingerprint(model, config)):
        rates.record(config.output.cache, fingerprint, Rate("H200", 10, 1000, 10.0, "2026-01-01"))
    folder = RunFolder(config.model_copy(update={"run": "before"}))
    recorded.write(RunFolder(config.model_copy(update={"run": "before"})))
    folder.metrics.write_text('{"step": 1, "seconds": 3.6}\n')
    told = plan(config)
    missing = told["bytes"]["latents"] // (128 * 4)
    assert told["time"]["latents"] == {
        "seconds": round(missing / 100, 2), "device": "H200", "tokens_per_second": 100.0, "measured_rows": 10,
        "rough": True,
    }  # fmt: skip
    assert told["time"]["train"] == {
        "seconds": 3600.0, "seconds_per_step": 3.6, "run": "before", "measured_steps": 1, "rough": True,
    }  # fmt: skip
    encoding = told["time"]["text"]["seconds"] + told["time"]["latents"]["seconds"]
    assert told["time"]["gpu_hours"] == round(2 + encoding / 3600, 3), "an hour on each of two workers"
    assert told["time"]["cost"] == round(told["time"]["gpu_hours"] * 3.6, 2)
    assert told["estimate"]["gpu_hours"]["most"] == pytest.approx(told["time"]["gpu_hours"], rel=0.01), "measured now"
    assert "H200" in wording.plan(told, "my.toml")


def test_tokens_of_a_picture_with_its_references() -> None:
    """Estimates take what the model sees of a sample on average: the picture's tokens and those of its references."""
    place = pa.struct([("bucket_height", pa.int32()), ("bucket_width", pa.int32())])
    beside = [[{"bucket_height": 32, "bucket_width": 16}] * 2, [], [], []]
    columns = {"bucket_height": [64, 64, 32, 32], "bucket_width": [64, 96, 32, 32]}
    samples = pa.table(columns | {"references": pa.array(beside, pa.list_(place))})
    assert describe._tokens(samples) == (16 + 24 + 4 + 4 + 2 * 2) / 4
    assert describe._tokens(samples.slice(0, 0)) == 0


def test_a_rate_says_how_sure_it_is(make_config: Make, data: Path) -> None:
    """What a handful of rows or steps took is called rough, in each number and in the sum; a hundred rows are not."""
    config = config_of(make_config, data, cluster={"price": 3.6})
    model, folder = resolve(config.model, parts=PARTS), RunFolder(config.model_copy(update={"run": "before"}))
    recorded.write(folder)
    prints = (fingerprints.text_fingerprint(model, config), fingerprints.latents_fingerprint(model, config))
    for rows, steps in ((4, 3), (4, 20), (100, 3), (100, 20)):
        Path(config.output.cache, rates.NAME).unlink(missing_ok=True)
        for fingerprint in prints:
            rates.record(config.output.cache, fingerprint, Rate("H200", rows, 1000, 60.0, "2026-01-01"))
        folder.metrics.write_text('{"step": 1, "seconds": 3.6}\n' * steps)
        told = plan(config)
        rough = [told["time"][part]["rough"] for part in ("text", "latents", "train")]
        assert rough == [rows == 4, rows == 4, steps == 3]
        assert told["time"]["rough"] == any(rough)
        text = wording.plan(told, "my.toml")
        assert text.count("rough: measured on 4 rows") == 2 * (rows == 4)
        assert text.count("rough: measured on 3 steps") == (steps == 3)
        (hours,) = [line for line in text.splitlines() if line.startswith("in all about")]
        assert ("rough" in hours) == any(rough)


@pytest.mark.parametrize(
    ("workers", "strategies"), [(1, {"ddp", "stream"}), (8, {"ddp", "fsdp", "stream"}), (16, {"ddp", "hsdp", "stream"})]
)
def test_placements_beyond_a_node_are_hsdp(
    make_config: Make, data: Path, monkeypatch: pytest.MonkeyPatch, workers: int, strategies: set[str]
) -> None:
    """Workers that one machine of eight GPUs does not hold are sharded in each node, not across nodes."""
    monkeypatch.setattr(accelerator, "count", lambda: 8)
    memory = plan(config_of(make_config, data, cluster={"workers": workers, "gpu_memory": 80}))["memory"]
    assert {row["strategy"] for row in memory["alternatives"]} == strategies
    assert memory["workers_per_node"] == min(workers, 8)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"learning_rate": 0.5}}, "train.learning_rate=0.5"),
        ({"train": {"optimizer": "prodigy", "learning_rate": 1e-4}}, "train.learning_rate=0.0001"),
        ({"train": {"batch_size": 64}}, "train.batch_size=64 is more than the 19 pictures"),
        ({"cluster": {"workers": 3}}, "1 of the 3 pictures that they compute in each step are fillers"),
        ({"train": {"steps": 3}}, "see only 6 of 19 pictures"),
        ({"data": {"trigger": None}}, "no trigger is set"),
        ({"validate": {"every": 10}}, "validate.prompts is empty"),
    ],
)
def test_unusual_settings_are_said(make_config: Make, data: Path, sections: dict[str, Any], words: str) -> None:
    """A setting that is allowed and seldom meant is a warning that names it."""
    (data / "long.txt").write_text("short")
    for caption in data.glob("*.txt") if "data" in sections else ():
        caption.write_text("a thing")
    usual = {"train": {"steps": 100, "batch_size": 2, "learning_rate": 1e-4}}
    merged = {name: usual.get(name, {}) | sections.get(name, {}) for name in {*usual, *sections}}
    config = config_of(make_config, data, **merged)
    model = resolve(config.model, parts=PARTS)
    planned = survey.survey(config, model)
    held_out = replace(planned, warnings=[])
    assert [w for w in describe.describe(config, model, held_out)["warnings"] if words in w], words
    if "data" not in sections:
        assert not [w for w in plan(config_of(make_config, data, **usual))["warnings"] if words in w]


def test_look_alikes_across_the_split_are_said(make_config: Make, data: Path) -> None:
    """Of two look-alikes one is held out: the validation loss would flatter, and it is the first thing said. Where both
    are on one side nothing is said."""
    config = config_of(make_config, data)
    model = resolve(config.model, parts=PARTS)
    planned = survey.survey(config, model)
    ids = planned.samples.column("id").to_pylist()
    place = planned.samples.schema.get_field_index("split")
    for held_out, across in (({"lossy"}, [["lossy", "p05"]]), ({"lossy", "p05"}, []), ({"p01"}, [])):
        split = ["validation" if name in held_out else "train" for name in ids]
        told = describe.describe(
            config, model, replace(planned, samples=planned.samples.set_column(place, "split", [split]))
        )
        assert told["duplicates"]["across_split"] == across
        said = ["held-out pictures look like training pictures" in warning for warning in told["warnings"][:2]]
        assert any(said) == bool(across)
        assert told["samples"]["validation"] == len(held_out)


def test_progress_tells_of_every_file(make_config: Make, data: Path) -> None:
    """A watched mapper tells (0, n) first and (n, n) last, and changes nothing of the plan."""
    config, told = config_of(make_config, data), []
    model = resolve(config.model, parts=PARTS)
    watched = survey.survey(config, model, mapper=survey.watched(lambda done, of: told.append((done, of)), map))
    assert watched.samples.equals(survey.survey(config, model).samples)
    assert (told[0], told[-1], len(told)) == ((0, 21), (21, 21), 22)
