"""The bytes behind every kind of URI, from many threads; of a container that was replaced, none."""

import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import lance
import pyarrow.parquet as pq
import pytest

from flux2_core.config.dataset import Data
from flux2_core.data.pictures.transform import Transform
from flux2_core.data.samples import Wanted
from flux2_core.data.scan import Candidate, scan
from flux2_core.data.sources import parquet_rows, tar_members
from flux2_core.data.sources import read as sources_read
from flux2_core.data.sources.read import split
from flux2_core.errors import DataError
from flux2_core.store import objects
from stages import encode_images
from tests.flux2_core import layout_files
from tests.flux2_core.layout_files import pack, picture_table, put


def items(count, size=50):
    return [(f"{n:03}.png", f"t{n}", b"\x89PNG" + str(n).encode().rjust(size)) for n in range(count)]


@pytest.mark.parametrize("layout", ["folder", "tar", "parquet", "lance"])
def test_every_picture_is_read_back_in_any_order_by_threads(root, tmp_path, layout):
    """Each URI gives its own bytes, whoever asks for which first."""
    expected = items(12)
    layout_files.write(layout, root, expected, tmp=tmp_path)
    uris = {item.id: item.path for item in scan(Data(path=root), ordinal=0) if isinstance(item, Candidate)}
    shuffled = sorted(expected, key=lambda item: item[2][::-1])
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(sources_read.read, [uris[name.removesuffix(".png")] for name, _, _ in shuffled])
        assert list(read) == [data for _, _, data in shuffled]


def test_a_hash_in_a_name_is_a_hash_in_a_name(tmp_path):
    """`#` splits only behind a container that exists, and never the name of a file that exists."""
    for name in ("a#1.png", "0.tar#x.png", "b.parquet#/c.png", "x.tar#/0.tar"):
        put(tmp_path, name, name.encode())
    for name in ("a#1.png", "0.tar#x.png", "b.parquet#/c.png"):
        assert sources_read.read(str(tmp_path / name)) == name.encode()
    pack(tmp_path / "x.tar#/0.tar", {"y.tar#z.png": b"inner"})
    put(tmp_path, "x.tar#/y.tar#z.txt", b"a caption")
    (found,) = [
        item
        for item in scan(Data(path=f"{tmp_path}/x.tar#/0.tar", caption="a b"), ordinal=0)
        if isinstance(item, Candidate)
    ]
    assert sources_read.read(found.path) == b"inner"
    assert sources_read.plain(found.path) == f"{tmp_path}/x.tar#/0.tar#y.tar#z.png"
    assert split("s3://b/k#1.png") is None
    assert split("s3://b/0.TAR@0f.0.1#a/b.png") == ("s3://b/0.TAR", ".tar", "0f.0.1", "a/b.png")


def test_what_cannot_be_read_has_a_reason(root, tmp_path):
    """Missing files, containers and rows are DataErrors without the URI, which the caller knows."""
    pack(tmp_path / "0.tar", {"a.png": b"a", "empty.png": b""})
    pq.write_table(picture_table(items(2)), tmp_path / "0.parquet")
    layout_files.lance_table(tmp_path, items(2))
    for path in [*tmp_path.glob("0.*"), *(p for p in (tmp_path / "train.lance").rglob("*") if p.is_file())]:
        objects.write(objects.join(root, str(path.relative_to(tmp_path))), path.read_bytes())
    for member, says in {
        "none.png": r"cannot be read \((No such file|no such object)",
        "0.tar#a.png": "an older cacheloom: run `cacheloom cache` again",
        "0.tar@0123456789ab.512.513#a.png": "its container has changed since it was planned",
        "0.parquet@0123456789ab.0.0#1": "its container has changed since it was planned",
        "train.lance@1.01234567#1": "its container has changed since it was planned",
        "train.lance@7.01234567#1": "its container has changed since it was planned",
        "1.tar@0123456789ab.512.513#a.png": "cannot be read",
    }.items():
        uri = objects.join(root, member)
        with pytest.raises(DataError, match=says) as caught:
            sources_read.read(uri)
        assert uri not in str(caught.value)
    found = tar_members.members(objects.join(root, "0.tar"))
    assert [sources_read.read(objects.join(root, f"0.tar@{one.stamp}#{one.name}")) for one in found] == [b"a", b""]


