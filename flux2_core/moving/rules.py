"""Rules: how a value of another trainer becomes one of ours, where it is not the same or another word for it.

A rule is given the value and what stands beside it (of its data set first), by the names of the tables. It returns our
value, or several by our keys (none: another option says it), or an `Answer`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flux2_core.config.adapter import Lora
from flux2_core.lora import targets
from flux2_core.moving.commands import COMPUTED, NOT_SET
from flux2_core.placement.planner import Sizes

Near = Mapping[str, Any]
D = "datasets[]."
PAIRS = (("height", "width"), ("sample.height", "sample.width"), ("sample_prompts line --h", "sample_prompts line --w"))
BATCH = (  # is multiplied, of each the first that stands there
    (f"{D}train_batch_size", f"{D}batch_size", "general.batch_size", "train_batch_size", "train.batch_size"),
    ("gradient_accumulation_steps", "train.gradient_accumulation", "train.gradient_accumulation_steps"),
    ("num_processes",),
)
LINEARS = list(Sizes(1, 1, 1, double=8, single=48, double_parameters=1, single_parameters=1, outside=1).linears())
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
OFF = ("false", "0", "none")


class Answer(str):
    """Why there is no value."""

    __slots__ = ()


def number(value: Any) -> float:
    """A number, however it was written (YAML reads 1e-4 as text).

    Raises:
        ValueError: it is none.
    """
    found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"{value} is no number")
    return int(found) if found == int(found) else found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _first(near: Near, *names: str, default: Any = None) -> Any:
    return next((near[name] for name in names if near.get(name) is not None), default)


def _sixteen(side: float) -> int:
    return max(16, round(side / 16) * 16)


def _batch(_: Any, near: Near) -> Any:
    """Pictures of a step over all workers and passes."""
    return math.prod(int(number(_first(near, *names, default=1))) for names in BATCH)


def _rate(value: Any, near: Near) -> Any:
    """As it was used: multiplied by the batch where that was asked for."""
    size = _batch(None, near) if near.get("scale_lr") or near.get("lr_scale") else 1
    return number(value) * (math.sqrt(size) if near.get("lr_scale_sqrt") else size)


def _warmup(value: Any, near: Near) -> Any:
    """Under 1 it is a share of all steps."""
    steps = number(value)
    return steps if steps >= 1 or not steps else round(steps * number(near.get("max_train_steps") or 0))


def _length(value: Any, near: Near) -> Any:
    overruled = near.get("max_train_steps") and not near.get("max_train_epochs")
    return Answer("its number of steps holds (train.steps)") if overruled or number(value) < 1 else number(value)


def _by_epochs(value: Any, _: Near) -> Any:
    return "epoch" if number(value) == 1 else Answer('an interval is "epoch", or a number of steps or samples')


def _side(value: Any, near: Near, unit: str = "pixel") -> Any:
    """A side from one number in whatever unit it has there, or from `WxH`."""
    text = str(value).lower().split(",")[0]
    pair = [number(part) for part in text.split("x")]
    area = _first(near, f"{D}resolution_type", "resolution_type", default=unit) == "area"
    return _sixteen(math.sqrt(math.prod(pair)) if len(pair) == 2 else 1024 * math.sqrt(pair[0]) if area else pair[0])


def _sides(value: Any, near: Near) -> Any:
    return list(dict.fromkeys(_side(each, near) for each in _listed(value)))


def _box(value: Any, near: Near) -> Any:
    """A width and a height, or one number for both."""
    return [_side("x".join(map(str, value)) if isinstance(value, list) else value, near)]


def _rectangle(value: Any, near: Near) -> Any:
    """The side of a square of as many pixels as a height and a width make."""
    pair = next((pair for pair in PAIRS if {*pair} & near.keys()), ())
    return _sixteen(math.sqrt(math.prod(number(near.get(name) or value) for name in pair)))


def _pixels(value: Any, near: Near) -> Any:
    area = _first(near, f"{D}resolution_type", "resolution_type") == "area"
    return _side(value, near) if area else number(value)


def _timesteps(_: Any, near: Near) -> Any:
    """Levels from timesteps of a thousand, which AI Toolkit counts from pure noise."""
    ends = [number(near.get(f"train.{end}_denoising_steps", usual)) for end, usual in (("max", 999), ("min", 0))]
    low, high = 1 - (ends[0] + 1) / 1000, 1 - ends[1] / 1000
    if {"min_timestep", "max_timestep"} & near.keys():
        low, high = number(near.get("min_timestep") or 0) / 1000, number(near.get("max_timestep") or 1000) / 1000
    return [round(max(0.0, low), 4), round(min(1.0, high), 4)]


def _levels(value: Any, _: Near) -> Any:
    levels = [number(part) for part in (value if isinstance(value, list) else str(value).split(","))]
    return {"noise.distribution": "levels", "noise.parameters": [n / 1000 if max(levels) > 1 else n for n in levels]}


def _guidance(_: Any, near: Near) -> Any:
    ends = [number(near.get(f"flux_guidance_{end}", usual)) for end, usual in (("min", 0.0), ("max", 4.0))]
    drawn = near.get("flux_guidance_mode") == "random-range"
    return ends if drawn else Answer("it is constant: train.guidance is its value")


def _chosen(names: list[str], pattern: str) -> Any:
    """A preset, where some Linears are just its own; else an expression."""
    if not names:
        return Answer("no Linear of FLUX.2's blocks has such a name")
    return next((key for key in targets.PRESETS if targets.match(Lora(targets=key), LINEARS) == names), [pattern])


def _layers(value: Any, _: Near) -> Any:
    """Linears whose names end in one of some, as peft takes them."""
    ends = [part.strip() for each in _listed(value) for part in str(each).split(",") if part.strip()]
    found = [name for name in LINEARS if any(f".{name}".endswith(f".{end}") for end in ends)]
    wanted = [re.escape(end) for end in ends if any(f".{name}".endswith(f".{end}") for name in found)]
    return _chosen(found, f"(single_)?transformer_blocks\\.(.*\\.)?({'|'.join(wanted)})")


def _containing(value: Any, _: Near) -> Any:
    """Linears with one of some texts in their names, those of BFL or of diffusers."""
    texts = [re.sub(r"double_blocks", "transformer_blocks", str(text)) for text in _listed(value)]
    texts = [re.sub(r"single_blocks", "single_transformer_blocks", t).removeprefix("transformer.") for t in texts]
    found = [name for name in LINEARS if any(text in name for text in texts)]
    wanted = [re.escape(text) for text in texts if any(text in name for name in found)]
    return _chosen(found, f"(?=.*({'|'.join(wanted)})).*")


def _name(value: Any, _: Near) -> Any:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-._")[:100] or Answer("it has no letter of a file name")


def _place(value: Any, near: Near) -> Any:
    """A folder of results as a run below a root."""
    folder = Path(str(value).rstrip("/"))
    return {"output.root": str(folder.parent) if folder.parent.name else "runs", "run": _name(folder.name, near)}


def _metadata(value: Any, near: Near) -> Any:
    file, base = Path(str(value)), near.get("dataset_base_path")
    if file.name not in METADATA or (base and file.parent != Path(str(base))):
        return Answer(f"put it into the folder of the pictures, called {' or '.join(METADATA)}")
    return {"data[].path": str(file.parent)} | ({"data[].caption": "column:prompt"} if base else {})


def _hub_data(value: Any, _: Near) -> Any:
    """A data set of the hub: where it is downloaded to first."""
    return str(value) if Path(str(value)).is_dir() else f"data/{Path(str(value)).name}"


def _bucket(_: Any, near: Near) -> Any:
    return f"s3://{near.get(f'{D}aws_bucket_name')}/{near.get(f'{D}aws_data_prefix') or ''}".rstrip("/")


def _hub_id(value: Any, _: Near) -> Any:
    """Of ids with patterns of files that of the transformer."""
    parts = [part.partition(":") for part in str(value).split(",")]
    return next((model.strip() for model, _, files in parts if "transformer" in files), parts[0][0].strip())


def _folder(value: Any, _: Near) -> Any:
    """The model's folder, from a file in its transformer/."""
    found = re.search(r"([^\"]+)/transformer/", value if isinstance(value, str) else json.dumps(value))
    return found[1] if found else Answer("a single file is not read: model.path is a folder of parts, or a hub id")


