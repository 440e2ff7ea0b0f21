"""Rebuilds the embedded model from a seed: `python -m flux2_core.embedded.build [--work FOLDER] [--seed N]`.

Resumable: what the work folder holds is gone on with; `--out` is written at the end. Takes one to two and a half hours
on two CPU cores. The text encoder stays random, and the transformer learns to read it: each token keeps an embedding of
its own (unit variance, layers scaled by 0.2), so a random encoder is a fixed code of words and context.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flux2_core.config.sections import Model
from flux2_core.embedded import MODEL_FOLDER
from flux2_core.embedded.score import load_transformer, score_drawings, score_vae
from flux2_core.embedded.shapes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, tokenizer_corpus
from flux2_core.embedded.tiny_model import ModelShape, build_model
from flux2_core.embedded.train_model import PICTURES, PLAN, TEXT, cache_lesson, train_transformer
from flux2_core.embedded.train_vae import PLAN as VAE_PLAN
from flux2_core.embedded.train_vae import train_vae
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.model.vae import Vae

SHAPE = ModelShape(
    text_width=64,
    text_heads=4,
    text_ff=96,
    vocabulary=768,
    whole_sentences=True,
    layer_gain=0.2,
    vae_widths=(16, 16, 32, 64),
    vae_attention=False,
    heads=5,
    head_width=32,
    rope_axes=(8, 8, 8, 8),
    double_blocks=2,
    single_blocks=4,
    time_channels=64,
)
PARTS = ("text_encoder", "vae", "transformer")
CARD = Path(__file__).with_name("card.md")

logger = logging.getLogger(__name__)


def rebuild(out: Path, *, work: Path, seed: int) -> dict[str, float]:
    """Train everything that is not trained yet, write the model folder, and measure it.

    Returns:
        Seconds of each part, and the figures of `flux2_core.embedded.score`.
    """
    work.mkdir(parents=True, exist_ok=True)
    folder = work / "model"
    if not (folder / "model_index.json").exists():
        build_model(folder, shape=SHAPE, seed=seed, corpus=tokenizer_corpus())
        store_as(folder / "text_encoder", torch.bfloat16)  # before training: the transformer learns the shipped one
    model = resolve(Model(path=str(folder)), parts=PARTS)
    figures = {"seconds vae": train_vae_part(model, work=work, seed=seed)}
    figures["seconds transformer"] = train_transformer_part(model, work=work, seed=seed)
    shutil.copytree(folder, out, dirs_exist_ok=True)
    shipped = resolve(Model(path=str(out)), parts=PARTS)
    figures |= {f"psnr {kind}": value for kind, value in score_vae(shipped).items()}
    figures |= score_drawings(shipped, load_transformer(shipped))
    (out / "README.md").write_text(card(figures, seed=seed), encoding="utf-8")
    return figures


def train_vae_part(model: ModelFolder, *, work: Path, seed: int) -> float:
    """Train the VAE in place, or finish it; returns the seconds of all sittings."""
    vae = Vae(model).vae.requires_grad_(True)
    seconds = train_vae(vae, work=work, seed=seed)
    vae.to(memory_format=torch.contiguous_format).save_pretrained(str(model.path / "vae"), safe_serialization=True)
    store_as(model.path / "vae", torch.float16)
    return seconds


def train_transformer_part(model: ModelFolder, *, work: Path, seed: int) -> float:
    """Train the transformer in place, or finish it; returns the seconds of all sittings."""
    lesson = cache_lesson(model, file=work / "lesson.safetensors", seed=seed)
    transformer = load_transformer(model).requires_grad_(True)
    seconds = train_transformer(transformer, lesson, work=work, seed=seed)
    transformer.save_pretrained(str(model.path / "transformer"), safe_serialization=True)
    store_as(model.path / "transformer", torch.bfloat16)
    return seconds


def store_as(part: Path, dtype: torch.dtype) -> None:
    """Store the floating-point tensors of a part in half the bytes; loading brings them back to fp32.

    Its configuration forgets the path that it was loaded from.
    """
    config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in part.glob("*.safetensors"):
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)


def card(figures: Mapping[str, float], *, seed: int) -> str:
    """The card of a built model, `model/README.md`, from what it measured."""
    tables = {"shapes": SHAPES, "colours": COLOURS, "sizes": SIZES, "places": PLACES, "backgrounds": BACKGROUNDS}
    words = {name: ", ".join(table) for name, table in tables.items()}
    counts = {"length": TEXT.max_length, "vae_steps": VAE_PLAN.steps, "pictures": PICTURES, "seed": seed}
    told = {**words, **counts, "steps": PLAN.steps, "batch": PLAN.batch, **figures}
    return CARD.read_text(encoding="utf-8").format_map(told)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m flux2_core.embedded.build", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="checkpoints and caches")
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="where the finished model is written")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    figures = rebuild(chosen.out, work=chosen.work, seed=chosen.seed)
    sys.stdout.write(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
