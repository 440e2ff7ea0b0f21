"""Builds small models of FLUX.2's structure from sizes and a seed: the one module that may construct every kind.

A built folder is a complete diffusers pipeline of random weights: it proves shapes, parity and plumbing. The trained
one in `flux2_core.embedded` starts from here with larger sizes. No tensor is zero: zero-initialised layers and unit
norms would let a parity test pass by accident.

torchvision is not needed: `Flux2Pipeline.from_pretrained(folder, tokenizer=None)`, then
`register_modules(tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"))`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flux2_core.model.families import DEV, KLEIN, SYSTEM_MESSAGE

CONTROL_TOKENS = (  # the ids of Mistral's Tekken tokenizer: pad is 11, the system prompt's brackets are 17 and 18
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
KLEIN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}{% set text = message['content'] | selectattr('type', 'equalto', 'text') "
    "| map(attribute='text') | join %}{% endif %}"
    "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
    "{% elif message['role'] == 'user' %}[INST]{{ text }}[/INST]"
    "{% else %}{{ text }}{{ eos_token }}{% endif %}{% endfor %}"
)
KLEIN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CORPUS = (
    SYSTEM_MESSAGE,
    "a photo of a red square on a white background, a painting of two small blue circles in the style of",
    "a large green triangle at the top left on a black background, a tiny yellow star at the bottom right",
    "the quick brown fox jumps over the lazy dog, with and without its shadow in the evening light",
)


@dataclass(frozen=True)
class ModelShape:
    """Every size of a small model; widths in channels, counts in layers, tokens or heads."""

    text_width: int = 32
    """Hidden size of the text encoder; the transformer's text input is three times it."""
    text_heads: int = 2
    text_layers: int = 32
    """FLUX.2 reads states 10, 20 and 30; two layers more than needed show that the rest is left out."""
    text_ff: int = 48
    vocabulary: int = 640
    whole_sentences: bool = False
    """Make each line of the system message one token, so that a prompt is short."""
    layer_gain: float = 1.0
    """Scale of the encoder's attention and feed-forward outputs against its unit-variance embeddings."""
    vae_widths: tuple[int, int, int, int] = (16, 16, 16, 16)
    vae_layers: int = 1
    vae_attention: bool = True
    heads: int = 2
    head_width: int = 16
    rope_axes: tuple[int, int, int, int] = (4, 4, 4, 4)
    """Head channels rotated by (time, row, column, text position); they sum to `head_width`."""
    double_blocks: int = 2
    single_blocks: int = 2
    time_channels: int = 32
    """Width of the sinusoidal embedding of time and guidance."""
    guided: bool = True


RANDOM_SHAPE = ModelShape()


