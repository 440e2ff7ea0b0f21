"""Proofs: what an upgrade of a library costs (R24), and what becomes of a cache from before proofs."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

from flux2_core.cache import fingerprints, index, proofs
from flux2_core.cache.index import read_index
from flux2_core.config.reading import load as load_config
from flux2_core.config.sections import Config
from flux2_core.data import texts as data_texts
from flux2_core.errors import DataError, SetupError
from flux2_core.model.families import DEV, KLEIN
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.model.text_encoder import golden_rows
from flux2_core.model.vae import golden_latents
from flux2_core.plan import describe, survey
from flux2_core.store import hashing, schemas
from flux2_core.store.table import Table, physical_schema
from flux2_core.train.batches import TrainingData
from tests.in_process import KINDS, PARTS, fill_cache

Make = Callable[..., Config]
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden values are remembered here, and those of pretended versions nowhere else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))


class Upgrade:
    """Pretends that a library has another version, and that it makes other bytes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def to(self, **versions: str) -> None:
        """Versions by library, as `importlib.metadata` and Pillow say them."""

        def said(name: str) -> str:
            return versions.get(name.replace("-", "_")) or version(name)

        self.patch.setattr(fingerprints, "version", said)
        self.patch.setattr(proofs, "version", said)
        if "pillow" in versions:
            self.patch.setattr(fingerprints.PIL, "__version__", versions["pillow"])

    def other_bytes(self, what: str) -> None:
        """One part of the self-test comes out otherwise."""
        if what == "pixels":
            load = proofs.load.load
            self.patch.setattr(proofs.load, "load", lambda *given, **named: load(*given, **named) ^ np.uint8(1))
        elif what == "tokens":
            self.patch.setattr(proofs.PromptTokenizer, "golden", lambda _self: "other")
        else:
            real = proofs.SelfTest._golden
            self.patch.setattr(proofs.SelfTest, "_golden", lambda test: [1.001 * value for value in real(test)])


@pytest.fixture
def upgrade(monkeypatch: pytest.MonkeyPatch) -> Upgrade:
    return Upgrade(monkeypatch)


def rows(config: Config) -> dict[str, dict[str, int]]:
    """Rows by table and kind, whatever fingerprint a table has."""
    root = Path(config.output.cache)
    return {kind: {str(uri): Table.open(str(uri)).rows() for uri in root.glob(f"{kind}/*.lance")} for kind in KINDS}


def planned(config: Config, model: ModelFolder) -> dict[str, Any]:
    return describe.describe(config, model, survey.survey(config, model))


HARMLESS: dict[str, dict[str, str]] = {
    "Pillow": {"pillow": "13.0.99"},
    "torch": {"torch": "2.13.99"},
    "transformers": {"transformers": "5.23.99"},
    "diffusers": {"diffusers": "0.42.99"},
    "pylance": {"pylance": "14.0.99"},
}
HARMFUL = {  # by library: what comes out otherwise, of which kinds, and what `plan` says
    "Pillow": ("pixels", {"latents"}, r"pillow 13\S+ -> 13.0.99 makes other pixels of alpha.png"),
    "torch": ("values", {"text", "latents"}, r"torch 2\S+ -> 2.13.99 computes other (text|latents) rows"),
    "transformers": ("values", {"text"}, r"transformers 5\S+ -> 5.23.99 computes other text rows"),
    "diffusers": ("values", {"latents"}, r"diffusers 0\S+ -> 0.42.99 computes other latents rows"),
    "tokenizers": ("tokens", {"text"}, r"tokenizers 0\S+ -> 0.99.0 makes other tokens"),
}


@pytest.mark.parametrize("library", HARMLESS)
def test_r24_an_upgrade_that_changes_no_byte_costs_nothing(make_config: Make, upgrade: Upgrade, library: str) -> None:
    """R24: after a patch-level upgrade `train` goes on, `plan` finds every row, and `cache` encodes nothing."""
    config = make_config()
    model = fill_cache(config)
    before, data = rows(config), TrainingData(config, model)
    upgrade.to(**HARMLESS[library])
    plan = planned(config, model)
    assert [plan["rows"][kind]["missing"] for kind in KINDS] == [0, 0]
    assert not [line for line in plan["warnings"] if "encoded anew" in line]
    after = TrainingData(config, model).batch(0)
    assert after.latents_Bchw.equal(data.batch(0).latents_Bchw)
    fill_cache(config)
    assert rows(config) == before
    assert read_index(config, model).latents.fingerprint == data.index.latents.fingerprint


