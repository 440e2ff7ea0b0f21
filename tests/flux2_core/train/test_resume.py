"""R10, exact resume: 20 cut points bit for bit, and 9 pairs of world sizes within 1e-5 in the same sample order."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.run import checkpoint, metrics, recorded
from flux2_core.run.checkpoint import Checkpoint
from flux2_core.run.folder import RunFolder
from flux2_core.train import schedules
from flux2_core.train.loop import run
from flux2_core.train.trainer import Trainer
from tests.in_process import fill_cache, in_ranks, process_group

Make = Callable[..., Config]
STEPS = 21
LIVELY: dict[str, Any] = {  # everything that could go on differently
    "steps": STEPS,
    "batch_size": 2,
    "caption_dropout": 0.3,
    "schedule": "cosine-restarts",
    "warmup_steps": 4,
    "ema": 0.9,
}
SPREAD = (1, 6, 10, 14, 20)


class Killed(BaseException):
    """The process ends here."""


def train(config: Config, *, stop: int | None = None) -> None:
    """Train, ending after `stop` steps as a killed process would: nothing is written beyond the last checkpoint."""

    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == stop:
            raise Killed

    with contextlib.suppress(Killed):
        run(Trainer(config), on_step)


def end(config: Config) -> Checkpoint:
    found = checkpoint.newest(RunFolder(config).checkpoints)
    assert found is not None
    return found


def same_bits(ours: Checkpoint, theirs: Checkpoint) -> bool:
    """Weights, average, optimizer, counters, RNG and position (all random draws follow from the step)."""
    parts = [(getattr(ours, part), getattr(theirs, part)) for part in checkpoint.PARTS]
    return (
        (ours.step, ours.facts) == (theirs.step, theirs.facts)
        and all(a.keys() == b.keys() for a, b in parts)
        and all(torch.equal(a[name], b[name]) for a, b in parts for name in a)
    )


def told(config: Config) -> list[tuple[Any, ...]]:
    """What each step recorded that does not depend on the clock."""
    fields = ("step", "loss", "smoothed", "learning_rate", "grad_norm", "epoch")
    return [tuple(record[field] for field in fields) for record in metrics.read(RunFolder(config).metrics)]


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, photos: Path
) -> Iterator[tuple[Callable[[str, int], Config], Config]]:
    """A run that nothing disturbed, and how to make the same run under another name."""
    folder = tmp_path_factory.mktemp("resume")

    def config(name: str, save_every: int) -> Config:
        return parse(
            {
                "run": name,
                "model": {"path": str(tiny_model)},
                "data": [{"path": str(photos), "trigger": "sks", "resolutions": [64], "repeats": 2}],
                "text": {"dtype": "fp32", "max_length": 96},
                "latents": {"dtype": "fp32"},
                "lora": {"rank": 2, "targets": "tiny"},
                "train": LIVELY,
                "validate": {"every": 0},
                "output": {"root": str(folder / "runs"), "cache": str(folder / "cache"), "save_every": save_every},
            }
        )

    whole = config("straight", STEPS)
    fill_cache(whole)
    with process_group(folder):
        train(whole)
        yield config, whole


@pytest.mark.parametrize(
    "cut", [pytest.param(n, marks=() if n in SPREAD else pytest.mark.all_cases) for n in range(1, STEPS)]
)
def test_cut_anywhere_is_bit_exact(straight: tuple[Callable[[str, int], Config], Config], cut: int) -> None:
    """Killed after step `cut`, with checkpoints every 1 to 4 steps, and started again: every bit of the end is equal,
    and `metrics.jsonl` has each step once with the same numbers."""
    make, whole = straight
    config = make(f"cut-{cut}", 1 + cut % 4)
    train(config, stop=cut)
    train(config)
    assert same_bits(end(config), end(whole))
    assert told(config) == told(whole)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_more_steps_go_on(straight: tuple[Callable[[str, int], Config], Config], schedule: str) -> None:
    """A finished run that is given more steps goes on from its end: at a constant rate it ends as one that had them
    from the start, bit for bit; a rate that follows all steps bends, and that is said with both rates."""
    make, _ = straight

    def config(name: str, steps: int) -> Config:
        made = make(f"{name}-{schedule}", 2)
        return made.model_copy(update={"train": made.train.model_copy(update={"steps": steps, "schedule": schedule})})

    short, longer, whole = config("more", 7), config("more", 9), config("at-once", 9)
    recorded.write(RunFolder(short))
    train(short)
    recorded.check(RunFolder(longer))
    assert recorded.lengthened(RunFolder(longer)) == 7
    said = schedules.bend(longer.train, 7)
    for each in (longer, whole):
        train(each)
    assert same_bits(end(longer), end(whole)) == (schedule == "constant")
    assert (said is None) == (schedule == "constant")
    if said:
        last, first = (told(longer)[step][3] for step in (6, 7))
        assert f"a rate of {last:.3g} in step 7 it is {first:.3g}" in said


def test_the_comparison_sees_a_difference(straight: tuple[Callable[[str, int], Config], Config]) -> None:
    """One bit of the optimizer's state, flipped at step 3 of 21, is seen by what the cut points are judged by."""
    make, whole = straight
    config = make("other", 3)
    train(config, stop=3)
    last = end(config)
    moments = next(value for value in last.optimizer.values() if value.ndim)
    moments.view(torch.uint8).view(-1)[2] ^= 64  # the highest bit of a mantissa: the lowest one may round away
    checkpoint.write(RunFolder(config).checkpoints, last, keep=3)
    train(config)
    assert not same_bits(end(config), end(whole))


