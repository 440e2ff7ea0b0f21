"""The sampler against diffusers' own pipeline, from the same noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline

from flux2_core import sampling, transformer
from flux2_core.config import Model
from flux2_core.flow_matching import generator
from flux2_core.latents import to_tokens
from flux2_core.model_folder import resolve
from flux2_core.vae import Vae

CPU = torch.device("cpu")
SIZE = {"height": 32, "width": 48}


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
    settings = {"steps": 4, "guidance": 2.5, **SIZE, **settings}
    return sampling.draw(built, prompts, seeds, device=CPU, **settings)


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
