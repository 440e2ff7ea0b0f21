"""`plan`, `show`, `verify` and `stat` on a small cache, and the batches that training makes of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flux2_core.cache import prompt_rows, stat
from flux2_core.config.sections import Config
from flux2_core.errors import DataError
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.plan import describe, survey
from flux2_core.run.folder import RunFolder
from flux2_core.store import parquet, schemas
from flux2_core.train import show
from flux2_core.train.batches import TrainingData
from tests.in_process import PARTS, fill_cache

Make = Callable[..., Config]
SECTIONS: dict[str, Any] = {"validate": {"prompts": ["a blue [trigger]"]}, "train": {"batch_size": 4}}


@pytest.fixture
def config(make_config: Make) -> Config:
    return make_config(**SECTIONS)


@pytest.fixture
def model(config: Config) -> ModelFolder:
    return fill_cache(config)


def test_plan_before_and_after(make_config: Make, config: Config) -> None:
    """A plan counts what is needed and missing, writes nothing, and is exact: after caching nothing is missing."""
    model = resolve(config.model, parts=PARTS)
    before = describe.describe(config, model, survey.survey(config, model))
    assert not Path(config.output.cache).exists()
    assert not Path(config.output.root).exists()
    assert before["rows"] == {
        "text": {"needed": 8, "cached": 0, "missing": 8, "why": {"new": 8}},
        "latents": {"needed": 6, "cached": 0, "missing": 6, "why": {"new": 6}},
    }
    assert (before["samples"]["kept"], before["samples"]["ids"][0], before["samples"]["quarantined"]) == (6, "p0", [])
    assert sum(bucket["samples"] for bucket in before["buckets"]) == 6
    assert "refused" not in before
    fill_cache(config)
    after = describe.describe(config, model, survey.survey(config, model))
    assert {kind: counts["missing"] for kind, counts in after["rows"].items()} == {"text": 0, "latents": 0}
    data = TrainingData(config, model)
    stored = [data.text_reader.fetch([key])[0] for key in {data.key(t) for t in ["", *data.prompts]}]
    assert all(len(row.payload) == row.attributes["tokens"] * 96 * 4 for row in stored)
    rows = data.latents_reader.fetch([row["latent_key"] for row in data.train])
    assert after["bytes"]["latents"] == sum(len(row.payload) for row in rows)
    captions = {key for row in data.train for key in row["text_keys"]} | {data.key(t) for t in ["", *data.prompts]}
    assert after["bytes"]["text"] == sum(len(row.payload) for row in data.text_reader.fetch(list(captions)))
    json.dumps(after, allow_nan=False)


def test_plan_tells_of_truncation_and_refusal(make_config: Make) -> None:
    """Captions that lose their end are counted and shown; data that would be refused says why."""
    config = make_config(text={"max_length": 60}, validate={"prompts": ["word " * 40]}, max_quarantined=0.0)
    model = resolve(config.model, parts=PARTS)
    planned = survey.survey(config, model)
    told = describe.describe(config, model, planned)
    assert any("over text.max_length=60 tokens" in warning for warning in told["warnings"])
    assert told["tokens"]["longest"] > 60
    empty = replace(planned, samples=planned.samples.slice(0, 0), warnings=[])
    assert "no picture can be used" in describe.describe(config, model, empty)["refused"]


def test_show_is_what_training_sees(config: Config, model: ModelFolder, tmp_path: Path) -> None:
    """`show` gives the tensors of the sample as a batch holds them, in the shapes of design.md."""
    data = TrainingData(config, model)
    batch = data.batch(0)
    for place, name in enumerate(batch.ids):
        shown = show.tensors_of(config, model, name)
        assert torch.equal(shown["latents"], batch.latents_Bchw[place])
        assert torch.equal(shown["prompt_embeds"], batch.prompts_BLD[place])
    height, width = shown["latents"].shape[1:]
    assert {name: tuple(tensor.shape) for name, tensor in shown.items()} == {
        "latents": (128, height, width), "prompt_embeds": (96, 96), "prompt_embeds.null": (96, 96),
        "prompt_embeds.preview0": (96, 96), "img_ids": (height * width, 4), "txt_ids": (96, 4),
    }  # fmt: skip
    show.write_tensors(tmp_path / "new" / "out.safetensors", shown)
    back = load_file(tmp_path / "new" / "out.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in shown.items())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.safetensors"]


def test_show_of_masks_and_references(make_config: Make, photos: Path, tmp_path: Path) -> None:
    """A mask is shown on the token grid, references with their own shapes and the time ids that tell them apart; `plan`
    counted the bytes of all of them exactly."""
    for place, picture in enumerate(sorted(photos.glob("*.png"))):
        for name, color in (("masks", (51 + 204 * (place % 2),) * 3), ("one", (9, 200, 9)), ("two", (200, 9, 9))):
            (tmp_path / name).mkdir(exist_ok=True)
            with Image.open(picture) as opened:
                size = opened.size if name == "masks" else (64, 48)
            Image.new("RGB", size, color).save(tmp_path / name / picture.name)
    beside = {"masks": str(tmp_path / "masks"), "references": [str(tmp_path / "one"), str(tmp_path / "two")]}
    config = make_config(data=[{"path": str(photos), "trigger": "sks", "resolutions": [64], **beside}])
    model = fill_cache(config)
    shown = show.tensors_of(config, model, "p1")
    assert torch.equal(shown["mask"], torch.ones(4, 4))
    assert show.tensors_of(config, model, "p2")["mask"].allclose(torch.full((4, 4), 0.2))
    assert shown["reference.0"].shape == shown["reference.1"].shape == (128, 3, 4)
    assert not torch.equal(shown["reference.0"], shown["reference.1"])
    assert shown["reference_ids"][:, 0].tolist() == [10] * 12 + [20] * 12
    told = describe.describe(config, model, survey.survey(config, model))
    reader = TrainingData(config, model).latents_reader
    keys = reader.keys()
    assert told["bytes"]["latents"] == sum(reader.size(key) for key in keys)
    assert told["rows"]["latents"]["cached"] == len(keys) > 6


def test_samples_are_found_by_id_and_variant() -> None:
    """`ID` is the first variant, `ID#n` the n-th; a # in a file's own name is no variant."""
    rows = [{"id": "a", "variant": 0}, {"id": "a", "variant": 1}, {"id": "b#1", "variant": 0}]
    data: Any = SimpleNamespace(train=rows[:2], validation=rows[2:])
    config: Any = Config(run="none", model={"path": "m"}, data=[{"path": "d"}], output={"root": "/no/such"})  # type: ignore
    for wanted, row in (("a", rows[0]), ("a#0", rows[0]), ("a#1", rows[1]), ("b#1", rows[2]), ("b#1#0", rows[2])):
        assert show._find(config, data, wanted) is row
    for wanted in ("a#2", "c", "", "b"):
        with pytest.raises(DataError, match="no such sample; there are a, "):
            show._find(config, data, wanted)


