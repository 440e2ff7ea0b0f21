"""The rehearsal at full size, in toy sizes."""

import json
from pathlib import Path

import pytest

from bench import full_size, rehearse
from bench.full_size import SIZES


def test_random_weights_are_the_same_and_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is a whole model in several files, the same bytes each time, and no file larger than told."""
    monkeypatch.setattr(full_size, "SHARD", 100_000)
    written = []
    for name in ("one", "two"):
        model = full_size.describe(tmp_path / name, full_size.tiny(SIZES["klein-4b"]))
        full_size.write(model)
        files = {part: model.weight_files(part) for part in full_size.PARTS}
        assert all(set(model.tensor_files(part)) == set(full_size.tensors(model, part)) for part in files)
        written.append([file.read_bytes() for part in files for file in files[part]])
    assert written[0] == written[1]
    assert len(written[0]) > 2 * len(full_size.PARTS)
    largest = max(one.nbytes for part in full_size.PARTS for one in full_size.tensors(model, part).values())
    assert max(map(len, written[0])) < max(largest, 100_000) + 20_000, "and the names in front"


def test_published_sizes(tmp_path: Path) -> None:
    """The sizes are those that were published: parameters of the transformer, and bytes of all of klein-4B."""
    known = {"dev": 32_223_281_152, "klein-9b": 9.08e9, "klein-4b": 3.88e9}
    for name, parameters in known.items():
        model = full_size.describe(tmp_path / name, SIZES[name])
        assert model.published
        assert model.published.name == name
        counted = sum(one.numel() for one in full_size.tensors(model, "transformer").values())
        assert counted == pytest.approx(parameters, rel=0 if name == "dev" else 0.002)
    total = sum(one.nbytes for part in full_size.PARTS for one in full_size.tensors(model, part).values())
    assert total == pytest.approx(16.1e9, rel=0.01)


@pytest.mark.slow
@pytest.mark.all_cases
def test_the_whole_way_in_toy_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """plan, cache, train and sample end well one after the other; each has its seconds and its largest process."""
    assert rehearse.main(["klein-4b", "--tiny", "--folder", str(tmp_path)]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if not line.startswith("| |")]
    named = {row[0].strip("| "): row for row in rows if row[0].strip("| ") in rehearse.VERBS}
    assert list(named) == list(rehearse.VERBS)
    assert all(float(row[3]) > 0.1 for row in named.values())
    assert json.loads((tmp_path / "runs" / "rehearsal" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    lora = tmp_path / "runs" / "rehearsal" / "lora"
    assert {file.name for file in lora.iterdir()} >= {"rehearsal.safetensors", "rehearsal-comfyui.safetensors"}
    assert list((tmp_path / "runs" / "rehearsal" / "samples").rglob("*.png"))