@pytest.mark.parametrize("library", HARMFUL)
def test_r24_other_bytes_get_a_table_of_their_own(make_config: Make, upgrade: Upgrade, library: str) -> None:
    """R24: where the self-test comes out otherwise, the rows that it concerns are encoded anew beside the old ones and
    `plan` names library and reason; a training of before goes on.
    """
    what, kinds, words = HARMFUL[library]
    config = make_config()
    model = fill_cache(config)
    before = rows(config)
    upgrade.to(**HARMLESS.get(library, {"tokenizers": "0.99.0"}))
    upgrade.other_bytes(what)
    plan = planned(config, model)
    assert {kind for kind in KINDS if plan["rows"][kind]["missing"] == plan["rows"][kind]["needed"]} == kinds
    assert sum(plan["rows"][kind]["missing"] for kind in KINDS if kind not in kinds) == 0
    told = [line for line in plan["warnings"] if "encoded anew" in line]
    assert len(told) == len(kinds)
    assert all(re.search(words, line) for line in told)
    TrainingData(config, model)
    fill_cache(config)
    grown = rows(config)
    assert all(before[kind].items() <= grown[kind].items() for kind in KINDS)
    assert {kind for kind in KINDS if len(grown[kind]) == 2} == kinds
    again = planned(config, model)
    assert sum(again["rows"][kind]["missing"] for kind in KINDS) == 0
    assert not [line for line in again["warnings"] if "encoded anew" in line]


def test_r24_another_file_version_of_lance(make_config: Make) -> None:
    """R24: a table whose files have another version than new ones is filled and read on."""
    config = make_config()
    model = resolve(config.model, parts=PARTS)
    for kind in KINDS:
        test = proofs.SelfTest(config, model, kind)
        schema = physical_schema(kind).with_metadata(schemas.identity(kind, test.base, test.proof()))
        uri = proofs.URIS[kind](config, test.base)
        lance.write_dataset(schema.empty_table(), uri, data_storage_version="2.3", enable_stable_row_ids=True)
    fill_cache(config)
    found = read_index(config, model)
    for ref in (found.text, found.latents):
        assert Table.open(ref.uri).dataset.data_storage_version == "2.3"
    TrainingData(config, model).batch(0)


def test_an_index_is_made_of_one_table(make_config: Make, upgrade: Upgrade) -> None:
    """Two upgrades one after the other find the first table: what counts are its bytes, not the last version."""
    config = make_config()
    model = fill_cache(config)
    first = read_index(config, model)
    for number in ("13.0.98", "13.1.0"):
        upgrade.to(pillow=number, torch=f"2.{number}")
        fill_cache(config)
    assert read_index(config, model).latents.uri == first.latents.uri
    assert Table.open(first.latents.uri).proof["libraries"]["pillow"] == fingerprints.features.version("pil")


# ------------------------------------------------------------------------------------------------- caches from before


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A copy of the cache that an earlier commit wrote, and its configuration."""
    shutil.copytree(ROOT / "tests" / "golden", tmp_path / "tests" / "golden")
    monkeypatch.chdir(tmp_path)
    return load_config(tmp_path / "tests" / "golden" / "golden.toml", [f"output.root={tmp_path / 'runs'}"])


def tables(config: Config) -> dict[str, Table]:
    return {kind: Table.open(uri) for kind, held in rows(config).items() for uri in held}


def test_a_cache_from_before_is_adopted(golden: Config) -> None:
    """What an earlier commit cached is found and used with nothing encoded again, and has a proof from then on."""
    before = rows(golden)
    assert [table.proof for table in tables(golden).values()] == [None, None]
    model = resolve(golden.model, parts=PARTS)
    plan = planned(golden, model)
    assert [plan["rows"][kind]["missing"] for kind in KINDS] == [0, 0]
    fill_cache(golden)
    assert rows(golden) == before
    assert {kind: table.proof for kind, table in tables(golden).items()} == {
        kind: proofs.SelfTest(golden, model, kind).proof() for kind in KINDS
    }
    TrainingData(golden, model).batch(0)


def test_a_cache_from_before_with_other_tokens_is_refused(golden: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that were cut otherwise, by another backend or pattern, are found by their stored numbers of tokens: the
    table is refused by name, by `plan` too, and nothing is mixed into it.
    """
    counts = proofs.PromptTokenizer.counts
    monkeypatch.setattr(proofs.PromptTokenizer, "counts", lambda self, texts: [n + 1 for n in counts(self, texts)])
    model = resolve(golden.model, parts=PARTS)
    words = r"tokens: \d+ of \d+ texts were cut otherwise, .*has \d+ there and \d+ here.*use another output.cache"
    with pytest.raises(DataError, match=words):
        survey.survey(golden, model)
    assert [table.proof for table in tables(golden).values()] == [None, None]


