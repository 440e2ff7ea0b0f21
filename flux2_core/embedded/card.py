"""The embedded model's card, `model/README.md`, written by the build from what it measured."""

from __future__ import annotations

from collections.abc import Mapping

from flux2_core.embedded.shapes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES
from flux2_core.embedded.train_model import PICTURES, PLAN, TEXT
from flux2_core.embedded.train_vae import PLAN as VAE_PLAN

CARD = """\
---
license: apache-2.0
pipeline_tag: text-to-image
---
# The embedded model

A small model of FLUX.2-dev's structure that cacheloom trained from nothing on pictures that it drew itself, so that a
LoRA can be trained, and seen to have learned, on two CPU cores in minutes. It knows one coloured shape on a
background, 64 x 64 pixels, and nothing else. No picture of the world and no other model went into it.

- Words: {shapes}; {colours}; {sizes}; {places}; backgrounds {backgrounds}.
  For instance: `a large red cross at the left on a striped background`.
- `tokenizer/`: byte-level BPE with Mistral's control tokens and FLUX.2's chat template, trained on the captions. Each
  of the system message's two lines is one token, so that a prompt takes about 20; use `text.max_length = {length}`.
- `text_encoder/`: `Mistral3ForConditionalGeneration`, 32 layers, **random, not trained**: every token keeps a
  unit-variance embedding, each layer adds a little context to it, and the transformer learned to read that.
- `vae/`: `AutoencoderKLFlux2`, 32 latent channels, trained on scenes in both styles, owls and doodles
  ({vae_steps} steps).
- `transformer/`: `Flux2Transformer2DModel`, 2 double and 4 single blocks, width 160, guidance embedding (any value
  draws alike), trained by flow matching on {pictures} cached latents and captions ({steps} steps of {batch}).
- `scheduler/`: FLUX.2's.

## Measured
| what | value |
|---|---|
| right colour, 200 held-out prompts, 20 steps | {colour:.1%} |
| right shape | {shape:.1%} |
| right background | {background:.1%} |
| VAE, held-out scenes | {psnr scenes:.1f} dB |
| VAE, doodles | {psnr doodles:.1f} dB |
| VAE, the demo subject (which the transformer never saw) | {psnr owls:.1f} dB |
| VAE, the demo style (likewise) | {psnr hatched:.1f} dB |
| seconds of training on two shared CPU cores, VAE / transformer | {seconds vae:.0f} / {seconds transformer:.0f} |

A tenth of all word combinations is held out from training (`shapes.is_held_out`); the judge looks at pixels and is no
learned model (`checker`). Rebuild and measure again: `python -m flux2_core.embedded.build --seed {seed}`.
"""


def card(figures: Mapping[str, float], *, seed: int) -> str:
    """The card's text, from the figures of a build."""
    words = {
        "shapes": ", ".join(SHAPES),
        "colours": ", ".join(COLOURS),
        "sizes": ", ".join(SIZES),
        "places": ", ".join(PLACES),
        "backgrounds": ", ".join(BACKGROUNDS),
    }
    counts = {"length": TEXT.max_length, "vae_steps": VAE_PLAN.steps, "pictures": PICTURES, "seed": seed}
    return CARD.format_map(words | counts | {"steps": PLAN.steps, "batch": PLAN.batch} | dict(figures))
