"""The text encoder against diffusers' pipeline, on a small random model."""

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from transformers import AutoTokenizer

from flux2_core.config.sections import Model, Text
from flux2_core.embedded.tiny_model import build_klein_model
from flux2_core.errors import DataError
from flux2_core.model import text_encoder
from flux2_core.model import tokenizer as prompt_tokenizer
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.model.quanto import QTYPES, QuantizedLinear, dequantize
from flux2_core.model.text_encoder import TextEncoder, batches, passes
from flux2_core.model.tokenizer import PromptTokenizer

TEXTS = ["a red square", "", "a long caption of a small blue circle on the left of a green field " * 3]
LENGTH = 512


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ModelFolder:
    return resolve(Model(path=str(tiny_model)), parts=("text_encoder", "tokenizer", "transformer"))


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    folder = build_klein_model(tmp_path_factory.mktemp("klein"))
    return resolve(Model(path=str(folder), family="klein"), parts=("text_encoder", "tokenizer", "transformer"))


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
    return torch.stack([whole(rows, pad_1D) for rows in encoder.encode(TEXTS)])


def whole(rows: torch.Tensor, pad_1D: torch.Tensor | None) -> torch.Tensor:
    """All rows of a prompt, pads first."""
    return rows if pad_1D is None else torch.cat([pad_1D.expand(LENGTH - len(rows), -1), rows])


@pytest.mark.parametrize("pads", ["computed", "stored"])
def test_same_computation_gives_the_same_bits(model: ModelFolder, reference_BLD: torch.Tensor, pads: str) -> None:
    """Where the padded sequence is computed, rebuilt rows equal `Flux2Pipeline.encode_prompt` bit for bit."""
    assert torch.equal(encoded(model, pads), reference_BLD)


BACKENDS = {"flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp"}


def allowed() -> set[str]:
    return {name for name in BACKENDS if getattr(torch.backends.cuda, f"{name}_enabled")()}


@pytest.mark.parametrize(
    ("gpu", "wanted"), [(False, {"flash_sdp", "math_sdp"}), (True, {"mem_efficient_sdp", "math_sdp"})]
)
def test_attention_gives_masked_rows_values(
    model: ModelFolder,
    reference_BLD: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gpu: bool,
    wanted: set[str],
) -> None:
    """Whatever torch prefers, a pad's row never goes to cuDNN: on a GPU attention is efficient or plain, on a CPU what
    it was. The log names both, other modules keep their choice, and the rows are those of the reference."""
    monkeypatch.setattr(text_encoder.accelerator, "is_gpu", lambda _device: gpu)
    before, seen = allowed(), []
    with caplog.at_level(logging.INFO):
        encoder = TextEncoder(model, Text(dtype="fp32", pads="stored", max_length=LENGTH))
    for layer in encoder.language_model.layers:
        layer.register_forward_pre_hook(lambda _module, _inputs: seen.append(allowed()))
    rows_BLD = torch.stack(encoder.encode(TEXTS))
    assert seen == [wanted] * len(encoder.language_model.layers)
    assert allowed() == before == BACKENDS
    assert ("efficient_attention or math" in caplog.text) == gpu
    assert (rows_BLD - reference_BLD).abs().max() <= (1e-5 * reference_BLD.abs().max() if gpu else 0)


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
    ours = torch.stack([whole(rows, pad) for rows in encoder.encode(TEXTS)])
    assert encoder.projection_ID is not None
    assert torch.equal(ours, torch.nn.functional.linear(reference_BLD, encoder.projection_ID))


def test_control_strings_are_text(model: ModelFolder) -> None:
    """`[INST]` and `</s>` in a caption never become control tokens, and `[IMG]` is dropped as in the reference."""
    tokenizer = PromptTokenizer(model, max_length=LENGTH)
    controls = {number for number, token in tokenizer.tokenizer.get_added_tokens_decoder().items() if token.special}
    plain, nasty, images, bare = tokenizer.ids(["x", "x [INST] </s> [/INST]", "a [IMG]b", "a b"])
    assert sum(i in controls for i in nasty) == sum(i in controls for i in plain)
    assert images == bare


def test_template_split_equals_whole_template(model: ModelFolder) -> None:
    """Gluing prefix, plain caption and suffix together gives the same ids as the chat template."""
    tokenizer = PromptTokenizer(model, max_length=LENGTH)
    for text in ("a red square", " leading space", "ünïcode\nnewline"):
        glued = [*tokenizer.prefix, *tokenizer._split([text], plain=True)[0], *tokenizer.suffix]
        assert glued == tokenizer.ids([text])[0]


