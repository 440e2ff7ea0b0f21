"""`verify`: every planted fault is found and named (reliability R8), and rows encoded again agree."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from flux2_core.cache import verify
from flux2_core.cache.index import read_index
from flux2_core.config.sections import Config
from flux2_core.errors import DataError
from flux2_core.model.folder import ModelFolder
from flux2_core.run.folder import RunFolder
from flux2_core.store import mend, objects, schemas, seals, upkeep
from flux2_core.store.reader import Reader
from flux2_core.store.row import Row
from flux2_core.store.table import Table
from flux2_core.store.writer import Writer
from flux2_core.train.batches import TrainingData
from tests.in_process import fill_cache

Make = Callable[..., Config]
PLACES = {  # of a table's files, by pattern; the first is the oldest
    "data": "data/*.lance", "blob": "data/*/*.blob", "manifest": "_versions/*.manifest", "hint": "_versions/*.json",
    "transaction": "_transactions/*.txn", "deletion": "_deletions/*.arrow", "tag": "_refs/tags/*.json",
    "seal": "_seals/*.json",
}  # fmt: skip
OF_TABLES = [(f"{kind} {name}", size) for kind in ("text", "latents") for name in PLACES for size in (1, 200)]
OF_FILES = [(name, size) for name in ("samples", "index", "run index", "quarantine") for size in (1, 200)]
MORE = [
    (f"{kind} {name}", size) for kind in ("text", "latents") for name in ("data", "blob") for size in (1, 200, 1, 9, 1)
]
CASES = [(name, size, seed) for seed, (name, size) in enumerate([*OF_TABLES, *OF_FILES, *MORE])]
SPREAD = range(0, len(CASES), 4)  # of them in `make test`


@dataclass(frozen=True)
class Cached:
    """A small cache with every kind of file in it."""

    make: Make
    model: ModelFolder
    kept: Path

    def restored(self, folder: Path) -> Config:
        """The configuration over a copy of the cache and of the run's folder."""
        shutil.copytree(self.kept, folder, dirs_exist_ok=True)
        return self.make(output={"root": str(folder / "runs"), "cache": str(folder / "cache")})


_filled: dict[str, Cached] = {}


@pytest.fixture
def cached(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Cached:
    """Filled once for all cases; beside the samples' rows there are large ones (in .blob files) and a dropped one."""
    if not _filled:
        folder = tmp_path_factory.mktemp("cached")
        config = make_config(output={"root": str(folder / "runs"), "cache": str(folder / "cache")})
        model = fill_cache(config)
        index = read_index(config, model)
        for table, attributes in ((index.text, {"text": "", "tokens": 1}), (index.latents, {"height": 1, "width": 1})):
            with Writer(Table.open(table.uri), batch_rows=9, batch_bytes=1 << 30) as writer:
                for number in range(3):
                    writer.add(Row(f"large {number}", random.Random(number).randbytes(70_000), attributes))
                writer.add(Row("dropped", b"x" * 300, attributes))
            upkeep.drop(table.uri, ["dropped"])
            seals.seal(table.uri)
        _filled["once"] = Cached(make_config, model, folder)
    kept = _filled["once"]
    return Cached(make_config, kept.model, kept.kept)


def file_of(config: Config, model: ModelFolder, name: str, dice: random.Random) -> Path:
    """One file of the named kind."""
    index, run = read_index(config, model), RunFolder(config)
    places = {"samples": index.samples, "run index": run.index, "quarantine": run.quarantine}
    if name in places:
        return Path(places[name])
    if name == "index":
        return next(Path(config.output.cache, "samples").glob("*.json"))
    kind, place = name.split()
    table = index.text if kind == "text" else index.latents
    return dice.choice(sorted(Path(table.uri).glob(PLACES[place])))


def plant(path: Path, size: int, dice: random.Random) -> None:
    """Flip a bit in each of `size` bytes somewhere in a file."""
    data = bytearray(path.read_bytes())
    start = dice.randrange(max(1, len(data) - size))
    for place in range(start, min(len(data), start + size)):
        data[place] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "size", "seed"),
    [pytest.param(*case, marks=() if at in SPREAD else pytest.mark.all_cases) for at, case in enumerate(CASES)],
)
def test_every_planted_fault_is_found(cached: Cached, tmp_path: Path, name: str, size: int, seed: int) -> None:
    """R8, 60 cases: `verify` lists one flipped bit, or 200, in any file of the cache, and names the file or the row."""
    config, dice = cached.restored(tmp_path / "copy"), random.Random(seed)
    path = file_of(config, cached.model, name, dice)
    plant(path, size, dice)
    found = verify.verify_rows(config, cached.model)["corrupt"]
    assert found
    named = " ".join(f"{entry['key']} {entry['of']} {entry['reason']}" for entry in found)
    assert str(path) in named or (path.suffix == ".blob" and all(entry["kind"] == "row" for entry in found))


