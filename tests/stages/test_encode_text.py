"""The text stage's worker, called directly: what it stores, what it refuses, and all of it for klein."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux2_core.cache import fingerprints, index, prompt_rows
from flux2_core.cache.keys import text_key
from flux2_core.config.sections import Config
from flux2_core.embedded.tiny_model import build_klein_model
from flux2_core.errors import DataError, SetupError, UsageError
from flux2_core.model.folder import resolve
from flux2_core.model.text_encoder import TextEncoder
from flux2_core.placement import encoding
from flux2_core.placement.encoding import Encoding
from flux2_core.run import previews
from flux2_core.store import schemas
from flux2_core.store.reader import Reader
from flux2_core.store.table import Table
from flux2_core.train import show
from flux2_core.train.batches import TrainingData
from flux2_core.train.validate import Watch
from stages import train
from stages.encode_text import PARTS, TextWorker
from stages.sample import SampleWorker
from tests.in_process import fill_cache, process_group, trainer

Make = Callable[..., Config]
TEXTS = ["a red square", "", "a long caption of a small blue circle on the left of a green field " * 2]
PROJECTED = {"stored": "projected", "int8_rows": True}


def worker(config: Config) -> TextWorker:
    """A worker over a fresh table."""
    model = resolve(config.model, parts=PARTS)
    fingerprint = fingerprints.text_fingerprint(model, config)
    uri = index.text_uri(config, fingerprint)
    Table.open_or_create(uri, kind=schemas.KIND_TEXT, fingerprint=fingerprint)
    return TextWorker(config.model_dump(mode="json", by_alias=True), uri)


def stored(config: Config) -> dict[str, Any]:
    """Rows of TEXTS and the pad row as they come out of the table, by text."""
    made = worker(config)
    assert made.work(TEXTS) == (3, {})
    made.close()
    table = Table.open(made.uri)
    keys = [text_key(table.fingerprint, text) for text in TEXTS]
    ragged = [prompt_rows.PAD_KEY] if prompt_rows.ragged(table.fingerprint) else []
    rows = Reader(table, [*keys, *ragged]).fetch([*keys, *ragged])
    return {row.attributes["text"] if row.key in keys else "pad": (row, table.fingerprint) for row in rows}


@pytest.mark.parametrize(
    "text",
    [{}, {"pads": "stored"}, {"dtype": "bf16"}, {"dtype": "bf16", **PROJECTED}, {"quantize": "int8", **PROJECTED}],
)
def test_what_is_stored_is_what_was_encoded(make_config: Make, text: dict[str, Any]) -> None:
    """Rows come out of the table as the encoder made them, with their number of tokens; in 8 bits within 1 %."""
    config = make_config(text=text)
    rows = stored(config)
    encoder = TextEncoder(resolve(config.model, parts=PARTS), config.text)
    for name, made, tokens in zip(TEXTS, encoder.encode(TEXTS), encoder.tokenizer.counts(TEXTS), strict=True):
        row, fingerprint = rows[name]
        back = prompt_rows.decode(row.payload, fingerprint)
        assert row.attributes["tokens"] == min(tokens, 96)
        if config.text.int8_rows:
            assert 0 < (back - made).float().norm() / made.float().norm() < 0.01
        else:
            assert torch.equal(back, made)
    pad_1D = encoder.pad_row()
    assert ("pad" in rows) == (pad_1D is not None)


def short_of_memory(encode: Callable[[Any], Any], most: int, seen: list[int]) -> Callable[[Any], Any]:
    """An encoder on a card that is full with more than so many things."""

    def encoded(things: Any) -> Any:
        seen.append(len(things))
        if len(things) > most:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 1 GiB")
        return encode(things)

    return encoded


def test_a_full_card_halves_the_passes(make_config: Make) -> None:
    """What does not fit is encoded in halves, and so is what comes after: no row is lost, and each is that of its
    text; where one text alone does not fit, the error says what helps."""
    made, texts, seen = worker(make_config()), [f"a square, the {number:02}. one" for number in range(11)], list[int]()
    real = made.encoder.encode
    made.encoder.encode = short_of_memory(real, 3, seen)
    assert made.work(texts[:8]) == (8, {})
    assert seen == [8, 4, 2, 2, 2, 2]
    assert made.work(texts[8:]) == (3, {})
    assert seen[6:] == [1, 2]
    made.close()
    rows = {row.attributes["text"]: prompt_rows.decode(row.payload, made.table.fingerprint) for row in _all(made.uri)}
    assert all((rows[text] - wanted).abs().max() < 1e-4 for text, wanted in zip(texts, real(texts), strict=True))
    made.encoder.encode = short_of_memory(real, 0, seen)
    with pytest.raises(SetupError, match=r"full with a single one \(out of memory\): use a larger card, or text.quant"):
        made.work(["x"])


def test_planned_passes_are_kept(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the planner lets a pass hold is what a pass gets, counted by its longest text; one text is always tried."""
    made, seen = worker(make_config()), list[int]()
    monkeypatch.setattr(encoding, "text", lambda *_, **__: Encoding("whole", 100))
    made.encoder.encode = short_of_memory(made.encoder.encode, 99, seen)
    texts = ["a red square", "a blue square", "a green circle", "a long caption of a small circle on a field " * 9]
    longest, short = (made.encoder.tokenizer.counts(texts[place : place + 1])[0] for place in (3, 0))
    assert 3 * short > 100 > 2 * short
    assert longest >= 96
    assert made.work(texts) == (4, {})
    assert seen == [2, 1, 1]
    made.close()


FAULTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "NaN": (lambda rows: rows.index_fill(1, torch.tensor([3]), float("nan")), "NaN.*model.path"),
    "infinity": (lambda rows: rows.index_fill(0, torch.tensor([3]), float("inf")), 'infinity.*text.dtype="fp32"'),
    "minus infinity": (lambda rows: rows.index_fill(0, torch.tensor([3]), -float("inf")), 'text.dtype="fp32"'),
    "bf16 overflow": (lambda rows: (rows.double() * 1e39).bfloat16().float(), 'infinity.*text.dtype="fp32"'),
    "zeros": (torch.zeros_like, "nothing but zeros.*model.path"),
    "one row of zeros": (lambda rows: rows.index_fill(0, torch.tensor([3]), 0.0), "a row of nothing but zeros"),
    "wrong width": (lambda rows: rows[:, :-1], r"shape \(\d+, 95\), \(\d+, 96\) is right: check model.path"),
    "wrong number of rows": (lambda rows: rows[1:], "is right: check model.path"),
    "wrong dtype": (lambda rows: rows.half(), "float16 where the table holds torch.float32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_unsound_rows_are_never_stored(make_config: Make, fault: str) -> None:
    """R5: a bad row is refused before it is committed, with its text and the way out; rows before it are kept."""
    spoil, message = FAULTS[fault]
    made = worker(make_config())
    real = made.encoder

    def encode(texts: list[str]) -> list[torch.Tensor]:
        rows = real.encode(texts)
        return [*rows[:-1], spoil(rows[-1])]

    made.__dict__["encoder"] = SimpleNamespace(encode=encode, tokenizer=real.tokenizer)
    with pytest.raises(DataError, match=f"'a red square': the text encoder made .*{message}"):
        made.work(["a good one", "a red square"])
    made.close()
    assert {row.attributes["text"] for row in _all(made.uri)} == {"", "a good one"}


@pytest.mark.parametrize(("dtype", "factor"), [("fp16", 1e5), ("bf16", 3e38), ("fp32", float("nan"))])
def test_a_model_that_overflows(make_config: Make, tiny_model: Path, tmp_path: Path, dtype: str, factor: float) -> None:
    """R5: where the model itself leaves the range of `text.dtype`, nothing is stored, not even the pad row."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "loud"))
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    (name,) = [key for key in tensors if key.endswith("layers.29.mlp.down_proj.weight")]
    tensors[name] = torch.where(tensors[name] > 0, 1.0, -1.0) * factor
    save_file(tensors, file, metadata={"format": "pt"})
    made = worker(make_config(model={"path": str(folder)}, text={"dtype": dtype, "pads": "stored"}))
    with pytest.raises(DataError, match=r"'a red square': the text encoder made (NaN|infinity)"):
        made.work(["a red square"])
    made.close()
    assert _all(made.uri) == []


def test_projected_rows_are_what_training_would_project(make_config: Make) -> None:
    """With projected rows training sees, bit for bit, what `context_embedder` makes of raw ones; zeros stay zeros."""
    text = {"pads": "computed"}
    for pad_rows in ("reference", "zeros"):
        raw, projected = (
            make_config(text=text | {"stored": stored}, train={"pad_rows": pad_rows}) for stored in ("raw", "projected")
        )
        if pad_rows == "reference":
            model = fill_cache(raw)
            fill_cache(projected)
        rows = {}
        for config in (raw, projected):
            data = TrainingData(config, model)
            rows[config.text.stored] = data.prompt_rows(data.train[0]["text_keys"])
        weight = load_file(model.path / "transformer" / "diffusion_pytorch_model.safetensors")[
            "context_embedder.weight"
        ]
        assert torch.equal(torch.nn.functional.linear(rows["raw"], weight), rows["projected"])
        assert (rows["projected"][0, 0] == 0).all() == (pad_rows == "zeros")


def test_klein_from_captions_to_previews(make_config: Make, tmp_path: Path) -> None:
    """klein is cached with all its rows, drawn away from a negative prompt, and trained on without guidance."""
    folder = build_klein_model(tmp_path / "klein")
    config = make_config(
        model={"path": str(folder), "family": "klein"},
        text={"dtype": "bf16", "max_length": 48, **PROJECTED},
        train={"steps": 1},
        validate={"every": 1, "prompts": ["a [trigger]"], "negative": "ugly", "guidance": 4.0, "size": 64},
    )
    model = fill_cache(config)
    assert (model.family.name, model.guided) == ("klein", False)
    shown = show.tensors_of(config, model, "p0")
    assert {"prompt_embeds", "prompt_embeds.null", "prompt_embeds.preview0", "prompt_embeds.negative"} <= shown.keys()
    assert shown["prompt_embeds"].shape == (48, model.inner_width)
    with process_group(tmp_path):
        running = trainer(config)
        Watch(running).look(0, SimpleNamespace(image=lambda *_: None))  # type: ignore[arg-type]
        running.train_step(running.data.batch(0))
    drawn = np.asarray(Image.open(previews.tile_path(running.folder.previews, 0, 0)))
    sampled = SampleWorker(config.model_dump(mode="json", by_alias=True), running.data.index.text, None)
    driver = {part: model.likeness(part) for part in ("transformer", "vae")}
    assert sampled.load(driver) == 'drawing with train.precision="fp32" cluster.strategy="ddp"'
    assert np.array_equal(sampled.draw("a sks", config.validation.seed), drawn), "`sample` draws what a preview draws"
    with pytest.raises(DataError, match="'pretty'"):
        TrainingData(make_config(**_sections(config, negative="pretty")), model)
    with pytest.raises(UsageError, match=re.escape("validate.guidance=1 and validate.negative='ugly'")):
        train.train(make_config(**_sections(config, guidance=1.0)))


def test_show_names_the_roles(make_config: Make, photos: Path) -> None:
    """`show` gives the rows of every role that the configuration needs, each that of its own text."""
    data = {"path": str(photos), "trigger": "sks", "class_name": "dog", "resolutions": [64]}
    config = make_config(data=[data], train={"preservation": "dop", "trigger_dropout": 0.5})
    model = fill_cache(config)
    shown = show.tensors_of(config, model, "p3")
    seen = TrainingData(config, model)
    for role, text in {"dop": "a photo of dog number 3", "class_only": "dog", "trigger_only": "sks"}.items():
        assert torch.equal(shown[f"prompt_embeds.{role}"], seen.prompt_rows([seen.key(text)])[0])
    assert "prompt_embeds.negative" not in shown


def _sections(config: Config, **validate: Any) -> dict[str, Any]:
    tree = config.model_dump(mode="json", by_alias=True)
    return {name: tree[name] for name in ("model", "text", "train")} | {"validate": tree["validate"] | validate}


def _all(uri: str) -> list[Any]:
    table = Table.open(uri)
    keys = list(table.keys())
    return Reader(table, keys).fetch(keys)
