"""Results in words, for a person at a terminal: a function for each verb, which may end with what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

SHOWN = 5  # of a list of files; all of them are in --json
NAMED = 3  # of files with one reason
WARNINGS = 3
BAR, BLOCK = 24, "█"  # letters of the longest bar, and what they are
BARS = " ▁▂▃▄▅▆▇█"  # upright ones, the first of nothing
TABLES = ("text", "latents")
WHY = {  # a row is encoded, where it is no field of a fingerprint that has changed
    "new": "nothing like it is cached",
    "gone": "cached before and gone since: dropped by gc or verify, or lost",
    "text": "the caption of its picture has changed",
    "source": "the file of its picture has changed",
    "unexplained": "not looked at: --json and this list explain the first 100,000",
}


def plan(result: dict[str, Any], config: str) -> str:
    """What is kept and left out, what it will take, and how to begin."""
    samples, rows, size = result["samples"], result["rows"], result["bytes"]
    kept = [f"{_count(samples['kept'], 'picture')} kept"]
    kept += [f"{samples['validation']} of them held out for validation"] if samples["validation"] else []
    kept += [f"{samples['pairs']} of them better than a rejected one"] if samples["pairs"] else []
    kept += [f"{samples['rows']:,} samples of them"] if samples["rows"] != samples["kept"] else []
    blocks = [f"Run {result['run']}: {', '.join(kept)}", *_left_out("left out as unusable", samples["quarantined"])]
    blocks += _left_out("left out by min_size, max_size, skip_captions", samples["excluded"])
    if beside := result["references"]["pictures"]:
        each = ", ".join(f"{pictures:,} of {count}" for count, pictures in beside.items())
        blocks.append(f"references beside {_count(sum(beside.values()), 'picture')}: {each}")
    if count := result["references"]["previews"]:
        blocks.append(f"{_count(count, 'picture')} shown to the model in previews")
    blocks += ["", *_columns(_buckets(result["buckets"]))] if result["buckets"] else []
    blocks += ["", *_columns(_tables(rows, size, result))]
    blocks += [line for name in TABLES for line in _why(name, rows[name])]
    blocks.append(
        f"  {_bytes(size['to_write']) if size['to_write'] else 'nothing'} to write, {_bytes(size['total'])} in all"
    )
    blocks += ["", *_tokens(result["tokens"])]
    blocks += [_trigger(entry) for entry in result["triggers"]]
    blocks += [line for levels in result["noise"] for line in ("", *_noise(levels))]
    blocks += ["", f"{_count(result['steps'], 'step')} of training", *_cost(result)]
    blocks += _warnings(result["warnings"])
    blocks += [] if "refused" in result else ["", f"next: cacheloom run {config}"]
    return "\n".join(blocks)


def _buckets(buckets: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    most = max(bucket["samples"] for bucket in buckets)
    lines = [["bucket", "samples", "", "cropped away"]]
    shown = buckets if len(buckets) <= 12 else sorted(buckets, key=lambda bucket: -bucket["samples"])[:11]
    for bucket in shown:
        size, bar = f"{bucket['width']} x {bucket['height']}", BLOCK * max(1, round(BAR * bucket["samples"] / most))
        lost = f"{bucket['pixels_lost']:.1%}, at most {bucket['most_lost']:.1%}" if bucket["most_lost"] else "nothing"
        lines.append([size, f"{bucket['samples']:,}", bar, lost])
    rest = sum(bucket["samples"] for bucket in buckets) - sum(bucket["samples"] for bucket in shown)
    return [*lines, *([[f"{len(buckets) - len(shown)} more", f"{rest:,}", "", ""]] if rest else [])]


def _tables(rows: Mapping[str, Any], size: Mapping[str, int], result: Mapping[str, Any]) -> list[list[str]]:
    lines = [["rows", "needed", "cached", "to encode", "size", "encoding takes"]]
    for name in TABLES:
        counts = [f"{rows[name][kind]:,}" for kind in ("needed", "cached", "missing")]
        lines.append([name, *counts, _bytes(size[name]), _takes(result["time"][name], result["estimate"], name)])
    return lines


def _takes(time: Mapping[str, Any] | None, estimate: Mapping[str, Any], name: str) -> str:
    if time is None:
        return "not measured yet" if "reason" in estimate else _estimated(estimate, name)
    if time["device"] is None:
        return "nothing to do"
    sure = f"; rough: measured on {_count(time['measured_rows'], 'row')}" if time["rough"] else ""
    return f"about {_duration(time['seconds'])} on {time['device']} ({time['tokens_per_second']:,.0f} tokens/s{sure})"


def _why(name: str, rows: Mapping[str, Any]) -> list[str]:
    """Why rows are to be encoded, a line for each reason; nothing where nothing was cached yet."""
    why = rows["why"]
    if not rows["cached"] and not why.keys() - {"new"}:
        return []
    return [f"  {_count(why[what], f'{name} row')}: {WHY.get(what, f'{what} has changed')}" for what in why]


def _tokens(tokens: Mapping[str, Any]) -> list[str]:
    bins = tokens["histogram"]
    most = max(place["texts"] for place in bins) or 1
    lines = [
        ["  " + (f"{place['from']} to {place['to']}" if place["to"] else f"over {tokens['limit']}"),
         f"{place['texts']:,}", BLOCK * math.ceil(BAR * place["texts"] / most)]
        for place in bins if place["texts"]
    ]  # fmt: skip
    head = f"prompts have {tokens['mean']:.0f} tokens on average, {tokens['longest']} at most (limit {tokens['limit']})"
    return [head, *(_columns(lines) if len(lines) > 1 else [])]


def _trigger(entry: Mapping[str, Any]) -> str:
    told = f"trigger {entry['trigger']!r} is in {entry['mentioned']:,} of {_count(entry['captions'], 'caption')}"
    told += f", put there in {_count(entry['injected'], 'picture')}" if entry["injected"] else ""
    return told + (f"; {_count(len(entry['without']), 'picture')} without it" if entry["without"] else "")


def _noise(levels: Mapping[str, Any]) -> list[str]:
    """Which noise levels are drawn, beside those that the sampler goes through."""
    rows = [["noise levels (0 picture, 1 noise)", "5 %", "median", "95 %", "how often, from 0 to 1"]]
    bars = "".join(BARS[math.ceil(share / max(levels["density"]) * (len(BARS) - 1))] for share in levels["density"])
    drawn = [f"{level:.3f}" for level in levels["quantiles"]]
    rows.append([f"trained: {levels['distribution']}", *drawn, f"|{bars}|"])
    rows.append(["the sampler's steps", *(f"{level:.3f}" for level in levels["sampler"]), ""])
    return _columns(rows)


def _cost(result: Mapping[str, Any]) -> list[str]:
    time, estimate, lines = result["time"], result["estimate"], []
    if train := time["train"]:
        each = f"{train['seconds_per_step']:.3g} s a step, as in run {train['run']}"
        each += f"; rough: measured on {_count(train['measured_steps'], 'step')}" if train["rough"] else ""
        lines.append(f"training takes about {_duration(train['seconds'])} ({each})")
    elif reason := estimate.get("reason"):
        lines.append(f"training time: not measured yet, and not estimated: {reason}")
    else:
        each = f"{_span(estimate['step'], '.3g')} s a step, most of it {estimate['most_of_it']}"
        lines.append(f"training takes {_estimated(estimate, 'train')}: {each}")
    if time["gpu_hours"] is not None:
        cost = "" if time["cost"] is None else f", which cost {time['cost']:,.2f}"
        rough = "; rough, as what it is made of" if time["rough"] else ""
        lines.append(f"in all about {time['gpu_hours']:.2f} device-hours{cost}{rough}")
    elif "reason" not in estimate:
        cost = f", which cost {_span(estimate['cost'], ',.2f')}" if "cost" in estimate else ""
        why = "" if estimate["here"] else f", for the card {estimate['card']}, as none that is known is here"
        lines.append(f"in all about {_span(estimate['gpu_hours'], '.2g')} device-hours{cost}; estimated{why}")
    return [*lines, *_memory(result["memory"]), *_encoders(result["memory"].get("encoders", {}))]


def _estimated(estimate: Mapping[str, Any], name: str) -> str:
    likely, least, most = (_duration(estimate[name][end]) for end in ("likely", "least", "most"))
    told = f"about {likely} ({least} to {most})" if least != most else f"about {likely}"
    told = told if estimate[name]["most"] >= 1 else "under 1 s"
    return f"{told} on {estimate['card']}, estimated"


def _span(span: Mapping[str, float], form: str) -> str:
    likely, least, most = (format(span[end], form) for end in ("likely", "least", "most"))
    return f"{likely} ({least} to {most})" if least != most else likely


def _memory(memory: Mapping[str, Any]) -> list[str]:
    """What the planner chose, and what else it looked at."""
    chosen = memory.get("chosen")
    if chosen is None:
        return [f"memory per GPU: {memory['reason']}"] if "reason" in memory else []
    lines = [["", "memory per GPU", "strategy", "precision", "recompute", "time"]]
    others = [row for row in memory["alternatives"] if row != chosen][: SHOWN - 1]
    for row in [chosen, *others]:
        host = f" + {row['host_gb']:.1f} GB of a node's host memory" if row["host_gb"] else ""
        host += "" if row["decodes"] else ", previews decoded by the CPU"
        size = f"{row['total_gb']:.1f} of {memory['limit_gb']:.0f} GB{host}{'' if row['fits'] else ', too much'}"
        how = [str(row[name]) for name in ("strategy", "precision", "recompute")]
        lines.append(["=>" if row is chosen else "", size, *how, f"{row['relative_time']:.2f}"])
    return ["", *_columns(lines)]


def _encoders(placed: Mapping[str, Any]) -> list[str]:
    """Where each encoder lies; what is refused stands among the warnings."""
    lines = []
    for name, unit in (("text", "tokens"), ("latents", "pixels")):
        row = placed.get(name, {})
        if "refused" not in row and row:
            host = f" + {row['host_gb']:.1f} GB of a node's host memory" if row["host_gb"] else ""
            how = "streamed layer by layer" if row["strategy"] == "stream" else "whole"
            lines.append(
                [f"{name} encoder", f"{row['total_gb']:.1f} GB{host}", how, f"{row['per_pass']:,} {unit} a pass"]
            )
    return [*_columns(lines), *([f"  or: {advice}"] if (advice := placed.get("text", {}).get("advice")) else [])]


def cache(result: dict[str, Any], config: str) -> str:
    """What was encoded, and how to go on."""
    head = ["rows", "encoded now", "reused", "table"]
    lines = [
        [name, f"{result[name]['encoded']:,}", f"{result[name]['reused']:,}", result[name]["uri"]] for name in TABLES
    ]
    left_out = _left_out("left out as unusable", result["samples"]["quarantined"])
    shown = [*_columns([head, *lines]), *left_out, *_warnings(result["warnings"])]
    return "\n".join([*shown, "", f"next: cacheloom train {config}"])


def trained(result: dict[str, Any], _: str) -> str:
    """The facts of a run, and where everything is."""
    lora, grids = result["lora"], result["previews"]
    rows = [[name, str(value)] for name, value in result["facts"].items()]
    rows += [["", ""], ["LoRA for diffusers", lora["diffusers"]], ["LoRA for ComfyUI", lora["comfyui"]]]
    rows += [[f"moving average for {name}", file] for name, file in result.get("ema", {}).items()]
    rows += [["Preview grid", grids[-1]]] if grids else []
    rows += [["Strengths", result["strengths"]]] if "strengths" in result else []
    rows += [["Mirror", result["mirror"]]] if "mirror" in result else []
    rows += [
        ["Report", f"{result['report']}   (open it in a browser)"],
        ["TensorBoard", f"tensorboard --logdir {result['run']}"],
        ["Dashboard", 'prefect server start, then http://127.0.0.1:4200 (README: "Watching it")'],
    ]
    left_out = _left_out("left out as unusable", result.get("samples", {}).get("quarantined", []))
    return "\n".join([*_columns(rows), *left_out, *_warnings(result["warnings"])])


def sample(result: dict[str, Any], _: str) -> str:
    """The pictures that were drawn."""
    return "\n".join([*result["pictures"], f"all of them: {result['grid']}"])


def show(result: dict[str, Any], _: str) -> str:
    """The tensors that were written."""
    lines = [[name, entry["dtype"], " x ".join(map(str, entry["shape"]))] for name, entry in result["tensors"].items()]
    return "\n".join([*_columns([["tensor", "dtype", "shape"], *lines]), f"written to {result['out']}"])


def stat(result: dict[str, Any], _: str) -> str:
    """Both tables, and what is due."""
    lines = [["rows", "", "size", "files", "version", "days old", "fingerprint", "table"]]
    told = [f"{_count(result['samples'], 'sample')} of this configuration"]
    for name in TABLES:
        held = result[name]
        age = "-" if held["age_days"] is None else f"{held['age_days']:.1f}"
        counts = [f"{held['rows']:,}", _bytes(held["bytes"]), str(held["files"]), str(held["version"]), age]
        lines.append([name, *counts, held["fingerprint"][:12], held["uri"]])
        told += [f"many small files of {name} rows: cacheloom gc merges them"] if held["compaction_due"] else []
    return "\n".join([*_columns(lines), *told])


def gc(result: dict[str, Any], _: str) -> str:
    """What went, and what stays for now."""
    rows, told = result["dropped"], "would be" if result["dry_run"] else "were"
    lines = [
        f"{rows['text']:,} text rows, {rows['latents']:,} latents rows and {result['files']:,} files under samples/ "
        f"{told} dropped, {_bytes(result['freed'])} {told} freed"
    ]
    if result["kept_young"]:
        lines.append(f"{_count(result['kept_young'], 'unneeded row')} too young to go (--keep-days)")
    if rows["text"] + rows["latents"] and not result["dry_run"]:
        lines.append("versions that a training may still read keep their files until a later gc (--keep-days)")
    if result["caching"]:
        lines.append("a `cache` is at work: run gc again after it")
    lines += [f"held: {lease}" for lease in result["held"]]
    return "\n".join([*lines, *(f"left alone: {reason}" for reason in result["skipped"])])


def check(result: dict[str, Any], _: str) -> str:
    """One line for each check."""
    return "\n".join(_columns([["ok" if e["ok"] else "LACKING", e["name"], e["detail"]] for e in result["checks"]]))


def verify(result: dict[str, Any], config: str) -> str:
    """What is corrupt or missing, and how to mend it."""
    lines = [["corrupt", entry["of"], entry["reason"]] for entry in result["corrupt"]]
    lines += [["missing", entry["of"], entry["uri"]] for entry in result["missing"]]
    more = f"  ... and {len(lines) - 20:,} more: --json lists all"
    shown = [*_columns(lines[:20]), *([more] if len(lines) > 20 else [])]
    shown += [f"not compared: {reason}" for reason in result["not_compared"]]
    shown += [f"{_count(result['dropped'], 'corrupt row')} dropped"] if result["dropped"] else []
    head = f"{_count(result['rows'], 'row')} read, {result['compared']:,} encoded again, {len(lines) or 'none'} bad"
    drop = f"cacheloom verify --drop {config}, then " if len(result["corrupt"]) > result["dropped"] else ""
    shown += ["", f"next: {drop}cacheloom cache {config}, which encodes what is missing"] if lines else []
    return "\n".join([head, *shown])


def _left_out(head: str, entries: Sequence[Mapping[str, str]]) -> list[str]:
    """Pictures by the reason why they are left out, those of the most common one first."""
    named: dict[str, list[str]] = {}
    for entry in entries:
        name = "/".join(PurePath(entry["path"]).parts[-2:])  # a person knows which folder was given
        named.setdefault(entry["reason"], []).append(name)
    reasons = sorted(named, key=lambda reason: -len(named[reason]))
    lines = [f"{_count(len(entries), 'picture')} {head}:"] if entries else []
    for reason in reasons[:SHOWN]:
        first, more = named[reason][:NAMED], len(named[reason]) - NAMED
        lines.append(f"  {', '.join(first)}{f' and {more:,} more' if more > 0 else ''}: {reason}")
    rest = sum(len(named[reason]) for reason in reasons[SHOWN:])
    return [*lines, *([f"  ... and {rest:,} more: --json lists all"] if rest else [])]


def _warnings(warnings: Sequence[str]) -> list[str]:
    more = len(warnings) - WARNINGS
    shown = [f"! {warning}" for warning in warnings[:WARNINGS]]
    if more > 0:
        shown.append(f"  ... and {_count(more, 'warning')} more: --json lists all")
    return ["", *shown] if shown else []


def _columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned columns; those of numbers to the right."""
    table = list(rows)
    columns = []
    for cells in zip(*table, strict=True):
        width = max(map(len, cells))
        right = len(table) > 1 and all(_numeric(cell) for cell in cells[1:])
        columns.append([cell.rjust(width) if right else cell.ljust(width) for cell in cells])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def _numeric(cell: str) -> bool:
    return cell[:1].isdigit() and len(cell) < 12


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _bytes(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"
