"""`python -m bench.effects [METHOD ...]`: what each method does to the embedded model, beside plain training.

Every method is a record in `bench/effects_table.py`: what is set over plain training of a lesson (`bench/lessons.py`),
what of the drawings is measured, and what is claimed. Both are trained at the same seeds by the product's own loop,
from one cache, and what a step costs is measured in turns. A claim is what held at every seed.

    python -m bench.effects --out effects.jsonl [--seeds 5] [METHOD ...]   measures what the file does not hold yet
    python -m bench.effects --out effects.jsonl --write                    makes bench/effects.json of it
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.effects_table import EFFECTS, Effect
from bench.lessons import LESSONS, MEASURES, Pupil
from bench.measure import alternate
from flux2_core.config.reading import apply_override, parse
from flux2_core.config.sections import Config
from flux2_core.embedded import MODEL_FOLDER
from flux2_core.lora import file
from flux2_core.run.folder import RunFolder
from flux2_core.store.hashing import digest
from flux2_core.train.loop import run
from flux2_core.train.trainer import Trainer
from tests.in_process import fill_cache

ROOT = Path(__file__).parents[1]
DEMO, KEPT = ROOT / "examples" / "demo.toml", ROOT / "bench" / "effects.json"
PLAIN = (  # over examples/demo.toml
    "train.steps=40", "train.batch_size=4", "train.learning_rate=3e-3", "train.schedule=constant", "noise.shift=3.0",
    "validate.every=0", "validate.prompts=[]",
)  # fmt: skip
PRESET = "rooks.safetensors"  # a LoRA that knows rooks, where a setting names it
ROUNDS, STEPS_A_ROUND = 3, 2  # of what a step costs
Sets = tuple[str, ...]
Line = dict[str, Any]


def configuration(folder: Path, lesson: str, sets: Sets, *, seed: int) -> Config:
    """Training of a lesson with some settings, all runs with one cache."""
    tree = tomllib.loads(DEMO.read_text(encoding="utf-8"))
    del tree["lora"]["alpha"]  # is the rank, as when nothing is said
    for override in PLAIN:
        apply_override(tree, override)
    for name, section in copy.deepcopy(_lesson(folder, lesson)).items():
        tree[name] = tree[name] | section if isinstance(section, dict) and name in tree else section
    tree["model"] = {"path": str(MODEL_FOLDER)}
    tree["output"] = {"root": str(folder / "runs"), "cache": str(folder / "cache")}
    for override in (*sets, f"train.seed={seed}"):
        apply_override(tree, override.replace(PRESET, str(folder / PRESET)))
    return parse(tree | {"run": digest([lesson, *sets, seed])[:16]})


def trained(folder: Path, lesson: str, sets: Sets, *, seed: int) -> Trainer:
    """What the product's own loop has trained; the pictures and texts that are new are encoded first."""
    if any(PRESET in one for one in sets):
        _preset(folder)
    _encode(folder, lesson, sets)
    run(trainer := Trainer(configuration(folder, lesson, sets, seed=seed)), lambda record: None)
    return trainer


@cache
def _lesson(folder: Path, lesson: str) -> dict[str, Any]:
    return LESSONS[lesson](folder / "pictures" / lesson)


@cache
def _encode(folder: Path, lesson: str, sets: Sets) -> None:
    fill_cache(configuration(folder, lesson, sets, seed=0))


@cache
def _preset(folder: Path) -> None:
    knows = trained(folder, "rooks", (), seed=0)
    file.write(folder, PRESET.removesuffix(".safetensors"), knows.weights(), metadata={}, dtype="fp32")


def measured(folder: Path, lesson: str, sets: Sets, *, seed: int, measures: Sequence[str]) -> list[Line]:
    """Train once and measure all that is asked of it; the run's folder is not kept."""
    began = time.process_time()
    trainer = trained(folder, lesson, sets, seed=seed)
    seconds = time.process_time() - began
    values = {name: round(MEASURES[name](Pupil(trainer)), 4) for name in measures}
    shutil.rmtree(RunFolder(trainer.config).path)
    own = {"lesson": lesson, "sets": list(sets), "seed": seed}
    return [own | {"measure": name, "value": value, "cpu_s": round(seconds, 1)} for name, value in values.items()]


def arms_of(effect: Effect) -> list[Any]:
    """What two steps are compared: records of one method share it."""
    return [effect.beside or effect.lesson, list(effect.plain), effect.lesson, list(effect.plain + effect.sets)]


def cost(folder: Path, effect: Effect) -> Line:
    """CPU time of a step with the method against one without, in turns: medians of the same batches."""
    steps = {}
    arms = ("plain", effect.beside or effect.lesson, effect.plain), ("with", effect.lesson, effect.plain + effect.sets)
    for name, lesson, sets in arms:
        if any(PRESET in one for one in sets):
            _preset(folder)
        _encode(folder, lesson, sets)
        steps[name] = _stepping(Trainer(configuration(folder, lesson, sets, seed=0)))
    timings = alternate(steps, rounds=ROUNDS)
    return {
        "step_of": arms_of(effect),
        "cost": round(timings.ratio("with", "plain"), 3),
        "spread": [round(ratio, 3) for ratio in timings.spread("with", "plain")],
    }


