"""What the documents take from the code: cog calls these functions, and `make check` fails where a document drifted."""

from __future__ import annotations

import ast
import json
import statistics
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).parents[1]
DRAWN: list[tuple[dict[str, object], str]] = [
    ({"distribution": "linear"}, "AI Toolkit's `linear`; our demo"),
    ({"distribution": "logit-normal"}, "diffusers' script; our default; AI Toolkit's `sigmoid`"),
    ({"distribution": "linear", "shift": 2.2255}, 'DiffSynth-Studio (mu 0.8 at every size, `loss.weighting = "bell"`)'),
    ({"distribution": "linear", "shift": 3.0}, "NeMo Automodel"),
    ({"distribution": "logit-normal", "shift": 3.0}, "diffusion-pipe"),
    ({"distribution": "logit-normal", "shift": "tokens"}, "musubi's `flux2_shift`, OneTrainer; AI Toolkit's `shift`"),
    ({"distribution": "levels", "parameters": [50], "shift": "flux2"}, "FLUX.2's own sampler, 50 steps"),
    ({"distribution": "linear", "bias": "content"}, "AI Toolkit's `content`"),
    ({"distribution": "linear", "bias": "style"}, "AI Toolkit's `style`"),
    ({"distribution": "beta"}, "SimpleTuner's beta schedule"),
    ({"distribution": "mode"}, "diffusers' and musubi's `mode`"),
]


