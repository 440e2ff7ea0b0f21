"""Decoding 12-megapixel JPEGs to the model's input: `latents.decoder = "fast"` against the bit-exact `"pil"`.

Both arms are the whole of what a decoding thread does: read, hash, decode, colour, turn, resize, crop. The
photos are random with the spectrum of natural ones (amplitude 1/f, little colour noise), about 4 MB each; once as a
camera writes them, and once as a phone does: on its side, with a Display P3 profile.
"""

from __future__ import annotations

import io
import struct
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from bench.measure import Row, alternate
from flux2_core.config.sections import Latents
from flux2_core.data.pictures import load
from flux2_core.data.pictures.buckets import choose, place

SIDE = 1024
SIZE = 3000, 4000
QUICK_SIZE = 300, 400
QUALITY = 88
DISPLAY_P3 = {b"rXYZ": (0.5151, 0.2412, -0.0011), b"gXYZ": (0.2920, 0.6922, 0.0419), b"bXYZ": (0.1571, 0.0666, 0.7841)}
SIDEWAYS = 6


def run(*, quick: bool = False) -> list[Row]:
    """Pictures per CPU second of both decoders."""
    with tempfile.TemporaryDirectory() as folder:
        rgb_HWC = _photo(*(QUICK_SIZE if quick else SIZE))
        exif = Image.Exif()
        exif[0x112] = SIDEWAYS
        phone = {"exif": exif, "icc_profile": _profile(DISPLAY_P3)}
        return [
            _compare(Path(folder, f"{name}.jpg"), rgb_HWC, name, quick=quick, **options)
            for name, options in {"camera, sRGB": {}, "phone, Display P3, turned": phone}.items()
        ]


def _compare(path: Path, rgb_HWC: npt.NDArray[np.uint8], name: str, *, quick: bool, **options: object) -> Row:
    Image.fromarray(rgb_HWC).save(path, quality=QUALITY, **options)
    seen = load.inspect(str(path), decode=False, latents=Latents())
    side = SIDE // 8 if quick else SIDE
    bucket = choose(seen.width, seen.height, side, aspect="closest", upscale=False)
    assert bucket is not None
    transform = place(seen.width, seen.height, bucket)
    ways = {
        decoder: partial(load.load, str(path), transform, latents=latents, sha256=seen.sha256)
        for decoder, latents in {"pil": Latents(), "fast": Latents(decoder="fast")}.items()
    }
    apart = np.abs(ways["pil"]().astype(float) - ways["fast"]())
    timings = alternate(ways, rounds=1 if quick else 7)
    return Row(
        "decode",
        f"{seen.width * seen.height / 1e6:.0f} MP, {path.stat().st_size / 1e6:.1f} MB ({name})",
        1 / timings.median("fast"),
        "pictures/CPU-s",
        theirs=1 / timings.median("pil"),
        ratio=timings.ratio("pil", "fast"),
        spread=timings.spread("pil", "fast"),
        goal=">= 2.5",
        note=f"to {bucket[1]}x{bucket[0]}; pixels {apart.mean():.2f} of 255 apart, at most {apart.max():.0f}",
    )


def _photo(height: int, width: int) -> npt.NDArray[np.uint8]:
    draw = np.random.default_rng(0)
    grey = _layer(height, width, 1.2, draw)
    channels = [grey + 0.25 * _layer(height, width, 1.4, draw) for _ in range(3)]
    return (np.stack(channels, axis=-1) * 45 + 128).clip(0, 255).astype(np.uint8)


def _layer(height: int, width: int, falloff: float, draw: np.random.Generator) -> npt.NDArray[np.float64]:
    """Noise of unit variance whose amplitude falls with frequency to this power."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = np.fft.irfft2(np.fft.rfft2(draw.standard_normal((height, width))) / frequency**falloff, (height, width))
    return (noise - noise.mean()) / noise.std()


def _profile(primaries: dict[bytes, tuple[float, float, float]]) -> bytes:
    """LittleCMS' own sRGB profile with other primaries (tags of type XYZ: 8 bytes, then three 16.16 numbers)."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(struct.unpack_from(">I", data, 128)[0]):
        tag, offset = struct.unpack_from(">4sI", data, 132 + 12 * number)
        if tag in primaries:
            struct.pack_into(">3i", data, offset + 8, *(round(value * 65536) for value in primaries[tag]))
    ImageCms.ImageCmsProfile(io.BytesIO(data))
    return bytes(data)
