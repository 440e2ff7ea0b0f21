"""The training step: parity with diffusers' script, exact resume, and what a step must survive."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Pipeline, Flux2Transformer2DModel
from peft import LoraConfig

from flux2_core.config.sections import Config
from flux2_core.errors import DataError, UsageError
from flux2_core.lora import adapter
from flux2_core.lora.targets import match
from flux2_core.model import latents
from flux2_core.run import checkpoint, metrics
from flux2_core.run.folder import RunFolder
from flux2_core.train.batches import TrainingData
from flux2_core.train.loop import run
from flux2_core.train.methods.protocol import Batch
from flux2_core.train.trainer import Trainer
from tests.in_process import fill_cache, process_group
from tests.random_adapter import randomised

Make = Callable[..., Config]


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


def reference_step(config: Config, trainer: Trainer, step: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and LoRA gradients of a step, put together as diffusers' train_dreambooth_lora_flux2.py does."""
    batch = trainer.data.batch(step)
    model = Flux2Transformer2DModel.from_pretrained(config.model.path, subfolder="transformer")
    model.requires_grad_(False)
    targets = match(config.lora, [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)])
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    own = trainer.weights()
    for name, parameter in adapter.parameters(model):
        parameter.data.copy_(own[name])
    noisy = (1 - batch.sigma_B.view(-1, 1, 1, 1)) * batch.latents_Bchw + batch.sigma_B.view(
        -1, 1, 1, 1
    ) * batch.noise_Bchw
    packed = Flux2Pipeline._pack_latents(noisy)
    prediction = model(
        hidden_states=packed,
        timestep=batch.sigma_B,
        guidance=torch.full((len(batch.ids),), config.train.guidance),
        encoder_hidden_states=batch.prompts_BLD,
        txt_ids=Flux2Pipeline._prepare_text_ids(batch.prompts_BLD),
        img_ids=Flux2Pipeline._prepare_latent_ids(batch.latents_Bchw),
        return_dict=False,
    )[0]
    unpacked = Flux2Pipeline._unpack_latents_with_ids(prediction, Flux2Pipeline._prepare_latent_ids(noisy))
    target = batch.noise_Bchw - batch.latents_Bchw
    loss = ((unpacked.float() - target.float()) ** 2).reshape(target.shape[0], -1).mean(1).mean()
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in adapter.parameters(model)}


def test_step_equals_diffusers_script(make_config: Make) -> None:
    """From the same noise, sigma, guidance and cached tensors: loss within 1e-6, LoRA gradients within 1e-5 of the
    reference."""
    config = make_config(train={"guidance": 3.5})
    fill_cache(config)
    trainer = Trainer(config)
    randomised(trainer)
    reference_loss, reference = reference_step(config, trainer, 0)
    [(_, loss)] = trainer.terms(trainer.data.batch(0))
    loss.backward()
    assert abs(float(loss) - reference_loss) <= 1e-6 * reference_loss
    assert reference.keys() == trainer.adapter.keys()
    for name, gradient in reference.items():
        ours = trainer.adapter[name].grad
        assert ours is not None
        assert (ours - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max()), name
        assert gradient.abs().max() > 0, f"{name} has no gradient in the reference: the test would show nothing"


def weights_after(config: Config, *, stop: int | None = None) -> dict[str, torch.Tensor]:
    """Train, stopping after `stop` steps as a killed process would: nothing written beyond the last checkpoint."""

    class Killed(BaseException):
        pass

    def on_step(record: dict) -> None:
        if record["step"] == stop:
            raise Killed

    trainer = Trainer(config)
    with contextlib.suppress(Killed):
        run(trainer, on_step)
    return trainer.weights()