def _fp8_models(value: Any, _: Near) -> Any:
    keys = {"transformer": "train.precision", "text_encoder": "text.quantize"}
    return {key: "fp8" for part, key in keys.items() if part in str(value)}


def _prompts(value: Any, near: Near) -> Any:
    """Without the flags that AI Toolkit has in them."""
    subject = _first(near, "instance_prompt", f"{D}instance_prompt", default="<subject>")
    texts = [each.get("prompt", "") if isinstance(each, dict) else str(each) for each in _listed(value)]
    return [re.split(r"\s--[a-z]", text.replace("<subject>", str(subject)))[0].strip() for text in texts if text]


def _reference_prompt(value: Any, near: Near) -> Any:
    text = _first(near, "sample.samples[].prompt", "sample_prompts", "validation_prompt", default="")
    return {"validate.prompt[].text": str(text), "validate.prompt[].references": [str(value)]}


def _prompt(value: Any, near: Near) -> Any:
    """One caption for all pictures; a single word is their trigger, or their class."""
    text, word = str(value).strip(), ("class", "class_name") if near.get("class_prompt") == value else ("trigger",) * 2
    return {"data[].caption": text} if " " in text else {"data[].caption": f"[{word[0]}]", f"data[].{word[1]}": text}


def _strategy(_: Any, near: Near) -> Any:
    """Where SimpleTuner's captions come from."""
    said = str(_first(near, f"{D}caption_strategy", "caption_strategy", default="filename")).replace("_", "")
    if said == "instanceprompt" or near.get(f"{D}only_instance_prompt"):
        return _prompt(_first(near, f"{D}instance_prompt", "instance_prompt", default="photo"), near)
    column = _first(near, f"{D}parquet.caption_column", "parquet_caption_column", default="caption")
    text = "textfile" if near.get(f"{D}disable_multiline_split") else "lines"
    found = {"textfile": text, "filename": "filename", "parquet": f"column:{column}"}
    return {"data[].caption": found.get(said, "auto")}


