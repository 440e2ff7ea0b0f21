"""flux2_core.run.mirror: a machine whose disk is gone is replaced by another, wherever the copy was cut."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from flows import verbs
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.errors import SetupError, UsageError
from flux2_core.run import checkpoint, metrics, mirror, recorded
from flux2_core.run.folder import RunFolder
from flux2_core.store import objects
from flux2_core.train.loop import run
from flux2_core.train.trainer import Trainer
from stages import train
from tests.fault_proxy import Proxy, Rule
from tests.flux2_core.run.test_checkpoint import make, step_of
from tests.flux2_core.train.test_resume import LIVELY, Killed, end, same_bits, told
from tests.in_process import fill_cache, process_group

Make = Callable[..., Config]
Start = Callable[..., dict[str, Any] | None]
STEPS = 9


def files(folder: str | Path) -> dict[str, bytes]:
    """What lies below a folder or a prefix, but for what is never copied, by name."""
    names = {uri[len(str(folder)) + 1 :]: uri for uri, _ in objects.listing(str(folder))}
    left_out = (".", "tensorboard/", "checkpoints/.")
    return {name: objects.read(uri) for name, uri in names.items() if not name.startswith(left_out)}


def steps_in(place: str) -> list[str]:
    """Checkpoints of which anything is in the mirror."""
    found = (uri.split("/checkpoints/")[1].split("/")[0] for uri, _ in objects.listing(place) if "/checkpoints/" in uri)
    return sorted(set(found))


@pytest.fixture
def folder(make_config: Make, root: str, tmp_path: Path) -> Callable[..., RunFolder]:
    """The run's folder on one machine or another, over one mirror."""

    def on(machine: str = "a", *, keep: int = 3, **more: Any) -> RunFolder:
        output = {"root": str(tmp_path / machine), "mirror": f"{root}/mirror", "keep": keep}
        return RunFolder(make_config(output=output, **more))

    return on


def save(run: RunFolder, step: int) -> None:
    """A checkpoint and a line of metrics."""
    checkpoint.write(run.checkpoints, make(step), keep=run.config.output.keep)
    with run.metrics.open("a") as lines:
        lines.write(f'{{"step": {step}}}\n')


Folder = Callable[..., RunFolder]
FOLDER_FIRST = pytest.mark.parametrize(  # of many uploads: on S3 with `make test-all`
    "root", ["local", pytest.param("s3", marks=[pytest.mark.s3, pytest.mark.all_cases])], indirect=True
)


def test_there_and_back(folder: Folder) -> None:
    """A pushed folder comes back on another machine byte for byte, without locks, notes and half-written files."""
    here, there = folder("a"), folder("b")
    save(here, 1)
    for name in (".lock", ".ray/state", "previews/tiles/step-000000/000.png", "previews/.tmp-x.png-1", "config.toml"):
        (here.path / name).parent.mkdir(parents=True, exist_ok=True)
        (here.path / name).write_text(name)
    (here.path / "tensorboard").mkdir()
    (here.path / "tensorboard" / "events.out.tfevents.1.host").write_text("x")
    mirror.push(here)
    mirror.pull(there)
    copied = files(there.path)
    assert sorted(uri[len(str(here.mirror)) + 1 :] for uri, _ in objects.listing(str(here.mirror))) == sorted(copied)
    assert sorted(copied) == sorted(
        ["checkpoints/step-000001/" + name for name in os.listdir(here.checkpoints / "step-000001")]
        + ["config.toml", "metrics.jsonl", "previews/tiles/step-000000/000.png"]
    )
    assert copied == {name: data for name, data in files(here.path).items() if name in copied}


