"""The index of a cache: found by its settings, refused where it does not fit."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flux2_core.cache import index, keys
from flux2_core.cache import settings as asked
from flux2_core.cache.index import (
    Index,
    TableRef,
    latents_uri,
    missing_message,
    read_index,
    settings,
    text_uri,
)
from flux2_core.cache.publish import write_index, write_samples
from flux2_core.config.sections import Config
from flux2_core.data import texts
from flux2_core.errors import DataError
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.run.folder import RunFolder
from flux2_core.store import parquet, schemas
from flux2_core.store.hashing import digest

Make = Callable[..., Config]


@pytest.fixture
def model(make_config: Make) -> ModelFolder:
    return resolve(make_config().model, parts=("transformer",))


def publish(config: Config, model: ModelFolder, **changed: Any) -> Index:
    text, latents = asked.text_settings(model, config), asked.latents_settings(config)
    root = config.output.cache
    index = Index(
        contract=schemas.CONTRACT_VERSION, samples=f"{root}/samples/s", rows=3,
        text=TableRef(f"{root}/text/t", 4, text | {"encoder_files": "e"}),
        latents=TableRef(f"{root}/latents/l", 5, latents | {"vae_files": "v"}), settings=settings(config),
    )  # fmt: skip
    index = Index(**{**vars(index), **changed})
    write_index(config, index)
    return index


def test_written_and_found(make_config: Make, model: ModelFolder) -> None:
    """An index comes back as it was written, without any file of the data or of an encoder."""
    config = make_config()
    assert publish(config, model) == read_index(config, model)


def test_a_cache_may_move(make_config: Make, model: ModelFolder, tmp_path: Path) -> None:
    """A cache that was copied elsewhere is found there, and points at its own tables."""
    publish(make_config(), model)
    shutil.move(make_config().output.cache, tmp_path / "moved")
    index = read_index(make_config(output={"cache": str(tmp_path / "moved")}), model)
    assert index.text.uri == str(tmp_path / "moved" / "text" / "t")
    assert index.samples == str(tmp_path / "moved" / "samples" / "s")


@pytest.mark.parametrize(
    "free",
    [
        {"lora": {"rank": 9}},
        {"train": {"steps": 9, "seed": 1}},
        {"run": "other"},
        {"validate": {"prompts": ["x y"], "every": 5}},
        {"cluster": {"workers": 2}},
    ],
)
def test_what_does_not_change_the_cache(make_config: Make, model: ModelFolder, free: dict[str, Any]) -> None:
    """Adapter, training, run name, prompts and workers find the same index."""
    index = publish(make_config(), model)
    assert read_index(make_config(**free), model) == index


def test_nothing_there(make_config: Make, model: ModelFolder) -> None:
    """An empty cache says what to run."""
    with pytest.raises(DataError, match="nothing is cached for this configuration: run `cacheloom cache` first"):
        read_index(make_config(), model)


def test_the_nearest_is_compared(make_config: Make, model: ModelFolder) -> None:
    """Of several cached configurations the one with fewest differences is compared, key by key."""
    publish(make_config(text={"max_length": 128, "dtype": "bf16"}, latents={"dtype": "bf16"}), model)
    publish(make_config(text={"max_length": 128}), model)
    broken = Path(make_config().output.cache) / "samples" / "broken.json"
    broken.write_text("{")
    with pytest.raises(DataError, match=r"\(text\.max_length is 96, cached with 128\): run") as caught:
        read_index(make_config(), model)
    assert "dtype" not in str(caught.value)


def test_another_contract(make_config: Make, model: ModelFolder) -> None:
    """A cache of another contract version is refused with both versions and the command, never misread."""
    publish(make_config(), model, contract=0)
    with pytest.raises(DataError, match=r"contract 0, this is contract 2: run `cacheloom cache` again"):
        read_index(make_config(), model)


TEXT_FIELDS = [
    "attention", "counted", "dtype", "family", "int8_rows", "layers", "max_length", "pads", "projection", "quantize",
    "stored", "system_message", "tokens", "width",
]  # fmt: skip


@pytest.mark.parametrize(("table", "field"), [*(("text", field) for field in TEXT_FIELDS), ("latents", "dtype")])
def test_rows_made_otherwise(make_config: Make, model: ModelFolder, table: str, field: str) -> None:
    """A table whose fingerprint differs from what this version would make is refused by the field's name."""
    assert list(asked.text_settings(model, make_config())) == TEXT_FIELDS
    good = publish(make_config(), model)
    ref = getattr(good, table)
    publish(make_config(), model, **{table: TableRef(ref.uri, ref.version, ref.fingerprint | {field: "other"})})
    with pytest.raises(DataError, match=rf"its {table} rows were made otherwise \({field}: wanted .*found \"other\""):
        read_index(make_config(), model)