@pytest.mark.parametrize(("library", "kind"), [("transformers", "text"), ("diffusers", "latents")])
def test_a_cache_from_before_that_a_library_would_make_otherwise(
    golden: Config, upgrade: Upgrade, library: str, kind: str
) -> None:
    """Versions after those of before, whose golden values differ from what all of them gave: refused by the library."""
    upgrade.to(**{library: "99.0"})
    upgrade.other_bytes("values")
    words = rf"{kind}/.*\.lance: written by an earlier cacheloom, and {library} \S+ -> 99.0 computes other {kind} rows"
    with pytest.raises(DataError, match=words):
        survey.survey(golden, resolve(golden.model, parts=PARTS))


@pytest.mark.parametrize("decoder", ["pil", "fast"])
def test_a_cache_from_before_under_another_pillow(make_config: Make, upgrade: Upgrade, decoder: str) -> None:
    """Its recipe is a hash; that of the versions of then is known, and so are their pixels: the same ones keep it."""
    config = make_config(latents={"decoder": decoder})
    model = resolve(config.model, parts=PARTS)
    base = fingerprints.latents_fingerprint(model, config)
    Table.open_or_create(index.latents_uri(config, base), kind="latents", fingerprint=base)
    upgrade.to(pillow="13.0.99", simplejpeg="1.9.99")
    assert survey.survey(config, model).fingerprints["latents"] == base
    upgrade.other_bytes("pixels")
    planned = survey.survey(config, model)
    assert planned.fingerprints["latents"] != base
    assert re.search(r"latents rows of .* anew: .*pillow 13\S+ -> 13.0.99.* makes other pixels", planned.warnings[0])


def test_a_cache_from_before_of_unknown_versions(golden: Config, upgrade: Upgrade) -> None:
    """Of any other versions no field of the recipe can be told: `plan` says that, and uses another table."""
    (uri,) = rows(golden)["latents"]
    fingerprint = Table.open(uri).fingerprint | {"image": "0" * 64}
    shutil.rmtree(uri)
    Table.open_or_create(index.latents_uri(golden, fingerprint), kind="latents", fingerprint=fingerprint)
    plan = planned(golden, resolve(golden.model, parts=PARTS))
    assert plan["rows"]["text"]["missing"] == 0
    assert plan["rows"]["latents"]["missing"] == plan["rows"]["latents"]["needed"]
    assert [line for line in plan["warnings"] if "its image recipe was kept as a hash" in line]


# --------------------------------------------------------------------------------------------------- what is in a proof


@pytest.mark.parametrize("family", [DEV, KLEIN])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4", "fp8"])
def test_golden_rows_are_what_they_were(family: Any, quantize: str) -> None:
    """The libraries here compute what those of before did: an upgrade that fails here would cost caches."""
    kind = {"dev": "mistral", "klein": "qwen3"}[family.name]
    known = json.loads((proofs.FILES / proofs.BEFORE).read_text())["golden"][f"{kind}/{quantize}"]
    assert proofs._distance(golden_rows(family, kind, quantize=quantize), known) < 1e-5


@pytest.mark.parametrize("decoder", ["pil", "fast"])
def test_golden_pixels_are_what_they_were(make_config: Make, decoder: str) -> None:
    """The same of decoding and resizing: JPEG of four kinds, WebP, AVIF, PNG in 16 bits, GIF and TIFF, with ICC."""
    config = make_config(latents={"decoder": decoder})
    test = proofs.SelfTest(config, resolve(config.model, parts=PARTS), "latents")
    known = json.loads((proofs.FILES / proofs.BEFORE).read_text())["exact"][decoder]
    assert len(known) == 9
    assert known.items() <= test.exact.items()
    assert set(map(len, test.exact.values())) == {64}, "a picture was refused"


def test_golden_latents_are_what_they_were() -> None:
    """The same of the VAE."""
    known = json.loads((proofs.FILES / proofs.BEFORE).read_text())["golden"]["latents"]
    assert proofs._distance(golden_latents(), known) < 1e-5
    assert proofs._distance(golden_latents(), [1.0005 * value for value in known]) > proofs.SAME


def test_a_proof_names_the_recipes_fields(make_config: Make) -> None:
    """A new table keeps its recipe in words; another background is told by that field."""
    config = make_config()
    model = fill_cache(config)
    proof = Table.open(read_index(config, model).latents.uri).proof
    assert proof is not None
    assert proof["recipe"] == fingerprints.recipe(config.latents)
    assert hashing.digest(proof["recipe"]) == read_index(config, model).latents.fingerprint["image"]
    plan = planned(make_config(latents={"dtype": "fp32", "background": "#000000"}), model)
    assert [line for line in plan["warnings"] if "another image recipe (alpha: wanted" in line]


