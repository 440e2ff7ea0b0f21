"""Roles of texts: what a sample can have, what a configuration needs, how `show` calls them."""

from typing import Any

import pytest

from flux2_core.config.dataset import Data
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.data import needs
from flux2_core.data import texts as data_texts
from flux2_core.data.texts import common_texts, named, of_sample
from flux2_core.store import schemas


def config(**sections: Any) -> Config:
    data = {"path": "d", "trigger": "sks", "class_name": "dog"}
    return parse({"model": {"path": "m"}, "data": [data], **sections})


CAPTIONS = ["a photo of sks, no risks", "sks"]


def test_what_a_sample_has() -> None:
    """The trigger alone, the class alone, and each caption with the class at the trigger's word boundaries."""
    assert of_sample(Data(path="d", trigger="sks", class_name="dog"), CAPTIONS) == [
        ("trigger_only", "sks"),
        ("class_only", "dog"),
        ("dop", "a photo of dog, no risks"),
        ("dop", "dog"),
    ]
    assert of_sample(Data(path="d", trigger="sks"), CAPTIONS) == [("trigger_only", "sks")]
    assert of_sample(Data(path="d"), CAPTIONS) == []
    assert of_sample(Data(path="d", class_name="dog", regularisation=True), CAPTIONS) == []


@pytest.mark.parametrize(
    ("sections", "needed", "texts"),
    [
        ({}, set(), set()),
        ({"train": {"trigger_dropout": 0.1}}, {"trigger_only"}, {"sks"}),
        ({"train": {"preservation": "dop"}}, {"dop", "class_only"}, {"dog", "a photo of dog, no risks"}),
        ({"train": {"preservation": "blank", "caption_dropout": 0.1}}, set(), set()),
        ({"validate": {"negative": "ugly", "guidance": 4.0}}, set(), {"ugly"}),
        ({"validate": {"prompts": ["a [trigger]", "sks"]}}, set(), {"a sks"}),
    ],
)
def test_what_a_configuration_needs(sections: dict[str, Any], needed: set[str], texts: set[str]) -> None:
    """Only the roles in use are encoded, each text once, whoever needs it; the empty caption always is."""
    made = config(**sections)
    assert needs.of(made).roles == needed
    own = [{"role": role, "text": text, "key": text} for role, text in of_sample(made.data[0], CAPTIONS)]
    rows = [{"id": str(n), "captions": CAPTIONS, "roles": own} for n in range(2)]
    wanted = data_texts.texts(made, schemas.pa.Table.from_pylist(rows, schema=schemas.samples_schema()))
    assert len(wanted) == len(set(wanted))
    assert set(wanted) == {"", *CAPTIONS} | texts


def test_names() -> None:
    """The first text of a role has its name, further ones a number; roles that are not in use are left out."""
    parts = [{"role": role, "key": key} for role, key in [("dop", "a"), ("class_only", "b"), ("dop", "c"), ("x", "d")]]
    found = dict(named(parts, frozenset({"dop", "class_only"})))
    assert found == {"dop": "a", "class_only": "b", "dop1": "c"}
    validate = {"prompts": ["p q", "[trigger] r"], "negative": "n", "guidance": 2.0}
    assert common_texts(config(validate=validate)) == {
        "null": "", "preview0": "p q", "preview1": "sks r", "negative": "n"
    }  # fmt: skip