@pytest.mark.parametrize(("table", "field"), [("latents", "image"), ("text", "tokenizers_version")])
def test_libraries_of_the_encoders_are_not_trainings(
    make_config: Make, model: ModelFolder, table: str, field: str
) -> None:
    """Training decodes no picture and cuts no text into tokens: the versions that did so are nothing to it."""
    good = publish(make_config(), model)
    ref = getattr(good, table)
    other = ref.fingerprint | {field: "of another version"}
    publish(make_config(), model, **{table: TableRef(ref.uri, ref.version, other)})
    assert getattr(read_index(make_config(), model), table).fingerprint == other


def test_a_setting_of_later_costs_no_index(make_config: Make) -> None:
    """What a later version added is no part of the settings where it asks for what was always done."""
    before, named = index.settings(make_config()), index.settings(make_config(text={"tokens": "mistral-common"}))
    assert "text.tokens" not in before
    assert named == before | {"text.tokens": "mistral-common"}


def test_every_changed_character_is_seen(make_config: Make, model: ModelFolder) -> None:
    """An index with one changed character is damaged, wherever that is: it never points at another table version."""
    config = make_config()
    publish(config, model)
    (file,) = Path(config.output.cache).glob("samples/*.json")
    text = file.read_text()
    own = RunFolder(config).index
    assert own.read_text() == text
    own.unlink()
    for place in range(0, len(text), 7):
        if not text[place].isspace():
            file.write_text(text[:place] + ("1" if text[place] != "1" else "2") + text[place + 1 :])
            with pytest.raises(DataError, match="damaged; run `cacheloom cache` again"):
                read_index(config, model)
    file.write_text(text)
    tree = json.loads(text)
    assert tree.pop("seal") == digest(tree)
    assert tree["settings"] == read_index(config, model).settings


def samples(captions: list[list[str]]) -> pa.Table:
    rows = [{"id": str(place), "captions": given} for place, given in enumerate(captions)]
    return pa.Table.from_pylist(rows, schema=schemas.samples_schema())


def test_samples_are_stored_by_content(make_config: Make) -> None:
    """The same samples are one file whoever writes them, others are another; the table comes back."""
    config = make_config()
    one, again, other = (write_samples(config, samples([[x]])) for x in ("a", "a", "b"))
    assert one == again != other
    assert parquet.read_parquet(one).to_pylist() == samples([["a"]]).to_pylist()


def test_a_samples_table_keeps_its_name(make_config: Make) -> None:
    """The name is the hash of the table as one Arrow stream, which is never in memory as a whole, however it is cut."""
    one, empty = samples([["a"], ["b", "c"], []]), samples([])
    for table in (one, empty, pa.concat_tables([one, one.slice(1), one.filter([True, False, True]), empty])):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        name = hashlib.sha256(sink.getvalue()).hexdigest()[:32]
        assert Path(write_samples(make_config(), table)).stem == name


def test_texts_once_each(make_config: Make) -> None:
    """Every caption, the empty one and the prompts with their trigger, each once."""
    config = make_config(validate={"prompts": ["a [trigger]", "b c"]})
    given = samples([["x", "y"], ["x"], ["a sks"]])
    assert texts.texts(config, given) == ["", "a sks", "b c", "x", "y"]


def test_a_prompt_without_its_trigger(make_config: Make, photos: Path) -> None:
    """A prompt that cannot be resolved is named by its place."""
    data = [{"path": str(photos), "resolutions": [64]}]
    config = make_config(data=data, validate={"prompts": ["fine here", "a [trigger]"]})
    with pytest.raises(DataError, match=r"validate\.prompts\.1: \[trigger\] stands in the text"):
        texts.prompts(config)


def test_keys_and_places(make_config: Make) -> None:
    """A text's key is of the fingerprint and the exact text; a table's place is of its fingerprint."""
    config = make_config()
    assert keys.text_key({"a": 1}, "x") != keys.text_key({"a": 1}, "x ")
    assert keys.text_key({"a": 1}, "x") != keys.text_key({"a": 2}, "x")
    assert text_uri(config, {"a": 1}) != text_uri(config, {"a": 2})
    assert text_uri(config, {"a": 1}) != latents_uri(config, {"a": 1})
    assert "4 of 9 text rows are missing, the first is for 'x'" in missing_message("text", "u", list("xyzw"), 9)
