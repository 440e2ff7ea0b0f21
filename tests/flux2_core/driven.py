"""A configuration driven through what a person runs: `plan`, `cache` (in this process), and `show` for its samples."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.model.text_encoder import TextEncoder
from flux2_core.model.vae import Vae
from flux2_core.plan import describe, survey
from flux2_core.train.show import tensors_of
from tests.in_process import PARTS, fill_cache


@dataclass(frozen=True)
class Driven:
    """What `plan` said, and the cache from which `show` takes its tensors."""

    config: Config
    model: ModelFolder
    plan: dict[str, Any]
    samples: pa.Table
    _latents: dict[Any, torch.Tensor] = field(default_factory=dict)  # encoded already, for comparison
    _rows: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def reasons(self) -> dict[str, str]:
        """Why each path is quarantined."""
        return {row["path"]: row["reason"] for row in self.plan["samples"]["quarantined"]}

    @property
    def warnings(self) -> dict[str, int]:
        """Of how many paths `plan` warns, by what it says of them."""
        lines = [
            re.fullmatch(r"(\d+) pictures: (.*) \(first: .*\)|(/.*?): (.*)", line) for line in self.plan["warnings"]
        ]
        return {found[2] or found[4]: int(found[1] or 1) for found in lines if found}

    def ids(self, dataset: int) -> list[str]:
        """The samples of one data set."""
        return self.samples.filter(pc.equal(self.samples.column("dataset"), dataset)).column("id").to_pylist()

    def show(self, sample_id: str) -> dict[str, torch.Tensor]:
        """The tensors that training sees for a sample."""
        return tensors_of(self.config, self.model, sample_id)

    def encoded(self, pixels_HWC: np.ndarray) -> torch.Tensor:
        """The VAE's own latents of whole pixels."""
        pixels_HWC = pixels_HWC.astype(np.uint8)
        if (known := (pixels_HWC.shape, pixels_HWC.tobytes())) not in self._latents:
            self._latents[known] = self._vae.encode(torch.from_numpy(pixels_HWC)[None])[0]
        return self._latents[known]

    def says(self, shown: dict[str, torch.Tensor], text: str, name: str = "prompt_embeds") -> bool:
        """Whether what is shown ends with the encoder's own rows of a text, and begins with pads."""
        if text not in self._rows:
            (self._rows[text],) = self._encoder.encode([text])
        rows_LD = self._rows[text]
        pads = len(shown[name]) - len(rows_LD)
        return torch.allclose(shown[name][pads:], rows_LD, atol=1e-4) and not shown[name][:pads].diff(dim=0).any()

    @cached_property
    def _vae(self) -> Vae:
        return Vae(self.model)

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.model, self.config.text)


def drive(model: Path, folder: Path, *sets: dict[str, Any], **sections: Any) -> Driven:
    """Plan and cache data sets with a small model, whatever share of them is quarantined."""
    config = parse({
        "model": {"path": str(model)}, "data": list(sets), "max_quarantined": 1.0,
        "validate": {"every": 0, "held_out": 0.0}, "text": {"dtype": "fp32", "max_length": 512},
        "latents": {"dtype": "fp32"} | sections.get("latents", {}),
        "output": {"root": str(folder / "runs"), "cache": str(folder / "cache")},
    })  # fmt: skip
    found = resolve(config.model, parts=PARTS)
    planned = survey.survey(config, found)
    plan = describe.describe(config, found, planned)
    fill_cache(config)
    return Driven(config, found, plan, planned.samples)
