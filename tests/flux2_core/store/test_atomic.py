"""Files are whole or not there at all, whatever ends the process that writes them."""

import ast
import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from flux2_core.errors import SetupError
from flux2_core.run import mirror
from flux2_core.store import atomic, objects
from tests.test_architecture import BUILDER, modules

OLD, NEW = b"old" * 1000, b"new" * 2000
MOMENTS = ("mkdir", "open", "write", "fsync", "replace", "sync_folder", "unlink")


def killed_write(path: Path, moment: str) -> None:
    """Write a file in a process that ends itself by SIGKILL before this operation, of a write in the middle."""
    if (child := os.fork()) == 0:

        def die(*_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        try:
            if moment == "write":
                with atomic.writing(path) as stream:
                    stream.write(NEW[: len(NEW) // 2])
                    stream.flush()
                    die()
            setattr({"fsync": os, "sync_folder": atomic}.get(moment, Path), moment, die)
            atomic.write(path, NEW)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("before", [OLD, None])
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path, moment: str, before: bytes | None) -> None:
    """Killed anywhere, the file is whole; what is left beside it is neither listed nor copied to a mirror."""
    path = tmp_path / "a.bin"
    if before is not None:
        path.write_bytes(before)
    killed_write(path, moment)
    found = path.read_bytes() if path.exists() else None
    assert found == (NEW if moment in MOMENTS[5:] else before)
    assert list(objects.listing(str(tmp_path))) == ([] if found is None else [(str(path), len(found))])
    assert not [name for name in os.listdir(tmp_path) if name != path.name and mirror._travels(name)]
    atomic.write(path, NEW)
    assert path.read_bytes() == NEW


def test_bytes_are_on_disk_before_the_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that survives a power cut: the file is synced, then renamed, then its folder is synced."""
    done: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else os.fstat(descriptor).st_size
        done.append(f"sync {kind}")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", lambda path, to: (done.append("name"), real_replace(path, to))[1])
    atomic.write(tmp_path / "new" / "a.bin", NEW)
    assert done == [f"sync {len(NEW)}", "name", "sync folder"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_so(tmp_path: Path, number: int) -> None:
    """A full disk is an error of the environment that names the file; the old one stays and nothing lies about."""
    path = tmp_path / "a.bin"
    path.write_bytes(OLD)
    says = r"a\.bin: the disk is full or a quota is reached .*; free space and run again"
    with pytest.raises(SetupError, match=says), atomic.writing(path):
        raise OSError(number, os.strerror(number))
    assert (path.read_bytes(), os.listdir(tmp_path)) == (OLD, ["a.bin"])


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    """A block that fails leaves the old file, and its error is not reworded."""
    path = tmp_path / "a.bin"
    path.write_bytes(OLD)
    for error in (PermissionError(errno.EACCES, "no"), ValueError("no")):
        with pytest.raises(type(error), match="no"), atomic.writing(path):
            raise error
    assert (path.read_bytes(), os.listdir(tmp_path)) == (OLD, ["a.bin"])


def renames(source: str) -> set[str]:
    """Calls that give a file a name, read off the syntax tree; `text.replace(a, b)` is none."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [node for node in calls if isinstance(node.func, ast.Attribute)]
    return {
        ast.unparse(node)
        for node in named
        if node.func.attr in ("rename", "renames", "move")  # type: ignore[attr-defined]
        or ast.unparse(node.func) == "os.replace"
        or (node.func.attr == "replace" and len(node.args) == 1 and not node.keywords)  # type: ignore[attr-defined]
    }


def test_nobody_else_renames_files() -> None:
    """Every file of the product is written here; a checkpoint, which is a folder, is put in place by its own module."""
    assert renames("os.replace(a, b); a.replace(b); a.rename(b); shutil.move(a, b)").__len__() == 4
    assert not renames("text.replace('a', 'b'); dataclasses.replace(x, y=1); replace(x)")
    found = {
        name: calls
        for name, path in modules().items()
        if not name.startswith(BUILDER) and (calls := renames(path.read_text(encoding="utf-8")))
    }
    assert found.keys() == {"flux2_core.store.atomic", "flux2_core.run.checkpoint"}
    assert found["flux2_core.run.checkpoint"] == {"final.rename(aside)", "temporary.rename(final)"}
