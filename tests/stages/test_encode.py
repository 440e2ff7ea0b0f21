"""The caching stages on a real Ray: rows once, reuse, late quarantine, and what a killed worker leaves."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from flux2_core.cache.index import Index
from flux2_core.config.sections import Config
from flux2_core.data import texts as data_texts
from flux2_core.errors import DataError
from flux2_core.model.folder import resolve
from flux2_core.store import parquet
from flux2_core.store.table import Table
from stages import encode_images, encode_text, fill, index
from stages.fill import Filled
from tests.in_process import PARTS, fill_cache

pytestmark = pytest.mark.ray
Make = Callable[..., Config]


def cache_all(config: Config) -> tuple[Filled, Filled, Index]:
    model = resolve(config.model, parts=PARTS)
    planned = index.build(config, model)
    text = encode_text.encode(config, model, data_texts.texts(config, planned.samples))
    latents = encode_images.encode(config, model, planned.samples)
    return text, latents, index.publish(config, planned, text=text, latents=latents)


@pytest.mark.all_cases
def test_second_run_encodes_nothing(ray_runtime: str, make_config: Make) -> None:
    """A second run reuses every row and says so; with more encoders, the same keys come out."""
    text, latents, first = cache_all(make_config(validate={"prompts": ["a [trigger]"]}))
    assert (text.encoded, text.reused) == (8, 0)
    assert (latents.encoded, latents.reused) == (6, 0)
    text, latents, second = cache_all(make_config(validate={"prompts": ["a [trigger]"]}, cluster={"encoders": 2}))
    assert (text.encoded, text.reused, latents.encoded, latents.reused) == (0, 8, 0, 6)
    assert second == first


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What encoders sent back."""
    kept: list[object] = []
    run = fill.pool.run

    def noting(*given: object, **options: object) -> Iterator[object]:
        for result in run(*given, **options):
            kept.append(result)
            yield result

    monkeypatch.setattr(fill.pool, "run", noting)
    return kept


def test_one_new_picture_costs_one_row(
    ray_runtime: str, make_config: Make, photos: Path, tmp_path: Path, sent: list[object]
) -> None:
    """Adding one picture, and moving the folder, encodes one latent row and one text row; what comes back through Ray
    is how many, not the rows."""
    fill_cache(make_config())
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    Image.new("RGB", (64, 64), "teal").save(moved / "new.png")
    (moved / "new.txt").write_text("something new")
    data = {"path": str(moved), "trigger": "sks", "resolutions": [64]}
    text, latents, _ = cache_all(make_config(data=[data]))
    assert (text.encoded, latents.encoded) == (1, 1)
    assert sent == [(1, {}), (1, {})]


def test_broken_pixels_found_late_are_quarantined(ray_runtime: str, make_config: Make, tmp_path: Path) -> None:
    """A picture whose header is fine and whose pixels are not is quarantined by the encoder; neighbours stay right."""
    folder = tmp_path / "data"
    folder.mkdir()
    for place in range(4):
        Image.effect_noise((64, 64), 40 + place).convert("RGB").save(folder / f"{place}.jpg")
        (folder / f"{place}.txt").write_text(f"picture {place}")
    whole = (folder / "1.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(whole[: len(whole) // 2])
    data = [{"path": str(folder), "resolutions": [64], "check_images": False}]
    _, latents, published = cache_all(make_config(data=data, max_quarantined=0.3))
    assert len(latents.failed) == 1
    samples = parquet.read_parquet(published.samples).to_pylist()
    assert [row["id"] for row in samples] == ["0", "2", "3"]
    with pytest.raises(DataError, match=r"(?s)1 of 4 pictures.*1\.jpg"):
        cache_all(make_config(data=data, max_quarantined=0.1))


class Dying(encode_text.TextWorker):
    """Encodes its first item, then dies before any row is committed; later ones live."""

    def work(self, texts: list[str]) -> tuple[int, dict[str, str]]:
        done = super().work(texts)
        marker = Path(self.config.output.cache + ".died")
        if not marker.exists():
            marker.touch()
            os._exit(9)
        return done


def test_killed_encoder_loses_nothing(ray_runtime: str, make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that dies with rows not yet committed: the next round encodes just what is missing."""
    marker = make_config().output.cache + ".died"
    monkeypatch.setattr(encode_text, "TextWorker", Dying)
    text, _, _ = cache_all(make_config())
    assert Path(marker).exists()
    table = Table.open(text.table.uri)
    assert text.encoded == 7
    assert len(list(table.keys())) == len(set(table.keys())) == 8  # seven texts and the pad row
