"""The configuration: its names, its budget, its refusals."""

from typing import Any

import pytest

from flux2_core.config.dataset import CAPTION_SOURCES
from flux2_core.config.reading import keys, parse
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError

FIXED = [
    "run", "max_quarantined", "model.path", "data[].path", "data[].caption", "data[].trigger", "data[].resolutions",
    "data[].check_images", "lora.rank", "lora.alpha", "lora.targets", "train.steps", "train.batch_size",
    "train.learning_rate", "train.seed", "validate.prompts", "validate.every", "cluster.workers", "cluster.address",
    "output.root", "output.cache", "output.save_every", "text.dtype", "text.stored", "latents.dtype",
]  # fmt: skip


def tree(**sections: Any) -> dict[str, Any]:
    return {"model": {"path": "m"}, "data": [{"path": "d"}], **sections}


def test_fixed_names_exist() -> None:
    """Every key that people's scripts rely on is there."""
    assert not set(FIXED) - set(keys())


def test_each_key_is_there_once() -> None:
    """No key stands twice; how many there are is a budget of tests/test_architecture.py."""
    assert len(keys()) == len(set(keys()))


def test_only_the_model_and_the_data_are_required() -> None:
    """A model and one folder make a configuration; defaults fill the rest."""
    config = parse(tree())
    assert (config.run, config.max_quarantined, config.data[0].resolutions) == ("lora", 0.02, (1024,))
    assert (config.lora.rank, config.train.steps, config.text.max_length) == (16, 1000, 512)


def test_it_is_frozen() -> None:
    """Nobody changes a configuration after it was read."""
    with pytest.raises(ValueError, match="frozen"):
        parse(tree()).train.steps = 3


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"run": "../up"}, "run: '../up' is not a file name"),
        ({"run": "a" * 101}, "run: "),
        ({"data": [{"path": "d", "resolutions": [1000]}]}, "data.0.resolutions: 1000 is not .* 992 and 1008 are"),
        ({"data": [{"path": "d", "resolutions": [64, 64]}]}, "data.0.resolutions: .* twice"),
        ({"data": [{"path": "d", "resolutions": []}]}, "data.0.resolutions: "),
        ({"data": [{"path": "d", "caption": "textfiles"}]}, "data.0.caption: 'textfiles' is neither"),
        ({"data": [{"path": "d", "repeats": 0}]}, "data.0.repeats: "),
        ({"data": []}, "data: .*at least 1"),
        ({"cluster": {"workers": 2, "min_workers": 3}}, "min_workers=3 is more than workers=2"),
        ({"train": {"optimizer": "schedule-free", "schedule": "cosine"}}, 'schedule="constant"'),
        ({"train": {"optimizer": "schedule-free", "ema": 0.9}}, "no ema"),
        ({"train": {"caption_dropout": 0.7, "trigger_dropout": 0.4}}, "together 1.1 > 1"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate: "),
        ({"train": {"learning_rate": float("inf")}}, "train.learning_rate: "),
        ({"train": {"caption_dropout": 1.5}}, "train.caption_dropout: "),
        ({"lora": {"rank": 0}}, "lora.rank: "),
        ({"lora": {"alpha": 0}}, "lora.alpha: "),
        ({"lora": {"targets": []}}, "lora.targets: nothing would be trained"),
        ({"text": {"dtype": "fp8"}}, "text.dtype: .*'bf16', 'fp16' or 'fp32'"),
        ({"validate": {"held_out": 0.6}}, "validate.held_out: "),
        ({"validate": {"size": 100}}, "validate.size: .*multiple of 16"),
    ],
)
def test_values_that_cannot_work_are_refused(sections: dict[str, Any], named: str) -> None:
    """A refused value is named by its dotted key, with what would be allowed."""
    with pytest.raises(UsageError, match=named):
        parse(tree(**sections))


@pytest.mark.parametrize("caption", [*CAPTION_SOURCES, "a photo of [trigger]", "[trigger]", "one red"])
def test_caption_sources(caption: str) -> None:
    """A source's name, or any text with a space or a placeholder in it."""
    assert parse(tree(data=[{"path": "d", "caption": caption}])).data[0].caption == caption


def test_the_trigger_of_prompts_is_the_first_data_sets() -> None:
    """`Config.trigger` is data.0's, whatever the others say."""
    config = parse(tree(data=[{"path": "d", "trigger": "sks"}, {"path": "e", "trigger": "xyz"}]))
    assert config.trigger == "sks"
    assert isinstance(config, Config)