TRUNCATED = [(name, -1, 100 + seed) for seed, (name, size) in enumerate([*OF_TABLES, *OF_FILES]) if size == 1]


@pytest.mark.parametrize(
    ("name", "size", "seed"),
    [
        pytest.param(*case, marks=() if at % 8 == 0 else pytest.mark.all_cases)
        for at, case in enumerate([*CASES, *TRUNCATED])
    ],
)
def test_the_advice_mends_every_planted_fault(cached: Cached, tmp_path: Path, name: str, size: int, seed: int) -> None:
    """What `verify` advises, `verify --drop` and then `cache`, ends in a clean `verify`; truncated files too."""
    config, dice = cached.restored(tmp_path / "copy"), random.Random(seed)
    path = file_of(config, cached.model, name, dice)
    if size > 0:
        plant(path, size, dice)
    else:
        path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])
    found = verify.verify_rows(config, cached.model)["corrupt"]
    assert found
    assert verify.drop(found) == len(found)
    fill_cache(config)
    assert verify.verify_rows(config, cached.model) == {
        **verify.verify_rows(config, cached.model),
        "corrupt": [],
        "missing": [],
    }
    assert len(TrainingData(config, cached.model).text_reader.missing) == 0


def test_there_are_sixty_cases() -> None:
    """As many as reliability.md counts."""
    assert len(CASES) == 60


def test_a_whole_cache_is_whole(cached: Cached, tmp_path: Path) -> None:
    """Nothing is corrupt or missing where nothing was planted, rows that no configuration needs included."""
    config = cached.restored(tmp_path / "copy")
    told: list[tuple[str, int, int]] = []
    found = verify.verify_rows(config, cached.model, progress=lambda *count: told.append(count))
    assert found == {"rows": 7 + 1 + 6 + 2 * 3, "corrupt": [], "missing": []}
    ends = [count for count in told if count[1] == count[2]]
    assert {kind for kind, *_ in ends} == {"text", "latents"}
    assert sum(total for *_, total in ends) == found["rows"], "its progress is told to the end"


@pytest.mark.parametrize("kind", ["text", "latents"])
def test_training_refuses_a_corrupt_row(cached: Cached, tmp_path: Path, kind: str) -> None:
    """A row whose payload has one flipped bit stops the training with its key and its table; `--drop` mends that."""
    config = cached.restored(tmp_path / "copy")
    data = TrainingData(config, cached.model)
    reader = data.text_reader if kind == "text" else data.latents_reader
    key = data.train[0]["text_keys"][0] if kind == "text" else data.train[0]["latent_key"]
    file, place = reader.where(key)
    content = bytearray(Path(file).read_bytes())
    content[place + 1000] ^= 16
    Path(file).write_bytes(content)
    opened = TrainingData(config, cached.model)
    with pytest.raises(DataError, match=rf"{reader.table.uri}: row {key} is corrupt .*verify --drop"):
        opened.prompt_rows([key]) if kind == "text" else opened.latent_rows([data.train[0]])
    before = set(Table.open(reader.table.uri).keys())
    found = verify.verify_rows(config, cached.model)["corrupt"]
    assert [entry["key"] for entry in found if entry["kind"] == "row"] == [key]
    assert verify.drop(found) == len(found)
    assert set(Table.open(reader.table.uri).keys()) == before - {key}, "a sound row was dropped with it"


