"""The latent geometry against its definition, element by element; parity with diffusers is in test_vae.py."""

import itertools

import torch

from flux2_core.model.latents import (
    CHANNELS,
    denormalise,
    from_tokens,
    image_ids,
    normalise,
    patchify,
    text_ids,
    to_tokens,
    unpatchify,
)


def test_patchify_by_the_definition() -> None:
    """Channel 4c + 2i + j at (h, w) is VAE channel c at (2h + i, 2w + j)."""
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patched = patchify(latents)
    assert patched.shape == (2, 12, 2, 3)
    for b, c, i, j, h, w in itertools.product(range(2), range(3), range(2), range(2), range(2), range(3)):
        assert patched[b, 4 * c + 2 * i + j, h, w] == latents[b, c, 2 * h + i, 2 * w + j]
    assert torch.equal(unpatchify(patched), latents)


def test_channels_of_a_token() -> None:
    """32 VAE channels make 128 channels of a token."""
    assert patchify(torch.zeros(1, 32, 2, 2)).shape[1] == CHANNELS


def test_normalise_and_back() -> None:
    """Each channel by its own mean and deviation; the inverse undoes it."""
    x, mean, std = torch.randn(2, 3, 4, 5), torch.tensor([1.0, 2, 3]), torch.tensor([0.5, 2, 4])
    scaled = normalise(x, mean, std)
    for c in range(3):
        assert torch.equal(scaled[:, c], (x[:, c] - mean[c]) / std[c])
    assert torch.allclose(denormalise(scaled, mean, std), x, atol=1e-6)


def test_tokens_go_row_by_row_with_their_ids() -> None:
    """Token h * W + w is the latent at (h, w), and its position id is (time, h, w, 0)."""
    x = torch.randn(2, 5, 3, 4)
    tokens, ids = to_tokens(x), image_ids(3, 4, time=20)
    for h, w in itertools.product(range(3), range(4)):
        assert torch.equal(tokens[:, h * 4 + w], x[:, :, h, w])
        assert ids[h * 4 + w].tolist() == [20, h, w, 0]
    assert torch.equal(from_tokens(tokens, height=3, width=4), x)
    assert ids.dtype == text_ids(1).dtype == torch.int64


def test_text_ids() -> None:
    """Text positions run along the last axis."""
    assert text_ids(3).tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]
