"""A cache that an earlier version wrote is the cache of today: keys, fingerprints and bytes stand written down here.

`tests/golden` holds a small model, two pictures with captions, masks and references, and the cache that
`cacheloom cache tests/golden/golden.toml` made of them on 2026-11-28, before the rooms. A test that fails here says
that an upgrade would encode everybody's cache anew, in silence: whoever means that writes new numbers, and says so in
the changelog.

Some libraries are part of what rows depend on, so their versions are part of keys (Pillow with its libjpeg and
littlecms, tokenizers, quanto, simplejpeg, torch). All tests here pretend the versions of that day: what is tested is
what *we* make of them, on any machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from flux2_core.cache import fingerprints, index, keys, prompt_rows, verify
from flux2_core.cache.index import Index, TableRef
from flux2_core.config.reading import load, parse
from flux2_core.config.sections import Config, Latents
from flux2_core.data import samples, texts
from flux2_core.data.pictures.transform import Transform
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.plan import describe, survey
from flux2_core.store import schemas
from flux2_core.store.hashing import digest
from flux2_core.store.table import Table
from flux2_core.train.loop import run
from stages import index as index_stage
from stages.fill import Filled
from tests.in_process import PARTS, fill_cache, process_group, trainer

GOLDEN = Path(__file__).parents[2] / "golden"
VERSIONS = {
    "libjpeg_turbo": "3.2.0", "littlecms2": "2.19",
    "tokenizers": "0.23.3", "optimum-quanto": "0.2.7", "simplejpeg": "1.9.0", "torch": "2.13.0+cpu",
}  # fmt: skip
PILLOW = "13.0.0"


@pytest.fixture(autouse=True)
def _versions_of_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "PIL", SimpleNamespace(__version__=PILLOW))
    monkeypatch.setattr(fingerprints, "features", SimpleNamespace(version=VERSIONS.__getitem__))
    monkeypatch.setattr(fingerprints, "version", VERSIONS.__getitem__)


@pytest.fixture(scope="module")
def model() -> ModelFolder:
    return resolve(load(GOLDEN / "golden.toml", [f"model.path={GOLDEN / 'model'}"]).model, parts=PARTS)


Make = Callable[..., Config]


@pytest.fixture
def golden(tmp_path: Path) -> Make:
    """The configuration of the cache over a copy of it, with its places where they are here, or where they were."""
    shutil.copytree(GOLDEN / "cache", tmp_path / "cache")

    def make(*overrides: str, root: str = str(GOLDEN), cache: str = str(tmp_path / "cache")) -> Config:
        places = [f"model.path={root}/model", f"data.0.path={root}/pictures", f"data.0.masks={root}/masks"]
        places += [f"data.0.references=['{root}/before']", f"output.cache={cache}", f"output.root={tmp_path / 'runs'}"]
        return load(GOLDEN / "golden.toml", [*places, *overrides])

    return make


TEXT = {
    "attention": "sdpa",
    "dtype": "bf16",
    "encoder_files": "043d5ffd3e87ab38045cb78294d3afc2259f81b71e20f8edd8355c59b2d486d1",
    "family": "dev",
    "layers": [10, 20, 30],
    "max_length": 96,
    "pads": "skipped",
    "stored": "raw",
    "system_message": (
        "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
        "relationships, object\nattribution and actions without speculation."
    ),
    "tokenizer_files": "80a1a52158d11b279154a6a370b2c351885bc97512801e376aa8d04c12a24277",
    "tokenizers_version": "0.23.3",
    "width": 96,
}
TEXT_OTHERWISE = {  # with everything set that can be: projected 8-bit rows of a quantised encoder, every pad stored
    "counted": "tokens",
    "int8_rows": True,
    "pads": "stored",
    "projection": "7784beb533fece88d6c2bc0248f72f2b20ba95a0635cfe49b66195ddac7a323a",
    "quantize": "fp8",
    "quanto_version": "0.2.7",
    "stored": "projected",
    "width": 32,
}
LATENTS = {
    "dtype": "fp16",
    "image": "76415ea7371b71c910e3533cab830c294662526c718ae8b55880b6e44a1c2add",
    "vae_files": "ee4a08dd2977959c097234a4709e875b39a78e730f7453d52512d0a2b7813874",
}
RECIPE = {
    "orientation": "EXIF applied",
    "frame": "first",
    "colour": "ICC to sRGB, perceptual; without a profile taken as sRGB",
    "alpha": "over #ffffff, before resizing",
    "sixteen_bit": "grey (x+128)//257, colour high byte",
    "resize": "PIL BILINEAR, antialiased",
    "range": "((x/255)-0.5)/0.5 in fp32",
    "mask": "alpha over black, grey, resized and cropped like the picture, mean of 16x16 px in 8 bits",
    "pillow": "13.0.0",
    "libjpeg_turbo": "3.2.0",
    "littlecms2": "2.19",
}
FAST = (
    "simplejpeg 1.9.0: undamaged RGB and grey JPEGs at the least n/8 that covers the resized picture, then bilinear, "
    "antialiased by torch 2.13.0, then colour; others by Pillow"
)
EVERYTHING = ['text.stored="projected"', "text.int8_rows=true", 'text.quantize="fp8"', 'text.pads="stored"']


def test_fingerprints(golden: Make, model: ModelFolder) -> None:
    """The fingerprints of the model, field by field and as the digests that tables are named and keys are made by."""
    text, latents = fingerprints.text_fingerprint(model, golden()), fingerprints.latents_fingerprint(model, golden())
    assert (text, latents) == (TEXT, LATENTS)
    assert digest(text) == "8277b0dca1e2418b0b4d9616cd1b36024737ba6f25348c509e966c6f8461b8ba"
    assert digest(latents) == "a45efb7a52f155e81d9aeb0c0a6619f3014c081d24e99fb652459993c362d273"
    half = fingerprints.latents_fingerprint(model, golden('latents.precision="bf16"'))
    assert half == LATENTS | {"precision": "bf16"}
    other = fingerprints.text_fingerprint(model, golden(*EVERYTHING))
    assert other == TEXT | TEXT_OTHERWISE
    assert digest(other) == "9e991b289183f3049ff1dd39371027ba36b081fb99b4723d072be81f5660b159"


def test_the_recipe_of_pixels() -> None:
    """Every field of what pixels depend on stands in it, with either decoder: without one, wrong pixels would do."""
    assert fingerprints.recipe(Latents()) == RECIPE
    assert digest(RECIPE) == LATENTS["image"]
    assert fingerprints.recipe(Latents(decoder="fast")) == RECIPE | {"decoder": FAST}
    assert fingerprints.recipe(Latents(background="#00FF7F"))["alpha"] == "over #00ff7f, before resizing"


def test_row_keys() -> None:
    """The keys of texts, of a picture as it is and mirrored, of a mask, and of the row of pads."""
    flipped = Transform(64, 48, 70, 52, 3, 2, flip=True)
    assert [
        keys.text_key(TEXT, "a photo of a sks teapot"),
        keys.text_key(TEXT, ""),
        keys.text_key(TEXT, "été \U0001f600\n"),
        keys.picture_key(LATENTS, "0" * 64, flipped),
        keys.picture_key(LATENTS, "0" * 64, Transform(64, 48, 70, 52, 3, 2)),
        keys.mask_key(LATENTS, "0" * 64, flipped),
        prompt_rows.PAD_KEY,
    ] == [
        "90b3c2609dbb7233cdb2d34df9c851036a2e1ad72135cdd5e0a1bce4caf03e2a",
        "c2f10d126e9be4e3bdbb3bb813f781822cd4f8234e7f3021c1831f51210826cf",
        "9703dd1ae89ff69adfd5c9b967e194a73561065c5140021be742d3b271b30a64",
        "add883f1e5677c030b5c0a909d734fddb9fd98b57a7b5dc700a27bb0ce999ad5",
        "28d9a75381eae76b83a276bfa0e9f2dc7da334984664e8a1185db94c5310cb91",
        "c6507160910ebb37d38fefc9acc725ec3807e092eb4150177894b8bf89caaf8b",
        "pad",
    ]


def test_the_settings_that_find_an_index() -> None:
    """An index is named by the settings that decide what is cached: all of them, and nothing else, for ever.

    A later key must not be among them where it is left at its default: nobody's index would be found any more.
    """
    data = {"path": "/somewhere/pictures", "masks": "/somewhere/masks", "trigger": "sks", "check_images": True}
    data |= {"references": ["/somewhere/before", "s3://bucket/more"], "resolutions": [512, 1024]}
    of_class = {"path": "s3://bucket/class", "regularisation": True, "weight": 0.5}
    tree = {"model": {"path": "/somewhere/model", "revision": "0123abc"}, "data": [data, of_class]}
    found = index.settings(parse(tree | {"text": {"pads": "computed"}, "latents": {"background": "#102030"}}))
    assert (found["model.path"], found["model.revision"]) == ("/somewhere/model", "0123abc")
    assert digest(found) == "37790bd944be9af3cbd316fafd911fbbb7048fb606ae5093ef8ce6e7c3aa5519", found


def test_the_index_is_found_and_every_row_is_whole(golden: Make, model: ModelFolder) -> None:
    """Asked as it was asked then, the index is found by its name; `verify` reads all rows of both tables, content.

    That is 8 texts, the pad row, and 12 rows of latents; files, row checksums, seals and the samples table all hold.
    """
    (file,) = Path(golden().output.cache).glob("samples/*.json")
    then = golden(root=json.loads(file.read_bytes())["settings"]["model.path"].removesuffix("/model"))
    found = index.read_index(then, model)
    assert (found.text.fingerprint, found.latents.fingerprint, found.rows) == (TEXT, LATENTS, 4)
    assert verify.verify_rows(then, model) == {"rows": 8 + 1 + 12, "corrupt": [], "missing": []}


def tables(config: Config) -> tuple[Table, Table]:
    """Both tables, where today's code looks for them."""
    return Table.open(index.text_uri(config, TEXT)), Table.open(index.latents_uri(config, LATENTS))


