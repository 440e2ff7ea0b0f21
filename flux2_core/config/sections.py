"""The configuration: one frozen model, read once, passed down in sections.

Defaults exist here and nowhere else. `flux2_core.config.reading` reads it from TOML and overrides;
`docs/config.md` is generated from the descriptions below; the Prefect form shows the same model.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from flux2_core.config import objective, routing, slider
from flux2_core.config.adapter import Lora
from flux2_core.config.dataset import Data, uncovered
from flux2_core.config.objective import PREFERENCE, Loss, Noise
from flux2_core.config.places import Place
from flux2_core.config.prompts import Prompt
from flux2_core.config.routing import Rollout, Tread
from flux2_core.config.section import Dtype, Natural, Positive, Section, Share, interval
from flux2_core.config.slider import SLIDER_STEPS, Slider

MOST_STEPS = 999_999  # names of checkpoints and previews have six digits
# Keys that each data set to be learned must have, and what for
Guidance = Annotated[float, Field(ge=0)]
SLIDER = "slider"  # the method of prompts alone
PASSES = {"flow": (1, 1, 0), "rollout": (1, 1, 0), PREFERENCE: (2, 1, 1)}  # `Config.passes` where they are not one each
DEVICES = {"CPU", "GPU", "memory", "object_store_memory"}  # what Ray has of every node
PRESERVATION_TAKES = {"dop": (("trigger", "class_name"), "puts the class in the trigger's place")}


class Model(Section):
    """`[model]`: which FLUX.2 model."""

    path: Annotated[str, Place.HUB]
    """Folder in diffusers' layout, or a hub id such as `black-forest-labs/FLUX.2-dev`."""
    revision: str | None = None
    """Commit, branch or tag of a hub id; a commit makes a run repeatable."""
    family: Literal["dev", "klein"] | None = None
    """Said only to be checked: the family is read from the model's own files, and another one is refused."""


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
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the VAE encodes in. `bf16`: half of a card's memory and traffic, for rows about 0.8 % apart (0.15 of 255
    once decoded); refused where a model's own VAE, tried before the first picture, is more than 2 % apart."""
    background: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")] = "#ffffff"
    """Colour behind transparent pixels."""


class Train(Section):
    """`[train]`: the training itself."""

    steps: Annotated[int, Field(ge=0, le=MOST_STEPS)] = 1000
    """Optimizer steps."""
    epochs: Positive | None = None
    """Instead of steps: so many epochs of the pictures to train on, `repeats` counted; `plan` says the steps."""
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
    guidance: Guidance | tuple[Guidance, Guidance] = 1.0
    """Guidance that the model is told while training, or two ends between which each sample has one drawn; ignored by
    models without a guidance embedding."""
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
    precision: Literal["auto", "bf16", "fp32", "int8", "int4", "nf4", "fp8", "int8-matmul", "fp8-matmul"] = "auto"
    """Precision of the frozen base; auto: bf16 on a GPU, fp32 on a CPU, or what the planner needs to fit the card.
    `int8`, `int4`, `nf4`, `fp8` keep its weights small and multiply in bf16; `-matmul` multiplies in 8 bits too. The
    adapter is fp32."""
    recompute: Literal["auto", "none", "selective", "full"] | Natural = "auto"
    """What the backward pass computes again: nothing, everything but matmuls, everything, or everything in so many
    blocks. `auto`: as little as the memory allows (`none` on a CPU)."""
    compile: Literal["auto"] | bool = "auto"
    """`torch.compile` every block: faster steps after a minute or two of compiling. `auto`: on a GPU that has Triton,
    from 500 steps on, and where compiling fails training goes on without, and says so."""
    seed: Natural = 42
    """Everything random follows from it: order, noise, sigma, dropout, adapter initialisation."""

    @model_validator(mode="before")
    @classmethod
    def _by_epochs(cls, given: Any) -> Any:
        """Steps that epochs come to are not known before the samples are: 0 until then."""
        return {"steps": 0} | given if isinstance(given, dict) and given.get("epochs") is not None else given

    @property
    def settled(self) -> bool:
        """Whether `steps` is the number of steps, or still to be counted out of `epochs`."""
        return self.steps > 0 or self.epochs is None

    @model_validator(mode="after")
    def _fitting(self) -> Train:
        if self.optimizer == "schedule-free" and (self.schedule != "constant" or self.ema):
            raise ValueError('optimizer="schedule-free" averages by itself: it takes schedule="constant" and no ema')
        if isinstance(self.guidance, tuple) and self.guidance[0] >= self.guidance[1]:
            raise ValueError(f"guidance={list(self.guidance)}: the lower end comes first")
        if self.preservation == "none" and self.preservation_weight != 1:
            raise ValueError('preservation_weight weighs nothing: set preservation="dop" or "blank"')
        if (dropped := self.caption_dropout + self.trigger_dropout) > 1:
            raise ValueError(f"caption_dropout and trigger_dropout are shares of all draws: together {dropped:g} > 1")
        return self


