"""Fingerprints: what must change a key, and what must not."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux2_core.cache.keys import row_key
from flux2_core.errors import SetupError
from flux2_core.store import hashing
from flux2_core.store.hashing import digest, file_sha256, files_digest, first_difference, tensor_sha256


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))
    return tmp_path / "memory"


def test_digest_is_of_the_value() -> None:
    """The order of a dictionary does not matter; types do; a NaN is refused rather than hashed."""
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert len({digest(x) for x in ({"a": 1}, {"a": "1"}, {"a": True}, {"a": None}, {}, {"a": 1.5})}) == 6
    assert digest("é") != digest("e\u0301")
    with pytest.raises(ValueError, match="JSON"):
        digest(float("nan"))


def test_row_keys_do_not_run_together() -> None:
    """Neighbouring parts of a key cannot be mistaken for one another."""
    assert row_key({"a": 1}, "ab", "c") != row_key({"a": 1}, "a", "bc")
    assert row_key({"a": 1}, 1, 12) != row_key({"a": 1}, 11, 2)
    assert row_key({"a": 1}, "x") != row_key({"a": 2}, "x")
    assert len(row_key({}, "x")) == 64


def test_first_difference_names_the_field() -> None:
    """The first field that differs, in the order of names, with both values; long ones are cut."""
    assert first_difference({"a": 1, "b": 2}, {"b": 2, "a": 1}) is None
    assert first_difference({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b: wanted 2, found 3"
    assert first_difference({"b": 1}, {"a": 1}) == "a: wanted null, found 1"
    long = first_difference({"a": "x" * 500}, {"a": "y" * 500})
    assert long is not None
    assert len(long) < 150


def test_files_count_by_name_and_content(tmp_path: Path) -> None:
    """A byte, a name or one more file changes the hash; folder, time and order do not."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in "ab":
            (tmp_path / folder / name).write_text(name)
    os.utime(tmp_path / "two" / "a", (1, 1))
    whole = files_digest(tmp_path / "one", ["a", "b"])
    assert whole == files_digest(tmp_path / "two", ["b", "a"])
    assert whole != files_digest(tmp_path / "one", ["a"])
    (tmp_path / "two" / "b").write_text("c")
    assert whole != files_digest(tmp_path / "two", ["a", "b"])
    with pytest.raises(FileNotFoundError):
        files_digest(tmp_path / "one", ["c"])


def test_large_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file's hash is remembered: read again only after it changed."""
    read: list[Path] = []
    real = hashing._hash
    monkeypatch.setattr(hashing, "_hash", lambda path: read.append(path) or real(path))  # type: ignore
    file = tmp_path / "weights"
    for fill in (b"a", b"b"):
        data = fill * ((1 << 24) + 1)
        file.write_bytes(data)
        assert {file_sha256(file) for _ in range(3)} == {hashlib.sha256(data).hexdigest()}
    assert len(read) == 2


@pytest.mark.parametrize("way", ["in place", "another file", "all facts alike"])
def test_other_bytes_of_the_same_path_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A file whose path, size and mtime are what they were is hashed anew: written in place, replaced, or, on a file
    system that has neither inodes nor change times, by the bytes out of all of it.
    """
    file, size = tmp_path / "weights", (1 << 24) + 1
    file.write_bytes(b"a" * size)
    os.utime(file, (1, 1))
    if way == "all facts alike":
        real, status = Path.stat, file.stat()
        monkeypatch.setattr(Path, "stat", lambda path, **named: status if path == file else real(path, **named))
    before = file_sha256(file)
    changed = b"a" * (size // 2) + b"b" * (size - size // 2)
    if way == "another file":
        (tmp_path / "new").write_bytes(changed)
        os.replace(tmp_path / "new", file)
    else:
        with file.open("r+b") as stream:
            stream.write(changed)
    os.utime(file, (1, 1))
    assert file_sha256(file) == hashlib.sha256(changed).hexdigest() != before


def test_a_file_that_is_still_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash of a download under way would be remembered for neither the one nor the other state: refused by name."""
    file = tmp_path / "weights"
    file.write_bytes(b"a" * ((1 << 24) + 1))
    real = hashing._hash
    monkeypatch.setattr(hashing, "_hash", lambda path: (real(path), path.open("ab").write(b"b"))[0])
    with pytest.raises(SetupError, match="weights: was written to while"):
        file_sha256(file)


def test_a_torn_memory_is_not_believed(tmp_path: Path, memory: Path) -> None:
    """A half-written remembered hash is passed over, and a place that cannot be written to costs only time."""
    file = tmp_path / "weights"
    file.write_bytes(b"a" * ((1 << 24) + 1))
    value = file_sha256(file)
    (kept,) = memory.rglob("*.sha256")
    kept.write_text(value[:10])
    assert file_sha256(file) == value
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_text("a file where the folder should be")
    assert file_sha256(file) == value


def test_hub_blobs_carry_their_hash(tmp_path: Path) -> None:
    """A hub download of 48 GB is not read: its blob's name is its sha256. Small files (git's hash) are read."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    name = "0" * 64
    (blobs / name).write_text("x")
    (blobs / ("0" * 40)).write_text("x")
    (tmp_path / "large").symlink_to(blobs / name)
    (tmp_path / "small").symlink_to(blobs / ("0" * 40))
    assert file_sha256(tmp_path / "large") == name
    assert file_sha256(tmp_path / "small") == hashlib.sha256(b"x").hexdigest()


def test_one_tensor_of_a_file(tmp_path: Path) -> None:
    """A tensor's hash depends on its own bytes, dtype and shape, not on its neighbours or the file's name."""
    value = torch.arange(12.0).view(3, 4)
    save_file({"a": value, "b": torch.zeros(5)}, tmp_path / "one")
    save_file({"b": torch.ones(2), "z": torch.ones(2), "a": value}, tmp_path / "two")
    save_file({"a": value.view(4, 3)}, tmp_path / "three")
    save_file({"a": value + 1}, tmp_path / "four")
    hashes = [tensor_sha256(tmp_path / name, "a") for name in ("one", "two", "three", "four")]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    with pytest.raises(KeyError):
        tensor_sha256(tmp_path / "three", "b")
