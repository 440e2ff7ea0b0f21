"""The configuration: one frozen model, read once, passed down in sections.

Defaults exist here and nowhere else. `flux2_core.config_file` reads it from TOML and overrides;
`docs/config.md` is generated from the descriptions below; the Prefect form shows the same model.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

CAPTION_SOURCES = ("auto", "textfile", "metadata", "filename")
TARGET_PRESETS = ("all", "attention", "mlp", "tiny", "diffusers")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Dtype = Literal["bf16", "fp16", "fp32"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A frozen section; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Model(Section):
    """`[model]`: which FLUX.2 model."""

    path: str
    """Folder in diffusers' layout, or a hub id such as `black-forest-labs/FLUX.2-dev`."""
    revision: str | None = None
    """Commit, branch or tag of a hub id; a commit makes a run repeatable."""


class Data(Section):
    """`[[data]]`: one folder of pictures and how its captions are found."""

    path: str
    """Folder with pictures and `.txt` sidecars, or with `metadata.jsonl` / `metadata.csv` (`file_name`, `text`)."""
    caption: str = "auto"
    """`textfile`, `metadata`, `filename`, `auto` (metadata where the folder has it, else text files), or a caption for
    every picture: any text with a space or a `[trigger]` in it."""
    default_caption: str | None = None
    """Caption of a picture that has none; without it such a picture is quarantined."""
    trigger: str | None = None
    """Word that calls the new concept: `[trigger]` and `[name]` in captions and in `validate.prompts` become it."""
    resolutions: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1024,)
    """Side lengths in pixels: a picture is trained in the bucket of each that has about side * side pixels and its
    own aspect ratio, wherever it is large enough."""
    repeats: Positive = 1
    """How often each picture is seen per epoch."""
    check_images: bool | None = None
    """Decode every picture in `plan` (true), only read headers (false), or decode up to 2,000 pictures (unset)."""

    @field_validator("resolutions")
    @classmethod
    def _sixteens(cls, sides: tuple[int, ...]) -> tuple[int, ...]:
        for side in sides:
            if side % 16:
                raise ValueError(
                    f"{side} is not a multiple of 16; {side // 16 * 16 or 16} and {side // 16 * 16 + 16} are"
                )
        if len(set(sides)) != len(sides):
            raise ValueError(f"{list(sides)} names a resolution twice")
        return sides

    @field_validator("caption")
    @classmethod
    def _caption(cls, source: str) -> str:
        if source in CAPTION_SOURCES or " " in source or "[" in source:
            return source
        raise ValueError(
            f"{source!r} is neither one of {', '.join(CAPTION_SOURCES)} nor a caption, "
            "which has a space or [trigger] in it"
        )


class Text(Section):
    """`[text]`: what changes the bytes of text rows."""

    dtype: Dtype = "bf16"
    """Precision of the encoder and of its stored rows."""
    stored: Literal["raw", "projected"] = "raw"
    """`raw`: the encoder's rows. `projected`: after the transformer's frozen `context_embedder`, 2.5x smaller."""
    max_length: Annotated[int, Field(ge=16, le=4096)] = 512
    """Tokens of a prompt, pads included; FLUX.2 was trained with 512."""
    pads: Literal["skipped", "computed", "stored"] = "skipped"
    """`skipped`: encode real tokens only, at their true positions (faster). `computed`: run the padded sequence as
    diffusers does, bit for bit. `stored`: the same, and keep every pad row (klein always does)."""


class Latents(Section):
    """`[latents]`: what changes the bytes of latent rows."""

    dtype: Dtype = "fp16"
    """Precision of stored latents; fp16 keeps them 8x more precisely than bf16 in the same bytes."""


class Lora(Section):
    """`[lora]`: the adapter."""

    rank: Positive = 16
    """Rank of every adapted Linear."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Strength: the update is scaled by alpha / rank. Unset: equal to the rank."""
    targets: str | tuple[str, ...] = "all"
    """`all` (every Linear of every block), `attention` (with text-side and fused projections), `mlp`, `tiny` (image
    q, k, v), `diffusers` (that trainer's default), or regular expressions over module names."""
    kind: Literal["lora", "rslora"] = "lora"
    """`rslora` scales by alpha / sqrt(rank)."""

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets:
            raise ValueError(f"nothing would be trained; name a preset ({', '.join(TARGET_PRESETS)}) or expressions")
        return targets


