"""Where encoders lie and what their passes take: counts against real modules, choices on known cards, equal rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from transformers import AutoConfig

from flux2_core import accelerator
from flux2_core.accelerator import CPU
from flux2_core.config.sections import Config
from flux2_core.embedded.tiny_model import build_klein_model
from flux2_core.errors import SetupError, UsageError
from flux2_core.model import text_encoder
from flux2_core.model.folder import resolve
from flux2_core.model.text_encoder import TextEncoder
from flux2_core.placement import encoding, stream
from flux2_core.placement.encoding import ENCODED, Encoding
from flux2_core.placement.stream import Stream
from tests.flux2_core.jobs import CARD_16, CARD_24, CARD_48, H100, H200, asked, described, limit
from tests.flux2_core.placement.test_planner import Peak
from tests.flux2_core.placement.test_stream import poisoned

Make = Callable[..., Config]
TEXTS = ["a red square", "", "a long caption of a small blue circle " * 3]
PARTS = ("text_encoder", "tokenizer", "transformer")


def test_counts_equal_the_built_encoders(make_config: Make, tmp_path: Path) -> None:
    """Layers and embedding, counted from config.json, are those that are loaded, of dev and of klein; of FLUX.2-dev 30
    layers take 34.7 GB in bf16 (ground-truth: 48 GB with all of them)."""
    for model in ({}, {"path": str(build_klein_model(tmp_path)), "family": "klein"}):
        config = make_config(**({"model": model} if model else {}))
        folder = resolve(config.model, parts=PARTS)
        loaded, found = TextEncoder(folder, config.text).language_model, encoding.layers(folder)
        norms = sum(p.numel() for n, p in loaded.named_parameters() if "q_norm" in n or "k_norm" in n)
        assert len(loaded.layers) == found["count"]
        assert sum(p.numel() for p in loaded.layers.parameters()) - norms == found["count"] * found["layer"]
        assert loaded.embed_tokens.weight.numel() == found["embedding"]
    dev = encoding.layers(described("dev"))
    assert 2 * (dev["count"] * dev["layer"] + dev["embedding"]) == pytest.approx(34.7e9, rel=1e-3)


def test_a_pass_against_real_layers() -> None:
    """Beside its weights a pass of the language model holds what is counted (3i + 8h values a token), or 20 % less."""
    for kind, h, i in (("mistral", 640, 4096), ("qwen3", 640, 2432), ("qwen3", 1024, 3072)):
        config = AutoConfig.for_model(
            kind, hidden_size=h, intermediate_size=i, num_attention_heads=8, num_key_value_heads=2, head_dim=128,
            num_hidden_layers=4, vocab_size=64,
        )  # fmt: skip
        built = text_encoder._without_weights(config, torch.bfloat16).to_empty(device=CPU)
        built = text_encoder._finished(built, config, CPU)
        ids_BN, mask_BN = torch.zeros(2, 256, dtype=torch.long), torch.ones(2, 256, dtype=torch.long)
        mask_BN[0, :40] = 0
        with Peak(built.parameters()) as peak:
            text_encoder.tapped(built, (1, 2, 4), ids_BN, mask_BN, offset=0)
        assert 0.8 < peak.most / (2 * ids_BN.numel() * (3 * i + 8 * h)) <= 1


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1.0), (torch.bfloat16, 0.5)])
def test_a_picture_against_the_real_vae(dtype: torch.dtype, share: float) -> None:
    """The VAE of FLUX.2's sizes, on the meta device, works in just so many bytes a pixel, whatever the batch."""
    with torch.device("meta"):
        vae = AutoencoderKLFlux2().eval().to(dtype)
        for count, side in ((1, 512), (2, 256)):
            pixels = torch.empty(count, 3, side, side, dtype=dtype)
            with torch.no_grad(), Peak([*vae.state_dict().values(), pixels]) as peak:
                vae.encode(pixels)
            assert peak.most == pytest.approx(share * ENCODED * count * side**2, rel=0.01)


@pytest.mark.parametrize(
    ("memory", "quantize", "wanted", "gb"),
    [
        (H200, "none", ("whole", 8192), (39.0, 0)),
        (CARD_48, "none", ("whole", 8192), (39.0, 0)),
        (CARD_24, "none", ("stream", 8192), (7.8, 33.3)),
        (CARD_16, "none", ("stream", 8192), (7.8, 33.3)),
        (6, "none", ("stream", 1024), (5.9, 33.3)),
        (CARD_24, "int8", ("whole", 8192), (23.0, 0)),
        (CARD_16, "int8", ("stream", 8192), (7.4, 16.7)),
        (CARD_16, "int4", ("whole", 4096), (14.9, 0)),
    ],
)
def test_choices(memory: float, quantize: str, wanted: tuple[str, int], gb: tuple[float, float]) -> None:
    """What is picked of dev's encoder on known cards: whole, with smaller passes where that suffices, else streamed; a
    smaller precision never, however much better it would fit."""
    config = asked(memory, text={"quantize": quantize}).config
    best = encoding.text(config, described("dev"), limit(memory))
    assert (best.strategy, best.most) == wanted
    assert (best.total / 1e9, best.host / 1e9) == pytest.approx(gb, abs=0.05)
    advice = encoding.advice(config, described("dev"), best, limit(memory))
    assert ('text.quantize="int8" fits whole in 23.0 GB' in (advice or "")) == ((memory, quantize) == (CARD_24, "none"))
    assert encoding.text(config, described("dev"), None).strategy == "whole", "on a CPU all is as it was"


