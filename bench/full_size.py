"""The published models by their sizes alone: folders whose configurations are real and whose weights are random.

Tokenizers are the small ones of the tests: their ids lie inside of the real vocabulary. Sizes of the transformers as
in docs of FLUX.2; the encoders are Mistral Small 3.2 (24B) and Qwen3 (8B, 4B); the VAE is diffusers' default.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from bench.sizes import DEV
from flux2_core.embedded.tiny_model import build_klein_model, build_model
from flux2_core.model.families import FAMILIES
from flux2_core.model.folder import ModelFolder

PARTS = ("text_encoder", "vae", "transformer")
SHARD = 2e9  # bytes of a file, about what is held in memory while it is written
POOL = 2**24 + 17  # random numbers that all weights are cut from


@dataclass(frozen=True)
class Size:
    """What a model's configuration files say."""

    family: str
    transformer: Mapping[str, Any]
    language: Mapping[str, Any]
    vae: Mapping[str, Any]


VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024}
MISTRAL = {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "vocab_size": 131072}
QWEN_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936}
QWEN_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
KLEIN = {
    **DEV,
    "guidance_embeds": False,
    "joint_attention_dim": 12288,
    "num_attention_heads": 32,
    "num_single_layers": 24,
}
KLEIN_4B = {**KLEIN, "joint_attention_dim": 7680, "num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20}
TINY_VAE = {"block_out_channels": [16, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 64}
TINY_LANGUAGE = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "num_hidden_layers": 30, "vocab_size": 640,
}  # fmt: skip
TINY = {
    "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 48, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32,
}  # fmt: skip
SIZES = {
    "dev": Size("dev", DEV, {**MISTRAL, **HEADS}, VAE),
    "klein-9b": Size("klein", KLEIN, {**QWEN_8B, **HEADS}, VAE),
    "klein-4b": Size("klein", KLEIN_4B, {**QWEN_4B, **HEADS, "tie_word_embeddings": True}, VAE),
}


def tiny(size: Size) -> Size:
    """The same family in toy sizes."""
    return replace(size, transformer={**size.transformer, **TINY}, language=TINY_LANGUAGE, vae=TINY_VAE)


def describe(folder: Path, size: Size) -> ModelFolder:
    """A folder with everything but weights."""
    (build_model if size.family == "dev" else build_klein_model)(folder)
    for part in PARTS:
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        path = folder / part / "config.json"
        config = json.loads(path.read_text())
        language = config.get("text_config", config) if part == "text_encoder" else config
        sizes = {"text_encoder": size.language, "vae": size.vae, "transformer": size.transformer}[part]
        language.pop("layer_types", None)  # one entry a layer
        language.update(sizes)
        path.write_text(json.dumps(config, indent=2))
    return ModelFolder(folder, FAMILIES[size.family])


def tensors(model: ModelFolder, part: str) -> dict[str, torch.Tensor]:
    """Every tensor of a part's files by name, on the meta device; the VAE's in fp32, all others in bf16."""
    with torch.device("meta"):
        if part == "text_encoder":
            config = AutoConfig.from_pretrained(model.path / part, trust_remote_code=False)
            kind = AutoModelForImageTextToText if model.family.name == "dev" else AutoModelForCausalLM
            built = kind.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
        else:
            kind = {"vae": AutoencoderKLFlux2, "transformer": Flux2Transformer2DModel}[part]
            built = kind.from_config(model.config(part)).to(torch.float32 if part == "vae" else torch.bfloat16)
    found = built.state_dict()
    if getattr(built.config, "tie_word_embeddings", False):
        found.pop("lm_head.weight", None)
    return found


def write(model: ModelFolder) -> None:
    """Random weights, the same for the same sizes, shard by shard: two shards are in memory at a time, at most."""
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for part in PARTS:
        shards = list(_shards(tensors(model, part)))
        total, start, where = len(shards), 0, {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{total:05}.safetensors"
            values = {}
            for key, like in shard.items():
                values[key], start = _drawn(pool, start, key, like), (start + like.numel()) % POOL
            save_file(values, model.path / part / name)
            where |= dict.fromkeys(shard, name)
        index = {"metadata": {}, "weight_map": where}
        (model.path / part / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(every: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    for key, like in every.items():
        if shard and sum(one.nbytes for one in shard.values()) + like.nbytes > SHARD:
            yield shard
            shard = {}
        shard[key] = like
    yield shard


def _drawn(pool: torch.Tensor, start: int, key: str, like: torch.Tensor) -> torch.Tensor:
    """Matrices of variance 1 / fan in, embeddings of 1; norms and statistics as a new model has them."""
    if like.ndim < 2:
        centre = 1 if key.endswith(("weight", "running_var")) else 0
        return torch.full(like.shape, centre, dtype=like.dtype)
    values = pool.repeat(-(-(start + like.numel()) // POOL))[start : start + like.numel()].view(like.shape)
    scale = 1.0 if "embed_tokens" in key else like[0].numel() ** -0.5
    return values.to(like.dtype).mul(scale)
