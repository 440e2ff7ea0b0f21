"""The end of a run: files out of the last checkpoint, the same each time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flux2_core.config.sections import Config
from flux2_core.errors import CacheloomError
from flux2_core.lora import reading
from flux2_core.output import export
from flux2_core.run import checkpoint
from flux2_core.run.checkpoint import Checkpoint
from flux2_core.run.folder import RunFolder
from tests.in_process import fill_cache

Make = Callable[..., Config]
NAME = "transformer_blocks.0.attn.to_q"


def adapter() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{NAME}.lora_A.weight": torch.randn(4, 32, generator=generator),
        f"{NAME}.lora_B.weight": torch.randn(32, 4, generator=generator),
    }


def test_a_run_is_exported_from_its_last_checkpoint(make_config: Make) -> None:
    """Both LoRA files carry the update times alpha / rank; report, card and result are there, and again the same."""
    config = make_config(lora={"rank": 4, "alpha": 2})
    model = fill_cache(config)
    folder = RunFolder(config)
    checkpoint.write(folder.checkpoints, Checkpoint(3, adapter(), {}, {"skipped": 0}), keep=3)
    with pytest.raises(CacheloomError, match="no checkpoint of step 4"):
        export.export(config, model, resumed_from=0)
    checkpoint.write(folder.checkpoints, Checkpoint(4, adapter(), {}, {"skipped": 0}), keep=3)
    result = export.export(config, model, resumed_from=3)
    assert (result["steps"], result["resumed_from"]) == (4, 3)
    for path in result["lora"].values():
        parts = {name: value.float() for name, value in reading.from_file(Path(path)).items()}
        found = parts[f"{NAME}.lora_B.weight"] @ parts[f"{NAME}.lora_A.weight"]
        wanted = 0.5 * adapter()[f"{NAME}.lora_B.weight"] @ adapter()[f"{NAME}.lora_A.weight"]
        assert (found - wanted).abs().max() <= 0.02 * wanted.abs().max()
    assert (folder.path / "report.html").is_file()
    assert "adapter" in json.dumps(result["facts"]).lower()
    assert (folder.path / "README.md").is_file()
    first = [Path(path).read_bytes() for path in result["lora"].values()]
    again = export.export(config, model, resumed_from=4)
    assert [len(Path(path).read_bytes()) for path in again["lora"].values()] == [len(data) for data in first]
    assert export.result(config, resumed_from=3) == result


def test_a_moving_average_has_files_of_its_own(make_config: Make) -> None:
    """With `train.ema` the average is written beside the last weights, in both namings, and named in the result."""
    config = make_config(train={"ema": 0.9})
    model = fill_cache(config)
    average = {name: value * 2 for name, value in adapter().items()}
    checkpoint.write(RunFolder(config).checkpoints, Checkpoint(4, adapter(), {}, {"skipped": 0}, average), keep=3)
    result = export.export(config, model, resumed_from=0)
    assert [Path(path).name for path in result["ema"].values()] == [
        "test-ema.safetensors",
        "test-ema-comfyui.safetensors",
    ]
    for kind, path in result["ema"].items():
        last, mean = (reading.from_file(Path(p)) for p in (result["lora"][kind], path))
        assert all(torch.equal(mean[name], 2 * value) for name, value in last.items())
    assert "ema" not in export.result(make_config(), resumed_from=0)
