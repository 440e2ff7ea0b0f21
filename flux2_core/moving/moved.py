"""Another trainer's configuration as one of ours: every option of theirs is mapped, answered or named as unknown.

Options are taken in the order of the table, so that what stands further down there wins over what it overrules. What
our schema does not take, because a key or a value is not there or does not go with the rest, is answered and never
written: what comes out can be read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flux2_core.config import reading
from flux2_core.config.objective import PARAMETERS
from flux2_core.errors import UsageError
from flux2_core.escape import visible
from flux2_core.moving import documents, readers, rules
from flux2_core.moving.readers import Given, Option
from flux2_core.moving.rules import Answer

FIRST = re.compile(r"model\.path|data\.\d+\.path")  # without which nothing can be read
CHOOSES = re.compile(r"\.(kind|distribution)$")  # what decides which other keys there are: tried before them
COUNTED = re.compile(r"tread|slider|rollout|validate\.prompt\.")  # tables that mean nothing in part
ADDED = re.compile(r"validate\.prompts|data\.\d+\.references|lora\.preset")  # lists that several options make together
PLACES = re.compile(r"data\.\d+\.(path|masks|references)|lora\.(init|preset)")
PARAMETER = re.compile(r"noise\.parameters\.([a-z-]+)\.(\d)")  # one of a distribution's: ours are a list
Entry = tuple[str, Any]  # a dotted key, `data.0.path`, and a value


class Mapped(NamedTuple):
    """An option and what it became."""

    option: Option
    key: str
    entries: list[Entry]
    given: bool


def move(source: str) -> dict[str, Any]:
    """What a file, script or command line of another trainer becomes, and what became of each of its options.

    Raises:
        UsageError: it is none of a trainer that is known here, or says no model or no pictures.
    """
    found = readers.read(source)
    mapped, dropped = _mapped(found)
    tree, refused = _settled(mapped, found)
    kept = []
    for item in mapped:
        reasons = [refused[key] for key, _ in item.entries if key in refused]
        if reasons and len(reasons) == len(item.entries):
            dropped += [_dropped(item.option, reasons[0])] if item.given else []
        else:
            value = [value for _, value in item.entries]
            shown = {
                "key": PARAMETER.sub("noise.parameters", item.key),
                "ours": value[0] if len(value) == 1 else dict(item.entries),
            }
            kept.append({"option": item.option.shown, "theirs": item.option.value, "given": item.given, **shown})
    told = {item.option.name for item in mapped} | {entry["name"] for entry in dropped}
    notes = [line for name, line in found.system.better.items() if name in told]
    listed = [{key: value for key, value in entry.items() if key != "name"} for entry in dropped]
    result = {"system": found.system.title, "config": tree, "mapped": kept, "dropped": listed, "unknown": found.unknown}
    return result | {"notes": notes, "toml": _text(found, tree, listed, notes)}


def _dropped(option: Option, reason: str) -> dict[str, Any]:
    value = "not shown" if reason.startswith("a secret") else option.value
    return {"name": option.name, "option": option.shown, "theirs": value, "reason": reason}


def _mapped(found: Given) -> tuple[list[Mapped], list[dict[str, Any]]]:
    system = found.system
    said = {option.name for option in found.options}
    unsaid = [Option(n, value, n) for n, value in system.defaults.items() if n not in said or n.startswith("datasets")]
    order = {name: place for place, name in enumerate(system.mapped)}
    every = sorted([*unsaid, *found.options], key=lambda option: order.get(option.name, len(order)))
    sets = 1 + max((option.at or 0 for option in every if option.name.startswith("datasets[]")), default=0)
    sets += any(target.when in said for target in system.mapped.values() if target.key.startswith("data[1]"))
    mapped, dropped = [], []
    for option in every:
        given = option not in unsaid
        said_of_it = _became(option, found, every)
        if not isinstance(said_of_it, Answer):
            key = system.mapped[option.name].key
            placed = (_placed(inner, value, option, key, sets, found) for inner, value in said_of_it)
            mapped.append(Mapped(option, key, [entry for entries in placed for entry in entries], given))
        elif given:
            dropped.append(_dropped(option, str(said_of_it)))
    return mapped, dropped


def _became(option: Option, found: Given, every: Iterable[Option]) -> Answer | list[Entry]:
    """Our keys, as the table writes them, with values; or why there are none."""
    system, target = found.system, found.system.mapped.get(option.name)
    if target is None:
        return Answer(system.answered[option.name])
    if option.aside:
        return Answer(f"of a set that is not trained on ({option.aside}): where another names it, its folder is taken")
    near = {other.name: other.value for other in every if other.at in (None, option.at or 0) and not other.aside}
    if target.when and near.get(target.when) in (None, False, "", "false", 0):
        return Answer(f"means nothing there without {target.when}")
    value = rules.apply(target.rule, option.value, near, system.choices)
    if isinstance(value, Answer):
        return value
    return list(value.items()) if isinstance(value, dict) else [(target.key, value)]


def _placed(key: str, value: Any, option: Option, target: str, sets: int, found: Given) -> Iterable[Entry]:
    """The key with a number for `[]`: that of its item, else of each data set."""
    if target.startswith("data[1]"):
        key = key.replace("data[]", "data[1]")
    own = [option.at] if option.at is not None else range(sets if key.startswith("data[]") else 1)
    for number in own:
        dotted = key.replace("[]", f".{number}").replace("[1]", ".1")
        yield dotted, _beside(value, found.folder) if PLACES.fullmatch(dotted) else value


def _beside(value: Any, folder: Path) -> Any:
    """A path as it is where something is there, or nothing is beside the configuration either."""
    if isinstance(value, list):
        return [_beside(each, folder) for each in value]
    if "://" in str(value) or Path(str(value)).expanduser().exists():
        return value
    return str(documents.beside(str(value), folder) or value)


def _settled(mapped: list[Mapped], found: Given) -> tuple[dict[str, Any], dict[str, str]]:
    """All entries that our schema takes together, and why it refuses each of the others."""
    wanted: dict[str, Any] = dict(found.system.always)
    for key, value in (entry for item in mapped for entry in item.entries):
        several = ADDED.fullmatch(key) and key in wanted
        value = value if not ADDED.fullmatch(key) or isinstance(value, list) else [value]
        wanted[key] = [*wanted[key], *(each for each in value if each not in wanted[key])] if several else value
    others = _parameters(wanted)
    units = _units(wanted)
    first = [name for name in units if FIRST.fullmatch(name)]
    first += ["slider"] if "slider" in units and first == ["model.path"] else []  # which needs no pictures
    tree, why = _tried({}, {key: value for name in first for key, value in units.pop(name).items()})
    if why is not None:
        raise UsageError(f"{found.source}: it says no model or no folder of pictures that can be read here: {why}")
    given = {key for item in mapped if item.given for key, _ in item.entries}
    waiting = sorted(units.values(), key=lambda unit: (not given & unit.keys(), not CHOOSES.search(min(unit))))
    before, refused = -1, dict[str, str]()
    while len(waiting) != before:  # one key may need another that stands further down
        before, again, waiting, refused = len(waiting), waiting, [], {}
        for unit in again:
            tree, why = _tried(tree, unit)
            if why is not None:
                waiting.append(unit)
                refused |= dict.fromkeys(unit, why)
    whole = refused.get("noise.parameters")
    refused |= {key: whole for key, value in others.items() if whole and value is None}
    return _fitted(tree, refused), refused | {key: why for key, why in others.items() if why}


def _parameters(wanted: dict[str, Any]) -> dict[str, str | None]:
    """Put those of the distribution into one list; of each its key, and why it is none of this distribution's."""
    kind = wanted.get("noise.distribution", "logit-normal")
    kind = "logit-normal" if kind == "sigmoid" else kind
    usual = [*PARAMETERS[kind][-1]] if kind in PARAMETERS else []
    listed, told = [*usual], dict[str, str | None]()
    for key in [key for key in wanted if PARAMETER.fullmatch(key)]:
        of, place = key.split(".")[2:]
        told[key] = None if of == kind else f"of {of} noise levels, and they are {kind}"
        value = _plain(wanted.pop(key))
        if of == kind:
            listed[int(place)] = value
    if listed != usual:
        wanted["noise.parameters"] = listed
    return told


