"""Decoding: the fast decoder gives about Pillow's picture, takes only what it should, and judges no file itself."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from flux2_core.config.sections import Latents
from flux2_core.data.pictures import decode
from flux2_core.errors import DataError
from tests.flux2_core.data.pictures.test_colour import DISPLAY_P3, icc_profile
from tests.flux2_core.pictures import encoded, fit, inspect, load, noise, put

FAST = {"decoder": "fast"}


def photo(height=600, width=900):
    """Smooth, with an edge."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1).astype(np.uint8)
    rgb[height // 3 : height // 2, width // 4 : width // 2] = (250, 240, 10)
    return rgb


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_fast_picture_is_nearly_pillows(tmp_path, orientation, mode):
    """Shrunk while loading, in every orientation, colour and grey, with a profile: within a level or two on average."""
    exif = Image.Exif()
    exif[0x112] = orientation
    profile = {"icc_profile": icc_profile(b"RGB ", 2.2, DISPLAY_P3)} if mode == "RGB" else {}
    data = encoded(Image.fromarray(photo()).convert(mode), "JPEG", quality=92, exif=exif, **profile)
    path = put(tmp_path, "x.jpg", data)
    seen = inspect(path, decode=True, **FAST)
    assert replace(seen, look=None) == replace(inspect(path, decode=True), look=None)
    transform = fit(seen.width, seen.height, 128)
    slow, fast = (load(path, transform, **options).astype(float) for options in ({}, FAST))
    assert fast.shape == slow.shape
    assert 0 < np.abs(fast - slow).mean() < 2


@pytest.mark.parametrize("size", [(900, 600), (450, 300), (451, 301), (113, 75), (10, 10), (1, 1)])
def test_it_shrinks_but_never_below_what_is_asked(tmp_path, size):
    """The decoded size is the least eighth of the whole that covers the wanted one."""
    data = encoded(Image.fromarray(photo()), "JPEG")
    image = Image.open(put(tmp_path, "x.jpg", data))
    width, height = decode.pixels(image, data, latents=Latents(**FAST), width=size[0], height=size[1]).size
    scaled = [(-(-900 * eighths // 8), -(-600 * eighths // 8)) for eighths in range(1, 9)]
    assert (width, height) == next(s for s in scaled if s[0] >= size[0] and s[1] >= size[1])


def test_the_last_resize_is_torchs_and_within_a_level_of_pillows(tmp_path):
    """What is decoded whole differs from Pillow's by its filter alone, and comes in exactly the size asked for."""
    data = encoded(Image.fromarray(photo()), "JPEG", quality=95)
    image = Image.open(put(tmp_path, "x.jpg", data))
    resized_HWC = decode.resized(image, data, latents=Latents(**FAST), height=590, width=880)
    pillows_HWC = np.asarray(image.resize((880, 590), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(resized_HWC - pillows_HWC).max() <= 1
    assert decode.resized(image, data, latents=Latents(), height=590, width=880) is None


def test_planning_with_the_fast_decoder_loads_no_torch(tmp_path):
    """`plan` decodes every picture of a small data set; its start does not wait for torch."""
    path = put(tmp_path, "x.jpg", encoded(Image.fromarray(photo()), "JPEG"))
    code = (
        "import sys; from flux2_core.data.pictures import load; from flux2_core.config.sections import Latents; "
        f"seen = load.inspect({str(path)!r}, decode=True, latents=Latents(decoder='fast')); "
        "assert seen.look and not seen.problem; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "TIFF", "GIF"])
def test_what_is_no_jpeg_is_pillows_bit_for_bit(tmp_path, fmt):
    """Other formats, and CMYK JPEGs, are the same under both settings."""
    path = put(tmp_path, f"x.{fmt.lower()}", encoded(Image.fromarray(noise(64, 64)), fmt))
    assert np.array_equal(load(path, fit(64, 64, 64)), load(path, fit(64, 64, 64), **FAST))
    cmyk = put(tmp_path, "cmyk.jpg", encoded(Image.new("CMYK", (64, 64), (0, 99, 200, 9)), "JPEG"))
    assert np.array_equal(load(cmyk, fit(64, 64, 64)), load(cmyk, fit(64, 64, 64), **FAST))


def test_damage_is_judged_by_pillow(tmp_path):
    """Cut anywhere, a JPEG is refused under both settings with the same words, and never padded with grey."""
    data = encoded(Image.fromarray(noise(200, 200)), "JPEG")
    for part in (0.3, 0.6, 0.9):
        path = put(tmp_path, "x.jpg", data[: int(len(data) * part)])
        problem = inspect(path, decode=True).problem
        assert "damaged" in problem
        assert inspect(path, decode=True, **FAST).problem == problem
        with pytest.raises(DataError, match="damaged"):
            load(path, fit(200, 200, 64), **FAST)
