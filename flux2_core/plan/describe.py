"""What `plan` says: what is kept and left out, what is cached and missing, what it will take; no model is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flux2_core import noise
from flux2_core.cache import index, prompt_rows
from flux2_core.cache.keys import text_key
from flux2_core.config.sections import Config
from flux2_core.data import intake, shown
from flux2_core.data import texts as data_texts
from flux2_core.data.intake import SamplePlan
from flux2_core.data.needs import LATENTS
from flux2_core.data.pictures import likeness
from flux2_core.model.folder import ModelFolder
from flux2_core.model.latents import CHANNELS, PIXELS_PER_TOKEN
from flux2_core.model.tensor_bytes import DTYPES
from flux2_core.model.tokenizer import PromptTokenizer
from flux2_core.plan import doctor, flops, memory, missing, rates, roofline
from flux2_core.plan.flops import Work
from flux2_core.store import keyset, objects
from flux2_core.store.keyset import Keys
from flux2_core.store.schemas import KIND_LATENTS, KIND_TEXT, VALIDATION
from flux2_core.store.table import Table
from flux2_core.train import length, preflight
from flux2_core.train.optimizers import OPTIMIZERS

LISTED = 3
HOUR_S = 3600


def describe(config: Config, model: ModelFolder, planned: SamplePlan) -> dict[str, Any]:
    """The plan as one JSON object; `refused` holds the reason where the data would be refused."""
    config = length.settled(config, planned.samples)
    samples = shown.left_out(planned.samples)
    first = pc.equal(samples.column("variant"), 0)
    pictures = samples.select(["id", "sha256", "captions", "dataset", "split", "references"]).filter(first)
    held_out = pictures.filter(pc.equal(pictures.column("split"), VALIDATION))
    text_print, latents_print = planned.fingerprints[KIND_TEXT], planned.fingerprints[KIND_LATENTS]
    texts, limit = data_texts.texts(config, planned.samples), config.text.max_length
    counts = np.array(PromptTokenizer(model, max_length=limit, tokens=config.text.tokens).counts(texts))
    sizes = np.array([prompt_rows.size_bytes(count, text_print) for count in range(limit + 1)])
    tokens = np.minimum(counts, limit)
    text_keys = keyset.array(text_key(text_print, text) for text in texts)
    text = _Rows(index.text_uri(config, text_print), text_keys, sizes[tokens])
    latents = _Rows(index.latents_uri(config, latents_print), *_latent_bytes(config, planned.samples))
    lacking = {text_keys[place].decode(): texts[place] for place in text.places[: missing.MOST_ROWS].tolist()}
    cut = doctor.truncated(pictures, texts, counts, limit=limit)
    result: dict[str, Any] = {
        "run": config.run,
        "samples": _kept(pictures, held_out.num_rows, planned) | {"rows": samples.num_rows},
        "steps": config.train.steps,
        "references": doctor.references(pictures) | {"previews": planned.samples.num_rows - samples.num_rows},
        "buckets": _buckets(samples),
        "rows": {
            "text": text.counts() | {"why": missing.texts(config, model, planned, lacking, of=text.keys.size)},
            "latents": latents.counts() | {"why": missing.latents(config, model, planned, latents.keys)},
        },
        "bytes": {"text": text.size, "latents": latents.size}
        | {"to_write": text.to_write + latents.to_write, "total": text.size + latents.size},
        "tokens": doctor.token_lengths(counts, limit=limit) | {"truncated": cut},
        "triggers": doctor.trigger_coverage(config, pictures, injected=planned.injected),
        "duplicates": _duplicates(pictures, set(held_out.column("id").to_pylist()), planned),
    }
    result["time"] = _time(
        config,
        text=_seconds(config, text_print, text.missing(tokens)),
        latents=_seconds(config, latents_print, latents.to_write // (CHANNELS * DTYPES[config.latents.dtype].itemsize)),
    )
    result["noise"] = noise.summaries(config)
    result["memory"] = memory.here(config, model)
    image, encoding = _tokens(samples), _encoding(config, model, text, tokens, latents)
    found = {"memory": result["memory"], "time": result["time"]}
    result["estimate"] = roofline.estimate(config, model, image=image, encoding=encoding, **found)
    result["warnings"] = [
        *_findings(result, texts, counts, preflight.fillers(config.train.batch_size, config.cluster.workers)),
        *_unusual(config, 0 if config.slider.texts else pictures.num_rows - held_out.num_rows),
        *planned.warnings,
    ]
    reason = intake.refusal(config, planned)
    return result | {"refused": reason} if reason else result


def _kept(pictures: pa.Table, held_out: int, planned: SamplePlan) -> dict[str, Any]:
    """The pictures that are kept and those that are not."""
    each = planned.samples.filter(pc.equal(planned.samples.column("variant"), 0))
    return {
        "kept": pictures.num_rows,
        "ids": pictures.column("id").to_pylist(),
        "pairs": pc.count(LATENTS["rejected"].keys(each)).as_py(),
        "validation": held_out,
        "quarantined": planned.quarantine.select(["path", "reason"]).to_pylist(),
        "excluded": planned.excluded.select(["path", "reason"]).to_pylist(),
    }


class _Rows:
    """The rows that a table must have, with their bytes, and which of them are there."""

    def __init__(self, uri: str, keys: Keys, sizes: npt.NDArray[np.int64]) -> None:
        """Look.

        Args:
            uri: of the table.
            keys: of its rows; one may come several times, each time with the same size.
            sizes: bytes of the rows of these keys.
        """
        wanted, first = np.unique(keys, return_index=True)
        there = next(iter(objects.listing(uri)), None) is not None
        lacking = ~Table.open(uri).holds(wanted) if there else np.ones(wanted.size, np.bool_)
        self.needed, self.size = wanted.size, int(sizes[first].sum())
        self.sizes = sizes
        self.keys, self.places = wanted[lacking], first[lacking]  # of rows that are not there
        self.to_write = self.missing(sizes)

    def missing(self, amounts: npt.NDArray[np.int64]) -> int:
        """The sum, over rows that are not there, of what each key stands for."""
        return int(amounts[self.places].sum())

    def counts(self) -> dict[str, int]:
        return {"needed": self.needed, "cached": self.needed - self.keys.size, "missing": self.keys.size}


def _latent_bytes(config: Config, samples: pa.Table) -> tuple[Keys, npt.NDArray[np.int64]]:
    """Keys and bytes of the latents of every picture and of those beside it, and of its mask (a byte per token)."""
    references = pc.list_flatten(samples.column("references"))
    per_token = CHANNELS * DTYPES[config.latents.dtype].itemsize
    sides = "bucket_height", "bucket_width"
    own, beside = [samples.column(name) for name in sides], [pc.struct_field(references, name) for name in sides]
    sized = {"picture": (*own, per_token), "rejected": (*own, per_token)}
    sized |= {"references": (*beside, per_token), "mask": (*own, 1)}
    keys, sizes = [], []
    for name, (height, width, factor) in sized.items():
        column = LATENTS[name].keys(samples)
        cells = pc.multiply(height.cast(pa.int64()), width).filter(pc.is_valid(column)).to_numpy()
        keys.append(keyset.array(column))
        sizes.append(cells // PIXELS_PER_TOKEN**2 * factor)
    return np.concatenate(keys), np.concatenate(sizes)


def _tokens(samples: pa.Table) -> float:
    """Of a sample and its references, on average; repeats and weights of data sets do not count."""
    references = pc.list_flatten(samples.column("references"))
    sides = [(samples.column("bucket_height"), samples.column("bucket_width"))]
    sides += [(pc.struct_field(references, "bucket_height"), pc.struct_field(references, "bucket_width"))]
    pixels = sum(pc.sum(pc.multiply(h.cast(pa.int64()), w)).as_py() or 0 for h, w in sides)
    return pixels / PIXELS_PER_TOKEN**2 / max(1, samples.num_rows)


def _buckets(samples: pa.Table) -> list[dict[str, Any]]:
    sides = ["bucket_height", "bucket_width"]
    grouped = samples.group_by(sides).aggregate([("id", "count"), ("pixels_lost", "mean"), ("pixels_lost", "max")])
    ordered = grouped.select([*sides, "id_count", "pixels_lost_mean", "pixels_lost_max"]).rename_columns(
        ["height", "width", "samples", "pixels_lost", "most_lost"]
    )
    rows = ordered.sort_by([("height", "ascending"), ("width", "ascending")]).to_pylist()
    return [row | {name: round(row[name], 4) for name in ("pixels_lost", "most_lost")} for row in rows]


def _duplicates(pictures: pa.Table, held_out: set[str], planned: SamplePlan) -> dict[str, Any]:
    """Groups of ids with the same bytes, and of those that only look alike among the `looked_at` decoded ones."""
    ids, hashes = pictures.column("id"), keyset.array(pictures.column("sha256"))
    _, firsts, group, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    same: dict[int, list[str]] = {}
    for place in np.flatnonzero(counts[group] > 1).tolist():
        same.setdefault(int(group[place]), []).append(ids[place].as_py())
    looked = keyset.find(hashes, keyset.of(planned.looks))[1]
    first = [place for place in np.sort(firsts).tolist() if looked[place]]
    groups = likeness.alike([planned.looks[hashes[place].decode()] for place in first])
    alike = [[ids[first[member]].as_py() for member in group] for group in groups]
    return {
        "looked_at": int(looked.sum()),
        "identical": list(same.values()),
        "alike": alike,
        "across_split": [group for group in alike if 0 < len(held_out.intersection(group)) < len(group)],
    }


def _seconds(config: Config, fingerprint: dict[str, Any], tokens: int) -> dict[str, Any] | None:
    """Device-seconds of encoding so many tokens, by the last measurement; None where nothing was measured."""
    if not tokens:
        return {"seconds": 0.0, "device": None, "tokens_per_second": None, "measured_rows": None, "rough": False}
    if (rate := rates.newest(config.output.cache, fingerprint)) is None:
        return None
    speed = {"device": rate.device, "tokens_per_second": round(rate.tokens / rate.seconds, 1)}
    return {"seconds": round(rate.predict(tokens), 2), **speed, "measured_rows": rate.rows, "rough": rate.rough}


def _encoding(
    config: Config, model: ModelFolder, text: _Rows, tokens: npt.NDArray[np.int64], latents: _Rows
) -> dict[str, Work]:
    """What is to be encoded, for estimates; `tokens` are those of each text."""
    skipped = model.family.ragged and config.text.pads == "skipped"
    seen = tokens if skipped else np.full_like(tokens, config.text.max_length)
    cells = latents.sizes // (CHANNELS * DTYPES[config.latents.dtype].itemsize)  # about none of a mask
    own, painted = (
        {"tokens": rows.missing(each), "squares": rows.missing(each**2)}
        for rows, each in ((text, seen), (latents, cells))
    )
    return {
        KIND_TEXT: flops.texts(model, **own, dtype=config.text.dtype) if own["tokens"] else Work(),
        KIND_LATENTS: flops.pictures(model, **painted, precision=config.latents.precision),
    }


def _time(config: Config, *, text: dict[str, Any] | None, latents: dict[str, Any] | None) -> dict[str, Any]:
    """Predicted device-seconds of each part; what was never measured is None, and then the sums are None too."""
    measured = rates.step_seconds(config)
    train: dict[str, Any] | None = None
    if measured is not None:
        per_step, run, steps = measured
        train = {"seconds": round(per_step * config.train.steps, 1), "seconds_per_step": round(per_step, 4), "run": run}
        train |= {"measured_steps": steps, "rough": steps < rates.SURE_STEPS}
    hours, rough = None, any(part and part["rough"] for part in (text, latents, train))
    if text and latents and train:
        devices = text["seconds"] + latents["seconds"] + train["seconds"] * config.cluster.workers
        hours = round(devices / HOUR_S, 3)
    price = config.cluster.price
    cost = None if hours is None or price is None else round(hours * price, 2)
    return {"text": text, "latents": latents, "train": train, "gpu_hours": hours, "cost": cost, "rough": rough}


def _findings(result: dict[str, Any], texts: list[str], counts: npt.NDArray[np.int64], idle: str | None) -> list[str]:
    """What the doctor found, the worst first, with the first few names; `idle` says what fillers cost."""
    tokens, same = result["tokens"], result["duplicates"]
    placed = result["memory"].get("encoders", {})
    unplaced = [placed[table].get("refused") for table in placed if result["rows"][table]["missing"]]
    found = [told for told in (result["memory"].get("refused"), *unplaced, idle) if told]
    if over := int((counts > tokens["limit"]).sum()):
        named = [f"{entry['id']} ({entry['tokens']} tokens)" for entry in tokens["truncated"]]
        named = named or [f"{texts[place][:40]!r}..." for place in np.flatnonzero(counts > tokens["limit"])[:LISTED]]
        head = f"{_count(over, 'text')} over text.max_length={tokens['limit']} tokens"
        found.append(f"{head}, the rest is cut off: {_some(named)}")
    if same["across_split"]:
        groups = [" = ".join(group[:LISTED]) for group in same["across_split"]]
        found.append(f"held-out pictures look like training pictures, so the validation loss flatters: {_some(groups)}")
    for entry in result["triggers"]:
        if entry["without"]:
            told = f"do not contain the trigger {entry['trigger']!r} (data.{entry['dataset']})"
            found.append(f"captions of {_count(len(entry['without']), 'picture')} {told}: {_some(entry['without'])}")
    if lacking := result["references"]["unmatched"]:
        told = 'name a reference that is not there, as in "image 2" beside one'
        found.append(f"captions of {_count(len(lacking), 'picture')} {told}: {_some(lacking)}")
    if same["alike"]:
        groups = [" = ".join(group[:LISTED]) for group in same["alike"]]
        found.append(f"{_count(len(groups), 'group')} of pictures that look alike: {_some(groups)}")
    return found


def _unusual(config: Config, learnt: int) -> list[str]:
    """Settings that are allowed and seldom meant."""
    train, found = config.train, []
    low, high = OPTIMIZERS[train.optimizer].usual
    if not low <= train.learning_rate <= high:
        usual = f"{low:g} to {high:g} is usual with {train.optimizer}"
        found.append(f"train.learning_rate={train.learning_rate:g}: {usual}")
    if train.batch_size > learnt > 0:
        found.append(f"train.batch_size={train.batch_size} is more than the {learnt} pictures to train on")
    if not any(data.trigger or data.regularisation for data in config.data) and not config.slider.texts:
        found.append("no trigger is set: what is learned has no word of its own and colours every prompt")
    if train.steps * train.batch_size < learnt:
        seen = train.steps * train.batch_size
        found.append(f"train.steps={train.steps} of {train.batch_size} see only {seen} of {learnt} pictures once")
    if not config.validation.drawn and config.validation.every:
        found.append("validate.prompts is empty: there will be no preview pictures")
    return found


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _some(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more:,} more" if more > 0 else "")
