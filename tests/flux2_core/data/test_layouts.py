"""R3: every layout gives every picture its own caption or none, on a disk and on S3."""

import hashlib
import io
import itertools
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from flux2_core.config.dataset import Data
from flux2_core.config.sections import Config
from flux2_core.data import intake, listing, metadata
from flux2_core.data.listing import Note, Rejected
from flux2_core.data.samples import Keys
from flux2_core.data.scan import Candidate, scan
from flux2_core.data.sources import read, tar_members, walls
from flux2_core.errors import DataError
from flux2_core.store import objects
from tests.flux2_core import layout_files
from tests.flux2_core.driven import drive
from tests.flux2_core.layout_files import LAYOUTS, pack, put
from tests.flux2_core.pictures import encoded, noise

PAIRED = ("folder", "tar")  # by base name; the others by row
ROWS = ("parquet", "lance")
SIDE = 16
WORDS = ("red", "green", "blue", "lost")
NOTES = {  # of a layout itself, and what `plan` adds: all pictures are PNG, and there are three of them
    "a text file without a picture of its name": 2,
    "its caption file also belongs to a picture of the same name": 4,
    **dict.fromkeys(("read as WebDataset tar files", "read as Parquet files with picture bytes"), 4),
    "read as Lance tables": 4,
    "read as a folder with metadata": 12,
    "the file is PNG, its name says .jpg: read as PNG": 10,  # in the five layouts whose places end so
    "the file is PNG, its name says .webp: read as PNG": 5,
    "the same bytes as another picture: kept, one latent row": 70,
}


def drawn(word):
    """A picture in a colour of the caption that belongs to it."""
    return Image.new("RGB", (SIDE, SIDE), tuple(hashlib.sha256(word.encode()).digest()[:3]))


def picture(word):
    """Bytes of a picture that carries the caption that belongs to it."""
    text = PngImagePlugin.PngInfo()
    text.add_text("caption", word)
    return encoded(drawn(word), "PNG", pnginfo=text)


def items(**words):
    return [(name.replace("__", "/").replace("_", "."), word, picture(word)) for name, word in words.items()]


def outcome(path, **options):
    """Captions by id, reasons and notes by place; every kept picture's bytes must carry its own caption."""
    found = list(scan(Data(path=str(path), **options), ordinal=0))
    kept, left_out = {}, {read.plain(item.path): item.reason for item in found if isinstance(item, Rejected)}
    for item in found:
        if isinstance(item, Candidate):
            try:
                data = read.read(item.path)
            except DataError as error:
                left_out[read.plain(item.path)] = str(error)
                continue
            kept[item.id] = (item.captions, data)
    notes = {read.plain(item.path): item.message for item in found if isinstance(item, Note)}
    return kept, left_out, {path: note for path, note in notes.items() if not note.startswith("read as")}


def good(kept, left_out, layout):
    """Both pictures have their own captions."""
    assert captions(kept) == {"a": "red", "sub/b": "green", "z": "blue"}
    assert not left_out


def missing_media(kept, left_out, layout):
    """A caption without its picture goes to no other picture."""
    assert captions(kept) == {"a": "red", "z": "blue"}
    if layout in PAIRED:
        assert not left_out
        return
    ((place, said),) = left_out.items()
    assert said == "the row holds no picture bytes" if layout in ROWS else said.startswith("the file is missing (")
    assert place.endswith("#1" if layout in ROWS else "gone.png")


def two_folders(kept, left_out, layout):
    """The same base name in two folders is two samples."""
    assert captions(kept) == {"x/a": "red", "y/a": "green"}
    assert not left_out


def two_kinds(kept, left_out, layout):
    """a.png and a.jpg keep their extensions; by base name they share a text, which is said; by row each has its own."""
    shared = layout in PAIRED
    assert kept == {
        "a.jpg": (("green",), picture("green")),
        "a.png": (("green" if shared else "red",), picture("red")),
        "b": (("blue",), picture("blue")),
    }
    assert not left_out


def captions(kept):
    assert all(data == picture(texts[0]) for texts, data in kept.values()), "mispaired"
    return {name: texts[0] for name, (texts, _) in kept.items()}


