"""Pictures: what a file really is, and its pixels as the model sees them.

A file's first bytes decide what it is, never its name. `inspect` and `load` judge by the same code, so a picture that
`plan` did not open is refused by the encoder for the same reason.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import numpy.typing as npt
import PIL
from PIL import ExifTags, Image

from flux2_core.config.sections import Latents
from flux2_core.data.pictures import colour, likeness
from flux2_core.data.pictures import decode as pictures_decode
from flux2_core.data.pictures.transform import Transform
from flux2_core.data.sources import read
from flux2_core.errors import DataError

MAX_PIXELS = 100_000_000

PICTURE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif",
    ".heic", ".heif", ".svg", ".jp2", ".j2k", ".jxl", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf",
    ".rw2", ".raf", ".exr", ".hdr", ".ico", ".ppm", ".pgm", ".tga",
})  # fmt: skip
"""Names that promise a picture; some formats among them are then refused with a reason, never passed over."""
_RAW_SUFFIXES = frozenset({".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"})

_FORMATS = {  # that are read, with the names that promise them
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
    "PNG": {".png", ".apng"},
    "GIF": {".gif"},
    "WEBP": {".webp"},
    "TIFF": {".tif", ".tiff"},
    "BMP": {".bmp", ".dib"},
    "AVIF": {".avif"},
}
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF"),
    (b"\0\x05\x16\x07", "an AppleDouble file (macOS metadata, no picture)"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\x01\0", "an icon file"),
)
# What Pillow's decoders were seen to raise on damaged files; `test_damage_never_crashes` damages 120 of each format.
_BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, EOFError, RuntimeError, AttributeError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip

# Pillow would raise at twice its limit and only warn below; `_open` checks the exact one.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


@dataclass(frozen=True)
class Inspected:
    """What a file is: sha256 of its bytes, oriented size in pixels, the problem that excludes it, and warnings."""

    sha256: str
    width: int
    height: int
    problem: str | None = None
    warnings: tuple[str, ...] = ()
    look: bytes | None = None
    """How it looks (`flux2_core.data.pictures.likeness`), where it was decoded."""


def kind(head: bytes) -> str:
    """What the first bytes (256 are enough) say: a Pillow format that we read, or words for what else it is."""
    if not head:
        return "empty (0 bytes)"
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = {head[at : at + 4] for at in range(8, min(len(head), struct.unpack(">I", head[:4])[0]), 4)}
        return "AVIF" if brands & {b"avif", b"avis"} else _not_avif(brands)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "HTML (a web page saved under a picture's name?)"
    if b"<svg" in start:
        return "SVG (drawings have no pixels)"
    if _is_text(head):
        return "text"
    return f"of no known format (starts with {head[:8].hex(' ')})"


def inspect(uri: str, *, decode: bool, latents: Latents) -> Inspected:
    """Read a file once: its hash, its oriented size, and whether it can be used.

    Args:
        uri: A picture (`flux2_core.data.sources.read`).
        decode: Decode every pixel too, which finds damage that the header does not show.
        latents: Which decoder.

    Never raises for what the file holds: that is `problem`, a reason without the URI.
    """
    sha256, look = "", None
    try:
        data = read.read(uri)
        sha256 = hashlib.sha256(data).hexdigest()
        image, warnings = _open(data, name=uri)
        width, height, more = _oriented_size(image, data)
        if decode:
            pixels = pictures_decode.pixels(image, data, latents=latents, height=36, width=36)
            small = colour.eight_bits(pixels).resize((36, 36), Image.Resampling.BOX, reducing_gap=1.0)
            look = likeness.look(_turn(colour.to_srgb(small, background=latents.background), _orientation(image)))
    except DataError as error:
        return Inspected(sha256, 0, 0, str(error))
    except _BROKEN as error:
        return Inspected(sha256, 0, 0, _damage(error))
    return Inspected(sha256, width, height, None, (*warnings, *more), look)


def load(uri: str, transform: Transform, *, latents: Latents, sha256: str | None = None) -> npt.NDArray[np.uint8]:
    """Pixels_HWC of a picture as the model sees it: 8-bit sRGB (bucket_height, bucket_width, 3), for `Vae.encode`.

    Args:
        uri: A picture (`flux2_core.data.sources.read`).
        transform: Resize, crop and flip, in the pixels of the oriented picture.
        latents: Decoder, and the colour behind transparent pixels.
        sha256: Hash that the file must still have.

    Raises:
        DataError: the file is no readable picture, or no longer the one that was planned; the message names it.
    """
    try:
        data = read.read(uri)
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise DataError("the file has changed since it was planned; run again")
        image, _ = _open(data, name=uri)
        return _crop(_resized(image, data, transform, latents), transform)
    except DataError as error:
        raise DataError(f"{uri}: {error}") from None
    except _BROKEN as error:
        raise DataError(f"{uri}: {_damage(error)}") from error


def _resized(image: Image.Image, data: bytes, transform: Transform, latents: Latents) -> npt.NDArray[np.uint8]:
    """RGB_HWC of an opened picture: decoded, converted, turned and resized, not yet cropped."""
    height, width = transform.resize_height, transform.resize_width
    stored = (width, height) if _orientation(image) in _SIDEWAYS else (height, width)
    pixels_HWC = pictures_decode.resized(image, data, latents=latents, height=stored[0], width=stored[1])
    if pixels_HWC is not None and colour.is_srgb(image) and _orientation(image) == 1:
        return pixels_HWC  # nothing left to do: through Pillow and back would be 4 ms of 75
    picture = pictures_decode.picture(pixels_HWC, image)
    # asked again: the EXIF block of a PNG may lie behind its pixels, and a TIFF is turned while it is decoded
    rgb = _turn(colour.to_srgb(picture, background=latents.background), _orientation(image))
    return np.asarray(rgb if rgb.size == (width, height) else rgb.resize((width, height), Image.Resampling.BILINEAR))


def _crop(rgb_HWC: npt.NDArray[np.uint8], transform: Transform) -> npt.NDArray[np.uint8]:
    left, top = transform.crop_left, transform.crop_top
    crop_HWC = rgb_HWC[top : top + transform.bucket_height, left : left + transform.bucket_width]
    return (crop_HWC[:, ::-1] if transform.flip else crop_HWC).copy()


def _open(data: bytes, *, name: str) -> tuple[Image.Image, list[str]]:
    """Open by content, refuse what cannot be used, collect warnings. Pixels are not decoded yet."""
    found = kind(data[:256])
    suffix = PurePath(name).suffix.lower()
    if suffix in _RAW_SUFFIXES:
        raise DataError("camera raw files are not developed; export as JPEG, PNG or TIFF")
    if found not in _FORMATS:
        raise DataError(f"the file is {found}; use JPEG, PNG, WebP, TIFF, AVIF, GIF or BMP")
    if found == "PNG":  # Pillow checks no CRC of pixel data while decoding; this does, and finds a missing end
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()
    image = Image.open(io.BytesIO(data), formats=[found])
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height} = {image.width * image.height / 1e6:.0f} megapixels"
        raise DataError(f"{size}; up to {MAX_PIXELS // 10**6} are read: scale it down")
    warnings = colour.prepare(image)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # phones append a preview or gain map to a JPEG and call that MPO
        warnings.append("several frames or pages: the first is used")
    if suffix in PICTURE_SUFFIXES and suffix not in _FORMATS[found]:
        warnings.append(f"the file is {found}, its name says {suffix}: read as {found}")
    return image, warnings


def _oriented_size(image: Image.Image, data: bytes) -> tuple[int, int, list[str]]:
    width, height = image.size
    if image.format == "TIFF":  # Pillow turns TIFFs itself, and says so in `size` before decoding
        return width, height, []
    if image.format == "PNG" and not any(mark in data for mark in (b"eXIf", b"Raw profile type", b"XML:com.adobe")):
        return width, height, []  # Pillow would decode the whole picture to look for EXIF after the pixels
    orientation = _orientation(image)
    if orientation is None:
        return width, height, ["its EXIF block cannot be read: the picture is taken as stored, not turned"]
    return (height, width, []) if orientation in _SIDEWAYS else (width, height, [])


def _orientation(image: Image.Image) -> object:
    """The EXIF orientation, 1..8 in a sound file; None when the block cannot be read."""
    try:
        exif = image.getexif()
    except (SyntaxError, ValueError, LookupError, struct.error):
        return None
    return exif.get(ExifTags.Base.Orientation, 1)


_SIDEWAYS = (5, 6, 7, 8)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn(rgb: Image.Image, orientation: object) -> Image.Image:
    turn = next((turn for value, turn in _TURNS.items() if value == orientation), None)
    return rgb if turn is None else rgb.transpose(turn)


def _is_text(head: bytes) -> bool:
    try:  # incremental: the cut at 256 bytes may fall inside a character
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(byte >= 32 or byte in b"\t\r\n\f" for byte in head)


def _not_avif(brands: set[bytes]) -> str:
    if brands & {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}:
        return "HEIC (export it as JPEG, or convert it to AVIF or PNG)"
    return "a video or another ISO media file"


def _damage(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "damaged or too large: decoding ran out of memory"
    if isinstance(error, PIL.UnidentifiedImageError):  # 16-bit grey with alpha in a TIFF, say
        return "damaged, or of a kind that is not read: save it again as PNG, 8 or 16-bit"
    return f"damaged picture ({str(error).strip() or type(error).__name__})"
