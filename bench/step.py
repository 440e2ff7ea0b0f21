"""One training step: ours under a process group of one, against the step of diffusers' script.

Theirs is put together as examples/dreambooth/train_dreambooth_lora_flux2.py does (transformer + peft + AdamW; its
accelerate layer, which only adds time, is left out), with the same targets, rank, first weights, batch and settings.
Both losses are compared before anything is measured. A third arm is our trainer with `fully_shard` left out: what it
saves against ours is what sharding over one worker costs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import Flux2Pipeline, Flux2Transformer2DModel
from peft import LoraConfig

from bench.measure import Row, alternate, compared
from bench.tiny_cache import prepare
from flux2_core import lora, transformer
from flux2_core.config import Config
from flux2_core.tiny_model import RANDOM_SHAPE, ModelShape
from flux2_core.training import Trainer
from flux2_core.training_data import Batch
from tests.in_process import process_group


@dataclass(frozen=True)
class Case:
    """One model and the batch that it is trained on."""

    name: str
    shape: ModelShape
    side: int
    text_rows: int
    rank: int
    batch: int
    steps: int
    """Steps of one measured round."""
    rounds: int


SMALL = Case("small: width 32, 4 blocks", RANDOM_SHAPE, side=64, text_rows=96, rank=4, batch=2, steps=15, rounds=5)
MIDDLE = Case(
    "mid-size: width 384, 8 blocks",
    ModelShape(text_width=64, heads=6, head_width=64, rope_axes=(16, 16, 16, 16), double_blocks=3, single_blocks=5),
    side=256, text_rows=512, rank=16, batch=1, steps=1, rounds=5,
)  # fmt: skip


def run(*, quick: bool = False) -> list[Row]:
    """CPU milliseconds of a step on each model."""
    rows = []
    for case in (SMALL,) if quick else (SMALL, MIDDLE):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config = prepare(
                folder,
                case.shape,
                side=case.side,
                pictures=case.batch,
                text_rows=case.text_rows,
                lora={"rank": case.rank},
                train={"batch_size": case.batch},
            )
            with process_group(folder):
                rows += _measure(case, config, rounds=1 if quick else case.rounds)
    return rows


def _measure(case: Case, config: Config, *, rounds: int) -> list[Row]:
    sharded = Trainer(config)
    with mock.patch.object(transformer, "shard"):
        plain = Trainer(config)
    batch = sharded.data.batch(0)
    reference = Reference(config, sharded)
    steps: dict[str, Callable[[], Any]] = {
        "ours": lambda: sharded.train_step(batch)["loss"],
        "theirs": lambda: reference.step(batch),
        "unsharded": lambda: plain.train_step(batch)["loss"],
    }
    first = [step() for step in steps.values()]
    np.testing.assert_allclose(first, first[0], rtol=1e-5)  # the same job
    arms = {name: _repeated(step, case.steps) for name, step in steps.items()}
    timings = alternate(arms, rounds=rounds)
    return [
        compared(timings, "step", case.name, ours="ours", theirs="theirs", per=case.steps, goal=">= 1"),
        compared(
            timings, "step", f"{case.name}, ours without FSDP2", ours="unsharded", theirs="theirs", per=case.steps
        ),
    ]


class Reference:
    """Model, adapter and optimizer as diffusers' script holds them."""

    def __init__(self, config: Config, ours: Trainer) -> None:
        self.guidance, self.most = config.train.guidance, config.train.max_grad_norm
        self.model: Any = Flux2Transformer2DModel.from_pretrained(config.model.path, subfolder="transformer")
        self.model.requires_grad_(False)
        targets = lora.match(config.lora, transformer.linear_names(self.model))
        rank = config.lora.rank
        self.model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        lora.load(self.model, lora.state(ours.transformer), device=torch.device("cpu"))
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=config.train.learning_rate,
            weight_decay=config.train.weight_decay,
        )
        self.model.train()

    def step(self, batch: Batch) -> float:
        """One optimizer step; returns the loss."""
        clean, noise = batch.latents_Bchw, batch.noise_Bchw
        sigma = batch.sigma_B.view(-1, 1, 1, 1)
        packed = Flux2Pipeline._pack_latents((1.0 - sigma) * clean + sigma * noise)
        ids = Flux2Pipeline._prepare_latent_ids(clean)
        prediction = self.model(
            hidden_states=packed,
            timestep=batch.sigma_B,
            guidance=torch.full([1], self.guidance).expand(len(clean)),
            encoder_hidden_states=batch.prompts_BLD,
            txt_ids=Flux2Pipeline._prepare_text_ids(batch.prompts_BLD),
            img_ids=ids,
            return_dict=False,
        )[0]
        prediction = Flux2Pipeline._unpack_latents_with_ids(prediction[:, : packed.size(1)], ids)
        target = noise - clean
        loss = (prediction.float() - target.float()).square().reshape(len(clean), -1).mean(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.most)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


def _repeated(step: Callable[[], Any], times: int) -> Callable[[], None]:
    def arm() -> None:
        for _ in range(times):
            step()

    return arm