CASES = {
    good: items(a_png="red", sub__b_jpg="green", z_webp="blue"),
    missing_media: [("a.png", "red", picture("red")), ("gone.png", "lost", None), ("z.png", "blue", picture("blue"))],
    two_folders: items(x__a_png="red", y__a_png="green"),
    two_kinds: items(a_png="red", a_jpg="green", b_png="blue"),
}


@pytest.fixture(scope="module")
def driven(tiny_model, tmp_path_factory):
    """Each layout in each case is a data set of one configuration, planned and cached at once."""
    root = tmp_path_factory.mktemp("layouts")
    sets = []
    for layout, case in itertools.product(LAYOUTS, CASES):
        layout_files.write(layout, str(root / layout / case.__name__), CASES[case], tmp=root)
        sets.append({"path": str(root / layout / case.__name__), "resolutions": [SIDE]})
    return drive(tiny_model, tmp_path_factory.mktemp("cache"), *sets)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_r3_no_caption_goes_astray(driven, layout, case):
    """R3: 7 layouts x 4 cases: exactly the expected ids and reasons, and `show` has each picture beside its caption."""
    assert len(LAYOUTS) * len(CASES) == 28
    place = list(itertools.product(LAYOUTS, CASES)).index((layout, case))
    kept = {}
    for sample_id in driven.ids(place):
        shown = driven.show(sample_id)
        (said,) = [word for word in WORDS if driven.says(shown, word)]
        (seen,) = [word for word in WORDS if shown["latents"].equal(driven.encoded(np.asarray(drawn(word))))]
        kept[re.sub(r"@\d+$", "", sample_id)] = ((said,), picture(seen))
    own = f"{driven.config.data[place].path}/"
    case(kept, {path: said for path, said in driven.reasons.items() if path.startswith(own)}, layout)


def test_r3_what_is_notable_is_said(driven):
    """R3: orphaned texts and shared ones are counted, and nothing else is said of any of the 28 data sets."""
    assert driven.warnings == NOTES


@pytest.mark.s3
@pytest.mark.parametrize("layout", LAYOUTS)
def test_r3_on_s3(s3_root, tmp_path, layout):
    """The same 28 cases below a prefix of an S3 bucket."""
    for case, pictures in CASES.items():
        root = f"{s3_root}/{case.__name__}"
        layout_files.write(layout, root, pictures, tmp=tmp_path / case.__name__)
        kept, left_out, notes = outcome(root)
        case(kept, left_out, layout)
        assert set(notes.values()) <= set(NOTES)


def test_the_layout_changes_no_row(tmp_path):
    """The same pictures and captions in all seven layouts are planned to the same ids, captions, hashes and keys."""
    pictures = [
        (name, f"a {name}", encoded(Image.fromarray(noise(64, 64, seed=seed)), "PNG"))
        for seed, name in enumerate(["a.png", "sub/b.png", "c.png"])
    ]
    planned = {}
    for layout in LAYOUTS:
        layout_files.write(layout, str(tmp_path / layout), pictures, tmp=tmp_path)
        sets = [{"path": str(tmp_path / layout), "resolutions": [64], "trigger": "sks"}]
        keys = Keys(*[lambda *parts: str(parts)] * 3)
        result = intake.build(Config.model_validate({"model": {"path": "m"}, "data": sets}), keys)
        rows = sorted(result.samples.drop_columns("uri").to_pylist(), key=lambda row: row["id"])
        planned[layout] = (rows, result.quarantine.num_rows)
    assert [row["id"] for row in planned["folder"][0]] == ["a", "c", "sub/b"]
    assert all(plan == planned["folder"] for plan in planned.values())


@pytest.mark.parametrize("layout", ["parquet", "lance", "tar"])
def test_a_container_is_a_data_set_of_its_own(root, tmp_path, layout):
    """`data.path` may be the file or table itself; the note says how it was read."""
    layout_files.write(layout, root, CASES[good], tmp=tmp_path)
    (name,) = {uri.removeprefix(f"{root}/").split("/")[0] for uri, _ in objects.listing(root)}
    path = objects.join(root, name)
    assert captions(outcome(path)[0]) == {"a": "red", "sub/b": "green", "z": "blue"}
    (said,) = [item.message for item in scan(Data(path=path), ordinal=0) if isinstance(item, Note)]
    assert said.startswith("read as")


