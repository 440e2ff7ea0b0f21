"""The text encoder against diffusers' pipeline, on a small random model."""

from pathlib import Path

import pytest
import torch
from diffusers import Flux2Pipeline
from transformers import AutoTokenizer

from flux2_core.config import Model, Text
from flux2_core.errors import DataError
from flux2_core.model_folder import ModelFolder, resolve
from flux2_core.prompt_rows import rebuild
from flux2_core.text_encoder import PromptTokenizer, TextEncoder, batches

TEXTS = ["a red square", "", "a long caption of a small blue circle on the left of a green field " * 3]
LENGTH = 512


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ModelFolder:
    return resolve(Model(path=str(tiny_model)), parts=("text_encoder", "tokenizer", "transformer"))


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Flux2Pipeline:
    pipe = Flux2Pipeline.from_pretrained(tiny_model, tokenizer=None, vae=None, torch_dtype=torch.float32)
    pipe.register_modules(tokenizer=AutoTokenizer.from_pretrained(tiny_model / "tokenizer"))
    return pipe


@pytest.fixture(scope="module")
def reference_BLD(pipeline: Flux2Pipeline) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.encode_prompt(TEXTS, max_sequence_length=LENGTH)[0]


def encoded(model: ModelFolder, pads: str) -> torch.Tensor:
    encoder = TextEncoder(model, Text(dtype="fp32", pads=pads, max_length=LENGTH))
    pad_1D = encoder.pad_row()
    return torch.stack([rebuild(rows, pad_1D, max_length=LENGTH) for rows in encoder.encode(TEXTS)])


@pytest.mark.parametrize("pads", ["computed", "stored"])
def test_same_computation_gives_the_same_bits(model: ModelFolder, reference_BLD: torch.Tensor, pads: str) -> None:
    """Where the padded sequence is computed, rebuilt rows equal `Flux2Pipeline.encode_prompt` bit for bit."""
    assert torch.equal(encoded(model, pads), reference_BLD)


def test_skipped_pads_stay_within_rounding(model: ModelFolder, reference_BLD: torch.Tensor) -> None:
    """Real tokens alone, at their true positions, differ from the padded run by rounding only (1e-5 of the scale)."""
    ours = encoded(model, "skipped")
    assert (ours - reference_BLD).abs().max() <= 1e-5 * max(1.0, reference_BLD.abs().max())


def test_the_tolerance_has_teeth(model: ModelFolder, reference_BLD: torch.Tensor) -> None:
    """Taps one layer off, a mistake that other trainers made, are far outside every tolerance here."""
    encoder = TextEncoder(model, Text(dtype="fp32", pads="computed", max_length=LENGTH))
    encoder.taps = (9, 19, 29)
    off = encoder.encode(TEXTS)[0]
    assert (off - reference_BLD[0, -off.shape[0] :]).abs().max() > 1e-2


def test_only_thirty_layers_are_loaded(model: ModelFolder) -> None:
    """Of the encoder's 32 layers, only those that the deepest tap needs are built, and no final norm."""
    encoder = TextEncoder(model, Text(dtype="fp32", max_length=LENGTH))
    assert len(encoder.language_model.layers) == 30
    assert isinstance(encoder.language_model.norm, torch.nn.Identity)


def test_projected_rows_equal_projecting_later(model: ModelFolder, reference_BLD: torch.Tensor) -> None:
    """`text.stored = "projected"` stores exactly what the transformer's `context_embedder` would make of the rows."""
    encoder = TextEncoder(model, Text(dtype="fp32", pads="computed", stored="projected", max_length=LENGTH))
    pad = encoder.pad_row()
    ours = torch.stack([rebuild(rows, pad, max_length=LENGTH) for rows in encoder.encode(TEXTS)])
    assert encoder.projection_ID is not None
    assert torch.equal(ours, torch.nn.functional.linear(reference_BLD, encoder.projection_ID))


def test_control_strings_are_text(model: ModelFolder) -> None:
    """`[INST]` and `</s>` in a caption never become control tokens, and `[IMG]` is dropped as in the reference."""
    tokenizer = PromptTokenizer(model, max_length=LENGTH)
    controls = set(tokenizer.tokenizer.all_special_ids)
    plain, nasty = tokenizer.ids("x"), tokenizer.ids("x [INST] </s> [/INST]")
    assert sum(i in controls for i in nasty) == sum(i in controls for i in plain)
    assert tokenizer.ids("a [IMG]b") == tokenizer.ids("a b")


def test_template_split_equals_whole_template(model: ModelFolder) -> None:
    """Gluing prefix, plain caption and suffix together gives the same ids as the chat template."""
    tokenizer = PromptTokenizer(model, max_length=LENGTH)
    for text in ("a red square", " leading space", "ünïcode\nnewline"):
        glued = [*tokenizer.prefix, *tokenizer._split(text, plain=True), *tokenizer.suffix]
        assert glued == tokenizer.ids(text)


def test_max_length_must_hold_the_template(model: ModelFolder) -> None:
    """A `text.max_length` that the template alone fills is refused with its size."""
    with pytest.raises(DataError, match="template alone takes"):
        PromptTokenizer(model, max_length=16)


def test_batches_respect_the_budget_and_lose_nothing() -> None:
    """Every index is in one batch, and longest * count never exceeds the budget unless alone."""
    lengths = [5, 90, 12, 40, 40, 7, 300]
    groups = batches(lengths, budget=100)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(g) == 1 or max(lengths[i] for i in g) * len(g) <= 100 for g in groups)
    assert all(min(lengths[i] for i in g) >= 0.8 * max(lengths[i] for i in g) for g in groups)
    assert [3, 4] in groups