def test_another_model_is_no_candidate(make_config: Make, tiny_model: Path, tmp_path: Path) -> None:
    """Proofs decide about libraries alone: rows of other files, precision or length are never taken."""
    config = make_config()
    model = fill_cache(config)
    for other in (make_config(text={"max_length": 128}), make_config(text={"dtype": "bf16"})):
        assert planned(other, model)["rows"]["text"]["missing"] > 0
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    (copy / "tokenizer" / "chat_template.jinja").open("a").write(" ")
    moved = make_config(model={"path": str(copy)})
    assert planned(moved, resolve(moved.model, parts=PARTS))["rows"]["text"]["missing"] > 0


def test_the_table_of_a_race_is_not_written_to(make_config: Make, upgrade: Upgrade) -> None:
    """A table that others made meanwhile, whose bytes differ, is refused before a row is written."""
    config = make_config()
    model = resolve(config.model, parts=PARTS)
    chosen = survey.survey(config, model).fingerprints["text"]
    proofs.open_table(config, model, "text", chosen)
    upgrade.to(transformers="99.0")
    upgrade.other_bytes("values")
    with pytest.raises(DataError, match=r"made by other libraries meanwhile .*transformers \S+ -> 99.0"):
        proofs.open_table(config, model, "text", chosen)


def test_two_that_adopt_at_once(tmp_path: Path) -> None:
    """Of two proofs for one table from before the first stands, and the second one's maker is told it."""
    uri = str(tmp_path / "t.lance")
    Table.open_or_create(uri, kind="text", fingerprint={"a": 1})
    one, two = Table.open(uri), Table.open(uri)
    assert one.prove({"libraries": {"torch": "1"}}) == {"libraries": {"torch": "1"}}
    assert two.prove({"libraries": {"torch": "2"}}) == {"libraries": {"torch": "1"}}
    assert Table.open(uri).proof == {"libraries": {"torch": "1"}}


def test_a_node_with_another_library_is_refused(make_config: Make, upgrade: Upgrade) -> None:
    """A worker whose library makes other bytes is refused with the library; one with the same bytes may work."""
    config = make_config()
    model = fill_cache(config)
    table = Table.open(read_index(config, model).latents.uri)
    upgrade.to(pillow="13.0.99")
    proofs.check_node(config, model, table)
    upgrade.other_bytes("pixels")
    with pytest.raises(SetupError, match=r": pillow .* -> 13.0.99 makes other pixels .* install the same versions"):
        proofs.check_node(config, model, table)


def test_golden_values_are_made_once_a_version(make_config: Make, upgrade: Upgrade) -> None:
    """After an upgrade the small models run once on a machine, not at each start."""
    config = make_config()
    model, made = resolve(config.model, parts=PARTS), []
    real = proofs.SelfTest._golden
    upgrade.patch.setattr(proofs.SelfTest, "_golden", lambda test: made.append(test.name) or real(test))
    for _ in range(2):
        for kind in KINDS:
            assert proofs.SelfTest(config, model, kind).golden
    assert made == ["mistral/none", "latents"]


def test_the_texts_of_the_index_stay(make_config: Make, upgrade: Upgrade) -> None:
    """Keys under an adopted fingerprint are those of before: prompts that train from the index are found by them."""
    config = make_config()
    model = fill_cache(config)
    upgrade.to(tokenizers="0.99.0")
    new = survey.survey(config, model)
    assert new.fingerprints["text"] == read_index(config, model).text.fingerprint
    assert new.fingerprints["text"]["tokenizers_version"] != "0.99.0"
    table = Table.open(index.text_uri(config, new.fingerprints["text"]))
    wanted = set(data_texts.texts(config, new.samples))
    assert wanted <= {row["text"] for row in table.head(["text"], 100)}


def test_a_damaged_proof_is_named(tmp_path: Path) -> None:
    """A proof that is no JSON any more is damage, told with its table."""
    uri = str(tmp_path / "t.lance")
    table = Table.open_or_create(uri, kind="text", fingerprint={"a": 1}, proof=lambda: {"libraries": {}})
    table.dataset.update_schema_metadata({schemas.META_PROOF: '{"libraries": {'})
    with pytest.raises(DataError, match=r"t\.lance: its proof is unreadable: damaged"):
        _ = Table.open(uri).proof
