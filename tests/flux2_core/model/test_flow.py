"""Flow matching: identities, and the sampler's noise levels against diffusers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from flux2_core.model.flow import add_noise, empirical_mu, predict, sampling_sigmas, velocity
from flux2_core.model.seeded import generator


def test_identities() -> None:
    """noisy + (1 - s) v = noise, noisy - s v = clean; sigma 0 is clean and 1 is noise."""
    clean, noise = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    sigma = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    noisy, v, s = add_noise(clean, noise, sigma), velocity(clean, noise), sigma.view(-1, 1, 1)
    assert torch.allclose(noisy + (1 - s) * v, noise)
    assert torch.allclose(noisy - s * v, clean)
    assert torch.equal(noisy[0], clean[0])
    assert torch.equal(noisy[2], noise[2])


def test_draws_depend_on_their_key_alone() -> None:
    """The same (seed, key) gives the same numbers; another seed or key others; parts do not run together."""
    keys = [(1, "a", 1, 2), (2, "a", 1, 2), (1, "b", 1, 2), (1, "a", 1, 3), (1, "a", 12), (1, "a", 1, 20)]
    first = [torch.rand((), generator=generator(*key)).item() for key in keys]
    assert first == [torch.rand((), generator=generator(*key)).item() for key in keys]
    assert len(set(first)) == len(keys)


def test_mu_equals_diffusers() -> None:
    """The empirical mu of every size and step count equals the pipeline's."""
    for tokens in (1, 16, 256, 1024, 4096, 4300, 4301, 8192, 16384):
        for steps in (1, 4, 10, 25, 28, 50, 200):
            assert empirical_mu(tokens, steps) == pytest.approx(
                compute_empirical_mu(image_seq_len=tokens, num_steps=steps), abs=1e-12
            )
    assert empirical_mu(4096, 50) == pytest.approx(2.02, abs=0.01)


@pytest.mark.parametrize(("tokens", "steps"), [(16, 1), (16, 2), (4096, 50), (4096, 28), (9216, 25), (256, 4)])
def test_sampling_sigmas_equal_the_scheduler(tiny_model: Path, tokens: int, steps: int) -> None:
    """Noise levels equal those of the model's own scheduler, set up as the pipeline does."""
    config = json.loads((tiny_model / "scheduler" / "scheduler_config.json").read_text())
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    mu = compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = sampling_sigmas(tokens, steps)
    assert ours.shape == (steps + 1,)
    assert (ours[0], ours[-1]) == (1, 0)
    assert bool((ours.diff() < 0).all())
    assert (ours - scheduler.sigmas).abs().max() <= 1e-6


@pytest.mark.parametrize("guidance", [None, 3.5])
def test_predict_hands_everything_on(guidance: float | None) -> None:
    """The model gets fp32 tokens, sigma itself as time, and guidance per sample or none."""
    seen: dict[str, object] = {}

    def model(**given: object) -> tuple[object]:
        seen.update(given)
        return (given["hidden_states"],)

    noisy, prompt, sigma, ids = (
        torch.randn(2, 4, 128),
        torch.randn(2, 3, 5),
        torch.tensor([0.1, 0.9]),
        torch.zeros(4, 4),
    )
    assert predict(model, noisy, prompt, sigma, img_ids=ids, txt_ids=ids[:3], guidance=guidance) is noisy
    assert seen["timestep"] is sigma
    assert seen["encoder_hidden_states"] is prompt
    guide = seen["guidance"]
    assert guide is None if guidance is None else torch.equal(guide, torch.tensor([3.5, 3.5]))  # type: ignore[arg-type]
