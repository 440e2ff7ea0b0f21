"""The verbs: each a function from configuration to the object that `--json` prints, and a record in one table.

Ray, Prefect, the model libraries and the configuration are imported by the verbs that need them, so that `--help`,
`plan` and `stat` answer at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import progress, wording
from flows.moving_in import MOVING
from flows.verb import Verb, option
from flux2_core.errors import CacheloomError, DataError, SetupError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flux2_core.config.sections import Config
    from flux2_core.model.folder import ModelFolder

DATA_PARTS = ("text_encoder", "tokenizer", "vae", "transformer")
MOST_DAYS = 36_500  # of an age: a century


def plan(config: Config, *, trust_nothing: bool = False) -> dict[str, Any]:
    """What would run."""
    from flux2_core.plan import describe, survey
    from flux2_core.run import recorded
    from flux2_core.run.folder import RunFolder
    from flux2_core.train import preflight

    model = _model(config)
    recorded.check(RunFolder(config))
    preflight.check(config, model, parts=DATA_PARTS)
    planned = survey.survey(config, model, mapper=survey.watched(_bar("index")), trusting=not trust_nothing)
    described = describe.describe(config, model, planned)
    return described | {"exit_code": DataError.exit_code} if "refused" in described else described


def cache(config: Config, *, trust_nothing: bool = False) -> dict[str, Any]:
    """Index, then encode what is missing."""
    from flux2_core.data import texts as data_texts
    from flux2_core.output.export import quarantined
    from flux2_core.run import recorded
    from flux2_core.run.folder import RunFolder
    from flux2_core.train import preflight

    config, model = recorded.settled(config), _model(config)
    preflight.before_caching(config, model, parts=DATA_PARTS)
    from stages import background, cluster, encode_images, encode_text, index  # a refusal does not wait for Ray

    progress.say("starting Ray")
    with cluster.connect(config.cluster):
        planned = index.build(config, model, progress=_bar("index"), trusting=not trust_nothing)
        texts = data_texts.texts(config, planned.samples)
        text, latents = background.both(  # on one device Ray has them take turns
            lambda: encode_text.encode(
                config, model, texts, fingerprint=planned.fingerprints["text"], progress=_bar("text")
            ),
            lambda: encode_images.encode(
                config, model, planned.samples, fingerprint=planned.fingerprints["latents"], progress=_bar("latents")
            ),
        )
        published = index.publish(config, planned, text=text, latents=latents)
    rows = {
        name: {"encoded": filled.encoded, "reused": filled.reused, "uri": filled.table.uri}
        for name, filled in (("text", text), ("latents", latents))
    }
    samples = {"rows": published.rows, "quarantined": quarantined(RunFolder(config))}
    return rows | {"samples": samples, "warnings": planned.warnings}


def train(config: Config) -> dict[str, Any]:
    """Train from the caches alone."""
    from flux2_core.run import recorded
    from flux2_core.run.folder import RunFolder
    from stages import train as stage

    if not RunFolder(recorded.settled(config)).finished():
        progress.say("starting to train")
    return stage.train(config, progress=progress.step, phase=progress.phase)


def run(config: Config, *, trust_nothing: bool = False) -> dict[str, Any]:
    """Everything: the Prefect flow."""
    from flux2_core.run import recorded
    from flux2_core.run.folder import RunFolder
    from flux2_core.train import preflight

    recorded.check(RunFolder(config))
    preflight.before_caching(config, _model(config), parts=DATA_PARTS)
    from stages import cluster

    cluster.knock(config.cluster)
    progress.say("starting Prefect")
    from flows import server

    server.embed()  # it needs seconds, and the rest of our imports and Ray's start as many
    from flows.cache_and_train import run_here

    return run_here(config, trust_nothing=trust_nothing)


def sample(config: Config, *, prompt: list[str] | None, lora: str | None, out: str | None) -> dict[str, Any]:
    """Encode the prompts, then draw them; pictures and a grid go to a folder."""
    from flux2_core.cache import proofs
    from flux2_core.config import targets
    from flux2_core.data import words
    from flux2_core.model.sampler import guidance_of
    from flux2_core.run import previews
    from flux2_core.run.folder import RunFolder
    from flux2_core.store import objects
    from flux2_core.train import preflight

    folder = RunFolder(config)
    if not prompt and any(one.references for one in config.validation.prompt):
        raise UsageError(
            "validate.prompt has references, with which previews are drawn, and not `sample`: give --prompt"
        )
    wanted = [words.resolve_prompt(text, config) for text in prompt or [one.text for one in config.validation.drawn]]
    if not wanted:
        raise UsageError("nothing to draw: give --prompt TEXT, or validate.prompts in the configuration")
    adapter = None if lora == "none" else Path(lora) if lora else folder.lora_files[0]
    if adapter is not None and not adapter.is_file():
        raise DataError(f"{adapter}: no such LoRA; train first, give --lora FILE, or --lora none for the base model")
    model = _model(config)
    guidance_of(config.validation, model)
    preflight.weights(model, DATA_PARTS)
    if adapter is not None:
        preflight.adapter(adapter, model)
    negative = [] if config.validation.negative is None else [config.validation.negative]
    target = Path(out) if out else folder.path / "samples"
    targets.folder(str(target), setting="--out")
    for place in (str(target), config.output.cache):
        objects.probe(place)
    from stages import cluster, encode_text
    from stages import sample as stage

    progress.say("starting Ray")
    with cluster.connect(config.cluster):
        of = proofs.fingerprint(config, model, "text")
        text = encode_text.encode(config, model, [*wanted, *negative], fingerprint=of, progress=_bar("text"))
        drawn = {"adapter": adapter, "progress": _bar("sample"), "say": progress.say}
        pictures = stage.sample(config, model, wanted, text.table, **drawn)
    files = previews.write_pictures(target, wanted, pictures, title=config.run if adapter else "base model")
    return {"pictures": [str(file) for file in files[:-1]], "grid": str(files[-1]), "lora": adapter and str(adapter)}


def show(config: Config, *, sample: str, out: str) -> dict[str, Any]:
    """Write the exact tensors that training sees for one sample."""
    from flux2_core.model.folder import TRAINING_PARTS
    from flux2_core.store import objects
    from flux2_core.train.show import tensors_of, write_tensors

    objects.probe(str(Path(out).absolute().parent))
    found = tensors_of(config, _model(config, TRAINING_PARTS), sample)
    write_tensors(Path(out), found)
    shapes = {name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in found.items()}
    return {"out": out, "tensors": shapes}


def verify(config: Config, *, rows: int, drop: bool) -> dict[str, Any]:
    """Read and check every row of the cache, then encode some of each table again, where the rest was found whole."""
    from flux2_core.cache import verify as cache_verify
    from flux2_core.model.folder import TRAINING_PARTS

    found = cache_verify.verify_rows(
        config, _model(config, TRAINING_PARTS), progress=lambda kind, *count: progress.show(f"read {kind}", *count)
    )
    found |= {"compared": 0, "not_compared": []}
    if rows and not found["corrupt"] and not found["missing"]:
        found |= _encoded_again(config, rows)
    found["dropped"] = cache_verify.drop(found["corrupt"]) if drop else 0
    return found | ({"exit_code": DataError.exit_code} if found["corrupt"] or found["missing"] else {})


def _encoded_again(config: Config, rows: int) -> dict[str, Any]:
    import uuid

    from flows.reaper import guard
    from flux2_core.cache.index import read_index
    from flux2_core.cache.verify import chosen, compare
    from flux2_core.store import objects, schemas
    from stages import cluster, encode_images, encode_text

    model = _model(config)
    cached, (texts, samples) = read_index(config, model), chosen(config, model, rows)
    place = objects.join(config.output.cache, f"verify-{uuid.uuid4().hex}")  # where every node of the cluster can write
    scratch = config.model_copy(update={"output": config.output.model_copy(update={"cache": place})})
    bars = {name: {"progress": _bar(name)} for name in ("text", "latents")}
    progress.say("starting Ray, to encode some rows again")
    try:
        with guard(), cluster.connect(config.cluster):
            text = encode_text.encode(scratch, model, texts, fingerprint=cached.text.fingerprint, **bars["text"])
            latents = encode_images.encode(
                scratch, model, samples, fingerprint=cached.latents.fingerprint, **bars["latents"]
            )
        again = {schemas.KIND_TEXT: text.table, schemas.KIND_LATENTS: latents.table}
        count, differing = compare(config, model, again)
    finally:
        objects.delete_below(place)
    return {"compared": count, "corrupt": differing, "not_compared": sorted(latents.failed.values())}


def gc(config: Config, *, keep_days: float, dry_run: bool) -> dict[str, Any]:
    """Drop what no kept run needs, and compact the rest."""
    from datetime import timedelta

    from flux2_core.cache.garbage import collect

    if not 0 <= keep_days <= MOST_DAYS:  # which nan is not either
        raise UsageError(
            f"--keep-days {keep_days:g}: an age in days, from 0 (nothing is too young to go) to {MOST_DAYS}"
        )
    return collect(config, keep=timedelta(days=keep_days), dry_run=dry_run)


def stat(config: Config) -> dict[str, Any]:
    """What the cache holds for this configuration."""
    from flux2_core.cache.stat import stat_tables

    return stat_tables(config, _model(config))


def check(config: Config) -> dict[str, Any]:
    """The environment; each failure comes with its fix."""
    import platform

    checks: dict[str, Callable[[Config], str]] = {
        "model": _check_model,
        "cache": _check_cache,
        "output": _check_output,
        "memory": _check_memory,
        "prefect": _check_prefect,
        "ray": _check_ray,
    }
    found = [{"name": "python", "ok": True, "detail": f"{platform.python_version()} on {platform.node()}"}]
    for name, function in checks.items():
        try:
            found.append({"name": name, "ok": True, "detail": function(config)})
        except CacheloomError as error:
            found.append({"name": name, "ok": False, "detail": str(error)})
    good = all(entry["ok"] for entry in found)
    return {"ok": good, "checks": found} | ({} if good else {"exit_code": SetupError.exit_code})


def _check_model(config: Config) -> str:
    from flux2_core.train import preflight

    model = _model(config, (*DATA_PARTS, "scheduler"))
    preflight.weights(model, DATA_PARTS)
    size = sum(f.stat().st_size for part in ("text_encoder", "vae", "transformer") for f in model.weight_files(part))
    return f"{model.path}: family {model.family.name}, {size / 1e9:.2f} GB of weights"


def _check_cache(config: Config) -> str:
    from flux2_core.store import objects

    objects.probe(config.output.cache)
    return f"{config.output.cache}: readable and writable"


def _check_output(config: Config) -> str:
    import shutil

    from flux2_core.store import objects

    place = Path(config.output.root).expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < 2**30:
        raise SetupError(f"{place}: {free / 2**20:.0f} MiB free; free at least 1 GiB, or set output.root elsewhere")
    told = f"{config.output.root}: {free / 1e9:.0f} GB free"
    if mirror := config.output.mirror:
        try:
            objects.probe(mirror)
        except SetupError as error:
            raise SetupError(f"output.mirror: {error}") from error
        told += f"; mirror {mirror}: readable and writable"
    return told


def _check_memory(config: Config) -> str:
    from flux2_core import accelerator
    from flux2_core.plan import memory

    told = memory.here(config, _model(config))
    encoders = told["encoders"]
    if refused := [part["refused"] for part in (told, *encoders.values()) if "refused" in part]:
        raise SetupError("; ".join(refused))
    placed = "".join(f"; {name} encoder {row['strategy']}, {row['total_gb']:.1f} GB" for name, row in encoders.items())
    return f"{accelerator.free_host_bytes() / 1e9:.0f} GB of host memory free; of each card: {told['reason']}{placed}"


def _check_prefect(_: Config) -> str:
    from flows import server

    return server.describe()


def _check_ray(config: Config) -> str:
    from flows.reaper import guard
    from stages import cluster

    with guard(), cluster.connect(config.cluster):
        gpus, cpus = cluster.gpus(), cluster.cpus()
        cluster.encoding_nodes(config.cluster)
    if gpus and gpus < max(config.cluster.workers, config.cluster.encoders or 1):
        raise SetupError(f"{gpus} GPUs are there: set cluster.workers and cluster.encoders to that many at most")
    return f"{gpus} GPUs, {cpus} cores" + ("" if gpus else "; without a GPU only small models train in reasonable time")


def _bar(name: str) -> Any:
    return lambda done, total: progress.show(name, done, total)


def _model(config: Config, parts: Sequence[str] = DATA_PARTS) -> ModelFolder:
    from flux2_core.model.folder import resolve

    return resolve(config.model, parts=parts)


TRUST = option(
    "--trust-nothing", "read every picture again, those too that the cache knows by size and time", action="store_true"
)
VERBS = {
    "plan": Verb(
        "what would run: what is kept, left out and odd, rows, bytes, time, memory; loads no model, writes nothing",
        plan,
        wording.plan,
        arguments=(TRUST,),
    ),
    "cache": Verb(
        "index, then encode every text and picture that is not cached yet",
        cache,
        wording.cache,
        arguments=(TRUST,),
        guarded=True,
    ),
    "train": Verb("train from the caches alone", train, wording.trained, guarded=True),
    "run": Verb("everything: the Prefect flow cache-and-train", run, wording.trained, arguments=(TRUST,), guarded=True),
    "sample": Verb(
        "draw pictures with the trained LoRA",
        sample,
        wording.sample,
        arguments=(
            option(
                "--prompt",
                "what to draw (repeat for more); default: validate.prompts",
                action="append",
                metavar="PROMPTS",
            ),
            option("--lora", "a LoRA file; default: the run's own. `none` draws the base model"),
            option("--out", "folder for the pictures; default: samples/ in the run's folder"),
        ),
        guarded=True,
    ),
    "show": Verb(
        "write the exact tensors that training sees for one sample",
        show,
        wording.show,
        arguments=(
            option("sample", "the picture's path in its folder, without extension", metavar="SAMPLE_ID"),
            option("--out", "where to write the tensors", required=True, metavar="FILE.safetensors"),
        ),
    ),
    "verify": Verb(
        "checksums and coverage of the cached rows; some of them encoded again and compared",
        verify,
        wording.verify,
        arguments=(
            option("--rows", "rows of each table to encode again; 0: none (default: %(default)s)", type=int, default=4),
            option("--drop", "drop corrupt rows, for `cache` to write them again", action="store_true"),
        ),
    ),
    "stat": Verb("what the cache holds", stat, wording.stat),
    "gc": Verb(
        "drop what no kept run needs, and compact the rest",
        gc,
        wording.gc,
        arguments=(
            option("--keep-days", "age of what is never dropped (default: %(default)s)", type=float, default=7.0),
            option("--dry-run", "say what would go, change nothing", action="store_true"),
        ),
    ),
    "check": Verb("the environment: GPUs, Ray, storage rights, model access", check, wording.check),
    **MOVING,
}
