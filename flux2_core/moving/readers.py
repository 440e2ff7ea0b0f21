"""Readers of other trainers' configurations: whatever their form, they become options by the names of the tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flux2_core.errors import UsageError
from flux2_core.moving import commands, documents
from flux2_core.moving.tables import System, systems

FORMS = "SimpleTuner's config.json, AI Toolkit's YAML, musubi's TOML, a script of one of them, diffusers or DiffSynth"
PROMPT_LINE = "sample_prompts line"


class Option(NamedTuple):
    """One option as it was given."""

    name: str
    """As its table knows it."""
    value: Any
    shown: str
    """As it was written."""
    at: int | None = None
    """Of which data set, or which item of a list."""
    aside: str | None = None
    """The kind of a data set that is not trained on, whose options are no settings of one that is."""


class Given(NamedTuple):
    """A configuration of another trainer."""

    system: System
    source: str
    folder: Path
    options: list[Option]
    unknown: list[dict[str, str | None]]


Named = tuple[str, Any, str, int | None, str | None]  # name, value, as shown, at, aside


def read(source: str) -> Given:
    """A file, script or command line of another trainer.

    Raises:
        UsageError: it is none of any trainer that we know, or a file that it names is missing or damaged.
    """
    path = Path(source).expanduser()
    if len(source) < 1_000 and "\n" not in source and path.is_file():
        read_as = _document if path.suffix.lower() in documents.PARSERS else _script
        return _named(source, path.absolute().parent, *read_as(path))
    if re.match(r"-|\S+\s+\S", source.strip()):
        return _named("a command", Path.cwd(), *_commands(source, Path.cwd(), "the command"))
    raise UsageError(f"{source}: no such file; give {FORMS}, or the command itself in quotes")


def _named(source: str, folder: Path, system: System, named: list[Named]) -> Given:
    options, unknown = [], []
    if len(named) > documents.MOST:
        raise UsageError(f"{source}: over {documents.MOST:,} values: this is no configuration")
    for name, value, shown, at, aside in named:
        known = system.known(name) or system.holder(name)
        if known is None:
            unknown.append({"option": shown, "nearest": system.nearest(name)})
        else:
            options.append(Option(known, value, shown, at, aside))
    return Given(system, source, folder, options, unknown)


def _document(path: Path) -> tuple[System, list[Named]]:
    """A JSON, YAML or TOML file, by what stands in it."""
    tree, known = documents.parse(path), systems()
    names = {str(name).lstrip("-") for name in tree} if isinstance(tree, dict) else set()
    if {"job", "config"} <= names:
        return known["ai-toolkit"], list(_toolkit(tree))
    if names & {*known["simpletuner"].signs}:
        return known["simpletuner"], list(_simpletuner(tree, path.parent))
    if "datasets" in names and path.suffix.lower() in (".toml", ".json"):
        return known["musubi"], list(_datasets(tree))
    if path.suffix.lower() == ".toml" and (flat := _flat(tree)).keys() & {*known["musubi"].signs}:
        return known["musubi"], list(_musubi(flat, path.parent))
    if {"model", "data"} <= names:
        raise UsageError(f"{path}: this is a configuration of cacheloom already: `cacheloom plan {path}`")
    raise UsageError(f"{path}: a configuration of no trainer that is known here; give {FORMS}")


def _script(path: Path) -> tuple[System, list[Named]]:
    try:
        return _commands(documents.text_of(path), path.absolute().parent, str(path))
    except UsageError as error:
        told = str(error)
        raise error if told.startswith(str(path)) else UsageError(f"{path}: {told}") from None


def _commands(text: str, folder: Path, source: str) -> tuple[System, list[Named]]:
    """The training commands of a script; of several of one trainer later ones win."""
    found: dict[str, dict[str, Any]] = {}
    for words in commands.commands(text):
        for system in systems().values():
            place = next((n for n, word in enumerate(words) if _runs(system, word, *words[n + 1 : n + 2])), None)
            bare = place is None and words[0].startswith("-") and _signed(system, commands.options(words))
            if place is None and not bare:
                continue
            start = 0 if place is None else place + 1
            launcher = commands.options(words[: place or 0])
            held = commands.options(words[start:]) | {k: launcher[k] for k in ("num_processes",) if k in launcher}
            if not system.argparse or (system.key == "simpletuner" and not held):
                file = next((word for word in words[start:] if "." in word), "config/config.json")
                return _document(_existing(file, folder, source))
            found[system.key] = _together(found.get(system.key, {}), held)
    if len(found) != 1:
        several = f"commands of {' and '.join(found)}: keep one" if found else "no command of a known trainer"
        raise UsageError(f"{source}: {several}; give {FORMS}")
    ((key, options),) = found.items()
    read_as: Mapping[str, Callable[[dict[str, Any], Path], Iterator[Named]]]
    read_as = {"simpletuner": _simpletuner, "musubi": _musubi}
    return systems()[key], list(read_as.get(key, _plain)(options, folder))


def _runs(system: System, *words: str) -> bool:
    """Whether the first of some words is one of its scripts, by whatever path, or both are its command."""
    whole = " ".join(words)
    return any(f"/{whole if ' ' in script else words[0]}".endswith(f"/{script}") for script in system.scripts)


def _signed(system: System, options: dict[str, Any]) -> bool:
    return system.argparse and any(system.known(name) in system.signs for name in options)


def _together(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Two commands as one: what DiffSynth caches in its first stage is the data of its second."""
    split = str(before.get("task", "")).endswith("data_process")
    return before | {key: value for key, value in after.items() if not (split and key.startswith("data"))}