class Train(Section):
    """`[train]`: the training itself."""

    steps: Natural = 1000
    """Optimizer steps."""
    batch_size: Positive = 1
    """Pictures per step over all workers together: the result does not depend on `cluster.workers`."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """AdamW's decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine end at zero."""
    warmup_steps: Natural = 0
    """Steps over which the learning rate rises linearly."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient over all adapter weights is scaled down to this norm."""
    timesteps: Literal["logit-normal", "sigmoid", "linear"] = "logit-normal"
    """How noise levels (sigma, 1 = pure noise) are drawn: uniformly (`linear`) or around 0.5 (the other two, which
    are the same distribution)."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Guidance that the model is told while training; ignored by models without a guidance embedding."""
    caption_dropout: Share = 0.0
    """Share of draws trained with the empty caption."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the frozen base and of its matmuls; auto: bf16 on a GPU, fp32 on a CPU. The adapter is fp32."""
    recompute: Literal["none", "full"] = "none"
    """`full`: blocks are computed again in the backward pass; least memory, about 47 % more work."""
    seed: Natural = 42
    """Everything random follows from it: order, noise, sigma, dropout, adapter initialisation."""


class Validate(Section):
    """`[validate]`: what is looked at; it changes no weight."""

    prompts: tuple[str, ...] = ()
    """Prompts drawn as previews; `[trigger]` is that of the first data set."""
    every: Natural = 250
    """Previews and validation loss each so many steps, at step 0 and at the end; 0 turns both off."""
    size: Annotated[int, Field(ge=16, multiple_of=16)] | None = None
    """Side of a preview in pixels; unset: the first resolution."""
    steps: Positive = 25
    """Denoising steps of a preview."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Guidance of previews; 1 shows what was trained."""
    seed: Natural = 42
    """Seed of the previews' noise, the same at every step."""
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of pictures kept out of training for the validation loss; nothing is held out under 20 pictures."""


class Cluster(Section):
    """`[cluster]`: only speed. Nothing here may change a result or a fingerprint."""

    address: str | None = None
    """Address of a running Ray cluster (`auto` on its head node); unset: Ray is started here and ended after."""
    workers: Positive = 1
    """Training workers, one per GPU."""
    encoders: Positive | None = None
    """Encoding workers per kind; unset: one per GPU of the cluster."""
    strategy: Literal["fsdp"] = "fsdp"
    """How the frozen base is laid out over the workers."""
    micro_batch: Positive | None = None
    """Pictures per forward pass of one worker; unset: its whole share of the batch."""
    retries: Natural = 3
    """How often a lost worker group is started again from the last checkpoint."""


class Output(Section):
    """`[output]`: only places."""

    root: str = "runs"
    """Folder of runs; outputs go to `<root>/<run>/`."""
    cache: str = "cache"
    """Folder or `s3://bucket/prefix` of the tables; share it between runs."""
    save_every: Positive = 250
    """Steps between checkpoints."""
    keep: Positive = 3
    """Checkpoints kept."""


class Config(Section):
    """A whole configuration."""

    run: str = "lora"
    """Name of the run: its folder under `output.root`, and the LoRA's file name."""
    max_quarantined: Share = 0.02
    """Share of pictures that may be quarantined before the run is refused."""
    model: Model
    data: Annotated[tuple[Data, ...], Field(min_length=1)]
    text: Text = Text()
    latents: Latents = Latents()
    lora: Lora = Lora()
    train: Train = Train()
    validate_: Validate = Field(default=Validate(), alias="validate")
    cluster: Cluster = Cluster()
    output: Output = Output()

    @field_validator("run")
    @classmethod
    def _run(cls, name: str) -> str:
        if not RUN_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a file name: letters, digits, '.', '_' and '-' only, at most 100")
        return name

    @model_validator(mode="after")
    def _shares(self) -> Config:
        share = self.cluster.workers
        if self.train.batch_size % share:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} cannot be dealt evenly to cluster.workers={share}: "
                f"use a multiple, for instance train.batch_size={max(share, self.train.batch_size // share * share)}"
            )
        return self

    @property
    def validation(self) -> Validate:
        """The `[validate]` section (pydantic keeps the name `validate` for itself)."""
        return self.validate_

    @property
    def trigger(self) -> str | None:
        """Trigger of the first data set, used in prompts."""
        return self.data[0].trigger