def test_resumed_equals_uninterrupted(make_config: Make, tmp_path: Path) -> None:
    """Interrupted after step 7 and resumed from the checkpoint of step 6: weights and optimizer equal bit for bit."""
    straight = make_config(train={"steps": 12, "caption_dropout": 0.3}, run="straight")
    fill_cache(straight)
    whole = weights_after(straight)
    broken = make_config(train={"steps": 12, "caption_dropout": 0.3}, run="broken", output={"save_every": 3})
    weights_after(broken, stop=7)
    resumed = weights_after(broken)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    runs = Path(straight.output.root)
    ends = [checkpoint.newest(runs / run / "checkpoints") for run in ("straight", "broken")]
    assert ends[0] is not None
    assert ends[1] is not None
    assert all(torch.equal(ends[0].optimizer[name], ends[1].optimizer[name]) for name in ends[0].optimizer)
    steps = [line.split(",")[0] for line in (runs / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [f'{{"step": {n}' for n in range(1, 13)]


def test_accumulation_equals_the_whole_batch(make_config: Make) -> None:
    """Two forward passes of two pictures give the gradients of one of four, within 1e-6."""
    config = make_config(train={"batch_size": 4})
    fill_cache(config)
    gradients = []
    for micro in (None, 2, 1):
        trainer = Trainer(make_config(train={"batch_size": 4}, cluster={"micro_batch": micro}))
        randomised(trainer)
        batch = trainer.data.batch(0)
        for start in range(0, 4, micro or 4):
            [(_, loss)] = trainer.terms(batch.each(itemgetter(slice(start, start + (micro or 4)))))
            loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in trainer.adapter.items()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert (gradient - other[name]).abs().max() <= 1e-6 * max(1.0, gradient.abs().max())


@pytest.mark.parametrize("precision", ["fp32", pytest.param("int4", marks=pytest.mark.all_cases), "fp8-matmul"])
def test_recompute_changes_no_gradient(make_config: Make, precision: str) -> None:
    """Every `train.recompute`, and blocks streamed from the host, give the bits of keeping every activation."""
    fill_cache(make_config())
    gradients = []
    for recompute, strategy in (("none", "ddp"), ("selective", "ddp"), ("full", "ddp"), (1, "ddp"), ("auto", "stream")):
        trainer = Trainer(
            make_config(train={"recompute": recompute, "precision": precision}, cluster={"strategy": strategy})
        )
        randomised(trainer)
        [(_, loss)] = trainer.terms(trainer.data.batch(0))
        loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in trainer.adapter.items()})
    assert all(gradients[0][name].abs().max() > 0 for name in gradients[0])
    for other in gradients[1:]:
        assert all(torch.equal(gradients[0][name], other[name]) for name in gradients[0])


def test_projected_rows_train_the_same(make_config: Make) -> None:
    """Training on projected rows gives the loss of training on raw rows."""
    losses = []
    for stored in ("raw", "projected"):
        config = make_config(text={"stored": stored, "pads": "computed"})
        fill_cache(config)
        trainer = Trainer(config)
        [(_, loss)] = trainer.terms(trainer.data.batch(0))
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_bf16_base_keeps_the_adapter_in_fp32(make_config: Make) -> None:
    """With a bf16 base the adapter and its gradients stay fp32, and the loss stays near the fp32 loss."""
    fill_cache(make_config())
    full = Trainer(make_config())
    half = Trainer(make_config(train={"precision": "bf16"}))
    losses = []
    for trainer in (full, half):
        randomised(trainer)
        [(_, loss)] = trainer.terms(trainer.data.batch(0))
        loss.backward()
        losses.append(float(loss))
    assert {p.dtype for p in half.adapter.values()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in half.adapter.values())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


def spoilt(trainer: Trainer, bad: set[int]) -> Trainer:
    """A trainer that finds latents which are not finite in these steps (from 1)."""
    sound = trainer.data.batch

    def batch(step: int, **place: int) -> Batch:
        found = sound(step, **place)
        return replace(found, latents_Bchw=found.latents_Bchw * float("nan")) if step + 1 in bad else found

    trainer.data.batch = batch  # type: ignore[method-assign]
    return trainer


def test_not_finite_three_times_names_the_samples(make_config: Make) -> None:
    """A loss that is not finite skips the step; the third in a row, and no later one, stops the run and names its
    samples."""
    config = make_config(train={"steps": 10, "ema": 0.5})
    fill_cache(config)
    trainer = Trainer(config)
    before = trainer.weights()
    with pytest.raises(DataError, match=r"3 steps in a row \(now step 3, samples p\d, p\d\)"):
        run(spoilt(trainer, {1, 2, 3, 4}), lambda record: None)
    assert [record["skipped"] for record in metrics.read(RunFolder(config).metrics)] == [1, 2]
    for after in (trainer.weights(), trainer.ema):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_finite_step_begins_the_count_again(make_config: Make) -> None:
    """Two steps that are not finite, one that is, and two more: four are skipped and counted, the run goes on."""
    config = make_config(train={"steps": 6})
    fill_cache(config)
    assert run(spoilt(Trainer(config), {1, 2, 4, 5}), lambda record: None)
    records = metrics.read(RunFolder(config).metrics)
    assert [record.get("skipped") for record in records] == [1, 2, 2, 3, 4, 4]
    assert [record["loss"] is None for record in records] == [True, True, False, True, True, False]