def build_model(
    folder: Path, *, shape: ModelShape = RANDOM_SHAPE, seed: int = 0, corpus: Sequence[str] = CORPUS
) -> Path:
    """Write a complete FLUX.2-dev folder of random weights, the same bytes for the same arguments.

    Args:
        folder: Made where it is missing; files of the same names are overwritten.
        shape: All sizes.
        seed: Of the weights.
        corpus: Sentences that the tokenizer is trained on, beside the system message.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([SYSTEM_MESSAGE, *corpus], shape=shape)
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    encoder = text_encoder(shape, vocabulary=len(tokenizer))
    _save_parts(folder, encoder, shape=shape, seed=seed)
    write_index(folder, DEV.pipeline, type(encoder).__name__, "PixtralProcessor")
    return folder


def build_klein_model(folder: Path, *, shape: ModelShape = RANDOM_SHAPE, seed: int = 0) -> Path:
    """Write a complete FLUX.2-klein folder of random weights: Qwen3 text encoder (taps 9/18/27), no guidance."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = replace(shape, guided=False)
    tokenizer = _byte_level_bpe(CORPUS, KLEIN_TOKENS, vocabulary=shape.vocabulary)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="right"
    )
    fast.chat_template = KLEIN_TEMPLATE
    fast.save_pretrained(str(folder / "tokenizer"))
    head = shape.text_width // shape.text_heads
    language = Qwen3Config(
        vocab_size=len(fast), hidden_size=shape.text_width, intermediate_size=shape.text_ff,
        num_hidden_layers=shape.text_layers, num_attention_heads=shape.text_heads,
        num_key_value_heads=max(1, shape.text_heads // 2), head_dim=head, max_position_embeddings=4096,
    )  # fmt: skip
    _save_parts(folder, Qwen3ForCausalLM(language), shape=shape, seed=seed)
    write_index(folder, KLEIN.pipeline, "Qwen3ForCausalLM", "Qwen2TokenizerFast", is_distilled=False)
    return folder


def _save_parts(folder: Path, encoder: Any, *, shape: ModelShape, seed: int) -> None:
    parts = {"text_encoder": encoder, "vae": autoencoder(shape), "transformer": transformer(shape)}
    for number, (name, model) in enumerate(parts.items()):
        randomize(model, torch.Generator().manual_seed(seed * len(parts) + number))
        if name == "text_encoder":
            scale_layers(model, shape.layer_gain)
        model.save_pretrained(str(folder / name), safe_serialization=True)
    flow_scheduler().save_pretrained(str(folder / "scheduler"))


def train_tokenizer(corpus: Sequence[str], *, shape: ModelShape = RANDOM_SHAPE) -> Any:
    """Train FLUX.2's kind of tokenizer: byte-level BPE, Mistral's control tokens, left padding, chat template."""
    sentences = SYSTEM_MESSAGE.splitlines() if shape.whole_sentences else []
    tokenizer = _byte_level_bpe(corpus, CONTROL_TOKENS, vocabulary=shape.vocabulary - len(sentences))
    tokenizer.add_tokens([AddedToken(sentence, special=False, normalized=False) for sentence in sentences])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=[token for token in CONTROL_TOKENS if token.startswith("[")], padding_side="left",
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def text_encoder(shape: ModelShape, *, vocabulary: int) -> Any:
    """A Mistral 3 of `shape`, with the least vision tower that its class allows (FLUX.2 never runs it)."""
    language = {
        "model_type": "mistral", "vocab_size": vocabulary, "hidden_size": shape.text_width,
        "intermediate_size": shape.text_ff, "num_hidden_layers": shape.text_layers,
        "num_attention_heads": shape.text_heads, "num_key_value_heads": max(1, shape.text_heads // 2),
        "head_dim": shape.text_width // shape.text_heads, "max_position_embeddings": 4096, "sliding_window": None,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "head_dim": 8, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    config = Mistral3Config(
        text_config=language,
        vision_config=vision,
        image_token_index=CONTROL_TOKENS.index("[IMG]"),
        spatial_merge_size=2,
    )
    return Mistral3ForConditionalGeneration(config)


def autoencoder(shape: ModelShape) -> Any:
    """A VAE of `shape`: 8x smaller sides, 32 channels, 2x2 patches, batch-norm statistics."""
    return AutoencoderKLFlux2(
        block_out_channels=shape.vae_widths, layers_per_block=shape.vae_layers, norm_num_groups=8, sample_size=64,
        mid_block_add_attention=shape.vae_attention,
    )  # fmt: skip


def transformer(shape: ModelShape) -> Any:
    """A FLUX.2 transformer of `shape`."""
    assert sum(shape.rope_axes) == shape.head_width
    return Flux2Transformer2DModel(
        in_channels=128, num_layers=shape.double_blocks, num_single_layers=shape.single_blocks,
        attention_head_dim=shape.head_width, num_attention_heads=shape.heads,
        joint_attention_dim=3 * shape.text_width, timestep_guidance_channels=shape.time_channels,
        axes_dims_rope=shape.rope_axes, guidance_embeds=shape.guided,
    )  # fmt: skip


def flow_scheduler() -> Any:
    """The scheduler of FLUX.2's repository."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096, time_shift_type="exponential",
    )  # fmt: skip


@torch.no_grad()
def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter and statistic anew: embeddings unit-variance, matrices 1/sqrt(fan in), norms around one."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(noise)
        elif parameter.ndim > 1:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        else:
            centre = 1.0 if _is_scale(model, parameter) else 0.0
            parameter.copy_(centre + 0.1 * noise)
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


@torch.no_grad()
def scale_layers(model: torch.nn.Module, gain: float) -> None:
    """Scale what each layer of a language model adds to its residual stream."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(gain)


def write_index(folder: Path, pipeline: str, encoder: str, tokenizer: str, **extra: bool) -> None:
    """Write `model_index.json`, which names the class of each part of a diffusers folder."""
    index = {
        "_class_name": pipeline, "_diffusers_version": "0.42.1", **extra,
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"), "text_encoder": ("transformers", encoder),
        "tokenizer": ("transformers", tokenizer), "transformer": ("diffusers", "Flux2Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKLFlux2"),
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _byte_level_bpe(corpus: Sequence[str], controls: Sequence[str], *, vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in controls]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def _is_scale(model: torch.nn.Module, parameter: torch.nn.Parameter) -> bool:
    return any(
        parameter is module.weight and not isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        for module in model.modules()
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter)
    )
