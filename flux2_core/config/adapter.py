"""`[lora]`: the kind of adapter, where it sits, how large and how strong it is, and what it starts from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from flux2_core.config.places import Place
from flux2_core.config.section import Positive, Section

TAKES = {  # keys that some kinds alone have, and what they would do
    "dropout": (("lora", "rslora", "dora", "t-lora"), "leaves out ranks of a thin product, which it has none of"),
    "factor": (("lokr",), "is a side of lokr's left factor"),
    "min_rank": (("t-lora",), "is how many ranks t-lora keeps in pure noise"),
    "alpha": (("lora", "rslora", "dora", "t-lora", "lokr", "loha"), "is a strength, and a rotation has none"),
    "preset": (
        ("lora", "rslora", "t-lora", "lokr", "loha"),
        "changes the weights that this kind turns or stretches: no loader would apply it above them",
    ),
}
LATER = (
    "ranks",
    "factor",
    "min_rank",
    "dropout",
)  # keys that came later: unset, they change no hash of a configuration


class Lora(Section):
    """`[lora]`: the adapter."""

    rank: Positive = 16
    """Rank of every adapted Linear; of `oft` the side of its blocks."""
    ranks: dict[str, Positive] = {}  # noqa: RUF012  (pydantic gives each its own)
    """Other ranks for some of the targets: presets or expressions as in `targets`, the first that matches counts. With
    `alpha` set a Linear is scaled by alpha over its own rank."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Strength: the update is scaled by alpha / rank. Unset: equal to the rank."""
    targets: str | tuple[str, ...] = "all"
    """`all` (every Linear of every block), `attention` (with text-side and fused projections), `mlp`, `tiny` (image
    q, k, v), `diffusers` (that trainer's default), or regular expressions over module names, in which
    "single_transformer_blocks.[11-18]" are whole blocks."""
    kind: Literal["lora", "rslora", "dora", "lokr", "loha", "oft", "t-lora"] = "lora"
    """`rslora`: scaled by alpha / sqrt(rank). `dora`: each output's size is learned by itself. `lokr`, `loha`: products
    of factors after Kronecker and Hadamard. `oft`: outputs turned block by block. `t-lora`: the noisier the input, the
    fewer ranks. docs/methods.md says what each is for."""
    factor: Annotated[int, Field(ge=2)] | None = None
    """Side of the left factor of `lokr`, or the nearest divisor below it; unset: 16."""
    min_rank: Positive | None = None
    """Ranks of `t-lora` that work in pure noise, all of them at none; unset: half of the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the ranks that a sample is trained without, other ones in each step and Linear; none is left out where
    pictures are drawn or measured."""
    init: Annotated[str | None, Place.HERE] = None
    """LoRA file to start from (diffusers' or ComfyUI's names), of the same kind, targets and rank."""
    preset: Annotated[tuple[str, ...], Place.HERE] = ()
    """LoRA files that are part of the base while this one is trained and drawn (differential LoRA): what is exported is
    the new one alone, to be used beside them."""
    preset_scales: tuple[float, ...] = ()
    """Strength of each of `preset`; unset: 1."""

    @model_validator(mode="after")
    def _each_its_scale(self) -> Lora:
        if self.preset_scales and len(self.preset_scales) != len(self.preset):
            raise ValueError(f"{len(self.preset_scales)} preset_scales for {len(self.preset)} files of preset")
        return self

    @model_validator(mode="after")
    def _of_its_kind(self) -> Lora:
        for key, (kinds, why) in TAKES.items():
            if self.kind not in kinds and getattr(self, key):
                others = ", ".join(f'"{kind}"' for kind in kinds)
                raise ValueError(f'kind="{self.kind}" takes no {key}, which {why}: leave it out, or take {others}')
        least = min(self.rank, *self.ranks.values()) if self.ranks else self.rank
        if self.min_rank and self.min_rank > least:
            raise ValueError(f"min_rank={self.min_rank} is more than the rank {least} of a Linear")
        return self

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets:
            raise ValueError('nothing would be trained; name a preset ("all" is usual) or expressions')
        return targets