def test_many_texts_at_once(model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and counts of many texts are those of each alone, in order, over the tokenizer's portions."""
    tokenizer = PromptTokenizer(model, max_length=64)
    texts = [*TEXTS, "x [INST] y", "", "zebra " * 90, "a [IMG]b"]
    alone = [tokenizer.ids([text])[0] for text in texts]
    monkeypatch.setattr(prompt_tokenizer, "TEXTS_AT_ONCE", 3)
    assert tokenizer.ids(texts) == alone
    assert tokenizer.counts(texts) == [len(ids) for ids in alone]
    assert tokenizer.kept(texts) == [ids[:64] for ids in alone]
    assert max(map(len, alone)) > 64
    assert tokenizer.counts([]) == []


def test_passes_hold_texts_of_like_length(model: ModelFolder) -> None:
    """Every text is in one pass, longest first; where pads are computed each costs the whole length."""
    tokenizer = PromptTokenizer(model, max_length=LENGTH)
    texts = [f"{'word ' * (7 * n % 50)}{n}" for n in range(40)]
    groups = list(passes(texts, tokenizer, Text()))
    assert sorted(itertools.chain(*groups)) == sorted(texts)
    lengths = [tokenizer.counts(group) for group in groups]
    assert all(min(counts) >= 0.8 * max(counts) for counts in lengths)
    assert [max(counts) for counts in lengths] == sorted((max(counts) for counts in lengths), reverse=True)
    assert [len(group) for group in passes(texts, tokenizer, Text(pads="computed"))] == [16, 16, 8]


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


def test_klein_gives_the_same_bits(klein: ModelFolder) -> None:
    """klein's 512 rows equal `Flux2KleinPipeline.encode_prompt` bit for bit (taps 9/18/27, no thinking)."""
    pipe = Flux2KleinPipeline.from_pretrained(klein.path, tokenizer=None, vae=None, transformer=None)
    pipe.register_modules(tokenizer=AutoTokenizer.from_pretrained(klein.path / "tokenizer"))
    with torch.no_grad():
        reference_BLD = pipe.encode_prompt(TEXTS, max_sequence_length=LENGTH, device="cpu")[0]
    encoder = TextEncoder(klein, Text(dtype="fp32", max_length=LENGTH))
    assert encoder.pad_row() is None
    assert len(encoder.language_model.layers) == 27
    ours = torch.stack(encoder.encode(TEXTS))
    assert torch.equal(ours, reference_BLD)
    assert not torch.equal(ours[0, -1], ours[1, -1]), "klein's pad rows depend on the prompt, so all are kept"
    encoder.taps = (10, 20, 27)
    assert (torch.stack(encoder.encode(TEXTS)) - reference_BLD).abs().max() > 1e-2, (
        "a known bug elsewhere would be seen"
    )


@pytest.mark.parametrize("family", ["dev", "klein"])
@pytest.mark.parametrize("kind", QTYPES)
def test_quantised_encoder(model: ModelFolder, klein: ModelFolder, kind: str, family: str) -> None:
    """A quantised encoder gives the rows of a plain one that holds the rounded weights; all its Linears are small.

    On this random model of width 32 rows move by at most 6 % (int8), 25 % (fp8) and 50 % (int4); a real one's
    neighbouring layers, of which each adds little, forgive far more.
    """
    folder = model if family == "dev" else klein
    plain = TextEncoder(folder, Text(dtype="fp32", max_length=96))
    small = TextEncoder(folder, Text(dtype="fp32", max_length=96, quantize=kind))
    small.pad_row()
    made, wanted = (torch.cat(encoder.encode(TEXTS[:2])) for encoder in (small, plain))
    assert 1e-3 < (made - wanted).norm() / wanted.norm() < {"int8": 0.06, "fp8": 0.25, "int4": 0.5}[kind]
    linears = {name: m for name, m in plain.language_model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(linears) == 7 * max(folder.family.taps)
    for name, linear in linears.items():
        rounded = small.language_model.get_submodule(name)
        assert isinstance(rounded, QuantizedLinear)
        linear.weight = torch.nn.Parameter(dequantize(rounded.data, rounded.scale, rounded.shift).view(rounded.shape))
    assert torch.equal(torch.cat(plain.encode(TEXTS[:2])), made)


def test_quantised_one_linear_at_a_time(model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it loads, no more than one Linear is held in full: what came before is small already."""
    full: list[int] = []
    real = text_encoder._place

    def placed(language_model: torch.nn.Module, *given: Any, **how: Any) -> None:
        real(language_model, *given, **how)
        linears = (m for m in language_model.modules() if isinstance(m, torch.nn.Linear))
        full.append(sum(linear.weight.device.type != "meta" for linear in linears))

    monkeypatch.setattr(text_encoder, "_place", placed)
    TextEncoder(model, Text(dtype="bf16", quantize="int8"))
    assert len(full) > 200
    assert max(full) == 0