def work(rank: int, world: int, tree: str, stop: int | None) -> None:
    """What one process of a group does: train up to a checkpoint, and say which samples it saw."""
    config = parse(json.loads(tree))
    trainer = Trainer(config, rank=rank, world=world)
    seen = []
    batch_of = trainer.data.batch

    def noted(step: int, **place: int) -> Any:
        batch = batch_of(step, **place)
        seen.append((step, batch.ids))
        return batch

    trainer.data.batch = noted  # type: ignore[method-assign]

    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == stop:
            raise Killed

    with contextlib.suppress(Killed):
        run(trainer, on_step)
    (RunFolder(config).path / f"seen-{world}-{rank}.json").write_text(json.dumps(sorted(seen)))


PAIRS = [(first, then) for first in (1, 2, 4) for then in (1, 2, 4)]


@pytest.mark.parametrize(
    ("first", "then"),
    [pytest.param(*pair, marks=() if pair in ((2, 1), (1, 4)) else pytest.mark.all_cases) for pair in PAIRS],
)
def test_world_sizes(
    straight: tuple[Callable[[str, int], Config], Config], make_config: Make, tmp_path: Path, first: int, then: int
) -> None:
    """6 steps on `first` workers, then 6 on `then`: the samples of each step are those of one worker, losses within
    1e-5. A batch of 3 deals unevenly; on 4 workers one has no sample at all."""
    make, _ = straight
    batch = {"steps": 12, "batch_size": 3, "preservation": "blank"}

    def config(name: str) -> Config:
        tree = make(name, 6).model_dump(mode="json", by_alias=True)
        return parse(tree | {"train": tree["train"] | batch})

    alone, resized = config("alone-3"), config(f"from-{first}-to-{then}")
    if not RunFolder(alone).path.exists():
        train(alone)
    folder = RunFolder(resized).path
    shutil.rmtree(folder, ignore_errors=True)
    tree = resized.model_dump_json(by_alias=True)
    in_ranks(first, work, tree, 7, folder=tmp_path)
    assert end(resized).step == 6
    before = told(resized)[:6]
    in_ranks(then, work, tree, None, folder=tmp_path)
    assert told(resized)[:6] == before
    for ours, theirs in zip(told(resized), told(alone), strict=True):
        assert ours[0] == theirs[0]
        assert ours[1:5] == pytest.approx(theirs[1:5], rel=1e-5)
    data = Trainer(alone).data
    wanted = [[data.train[i]["id"] for i in data.order.batch(step)] for step in range(6, 12)]
    seen = [json.loads((folder / f"seen-{then}-{rank}.json").read_text()) for rank in range(then)]
    assert [[x for part in seen for x in dict(part)[step]] for step in range(6, 12)] == wanted
