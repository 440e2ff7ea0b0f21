"""The records: every method, what is set over plain training, and what is claimed of the embedded model's drawings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Effect:
    """One method against plain training of the same lesson at the same seeds."""

    name: str
    sets: tuple[str, ...]
    """Overrides of the configuration that are the method."""
    measure: str = "rooks"
    """Of `bench.lessons.MEASURES`."""
    claims: Literal["more", "less", "kept"] | None = None
    """Of plain's figure, at every seed, by `margin` at least; `kept`: no less by more than it. None: nothing holds."""
    margin: float = 0.0
    lesson: str = "rooks"
    plain: tuple[str, ...] = ()
    """Overrides of both."""
    beside: str = ""
    """Lesson whose plain step the cost is measured against, where it is another one."""
    note: str = ""

    @property
    def said(self) -> str:
        """The claim in words."""
        if self.claims is None:
            return "no effect measured"
        return f"at most {self.margin:g} less" if self.claims == "kept" else f"{self.claims} by {self.margin:g}"

    def holds(self, plain: float, with_it: float) -> bool:
        """Whether what is claimed is so at a seed."""
        more = with_it - plain
        return {"more": more >= self.margin, "less": -more >= self.margin, "kept": more >= -self.margin}[self.claims]


LONG = ("train.steps=80",)
BASE = "plain is the base model, its step one on rooks"
FAST = ("train.learning_rate=1e-2",)  # of kinds that move less at a rate
UNSHIFTED = ("noise.shift=none",)
ALONE = "rooks alone"  # learned faster, others being lost
LOGIT = (*UNSHIFTED, "noise.distribution=logit-normal")
EFFECTS = (
    Effect("logit-normal", ("noise.distribution=logit-normal",), plain=UNSHIFTED, claims="less", margin=0.04),
    Effect("logit-normal, more noise", ("noise.parameters=[1.5, 1.0]",), plain=LOGIT, claims="more", margin=0.15),
    Effect("weighted", ("noise.distribution=weighted",), plain=UNSHIFTED, claims="kept", margin=0.25),
    Effect("beta", ("noise.distribution=beta", "noise.parameters=[4.0, 1.5]"),
           plain=UNSHIFTED, claims="kept", margin=0.2),
    Effect("mode", ("noise.distribution=mode", "noise.parameters=[-0.8]"), plain=UNSHIFTED, claims="kept", margin=0.25),
    Effect("cubic", ("noise.distribution=cubic", "noise.parameters=[0.0, 0.5, 1.0]"),
           plain=UNSHIFTED, claims="kept", margin=0.2),
    Effect("levels", ("noise.distribution=levels", "noise.parameters=[4]", "noise.shift=7.0"), "rooks in 4 steps",
           plain=UNSHIFTED, claims="more", margin=0.15),
    Effect("shift, a number", ("noise.shift=3.0",), plain=LOGIT, claims="more", margin=0.15),
    Effect("shift by tokens", ("noise.shift=tokens",), plain=LOGIT, claims="more", margin=0.04),
    Effect("shift of FLUX.2", ("noise.shift=flux2",), plain=LOGIT, claims="more", margin=0.15),
    Effect("bias to content", ("noise.bias=content",), plain=UNSHIFTED, claims="more", margin=0.05),
    Effect("bias to style", ("noise.bias=style",), plain=UNSHIFTED, claims="less", margin=0.2),
    Effect("range, noisy", ("noise.range=[0.5, 1.0]",), plain=UNSHIFTED, claims="kept", margin=0.1),
    Effect("range, clear", ("noise.range=[0.0, 0.5]",), claims="less", margin=0.25),
    Effect("noise of one data set", ("data.0.noise={range=[0.0, 0.5]}",), claims="less", margin=0.25),
    Effect("stratified", ("noise.stratified=true",), "unrest of the loss"),
    Effect("mae", ("loss.kind=mae",), claims="kept", margin=0.2, lesson=ALONE),
    Effect("smooth-l1", ("loss.kind=smooth-l1", "loss.delta=0.5"), claims="kept", margin=0.2, lesson=ALONE),
    Effect("huber", ("loss.kind=huber", "loss.delta_schedule=exponential"), claims="kept", margin=0.2, lesson=ALONE),
    Effect("pseudo-huber", ("loss.kind=pseudo-huber", "loss.delta_schedule=snr"),
           claims="kept", margin=0.2, lesson=ALONE),
    Effect("wavelet", ("loss.kind=wavelet",), lesson=ALONE),
    Effect("bell", ("loss.weighting=bell",), claims="kept", margin=0.2, lesson=ALONE),
    Effect("min-snr", ("loss.weighting=min-snr", "loss.gamma=5.0"), lesson=ALONE, claims="less", margin=0.2),
    Effect("sigma-sqrt", ("loss.weighting=sigma-sqrt",), lesson=ALONE),
    Effect("cosmap", ("loss.weighting=cosmap",), claims="kept", margin=0.2, lesson=ALONE),
    Effect("weighting by AI Toolkit's table", ("loss.weighting=weighted",), claims="kept", margin=0.2, lesson=ALONE),
    Effect("contrastive guidance", ("loss.contrastive_guidance=3.0",),
           "rooks' distance from no prompt", claims="more", margin=0.005),
    Effect("contrastive guidance, drawn", ("loss.contrastive_guidance=[2.0, 4.0]", "loss.contrastive_schedule=sigma"),
           "rooks' distance from no prompt", claims="more", margin=0.005),
    Effect("contrastive guidance, zero star", ("loss.contrastive_guidance=3.0", "loss.contrastive_zero_star=true"),
           "rooks' distance from no prompt", claims="more", margin=0.005),
    Effect("differential guidance", ("loss.differential_guidance=3.0",), lesson=ALONE, claims="kept", margin=0.1),
    Effect("guidance from a range", ("train.guidance=[1.0, 10.0]",), "rooks at guidance 10",
           claims="kept", margin=0.2, lesson=ALONE),
    Effect("prior", ("data.1.regularisation=prior",), "others hatched",
           lesson="rooks beside hatched pictures", claims="less", margin=0.25),
    Effect("prior, rooks", ("data.1.regularisation=prior",),
           lesson="rooks beside hatched pictures", claims="kept", margin=0.2),
    Effect("masked prior", ("loss.masked_prior=1.0",), "backgrounds of rooks",
           lesson="rooks by masks", claims="more", margin=0.5),
    Effect("masked prior, rooks", ("loss.masked_prior=1.0",), lesson="rooks by masks", claims="less", margin=0.3),
    Effect("dop", ("train.preservation=dop",), "others as before", lesson=ALONE, claims="more", margin=0.1),
    Effect("dop, rooks", ("train.preservation=dop",), lesson=ALONE, claims="kept", margin=0.2),
    Effect("blank", ("train.preservation=blank",), "no prompt as before", lesson=ALONE, claims="more", margin=0.1),
    Effect("blank, others", ("train.preservation=blank",), "others as before", lesson=ALONE),
    Effect("blank, rooks", ("train.preservation=blank",), lesson=ALONE, claims="kept", margin=0.2),
    Effect("curriculum, first", ("data.0.steps=[1, 40]", "data.1.steps=[41, 80]"), lesson="rooks and knights",
           plain=LONG, claims="less", margin=0.5),
    Effect("curriculum, second", ("data.0.steps=[1, 40]", "data.1.steps=[41, 80]"), "knights",
           lesson="rooks and knights", plain=LONG, claims="kept", margin=0.1),
    Effect("trigger alone", ("train.trigger_dropout=1.0",), "purple of the word alone",
           lesson=ALONE, plain=LONG, claims="more", margin=0.03),
    Effect("blank captions", ("train.caption_dropout=1.0",), "purple of no prompt",
           lesson=ALONE, plain=LONG, claims="more", margin=0.4),
    Effect("preset", ('lora.preset=["rooks.safetensors"]',), "rooks without the preset", lesson="rooks and knights",
           plain=LONG, claims="less", margin=0.5),
    Effect("preset, knights", ('lora.preset=["rooks.safetensors"]',), "knights", lesson="rooks and knights",
           plain=LONG, claims="kept", margin=0.1),
    Effect("rslora", ("lora.kind=rslora",), plain=("lora.alpha=2",), claims="more", margin=0.2),
    Effect("dora", ("lora.kind=dora",), claims="kept", margin=0.2, lesson=ALONE),
    Effect("lokr", ("lora.kind=lokr", "lora.factor=8", *FAST, *LONG), lesson=ALONE, claims="kept", margin=0.2),
    Effect("loha", ("lora.kind=loha", "lora.rank=8", "lora.alpha=80", *FAST), claims="kept", margin=0.2, lesson=ALONE),
    Effect("oft", ("lora.kind=oft", *LONG), lesson=ALONE, claims="kept", margin=0.25),
    Effect("t-lora", ("lora.kind=t-lora", "lora.min_rank=8"), claims="kept", margin=0.2, lesson=ALONE),
    Effect("dropout", ("lora.dropout=0.2",), claims="kept", margin=0.2, lesson=ALONE),
    Effect("ranks", ("lora.ranks={mlp=4}",), claims="kept", margin=0.2, lesson=ALONE),
    Effect("init", ('lora.init="rooks.safetensors"',), plain=("train.steps=5",), claims="more", margin=0.3),
    Effect("ema", ("train.ema=0.9",), "others as before"),
    Effect("ema, rooks", ("train.ema=0.9",), claims="kept", margin=0.1),
    Effect("blocks", ('lora.targets=["single_transformer_blocks.[0-3]"]',), lesson=ALONE, claims="less", margin=0.3),
    Effect("tread", ("tread.routes=[{skip=0.5, start=2, end=-2}]",), lesson=ALONE, claims="less", margin=0.1),
    Effect("rollout", ("rollout.probability=0.5", "rollout.steps=2"), lesson=ALONE, claims="kept", margin=0.2),
    Effect("rollout by ReflexFlow", ("rollout.probability=0.5", "rollout.steps=2", "rollout.reflexflow=true"),
           lesson=ALONE, claims="kept", margin=0.25),
    Effect("preference pairs", ("train.steps=40",), "large shapes", "more", 0.3, lesson="pairs of sizes",
           plain=("train.steps=0",), beside="rooks", note=BASE),
    Effect("slider", ("train.steps=120",), "sizes that grow with strength", "more", 0.7, lesson="a slider of size",
           plain=("train.steps=0",), beside="rooks", note=BASE),
    Effect("edit", ("train.steps=500",), "recoloured references", "more", 0.7, lesson="recolouring",
           plain=("train.steps=0", "train.batch_size=8"), beside="rooks", note=BASE),
)  # fmt: skip