def test_ids_of_several_containers(tmp_path):
    """A member's path is its id where one shard has it; else shard and member, as a nameless row is file and row."""
    pack(tmp_path / "tars/0.tar", {"a.png": picture("red"), "a.txt": b"red", "b.png": picture("b"), "b.txt": b"b"})
    pack(tmp_path / "tars/1.tar", {"./a.png": picture("green"), "./a.txt": b"green"})
    assert captions(outcome(tmp_path / "tars")[0]) == {"0.tar#a.png": "red", "b": "b", "1.tar#a.png": "green"}


@pytest.fixture(autouse=True)
def _folders(tmp_path):
    (tmp_path / "tars").mkdir()
    (tmp_path / "rows").mkdir()


def test_nameless_rows_and_binary_columns(tmp_path):
    """A plain binary column works; rows without names are `file#row`; a name that leaves the folder names nothing."""
    table = pa.table({"picture": [picture("x"), picture("y")], "caption": ["x", "y"], "n": [1, 2]})
    pq.write_table(table, tmp_path / "rows/p.parquet")
    assert captions(outcome(tmp_path / "rows")[0]) == {"p.parquet#0": "x", "p.parquet#1": "y"}
    named = table.append_column("file_name", pa.array(["../x.png", "y.png"]))
    pq.write_table(named, tmp_path / "rows/p.parquet")
    kept, _, notes = outcome(tmp_path / "rows")
    assert captions(kept) == {"p.parquet#0": "x", "y": "y"}
    assert "goes by its row's number" in notes[f"{tmp_path}/rows/p.parquet#0"]
    kept, left_out, _ = outcome(tmp_path / "rows", caption="filename")
    assert {name: texts for name, (texts, _) in kept.items()} == {"y": ("y",)}
    assert "names no file" in left_out[f"{tmp_path}/rows/p.parquet#0"]


def test_blob_columns_of_lance(tmp_path):
    """A table of ours or of others with a blob column is read like any other."""
    import lance

    schema = pa.schema([pa.field("text", pa.string()), lance.blob_field("image")])
    blobs = lance.blob_array([picture("x"), picture("y")])
    rows = pa.table([pa.array(["x", "y"]), blobs], schema=schema)
    lance.write_dataset(rows, str(tmp_path / "t.lance"), data_storage_version="2.2")
    assert captions(outcome(tmp_path / "t.lance")[0]) == {"t.lance#0": "x", "t.lance#1": "y"}


@pytest.mark.parametrize("layout", ["jsonl", "metadata.parquet", "parquet", "lance"])
def test_columns_and_several_captions(tmp_path, layout):
    """`column:NAME` takes that column; a list of strings is several captions; an unknown column names those there."""
    rows = [("a.png", ["red", "crimson"], picture("red")), ("b.png", ["green"], picture("green"))]
    if layout in ROWS:
        table = layout_files.picture_table([(name, "other", data) for name, _, data in rows])
        table = table.append_column("many", pa.array([texts for _, texts, _ in rows]))
        if layout == "parquet":
            pq.write_table(table, tmp_path / "rows/x.parquet")
        else:
            import lance

            lance.write_dataset(table, str(tmp_path / "rows/x.lance"))
    else:
        suffix = layout.rsplit(".", 1)[-1]
        listed = [{"file_name": name, "text": "other", "many": texts} for name, texts, _ in rows]
        put(tmp_path / "rows", f"metadata.{suffix}", layout_files.encode(listed, suffix))
        for name, _, data in rows:
            put(tmp_path / "rows", name, data)
    kept, left_out, _ = outcome(tmp_path / "rows", caption="column:many")
    assert {name: texts for name, (texts, _) in kept.items()} == {"a": ("red", "crimson"), "b": ("green",)}
    assert not left_out
    with pytest.raises(DataError, match=r"no such column.*many"):
        outcome(tmp_path / "rows", caption="column:nope")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_columns_of_other_trainers(tmp_path, suffix):
    """Where no column is called file_name, `image` or `image_path` names the picture and `edit_image` or `control_path`
    its reference; beside a file_name they are columns like any other."""
    for name in ("a.png", "b.png"):
        put(tmp_path / "rows", name, picture(name))
    theirs = [{"image": "a.png", "prompt": "red", "edit_image": "b.png"}]
    put(tmp_path / "rows", f"metadata.{suffix}", layout_files.encode(theirs, suffix))
    kept, _, _ = outcome(tmp_path / "rows", caption="column:prompt")
    assert {name: texts for name, (texts, _) in kept.items()} == {"a": ("red",)}
    (row,) = metadata.rows(f"metadata.{suffix}", layout_files.encode(theirs, suffix), caption="column:prompt")
    assert (row.file_name, row.references) == ("a.png", ("b.png",))
    both = [{"file_name": "b.png", "image": "a.png", "text": "blue"}]
    (row,) = metadata.rows(f"metadata.{suffix}", layout_files.encode(both, suffix), caption="auto")
    assert (row.file_name, row.text) == ("b.png", "blue")


