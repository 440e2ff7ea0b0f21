"""What a configuration asks of rows: the part of both fingerprints that training compares with a cache's tables.

Training cannot recompute what comes from encoder files (`cache.fingerprints`), and depends on none of it.
"""

from __future__ import annotations

from typing import Any

from flux2_core.config.sections import Config
from flux2_core.errors import SetupError
from flux2_core.model.folder import PROJECTION, ModelFolder
from flux2_core.store.hashing import tensor_sha256

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


def latents_settings(config: Config) -> dict[str, Any]:
    """The part of a latents fingerprint that training depends on: it decodes no picture.

    The recipe's settings are among those that the index was found by (`index.settings`). fp32 is not said, as before.
    """
    latents = config.latents
    return {"dtype": latents.dtype} | ({} if latents.precision == "fp32" else {"precision": latents.precision})


def _projection(model: ModelFolder) -> str:
    """Hash of the frozen weight that projected rows went through; training has it too, so it is a setting."""
    if file := model.tensor_files("transformer").get(PROJECTION):
        return tensor_sha256(file, PROJECTION)
    raise SetupError(f"{model.path / 'transformer'}: the files lack {PROJECTION}; download the model again")