NO_METHOD = (  # sections that change no step's target
    "",
    "model",
    "text",
    "latents",
    "validate",
    "validate.prompt[]",
    "cluster",
    "output",
)
NO_RECORD = {  # keys, or single values of one, that have no record, by the reason
    "which pictures and captions there are; tests/flux2_core/data": (
        "data[].path", "data[].caption", "data[].default_caption", "data[].caption_edits", "data[].skip_captions",
        "data[].caption_shuffles", "data[].trigger", "data[].inject_trigger", "data[].class_name", "data[].resolutions",
        "data[].upscale", "data[].min_size", "data[].max_size", "data[].crop", "data[].crop_variants",
        "data[].crop_aspect", "data[].bucket_min", "data[].flip", "data[].repeats", "data[].check_images",
        "data[].reference_size", "data[].drop_references",
    ),
    "of any method, how much of it, how fast and how it is placed; tests/flux2_core/train": (
        "train.steps", "train.batch_size", "train.learning_rate", "train.optimizer", "train.weight_decay",
        "train.schedule", "train.warmup_steps", "train.max_grad_norm", "train.pad_rows", "train.precision",
        "train.recompute", "train.compile", "train.seed", "train.epochs", "lora.rank",
    ),
    "factors, which tests hold to the bit": ("data[].weight", "lora.preset_scales", "train.preservation_weight"),
    "what a slider leaves as it is; tests/flux2_core/train/test_slider.py": ("slider.anchor",),
    "what plain training here draws": ("noise.distribution=linear",),
    "logit-normal's name in other trainers: one function": ("noise.distribution=sigmoid",),
}  # fmt: skip