def test_too_large(tmp_path):
    """A file over 1 GiB is refused unread."""
    path = tmp_path / "big.png"
    with path.open("wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(DataError, match=r"1\.0 GiB; pictures up to 1 GiB"):
        sources_read.read(str(path))


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_a_replaced_container_is_indexed_anew(root, tmp_path, layout):
    """Offsets and rows of an older archive or file are never used on its successor, on a store neither."""
    for word in ("one", "three"):
        layout_files.write(layout, root, [(f"{word}.png", word, word.encode())], tmp=tmp_path / word)
        (found,) = [item for item in scan(Data(path=root), ordinal=0) if isinstance(item, Candidate)]
        assert (found.id, found.captions, sources_read.read(found.path)) == (word, (word,), word.encode())


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_nothing_is_read_of_a_container_that_was_replaced(root, tmp_path, layout):
    """An address leads into the file that was planned: never into its successor, on a store neither."""
    planned = []
    for word in ("one", "two"):
        layout_files.write(layout, root, [(f"{word}.png", word, word.encode())], tmp=tmp_path / word)
        parquet_rows._groups.clear()  # what is in memory is of the planned one
        parquet_rows._open.cache_clear()
        for uri in planned:
            with pytest.raises(DataError, match="has changed since it was planned; run again"):
                sources_read.read(uri)
        planned = [item.path for item in scan(Data(path=root), ordinal=0) if isinstance(item, Candidate)]
        assert list(map(sources_read.read, planned)) == [word.encode()]


def test_a_copy_with_another_time_is_the_same_container(tmp_path):
    """Files are known by their bytes, so every node of a cluster may have a copy of its own."""
    pack(tmp_path / "0.tar", {"a.png": b"one"})
    pq.write_table(picture_table(items(2)), tmp_path / "0.parquet")
    found = [
        *(f"{tmp_path}/0.tar@{one.stamp}#{one.name}" for one in tar_members.members(f"{tmp_path}/0.tar")),
        *(f"{tmp_path}/0.parquet@{one}#1" for one in parquet_rows.rows(f"{tmp_path}/0.parquet", "auto").stamps[1:]),
    ]
    for name in ("0.tar", "0.parquet"):
        os.utime(tmp_path / name, ns=(1, 1))
    assert [sources_read.read(uri) for uri in found] == [b"one", items(2)[1][2]]


def test_a_lance_table_is_read_at_its_newest_version(tmp_path):
    """Whoever lists a table that has grown another version meanwhile reads that one, and what was listed stays."""
    seen = {}
    for word in ("one", "three"):
        table = picture_table([(f"{word}.png", word, word.encode())])
        lance.write_dataset(table, str(tmp_path / "x.lance"), mode="overwrite")
        (found,) = [item for item in scan(Data(path=str(tmp_path)), ordinal=0) if isinstance(item, Candidate)]
        seen[found.path] = (word,), word.encode()
        assert found.captions == (word,)
        assert all(sources_read.read(path) == data for path, (_, data) in seen.items())


def count_bytes(monkeypatch) -> list[int]:
    """The bytes of each read from now on."""
    fetched, plain = [], objects.read

    def read(uri, **options):
        data = plain(uri, **options)
        fetched.append(len(data))
        return data

    monkeypatch.setattr(objects, "read", read)
    return fetched


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_container_is_read_once(s3_root, tmp_path, monkeypatch, kind):
    """In the order in which they are encoded pictures cost at most 1.3 times the bytes of their container."""
    pictures = items(90, size=20_000)
    layout_files.write(kind, s3_root, pictures, tmp=tmp_path)
    found = [item.path for item in scan(Data(path=s3_root), ordinal=0) if isinstance(item, Candidate)]
    wanted = [
        Wanted(uri, uri, "", Transform(16, 16 * (n * 7 % 5 + 1), 16, 96, 0, 0), mask=False)
        for n, uri in enumerate(found)
    ]
    fetched = count_bytes(monkeypatch)
    seen = {row.uri: sources_read.read(row.uri) for item in encode_images.items(wanted) for row in item}
    assert sorted(seen.values()) == sorted(data for _, _, data in pictures)
    assert sum(fetched) < 1.3 * 90 * 20_000


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_little_is_read_of_a_container_on_s3(s3_root, tmp_path, monkeypatch, kind):
    """One picture of many is fetched by its span or its row group, not by fetching the container."""
    pictures = items(60, size=200_000)
    layout_files.write(kind, s3_root, pictures, tmp=tmp_path)
    found = [item for item in scan(Data(path=s3_root), ordinal=0) if isinstance(item, Candidate)]
    fetched = count_bytes(monkeypatch)
    assert sources_read.read(found[31].path) == pictures[31][2]
    assert sum(fetched) < 4 * 200_000 + parquet_rows.BUFFER_BYTES * 4


@pytest.mark.parametrize("layout", ["folder", "tar"])
def test_listing_is_linear_in_memory(tmp_path, layout):
    """500 pictures with captions peak under 2 kB of Python objects each: 200 MB for 100,000."""
    several = [(f"{n % 10:02}/{n:06}.png", f"a photo of thing number {n}, plain", b"") for n in range(500)]
    layout_files.write(layout, str(tmp_path / "set"), several, tmp=tmp_path)
    list(scan(Data(path=str(tmp_path / "set")), ordinal=0))  # what is loaded once does not count
    tracemalloc.start()
    count = sum(isinstance(item, Candidate) for item in scan(Data(path=str(tmp_path / "set")), ordinal=0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 500
    assert peak < 500 * 2_000
