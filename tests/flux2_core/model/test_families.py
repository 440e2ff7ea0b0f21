"""Families: what a record says is what every room does, shown by a family that nobody published."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from safetensors import safe_open

from flux2_core.config.sections import Config, Model
from flux2_core.embedded.tiny_model import write_index
from flux2_core.lora.reading import from_file
from flux2_core.model.families import DEV, FAMILIES, Family, Licence, Published
from flux2_core.model.text_encoder import PromptTokenizer
from flux2_core.output import export
from flux2_core.train.trainer import Trainer
from tests.in_process import fill_cache, process_group

Make = Callable[..., Config]
MADE_UP = {
    "left": Family(
        name="made-up",
        pipeline="MadeUpPipeline",
        taps=(5, 15, 25),
        system_message="Answer in verse.",
        padding_side="left",
        chat={"add_generation_prompt": False},
        typed_parts=True,
        weight_prefixes=DEV.weight_prefixes,
        published=(Published("made-up-1b", "Made Up", "somebody/made-up", (2, 2, 2), Licence("license: mit\n")),),
    ),
    "right": Family(
        name="made-up",
        pipeline="MadeUpPipeline",
        taps=(1, 2, 3),
        system_message=None,
        padding_side="right",
        chat={},
        typed_parts=False,
        weight_prefixes=DEV.weight_prefixes,
    ),
}


@pytest.mark.parametrize("side", MADE_UP)
def test_a_family_more_is_a_record_more(
    make_config: Make, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """One record takes a family of the same structure from cache to LoRA file: its taps, chat, pads, names, licence."""
    made_up = MADE_UP[side]
    monkeypatch.setitem(FAMILIES, made_up.name, made_up)
    folder = Path(shutil.copytree(tiny_model, tmp_path / "made-up"))
    write_index(folder, made_up.pipeline, "Mistral3ForConditionalGeneration", "PixtralProcessor")
    config = make_config(model={"path": str(folder)}, train={"steps": 1, "pad_rows": "zeros"})
    model = fill_cache(config)
    tokenizer = PromptTokenizer(model, max_length=96)
    told = tokenizer.tokenizer.decode(tokenizer.prefix)
    assert told == ("<s>[SYSTEM_PROMPT]Answer in verse.[/SYSTEM_PROMPT][INST]" if side == "left" else "<s>[INST]")
    with process_group(tmp_path):
        trainer = Trainer(config)
        batch = trainer.data.batch(0)
        trainer.train_step(batch)
        trainer.save()
    fingerprint = trainer.data.index.text.fingerprint
    assert (fingerprint["family"], fingerprint["layers"]) == ("made-up", list(made_up.taps))
    assert (fingerprint["pads"] == "stored") == (side == "right")
    pads = (batch.prompts_BLD == 0).all(-1).float()
    assert (pads.diff() == (-1 if side == "left" else 1)).sum(1).tolist() == [1, 1], "all pads are on one side"
    files = export.export(config, model, resumed_from=0)["lora"]
    card = (trainer.folder.path / "README.md").read_text()
    assert len(from_file(files["comfyui"])) == len(trainer.adapter)
    with safe_open(files["diffusers"], "pt") as file:
        architecture = file.metadata()["modelspec.architecture"]
    assert architecture == ("Flux.2-made-up-1b/lora" if side == "left" else "flux.2/lora")
    assert "from diffusers import MadeUpPipeline" in card
    assert ("license: mit" in card, "huggingface.co/somebody/made-up" in card) == ((side == "left"),) * 2


def test_a_configuration_may_name_each_family() -> None:
    """The values of `model.family` are the families that there are."""
    literal, _none = get_args(Model.model_fields["family"].annotation)
    assert set(get_args(literal)) == FAMILIES.keys()
    assert all(name == family.name for name, family in FAMILIES.items())
