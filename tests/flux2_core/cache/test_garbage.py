"""`gc`: what no index names goes, what any names stays, whoever works beside it."""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_core.cache import garbage, index, leases, publish, sealed, verify
from flux2_core.cache.index import read_index
from flux2_core.cache.keys import text_key
from flux2_core.cache.publish import announce, withdraw
from flux2_core.config.sections import Config
from flux2_core.data import texts
from flux2_core.errors import DataError, SetupError
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
    for path in copy.rglob("*.json"):  # as if it had been written there
        if (tree := sealed.decode(path.read_bytes())) and index.CACHE in tree:
            path.write_bytes(sealed.encode(tree | {index.CACHE: str(copy / "cache")}))
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
    assert ["its files are not merged" in told for told in result["skipped"]] == [True, True]
    fill_cache(dropped)
    withdraw(dropped)
    assert garbage.collect(kept, keep=WEEK, dry_run=False)["skipped"] == []
    assert not list(Path(kept.output.cache, leases.FOLDER).glob("*"))
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


def another(config: Config, tmp_path: Path) -> Config:
    """The same run of a colleague, whose folder of runs nobody else sees."""
    return config.model_copy(update={"output": config.output.model_copy(update={"root": str(tmp_path / "theirs")})})


@pytest.fixture
def colleague(dropped: Config, tmp_path: Path) -> Config:
    """The run `dropped`, of which the cache has rows and nothing else: its indexes are older than any age."""
    shutil.rmtree(RunFolder(dropped).path)
    own = index.index_uri(dropped)
    tree = sealed.read(own) | {index.WRITTEN: 0.0}
    Path(own).write_bytes(sealed.encode(tree))
    return another(dropped, tmp_path)


def lease(config: Config, model: ModelFolder, monkeypatch: pytest.MonkeyPatch, *, now: float = 0.0) -> leases.Lease:
    """What `train` takes, by a clock that is `now` seconds off."""
    real = time.time
    monkeypatch.setattr(leases.time, "time", lambda: real() + now)
    taken = leases.Lease(config, "train", publish.named_by(config, read_index(config, model)))
    monkeypatch.setattr(leases.time, "time", real)
    return taken


DAY = 86400.0


@pytest.mark.parametrize(
    ("clock", "held"), [(0.0, True), (-DAY, True), (DAY, True), (-6 * DAY, True), (-8 * DAY, False)]
)
def test_a_colleagues_lease_holds(
    kept: Config, colleague: Config, model: ModelFolder, monkeypatch: pytest.MonkeyPatch, clock: float, held: bool
) -> None:
    """R20: a training of another person keeps its rows, by a clock one day off and six days after it was broken off
    too; a holder that died eight days ago holds nothing, and its lease goes."""
    taken = lease(colleague, model, monkeypatch, now=clock)
    before = seen(colleague, model)
    taken.leave()
    told = garbage.collect(kept, keep=NOW, dry_run=True)
    assert [text for text in told["held"] if str(RunFolder(colleague).path) in text] == told["held"]
    assert bool(told["held"]) == held
    result = garbage.collect(kept, keep=NOW, dry_run=False)
    assert result["dropped"]["text"] == told["dropped"]["text"] == (0 if held else OWN)
    assert Path(taken.uri).exists() == held
    if held:
        assert all(torch.equal(*pair) for pair in zip(before, seen(colleague, model), strict=True))
        taken.release()
        assert garbage.collect(kept, keep=NOW, dry_run=False)["dropped"]["text"] == OWN


