"""R4: nothing that a data set says leads out of its folder."""

import json
import os
import tarfile

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from flux2_core.config.dataset import Data
from flux2_core.data.listing import Rejected
from flux2_core.data.scan import Candidate, scan
from flux2_core.data.sources import read
from flux2_core.errors import DataError
from tests.flux2_core.driven import drive
from tests.flux2_core.layout_files import encode, pack, picture_table, put
from tests.flux2_core.pictures import encoded

GREEN, RED = np.full((16, 16, 3), (0, 255, 0)), np.full((16, 16, 3), (255, 0, 0))


def picture(pixels, words):
    """A picture of these pixels with these words in its file."""
    text = PngImagePlugin.PngInfo()
    text.add_text("about", words)
    return encoded(Image.fromarray(pixels.astype(np.uint8)), "PNG", pnginfo=text)


GOOD, SECRET = picture(GREEN, "good"), picture(RED, "secret")


def link_picture(root, outside):
    (root / "x.png").symlink_to(outside / "x.png")
    put(root, "x.txt", b"x")


def link_folder(root, outside):
    (root / "x").symlink_to(outside)


def link_caption(root, outside):
    put(root, "x.png", GOOD)
    (root / "x.txt").symlink_to(outside / "x.txt")


def member(name, link=None):
    def write(root, outside):
        info = tarfile.TarInfo("x.png" if link else name)
        if link:
            info.type, info.linkname = link, f"{outside}/x.png"
        members = {} if link else {name: SECRET, name.replace(".png", ".txt"): b"x"}
        pack(
            root / "0.tar", {"good.png": GOOD, "good.txt": b"good", "x.txt": b"x", **members}, *([info] if link else [])
        )

    return write


METADATA = {
    "../": ("../outside/x.png", "leaves the data set's folder"),
    "../ behind a folder": ("sub/../../outside/x.png", "leaves the data set's folder"),
    "absolute": ("/etc/hostname", "absolute path"),
    "NUL": ("x\0.png", "NUL"),
    "file://": ("file:///etc/hostname", "URL"),
    "http://": ("http://127.0.0.1/x.png", "URL"),
}
FILES = {
    "symlinked picture": (link_picture, "leaves the data set's folder"),
    "symlinked folder": (link_folder, "leaves the data set's folder"),
    "symlinked caption": (link_caption, "leaves the data set's folder"),
    "tar member ../": (member("../outside/x.png"), "leaves the data set's folder"),
    "tar member absolute": (member("/etc/x.png"), "absolute path"),
    "tar member symlink": (member("x.png", tarfile.SYMTYPE), "not a regular file of the archive"),
}  # fmt: skip
MORE_NAMES = ["..", "a/..", "..\\x.png", "C:\\x.png", "\\\\host\\x.png", "https://h/x.png", "s3://b/x.png", "sub/s3://b/x.png",
              "data:image/png;base64,AA", "FILE:x.png", "out/x.png", "x\ud800.png"]  # fmt: skip


@pytest.fixture
def root(tmp_path):
    put(tmp_path, "outside/x.png", SECRET)
    put(tmp_path, "outside/x.txt", b"secret")
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def behind_the_wall(root, **options):
    """The reason of the one that is left out; the good one stays, and no URI gives the secret's bytes."""
    found = list(scan(Data(path=str(root), **options), ordinal=0))
    kept = [item for item in found if isinstance(item, Candidate)]
    assert [item.id for item in kept] == ["good"]
    for item in kept:
        assert item.captions == ("good",)
        for uri in (item.path, *item.references, *([item.mask] if item.mask else [])):
            assert b"secret" not in read.read(uri)
    reasons = [item.reason for item in found if isinstance(item, Rejected)]
    assert reasons
    return reasons


def good(root):
    put(root, "good.png", GOOD)
    put(root, "good.txt", b"good")


def with_metadata(root, row, suffix="jsonl"):
    """A good row, and this one."""
    good(root)
    put(root, f"metadata.{suffix}", encode([{"file_name": "good.png", "text": "good"}, row], suffix))


@pytest.fixture(scope="module")
def driven(tiny_model, tmp_path_factory):
    """A data set for each of the 12 cases, with a good picture beside the bad one, planned and cached at once."""
    outer = tmp_path_factory.mktemp("walls")
    put(outer, "outside/x.png", SECRET)
    put(outer, "outside/x.txt", b"secret")
    for place, case in enumerate([*METADATA, *FILES]):
        folder = outer / str(place)
        folder.mkdir()
        if case in METADATA:
            with_metadata(folder, {"file_name": METADATA[case][0], "text": "bad"})
            continue
        if "tar" not in case:
            good(folder)
        FILES[case][0](folder, outer / "outside")
    sets = [{"path": str(outer / str(place)), "resolutions": [16]} for place in range(12)]
    return drive(tiny_model, tmp_path_factory.mktemp("cache"), *sets)


