"""Every option of training as one record: what it sets, and what a run of it must show otherwise than one without it.

A key that is not in a record stands in `APART`, with the reason why no other option can be wrong in its company.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LEARNED = frozenset({"learned"})  # what nearly all of them change
DATA = LEARNED | {"samples", "latents", "texts"}
TEXTS = LEARNED | {"texts"}
SHIFTED = LEARNED | {"levels"}
LEVELS = SHIFTED | {"noise"}
COUNTS = LEARNED | {"counts"}


@dataclass(frozen=True)
class Option:
    """One value of a key, or of a few that say one thing together."""

    sets: dict[str, Any]
    """Dotted keys as one writes them; a `Path` stands for a place in the folder of the fixtures."""
    moves: frozenset[str] = LEARNED
    """Aspects of a run (`test_pairs_of_options.Seen`) that it changes; all others must stay as they are."""
    over: str | None = None
    """The option without which it means nothing: it is compared with that one alone."""
    beneath: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """What holds where nothing else does."""
        object.__setattr__(self, "beneath", OPTIONS[self.over].values if self.over else {})

    def part(self, strong: bool) -> dict[str, Any]:
        """Its own keys, or those beneath."""
        return self.sets if strong else self.beneath

    @property
    def values(self) -> dict[str, Any]:
        """All keys."""
        return self.beneath | self.sets


OPTIONS: dict[str, Option] = {}


def _one(name: str, sets: dict[str, Any], moves: frozenset[str] | set[str] = LEARNED, over: str | None = None) -> None:
    OPTIONS[name] = Option(sets, frozenset(moves), over)


def _values(key: str, *values: Any, moves: frozenset[str] | set[str] = LEARNED) -> None:
    for value in values:
        _one(f"{key}={value}", {key: value}, moves)


# what a step minimises
_one("dop", {"train.preservation": "dop"}, {*LEARNED, "passes"})
_one("blank", {"train.preservation": "blank"}, {*LEARNED, "passes"})
_one("preservation_weight", {"train.preservation_weight": 3.0}, LEARNED, "dop")
_one("class_name", {"data.0.class_name": "a small house"}, LEARNED, "dop")
_one("contrastive", {"loss.contrastive_guidance": 3.0}, {*LEARNED, "passes"})
_one("contrastive range", {"loss.contrastive_guidance": (1.5, 4.0)}, {*LEARNED, "passes"})
_one("contrastive_schedule", {"loss.contrastive_schedule": "sigma"}, over="contrastive")
_one("contrastive_zero_star", {"loss.contrastive_zero_star": True}, over="contrastive")
_one("differential", {"loss.differential_guidance": 3.0})

# beta is far below the usual one: a random model's errors are large, and rounding is multiplied by it
_one("pairs", {"data.0.rejected": Path("worse"), "loss.preference_beta": 100.0}, {*LEARNED, "passes"})
_one("preference_beta", {"loss.preference_beta": 20.0}, over="pairs")

_one("tread", {"tread.routes": ({"skip": 0.5, "start": 0, "end": -1},)})
_one("rollout", {"rollout.probability": 1.0}, {*LEARNED, "passes"})
_one("rollout.steps", {"rollout.steps": 1}, {*LEARNED, "passes"}, "rollout")
_one("reflexflow", {"rollout.reflexflow": True}, {*LEARNED, "passes"}, "rollout")

# losses and weights of levels
_values("loss.kind", "mae", "smooth-l1", "huber", "pseudo-huber", "wavelet")
_one("delta", {"loss.delta": 0.5}, over="loss.kind=huber")
_one("delta exponential", {"loss.delta_schedule": "exponential"}, over="loss.kind=huber")
_one("delta snr", {"loss.delta_schedule": "snr"}, over="loss.kind=huber")
_values("loss.weighting", "bell", "min-snr", "sigma-sqrt", "cosmap", "weighted", moves=COUNTS)
_one("gamma", {"loss.gamma": 0.5}, COUNTS, "loss.weighting=min-snr")

# noise levels: each kind of distribution, and what is done to any of them
_one("sigmoid", {"noise.distribution": "sigmoid", "noise.parameters": (0.0, 0.5)}, SHIFTED)
_one("logit-normal", {"noise.parameters": (1.0, 1.0)}, SHIFTED)
_one("noise.distribution=linear", {"noise.distribution": "linear"}, LEVELS)
_one("noise.distribution=weighted", {"noise.distribution": "weighted"}, LEVELS | COUNTS)
_one("beta", {"noise.distribution": "beta", "noise.parameters": (3.0, 1.5)}, LEVELS)
_one("mode", {"noise.distribution": "mode", "noise.parameters": (0.8,)}, LEVELS)
_one("cubic", {"noise.distribution": "cubic", "noise.parameters": (1.0, 0.5, 2.0)}, LEVELS)
_one("levels", {"noise.distribution": "levels", "noise.parameters": (3.0,)}, LEVELS)
_values("noise.shift", 3.0, "tokens", "flux2", moves=SHIFTED)
_values("noise.bias", "content", "style", moves=SHIFTED)
_one("range", {"noise.range": (0.3, 0.6)}, SHIFTED)
_one("stratified", {"noise.stratified": True}, SHIFTED)
_one("noise of a set", {"data.0.noise": {"distribution": "mode", "parameters": (0.4,)}}, LEVELS)

# what the model is told
_one("guidance", {"train.guidance": 4.0}, {*LEARNED, "told"})
_one("guidance range", {"train.guidance": (1.0, 5.0)}, {*LEARNED, "told"})
_one("caption_dropout", {"train.caption_dropout": 0.5}, TEXTS)
_one("trigger_dropout", {"train.trigger_dropout": 0.5}, TEXTS)
_one("pad_rows", {"train.pad_rows": "zeros"}, TEXTS)

# optimizers and rates
_one("prodigy", {"train.optimizer": "prodigy", "train.learning_rate": 1e4}, {*LEARNED, "rates"})
_one("adafactor", {"train.optimizer": "adafactor", "train.learning_rate": 0.3}, {*LEARNED, "rates"})
_values("train.optimizer", "lion", "schedule-free")
_one("weight_decay", {"train.weight_decay": 1.0})
_values("train.schedule", "linear", "cosine", "cosine-restarts", "polynomial", moves={*LEARNED, "rates"})
_one("warmup", {"train.warmup_steps": 2}, {*LEARNED, "rates"})
_one("learning_rate", {"train.learning_rate": 2e-2}, {*LEARNED, "rates"})
_one("max_grad_norm", {"train.max_grad_norm": 1e-5})
_one("ema", {"train.ema": 0.9}, {"average"})
_one("seed", {"train.seed": 1}, DATA | {"levels", "noise", "texts", "begun"})
_one("batch_size", {"train.batch_size": 2}, DATA | {"levels", "noise", "texts", "told", "shares", "counts"})

# the adapter
_one("rank", {"lora.rank": 8}, {*LEARNED, "begun"})
_one("alpha", {"lora.alpha": 16.0})
_one("targets", {"lora.targets": "attention"}, {*LEARNED, "begun"})
_one("targets by pattern", {"lora.targets": ("single_transformer_blocks.[1-1]",)}, {*LEARNED, "begun"})
_one("rslora", {"lora.kind": "rslora"})
_values("lora.kind", "dora", "lokr", "loha", "oft", moves={*LEARNED, "begun"})
_one("t-lora", {"lora.kind": "t-lora"}, {*LEARNED, "begun"})
_one("factor", {"lora.factor": 4}, {*LEARNED, "begun"}, "lora.kind=lokr")
_one("min_rank", {"lora.min_rank": 1}, over="t-lora")
_one("dropout", {"lora.dropout": 0.5})
_one("ranks", {"lora.ranks": {"attention": 2}}, {*LEARNED, "begun"})
_one("init", {"lora.init": Path("own.safetensors")}, {*LEARNED, "begun"})
_one("preset", {"lora.preset": (Path("look.safetensors"),)})
_one("preset_scales", {"lora.preset_scales": (0.3,)}, over="preset")

# the base and where it lies
_values(
    "train.precision", "bf16", "int8", "fp8", "int4", "nf4", "int8-matmul", "fp8-matmul", moves={*LEARNED, "placed"}
)
_values("train.recompute", "selective", "full", 2, moves={"placed"})
_one("stream", {"cluster.strategy": "stream"}, {"placed"})
_one("micro_batch", {"cluster.micro_batch": 1}, {"passes"})
_one("rounded", {"cluster.rounded": Path("rounded")}, {"placed"}, "train.precision=int4")
_one("klein", {"model.path": Path("klein")}, TEXTS)

# pictures
_one("flip", {"data.0.flip": True}, DATA)
_one("resolutions", {"data.0.resolutions": (64, 32)}, DATA)
_one("upscale", {"data.0.upscale": True}, DATA)
_one("min_size", {"data.0.min_size": 70}, DATA)
_one("max_size", {"data.0.max_size": 250}, DATA)
_one("crop corner", {"data.0.crop": "corner"}, LEARNED | {"latents"})
_one("crop random", {"data.0.crop": "random"}, LEARNED | {"latents"})
_one("crop_variants", {"data.0.crop_variants": 2}, DATA, "crop random")
_values("data.0.crop_aspect", "square", "preserve", moves=DATA)
_one("bucket_min", {"data.0.bucket_min": 3}, DATA)
_one("masks", {"data.0.masks": Path("masks")}, {*LEARNED, "masks"})
_one("masked_prior", {"loss.masked_prior": 0.5}, {*LEARNED, "passes"}, "masks")
_one("references", {"data.0.references": (Path("looks"),)}, DATA | {"references"})
_one("two references", {"data.0.references": (Path("looks"), Path("masks"))}, DATA | {"references"})
_one("drop_references", {"data.0.drop_references": 0.9}, DATA | {"references"}, "references")
_one("reference_size", {"data.0.reference_size": 16}, DATA | {"references"}, "references")
_one("repeats", {"data.0.repeats": 2}, DATA)
_one("decoder", {"latents.decoder": "fast"}, LEARNED | {"latents"})
_one("latents.precision", {"latents.precision": "bf16"}, LEARNED | {"latents"})
_one("latents.dtype", {"latents.dtype": "bf16"}, LEARNED | {"latents"})
_one("background", {"latents.background": "#204060"}, LEARNED | {"latents"})

# captions
_one("filename", {"data.0.caption": "filename"}, DATA)
_one("default_caption", {"data.0.default_caption": "something"}, DATA)
_one("caption_edits", {"data.0.caption_edits": (("photo", "drawing"),)}, TEXTS)
_one("skip_captions", {"data.0.skip_captions": ("number 3",)}, DATA)
_one("caption_shuffles", {"data.0.caption_shuffles": 2}, TEXTS)
_one("trigger", {"data.0.trigger": "zwx"}, TEXTS)
_one("inject_trigger", {"data.0.inject_trigger": False}, TEXTS)
_one("text.dtype", {"text.dtype": "bf16"}, TEXTS)
_one("projected", {"text.stored": "projected"}, {"texts"})
_one("int8_rows", {"text.int8_rows": True}, TEXTS, "projected")
_one("quantize", {"text.quantize": "int8"}, TEXTS)
_one("max_length", {"text.max_length": 80}, TEXTS)
_one("pads computed", {"text.pads": "computed"}, set())
_one("pads stored", {"text.pads": "stored"}, set())

# two sets
CLASS = {"data.1.path": Path("class"), "data.1.regularisation": True, "data.1.resolutions": (64,)}
_one("regularisation", CLASS, DATA)
_one("prior", {"data.1.regularisation": "prior"}, {*LEARNED, "passes"}, "regularisation")
_one("weight", {"data.1.weight": 0.25}, {*LEARNED, "shares"}, "regularisation")
_one("curriculum", {"data.0.steps": (1, 2), "data.1.steps": (2, 3)}, DATA, "regularisation")


@dataclass(frozen=True)
class Refusal:
    """Options that exclude each other."""

    ones: tuple[str, ...]
    others: tuple[str, ...]
    says: str
    """In the message."""
    why: str


@dataclass(frozen=True)
class Excuse:
    """Options that, in some aspects, rightly do otherwise beside some others than alone."""

    ones: tuple[str, ...]
    others: tuple[str, ...]
    aspects: frozenset[str]
    why: str


HUBERS = ("delta", "delta exponential", "delta snr")
WEIGHTINGS = ("bell", "sigma-sqrt", "cosmap", "weighted")
FEWER = ("bf16", "int8", "fp8", "int4", "nf4", "int8-matmul", "fp8-matmul")
DISTRIBUTIONS = ("sigmoid", "logit-normal", "noise.distribution=linear", "beta", "mode", "cubic", "levels")
CURVES = ("linear", "cosine", "cosine-restarts", "polynomial")
NOT_THIN = tuple(f"lora.kind={kind}" for kind in ("dora", "lokr", "loha", "oft"))
REFUSED = [
    Refusal(HUBERS, ("loss.kind=mae", "loss.kind=wavelet"), "is for kind=", "these losses have no delta"),
    Refusal(
        ("gamma",), tuple(f"loss.weighting={each}" for each in WEIGHTINGS),
        "gamma is for weighting=", "only min-snr has a bound",
    ),
    Refusal(
        ("gamma", "loss.weighting=min-snr", *(f"loss.weighting={each}" for each in WEIGHTINGS)),
        ("noise.distribution=weighted",), "brings its own weights", "levels would be weighted twice",
    ),
    Refusal(
        ("logit-normal",), ("noise.distribution=linear", "noise.distribution=weighted"),
        "has no parameters", "parameters of another distribution",
    ),
    Refusal(
        ("train.optimizer=schedule-free",), ("ema", *(f"train.schedule={curve}" for curve in CURVES)),
        "averages by itself", "its average takes the place of both",
    ),
    Refusal(
        ("init",), ("rank", "ranks", "targets", "targets by pattern", *NOT_THIN, "factor"),
        "lora.init", "the file has another shape",
    ),
    Refusal(("dropout",), (*NOT_THIN[1:], "factor"), "takes no dropout", "they have no ranks to leave out"),
    Refusal(("alpha",), ("lora.kind=oft",), "takes no alpha", "a rotation has no strength"),
    Refusal(("preset", "preset_scales"), ("lora.kind=dora", "lora.kind=oft"), "takes no preset", "none joins them"),
    Refusal(
        ("factor",), ("rslora", "t-lora", "lora.kind=dora", "lora.kind=loha", "lora.kind=oft"),
        "takes no factor", "lokr's own",
    ),
    Refusal(("min_rank",), ("rslora", *NOT_THIN), "takes no min_rank", "t-lora's own"),
    Refusal(
        ("stream",), ("train.recompute=selective", "train.recompute=2"),
        "brings each block's weights twice", "what is kept would need the weights too",
    ),
    Refusal(
        ("pairs", "preference_beta"),
        ("contrastive", "contrastive range", "contrastive_schedule", "contrastive_zero_star", "differential"),
        "is for single pictures", "pairs have no target that could be moved",
    ),
    Refusal(("pairs", "preference_beta"), ("tread",), "take no routes", "its passes know of none"),
    Refusal(
        ("pairs", "preference_beta"), ("rollout", "rollout.steps", "reflexflow"),
        "has no noise that could be reached", "both pictures of a pair share one noise",
    ),
    Refusal(("pairs", "preference_beta"), ("masked_prior",), "no data set has any", "masks of pairs are of both"),
    Refusal(("crop_variants",), ("crop corner",), "crop_variants=2 needs", "crops at one place are all the same"),
]  # fmt: skip
EXCUSED = [
    Excuse(("seed", "rslora", "alpha", "t-lora"), ("init",), frozenset({"begun"}), "a file carries its own weights"),
    Excuse(("klein",), ("lora.kind=dora",), frozenset({"begun"}), "its sizes are those of the base's weights"),
    Excuse(
        ("references", "two references", "reference_size", "drop_references"), tuple(OPTIONS),
        frozenset({"samples", "latents", "texts"}), "shapes decide which batch a sample is in, and it may be the same",
    ),
    Excuse(("masked_prior",), ("curriculum",), LEARNED, "masked pictures come in the first step alone"),
    Excuse(
        ("guidance", "guidance range"), ("klein",), LEARNED, "it has no guidance embedding: `train.guidance` says so",
    ),
    Excuse(("class_name",), ("blank",), LEARNED, "the class is read by dop alone"),
    Excuse(("regularisation",), ("pairs", "preference_beta"), frozenset({"passes"}), "its pictures take their own"),
    Excuse(
        tuple(f"train.precision={each}" for each in FEWER), ("lora.kind=dora",), frozenset({"begun"}),
        "its sizes are those of the base's weights as they are rounded",
    ),
    Excuse(
        ("micro_batch", "projected"), ("train.precision=bf16",), LEARNED,
        "sums of another order are rounded otherwise, to 8 bits: 1 in 400 of the adapter",
    ),
    Excuse(("micro_batch",), ("train.precision=int8-matmul",), LEARNED, "so are the numbers that it multiplies"),
    Excuse(("train.recompute=full",), ("stream",), frozenset({"placed"}), "what streaming does by itself"),
    Excuse(DISTRIBUTIONS, ("noise of a set",), LEVELS, "the set's own distribution takes its place"),
    Excuse(("noise of a set",), DISTRIBUTIONS, frozenset({"noise"}), "what is drawn before a level may be as much"),
    Excuse(
        ("latents.dtype", "latents.precision"), ("references", "two references", "reference_size", "drop_references"),
        frozenset({"references"}), "they are encoded as pictures are",
    ),
    Excuse(("seed",), ("guidance range",), frozenset({"told"}), "what the model is told is drawn"),
    Excuse(
        ("data.0.crop_aspect=square", "data.0.crop_aspect=preserve", "bucket_min"),
        ("data.0.crop_aspect=square", "data.0.crop_aspect=preserve", "bucket_min"), DATA,
        "what three of these pictures have in common is the square, one way or the other",
    ),
    Excuse(
        ("data.0.crop_aspect=preserve",), ("regularisation", "prior", "weight", "curriculum"), DATA,
        "what it cuts otherwise, tall pictures, does not come in these three steps; with another seed it is seen",
    ),
    Excuse(
        ("pads computed", "pads stored"),
        ("train.precision=bf16", "train.precision=int8-matmul", "train.precision=fp8-matmul"), LEARNED,
        "rows that differ in their seventh digit are rounded to a neighbour, of 8 bits or fewer",
    ),
    Excuse(("data.0.crop_aspect=preserve",), ("max_size",), DATA, "it leaves the tall pictures out"),
    Excuse(("upscale",), ("min_size",), DATA, "it leaves the small picture out"),
    Excuse(("upscale",), ("two references",), DATA, "the small picture does not come in these three steps"),
    Excuse(("default_caption",), ("filename",), DATA, "every picture has a name"),
    Excuse(("filename",), ("default_caption",), frozenset({"samples", "latents"}), "both take the picture without one"),
    Excuse(("skip_captions",), ("min_size",), DATA, "it leaves the same picture out"),
    Excuse(
        ("pads computed", "pads stored"), ("text.dtype",), TEXTS,
        "what is computed in bf16 at another length is rounded otherwise",
    ),
    Excuse(
        ("dop", "blank", "preservation_weight", "class_name"), ("curriculum",), LEARNED,
        "captions of the concept come in the first step alone, before there is anything to preserve",
    ),
    Excuse(("inject_trigger",), ("curriculum",), TEXTS, "captions without a trigger do not come in the first step"),
    Excuse(
        ("prior", "masked_prior"), ("prior", "masked_prior"), frozenset({"passes"}),
        "one pass of the base model serves both",
    ),
    Excuse(("batch_size",), ("micro_batch",), frozenset({"passes"}), "each sample is a pass"),
    Excuse(("caption_edits",), ("filename",), TEXTS, "no name holds what it edits"),
    Excuse(
        tuple(f"train.schedule={curve}" for curve in CURVES), ("warmup",), LEARNED | {"rates"},
        "of three steps two warm up, and the third is the curve's first",
    ),
    Excuse(("projected",), ("text.dtype",), LEARNED, "its rows are rounded behind the projection, not before"),
    Excuse(
        ("max_size",), ("regularisation", "prior", "weight", "curriculum"), DATA,
        "what it leaves out, tall pictures, does not come in these three steps",
    ),
    Excuse(("warmup",), ("prior",), LEARNED, "the step that warms up is of pictures that teach nothing yet"),
    Excuse(("gamma",), ("noise.shift=flux2",), COUNTS, "levels so near to pure noise are under either bound"),
    Excuse(("skip_captions",), ("filename",), DATA, "no name holds what it leaves out"),
    Excuse(("caption_shuffles",), ("filename",), TEXTS, "a name has no parts"),
    Excuse(("noise.distribution=weighted",), ("noise of a set",), LEVELS | COUNTS, "the set's own takes its place"),
    Excuse(("noise of a set",), ("noise.distribution=weighted",), frozenset({"noise"}), "as of the others"),
    Excuse(("seed",), ("rollout", "reflexflow"), frozenset({"passes"}), "how many steps lead to a level is drawn"),
]  # fmt: skip
APART = {  # keys, and values of choices, that are in no record
    "train.steps": "how long: with its first steps alone nothing is otherwise but schedules, which are in records",
    "train.epochs": "become `train.steps` before a trainer is made",
    **dict.fromkeys(
        ("slider.target", "slider.positive", "slider.negative", "slider.anchor"),
        "without pictures: what is for them is refused by name (test_slider.py)",
    ),
    "data[].preferred": "a data set's path by another name, or a column",
    "train.compile": "a minute of compiling for each; beside a few others in `test_compiled_beside`",
    "data[].check_images": "what `plan` opens; no row depends on it",
    "text.tokens": "other ids for the same captions, of a vocabulary that the small model has not",
    "latents.dtype=fp32": "what the plain run here has",
    "text.dtype=fp32": "the same",
    "data[].reference_size=target": "as a number, for each picture its own",
    "text.dtype=fp16": "other bits of the same rows, as of bf16",
    "text.quantize=fp8": "the same, as of int8",
    "text.quantize=int4": "the same, as of int8",
    "train.optimizer=adamw-8bit": "its library is for cards, and not installed here",
    "train.precision=fp32": "what `auto` is on a CPU",
    "train.recompute=none": "the same",
}