def test_a_node_that_cannot_hold_the_layers() -> None:
    """What is streamed counts once for each encoder of a node; what fits nowhere is refused with both figures and with
    what helps: fewer bits or fewer encoders, never another resolution."""
    config, model = asked(CARD_24).config, described("dev")
    assert encoding.text(config, model, limit(CARD_24), host=40e9).strategy == "stream"
    for host, encoders, words in ((30e9, 1, r"set text.quantize"), (40e9, 2, r'"int4", fewer cluster.encoders')):
        with pytest.raises(UsageError, match=rf"{33.345 * encoders:.1f} GB of a node's host memory; .*{words}") as told:
            encoding.text(config, model, limit(CARD_24), host=host, encoders=encoders)
        assert "resolutions" not in str(told.value)


def test_passes_of_pictures() -> None:
    """A pass of the VAE is halved until a card holds it; one picture alone is tried whatever it takes."""
    large = asked(data=[{"path": "x", "resolutions": [1024, 2048]}]).config
    assert [encoding.pictures(asked().config, limit(m)).most for m in (H100, CARD_16, 12, 6)] == [
        4 * 2**20, 4 * 2**20, 2 * 2**20, 2**20,
    ]  # fmt: skip
    assert encoding.pictures(large, limit(6)).most == 2048**2
    half = asked(latents={"precision": "bf16"}).config
    assert encoding.pictures(half, limit(12)).most == 4 * 2**20


@pytest.mark.parametrize(
    "text", [{}, {"dtype": "bf16"}, {"quantize": "int8"}, {"quantize": "int4"}, {"pads": "stored"}]
)
def test_streamed_rows_are_the_same_bits(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, text: dict[str, Any]
) -> None:
    """With NaN on the host wherever a layer is not just travelling, rows and the pad row are the bits of an encoder
    that lies whole on the device: streaming changes no row, so no fingerprint either."""
    config, made = make_config(text=text), []
    model = resolve(config.model, parts=PARTS)
    monkeypatch.setattr(stream, "Stream", lambda *given: made.append(Stream(*given)))
    found = []
    for strategy in ("whole", "stream"):
        monkeypatch.setattr(encoding, "text", lambda *_, s=strategy, **__: Encoding(s, 8192))
        encoder, placed = encoding.build(config, model, CPU)
        assert placed.strategy == strategy
        if made:
            poisoned(made[0])
        pad_1D = encoder.pad_row()
        found.append([*encoder.encode(TEXTS), *encoder.encode(TEXTS[:1]), *([] if pad_1D is None else [pad_1D])])
    assert len(made) == 1
    assert len(made[0].blocks) == 30
    assert all(rows.isfinite().all() for rows in found[0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_layers_of_a_streamed_encoder_never_lie_on_the_card(make_config: Make) -> None:
    """While it loads, what is streamed stays on the host, and only the rest goes to the device (here: meta)."""
    config = make_config()
    built = TextEncoder(resolve(config.model, parts=PARTS), config.text, device="meta", streamed=True).language_model
    assert {parameter.device.type for parameter in built.layers.parameters()} == {"cpu"}
    assert [name for name, p in built.named_parameters() if p.device.type == "meta"] == ["embed_tokens.weight"]


def test_a_card_that_is_full_all_the_same(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that does not fit while it loads is told with what helps: to be streamed, or fewer bits."""

    def full(*_given: Any, **_how: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(text_encoder, "load_language_model", full)
    config = make_config()
    with pytest.raises(SetupError, match=r"does not fit the card \(out of memory\): set cluster.gpu_memory .*int8"):
        encoding.build(config, resolve(config.model, parts=PARTS), CPU)


def test_the_card_at_hand_decides(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be filled is 94 % of what is free of this process's card, or of `cluster.gpu_memory`."""
    monkeypatch.setattr(accelerator, "is_gpu", lambda _device: True)
    monkeypatch.setattr(accelerator, "free_bytes", lambda _device: 10**10)
    assert encoding.here(make_config(), CPU) == 9.4e9
    assert encoding.here(make_config(cluster={"gpu_memory": 1}), CPU) == 0.94 * 2**30
