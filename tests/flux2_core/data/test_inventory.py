"""The inventory: what is known of a picture is not read again, and what has changed is."""

import os
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_core.config.sections import Config
from flux2_core.data import intake as data_intake
from flux2_core.data import inventory, samples
from flux2_core.data.intake import SamplePlan
from flux2_core.data.inventory import Inventory
from flux2_core.data.pictures.load import Inspected
from flux2_core.model.folder import resolve
from flux2_core.plan import survey
from flux2_core.store import objects
from stages import index
from tests.flux2_core import layout_files
from tests.flux2_core.pictures import encoded, noise
from tests.in_process import PARTS

COUNT = 6


def picture(seed: int) -> bytes:
    return encoded(Image.fromarray(noise(32, 32, seed=seed)), "PNG")


def fill(root: Path) -> None:
    """Six sound pictures, one that is none, and masks."""
    for number in range(COUNT):
        layout_files.put(root, f"set/{number}.png", picture(number))
        layout_files.put(root, f"set/{number}.txt", f"a photo {number}".encode())
        layout_files.put(root, f"masks/{number}.png", picture(number + 100))
    layout_files.put(root, "set/no.png", b"<html>")
    layout_files.put(root, "set/no.txt", b"none")
    layout_files.put(root, "masks/no.png", picture(99))


def config(root: Path, **data: object) -> Config:
    sets = [{"path": str(root / "set"), "masks": "../masks", "resolutions": [32], **data}]
    output = {"cache": str(root / "cache"), "root": str(root / "runs")}
    return Config.model_validate({"model": {"path": "m"}, "data": sets, "output": output, "max_quarantined": 1.0})


def plan(given: Config, *, trusting: bool = True) -> SamplePlan:
    keys = samples.Keys(text=str, latent=lambda sha256, t: f"{sha256} {t}", mask=lambda sha256, t: f"mask {sha256} {t}")
    return data_intake.build(given, keys, trusting=trusting)


def cache(given: Config) -> SamplePlan:
    planned = plan(given)
    for known in planned.inventories:
        known.write()
    return planned


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pictures that were read, by name."""
    names: list[str] = []
    plain = objects.read

    def read(uri: str, **options: object) -> bytes:
        names.extend(["/".join(uri.split("/")[-2:])] if "png" in uri else [])
        return plain(uri, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(objects, "read", read)
    return names


def same(one: SamplePlan, other: SamplePlan) -> bool:
    tables = (one.samples, other.samples), (one.quarantine, other.quarantine)
    return all(a.equals(b) for a, b in tables) and (one.warnings, one.looks) == (other.warnings, other.looks)


def test_a_second_plan_opens_no_picture(tmp_path: Path, opened: list[str]) -> None:
    """`plan` alone leaves nothing behind; after `cache` the next plan is the same to the bit, and opens none."""
    fill(tmp_path)
    first = plan(config(tmp_path))
    assert not (tmp_path / "cache").exists()
    assert len(opened) == 2 * (COUNT + 1)
    assert same(cache(config(tmp_path)), first)
    opened.clear()
    assert same(plan(config(tmp_path)), first)
    assert not opened


def test_what_changed_is_opened(tmp_path: Path, opened: list[str]) -> None:
    """A touched picture, a touched mask, a new one: these alone; the plan is that of one who trusts nothing."""
    fill(tmp_path)
    cache(config(tmp_path))
    opened.clear()
    os.utime(tmp_path / "set/1.png", ns=(1, 1))
    layout_files.put(tmp_path, "masks/2.png", picture(200))
    layout_files.put(tmp_path, "set/new.png", picture(300))
    layout_files.put(tmp_path, "set/new.txt", b"new")
    changed = cache(config(tmp_path))
    assert sorted(opened) == ["masks/2.png", "set/1.png", "set/new.png"]
    assert same(changed, plan(config(tmp_path), trusting=False))
    opened.clear()
    assert same(plan(config(tmp_path)), changed)
    assert not opened


@pytest.mark.parametrize(
    ("change", "reads"),
    [({"weight": 2.0}, False), ({"repeats": 3}, False), ({"trigger": "sks"}, False), ({"check_images": False}, True)],
)
def test_settings_that_change_no_picture_cost_no_reading(
    tmp_path: Path, opened: list[str], change: dict[str, object], reads: bool
) -> None:
    """Weights, repeats, captions: nothing is read; how pictures are looked at is another matter."""
    fill(tmp_path)
    cache(config(tmp_path))
    opened.clear()
    assert same(plan(config(tmp_path, **change)), plan(config(tmp_path, **change), trusting=False))
    assert len(opened) == 2 * (COUNT + 1) * (1 + reads)


def test_other_bytes_of_the_same_size_and_time(tmp_path: Path) -> None:
    """The documented limit: they are not seen, unless nothing is trusted."""
    fill(tmp_path)
    first, path = cache(config(tmp_path)), tmp_path / "set/1.png"
    before = path.stat()
    path.write_bytes(picture(400).ljust(before.st_size)[: before.st_size])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert same(plan(config(tmp_path)), first)
    assert not same(plan(config(tmp_path), trusting=False), first)


def test_another_reader_reads_again(tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older version of the code or of a library saw is not taken for what this one sees."""
    fill(tmp_path)
    cache(config(tmp_path))
    opened.clear()
    monkeypatch.setattr(inventory, "_reader", lambda: "of another version")
    plan(config(tmp_path))
    assert len(opened) == 2 * (COUNT + 1)