def _plain(options: Mapping[str, Any], _: Path) -> Iterator[Named]:
    for name, value in options.items():
        yield name, value, f"--{name}", None, None


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Argument names of a `--config_file`, under whatever table they stand."""
    return {name.rpartition(".")[2]: value for name, value, _ in documents.leaves(dict(tree))}


def _musubi(options: dict[str, Any], folder: Path) -> Iterator[Named]:
    system = systems()["musubi"]
    given = {system.known(name) or name: value for name, value in options.items()}
    if file := given.get("config_file"):
        given = {**_flat(documents.parse(_existing(file, folder, "--config_file"))), **given}
    for name, value in given.items():
        if name == "sample_prompts":
            yield from _prompt_lines(documents.text_of(_existing(value, folder, "--sample_prompts")))
            continue
        yield name, value, f"--{name}", None, None
        if name == "dataset_config":
            yield from _datasets(documents.parse(_existing(value, folder, "--dataset_config")))
        elif name == "network_args":
            for pair in value if isinstance(value, list) else [value]:
                key, _, text = str(pair).partition("=")
                yield f"{name}.{key}", text, f"--{name} {key}", None, None


def _prompt_lines(text: str) -> Iterator[Named]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for place, line in enumerate(lines):
        prompt, *flags = re.split(r"\s+--(?=[a-z]+\s)", line)
        yield "sample_prompts", prompt, PROMPT_LINE, place, None
        for flag in flags:
            name, _, value = flag.partition(" ")
            yield f"{PROMPT_LINE} --{name}", value.strip(), f"{PROMPT_LINE} --{name}", place, None


def _datasets(tree: Mapping[str, Any]) -> Iterator[Named]:
    for name, value, at in documents.leaves(dict(tree)):
        yield name, value, name, at[0] if at else None, None


def _toolkit(tree: dict[str, Any]) -> Iterator[Named]:
    config = tree["config"]
    processes = config.get("process") if isinstance(config, dict) else None
    if not isinstance(processes, list) or not processes or not isinstance(processes[0], dict):
        raise UsageError("config.process: AI Toolkit's job has a list of processes, and the first is what trains")
    outside = {**tree, "config": {key: value for key, value in config.items() if key != "process"}}
    for name, value, _ in documents.leaves(outside):
        yield f"$.{name}", value, name, None, None
    for _ in processes[1:]:
        yield "$.config.process", "a further process", "config.process", None, None
    for name, value, at in documents.leaves({"network": None} | processes[0]):
        yield name, value, name, at[0] if at else None, None


def _simpletuner(options: Mapping[str, Any], folder: Path) -> Iterator[Named]:
    given = {str(name).lstrip("-"): value for name, value in options.items()}
    files = {"data_backend_config": "multidatabackend.json", "lycoris_config": None, "user_prompt_library": None}
    for name, value in ({"data_backend_config": files["data_backend_config"]} | given).items():
        if isinstance(value, str) and value.startswith(("{", "[")):
            value = _json(value, name)
        if name in files and isinstance(value, str):
            yield name, value, name, None, None
            value = documents.parse(_existing(value, folder, name))
        if name == "data_backend_config":
            yield from _backends(value)
        elif name == "user_prompt_library" and isinstance(value, dict):
            for key, prompt in value.items():
                for inner, leaf, _ in documents.leaves(prompt, f"{name}.<name>"):
                    yield inner, leaf, inner.replace("<name>", key), None, None
        else:
            for key, leaf, at in documents.leaves(value, name):
                yield key, leaf, key, at[0] if at else None, None


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: not JSON ({error})") from error


def _backends(entries: Any) -> Iterator[Named]:
    """SimpleTuner's list of data sets: those of pictures are counted, and what others give them is put in."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError("data_backend_config: SimpleTuner's is a list of tables, one for each data set")
    by_id = {entry.get("id"): entry for entry in entries}
    count = 0
    for entry in entries:
        kind = "disabled" if entry.get("disabled") or entry.get("disable") else entry.get("dataset_type", "image")
        at = count if kind == "image" else None
        count += at is not None
        for name, value, _ in documents.leaves(entry):
            shown, aside = f"{entry.get('id', '?')}: {name}", None if kind == "image" else str(kind)
            if name == "conditioning_data":
                value = _conditioned(value, by_id)
            yield f"datasets[].{name}", value, shown, at, aside


def _conditioned(ids: Any, by_id: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    """Folders of masks and references by the names of their data sets."""
    found: dict[str, Any] = {}
    for name in ids if isinstance(ids, list) else [ids]:
        entry = by_id.get(name)
        if entry is None or not entry.get("instance_data_dir"):
            raise UsageError(f"conditioning_data: there is no data set {name!r} with an instance_data_dir")
        if entry.get("conditioning_type") == "mask":
            found["data[].masks"] = entry["instance_data_dir"]
        else:
            found.setdefault("data[].references", []).append(entry["instance_data_dir"])
    return found


def _existing(name: Any, folder: Path, setting: str) -> Path:
    found = documents.beside(str(name), folder) if name else None
    if found is None or not found.is_file():
        raise UsageError(
            f"{setting}: {name or 'a configuration file'} is neither here nor in {folder}; put it beside it"
        )
    return found