@pytest.mark.parametrize("case", [*METADATA, *FILES])
def test_r4_no_way_out(driven, case):
    """R4, 12 cases: `plan` quarantines it with its reason; `show` has the good picture beside it with its caption."""
    place, says = [*METADATA, *FILES].index(case), (METADATA | FILES)[case][1]
    name = "good" if place == 0 else f"good@{place}"
    assert driven.ids(place) == [name]
    shown = driven.show(name)
    assert shown["latents"].equal(driven.encoded(GREEN))
    assert driven.says(shown, "good")
    bad = METADATA[case][0].replace("\0", "\\x00") if case in METADATA else f"{driven.config.data[place].path}/"
    assert any(says in reason for path, reason in driven.reasons.items() if path.startswith(bad))


def test_r4_nothing_from_outside_is_cached(driven):
    """R4: the 12 good pictures share the one latents row; texts are theirs and the empty one."""
    assert len(METADATA) + len(FILES) == 12
    assert driven.plan["rows"]["latents"]["needed"] == 1
    assert driven.plan["rows"]["text"]["needed"] == 2
    assert not driven.encoded(RED).equal(driven.encoded(GREEN))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        (name, suffix)
        for suffix in ("jsonl", "csv", "parquet")
        for name in (*(name for name, _ in METADATA.values()), *MORE_NAMES)
        if suffix != "parquet" or "\ud800" not in name  # Arrow has no such text
    ],
)
def test_every_metadata_format_is_held_by_the_wall(root, tmp_path, name, suffix):
    """Drives, UNC names, schemes anywhere in the name, folders and links: no format of metadata follows them."""
    (root / "out").symlink_to(tmp_path / "outside")
    row = {"file_name": name, "text": "bad"}
    if suffix == "csv":  # as a file has it: bytes that are no UTF-8
        with_metadata(root, {**row, "file_name": name.replace("\ud800", "?")}, suffix)
        path = root / "metadata.csv"
        path.write_bytes(path.read_bytes().replace(b"x?.png", b"x\xff.png"))
    else:
        with_metadata(root, row, suffix)
    assert len(behind_the_wall(root)) == 2  # the row, and the link itself


@pytest.mark.parametrize("column", ["mask", "reference", "references"])
@pytest.mark.parametrize(
    "name", ["../outside/x.png", "/etc/hostname", "http://h/x.png", "out/x.png", "none.png", "sub", "x\0"]
)
def test_masks_and_references_of_metadata_stay_inside(root, tmp_path, name, column):
    """What a row names beside its picture is held by the same wall, and must be there."""
    (root / "out.png").symlink_to(tmp_path / "outside" / "x.png")
    put(root, "x.png", GOOD)
    put(root, "sub/notes.md", b"")
    (root / "out").symlink_to(tmp_path / "outside")
    beside = [name] if column == "references" else name
    with_metadata(root, {"file_name": "x.png", "text": "bad", column: beside})
    (reason,) = [reason for reason in behind_the_wall(root) if "its mask, reference or rejected picture" in reason]
    assert "metadata.jsonl:2" in reason


def test_folders_of_masks_and_references_are_walls_too(root, tmp_path):
    """A link out of such a folder is nobody's mask, and no reference."""
    good(root)
    (root / "masks").mkdir()
    (root / "masks/good.png").symlink_to(tmp_path / "outside/x.png")
    with pytest.raises(DataError, match="no mask there"):
        behind_the_wall(root, masks="masks")
    found = list(scan(Data(path=str(root), references=("masks",)), ordinal=0))
    assert [type(item) for item in found] == [Rejected]


def test_linked_containers_and_metadata_stay_inside(root, tmp_path):
    """A shard or a Parquet file that is a link out of the folder is left out; one inside is read."""
    pack(tmp_path / "outside/1.tar", {"s.png": SECRET, "s.txt": b"s"})
    pack(root / "0.tar", {"good.png": GOOD, "good.txt": b"good"})
    (root / "1.tar").symlink_to(tmp_path / "outside/1.tar")
    assert behind_the_wall(root) == ["a link that leaves the data set's folder; copy the file into it"]


