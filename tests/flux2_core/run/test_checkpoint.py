"""Checkpoints: torn, corrupt and killed saves never cost more than the last one."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_core.errors import DataError, SetupError
from flux2_core.run import checkpoint
from flux2_core.run.checkpoint import Checkpoint, newest, read, write
from flux2_core.store import atomic
from flux2_core.store.hashing import digest


def make(step: int, *, mark: float = 0.0) -> Checkpoint:
    adapter = {"a.lora_A.weight": torch.full((2, 3), step + mark), "a.lora_B.weight": torch.randn(3, 2).T}
    optimizer = {"a.step": torch.tensor(float(step)), "a.exp_avg": torch.randn(2, 3)}
    ema = {"a.lora_A.weight": torch.full((2, 3), step - mark)}
    return Checkpoint(step, adapter, optimizer, {"skipped": 1, "samples": "uri"}, ema)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def step_of(folder: Path) -> int | None:
    found = newest(folder)
    return None if found is None else found.step


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Tensors (scalars and transposed ones too), step and facts are read as they were written."""
    given = make(7)
    path = write(tmp_path / "c", given, keep=3)
    assert path.name == "step-000007"
    found = newest(tmp_path / "c")
    assert found is not None
    assert (found.step, found.facts) == (given.step, given.facts)
    for part in checkpoint.PARTS:
        ours, theirs = getattr(given, part), getattr(found, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_nothing_there(tmp_path: Path) -> None:
    """No folder, an empty one, or other people's files: no checkpoint."""
    assert newest(tmp_path / "no") is None
    for name in ("step-best", "step-1", "notes", "step-000009.bak"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000003").write_text("a file")
    assert newest(tmp_path) is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Of six saves the newest three stay; numbers count, not spelling, beyond a million steps too."""
    for step in (1, 2, 3, 999_999, 1_000_000, 1_000_001):
        write(tmp_path, make(step), keep=3)
    assert steps(tmp_path) == ["step-1000000", "step-1000001", "step-999999"]
    assert step_of(tmp_path) == 1_000_001


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "ema.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_newest_falls_back(tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """A flipped bit, a cut, a missing or an empty file: the one before is loaded, and the loss is said."""
    for step in (1, 2):
        write(tmp_path, make(step), keep=3)
    file = tmp_path / "step-000002" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes({"flip": bytes(data), "cut": bytes(data[:-1]), "empty": b""}[damage])
    assert read(tmp_path / "step-000002") is None
    assert step_of(tmp_path) == 1
    assert "step-000002: torn or corrupt, passed over" in caplog.text


def test_every_byte_of_the_note_counts(tmp_path: Path) -> None:
    """No changed character of `checkpoint.json` is believed, not even in the step or the facts."""
    write(tmp_path, make(250), keep=1)
    file = tmp_path / "step-000250" / "checkpoint.json"
    text = file.read_text()
    for place, character in enumerate(text):
        if not character.isspace():
            file.write_text(text[:place] + ("1" if character != "1" else "2") + text[place + 1 :])
            assert read(file.parent) is None, place
    for wrong in ("[]", "null", "{}", json.dumps({"self": 1})):
        file.write_text(wrong)
        assert read(file.parent) is None


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "ema.safetensors", "checkpoint.json"])
def test_a_wrong_checksum_is_passed_over(tmp_path: Path, name: str) -> None:
    """R12, 4 checksum mismatches: a part or the note of another save of the same step, whole in itself, is refused."""
    write(tmp_path, make(1), keep=3)
    path = write(tmp_path, make(2), keep=3)
    other = write(tmp_path / "other", make(2, mark=0.5), keep=3)
    (path / name).write_bytes((other / name).read_bytes())
    assert step_of(tmp_path) == 1


def killed_save(folder: Path, moment: int) -> bool:
    """Save step 3 in a process of its own that ends itself by SIGKILL at this moment; whether it got that far.

    Moments are the file operations of the save in order, and the middle of every write.
    """
    if (child := os.fork()) == 0:
        left = [moment]

        def tick() -> None:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

        def before(real: Any) -> Any:
            return lambda *args, **given: (tick(), real(*args, **given))[1]

        def halved(path: Path, data: bytes) -> None:
            with path.open("wb") as stream:
                stream.write(data[: len(data) // 2])
                stream.flush()
                tick()
                stream.write(data[len(data) // 2 :])

        checkpoint._write_synced = halved
        atomic.sync_folder = before(atomic.sync_folder)
        Path.mkdir, Path.rename = before(Path.mkdir), before(Path.rename)  # type: ignore[method-assign]
        shutil.rmtree = before(shutil.rmtree)
        try:
            write(folder, make(3), keep=2)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("moment", range(12))
def test_sigkill_during_a_save(tmp_path: Path, moment: int) -> None:
    """R12, 12 kill points: a save of step 3 is killed; step 2, or 3 when it was whole, loads, and the next save works.

    The first save of a step has fewer moments than 12: the last kill points lie in its second save.
    """
    for step in (1, 2):
        write(tmp_path, make(step), keep=2)
    if not killed_save(tmp_path, moment):
        assert moment >= 8, "the save has fewer moments than that"
        assert killed_save(tmp_path, moment - 8), "and its second save as well"
    found = newest(tmp_path)
    assert found is not None
    assert found.step in (2, 3)
    assert all(torch.equal(make(found.step).adapter[k][0], v[0]) for k, v in found.adapter.items() if "lora_A" in k)
    write(tmp_path, make(4), keep=2)
    assert step_of(tmp_path) == 4
    assert not [name for name in steps(tmp_path) if name.startswith(".")]


def test_another_format_is_named(tmp_path: Path) -> None:
    """A whole checkpoint that another version wrote is refused by name, not passed over as if it were torn."""
    path = write(tmp_path, make(2), keep=1)
    meta = json.loads((path / "checkpoint.json").read_text())
    del meta["self"], meta["format"]
    (path / "checkpoint.json").write_text(json.dumps(meta | {"self": digest(meta)}))
    with pytest.raises(DataError, match="checkpoint format None, this cacheloom reads 2"):
        newest(tmp_path)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("keep", [1, 2])
def test_killed_anywhere_leaves_a_valid_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, keep: int
) -> None:
    """Killed before each file operation of a save (a new step's, or the same step's again): one is always whole.

    The next save then clears up what the killed one left.
    """
    moments = 0
    while True:
        folder = tmp_path / str(moments)
        for earlier in (1, 2):
            write(folder, make(earlier), keep=keep)
        left = [moments]

        def counted(real: Any, left: list[int] = left) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_write_synced", counted(checkpoint._write_synced))
            patch.setattr(atomic, "sync_folder", counted(atomic.sync_folder))
            patch.setattr(Path, "mkdir", counted(Path.mkdir))
            patch.setattr(Path, "rename", counted(Path.rename))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            try:
                write(folder, make(step, mark=0.5), keep=keep)
            except Killed:
                finished = False
            else:
                finished = True
        found = newest(folder)
        assert found is not None
        assert found.step in (2, step)
        if finished:
            break
        write(folder, make(4), keep=keep)
        assert step_of(folder) == 4
        assert not [name for name in steps(folder) if name.startswith(".")]
        assert len(steps(folder)) <= keep
        moments += 1
    assert moments >= 7


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    """A second save of a step is what is read afterwards."""
    write(tmp_path, make(5), keep=1)
    write(tmp_path, make(5, mark=0.5), keep=1)
    found = newest(tmp_path)
    assert found is not None
    assert found.adapter["a.lora_A.weight"][0, 0] == 5.5
    assert steps(tmp_path) == ["step-000005"]


def test_corrupt_newer_ones_do_not_push_out_valid_ones(tmp_path: Path) -> None:
    """After falling back from a corrupt step 300, saving 250 with keep=1 must not delete 250 in favour of 300."""
    write(tmp_path, make(300), keep=1)
    (tmp_path / "step-000300" / "adapter.safetensors").write_bytes(b"")
    write(tmp_path, make(250), keep=1)
    assert step_of(tmp_path) == 250
    assert steps(tmp_path) == ["step-000250"]


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is an error of the environment; earlier checkpoints stay and nothing is left lying about."""
    write(tmp_path, make(1), keep=1)

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_synced", full)
    with pytest.raises(SetupError, match="disk is full"):
        write(tmp_path, make(2), keep=1)
    assert steps(tmp_path) == ["step-000001"]
    assert step_of(tmp_path) == 1
