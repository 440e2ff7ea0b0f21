"""Section of a slider: what a LoRA's strength shall turn up and down, told in prompts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import field_validator, model_validator

from flux2_core.config.dataset import Data
from flux2_core.config.section import Section

SLIDER_STEPS = 4  # of the base model from pure noise to where a step trains: the shape is there, for 4 passes a step
TAKEN = frozenset({"path", "resolutions", "repeats", "weight", "steps", "noise"})  # of a data set

TURNED = ("lora", "rslora")  # kinds whose update is multiplied by a strength


class Slider(Section):
    """`[slider]`: a LoRA that does more of something at strength 1 and less at -1; needs no picture."""

    target: str | None = None
    """What it is for, the prompt that is trained on ("a person"): with it, a slider is what is trained."""
    positive: str | None = None
    """The same with more of it ("an old person"): what strength 1 makes of `target`."""
    negative: str | None = None
    """The same with less of it ("a young person"): strength -1."""
    anchor: tuple[str, ...] = ()
    """A prompt or several that strength must not change ("a house"). Three passes more a step."""

    @field_validator("anchor", mode="before")
    @classmethod
    def _one(cls, anchor: object) -> object:
        return (anchor,) if isinstance(anchor, str) else anchor

    @model_validator(mode="after")
    def _whole(self) -> Slider:
        told = {"target": self.target, "positive": self.positive, "negative": self.negative}
        lacking = [name for name, text in told.items() if not text]
        if (lacking and len(lacking) < len(told)) or (lacking and self.anchor):
            raise ValueError(f"a slider is told by target, positive and negative: set slider.{lacking[0]}")
        if not lacking and self.positive == self.negative:
            raise ValueError(f"positive and negative are both {self.positive!r}: nothing would be learned")
        return self

    @property
    def texts(self) -> dict[str, str]:
        """Its prompts by role; nothing where there is no slider."""
        told = {"positive": self.positive, "negative": self.negative, "target": self.target}
        anchors = {f"anchor{place}": text for place, text in enumerate(self.anchor)}
        return {f"slider_{name}": text for name, text in {**told, **anchors}.items() if text}


def in_place(tree: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with the data sets of a slider, which have no place: one, where none is told of."""
    slider, data = tree.get("slider"), tree.get("data", [{}])
    if not isinstance(slider, dict) or not slider.get("target") or not isinstance(data, list | tuple):
        return tree
    return tree | {"data": [{"path": ""} | one if isinstance(one, dict) else one for one in data]}


def refusal(slider: Slider, sets: Sequence[Data], *, captions: bool, kind: str) -> str | None:
    """What does not go with a slider, or without one, in a sentence; None where all does.

    Args:
        slider: `[slider]`.
        sets: `data`.
        captions: Whether something is set that is for captions.
        kind: `lora.kind`.
    """
    for place, data in enumerate(sets):
        if not slider.texts and not data.path:
            return f"data.{place}.path: nothing is given; without [slider] pictures are needed"
        changed = (name for name in Data.model_fields if name not in TAKEN and getattr(data, name) != default(name))
        if slider.texts and (key := "path" if data.path else next(changed, None)):
            return f"data.{place}.{key} is for pictures, and a slider makes its own: leave it out"
    if slider.texts and captions:
        return "train.preservation, caption_dropout: a slider has no captions; set slider.anchor"
    if slider.texts and kind not in TURNED:
        return f'lora.kind="{kind}" has no strength of -1: a slider takes {" or ".join(TURNED)}'
    return None


def default(name: str) -> object:
    """What a key of a data set is where it is not given."""
    return Data.model_fields[name].default
