"""The registry of containers: whatever is done with pictures in one goes through its entry."""

import json
from pathlib import Path

import pytest

from flux2_core.config.dataset import Data
from flux2_core.data.listing import Note
from flux2_core.data.scan import Candidate, scan
from flux2_core.data.sources import read
from flux2_core.data.sources.columns import Rows, located
from flux2_core.data.sources.containers import CONTAINERS, Container
from flux2_core.data.sources.tar_members import Member
from flux2_core.errors import DataError

FILES = {"sub/a.png": "the bytes of a", "sub/a.txt": "a caption", "b.png": "the bytes of b", "b.txt": "b's"}


def files(uri):
    return json.loads(Path(uri).read_text())


def members(uri):
    return [Member(name, "0", None, text.encode()) for name, text in files(uri).items()]


def rows(uri, caption, picture):
    names = [name for name in files(uri) if name.endswith(".png")]
    return Rows(
        names, [files(uri)[f"{name.removesuffix('.png')}.txt"] for name in names], "no caption", ["0"] * len(names)
    )


BOX = Container("boxes of files", lambda uri, stamp, name: files(uri)[name].encode(), members=members)
DECK = Container(
    "decks of cards", lambda uri, stamp, row: [*files(uri).values()][2 * located(row)[0]].encode(), rows=rows
)


@pytest.mark.parametrize("kind", [BOX, DECK], ids=lambda kind: kind.title)
def test_a_kind_of_container_is_one_entry(tmp_path, monkeypatch, kind):
    """With an entry, containers are found in a folder and by themselves, with captions, and their pictures are read."""
    path = tmp_path / "set/x.HELD"
    path.parent.mkdir()
    path.write_text(json.dumps(FILES))
    with pytest.raises(DataError, match=r"x.HELD.*is a file, but no \.tar or \.parquet; name the folder"):
        list(scan(Data(path=str(path)), ordinal=0))
    monkeypatch.setitem(CONTAINERS, ".held", kind)
    for place in (path.parent, path):
        said, *found = sorted(scan(Data(path=str(place)), ordinal=0), key=lambda item: isinstance(item, Candidate))
        assert said == Note(str(path.parent), f"read as {kind.title}")
        assert {item.id: (read.read(item.path), item.captions) for item in found} == {
            "sub/a": (b"the bytes of a", ("a caption",)), "b": (b"the bytes of b", ("b's",)),
        }  # fmt: skip
    with pytest.raises(DataError, match=f"is {kind.title}: caption='metadata' is none of auto"):
        list(scan(Data(path=str(path), caption="metadata"), ordinal=0))
    (path.parent / "c.png").write_bytes(b"")
    with pytest.raises(DataError, match=f"a mixture of {kind.title} and a folder of picture files"):
        list(scan(Data(path=str(path.parent)), ordinal=0))


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_every_entry_is_whole(suffix):
    """A kind brings either members or rows, and a suffix as file names are compared: in small letters."""
    kind = CONTAINERS[suffix]
    assert (kind.members is None) != (kind.rows is None)
    assert suffix == suffix.lower()
    assert suffix.startswith(".")
