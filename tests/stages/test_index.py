"""The index stage: inspection over the cluster, and what is published after both tables are filled."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from flux2_core.cache import fingerprints
from flux2_core.cache.index import TableRef, latents_uri, text_uri
from flux2_core.config.sections import Config
from flux2_core.data.intake import SamplePlan
from flux2_core.errors import DataError
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.plan import describe, rates
from flux2_core.plan import survey as plan_survey
from flux2_core.plan.rates import Rate
from flux2_core.run.folder import RunFolder
from flux2_core.store import parquet, schemas
from flux2_core.store.table import Table
from stages import cluster, index
from stages.fill import Filled
from tests.in_process import PARTS

Make = Callable[..., Config]
RATE = Rate("H200", 6, 600, 2.0, "2026-01-01")


def filled(config: Config, model: ModelFolder, failed: dict[str, str], rate: Rate | None) -> tuple[Filled, Filled]:
    """Two empty tables, as if their rows had been encoded."""
    made = []
    for kind, fingerprint, uri_of in (
        (schemas.KIND_TEXT, fingerprints.text_fingerprint(model, config), text_uri),
        (schemas.KIND_LATENTS, fingerprints.latents_fingerprint(model, config), latents_uri),
    ):
        table = Table.open_or_create(uri_of(config, fingerprint), kind=kind, fingerprint=fingerprint)
        made.append(Filled(TableRef(table.uri, table.version, fingerprint), 6, 0, failed, rate))
    return made[0], made[1]


def survey(config: Config) -> tuple[ModelFolder, SamplePlan]:
    model = resolve(config.model, parts=PARTS)
    return model, plan_survey.survey(config, model)


def test_publishing_remembers_what_encoding_took(make_config: Make) -> None:
    """Rates of both tables are in the cache after an index was published, and `plan` finds them there."""
    config = make_config()
    model, planned = survey(config)
    text, latents = filled(config, model, {}, RATE)
    index.publish(config, planned, text=text, latents=latents)
    assert rates.newest(config.output.cache, text.table.fingerprint) == RATE
    assert describe.describe(config, model, planned)["time"]["latents"]["device"] == "H200"


def test_a_picture_that_failed_late_is_quarantined(make_config: Make) -> None:
    """A row that could not be encoded takes its sample out of the published table, into the run's quarantine."""
    config = make_config(max_quarantined=0.2)
    model, planned = survey(config)
    row = planned.samples.to_pylist()[2]
    text, latents = filled(config, model, {row["latent_key"]: "damaged picture"}, None)
    published = index.publish(config, planned, text=text, latents=latents)
    assert row["id"] not in parquet.read_parquet(published.samples).column("id").to_pylist()
    assert published.rows == planned.samples.num_rows - 1
    (left_out,) = parquet.read_parquet(str(RunFolder(config).quarantine)).to_pylist()
    assert (left_out["path"], left_out["reason"]) == (row["uri"], "damaged picture")
    assert rates.newest(config.output.cache, text.table.fingerprint) is None
    with pytest.raises(DataError, match=Path(row["uri"]).name):
        index.publish(config.model_copy(update={"max_quarantined": 0.0}), planned, text=text, latents=latents)


def test_a_refused_run_says_what_was_left_out(make_config: Make) -> None:
    """Where too much is quarantined the run is refused, and its quarantine table names every picture all the same."""
    config = make_config(max_quarantined=0.2)
    model, planned = survey(config)
    failed = {row["latent_key"]: "damaged picture" for row in planned.samples.to_pylist()[:3]}
    text, latents = filled(config, model, failed, None)
    with pytest.raises(DataError, match="3 of 6"):
        index.publish(config, planned, text=text, latents=latents)
    assert parquet.read_parquet(str(RunFolder(config).quarantine)).num_rows == 3


@pytest.mark.ray
@pytest.mark.usefixtures("ray_runtime")
def test_the_cluster_maps_in_order_and_within_bounds() -> None:
    """Results come in the order of items, which are drawn only as far ahead as tasks are in flight."""
    drawn: list[int] = []
    items = (drawn.append(number) or number**2 for number in range(1, 301))  # type: ignore[func-returns-value]
    results = index.over_cluster(math.isqrt, items)  # a function that no worker has to import anything for
    assert next(results) == 1
    assert len(drawn) <= index.FILES_PER_TASK * (2 * cluster.cpus() + 1)
    assert list(results) == list(range(2, 301))