def test_captions_in_json_members(tmp_path):
    """A shard's .json holds the caption where there is no .txt, or where a column is asked for."""
    pack(tmp_path / "tars/0.tar", {
        "a.jpg": picture("a"), "a.json": b'{"caption": "a", "alt": "A"}', "b.jpg": picture("b"), "b.txt": b"b",
        "b.json": b'{"alt": "B"}', "c.jpg": picture("c"), "c.json": b"[1]", "d.jpg": picture("d"),
        "d.json": b'{"text": 7}',
    })  # fmt: skip
    kept, left_out, _ = outcome(tmp_path / "tars")
    assert {name: texts for name, (texts, _) in kept.items()} == {"a": ("a",), "b": ("b",)}
    assert [reason for _, reason in sorted(left_out.items())] == [
        "its .json is not an object with a caption in it", "its caption is int, not a string or a list of strings",
    ]  # fmt: skip
    kept, _, _ = outcome(tmp_path / "tars", caption="column:alt")
    assert {name: texts for name, (texts, _) in kept.items()} == {"a": ("A",), "b": ("B",)}


def test_what_a_shard_holds_beside_its_pictures(tmp_path, monkeypatch):
    """Hidden members are none; a caption file that is too large leaves its picture out, as text and as JSON."""
    monkeypatch.setattr(tar_members, "CAPTION_BYTES", 20)
    pack(tmp_path / "tars/0.tar", {
        "a.png": picture("a"), "a.txt": b"a", "._a.png": b"", ".b.png": picture("b"), "sub/.c.png": picture("c"),
        "d.png": picture("d"), "d.txt": b"d" * 21, "e.png": picture("e"), "e.json": b'{"text": "e", "n": 12}',
    })  # fmt: skip
    kept, left_out, notes = outcome(tmp_path / "tars")
    assert captions(kept) == {"a": "a"}
    assert left_out == {f"{tmp_path}/tars/0.tar#{name}.png": "caption file over 16 MiB" for name in "de"}
    assert not notes


def test_archives_that_cannot_be_trusted_are_refused(tmp_path):
    """A cut, compressed or foreign file under a container's name stops the run, named; twice a name is no pair."""
    path = tmp_path / "tars/0.tar"
    pack(path, {"a.png": picture("a" * 2000), "a.txt": b"a", "b.png": picture("b"), "b.txt": b"b"})
    whole = path.read_bytes()
    for data in (whole[:1500], b"not a tar at all" * 100):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"0\.tar: not a whole, uncompressed tar"):
            outcome(tmp_path / "tars")
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match="uncompressed"):
        outcome(tmp_path / "tars")
    path.write_bytes(whole)
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = 9
        archive.addfile(info, io.BytesIO(picture("?")))
    kept, left_out, _ = outcome(tmp_path / "tars")
    assert captions(kept) == {"b": "b"}
    assert set(left_out.values()) == {"its name stands in the archive more than once"}
    put(tmp_path / "rows", "x.parquet", b"PAR1 no")
    with pytest.raises(DataError, match=r"x\.parquet: not a Parquet file"):
        outcome(tmp_path / "rows")
    put(tmp_path / "t.lance", "data/x.lance", b"no")
    with pytest.raises(DataError, match=r"t\.lance"):
        outcome(tmp_path / "t.lance")


