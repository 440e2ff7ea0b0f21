"""The fingerprints of the two tensor tables, made of files and settings; no model is loaded.

Training cannot recompute the parts that come from encoder files: it compares `settings` alone (`cache.index`).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import PIL
from PIL import features

from flux2_core.config.sections import Config, Latents
from flux2_core.errors import SetupError
from flux2_core.model.folder import PROJECTION, ModelFolder
from flux2_core.store.hashing import digest, files_digest, tensor_sha256

ATTENTION = "sdpa"


def text_settings(model: ModelFolder, config: Config) -> dict[str, Any]:
    """The part of a text fingerprint that follows from settings and the transformer's configuration.

    None stands for what must not be in it, so that a later setting's default finds the rows of before.
    """
    projected = config.text.stored == "projected"
    ragged = model.family.ragged and config.text.pads != "stored"
    return {
        "attention": ATTENTION,
        "counted": None if ragged else "tokens",  # of a full table; an older one counted pads too
        "dtype": config.text.dtype,
        "family": model.family.name,
        "int8_rows": config.text.int8_rows or None,
        "layers": list(model.family.taps),
        "max_length": config.text.max_length,
        "pads": config.text.pads if ragged else "stored",  # the self-test's verdict: it refuses a ragged table
        "projection": _projection(model) if projected else None,
        "quantize": None if config.text.quantize == "none" else config.text.quantize,
        "stored": config.text.stored,
        "system_message": model.family.system_message,
        "tokens": None if config.text.tokens == "reference" else config.text.tokens,
        "width": model.inner_width if projected else model.text_width,
    }


def text_fingerprint(model: ModelFolder, config: Config) -> dict[str, Any]:
    """Everything that the bytes of a text row depend on, beside the text itself."""
    files = {
        "encoder_files": files_digest(model.path / "text_encoder", _names(model, "text_encoder")),
        "tokenizer_files": files_digest(model.path / "tokenizer", _tokenizer_names(model)),
        "tokenizers_version": version("tokenizers"),
    }
    if config.text.quantize != "none":
        files["quanto_version"] = version("optimum-quanto")
    return {name: value for name, value in (text_settings(model, config) | files).items() if value is not None}


def latents_settings(config: Config) -> dict[str, Any]:
    """The part of a latents fingerprint that training depends on: it decodes no picture.

    The recipe's settings are among those that the index was found by (`index.settings`).
    """
    return {"dtype": config.latents.dtype}


def latents_fingerprint(model: ModelFolder, config: Config) -> dict[str, Any]:
    """Everything that the bytes of a latent row depend on, beside the picture and its transform."""
    vae_files = files_digest(model.path / "vae", _names(model, "vae"))
    return latents_settings(config) | {"image": digest(recipe(config.latents)), "vae_files": vae_files}


def _projection(model: ModelFolder) -> str:
    """Hash of the frozen weight that projected rows went through; training has it too, so it is a setting."""
    if file := model.tensor_files("transformer").get(PROJECTION):
        return tensor_sha256(file, PROJECTION)
    raise SetupError(f"{model.path / 'transformer'}: the files lack {PROJECTION}; download the model again")


def _names(model: ModelFolder, part: str) -> list[str]:
    return ["config.json", *(file.name for file in model.weight_files(part))]


def _tokenizer_names(model: ModelFolder) -> list[str]:
    return sorted(
        file.name
        for file in (model.path / "tokenizer").iterdir()
        if file.suffix in {".json", ".jinja", ".txt", ".model"}
    )


def recipe(latents: Latents, versions: Mapping[str, str | None] | None = None) -> dict[str, str | None]:
    """Everything that the pixels depend on besides the file and the transform; part of the latents' fingerprint.

    `versions`: of the libraries of another time; unset: of those that are here.
    """
    used = picture_libraries() if versions is None else versions
    made = {
        "orientation": "EXIF applied",
        "frame": "first",
        "colour": "ICC to sRGB, perceptual; without a profile taken as sRGB",
        "alpha": f"over {latents.background.lower()}, before resizing",
        "sixteen_bit": "grey (x+128)//257, colour high byte",
        "resize": "PIL BILINEAR, antialiased",
        "range": "((x/255)-0.5)/0.5 in fp32",
        "mask": "alpha over black, grey, resized and cropped like the picture, mean of 16x16 px in 8 bits",
        **{name: used[name] for name in ("pillow", "libjpeg_turbo", "littlecms2")},
    }
    if latents.decoder == "fast":
        with_torch = f"then bilinear, antialiased by torch {used['torch']}, then colour"
        shrunk = f"undamaged RGB and grey JPEGs at the least n/8 that covers the resized picture, {with_torch}"
        made["decoder"] = f"simplejpeg {used['simplejpeg']}: {shrunk}; others by Pillow"
    return made


def picture_libraries() -> dict[str, str | None]:
    """Versions of everything that pictures are decoded with."""
    compiled = {name: features.version(name) for name in ("libjpeg_turbo", "littlecms2")}
    torch = version("torch").partition("+")[0]
    return {"pillow": PIL.__version__, **compiled, "simplejpeg": version("simplejpeg"), "torch": torch}
