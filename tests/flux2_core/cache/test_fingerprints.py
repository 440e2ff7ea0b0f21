"""The fingerprints of both tables: what must miss and what must hit (reliability.md, R6)."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux2_core.cache import fingerprints
from flux2_core.cache.keys import text_key
from flux2_core.config.sections import Config, Model
from flux2_core.data import texts
from flux2_core.errors import SetupError
from flux2_core.model.families import DEV, Family
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.plan import survey

Make = Callable[..., Config]
PARTS = ("text_encoder", "tokenizer", "vae", "transformer")


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model's folder, to be spoilt."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copied"))


def prints(config: Config, path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    model = resolve(Model(path=str(path)), parts=PARTS)
    return fingerprints.text_fingerprint(model, config), fingerprints.latents_fingerprint(model, config)


def change(file: Path, name: str) -> None:
    tensors = load_file(file)
    (key,) = [key for key in tensors if key.endswith(name)]
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


@dataclass
class Place:
    """A model and pictures of one's own, to be changed."""

    make_config: Make
    patch: pytest.MonkeyPatch
    model: Path
    photos: Path
    family: Family = DEV

    def keys(self, data: dict[str, Any] | None = None, **sections: Any) -> dict[str, set[str]]:
        """Keys of all rows that a configuration over them needs; no model is loaded."""
        named = {"path": str(self.photos), "trigger": "sks", "resolutions": [64], **(data or {})}
        config = self.make_config(**{"data": [named], "model": {"path": str(self.model)}, **sections})
        model = replace(resolve(config.model, parts=PARTS), family=self.family)
        planned = survey.survey(config, model)
        fingerprint = fingerprints.text_fingerprint(model, config)
        return {
            "text": {text_key(fingerprint, text) for text in texts.texts(config, planned.samples)},
            "latents": set(planned.samples.column("latent_key").to_pylist()),
        }

    def redraw(self) -> None:
        """One pixel of one picture changes."""
        picture = Image.open(self.photos / "p1.png")
        picture.putpixel((0, 0), (1, 2, 3))
        picture.save(self.photos / "p1.png")

    def recipe(self, part: str) -> None:
        """Pictures are read in another way."""
        real = fingerprints.recipe
        self.patch.setattr(fingerprints, "recipe", lambda latents: real(latents) | {part: "another"})

    def template(self) -> None:
        """The chat template renders prompts in another way."""
        with (self.model / "tokenizer" / "chat_template.jinja").open("a") as file:
            file.write(" ")

    def taught(self, **changed: Any) -> None:
        """The family has other taps or another system message."""
        self.family = replace(self.family, **changed)


