"""A small model with a filled cache, ready to train on: noise pictures, short captions, fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.embedded.tiny_model import ModelShape, build_model
from stages import cluster
from tests.in_process import fill_cache


def prepare(folder: Path, shape: ModelShape, *, side: int, pictures: int, text_rows: int, **sections: Any) -> Config:
    """Build a model of `shape`, draw pictures of `side` px, cache both; `sections` go into the configuration."""
    photos = folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for place in range(pictures):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(photos / f"p{place}.png")
        (photos / f"p{place}.txt").write_text(f"a photo of a red square, number {place}")
    config = parse(
        {
            "run": "bench",
            "model": {"path": str(build_model(folder / "model", shape=shape))},
            "data": [{"path": str(photos), "resolutions": [side]}],
            "text": {"dtype": "fp32", "max_length": text_rows},
            "latents": {"dtype": "fp32"},
            "validate": {"every": 0},
            "output": {"root": str(folder / "runs"), "cache": str(folder / "cache")},
            **sections,
        }
    )
    with mock.patch.object(cluster, "device", return_value="cpu"):  # asking Ray for a device would start one
        fill_cache(config)
    return config
