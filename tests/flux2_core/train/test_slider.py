"""Sliders: the terms by hand, strengths and what they leave, no picture needed, two workers, resume, the strip."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.lora import adapter
from flux2_core.model.folder import resolve
from flux2_core.model.latents import from_tokens
from flux2_core.placement import compiled
from flux2_core.plan import describe, survey
from flux2_core.run.folder import RunFolder
from flux2_core.train import show
from flux2_core.train.batches import TrainingData
from flux2_core.train.loop import run
from flux2_core.train.trainer import Trainer
from tests.in_process import PARTS, fill_cache, in_ranks, process_group
from tests.random_adapter import randomised

Make = Callable[..., Config]
SLIDER = {"target": "a house", "positive": "a large house", "negative": "a small house"}


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


def configured(make_config: Make, *, slider: dict[str, Any] | None = None, **sections: Any) -> Config:
    """A slider without any picture, at two sizes."""
    return make_config(data=[{"resolutions": [64, 96]}], slider=SLIDER | (slider or {}), **sections)


def prepared(config: Config) -> Trainer:
    fill_cache(config)
    trainer = Trainer(config)
    randomised(trainer)
    return trainer


def at(trainer: Trainer, strength: float) -> None:
    """Multiply the adapter itself."""
    weights = {name: value * (strength if "lora_B" in name else 1) for name, value in trainer.weights().items()}
    adapter.load(trainer.transformer, weights, device=torch.device("cpu"))


@pytest.mark.parametrize("anchor", [(), ("a tree", "a car")])
def test_the_terms_by_hand(make_config: Make, anchor: tuple[str, ...]) -> None:
    """At what the base makes of noise in four steps, strengths 1 and -1 are to add and to take half the difference of
    the base's velocities of both prompts, and leave the drawn anchor's alone."""
    trainer = prepared(configured(make_config, slider={"anchor": anchor}))
    data, batch = trainer.data, trainer.data.batch(0)
    assert not batch.latents_Bchw.any()
    many, (height, width) = len(batch.sigma_B), batch.noise_Bchw.shape[2:]
    rows = {name: data.prompt_rows([data.key(text)] * many) for name, text in SLIDER.items()}
    with torch.no_grad(), trainer.base():
        x, level = batch.noise_Bchw, torch.ones(many)
        for _ in range(4):
            velocity = from_tokens(trainer.predict(x, rows["target"], level), height=height, width=width)
            x = x - ((1 - batch.sigma_B) / 4).view(-1, 1, 1, 1) * velocity
            level = level - (1 - batch.sigma_B) / 4
        base = {name: trainer.predict(x, each, batch.sigma_B) for name, each in rows.items()}
        wanted = [(rows["target"], base["target"] + s * (base["positive"] - base["negative"])) for s in (0.5, -0.5)]
        if anchor:
            drawn = batch.carried["slider"]["anchor_BLD"]
            known = [data.prompt_rows([data.key(text)])[0] for text in anchor]
            assert all(any(torch.equal(one, each) for each in known) for one in drawn)
            wanted += [(drawn, trainer.predict(x, drawn, batch.sigma_B))] * 2
    by_hand, before = [], trainer.weights()
    for (prompts, target), strength in zip(wanted, (1, -1) * 2, strict=False):
        at(trainer, strength)
        with torch.no_grad():
            by_hand.append(float((trainer.predict(x, prompts, batch.sigma_B) - target).square().mean()))
        adapter.load(trainer.transformer, before, device=torch.device("cpu"))
    ours = [float(term.detach()) for _, term in trainer.terms(batch)]
    assert ours == pytest.approx(by_hand, rel=1e-4)
    assert len({round(one, 7) for one in ours}) == len(ours)


def test_a_strength_is_left_as_it_was(make_config: Make) -> None:
    """Inside, the prediction is that of the multiplied adapter, 0 is the base's; after it, also after an error, the
    adapter's own, bit for bit."""
    trainer = prepared(configured(make_config))
    batch = trainer.data.batch(0)

    def predicted() -> torch.Tensor:
        with torch.no_grad():
            return trainer.predict(batch.noise_Bchw, batch.prompts_BLD, batch.sigma_B)

    own, before = predicted(), trainer.weights()
    with trainer.base():
        base = predicted()
    for strength in (-2.0, 0.0, 1.0):
        with trainer.at(strength):
            inside = predicted()
        at(trainer, strength)
        assert torch.allclose(inside, predicted(), atol=1e-6)
        assert torch.equal(inside, {0.0: base, 1.0: own}.get(strength, inside))
        adapter.load(trainer.transformer, before, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="x"), trainer.at(3.0):
        raise ValueError("x")
    assert torch.equal(predicted(), own)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_blocks_that_are_computed_again_have_the_same_strength(make_config: Make, recompute: str) -> None:
    """The gradient at strength -1 is the same whether blocks are kept or computed again while it is taken."""
    norms = []
    for policy in ("none", recompute):
        trainer = prepared(configured(make_config, train={"recompute": policy}, run=policy))
        norms.append(trainer.train_step(trainer.data.batch(0))["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_person_brings_no_picture(make_config: Make, tmp_path: Path) -> None:
    """Without any data set `plan` keeps a sample a resolution and no latents, `train` learns and ends with the strip;
    `show` has the prompts."""
    tree = configured(make_config, train={"steps": 2}, validate={"every": 2, "prompts": ["a house by the sea"]})
    tree = tree.model_dump(mode="json", by_alias=True, exclude_none=True)
    tree["data"] = [{"resolutions": [64]}]
    config = parse(tree)
    assert parse(config.model_dump(mode="json", by_alias=True)) == config
    model = resolve(config.model, parts=PARTS)
    told = describe.describe(config, model, survey.survey(config, model))
    assert told["samples"]["ids"] == ["64px"]
    assert told["rows"]["latents"]["needed"] == 0
    assert "refused" not in told
    assert not [warning for warning in told["warnings"] if "pictures" in warning or "trigger" in warning]
    fill_cache(config)
    trainer = Trainer(config)
    run(trainer, lambda record: None)
    strip = Image.open(RunFolder(config).strengths)
    assert strip.width > 5 * 64
    assert {"prompt_embeds.slider_positive", "prompt_embeds.slider_negative", "latents"} <= show.tensors_of(
        config, model, "64px"
    ).keys()
    del tree["data"]
    assert parse(tree).data[0].resolutions == (1024,)


def test_texts_decide_what_is_cached(make_config: Make) -> None:
    """Another prompt is another cache: training refuses it before it starts, and names what differs."""
    fill_cache(configured(make_config))
    TrainingData(config := configured(make_config), resolve(config.model, parts=PARTS))
    other = configured(make_config, slider={"positive": "a huge house"})
    with pytest.raises(Exception, match=r"slider\.positive is 'a huge house', cached with 'a large house'"):
        TrainingData(other, resolve(other.model, parts=PARTS))


def ranked(rank: int, world: int, tree: str, out: str) -> None:
    """One process of a group: two steps' losses and norms."""
    trainer = Trainer(Config.model_validate_json(tree), rank=rank, world=world)
    randomised(trainer)
    records = [trainer.train_step(trainer.data.batch(step, rank=rank, world=world)) for step in range(2)]
    Path(f"{out}/{world}-{rank}").write_text(json.dumps([[one["loss"], one["grad_norm"]] for one in records]))


def test_two_workers(make_config: Make, tmp_path: Path) -> None:
    """A batch of 3 with anchors, in parts: the same losses and norms on one worker and on two."""
    anchor = {"anchor": ["a tree", "a car"]}
    config = configured(make_config, slider=anchor, train={"batch_size": 3}, cluster={"micro_batch": 1})
    fill_cache(config)
    for world in (1, 2):
        in_ranks(world, ranked, config.model_dump_json(by_alias=True), str(tmp_path), folder=tmp_path)
    one, first, second = (json.loads((tmp_path / name).read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second
    assert np.array(first) == pytest.approx(np.array(one), rel=1e-4)


def test_a_run_that_goes_on_is_the_uninterrupted_one(make_config: Make) -> None:
    """Three steps at once, and two and one after a checkpoint: the same adapter to the bit."""
    config = configured(make_config, train={"steps": 3})
    fill_cache(config)
    whole = Trainer(config.model_copy(update={"run": "whole"}))
    run(whole, lambda record: None)
    broken = Trainer(config)
    for step in range(2):
        broken.train_step(broken.data.batch(step))
    broken.save()
    resumed = Trainer(config)
    resumed.train_step(resumed.data.batch(2))
    assert all(torch.equal(weight, whole.weights()[name]) for name, weight in resumed.weights().items())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no positive": ({"slider": {"target": "a", "negative": "b"}}, r"set slider\.positive"),
    "anchor alone": ({"slider": {"anchor": "a"}}, r"set slider\.target"),
    "twice the same": ({"slider": {"target": "a", "positive": "b", "negative": "b"}}, "nothing would be learned"),
    "pictures": ({"data": [{"path": "photos"}]}, r"data\.0\.path is for pictures"),
    "masks": ({"data": [{"masks": "masks"}]}, r"data\.0\.masks is for pictures"),
    "flips": ({"data": [{}, {"flip": True}]}, r"data\.1\.flip is for pictures"),
    "preservation": ({"train": {"preservation": "blank"}}, r"set slider\.anchor"),
    "moved target": ({"loss": {"contrastive_guidance": 3.0}}, r"loss\.contrastive_guidance is for single pictures"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_slider_does_not_take(case: str) -> None:
    """Each is refused with its key when the configuration is read."""
    sections, said = REFUSED[case]
    with pytest.raises(UsageError, match=said):
        parse({"model": {"path": "m"}, "slider": SLIDER} | sections)


def test_without_a_slider_pictures_are_needed() -> None:
    """A data set without a path is refused, with a slider's heading as the other way."""
    for data in ({"data": [{}]}, {}):
        with pytest.raises(UsageError, match=r"data"):
            parse({"model": {"path": "m"}} | data)


@pytest.mark.all_cases
def test_compiled_blocks_heed_the_strength(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled as not compiled: a graph bakes no strength in, and more of them fail nothing."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    found = []
    for compile_it in (False, True):
        train = {"precision": "bf16", "compile": compile_it}
        trainer = prepared(configured(make_config, train=train, run=f"compiled-{compile_it}"))
        batch = trainer.data.batch(0)
        found.append([float(term.detach()) for _, term in trainer.terms(batch)])
        for strength in (-2.0, 2.0):
            with torch.no_grad(), trainer.at(strength):
                found[-1].append(float(trainer.predict(batch.noise_Bchw, batch.prompts_BLD, batch.sigma_B).mean()))
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4)
    assert len(set(found[1])) == 4
