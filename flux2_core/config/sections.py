"""The configuration: one frozen model, read once, passed down in sections.

Defaults exist here and nowhere else. `flux2_core.config.reading` reads it from TOML and overrides;
`docs/config.md` is generated from the descriptions below; the Prefect form shows the same model.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from flux2_core.config.places import Place

CAPTION_SOURCES = ("auto", "textfile", "lines", "metadata", "filename")
MOST_REFERENCES = 10
COLUMN = "column:"  # `data.caption = "column:NAME"`
# Keys that each data set to be learned must have, and what for
PRESERVATION_TAKES = {"dop": (("trigger", "class_name"), "puts the class in the trigger's place")}
Dtype = Literal["bf16", "fp16", "fp32"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A frozen section; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", check_fields=False)
    @classmethod
    def _holds_no_password(cls, value: Any) -> Any:
        """A configuration is stored, shown and copied: it never holds a secret."""
        texts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(text, str) and re.match(r"[a-z0-9]+://[^/]*@", text) for text in texts):
            raise ValueError("a URL with a name or password in it; credentials come from the environment")
        return value


class Model(Section):
    """`[model]`: which FLUX.2 model."""

    path: Annotated[str, Place.HUB]
    """Folder in diffusers' layout, or a hub id such as `black-forest-labs/FLUX.2-dev`."""
    revision: str | None = None
    """Commit, branch or tag of a hub id; a commit makes a run repeatable."""
    family: Literal["dev", "klein"] | None = None
    """Said only to be checked: the family is read from the model's own files, and another one is refused."""


