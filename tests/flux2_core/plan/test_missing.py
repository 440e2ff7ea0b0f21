"""Why rows are missing: each field that may differ from what is cached is named, and counted."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flux2_core.cache import fingerprints, index, proofs
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.plan import describe, missing, survey
from flux2_core.store import upkeep
from flux2_core.store.table import Table
from tests.in_process import PARTS, fill_cache

PICTURES = 6
TEXTS = PICTURES + 1  # a caption each, and the empty one
LATENTS = 2 * PICTURES + 1  # a reference each, and one mask
Planned = Callable[..., dict[str, dict[str, int]]]


def noise(path: Path, seed: int, height: int = 64) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, 64, 3), dtype=np.uint8)).save(path)


class Cached:
    """A cache of six pictures, a mask and six references, and plans against it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.data = folder, folder / "photos"
        for name in ("photos", "masks", "references"):
            (folder / name).mkdir()
        for number in range(PICTURES):
            noise(self.data / f"p{number}.png", number, 64 if number % 3 else 96)
            (self.data / f"p{number}.txt").write_text(f"a photo of sks, {number}")
            noise(folder / "references" / f"p{number}.png", 50 + number)
        noise(folder / "masks" / "p1.png", 99)
        self.tree: dict[str, Any] = {
            "model": {"path": str(model)},
            "data": [{"path": str(self.data), "trigger": "sks", "resolutions": [64]}],
            "text": {"dtype": "fp32", "max_length": 96},
            "latents": {"dtype": "fp32"},
            "output": {"root": str(folder / "runs"), "cache": str(folder / "cache")},
        }

    def config(self, **sections: dict[str, Any]) -> Config:
        beside = {"masks": str(self.folder / "masks"), "references": [str(self.folder / "references")]}
        data = [self.tree["data"][0] | beside | sections.pop("data", {})]
        changed = {name: self.tree.get(name, {}) | values for name, values in sections.items()}
        return parse(self.tree | changed | {"data": data})

    def why(self, folder: ModelFolder | None = None, **sections: dict[str, Any]) -> dict[str, dict[str, int]]:
        """What a plan says of missing rows, by kind; they are counted as missing too."""
        config = self.config(**sections)
        model = folder or resolve(config.model, parts=PARTS)
        rows = describe.describe(config, model, survey.survey(config, model))["rows"]
        for counts in rows.values():
            assert bool(counts["missing"]) == bool(counts["why"])
            assert sum(counts["why"].values()) >= counts["missing"]
            assert max(counts["why"].values(), default=0) <= counts["missing"]
        return {kind: counts["why"] for kind, counts in rows.items() if counts["missing"]}


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Cached:
    made = Cached(tmp_path_factory.mktemp("cached"), tiny_model)
    fill_cache(made.config())
    return made


@contextmanager
def edited(path: Path, change: Callable[[Path], object]) -> Iterator[None]:
    before = path.read_bytes() if path.exists() else None
    change(path)
    try:
        yield
    finally:
        path.unlink() if before is None else path.write_bytes(before)


def test_nothing_is_missing(cached: Cached) -> None:
    """Where all is cached nothing is explained, whatever changed that no row depends on."""
    assert cached.why() == {}
    assert cached.why(lora={"rank": 9}, data={"repeats": 3, "weight": 0.5}) == {}


def test_nothing_is_cached(cached: Cached, tmp_path: Path) -> None:
    """In an empty cache every row is new."""
    new = {"text": {"new": TEXTS}, "latents": {"new": LATENTS}}
    assert cached.why(output={"cache": str(tmp_path / "empty")}) == new


@pytest.mark.parametrize(
    ("sections", "kind", "why"),
    [
        ({"text": {"dtype": "bf16"}}, "text", {"dtype": TEXTS}),
        ({"text": {"max_length": 128}}, "text", {"max_length": TEXTS}),
        ({"text": {"stored": "projected"}}, "text", {"stored": TEXTS}),
        ({"text": {"pads": "stored"}}, "text", {"pads": TEXTS}),
        ({"text": {"quantize": "int8"}}, "text", {"quantize": TEXTS}),
        ({"text": {"dtype": "bf16", "max_length": 128}}, "text", {"dtype": TEXTS, "max_length": TEXTS}),
        ({"latents": {"dtype": "bf16"}}, "latents", {"dtype": LATENTS}),
        ({"latents": {"precision": "bf16"}}, "latents", {"precision": LATENTS}),
        ({"latents": {"background": "#000000"}}, "latents", {"background": LATENTS}),
        ({"latents": {"decoder": "fast"}}, "latents", {"decoder": LATENTS}),
        ({"data": {"resolutions": [48]}}, "latents", {"resolution": LATENTS}),
        ({"data": {"crop_aspect": "square"}}, "latents", {"bucket": 2}),
        ({"data": {"crop": "corner"}}, "latents", {"crop": 2}),
        ({"data": {"flip": True}}, "latents", {"flip": LATENTS}),
        (
            {"latents": {"dtype": "bf16"}, "data": {"resolutions": [48]}},
            "latents",
            {"resolution": LATENTS, "dtype": LATENTS},
        ),
    ],
)
def test_settings(cached: Cached, sections: dict[str, Any], kind: str, why: dict[str, int]) -> None:
    """A setting that changes rows is named, and no other; rows of the other kind are not missing."""
    assert cached.why(**sections) == {kind: why}


