"""All pairs of options: each is refused by name, or trains and shows what both do; no pair is silently wrong.

A run is three steps of the real trainer on the tiny model. What is seen of it are aspects: what was drawn, what was
computed. An option is compared with the plain run (or with the option that it is over), a pair with each of its two.
"""

import functools
import hashlib
import itertools
import logging
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_core import embedded
from flux2_core.cache import index
from flux2_core.config.reading import fields, parse
from flux2_core.config.sections import Config
from flux2_core.data import needs
from flux2_core.embedded.tiny_model import build_klein_model, build_model
from flux2_core.errors import CacheloomError
from flux2_core.lora import adapter, file, targets
from flux2_core.model import transformer
from flux2_core.model.folder import TRAINING_PARTS, resolve
from flux2_core.placement import compiled
from flux2_core.store.hashing import digest
from flux2_core.train import preflight
from flux2_core.train.trainer import Trainer
from tests.flux2_core.config.test_tables import values
from tests.flux2_core.train.options import APART, EXCUSED, OPTIONS, REFUSED
from tests.in_process import fill_cache

STEPS = 3
# Up to a relative distance, by sums of sizes; all else to the bit. Adam turns the rounding of a gradient near 0 into a
# whole step, of one weight in ten thousand
COMPUTED = {"texts": 1e-5, "losses": 5e-6, "norms": 2e-5, "adapter": 1e-4}
LEARNED = ("losses", "norms", "adapter")  # are one aspect: what is seen in any of them is seen
FOLLOWS = {  # aspects that change with others, by what they are of: only where these do not may they not
    "latents": {"samples"}, "texts": {"samples", "noise"}, "masks": {"samples"}, "references": {"samples"},
    "shares": {"samples"}, "noise": {"samples"}, "levels": {"samples"}, "counts": {"samples", "levels"},
}  # fmt: skip
PLAIN: frozenset[str] = frozenset()

Names = frozenset[str]


@dataclass(frozen=True)
class Seen:
    """What a run showed, by aspect; or why it was refused."""

    aspects: dict[str, Any]
    refused: str = ""

    @property
    def finite(self) -> bool:
        """Whether all that it computed is."""
        return all(bool(torch.isfinite(self.aspects[aspect]).all()) for aspect in COMPUTED)


