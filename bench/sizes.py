"""Models of which only the sizes exist: FLUX.2-dev's own, and toy ones that show that a benchmark works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flux2_core.model import families
from flux2_core.model.folder import ModelFolder
from flux2_core.model.latents import CHANNELS

DEV = {
    "patch_size": 1, "in_channels": CHANNELS, "out_channels": None, "num_layers": 8, "num_single_layers": 48,
    "attention_head_dim": 128, "num_attention_heads": 48, "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256, "mlp_ratio": 3.0, "axes_dims_rope": (32, 32, 32, 32), "rope_theta": 2000,
    "eps": 1e-6, "guidance_embeds": True,
}  # fmt: skip
TINY = DEV | {
    "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 48, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32,
}  # fmt: skip


class Sized(ModelFolder):
    """A model of which only the sizes exist."""

    def config(self, part: str) -> dict[str, Any]:
        """Of the transformer; the folder's name says which."""
        return dict(TINY if self.path.name == "tiny" else DEV)


def sized(*, tiny: bool) -> Sized:
    """FLUX.2-dev, or a toy of its structure."""
    return Sized(Path("tiny" if tiny else "dev"), families.DEV)
