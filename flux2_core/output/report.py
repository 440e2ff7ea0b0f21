"""What a run says about itself: one page to look at (`report.html`) and a model card to share (`README.md`)."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flux2_core import noise
from flux2_core.config.reading import dump_toml
from flux2_core.config.sections import Config
from flux2_core.data import words
from flux2_core.escape import code, markdown, page, quoted
from flux2_core.lora.metadata import Paths
from flux2_core.model.families import Family, Published
from flux2_core.output import curves
from flux2_core.output.curves import Curve
from flux2_core.store import atomic

SHOWN_QUARANTINED = 200
NO_CURVE = ("step", "loss", "seconds")  # of a validation: losses alone, the mean of them apart
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # whatever a caption says, nothing is loaded
STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#fff;--ink:#1d1d1f;--muted:#6e6d70;--rule:#e6e3db;
--c0:#2f6fde;--c1:#d9480f;--c2:#2b8a3e;--c3:#9c36b5;--c4:#0b7285}
@media(prefers-color-scheme:dark){:root{--paper:#17181a;--card:#1f2023;--ink:#ececee;--muted:#9b9ba1;--rule:#34353a;
--c0:#74a5ff;--c1:#ff9a62;--c2:#69db7c;--c3:#da9bf0;--c4:#66d9e8}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1240px;margin:0 auto;padding:40px 28px 64px}
h1{font-size:28px;margin:0 0 2px;letter-spacing:-.01em;overflow-wrap:anywhere}h2{font-size:17px;margin:44px 0 14px}
p{margin:4px 0}.muted{color:var(--muted)}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));margin:26px 0 0;padding:0;
background:var(--card);border:1px solid var(--rule);border-radius:10px;overflow:hidden}
.facts div{box-shadow:0 0 0 .5px var(--rule);padding:12px 16px}.facts dt{color:var(--muted);font-size:13px}
.facts dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:18px}
.curves figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px 18px 8px}
svg{display:block;width:100%;height:auto;font:12px system-ui,sans-serif}
svg .title{font-size:14px;font-weight:600;fill:var(--ink)}svg .tick{fill:var(--muted)}svg .rule{stroke:var(--rule)}
svg .legend{font-size:12.5px;font-variant-numeric:tabular-nums}
svg .curve{fill:none;stroke-width:1.8;stroke-linejoin:round}svg .faint{stroke-width:1;opacity:.3}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}.c4{stroke:var(--c4)}
svg .dot,svg .key{stroke:none}
.key.c0,.dot.c0{fill:var(--c0)}.key.c1,.dot.c1{fill:var(--c1)}.key.c2,.dot.c2{fill:var(--c2)}
.key.c3,.dot.c3{fill:var(--c3)}.key.c4,.dot.c4{fill:var(--c4)}
img{display:block;max-width:100%;border:1px solid var(--rule);border-radius:10px}
.scroll{overflow:auto;max-height:420px;border:1px solid var(--rule);border-radius:10px;background:var(--card)}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:7px 16px;border-bottom:1px solid var(--rule);
overflow-wrap:anywhere;vertical-align:top}tr:last-child td{border-bottom:0}th{color:var(--muted);font-weight:500}
code,pre{font:13px/1.55 ui-monospace,"SF Mono",Menlo,Consolas,monospace}pre{margin:0;padding:16px 18px;overflow:auto}
summary{cursor:pointer;font-size:17px;font-weight:600;margin:44px 0 14px}
"""


def write_html(
    path: Path,
    *,
    config: Config,
    metrics: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    grid_png: bytes | None,
    facts: Mapping[str, str],
    quarantine: Sequence[Mapping[str, Any]],
    lora_paths: Paths | None,
) -> None:
    """Write a page that needs nothing but itself: curves, previews, files, what was left out, the configuration.

    Args:
        path: of the page; the name of its folder is the run's.
        config: the configuration, which is shown whole.
        metrics: records of `metrics.jsonl` (`step`, `loss`, `learning_rate`, `grad_norm`).
        validation: records of `validation.jsonl` (`step`, `loss`, further numbers).
        grid_png: the latest previews.
        facts: label to value, shown on top in this order.
        quarantine: `path` and `reason` of each picture left out.
        lora_paths: the files of the adapter, where there are some.
    """
    run = path.absolute().parent.name
    last = metrics[-1]["step"] if metrics else 0
    sections = [
        f"<h1>{page(run)}</h1><p class=muted>A LoRA for FLUX.2, trained with cacheloom; {_count(last, 'step')}.</p>",
        _facts(facts),
        _curves(config, metrics, validation),
        _previews(grid_png),
        _files(path, lora_paths),
        _quarantine(quarantine),
        "<details><summary>Configuration</summary>"
        f"<div class=scroll><pre>{page(dump_toml(config), lines=True)}</pre></div></details>",
    ]
    text = (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}">'
        f"<title>{page(run)} - cacheloom</title><style>{STYLE}</style><main>{''.join(sections)}</main></html>\n"
    )
    atomic.write(path, text.encode())