def pictures(folder: Path) -> None:
    """What is learned (JPEGs and half-transparent PNGs of several shapes), with masks and references; and a class."""
    rng = np.random.default_rng(0)
    sizes = {0: (320, 96), 1: (80, 72), 2: (160, 240), 3: (64, 96), 4: (300, 90), 5: (64, 64), 6: (48, 48), 7: (72, 80)}
    for name in ("own", "worse", "masks", "looks", "class"):
        (folder / name).mkdir()
    for place, (height, width) in sizes.items():
        noise = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        picture, mask = Image.fromarray(noise), np.zeros((height, width), dtype=np.uint8)
        mask[:, : width // 2] = 255
        if place % 2:
            picture.putalpha(Image.fromarray(np.roll(mask // 2 + 60, height // 3)))
        Image.fromarray(255 - noise).save(folder / "worse" / f"p{place}.png")
        picture.save(folder / "own" / f"p{place}.{'png' if place % 2 else 'jpg'}")
        Image.fromarray(mask).save(folder / "masks" / f"p{place}.png")
        Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(folder / "looks" / f"p{place}.png")
        whose = "a tower" if place in (0, 5) else "[trigger]"
        if place != 7:
            (folder / "own" / f"p{place}.txt").write_text(f"a photo of {whose}, number {place}, on grass")
    for place in range(3):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / "class" / f"c{place}.png")
        (folder / "class" / f"c{place}.txt").write_text(f"a photo of a dog, number {place}")


class Runs:
    """Runs of combinations of options in one folder; each cache is filled once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.filled: set[str] = set()
        pictures(folder)
        build_model(folder / "dev")
        build_klein_model(folder / "klein")
        for model in ("dev", "klein"):  # a trained VAE, as bf16 is refused of a random one
            shutil.copytree(
                Path(embedded.__file__).parent / "model" / "vae", folder / model / "vae", dirs_exist_ok=True
            )
        for place, (name, rank) in enumerate((("own", 4), ("look", 2))):
            config = self.config({"lora.rank": rank, "train.seed": place})
            built = transformer.build(resolve(config.model, parts=TRAINING_PARTS), dtype=torch.float32)
            adapter.inject(built, config.lora, targets.match(config.lora, transformer.linear_names(built)))
            rng = torch.Generator().manual_seed(place)
            weights = {each: 0.1 * torch.randn(one.shape, generator=rng) for each, one in adapter.parameters(built)}
            file.write(folder, name, weights, metadata={}, dtype="fp32")
        self.of = functools.lru_cache(maxsize=512)(self._of)

    def config(self, values: Mapping[str, Any]) -> Config:
        """The plain configuration with some values."""
        own = {"path": Path("own"), "trigger": "sks", "class_name": "a cat", "resolutions": [64]}
        tree: dict[str, Any] = {
            "max_quarantined": 1.0,
            "model": {"path": Path("dev")},
            "data": {"0": own},
            "text": {"dtype": "fp32", "max_length": 96},
            "latents": {"dtype": "fp32"},
            "lora": {"rank": 4},
            "train": {"steps": STEPS, "batch_size": 3, "learning_rate": 1e-2, "max_grad_norm": 1e6},
            "validate": {"every": 0, "held_out": 0.0},
            "output": {"root": Path("runs"), "cache": Path("cache")},
        }
        for key, value in values.items():
            *sections, leaf = key.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[leaf] = value
        return parse(self._placed(tree | {"data": list(tree["data"].values())}))

    def _placed(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._placed(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._placed(each) for each in value]
        return str(self.folder / value) if isinstance(value, Path) else value

    def _of(self, names: Names) -> Seen:
        """Three steps with some options."""
        values = together(names)
        assert values is not None
        try:
            return Seen(self.show(self.config(values)))
        except CacheloomError as refused:
            return Seen({}, str(refused))

    def show(self, config: Config) -> dict[str, Any]:
        """What three steps of a configuration show."""
        model = resolve(config.model, parts=TRAINING_PARTS)
        preflight.check(config, model, parts=TRAINING_PARTS)
        needed = digest([index.settings(config), [sorted(part) for part in needs.of(config)]])[:16]
        config = config.model_copy(update={"run": needed})
        if needed not in self.filled:
            fill_cache(config)
            self.filled.add(needed)
        trainer = Trainer(config)
        passes: list[bool] = []
        trainer.transformer.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        begun = digested(trainer.adapter.values())
        batches = [trainer.data.batch(step) for step in range(STEPS)]
        records = [trainer.train_step(batch) for batch in batches]
        weights = trainer.weights()
        kept = config.cluster.rounded is not None and any(Path(config.cluster.rounded).iterdir())
        return {
            "samples": [batch.ids for batch in batches],
            "latents": digested(batch.latents_Bchw for batch in batches),
            "noise": digested(batch.noise_Bchw[:, 0, 0, 0] for batch in batches),
            "levels": digested(batch.sigma_B for batch in batches),
            "counts": digested(batch.counts_B for batch in batches),
            "told": digested(batch.guidance_B for batch in batches),
            "texts": torch.cat([batch.prompts_BLD.flatten() for batch in batches]),
            "shares": digested(batch.weight_B for batch in batches),
            "masks": digested(batch.mask_Bhw for batch in batches if batch.mask_Bhw is not None),
            "references": digested(one for batch in batches for one in batch.references_RBchw),
            "rates": [record["learning_rate"] for record in records],
            "passes": [len(passes), sum(passes)],
            "placed": [trainer.placement.strategy, trainer.placement.precision, trainer.placement.recompute, kept],
            "begun": begun,
            "losses": torch.tensor([record["loss"] for record in records]),
            "norms": torch.tensor([record["grad_norm"] for record in records]),
            "adapter": torch.cat([weights[name].flatten() for name in sorted(weights)]),
            "average": any(not torch.equal(trainer.ema[name], weights[name]) for name in trainer.ema),
        }


def digested(tensors: Any) -> str:
    """Shapes and bytes of tensors, in order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str(tensor.shape).encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def together(names: Names) -> dict[str, Any] | None:
    """Values of several options, of one's own keys before those of what one is over; None where two contradict."""
    found: dict[str, Any] = {}
    for strong in (True, False):
        given = [item for name in sorted(names) for item in OPTIONS[name].part(strong).items() if item[0] not in found]
        for key, value in given:
            if found.setdefault(key, value) != value:
                return None
    return found


def same(aspect: str, ours: Any, theirs: Any) -> bool:
    """Whether an aspect is the same, up to rounding where it is computed."""
    if aspect not in COMPUTED:
        return bool(ours == theirs)
    if ours.shape != theirs.shape:
        return False
    return float((ours - theirs).norm(p=1)) <= COMPUTED[aspect] * max(float(theirs.norm(p=1)), 1e-12)


def moved(ours: Seen, theirs: Seen) -> set[str]:
    """Aspects in which two runs differ."""
    found = {aspect for aspect in ours.aspects if not same(aspect, ours.aspects[aspect], theirs.aspects[aspect])}
    return {"learned" if aspect in LEARNED else aspect for aspect in found}


def beneath(name: str) -> Names:
    """What an option is compared with: nothing, or what it is over."""
    over = OPTIONS[name].over
    return frozenset({over}) if over else PLAIN


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """Without a warning of diffusers' for each model that is cast, of no modules at all: it would bury a failure."""
    log = logging.getLogger("diffusers.models.modeling_utils")
    level = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(level)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Pictures, models and LoRAs for all options."""
    return Runs(tmp_path_factory.mktemp("options"))


PAIRS = [
    pair
    for pair in itertools.combinations(OPTIONS, 2)
    if together(frozenset(pair)) is not None and pair[0] != OPTIONS[pair[1]].over and pair[1] != OPTIONS[pair[0]].over
]
REFUSALS = {frozenset(pair): each for each in REFUSED for pair in itertools.product(each.ones, each.others)}


def wrong(runs: Runs, one: str, other: str) -> Iterator[str]:
    """What is wrong with a pair, in words: a refusal that nobody expects or that does not come, an option unseen."""
    names = frozenset({one, other})
    both, expected = runs.of(names), REFUSALS.get(names)
    if both.refused or expected:
        if not (both.refused and expected and re.search(expected.says, both.refused)):
            yield f"{one} + {other}: refused {both.refused or 'by nothing'!r}, and expected is {expected}"
        elif not any(key.rsplit(".", 1)[-1] in both.refused for name in names for key in OPTIONS[name].values):
            yield f"{one} + {other}: {both.refused!r} names no key of either"
        return
    if not both.finite:
        yield f"{one} + {other}: the loss is not finite"
    for mine, partner in ((one, other), (other, one)):
        beside = beneath(mine) | {partner}
        found = moved(both, runs.of(beside if together(beside) is not None else frozenset({partner})))
        moves = OPTIONS[mine].moves
        known = excused(mine, partner)
        unseen = moves - found - known
        if OPTIONS[mine].sets.keys() & OPTIONS[partner].beneath.keys() and found & moves:
            unseen = set()  # another value of what the other one is over: some of it was there before
        also = {aspect for aspect in found - moves - known if not FOLLOWS.get(aspect, frozenset()) & moves}
        if unseen or also:
            yield f"{mine} beside {partner}: nothing is seen of it in {sorted(unseen)}; it moves {sorted(also)} too"


def excused(mine: str, partner: str) -> set[str]:
    """Aspects in which an option rightly does otherwise beside another one than alone."""
    return {aspect for each in EXCUSED if mine in each.ones and partner in each.others for aspect in each.aspects}


def cached(name: str) -> bool:
    """Whether an option may decide what is encoded, so that a pair with it needs a cache of its own."""
    return any(key.split(".")[0] in ("data", "text", "latents", "model") for key in OPTIONS[name].values)


def spread(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs among which each option is, not many more than that takes; first those that need no cache or run more."""
    missing, found = set(OPTIONS), []
    drawn = random.Random(0).sample(pairs, len(pairs))
    for pair in sorted(drawn, key=lambda pair: (all(map(cached, pair)), beneath(pair[0]) != beneath(pair[1]))):
        if missing.issuperset(pair) or (len(missing) < len(OPTIONS) // 10 and missing.intersection(pair)):
            found.append(pair)
            missing -= {*pair}
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_alone(runs: Runs, name: str) -> None:
    """Each option trains three steps with finite losses, and changes what it says that it does, and nothing else."""
    alone = runs.of(frozenset({name}))
    assert not alone.refused
    assert alone.finite
    assert moved(alone, runs.of(beneath(name))) == OPTIONS[name].moves


@pytest.mark.parametrize(("one", "other"), spread(PAIRS))
def test_a_spread_of_pairs(runs: Runs, one: str, other: str) -> None:
    """Each option beside another one: both are seen, or the pair is refused as expected."""
    said = "\n".join(wrong(runs, one, other))
    assert not said, said


@pytest.mark.all_cases
@pytest.mark.parametrize("one", OPTIONS)
def test_every_pair(runs: Runs, one: str) -> None:
    """Each option beside every other one: both are seen, or the pair is refused as expected."""
    said = "\n".join(said for pair in PAIRS if pair[0] == one for said in wrong(runs, *pair))
    assert not said, said  # as a message: pytest cuts what it compares


@pytest.mark.parametrize("names", REFUSALS, ids=lambda names: " + ".join(sorted(names)))
def test_a_pair_is_refused(runs: Runs, names: Names) -> None:
    """What excludes each other is refused with a key of one of both and a way out, before anything is encoded."""
    said = "\n".join(wrong(runs, *sorted(names)))
    assert not said, said
    assert REFUSALS[names].why


@pytest.mark.all_cases
@pytest.mark.parametrize("partner", ["dop", "contrastive", "references", "preset", "train.precision=int8"])
def test_compiled_beside(runs: Runs, monkeypatch: pytest.MonkeyPatch, partner: str) -> None:
    """Blocks that are compiled (to graphs that torch runs as they are) learn the same beside another option."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    both = Seen(runs.show(runs.config(OPTIONS[partner].values | {"train.compile": True})))
    assert compiled.Compiled("eager").told > 0
    assert moved(both, runs.of(frozenset({partner}))) == set()


SECTIONS = ("lora", "train", "noise", "loss", "data[]", "tread", "rollout", "slider", "text", "latents")


def test_every_key_is_an_option() -> None:
    """Every key of what training depends on is in a record, with each value that it can choose, or has a reason."""
    set_by = [
        (re.sub(r"\.\d+\.", "[].", key), value) for option in OPTIONS.values() for key, value in option.sets.items()
    ]
    known = {(key, value) for key, value in set_by if isinstance(value, str)}
    wanted = {key: field for key, field in fields() if key.split(".")[0] in SECTIONS}
    assert wanted.keys() - {key for key, _ in set_by} == APART.keys() - {key for key in APART if "=" in key}
    choices = {(key, value) for key, field in wanted.items() for value in values(field.annotation) if key not in APART}
    plain = {(key, wanted[key].default) for key, _ in choices}
    assert {f"{key}={value}" for key, value in choices - known - plain} == {key for key in APART if "=" in key}
