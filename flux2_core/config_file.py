"""Reading a configuration: a TOML file, then overrides such as `train.steps=200` or `data.0.path=photos`."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from flux2_core.config import Config
from flux2_core.errors import UsageError


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate a configuration.

    Raises:
        UsageError: the file is missing or not TOML, a key is unknown, or a value is not allowed.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; the first argument is a TOML configuration") from None
    except (IsADirectoryError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: not a TOML file ({error})") from error
    for override in overrides:
        apply_override(tree, override)
    return parse(tree, source=str(path))


def parse(tree: dict[str, Any], *, source: str = "configuration") -> Config:
    """Validate a nested dictionary; errors name the dotted key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError("\n".join(f"{source}: {_describe(item)}" for item in error.errors())) from None


def dump_toml(config: Config) -> str:
    """The resolved configuration as TOML, every key written out except unset ones."""
    tree = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    lines = [f"{key} = {_toml(value)}" for key, value in tree.items() if not isinstance(value, dict | list)]
    for item in tree.pop("data"):
        lines += ["", "[[data]]", *(f"{key} = {_toml(value)}" for key, value in item.items())]
    for name, section in tree.items():
        if isinstance(section, dict):
            lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in section.items())]
    return "\n".join(lines) + "\n"


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in the tree; the value is read as TOML, else taken as text."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override!r} is not an override: write section.key=value, for instance train.steps=200")
    *parents, leaf = key.strip().split(".")
    node: Any = tree
    for position, name in enumerate(parents):
        node = _step(node, name, key=key, at=".".join(parents[: position + 1]))
    if not isinstance(node, dict):
        raise UsageError(f"{key}: {'.'.join(parents)} is a list; write {'.'.join(parents)}.0.{leaf}=...")
    node[leaf] = _value(text.strip())


def keys() -> list[str]:
    """Every dotted key of the configuration, `data[]` for a data set."""
    return [dotted for dotted, _ in _walk(Config, "")]


def fields() -> Iterator[tuple[str, Any]]:
    """Every dotted key with its pydantic field, for the generated reference."""
    return _walk(Config, "")


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        section = next(
            (x for x in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_section(x)), None
        )
        dotted = prefix + (field.alias or name)
        if section is None:
            yield dotted, field
        else:
            yield from _walk(section, dotted + ("[]." if name == "data" else "."))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _step(node: Any, name: str, *, key: str, at: str) -> Any:
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            raise UsageError(f"{key}: {at} does not exist; the file has {len(node)} of them, counted from 0")
        return node[int(name)]
    if not isinstance(node, dict):
        raise UsageError(f"{key}: {at} is inside a value, not a section")
    if name == "data" and name not in node:
        raise UsageError(f"{key}: the file has no [[data]] to override")
    return node.setdefault(name, {})


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04X}" for c in escaped) + '"'


def _describe(item: Any) -> str:
    dotted = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{dotted}: unknown key.{_suggest(dotted)}"
    if item["type"] == "missing":
        return f"{dotted}: required, and not given"
    message = item["msg"].removeprefix("Value error, ")
    return f"{dotted or 'configuration'}: {message}" + (f" (given: {item['input']!r})" if dotted else "")


def _suggest(dotted: str) -> str:
    plain = ".".join("[]" if part.isdigit() else part for part in dotted.split(".")).replace(".[]", "[]")
    near = difflib.get_close_matches(plain, keys(), n=1, cutoff=0.6)
    if not near:
        leaf = plain.rsplit(".", 1)[-1]
        near = [key for key in keys() if key.rsplit(".", 1)[-1] == leaf][:1]
    return f" Did you mean {near[0]}?" if near else " docs/config.md lists every key."