def test_texts(cached: Cached) -> None:
    """A caption that was edited is told from one that is new; so are the prompts."""
    with edited(cached.data / "p1.txt", lambda path: path.write_text("sks by night")):
        assert cached.why() == {"text": {"text": 1}}
        both = {"text": {"text": 1, "max_length": TEXTS}}
        assert cached.why(text={"max_length": 128}) == both
    assert cached.why(validate={"prompts": ["a sks"]}) == {"text": {"new": 1}}
    with (
        edited(cached.data / "p9.txt", lambda path: path.write_text("sks, the ninth")),
        edited(cached.data / "p9.png", lambda path: noise(path, 9)),
        edited(cached.folder / "references" / "p9.png", lambda path: noise(path, 59)),
    ):
        assert cached.why() == {"text": {"new": 1}, "latents": {"new": 2}}


def test_files(cached: Cached) -> None:
    """A picture, a mask or a reference whose file has changed is told from a new one; the same bytes elsewhere miss
    nothing."""
    for path in (cached.data / "p1.png", cached.folder / "masks" / "p1.png", cached.folder / "references" / "p1.png"):
        with edited(path, lambda path: noise(path, 77)):
            assert cached.why() == {"latents": {"source": 1}}
    moved = shutil.copytree(cached.data, cached.folder / "moved")
    assert cached.why(data={"path": str(moved)}) == {}
    cut = {"path": str(moved), "flip": True, "resolutions": [64]}
    assert cached.why(data=cut) == {"latents": {"flip": LATENTS}}, "known by its bytes"


@pytest.mark.parametrize(
    ("part", "pattern", "kind", "why"),
    [
        ("text_encoder", "*.safetensors", "text", "model"),
        ("tokenizer", "tokenizer.json", "text", "tokenizer"),
        ("vae", "*.safetensors", "latents", "model"),
    ],
)
def test_the_models_files(
    cached: Cached, tiny_model: Path, tmp_path: Path, part: str, pattern: str, kind: str, why: str
) -> None:
    """Other files of the encoder, the tokenizer or the VAE are named, for the rows that they make."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file = next((model / part).glob(pattern))
    data = bytearray(file.read_bytes())
    if part == "tokenizer":
        data += b"\n"
    else:
        data[-1] ^= 1
    file.write_bytes(data)
    total = {"text": TEXTS, "latents": LATENTS}[kind]
    assert cached.why(model={"path": str(model)}) == {kind: {why: total}}


def test_the_template(cached: Cached) -> None:
    """Another system message is the template."""
    model = resolve(cached.config().model, parts=PARTS)
    other = replace(model, family=replace(model.family, system_message="Describe."))
    assert cached.why(other) == {"text": {"template": TEXTS}}


def test_a_library(cached: Cached, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Pillow that makes other pixels is named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fingerprints.PIL, "__version__", "13.0.99")
    load = proofs.load.load
    monkeypatch.setattr(proofs.load, "load", lambda *given, **named: load(*given, **named) ^ np.uint8(1))
    assert cached.why() == {"latents": {"pillow": LATENTS}}


def test_rows_that_are_gone(cached: Cached, tmp_path: Path) -> None:
    """Rows that were dropped are called gone; a table that is gone altogether too."""
    output = {"cache": str(shutil.copytree(cached.folder / "cache", tmp_path / "cache"))}
    config = cached.config(output=output)
    held = index.read_index(config, resolve(config.model, parts=PARTS))
    rows = Table.open(held.text.uri).head(["key", "text"], 100)
    upkeep.drop(held.text.uri, [row["key"] for row in rows if "sks" in row["text"]][:2])
    assert cached.why(output=output) == {"text": {"gone": 2}}
    shutil.rmtree(held.latents.uri)
    assert cached.why(output=output)["latents"] == {"gone": LATENTS}


def test_it_is_bounded(cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many rows are looked for, and the rest is counted as unexplained."""
    monkeypatch.setattr(missing, "MOST_ROWS", 5)
    told = cached.why(text={"dtype": "bf16"}, latents={"dtype": "bf16"})
    assert told == {
        "text": {"dtype": 5, "unexplained": TEXTS - 5},
        "latents": {"dtype": 5, "unexplained": LATENTS - 5},
    }
