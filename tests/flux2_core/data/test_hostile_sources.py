"""R21: files that were made to hang `plan` or to fill its memory are refused, or left out, by name."""

import gzip
import os
import re
import resource
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flux2_core.config.sections import Config
from flux2_core.data.sources import columns, parquet_rows
from flux2_core.errors import DataError, SetupError
from flux2_core.lora.names import PEFT_KEY
from flux2_core.lora.reading import from_file
from flux2_core.model.folder import resolve
from flux2_core.plan import describe, survey
from flux2_core.store import hashing
from tests.flux2_core.layout_files import picture_table, put
from tests.flux2_core.pictures import encoded
from tests.in_process import PARTS

PICTURE = encoded(Image.new("RGB", (64, 64), "red"), "PNG")
GIB = 2**30
MOST_S, MOST_BYTES = 30, 700 * 2**20
DEEP = 1_100


@pytest.fixture(autouse=True)
def _bounds() -> Iterator[None]:
    """Every case ends in time, and takes no more memory than is meant for names and captions."""

    def late(*_: object) -> None:
        raise AssertionError(f"not done in {MOST_S} s")  # no OSError, which is handled

    before, taken = signal.signal(signal.SIGALRM, late), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(MOST_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - taken) * 1024 < MOST_BYTES


def good(root: Path) -> None:
    """A picture that nothing is wrong with."""
    put(root, "good.png", PICTURE)
    put(root, "good.txt", b"a good one")


def beside(name: str) -> Callable[[Path], None]:
    """A pipe of this name beside a good picture, and a picture of that caption file."""

    def write(root: Path) -> None:
        good(root)
        os.mkfifo(root / name)
        if name.endswith(".txt"):
            put(root, name.replace(".txt", ".png"), PICTURE)

    return write


def device(root: Path) -> None:
    good(root)
    (root / "x.jpg").symlink_to("/dev/zero")


def headers(*infos: tarfile.TarInfo, sparse: int = 0) -> Callable[[Path], None]:
    """An archive of headers alone, then a hole."""

    def write(root: Path) -> None:
        path = root / "x.tar"
        path.write_bytes(b"".join(info.tobuf(tarfile.GNU_FORMAT) for info in infos) + bytes(1024))
        os.truncate(path, path.stat().st_size + sparse)

    return write