def _stepping(trainer: Trainer) -> Any:
    def steps() -> None:
        for _ in range(STEPS_A_ROUND):
            trainer.train_step(trainer.data.batch(trainer.step))

    return steps


class Results:
    """Lines of what was measured; a file of them takes each as it comes."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.lines = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []

    def add(self, *lines: Line) -> None:
        """Keep lines."""
        self.lines += lines
        if self.out:
            with self.out.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in lines)

    def value(self, lesson: str, sets: Sets, seed: int, measure: str) -> float | None:
        """What was measured of a run, if it was."""
        wanted = {"lesson": lesson, "sets": list(sets), "seed": seed, "measure": measure}
        return next((line["value"] for line in self.lines if wanted.items() <= line.items()), None)

    def cost(self, effect: Effect) -> Line | None:
        """What a step of a method was measured to cost, if it was."""
        return next((line for line in self.lines if line.get("step_of") == arms_of(effect)), None)

    def pairs(self, effect: Effect, seeds: Sequence[int]) -> list[tuple[float, float]]:
        """Plain and with the method, at each of the seeds at which both were measured."""
        arms = effect.plain, effect.plain + effect.sets
        found = [[self.value(effect.lesson, sets, seed, effect.measure) for sets in arms] for seed in seeds]
        return [(plain, with_it) for plain, with_it in found if plain is not None and with_it is not None]


def measure_all(folder: Path, effects: Sequence[Effect], results: Results, *, seeds: Sequence[int]) -> None:
    """Measure what is missing: seed by seed, each run once whatever is asked of it."""
    for seed in seeds:
        wanted: dict[tuple[str, Sets], list[str]] = {}
        for effect in effects:
            for sets in (effect.plain, effect.plain + effect.sets):
                if results.value(effect.lesson, sets, seed, effect.measure) is None:
                    wanted.setdefault((effect.lesson, sets), []).append(effect.measure)
        for (lesson, sets), measures in wanted.items():
            results.add(*measured(folder, lesson, sets, seed=seed, measures=list(dict.fromkeys(measures))))


def costs(folder: Path, effects: Sequence[Effect], results: Results) -> None:
    """Measure what steps cost, where that is not known."""
    for effect in effects:
        if results.cost(effect) is None:
            results.add(cost(folder, effect))


def summary(results: Results, *, seeds: Sequence[int]) -> dict[str, Any]:
    """What is committed: of each record its values at the seeds and its cost."""
    found = {}
    for effect in EFFECTS:
        if pairs := results.pairs(effect, seeds):
            plain, with_it = zip(*pairs, strict=True)
            line = results.cost(effect)
            found[effect.name] = {"plain": plain, "with": with_it, "cost": line["cost"] if line else None}
    machine = f"{os.cpu_count()} shared {platform.machine()} cores, 1 thread, torch {torch.__version__.split('+')[0]}"
    return {"date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}", "machine": machine, "effects": found}


def told(effect: Effect, pairs: Sequence[tuple[float, float]], line: Line | None) -> str:
    """One line for the eye."""
    plain, with_it = (statistics.fmean(each) for each in zip(*pairs, strict=True))
    held = sum(effect.holds(*pair) for pair in pairs) if effect.claims else "-"
    ratio = f"{line['cost']:.2f} x" if line else ""
    return f"{effect.name:50} {effect.measure:25} {plain:5.2f} {with_it:5.2f}  held {held} of {len(pairs)}  {ratio}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(prog="python -m bench.effects", description="What each method does.")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="words of the records' names; default: all")
    parser.add_argument("--seeds", type=int, default=5, help="from 1 on; 0: seed 0 alone, for trying")
    parser.add_argument("--out", type=Path, help="JSON lines, one a figure; what is there is not measured again")
    parser.add_argument("--write", action="store_true", help="measure nothing, make bench/effects.json of --out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results, seeds = Results(options.out), range(1, 1 + options.seeds) if options.seeds else [0]
    if options.write:
        kept = summary(results, seeds=seeds)
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in kept.pop("effects").items())
        KEPT.write_text(f'{json.dumps(kept)[:-1]}, "effects": {{\n{rows}\n}}}}\n', encoding="utf-8")
        return 0
    chosen = [one for one in EFFECTS if not options.methods or any(word in one.name for word in options.methods)]
    with tempfile.TemporaryDirectory() as name:
        measure_all(Path(name), chosen, results, seeds=seeds)
        costs(Path(name), chosen, results)
    held = True
    for effect in chosen:
        pairs = results.pairs(effect, seeds)
        held &= not effect.claims or all(effect.holds(*pair) for pair in pairs)
        print(told(effect, pairs, results.cost(effect)))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
