"""Files of other trainers: what is damaged is named with its line, what is hostile is refused at once."""

import time
from pathlib import Path

import pytest

from flux2_core.errors import UsageError
from flux2_core.moving import documents
from flux2_core.moving.moved import move

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("config.json", '{"model_family": "flux2",\n "lora_rank": }', "JSON .*line 2"),
        ("job.yaml", "job: extension\nconfig:\n  - name: [x\n", "YAML .*line"),
        ("train.toml", 'a = 1\nb = "x\n', "TOML .*line 2"),
        ("bomb.yaml", BOMB, "aliases"),
        ("deep.json", "[" * 100_000, "JSON .*(nested|recursion)"),
        ("deep.yaml", "[" * 3_000, "YAML"),
        ("long.yaml", "".join(f"a{n}: 1\n" for n in range(25_000)), "over 2,000 values"),
        ("tagged.yaml", "a: !!python/object/apply:os.system ['true']", "YAML .*could not determine a constructor"),
        ("many.json", '{"model_family": "flux2", ' + ", ".join(f'"a{n}": 1' for n in range(3_000)) + "}", "over 2,000"),
        ("binary.json", "\udcff", "not a text file"),
    ],
)
def test_damaged_and_hostile_files(name: str, text: str, told: str, tmp_path: Path) -> None:
    """Each is refused in one line within two seconds, with what is wrong and, where a parser says it, on which line."""
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "multidatabackend.json").write_text("[]")
    started = time.monotonic()
    with pytest.raises(UsageError, match=told) as caught:
        move(str(tmp_path / name))
    assert time.monotonic() - started < 2
    assert "\n" not in str(caught.value)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    """A file of 100 MB is refused by its size."""
    with (tmp_path / "config.yaml").open("wb") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(UsageError, match="104,857,600 bytes; a configuration has 262,144 at most"):
        move(str(tmp_path / "config.yaml"))


def test_leaves() -> None:
    """Tables in tables become dotted names; lists of tables are numbered, other lists are values."""
    tree = {"a": {"b": 1, "c": [1, 2]}, "datasets": [{"x": 1}, {"x": {"y": 2}}], "empty": {}}
    assert list(documents.leaves(tree)) == [
        ("a.b", 1, ()),
        ("a.c", [1, 2], ()),
        ("datasets[].x", 1, (0,)),
        ("datasets[].x.y", 2, (1,)),
        ("empty", {}, ()),
    ]
