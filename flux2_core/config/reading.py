"""Reading a configuration: a TOML file, then overrides such as `train.steps=200` or `data.0.path=photos`."""

from __future__ import annotations

import difflib
import functools
import itertools
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from flux2_core.config.places import Place, beside, here
from flux2_core.config.section import Section
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError

AnySection = TypeVar("AnySection", bound=Section)
SEVERAL = ("data", "validate.prompt")  # sections that are lists
LONGEST_VALUE = 120  # of a refused value, in an error


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate a configuration.

    Raises:
        UsageError: the file is missing or not TOML, a key is unknown, or a value is not allowed.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; the first argument is a TOML configuration") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: not a TOML file ({error})") from error
    for override in overrides:
        apply_override(tree, override)
    return parse(tree, source=str(path))


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with overrides on top, as `load` lays them over a file.

    Raises:
        UsageError: a key is unknown, or a value is not allowed.
    """
    tree = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    for override in overrides:
        apply_override(tree, override)
    return parse(tree)


def parse(tree: dict[str, Any], *, source: str = "configuration") -> Config:
    """Validate a nested dictionary; errors name the dotted key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(*(f"{source}: {line}" for line in _lines(error.errors()))) from None


def absolute(section: AnySection) -> AnySection:
    """The same with every `Place` made absolute: Ray's workers stand in another folder than the driver."""

    def placed(value: Any, how: Place | None) -> Any:
        if isinstance(value, tuple):
            return tuple(placed(each, how) for each in value)
        if isinstance(value, Section):
            return absolute(value)
        return value if how is None else _PLACED[how](value, section)

    found = {}
    for name, field in type(section).model_fields.items():
        how = next((mark for mark in field.metadata if isinstance(mark, Place)), None)
        value = getattr(section, name)
        if value or field.default is not None:  # what may be unset and is given as nothing stays nothing
            found[name] = placed(value, how)
    return section.model_copy(update=found)


_PLACED: dict[Place, Callable[[str, Any], str]] = {
    Place.HERE: lambda path, _: here(path),
    Place.HUB: lambda path, _: here(path) if Path(path).expanduser().is_dir() else path,
    Place.BESIDE: lambda folder, section: beside(here(section.path), folder),
}


def dump_toml(config: Config) -> str:
    """The resolved configuration as TOML, every key written out except unset ones."""
    return written(config.model_dump(mode="json", by_alias=True, exclude_none=True))


def written(tree: Mapping[str, Any]) -> str:
    """A nested dictionary of the configuration's shape as TOML."""
    lines = [f"{key} = {_toml(value)}" for key, value in tree.items() if not isinstance(value, dict | list)]
    for item in tree.get("data", ()):
        lines += ["", "[[data]]", *(f"{key} = {_toml(value)}" for key, value in item.items())]
    for name, section in tree.items():
        if isinstance(section, dict):
            lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in section.items())]
    return "\n".join(lines) + "\n"


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in the tree; the value is read as TOML, else taken as text.

    A key that holds text takes an unquoted value as it stands: `run=2026-11-21` is a name, not a date.

    Raises:
        UsageError: there is no `=`, or the key leads through something that is no section.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override!r} is not an override: write section.key=value, for instance train.steps=200")
    *parents, leaf = key.strip().split(".")
    node: Any = tree
    for position, name in enumerate(parents):
        node = _step(node, name, key=key, at=".".join(parents[: position + 1]))
    if isinstance(node, list):
        raise UsageError(f"{key}: {'.'.join(parents)} is a list; write {'.'.join(parents)}.0.{leaf}=...")
    if not isinstance(node, dict):
        raise UsageError(f"{key}: {'.'.join(parents)} is a value, not a section")
    value = _value(text.strip())
    node[leaf] = text.strip() if _plain(key.strip()) in _texts() and not isinstance(value, str) else value


def keys() -> list[str]:
    """Every dotted key of the configuration, `data[]` for a data set."""
    return [dotted for dotted, _ in fields()]


def fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its pydantic field, for the generated reference."""
    for name, field in section.model_fields.items():
        dotted, kinds = prefix + (field.alias or name), (field.annotation, *typing.get_args(field.annotation))
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        # One that may be left out holds keys of another section; a list of tables is one key, or one of `SEVERAL`.
        inner = None if type(None) in kinds or (Ellipsis in kinds and dotted not in SEVERAL) else inner
        if inner is None:
            yield dotted, field
        else:
            yield from fields(inner, dotted + ("[]." if typing.get_origin(field.annotation) is tuple else "."))


def _step(node: Any, name: str, *, key: str, at: str) -> Any:
    if isinstance(node, list):
        if not name.isdecimal() or int(name) >= len(node):
            raise UsageError(f"{key}: {at} does not exist; the file has {len(node)} of them, counted from 0")
        return node[int(name)]
    if not isinstance(node, dict):
        raise UsageError(f"{key}: {at} is inside a value, not a section")
    if at in SEVERAL and name not in node:
        raise UsageError(f"{key}: the file has no [[{at}]] to override")
    return node.setdefault(name, {})


def _value(text: str) -> Any:
    try:
        read = tomllib.loads(f"v = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return read["v"] if len(read) == 1 else text


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        named = {key if re.fullmatch(r"[\w-]+", key, re.ASCII) else _toml(key): item for key, item in value.items()}
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in named.items()) + " }"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'


def _lines(items: list[Any]) -> Iterator[str]:
    """One line per key that is wrong: what follows from another error, or says it again, is left out."""
    places = [item["loc"] for item in items]
    told = set()
    for item in items:
        place, dotted = item["loc"], _dotted(item["loc"])
        follows = any(other[: len(place)] == place and len(other) > len(place) for other in places)
        if follows or dotted in told:
            continue
        told.add(dotted)
        if item["type"] == "extra_forbidden":
            for key in _leaves(item["input"], dotted):  # of a misspelt section: the keys as they were given
                yield f"{key}: unknown key.{_suggest(key)}"
        else:
            yield _describe(item, dotted)


def _leaves(value: Any, dotted: str) -> list[str]:
    if not isinstance(value, dict) or not value:
        return [dotted]
    return [leaf for name, inner in value.items() for leaf in _leaves(inner, f"{dotted}.{name}")]


def _describe(item: Any, dotted: str) -> str:
    if item["type"] == "missing":
        return f"{dotted}: required, and not given"
    if dotted in SEVERAL and isinstance(item["input"], dict):
        return f"{dotted}: there may be several, so its heading has two brackets: [[{dotted}]]"
    message = item["msg"].removeprefix("Value error, ")
    if dotted == "lora.targets" and item["type"] == "string_type":
        message = "Input should be a preset or a list of regular expressions"
    if item["type"] == "tuple_type":
        message = "Input should be a list, in brackets"
    given = repr(item["input"])
    given = given if len(given) <= LONGEST_VALUE else given[: LONGEST_VALUE - 3] + "..."
    return f"{dotted or 'configuration'}: {message}" + (f" (given: {given})" if dotted else "")


def _dotted(place: Sequence[int | str]) -> str:
    """The key as a person writes it: pydantic adds the member of a union (`lora.targets.str`), which is cut off."""
    known, parts = set(keys()), [str(part) for part in place]
    for end in range(len(parts), 0, -1):
        if _plain(".".join(parts[:end])) in known:
            rest = itertools.dropwhile(lambda part: not part.isdecimal(), parts[end:])
            return ".".join([*parts[:end], *rest])
    return ".".join(parts)


def _plain(dotted: str) -> str:
    """`data.0.path` as `data[].path`."""
    return ".".join("[]" if part.isdecimal() else part for part in dotted.split(".")).replace(".[]", "[]")


@functools.cache
def _texts() -> frozenset[str]:
    """Keys whose value is text."""
    return frozenset(dotted for dotted, field in fields() if field.annotation in (str, str | None))


SYNONYMS = {  # of keys' last parts, in other trainers and in people's heads
    "train.learning_rate": "lr unet_lr",
    "train.steps": "max_train_steps max_steps num_steps iterations",
    "train.batch_size": "batch train_batch_size",
    "train.optimizer": "optimizer_type",
    "train.schedule": "lr_scheduler scheduler",
    "train.warmup_steps": "warmup lr_warmup_steps",
    "train.recompute": "gradient_checkpointing",
    "train.precision": "mixed_precision base_model_precision",
    "train.guidance": "guidance_scale flux_guidance_value",
    "train.max_grad_norm": "clip_grad_norm gradient_clip",
    "lora.rank": "dim network_dim r lora_rank",
    "lora.alpha": "network_alpha lora_alpha",
    "lora.targets": "target_modules lora_layers",
    "data[].resolutions": "resolution image_size",
    "data[].trigger": "trigger_word instance_token token",
    "data[].repeats": "num_repeats",
    "data[].path": "folder folder_path instance_data_dir image_dir",
    "data[].caption": "caption_ext caption_column",
    "data[].masks": "mask_path",
    "data[].references": "control_path cond_images",
    "noise.distribution": "timestep_sampling timestep_type weighting_scheme",
    "noise.shift": "flow_shift flow_schedule_shift discrete_flow_shift",
    "validate.every": "sample_every validation_steps preview_every",
    "validate.prompts": "prompt prompts sample_prompts validation_prompt",
    "output.save_every": "save_steps checkpointing_steps save_every_n_steps",
    "output.keep": "checkpoints_total_limit max_step_saves_to_keep",
    "output.root": "output_dir training_folder",
    "model.path": "pretrained_model_name_or_path name_or_path base_model",
    "run": "name output_name job",
}


def _meant(leaf: str) -> list[str]:
    return [key for key, others in SYNONYMS.items() if leaf in others.split()]


def _suggest(dotted: str) -> str:
    plain = _plain(dotted)
    near = _meant(plain.rsplit(".", 1)[-1]) or difflib.get_close_matches(plain, keys(), n=1, cutoff=0.6)
    if not near:
        leaf = plain.rsplit(".", 1)[-1]
        near = [key for key in keys() if key.rsplit(".", 1)[-1] == leaf][:1]
    return f" Did you mean {near[0]}?" if near else " docs/config.md lists every key."