class Validate(Section):
    """`[validate]`: what is looked at; it changes no weight."""

    prompts: tuple[str, ...] = ()
    """Prompts drawn as previews; `[trigger]` is that of the first data set."""
    every: Annotated[int | str, interval(0)] = 250
    """Previews and validation loss each so many steps, at step 0 and at the end; 0 turns both off. `epoch`: at the end
    of each, `500 samples`: each time that so many more were trained on."""
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
    prompt: tuple[Prompt, ...] = ()
    """Prompts with something of their own."""

    @property
    def drawn(self) -> tuple[Prompt, ...]:
        """All prompts, in the order of their previews."""
        return (*(Prompt(text=text) for text in self.prompts), *self.prompt)


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
    encoder_resources: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """What Ray must have on a node for each encoder there, such as `{ encoder = 1 }` of nodes that were started with
    `--resources='{"encoder": 2}'`; training goes to the other nodes. Unset: both go anywhere."""
    compile_vae: bool = False
    """`torch.compile` the VAE's encoder: pays where a GPU has many thousand pictures to encode."""
    strategy: Literal["auto", "fsdp", "hsdp", "ddp", "stream"] = "auto"
    """How the frozen base is laid out: whole in every worker (`ddp`), sharded over all (`fsdp`), sharded in each node
    (`hsdp`), or in host memory, a copy a worker, two blocks on the card (`stream`). `auto`: the fastest that fits."""
    gpu_memory: Annotated[float, Field(gt=0)] | None = None
    """GiB of a card to plan for, of which 94 % are filled; unset: what is free of the cards at hand."""
    price: Annotated[float, Field(ge=0)] | None = None
    """Price of a GPU-hour: `plan` multiplies its hours by it."""
    rounded: Annotated[str | None, Place.HERE] = None
    """Folder on each node's disk that keeps the weights of a few-bit `train.precision` as they were rounded: later
    starts read those, a half (`int8`, `fp8`) or a quarter (`int4`, `nf4`) of the model's bytes."""
    micro_batch: Positive | None = None
    """Pictures per forward pass of one worker; unset: its whole share of the batch."""
    retries: Natural = 3
    """How often a lost worker group is started again from the last checkpoint; after a notice it always is."""

    @model_validator(mode="after")
    def _fewest(self) -> Cluster:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        return self

    @model_validator(mode="after")
    def _marked_nodes(self) -> Cluster:
        if self.encoder_resources and self.address is None:
            raise ValueError("encoder_resources names nodes of a running cluster: set cluster.address, or leave it out")
        if asked := DEVICES & set(self.encoder_resources or {}):
            raise ValueError(
                f"encoder_resources asks for {', '.join(sorted(asked))}, which Ray has on every node: name a resource "
                "that marks the nodes, and set cluster.encoders for how many there are"
            )
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
    save_every: Annotated[int | str, interval(1)] = 250
    """Steps between checkpoints, or `epoch`, or `500 samples`."""
    keep: Positive = 3
    """Checkpoints kept."""
    as_lora: Positive | None = None
    """Rank of a plain LoRA that is exported beside, as near as that rank comes to what another `lora.kind` does to the
    weights. Of `loha` and `oft`, which diffusers does not load, its file is one in any case, of 4 x `lora.rank`."""

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
    noise: Noise = Noise()
    loss: Loss = Loss()
    tread: Tread = Tread()
    rollout: Rollout = Rollout()
    slider: Slider = Slider()
    validate_: Validate = Field(default=Validate(), alias="validate")
    cluster: Cluster = Cluster()
    output: Output = Output()

    @model_validator(mode="before")
    @classmethod
    def _in_place(cls, tree: Any) -> Any:
        """What is said in a former place or in a shorter form, where it belongs."""
        return objective.in_place(slider.in_place(tree)) if isinstance(tree, dict) else tree

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
        if self.loss.weighting != "none" and any(noise.distribution == "weighted" for noise in self.noises):
            raise ValueError('distribution="weighted" brings its own weights: leave out loss.weighting')
        if self.loss.masked_prior and not any(data.masks and not data.rejected for data in self.data):
            raise ValueError("loss.masked_prior keeps what masks leave out, and no data set has any: set data.0.masks")
        if self.train.settled and (gap := uncovered(self.data, self.train.steps)) is not None:
            raise ValueError(f"step {gap} has no data set: data[].steps must cover 1 to {self.train.steps} together")
        for place, data in taught:
            if self.train.trigger_dropout and not data.trigger:
                raise ValueError(f"train.trigger_dropout needs a trigger: set data.{place}.trigger")
            words, why = PRESERVATION_TAKES.get(self.train.preservation, ((), ""))
            if not all(getattr(data, word) for word in words):
                wanted = " and ".join(f"data.{place}.{word}" for word in words)
                raise ValueError(f'train.preservation="{self.train.preservation}" {why}: set {wanted}')
        routing.check(self.tread, self.rollout, self.methods, self.noises)
        return self

    @model_validator(mode="after")
    def _of_methods(self) -> Config:
        captions = self.train.preservation != "none" or self.train.caption_dropout > 0
        told = slider.refusal(self.slider, self.data, captions=captions, kind=self.lora.kind)
        if told or (told := objective.unused(self.loss, self.methods)):
            raise ValueError(told)
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """What a step minimises, in the order of its passes: names in `data.needs` and in `train.methods.table`."""
        if self.slider.texts:
            return (SLIDER,)
        paired = {bool(data.rejected) for data in self.data}
        single = "rollout" if self.rollout.on else "flow"
        learnt = [name for kind, name in ((False, single), (True, PREFERENCE)) if kind in paired]
        return tuple(name for name in (*learnt, self.train.preservation) if name != "none")

    @property
    def pairs(self) -> bool:
        """Whether a data set holds pairs of a preferred and a rejected picture."""
        return PREFERENCE in self.methods

    @property
    def passes(self) -> list[tuple[int, int, int]]:
        """Of each method: a sample's pictures in one pass, passes with the adapter and back, and of the base alone."""
        if self.slider.texts:
            kept = bool(self.slider.anchor)
            return [(1, 2 + 2 * kept, SLIDER_STEPS + 3 + kept)]
        return [PASSES.get(name, (1, 1, 1)) for name in self.methods]

    @property
    def whole_passes(self) -> float:
        """Passes without gradient that a step makes with all tokens, whatever `tread.routes` says."""
        return (self.loss.contrastive_guidance != 1) + self.rollout.passes

    @property
    def takes_prior(self) -> bool:
        """Whether what the base model predicts is a target of some samples or tokens."""
        return bool(self.loss.masked_prior) or any(data.regularisation == "prior" for data in self.data)

    @property
    def noises(self) -> tuple[Noise, ...]:
        """Noise levels of each data set."""
        return tuple(data.noise or self.noise for data in self.data)

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
