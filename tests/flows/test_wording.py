"""What a person reads at a terminal: aligned, with units, the worst first, and what to do next."""

from typing import Any

import pytest

from flows import wording

PLAN: dict[str, Any] = {
    "run": "r",
    "samples": {"kept": 1200, "ids": [], "rows": 2400, "validation": 60, "pairs": 0, "quarantined": [], "excluded": []},
    "buckets": [
        {"height": 64, "width": 96, "samples": 1000, "pixels_lost": 0.051, "most_lost": 0.12},
        {"height": 1024, "width": 1024, "samples": 9, "pixels_lost": 0.0, "most_lost": 0.0},
    ],
    "rows": {
        "text": {"needed": 1200, "cached": 200, "missing": 1000, "why": {"max_length": 990, "text": 9, "new": 1}},
        "latents": {"needed": 1200, "cached": 0, "missing": 1200, "why": {"new": 1200}},
    },
    "bytes": {"text": 2_500_000_000, "latents": 1_500, "to_write": 10**6, "total": 2 * 10**12},
    "tokens": {"limit": 512, "longest": 600, "mean": 163.2, "truncated": [], "histogram": [
        {"from": 1, "to": 64, "texts": 1}, {"from": 65, "to": 128, "texts": 900}, {"from": 513, "to": None, "texts": 2},
    ]},
    "triggers": [{"dataset": 0, "trigger": "sks", "captions": 9, "mentioned": 5, "injected": 1, "without": ["a"]}],
    "time": {
        "text": {
            "seconds": 7300.0, "device": "H200", "tokens_per_second": 12345.6, "measured_rows": 999, "rough": False
        },
        "latents": {"seconds": 0.0, "device": None, "tokens_per_second": None, "measured_rows": None, "rough": False},
        "train": {"seconds": 200.0, "seconds_per_step": 1.05, "run": "before", "measured_steps": 99, "rough": False},
        "gpu_hours": 2.5, "cost": 7.25, "rough": False,
    },
    "steps": 1500,
    "references": {"pictures": {"1": 2, "3": 698}, "unmatched": [], "previews": 2},
    "noise": [{
        "distribution": "linear", "quantiles": [0.05, 0.5, 0.95], "density": [0.0, 0.25, 0.75, 0.0],
        "sampler": [0.326, 0.887, 0.995], "sampler_density": [0.1, 0.2, 0.3, 0.4],
    }],
    "estimate": {
        "card": "H100", "here": False, "most_of_it": "matmuls",
        "text": {"likely": 60.0, "least": 40.0, "most": 200.0}, "latents": {"likely": 9.0, "least": 8.0, "most": 10.0},
        "train": {"likely": 1500.0, "least": 900.0, "most": 2400.0}, "step": {"likely": 1.5, "least": 0.9, "most": 2.4},
        "gpu_hours": {"likely": 0.44, "least": 0.3, "most": 0.7}, "cost": {"likely": 1.3, "least": 0.9, "most": 2.1},
    },
    "memory": {"card_gb": 84.9, "limit_gb": 80.0, "chosen": {}, "alternatives": []},
    "warnings": [f"warning {number}" for number in range(5)],
}  # fmt: skip
ROW = {
    "total_gb": 61.2, "host_gb": 0.0, "fits": True, "decodes": True,
    "strategy": "ddp", "precision": "fp8", "recompute": "none", "relative_time": 1.0,
}  # fmt: skip


def told(**changed: Any) -> str:
    memory = {
        "card_gb": 84.9,
        "limit_gb": 80.0,
        "chosen": ROW,
        "alternatives": [ROW, ROW | {"total_gb": 97.0, "fits": False}],
    }
    return wording.plan(PLAN | {"memory": memory} | changed, "my.toml")


def test_a_plan_says_all_of_it() -> None:
    """Counts with thousands, sizes and times with units, three warnings of five, the cost, and the next command."""
    text = told()
    for words in (
        "1,200 pictures kept, 60 of them held out", "2,400 samples", "96 x 64", "5.1%, at most 12.0%", "nothing",
        "2.50 GB", "1.5 kB", "1.00 MB to write, 2.00 TB in all", "about 2.0 h on H200 (12,346 tokens/s)",
        "nothing to do", "about 3.3 min (1.05 s a step, as in run before)", "2.50 device-hours, which cost 7.25",
        "163 tokens on average, 600 at most (limit 512)", "over 512", "in 5 of 9 captions, put there in 1 picture; 1 p",
        "1,500 steps of training", "trained: linear", "| ▃█ |", "0.887",
        "references beside 700 pictures: 2 of 1, 698 of 3", "2 pictures shown to the model in previews",
        "=>", "61.2 of 80 GB", "97.0 of 80 GB, too much",
        "warning 2", "... and 2 warnings more",
    ):  # fmt: skip
        assert words in text, words
    assert "warning 3" not in text
    assert text.endswith("\n\nnext: cacheloom run my.toml")


