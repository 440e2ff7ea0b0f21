"""Results in words, for a person at a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

GIB = 2**30


def words(verb: str, result: dict[str, Any]) -> str:
    """The result of a verb as text."""
    return WORDS[verb](result)


def _plan(result: dict[str, Any]) -> str:
    samples, rows, size = result["samples"], result["rows"], result["bytes"]
    lines = [
        f"{samples['kept']} pictures kept ({samples['validation']} held out for validation), "
        f"{len(samples['quarantined'])} quarantined",
        *(f"  {entry['path']}: {entry['reason']}" for entry in samples["quarantined"]),
        *(
            f"  bucket {b['width']}x{b['height']}: {b['samples']} (loses {b['pixels_lost']:.1%} of the pixels)"
            for b in result["buckets"]
        ),
        f"text: {rows['text']['needed']} rows, {rows['text']['cached']} cached, {rows['text']['missing']} to encode, "
        f"{_bytes(size['text'])}; prompts of {result['tokens']['mean']} tokens, "
        f"the longest {result['tokens']['longest']}",
        f"latents: {rows['latents']['needed']} rows, {rows['latents']['cached']} cached, "
        f"{rows['latents']['missing']} to encode, {_bytes(size['latents'])}",
        *(f"warning: {warning}" for warning in result["warnings"]),
    ]
    return "\n".join(lines)


def _cache(result: dict[str, Any]) -> str:
    lines = [
        f"{name}: {result[name]['encoded']} encoded, {result[name]['reused']} reused  ({result[name]['uri']})"
        for name in ("text", "latents")
    ]
    left_out = result["samples"]["quarantined"]
    lines += [f"quarantined: {entry['path']}: {entry['reason']}" for entry in left_out]
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    return "\n".join(lines)


def _trained(result: dict[str, Any]) -> str:
    lines = [*(f"{name}: {value}" for name, value in result["facts"].items()), ""]
    lines += [f"LoRA for diffusers  {result['lora']['diffusers']}", f"LoRA for ComfyUI    {result['lora']['comfyui']}"]
    if result["previews"]:
        lines.append(f"Preview grid        {result['previews'][-1]}")
    lines.append(f"Report              {result['report']}   (open it in a browser)")
    lines.append(f"TensorBoard         tensorboard --logdir {result['run']}")
    lines.append('Dashboard           prefect server start, then http://127.0.0.1:4200 (README: "Watching it")')
    return "\n".join(lines)


def _sample(result: dict[str, Any]) -> str:
    return "\n".join([*result["pictures"], f"all of them: {result['grid']}"])


def _show(result: dict[str, Any]) -> str:
    lines = [f"{name:24} {entry['dtype']:9} {entry['shape']}" for name, entry in result["tensors"].items()]
    return "\n".join([*lines, f"written to {result['out']}"])


def _stat(result: dict[str, Any]) -> str:
    lines = [
        f"{name}: {result[name]['rows']} rows, {_bytes(result[name]['bytes'])}, version {result[name]['version']}, "
        f"fingerprint {result[name]['fingerprint'][:16]}  ({result[name]['uri']})"
        for name in ("text", "latents")
    ]
    return "\n".join([*lines, f"samples: {result['samples']}"])


def _check(result: dict[str, Any]) -> str:
    return "\n".join(f"{'ok     ' if e['ok'] else 'LACKING'} {e['name']:8} {e['detail']}" for e in result["checks"])


def _verify(result: dict[str, Any]) -> str:
    bad = [f"corrupt: {entry['of']} ({entry['reason']})" for entry in result["corrupt"]]
    bad += [f"missing: {entry['of']} ({entry['uri']})" for entry in result["missing"]]
    return "\n".join([f"{result['rows']} rows read, {len(bad)} bad", *bad])


def _bytes(count: int) -> str:
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / 2**20:.2f} MiB"


WORDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "plan": _plan,
    "cache": _cache,
    "train": _trained,
    "run": _trained,
    "sample": _sample,
    "show": _show,
    "stat": _stat,
    "check": _check,
    "verify": _verify,
}
