"""Length of a training: the order of its samples, the steps that its epochs come to, and when an interval is over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flux2_core.config.dataset import Data, uncovered
from flux2_core.config.reading import parse
from flux2_core.config.section import EPOCH
from flux2_core.config.sections import MOST_STEPS, Config
from flux2_core.errors import DataError, UsageError
from flux2_core.store import parquet, schemas
from flux2_core.train import optimizers
from flux2_core.train.order import Curriculum, Numbers, Order

NO_SIDE = -1  # of a reference that a sample does not have


def settled(config: Config, samples: pa.Table) -> Config:
    """The configuration with the steps that `train.epochs` come to, where it says so; without samples as it is.

    Raises:
        UsageError: it says steps too, and others; or they are none, too many, or not what the rest of it allows.
    """
    train, rows = config.train, of_split(samples, schemas.TRAIN)
    if train.epochs is None or not rows:
        return config
    gap = uncovered(config.data, MOST_STEPS)
    steps = curriculum(config, rows, until=MOST_STEPS if gap is None else gap - 1).steps(train.epochs)
    told = f"train.epochs={train.epochs} of these {len(rows)} samples at train.batch_size={train.batch_size}"
    if not 0 < steps <= MOST_STEPS:
        raise UsageError(f"{told} are {steps} steps, and 1 to {MOST_STEPS} are allowed: set train.steps instead")
    if train.steps not in (0, steps):
        raise UsageError(
            f"{told} are {steps} steps, and train.steps={train.steps}: leave one of them out (train.steps=0 does); a "
            "run that was begun with other samples goes on with those, or anew with run=NAME"
        )
    tree = config.model_dump(mode="json", by_alias=True)
    made = parse(tree | {"train": tree["train"] | {"steps": steps}}, source=told)
    optimizers.pace(made.train)
    return made


def passed(every: int | str, step: int, *, batch_size: int, order: Curriculum) -> int:
    """How many intervals of so many steps, of an epoch or of so many samples are over after `step` steps."""
    if every == EPOCH:
        return order.epoch(step)
    if isinstance(every, str):
        return step * batch_size // int(every.split()[0])
    return step // every


def of_split(samples: pa.Table, split: str) -> parquet.Rows:
    """The samples to train on, or those that are held out."""
    return parquet.Rows(samples, np.flatnonzero(pc.equal(samples.column(schemas.SPLIT), split).to_numpy()))


def curriculum(config: Config, rows: parquet.Rows, *, until: int) -> Curriculum:
    """The order of the samples in each part of the first `until` steps that draws from other data sets."""
    buckets, of = buckets_of(rows, config.data), rows.column(schemas.DATASET).to_numpy()
    train, repeats = config.train, rows.column(schemas.REPEATS).to_numpy()
    ends = {end for data in config.data if data.steps for end in (data.steps[0] - 1, data.steps[1])}
    orders = {}
    for start in {0} | {end for end in ends if end < until}:
        drawn = [place for place, data in enumerate(config.data) if _draws(data, start)]
        own = {bucket: places[np.isin(of[places], drawn)] for bucket, places in buckets.items()}
        if not any(map(len, own.values())):
            named = ", ".join(f"data.{place}" for place in drawn)
            raise DataError(f"no sample to train on from step {start + 1} on: none of {named} is left")
        orders[start] = Order(own, batch_size=train.batch_size, seed=train.seed, repeats=repeats)
    return Curriculum(orders)


def _draws(data: Data, step: int) -> bool:
    return data.steps is None or data.steps[0] <= step + 1 <= data.steps[1]


def buckets_of(rows: parquet.Rows, sets: Sequence[Data] = ()) -> dict[tuple[int, ...], Numbers]:
    """Places of samples by what a batch must share: the picture's sides, then each reference's, and, where they are
    dropped, how often, for they are dropped of a whole batch."""
    if not rows:
        raise DataError("no sample is left to train on: every picture is quarantined or held out")
    names = schemas.BUCKET_HEIGHT, schemas.BUCKET_WIDTH
    references = rows.column(schemas.REFERENCES)
    counts = pc.list_value_length(references).to_numpy()
    listed = [pc.struct_field(pc.list_flatten(references), name).to_numpy() for name in names]
    sides = np.full((len(rows), 2 * (1 + counts.max())), NO_SIDE)
    sides[:, 0], sides[:, 1] = (rows.column(name).to_numpy() for name in names)
    owner, first = np.repeat(np.arange(len(rows)), counts), np.cumsum(counts) - counts
    nth = np.arange(len(owner)) - first[owner]
    for place, each in enumerate(listed):
        sides[owner, 2 * (1 + nth) + place] = each
    if any(data.drop_references for data in sets):
        millionths = np.array([round(data.drop_references * 1e6) or NO_SIDE for data in sets])
        of = rows.column(schemas.DATASET).to_numpy()
        sides = np.column_stack([sides, np.where(counts > 0, millionths[of], NO_SIDE)])
    shapes, group = np.unique(sides, axis=0, return_inverse=True)
    order, ends = np.argsort(group.reshape(-1), kind="stable"), np.cumsum(np.bincount(group.reshape(-1)))
    keys = (tuple(int(side) for side in shape if side != NO_SIDE) for shape in shapes)
    return dict(zip(keys, np.split(order, ends[:-1]), strict=True))