def published(config: Config, model: ModelFolder) -> Index:
    """What `cache` does where it finds every row there: an index over the tables as they are."""
    planned = survey.survey(config, model)
    text, latents = (
        Filled(TableRef(table.uri, table.version, table.fingerprint), 0, table.rows(), {}) for table in tables(config)
    )
    return index_stage.publish(config, planned, text=text, latents=latents)


def test_nothing_is_encoded_again(golden: Make, model: ModelFolder) -> None:
    """Today's plan over the same pictures, elsewhere, wants the rows that are there and no others."""
    config = golden()
    planned = survey.survey(config, model)
    text, latents = tables(config)
    wanted = samples.wanted(planned.samples)
    spoken = {keys.text_key(TEXT, each) for each in texts.texts(config, planned.samples)}
    assert (text.present(spoken), latents.present(wanted)) == (spoken, wanted.keys())
    assert {*text.keys()} == spoken | {prompt_rows.PAD_KEY}
    assert {*latents.keys()} == wanted.keys()
    assert describe.describe(config, model, planned)["rows"] == {
        "text": {"needed": 8, "cached": 8, "missing": 0, "why": {}},
        "latents": {"needed": 12, "cached": 12, "missing": 0, "why": {}},
    }


def test_training_goes_on_from_it(golden: Make, model: ModelFolder, tmp_path: Path) -> None:
    """Two steps with masks, references and preservation are taken from the old rows; no table gets a new version."""
    config = golden()
    published(config, model)
    losses: list[float] = []
    with process_group(tmp_path):
        assert run(trainer(config), lambda record: losses.append(record["loss"]))
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
    assert [table.version for table in tables(config)] == [2, 2]


def test_rows_mean_what_they_meant(golden: Make, model: ModelFolder, tmp_path: Path) -> None:
    """Encoded again by today's code every row agrees within what `verify` allows: keys alone would not show that."""
    config = golden()
    published(config, model)
    fill_cache(golden(cache=str(tmp_path / "scratch")))
    again = index.read_index(golden(cache=str(tmp_path / "scratch")), model)
    both = {schemas.KIND_TEXT: again.text, schemas.KIND_LATENTS: again.latents}
    assert verify.compare(config, model, both) == (8 + 1 + 12, [])