@pytest.fixture
def counted(root: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many more objects of the mirror may be written or deleted before the machine is gone; unset: any number."""
    left: list[int] = []

    def until(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(uri: str, *given: Any) -> Any:
            if left and uri.startswith(f"{root}/mirror"):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
            return real(uri, *given)

        return call

    monkeypatch.setattr(objects, "write", until(objects.write))
    monkeypatch.setattr(objects, "delete", until(objects.delete))
    return left


@FOLDER_FIRST
@pytest.mark.parametrize("keep", [2, pytest.param(1, marks=pytest.mark.all_cases)])
def test_cut_at_every_object(folder: Folder, root: str, counted: list[int], keep: int) -> None:
    """Machine after machine goes on from the mirror, pushes a checkpoint, and is gone before the n-th write or delete
    of the next push: the first checkpoint loads, or the second once it is whole, with all metrics up to it; what the
    cut left is cleared up by the push after it (R12 again, over a mirror)."""
    step, found = 0, []
    for moment in range(20):
        here = folder(f"machine-{moment}", keep=keep)
        mirror.pull(here)
        assert (step_of(here.checkpoints) or 0) >= step
        assert len(metrics.read(here.metrics)) >= step
        found += [(step_of(here.checkpoints) or 0) - step]
        step += found[-1] + 1
        save(here, step)
        mirror.push(here)
        there = steps_in(f"{root}/mirror")
        assert there[-1] == f"step-{step:06d}"
        assert len(there) == min(keep, step)
        save(here, step + 1)
        counted.append(moment)
        with suppress(Killed):
            mirror.push(here)
        noted = [uri for uri, _ in objects.listing(f"{root}/mirror") if uri.endswith(checkpoint.NOTE)]
        assert all(len(list(objects.listing(uri.rsplit("/", 1)[0]))) == 4 for uri in noted), "a note without its parts"
        if counted.pop():
            break
    assert 9 <= moment < 19
    assert sorted(found) == found
    assert set(found) == {0, 1}


OBJECTS = [*(f"{part}.safetensors" for part in checkpoint.PARTS), checkpoint.NOTE]
DAMAGES = [(name, damage) for name in OBJECTS for damage in ("flip", "cut", "remove")]
SPREAD = [("optimizer.safetensors", "flip"), ("checkpoint.json", "remove")]


@pytest.mark.parametrize(
    ("name", "damage"), [pytest.param(*d, marks=() if d in SPREAD else pytest.mark.all_cases) for d in DAMAGES]
)
def test_a_damaged_object_falls_back(
    folder: Folder, root: str, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A flipped bit, a cut or a missing object of the mirror's newest checkpoint: the one before is fetched."""
    here, there = folder("a"), folder("b")
    for step in (1, 2):
        save(here, step)
        mirror.push(here)
    uri = f"{root}/mirror/test/checkpoints/step-000002/{name}"
    data = bytearray(objects.read(uri))
    data[len(data) // 2] ^= 1
    objects.delete(uri) if damage == "remove" else objects.write(uri, bytes(data) if damage == "flip" else data[:-1])
    mirror.pull(there)
    assert step_of(there.checkpoints) == 1
    assert (f"{root}/mirror/test/checkpoints/step-000002: torn" in caplog.text) == (
        name != "checkpoint.json" or damage != "remove"
    )
    save(there, 2)
    mirror.push(there)
    mirror.pull(again := folder("c"))
    assert step_of(again.checkpoints) == 2


@FOLDER_FIRST
def test_the_last_ones_are_kept(folder: Folder, root: str) -> None:
    """With keep=2 the mirror has two checkpoints after each push, also on a machine that fetched only the newest."""
    for step in range(1, 7):
        run_folder = folder("a" if step < 4 else "b", keep=2)
        mirror.pull(run_folder)
        save(run_folder, step)
        mirror.push(run_folder)
        assert steps_in(f"{root}/mirror") == [f"step-{n:06d}" for n in (step - 1, step) if n]


def test_only_what_changed_travels(folder: Folder, counted: list[int]) -> None:
    """A second push writes nothing; nor does one on the machine that fetched all; a changed file goes alone."""
    here, there = folder("a"), folder("b")
    save(here, 1)
    mirror.push(here)
    mirror.pull(there)
    counted.append(0)
    mirror.push(here)
    mirror.push(there)
    counted[0] = 1
    with there.metrics.open("a") as lines:
        lines.write('{"step": 2}\n')
    mirror.push(there)
    assert counted == [0]


def test_the_mirror_is_fetched_only_where_it_is_further(folder: Folder) -> None:
    """A folder that is as far keeps its files; where it is behind, the index that `cacheloom cache` wrote stays."""
    here, there = folder("a"), folder("b")
    save(here, 1)
    here.index.write_text("theirs")
    mirror.push(here)
    mirror.pull(there)
    assert there.index.read_text() == "theirs"
    there.index.write_text("ours")
    there.metrics.write_text("")
    mirror.pull(there)
    assert there.metrics.read_text() == ""
    save(here, 2)
    mirror.push(here)
    mirror.pull(there)
    assert (step_of(there.checkpoints), there.index.read_text()) == (2, "ours")
    assert len(metrics.read(there.metrics)) == 2
    shutil.rmtree(there.checkpoints / "step-000002")
    mirror.pull(there)
    assert step_of(there.checkpoints) == 2


def test_cut_while_fetching(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is gone before the n-th file is fetched has no checkpoint at its next start, and fetches all."""
    here, there, real = folder("a"), folder("b"), mirror._fetch
    save(here, 1)
    mirror.push(here)
    for moment in range(20):
        left = [moment]

        def until(run: RunFolder, name: str, path: Path, left: list[int] = left) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1
            real(run, name, path)

        monkeypatch.setattr(mirror, "_fetch", until)
        with suppress(Killed):
            mirror.pull(there)
            break
        assert step_of(there.checkpoints) is None
    assert moment == len(files(here.path))
    assert files(there.path) == files(here.path)


def test_nothing_leads_out_of_the_folder(folder: Folder, root: str, tmp_path: Path) -> None:
    """Names in a bucket that climb, or begin with a dot, are not fetched."""
    here, there = folder("a"), folder("b")
    save(here, 1)
    mirror.push(here)
    for name in ("../../out", ".lock", "previews/../../../out"):
        if objects.is_remote(root):
            objects.write(f"{root}/mirror/test/{name}", b"x")
    mirror.pull(there)
    assert not list(tmp_path.rglob("out"))
    assert not (there.path / ".lock").exists()


def test_two_machines_take_turns(folder: Folder) -> None:
    """The machine that started last has the run: the other one's push is refused and changes nothing, until it starts
    again itself."""
    here, there = folder("a"), folder("b")
    mirror.claim(here)
    save(here, 1)
    mirror.push(here)
    mirror.pull(there)
    mirror.claim(there)
    save(here, 2)
    with pytest.raises(UsageError, match=r"mirror/test: \S+ has taken this run over.*run the same command again here"):
        mirror.push(here)
    mirror.pull(there)
    assert step_of(there.checkpoints) == 1
    mirror.push(there)
    mirror.claim(here)
    mirror.push(here)
    mirror.pull(there)
    assert step_of(there.checkpoints) == 2


def test_another_configuration_is_refused_on_a_fresh_machine(folder: Folder) -> None:
    """The mirror's configuration counts as the folder's own does, before anything is fetched."""
    here = folder("a")
    recorded.write(here)
    mirror.push(here)
    recorded.check(folder("b"))
    other = folder("b", lora={"rank": 8})
    with pytest.raises(UsageError, match=r"mirror/test holds a run with another.*lora\.rank was 4, is 8.*run=NAME"):
        recorded.check(other)
    assert not other.path.exists()


def test_no_mirror(make_config: Make, tmp_path: Path) -> None:
    """Unset or empty: nothing is copied; the runs' own root is refused as their mirror."""
    for empty in ({}, {"mirror": ""}):
        run_folder = RunFolder(make_config(output=empty))
        for step in (mirror.pull, mirror.claim, mirror.push):
            step(run_folder)
        with mirror.Copies(run_folder, first=True) as copies:
            copies.start()
            copies.settle()
            assert copies.news() == {}
        assert not run_folder.path.exists()
    with pytest.raises(UsageError, match="is root itself"):
        make_config(output={"mirror": f"{tmp_path}/runs/"})


def test_a_push_that_hangs_holds_no_save(folder: Folder, monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    """A save waits for the copy before, but not for ever: what the save dropped under it is said, and the copy after it
    is whole."""
    here, real = folder("a", keep=1), objects.write
    hangs, goes_on = threading.Event(), threading.Event()

    def slow(uri: str, data: bytes) -> None:
        if uri.endswith("step-000001/adapter.safetensors") and "/mirror/" in uri:
            hangs.set()
            goes_on.wait(20)
        real(uri, data)

    monkeypatch.setattr(objects, "write", slow)
    monkeypatch.setattr(mirror, "PATIENCE_S", 0.05)
    with mirror.Copies(here, first=True) as copies:
        save(here, 1)
        copies.start()
        assert hangs.wait(20)
        copies.settle()
        assert copies.news() == {}
        save(here, 2)
        goes_on.set()
        monkeypatch.setattr(mirror, "PATIENCE_S", 60)
        copies.settle()
        assert "No such file" in copies.news()["warning"]
        copies.start()
    assert steps_in(f"{root}/mirror") == ["step-000002"]
    mirror.pull(there := folder("b"))
    assert step_of(there.checkpoints) == 2


def test_check_probes_the_mirror(folder: Folder, root: str, tmp_path: Path) -> None:
    """`cacheloom check` writes to the mirror, leaves nothing there, and names the setting where it cannot."""
    assert verbs._check_output(folder("a").config).endswith(f"mirror {root}/mirror: readable and writable")
    assert not list(objects.listing(root))
    (tmp_path / "file").touch()
    nowhere = "s3://no-such-bucket-here/x" if objects.is_remote(root) else str(tmp_path / "file" / "x")
    config = folder("a").config
    config = config.model_copy(update={"output": config.output.model_copy(update={"mirror": nowhere})})
    with pytest.raises(SetupError, match=r"^output\.mirror: "):
        verbs._check_output(config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, photos: Path) -> Iterator[Config]:
    """A run that nothing disturbed; its cache is filled, and a process group stands."""
    place = tmp_path_factory.mktemp("mirrored")
    config = parse(
        {
            "run": "straight",
            "model": {"path": str(tiny_model)},
            "data": [{"path": str(photos), "trigger": "sks", "resolutions": [64], "repeats": 2}],
            "text": {"dtype": "fp32", "max_length": 96},
            "latents": {"dtype": "fp32"},
            "lora": {"rank": 2, "targets": "tiny"},
            "train": LIVELY | {"steps": STEPS},
            "validate": {"every": 3, "steps": 1, "prompts": ["a [trigger]"]},
            "output": {"root": str(place / "runs"), "cache": str(place / "cache"), "save_every": STEPS},
        }
    )
    fill_cache(config)
    with process_group(place):
        run(Trainer(config), lambda record: None)
        yield config


def mirrored(whole: Config, tmp_path: Path, root: str) -> Config:
    """The same run with a mirror."""
    output = {"root": str(tmp_path / "runs"), "mirror": f"{root}/mirror", "save_every": 2}
    return whole.model_copy(update={"run": "test", "output": whole.output.model_copy(update=output)})


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """`cacheloom train`, its worker in this process instead of Ray's; killed after step `stop`."""
    monkeypatch.setattr(train.cluster, "connect", lambda _: nullcontext())

    def begin(config: Config, *, stop: int | None = None) -> dict[str, Any] | None:
        def fit(config: Config, _folder: RunFolder, progress: train.Progress) -> None:
            def on_step(record: dict[str, Any]) -> None:
                progress(record)
                if record["step"] == stop:
                    raise Killed

            run(Trainer(config), on_step)

        monkeypatch.setattr(train, "_fit", fit)
        with suppress(Killed):
            return train.train(config)
        return None

    return begin


def test_a_fresh_machine_goes_on_bit_for_bit(whole: Config, start: Start, tmp_path: Path, root: str) -> None:
    """Killed after step 5, its disk lost: the next machine goes on at step 4 and ends with every bit of an undisturbed
    run, each step once in the metrics, all previews, and a mirror that equals the folder. On a third machine the
    finished run is fetched, and nothing is trained."""
    config = mirrored(whole, tmp_path, root)
    place = RunFolder(config)
    assert start(config, stop=5) is None
    shutil.rmtree(place.path)
    done = start(config)
    assert done is not None
    assert (done["resumed_from"], done["mirror"]) == (4, place.mirror)
    assert same_bits(end(config), end(whole))
    assert told(config) == told(whole)
    looks = [metrics.read(RunFolder(one).validation) for one in (config, whole)]
    assert looks[0] == looks[1]
    assert [path.name for path in place.previews_drawn()] == [f"step-{step:06d}.png" for step in (0, 3, 6, 9)]
    before = files(place.path)
    assert {"lora/test.safetensors", "report.html", "README.md", "config.toml", "validation.jsonl"} < set(before)
    assert files(str(place.mirror)) == before
    shutil.rmtree(place.path)
    fetched = start(config, stop=0)
    assert fetched == done | {"resumed_from": STEPS}
    newest = f"checkpoints/step-{STEPS:06d}/"
    assert files(place.path) == {
        name: data for name, data in before.items() if not name.startswith("checkpoints/") or name.startswith(newest)
    }


@pytest.fixture
def proxy(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """Clients give up soon."""
    monkeypatch.setattr(objects, "RETRIES", 1)
    return proxy


@pytest.mark.s3
def test_a_store_that_fails_ends_no_training(
    whole: Config, start: Start, proxy: Proxy, s3_root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Uploads that fail while training are told and do not stop it; at the end they are one clear error, with the LoRA
    written; the same command then only copies."""
    config = mirrored(whole, tmp_path, s3_root)
    proxy.rules = [Rule("InternalError", method="PUT", path="metrics.jsonl")]
    with pytest.raises(SetupError, match=r"output\.mirror=s3://.*InternalError.*the same command copies"):
        start(config)
    place = RunFolder(config)
    assert place.finished()
    assert "InternalError" in caplog.text
    assert [r["step"] for r in metrics.read(place.metrics) if "warning" in r]
    assert steps_in(str(place.mirror)) == []
    proxy.rules = []
    done = start(config, stop=0)
    assert done is not None
    assert done["resumed_from"] == STEPS
    assert files(str(place.mirror)).keys() == {
        name for name in files(place.path) if not name.startswith("checkpoints/") or f"{STEPS:06d}" in name
    }


@pytest.mark.s3
def test_a_mirror_that_cannot_be_read_is_refused_at_once(make_config: Make, s3_root: str, tmp_path: Path) -> None:
    """A bucket that does not exist is an error of the environment before anything is started."""
    config = make_config(output={"mirror": "s3://no-such-bucket-here/x"})
    with pytest.raises(SetupError, match="bucket does not exist"):
        train.train(config)
    assert not (RunFolder(config).path / "config.toml").exists()


def test_a_notice_waits_for_the_copy(whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told that its machine goes, the loop returns when its checkpoint is in the mirror, though none was due and the
    store is slow."""
    config, real = mirrored(whole, tmp_path, str(tmp_path)), objects.write

    def slow(uri: str, data: bytes) -> None:
        time.sleep(0.5 if "step-000003/checkpoint.json" in uri else 0)
        real(uri, data)

    monkeypatch.setattr(objects, "write", slow)
    asked = iter([False, False, True])
    assert not run(Trainer(config), lambda record: None, noticed=lambda: next(asked))
    assert objects.exists(f"{tmp_path}/mirror/test/checkpoints/step-000003/checkpoint.json")
    before = end(config)
    shutil.rmtree(RunFolder(config).path)
    mirror.pull(RunFolder(config))
    assert same_bits(end(config), before)