def test_a_damaged_inventory_is_made_anew(tmp_path: Path, opened: list[str]) -> None:
    """It is ignored with a warning, and whole again after the next `cache`."""
    fill(tmp_path)
    first = cache(config(tmp_path))
    (file,) = (tmp_path / "cache/inventory").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    opened.clear()
    assert [said for said in cache(config(tmp_path)).warnings if said not in first.warnings] == [
        f"{file}: damaged or unreadable: every picture is read again"
    ]
    assert len(opened) == 2 * (COUNT + 1)
    opened.clear()
    assert same(plan(config(tmp_path)), first)
    assert not opened


@pytest.mark.parametrize("layout", ["tar", "parquet", "lance"])
def test_members_are_known_by_their_container(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a container that is the same no picture is read; of another one all are."""
    items = [(f"{n}.png", f"a photo {n}", picture(n)) for n in range(COUNT)]
    layout_files.write(layout, str(tmp_path / "set"), items, tmp=tmp_path)
    given = config(tmp_path, masks=None)
    first, read = cache(given), []

    def mapper(function: Callable[[str], Inspected], files: list[str]) -> list[Inspected]:
        read.append(len(files))
        return list(map(function, files))

    build = partial(data_intake.build, given, samples.Keys(*[lambda *parts: str(parts)] * 3), mapper=mapper)
    assert build().samples.column("sha256").equals(first.samples.column("sha256"))
    layout_files.write(layout, str(tmp_path / "again/set"), items[::-1], tmp=tmp_path)
    for name in os.listdir(tmp_path / "set"):
        os.rename(tmp_path / "set" / name, tmp_path / name)
        os.rename(tmp_path / "again/set" / name, tmp_path / "set" / name)
    build()
    assert read == [0, COUNT]


@pytest.mark.s3
def test_on_a_store(s3_root: str, opened: list[str]) -> None:
    """Objects are known by their ETags, which one listing brings."""
    for number in range(3):
        objects.write(f"{s3_root}/set/{number}.png", picture(number))
        objects.write(f"{s3_root}/set/{number}.txt", b"a photo")
    sets = [{"path": f"{s3_root}/set", "resolutions": [32]}]
    given = Config.model_validate({"model": {"path": "m"}, "data": sets, "output": {"cache": f"{s3_root}/cache"}})
    first = cache(given)
    opened.clear()
    assert same(plan(given), first)
    objects.write(f"{s3_root}/set/1.png", picture(9))
    assert opened == []
    plan(given)
    assert opened == ["set/1.png"]


def test_cache_leaves_it_for_plan(
    make_config: Callable[..., Config], opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `cache` builds first writes it, and the survey of `plan` reads it."""
    monkeypatch.setattr(index, "over_cluster", map)
    given = make_config()
    model = resolve(given.model, parts=PARTS)
    first = index.build(given, model)
    opened.clear()
    assert survey.survey(given, model).samples.equals(first.samples)
    assert not opened
    assert survey.survey(given, model, trusting=False).samples.equals(first.samples)
    assert len(opened) == 6
    index.withdraw(given)


def test_memory_of_a_picture(tmp_path: Path) -> None:
    """20,000 pictures that are known take at most 200 bytes each, and 200 more while they are looked up."""
    count, given = 20_000, config(tmp_path)
    known = Inventory(given, 0, trusting=True)
    files = [f"/no/{number:06}.png" for number in range(count)]

    def found(_: object, part: list[str]) -> list[Inspected]:
        return [Inspected(f"{n:064x}", 512, 512, None, (), bytes(56)) for n in range(len(part))]

    def keys(files: list[str], **_: object) -> inventory.Keys:
        return np.array([f"{n:016}" for n in range(len(files))], dtype="S16")

    known._keys = keys  # type: ignore[method-assign]
    assert sum(1 for _ in known.looked(files, decode=True, mapper=found)) == count
    known.write()
    assert (tmp_path / "cache/inventory").stat()
    tracemalloc.start()
    again = Inventory(given, 0, trusting=True)
    again._keys = keys  # type: ignore[method-assign]
    assert again._known.num_rows == count
    assert again._known.nbytes <= 200 * count
    assert sum(1 for _ in again.looked(files, decode=True, mapper=lambda *_: [])) == count
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400 * count