def test_what_was_never_measured_is_estimated() -> None:
    """Where no run has measured it: a likely time with its span, the card that it is for, what takes most, and what it
    costs."""
    never = dict.fromkeys(("text", "latents", "train", "gpu_hours", "cost")) | {"rough": False}
    text = told(time=never)
    for words in (
        "about 60 s (40 s to 3.3 min) on H100, estimated", "about 9 s (8 s to 10 s) on H100, estimated",
        "training takes about 25.0 min (15.0 min to 40.0 min) on H100, estimated: 1.5 (0.9 to 2.4) s a step, most",
        "0.44 (0.3 to 0.7) device-hours, which cost 1.30 (0.90 to 2.10); estimated, for the card H100, as none",
    ):  # fmt: skip
        assert words in text, words
    assert "as none" not in told(time=never, estimate=PLAN["estimate"] | {"here": True})
    assert "estimated" not in told(), "what was measured is said instead"
    brief = dict.fromkeys(("likely", "least", "most"), 0.3)
    assert "under 1 s on H100, estimated" in told(time=never, estimate=PLAN["estimate"] | {"latents": brief})


def test_why_rows_are_encoded_again() -> None:
    """A line for each reason, in words where it is no setting; nothing of a table that nothing was cached in."""
    lines = told().splitlines()
    place = lines.index("  990 text rows: max_length has changed")
    assert lines[place + 1] == "  9 text rows: the caption of its picture has changed"
    assert lines[place + 2] == "  1 text row: nothing like it is cached"
    assert not [line for line in lines if "latents row" in line]


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
    broken = [{"path": f"/data/set/p{number}.jpg", "reason": f"of {number} bytes"} for number in range(9)]
    text = told(samples=PLAN["samples"] | {"quarantined": broken}, refused="too many")
    assert "next:" not in text
    assert "  set/p0.jpg: of 0 bytes" in text
    assert "set/p5.jpg" not in text
    assert "... and 4 more" in text


def test_nothing_measured_and_nothing_estimated_is_said_so() -> None:
    """Where no rate is known and none can be estimated there is a reason, no number, no hours and no cost."""
    unknown = {"card": "A100", "here": True, "reason": "no placement fits"}
    memory = {"card_gb": None, "reason": "no GPU is known"}
    text = told(time=dict.fromkeys(PLAN["time"]), memory=memory, estimate=unknown)
    assert "training time: not measured yet, and not estimated: no placement fits" in text
    assert text.count("not measured yet") == 3
    assert "memory per GPU: no GPU is known" in text
    assert "device-hours" not in text


def test_streamed_blocks_are_said_to_take_host_memory() -> None:
    """Beside the bytes of a card stand those of its node, where a placement takes any."""
    row = ROW | {"total_gb": 8.7, "host_gb": 62.8, "fits": False, "strategy": "stream"}
    text = told(memory={"card_gb": 25.5, "limit_gb": 24.0, "chosen": ROW, "alternatives": [ROW, row]})
    assert "8.7 of 24 GB + 62.8 GB of a node's host memory, too much" in text
    assert text.count("host memory") == 1
    assert "GB, previews decoded by the CPU" in told(
        memory={"limit_gb": 24.0, "alternatives": [], "chosen": ROW | {"decodes": False}}
    )


def test_where_encoders_lie_is_said() -> None:
    """A line for each encoder that fits, and the advice; what is refused stands among the warnings alone."""
    row = {"strategy": "stream", "per_pass": 8192, "total_gb": 7.8, "host_gb": 33.3, "advice": "set x"}
    vae = {"strategy": "whole", "per_pass": 4194304, "total_gb": 13.1, "host_gb": 0.0}
    memory = {"card_gb": 25.5, "limit_gb": 24.0, "chosen": ROW, "alternatives": [ROW]}
    text = told(memory=memory | {"encoders": {"text": row, "latents": vae | {"refused": "too large"}}})
    assert (
        "text encoder  7.8 GB + 33.3 GB of a node's host memory  streamed layer by layer  8,192 tokens a pass" in text
    )
    assert "\n  or: set x\n" in text
    assert "latents encoder" not in text
    assert "latents encoder  13.1 GB  whole  4,194,304 pixels a pass" in told(memory={"encoders": {"latents": vae}})


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


