"""Checkpoints: torn, corrupt and killed saves never cost more than the last one."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_core import checkpoint
from flux2_core.checkpoint import Checkpoint, newest, read, write
from flux2_core.errors import SetupError


def make(step: int, *, mark: float = 0.0) -> Checkpoint:
    adapter = {"a.lora_A.weight": torch.full((2, 3), step + mark), "a.lora_B.weight": torch.randn(3, 2).T}
    optimizer = {"a.step": torch.tensor(float(step)), "a.exp_avg": torch.randn(2, 3)}
    return Checkpoint(step, adapter, optimizer, {"skipped": 1, "samples": "uri"})


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
    for part in ("adapter", "optimizer"):
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


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "checkpoint.json"])
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
            patch.setattr(checkpoint, "_sync_folder", counted(checkpoint._sync_folder))
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
