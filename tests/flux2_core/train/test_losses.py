"""Losses: each against its definition, its limits, and what a mask must do."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from flux2_core.config.objective import Loss, Noise
from flux2_core.model.latents import to_tokens
from flux2_core.noise import Levels
from flux2_core.train import losses
from flux2_core.train.losses import LOSSES, Weights, loss_B, mse_B

HEIGHT, WIDTH = 5, 6  # tokens


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, HEIGHT * WIDTH, 128, generator=rng) for _ in range(2))  # type: ignore[return-value]


def off(prediction: torch.Tensor, target: torch.Tensor, *, sigma: float = 0.5, mask: Any = None, **loss: Any) -> Any:
    sigma_B = torch.full((len(prediction),), sigma)
    return loss_B(Loss(**loss), prediction, target, sigma_B=sigma_B, mask_Bhw=mask, height=HEIGHT)


def test_mse_is_a_mean_per_sample_in_fp32() -> None:
    """One number a sample, computed in fp32 whatever comes in."""
    prediction, target = torch.randn(3, 5, 4).bfloat16(), torch.randn(3, 5, 4)
    expected = [np.mean((prediction[b].float().numpy() - target[b].numpy()) ** 2) for b in range(3)]
    loss = mse_B(prediction, target)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, torch.tensor(expected))


def test_each_against_torch() -> None:
    """The Hubers are torch's doubled, so that small errors count as in `mse`; mae is its l1; pseudo-huber is smooth."""
    prediction, target = pair()
    each = {"reduction": "none"}
    assert torch.allclose(off(prediction, target, kind="mae"), F.l1_loss(prediction, target, **each).mean((1, 2)))  # type: ignore[arg-type]
    for delta in (0.01, 0.5, 3.0):
        huber = 2 * F.huber_loss(prediction, target, delta=delta, **each).mean((1, 2))  # type: ignore[arg-type]
        assert torch.allclose(off(prediction, target, kind="huber", delta=delta), huber)
        smooth = 2 * F.smooth_l1_loss(prediction, target, beta=delta, **each).mean((1, 2))  # type: ignore[arg-type]
        assert torch.allclose(off(prediction, target, kind="smooth-l1", delta=delta), smooth)
        error = (prediction - target).double()
        pseudo = 2 * delta * ((error.square() + delta**2).sqrt() - delta)
        assert torch.allclose(
            off(prediction, target, kind="pseudo-huber", delta=delta).double(), pseudo.mean((1, 2)), rtol=1e-5
        )


def test_limits() -> None:
    """A large delta is mse exactly for Huber's, nearly for its smooth form; a small one is twice delta times mae."""
    prediction, target = pair()
    mse, mae = off(prediction, target), off(prediction, target, kind="mae")
    assert torch.equal(off(prediction, target, kind="huber", delta=100.0), mse)
    assert torch.allclose(off(prediction, target, kind="pseudo-huber", delta=1e4), mse)
    assert torch.allclose(off(prediction, target, kind="smooth-l1", delta=1e-6), 2 * mae)
    assert torch.allclose(off(prediction, target, kind="pseudo-huber", delta=1e-6) / 2e-6, mae, rtol=1e-4)


def test_deltas_follow_the_noise() -> None:
    """`exponential` and `snr` begin at 1 without noise and end at delta; between them they are kohya's formulas."""
    prediction, target = pair()
    for schedule, middle in (("exponential", 0.1**0.5), ("snr", 0.9 / (1 + 0.5 / 0.5) ** 2 + 0.1)):
        for sigma, delta in ((0.0, 1.0), (0.5, middle), (1.0, 0.1)):
            scheduled = off(prediction, target, kind="huber", delta_schedule=schedule, sigma=sigma)
            assert torch.allclose(scheduled, off(prediction, target, kind="huber", delta=delta))


@pytest.mark.parametrize("kind", LOSSES)
def test_masks(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """All ones change nothing, a share of 0 has no gradient and no part in the mean, nothing left is a loss of 0."""
    prediction, target = pair()
    monkeypatch.setattr(losses, "HALVINGS", 1)  # a band of a wavelet is then of one token
    given: dict[str, Any] = {"kind": kind}
    whole = off(prediction, target, **given)
    ones = torch.ones(3, HEIGHT, WIDTH)
    assert torch.allclose(off(prediction, target, **given, mask=ones), whole)
    half = ones.clone()
    half[:, :, 3:] = 0
    prediction.requires_grad_()
    loss = off(prediction, target, **given, mask=half)
    loss.sum().backward()
    gradient = prediction.grad
    assert gradient is not None
    per_token = gradient.view(3, HEIGHT, WIDTH, 128).abs().sum(3)
    assert bool((per_token[:, :, :3] > 0).all())
    assert not per_token[:, :, 3:].any()
    kept = torch.cat([part.view(3, HEIGHT, WIDTH, 128)[:, :, :3] for part in (prediction, target)]).detach()
    alone = loss_B(Loss(**given), *kept.flatten(1, 2).chunk(2), sigma_B=torch.full((3,), 0.5), height=HEIGHT)
    assert torch.allclose(loss.detach(), alone)
    assert not off(prediction, target, kind=kind, mask=0 * ones).any()


def test_the_wavelet_loss_is_no_mse() -> None:
    """An error that is even over the picture counts by the share of its band, one that alternates likewise: with as
    large a mse, even errors count 6.4 and alternating ones 0.4 times as much as mse (three halvings, ten bands)."""
    even = torch.ones(1, 32, 16, 16)
    checks = even * (1 - 2 * ((torch.arange(16)[:, None] + torch.arange(16)) % 2))
    for picture, factor in ((even, 4**3 / 10), (checks, 4 / 10)):
        tokens = to_tokens(F.pixel_unshuffle(picture, 2))
        found = loss_B(Loss(kind="wavelet"), tokens, 0 * tokens, sigma_B=torch.ones(1), height=8)
        assert float(mse_B(tokens, 0 * tokens)) == pytest.approx(1)
        assert float(found) == pytest.approx(factor)


@pytest.mark.parametrize("bands", [1, 2, 5])
@pytest.mark.parametrize("width", [1, 7, 8])
def test_the_wavelet_loss_takes_every_size(monkeypatch: pytest.MonkeyPatch, bands: int, width: int) -> None:
    """Odd sides and small pictures give a finite loss whose gradient reaches every value."""
    prediction = torch.randn(2, 3 * width, 128, requires_grad=True)
    target = torch.randn(2, 3 * width, 128)
    monkeypatch.setattr(losses, "HALVINGS", bands)
    loss = loss_B(Loss(kind="wavelet"), prediction, target, sigma_B=torch.ones(2), height=3)
    loss.sum().backward()
    assert prediction.grad is not None
    assert bool(loss.isfinite().all())
    assert bool((prediction.grad != 0).all())


def test_min_snr_is_the_pictures_error_up_to_gamma() -> None:
    """min(SNR, gamma) on the clean picture's error, which is sigma times the velocity's; diffusers' two as they are."""
    sigma = np.linspace(0.05, 0.95, 19)
    snr = ((1 - sigma) / sigma) ** 2
    published = {
        "min-snr": np.minimum(snr, 5) * sigma**2,
        "sigma-sqrt": sigma**-2.0,
        "cosmap": 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2)),
        "none": np.ones(19),
    }
    for name, wanted in published.items():
        weights = Weights(Loss(weighting=name), Levels(Noise()))  # type: ignore[arg-type]
        assert [weights.weight(float(level), tokens=64) for level in sigma] == pytest.approx(wanted.tolist())
