"""The image worker without Ray: what it stores, what it refuses, and that decoding runs ahead of the device."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux2_core.cache import fingerprints, index
from flux2_core.config.sections import Config, Latents
from flux2_core.data import intake, samples
from flux2_core.data.intake import SamplePlan
from flux2_core.data.pictures import buckets, masks
from flux2_core.data.pictures import load as pictures_load
from flux2_core.data.samples import Wanted
from flux2_core.data.sources import parquet_rows, read
from flux2_core.errors import DataError
from flux2_core.model.folder import resolve
from flux2_core.model.vae import Vae
from flux2_core.placement.encoding import Encoding
from flux2_core.plan import survey
from flux2_core.store import schemas
from flux2_core.store.reader import Reader
from flux2_core.store.table import Table
from stages import encode_images
from stages.encode_images import ImageWorker
from tests.in_process import PARTS

Make = Callable[..., Config]


@pytest.fixture
def edit_set(tmp_path: Path) -> dict[str, Any]:
    """A data set of three pictures, each with a mask and a reference, one of these of other sizes."""
    draw = np.random.default_rng(0)
    for number in range(3):
        for folder, height, width in (("set", 64, 96), ("masks", 64, 96), ("seen", 200, 100)):
            (tmp_path / folder).mkdir(exist_ok=True)
            pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
        (tmp_path / "set" / f"{number}.txt").write_text(f"picture {number}")
    return {
        "path": str(tmp_path / "set"), "masks": str(tmp_path / "masks"), "references": [str(tmp_path / "seen")],
        "resolutions": [64], "flip": True,
    }  # fmt: skip


def prepared(config: Config) -> tuple[SamplePlan, ImageWorker, str]:
    """The plan, a worker and its empty table."""
    model = resolve(config.model, parts=PARTS)
    fingerprint = fingerprints.latents_fingerprint(model, config)
    uri = index.latents_uri(config, fingerprint)
    Table.open_or_create(uri, kind=schemas.KIND_LATENTS, fingerprint=fingerprint)
    return survey.survey(config, model), ImageWorker(config.model_dump(mode="json", by_alias=True), uri), uri


def stored(uri: str, wanted: dict[str, Wanted]) -> dict[str, Any]:
    table = Table.open(uri)
    rows = Reader(table, list(wanted)).fetch(list(wanted))
    assert len(list(table.keys())) == len(wanted)
    return {row.key: row for row in rows}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.all_cases)])
def test_pictures_references_and_masks_are_stored(make_config: Make, edit_set: dict[str, Any], compiled: bool) -> None:
    """Each distinct key once: latents of picture and reference are the VAE's, mask rows the mask's own tokens."""
    torch._dynamo.utils.counters.clear()
    config = make_config(data=[edit_set], cluster={"compile_vae": compiled})
    planned, worker, uri = prepared(config)
    wanted = samples.wanted(planned.samples)
    assert len(wanted) == 3 * 2 * 3
    for item in encode_images.items(list(wanted.values())):
        assert worker.work(item) == (len(item), {})
    worker.close()
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == compiled
    rows = stored(uri, wanted)
    for key, row in wanted.items():
        height, width = rows[key].attributes[schemas.HEIGHT], rows[key].attributes[schemas.WIDTH]
        assert (16 * height, 16 * width) == (row.transform.bucket_height, row.transform.bucket_width)
        if row.mask:
            assert bytes(rows[key].payload) == masks.load(row.uri, row.transform).tobytes()
        else:
            pixels = torch.from_numpy(pictures_load.load(row.uri, row.transform, latents=Latents()))[None]
            seen = torch.frombuffer(bytearray(rows[key].payload), dtype=torch.float32).view(128, height, width)
            assert (seen - worker.vae.encode(pixels)[0]).abs().max() < 1e-4


def test_a_full_card_halves_the_passes(make_config: Make, edit_set: dict[str, Any]) -> None:
    """Pictures that do not fit together are encoded in halves, each whole, and no row is lost."""
    config = make_config(data=[edit_set])
    planned, worker, uri = prepared(config)
    wanted, seen, real = samples.wanted(planned.samples), list[int](), worker.vae.encode

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(pixels)

    worker.vae.encode = encode
    for item in encode_images.items(list(wanted.values())):
        assert worker.work(item) == (len(item), {})
    worker.close()
    assert len(stored(uri, wanted)) == len(wanted)
    assert seen.count(1) == 2 * 2 * 3, "each picture and reference"
    assert max(seen) > 1
    assert sum(count > 1 for count in seen) <= 3, "what was full once is not tried again"


def test_planned_passes_are_kept(make_config: Make, edit_set: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a card that holds few pixels at a time the VAE gets no more in a pass than the planner lets it have."""
    monkeypatch.setattr(encode_images.encoding, "pictures", lambda *_: Encoding("whole", 2 * 64 * 64))
    planned, worker, uri = prepared(make_config(data=[edit_set]))
    wanted, seen, real = samples.wanted(planned.samples), list[int](), worker.vae.encode
    worker.vae.encode = lambda pixels: seen.append(pixels.numel() // 3) or real(pixels)
    for item in encode_images.items(list(wanted.values())):
        worker.work(item)
    worker.close()
    assert len(stored(uri, wanted)) == len(wanted)
    assert 64 * 64 < max(seen) <= 2 * 64 * 64


def test_items_are_runs_of_one_size() -> None:
    """Every wanted row is in one item; an item is of one bucket, of masks or of pictures, and bounded in pixels."""
    draw = np.random.default_rng(1)
    sides = 16 * draw.integers(1, 130, (400, 2))
    transforms = [samples.Transform(h, w, h, w, 0, 0) for h, w in sides.tolist()]
    wanted = [Wanted(str(n), "x", "y", t, bool(n % 3)) for n, t in enumerate(transforms * 3)]
    items = list(encode_images.items(wanted))
    assert sorted(row.key for item in items for row in item) == sorted(row.key for row in wanted)
    for item in items:
        assert len({(row.mask, row.transform) for row in item}) == 1
        pixels = sum(row.transform.bucket_height * row.transform.bucket_width for row in item)
        assert len(item) == 1 or (pixels <= encode_images.PIXELS_PER_ITEM and len(item) <= encode_images.MOST_PER_ITEM)


def groups_read(shares: list[list[list[Wanted]]], *, kept: int) -> int:
    """How often actors unpack a row group, each with its own items, its last few groups in memory."""
    count = 0
    for share in shares:
        memory: list[str | None] = []
        for row in (row for item in share for row in item):
            if (group := read.group(row.uri)) not in memory:
                count += 1
            memory = [*(one for one in memory if one != group), group][-kept:]
    return count


@pytest.mark.parametrize("rows", [10, 100, 1_000])
def test_row_groups_are_read_once(rows: int) -> None:
    """Of 40,000 rows in groups of any size, 8 actors with two items at a time read at most 1.3 times as many groups."""
    draw, actors, count = np.random.default_rng(2), 8, 40_000
    sizes = buckets.buckets(1024)
    wanted = []
    for number, (height, width) in enumerate(np.array(sizes)[draw.integers(0, len(sizes), count)].tolist()):
        group, file = number // rows, number // 4_000
        uri = f"/d/{file}.parquet@0.{group}.{group * rows}#{number}"
        wanted.append(Wanted(str(number), uri, "y", samples.Transform(height, width, height, width, 0, 0), mask=False))
    kept = max(parquet_rows.KEPT, parquet_rows.KEPT_BYTES // (rows * 500_000))
    divided = list(encode_images.items(wanted, actors=actors))
    assert sorted(row.key for item in divided for row in item) == sorted(row.key for row in wanted)
    assert groups_read([divided[n::actors] for n in range(actors)], kept=kept) <= 1.3 * count / rows
    by_bucket = [row for _, row in sorted(enumerate(wanted), key=lambda one: (encode_images._like(one[1]), one[0]))]
    runs = [by_bucket[at : at + 16] for at in range(0, count, 16)]
    before = groups_read([runs[n::actors] for n in range(actors)], kept=kept)
    assert before > 4 * count / rows, "the rows that were made up need no care"
    assert len(divided) >= encode_images.ITEMS_PER_ACTOR * actors


def test_an_item_of_several_buckets(
    make_config: Make, edit_set: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one group are one item, whatever their sizes, and each pass over the device is of one size."""
    planned, worker, uri = prepared(make_config(data=[edit_set]))
    wanted = samples.wanted(planned.samples)
    monkeypatch.setattr(read, "group", lambda _: "a group")
    monkeypatch.setattr(encode_images, "PIXELS_PER_ITEM", 1)  # so that one picture is decoded at a time
    (item,) = encode_images.items(list(wanted.values()))
    assert len({encode_images._like(row) for row in item}) == 3
    assert worker.work(item) == (len(item), {})
    worker.close()
    for key, row in stored(uri, wanted).items():
        sides = row.attributes[schemas.HEIGHT], row.attributes[schemas.WIDTH]
        transform = wanted[key].transform
        assert sides == (transform.bucket_height // 16, transform.bucket_width // 16)


def test_a_file_broken_since_takes_only_its_samples(make_config: Make, edit_set: dict[str, Any]) -> None:
    """A mask emptied, a reference changed and a picture cut after planning: reasons by key; the rest is stored."""
    planned, worker, uri = prepared(make_config(data=[edit_set]))
    wanted = samples.wanted(planned.samples)
    Path(edit_set["masks"], "0.png").write_bytes(b"")
    Image.new("RGB", (200, 100)).save(Path(edit_set["references"][0], "1.png"))
    failed: dict[str, str] = {}
    for item in encode_images.items(list(wanted.values())):
        failed |= worker.work(item)[1]
    worker.close()
    assert len(failed) == 4  # a mask and a reference, each straight and mirrored
    stored(uri, {key: row for key, row in wanted.items() if key not in failed})
    left = intake.without(planned, failed)
    assert left.samples.column("id").to_pylist() == ["2", "2"]
    reasons = left.quarantine.column("reason").to_pylist()
    assert reasons == [
        f"mask {edit_set['masks']}/0.png: the file has changed since it was planned; run again",
        f"reference {edit_set['references'][0]}/1.png: the file has changed since it was planned; run again",
    ]


def test_decoding_runs_ahead_of_the_device(
    make_config: Make, edit_set: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first item's pictures are on a device that takes its time, the second item's are all decoded.

    The slowed encoder holds its first batch until the last picture of the second item was read: without the overlap
    it would wait for ever (here: until the time is up, and fail).
    """
    planned, worker, _ = prepared(make_config(data=[edit_set]))
    pictures = [row for row in samples.wanted(planned.samples).values() if not row.mask]
    first, second = list(encode_images.items(pictures))
    assert len(first) == len(second) == 6
    seen: list[str] = []
    all_read = threading.Event()
    load = encode_images._load

    def reading(row: Wanted, latents: Latents) -> Any:
        loaded = load(row, latents)
        seen.append(row.key)
        if len(seen) == len(pictures):
            all_read.set()
        return loaded

    class Slow:
        def __init__(self, vae: Vae) -> None:
            self.vae, self.batches = vae, 0

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            self.batches += 1
            assert all_read.wait(60), "the device waited: nothing was decoded ahead"
            return self.vae.encode(pixels)

    monkeypatch.setattr(encode_images, "_load", reading)
    worker.vae = slow = Slow(Vae(resolve(worker.config.model, parts=("vae",))))  # type: ignore[assignment]
    with ThreadPoolExecutor(encode_images.ITEMS_AHEAD) as actor:  # as Ray runs an actor with max_concurrency
        done = list(actor.map(worker.work, [first, second]))
    worker.close()
    assert done == [(6, {}), (6, {})]
    assert slow.batches == 2


def spoilt(model: Path, folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a model whose VAE has one tensor changed."""
    copy = Path(shutil.copytree(model, folder / "spoilt"))
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("name", "change", "dtype", "words"),
    [
        ("encoder.conv_in.bias", lambda t: t * torch.nan, "fp32", "made NaN"),
        ("bn.running_mean", lambda t: t + 1e6, "fp16", 'made infinity.*latents.dtype="fp32"'),
        ("bn.running_mean", lambda t: t - 1e6, "fp16", "made infinity"),
    ],
)
def test_an_unsound_latent_is_never_stored(
    make_config: Make, tiny_model: Path, tmp_path: Path, name: str, change: Any, dtype: str, words: str
) -> None:
    """NaN in the weights, or values over fp16's range: the run stops, the picture is named, no row is committed."""
    model = spoilt(tiny_model, tmp_path, name, change)
    planned, worker, uri = prepared(make_config(model={"path": str(model)}, latents={"dtype": dtype}))
    wanted = samples.wanted(planned.samples)
    (item, *_) = encode_images.items(list(wanted.values()))
    with pytest.raises(DataError, match=rf"p\d\.png: the VAE {words}"):
        worker.work(item)
    worker.close()
    assert not list(Table.open(uri).keys())


def test_masks_and_pictures_of_one_file_have_rows_of_their_own(make_config: Make, edit_set: dict[str, Any]) -> None:
    """A picture that is its own mask: two rows with two keys."""
    config = make_config(data=[edit_set | {"masks": edit_set["path"], "flip": False}])
    planned, _, _ = prepared(config)
    for row in planned.samples.to_pylist():
        assert row["mask"]["sha256"] == row["sha256"]
        assert row["mask"]["latent_key"] != row["latent_key"]
    assert len(samples.wanted(planned.samples)) == 9