def _units(wanted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries one by one, those of a table that means nothing in part together."""
    units: dict[str, dict[str, Any]] = {}
    for key, value in wanted.items():
        part = COUNTED.match(key)
        units.setdefault(part[0] if part else key, {})[key] = value
    return units


def _tried(tree: dict[str, Any], unit: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The tree with a unit's entries as numbers, text or lists, whichever our schema takes; or why it takes none."""
    first = None
    for form in (_plain, lambda value: value, lambda value: [_plain(value)], lambda value: [value]):
        tried = tree
        for key, value in unit.items():
            tried = _with(tried, key, form(value))
        why = _wrong(tried)
        if why is None:
            return tried, None
        first = first or why
    return tree, first


def _plain(value: Any) -> Any:
    """Text as the number or truth that it says."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return rules.number(value)
    except ValueError:
        return value


def _with(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of the tree with one value in it; lists grow as they must."""
    new = copy.deepcopy(tree)
    *parents, leaf = key.split(".")
    node: Any = new
    for name, following in zip(parents, [*parents, leaf][1:], strict=True):
        empty: Any = [] if following.isdecimal() else {}
        if name.isdecimal():
            node += [{} for _ in range(int(name) + 1 - len(node))]
            node = node[int(name)]
        else:
            node = node.setdefault(name, empty)
    node[leaf] = value
    return new


def _wrong(tree: dict[str, Any]) -> str | None:
    try:
        reading.parse(tree)
    except UsageError as error:
        told = str(error).split("\n")[0].removeprefix("configuration: ")
        return f"not yet: there is no {told.split(':')[0]} in this version" if "unknown key" in told else told
    return None


def _fitted(tree: dict[str, Any], refused: dict[str, str]) -> dict[str, Any]:
    """Without what model and data decide: dev takes no negative prompt, klein's base one with guidance, a distilled
    klein neither; only references have a size.
    """
    path, validate = tree["model"]["path"].lower(), tree.get("validate", {})
    klein, base, guided = "klein" in path, "base" in path, validate.get("guidance", 1) != 1
    if klein and base and guided:
        validate.setdefault("negative", "")
    unfit = {"negative": not (klein and base and guided), "guidance": klein and not base and guided}
    for key in [key for key, is_unfit in unfit.items() if is_unfit and key in validate]:
        refused[f"validate.{key}"] = "a model with a guidance embedding, or a distilled one, takes none"
        del validate[key]
    for place, data in enumerate(tree.get("data", ())):
        if "reference_size" in data and not data.get("references"):
            refused[f"data.{place}.reference_size"] = "this data set has no references"
            del data["reference_size"]
    return tree


def _text(found: Given, tree: dict[str, Any], dropped: list[dict[str, Any]], notes: list[str]) -> list[str]:
    """Lines of the configuration as a file, with what was answered below it."""
    head = [f"From {found.system.title}: {found.source}", *notes]
    tail = [f"{entry['option']}: {entry['reason']}" for entry in dropped]
    tail += [f"{entry['option']}: unknown there; nearest: {entry['nearest'] or 'nothing'}" for entry in found.unknown]
    tail = ["Not carried over:", *tail] if tail else []
    above, below = ([f"# {visible(line)}" for line in part] for part in (head, tail))
    return [*above, "", *reading.written(tree).splitlines(), "", *below]