def test_a_quarantined_sample_says_why(config: Config, model: ModelFolder) -> None:
    """`show` of a picture that was left out gives the reason, and only for that very picture."""
    rows = [{"path": "/data/sub/zp.png", "reason": "truncated", "dataset": 0}]
    parquet.write_parquet(
        str(RunFolder(config).quarantine), schemas.pa.Table.from_pylist(rows, schema=schemas.quarantine_schema()), {}
    )
    for name in ("zp", "sub/zp", "zp.png"):
        with pytest.raises(DataError, match=r"quarantined \(truncated\)"):
            show.tensors_of(config, model, name)
    with pytest.raises(DataError, match="no such sample"):
        show.tensors_of(config, model, "p")


def test_stat(make_config: Make, config: Config, model: ModelFolder) -> None:
    """Rows, bytes and version of both tables; zeros where nothing is cached for a configuration."""
    found = stat.stat_tables(config, model)
    assert (found["samples"], found["text"]["rows"], found["latents"]["rows"]) == (6, 9, 6)
    assert min(found[kind][field] for kind in ("text", "latents") for field in ("version", "bytes")) > 0
    empty = stat.stat_tables(make_config(text={"max_length": 128}), model)
    assert (empty["samples"], empty["text"]["rows"], empty["latents"]["rows"]) == (0, 0, 6)
    assert (empty["text"]["files"], empty["text"]["age_days"], empty["text"]["compaction_due"]) == (0, None, False)
    assert found["latents"]["files"] > 3
    assert 0 <= found["latents"]["age_days"] < 1


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_do_not_depend_on_workers(make_config: Make, config: Config, model: ModelFolder, world: int) -> None:
    """Pictures, noise, sigma, dropout and prompts of a step are the same however many workers share it."""
    data = TrainingData(make_config(**{**SECTIONS, "train": {"batch_size": 4, "caption_dropout": 0.5}}), model)
    null = data.prompt_rows([data.key("")])[0]
    dropped = []
    for step in range(6):
        whole = data.batch(step)
        parts = [data.batch(step, rank=rank, world=world) for rank in range(world)]
        assert [name for part in parts for name in part.ids] == whole.ids
        for field in ("latents_Bchw", "noise_Bchw", "sigma_B", "prompts_BLD"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))
        assert {part.total for part in parts} == {4}
        dropped += [torch.equal(rows, null) for rows in whole.prompts_BLD]
    assert 3 <= sum(dropped) <= 21
    ahead = [batch for batch, _ in data.batches(2, 6, rank=0, world=world)]
    assert [batch.ids for batch in ahead] == [data.batch(step, world=world).ids for step in range(2, 6)]
    assert prompt_rows.PAD_KEY == "pad"