def test_mixtures_and_captions_that_a_layout_cannot_bring(tmp_path):
    """Two layouts in one folder, two caption columns, no picture column, captions from nowhere: a clear error each."""

    def refused(says, path=tmp_path / "rows", **options):
        with pytest.raises(DataError, match=says):
            outcome(path, **options)

    put(tmp_path / "rows", "a.png", picture("a"))
    for caption in ("metadata", "column:x"):
        refused("without metadata.jsonl", caption=caption)
    pack(tmp_path / "rows/0.tar", {"b.png": picture("b")})
    refused("mixture of WebDataset tar files and a folder of picture files")
    (tmp_path / "rows/a.png").unlink()
    refused("caption='metadata' is none of auto, textfile, lines, column:NAME, filename", caption="metadata")
    (tmp_path / "rows/0.tar").unlink()
    pq.write_table(pa.table({"image": [b"x"], "text": ["t"], "caption": ["c"]}), tmp_path / "rows/x.parquet")
    refused('both columns text and caption: say which, caption = "column:text"')
    refused("caption='lines' is none of", caption="lines")
    pq.write_table(pa.table({"p": [b"x"], "q": [b"y"], "text": ["t"]}), tmp_path / "rows/x.parquet")
    refused("several columns of bytes")
    pq.write_table(pa.table({"text": ["t"]}), tmp_path / "rows/x.parquet")
    refused("no column of picture bytes")
    put(tmp_path / "x", "notes.md", b"#")
    refused("no pictures in it", tmp_path / "x")
    refused("no .tar or .parquet", tmp_path / "x/notes.md")


@pytest.mark.s3
def test_objects_that_are_too_large_are_left_out_unread(s3_root, monkeypatch):
    """A picture or caption over its limit is quarantined while listing, with its reason."""
    monkeypatch.setattr(walls, "MAX_BYTES", 1000)
    monkeypatch.setattr(listing, "CAPTION_BYTES", 20)
    for name, data in {"a.png": bytes(1001), "a.txt": b"a", "b.png": picture("b"), "b.txt": b"b" * 21}.items():
        objects.write(objects.join(s3_root, name), data)
    kept, left_out, _ = outcome(s3_root)
    assert not kept
    assert {path.removeprefix(f"{s3_root}/"): reason for path, reason in left_out.items()} == {
        "a.png": "file of 0.0 GiB; pictures up to 1 GiB are read",
        "b.png": "no caption: b.txt is missing and default_caption is not set",
        "b.txt": "caption file over 16 MiB",
    }


@pytest.mark.s3
def test_s3_and_disk_agree(s3_root, tmp_path):
    """A mixed folder has the same samples, reasons and notes wherever it lies, but for nameless files."""
    files = {
        "a.png": picture("a"), "a.txt": b"a", "b.png": picture("b"), "b.txt": b"\xff\xfe", "c.png": picture("c"),
        "sub/d.png": picture("d"), "sub/d.TXT": b"d", "._a.png": b"", "lost.txt": b"", "README.md": b"#",
        ".git/e.png": b"",
        "f.png": picture("f"), "f.txt": b"", "a b#c é.png": picture("g"), "a b#c é.txt": b"g",
    }  # fmt: skip
    for name, data in files.items():
        put(tmp_path / "rows", name, data)
        objects.write(objects.join(s3_root, "rows", name), data)
    remote, local = outcome(f"{s3_root}/rows/"), outcome(tmp_path / "rows")

    def relative(result):
        kept, *said = result
        return kept, *({path.split("rows/", 1)[1]: text for path, text in part.items()} for part in said)

    assert relative(remote) == relative(local)
    assert set(remote[0]) == {"a", "sub/d", "a b#c é"}
    with pytest.raises(DataError, match="no pictures"):
        outcome(f"{s3_root}/elsewhere")
