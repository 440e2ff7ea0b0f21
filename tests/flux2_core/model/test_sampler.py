"""The sampler against diffusers' own pipeline, from the same noise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline

from flux2_core.config.sections import Model, Validate
from flux2_core.embedded.tiny_model import build_klein_model
from flux2_core.errors import UsageError
from flux2_core.model import sampler, transformer
from flux2_core.model.folder import resolve
from flux2_core.model.latents import denormalise, to_tokens, unpatchify
from flux2_core.model.seeded import generator
from flux2_core.model.vae import Vae

CPU = torch.device("cpu")
SIZE = {"height": 32, "width": 48}  # as the pipeline is told


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return resolve(Model(path=str(tiny_model)), parts=("transformer", "vae"))


@pytest.fixture(scope="module")
def built(model: Any) -> Any:
    made = transformer.build(model, dtype=torch.float32)
    transformer.load_weights(made, model, device=CPU)
    return made.eval()


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randn(2, 24, 96, generator=torch.Generator().manual_seed(5))


def draw(built: Any, prompts: torch.Tensor, seeds: list[int], **settings: Any) -> torch.Tensor:
    settings = {"steps": 4, "guidance": 2.5, "size": tuple(SIZE.values()), **settings}
    return sampler.draw(built, prompts, seeds, **settings)


@pytest.mark.parametrize("steps", [1, 4])
def test_equals_the_pipeline(tiny_model: Path, model: Any, built: Any, prompts: torch.Tensor, steps: int) -> None:
    """Latents equal `Flux2Pipeline.__call__` within 1e-5 from the same noise, and the pictures within one level."""
    pipeline = Flux2Pipeline.from_pretrained(tiny_model, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(128, 2, 3, generator=generator(9, "preview"))[None]
    given = {"prompt_embeds": prompts[:1], "num_inference_steps": steps, "guidance_scale": 2.5, **SIZE}
    expected = pipeline(latents=noise.clone(), output_type="latent", **given).images
    pictures = pipeline(latents=noise.clone(), output_type="np", **given).images
    ours = draw(built, prompts[:1], [9], steps=steps)
    vae = Vae(model)
    assert (to_tokens(ours) - expected).abs().max() <= 1e-5
    assert np.abs(vae.decode(ours).numpy() - pictures * 255).max() <= 0.51
    assert (ours - noise).abs().max() > 0.1, "the model did nothing, so nothing was shown"


def test_a_picture_depends_on_its_own_seed(built: Any, prompts: torch.Tensor) -> None:
    """A picture is the same alone and beside others; another seed or prompt is another picture."""
    both = draw(built, prompts, [1, 2])
    assert (draw(built, prompts[1:], [2]) - both[1:]).abs().max() <= 1e-5
    assert (draw(built, prompts[1:], [3]) - both[1:]).abs().max() > 0.1
    assert (draw(built, prompts[:1], [2]) - both[1:]).abs().max() > 1e-4
    assert torch.equal(both, draw(built, prompts, [1, 2]))


def test_shape_and_guidance(built: Any, prompts: torch.Tensor) -> None:
    """Latents come as (B, 128, H/16, W/16) in fp32 without a gradient, and the model listens to guidance."""
    drawn = draw(built, prompts, [1, 2])
    assert (drawn.shape, drawn.dtype, drawn.requires_grad) == ((2, 128, 2, 3), torch.float32, False)
    assert not torch.equal(drawn, draw(built, prompts, [1, 2], guidance=1.0))


def test_negative_prompt_equals_the_pipeline(tmp_path: Path, prompts: torch.Tensor) -> None:
    """With a negative prompt klein's latents equal `Flux2KleinPipeline.__call__`, two passes a step, within 1e-5."""
    folder = build_klein_model(tmp_path)
    klein = resolve(Model(path=str(folder)), parts=("transformer", "vae"))
    made = transformer.build(klein, dtype=torch.float32)
    transformer.load_weights(made, klein, device=CPU)
    pipeline = Flux2KleinPipeline.from_pretrained(folder, tokenizer=None, text_encoder=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(128, 2, 3, generator=generator(9, "preview"))[None]
    given = {"prompt_embeds": prompts[:1], "negative_prompt_embeds": prompts[1:], "num_inference_steps": 3, **SIZE}
    expected = pipeline(latents=noise.clone(), output_type="latent", guidance_scale=4.0, **given).images
    ours = draw(made.eval(), prompts[:1], [9], steps=3, guidance=4.0, negative_1LD=prompts[1:])
    vae = Vae(klein)
    assert (unpatchify(denormalise(ours, vae.mean_c, vae.std_c)) - expected).abs().max() <= 1e-5
    assert (ours - draw(made, prompts[:1], [9], steps=3, guidance=None)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "settings", "wanted"),
    [
        ("dev", {"guidance": 2.5}, 2.5),
        ("dev", {}, 1.0),
        ("dev", {"negative": "ugly"}, "dev embeds its guidance and takes no negative prompt; remove it"),
        ("klein", {}, None),
        ("klein", {"negative": "", "guidance": 4.0}, 4.0),
        ("klein", {"negative": "ugly"}, "no guidance embedding; set both"),
        ("klein", {"guidance": 4.0}, "no guidance embedding; set both"),
        ("distilled klein", {}, None),
        ("distilled klein", {"negative": "", "guidance": 4.0}, "draws without guidance; remove"),
        ("distilled klein", {"guidance": 4.0}, "draws without guidance; remove"),
    ],
)
def test_guidance_is_never_ignored(
    tmp_path: Path, kind: str, settings: dict[str, Any], wanted: float | str | None
) -> None:
    """Settings that a model would not listen to are refused; dev is told its guidance, klein scales by it."""
    pipeline = "Flux2Pipeline" if kind == "dev" else "Flux2KleinPipeline"
    index = {"_class_name": pipeline, **({"is_distilled": True} if "distilled" in kind else {})}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"guidance_embeds": kind == "dev"}))
    model = resolve(Model(path=str(tmp_path)), parts=())
    if isinstance(wanted, str):
        with pytest.raises(UsageError, match=wanted):
            sampler.guidance_of(Validate(**settings), model)
    else:
        assert sampler.guidance_of(Validate(**settings), model) == wanted
