"""`gc`: what no index names goes, what any names stays, whoever works beside it."""

import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_core.cache import garbage, verify
from flux2_core.cache.index import PENDING, announce, read_index, withdraw
from flux2_core.cache.keys import text_key
from flux2_core.config.sections import Config
from flux2_core.data import texts
from flux2_core.errors import DataError
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.plan import survey
from flux2_core.run.folder import RunFolder
from flux2_core.store import upkeep
from flux2_core.store.table import Table
from flux2_core.train.batches import TrainingData
from tests.flux2_core.store_writers import fill, keys_of, row
from tests.in_process import PARTS, fill_cache

Make = Callable[..., Config]
NOW, WEEK = timedelta(0), timedelta(days=7)
SHARED, OWN = 6, 7  # latents rows of both runs; text rows of one alone: six captions and a prompt


_filled: list[tuple[Path, ModelFolder]] = []


@pytest.fixture
def runs(
    make_config: Make, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Config, ModelFolder]:
    """A run of which everything must stay, and one over the same pictures with another trigger; both are cached."""

    def both(folder: Path) -> tuple[Config, Config]:
        output = {"root": str(folder / "runs"), "cache": str(folder / "cache")}
        prompts = {"prompts": ["a red [trigger]"]}
        data = [{"path": str(photos), "trigger": "xyz", "resolutions": [64]}]
        return (
            make_config(run="kept", validate=prompts, output=output),
            make_config(run="dropped", data=data, validate=prompts, output=output),
        )

    if not _filled:  # once for all tests
        folder = tmp_path_factory.mktemp("cached")
        kept, dropped = both(folder)
        fill_cache(dropped)
        _filled.append((folder, fill_cache(kept)))
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(_filled[0][0], copy, dirs_exist_ok=True)
    return *both(copy), _filled[0][1]


@pytest.fixture
def kept(runs: tuple[Config, Config, ModelFolder]) -> Config:
    return runs[0]


@pytest.fixture
def dropped(runs: tuple[Config, Config, ModelFolder]) -> Config:
    return runs[1]


@pytest.fixture
def model(runs: tuple[Config, Config, ModelFolder]) -> ModelFolder:
    return runs[2]


def seen(config: Config, model: ModelFolder) -> list[torch.Tensor]:
    batch = TrainingData(config, model).batch(0)
    return [batch.latents_Bchw, batch.prompts_BLD, batch.noise_Bchw]


def test_a_dropped_run_frees_its_own(kept: Config, dropped: Config, model: ModelFolder) -> None:
    """Without one run's folder its rows, index and bytes go; the other trains on, bit for bit the same."""
    before = seen(kept, model)
    assert garbage.collect(kept, keep=NOW, dry_run=True)["dropped"] == {"text": 0, "latents": 0}
    shutil.rmtree(RunFolder(dropped).path)
    told = garbage.collect(kept, keep=NOW, dry_run=True)
    assert seen(dropped, model)  # nothing is gone yet
    result = garbage.collect(kept, keep=NOW, dry_run=False)
    assert told["dropped"] == result["dropped"] == {"text": OWN, "latents": 0}
    assert told["files"] == result["files"] == 2  # its index and its samples table
    assert result["freed"] > told["freed"] > OWN * 96 * 4 * 10
    assert all(torch.equal(*pair) for pair in zip(before, seen(kept, model), strict=True))
    assert verify.verify_rows(kept, model) == {"rows": OWN + 2 + SHARED, "corrupt": [], "missing": []}
    with pytest.raises(DataError, match="nothing is cached"):
        TrainingData(dropped, model)
    assert garbage.collect(kept, keep=NOW, dry_run=False)["dropped"] == {"text": 0, "latents": 0}
    fill_cache(dropped)
    assert seen(dropped, model)


def test_nothing_young_is_touched(kept: Config, dropped: Config, model: ModelFolder) -> None:
    """Within the safe age an index in the cache counts though its run is gone, and so does a row that nothing names."""
    shutil.rmtree(RunFolder(dropped).path)
    index = read_index(kept, model)
    fill(Table.open(index.text.uri), range(3))
    result = garbage.collect(kept, keep=WEEK, dry_run=False)
    assert (result["dropped"], result["files"], result["kept_young"]) == ({"text": 0, "latents": 0}, 0, 3)
    assert seen(dropped, model)
    assert Table.open(index.text.uri).present(keys_of(range(3))) == set(keys_of(range(3)))
    assert index.text.version in upkeep.tags(index.text.uri).values()  # left by the index, kept for who still reads it
    assert read_index(kept, model).text.version == Table.open(index.text.uri).version
    assert len(TrainingData(kept, model).text_reader.missing) == 0