def test_the_version_under_a_lease_can_be_read_on(
    kept: Config, colleague: Config, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that has its tables open reads on after a `gc` that rewrote them, and after a second one."""
    other = kept.model_copy(
        update={"run": "third", "validate_": kept.validation.model_copy(update={"prompts": ("x",)})}
    )
    fill_cache(other)
    taken = lease(colleague, model, monkeypatch)
    data = TrainingData(colleague, model)
    first = data.batch(0)
    shutil.rmtree(RunFolder(other).path)
    for _ in range(2):
        garbage.collect(kept, keep=NOW, dry_run=False)
        assert torch.equal(data.batch(0).prompts_BLD, first.prompts_BLD)
        assert torch.equal(TrainingData(colleague, model).batch(0).latents_Bchw, first.latents_Bchw)
    taken.release()


def test_a_cache_of_last_week_stays(kept: Config, colleague: Config, model: ModelFolder) -> None:
    """An index younger than the age keeps a colleague's rows without any lease."""
    own = Path(index.index_uri(colleague))
    own.write_bytes(sealed.encode(sealed.read(str(own)) | {index.WRITTEN: time.time() - 6 * DAY}))
    assert garbage.collect(kept, keep=WEEK, dry_run=False)["dropped"]["text"] == 0
    assert seen(colleague, model)


def test_a_lease_is_renewed_while_its_holder_works(
    kept: Config, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time until which it holds moves on by itself, and a store that fails once in between ends nothing."""
    monkeypatch.setattr(leases, "RENEW_S", 0.02)
    taken = leases.Lease(kept, "train", publish.named_by(kept, read_index(kept, model)))
    first = sealed.read(taken.uri)[leases.UNTIL]
    failing = threading.Event()
    real = leases.objects.write

    def write(uri: str, data: bytes) -> None:
        if not failing.is_set():
            failing.set()
            raise SetupError("the store is away")
        real(uri, data)

    monkeypatch.setattr(leases.objects, "write", write)
    assert failing.wait(10)
    for _ in range(500):
        if sealed.read(taken.uri)[leases.UNTIL] > first:
            break
        time.sleep(0.02)
    assert sealed.read(taken.uri)[leases.UNTIL] > first
    taken.release()
    assert not Path(taken.uri).exists()


def test_a_run_that_only_trained_has_an_index_of_its_own(kept: Config, tmp_path: Path, model: ModelFolder) -> None:
    """`train` copies the index that it found, so that `gc` knows what an interrupted run needs."""
    alone = another(kept, tmp_path)
    publish.keep(alone)
    assert read_index(alone, model) == read_index(kept, model)
    own = RunFolder(alone).index
    assert sealed.read(str(own))["settings"] == index.settings(alone)
    for path in Path(kept.output.cache, "samples").glob("*.json"):
        path.unlink()
    assert garbage.collect(alone, keep=NOW, dry_run=False)["dropped"]["text"] == OWN
    assert seen(alone, model)


def test_another_caches_run_is_left_alone(make_config: Make, tmp_path: Path) -> None:
    """Two caches that hold a samples table of the same content: `gc` in one rewrites no index of a run of the other."""
    first, second = (
        make_config(run=name, output={"root": str(tmp_path / "runs"), "cache": str(tmp_path / f"cache-{name}")})
        for name in "ab"
    )
    model = fill_cache(first)
    fill_cache(second)
    fill(Table.open(read_index(first, model).text.uri), range(3))
    theirs = RunFolder(second).index.read_bytes()
    garbage.collect(first, keep=NOW, dry_run=False)
    assert RunFolder(second).index.read_bytes() == theirs
    assert verify.verify_rows(second, model)["corrupt"] == []
    assert seen(second, model)


def test_rows_that_vanish_are_named(kept: Config, model: ModelFolder) -> None:
    """A training whose files are removed under it ends with one line that says what happened."""
    data = TrainingData(kept, model)
    shutil.rmtree(read_index(kept, model).latents.uri)
    with pytest.raises(DataError, match=r"gone, with row .* in it: somebody removed the cache"):
        data.batch(0)


def test_a_finished_run_keeps_the_index_of_its_data(kept: Config, model: ModelFolder, monkeypatch: Any) -> None:
    """Caching edited captions under a finished run leaves its index as its LoRA saw it, and it is said."""
    own = RunFolder(kept).index
    before = own.read_bytes()
    samples = read_index(kept, model).samples.rsplit("/", 1)[-1]
    assert publish.trained_on_other_data(kept, samples) is None
    monkeypatch.setattr(RunFolder, "finished", lambda _: True)
    found, edited = read_index(kept, model), survey.survey(kept, model).samples.slice(1)
    publish.write_index(kept, replace(found, samples=publish.write_samples(kept, edited)))
    assert own.read_bytes() == before
    told = publish.trained_on_other_data(kept, samples)
    assert told is not None
    assert "have changed since" in told
    assert "lora.init=" in told
