"""The fingerprints of both tables: what must miss and what must hit (reliability.md, R6)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2_core import recipes
from flux2_core.config import Config, Model
from flux2_core.errors import SetupError
from flux2_core.model_folder import ModelFolder, resolve

Make = Callable[..., Config]
PARTS = ("text_encoder", "tokenizer", "vae", "transformer")


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model's folder, to be spoilt."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copied"))


def prints(config: Config, path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    model = resolve(Model(path=str(path)), parts=PARTS)
    return recipes.text_fingerprint(model, config), recipes.latents_fingerprint(model, config)


def change(file: Path, name: str) -> None:
    tensors = load_file(file)
    (key,) = [key for key in tensors if key.endswith(name)]
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "sections",
    [
        {"text": {"dtype": "bf16"}},
        {"text": {"max_length": 512}},
        {"text": {"pads": "computed"}},
        {"text": {"pads": "stored"}},
        {"text": {"stored": "projected"}},
    ],
)
def test_text_settings_that_must_miss(make_config: Make, tiny_model: Path, sections: dict[str, Any]) -> None:
    """Precision, length, padding and stored form make other text rows and the same latents."""
    plain, other = prints(make_config(), tiny_model), prints(make_config(**sections), tiny_model)
    assert plain[0] != other[0]
    assert plain[1] == other[1]


def test_latents_dtype_must_miss(make_config: Make, tiny_model: Path) -> None:
    """Precision of latents makes other latents and the same text rows."""
    plain, other = prints(make_config(), tiny_model), prints(make_config(latents={"dtype": "fp16"}), tiny_model)
    assert plain[0] == other[0]
    assert plain[1] != other[1]


def test_the_image_recipe_must_miss(make_config: Make, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever changes of how pictures are read (filter, colour policy, Pillow's version, ...) makes other latents."""
    plain = prints(make_config(), tiny_model)[1]
    assert len(recipes.IMAGE_RECIPE) >= 6
    for name in recipes.IMAGE_RECIPE:
        monkeypatch.setattr(recipes, "IMAGE_RECIPE", {**recipes.IMAGE_RECIPE, name: "another"})
        assert prints(make_config(), tiny_model)[1] != plain, name


@pytest.mark.parametrize(("file", "name", "which"), [
    ("vae/diffusion_pytorch_model.safetensors", "bn.running_mean", 1),
    ("vae/diffusion_pytorch_model.safetensors", "encoder.conv_in.weight", 1),
    ("text_encoder/model.safetensors", "layers.3.mlp.up_proj.weight", 0),
])  # fmt: skip
def test_weights_must_miss(make_config: Make, copied: Path, file: str, name: str, which: int) -> None:
    """One changed number in the encoder, the VAE or its statistics changes that table's fingerprint only."""
    before = prints(make_config(), copied)
    change(copied / file, name)
    after = prints(make_config(), copied)
    assert before[which] != after[which]
    assert before[1 - which] == after[1 - which]


def test_tokenizer_and_template_must_miss(make_config: Make, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tokenizer file, chat template, system message, tap or attention backend makes other text rows."""
    seen = [prints(make_config(), copied)[0]]
    (copied / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    seen.append(prints(make_config(), copied)[0])
    monkeypatch.setattr(recipes, "ATTENTION", "eager")
    seen.append(prints(make_config(), copied)[0])
    (copied / "text_encoder" / "config.json").open("a").write(" ")
    seen.append(prints(make_config(), copied)[0])
    assert all(one != other for place, one in enumerate(seen) for other in seen[:place])


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
    before = recipes.text_settings(model, config)
    shutil.rmtree(copied / "text_encoder")
    change(copied / "transformer" / "diffusion_pytorch_model.safetensors", "context_embedder.weight")
    assert recipes.text_settings(model, config) != before


def test_a_transformer_without_projection_is_named(make_config: Make, copied: Path) -> None:
    """Files that lack the projection are refused by name."""
    save_file({"a": torch.zeros(1)}, copied / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(SetupError, match=r"lack context_embedder\.weight"):
        prints(make_config(text={"stored": "projected"}), copied)


def test_what_must_hit(make_config: Make, tiny_model: Path, copied: Path, tmp_path: Path) -> None:
    """Another folder, time, run, worker count, micro batch, seed, data, output or adapter: the same fingerprints."""
    for file in copied.rglob("*.safetensors"):
        file.touch()
    other = make_config(
        run="other", data=[{"path": "elsewhere", "resolutions": [1024, 512], "trigger": "x", "repeats": 3}],
        cluster={"workers": 2, "micro_batch": 1, "encoders": 2}, lora={"rank": 8, "targets": "tiny"},
        train={"seed": 7, "steps": 9, "recompute": "full"}, validate={"prompts": ["x y"], "every": 3},
        output={"root": "x", "cache": "y"},
    )  # fmt: skip
    assert prints(make_config(), tiny_model) == prints(other, copied)


def test_settings_are_part_of_fingerprints(make_config: Make, tiny_model: Path) -> None:
    """What training compares is a part of what the tables were made under, and everything is JSON."""
    config = make_config()
    model: ModelFolder = resolve(Model(path=str(tiny_model)), parts=PARTS)
    text, latents = prints(config, tiny_model)
    assert recipes.text_settings(model, config).items() <= text.items()
    assert recipes.latents_settings(config).items() <= latents.items()
    assert json.loads(json.dumps([text, latents])) == [text, latents]
    assert str(tiny_model) not in json.dumps([text, latents])
