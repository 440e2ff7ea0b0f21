"""The benchmarks run and print what they claim; no test here asserts a time."""

import json

import pytest
import torch

from bench import gpu_encode, gpu_probes, gpu_step, gpu_ten_minutes, scaling, sizes
from bench.__main__ import main
from bench.captions import lengths
from bench.measure import alternate
from bench.stored_bytes import PROJECTED, _size
from flux2_core.config.reading import parse
from flux2_core.placement import planner
from flux2_core.placement.planner import Placement
from flux2_core.plan import flops, roofline


def test_arms_take_turns_and_medians_are_compared() -> None:
    """A B A B after one unmeasured turn each; the ratio is of medians, so one slow round does not move it."""
    turns: list[str] = []
    costs = {"ours": iter([9.0, 2.0, 2.0, 50.0]), "theirs": iter([9.0, 6.0, 6.0, 6.0])}
    now = 0.0

    def arm(name: str) -> None:
        nonlocal now
        turns.append(name)
        now += next(costs[name])

    timings = alternate({"ours": lambda: arm("ours"), "theirs": lambda: arm("theirs")}, rounds=3, clock=lambda: now)
    assert turns == ["ours", "theirs"] * 4
    assert timings.median("ours") == 2.0
    assert timings.ratio("theirs", "ours") == 3.0
    assert timings.spread("theirs", "ours") == (6.0 / 50.0, 3.0)


def test_captions_have_the_stated_mean() -> None:
    """Lengths average the stated mean within 5 %, and differ."""
    drawn = lengths(200, mean=163)
    assert abs(sum(drawn) / len(drawn) - 163) < 8
    assert len(set(drawn)) > 50


def test_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt name exits 2 and lists what there is."""
    with pytest.raises(SystemExit) as stopped:
        main(["read_cach"])
    assert stopped.value.code == 2
    assert "read_cache" in capsys.readouterr().err


def test_bytes_of_a_caption_at_full_width() -> None:
    """Captions of 163 tokens, projected bf16 at FLUX.2-dev's width, take at most 2.1 MB each on disk, all included."""
    assert _size([163] * 4, width=PROJECTED, int8_rows=False) / 4 <= 2.1e6
    assert _size([163] * 4, width=PROJECTED, int8_rows=True) / 4 <= 1.05e6


def test_the_full_size_encoder() -> None:
    """The GPU benchmark builds the 34.7 GB of 30 layers that the product loads, and 6144 x 15360 of projection."""
    model, projection_ID = gpu_encode.encoder(gpu_encode.Sizes(), layers=30, device=torch.device("meta"))
    assert round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9, 1) == 34.7
    assert projection_ID.shape == (6144, 15360)


@pytest.mark.slow
def test_the_gpu_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Toy sizes go through the same code on any device: captions, the peers' path, pictures, as JSON lines."""
    assert gpu_encode.main(["--tiny", "--theirs", "--captions", "2", "--images", "2", "--rounds", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["what"] for row in rows] == [
        "captions",
        "captions, 4 layers of 512 tokens",
        "VAE images",
        "VAE images, bf16",
    ]
    assert min(row["per_second"] for row in rows) > 0
    assert rows[1]["ratio"] == pytest.approx(rows[0]["per_second"] / rows[1]["per_second"])


@pytest.mark.slow
def test_quick_benchmarks_print_their_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    """The two cheapest benchmarks, on toy sizes: a table line per case, and JSON whose ratio is theirs over ours."""
    assert main(["bytes", "read_cache", "--quick", "--json"]) == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["benchmark"] for row in rows] == ["bytes"] * 3 + ["read_cache"] * 4
    assert "| theirs / ours" in printed.err
    for row in rows:
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
        assert f"| {row['case']} " in printed.err


