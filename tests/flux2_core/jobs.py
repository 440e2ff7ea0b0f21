"""Jobs for the planner on FLUX.2's published models, of which only the configuration is there."""

from pathlib import Path
from typing import Any

from flux2_core.config.reading import parse
from flux2_core.model.families import FAMILIES
from flux2_core.model.folder import ModelFolder
from flux2_core.placement import planner
from flux2_core.placement.planner import Job

DEV = {
    "in_channels": 128, "out_channels": None, "num_layers": 8, "num_single_layers": 48, "attention_head_dim": 128,
    "num_attention_heads": 48, "joint_attention_dim": 15360, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
    "guidance_embeds": True,
}  # fmt: skip
KLEIN_4B = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
    "guidance_embeds": False,
}  # fmt: skip
TEXT_ENCODERS = {
    "dev": {"text_config": {"hidden_size": 5120, "intermediate_size": 32768, "num_attention_heads": 32,
                            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072}},
    "klein": {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8,
              "head_dim": 128, "vocab_size": 151936},
}  # fmt: skip
H200, H100, CARD_48, CARD_24, CARD_16 = 139.8, 79.1, 47.5, 23.6, 15.7  # GiB as the driver tells them


class Described(ModelFolder):
    """A model of which only the configuration is there."""

    def config(self, part: str) -> dict[str, Any]:
        if part == "text_encoder":
            return TEXT_ENCODERS[self.path.name]
        return dict(DEV) if self.path.name == "dev" else {**DEV, **KLEIN_4B}


def described(name: str) -> ModelFolder:
    return Described(Path(name), FAMILIES[name])


def asked(memory: float | None = None, *, workers: int = 1, local: int | None = None, **sections: Any) -> Job:
    """A job on FLUX.2-dev: 1024 px, one picture a worker, rank 16 on every Linear of every block."""
    tree: dict[str, Any] = {"model": {"path": "x"}, "data": [{"path": "x"}]}
    tree["cluster"] = {"workers": workers, **({"gpu_memory": memory} if memory else {}), **sections.pop("cluster", {})}
    tree["train"] = {"batch_size": workers, **sections.pop("train", {})}
    return planner.job(parse({**tree, **sections}), described("dev"), world=workers, local=local or workers)


def limit(gib: float) -> float:
    """What the planner may fill of a card."""
    return 0.94 * gib * 2**30