def write_card(
    path: Path,
    *,
    config: Config,
    family: Family,
    base: Published | None,
    facts: Mapping[str, str],
    lora_paths: Paths,
    preview: str | None = None,
    model_folder: Path | None = None,
) -> None:
    """Write the model card, with the notices that the licence of its base asks for.

    Args:
        path: of the card (`README.md`); the licence's text goes beside it where the model folder has it.
        config: of the run.
        family: of the base model.
        base: the base itself where it is a published one.
        facts: label to value, for instance steps, pictures, final loss.
        lora_paths: the files of the adapter.
        preview: a picture of previews, relative to the card.
        model_folder: of the base model, searched for `LICENSE*`.
    """
    name = base.hub if base else config.model.path
    parts = [
        _front_matter(config, base, preview=preview),
        f"# {config.run}\n\nA LoRA for ",
        f"[{name}](https://huggingface.co/{name})" if base else f"`{code(name)}`",
        f", rank {config.lora.rank}, trained with cacheloom.\n",
        f"\nTrigger word: `{code(config.trigger)}`\n" if config.trigger else "",
        f"\n![previews]({preview})\n" if preview else "",
        _usage(config, family.pipeline, name=name, files=lora_paths, folder=path.parent),
        "\n## Training\n\n| | |\n|---|---|\n",
        *(f"| {markdown(key)} | {markdown(value)} |\n" for key, value in facts.items()),
        "\nThe whole configuration is in `config.toml`, the curves are in `report.html`.\n\n",
        _licence(base, path.parent, model_folder),
    ]
    atomic.write(path, "".join(parts).encode())


def _facts(facts: Mapping[str, str]) -> str:
    cells = "".join(f"<div><dt>{page(key)}</dt><dd>{page(value)}</dd></div>" for key, value in facts.items())
    return f"<dl class=facts>{cells}</dl>" if cells else ""