def test_mending_spares_what_is_sound(cached: Cached, tmp_path: Path) -> None:
    """A file that is cut short takes only its own rows with it; a table of another contract loses nothing."""
    config = cached.restored(tmp_path / "copy")
    table = Table.open(read_index(config, cached.model).text.uri)
    parts = table.dataset.get_fragments()
    rows = [{row["key"] for row in part.to_table(columns=["key"]).to_pylist()} for part in parts]
    assert len(parts) > 1
    path = Path(table.uri, "data", parts[0].data_files()[0].path)
    path.write_bytes(path.read_bytes()[:100])
    verify.drop(verify.verify_rows(config, cached.model)["corrupt"])
    assert set(Table.open(table.uri).keys()) == set().union(*rows[1:])
    table.checkout_latest()
    table.dataset.update_schema_metadata({schemas.META_CONTRACT: "3"})
    seals.seal(table.uri)
    files = sorted(Path(table.uri).rglob("*"))
    with pytest.raises(DataError, match="contract version is 3"):
        mend.mend(table.uri, [])
    assert sorted(Path(table.uri).rglob("*")) == files


def test_a_table_that_cannot_be_opened_is_listed(cached: Cached, tmp_path: Path) -> None:
    """A table without its newest manifest is one entry; the other table is still read."""
    config = cached.restored(tmp_path / "copy")
    index = read_index(config, cached.model)
    for path in Path(index.text.uri, "_versions").glob("*.manifest"):
        path.write_bytes(b"")
    found = verify.verify_rows(config, cached.model)
    assert {entry["key"] for entry in found["corrupt"] if entry["kind"] == "version"} == {
        f"version {index.text.version}", "the newest version"
    }  # fmt: skip
    assert found["rows"] >= 6


def test_missing_rows_are_listed(cached: Cached, tmp_path: Path) -> None:
    """A prompt that was never encoded is missing, by its text."""
    folder = tmp_path / "copy"
    cached.restored(folder)
    output = {"root": str(folder / "runs"), "cache": str(folder / "cache")}
    found = verify.verify_rows(cached.make(validate={"prompts": ["new one"]}, output=output), cached.model)
    assert [row["of"] for row in found["missing"]] == ["new one"]


def test_rows_encoded_again_agree(cached: Cached, tmp_path: Path, make_config: Make) -> None:
    """The same rows from a second encoding are equal; rows of other bytes that carry a right checksum are listed."""
    config = cached.restored(tmp_path / "copy")
    texts, samples = verify.chosen(config, cached.model, 3)
    assert (len(texts), samples.num_rows) == (3, 3)
    scratch = make_config(output={"root": str(tmp_path / "r"), "cache": str(tmp_path / "scratch")})
    fill_cache(scratch)
    again = read_index(scratch, cached.model)
    tables_again = {schemas.KIND_TEXT: again.text, schemas.KIND_LATENTS: again.latents}
    assert verify.compare(config, cached.model, tables_again) == (7 + 1 + 6, [])
    index = read_index(scratch, cached.model)
    key = samples.column("latent_key")[0].as_py()
    (row,) = Reader(Table.open(index.latents.uri), [key]).fetch([key])
    upkeep.drop(index.latents.uri, [key])
    with Writer(Table.open(index.latents.uri), batch_rows=2, batch_bytes=1 << 30) as writer:
        writer.add(Row(key, bytes(row.payload)[4:] + b"\0\0\0?", row.attributes))
    count, differing = verify.compare(config, cached.model, tables_again)
    assert (count, [entry["key"] for entry in differing]) == (7 + 1 + 6, [key])
    assert "encoded again it differs by" in differing[0]["reason"]


def test_faults_elsewhere_are_not_ours(cached: Cached, tmp_path: Path) -> None:
    """A later commit and a moved tag change the hint and the tag: no damage, before and after they are sealed."""
    config = cached.restored(tmp_path / "copy")
    uri = read_index(config, cached.model).text.uri
    with Writer(Table.open(uri), batch_rows=2, batch_bytes=1 << 30) as writer:
        writer.add(Row("later", b"x", {"text": "", "tokens": 1}))
    for name in upkeep.tags(uri):
        upkeep.tag(uri, name, Table.open(uri).version)
    assert verify.verify_rows(config, cached.model)["corrupt"] == []
    seals.seal(uri)
    assert verify.verify_rows(config, cached.model)["corrupt"] == []
    assert [path for path, _ in objects.listing(uri) if "latest_version_hint" in path]