@pytest.mark.parametrize(
    ("corrupt", "missing", "dropped", "todo"),
    [
        (0, 0, 0, None),
        (2, 0, 0, "cacheloom verify --drop my.toml, then cacheloom cache my.toml"),
        (2, 0, 1, "cacheloom verify --drop my.toml, then cacheloom cache my.toml"),
        (2, 0, 2, "cacheloom cache my.toml"),
        (0, 1, 0, "cacheloom cache my.toml"),
    ],
)
def test_verify_says_how_to_mend(corrupt: int, missing: int, dropped: int, todo: str | None) -> None:
    """Corrupt rows that are still there must be dropped first; what is missing `cache` encodes; else all is well."""
    found = {
        "rows": 15, "compared": 8, "dropped": dropped, "not_compared": ["p4.png: gone"],
        "corrupt": [{"of": "p3", "reason": "checksum"}] * corrupt, "missing": [{"of": "p1", "uri": "cache"}] * missing,
    }  # fmt: skip
    text = wording.verify(found, "my.toml")
    assert text.startswith(f"15 rows read, 8 encoded again, {corrupt + missing or 'none'} bad\n")
    assert text.count("checksum") == corrupt
    assert "not compared: p4.png: gone" in text
    assert ("next: " in text) == (todo is not None)
    assert todo is None or text.endswith(f"\n\nnext: {todo}, which encodes what is missing")


def test_a_run_says_where_everything_is() -> None:
    """Facts, both LoRA files, the newest grid, the mirror where there is one, and how to look at it."""
    result = {
        "facts": {"Steps": 40}, "lora": {"diffusers": "r.safetensors", "comfyui": "r-comfyui.safetensors"},
        "previews": ["step-000000.png", "step-000040.png"], "report": "report.html", "run": "runs/r", "warnings": [],
    }  # fmt: skip
    text = wording.trained(result, "my.toml")
    for words in ("Steps", "40", "r.safetensors", "r-comfyui.safetensors", "step-000040.png", "report.html", "runs/r"):
        assert words in text
    assert "step-000000.png" not in text
    assert "Mirror" not in text
    assert "! the data has changed" in wording.trained(result | {"warnings": ["the data has changed"]}, "my.toml")
    assert "s3://bucket/r" in wording.trained(result | {"mirror": "s3://bucket/r", "previews": []}, "my.toml")


def test_reasons_are_said_once() -> None:
    """Pictures that are left out for one reason share a line, the commonest reason first; the rest is counted; a run
    names them too, and the files of its moving average."""
    entries = [{"path": f"/photos/{n}.png", "reason": "no caption"} for n in range(5)]
    entries = [{"path": "/photos/odd.gif", "reason": "an animation"}, *entries]
    result = {
        "lora": {"diffusers": "r.safetensors", "comfyui": "c.safetensors"}, "previews": [], "report": "r", "run": "r",
        "warnings": [], "facts": {"Steps": "4"}, "ema": {"diffusers": "r-ema.safetensors"},
        "samples": {"quarantined": entries},
    }  # fmt: skip
    lines = wording.trained(result, "my.toml").splitlines()
    place = lines.index("6 pictures left out as unusable:")
    assert lines[place + 1] == "  photos/0.png, photos/1.png, photos/2.png and 2 more: no caption"
    assert lines[place + 2] == "  photos/odd.gif: an animation"
    assert any(line.startswith("moving average for diffusers") and "r-ema" in line for line in lines)


def test_a_dry_gc_promises_and_a_real_one_reports() -> None:
    """`gc` says what went, or would go, and why the rest stays."""
    found = {
        "dropped": {"text": 1200, "latents": 3}, "files": 2, "freed": 5 * 10**6, "kept_young": 1, "caching": True,
        "skipped": ["runs/x: another contract"], "held": ["train of runs/y by ann on gpu7"],
    }  # fmt: skip
    dry, real = (wording.gc(found | {"dry_run": dry_run}, "my.toml") for dry_run in (True, False))
    gone = "1,200 text rows, 3 latents rows and 2 files under samples/ {0} dropped, 5.00 MB {0} freed"
    assert dry.startswith(gone.format("would be"))
    assert real.startswith(gone.format("were"))
    for words in (
        "1 unneeded row too young",
        "a `cache` is at work",
        "left alone: runs/x: another contract",
        "held: train of",
    ):
        assert words in dry
        assert words in real
    assert ("keep their files" in dry, "keep their files" in real) == (False, True)


def test_a_cache_is_told_in_columns() -> None:
    """`cache` and `stat` say counts, places and what is due of both tables."""
    table = {"encoded": 7, "reused": 1000, "uri": "s3://bucket/cache/text"}
    made = {"text": table, "latents": table, "samples": {"quarantined": []}, "warnings": []}
    assert wording.cache(made, "my.toml").endswith("s3://bucket/cache/text\n\nnext: cacheloom train my.toml")
    held = {
        "rows": 1200, "bytes": 2_500_000_000, "files": 3, "version": 4, "age_days": None, "fingerprint": "f" * 64,
        "uri": "u", "compaction_due": False,
    }  # fmt: skip
    text = wording.stat({"text": held, "latents": held | {"age_days": 1.25, "compaction_due": True}, "samples": 1}, "")
    for words in ("1,200", "2.50 GB", "f" * 12, " - ", "1.2", "1 sample of this", "many small files of latents rows"):
        assert words in text
    assert "f" * 13 not in text
    assert "files of text rows" not in text
