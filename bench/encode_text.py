"""Text encoding: 30 layers over real tokens in length-sorted batches, against 40 layers over 512 padded tokens.

The peers' path is diffusers' own function, which every trainer of FLUX.2 calls or repeats: the whole
Mistral3ForConditionalGeneration, prompts padded to 512, hidden states of all layers kept. Both arms start at the text
and end at the (n, 3 x hidden) rows, and their values are compared before anything is measured.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from diffusers import Flux2Pipeline
from transformers import AutoTokenizer, Mistral3ForConditionalGeneration

from bench import captions
from bench.measure import Row, alternate
from flux2_core.config.sections import Model, Text
from flux2_core.embedded.tiny_model import ModelShape, build_model
from flux2_core.model.folder import resolve
from flux2_core.model.text_encoder import TextEncoder, passes

SHAPE = ModelShape(text_width=192, text_heads=4, text_layers=40, text_ff=768)
QUICK_SHAPE = ModelShape(text_layers=40)
THEIR_BATCH = 4
MAX_LENGTH = 512


def run(*, quick: bool = False) -> list[Row]:
    """Captions per CPU second of both ways, on one random model of 40 layers."""
    with tempfile.TemporaryDirectory() as folder:
        path = build_model(Path(folder), shape=QUICK_SHAPE if quick else SHAPE)
        model = resolve(Model(path=str(path)), parts=("text_encoder", "tokenizer"))
        encoder = TextEncoder(model, Text(dtype="fp32", max_length=MAX_LENGTH))
        whole = Mistral3ForConditionalGeneration.from_pretrained(path / "text_encoder", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer", padding_side="left", trust_remote_code=False)
    wanted = captions.lengths(4 if quick else 16)
    texts = captions.texts(wanted, count_tokens=lambda text: encoder.tokenizer.counts([text])[0])

    def ours() -> dict[str, torch.Tensor]:
        rows: dict[str, torch.Tensor] = {}
        for members in passes(texts, encoder.tokenizer, encoder.text):
            rows |= zip(members, encoder.encode(members), strict=True)
        return rows

    @torch.inference_mode()
    def theirs() -> dict[str, torch.Tensor]:
        rows: dict[str, torch.Tensor] = {}
        for start in range(0, len(texts), THEIR_BATCH):
            members = texts[start : start + THEIR_BATCH]
            embeds_BLD = Flux2Pipeline._get_mistral_3_small_prompt_embeds(
                text_encoder=whole, tokenizer=tokenizer, prompt=members, max_sequence_length=MAX_LENGTH
            )
            rows |= zip(members, embeds_BLD, strict=True)
        return rows

    _same(ours(), theirs())
    timings = alternate({"ours": ours, "theirs": theirs}, rounds=1 if quick else 3, warm=True)
    mean = sum(encoder.tokenizer.counts(texts)) / len(texts)
    bound = whole.config.text_config.num_hidden_layers / max(model.family.taps) * MAX_LENGTH / mean
    return [
        Row(
            "encode_text",
            f"{len(texts)} captions, mean {mean:.0f} tokens",
            len(texts) / timings.median("ours"),
            "captions/CPU-s",
            theirs=len(texts) / timings.median("theirs"),
            ratio=timings.ratio("theirs", "ours"),
            spread=timings.spread("theirs", "ours"),
            goal=">= 3",
            note=f"layers x tokens alone give {bound:.2f}",
        )
    ]


def _same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Both arms must do the same job: our rows are the last ones of their padded prompts."""
    for text, rows_ND in ours.items():
        torch.testing.assert_close(rows_ND, theirs[text][-len(rows_ND) :], rtol=1e-3, atol=1e-3)
