"""Claims about the builder of small models: complete, deterministic, without zeros, and drawing without torchvision."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer

from flux2_core.embedded.tiny_model import CORPUS, RANDOM_SHAPE, build_klein_model, build_model, train_tokenizer
from flux2_core.model.families import SYSTEM_MESSAGE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("tiny"))


def messages(system, text):
    return [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": [{"type": "text", "text": text}]},
    ]


def weight_files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_same_arguments_write_the_same_bytes(folder, tmp_path):
    """A seed decides every byte of the folder, and another seed changes the weights."""
    assert weight_files(build_model(tmp_path / "again")) == weight_files(folder)
    other = weight_files(build_model(tmp_path / "other", seed=1))
    assert (
        other["transformer/diffusion_pytorch_model.safetensors"]
        != weight_files(folder)["transformer/diffusion_pytorch_model.safetensors"]
    )


def test_building_leaves_the_global_random_state_out_of_it(folder, tmp_path):
    """Weights do not depend on torch's global generator."""
    torch.manual_seed(123)
    assert weight_files(build_model(tmp_path / "again")) == weight_files(folder)


def test_diffusers_loads_the_folder_and_draws(folder):
    """`Flux2Pipeline` draws from the folder with a plain tokenizer, and torchvision is never imported."""
    pipeline = Flux2Pipeline.from_pretrained(folder, tokenizer=None)
    pipeline.register_modules(tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"))
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(prompt="a red square", height=64, width=64, num_inference_steps=2, max_sequence_length=64)
    assert drawn.images[0].size == (64, 64)
    assert "torchvision" not in sys.modules


def test_the_folder_is_small(folder):
    """The random model takes less than 3 MB."""
    assert sum(len(data) for data in weight_files(folder).values()) < 3_000_000


def test_no_tensor_is_zero_or_one_throughout(folder):
    """Every weight and statistic varies, so that a parity test cannot pass by a layer that does nothing."""
    for file in folder.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and tensor.numel() > 1:
                assert tensor.float().std() > 1e-3, (file, name)


def test_prompts_are_rendered_and_cut_as_mistral_does(folder):
    """Control tokens have Mistral's ids, padding is on the left with id 11, and the template is FLUX.2's."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert (tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.bos_token_id) == (11, "left", 1)
    chat = messages(SYSTEM_MESSAGE, "a red square")
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]a red square[/INST]"
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, padding="max_length", max_length=64)
    assert len(ids) == 64
    assert ids[0] == 11
    assert [ids[ids.index(1) + 1], ids[-1]] == [17, 4]


def test_text_survives_the_tokenizer(folder):
    """Bytes are never lost: any text comes back as it was."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for text in ("a red square", "Ein Haus am See", "猫と犬 🦉", "  two  spaces\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("whole", [False, True])
def test_the_newline_of_the_system_message_matters(whole):
    """A space in place of the system message's newline gives other tokens, also where its lines are single tokens."""
    tokenizer = train_tokenizer(CORPUS, shape=replace(RANDOM_SHAPE, whole_sentences=whole))
    right, wrong = (tokenizer(text)["input_ids"] for text in (SYSTEM_MESSAGE, SYSTEM_MESSAGE.replace("\n", " ")))
    assert right != wrong


def test_klein_draws(tmp_path):
    """The klein folder loads as `Flux2KleinPipeline`, has no guidance embedding, and draws with taps 9, 18 and 27."""
    folder = build_klein_model(tmp_path / "klein")
    pipeline = Flux2KleinPipeline.from_pretrained(folder, tokenizer=None)
    pipeline.register_modules(tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"))
    pipeline.set_progress_bar_config(disable=True)
    assert not pipeline.transformer.config.guidance_embeds
    drawn = pipeline(prompt="a red square", height=64, width=64, num_inference_steps=2, max_sequence_length=64)
    assert drawn.images[0].size == (64, 64)