def _crop_aspect(_: Any, near: Near) -> Any:
    said = str(near.get(f"{D}crop_aspect", "square")) if near.get(f"{D}crop") else "preserve"
    return {"random": "closest"}.get(said, said)


def _span(_: Any, near: Near) -> Any:
    last = near.get(f"{D}end_step") or near.get("max_train_steps") or 1000
    return [max(1, int(number(near.get(f"{D}start_step") or 0))), int(number(last))]


def _replacements(value: Any, _: Near) -> Any:
    """`a|b`, `s/a/b/`, or what is taken out."""
    cuts = [(re.split(r"(?<!\\)/", str(each)), str(each).partition("|")) for each in _listed(value)]
    return [[f"/{c[1]}/", c[2]] if c[0] == "s" and len(c) == 4 else [pair[0], pair[2]] for c, pair in cuts]


def _decay(value: Any, _: Near) -> Any:
    pairs = dict(str(each).partition("=")[::2] for each in _listed(value))
    return number(pairs["weight_decay"]) if "weight_decay" in pairs else Answer("constants are those of its library")


RULES: dict[str, Callable[[Any, Near], Any]] = {
    "area": lambda value, near: (
        Answer("height and width hold") if near.get("height") else [_sixteen(number(value) ** 0.5)]
    ),
    "batch": _batch,
    "box": _box,
    "bucket": _bucket,
    "by_epochs": _by_epochs,
    "column": lambda value, _: f"column:{_listed(value)[0]}",
    "containing": _containing,
    "crop_aspect": _crop_aspect,
    "cubic": lambda value, _: {
        "noise.distribution": "cubic",
        "noise.parameters": json.loads(value) if isinstance(value, str) else value,
    },
    "decay": _decay,
    "extra": lambda value, _: number(value) + 1,  # repeats beyond the first time
    "folder": _folder,
    "fp8_models": _fp8_models,
    "given": lambda value, _: dict(value),  # the reader found it
    "guidance": _guidance,
    "prior": lambda value, _: "prior" if str(value).lower() in ("true", "1") else Answer("off, as it is here"),
    "hub_data": _hub_data,
    "hub_id": _hub_id,
    "layers": _layers,
    "length": _length,
    "levels": _levels,
    "metadata": _metadata,
    "name": _name,
    "negated": lambda value, _: -number(value),  # counted from the other end of the noise
    "pixels": _pixels,
    "place": _place,
    "prompt": _prompt,
    "prompts": _prompts,
    "rate": _rate,
    "rectangle": _rectangle,
    "reference_prompt": _reference_prompt,
    "replacements": _replacements,
    "seed": lambda value, _: number(value) if number(value) >= 1 else Answer("drawn by chance there; here it is fixed"),
    "shift": lambda value, _: number(value) if number(value) not in (0, 1) else "none",
    "side": _side,
    "sides": _sides,
    "span": _span,
    "steps": lambda value, near: Answer("its epochs hold") if near.get("max_train_epochs") else number(value),
    "strategy": _strategy,
    "switch": lambda value, _: {} if str(value).lower() not in OFF else Answer("off"),  # others say by how much
    "timesteps": _timesteps,
    "warmup": _warmup,
    "workers": lambda value, near: {"cluster.workers": number(value), "train.batch_size": _batch(value, near)},
}


def apply(rule: str | None, value: Any, near: Near, choices: Mapping[str, Mapping[str, Any]]) -> Any:
    """What an option's value becomes: as it is, by a rule, or by a table of choices, in which `= ...` is an answer."""
    if isinstance(value, str) and COMPUTED.search(value):
        return Answer(NOT_SET)
    if value is None or value == "":
        return Answer("not set")
    if rule is None:
        return value
    if rule in RULES:
        try:
            return RULES[rule](value, near)
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            return Answer(f"it could not be read ({error})")
    table, said = choices[rule], str(value).lower()
    found = table.get(said, table.get("*") if said not in OFF else None)
    if found is None:
        return Answer("off" if said in OFF else f"there is no such choice here; there are {', '.join(table)}")
    return Answer(found[2:]) if isinstance(found, str) and found.startswith("= ") else found