def test_gpu_step_on_toy_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """The GPU benchmark of the training step runs its every part without one, and says that it was a toy."""
    arguments = ["--tiny", "--precision", "fp8-matmul", "--recompute", "selective", "1", "--compile", "off"]
    assert gpu_step.main([*arguments, "--case", "512x4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["recompute"] for line in lines] == ["selective", "1"]
    assert all(line["tiny"] and line["device"] == "cpu" and line["planned_gb"] > 0 for line in lines)
    assert all(line["seconds"] > 0 and line["tflop_per_second"] >= 0 for line in lines)
    assert gpu_step.main([*arguments, "--seconds", "-1"]) == 0
    assert all("left_out" in json.loads(line) for line in capsys.readouterr().out.splitlines())


def test_gpu_step_on_a_streamed_toy(capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks in host memory are measured too, computed again as streaming has it, whatever policy is asked."""
    assert gpu_step.main(["--tiny", "--strategy", "stream", "--precision", "int8", "--case", "512x4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["strategy"], line["recompute"], line["compile"]) for line in lines] == [
        ("stream", "full", False),
        ("stream", "full", True),
    ]
    assert all(line["seconds"] > 0 for line in lines)


def test_useful_flop_of_a_step() -> None:
    """596 TFLOP for one 1024 px sample with 512 text rows on FLUX.2-dev, and 1 % for the adapter."""
    config = parse({"model": {"path": "x"}, "data": [{"path": "x"}], "train": {"batch_size": 1}})
    folder = sizes.sized(tiny=False)
    job = planner.job(config, folder, world=1, local=1)
    assert flops.step(job, Placement("ddp", "bf16", "none"), folder, 4096).flop == pytest.approx(596e12, rel=0.01)


def test_scaling_on_paper() -> None:
    """Every row fits its card; pictures a second grow with GPUs, and no sharded base is faster than its links."""
    head, *rows = scaling.rows()
    table = [dict(zip(head, row, strict=True)) for row in rows]
    assert {row["GPUs"] for row in table} == {"1", "8", "16", "64"}
    for row in table:
        (card,) = (card for card in roofline.CARDS if card.name == row["card, base"].partition(",")[0])
        assert float(row["on the card"].split()[0]) * 1e9 <= planner.FILLED * card.gib * 2**30
        assert 0.95 < float(row["efficiency"].rstrip("%")) / 100 < 1.4
        assert ("fsdp" in row["placement"]) <= (float(row["links busy"].rstrip("%")) > 10)


TENTH_OF_CORRECT = {("fp8-matmul", "stream"), ("bf16", "compile")}  # each costs a second or two; the rest is alike


def test_ten_minutes_on_toy_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """Every step of the script for a card runs here with toy sizes and prints JSON lines; what is compared with the CPU
    is the same on one."""
    mains = {"bench.gpu_probes": gpu_probes.main, "bench.gpu_step": gpu_step.main}
    for step in gpu_ten_minutes.STEPS:
        for module, *words in step.commands:
            if words[0] == "correct" and (words[1], words[2]) not in TENTH_OF_CORRECT:
                continue
            if module == "bench.gpu_step" and step.name not in ("stream", "selective"):
                words = ["--seconds", "-1", *words]  # understood, and left out: other tests run them
            assert mains[module]([*words, "--tiny"]) == 0
            lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            assert lines
            assert all(line["ok"] and set(line["apart"].values()) == {0.0} for line in lines if words[0] == "correct")


def test_a_step_that_crashes_or_hangs_loses_itself_alone() -> None:
    """What it printed before is kept, how it ended is said, and the next one runs; with no time left none begins."""
    told = "print('{\"seconds\": 1}', flush=True)"
    ends = {"crash": f"{told}; import os; os._exit(3)", "hang": f"{told}; import time; time.sleep(60)", "well": told}
    steps = [
        gpu_ten_minutes.Step(name, "", 5, (("timeit", "-n", "1", "-r", "1", code),)) for name, code in ends.items()
    ]
    lines = list(gpu_ten_minutes.lines(steps, seconds=600))
    assert [line["step"] for line in lines if line.get("seconds") == 1] == list(ends)
    assert [line["failed"] for line in lines if "failed" in line] == [3]
    assert [line["timed_out_s"] for line in lines if "timed_out_s" in line] == [5]
    assert [line["step"] for line in lines if "took_s" in line] == list(ends)
    assert [line["left_out"] for line in gpu_ten_minutes.lines(steps[:1], seconds=1)] == ["after 1 s"]