class Data(Section):
    """`[[data]]`: a set of pictures, how its captions are found, and what training sees of each picture."""

    path: Annotated[str, Place.HERE]
    """A folder (or `s3://bucket/prefix`) of pictures with `.txt` sidecars or `metadata.jsonl` / `.csv` / `.parquet`
    (`file_name`, `text`), of Parquet files with picture bytes, or of WebDataset `.tar` files; or one such file; or a
    `.lance` table."""
    caption: str = "auto"
    """`textfile`, `lines` (each line of the text file is a caption of its own), `metadata`, `column:NAME` (of the
    metadata, Parquet or Lance columns), `filename`, `auto` (what the layout brings), or a caption for every picture:
    any text with a space or a `[trigger]` in it."""
    default_caption: str | None = None
    """Caption of a picture that has none; without it such a picture is quarantined."""
    caption_shuffles: Natural = 0
    """So many further captions per caption, its comma-separated parts in a seeded order, the first part staying."""
    trigger: str | None = None
    """Word that calls the new concept: `[trigger]` and `[name]` in captions and in `validate.prompts` become it."""
    inject_trigger: bool = True
    """Put the trigger in front of a caption that does not mention it; `plan` says how many."""
    class_name: str | None = None
    """What the concept is an instance of ("a teapot"): `[class]` becomes it, and preservation puts it in the
    trigger's place."""
    resolutions: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1024,)
    """Side lengths in pixels: a picture is trained in the bucket of each that has about side * side pixels and its
    own aspect ratio, wherever it is large enough."""
    upscale: bool = False
    """Enlarge pictures that are too small for a resolution instead of leaving them out of it."""
    min_size: Natural = 0
    """Pictures with a shorter side under so many pixels are left out."""
    max_size: Positive | None = None
    """Pictures with a longer side over so many pixels are left out."""
    crop: Literal["center", "corner", "random"] = "center"
    """Where the bucket is cut out of the picture."""
    crop_variants: Positive = 1
    """Seeded random crops per picture and resolution, each cached; needs `crop = "random"`."""
    crop_aspect: Literal["closest", "square", "preserve"] = "closest"
    """`closest`: the bucket with the nearest aspect ratio. `square`: only the square one. `preserve`: the picture's
    own aspect ratio to the nearest 16 px, no bucket list."""
    bucket_min: Positive = 1
    """Buckets with fewer pictures than this are merged into the nearest larger one."""
    flip: bool = False
    """Add every picture mirrored, as a variant of its own."""
    masks: Annotated[str | None, Place.BESIDE] = None
    """Folder of masks, by the pictures' names: white is learned, black is not."""
    references: Annotated[tuple[str, ...], Place.BESIDE] = ()
    """Up to 10 folders of reference (edit) pictures, by the pictures' names; the model sees them beside the prompt."""
    repeats: Positive = 1
    """How often each picture is seen per epoch."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the loss of this data set."""
    regularisation: bool = False
    """Pictures of the class, not of the concept: no trigger is put into their captions, none are held out."""
    check_images: bool | None = None
    """Decode every picture in `plan` (true), only read headers (false), or decode up to 2,000 pictures (unset)."""

    @field_validator("resolutions")
    @classmethod
    def _sixteens(cls, sides: tuple[int, ...]) -> tuple[int, ...]:
        for side in sides:
            if side != (under := side // 16 * 16):
                raise ValueError(f"{side} is not a multiple of 16; {under or 16} and {under + 16} are")
        if len(set(sides)) != len(sides):
            raise ValueError(f"{list(sides)} names a resolution twice")
        return sides

    @field_validator("caption")
    @classmethod
    def _caption(cls, source: str) -> str:
        if source in CAPTION_SOURCES or {*source} & {" ", "["} or source.removeprefix(COLUMN) not in ("", source):
            return source
        raise ValueError(
            f"{source!r} is neither one of {', '.join(CAPTION_SOURCES)}, {COLUMN}NAME nor a caption, "
            "which has a space or [trigger] in it"
        )

    @field_validator("references")
    @classmethod
    def _at_most_ten(cls, folders: tuple[str, ...]) -> tuple[str, ...]:
        if len(folders) > MOST_REFERENCES:
            raise ValueError(f"{len(folders)} folders; FLUX.2 takes up to {MOST_REFERENCES} reference pictures")
        return folders

    @model_validator(mode="after")
    def _fitting(self) -> Data:
        if self.crop_variants > 1 and self.crop != "random":
            raise ValueError(f'crop_variants={self.crop_variants} needs crop="random": other crops are all the same')
        if self.max_size is not None and self.max_size < self.min_size:
            raise ValueError(f"max_size={self.max_size} is under min_size={self.min_size}: no picture would be left")
        if self.regularisation and self.masks:
            raise ValueError("masks say where a concept is; a regularisation set has none: remove masks")
        return self


class Text(Section):
    """`[text]`: what changes the bytes of text rows."""

    dtype: Dtype = "bf16"
    """Precision of the encoder and of its stored rows."""
    stored: Literal["raw", "projected"] = "raw"
    """`raw`: the encoder's rows. `projected`: after the transformer's frozen `context_embedder`, 2.5x smaller."""
    quantize: Literal["none", "int8", "int4", "fp8"] = "none"
    """Precision of the encoder's weights (optimum-quanto); smaller cards hold it, its rows differ slightly."""
    int8_rows: bool = False
    """Keep projected rows in 8 bits with a scale per row: half the bytes for about 1 % error. Needs
    `stored = "projected"`: raw rows would lose 14 %."""
    max_length: Annotated[int, Field(ge=16, le=4096)] = 512
    """Tokens of a prompt, pads included; FLUX.2 was trained with 512."""
    tokens: Literal["reference", "mistral-common"] = "reference"
    """`reference`: tokenizer.json as it is (diffusers). `mistral-common`: Mistral's split pattern, as ComfyUI cuts."""
    pads: Literal["skipped", "computed", "stored"] = "skipped"
    """`skipped`: encode real tokens only, at their true positions (faster). `computed`: run the padded sequence as
    diffusers does, bit for bit. `stored`: the same, and keep every pad row (klein always does)."""

    @model_validator(mode="after")
    def _projected_only(self) -> Text:
        if self.int8_rows and self.stored != "projected":
            raise ValueError('int8_rows=true needs stored="projected": raw rows lose 14 % by it, projected ones 1 %')
        return self


class Latents(Section):
    """`[latents]`: what changes the bytes of latent rows."""

    dtype: Dtype = "fp16"
    """Precision of stored latents; fp16 keeps them 8x more precisely than bf16 in the same bytes."""
    decoder: Literal["pil", "fast"] = "pil"
    """`pil`: the reference's pixels, bit for bit. `fast`: simplejpeg, which decodes large JPEGs straight to about the
    wanted size, and torch for the rest of the way; other pixels (about 0.8 of 255 apart), so other rows."""
    background: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")] = "#ffffff"
    """Colour behind transparent pixels."""


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
    init: Annotated[str | None, Place.HERE] = None
    """LoRA file to start from (diffusers' or ComfyUI's names), of the same targets and rank."""

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets:
            raise ValueError('nothing would be trained; name a preset ("all" is usual) or expressions')
        return targets


class Train(Section):
    """`[train]`: the training itself."""

    steps: Annotated[int, Field(ge=0, le=999_999)] = 1000  # names of checkpoints and previews have six digits
    """Optimizer steps."""
    batch_size: Positive = 1
    """Pictures per step over all workers together: the result does not depend on `cluster.workers`."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate; `prodigy` and `schedule-free` find their own scale: 1.0 is usual there for prodigy."""
    optimizer: Literal["adamw", "adamw-8bit", "prodigy", "adafactor", "lion", "schedule-free"] = "adamw"
    """Optimizer of the adapter's fp32 weights; `adamw-8bit` needs `pip install bitsandbytes`."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine", "cosine-restarts", "polynomial"] = "constant"
    """Course of the learning rate after the warm-up; all but constant end at zero (restarts: four times)."""
    warmup_steps: Natural = 0
    """Steps over which the learning rate rises linearly."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient over all adapter weights is scaled down to this norm."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of a moving average of the adapter (0.999 is usual): validated and exported beside the last weights."""
    timesteps: Literal["logit-normal", "sigmoid", "linear"] = "logit-normal"
    """How noise levels (sigma, 1 = pure noise) are drawn: uniformly (`linear`) or around 0.5 (the other two, which
    are the same distribution)."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Guidance that the model is told while training; ignored by models without a guidance embedding."""
    caption_dropout: Share = 0.0
    """Share of draws trained with the empty caption."""
    trigger_dropout: Share = 0.0
    """Share of draws trained with the trigger alone as their caption, beside those with the empty one."""
    preservation: Literal["none", "dop", "blank"] = "none"
    """Keep what the base model does without the concept: on the caption with class for trigger (`dop`, Differential
    Output Preservation) or on the empty one (`blank`). One more pass with and one without the adapter per step."""
    preservation_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the preservation loss."""
    pad_rows: Literal["reference", "zeros"] = "reference"
    """What the transformer sees before a short prompt: the encoder's pad row, as diffusers, or zeros, as ComfyUI."""
    precision: Literal["auto", "bf16", "fp32", "int8", "int4", "fp8", "int8-matmul", "fp8-matmul"] = "auto"
    """Precision of the frozen base; auto: bf16 on a GPU, fp32 on a CPU, or what the planner needs to fit the card.
    `int8`, `int4`, `fp8` keep its weights small and multiply in bf16; `-matmul` multiplies in 8 bits too. The adapter
    is fp32."""
    recompute: Literal["auto", "none", "selective", "full"] | Natural = "auto"
    """What the backward pass computes again: nothing, everything but matmuls, everything, or everything in so many
    blocks. `auto`: as little as the memory allows (`none` on a CPU)."""
    compile: Literal["auto"] | bool = "auto"
    """`torch.compile` every block: faster steps after a minute or two of compiling. `auto`: on a GPU that has Triton,
    from 500 steps on, and where compiling fails training goes on without, and says so."""
    seed: Natural = 42
    """Everything random follows from it: order, noise, sigma, dropout, adapter initialisation."""

    @model_validator(mode="after")
    def _fitting(self) -> Train:
        if self.optimizer == "schedule-free" and (self.schedule != "constant" or self.ema):
            raise ValueError('optimizer="schedule-free" averages by itself: it takes schedule="constant" and no ema')
        if (dropped := self.caption_dropout + self.trigger_dropout) > 1:
            raise ValueError(f"caption_dropout and trigger_dropout are shares of all draws: together {dropped:g} > 1")
        return self


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
    negative: str | None = None
    """Negative prompt of previews, for models without guidance embedding (klein base); `guidance` is then its scale."""
    seed: Natural = 42
    """Seed of the previews' noise, the same at every step."""
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of pictures kept out of training for the validation loss; nothing is held out under 20 pictures."""
    samples: Natural = 16
    """Held-out samples that are measured, always the same, of each data set and bucket its share; 0 measures all."""


class Cluster(Section):
    """`[cluster]`: only speed. Nothing here may change a result or a fingerprint."""

    address: str | None = None
    """Address of a running Ray cluster (`auto` on its head node); unset: Ray is started here and ended after."""
    workers: Positive = 1
    """Training workers, one per GPU."""
    min_workers: Positive | None = None
    """Go on with as few workers as this when machines are lost, and grow again when they return; unset: wait."""
    encoders: Positive | None = None
    """Encoding workers per kind; unset: one per GPU of the cluster."""
    compile_vae: bool = False
    """`torch.compile` the VAE's encoder: pays where a GPU has many thousand pictures to encode."""
    strategy: Literal["auto", "fsdp", "hsdp", "ddp", "stream"] = "auto"
    """How the frozen base is laid out: whole in every worker (`ddp`), sharded over all (`fsdp`), sharded in each node
    (`hsdp`), or in host memory, a copy a worker, two blocks on the card (`stream`). `auto`: the fastest that fits."""
    gpu_memory: Annotated[float, Field(gt=0)] | None = None
    """GiB of a card to plan for, of which 94 % are filled; unset: what is free of the cards at hand."""
    price: Annotated[float, Field(ge=0)] | None = None
    """Price of a GPU-hour: `plan` multiplies its hours by it."""
    micro_batch: Positive | None = None
    """Pictures per forward pass of one worker; unset: its whole share of the batch."""
    retries: Natural = 3
    """How often a lost worker group is started again from the last checkpoint; after a notice it always is."""

    @model_validator(mode="after")
    def _fewest(self) -> Cluster:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        return self


class Output(Section):
    """`[output]`: only places."""

    root: Annotated[str, Place.HERE] = "runs"
    """Folder of runs; outputs go to `<root>/<run>/`."""
    cache: Annotated[str, Place.HERE] = "cache"
    """Folder or `s3://bucket/prefix` of the tables; share it between runs."""
    mirror: Annotated[str | None, Place.HERE] = None
    """Folder or `s3://bucket/prefix` to which a run's folder is copied after each checkpoint and at the end; a machine
    that lacks the folder goes on from there. For machines whose disk goes with them."""
    save_every: Positive = 250
    """Steps between checkpoints."""
    keep: Positive = 3
    """Checkpoints kept."""

    @model_validator(mode="after")
    def _elsewhere(self) -> Output:
        if self.mirror and self.mirror.rstrip("/") == self.root.rstrip("/"):
            raise ValueError(f"mirror={self.mirror!r} is root itself: name another folder, or s3://bucket/prefix")
        return self


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
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(f"{name!r} is not a file name: letters, digits, '.', '_' and '-' only, at most 100")
        return name

    @model_validator(mode="after")
    def _roles(self) -> Config:
        taught = [(place, data) for place, data in enumerate(self.data) if not data.regularisation]
        if not taught:
            raise ValueError("every data set is regularisation: one must hold what is to be learned")
        for place, data in taught:
            if self.train.trigger_dropout and not data.trigger:
                raise ValueError(f"train.trigger_dropout needs a trigger: set data.{place}.trigger")
            words, why = PRESERVATION_TAKES.get(self.train.preservation, ((), ""))
            if not all(getattr(data, word) for word in words):
                wanted = " and ".join(f"data.{place}.{word}" for word in words)
                raise ValueError(f'train.preservation="{self.train.preservation}" {why}: set {wanted}')
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """What a step minimises, in the order of its passes: names in `data.needs` and in `train.methods`."""
        return tuple(name for name in ("flow", self.train.preservation) if name != "none")

    @property
    def validation(self) -> Validate:
        """The `[validate]` section (pydantic keeps the name `validate` for itself)."""
        return self.validate_

    @property
    def preview_size(self) -> int:
        """Side in pixels of the pictures that are drawn."""
        return self.validation.size or self.data[0].resolutions[0]

    @property
    def trigger(self) -> str | None:
        """Trigger of the first data set, used in prompts."""
        return self.data[0].trigger