def test_a_snapshot_of_the_hub_is_read(tmp_path):
    """In the hub's cache a snapshot's pictures are links to the blobs beside it, which are its own; another data set's
    blobs are not."""
    for owner, name in (("a", "good"), ("b", "other")):
        blobs = tmp_path / f"datasets--{owner}--set/blobs"
        blobs.mkdir(parents=True)
        (blobs / name).write_bytes(GOOD)
    snapshot = tmp_path / "datasets--a--set/snapshots/0123abc/photos"
    snapshot.mkdir(parents=True)
    (snapshot / "good.png").symlink_to("../../../blobs/good")
    (snapshot / "good.txt").write_text("good")
    (snapshot / "x.png").symlink_to(tmp_path / "datasets--b--set/blobs/other")
    (snapshot / "x.txt").write_text("x")
    for root in (snapshot, snapshot.parent):
        found = list(scan(Data(path=str(root)), ordinal=0))
        assert [item.reason for item in found if isinstance(item, Rejected)] == [
            "a link that leaves the data set's folder; copy the file into it"
        ]
        assert [item.id.rpartition("/")[2] for item in found if hasattr(item, "id")] == ["good"]


def test_names_in_tables_lead_nowhere(root):
    """The path inside a Hugging Face row is a name only: nothing is opened by it."""
    pq.write_table(picture_table([("../outside/x.png", "t", None), ("good.png", "good", GOOD)]), root / "x.parquet")
    first, second = [item for item in scan(Data(path=str(root)), ordinal=0) if isinstance(item, Candidate)]
    assert (first.id, second.id) == ("x.parquet#0", "good")
    with pytest.raises(DataError, match="no picture bytes"):
        read.read(first.path)


def test_metadata_that_is_a_link_out(root, tmp_path):
    """The metadata file itself is held by the wall."""
    put(tmp_path, "outside/metadata.jsonl", json.dumps({"file_name": "good.png", "text": "x"}).encode())
    good(root)
    os.symlink(tmp_path / "outside/metadata.jsonl", root / "metadata.jsonl")
    with pytest.raises(DataError, match="leaves the data set's folder"):
        behind_the_wall(root)


def test_a_device_in_an_archive(root):
    """Hard links, devices and pipes in an archive are no pictures."""
    infos = []
    for kind, name in ((tarfile.LNKTYPE, "h.png"), (tarfile.CHRTYPE, "c.png"), (tarfile.FIFOTYPE, "f.png")):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "good.png"
        infos.append(info)
    pack(root / "0.tar", {"good.png": GOOD, "good.txt": b"good"}, *infos)
    assert behind_the_wall(root) == ["not a regular file of the archive (a link, device or sparse file)"] * 3


@pytest.mark.parametrize("place", ["file://{}/outside/x.png", "s3://another-bucket/x.png"])
def test_a_blob_that_only_names_a_place(root, tmp_path, place):
    """A Lance row may name a file or object in the place of bytes: nothing is fetched, the row is left out."""
    schema = pa.schema([pa.field("text", pa.string()), lance.blob_field("image")])
    blobs = lance.blob_array([GOOD, lance.Blob.from_uri(place.format(tmp_path), position=0, size=len(SECRET))])
    rows = pa.table([pa.array(["good", "x"]), blobs], schema=schema)
    options = {"data_storage_version": "2.2", "allow_external_blob_outside_bases": True}
    lance.write_dataset(rows, str(root / "t.lance"), **options)
    first, second = [item.path for item in scan(Data(path=str(root)), ordinal=0) if isinstance(item, Candidate)]
    assert read.read(first) == GOOD
    with pytest.raises(DataError, match="the row only names a place outside the table"):
        read.read(second)


def test_a_table_whose_files_are_elsewhere(root, tmp_path):
    """A shallow clone holds no bytes of its own, and a link in a table leads anywhere: both are refused by name."""
    table = str(tmp_path / "outside/t.lance")
    lance.write_dataset(picture_table([("x.png", "x", SECRET)]), table).shallow_clone(str(root / "t.lance"), 1)
    with pytest.raises(DataError, match=r"photos/t\.lance: a shallow clone.*elsewhere \(.*outside/t\.lance"):
        behind_the_wall(root)
    os.rename(root / "t.lance", tmp_path / "clone.lance")
    os.rename(table, root / "t.lance")
    os.rename(root / "t.lance/data", tmp_path / "outside/data")
    (root / "t.lance/data").symlink_to(tmp_path / "outside/data")
    with pytest.raises(DataError, match=r"photos/t\.lance: .*t\.lance/data is a link"):
        behind_the_wall(root)
