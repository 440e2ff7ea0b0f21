"""What a person reads at a terminal: aligned, with units, the worst first, and what to do next."""

from typing import Any

import pytest

from flows import wording

PLAN: dict[str, Any] = {
    "run": "r",
    "samples": {"kept": 1200, "ids": [], "rows": 2400, "validation": 60, "quarantined": [], "excluded": []},
    "buckets": [
        {"height": 64, "width": 96, "samples": 1000, "pixels_lost": 0.051, "most_lost": 0.12},
        {"height": 1024, "width": 1024, "samples": 9, "pixels_lost": 0.0, "most_lost": 0.0},
    ],
    "rows": {name: {"needed": 1200, "cached": 200, "missing": 1000} for name in ("text", "latents")},
    "bytes": {"text": 2_500_000_000, "latents": 1_500, "to_write": 10**6, "total": 2 * 10**12},
    "tokens": {"limit": 512, "longest": 600, "mean": 163.2, "truncated": [], "histogram": [
        {"from": 1, "to": 64, "texts": 1}, {"from": 65, "to": 128, "texts": 900}, {"from": 513, "to": None, "texts": 2},
    ]},
    "triggers": [{"dataset": 0, "trigger": "sks", "captions": 9, "mentioned": 5, "injected": 1, "without": ["a"]}],
    "time": {
        "text": {"seconds": 7300.0, "device": "H200", "tokens_per_second": 12345.6},
        "latents": {"seconds": 0.0, "device": None, "tokens_per_second": None},
        "train": {"seconds": 200.0, "seconds_per_step": 1.05, "run": "before"},
        "gpu_hours": 2.5, "cost": 7.25,
    },
    "memory": {"card_gb": 80.0, "chosen": {}, "alternatives": []},
    "warnings": [f"warning {number}" for number in range(5)],
}  # fmt: skip
ROW = {"total_gb": 61.2, "fits": True, "strategy": "ddp", "precision": "fp8", "recompute": "none", "relative_time": 1.0}


def told(**changed: Any) -> str:
    memory = {"card_gb": 80.0, "chosen": ROW, "alternatives": [ROW, ROW | {"total_gb": 97.0, "fits": False}]}
    return wording.plan(PLAN | {"memory": memory} | changed, "my.toml")


def test_a_plan_says_all_of_it() -> None:
    """Counts with thousands, sizes and times with units, three warnings of five, the cost, and the next command."""
    text = told()
    for words in (
        "1,200 pictures kept, 60 of them held out", "2,400 samples", "96 x 64", "5.1%, at most 12.0%", "nothing",
        "2.50 GB", "1.5 kB", "1.00 MB to write, 2.00 TB in all", "about 2.0 h on H200 (12,346 tokens/s)",
        "nothing to do", "about 3.3 min (1.05 s a step, as in run before)", "2.50 device-hours, which cost 7.25",
        "163 tokens on average, 600 at most (limit 512)", "over 512", "in 5 of 9 captions, put there in 1 picture; 1 p",
        "=>", "61.2 of 80 GB", "97.0 of 80 GB, too much", "warning 2", "... and 2 warnings more",
    ):  # fmt: skip
        assert words in text, words
    assert "warning 3" not in text
    assert text.endswith("\n\nnext: cacheloom run my.toml")


def test_columns_are_aligned() -> None:
    """In a table numbers end in one column and words begin in one; no line has white space at its end."""
    lines = told().splitlines()
    (head,) = [line for line in lines if line.startswith("rows")]
    for name in ("text", "latents"):
        (row,) = [line for line in lines if line.startswith(name)]
        for word in ("needed", "cached"):
            end = head.index(word) + len(word)
            assert row[end - 1].isdigit(), (head, row)
            assert row[end] == " "
    assert all(line == line.rstrip() for line in lines)


def test_a_refused_plan_says_no_next_step() -> None:
    """Data that is refused is not to be run; the first files are listed by their last two parts, the rest counted."""
    broken = [{"path": f"/data/set/p{number}.jpg", "reason": "empty"} for number in range(9)]
    text = told(samples=PLAN["samples"] | {"quarantined": broken}, refused="too many")
    assert "next:" not in text
    assert "  set/p0.jpg: empty" in text
    assert "set/p5.jpg" not in text
    assert "... and 4 more" in text


def test_nothing_measured_is_said_so() -> None:
    """Where no rate is known there is no number, and no hours and no cost."""
    text = told(time=dict.fromkeys(PLAN["time"]), memory={"card_gb": None, "reason": "no GPU is known"})
    assert text.count("not measured yet") == 3
    assert "memory per GPU: no GPU is known" in text
    assert "device-hours" not in text


def test_many_buckets_are_summed_up() -> None:
    """Of more than twelve buckets the fullest eleven are shown, the others in one line that accounts for all."""
    many = [{"height": 16 * n, "width": 64, "samples": n, "pixels_lost": 0, "most_lost": 0} for n in range(1, 31)]
    text = told(buckets=many)
    assert "19 more" in text
    assert f"{sum(range(1, 20))}" in text


@pytest.mark.parametrize(("seconds", "words"), [(0, "0 s"), (119, "119 s"), (180, "3.0 min"), (7200, "2.0 h")])
def test_durations_have_units(seconds: float, words: str) -> None:
    """Seconds up to two minutes, minutes up to two hours, hours."""
    assert wording._duration(seconds) == words