def test_the_count_outlives_a_restart(make_config: Make) -> None:
    """Two steps that are not finite, a killed process, and a third: the run stops there, as if nobody had killed it."""

    class Killed(BaseException):
        pass

    def on_step(record: dict) -> None:
        if record["step"] == 3:
            raise Killed

    config = make_config(train={"steps": 6}, output={"save_every": 1})
    fill_cache(config)
    with contextlib.suppress(Killed):
        run(spoilt(Trainer(config), {2, 3}), on_step)
    with pytest.raises(DataError, match=r"3 steps in a row \(now step 4"):
        run(spoilt(Trainer(config), {4}), lambda record: None)


def test_the_average_follows_the_weights(make_config: Make) -> None:
    """`train.ema` averages the weights of each step with the growing decay of `ema.update`, from the first step on."""
    config = make_config(train={"ema": 0.9})
    fill_cache(config)
    trainer = Trainer(config)
    average = {name: weight.detach().clone() for name, weight in trainer.adapter.items()}
    for step in (1, 2, 3):
        trainer.train_step(trainer.data.batch(step - 1))
        kept = (1 + step) / (10 + step)
        average = {name: kept * average[name] + (1 - kept) * trainer.adapter[name].detach() for name in average}
        assert all(torch.allclose(average[name], trainer.ema[name], atol=1e-7) for name in average), step
    assert any(not torch.equal(trainer.ema[name], weight) for name, weight in trainer.adapter.items())


def test_changed_data_is_not_mixed_into_a_run(make_config: Make, photos: Path, tmp_path: Path) -> None:
    """A run whose data set changed since its checkpoint is refused instead of going on with other pictures."""
    config = make_config(train={"steps": 4}, output={"save_every": 2})
    fill_cache(config)
    weights_after(config, stop=3)
    folder = Path(config.output.root) / "test" / "checkpoints"
    last = checkpoint.newest(folder)
    assert last is not None
    checkpoint.write(folder, replace(last, step=3, facts=last.facts | {"samples": "x"}), keep=3)
    with pytest.raises(DataError, match="data set has changed"):
        Trainer(config)


def test_missing_rows_are_refused(make_config: Make) -> None:
    """A preview prompt that was not cached is refused before training, with the prompt in the message."""
    fill_cache(make_config())
    with pytest.raises(DataError, match=r"1 of 9 text rows are missing.*a blue sks"):
        Trainer(make_config(validate={"prompts": ["a blue [trigger]"]}))


def test_other_settings_are_refused_by_name(make_config: Make) -> None:
    """A configuration that was cached otherwise is refused with the key that differs."""
    fill_cache(make_config())
    with pytest.raises(DataError, match=r"text\.max_length is 128, cached with 96"):
        Trainer(make_config(text={"max_length": 128}))


def test_shared_cache_keeps_peoples_pictures_apart(make_config: Make, photos: Path, tmp_path: Path) -> None:
    """Two people with different pictures at the same path share one cache: each run trains on its own pictures."""
    ours = make_config(run="ours")
    fill_cache(ours)
    (photos / "p0.txt").rename(photos / "kept")
    try:
        (photos / "p0.txt").write_text("quite another sks caption")
        theirs = make_config(run="theirs", output={"root": str(tmp_path / "elsewhere")})
        model = fill_cache(theirs)
    finally:
        (photos / "kept").replace(photos / "p0.txt")
    opened = [TrainingData(config, model) for config in (ours, theirs)]
    captions = [
        {data.text_reader.attributes(key)["text"] for row in data.train for key in row["text_keys"]} for data in opened
    ]
    assert captions[1] - captions[0] == {"quite another sks caption"}
    assert captions[0] - captions[1] == {"a photo of sks number 0"}


def test_adapter_of_another_rank_is_refused(make_config: Make) -> None:
    """Weights of another rank are refused with both shapes."""
    config = make_config()
    fill_cache(config)
    trainer = Trainer(config)
    wrong = {name: torch.zeros(8, 8) for name in trainer.adapter}
    with pytest.raises(UsageError, match=r"lora\.rank asks for"):
        adapter.load(trainer.transformer, wrong, device=torch.device("cpu"))


def test_a_step_waits_for_the_device_once(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a step numbers come to the host, all of them together: the host hands out all else ahead of the device. And
    positions are made once for each size."""
    config = make_config(train={"preservation": "blank"})
    fill_cache(config)
    trainer = Trainer(config)
    batch = trainer.data.batch(0)
    trainer.train_step(batch)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)  # counts its steps on the host, on a CPU
    waits: list[str] = []
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *given, real=real, name=name: (waits.append(name), real(self, *given))[1]
        )
    made = latents.position_ids.cache_info().misses
    trainer.train_step(batch)
    monkeypatch.undo()
    assert waits == ["tolist"]
    assert latents.position_ids.cache_info().misses == made