@pytest.fixture
def place(make_config: Make, copied: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(make_config, monkeypatch, copied, Path(shutil.copytree(photos, tmp_path / "photos")))


VAE, ENCODER = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
Change = Callable[[Place], None] | dict[str, Any]
MISS: dict[str, tuple[Change, set[str]]] = {
    "source bytes": (Place.redraw, {"latents"}),
    "crop": ({"data": {"crop": "corner"}}, {"latents"}),
    "bucket": ({"data": {"crop_aspect": "square"}}, {"latents"}),
    "resize filter": (lambda place: place.recipe("resize"), {"latents"}),
    "colour policy": (lambda place: place.recipe("colour"), {"latents"}),
    "VAE weights": (lambda place: change(place.model / VAE, "encoder.conv_in.weight"), {"latents"}),
    "BN statistics": (lambda place: change(place.model / VAE, "bn.running_mean"), {"latents"}),
    "dtype": ({"text": {"dtype": "bf16"}, "latents": {"dtype": "fp16"}}, {"text", "latents"}),
    "encoder weights": (lambda place: change(place.model / ENCODER, "layers.3.mlp.up_proj.weight"), {"text"}),
    "quantisation": ({"text": {"quantize": "int8"}}, {"text"}),
    "layers": (lambda place: place.taught(taps=(9, 18, 27)), {"text"}),
    "template": (Place.template, {"text"}),
    "max length": ({"text": {"max_length": 128}}, {"text"}),
    "attention backend": (lambda place: place.patch.setattr(fingerprints, "ATTENTION", "eager"), {"text"}),
}
ALSO_MISS: dict[str, tuple[Change, set[str]]] = {  # beyond the 14 that are counted
    "system message": (lambda place: place.taught(system_message="You are a poet."), {"text"}),
    "background": ({"latents": {"background": "#000000"}}, {"latents"}),
    "pads computed": ({"text": {"pads": "computed"}}, {"text"}),
    "pads stored": ({"text": {"pads": "stored"}}, {"text"}),
    "projected": ({"text": {"stored": "projected"}}, {"text"}),
    "8-bit rows": ({"text": {"stored": "projected", "int8_rows": True}}, {"text"}),
    "flip": ({"data": {"flip": True}}, {"latents"}),
}


@pytest.mark.parametrize("name", [*MISS, *ALSO_MISS])
def test_what_must_miss(place: Place, name: str) -> None:
    """R6: what changes the bytes changes the keys, of the tables that it concerns and of no other."""
    changed, concerned = (MISS | ALSO_MISS)[name]
    before = place.keys()
    if callable(changed):
        changed(place)
    after = place.keys(**(changed if isinstance(changed, dict) else {}))
    assert {kind for kind in before if before[kind] != after[kind]} == concerned
    if name == "source bytes":
        assert len(before["latents"] - after["latents"]) == 1, "only that picture's row"
    elif name not in ("crop", "bucket", "flip"):  # which leave some pictures as they are
        assert not any(before[kind] & after[kind] for kind in concerned)


def _elsewhere(place: Place) -> None:
    place.photos = place.photos.rename(place.photos.with_name("elsewhere"))
    place.model = place.model.rename(place.model.with_name("moved"))


def _touched(place: Place) -> None:
    for file in (*place.photos.iterdir(), *place.model.rglob("*.safetensors")):
        os.utime(file, (1, 1))


def _renamed(place: Place) -> None:
    for file in list(place.photos.glob("p[01].*")):
        file.rename(file.with_stem(f"z{file.stem}"))


def _one_more(place: Place) -> None:
    Image.new("RGB", (64, 64), "teal").save(place.photos / "new.png")
    (place.photos / "new.txt").write_text("something new")


HIT: dict[str, Change] = {
    "path": _elsewhere,
    "mtime": _touched,
    "order": _renamed,
    "worker count": {"cluster": {"workers": 2, "encoders": 3}},
    "other rows": _one_more,
    "run name": {"run": "other"},
    "training": {"train": {"seed": 7, "steps": 9, "learning_rate": 1.0, "batch_size": 1}, "lora": {"rank": 8}},
    "cluster": {"cluster": {"strategy": "fsdp", "gpu_memory": 24.0, "micro_batch": 1, "retries": 0}},
    "output root": {"output": {"root": "elsewhere", "keep": 9}},
    "prompts": {"validate": {"prompts": ["a b", "[trigger] c"], "every": 3}},
}


@pytest.mark.parametrize("name", HIT)
def test_what_must_hit(place: Place, name: str) -> None:
    """R6: every row of before is found again; only new pictures and new texts add to them."""
    changed, before = HIT[name], place.keys()
    if callable(changed):
        changed(place)
    after = place.keys(**(changed if isinstance(changed, dict) else {}))
    assert all(before[kind] <= after[kind] for kind in before)
    more = {"other rows": (1, 1), "prompts": (2, 0)}.get(name, (0, 0))
    assert (len(after["text"] - before["text"]), len(after["latents"] - before["latents"])) == more


def test_the_cases_are_all_there() -> None:
    """R6 counts 14 changes that must miss and 10 that must hit."""
    assert (len(MISS), len(HIT)) == (14, 10)


def test_the_projection_counts_only_where_it_is_used(make_config: Make, copied: Path) -> None:
    """`context_embedder` is part of projected rows and of no others; the rest of the transformer never is."""
    raw, projected = make_config(), make_config(text={"stored": "projected"})
    file = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    before = prints(raw, copied), prints(projected, copied)
    change(file, "proj_out.weight")
    assert (prints(raw, copied), prints(projected, copied)) == before
    change(file, "context_embedder.weight")
    assert prints(raw, copied) == before[0]
    assert prints(projected, copied)[0] != before[1][0]


def test_training_sees_another_projection(make_config: Make, copied: Path) -> None:
    """The projection is among the settings that training compares without opening an encoder file."""
    config = make_config(text={"stored": "projected"})
    model = resolve(Model(path=str(copied)), parts=("transformer",))
    before = fingerprints.text_settings(model, config)
    shutil.rmtree(copied / "text_encoder")
    change(copied / "transformer" / "diffusion_pytorch_model.safetensors", "context_embedder.weight")
    assert fingerprints.text_settings(model, config) != before


def test_a_transformer_without_projection_is_named(make_config: Make, copied: Path) -> None:
    """Files that lack the projection are refused by name."""
    save_file({"a": torch.zeros(1)}, copied / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(SetupError, match=r"lack context_embedder\.weight"):
        prints(make_config(text={"stored": "projected"}), copied)


def test_settings_are_part_of_fingerprints(make_config: Make, tiny_model: Path) -> None:
    """What training compares is a part of what the tables were made under, and everything is JSON."""
    config = make_config()
    model: ModelFolder = resolve(Model(path=str(tiny_model)), parts=PARTS)
    text, latents = prints(config, tiny_model)
    settings = {name: value for name, value in fingerprints.text_settings(model, config).items() if value is not None}
    assert settings.items() <= text.items()
    assert None not in text.values()
    assert fingerprints.latents_settings(config).items() <= latents.items()
    assert json.loads(json.dumps([text, latents])) == [text, latents]
    assert str(tiny_model) not in json.dumps([text, latents])


def test_a_quantised_fingerprint_names_its_library(make_config: Make, tiny_model: Path) -> None:
    """Rows of a quantised encoder depend on quanto's version too; training compares the kind alone."""
    plain, small = (prints(make_config(text={"quantize": kind}), tiny_model)[0] for kind in ("none", "fp8"))
    assert small.keys() - plain.keys() == {"quantize", "quanto_version"}
