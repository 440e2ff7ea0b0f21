"""Picture files for tests: noise, odd encodings, and pixels back on the 0..255 scale."""

import io
import struct
import zlib

import numpy as np

from flux2_core.config.sections import Latents
from flux2_core.data.pictures import load as pictures_load
from flux2_core.data.pictures.buckets import choose, place
from flux2_core.data.pictures.transform import Transform

SEED = 7


def noise(height=24, width=32, channels=3, seed=SEED):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def whole(height, width):
    return Transform(height, width, height, width, 0, 0)


def fit(width, height, side):
    """The centred crop of a picture at one resolution by the default settings."""
    bucket = choose(width, height, side, aspect="closest", upscale=False)
    return None if bucket is None else place(width, height, bucket)


def inspect(path, *, decode, **latents):
    return pictures_load.inspect(str(path), decode=decode, latents=Latents(**latents))


def load(path, transform, *, sha256=None, **latents):
    return pictures_load.load(str(path), transform, latents=Latents(**latents), sha256=sha256)


def eight_bit(path, height=24, width=32, **latents):
    """All pixels of a picture of this size, as numbers that can be negative."""
    return load(path, whole(height, width), **latents).astype(float)


def encoded(image, fmt, **options):
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def put(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return path


def png(width, height, depth, colour_type, raw, *chunks):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    extra = b"".join(chunk(kind, data) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def tiff(width, height, channels, raw, *, photometric, extra=None):
    """A little-endian TIFF of 16-bit channels in one strip; `extra`: what the last channel is (2: alpha)."""
    depths = struct.pack(f"<{channels}H", *[16] * channels)
    tags = {256: width, 257: height, 258: None, 259: 1, 262: photometric, 273: None, 277: channels, 278: height,
            279: len(raw)} | ({} if extra is None else {338: extra})  # fmt: skip
    behind = 8 + 2 + 12 * len(tags) + 4
    body = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    for tag, value in sorted(tags.items()):
        if tag == 258:
            held = depths.ljust(4, b"\0") if len(depths) <= 4 else struct.pack("<I", behind)
            body += struct.pack("<HHI", tag, 3, channels) + held
        else:
            body += struct.pack("<HHII", tag, 4, 1, behind + len(depths) if tag == 273 else value)
    return body + bytes(4) + depths + raw
