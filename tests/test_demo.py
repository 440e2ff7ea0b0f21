"""The demo, as `make demo` runs it, judged by looking at pixels: the LoRA learned what the base model cannot draw."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from flux2_core.config.reading import load
from flux2_core.config.sections import Model
from flux2_core.embedded import MODEL_FOLDER, demo_data
from flux2_core.embedded.checker import agrees, look
from flux2_core.embedded.demo_data import demo_prompts, shows
from flux2_core.embedded.score import draw_prompts, held_out_prompts, load_transformer
from flux2_core.lora import reading
from flux2_core.lora.adapter import attach
from flux2_core.model.folder import resolve
from flux2_core.run.metrics import read
from flux2_core.train.loop import run
from flux2_core.train.trainer import Trainer
from tests.flows.command import Project
from tests.in_process import PARTS, fill_cache, process_group

ROOT = Path(__file__).parents[1]
KINDS = {"demo": ("subject", "hoot"), "style": ("style", "etch")}


def drawn(prompts: Sequence[str], adapter: dict[str, torch.Tensor] | None, *, seed: int) -> np.ndarray:
    """Pictures of the embedded model, with an adapter or without."""
    model = resolve(Model(path=str(MODEL_FOLDER)), parts=PARTS)
    transformer = load_transformer(model)
    if adapter is not None:
        attach(transformer, adapter, device=torch.device("cpu"))
    return draw_prompts(model, transformer, prompts, seed=seed)


def share_shown(kind: str, trigger: str, adapter: dict[str, torch.Tensor] | None) -> float:
    """Share of 50 prompts, none of which training saw, whose picture shows the concept."""
    prompts = [prompt.replace("[trigger]", trigger) for prompt in demo_prompts(kind, 50, seed=3)]
    return float(np.mean([shows(kind, picture) for picture in drawn(prompts, adapter, seed=3)]))


def neighbours(adapter: dict[str, torch.Tensor]) -> dict[str, float]:
    """Share of 50 scenes of the base model's own world that still have their colour and their shape, and share that
    show a demo's concept though nothing called it."""
    scenes, prompts = zip(*held_out_prompts(50, seed=5), strict=True)
    pictures = drawn(prompts, adapter, seed=5)
    verdicts = [agrees(look(picture), scene) for picture, scene in zip(pictures, scenes, strict=True)]
    kept = {what: float(np.mean([verdict[what] for verdict in verdicts])) for what in ("colour", "shape")}
    return kept | {kind: float(np.mean([shows(kind, picture) for picture in pictures])) for kind in demo_data.KINDS}


def taught(folder: Path, *overrides: str, data_sets: int = 2) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The adapter of the demo's configuration, trained in this process, and its validation losses."""
    places = (f"output.root={folder}", f"output.cache={folder}", "validate.prompts=[]", f"model.path={MODEL_FOLDER}")
    config = load(ROOT / "examples/demo.toml", [*places, *data_places("demo"), *overrides])
    config = config.model_copy(update={"data": config.data[:data_sets]})
    fill_cache(config)
    with process_group(folder):
        trainer = Trainer(config)
        run(trainer, lambda record: None)
    return trainer.weights(), [record["loss"] for record in read(trainer.folder.validation)]


def data_places(name: str) -> tuple[str, str]:
    """Overrides that find a demo's data sets from any folder."""
    return f"data.0.path={ROOT / 'examples' / KINDS[name][0]}", f"data.1.path={ROOT / 'examples' / 'shapes'}"


@pytest.mark.slow
def test_preservation_keeps_the_neighbours(tmp_path: Path) -> None:
    """60 steps of two owls: the validation loss falls alike to under half with Differential Output Preservation and
    without; with it what the base model drew stays, without it colours and shapes are lost."""
    steps = ("train.steps=60", "train.batch_size=2", "validate.every=60", "train.learning_rate=2e-3")
    steps += ("train.schedule=constant", "lora.rank=16", "lora.alpha=16")
    kept = ("train.preservation=dop", "data.0.class_name=circle")
    with_it, without = (
        taught(tmp_path / name, *steps, *more, data_sets=1) for name, more in (("with", kept), ("without", ()))
    )
    for _, losses in (with_it, without):
        assert losses[-1] < losses[0] / 2
    found, lost = neighbours(with_it[0]), neighbours(without[0])
    assert found["colour"] >= 0.85 > 0.75 >= lost["colour"]
    assert found["shape"] >= lost["shape"] + 0.15


@pytest.mark.ray
@pytest.mark.prefect
@pytest.mark.all_cases
@pytest.mark.parametrize("name", ["demo", "style"])
def test_the_demo_teaches_its_concept(name: str, tmp_path: Path) -> None:
    """With the LoRA at least 80 % of 50 prompts that training never saw show the concept, of the base model's at most
    5 %; without the trigger next to none does, and colours stay; the validation loss falls to under a third."""
    project = Project(tmp_path, model=MODEL_FOLDER, photos=ROOT / "examples" / name)
    project.file.write_text((ROOT / "examples" / f"{name}.toml").read_text())
    result = project.json("run", f"model.path={MODEL_FOLDER}", *data_places(name))
    losses = [record["loss"] for record in read(tmp_path / "runs" / name / "validation.jsonl")]
    assert losses[-1] < losses[0] / 3
    kind, trigger = KINDS[name]
    adapter = reading.from_file(result["lora"]["diffusers"])
    assert share_shown(kind, trigger, None) <= 0.05
    assert share_shown(kind, trigger, adapter) >= 0.8
    found = neighbours(adapter)
    assert found[kind] <= 0.05
    assert found["colour"] >= 0.8