def test_a_training_at_work_keeps_its_version(kept: Config, dropped: Config, model: ModelFolder) -> None:
    """While a run's lock is held its index and the version that it reads stay, even without a safe age."""
    shutil.rmtree(RunFolder(dropped).path)
    data, index = TrainingData(kept, model), read_index(kept, model)
    with RunFolder(kept).lock():
        assert garbage.collect(kept, keep=NOW, dry_run=False)["dropped"]["text"] == OWN
        assert data.batch(0).ids == TrainingData(kept, model).batch(0).ids
        assert read_index(kept, model) == index
    garbage.collect(kept, keep=NOW, dry_run=False)
    assert read_index(kept, model).text.version > index.text.version
    with pytest.raises(DataError, match="no table there at version"):
        Table.open(index.text.uri, version=index.text.version)


def test_a_cache_at_work_keeps_what_it_announced(kept: Config, dropped: Config, model: ModelFolder) -> None:
    """Rows that a `cache` found and relies on stay until its index is there; then the announcement is gone."""
    shutil.rmtree(RunFolder(dropped).path)
    for path in Path(kept.output.cache, "samples").glob("*.json"):
        path.unlink()
    announce(dropped, survey.survey(dropped, model).samples)
    result = garbage.collect(kept, keep=NOW, dry_run=False)
    assert (result["caching"], result["dropped"]) == (True, {"text": 0, "latents": 0})
    fill_cache(dropped)
    withdraw(dropped)
    assert not list(Path(kept.output.cache, "samples").glob("*" + PENDING))
    assert seen(dropped, model)


def test_rows_named_meanwhile_are_put_back(
    kept: Config, dropped: Config, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `cache` that starts between the reading of the names and the dropping of rows loses none."""
    shutil.rmtree(RunFolder(dropped).path)
    planned, real = survey.survey(dropped, model), upkeep.drop

    def late(uri: str, keys: Any) -> int:
        announce(dropped, planned.samples)
        return real(uri, keys)

    monkeypatch.setattr(upkeep, "drop", late)
    assert garbage.collect(kept, keep=NOW, dry_run=False)["dropped"]["text"] == OWN
    table = Table.open(read_index(kept, model).text.uri)
    wanted = [text_key(table.fingerprint, text) for text in texts.texts(dropped, planned.samples)]
    assert table.present(wanted) == set(wanted)
    assert verify.verify_rows(kept, model)["corrupt"] == []


def test_a_writer_beside_it_loses_nothing(kept: Config, model: ModelFolder) -> None:
    """Rows that are committed while gc drops, compacts and cleans up are all there afterwards, once and whole."""
    table = Table.open(read_index(kept, model).text.uri)
    threads = [threading.Thread(target=fill, args=(table, range(at, 40, 2)), kwargs={"batch_rows": 4}) for at in (0, 1)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        garbage.collect(kept, keep=WEEK, dry_run=False)
    for thread in threads:
        thread.join()
    found = list(Table.open(table.uri).keys())
    assert len(found) == len(set(found))
    assert {row(number).key for number in range(40)} <= set(found)
    assert verify.verify_rows(kept, model) == {"rows": 2 * OWN + 2 + SHARED + 40, "corrupt": [], "missing": []}


def test_a_damaged_index_stops_it(kept: Config, dropped: Config, model: ModelFolder) -> None:
    """What a damaged index names cannot be known: nothing is dropped, and the file is named."""
    path = RunFolder(dropped).index
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(DataError, match=r"dropped/index\.json: damaged, so what it names cannot be known"):
        garbage.collect(kept, keep=NOW, dry_run=False)
    assert verify.verify_rows(kept, model)["missing"] == []


@pytest.mark.s3
@pytest.mark.all_cases
def test_on_an_object_store(make_config: Make, s3_root: str, tmp_path: Path) -> None:
    """The same on s3://: an unnamed row goes, the run's rows stay and verify."""
    config = make_config(output={"root": str(tmp_path / "runs"), "cache": s3_root})
    model = fill_cache(config)
    index = read_index(config, resolve(config.model, parts=PARTS))
    fill(Table.open(index.text.uri), range(2))
    assert garbage.collect(config, keep=NOW, dry_run=False)["dropped"] == {"text": 2, "latents": 0}
    assert verify.verify_rows(config, model) == {"rows": OWN + 1 + SHARED, "corrupt": [], "missing": []}