def info(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type = size, kind
    return made


def pax_chain(root: Path) -> None:
    record = b"13 comment=x\n".ljust(512, b"\0")
    one = info("x", 13, tarfile.XHDTYPE).tobuf(tarfile.GNU_FORMAT) + record
    (root / "x.tar").write_bytes(one * 3_000 + bytes(1024))


def nested(root: Path) -> None:
    good(root)
    for depth in range(1, DEEP + 1):
        os.mkdir(f"{root}/{'d/' * depth}")


def zip_bomb(name: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        good(root)
        (root / name).write_bytes(gzip.compress(bytes(2**26), 1))
        if name.endswith(".tar"):
            (root / "good.png").unlink()

    return write


def one_group(*, same: bool) -> Callable[[Path], None]:
    """A row group of many rows: one picture for all of them, which the file's figures count once, or each its own."""

    def write(root: Path) -> None:
        count, cell = (3_000, PICTURE.ljust(2**16)) if same else (700, PICTURE.ljust(100_000))
        column = pa.array([cell] * count, pa.binary())
        table = pa.table({"image": column, "text": pa.array(["x"] * count)})
        pq.write_table(
            table, root / "x.parquet", row_group_size=count, use_dictionary=same, dictionary_pagesize_limit=2**20
        )

    return write


def table(root: Path, *blobs: Any) -> None:
    schema = pa.schema([pa.field("text", pa.string()), lance.blob_field("image")])
    rows = pa.table([pa.array([f"row {n}" for n in range(len(blobs))]), lance.blob_array(list(blobs))], schema=schema)
    options = {"data_storage_version": "2.2", "allow_external_blob_outside_bases": True}
    lance.write_dataset(rows, str(root / "t.lance"), **options)


def external(root: Path) -> None:
    put(root.parent, "secret.png", PICTURE)
    table(root, PICTURE, lance.Blob.from_uri(f"file://{root.parent}/secret.png", position=0, size=len(PICTURE)))


def clone(root: Path) -> None:
    source = lance.write_dataset(picture_table([("x.png", "x", PICTURE)]), str(root.parent / "s.lance"))
    source.shallow_clone(str(root / "t.lance"), 1)


def pipe_in_table(root: Path) -> None:
    table(root, PICTURE)
    (file,) = (root / "t.lance/data").glob("*.lance")
    file.unlink()
    os.mkfifo(file)


def large(name: str) -> Callable[[Path], None]:
    """A metadata file of 1 GiB, a hole."""

    def write(root: Path) -> None:
        good(root)
        put(root, name, b"file_name,text\n")
        os.truncate(root / name, GIB)

    return write


def long_line(name: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        good(root)
        put(root, name, b"file_name,text\ngood.png," + b"x" * (17 * 2**20))

    return write


def unpacking(root: Path) -> None:
    good(root)
    texts = pa.array(["x" * 2**16] * 6_000)
    rows = pa.table({"file_name": pa.array(["good.png"] * 6_000), "text": texts})
    pq.write_table(rows, root / "metadata.parquet", dictionary_pagesize_limit=2**20)


def no_text(root: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"], pa.binary()).buffers())
    pq.write_table(pa.table({"image": [PICTURE], "text": texts}), root / "x.parquet")


def many_columns(root: Path) -> None:
    good(root)
    put(root, "metadata.csv", ",".join(["file_name", *map(str, range(200_000))]).encode() + b"\n" + b"good.png\n" * 5)


PIPE, TAR = "a pipe, socket or device", r"x\.tar: not a whole, uncompressed tar file"
CASES: dict[str, tuple[Callable[[Path], None], bool, str]] = {  # what is written, whether the good one stays, why not
    "pipe as archive": (beside("x.tar"), True, PIPE),
    "pipe as picture": (beside("x.jpg"), True, PIPE),
    "pipe as caption": (beside("x.txt"), True, "caption file x.txt cannot be read"),
    "pipe as metadata": (beside("metadata.jsonl"), False, r"metadata\.jsonl cannot be read"),
    "device": (device, True, "a link that leaves"),
    "negative size": (headers(info("x.png", -1024), sparse=4096), False, rf"{TAR} \('x.png' has a negative size"),
    "negative long name": (headers(info("x", -1024, tarfile.GNUTYPE_LONGNAME)), False, TAR),
    "long name of 64 GiB": (headers(info("x", 2**36, tarfile.GNUTYPE_LONGNAME), sparse=2**36 + 512), False, TAR),
    "member of 8 EiB": (headers(info("x.png", 2**63), sparse=4096), False, "x.tar"),
    "chain of headers": (pax_chain, False, TAR),
    "1,100 folders": (nested, True, "over 100 folders inside of each other"),
    "gzip as tar": (zip_bomb("x.tar"), False, TAR),
    "tar.gz": (zip_bomb("x.tar.gz"), True, ""),
    "one row group": (one_group(same=False), False, r"x\.parquet: row group 0 has over 1 GiB of pictures"),
    "one row group of one picture": (one_group(same=True), False, "row group 0 has over 1 GiB of pictures"),
    "external blob": (external, True, "the row only names a place outside the table"),
    "shallow clone": (clone, False, r"t\.lance: a shallow clone"),
    "pipe in a table": (pipe_in_table, False, r"t\.lance: .*is a link, pipe, socket or device"),
    "JSON of 1 GiB": (large("metadata.jsonl"), False, r"metadata\.jsonl: over 512 MiB"),
    "CSV of 1 GiB": (large("metadata.csv"), False, r"metadata\.csv: over 512 MiB"),
    "JSON line": (long_line("metadata.jsonl"), False, r"metadata\.jsonl:2: a line of over 16 MiB"),
    "CSV line": (long_line("metadata.csv"), False, r"metadata\.csv:2: a line of over 16 MiB"),
    "metadata that unpacks": (unpacking, False, r"metadata\.parquet: over .* MiB of names and captions"),
    "captions that are no text": (no_text, False, r"x\.parquet: names or captions that are no text"),
    "CSV of 200,000 columns": (many_columns, False, r"metadata\.csv: over .* 1,000 columns"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_r21_hostile_files_are_named(
    case: str, make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R21: `plan` ends soon and small, says which file it is, and a good picture beside it stays where that can be."""
    monkeypatch.setattr(parquet_rows, "GROUP_BYTES", 2**26)
    monkeypatch.setattr(columns, "UNPACKED_BYTES", 2**26)
    write, stays, says = CASES[case]
    root = tmp_path / "set"
    root.mkdir()
    write(root)
    config = make_config(data=[{"path": str(root), "resolutions": [64]}], max_quarantined=1.0)
    model = resolve(config.model, parts=PARTS)
    try:
        told = describe.describe(config, model, survey.survey(config, model))
    except DataError as error:
        kept, said = 0, str(error)
    else:
        kept, said = told["samples"]["kept"], str(told["samples"]["quarantined"])
    finally:
        for depth in range(DEEP, 0, -1) if write is nested else ():  # pytest's own way of removing them is recursive
            os.rmdir(f"{root}/{'d/' * depth}")
    assert kept == stays
    assert re.search(says, said), said


def header(length: int, text: bytes, sparse: int = 0) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(length.to_bytes(8, "little") + text)
        os.truncate(path, path.stat().st_size + sparse)

    return write


HEADERS = {
    "no JSON": header(16, b"{not JSON at all"),
    "no object": header(8, b"[1, 2]  "),
    "8 EiB": header(2**63, b"{}"),
    "1 GiB": header(GIB, b"{}", sparse=GIB),
    "nested": header(2**20, b"[" * 2**20),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("case", HEADERS)
def test_r21_headers_of_safetensors(case: str, tmp_path: Path) -> None:
    """R21: a header that is none is named, whoever reads it: of a LoRA, or of a model's weights."""
    HEADERS[case](tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=r"x\.safetensors: (not a safetensors file|no such file)"):
        from_file(tmp_path / "x.safetensors")
    if case != "pipe":
        with pytest.raises(SetupError, match=r"x\.safetensors: its header of [\d,]+ bytes is none"):
            hashing.tensor_sha256(tmp_path / "x.safetensors", "a")


@pytest.mark.parametrize("said", ["{no", "[]", "[" * 100_000, '{"lora_alpha": 1'])
def test_a_lora_that_describes_itself_badly(said: str, tmp_path: Path) -> None:
    """What peft's part of the metadata holds may be anything."""
    save_file({"a.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "x.safetensors", {PEFT_KEY: said})
    with pytest.raises(DataError, match=r"x\.safetensors"):
        from_file(tmp_path / "x.safetensors")
