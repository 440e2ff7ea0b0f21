"""Files of other trainers, read as plain data: small ones only, no aliases, nothing that runs."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from flux2_core.errors import UsageError

LARGEST = 2**18  # bytes: the longest configuration that was seen has 30 KB
MOST = 2_000  # values; the largest of the five trainers has 865 options
DEEPEST = 50  # tables in tables: PyYAML takes minutes for some thousands


def text_of(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        UsageError: it is larger than any configuration, or no text.
    """
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise UsageError(f"{path}: {size:,} bytes; a configuration has {LARGEST:,} at most")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a text file that can be read ({error})") from error


def parse(path: Path) -> Any:
    """A JSON, YAML or TOML file as data.

    Raises:
        UsageError: it is damaged, and on which line; or it holds what could grow beyond measure.
    """
    kind, text = path.suffix.lower(), text_of(path)
    try:
        return PARSERS.get(kind, PARSERS[".yaml"])(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        told = " ".join(str(error).split()) or "nested too deeply"
        raise UsageError(f"{path}: not {kind.removeprefix('.').upper() or 'YAML'} ({told})") from error


def _yaml(text: str) -> Any:
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases (*name), which may unfold without end: write out what they stand for")
        if depth > DEEPEST or count > 10 * MOST:
            raise ValueError(f"nested over {DEEPEST} deep, or over {MOST:,} values")
    return yaml.safe_load(text)


PARSERS: dict[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".yaml": _yaml,
    ".yml": _yaml,
}


def leaves(tree: Any, name: str = "", at: tuple[int, ...] = ()) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Every value below a tree with its dotted name, `[]` for an item of a list of tables, and which items those were.

    Raises:
        UsageError: there are more than any configuration has.
    """
    waiting, count = [(tree, name, at)], 0
    while waiting:
        value, name, at = waiting.pop()
        if (count := count + 1) > MOST:
            raise UsageError(f"over {MOST:,} values: this is no configuration")
        if isinstance(value, dict) and (value or not name):
            inner = [(item, f"{name}.{key}" if name else str(key), at) for key, item in value.items()]
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            inner = [(item, f"{name}[]", (*at, place)) for place, item in enumerate(value)]
        else:
            yield name, value, at
            continue
        waiting += reversed(inner)


def beside(name: str, folder: Path) -> Path | None:
    """A file or folder that a configuration names: from here, else beside the configuration, by its whole path, by its
    last part; None where there is none. Trainers run in folders of their own.
    """
    path = Path(name).expanduser()
    places = [path, folder / path, folder.parent / path, folder / path.name]
    return next((place for place in places if place.exists()), None)
