"""Every choice of the configuration is tied to what implements it: to one table of its room, or to ifs that say why."""

import ast
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest

from flux2_core.config.reading import fields, parse
from flux2_core.errors import UsageError
from flux2_core.lora.kinds import KINDS
from flux2_core.lora.targets import PRESETS
from flux2_core.model import quanto
from flux2_core.model.folder import FAMILIES
from flux2_core.model.frozen_linear import NEEDS
from flux2_core.model.tensor_bytes import DTYPES
from flux2_core.noise import DISTRIBUTIONS
from flux2_core.placement.planner import BYTES, STRATEGY_COST
from flux2_core.train.losses import DELTAS, LOSSES, WEIGHTINGS
from flux2_core.train.methods.table import METHODS
from flux2_core.train.optimizers import OPTIMIZERS
from flux2_core.train.schedules import CURVES

AUTO, NONE = {"auto"}, {"none"}  # `auto` is resolved, to one of the others; `none` leaves the thing out
TABLES: dict[str, Callable[[], Collection[str]]] = {  # values of each key, as its tables have them
    "model.family": lambda: {family.name for family in FAMILIES.values()},
    "text.dtype": lambda: DTYPES,
    "text.tokens": lambda: {"reference"}.union(*(family.split_patterns for family in FAMILIES.values())),
    "text.quantize": lambda: NONE | quanto.QTYPES.keys(),
    "latents.dtype": lambda: DTYPES,
    "lora.kind": lambda: KINDS,
    "train.optimizer": lambda: OPTIMIZERS,
    "train.schedule": lambda: CURVES,
    "noise.distribution": lambda: DISTRIBUTIONS,
    "loss.kind": lambda: LOSSES,
    "loss.delta_schedule": lambda: DELTAS,
    "loss.weighting": lambda: WEIGHTINGS,
    "train.preservation": lambda: NONE | METHODS.keys() - {"flow", "rollout", "preference", "slider"},
    "train.precision": lambda: AUTO | BYTES.keys() | NEEDS.keys(),
    "cluster.strategy": lambda: AUTO | STRATEGY_COST.keys(),
}


@dataclass(frozen=True)
class Ifs:
    """Values that a module tells apart by plain ifs, those that are what is left, and why there is no table."""

    module: str
    told: set[str]
    left: set[str]
    why: str


IFS = {
    "data[].crop": Ifs("data.pictures.buckets", {"random", "corner"}, {"center"}, "two fixed places and drawn ones"),
    "data[].crop_aspect": Ifs("data.pictures.buckets", {"preserve", "square"}, {"closest"}, "which buckets are listed"),
    "data[].reference_size": Ifs("data.samples", {"target"}, set(), "the target's pixels, or a number"),
    "data[].regularisation": Ifs("train.methods.flow", {"prior"}, set(), "yes, no, or with another target"),
    "text.stored": Ifs("cache.settings", {"projected"}, {"raw"}, "one more product, or none"),
    "text.pads": Ifs("model.text_encoder", {"stored", "computed", "skipped"}, set(), "what of one pass is left out"),
    "latents.decoder": Ifs("data.pictures.decode", {"fast"}, {"pil"}, "a short cut for JPEGs, before Pillow"),
    "latents.precision": Ifs("model.vae", {"bf16"}, {"fp32"}, "its encoder is rounded, or not"),
    "loss.contrastive_schedule": Ifs("train.methods.flow", {"sigma"}, {"constant"}, "grows with the noise, or not"),
    "noise.bias": Ifs("noise", {"none", "content", "style"}, set(), "one power, from either end, or none"),
    "noise.shift": Ifs("noise", {"none", "tokens", "flux2"}, set(), "three words, or a number"),
    "train.pad_rows": Ifs("cache.prompt_rows", {"zeros"}, {"reference"}, "one row, or zeros in its place"),
    "train.compile": Ifs("placement.compiled", {"auto"}, set(), "yes, no, or by the card and the steps"),
    "train.recompute": Ifs("placement.planner", {"auto", "none", "selective", "full"}, set(), "a policy, or a number"),
}


def values(annotation: Any) -> Iterator[str]:
    """Values of the Literals in an annotation, also of those in a union, a list or an `Annotated`."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        yield from arguments
    else:
        for argument in arguments:
            yield from values(argument)


CHOICES = {key: {*found} for key, field in fields() if (found := [*values(field.annotation)])}


def test_every_choice_has_a_home() -> None:
    """A new Literal of the configuration fails here until it names its table, or says why it needs none."""
    assert CHOICES.keys() == TABLES.keys() | IFS.keys()
    assert not TABLES.keys() & IFS.keys()
    assert CHOICES["train.recompute"] == {"auto", "none", "selective", "full"}, "a union's Literal is seen"


@pytest.mark.parametrize("key", TABLES)
def test_a_choice_is_its_table(key: str) -> None:
    """The configuration allows what the table implements: no value without a function, none that nobody can reach."""
    assert CHOICES[key] == {*TABLES[key]()}


@pytest.mark.parametrize("key", IFS)
def test_ifs_know_every_value(key: str) -> None:
    """Where ifs decide, the module names every value but those that are left, and a new value has to be placed."""
    ifs = IFS[key]
    path = import_module(f"flux2_core.{ifs.module}").__file__
    assert path is not None
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert ifs.told | ifs.left == CHOICES[key]
    assert ifs.told <= strings
    assert ifs.why


@pytest.mark.parametrize("key", CHOICES)
def test_another_value_is_refused_by_name(key: str) -> None:
    """A value that is in no table is refused when the configuration is read, with the key and what is allowed."""
    section, _, name = key.rpartition(".")
    tree: dict[str, Any] = {"model": {"path": "m"}, "data": [{"path": "d"}]}
    given = {name: "nonsense"}
    if section == "data[]":
        tree["data"][0] |= given
    else:
        tree[section] = tree.get(section, {}) | given
    with pytest.raises(UsageError) as refused:
        parse(tree)
    said = str(refused.value)
    assert key.replace("[]", ".0") in said
    assert all(value in said for value in CHOICES[key])


def test_presets_are_described() -> None:
    """`lora.targets` takes any expression; the presets among them are those that its description tells of."""
    description = dict(fields())["lora.targets"].description or ""
    assert set(description.split("`")[1::2]) == PRESETS.keys()
