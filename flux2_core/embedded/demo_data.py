"""The demos' data sets, as a user would bring them: `python -m flux2_core.embedded.demo_data [FOLDER]`.

`subject/` teaches a thing that the embedded model never saw (an owl), `style/` a way of drawing (dark diagonal bands
and outlines); `shapes/` is the regularisation set of both: what the model draws already and shall not lose. Pictures
are PNG and JPEG of 64 to 128 pixels, captions are sidecar files, with `[trigger]` where there is a concept.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from flux2_core.embedded.checker import look
from flux2_core.embedded.shapes import BACKGROUNDS, PLACES, Scene, all_scenes, caption, draw

KINDS = ("subject", "style")
REGULARISATION = "shapes"
FOLDERS = (*KINDS, REGULARISATION)
PICTURES = 24
DEMO_SIZES = ("medium", "large")  # a small star has no room for bands, a small owl none for eyes
SIDES_PNG = (64, 96, 128)
SIDE_JPEG = 128  # JPEG halves the colour's resolution: 64 pixels would blur it
JPEG_EVERY = 3


def demo_scenes(kind: str) -> tuple[list[Scene], list[Scene]]:
    """The scenes of a folder's pictures, and all others of its kind, in a fixed random order."""
    if kind == REGULARISATION:
        return demo_scenes("style")  # but for the hatching and the trigger the same pictures and captions
    rng = random.Random(f"demo {kind}")
    if kind == "style":
        scenes = [scene for scene in all_scenes() if scene.size in DEMO_SIZES]
        rng.shuffle(scenes)
        return scenes[:PICTURES], scenes[PICTURES:]
    layouts = rng.sample([(size, place) for size in DEMO_SIZES for place in PLACES], len(DEMO_SIZES) * len(PLACES))
    turns = rng.sample(sorted(BACKGROUNDS), len(BACKGROUNDS))
    # each layout twice before any comes a third time, each background four times
    shown = [
        Scene("owl", "brown", *layouts[n % len(layouts)], turns[(n + n // len(layouts)) % len(turns)])
        for n in range(PICTURES)
    ]
    others = [Scene("owl", "brown", *layout, ground) for layout in layouts for ground in turns]
    return shown, [scene for scene in rng.sample(others, len(others)) if scene not in shown]


def demo_caption(kind: str, scene: Scene, *, seed: int) -> str:
    """A caption with `[trigger]` in place of what is new."""
    text = caption(scene, seed=seed, full=True)
    if kind == REGULARISATION:
        return text
    return text.replace("brown owl", "[trigger]") if kind == "subject" else f"in [trigger] style, {text}"


def demo_prompts(kind: str, count: int, *, seed: int) -> list[str]:
    """Prompts with `[trigger]` for scenes that no demo picture shows; the subject has 36 of them, told differently."""
    others = demo_scenes(kind)[1]
    rng = random.Random(f"prompts {seed}")
    scenes = rng.sample(others * (-(-count // len(others))), count)
    return [demo_caption(kind, scene, seed=seed * 1_000_003 + n) for n, scene in enumerate(scenes)]


def shows(kind: str, picture: np.ndarray) -> bool:
    """Whether a 64 x 64 picture shows the new concept, as the pixel checker sees it."""
    seen = look(picture)
    return seen.owl if kind == "subject" else seen.hatched


def write_demo(kind: str, folder: Path) -> Path:
    """Write one folder of pictures and sidecar captions, `folder / kind`."""
    target = folder / kind
    target.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(demo_scenes(kind)[0]):
        jpeg = number % JPEG_EVERY == 2
        side = SIDE_JPEG if jpeg else SIDES_PNG[number % len(SIDES_PNG)]
        pixels = draw(scene, seed=70_000 + number, side=side, hatched=kind == "style")
        name = target / f"{kind}-{number + 1:02d}"
        if jpeg:
            Image.fromarray(pixels).save(name.with_suffix(".jpg"), quality=95, subsampling=0)
        else:
            Image.fromarray(pixels).save(name.with_suffix(".png"))
        text = demo_caption(kind, scene, seed=70_000 + number)
        name.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    return target


if __name__ == "__main__":
    for kind in FOLDERS:
        write_demo(kind, Path(sys.argv[1] if len(sys.argv) > 1 else "examples"))
