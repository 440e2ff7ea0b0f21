"""Claims about the embedded model: its world, its checker, its demos, and what the shipped weights draw."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_core.config.sections import Model
from flux2_core.embedded import MODEL_FOLDER
from flux2_core.embedded.checker import agrees, look
from flux2_core.embedded.demo_data import FOLDERS, KINDS, PICTURES, demo_caption, demo_prompts, demo_scenes, shows
from flux2_core.embedded.fitting import Plan, fit
from flux2_core.embedded.score import draw_prompts, load_transformer, score_drawings, score_vae
from flux2_core.embedded.shapes import Scene, all_scenes, caption, draw, is_held_out
from flux2_core.embedded.train_model import TEXT
from flux2_core.model.folder import resolve
from flux2_core.model.tokenizer import PromptTokenizer

EXAMPLES = Path(__file__).parents[3] / "examples"
TRIGGERS = {"subject": "hoot", "style": "etch"}


@pytest.fixture(scope="module")
def model():
    return resolve(Model(path=str(MODEL_FOLDER)), parts=("text_encoder", "tokenizer", "transformer", "vae"))


@pytest.fixture(scope="module")
def transformer(model):
    return load_transformer(model)


def some_scenes(count: int) -> list[Scene]:
    return random.Random(11).sample(all_scenes(), count)


def noisy(picture: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 8, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def test_a_picture_is_a_function_of_its_scene_and_seed():
    """The same scene and seed give the same picture and caption; another seed gives others."""
    scene = Scene("cross", "red", "large", "left", "striped")
    assert np.array_equal(draw(scene, seed=3), draw(scene, seed=3))
    assert not np.array_equal(draw(scene, seed=3), draw(scene, seed=4))
    assert len({caption(scene, seed=seed) for seed in range(40)}) > 3


def test_a_tenth_of_all_scenes_is_held_out():
    """Held-out scenes are about a tenth, and hold every word of the world."""
    held = [scene for scene in all_scenes() if is_held_out(scene)]
    assert 0.08 < len(held) / len(all_scenes()) < 0.12
    for field in ("shape", "colour", "size", "place", "background"):
        assert {getattr(s, field) for s in held} == {getattr(s, field) for s in all_scenes()}


def test_the_checker_sees_what_was_drawn():
    """On noisy ground truth the checker is right in >= 99 % about each word, and sees no demo concept."""
    seen = [(scene, look(noisy(draw(scene, seed=n), n))) for n, scene in enumerate(some_scenes(200))]
    for what in ("colour", "shape", "background"):
        assert sum(agrees(saw, scene)[what] for scene, saw in seen) >= 198
    assert sum(saw.owl + saw.hatched for _, saw in seen) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_checker_sees_the_demo_concepts(kind):
    """It finds each concept in >= 98 % of drawings of it, noise included, and never takes one for the other."""
    scenes = [*demo_scenes(kind)[0], *demo_scenes(kind)[1][:40]]
    drawn = [noisy(draw(scene, seed=n, hatched=kind == "style"), n) for n, scene in enumerate(scenes)]
    other = next(name for name in KINDS if name != kind)
    assert sum(shows(kind, picture) for picture in drawn) >= 0.98 * len(drawn)
    assert not any(shows(other, picture) for picture in drawn)


def test_the_checker_says_none_where_nothing_fits():
    """Noise and an empty background are not taken for a drawing."""
    assert look(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).shape is None
    assert look(np.full((64, 64, 3), 248, dtype=np.uint8)).shape is None


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_demo_folder_is_what_the_code_draws(kind):
    """Each has 24 pictures, PNG and JPEG of several sizes, PNG exact; the concept's captions have a `[trigger]`, those
    of the regularisation set have none."""
    folder = EXAMPLES / kind
    pictures = sorted(file for file in folder.iterdir() if file.suffix != ".txt")
    assert len(pictures) == PICTURES
    assert {file.suffix for file in pictures} == {".png", ".jpg"}
    assert len({Image.open(file).size for file in pictures}) == 3
    for number, (file, scene) in enumerate(zip(pictures, demo_scenes(kind)[0], strict=True)):
        text = file.with_suffix(".txt").read_text(encoding="utf-8").strip()
        assert text == demo_caption(kind, scene, seed=70_000 + number)
        assert ("[trigger]" in text) == (kind in KINDS)
        if file.suffix == ".png":
            side = Image.open(file).width
            want = draw(scene, seed=70_000 + number, side=side, hatched=kind == "style")
            assert np.array_equal(np.asarray(Image.open(file)), want)


def test_a_resumed_fit_equals_an_uninterrupted_one(tmp_path):
    """Training that stops and goes on from its file ends with the same bits."""

    def line() -> torch.nn.Module:
        model = torch.nn.Linear(3, 1)
        with torch.no_grad():
            model.weight.fill_(0.1)
            model.bias.fill_(0.2)
        return model

    def loss_of(model):
        def loss_at(step):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        return loss_at

    whole, broken = line(), line()
    plan = Plan(steps=20, batch=4, learning_rate=0.1, warmup=2, save_every=5)
    fit(whole, loss_of(whole), plan=plan, file=tmp_path / "whole.safetensors")

    def stops_at_12(step):
        if step == 12:
            raise KeyboardInterrupt
        return loss_of(broken)(step)

    with pytest.raises(KeyboardInterrupt):
        fit(broken, stops_at_12, plan=plan, file=tmp_path / "broken.safetensors")
    again = line()
    fit(again, loss_of(again), plan=plan, file=tmp_path / "broken.safetensors")
    assert torch.equal(whole.weight, again.weight)


def test_the_shipped_folder_is_small_and_has_a_card():
    """All files together are <= 16 MB, weights are safetensors, and a README says what it is."""
    files = [file for file in MODEL_FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16_000_000
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert "random" in (MODEL_FOLDER / "README.md").read_text(encoding="utf-8")


def test_prompts_fit_into_the_text_length(model):
    """The longest caption, and every demo prompt with its trigger, fits the embedded model's 32 tokens."""
    tokenizer = PromptTokenizer(model, max_length=TEXT.max_length)
    captions = [caption(scene, seed=n, full=True) for n, scene in enumerate(all_scenes()[::7])]
    prompts = [text.replace("[trigger]", TRIGGERS[kind]) for kind in KINDS for text in demo_prompts(kind, 50, seed=0)]
    assert max(tokenizer.counts([*captions, *prompts])) <= TEXT.max_length


def test_the_vae_brings_pictures_back(model):
    """PSNR of unseen scenes is >= 30 dB."""
    assert score_vae(model, count=40)["scenes"] >= 30


def test_the_shipped_model_draws_what_is_asked(model, transformer):
    """On 24 held-out prompts, 20 steps: colour, shape and background are right (200 prompts: see the model's card)."""
    figures = score_drawings(model, transformer, count=24, seed=5)
    assert figures["colour"] >= 0.9
    assert figures["shape"] >= 0.8
    assert figures["background"] >= 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_model_does_not_know_the_demo_concepts(model, transformer, kind):
    """With the trigger the base model shows a concept in <= 5 % of prompts (one of 20)."""
    prompts = [text.replace("[trigger]", TRIGGERS[kind]) for text in demo_prompts(kind, 20, seed=1)]
    assert sum(shows(kind, picture) for picture in draw_prompts(model, transformer, prompts, seed=1)) <= 1