def _curves(config: Config, metrics: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> str:
    loss = curves.series(metrics, "loss")
    span = max(5, len(loss) // 25)
    others = dict.fromkeys(key for record in validation for key in record if key not in NO_CURVE)
    named = {"mean": "loss"} | {key: key for key in [*others][:4]}
    drawn = [
        curves.chart("Loss", [Curve("smoothed", curves.smoothed(loss, span=span)), Curve("each step", loss, "faint")]),
        curves.chart(
            "Validation loss", [Curve(name, curves.series(validation, key), "dots") for name, key in named.items()]
        ),
        curves.chart("Gradient norm", [Curve("gradient norm", curves.series(metrics, "grad_norm"))]),
        curves.chart("Learning rate", [Curve("learning rate", curves.series(metrics, "learning_rate"))]),
        curves.chart("Noise levels drawn, 0 picture to 1 noise", _levels(config) if metrics else [], across="level"),
    ]
    figures = "".join(f"<figure>{svg}</figure>" for svg in drawn if svg)
    return f"<h2>Curves</h2><div class=curves>{figures}</div>" if figures else ""


def _levels(config: Config) -> list[Curve]:
    """Densities of what is drawn, and of the levels that the sampler goes through."""
    summaries = noise.summaries(config)

    def curve(name: str, shares: Sequence[float]) -> Curve:
        return Curve(name, [((place + 0.5) / len(shares), share) for place, share in enumerate(shares)])

    drawn = [curve(each["distribution"], each["density"]) for each in summaries]
    return [*drawn, *(curve("the sampler's steps", each["sampler_density"]) for each in summaries[:1])]


def _previews(grid_png: bytes | None) -> str:
    if grid_png is None:
        return ""
    data = base64.b64encode(grid_png).decode()
    return f'<h2>Previews</h2><img alt="previews by prompt and step" src="data:image/png;base64,{data}">'


def _files(path: Path, lora_paths: Paths | None) -> str:
    if lora_paths is None:
        return ""
    rows = ""
    for file, use in ((lora_paths.diffusers, "diffusers"), (lora_paths.comfyui, "ComfyUI")):
        size = _size(file.stat().st_size) if file.is_file() else "not written"
        rows += f"<tr><td><code>{page(_relative(file, path.parent))}</code><td>{use}<td>{size}"
    return f"<h2>Files</h2><div class=scroll><table>{rows}</table></div>"


def _quarantine(quarantine: Sequence[Mapping[str, Any]]) -> str:
    if not quarantine:
        return ""
    rows = "".join(
        f"<tr><td><code>{page(record['path'])}</code><td>{page(record['reason'])}"
        for record in quarantine[:SHOWN_QUARANTINED]
    )
    more = len(quarantine) - SHOWN_QUARANTINED
    note = f"<p class=muted>{more:,} more in <code>quarantine.parquet</code>.</p>" if more > 0 else ""
    head = f"<h2>Left out: {_count(len(quarantine), 'picture')}</h2>"
    return f"{head}<div class=scroll><table><tr><th>File<th>Why{rows}</table></div>{note}"


def _front_matter(config: Config, base: Published | None, *, preview: str | None) -> str:
    licence = base.licence.front_matter if base else ""
    trigger = f"instance_prompt: {quoted(config.trigger)}\n" if config.trigger else ""
    widget = ""
    if preview and config.validation.drawn:
        prompt = _prompt(config)
        widget = f"widget:\n- text: {quoted(prompt)}\n  output:\n    url: {quoted(preview)}\n"
    tags = "".join(f"- {tag}\n" for tag in ("text-to-image", "lora", "diffusers", "flux2", "comfyui", "cacheloom"))
    name = quoted(base.hub if base else config.model.path)
    return (
        f"---\nbase_model: {name}\nbase_model_relation: adapter\nlibrary_name: diffusers\n"
        f"pipeline_tag: text-to-image\n{licence}{trigger}tags:\n{tags}{widget}---\n\n"
    )


def _usage(config: Config, pipeline: str, *, name: str, files: Paths, folder: Path) -> str:
    diffusers, comfyui = (_relative(file, folder) for file in (files.diffusers, files.comfyui))
    return f"""
## Use

With diffusers, from this folder:

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained({quoted(name)}, torch_dtype=torch.bfloat16)
pipe.load_lora_weights({quoted(diffusers)})
pipe.enable_model_cpu_offload()
pipe({quoted(_prompt(config))}).images[0].save("picture.png")
```

With ComfyUI: put `{code(comfyui)}` into `models/loras/` and load it with *LoraLoaderModelOnly* between the model and
the sampler. Strength 1 is what was trained: alpha / rank is inside the weights of both files.
"""


def _licence(base: Published | None, folder: Path, model_folder: Path | None) -> str:
    if base is None or not base.licence.notice:
        where = f": see [its model card](https://huggingface.co/{base.hub})" if base else ""
        return f"## Licence\n\nThis adapter derives from its base model, whose licence applies{where}.\n"
    licence, copied = base.licence, _copy_licence(folder, model_folder)
    text = (
        f"The licence's text is in [{markdown(copied)}]({quote(copied)}) beside this card."
        if copied
        else "The licence's text is not among these files, because the folder of the base model had none: "
        "whoever passes this adapter on has to add it."
    )
    return (
        f"## Licence and notices\n\nThis adapter is a Derivative of {base.title} under the "
        f"[{licence.name}]({licence.page}), which applies to it.\n\n> {licence.notice}\n\n"
        f"**Statement of modification:** the weights of {base.title} were modified by low-rank adaptation (LoRA). This "
        "folder holds only the adapter, not the model. It was not made or endorsed by Black Forest Labs.\n\n"
        f"{text}\n"
    )


def _copy_licence(folder: Path, model_folder: Path | None) -> str | None:
    found = sorted(file for file in model_folder.glob("LICENSE*") if file.is_file()) if model_folder else []
    if not found:
        return None
    atomic.write(folder / found[0].name, found[0].read_bytes())
    return found[0].name


def _prompt(config: Config) -> str:
    prompts = config.validation.drawn
    return words.resolve_prompt(prompts[0].text, config) if prompts else config.trigger or "a photo"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:,.1f} kB"


def _relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file, folder)).as_posix()