def config_reference() -> str:
    """A table per section with every key, its type, default and meaning."""
    from flux2_core.config.reading import fields
    from flux2_core.config.sections import Config

    out: list[str] = []
    section = None
    for key, field in fields():
        name = key.rpartition(".")[0]
        if name != section:
            section = name
            out += ["", f"## {_heading(name)}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        default = "required" if field.is_required() else f"`{_value(field.default)}`"
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        out.append(f"| `{key}` | {_type(field.annotation)} | {default} | {meaning} |")
    assert Config.__doc__
    return "\n".join(out) + "\n"


def tree() -> str:
    """The rooms in their order, then the files in each; beside every one the first line of its docstring."""
    folders = ["flows", "stages", "flux2_core", *_rooms(), "flux2_core/embedded"]
    lines = [(folder.replace("flux2_core/", "  ") + "/", ROOT / folder / "__init__.py") for folder in folders]
    for folder in folders:
        files = [file for file in sorted((ROOT / folder).glob("*.py")) if file.name != "__init__.py"]
        lines += [("", None), (f"{folder}/", None), *((f"  {file.name}", file) for file in files)]
    width = max(len(name) for name, _ in lines) + 2
    shown = [f"{name:{width}}{_meaning(file)}" if file else name for name, file in lines]
    return "\n".join(["```text", *shown, "```", ""])


def verbs() -> str:
    """The verbs of the command line."""
    from flows.verbs import VERBS

    rows = [f"| `{name}` | {verb.does} |" for name, verb in VERBS.items()]
    return "\n".join(["| verb | does |", "|---|---|", *rows]) + "\n"


def better(system: str) -> str:
    """What another trainer does otherwise, a line each."""
    from flux2_core.moving.tables import systems

    lines = {line: name for name, line in systems()[system].better.items()}
    return "".join(f"- `{name}`: {line}\n" for line, name in lines.items()) + "\n"


def moving(system: str) -> str:
    """What becomes of another trainer's options: those that a setting is made of, then the reasons of the others."""
    from flux2_core.moving.moved import PARAMETER
    from flux2_core.moving.tables import systems

    table, shown = systems()[system], 8
    ours: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for name, target in table.mapped.items():
        ours.setdefault(PARAMETER.sub("noise.parameters", target.key).replace("data[1]", "data[]"), []).append(name)
    for name, reason in table.answered.items():
        reasons.setdefault(reason, []).append(name)

    def named(names: list[str]) -> str:
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        return ", ".join(f"`{name}`" for name in names[:shown]) + more

    rows = [f"{len(table.mapped)} options become settings, {len(table.answered)} are answered.", ""]
    rows += [f"| {table.title} | here |", "|---|---|"]
    rows += [f"| {named(names)} | `{key}` |" for key, names in ours.items()]
    rows += ["", "| the others | why |", "|---|---|"]
    rows += [f"| {named(names)} | {reason} |" for reason, names in reasons.items()]
    return "\n".join(rows) + "\n"


def schemas() -> str:
    """Columns of the tables."""
    from flux2_core.store import schemas as store_schemas

    out = []
    for name in ("samples", "text", "latents", "quarantine"):
        out += [f"### {name}", "", "| column | type |", "|---|---|"]
        out += [f"| `{field.name}` | {field.type} |" for field in getattr(store_schemas, f"{name}_schema")()]
        out.append("")
    return "\n".join(out)


def noise_levels() -> str:
    """What each distribution draws for a picture of 1024 px, and the settings that draw what other trainers draw."""
    import numpy as np

    from flux2_core.config.objective import Noise
    from flux2_core.noise import SHOWN, Levels

    rows = ["| `[noise]` | mean | 5 % | median | 95 % | who draws so |", "|---|---|---|---|---|---|"]
    for keys, who in DRAWN:
        levels = Levels(Noise.model_validate(keys))
        mean = levels.at((np.arange(4096) + 0.5) / 4096, tokens=4096).mean()
        shown = " | ".join(f"{level:.3f}" for level in (mean, *levels.at(SHOWN, tokens=4096)))
        said = ", ".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
        rows.append(f"| `{said}` | {shown} | {who} |")
    return "\n".join(rows) + "\n"


def effects() -> str:
    """What each method did to the embedded model beside plain training, as `bench/effects.json` holds it."""
    sys.path.insert(0, str(ROOT))  # bench is not installed
    from bench.effects_table import EFFECTS

    kept = json.loads((ROOT / "bench" / "effects.json").read_text(encoding="utf-8"))
    rows = [
        f"Measured on {kept['date']}, {kept['machine']}.",
        "",
        "| method | set | over | what is measured | seeds | plain | with it | seen at every seed | a step costs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for effect in (one for one in EFFECTS if one.name in kept["effects"]):
        found = kept["effects"][effect.name]
        sets, over = (", ".join(f"`{one}`" for one in each) for each in (effect.sets, effect.plain))
        over = f"{effect.lesson}{', ' if over else ''}{over}"
        plain, with_it = (_range(found[arm]) for arm in ("plain", "with"))
        said = f"{effect.said}; {effect.note}" if effect.note else effect.said
        cells = [effect.name, sets, over, effect.measure, str(len(found["plain"])), plain, with_it, said]
        cells.append(f"{found['cost']:.2f} x" if found["cost"] else "")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def scaling() -> str:
    """What FLUX.2-dev's step would take on 1, 8, 16 and 64 GPUs, by the formulas of `plan`."""
    from bench.scaling import rows

    lines = [f"| {' | '.join(row)} |" for row in rows()]
    return "\n".join([lines[0], "|---" * lines[0].count(" | ") + "|---|", *lines[1:]]) + "\n"


def _range(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def _heading(section: str) -> str:
    if not section:
        return "Top level"
    if section.endswith("[]"):
        return f"`[[{section[:-2]}]]`, one per {'data set' if section == 'data[]' else 'prompt'}"
    return f"`[{section}]`"


def _rooms() -> list[str]:
    """Folders of flux2_core, each using only those before it, as the test that holds the order names them."""
    test = ast.parse((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    (rooms,) = [
        ast.literal_eval(node.value)
        for node in test.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS"
    ]
    folders = [f"flux2_core/{room.replace('.', '/')}" for room in rooms]
    return [folder for folder in folders if (ROOT / folder).is_dir()]


def _meaning(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def _value(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _type(annotation: object) -> str:
    arguments = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if arguments:
        return " or ".join(_type(argument) for argument in arguments)
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    return names.get(annotation.__name__, "table")  # type: ignore[attr-defined]
